"Data: batches that depend on seed and epoch alone; downloads that end, whole or not at all; image files of every kind."
import contextlib, gzip, hashlib, http.server, io, os, pickle, struct, subprocess, sys, tarfile, threading

import numpy as np
import pytest
import torch
from PIL import Image

from capsule_routing.data import (Batch, DataUnavailable, ImageSet, batches, default_data_dir, epoch_plan, eval_batches, load_data,
                                  read_image, shift_images)


def image_set(n=50, c=1, h=9, w=9, classes=10):
    g = torch.Generator().manual_seed(0)
    return ImageSet(torch.randint(0, 256, (n, c, h, w), dtype=torch.uint8, generator=g), torch.arange(n) % classes, range(classes))


def same(a, b):
    a, b = list(a), list(b)
    return len(a) == len(b) and all(torch.equal(s, t) for p, q in zip(a, b) for s, t in zip(p[:3], q[:3]))


# --- batches

def test_test_images_are_neither_shifted_nor_shuffled():
    ds = image_set()
    x, y, idx = (torch.cat(t) for t in list(zip(*eval_batches(ds, 16)))[:3])
    assert torch.equal(x.mul(255).round().to(torch.uint8), ds.x) and torch.equal(y, ds.y) and torch.equal(idx, torch.arange(50))
    assert same(eval_batches(ds, 16), eval_batches(ds, 16))


def test_pixels_stay_between_0_and_1():
    x = ImageSet(torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16), torch.tensor([0]), "ab")
    for got in (next(batches(x, 4, shift=0)), next(eval_batches(x, 4))):
        assert got[0].dtype == torch.float32
        assert torch.allclose(got[0].flatten(), torch.arange(256) / 255)   # neither normalised nor left at 255


def test_shift_against_a_loop_with_numpy():
    x, g = image_set(200, c=3, h=8, w=6).x, torch.Generator().manual_seed(1)
    x[:, :, [0, -1]] = 0; x[..., [0, -1]] = 0   # a black border, as in MNIST: zeros enter
    dx, dy = (torch.randint(-9, 10, (200,), generator=g) for _ in range(2))
    want = np.zeros_like(x.numpy())
    for k in range(200):
        for r in range(8):
            for c in range(6):
                sr, sc = r - int(dy[k]), c - int(dx[k])
                if 0 <= sr < 8 and 0 <= sc < 6: want[k, :, r, c] = x[k, :, sr, sc]
    got = shift_images(x, dx, dy)
    assert got.dtype == torch.uint8 and np.array_equal(got, want)
    assert torch.equal(shift_images(x.float(), dx, dy), got.float())


def test_a_shift_does_not_wrap_around():
    x = torch.zeros(1, 1, 5, 5, dtype=torch.uint8)
    x[..., -1] = 255   # one bright side: the border is black in the median
    got = shift_images(x, torch.tensor([2]), torch.tensor([-1]))[0, 0]
    assert not got.any()


def test_training_shifts_are_even_and_reach_two_pixels():
    x = torch.zeros(5000, 1, 9, 9, dtype=torch.uint8); x[:, 0, 4, 4] = 255
    ds = ImageSet(x, torch.zeros(5000, dtype=torch.int64), "a")
    got = torch.cat([x for x, *_ in batches(ds, 512, seed=1)])
    at = got.flatten(1).argmax(1)
    counts = torch.bincount(at, minlength=81).reshape(9, 9)
    assert counts[2:7, 2:7].min() > 140 and counts.sum() == counts[2:7, 2:7].sum()
    assert same(batches(ds, 512, seed=1, shift=0, shuffle=False), eval_batches(ds, 512))


def test_the_global_generators_are_neither_read_nor_moved():
    ds = image_set()
    torch.manual_seed(1); np.random.seed(1)
    a = list(batches(ds, 16, seed=5, epoch=2))
    torch.manual_seed(2); np.random.seed(2)
    state = torch.random.get_rng_state()
    assert same(a, batches(ds, 16, seed=5, epoch=2)) and torch.equal(state, torch.random.get_rng_state())


def test_seed_and_epoch_each_change_order_and_shifts():
    plans = {(s, e): epoch_plan(1000, s, e) for s in range(3) for e in range(3)}   # (1, 2) is not (2, 1), nor 1 + 2 = 3 + 0
    for a in plans:
        for b in plans:
            if a != b: assert not torch.equal(plans[a][0], plans[b][0]) and not torch.equal(plans[a][1], plans[b][1])


