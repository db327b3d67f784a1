"""Attacks on run folders, results files, command lines, images and running processes; not collected by pytest.

    python tests/attacks.py --kills 300 --mutations 1000 --seed 20261 --out capsule_routing/results/attacks.json
"""
import argparse, json, os, platform, random, shutil, signal, sys, tempfile, time, traceback
from dataclasses import replace
from io import BytesIO
from pathlib import Path
import numpy as np
import torch, torch._dynamo
from PIL import Image
from safetensors.torch import load as load_safetensors, save as dump_safetensors
from capsule_routing import affine, commands, multimnist, results, runs, visualize
LOADED = affine, multimnist, visualize   # once, before processes part
from capsule_routing.capsnet import caps_config
from capsule_routing.data import ImageData, ImageSet
from capsule_routing.machine import device_name
from capsule_routing.training import TrainConfig, fit, new_net

torch.set_num_threads(1)
SIZES = dict(height=20, width=20, n_classes=3, conv_channels=4, n_types=2, d_primary=4, d_class=4, decoder=(8,))
CFG = TrainConfig(epochs=2, batch_size=8, threads=1, precision="fp32", checkpoint_minutes=None, checkpoint_steps=1)
SETTINGS = { # network, settings of training, more for fit
    "plain": ({}, {}, {}), "averaged": ({}, dict(average=0.9), {}), "one cycle": ({}, dict(schedule="one_cycle", lr=2e-3), {}),
    "no decoder": (dict(decoder=None), {}, {}), "one iteration": (dict(n_iters=1), {}, {}), "two layers": (dict(layers=((4, 4),)), {}, {}),
    "rare checkpoints": ({}, dict(checkpoint_steps=5), {}), "big batch": ({}, dict(batch_size=64), {}),
    "sgd": ({}, {}, dict(optimizer=lambda ps: torch.optim.SGD(ps, 1e-3, momentum=0.9)))}

def noise():
    g = torch.Generator().manual_seed(5)
    return ImageData("noise", *[ImageSet(torch.randint(0, 256, (n, 1, 20, 20), generator=g, dtype=torch.uint8), torch.randint(0, 3, (n,), generator=g), "abc") for n in (41, 9)])

def child(f, limit=60.):
    "Run `f` in a child: its exit code and stderr; None if it had to be ended."
    err = tempfile.TemporaryFile()
    sys.stdout.flush(); sys.stderr.flush()
    if not (pid := os.fork()):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1); os.dup2(err.fileno(), 2)
        sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")
        sys.stdout = open(1, "w", closefd=False)
        try: code = f() or 0
        except BaseException: traceback.print_exc(); code = 99
        os._exit(code if isinstance(code, int) else 0)
    end = time.time() + limit
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done or time.time() > end: break
        time.sleep(0.004)
    if not done: os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
    err.seek(0)
    return os.waitstatus_to_exitcode(status) if done else None, err.read().decode(errors="replace")

# -- kills --

def train(kind, path, at=None):
    net, settings, more = SETTINGS[kind]
    if at:
        calls = [0]
        for name in ("fsync", "replace", "unlink", "mkdir", "open", "stat"):
            def spy(*a, real=getattr(os, name), **k):
                calls[0] += 1
                if calls[0] == at: os.kill(os.getpid(), signal.SIGKILL)
                return real(*a, **k)
            setattr(os, name, spy)
    cfg = replace(CFG, **settings)
    fit(new_net(caps_config(**{**SIZES, **net}), 1), noise(), cfg, path, resume=path.is_dir(), device="cpu", **more)

def outcome(path):
    tensors, meta, _ = runs.read_tensors(path/runs.LAST)
    return runs.digest(tensors, json.dumps([{k: v for k, v in r.items() if "second" not in k} for r in meta["history"]]))

def kills(n, r, top, kinds, note):
    want, took = {}, {}
    count = {k: kinds.setdefault(f"kill at a random {k}", dict(survived=0, failed=0)) for k in ("moment", "event")}
    for kind in SETTINGS:
        t = time.time()
        code, err = child(lambda: train(kind, top/f"whole {kind}"))
        assert code == 0, err
        want[kind], took[kind] = outcome(top/f"whole {kind}"), time.time() - t
    for i in range(n):
        kind, how, path = r.choice([*SETTINGS]), r.choice([*count]), top/f"run{i}"
        at, wait, sig = r.randrange(1, 400) if how == "event" else None, r.random()*took[kind]*1.1, signal.SIGKILL
        if not (pid := os.fork()):
            try: os.dup2(os.open(os.devnull, os.O_WRONLY), 2); train(kind, path, at)
            finally: os._exit(0)
        if how == "moment": time.sleep(wait); os.kill(pid, sig)
        os.waitpid(pid, 0)
        code, err = child(lambda: train(kind, path))
        ok = code == 0 and outcome(path) == want[kind]
        count[how]["survived" if ok else "failed"] += 1
        if not ok: print(f"kill {i}: {kind}, {how} {at or wait}: {code} {err[-400:]}", file=sys.stderr, flush=True)
        shutil.rmtree(path, ignore_errors=True)
        note()

