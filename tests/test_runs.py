"Run folders: what is written comes back exactly, or is refused in one line that names the file."
import json, os, pickle, shutil, struct, subprocess, sys, time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest, torch
from torch import nn
from safetensors.torch import load_file, save_file

from capsule_routing import registry, runs
from capsule_routing.capsnet import CapsNet, caps_config
from capsule_routing.settings import TrainConfig
from capsule_routing.runs import (BEST, CONFIG, HISTORY, LAST, LOCK, SUMS, Checkpoint, RunLocked, check_rebuilds, digest, load_run, lock_run, pack_optimizer,
                                  read_checkpoint, read_json, save_run, unpack_optimizer, write_atomic, write_checkpoint, write_tensors)

TINY = caps_config(height=20, width=20, conv_channels=4, n_types=2, d_primary=4, d_class=4, decoder=(8,))
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(tmp_path):
    "A run folder with random weights; `.net` is what went in"
    torch.manual_seed(0)
    net = CapsNet(TINY)
    save_run(tmp_path/"run", net, dict(note="a test"), [dict(epoch=1, test_accuracy=0.5)])
    return tmp_path/"run", net


def refused(path, name, *words, weights="last"):
    "load_run refuses in one line that names the file"
    with pytest.raises((ValueError, FileNotFoundError)) as e: load_run(path, weights)
    line = str(e.value)
    assert "\n" not in line and len(line) < 600 and name in line, line
    for w in words: assert w in line, line


def test_roundtrip_is_exact(run):
    path, net = run
    for w in ("last", "best"):
        r = load_run(path, w)
        assert digest(r.net.state_dict()) == digest(net.state_dict())
        assert r.cfg == TINY and r.config["note"] == "a test" and r.history == [dict(epoch=1, test_accuracy=0.5)] and not r.net.training
    assert {p.name for p in path.iterdir()} <= {CONFIG, HISTORY, LAST, BEST, LOCK}


def test_plain_safetensors_hold_the_weights(run):
    "Other programs can read the weights under their plain names"
    path, net = run
    assert set(load_file(path/BEST)) == set(net.state_dict())


def test_nothing_here_unpickles():
    "No module of the package calls torch.load or pickle"
    for p in (ROOT/"capsule_routing").glob("*.py"):
        text = p.read_text()
        for bad in ("torch.load(", "pickle.load", "import pickle", "allow_pickle=True", "joblib", "weights_only=False"):
            assert bad not in text, (p.name, bad)


@pytest.mark.parametrize("name", [CONFIG, LAST, BEST])
@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_pickle_in_place_of_a_file(run, tmp_path, name, how):
    path, _ = run
    class Payload:
        def __reduce__(self): return Path.touch, (tmp_path/"pwned",)
    if how == "pickle": (path/name).write_bytes(pickle.dumps(Payload()))
    else: torch.save(dict(w=Payload()), path/name)
    refused(path, name, weights="best" if name == BEST else "last")
    assert not (tmp_path/"pwned").exists()


@pytest.mark.parametrize("text", [b"", b"[{},", b"\x80\x04", None], ids=str)
def test_history_json_is_a_copy_for_people(run, text):
    "It is not read: whatever lies in its place, the history is that of the checkpoint"
    path, _ = run
    if text is None: (path/HISTORY).unlink(); os.mkfifo(path/HISTORY)
    else: (path/HISTORY).write_bytes(text)
    assert load_run(path).history == [dict(epoch=1, test_accuracy=0.5)]


@pytest.mark.parametrize("config, history, word", [(dict(data="mnist"), [], "config.data='mnist': must be an object"), (dict(training=[1]), [], "config.training=.*must be an object"),
                                                   ({}, [dict(epoch=1, test_n=0)], r"history\[0\].test_n=0: must be at least 1"), ({}, [7], r"history\[0\]=7: must be an object"),
                                                   (dict(note=10**400), [], "not finite")])
