"The verbs of the shell: parsing in this process, everything else in real ones."
import json, shutil
from pathlib import Path

import pytest

from capsule_routing import commands
from capsule_routing.commands import Refused, _parse, above, capsule_evaluate, capsule_predict, capsule_train, one_of, run_verb, verb, verb_parser, whole
from conftest import TINY, ROOT

VERBS = [capsule_train, capsule_evaluate, capsule_predict]
WELL_KNOWN = ("--batch-size 128 --test-batch-size 1000 --epochs 1 --lr 0.001 --no-cuda --seed 1 --log-interval 10 "
              "--routing_iterations 3 --with_reconstruction").split()


def options(func):
    "Every option of a verb, with a value that it takes (None for a bare flag)"
    import inspect
    for k, p in inspect.signature(func).parameters.items():
        if p.default is inspect.Parameter.empty: continue
        rule = func.rules.get(k)
        if p.annotation is bool: yield k, None, True
        elif rule and rule.names: yield k, rule.names[-1], rule.names[-1]
        elif p.annotation is int: yield k, "3", 3
        elif p.annotation is float: yield k, "0.5", 0.5
        elif k == "decoder_widths": yield k, "16,32", "16,32"
        else: yield k, "some/where", "some/where"


CASES = [(f, k, text, want) for f in VERBS for k, text, want in options(f)]
WORDS = {capsule_train: [], capsule_evaluate: ["RUN"], capsule_predict: ["RUN", "a.png"]}


# -- parsing --

@pytest.mark.parametrize("func,name,text,want", CASES, ids=[f"{f.__name__}-{k}" for f, k, *_ in CASES])
def test_both_spellings_of_every_option(func, name, text, want):
    for spelled in {"--"+name, "--"+name.replace("_", "-")}:
        ways = [[spelled]] if text is None else [[spelled, text], [f"{spelled}={text}"]]
        for w in ways:
            assert _parse(func, WORDS[func]+w)[name] == want
            assert _parse(func, w+(["--"]+WORDS[func] if WORDS[func] else []))[name] == want


@pytest.mark.parametrize("func", VERBS, ids=lambda f: f.__name__)
def test_help_shows_hyphens_and_every_option(func):
    import re
    text = verb_parser(func).format_help()
    shown = set(re.findall(r"(?<![\w-])--[\w-]+", text))
    assert not [s for s in shown if "_" in s.split("=")[0]], shown
    assert {"--"+k.replace("_", "-") for _, k, *_ in CASES if _ is func} <= shown
    for line in text.splitlines(): assert "(default: False)" not in line and "(default: None)" not in line


def test_the_well_known_command_line():
    assert _parse(capsule_train, WELL_KNOWN) == dict(batch_size=128, test_batch_size=1000, epochs=1, lr=0.001, no_cuda=True, seed=1,
                                                     log_interval=10, routing_iterations=3, with_reconstruction=True)


def test_the_well_known_defaults():
    import inspect
    got = {k: p.default for k, p in inspect.signature(capsule_train).parameters.items()}
    want = dict(batch_size=128, test_batch_size=1000, epochs=250, lr=0.001, no_cuda=False, seed=1, log_interval=10,
                routing_iterations=3, with_reconstruction=False)
    assert {k: got[k] for k in want} == want


def test_every_option_is_explained():
    from fastcore.docments import docments
    import inspect
    for f in VERBS:
        docs = docments(inspect.unwrap(f))
        for k in inspect.signature(f).parameters: assert docs.get(k), (f.__name__, k)