# -- mutations --

ODD = [None, -1, 0, 1, 2**31, 10**400, 1e308, -1e-320, "", "x", "\x1b[2J\r\n", "\u202e$x^{$", "a"*5000, [], [[]], {}, True, [1, "a"], {"a": {}}, float("nan"), float("inf"), "1", "-0", "../../x", "~"]

def changed(v, r):
    "One value somewhere within exchanged, doubled or taken away"
    keys = [*v] if isinstance(v, dict) else [*range(len(v))] if isinstance(v, list) else []
    if not keys or r.random() < 0.15: return r.choice(ODD)
    k, v = r.choice(keys), v.copy()
    if r.random() < 0.15: v.pop(k)
    elif r.random() < 0.1 and isinstance(v, dict): v[r.choice(["", "x", "\x1b"])] = v[k]
    else: v[k] = changed(v[k], r)
    return v

def bits(b, r):
    b = bytearray(b)
    for _ in range(r.choice([1, 1, 3, 40])):
        at, k = r.randrange(len(b)) if r.random() < 0.5 else r.randrange(min(len(b), 400)), r.randrange(4)
        if k == 0: b[at] ^= 1 << r.randrange(8)
        elif k == 1: b[at:at + r.randrange(1, 60)] = r.randbytes(r.randrange(60))
        elif k == 2: del b[at:]
        else: b[at:at] = bytes(r.randrange(1, 60))
        if not b: b = bytearray(b"\0")
    return bytes(b)

def forged(raw, r):
    "A checkpoint with another text or other weights, and the digest that belongs to it"
    n = int.from_bytes(raw[:8], "little")
    meta, tensors = json.loads(json.loads(raw[8:8+n])["__metadata__"]["meta"]), load_safetensors(raw)
    if r.random() < 0.7: meta = changed(meta, r)
    else:
        k = r.choice([*tensors])
        t = tensors[k].flatten().clone()
        if t.numel(): t[r.randrange(len(t))] = r.choice([3e38, float("nan"), float("inf"), -3e38, 0.])
        tensors[k] = r.choice([t.view_as(tensors[k]), t, tensors[k].double(), torch.full_like(tensors[k], 3e38) if tensors[k].is_floating_point() else t])
    text = json.dumps(meta)
    return dump_safetensors({k: v.contiguous() for k, v in tensors.items()}, dict(meta=text, sha256=runs.digest(tensors, text)))

def call(verb, *args): return lambda: getattr(commands, verb).main([str(a) for a in args])

