"The verbs of the shell: parsing in this process, everything else in real ones."
import re, inspect, json, os, shutil, sys, time

import click, pytest

from capsule_routing import commands
from capsule_routing.checks import BadValue
from capsule_routing.commands import _parse, capsule_bench, capsule_evaluate, capsule_explore, capsule_export, capsule_predict, capsule_reproduce, capsule_train, command, run_verb, verb
from conftest import TINY

VERBS = [capsule_export, capsule_train, capsule_evaluate, capsule_predict, capsule_explore, capsule_bench, capsule_reproduce]
WELL_KNOWN = ("--batch-size 128 --test-batch-size 1000 --epochs 1 --lr 0.001 --no-cuda --seed 1 --log-interval 10 "
              "--routing_iterations 3 --with_reconstruction").split()
VALUES = dict(decoder_widths=("16,32", (16, 32)), layers=("32x16,4x8", ((32, 16), (4, 8))), parts=("step,Epoch-Compiled", ("step", "epoch_compiled")),
              rows=("r1,r3", ("r1", "r3")), seeds=("1,2", (1, 2)), import_=("my.module", ("my.module",)), augment=("shift,Flip", ("shift", "flip")))


def options(func):
    "Every option of a verb, with a value that it takes (None for a bare flag)"
    for k, p in inspect.signature(func).parameters.items():
        t = func.types[k]
        if p.kind is not p.KEYWORD_ONLY: continue
        if p.annotation is bool: yield k, None, True
        elif k in VALUES: yield k, *VALUES[k]
        elif isinstance(t, click.Choice): yield k, t.choices[-1].replace("_", "-").upper(), t.choices[-1]
        elif p.annotation is dict: yield k, '{"a": 1}', dict(a=1)
        elif p.annotation is int: yield k, "3", 3
        elif p.annotation is float: yield k, "0.5", 0.5
        else: where = "where"+(getattr(t, "endings", ()) or ("",))[0]; yield k, where, where


CASES = [(f, k, text, want) for f in VERBS for k, text, want in options(f)]
WORDS = {capsule_export: ["RUN"], capsule_train: [], capsule_bench: [], capsule_evaluate: ["RUN"], capsule_explore: ["RUN"], capsule_predict: ["RUN", "a.png"], capsule_reproduce: ["table1"]}


# -- parsing --

@pytest.mark.parametrize("func,name,text,want", CASES, ids=[f"{f.__name__}-{k}" for f, k, *_ in CASES])
def test_both_spellings_of_every_option(func, name, text, want):
    name, key = name.rstrip("_"), name
    for spelled in {"--"+name, "--"+name.replace("_", "-")}:
        ways = [[spelled]] if text is None else [[spelled, text], [f"{spelled}={text}"]]
        for w in ways:
            assert _parse(func, WORDS[func]+w)[key] == want
            assert _parse(func, w+(["--"]+WORDS[func] if WORDS[func] else []))[key] == want


@pytest.mark.parametrize("func", VERBS, ids=lambda f: f.__name__)
def test_help_shows_hyphens_and_every_option(func, capsys):
    import re
    assert run_verb(func, ["--help"]) == 0
    text = capsys.readouterr().out
    shown = set(re.findall(r"(?<![\w-])--[\w-]+", text))
    assert not [s for s in shown if "_" in s.split("=")[0]], shown
    assert {"--"+k.rstrip("_").replace("_", "-") for f, k, *_ in CASES if f is func} <= shown
    flat = " ".join(text.split())
    assert "False" not in flat and "None" not in flat and func.__doc__ in flat and f"Example: {func.__name__}" in flat
    for k, p in inspect.signature(func).parameters.items(): assert p.kind is p.KEYWORD_ONLY or f"{k.upper()}: " in text


def test_the_well_known_command_line():
    assert _parse(capsule_train, WELL_KNOWN) == dict(batch_size=128, test_batch_size=1000, epochs=1, lr=0.001, no_cuda=True, seed=1,
                                                     log_interval=10, routing_iterations=3, with_reconstruction=True)


def test_the_well_known_defaults():
    got = {k: p.default for k, p in inspect.signature(capsule_train).parameters.items()}
    want = dict(batch_size=128, test_batch_size=1000, epochs=250, lr=0.001, no_cuda=False, seed=1, log_interval=10,
                routing_iterations=3, with_reconstruction=False)
    assert {k: got[k] for k in want} == want


def test_every_option_is_explained():
    for f in VERBS:
        for p in command(f).params:
            assert isinstance(p, click.Argument) or (p.help and p.help.strip()), (f.__name__, p.name)