def test_what_could_not_be_loaded_is_not_saved(tmp_path, config, history, word):
    with pytest.raises(ValueError, match=word): save_run(tmp_path/"new", CapsNet(TINY), config, history)
    assert not (tmp_path/"new").exists()
    deep = []
    for _ in range(20): deep = [deep]
    with pytest.raises(ValueError, match="more than 16 deep"): save_run(tmp_path/"new", CapsNet(TINY), dict(note=deep))


def test_a_header_too_long_to_be_read_is_not_written(run):
    path, net = run
    was = (path/LAST).read_bytes()
    with pytest.raises(ValueError, match=f"header needs .* at most {runs.MAX_JSON} are read back"): write_tensors(path/LAST, net.state_dict(), dict(note="x"*runs.MAX_JSON))
    assert (path/LAST).read_bytes() == was


def test_a_history_of_as_many_epochs_as_are_allowed_fits(run):
    "Written, and read back within a second and a half; 20,000 epochs in less than one"
    assert TrainConfig(epochs=runs.MAX_EPOCHS) and runs.MAX_EPOCHS >= 20_000
    with pytest.raises(ValueError, match="epochs=30001: must be at most 30000"): TrainConfig(epochs=runs.MAX_EPOCHS + 1)
    path, net = run
    row = json.loads((ROOT/"capsule_routing"/"weights"/"mnist.json").read_text())["runs"][0]["history"][-1]
    for n, limit in ((20_000, 1.), (runs.MAX_EPOCHS, 1.5)):
        write_tensors(path/LAST, net.state_dict(), dict(file=LAST, config=read_json(path/CONFIG), history=[{**row, "epoch": i+1} for i in range(n)]))
        took = []
        for _ in range(3):
            t0 = time.process_time()
            assert len(load_run(path).history) == n
            took.append(time.process_time() - t0)
        assert min(took) < limit, took


@pytest.mark.parametrize("name", [CONFIG, LAST])
def test_missing_file(run, name):
    path, _ = run
    (path/name).unlink()
    refused(path, name, "no such file")


def test_missing_folder(tmp_path): refused(tmp_path/"nowhere", "nowhere", "no such run folder")


def test_unknown_weights(run):
    with pytest.raises(ValueError, match="weights='newest': must be one of last, best"): load_run(run[0], "newest")


@pytest.mark.parametrize("name", [CONFIG, LAST])
def test_folder_or_pipe_in_place_of_a_file(run, name):
    "A pipe that nobody writes to would block a careless reader for ever"
    path, _ = run
    (path/name).unlink(); (path/name).mkdir()
    refused(path, name, "not a regular file")
    (path/name).rmdir(); os.mkfifo(path/name)
    refused(path, name, "not a regular file")


@pytest.mark.parametrize("text", ["", "{", "nul", "[1, 2]", "5", "[" * 200_000, '{"a": ' * 100_000, "\x00\x01", "NaN", '{"format": 1}', "1" * 10_000])
def test_bad_config(run, text):
    path, _ = run
    (path/CONFIG).write_text(text)
    refused(path, CONFIG)


@pytest.mark.parametrize("cut", [0, 4, 8, 9, 100, -1, -4096])
def test_truncated_weights(run, cut):
    path, _ = run
    raw = (path/LAST).read_bytes()
    (path/LAST).write_bytes(raw[:cut])
    refused(path, LAST)


