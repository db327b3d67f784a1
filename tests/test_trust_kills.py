"Killed, interrupted, out of disk: real processes, real signals, and the same weights in the end."
import json, os, shutil, signal, subprocess, sys, time

import pytest
from conftest import ROOT, TINY

pytestmark = [pytest.mark.kills, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and POSIX signals")]

# A process that imports everything once, then forks a child for each attempt and kills it. It never computes itself,
# so that every child starts from the same untouched state, as a fresh process would.
NURSERY = r"""
import json, os, random, shutil, signal, sys, time
from dataclasses import replace
from pathlib import Path
import torch
import torch._dynamo                                    # which Adam would import in every child anew
from capsule_routing import runs, training
from capsule_routing.capsnet import caps_config
from capsule_routing.data import ImageData, ImageSet
from capsule_routing.training import TrainConfig, fit, new_net

top, kills, seed = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
NET = caps_config(height=20, width=20, n_classes=3, conv_channels=4, n_types=2, d_primary=4, d_class=4, decoder=(8,))
CFG = TrainConfig(epochs=3, batch_size=8, threads=1, precision="fp32", checkpoint_minutes=None, checkpoint_steps=2)
FAST = replace(CFG, average=0.9, schedule="one_cycle")  # as the recipe fast: averaged weights beside the trained ones
KINDS = dict(plain=CFG, averaged=FAST, threads=replace(FAST, threads=2))

def data():
    g = torch.Generator().manual_seed(0)
    sets = [ImageSet(torch.randint(0, 256, (n, 1, 20, 20), generator=g, dtype=torch.uint8), torch.randint(0, 3, (n,), generator=g), "abc") for n in (57, 9)]
    return ImageData("noise", *sets)

def child(kind, path, at=None):
    "Fork; the child trains in `path`, going on where it can. `at(k, name, args)` may kill it at the k-th call of a system function."
    r, w = os.pipe()
    pid = os.fork()
    if pid: os.close(w); return pid, r
    try:
        os.close(r)
        if at is not None:
            n = 0
            for name in ("fsync", "replace", "unlink"):
                def spy(*a, real=getattr(os, name), name=name, **k):
                    nonlocal n
                    n += 1
                    at(n, name, a)
                    return real(*a, **k)
                setattr(os, name, spy)
        class Beat:
            def on_start(self, s): os.write(w, b"s")
            def on_step(self, s): os.write(w, b".")
        cfg = KINDS[kind]
        if (path/runs.LAST).exists(): cfg = replace(cfg, threads=None)     # the recorded number
        fit(new_net(NET, cfg.seed), data(), cfg, path, resume=path.is_dir(), device="cpu", reporter=Beat())
    except BaseException as e:
        sys.stderr.write(f"child: {type(e).__name__}: {e}\n"); sys.stderr.flush()
        os._exit(1)
    os._exit(0)

def reap(pid, r):
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(r)                                         # not before: the child writes into it
    assert code in (0, -signal.SIGKILL), code
    return code

def result(kind, path):
    tensors, meta, _ = runs.read_tensors(path/runs.LAST)
    assert any(k.startswith(runs.RAW) for k in tensors) == (KINDS[kind].average > 0), sorted(tensors)
    assert {s["threads"] for s in meta["sessions"]} == {KINDS[kind].threads}, meta["sessions"]
    best = runs.read_tensors(path/runs.BEST)[0]
    rows = [{k: v for k, v in row.items() if "second" not in k} for row in meta["history"]]
    assert [{k: v for k, v in row.items() if "second" not in k} for row in runs.read_json(path/runs.HISTORY, list)] == rows
    assert len((path/"history.csv").read_text().splitlines()) == 1 + len(rows)
    left = {p.name for p in path.iterdir()} - {runs.CONFIG, runs.HISTORY, "history.csv", runs.LAST, runs.BEST, runs.LOCK}
    assert not left, left
    return runs.digest(tensors, json.dumps(rows)), runs.digest(best)

def check_between(path):
    "After a kill each file is whole: an old one or a new one"
    if (path/runs.LAST).exists(): runs.read_checkpoint(path)
    if (path/runs.BEST).exists(): runs.read_tensors(path/runs.BEST)
    for name, kind in ((runs.CONFIG, dict), (runs.HISTORY, list)):
        if (path/name).exists(): runs.read_json(path/name, kind)

want = {}
for kind in KINDS:
    assert reap(*child(kind, top/f"whole-{kind}")) == 0
    want[kind] = result(kind, top/f"whole-{kind}")
assert want["plain"] != want["averaged"]
def count(n, name, a):                                  # system calls of an undisturbed run
    with open(top/"calls", "a") as f: f.write(f"{name}\n")
assert reap(*child("plain", top/"counted", count)) == 0
assert result("plain", top/"counted") == want["plain"]
total = len((top/"calls").read_text().split())

rnd, done, stats = random.Random(seed), dict.fromkeys(kills, 0), dict(random=0, inside=0, half=0, runs=0)
while (left := [k for k in kills if done[k] < kills[k]]):
    kind, path = left[stats["runs"] % len(left)], top/f"run{stats['runs']}"
    while True:                                         # one run, killed again and again until it is through
        if done[kind] >= kills[kind] or rnd.random() < 0.15: code = reap(*child(kind, path))
        elif rnd.random() < 0.5:                        # at a random moment, from outside
            pid, r = child(kind, path)
            for _ in range(rnd.randrange(0, 14)):
                if not os.read(r, 1): break
            time.sleep(rnd.random()*0.01)
            os.kill(pid, signal.SIGKILL)
            code = reap(pid, r)
            stats["random"] += code != 0
        else:                                           # within a write: before or after a sync or a rename, or with half a file
            k, half = rnd.randrange(1, total//3), rnd.random() < 0.3
            def at(n, name, a):
                if n < k: return
                if half and name == "fsync" and not os.path.isdir(f"/proc/self/fd/{a[0]}"): os.ftruncate(a[0], os.fstat(a[0]).st_size//2)
                elif half: return
                os.kill(os.getpid(), signal.SIGKILL)
            code = reap(*child(kind, path, at))
            stats["half" if half else "inside"] += code != 0
        if code == 0: break
        done[kind] += 1
        check_between(path)
    assert result(kind, path) == want[kind], path
    stats["runs"] += 1
print(json.dumps(dict(stats, kills=done)))
"""


def test_killed_at_forty_points(tmp_path):
    "SIGKILL at random steps, around every sync and rename, and with half a checkpoint on disk: the same weights, averages, moments and history"
    kills = dict(plain=12, averaged=20, threads=8)
    p = subprocess.run([sys.executable, "-c", NURSERY, str(tmp_path), json.dumps(kills), "1"], cwd=ROOT, capture_output=True, text=True, timeout=280,
                       env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"})   # two threads may share one core
    assert p.returncode == 0, p.stdout + p.stderr
    n = json.loads(p.stdout)
    assert n["kills"] == kills and min(n["random"], n["inside"], n["half"]) >= 3, n


@pytest.fixture(scope="module")
def args(image_folder):
    "Options of a small run of the recipe of the packaged weights: 30 images of 3 classes, 8 steps an epoch, a checkpoint after each"
    return [*"--dataset folder --recipe fast --batch-size 4 --with_reconstruction --no-cuda --checkpoint-minutes 0.00001 --log-interval 1".split(),
            "--folder", image_folder/"train", "--test-folder", image_folder/"test", *"--channels 1".split(), *TINY, *"--decoder-widths 4".split()]


def outcome(path):
    "All tensors of the last checkpoint, and the history without its seconds"
    from capsule_routing import runs
    tensors, meta, _ = runs.read_tensors(path/runs.LAST)
    return runs.digest(tensors), [{k: v for k, v in r.items() if "second" not in k} for r in meta["history"]]


def wait_for(path, p, steps):
    "Until the run's last checkpoint is at least so many steps in, or the process ends"
    from capsule_routing import runs
    while p.poll() is None:
        try:
            if runs.read_checkpoint(path).meta["global_step"] >= steps: return True
        except (FileNotFoundError, ValueError): pass
        time.sleep(0.005)
    return False


@pytest.fixture(scope="module")
def undisturbed(run_cmd, args, tmp_path_factory):
    top = tmp_path_factory.mktemp("undisturbed")
    p = run_cmd("capsule_train", *args, "--epochs", 2, "--out", "run", cwd=top)
    assert p.returncode == 0, p.stdout + p.stderr
    return outcome(top/"run")


def test_fresh_processes_killed(start_cmd, run_cmd, args, undisturbed, tmp_path):
    "The command itself, three times a new process: killed at its start, in its first epoch and in its second"
    out = tmp_path/"run"
    for steps, resume in ((0, []), (4, ["--resume"]), (10, ["--resume"])):
        p = start_cmd("capsule_train", *args, "--epochs", 2, "--out", out, *resume)
        assert wait_for(out, p, steps), p.communicate()
        p.send_signal(signal.SIGKILL)
        assert p.wait() == -signal.SIGKILL
    p = run_cmd("capsule_train", "--out", out, "--resume")
    assert p.returncode == 0, p.stdout + p.stderr
    assert outcome(out) == undisturbed


@pytest.mark.parametrize("sig, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_asked_to_stop(start_cmd, run_cmd, args, undisturbed, tmp_path, sig, code):
    "It ends with 130 or 143, says in one line how to go on, and that very command goes on"
    out = tmp_path/"run"
    p = start_cmd("capsule_train", *args, "--epochs", 2, "--out", out)
    assert wait_for(out, p, 3), p.communicate()
    p.send_signal(sig)
    said = p.communicate()[1]
    assert p.returncode == code, said
    assert "Traceback" not in said and "--resume" in said.splitlines()[-1] and str(out) in said.splitlines()[-1]
    p = run_cmd("capsule_train", "--out", out, "--resume")
    assert p.returncode == 0, p.stdout + p.stderr
    assert outcome(out) == undisturbed


def test_second_run_in_the_same_folder(start_cmd, run_cmd, args, tmp_path):
    "Refused in one line, with or without --resume; the first goes on; killed, it leaves nothing in the way"
    out = tmp_path/"run"
    first = start_cmd("capsule_train", *args, "--epochs", 2000, "--out", out)
    assert wait_for(out, first, 1), first.communicate()
    for extra, why in (([], "already holds a run"), (["--resume"], "another process is training in this folder")):
        p = run_cmd("capsule_train", *args, "--epochs", 2000, "--out", out, *extra)
        assert p.returncode == 2 and len(p.stderr.strip().splitlines()) == 1 and why in p.stderr, p.stderr
    assert first.poll() is None
    first.send_signal(signal.SIGKILL); first.wait()
    second = start_cmd("capsule_train", "--out", out, "--resume")
    from capsule_routing import runs
    n = runs.read_checkpoint(out).meta["global_step"]
    assert wait_for(out, second, n + 1), second.communicate()
    second.send_signal(signal.SIGKILL)


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 1 MB, or a skip where mounting is refused"
    disk = tmp_path/"disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode: pytest.skip("mounting is refused here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_disk_fills_up(start_cmd, run_cmd, args, small_disk, undisturbed):
    "One line, exit 2, the last good checkpoint whole; with room again it goes on to the same weights"
    disk = small_disk
    out = disk/"run"
    p = start_cmd("capsule_train", *args, "--epochs", 2, "--out", out)
    assert wait_for(out, p, 3), p.communicate()
    with open(disk/"filler", "wb", buffering=0) as f:
        try:
            while True: f.write(b"x"*1024)
        except OSError: pass
    said = p.communicate()[1]
    assert p.returncode == 2, said
    line = said.strip().splitlines()[-1]
    assert "Traceback" not in said and "No space left" in line and "last good checkpoint" in line
    (disk/"filler").unlink()
    from capsule_routing import runs
    assert runs.read_checkpoint(out).meta["global_step"] >= 3
    p = run_cmd("capsule_train", "--out", out, "--resume")
    assert p.returncode == 0, p.stdout + p.stderr
    assert outcome(out) == undisturbed


READ_ONLY = """
import errno, os, sys
from capsule_routing import runs
n = 0
def refuse(path, mode, *a):            # the lock's open file keeps the kernel from a real remount, so all writes after the twelfth fail here
    global n
    n += mode == "xb"
    if n > 12 and mode == "xb": raise OSError(errno.EROFS, "Read-only file system", str(path))
    return open(path, mode, *a)
runs.open = refuse
from capsule_routing.commands import capsule_train
sys.exit(capsule_train.main())
"""


def test_disk_turns_read_only(run_cmd, cmd_env, args, undisturbed, tmp_path):
    out = tmp_path/"run"
    p = subprocess.run([sys.executable, "-c", READ_ONLY, *map(str, args), "--epochs", "2", "--out", str(out)], env=cmd_env, cwd=tmp_path,
                       capture_output=True, text=True, timeout=240)
    line = p.stderr.strip().splitlines()[-1]
    assert p.returncode == 2 and "Read-only" in line and "last good checkpoint" in line and "Traceback" not in p.stderr, p.stderr
    from capsule_routing import runs
    assert 0 < runs.read_checkpoint(out).meta["global_step"] < 16
    p = run_cmd("capsule_train", "--out", out, "--resume")
    assert p.returncode == 0, p.stdout + p.stderr
    assert outcome(out) == undisturbed


def test_full_disk_at_the_start(run_cmd, small_disk):
    "A checkpoint that does not fit is noticed before the first step"
    disk = small_disk
    p = run_cmd("capsule_train", *"--dataset glyphs --limit 64 --epochs 1 --no-cuda --with_reconstruction --conv-channels 8 --primary-types 2 --decoder-widths 512,512".split(), "--out", disk/"run")
    assert p.returncode == 2 and "No space left" in p.stderr and len(p.stderr.strip().splitlines()) == 1, p.stderr
