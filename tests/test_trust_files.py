"Run folders from strangers: going on with them, and the commands that read them."
import json, pickle, random, shutil, struct, subprocess, sys
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file, save_file
from capsule_routing import runs
from capsule_routing.commands import capsule_evaluate, capsule_predict, capsule_train, run_verb
from capsule_routing.runs import BEST, CONFIG, HISTORY, LAST, digest, load_run, read_checkpoint, read_json, read_tensors
from capsule_routing.training import TrainConfig, fit, new_net
from capsule_routing.capsnet import caps_config
from capsule_routing.data import ImageData, ImageSet

TINY = caps_config(height=20, width=20, n_classes=3, conv_channels=4, n_types=2, d_primary=4, d_class=4, decoder=(8,))
CFG = TrainConfig(epochs=1, batch_size=4, threads=1, precision="fp32", checkpoint_minutes=None, checkpoint_steps=2)


def image_set(n, seed):
    "Squares: the class says where"
    g = torch.Generator().manual_seed(seed)
    x, y = torch.zeros(n, 1, 20, 20, dtype=torch.uint8), torch.arange(n) % 3
    for i, c in enumerate(y.tolist()): x[i, 0, 2+5*c:7+5*c, 5:15] = torch.randint(100, 255, (5, 10), generator=g, dtype=torch.uint8)
    return ImageSet(x, y, ("a", "b", "c"))

def squares(): return ImageData("squares", image_set(12, 0), image_set(4, 1))

def go_on(path): return fit(new_net(TINY, 1), squares(), CFG, path, resume=True, device="cpu")

def outcome(path): return digest(read_tensors(path/LAST)[0])


@pytest.fixture(scope="module")
def halfway(tmp_path_factory):
    "A run stopped after two of its three steps, and the digest it ends with"
    top = tmp_path_factory.mktemp("halfway")
    class Stop:
        def on_checkpoint(self, file):
            if read_checkpoint(file.parent).meta["global_step"] == 2: raise InterruptedError
    with pytest.raises(InterruptedError): fit(new_net(TINY, 1), squares(), CFG, top/"run", device="cpu", reporter=Stop())
    shutil.copytree(top/"run", top/"done")
    go_on(top/"done")
    assert read_checkpoint(top/"run").meta["step"] == 2 and outcome(top/"done") != outcome(top/"run")
    return top/"run", outcome(top/"done")


class Payload:
    def __init__(self, file): self.file = file
    def __reduce__(self): return Path.touch, (self.file,)


@pytest.mark.parametrize("how", ["pickle", "torch"])
@pytest.mark.parametrize("name", [CONFIG, HISTORY, LAST, BEST])
def test_pickles_and_the_commands(halfway, own_run, seven, tmp_path, capsys, name, how):
    "In place of each file: going on and the three commands refuse it in one line, or never look at it; the payload does not run"
    bad, sign = tmp_path/"bad", tmp_path/"ran"
    if how == "pickle": bad.write_bytes(pickle.dumps(Payload(sign)))
    else: torch.save(dict(w=Payload(sign)), bad)
    path = shutil.copytree(halfway[0], tmp_path/"run2")
    shutil.copy(bad, path/name); shutil.copy(bad, own_run/name)
    if name in (CONFIG, LAST):
        with pytest.raises(ValueError, match=name): go_on(path)
    else:                                        # derived files, written anew
        go_on(path)
        assert outcome(path) == halfway[1]
        read_tensors(path/BEST); runs.read_json(path/HISTORY, list)
    for verb, args in ((capsule_train, ["--out", own_run, "--resume", "--epochs", 2]), (capsule_evaluate, [own_run]), (capsule_predict, [own_run, seven])):
        code = run_verb(verb, list(map(str, args)))
        said = capsys.readouterr().err
        assert code in (None, 0, 2) and "Traceback" not in said
        if code == 2: assert len(said.strip().splitlines()) == 1 and name in said, said
    assert not sign.exists()


def forge(file, change):
    "Change the text of a checkpoint's header and give it the digest that belongs to it, as anybody can"
    raw, tensors = file.read_bytes(), load_file(file)
    meta = json.loads(json.loads(raw[8:8+struct.unpack("<Q", raw[:8])[0]])["__metadata__"]["meta"])
    change(meta, tensors)
    text = json.dumps(meta, separators=(",", ":"))
    save_file(tensors, file, dict(meta=text, sha256=digest(tensors, text)))

def put(where, value):
    "A change: `value` at a place such as `config.data.name`; `...` takes it away"
    def change(meta, tensors):
        *above, last = (int(k) if k.isdigit() else k for k in where.split("."))
        for k in above: meta = meta[k]
        if value is ...: del meta[last]
        else: meta[last] = value
    return change

def deep(n):
    v = []
    for _ in range(n): v = [v]
    return v