class Attacks:
    "Each gives a function to run in a child, and what it would be called"
    def __init__(self, r, top):
        self.r, self.top, self.n = r, top, 0
        g = np.random.default_rng(1)
        for split, n in (("train", 5), ("test", 3)):
            for c in ("one", "two"):
                (top/"pics"/split/c).mkdir(parents=True)
                for i in range(n): Image.fromarray(g.integers(0, 255, (20, 20), dtype=np.uint8)).save(top/"pics"/split/c/f"{i}.png")
        self.small = "--size 20 --channels 1 --epochs 1 --batch-size 4 --no-cuda --threads 1 --conv-channels 4 --primary-types 2 --primary-size 4 --class-size 4 --decoder-widths 8 --with-reconstruction --folder".split() + [top/"pics"/"train", "--test-folder", top/"pics"/"test"]
        code, err = child(call("capsule_train", *self.small, "--out", top/"base"))
        assert code == 0, err
        self.image = top/"pics"/"test"/"one"/"0.png"

    def new(self):
        self.n += 1
        (p := self.top/f"a{self.n}").mkdir()
        return p

    def verb(self, run):
        "One of the commands that read a run folder"
        return self.r.choice([call("capsule_predict", run, self.image), call("capsule_predict", run, self.image, "--json"), call("capsule_evaluate", run), call("capsule_evaluate", run, "--weights", "best"),
                              call("capsule_train", "--resume", "--out", run, "--epochs", 2, "--quiet"), call("capsule_explore", run, "--no-open")])

    def folder(self):
        "A file of a run folder, its bytes or its values"
        path = Path(shutil.copytree(self.top/"base", self.new()/"run"))
        f = path/self.r.choice([runs.LAST, runs.LAST, runs.BEST, runs.CONFIG, runs.HISTORY])
        k = self.r.random()
        if f.suffix == ".json" and k < 0.7: f.write_text(json.dumps(changed(json.loads(f.read_text()), self.r)))
        elif f.suffix != ".json" and k < 0.7: f.write_bytes(forged(f.read_bytes(), self.r))
        else: f.write_bytes(bits(f.read_bytes(), self.r))
        return self.verb(path)

    def results(self):
        "A results file"
        d = self.new()/"table1"
        d.mkdir()
        src = self.r.choice(sorted(p for p in (results.files("capsule_routing")/"results"/"table1").iterdir()))
        (d/"a.json").write_text(json.dumps(changed(json.loads(src.read_text()), self.r)))
        return call("capsule_reproduce", "table1", "--show", "--out", d.parent)

    def line(self):
        "A command line"
        verb = self.r.choice(["train", "evaluate", "predict", "explore", "reproduce", "export", "bench"])
        words = {"train": [*self.small, "--out", self.new()/"run"], "evaluate": [self.top/"base"], "predict": [self.top/"base", self.image], "explore": [self.top/"base", "--no-open"],
                 "reproduce": ["table1", "--show"], "export": [self.top/"base", "--format", "torch", "--out", self.new()/"m.pt2"], "bench": ["--parts", "limits", "--n", "1"]}[verb]
        words = [str(w) for w in words]
        for _ in range(self.r.choice([1, 1, 2])):
            at, k = self.r.randrange(len(words)), self.r.randrange(4)
            odd = self.r.choice(["", "-1", "0", "nan", "1e400", "--", "\x1b[2J", "\u202e", "caf\udce9", "9"*30, "--out", "--lr", "{}", "[", "/dev/null", "/dev/full", ".", "~nobody/x", "--epochs=0", "--size=3", "é", "$x^{$"])
            if k == 0: words[at] = odd
            elif k == 1: words.insert(at, odd)
            elif k == 2: words.pop(at)
            else: words[at] = words[at][:self.r.randrange(len(words[at]) + 1)]
            words = words or [""]
        cwd = self.new()
        def f(): os.chdir(cwd); return getattr(commands, f"capsule_{verb}").main(words)
        return f

    def picture(self):
        "An image file"
        size, mode = (self.r.choice([1, 3, 20, 700]), self.r.choice([1, 5, 20])), self.r.choice(["L", "RGB", "RGBA", "1", "P", "LA", "CMYK", "I;16", "F", "I"])
        fmt = self.r.choice(["PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM"])
        im, b = Image.new(mode, size), BytesIO()
        try: im.save(b, fmt)
        except Exception: Image.new("RGB", size).save(b, "PNG")
        data = bits(b.getvalue(), self.r) if self.r.random() < 0.8 else b.getvalue()
        path = self.new()/self.r.choice(["a.png", "$x^{$.jpg", "\x1b[2J.gif", "caf\udce9.png", "猫.png"])
        path.write_bytes(data)
        return call("capsule_predict", self.top/"base", path)

def mutations(n, r, top, kinds, note):
    a = Attacks(r, top)
    for i in range(n):
        kind = r.choice(["folder", "folder", "results", "line", "picture"])
        code, err = child(getattr(a, kind)(), 90)
        ok = code in (0, 1, 2) and "Traceback" not in err and not any(c in err for c in "\x1b\x07")
        kinds.setdefault(f"mutated {kind}", dict(survived=0, failed=0))["survived" if ok else "failed"] += 1
        if not ok: print(f"mutation {i}: {kind}: {code} {err[-700:]}", file=sys.stderr, flush=True)
        for p in top.glob("a[0-9]*"): shutil.rmtree(p, ignore_errors=True)
        note()

if __name__ == "__main__":
    p = argparse.ArgumentParser()
    for k, v in dict(kills=300, mutations=1000, seed=20261).items(): p.add_argument(f"--{k}", type=int, default=v)
    p.add_argument("--out")
    o, kinds = p.parse_args(), {}

    def note():
        "Write what was done so far"
        did = {k: sum(v[k] for v in kinds.values()) for k in ("survived", "failed")}
        res = dict(command=f"python tests/attacks.py --kills {o.kills} --mutations {o.mutations} --seed {o.seed}", seed=o.seed, n=sum(did.values()), **did, kinds=kinds,
                   device=device_name(torch.device("cpu")), versions=dict(torch=torch.__version__, python=platform.python_version()))
        if o.out: Path(o.out).write_text(json.dumps(res, indent=1) + "\n")
        return res

    top = Path(tempfile.mkdtemp())
    try:
        mutations(o.mutations, random.Random(o.seed + 1), top, kinds, note)
        kills(o.kills, random.Random(o.seed), top, kinds, note)
    finally: shutil.rmtree(top, ignore_errors=True)
    print(json.dumps(note(), indent=1))