@pytest.mark.parametrize("args,line", [
    (["--lr", "-1"], "--lr -1.0: must be a number above 0"),
    (["--lr=-1e-3"], "--lr -0.001: must be a number above 0"),
    (["--lr", "-inf"], "--lr -inf: must be a number above 0"),
    (["--lr", "nan"], "--lr nan: must be a number above 0"),
    (["--lr", "fast"], "--lr: 'fast' is not a valid float"),
    (["--lr"], "'--lr' requires an argument"),
    (["--lr="], "--lr: '' is not a valid float"),
    (["--out", "--resume"], "--out: needs a value"),
    (["--folder="], "--folder: needs a value"),
    (["--epochs", "0"], "--epochs: 0 is not in the range x>=1"),
    (["--epochs", "1.5"], "--epochs: '1.5' is not a valid integer"),
    (["--epochs", "1e3"], "--epochs: '1e3' is not a valid integer"),
    (["--batch_size", "-4"], "--batch-size: -4 is not in the range"),
    (["--limit", "0"], "--limit: 0 is not in the range"),
    (["--seed", "-1"], "--seed: -1 is not in the range"),
    (["--routing_iterations", "0"], "--routing-iterations: 0 is not in the range"),
    (["--precision", "fp23"], "--precision: 'fp23' is not one of 'auto', 'fp32', 'bf16'"),
    (["--dataset", "minst"], "--dataset: 'minst' is not one of 'mnist', "),
    (["--epoch", "3"], "--epochs"),
    (["--learning-rate", "3"], "o such option"),
    (["--no_cud"], "--no-cuda"),
    (["--resume=yes"], "--resume"),
    (["now"], "(now)"),
    (["--decoder-widths", "a,b"], "--decoder-widths: 'a' is not a valid integer"),
    (["--layers", "8"], "--layers "),
    (["--routing-options", "[1]"], '--routing-options: [1] is not an object like {"n_iters": 2}'),
    (["--import", "no_such_module"], "--import no_such_module: can't be imported: "),
    (["--checkpoint-minutes", "0"], "--checkpoint-minutes 0.0: must be"),
    (["--checkpoint_steps", "0"], "--checkpoint-steps: 0 is not in the range"),
    (["--warmup", "-1"], "--warmup: -1 is not in the range x>=0"),
    (["--average", "1"], "--average 1.0: must be a number from 0 to below 1"),
    (["--decay-steps", "0"], "--decay-steps: 0 is not in the range x>=1"),
])
def test_bad_options_are_one_line(args, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "--layers" in args: args = [*args, "--dataset", "glyphs"]
    assert run_verb(capsule_train, args) == 2
    out, err = capsys.readouterr()
    assert err.startswith("capsule_train: ") and line in err and err.count("\n") == 1 and out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("func,line", [(capsule_evaluate, "capsule_evaluate: RUN: is missing"), (capsule_predict, "capsule_predict: IMAGES: needs at least one file")])
def test_missing_words(func, line, capsys):
    assert run_verb(func, []) == 2
    assert capsys.readouterr().err.strip() == line


def test_python_callers_get_errors_that_name_the_value():
    with pytest.raises(ValueError, match="lr=-1: must be a number above 0"): capsule_train(lr=-1)
    with pytest.raises(ValueError, match="epochs=1.5: must be a whole number"): capsule_train(epochs=1.5)
    with pytest.raises(ValueError, match="precision='bf61': 'bf61' is not one of 'auto', 'fp32', 'bf16'"): capsule_train(precision="bf61")
    with pytest.raises(TypeError, match="unexpected keyword"): capsule_train(learning_rate=1)


def test_only_what_was_given_is_given():
    @verb("f --n 3", {})
    def f(*,
        n:int=3, # A number
        quiet:bool=False, # A flag
    ): return n, quiet, commands.given()
    assert f() == (3, False, frozenset())
    assert f(n=3) == f(n="3") == (3, False, {"n"})
    assert _parse(f, []) == {} and _parse(f, ["--n=3"]) == {"n": 3}
    assert commands.given() == frozenset()


# -- what goes wrong inside a verb --

def failing(error):
    @verb("f --lr 1", {})
    def f(*, lr:float=1.): # A rate
        raise error
    return f

@pytest.mark.parametrize("error,code,line", [
    (BadValue("lr", 3, "must be better"), 2, "f: --lr 3: must be better\n"),
    (FileNotFoundError(2, "No such file or directory", "a/b"), 2, "f: a/b: No such file or directory\n"),
    (OSError("two\nlines"), 2, "f: two lines\n"),
    (MemoryError(), 2, "f: out of memory\n"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 2, "f: out of memory\n"),
    (RuntimeError("could not create a primitive"), 2, "f: out of memory\n"),
    (BadValue("n_types", 0, "must be at least 1"), 2, "f: n_types=0: must be at least 1\n"),
    (KeyboardInterrupt("stopped; to go on: capsule_train --resume"), 130, "f: stopped; to go on: capsule_train --resume\n"),
    (KeyboardInterrupt(), 130, "f: interrupted\n"),
])
def test_errors_of_a_verb(error, code, line, capsys):
    assert run_verb(failing(error), []) == code
    assert capsys.readouterr().err == line


def test_out_of_memory_names_the_options_that_help(capsys):
    @verb("f", {})
    def f(*, batch_size:int=8): # Images
        raise MemoryError
    assert run_verb(f, []) == 2
    assert capsys.readouterr().err == "f: out of memory: try a smaller --batch-size\n"


def test_of_several_processes_the_first_speaks(capsys, monkeypatch):
    from capsule_routing.callbacks import PeerLost
    for k,v in dict(LOCAL_RANK="1", RANK="1", WORLD_SIZE="2").items(): monkeypatch.setenv(k, v)
    assert run_verb(failing(BadValue("lr", 3, "must be better")), []) == 2 and run_verb(failing(KeyboardInterrupt()), []) == 130
    assert capsys.readouterr().err == ""
    assert run_verb(failing(PeerLost("process 1 of 2 lost another process")), []) == 2 and run_verb(failing(MemoryError()), []) == 2
    assert capsys.readouterr().err.count("\n") == 2
    with pytest.raises(KeyError): run_verb(failing(KeyError("x")), [])


def test_a_mistake_of_ours_keeps_its_traceback():
    for e in (RuntimeError("a bug"), KeyError("x"), AssertionError(), ZeroDivisionError()):
        with pytest.raises(type(e)): run_verb(failing(e), [])


def test_debug_shows_the_traceback(capsys, monkeypatch):
    monkeypatch.setenv("CAPSULE_ROUTING_DEBUG", "1")
    assert run_verb(failing(OSError("no")), []) == 2
    assert "Traceback" in capsys.readouterr().err


# -- start-up --

HEAVY = ("torch", "torchvision", "matplotlib", "numpy", "IPython", "PIL", "tqdm", "ipywidgets")

@pytest.mark.parametrize("name", [f.__name__ for f in VERBS])
def test_help_loads_no_torch(name, cmd_env, tmp_path):
    import subprocess
    code = (f"import sys\nfrom capsule_routing.commands import {name}\nassert {name}.main(['--help']) == 0\n"
            f"assert {name}.main(['--no-such-option']) == 2\nprint(sorted(set({HEAVY}) & set(sys.modules)))")
    p = subprocess.run([sys.executable, "-c", code], env=cmd_env, capture_output=True, text=True, timeout=60)
    assert p.stdout.splitlines()[-1] == "[]", p.stdout+p.stderr
    assert "--help" in p.stdout and p.stderr.count("\n") == 1


def test_help_takes_little_longer_than_click_itself(cmd_env):
    "Turn about, the quickest of five; half a second on a machine with nothing else to do"
    import subprocess
    def seconds(code):
        t = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], env=cmd_env, capture_output=True, check=True, timeout=60)
        return time.perf_counter()-t
    ours = "from capsule_routing.commands import capsule_train; capsule_train.main(['--help'])"
    bare = "import click, fastcore.docments"
    best = [min(s) for s in zip(*[(seconds(ours), seconds(bare)) for _ in range(5)])]
    assert best[0] < 3*best[1], best