def test_every_bit_counts(run):
    "A flipped bit in any weight is noticed"
    path, _ = run
    raw = (path/LAST).read_bytes()
    for at in range(len(raw)-1, len(raw)//2, -len(raw)//40):
        bad = bytearray(raw); bad[at] ^= 1 << at % 8
        (path/LAST).write_bytes(bad)
        refused(path, LAST, "sha256")


@pytest.mark.parametrize("n", [2**63, 2**62, 2**31, 10**8, 0, 1])
def test_lying_header_length(run, n):
    path, _ = run
    raw = (path/LAST).read_bytes()
    (path/LAST).write_bytes(struct.pack("<Q", n) + raw[8:])
    refused(path, LAST)


def change_header(file, f):
    "Rewrite a safetensors header with `f(header)`, leaving the data as it is"
    raw = file.read_bytes()
    n, = struct.unpack("<Q", raw[:8])
    h = json.loads(raw[8:8+n]); f(h)
    h = json.dumps(h).encode()
    file.write_bytes(struct.pack("<Q", len(h)) + h + raw[8+n:])


@pytest.mark.parametrize("shape", [[2**40, 2**40], [10**9]*4, [-1], ["a"], None, [1.5], [True], [], [2**200], {}, [2**47]*50_000, [1]*50_000], ids=lambda s: str(s)[:20])
def test_lying_shapes(run, shape):
    path, _ = run
    change_header(path/LAST, lambda h: h["trunk.weight"].update(shape=shape))
    refused(path, LAST)


def test_lying_types_and_offsets(run):
    path, _ = run
    raw = (path/LAST).read_bytes()
    for key, v in (("dtype", "F64"), ("dtype", "X"), ("dtype", 3), ("data_offsets", [0, 2**60]), ("data_offsets", [-5, 3]), ("data_offsets", None)):
        (path/LAST).write_bytes(raw)
        change_header(path/LAST, lambda h: h["trunk.weight"].update({key: v}))
        refused(path, LAST)


def test_names_of_another_network(run):
    path, net = run
    config = read_json(path/CONFIG)
    w = dict(net.state_dict())
    for change in (lambda w: w.pop("digit.W"), lambda w: w.update(extra=torch.zeros(3)), lambda w: w.update({"digit.W": torch.zeros(2, 2)}),
                   lambda w: w.update({"digit.W": w["digit.W"]*float("nan")})):
        v = dict(w); change(v)
        write_tensors(path/LAST, v, dict(file=LAST, config=config, history=[]))
        refused(path, LAST)


def test_safetensors_of_someone_else(run):
    "A valid safetensors file that no run wrote"
    path, net = run
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, path/LAST)
    refused(path, LAST, "not written by capsule_routing")


def test_files_exchanged(run, tmp_path):
    path, net = run
    save_run(tmp_path/"other", CapsNet(TINY))
    for a, b in ((path/LAST, path/BEST), (path/LAST, tmp_path/"other"/LAST), (path/CONFIG, path/HISTORY), (path/CONFIG, tmp_path/"other"/CONFIG)):
        was = a.read_bytes()
        a.write_bytes(b.read_bytes())
        refused(path, "safetensors" if a.name == LAST else "")
        a.write_bytes(was)
    load_run(path)


def test_config_of_another_network(run):
    path, _ = run
    c = read_json(path/CONFIG); c["network"]["d_class"] = 8
    (path/CONFIG).write_text(json.dumps(c))
    refused(path, CONFIG, "another network")


@pytest.mark.parametrize("change", [dict(n_classes=10**9), dict(trunk_options=dict(channels=10**12)), dict(trunk_options=dict(channels=2**62)), dict(trunk="mine"), dict(kind="mine"), dict(height=10**9, width=10**9),
                                    dict(decoder=[8]*10**5), dict(decoder=[10**9]*50), dict(kernel=0), dict(n_types=-1), dict(nonsense=1), dict(d_class="x"),
                                    dict(n_classes=None), dict(n_classes=1e9), dict(kernel=True), dict(decoder={})], ids=lambda d: str(d)[:30])
def test_absurd_networks_are_refused_without_building_them(run, change):
    "Also where header, config and digest agree with each other"
    path, net = run
    c = read_json(path/CONFIG); c["network"].update(change)
    write_tensors(path/LAST, net.state_dict(), dict(file=LAST, config=c, history=[]))
    (path/CONFIG).write_text(json.dumps(c))
    refused(path, LAST)