NEVER = [  # place, value, a word of the line: no run holds these, with or without a training state
    ("history", [1], "history"), ("history", 5, "history"), ("history", {}, "history"), ("history", None, "history"), ("history.0.epoch", "1", "history[0].epoch"),
    ("history.0.test_n", 0, "history[0].test_n"), ("history.0.test_errors", [], "history[0].test_errors"), ("history.0.test_loss", None, "history[0].test_loss"),
    ("history.0.seconds", -1, "history[0].seconds"), ("history.0.train_loss", float("inf"), "finite"), ("history.0.other", float("nan"), "finite"), ("history.0.other", deep(99), "deep"),
    ("seconds", "x", "seconds"), ("seconds", -1, "seconds"), ("seconds", None, "seconds"), ("seconds", 10**400, "finite"), ("seconds", True, "seconds"),
    ("sessions", 5, "sessions"), ("sessions", [5], "sessions"), ("sessions", None, "sessions"), ("sessions", [dict(device=deep(300))], "deep"),
    ("epoch", 0, "epoch"), ("epoch", -1, "epoch"), ("epoch", 1.5, "epoch"), ("epoch", "2", "epoch"), ("epoch", True, "epoch"), ("epoch", None, "epoch"), ("epoch", 10**400, "finite"),
    ("step", -1, "step"), ("step", [], "step"), ("global_step", 2.5, "global_step"), ("file", "a\nb", "file is"), ("file", 5, "file"),
    ("config", 5, "no network"), ("config.format", deep(9), "format"), ("config.run", [], "config.run"), ("config.data", [], "config.data"), ("config.data", 5, "config.data"), ("config.data", None, "config.data"),
    ("config.training", 5, "config.training"), ("config.training", [], "config.training"), ("config.training", None, "config.training"), ("config.training.batch_size", 0, "batch_size"),
    ("config.training.lr", 10**400, "finite"), ("config.settings", 5, "config.settings"), ("config.settings", [], "config.settings"), ("config.data.n_train", "x", "config.data.n_train"),
    ("config.data.classes", [[1], 2, 3], "config.data.classes"), ("config.data.classes", "abc", "config.data.classes"), ("config.data.note", [], "config.data.note"), ("config.data.name", 5, "config.data.name")]
STATE = [  # harmless beside weights alone, but nothing can go on from these
    ("history", [], "epoch"), ("history", ..., "history"), ("history.0.test_errors", ..., "test_errors"), ("history.0", {}, "epoch"), ("history.0.epoch", 7, "history"), ("epoch", 9, "epoch"),
    ("epoch", ..., "no training state"), ("step", 10**9, "step"), ("step", 1, "global_step"), ("global_step", 0, "global_step"), ("global_step", 10**200, "global_step"), ("seconds", ..., "seconds"), ("sessions", ..., "sessions"),
    ("config.data", ..., "'data'"), ("config.data.n_train", ..., "n_train"), ("config.data.n_train", 10**9, "global_step"), ("config.training", ..., "'training'"), ("config.training.batch_size", 1, "global_step")]

def held(path): return {p.name: p.read_bytes() for p in path.iterdir() if p.name != runs.LOCK}

def refused_by(verb, path, args, capsys, *words):
    "Exit 2 and one line with all words; not a byte of the folder has changed"
    was = held(path)
    code, said = run_verb(verb, list(map(str, args))), capsys.readouterr().err
    assert code == 2 and len(said.strip().splitlines()) == 1 and "Traceback" not in said, (code, said)
    assert all(w in said for w in words) and len(said) < 900, said
    assert held(path) == was


@pytest.mark.parametrize("where, value, word, always", [(*c, True) for c in NEVER] + [(*c, False) for c in STATE], ids=lambda v: str(v)[:24])
def test_honest_digest_odd_text(halfway, tmp_path, where, value, word, always):
    "Refused in one line that names file and place, and nothing in the folder changes"
    done = Path(shutil.copytree(halfway[0].parent/"done", tmp_path/"done"))
    forge(done/LAST, put(where, value))
    was = held(done)
    for f in (read_checkpoint, go_on, *([load_run] if always else [])):
        with pytest.raises(ValueError) as e: f(done)
        assert "\n" not in str(e.value) and str(done/LAST) in str(e.value) and word in str(e.value) and len(str(e.value)) < 600, e.value
    if not always: load_run(done)
    assert held(done) == was


VERBS = [c for c in NEVER if c[0] in ("history.0.epoch", "seconds", "config.data", "config.training.lr", "config.format")]

@pytest.mark.parametrize("where, value, word", VERBS, ids=lambda v: str(v)[:24])
def test_honest_digest_odd_text_and_the_commands(own_run, capsys, where, value, word):
    forge(own_run/LAST, put(where, value))
    refused_by(capsule_train, own_run, ["--out", own_run, "--resume", "--epochs", 2], capsys, str(own_run/LAST), word)
    refused_by(capsule_evaluate, own_run, [own_run], capsys, str(own_run/LAST), word)


def test_sums_of_no_images(halfway, tmp_path):
    "A mean over no images would be asked for at the end of the epoch"
    path = Path(shutil.copytree(halfway[0], tmp_path/"run2"))
    forge(path/LAST, lambda meta, tensors: tensors[runs.SUMS].zero_())
    with pytest.raises(ValueError, match="images=0.0: must be 8"): go_on(path)