def test_the_package_is_light_and_lazy(cmd_env):
    import subprocess
    code = f"""import sys, capsule_routing
assert not set({HEAVY}) & set(sys.modules)
from capsule_routing.capsnet import CapsNet
assert "matplotlib" not in sys.modules
assert capsule_routing.CapsNet is CapsNet and callable(capsule_routing.CapsuleExplorer) and callable(capsule_routing.lengths_figure)
from capsule_routing.all import *
import capsule_routing.all
for name in capsule_routing.all.__all__:
    assert name in globals() and (getattr(capsule_routing, name) is globals()[name] or name in ("squash", "routing")), name
try: capsule_routing.CapsNot
except AttributeError as e: assert "CapsNot" in str(e)
else: assert False
print("fine")"""
    p = subprocess.run([sys.executable, "-c", code], env=cmd_env, capture_output=True, text=True, timeout=120)
    assert p.stdout.strip() == "fine", p.stderr


@pytest.mark.parametrize("how", ["ascii", "latin-1"])
def test_a_terminal_without_the_characters(trained, run_cmd, seven, how):
    p = run_cmd("capsule_predict", trained.path, seven, "--out", trained.path.parent/f"{how}.png", env=dict(PYTHONIOENCODING=how))
    assert p.returncode == 0 and p.stderr == "" and "?" in p.stdout, p.stderr


def test_a_closed_output(trained, cmd_env, seven):
    import subprocess
    from conftest import command_line
    line = " ".join(map(str, command_line("capsule_predict", trained.path, seven, "--out", trained.path.parent/"closed.png")[-4:]))
    code = "import sys; from capsule_routing.commands import capsule_predict; sys.exit(capsule_predict.main())"
    for end, code_ in (("| true", 141), (">&-", 0)):
        p = subprocess.run(["bash", "-c", f'"$0" -c "$1" {line} {end}; exit ${{PIPESTATUS[0]}}', sys.executable, code], env=cmd_env,
                           capture_output=True, text=True, timeout=120)
        assert p.returncode in (0, code_) and p.stderr == "", (p.returncode, p.stderr)


# -- a routing of one's own --

MINE = """
from capsule_routing.layers import DynamicRouting
from capsule_routing.registry import routing, trunk
from torch import nn

@routing("mine")
class Mine(DynamicRouting): pass

@trunk("plain")
class Plain(nn.Conv2d):
    def __init__(self, in_channels, channels=4): super().__init__(in_channels, channels, 5, 2)
"""