@pytest.mark.parametrize("args,line", [
    (["--lr", "-1"], "capsule_train: --lr -1: must be a number above 0"),
    (["--lr=-1e-3"], "capsule_train: --lr -1e-3: must be a number above 0"),
    (["--lr", "-1e-3"], "capsule_train: --lr -1e-3: must be a number above 0"),
    (["--lr", "-inf"], "capsule_train: --lr -inf: must be a number above 0"),
    (["--lr", "nan"], "capsule_train: --lr nan: must be a number above 0"),
    (["--lr", "fast"], "capsule_train: --lr fast: must be a number above 0"),
    (["--lr"], "capsule_train: --lr: needs a value"),
    (["--lr="], "capsule_train: --lr: needs a value"),
    (["--lr", "--resume"], "capsule_train: --lr: needs a value"),
    (["--epochs", "0"], "capsule_train: --epochs 0: must be a whole number, 1 or more"),
    (["--epochs", "1.5"], "capsule_train: --epochs 1.5: must be a whole number, 1 or more"),
    (["--epochs", "1e3"], "capsule_train: --epochs 1e3: must be a whole number"),
    (["--batch_size", "-4"], "capsule_train: --batch-size -4: must be a whole number"),
    (["--limit", "0"], "capsule_train: --limit 0: must be"),
    (["--seed", "-1"], "capsule_train: --seed -1: must be"),
    (["--routing_iterations", "0"], "capsule_train: --routing-iterations 0: must be"),
    (["--precision", "fp23"], "capsule_train: --precision fp23: must be one of auto, fp32, bf16; did you mean fp32?"),
    (["--dataset", "minst"], "did you mean mnist?"),
    (["--schedule", "papers"], "did you mean paper?"),
    (["--epoch", "3"], "capsule_train: --epoch: no such option; did you mean --epochs?"),
    (["--learning-rate", "3"], "capsule_train: --learning-rate: no such option"),
    (["-lr", "3"], "did you mean --lr?"),
    (["--no_cud"], "did you mean --no-cuda?"),
    (["--resume=yes"], "capsule_train: --resume=yes: --resume takes no value"),
    (["now"], "capsule_train: now: unexpected"),
    (["--decoder-widths", "a,b"], "capsule_train: --decoder-widths a,b: must be"),
    (["--checkpoint-minutes", "0"], "capsule_train: --checkpoint-minutes 0: must be"),
])
def test_bad_options_are_one_line(args, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_verb(capsule_train, args) == 2
    out, err = capsys.readouterr()
    assert line in err and err.count("\n") == 1 and out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("func,line", [(capsule_evaluate, "capsule_evaluate: RUN: is missing"), (capsule_predict, "capsule_predict: RUN: is missing")])
def test_missing_words(func, line, capsys):
    assert run_verb(func, []) == 2
    assert capsys.readouterr().err.strip() == line


def test_python_callers_get_errors_that_name_the_value():
    with pytest.raises(ValueError, match="lr=-1: must be a number above 0"): capsule_train(lr=-1)
    with pytest.raises(ValueError, match="epochs='3': must be a whole number"): capsule_train(epochs="3")
    with pytest.raises(ValueError, match="did you mean bf16"): capsule_train(precision="bf61")
    with pytest.raises(TypeError, match="unexpected keyword"): capsule_train(learning_rate=1)


def test_only_what_was_given_is_given():
    @verb(n=whole())
    def f(
        n:int=3, # A number
        quiet:bool=False, # A flag
    ): return n, quiet, commands.given()
    assert f() == (3, False, frozenset())
    assert f(n=3) == (3, False, {"n"})
    assert _parse(f, []) == {} and _parse(f, ["--n=3"]) == {"n": 3}
    assert commands.given() == frozenset()


# -- what goes wrong inside a verb --

def failing(error):
    @verb()
    def f(lr:float=1.): # A rate
        raise error
    return f

@pytest.mark.parametrize("error,code,line", [
    (Refused("must be better", "lr", 3), 2, "f: --lr 3: must be better\n"),
    (FileNotFoundError(2, "No such file or directory", "a/b"), 2, "f: a/b: No such file or directory\n"),
    (OSError("two\nlines"), 2, "f: two lines\n"),
    (MemoryError(), 2, "f: out of memory: try a smaller --batch-size or --test-batch-size\n"),
    (KeyboardInterrupt("stopped; to go on: capsule_train --resume"), 130, "f: stopped; to go on: capsule_train --resume\n"),
    (KeyboardInterrupt(), 130, "f: interrupted\n"),
])
def test_errors_of_a_verb(error, code, line, capsys):
    assert run_verb(failing(error), []) == code
    assert capsys.readouterr().err == line


def test_a_mistake_of_ours_keeps_its_traceback():
    for e in (RuntimeError("a bug"), KeyError("x"), AssertionError(), ZeroDivisionError()):
        with pytest.raises(type(e)): run_verb(failing(e), [])


def test_debug_shows_the_traceback(capsys, monkeypatch):
    monkeypatch.setenv("CAPSULE_ROUTING_DEBUG", "1")
    assert run_verb(failing(OSError("no")), []) == 2
    assert "Traceback" in capsys.readouterr().err


# -- start-up --

@pytest.mark.parametrize("name", [f.__name__ for f in VERBS])
def test_help_loads_no_torch(name, cmd_env, tmp_path):
    import subprocess, sys
    code = f"import sys; sys.argv=['{name}', '--help']\ntry:\n  from capsule_routing.commands import {name}; {name}()\nfinally: print(sorted({{'torch','torchvision','matplotlib','numpy','IPython','PIL','tqdm'}} & set(sys.modules)))"
    script = tmp_path/"s.py"
    script.write_text(code)
    p = subprocess.run([sys.executable, script], env=cmd_env, capture_output=True, text=True, timeout=60)
    assert p.stdout.splitlines()[-1] == "[]", p.stdout+p.stderr
    assert "--help" in p.stdout and p.stderr == ""