@pytest.mark.parametrize("where, value, word", [("history", [1], "history"), ("config.data", [], "config.data"), ("config.training", 5, "config.training")])
def test_odd_text_beside_the_best_weights(own_run, capsys, where, value, word):
    forge(own_run/BEST, put(where, value))
    for verb, more in ((capsule_evaluate, []), (capsule_predict, ["x.png"])): refused_by(verb, own_run, [own_run, *more, "--weights", "best"], capsys, str(own_run/BEST), word)


HEAVY = r"""
import resource, sys
from capsule_routing.runs import load_run
good, *odd = sys.argv[1:]
load_run(good)                                                 # all that loading needs is in memory
used = int(open("/proc/self/statm").read().split()[0])*resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29,)*2)      # half a GiB more, for 16 MiB
for path in odd:
    try: load_run(path); print("loaded")
    except ValueError as e: print(e)
"""

@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_AS and /proc")
def test_json_about_as_large_as_allowed(halfway, tmp_path):
    "Millions of numbers just under the limit cost little; longer text, or more empty objects than allowed, are not parsed"
    n = runs.MAX_JSON//4 - 5000
    odd = [Path(shutil.copytree(halfway[0], tmp_path/str(i))) for i in range(3)]
    for path, more in zip(odd, ([0.5]*n, [0.5]*(n + 10_000), [{}]*runs.MAX_OBJECTS)): forge(path/LAST, put("more", more))
    assert 0 < runs.MAX_JSON - struct.unpack("<Q", (odd[0]/LAST).read_bytes()[:8])[0] < 25_000
    (odd[0]/HISTORY).write_bytes(b"[" + b"{},"*20_000_000 + b"{}]")                     # not looked at
    p = subprocess.run([sys.executable, "-c", HEAVY, halfway[0], *odd], cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True, timeout=240)
    assert p.returncode == 0, p.stderr
    loaded, long, many = p.stdout.splitlines()
    assert loaded == "loaded" and str(odd[1]/LAST) in long and str(odd[2]/LAST) in many and "larger than" in long and "objects" in many
    with pytest.raises(ValueError, match="larger than"): read_json(odd[0]/HISTORY, list)


def mutate(b, r):
    "Other bytes: a bit, a cut, a hole, an insertion, zeros, another length of the header, noise"
    b, k = bytearray(b), r.randrange(7)
    at = r.choice([r.randrange(len(b)), r.randrange(min(len(b), 300))])
    if k == 0: b[at] ^= 1 << r.randrange(8)
    elif k == 1: del b[at:]
    elif k == 2: del b[at:at+r.randrange(1, 99)]
    elif k == 3: b[at:at] = r.randbytes(r.randrange(1, 99))
    elif k == 4: b[at:at+16] = bytes(16)
    elif k == 5: b[:8] = r.getrandbits(r.choice([8, 16, 32, 63])).to_bytes(8, "little")
    else:
        for _ in range(r.randrange(1, 200)): b[r.randrange(len(b))] = r.randrange(256)
    return bytes(b)


def test_mutated_checkpoints(halfway, tmp_path):
    "Two hundred times: refused in one line, or gone on with to the very same weights"
    src, want = halfway
    files = {k: (src/k).read_bytes() for k in (CONFIG, HISTORY, LAST, BEST) if (src/k).exists()}
    r, refused, same = random.Random(0), 0, 0
    for i in range(200):
        path = tmp_path/str(i)
        path.mkdir()
        k = r.choice([*files, LAST, LAST])
        for name, b in files.items(): (path/name).write_bytes(mutate(b, r) if name == k else b)
        try: go_on(path)
        except (ValueError, FileNotFoundError) as e:
            assert "\n" not in str(e) and str(path) in str(e), (i, e)
            refused += 1
        else:
            assert outcome(path) == want, i
            assert digest(load_run(path).net.state_dict()) and runs.read_json(path/HISTORY, list)
            same += 1
        shutil.rmtree(path)
    assert refused >= 60 and same >= 20, (refused, same)


@pytest.mark.slow
def test_command_that_diverges(run_cmd, image_folder, tmp_path):
    "A rate beyond all measure: exit 2 and one line with epoch, step and where the last good checkpoint is"
    p = run_cmd("capsule_train", *"--dataset folder --epochs 3 --batch-size 4 --size 28 --channels 1 --no-cuda --lr 1e30 --log-interval 1 --conv-channels 8 --primary-types 2 --out run".split(),
                "--folder", image_folder/"train", cwd=tmp_path)
    assert p.returncode == 2 and "Traceback" not in p.stderr, p.stderr
    line = p.stderr.strip().splitlines()[-1]
    assert "epoch 1, step" in line and "last good checkpoint is" in line and LAST in line, line
    ck = read_checkpoint(tmp_path/"run")
    assert all(t.isfinite().all() for t in ck.weights.values())