@pytest.mark.parametrize("batch_size, drop_last", [(16, False), (16, True), (7, False), (50, False), (64, False), (64, True)])
def test_every_start_gives_the_batches_of_the_whole_epoch(batch_size, drop_last):
    ds = image_set()
    kw = dict(seed=3, epoch=4, drop_last=drop_last)
    whole = list(batches(ds, batch_size, **kw))
    assert sum(len(b.y) for b in whole) == (50 // batch_size * batch_size if drop_last else 50)
    for start in range(len(whole) + 2):
        assert same(whole[start:], batches(ds, batch_size, start=start, **kw))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_together_see_what_one_process_sees(world):
    ds = image_set()
    for one, *parts in zip(batches(ds, 16, seed=3), *(batches(ds, 16, seed=3, rank=r, world=world) for r in range(world)), strict=True):
        for k in range(3): assert torch.equal(one[k], torch.cat([p[k] for p in parts]))
        assert max(len(p[1]) for p in parts) - min(len(p[1]) for p in parts) <= 1
    idx = torch.cat([b.index for r in range(world) for b in eval_batches(ds, 16, rank=r, world=world)])
    assert torch.equal(idx.sort()[0], torch.arange(50))                # every test image once


def test_a_batch_has_names():
    b = next(batches(image_set(), 4))
    assert type(b) is Batch and b._fields == ("x", "y", "index", "parts") and b.parts is None
    assert b.x.shape == (4, 1, 9, 9) and b.y.shape == b.index.shape == (4,)


def test_order_and_shifts_are_those_of_earlier_releases():
    "Runs are resumed in the middle of an epoch: what the plan of an epoch says must never change"
    digest = lambda *ts: hashlib.sha256(b"".join(t.numpy().tobytes() for t in ts)).hexdigest()[:16]
    for args, want in (((1000, 0, 0), "8a3a67357e5744cf"), ((777, 5, 3, 4), "4a4b355ca39beb0c"), ((50, 1, 9, 0, False), "12c44b6df7693efc")):
        assert digest(*epoch_plan(*args)) == want, args


@pytest.mark.parametrize("kw, error, text", [
    (dict(batch_size=0), ValueError, "batch_size=0"), (dict(batch_size=2.0), TypeError, "batch_size=2.0"), (dict(shift=-1), ValueError, "shift=-1"),
    (dict(epoch=-1), ValueError, "epoch=-1"), (dict(seed=-1), ValueError, "seed=-1"), (dict(start=-1), ValueError, "start=-1"),
    (dict(rank=2, world=2), ValueError, "rank=2")])
def test_bad_batch_arguments_fail_at_the_call(kw, error, text):
    with pytest.raises(error, match=text): batches(image_set(), **{"batch_size": 4, **kw})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_the_device_inside_an_epoch():
    ds = image_set(500).to("cuda")
    steps = batches(ds, 64, seed=1)
    first = next(steps)                                                # the plan of the epoch has moved to the device
    torch.cuda.set_sync_debug_mode("error")
    try: rest = list(steps)
    finally: torch.cuda.set_sync_debug_mode("default")
    for a, b in zip([first, *rest], batches(image_set(500), 64, seed=1), strict=True):
        for s, t in zip(a[:3], b[:3]): assert torch.equal(s.cpu(), t)          # and the same on every device


# --- image sets

@pytest.mark.parametrize("x, y, text", [
    (torch.zeros(4, 1, 3, 3), torch.zeros(4, dtype=torch.int64), "x=float32"),
    (torch.full((4, 1, 3, 3), float("nan")), torch.zeros(4, dtype=torch.int64), "x=float32"),
    (np.zeros((4, 1, 3, 3), np.uint8), torch.zeros(4, dtype=torch.int64), "x=array"),
    (torch.zeros(4, 3, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), r"x=uint8 \(4, 3, 3\)"),
    (torch.zeros(4, 1, 3, 3, dtype=torch.uint8), torch.zeros(4), "y=float32"),
    (torch.zeros(4, 1, 3, 3, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), r"y=int64 \(3,\)"),
    (torch.zeros(4, 1, 3, 3, dtype=torch.uint8), torch.tensor([0, 1, 2, 1]), "y=2: must be a class from 0 to 1"),
    (torch.zeros(4, 1, 3, 3, dtype=torch.uint8), torch.tensor([0, 1, -1, 1]), "y=-1: must be a class from 0 to 1"),
    (torch.zeros(0, 1, 3, 3, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), "at least one image")])
def test_bad_images_and_labels_are_refused(x, y, text):
    with pytest.raises(ValueError, match=text): ImageSet(x, y, "ab")


def test_factors_follow_their_images():
    ds = load_data("glyphs", limit=30).train
    assert len(ds) == 30 and ds.factors.shape == (30, len(ds.factor_names)) and ds.to("cpu").factors is not None
    with pytest.raises(ValueError, match="factors="): ImageSet(ds.x, ds.y, ds.classes, ds.factors[:5], ds.factor_names)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_of_pytorch_takes_image_sets(workers):
    from torch.utils.data import DataLoader, Subset
    ds = image_set(c=3)
    x, y = (torch.cat(t) for t in zip(*DataLoader(ds, 16, num_workers=workers)))
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    assert torch.equal(x, ds.x.float() / 255) and torch.equal(y, ds.y)
    x, y = next(iter(DataLoader(Subset(ds, [7, 3, 41]), 3, num_workers=workers)))
    assert torch.equal(x, ds.x[[7, 3, 41]].float() / 255) and y.tolist() == ds.y[[7, 3, 41]].tolist()
    mixed = torch.cat([y for _, y in DataLoader(ds, 16, shuffle=True, num_workers=workers)])
    assert torch.equal(mixed.sort()[0], ds.y.sort()[0])


def test_elements_of_an_image_set():
    ds = image_set(5)
    assert len(list(ds)) == 5 and type(ds[0][1]) is int and torch.equal(ds[-1][0], ds[4][0])
    with pytest.raises(IndexError): ds[5]


# --- names

@pytest.mark.parametrize("name, near", [("mnits", "mnist"), ("fashion", "fashion_mnist"), ("cifar", "cifar10"), ("glyph", "glyphs"), ("KMINST", "kmnist")])
def test_an_unknown_name_brings_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"dataset='{name}': .*did you mean {near}") as e: load_data(name)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("args, kw, text", [
    (("zzz",), {}, "dataset='zzz': must be one of mnist, "), (("folder",), {}, "--folder"), (("glyphs",), dict(limit=0), "limit=0"),
    (("mnist",), dict(folder="x"), "folder='x': is only for"), (("glyphs",), dict(channels=1), "channels=1: is only for"),
    (("mnist",), dict(timeout=0), "timeout=0"), (("mnist",), dict(timeout=float("nan")), "timeout=nan")])