def test_newer_format(run):
    path, net = run
    c = read_json(path/CONFIG); c["format"] = 99
    write_tensors(path/LAST, net.state_dict(), dict(file=LAST, config=c, history=[]))
    refused(path, LAST, "99")


def test_weights_alone_are_no_training_state(run):
    with pytest.raises(ValueError, match="no training state"): read_checkpoint(run[0])


def test_not_finite_is_not_saved(run, tmp_path):
    net = CapsNet(TINY)
    with torch.no_grad(): net.trunk.bias[0] = float("inf")
    with pytest.raises(ValueError, match="trunk.bias.*NaN or infinity"): save_run(tmp_path/"bad", net)
    assert not (tmp_path/"bad").exists()


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_atomic_write_that_fails(tmp_path, monkeypatch, where):
    "Whatever step of the write fails, the old file stands and nothing lies beside it"
    f = tmp_path/"file"
    write_atomic(f, b"old")
    def fail(*a, **k): raise OSError(28, "No space left on device")
    if where == "write":
        real = open
        class Half:
            def __init__(self, f): self.f = f
            def write(self, d): self.f.write(d[:len(d)//2]); self.f.flush(); fail()
            def __enter__(self): return self
            def __exit__(self, *a): self.f.close()
        monkeypatch.setattr(runs, "open", lambda *a: Half(real(*a)), raising=False)
    else: monkeypatch.setattr(os, where, fail)
    with pytest.raises(OSError, match="No space left"): write_atomic(f, b"new new new")
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and f.read_bytes() == b"old"


def test_leftover_of_a_killed_write_is_no_hindrance(tmp_path):
    "Nor is a link put in its place followed"
    (tmp_path/"victim").write_bytes(b"precious")
    (tmp_path/".file.tmp").symlink_to(tmp_path/"victim")
    write_atomic(tmp_path/"file", b"new")
    assert (tmp_path/"victim").read_bytes() == b"precious" and (tmp_path/"file").read_bytes() == b"new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "victim"]


def test_second_writer_is_refused_and_a_dead_one_is_not_in_the_way(tmp_path):
    code = "import sys, time; from capsule_routing.runs import lock_run\nwith lock_run(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    p = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert p.stdout.readline() == "held\n"
        with pytest.raises(RunLocked, match="another process is training in this folder"):
            with lock_run(tmp_path): pass
    finally: p.kill(); p.wait(); p.stdout.close()
    with lock_run(tmp_path): pass


def test_lock_is_free_after_an_error(tmp_path):
    with pytest.raises(KeyError):
        with lock_run(tmp_path): raise KeyError
    with lock_run(tmp_path): pass


@pytest.mark.parametrize("how", ["folder", "lock", "replaced"])
def test_nothing_is_written_without_the_lock_that_lies_there(tmp_path, how):
    "After `rm -rf RUN`, or of the lock file alone, a second run holds the folder: the first one writes no file of it"
    path, net = tmp_path/"run", CapsNet(TINY)
    ck = Checkpoint(net.state_dict(), {}, torch.zeros(0).double(), dict(step=0, history=[], config={}))
    path.mkdir()
    with lock_run(path) as first:
        write_checkpoint(path, ck, True, first)
        if how == "folder": shutil.rmtree(path); path.mkdir()
        else: (path/LOCK).unlink()
        if how == "replaced": (path/LOCK).write_text("")
        with lock_run(path) as second:
            write_atomic(path/LAST, b"of the second", second)
            for write in (lambda: write_checkpoint(path, ck, True, first), lambda: write_atomic(path/HISTORY, b"", first)):
                was = {p.name: p.read_bytes() for p in path.iterdir()}
                with pytest.raises(RunLocked, match="removed or replaced"): write()
                assert was == {p.name: p.read_bytes() for p in path.iterdir()}


def test_a_lock_that_is_a_link_is_refused_and_its_target_stays(tmp_path):
    (tmp_path/"victim").write_bytes(b"precious")
    (tmp_path/LOCK).symlink_to(tmp_path/"victim")
    with pytest.raises(ValueError, match="[.]lock: cannot be locked"):
        with lock_run(tmp_path): pass
    assert (tmp_path/"victim").read_bytes() == b"precious"


@pytest.mark.parametrize("size", [2**31, 2**40])
def test_giant_sparse_file(run, size):
    "A file that claims to be huge costs nothing to refuse"
    path, _ = run
    for name in (LAST, CONFIG):
        was = (path/name).read_bytes()
        try: os.truncate(path/name, size)
        except OSError: pytest.skip("no sparse files of this size here")
        refused(path, name)
        (path/name).write_bytes(was)


MUTATE = r"""
import json, random, resource, shutil, sys
from pathlib import Path
from capsule_routing.runs import *
from capsule_routing import registry, runs
src, dst, seed, n = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
r = random.Random(seed)
names = [runs.CONFIG, runs.HISTORY, runs.LAST, runs.BEST]
files = {k: (src/k).read_bytes() for k in names}
want = {w: digest(load_run(src, w).net.state_dict()) for w in ("last", "best")}
used = int(open("/proc/self/statm").read().split()[0])*resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28,)*2)      # a quarter of a GiB more than now, for a folder of 100 kB

def mutate(b):
    b, k = bytearray(b), r.randrange(9)
    at = r.choice([r.randrange(len(b)), r.randrange(min(len(b), 300))]) if b else 0
    if k == 0 and b: b[at] ^= 1 << r.randrange(8)
    elif k == 1: del b[at:]
    elif k == 2: del b[at:at+r.randrange(1, 99)]
    elif k == 3: b[at:at] = r.randbytes(r.randrange(1, 99))
    elif k == 4: b[at:at+16] = bytes(16)
    elif k == 5: b += r.randbytes(r.randrange(1, 9999))
    elif k == 6: b[:8] = r.getrandbits(r.choice([8, 16, 20, 32, 63])).to_bytes(8, "little")
    elif k == 7:                                            # another number somewhere in the JSON
        where = [i for i in range(min(len(b), 9000)) if 48 <= b[i] <= 57]
        if where: i = r.choice(where); b[i:i+1] = r.choice([b"0", b"9", b"-1", b"99999999999", b"1e308", b"NaN", b"null", b"[]"])
    else:
        for _ in range(r.randrange(1, 200)): b[r.randrange(len(b))] = r.randrange(256)
    return bytes(b)

refused = loaded = 0
for i in range(n):
    now = dict(files)
    if r.random() < 0.1: a, b = r.sample(names, 2); now[a], now[b] = now[b], now[a]
    else: k = r.choice(names + [runs.LAST]*2); now[k] = mutate(now[k])
    for k, v in now.items(): (dst/k).write_bytes(v)
    for w in ("last", "best"):
        try: got = digest(load_run(dst, w).net.state_dict())
        except (ValueError, FileNotFoundError) as e:
            assert "\n" not in str(e) and str(dst) in str(e), (i, e)
            refused += 1
        else:
            assert got == want[w], (i, w)
            loaded += 1
print(json.dumps(dict(refused=refused, loaded=loaded)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_AS and /proc")
def test_six_hundred_mutations(tmp_path):
    "Refused, or the very same weights; no crash, no hang, no large allocation"
    torch.manual_seed(0)
    save_run(tmp_path/"run", CapsNet(TINY), dict(note="x"), [dict(epoch=1)])
    (tmp_path/"bad").mkdir()
    p = subprocess.run([sys.executable, "-c", MUTATE, tmp_path/"run", tmp_path/"bad", "7", "600"], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert p.returncode == 0, p.stdout + p.stderr
    n = json.loads(p.stdout)
    assert n["refused"] + n["loaded"] == 1200 and n["refused"] > 300 and n["loaded"] > 300


# Networks of others

@pytest.fixture
def own():
    "`own(make)`: the config of a TINY network whose trunk `make(channels_in)` gives, registered for the length of a test"
    def config(make):
        registry.trunk["own"] = make
        return caps_config(height=20, width=20, trunk="own", n_types=2, d_primary=4, d_class=4, decoder=(8,))
    yield config
    registry.trunk.pop("own", None)


class Tied(nn.Module):
    "Two convolutions that share a kernel, and a count of steps"
    def __init__(self, c):
        super().__init__()
        self.a, self.b = nn.Conv2d(c, 1, 3), nn.Conv2d(1, 1, 3)
        self.b.weight = self.a.weight
        self.register_buffer("count", torch.tensor(3))
    def forward(self, x): return self.b(self.a(x))

def normed(c): return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(c, 4, 9)), nn.BatchNorm2d(4), nn.ReLU())


@pytest.mark.parametrize("make", [Tied, normed])
def test_whatever_state_dict_says_is_saved(own, tmp_path, make):
    "Tied weights, buffers of whole numbers, parametrizations: exactly as they were"
    net = CapsNet(own(make))
    with torch.no_grad():
        for t in net.state_dict().values(): t.add_(1)
    check_rebuilds(net)
    back = load_run(save_run(tmp_path/"run", net)).net
    assert make is normed or back.trunk.a.weight is back.trunk.b.weight
    assert digest(back.state_dict()) == digest(net.state_dict())
    assert {t.dtype for t in back.state_dict().values()} == {torch.float32, torch.int64}


def other(change):
    "A TINY network that is not what its config says"
    net = CapsNet(TINY)
    return change(net) or net

class Mine(type(CapsNet(TINY).digit)): pass
def mine(net): net.digit = Mine(*net.digit.sizes)
def subclass(net): net.__class__ = type("CapsNet", (CapsNet,), {})


@pytest.mark.parametrize("change, word", [
    (lambda net: setattr(net.digit, "n_iters", 5), "digit is"), (lambda net: setattr(net.digit, "stop_grad", True), "digit is"), (mine, "test_runs.Mine"),
    (lambda net: setattr(net.digit, "more", nn.Parameter(torch.zeros(3))), "digit.more is"), (lambda net: net.half(), "torch.float16"), (subclass, "the network is"),
    (lambda net: setattr(net, "trunk", nn.Sequential(net.trunk)), "trunk is"), (lambda net: net.register_buffer("x", torch.zeros(1)), "x is"),
    (lambda net: setattr(net.decoder, "layers", nn.Identity()), "decoder"), (lambda net: setattr(net, "cfg", None), "makes no network")])
def test_what_the_config_would_not_rebuild_is_refused(tmp_path, change, word):
    "In one line that names the first difference; nothing is written"
    net = CapsNet(TINY)
    change(net)
    for f in (check_rebuilds, partial(save_run, tmp_path/"run")):
        with pytest.raises(ValueError, match="register your layers") as e: f(net)
        assert word in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 1000, e.value
    assert not (tmp_path/"run").exists()


def test_frozen_or_moved_it_is_still_what_its_config_builds():
    net = CapsNet(TINY).eval()
    for p in net.trunk.parameters(): p.requires_grad_(False)
    check_rebuilds(net)


def test_a_name_that_nobody_registered(own, tmp_path):
    "One line with the file and what to do"
    path = save_run(tmp_path/"run", CapsNet(own(Tied)))
    registry.trunk.pop("own")
    refused(path, LAST, "trunk='own': is not registered", "import the module that registers it")


def test_loading_draws_no_random_numbers(run):
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    load_run(run[0])
    assert torch.equal(torch.rand(2), want)


# What optimizers remember

class Counting(torch.optim.Optimizer):
    "Remembers a whole number, a list of no tensor, a text and a matrix of another shape"
    def __init__(self, params, lr=0.1): super().__init__(params, dict(lr=lr, beats=0))
    def step(self):
        for g in self.param_groups:
            g["beats"] += 1
            for p in g["params"]:
                if p.grad is None: continue
                s = self.state[p]
                s["count"] = s.get("count", torch.zeros((), dtype=torch.int64)) + 1
                s["seen"] = s.get("seen", torch.zeros_like(p, dtype=torch.int64)) + 1
                s["rows"] = s.get("rows", torch.zeros(len(p))) + p.grad.flatten(1).sum(1) if p.ndim > 1 else torch.zeros(1)
                s["n"], s["name"] = s.get("n", 0) + 1, "x"
                p.data -= g["lr"]*(p.grad + s["rows"].sum() + s["count"] + g["beats"] + s["n"])*s["seen"].sqrt()

OPTIMIZERS = dict(adam=torch.optim.Adam, fused=partial(torch.optim.Adam, fused=True), adamw=partial(torch.optim.AdamW, amsgrad=True), own=Counting,
                  sgd=partial(torch.optim.SGD, lr=0.1, momentum=0.9), rmsprop=partial(torch.optim.RMSprop, centered=True, momentum=0.5), adagrad=torch.optim.Adagrad,
                  lion=partial(torch.optim.NAdam, foreach=True), groups=lambda ps: torch.optim.Adam([dict(params=ps[:3], lr=0.01), dict(params=ps[3:], weight_decay=0.1)]))

def steps(net, opt, first, last):
    for step in range(first, last):
        g = torch.Generator().manual_seed(step)
        for p in net.parameters():
            if p.requires_grad: p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=g))   # lies as autograd lays it
        opt.step()

def make(kind, frozen):
    torch.manual_seed(0)
    net = CapsNet(TINY)
    if frozen: net.trunk.requires_grad_(False)
    return net, OPTIMIZERS[kind]([p for p in net.parameters() if p.requires_grad] if frozen != "held" else list(net.parameters()))

def state(net, opt, path):
    "A run folder with these as its checkpoint"
    tensors, meta = pack_optimizer(net, opt)
    save_run(path, net, dict(training=dict(batch_size=4), data=dict(n_train=40)))
    m = dict(epoch=1, step=3, global_step=3, seconds=0., sessions=[], history=[], config=read_json(path/CONFIG), optimizer=meta)
    write_checkpoint(path, Checkpoint(net.state_dict(), tensors, torch.tensor([0., 12.]).double(), m))


@pytest.mark.parametrize("frozen", [False, True, "held"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_goes_on_as_if_it_had_not_stopped(tmp_path, kind, frozen):
    "Through a file: equal to the last bit, types and memory layouts too; frozen weights have nothing to remember"
    net, opt = make(kind, frozen)
    steps(net, opt, 0, 3)
    state(net, opt, tmp_path/"run")
    ck, (again, fresh) = read_checkpoint(tmp_path/"run"), make(kind, frozen)
    again.load_state_dict(ck.weights)
    unpack_optimizer(again, fresh, ck.moments, ck.meta["optimizer"], 3)
    for p, q in zip(net.parameters(), again.parameters()):
        a, b = opt.state.get(p, {}), fresh.state.get(q, {})
        assert {k: (v.dtype, v.stride()) if torch.is_tensor(v) else v for k, v in a.items()} == {k: (v.dtype, v.stride()) if torch.is_tensor(v) else v for k, v in b.items()}
    steps(net, opt, 3, 6), steps(again, fresh, 3, 6)
    assert digest(again.state_dict()) == digest(net.state_dict())
    if kind != "adagrad": assert any("trunk" in k for k in ck.moments) != bool(frozen)


def test_an_optimizer_that_cannot_be_kept(tmp_path):
    net = CapsNet(TINY)
    with pytest.raises(ValueError, match="optimizer='Adam': moves a parameter that the network lacks"): pack_optimizer(net, torch.optim.Adam([nn.Parameter(torch.zeros(2))]))
    opt = Counting(net.parameters())
    opt.state[net.digit.W]["odd"] = object()
    with pytest.raises(ValueError, match="optimizer='Counting': cannot be kept in a run folder"): pack_optimizer(net, opt)


def test_more_than_is_read_back_is_not_written(tmp_path):
    "An optimizer that remembers a hundred times the weights: refused when it is written, not when it is read"
    net, opt = make("own", False)
    steps(net, opt, 0, 1)
    for p in net.parameters(): opt.state[p]["much"] = torch.zeros(100, p.numel())
    with pytest.raises(ValueError, match="last.safetensors: not written: more than 62 times its weights"): state(net, opt, tmp_path/"run")
    load_run(tmp_path/"run")


def test_another_optimizer_or_other_weights_do_not_go_on():
    net, opt = make("adam", False)
    steps(net, opt, 0, 1)
    tensors, meta = pack_optimizer(net, opt)
    for kind, frozen in (("sgd", False), ("adam", True), ("own", False)):
        with pytest.raises(ValueError, match="last.safetensors: its optimizer does not fit"): unpack_optimizer(*make(kind, frozen), tensors, meta, 1)
    for odd in (dict(groups=[]), dict(names=5), dict(state=[["x", "y", 1]]), dict(state=5), {"groups": [5]}):
        with pytest.raises(ValueError, match="its optimizer does not fit"): unpack_optimizer(*make("adam", False), tensors, {**meta, **odd}, 1)
    with pytest.raises(ValueError, match="its optimizer does not fit"): unpack_optimizer(*make("adam", False), {"optim.exp_avg.nowhere": torch.zeros(1)}, meta, 1)


def test_a_folder_of_format_1(tmp_path):
    "Names of before version 0.2, Adam's moments alone: loaded, and gone on with at the step of the run"
    net, opt = make("adam", False)
    steps(net, opt, 0, 3)
    path = tmp_path/"run"
    old = lambda k: k.replace("trunk.", "conv1.")
    sizes = dict(channels=1, height=20, width=20, n_classes=10, conv_channels=4, kernel=9, n_types=2, d_primary=4, d_class=4, n_iters=3, decoder=[8], stop_grad=False)
    config = dict(format=1, run="x", network=sizes, training=dict(batch_size=4), data=dict(n_train=40))
    meta = dict(file=LAST, epoch=1, step=3, global_step=3, seconds=0., sessions=[], history=[], config=config)
    tensors = {old(k): t for k, t in net.state_dict().items()} | {SUMS: torch.tensor([0., 0., 0., 12.]).double()}
    path.mkdir()
    write_tensors(path/LAST, tensors | {old(k): t for k, t in pack_optimizer(net, opt)[0].items() if ".step." not in k}, meta)
    (path/CONFIG).write_text(json.dumps(config))
    assert digest(load_run(path).net.state_dict()) == digest(net.state_dict())
    ck, (again, fresh) = read_checkpoint(path), make("adam", False)
    again.load_state_dict(ck.weights)
    unpack_optimizer(again, fresh, ck.moments, ck.meta.get("optimizer"), 3)
    steps(net, opt, 3, 6), steps(again, fresh, 3, 6)
    assert digest(again.state_dict()) == digest(net.state_dict())


# The Hub

@pytest.mark.skipif(find_spec("huggingface_hub") is None, reason="huggingface_hub is not installed")
def test_to_a_folder_for_the_hub_and_back(run, tmp_path):
    from capsule_routing.hub import FILE, from_hub, to_hub
    to_hub(run[1], tmp_path/"shared")
    assert digest(from_hub(tmp_path/"shared").state_dict()) == digest(run[1].state_dict())
    (tmp_path/"shared"/FILE).write_bytes(b"x"*99)
    with pytest.raises(ValueError, match=FILE): from_hub(tmp_path/"shared")


def test_no_hub_without_its_package(run, tmp_path, monkeypatch):
    from capsule_routing.hub import from_hub, to_hub
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for f in (lambda: to_hub(run[1], tmp_path/"shared"), lambda: from_hub("some/where")):
        with pytest.raises(ImportError, match="pip install huggingface_hub"): f()
    assert not (tmp_path/"shared").exists()