@pytest.mark.slow
def test_a_routing_and_a_trunk_of_ones_own(run_cmd, image_folder, tmp_path, seven):
    "Trained, gone on with and evaluated where its module is imported; refused in one line where it is not: a run folder imports nothing"
    (tmp_path/"my_routing.py").write_text(MINE)
    own = ["--routing", "mine", "--trunk", "plain", "--trunk-options", '{"channels": 6}', "--layers", "3x4", "--kernel", "5"]
    start = [*folder_settings(image_folder)[:-2], "--test-folder", image_folder/"test", *own]
    one_line(run_cmd("capsule_train", *start, "--out", "run", cwd=tmp_path), "--routing mine: ", "--import MODULE")
    p = no_traceback(run_cmd("capsule_train", *start, "--import", "my_routing", "--out", "run", cwd=tmp_path))
    assert p.returncode == 0, p.stderr
    assert " --import my_routing" in next(l for l in p.stdout.splitlines() if l.startswith("repeat"))
    config = json.loads((tmp_path/"run"/"config.json").read_text())
    net = config["network"]
    assert (net["routing"], net["trunk"], net["trunk_options"], net["layers"]) == ("mine", "plain", {"channels": 6}, [[3, 4]])
    for args in (["capsule_train", "--resume", "--out", "run", "--epochs", 2], ["capsule_evaluate", "run"], ["capsule_predict", "run", seven]):
        one_line(run_cmd(*args, cwd=tmp_path), "mine", "--import MODULE")
        q = no_traceback(run_cmd(*args, "--import", "my_routing", cwd=tmp_path))
        assert q.returncode == 0, q.stderr
    history = json.loads((tmp_path/"run"/"history.json").read_text())
    assert len(history) == 2
    one_line(run_cmd("capsule_train", "--resume", "--out", "run", "--import", "my_routing", "--layers", "4x4", cwd=tmp_path), "--layers", "3x4")


def test_patience(run_cmd, tmp_path, image_folder):
    p = run_cmd("capsule_train", *folder_settings(image_folder, "--epochs", 30, "--lr", 1e-9, "--shift", 0, "--patience", 2, "--out", tmp_path/"run"))
    assert p.returncode == 0, p.stderr
    assert len(json.loads((tmp_path/"run"/"history.json").read_text())) < 30


# -- end to end, in real processes --

def no_traceback(p):
    assert "Traceback" not in p.stderr and "Error" not in p.stderr, p.stderr
    return p


def one_line(p, *parts):
    "Exit code 2 and exactly one line on stderr, with all the parts"
    assert p.returncode == 2, (p.returncode, p.stdout, p.stderr)
    lines = p.stderr.splitlines()
    assert len(lines) == 1 and all(x in lines[0] for x in parts), p.stderr


def test_train_says_what_it_did(trained):
    out, r = trained.stdout, json.loads((trained.path/"history.json").read_text())[-1]
    acc = f"{100*(1-r['test_errors']/r['test_n']):.2f}%"
    assert f"epoch 1/1: folder test accuracy {acc}, {r['test_errors']:,} errors of {r['test_n']:,}, test loss" in out
    assert f"accuracy  {acc} on folder, {r['test_errors']:,} errors of {r['test_n']:,} test images" in out
    for word in (" images/s", " s training", " GB at most", "cpu", "run       tiny", "repeat    capsule_train --dataset folder --folder ", "evaluate  capsule_evaluate tiny"):
        assert word in out, out
    assert trained.stderr == ""
    assert {"config.json", "history.json", "best.safetensors", "last.safetensors"} <= {p.name for p in trained.path.iterdir()}
    for line in out.splitlines():
        if "%" in line: assert "folder" in line, line


@pytest.mark.slow
def test_resume_evaluate_predict(own_run, run_cmd, seven):
    p = no_traceback(run_cmd("capsule_train", "--out", own_run, "--resume", "--epochs", 2))
    assert p.returncode == 0, p.stderr
    assert "epoch 2/2" in p.stdout and "epoch 1/2" not in p.stdout
    r = json.loads((own_run/"history.json").read_text())
    assert [h["epoch"] for h in r] == [1, 2]

    p = no_traceback(run_cmd("capsule_evaluate", own_run, "--json", "--out", own_run.parent/"pictures"))
    assert p.returncode == 0, p.stderr
    e = json.loads(p.stdout)
    assert (e["n"], e["n_errors"], e["data"]) == (r[-1]["test_n"], r[-1]["test_errors"], "folder")
    c = e["confusion"]
    assert sum(map(sum, c)) == e["n"] and e["n"]-sum(c[i][i] for i in range(3)) == e["n_errors"]
    from PIL import Image
    for name in ("confusion.png", "mistakes.png"):
        im = Image.open(own_run.parent/"pictures"/name)
        assert min(im.size) > 200 and len(im.convert("L").getcolors()) > 3
        assert not (own_run/name).exists()

    p = no_traceback(run_cmd("capsule_predict", own_run, seven, seven))
    assert p.returncode == 0, p.stderr
    lines = p.stdout.splitlines()
    assert re.fullmatch(re.escape(f"{seven}: ")+r"(\w+, length 0\..*|no class is there \(longest 0\.\d+\))", lines[0]) and [l.split()[0] for l in lines[1:4]] == ["one", "two", "zero"]
    lens = [float(l.split()[1]) for l in lines[1:4]]
    best = ["one", "two", "zero"][lens.index(max(lens))]
    assert lines[0].split(": ")[-1].startswith(f"{best}, length" if max(lens) >= 0.5 else "no class is there")
    assert Image.open(own_run/"prediction.png").size[0] > 300