def test_bad_arguments_are_named(args, kw, text):
    with pytest.raises(ValueError, match=text): load_data(*args, **kw)


def test_the_data_folder_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CAPSULE_ROUTING_DATA", str(tmp_path))
    assert default_data_dir() == tmp_path
    monkeypatch.delenv("CAPSULE_ROUTING_DATA")
    assert "capsule_routing" in str(default_data_dir())
    (tmp_path/"file").touch()
    with pytest.raises(ValueError, match="must be a folder"): load_data("mnist", tmp_path/"file")


def test_importing_the_module_loads_neither_torchvision_nor_pillow():
    code = "import sys, capsule_routing.data; print([m for m in ('torchvision', 'PIL', 'matplotlib', 'filelock') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# --- downloads: a server on this machine, well-behaved or not

class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.mode, self.asked, self.quit = {}, "good", [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_GET(self):
        s, name = self.server, self.path.strip("/")
        s.asked.append(name)
        if s.mode == "no headers": s.quit.wait(30); return
        if s.mode == "missing" or name not in s.files: self.send_error(404); return
        body = s.files[name]
        self.send_response(200)
        if s.mode != "endless": self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            if s.mode == "stalls": self.wfile.write(body[:len(body)//2]); self.wfile.flush(); s.quit.wait(30)
            elif s.mode == "endless":
                while not s.quit.is_set(): self.wfile.write(body)
            elif s.mode == "breaks off": self.wfile.write(body[:len(body)//2])
            elif s.mode == "flips a bit": self.wfile.write(bytes([body[0] ^ 1]) + body[1:])
            elif s.mode == "drips":
                for b in body:
                    self.wfile.write(bytes([b])); self.wfile.flush()
                    if s.quit.wait(0.05): break
            else: self.wfile.write(body)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as s:
        threading.Thread(target=s.serve_forever, args=(0.02,), daemon=True).start()
        yield s
        s.quit.set(); s.shutdown()


def idx(a):
    "The file format of the MNIST family"
    return struct.pack(f">BBBB{a.ndim}I", 0, 0, 8, a.ndim, *a.shape) + a.astype(np.uint8).tobytes()


@pytest.fixture
def small_mnist(server, monkeypatch):
    "A tiny MNIST on the local server, known to torchvision's class by name and checksum"
    from torchvision import datasets
    rng = np.random.default_rng(0)
    raw = {"train-images-idx3-ubyte": rng.integers(0, 256, (30, 28, 28)), "train-labels-idx1-ubyte": np.arange(30) % 10,
           "t10k-images-idx3-ubyte": rng.integers(0, 256, (10, 28, 28)), "t10k-labels-idx1-ubyte": np.arange(10)}
    server.files = {k + ".gz": gzip.compress(idx(v), mtime=0) for k, v in raw.items()}
    monkeypatch.setattr(datasets.MNIST, "mirrors", [server.url])
    monkeypatch.setattr(datasets.MNIST, "resources", [(k, hashlib.md5(v).hexdigest()) for k, v in server.files.items()])
    return raw


def left_behind(folder):
    "Files in a folder, without the lock"
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.name != ".download.lock")


def test_a_download_happens_once(server, small_mnist, tmp_path):
    data = load_data("mnist", tmp_path, progress=False)
    assert data.name == "mnist" and data.note is None and len(server.asked) == 4
    assert np.array_equal(data.train.x[:, 0], small_mnist["train-images-idx3-ubyte"]) and data.test.y.tolist() == list(range(10))
    assert data.train.classes == tuple("0123456789")
    server.mode = "missing"
    again = load_data("mnist", tmp_path, progress=False)
    assert torch.equal(again.train.x, data.train.x) and len(server.asked) == 4
    assert len(left_behind(tmp_path)) == 8                             # four archives and what was in them


@pytest.mark.parametrize("mode", ["missing", "no headers", "stalls", "drips", "endless", "breaks off", "flips a bit"])
def test_a_bad_server_costs_bounded_time_and_leaves_nothing(server, small_mnist, tmp_path, monkeypatch, mode):
    server.mode = mode
    monkeypatch.setattr("capsule_routing.downloads.MAX_BYTES", 1 << 20)
    outcome = []
    def attempt():
        try: load_data("mnist", tmp_path, timeout=0.4, progress=False)
        except Exception as e: outcome.append(e)
    t = threading.Thread(target=attempt, daemon=True)
    t.start(); t.join(20)                                              # the server itself would go on for 30 s
    assert outcome and type(outcome[0]) is DataUnavailable, outcome
    text = str(outcome[0])
    assert server.url in text and "--data-dir" in text and "--dataset glyphs" in text and str(tmp_path) in text and "\n" not in text
    assert left_behind(tmp_path) == [] and not (tmp_path/"MNIST").exists()
    server.mode = "good"                                               # and the next attempt is not misled
    assert len(load_data("mnist", tmp_path, progress=False).train) == 30


def test_a_server_that_accepts_and_says_nothing(server, small_mnist, monkeypatch, tmp_path):
    import socket
    from torchvision import datasets
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0)); s.listen()
        monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{s.getsockname()[1]}/"])
        with pytest.raises(DataUnavailable, match="only 0 bytes in"): load_data("mnist", tmp_path, timeout=0.3, progress=False)
    assert left_behind(tmp_path) == []


def test_the_second_address_is_tried(server, small_mnist, tmp_path, monkeypatch):
    from torchvision import datasets
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/", server.url])
    assert len(load_data("mnist", tmp_path, progress=False).test) == 10


def test_no_name_and_no_network_means_glyphs_and_says_so(server, small_mnist, tmp_path):
    server.mode = "missing"
    data = load_data(data_dir=tmp_path, progress=False, limit=20)
    assert not (tmp_path/"MNIST").exists()                             # nothing that looks like data
    assert data.name == "glyphs" and len(data.train) == 20
    assert "MNIST" in data.note and str(tmp_path) in data.note and "glyphs" in data.note and "\n" not in data.note


@pytest.mark.parametrize("what", ["cut", "flipped", "emptied", "swapped", "pickle"])
def test_a_damaged_file_is_replaced_or_refused(server, small_mnist, tmp_path, what):
    good = load_data("mnist", tmp_path, progress=False)
    path = tmp_path/"MNIST"/"raw"/"train-images-idx3-ubyte"
    body = bytearray(path.read_bytes())
    if what == "cut": body = body[:-100]
    if what == "flipped": body[5000] ^= 1
    if what == "emptied": body = b""
    if what == "swapped": body = (tmp_path/"MNIST"/"raw"/"t10k-images-idx3-ubyte").read_bytes()
    if what == "pickle": body = pickle.dumps(list(range(100)))
    server.mode = "missing"
    path.write_bytes(body)
    assert torch.equal(load_data("mnist", tmp_path, progress=False).train.x, good.train.x)    # from the archive beside it
    path.with_name(path.name + ".gz").unlink()
    if what in ("flipped", "swapped"): return                          # without the archive nobody can tell
    path.write_bytes(body)
    with pytest.raises(DataUnavailable, match="train-images-idx3-ubyte is damaged"): load_data("mnist", tmp_path, progress=False)
    server.mode = "good"
    assert torch.equal(load_data("mnist", tmp_path, progress=False).train.x, good.train.x)    # or downloaded anew


def test_a_folder_that_only_can_be_read(small_mnist, server, tmp_path, monkeypatch):
    load_data("mnist", tmp_path, progress=False)
    for name in ("mkdir", "unlink", "touch"): monkeypatch.setattr(f"pathlib.Path.{name}", None)
    real = open
    def read_only(file, mode="r", *args, **kw):
        assert not set(mode) & set("wax+"), f"{file} opened for writing"
        return real(file, mode, *args, **kw)
    monkeypatch.setattr("builtins.open", read_only)
    assert len(load_data("mnist", tmp_path, progress=False).train) == 30


@pytest.mark.parametrize("kept", [".gz", ""])
def test_archives_alone_or_files_alone_are_enough(small_mnist, server, tmp_path, kept):
    good = load_data("mnist", tmp_path, progress=False)
    server.mode = "missing"
    for p in (tmp_path/"MNIST"/"raw").iterdir():
        if p.suffix != kept: p.unlink()
    (tmp_path/".download.lock").unlink()
    again, names = load_data("mnist", tmp_path, progress=False), left_behind(tmp_path)
    assert torch.equal(again.train.x, good.train.x) and torch.equal(again.test.y, good.test.y)
    assert len(names) == 4 and all(n.endswith(kept or "ubyte") for n in names)    # only read
    assert not (tmp_path/".download.lock").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_links_and_pipes_in_the_way_are_replaced(server, small_mnist, tmp_path):
    raw, mine = tmp_path/"data"/"MNIST"/"raw", tmp_path/"mine"
    raw.mkdir(parents=True); mine.write_text("mine")
    for name in ("train-images-idx3-ubyte.gz", "train-images-idx3-ubyte", "train-images-idx3-ubyte.gz.part"): (raw/name).symlink_to(mine)
    for name in ("train-labels-idx1-ubyte.gz", "train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte.gz.part"): os.mkfifo(raw/name)
    assert len(load_data("mnist", tmp_path/"data", progress=False).train) == 30 and mine.read_text() == "mine"
    assert (raw/"train-images-idx3-ubyte").is_file() and not (raw/"train-images-idx3-ubyte").is_symlink()


def test_two_at_once_download_once(server, small_mnist, tmp_path):
    got = []
    threads = [threading.Thread(target=lambda: got.append(load_data("mnist", tmp_path, progress=False))) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join(60)
    assert len(got) == 3 and len(server.asked) == 4
    for d in got: assert torch.equal(d.train.x, got[0].train.x)


def test_a_lock_is_not_waited_for_without_end_or_word(server, small_mnist, tmp_path, capfd):
    code = f"import filelock, time; l = filelock.FileLock(r'{tmp_path/'.download.lock'}'); l.acquire(); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as p:
        try:
            assert p.stdout.readline() == "held\n"
            with pytest.raises(DataUnavailable, match="lock.* could not be acquired") as e: load_data("mnist", tmp_path, timeout=0.1)
        finally: p.kill()
    assert "\n" not in str(e.value) and "another process" in capfd.readouterr().err
    assert len(load_data("mnist", tmp_path, progress=False).train) == 30   # its owner is gone


def test_what_a_killed_process_left_is_taken_away(server, small_mnist, tmp_path):
    (tmp_path/".download-old").mkdir(); (tmp_path/".download-old"/"half").touch()
    load_data("mnist", tmp_path, progress=False)
    assert not (tmp_path/".download-old").exists()


def test_a_folder_that_cannot_be_written(server, small_mnist, tmp_path, monkeypatch):
    def full(*args, **kw): raise OSError(28, "No space left on device")
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(DataUnavailable, match="No space left on device"): load_data("mnist", tmp_path, progress=False)
    assert left_behind(tmp_path) == []


def test_an_old_folder_of_pickles_is_not_looked_at(server, small_mnist, tmp_path):
    load_data("mnist", tmp_path, progress=False)
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/"payload"),)
    old = tmp_path/"MNIST"/"processed"
    old.mkdir()
    for f in ("training.pt", "test.pt"): (old/f).write_bytes(pickle.dumps(Evil()))
    assert len(load_data("mnist", tmp_path, progress=False).train) == 30 and not (tmp_path/"payload").exists()


def test_labels_out_of_range_are_refused(server, small_mnist, tmp_path, monkeypatch):
    from torchvision import datasets
    server.files["train-labels-idx1-ubyte.gz"] = bad = gzip.compress(idx(np.full(30, 12)), mtime=0)
    monkeypatch.setattr(datasets.MNIST, "resources", [(k, hashlib.md5(bad).hexdigest() if "train-labels" in k else m) for k, m in datasets.MNIST.resources])
    with pytest.raises(ValueError, match="y=12: must be a class from 0 to 9"): load_data("mnist", tmp_path, progress=False)


def test_cifar10(server, tmp_path, monkeypatch):
    from torchvision import datasets
    cls, rng, files = datasets.CIFAR10, np.random.default_rng(0), {}
    for name in ["data_batch_1", "test_batch"]:
        files[name] = pickle.dumps({"data": rng.integers(0, 256, (6, 3072), dtype=np.uint8), "labels": [0, 1, 2, 9, 4, 5]})
    files["batches.meta"] = pickle.dumps({"label_names": [f"kind {k}" for k in range(10)]})
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, body in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}"); info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    md5 = lambda b: hashlib.md5(b).hexdigest()
    server.files["cifar-10-python.tar.gz"] = out.getvalue()
    monkeypatch.setattr(cls, "url", server.url + "cifar-10-python.tar.gz")
    monkeypatch.setattr(cls, "tgz_md5", md5(out.getvalue()))
    monkeypatch.setattr(cls, "train_list", [["data_batch_1", md5(files["data_batch_1"])]])
    monkeypatch.setattr(cls, "test_list", [["test_batch", md5(files["test_batch"])]])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5(files["batches.meta"])})
    data = load_data("cifar10", tmp_path, progress=False)
    assert data.train.image_shape == (3, 32, 32) and data.train.y.tolist() == [0, 1, 2, 9, 4, 5] and data.train.classes[2] == "kind 2"
    want = pickle.loads(files["data_batch_1"])["data"].reshape(6, 3, 32, 32)
    assert np.array_equal(data.train.x, want)
    assert left_behind(tmp_path) == ["batches.meta", "cifar-10-python.tar.gz", "data_batch_1", "test_batch"]
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/"payload"),)
    server.mode = "missing"                                            # a pickle of another checksum is never opened
    (tmp_path/"cifar-10-batches-py"/"data_batch_1").write_bytes(pickle.dumps(Evil()))
    (tmp_path/"cifar-10-python.tar.gz").unlink()
    with pytest.raises(DataUnavailable, match="cifar-10-batches-py is missing or damaged"): load_data("cifar10", tmp_path, progress=False)
    assert not (tmp_path/"payload").exists()


