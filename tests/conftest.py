"Shared by all tests: small data, a small trained run, and the commands as real processes without a network."
import os, signal, socket, subprocess, sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")   # before torch is imported
os.environ.setdefault("MPLBACKEND", "Agg")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)   # `pytest &`: a shell's background job would pass it on

import pytest

pytest_plugins = ["browser"]   # its fixtures: chromium, open_page, serve

ROOT = Path(__file__).resolve().parents[1]
TINY = "--conv-channels 8 --primary-types 2 --primary-size 4 --class-size 4 --decoder-widths 16,32".split()
TINY_CONFIG = dict(conv_channels=8, n_types=2, d_primary=4, d_class=4, decoder=(16,32))


@pytest.hookimpl(tryfirst=True)   # before `-m` chooses
def pytest_collection_modifyitems(items):
    "What is marked `kills`, `browser` or `wheel` is slow; what asks for a browser or for the rendered site is `browser`"
    for o in items:
        if {"chromium", "site"} & set(o.fixturenames): o.add_marker("browser")
        if any(o.get_closest_marker(k) for k in ("kills", "browser", "wheel")): o.add_marker("slow")


def command_line(verb, *args):
    "A verb as a process: what its console script does, of this checkout whatever is installed"
    code = f"import sys; from capsule_routing.commands import {verb}; sys.exit({verb}.main())"
    return [sys.executable, "-c", code, *map(str, args)]


@pytest.fixture(scope="session")
def no_network():
    "Settings under which every download ends at a local port that nobody listens to"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))   # bound and never listening: connections are refused at once
        url = f"http://127.0.0.1:{s.getsockname()[1]}"
        yield {**{k: url for k in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")}, "no_proxy": "", "NO_PROXY": ""}


@pytest.fixture(scope="session")
def cmd_env(no_network, tmp_path_factory):
    "The environment of the commands: one thread, this checkout, an empty data folder, no network"
    env = {k: v for k, v in os.environ.items() if not k.startswith("CAPSULE_ROUTING_")}
    env |= no_network
    env |= dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", MPLBACKEND="Agg", COLUMNS="120", PYTHONUNBUFFERED="1",
                CAPSULE_ROUTING_DATA=str(tmp_path_factory.mktemp("no-data")),
                PYTHONPATH=os.pathsep.join([str(ROOT)] + [p for p in [os.environ.get("PYTHONPATH")] if p]))
    return env


@pytest.fixture(scope="session")
def run_cmd(cmd_env):
    "`run_cmd(verb, *args, cwd=..., env={...})`: run a verb to its end; a `CompletedProcess` with texts"
    def run(verb, *args, cwd=None, env=None, timeout=240):
        return subprocess.run(command_line(verb, *args), cwd=cwd, env={**cmd_env, **(env or {})}, timeout=timeout,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    return run


@pytest.fixture(scope="session")
def start_cmd(cmd_env):
    "Like `run_cmd`, but started and left running: for signals. What still runs at the end is killed."
    procs = []
    def start(verb, *args, cwd=None, env=None):
        p = subprocess.Popen(command_line(verb, *args), cwd=cwd, env={**cmd_env, **(env or {})}, stdin=subprocess.DEVNULL,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
        procs.append(p)
        return p
    yield start
    for p in procs:
        if p.poll() is None: p.kill()
        p.communicate()


@pytest.fixture(scope="session")
def glyph_images():
    "120 glyphs of 28x28: `x` uint8 `(n, 1, 28, 28)`, `y` int64 `(n,)`"
    from capsule_routing.glyphs import make_glyphs
    return make_glyphs(120, seed=3)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory, glyph_images):
    "A tree of images with one folder per class: `train` (3 classes, 10 images each) and `test` (4 each)"
    from PIL import Image
    top = tmp_path_factory.mktemp("pictures")
    for c, name in enumerate(["zero", "one", "two"]):
        own = [im for im, y in zip(glyph_images.x, glyph_images.y) if int(y) == c]
        own = (own*14)[:14]
        for i, im in enumerate(own):
            d = top/("train" if i < 10 else "test")/name
            d.mkdir(parents=True, exist_ok=True)
            Image.fromarray(im[0].numpy()).save(d/f"{i:02d}.png")
    return top


@pytest.fixture(scope="session")
def trained(run_cmd, image_folder, tmp_path_factory):
    "A tiny run on the folder of images, made by the command itself; `.path` and `.stdout`. Copy it before changing it."
    from types import SimpleNamespace
    top = tmp_path_factory.mktemp("trained")
    args = [*"--epochs 1 --batch-size 8 --size 28 --channels 1 --with_reconstruction --no-cuda --out tiny".split(), *TINY,
            "--folder", image_folder/"train", "--test_folder", image_folder/"test"]
    p = run_cmd("capsule_train", *args, cwd=top)
    assert p.returncode == 0, p.stdout+p.stderr
    return SimpleNamespace(path=top/"tiny", args=args, stdout=p.stdout, stderr=p.stderr)


@pytest.fixture
def own_run(trained, tmp_path):
    "A copy of the trained run that a test may spoil"
    import shutil
    return Path(shutil.copytree(trained.path, tmp_path/"run"))


@pytest.fixture(scope="session")
def seven(tmp_path_factory, glyph_images):
    "An image file with one glyph, light on dark"
    from PIL import Image
    path = tmp_path_factory.mktemp("image")/"seven.png"
    i = [int(y) for y in glyph_images.y].index(7)
    Image.fromarray(glyph_images.x[i, 0].numpy()).save(path)
    return path