@pytest.mark.slow
def test_glyphs_where_mnist_cannot_be_had(run_cmd, tmp_path):
    p = run_cmd("capsule_train", *"--limit 64 --epochs 2 --batch-size 32 --no-cuda".split(), *TINY, cwd=tmp_path)
    assert p.returncode == 0, p.stderr
    assert p.stderr == ""
    first = p.stdout.splitlines()[0]
    assert "MNIST is neither in" in first and "using glyphs" in first
    run = tmp_path/"runs"/"glyphs-1"
    config = json.loads((run/"config.json").read_text())
    assert config["data"]["name"] == "glyphs" and config["data"]["note"] == first and config["settings"]["dataset"] == "glyphs"
    q = run_cmd("capsule_evaluate", run, cwd=tmp_path)
    assert q.returncode == 0 and q.stdout.splitlines()[0] == first, (q.stdout, q.stderr)
    told = [l for l in (p.stdout+q.stdout).splitlines() if "%" in l or l.startswith(("accuracy", "best"))]
    assert len(told) >= 4 and all("glyphs" in l and "mnist" not in l.lower() for l in told), told


@pytest.mark.slow
def test_mnist_by_name_where_it_cannot_be_had(run_cmd, tmp_path):
    p = run_cmd("capsule_train", "--dataset", "mnist", "--data-dir", tmp_path/"d", *TINY, cwd=tmp_path)
    one_line(p, "capsule_train: MNIST: ", "--data-dir", "--dataset glyphs")
    assert not (tmp_path/"runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name,code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_stopped_by_a_signal_and_gone_on(start_cmd, run_cmd, image_folder, tmp_path, name, code):
    import signal
    p = start_cmd("capsule_train", *"--epochs 30000 --batch-size 8 --size 28 --channels 1 --no-cuda".split(), *TINY,
                  "--folder", image_folder/"train", "--out", tmp_path/"run")
    for line in p.stdout:
        if line.startswith("epoch 2/"): break
    p.send_signal(getattr(signal, name))
    out, err = p.communicate(timeout=120)
    assert p.returncode == code, (p.returncode, out, err)
    assert err.count("\n") == 1 and err.endswith(f"; go on with: capsule_train --resume --out {tmp_path/'run'}\n") and name in err, err
    done = json.loads((tmp_path/"run"/"history.json").read_text())[-1]["epoch"]
    q = no_traceback(run_cmd("capsule_train", "--out", tmp_path/"run", "--resume", "--epochs", done+1))
    assert q.returncode == 0 and f"epoch {done+1}/{done+1}: folder test accuracy" in q.stdout, (q.stdout, q.stderr)


@pytest.mark.slow
def test_the_printed_command_repeats_the_run(trained, run_cmd, tmp_path):
    import shlex
    line = next(l for l in trained.stdout.splitlines() if l.startswith("repeat"))
    verb, *args = shlex.split(line.removeprefix("repeat"))
    p = run_cmd(verb, *args, cwd=tmp_path)
    assert p.returncode == 0, p.stderr
    from capsule_routing.runs import load_run
    a, b = (load_run(r).net.state_dict() for r in (trained.path, tmp_path/"runs"/"folder-1"))
    assert all((a[k] == b[k]).all() for k in a)


def test_the_well_known_command_line_in_a_process(run_cmd, tmp_path):
    "Parsed as a whole by a real process: the only complaint is about the value that is wrong on purpose"
    one_line(run_cmd("capsule_train", *WELL_KNOWN, "--limit", "0", cwd=tmp_path), "capsule_train: --limit: 0 is not in the range")


# -- bad input, with a real run folder in reach: nothing is lost --

def folder_settings(image_folder, *more):
    return [*"--epochs 1 --batch-size 8 --size 28 --channels 1 --no-cuda --quiet".split(), *TINY, "--folder", image_folder/"train",
            "--test-folder", image_folder/"test", *more]


@pytest.fixture(scope="module")
def folder_run(image_folder, tmp_path_factory):
    "A run on the folder of images, made in this process"
    path = tmp_path_factory.mktemp("folder")/"run"
    assert run_verb(capsule_train, folder_settings(image_folder, "--out", path)) == 0
    return path


def spread(images):
    "Two trees that need an option more: images of three sizes, and one image for each class"
    from PIL import Image
    if (images/"few").exists(): return
    for c in ("one", "two"):
        for top in ("few", "sizes"): (images/top/c).mkdir(parents=True)
        im = Image.open(images/"test"/c/"10.png")
        im.save(images/"few"/c/"1.png")
        for k in (28, 30, 32): im.resize((k, k)).save(images/"sizes"/c/f"{k}.png")


def bad_inputs(t, run, images):
    "`(verb, arguments, parts of the line)`; `t` is a folder for odd files"
    (t/"file").write_text("x"); (t/"text.png").write_text("a note"); (t/"empty.png").touch(); (t/"empty").mkdir(exist_ok=True)
    (t/"norun").mkdir(exist_ok=True); (t/"norun"/"config.json").write_text("{}")
    F = folder_settings(images)
    def train(*a): return capsule_train, [*F, *a]
    def other(*a): return capsule_train, [*"--epochs 1 --no-cuda --quiet".split(), *TINY, *a]   # small, should it not be refused
    def resume(*a): return capsule_train, ["--out", run, "--resume", *a]
    for (f, a), *parts in [
        (train("--out", run), f"--out {run}: already holds a run; add --resume"),
        (train("--out", t/"file"), f"--out: {t/'file'} is a file, not a folder"),
        (train("--out", t/"file"/"x"), f"--out: {t/'file'} is a file, not a folder"),
        (train("--resume"), "--resume: needs --out RUN"),
        ((capsule_train, ["--resume", "--out", t/"nowhere"]), f"--out {t/'nowhere'}: no such run folder"),
        (train("--dataset", "mnist"), "is only for the data set folder"),
        (train("--folder", t/"nowhere"), f"--folder {t/'nowhere'}: no such folder"),
        (train("--folder", t/"file"), f"--folder {t/'file'}: must be a folder"),
        (train("--folder", t/"empty"), f"--folder {t/'empty'}: must hold one folder of images for each class"),
        (train("--test-folder", t/"nowhere"), f"--test-folder {t/'nowhere'}: no such folder"),
        (train("--size", "16"), "(1, 16, 16): height and width must be at least 17"),
        (train("--size", "0"), "--size: 0 is not in the range"),
        (other("--folder", images/"sizes"), "--size: images differ in size", "give a size"),
        (other("--folder", images/"few"), f"--folder {images/'few'}: too few images to hold some out; give a test folder"),
        ((capsule_bench, ["--parts", "step,rooting"]), "--parts: 'rooting' is not one of 'limits', 'script', "),
        ((capsule_bench, ["--parts", "step,"]), "--parts", "is not one of"),
        ((capsule_bench, ["--out", t/"file"]), "--out", "does not end in .json"),
        ((capsule_bench, ["--out", run/"config.json"]), f"--out {run/'config.json'}: is there already; choose another file"),
        ((capsule_bench, ["--out", t/"file"/"b.json"]), "--out", "is a file, not a folder"),
        ((capsule_bench, ["--n", "0"]), "--n: 0 is not in the range"),
        ((capsule_bench, ["--part", "step"]), "--parts"),
        (train("--channels", "2"), "--channels 2: must be one of 1, 3"),
        (train("--dataset", "folders"), "--dataset: 'folders' is not one of "),
        (other("--dataset", "folder"), "--dataset folder: needs a tree of images"),
        (other("--dataset", "glyphs", "--size", "32"), "--size 32: is only for the data set folder"),
        (other("--dataset", "mnist", "--data-dir", t/"file"), f"--data-dir {t/'file'}: must be a folder"),
        (resume("--lr", "0.5"), "--lr 0.5: the run was begun with 0.001"),
        (resume("--batch_size", "9"), "--batch-size 9: the run was begun with 8"),
        (resume("--primary-types", "3"), "--primary-types 3: the run was begun with 2"),
        (resume("--with_reconstruction"), "--with-reconstruction: the run was begun without it"),
        (resume("--limit", "3"), "--limit 3: the run was begun without it"),
        (resume("--dataset", "glyphs"), "--dataset glyphs: the run was begun with folder"),
        ((capsule_train, ["--out", t/"norun", "--resume"]), str(t/"norun")),
        ((capsule_evaluate, [t/"nowhere"]), f"{t/'nowhere'}: no such run folder"),
        ((capsule_evaluate, [t/"file"]), str(t/"file")),
        ((capsule_evaluate, [t/"empty"]), str(t/"empty")),
        ((capsule_evaluate, [run, "--weights", "bets"]), "--weights: 'bets' is not one of 'last', 'best'"),
        ((capsule_evaluate, [run, "--dataset", "glyphs"]), "--dataset glyphs: has class 9, the network knows 0 to 2"),
        ((capsule_evaluate, [run, "--folder", images/"test", "--channels", "3"]), f"--folder {images/'test'}: its images are (3, 28, 28), the network takes (1, 28, 28)"),
        ((capsule_evaluate, [run, "--folder", images/"odd"]), f"--folder {images/'odd'}: its classes are", "zero"),
        ((capsule_evaluate, [run, "--out", t/"file"]), f"--out: {t/'file'} is a file"),
        ((capsule_evaluate, [run, run]), "unexpected"),
        ((capsule_predict, [run]), "IMAGES: needs at least one file"),
        ((capsule_predict, [run, images/"one.png", t/"nowhere.png"]), f"{t/'nowhere.png'}: no such image file"),
        ((capsule_predict, [run, images/"one.png", t/"text.png"]), f"{t/'text.png'}: cannot be read as an image"),
        ((capsule_predict, [run, t/"empty.png", images/"one.png"]), f"{t/'empty.png'}: cannot be read as an image: the file is empty"),
        ((capsule_predict, [run, t]), f"{t}: must be an image file"),
        ((capsule_predict, [run, images/"one.png", "--out", t/"p.gif"]), "--out", "does not end in .png or .pdf or .svg"),
        ((capsule_predict, [run, images/"one.png", "--out", t/"file"/"p.png"]), "--out", "is a file, not a folder"),
        ((capsule_predict, [t/"nowhere", images/"one.png"]), f"{t/'nowhere'}: no such run folder"),
    ]: yield f, list(map(str, a)), parts


def test_bad_input_is_one_line_and_nothing_is_lost(folder_run, image_folder, tmp_path, capsys, monkeypatch, cmd_env):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAPSULE_ROUTING_DATA", cmd_env["CAPSULE_ROUTING_DATA"])
    shutil.copy(image_folder/"test"/"one"/"10.png", image_folder/"one.png")
    if not (image_folder/"odd").exists():
        for c in ("zero", "one", "three"): shutil.copytree(image_folder/"test"/c.replace("three", "two"), image_folder/"odd"/c)
    spread(image_folder)
    before, wrong = {p.name: p.read_bytes() for p in folder_run.iterdir()}, []
    for f, args, parts in bad_inputs(tmp_path, folder_run, image_folder):
        code = run_verb(f, args)
        out, err = capsys.readouterr()
        if code != 2 or out or err.count("\n") != 1 or not all(p in err for p in (f.__name__+": ", *parts)): wrong.append((f.__name__, args, parts, code, out, err))
    assert not wrong, "\n".join(f"{f} {parts}: {code} {out!r} {err!r}" for f, _, parts, code, out, err in wrong)
    assert {p.name: p.read_bytes() for p in folder_run.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "empty.png", "file", "norun", "text.png"]


def test_folder_run_evaluates_on_its_own_data_and_on_a_folder(folder_run, image_folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)   # the run knows where its images are, wherever the command is given
    assert run_verb(capsule_evaluate, [folder_run, "--out", tmp_path/"o"]) == 0
    assert "on folder, " in capsys.readouterr().out
    assert run_verb(capsule_evaluate, [folder_run, "--out", tmp_path/"o", "--folder", image_folder/"train", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 30    # all of the tree


def test_predict_inverts_and_hints(folder_run, image_folder, tmp_path, capsys):
    from PIL import Image, ImageOps
    light = next((image_folder/"test"/"two").glob("*.png"))
    dark = tmp_path/"dark.png"
    ImageOps.invert(Image.open(light)).save(dark)
    def look(*args):
        assert run_verb(capsule_predict, [folder_run, *args]) == 0
        return capsys.readouterr().out
    assert "--invert" not in look(light) and "try --invert" in look(dark) and "try --invert" not in look(dark, "--invert")
    strip = lambda s: s.split(": ", 1)[1]
    assert strip(look(light)) == strip(look(dark, "--invert"))
    assert "no reconstruction" in look(light) and not (folder_run/"prediction.png").exists()
    found = json.loads(look(light, "--json"))["predictions"][0]
    assert set(found["lengths"]) == {"zero", "one", "two"} and found["class"] in (None, max(found["lengths"], key=found["lengths"].get))


def test_spoilt_run_folders(own_run, seven, capsys):
    for name in ("config.json", "last.safetensors"):
        good = (own_run/name).read_bytes()
        for bad in (b"", good[:len(good)//2], b"\x80\x04K\x01."):
            (own_run/name).write_bytes(bad)
            assert run_verb(capsule_predict, [own_run, seven]) == 2
            out, err = capsys.readouterr()
            assert err.count("\n") == 1 and name in err and not out
        (own_run/name).write_bytes(good)


def test_runs_are_numbered_and_never_overwritten(image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2): assert run_verb(capsule_train, folder_settings(image_folder)) == 0
    assert sorted(p.name for p in (tmp_path/"runs").iterdir()) == ["folder-1", "folder-2"]
    capsys.readouterr()
    assert run_verb(capsule_train, ["--resume"]) == 2
    assert "the newest is runs/folder-2" in capsys.readouterr().err


def test_python_callers_give_one_image_or_several(folder_run, image_folder, capsys):
    some = sorted((image_folder/"test"/"two").glob("*.png"))[:2]
    assert [f["image"] for f in capsule_predict(folder_run, some[0])] == [str(some[0])]
    assert [f["image"] for f in capsule_predict(folder_run, some, json=True)] == list(map(str, some))
    with pytest.raises(ValueError, match="images"): capsule_predict(folder_run, [])
    with pytest.raises(TypeError): capsule_predict(folder_run, [3])


def test_held_out_images_are_the_same_when_evaluating(image_folder, tmp_path, capsys, monkeypatch):
    "Without a test tree the seed chooses what is held out: `capsule_evaluate` uses the run's"
    from capsule_routing import tasks, training
    seen = []
    real = tasks.evaluate
    for m in (tasks, training): monkeypatch.setattr(m, "evaluate", lambda net, ds, *a, **k: seen.append(ds.x.cpu()) or real(net, ds, *a, **k))
    def train(seed):
        settings = [*"--epochs 1 --batch-size 8 --size 28 --channels 1 --no-cuda --quiet --seed".split(), seed, *TINY]
        assert run_verb(capsule_train, [*settings, "--folder", image_folder/"train", "--out", tmp_path/str(seed)]) == 0
        assert run_verb(capsule_evaluate, [tmp_path/str(seed)]) == 0
        out = capsys.readouterr().out.splitlines()
        note = f"no test folder: 6 of the images of {image_folder/'train'} held out for testing, chosen by seed {seed}"
        assert out.count(note) == 2 and out[0] == note and not any("MNIST" in l or "glyphs" in l for l in out), out
        assert (seen[-2] == seen[-1]).all() and len(seen[-1]) == 6
        return seen[-1]
    assert not (train(3) == train(4)).all()


def test_checkpoints_by_steps(image_folder, tmp_path, capsys, monkeypatch):
    from capsule_routing import callbacks
    steps = []
    real = callbacks.write_checkpoint
    monkeypatch.setattr(callbacks, "write_checkpoint", lambda path, ck, *a: steps.append(ck.meta["global_step"]) or real(path, ck, *a))
    assert run_verb(capsule_train, folder_settings(image_folder, "--out", tmp_path/"run", "--checkpoint-steps", 2, "--decay-steps", 7)) == 0
    assert steps == [0, 2, 4]      # 30 images in batches of 8: the last is the epoch's
    config = json.loads((tmp_path/"run"/"config.json").read_text())
    assert config["training"]["checkpoint_steps"] == 2 and config["training"]["decay_steps"] == 7
    assert run_verb(capsule_train, ["--resume", "--out", tmp_path/"run", "--epochs", 2, "--checkpoint-steps", 1, "--quiet"]) == 0
    assert steps[3:] == [5, 6, 7, 8]
    capsys.readouterr()
    assert run_verb(capsule_train, ["--resume", "--out", tmp_path/"run", "--decay-steps", 9]) == 2
    assert "--decay-steps 9: the run was begun with 7" in capsys.readouterr().err


def torchrun():
    "The launcher beside this Python, or on the path"
    from pathlib import Path
    import sys
    t = Path(sys.executable).parent/"torchrun"
    return str(t) if t.exists() else shutil.which("torchrun")


@pytest.mark.slow
@pytest.mark.skipif(torchrun() is None or os.name == "nt", reason="needs torchrun and gloo")
def test_two_processes_of_torchrun(trained, cmd_env, tmp_path):
    "The figures of one process, said once, in one folder"
    import subprocess
    from conftest import command_line
    verb, *args = command_line("capsule_train", *trained.args)
    p = subprocess.run([torchrun(), "--standalone", "--nproc_per_node=2", "--no-python", verb, *args], cwd=tmp_path, env=cmd_env, timeout=240,
                       stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert p.returncode == 0, p.stdout+p.stderr
    lines = p.stdout.splitlines()
    for word in ("data ", "network ", "epoch 1/1", "accuracy ", "repeat "): assert sum(l.startswith(word) for l in lines) == 1, p.stdout
    assert any(l.startswith("device") and l.endswith("2 processes") for l in lines), p.stdout
    assert next(l for l in lines if l.startswith("repeat")).split()[1] == "torchrun"
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]
    one, two = (json.loads((r/"history.json").read_text()) for r in (trained.path, tmp_path/"tiny"))
    for a, b in zip(one, two, strict=True):
        assert (a["n"], a["test_n"], a["test_errors"]) == (b["n"], b["test_n"], b["test_errors"])
        for k in ("train_loss", "test_loss"): assert b[k] == pytest.approx(a[k], rel=1e-4)


@pytest.mark.slow
def test_bench(run_cmd, tmp_path):
    p = no_traceback(run_cmd("capsule_bench", *"--parts step --n 1 --batch_size 2 --no-cuda --threads 1 --out new/b.json".split(), *TINY, cwd=tmp_path))
    assert p.returncode == 0 and p.stderr == "", p.stderr
    res = json.loads((tmp_path/"new"/"b.json").read_text())
    assert res["command"] == "capsule_bench --parts step --n 1 --batch-size 2 --threads 1 --no-cuda "+" ".join(TINY)
    assert res["machine"]["threads"] == 1 and res["machine"]["kind"] == "cpu" and set(res)-{"step_bf16"} == {"command", "machine", "step"}   # bf16 too where the processor has it
    for stage in res["step"]["seconds"]: assert stage in p.stdout
    assert p.stdout.splitlines()[-1] == "file      new/b.json" and [f.name for f in (tmp_path/"new").iterdir()] == ["b.json"]
    one_line(run_cmd("capsule_bench", "--out", "new/b.json", cwd=tmp_path), "capsule_bench: --out new/b.json: is there already")


def test_bench_parts(monkeypatch):
    from capsule_routing import speed
    seen = []
    monkeypatch.setattr(speed, "run_bench", lambda parts, *a: seen.append(tuple(parts)) or {})
    monkeypatch.setattr(speed, "bench_table", lambda res: "")
    assert commands.BENCH_PARTS == speed.PARTS
    for args in ([], ["--parts", "growth, STEP"]): assert run_verb(capsule_bench, [*args, "--no-cuda"]) == 0
    assert seen == [tuple(p for p in speed.PARTS if not p.startswith("epoch")), ("growth", "step")]
    with pytest.raises(ValueError, match="parts='warp': 'warp' is not one of"): capsule_bench(parts="warp")