def test_progress_is_silent_when_asked(server, small_mnist, tmp_path, capfd):
    load_data("mnist", tmp_path, progress=False)
    assert capfd.readouterr() == ("", "")


# --- image files

GREY = np.tile(np.arange(8, dtype=np.uint8) * 36, (6, 1))              # 6 high, 8 wide, dark to light


def saved(tmp_path, im, name="x.png", **kw):
    im.save(tmp_path/name, **kw)
    return tmp_path/name


@pytest.mark.parametrize("dtype, name", [(np.uint8, "x.png"), (np.uint16, "x.png"), (np.uint16, "x.tif"), (np.int32, "x.tif"), (np.uint8, "x.bmp"), (np.uint8, "x.pgm")])
def test_grey_of_8_and_16_bits(tmp_path, dtype, name):
    a = GREY if dtype == np.uint8 else GREY.astype(dtype) * 257
    got = read_image(saved(tmp_path, Image.fromarray(a), name), 1)
    assert got.dtype == torch.uint8 and np.array_equal(got[0], GREY)
    assert np.array_equal(read_image(tmp_path/name, 3), np.stack([GREY]*3))
    assert np.array_equal(read_image(tmp_path/name, 1, invert=True)[0], 255 - GREY)


def test_transparency_goes_on_white(tmp_path):
    a = np.zeros((4, 4, 4), np.uint8); a[:2, :, 3] = 255               # black above, clear below
    got = read_image(saved(tmp_path, Image.fromarray(a)), 3)
    assert not got[:, :2].any() and (got[:, 2:] == 255).all()
    grey = Image.fromarray(a[..., 3]).convert("LA"); grey.putalpha(Image.fromarray(a[..., 3]))
    assert (read_image(saved(tmp_path, grey, "la.png"), 1) == 255).all()
    pal = Image.new("P", (4, 4), 1); pal.putpalette([0, 0, 0, 255, 0, 0])
    assert (read_image(saved(tmp_path, pal, "p.png", transparency=1), 3) == 255).all()


def test_palette_cmyk_one_bit_and_rotated(tmp_path):
    pal = Image.new("P", (4, 4), 1); pal.putpalette([0, 0, 0, 255, 0, 0])
    assert read_image(saved(tmp_path, pal), 3)[:, 0, 0].tolist() == [255, 0, 0]
    red = read_image(saved(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "c.jpg", quality=100), 3)[:, 4, 4]
    assert red[0] > 230 and red[1] < 30 and red[2] < 30
    assert (read_image(saved(tmp_path, Image.new("1", (4, 4), 1), "b.png"), 1) == 255).all()
    exif = Image.Exif(); exif[0x0112] = 6                              # turn by a quarter to be upright
    path = saved(tmp_path, Image.fromarray(GREY), "r.png", exif=exif)
    assert np.array_equal(read_image(path, 1)[0], np.rot90(GREY, -1))


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("L", (5, 4), v) for v in (40, 200)]
    for name in ("a.gif", "a.png", "a.tif", "a.webp"):
        got = read_image(saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:]), 1, 4, 5)
        assert got.shape == (1, 4, 5) and (got.int() - 40).abs().max() <= 2, name


def test_size(tmp_path):
    path = saved(tmp_path, Image.fromarray(GREY))
    assert read_image(path).shape == (3, 6, 8) and read_image(path, 1, 3, 4).shape == (1, 3, 4) and read_image(path, 1, width=4).shape == (1, 6, 4)


def bad_files(d):
    png = io.BytesIO(); Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60), dtype=np.uint8)).save(png, "png")
    jpg = io.BytesIO(); Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60), dtype=np.uint8)).save(jpg, "jpeg")
    (d/"empty.png").touch()
    (d/"text.png").write_text("not an image")
    (d/"cut.png").write_bytes(png.getvalue()[:1500])
    (d/"cut.jpg").write_bytes(jpg.getvalue()[:900])
    (d/"head.png").write_bytes(png.getvalue()[:20])
    (d/"script.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    (d/"pickle.png").write_bytes(pickle.dumps([1]))
    Image.new("1", (9000, 9000)).save(d/"bomb.png")
    Image.new("F", (4, 4)).save(d/"float.tif")
    def chunk(kind, body):
        import zlib
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    (d/"vast.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)) + chunk(b"IEND", b""))
    return sorted(p for p in d.iterdir())


def test_bad_files_give_one_line_that_names_them(tmp_path, recwarn):
    paths = bad_files(tmp_path)
    assert len(paths) == 10
    for p in paths:
        with pytest.raises(ValueError) as e: read_image(p)
        assert str(e.value).startswith(f"{p}: cannot be read as an image: ") and "\n" not in str(e.value), str(e.value)
    with pytest.raises(ValueError, match="not one of PNG, JPEG"): read_image(tmp_path/"script.eps")   # for which Pillow would start Ghostscript
    with pytest.raises(ValueError, match="must be an image file"): read_image(tmp_path)
    with pytest.raises(FileNotFoundError, match="none.png: no such image file"): read_image(tmp_path/"none.png")
    with pytest.raises(ValueError, match="channels=2"): read_image(paths[0], 2)
    with pytest.raises(ValueError, match="height=0"): read_image(paths[0], 1, 0, 5)
    assert not [str(w.message) for w in recwarn.list]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path/"pipe.png")
    with pytest.raises(ValueError, match="must be an image file"): read_image(tmp_path/"pipe.png")


def test_mutated_images_are_read_or_refused(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path/"m"
    for name, kw in (("a.png", {}), ("a.jpg", {}), ("a.gif", {}), ("a.tif", {"compression": "tiff_lzw"}), ("a.webp", {}), ("a.bmp", {})):
        body = saved(tmp_path, Image.fromarray(GREY.repeat(3, 0)), name, **kw).read_bytes()
        for _ in range(60):
            b = bytearray(body)
            for at in rng.integers(0, len(b), 3): b[at] = rng.integers(256)
            path.write_bytes(b[:len(b) - int(rng.integers(0, 8))])
            with contextlib.suppress(ValueError): assert read_image(path, 3, 5, 5).shape == (3, 5, 5)


# --- folders of images

@pytest.fixture
def tree(tmp_path):
    "Two classes, `cat` with 12 images and `dog` with 18; a grey level for each image"
    for c, n, base in (("cat", 12, 10), ("dog", 18, 100)):
        for k in range(n):
            d = tmp_path/"tree"/c/("more" if k % 3 == 0 else ".")      # some lie deeper
            d.mkdir(parents=True, exist_ok=True)
            Image.new("L", (7, 5), base + k).save(d/f"{k:02d}.png")
    return tmp_path/"tree"


def levels(ds): return ds.x[:, 0, 0, 0].tolist()


def test_a_sixth_of_each_class_is_held_out(tree):
    a, b, c = (load_data("folder", folder=tree, seed=s) for s in (0, 0, 1))
    assert a.train.classes == ("cat", "dog") and a.train.image_shape == (3, 5, 7)
    assert a.test.y.tolist() == [0]*2 + [1]*3 and len(a.train) == 25 and "held out" in a.note
    assert sorted(levels(a.train) + levels(a.test)) == [*range(10, 22), *range(100, 118)]     # each image once
    assert levels(a.train) == levels(b.train) and set(levels(a.test)) != set(levels(c.test))
    assert all((v >= 100) == bool(y) for ds in (a.train, a.test) for v, y in zip(levels(ds), ds.y))
    assert set(a.train.take(10).y.tolist()) == {0, 1}                  # the first images are not all of one class


def test_a_tree_for_testing_size_and_channels(tree, tmp_path):
    (tmp_path/"other"/"dog").mkdir(parents=True); Image.new("RGB", (9, 9), "red").save(tmp_path/"other"/"dog"/"a.jpg")
    d = load_data(folder=tree, test_folder=tmp_path/"other", size=8, channels=1)
    assert d.name == "folder" and d.note is None and len(d.train) == 30 and d.train.image_shape == d.test.image_shape == (1, 8, 8)
    assert d.test.y.tolist() == [1]
    with pytest.raises(ValueError, match=r"\(5, 7\), .* is \(9, 9\); give a size"): load_data(folder=tree, test_folder=tmp_path/"other")
    assert load_data(folder=tree, size=(4, 6)).train.image_shape == (3, 4, 6)
    (tmp_path/"other"/"fox").mkdir(); Image.new("L", (9, 9)).save(tmp_path/"other"/"fox"/"a.png")
    with pytest.raises(ValueError, match="the class 'fox' is not among"): load_data(folder=tree, test_folder=tmp_path/"other", size=8)


def test_bad_trees(tree, tmp_path):
    (tree/"dog"/".hidden").touch(); (tree/"cat"/"Thumbs.db").touch(); (tree/".git").mkdir(); (tree/"readme.txt").touch()
    assert len(load_data(folder=tree).train) == 25                     # none of these is an image
    Image.new("L", (6, 5)).save(tree/"dog"/"zz.png")
    with pytest.raises(ValueError, match="images differ in size.*give a size"): load_data(folder=tree)
    (tree/"dog"/"zz.png").write_text("text")
    with pytest.raises(ValueError, match="zz.png: cannot be read as an image"): load_data(folder=tree, size=5)
    (tree/"dog"/"zz.png").unlink(); (tree/"dog"/"zz.png").symlink_to(tmp_path/"nowhere")
    with pytest.raises(FileNotFoundError, match="zz.png"): load_data(folder=tree, size=5)
    (tree/"dog"/"zz.png").unlink(); (tree/"fox").mkdir()
    with pytest.raises(ValueError, match="the class folder 'fox' holds no images"): load_data(folder=tree)
    with pytest.raises(ValueError, match="one folder of images for each class"): load_data(folder=tree/"dog"/"more")
    with pytest.raises(ValueError, match="folder=.*no such folder"): load_data(folder=tmp_path/"none")
    with pytest.raises(ValueError, match="must be a folder"): load_data(folder=tree/"readme.txt")
    with pytest.raises(ValueError, match="channels=2"): load_data(folder=tree/"..", channels=2)
    with pytest.raises(ValueError, match="size=0"): load_data(folder=tree, size=0)


# --- the real thing, where it is at hand

SIZES = {"train-images-idx3-ubyte": 47_040_016, "train-labels-idx1-ubyte": 60_008, "t10k-images-idx3-ubyte": 7_840_016, "t10k-labels-idx1-ubyte": 10_008}


def at_hand(name):
    "Are all files of a set of the MNIST family there, unpacked and of the right size?"
    raw = default_data_dir()/name/"raw"
    return all((raw/f).is_file() and (raw/f).stat().st_size == n for f, n in SIZES.items())


@pytest.mark.skipif(not at_hand("MNIST"), reason="no whole MNIST in the data folder")
def test_mnist_on_disk():
    data = load_data(progress=False)
    assert data.name == "mnist" and data.note is None
    assert data.train.x.shape == (60000, 1, 28, 28) and data.test.x.shape == (10000, 1, 28, 28)
    assert data.train.y[:8].tolist() == [5, 0, 4, 1, 9, 2, 1, 3] and data.test.y[:5].tolist() == [7, 2, 1, 0, 4]
    assert round(data.train.x.double().mean().item() / 255, 4) == 0.1307


@pytest.mark.skipif(not at_hand("FashionMNIST"), reason="no whole Fashion-MNIST in the data folder")
def test_fashion_mnist_on_disk():
    data = load_data("fashion-mnist", progress=False)
    assert data.name == "fashion_mnist" and len(data.train) == 60000 and len(data.test) == 10000
    assert data.train.classes[0] == "T-shirt/top" and data.train.y[:4].tolist() == [9, 0, 0, 3]
    assert round(data.train.x.double().mean().item() / 255, 4) == 0.2860
