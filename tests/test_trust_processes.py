"Several processes: the same weights as one, every test image once, and nobody waits for the dead."
import os, signal, socket, subprocess, sys, time
from dataclasses import replace

import pytest, torch
from conftest import ROOT, TINY as SMALL, command_line
from test_commands import torchrun
from test_training import TINY, image_set
from capsule_routing import runs
from capsule_routing.data import ImageData
from capsule_routing.runs import HISTORY, load_run, read_checkpoint, read_json
from capsule_routing.training import TrainConfig, fit, new_net

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.distributed.is_available() or os.name == "nt", reason="needs torch.distributed with gloo")]

CFG = TrainConfig(epochs=4, batch_size=8, test_batch_size=4, threads=1, precision="fp32", checkpoint_minutes=None)   # 4 x 5 = 20 steps, the last of one image

WORKER = r"""
import os, sys, time
sys.path.insert(0, sys.argv[1])
from test_trust_processes import *
from capsule_routing.training import processes
path, resume, limit, slow, change = runs.Path(sys.argv[2]), sys.argv[3] == "resume", float(sys.argv[4]), float(sys.argv[5]), eval(sys.argv[6])
class Slow:
    def on_step(self, s): time.sleep(slow)
try:
    with processes(no_cuda=True, limit=limit) as (rank, world):
        if "seeds" in change: change = dict(seed=change["seeds"][rank])
        fit(new_net(TINY, 1), squares(), replace(CFG, **change), path, resume, "cpu", Slow() if slow else None)
except BaseException as e:
    print(f"{type(e).__name__}: {e}", flush=True)
    sys.stdout.flush()
    os._exit(getattr(e, "signum", 1) + 128 if hasattr(e, "signum") else 2)
"""


def squares(): return ImageData("squares", image_set(33, 0), image_set(21, 1))


def start(n, path, resume=False, limit=60, slow=0, **change):
    "Start the processes as torchrun would"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n), "PYTHONPATH": str(ROOT)}
    args = [sys.executable, "-c", WORKER, str(ROOT/"tests"), str(path), "resume" if resume else "new", str(limit), str(slow), repr(change)]
    return [subprocess.Popen(args, env={**env, "RANK": str(i), "LOCAL_RANK": str(i)}, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for i in range(n)]


def end(procs, timeout=150):
    "Exit codes and what was said"
    try: said = [p.communicate(timeout=timeout) for p in procs]
    finally:
        for p in procs:
            if p.poll() is None: p.kill(); p.communicate()
    return [p.returncode for p in procs], said


def until(path, steps, procs, timeout=240):
    "Until the last checkpoint is so many steps in"
    latest = time.monotonic() + timeout
    while all(p.poll() is None for p in procs) and time.monotonic() < latest:
        try:
            if read_checkpoint(path).meta["global_step"] >= steps: return
        except (FileNotFoundError, ValueError): pass
        time.sleep(0.01)
    raise AssertionError(end(procs))


def distance(a, b):
    "Norm of the difference of all weights over their norm"
    a, b = (torch.cat([t.flatten() for t in load_run(p).net.state_dict().values()]) for p in (a, b))
    return ((a - b).norm()/b.norm()).item()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    path = tmp_path_factory.mktemp("alone")/"run"
    fit(new_net(TINY, 1), squares(), CFG, path, device="cpu")
    return path


@pytest.mark.parametrize("n", [2, 3])
def test_several_processes_equal_one(alone, tmp_path, n):
    "Twenty fp32 steps, an odd last batch (where some processes have no image at all) included"
    codes, said = end(start(n, tmp_path/"run"))
    assert codes == [0]*n, said
    assert distance(tmp_path/"run", alone) < 1e-5
    one, many = (read_json(p/HISTORY, list) for p in (alone, tmp_path/"run"))
    for a, b in zip(one, many):
        assert (b["n"], b["test_n"], b["epoch"], b["global_step"]) == (33, 21, a["epoch"], a["global_step"])
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-4) and b["test_loss"] == pytest.approx(a["test_loss"], rel=1e-4)
        assert b["test_errors"] == a["test_errors"]


def test_all_stop_when_one_is_asked(alone, tmp_path):
    "A signal to process 1 stops both after the same step, with a checkpoint; one process goes on, then three"
    procs = start(2, tmp_path/"run", slow=0.1, checkpoint_steps=1)
    until(tmp_path/"run", 3, procs)
    procs[1].send_signal(signal.SIGTERM)
    codes, said = end(procs)
    assert codes == [143, 143] and all("Interrupted: stopped by SIGTERM" in o for o, _ in said), said
    assert said[0][0].split(";")[0] == said[1][0].split(";")[0]                # after the same step
    fit(new_net(TINY, 1), squares(), replace(CFG, epochs=2), tmp_path/"run", resume=True, device="cpu")
    codes, said = end(start(3, tmp_path/"run", resume=True))
    assert codes == [0]*3, said
    assert distance(tmp_path/"run", alone) < 1e-5


@pytest.mark.parametrize("victim, sig", [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_nobody_waits_for_ever(alone, tmp_path, victim, sig):
    "Dead or stuck: the other gives up within its limit, in one line, and the run goes on from its last checkpoint"
    procs = start(2, tmp_path/"run", limit=6, slow=0.05, checkpoint_steps=2)
    until(tmp_path/"run", 4, procs)
    procs[victim].send_signal(sig)
    (code,), ((out, _),) = end([procs[1-victim]])
    procs[victim].kill(); procs[victim].communicate()
    assert code == 2 and "PeerLost" in out and "checkpoint" in out and len(out.strip().splitlines()) == 1, out
    fit(new_net(TINY, 1), squares(), CFG, tmp_path/"run", resume=True, device="cpu")
    assert distance(tmp_path/"run", alone) < 1e-5


def test_what_one_refuses_all_refuse(alone, tmp_path):
    "A folder in use, and settings that differ from the recorded ones in one process only"
    with runs.lock_run(alone):
        codes, said = end(start(2, alone, resume=True, epochs=5))
    assert codes == [2, 2] and "RunLocked" in said[0][0] and "PeerLost: another process of this run refused to start" in said[1][0], said
    codes, said = end(start(2, alone, resume=True, seeds=(1, 2)))
    assert codes == [2, 2] and "seed=2: the run was begun with 1" in said[1][0] and "PeerLost" in said[0][0], said


def test_one_process_of_torchrun_is_none(monkeypatch):
    from capsule_routing.training import processes
    monkeypatch.setenv("WORLD_SIZE", "1"); monkeypatch.setenv("RANK", "0")
    with processes() as (rank, world): assert (rank, world) == (0, 1) and not torch.distributed.is_initialized()


# -- torchrun itself --

@pytest.fixture
def launch(cmd_env, image_folder, tmp_path):
    "`launch(*args)`: two processes of `capsule_train` under torchrun. What still runs at the end is killed."
    launchers = []
    def start(*args):
        (tmp_path/"noted.sh").write_text('echo $$ > "pid.$RANK"; exec "$@"')    # each process leaves its number and becomes the command
        line = [torchrun(), "--standalone", "--nproc_per_node=2", "--no-python", "sh", "noted.sh", *command_line("capsule_train", *args)]
        launchers.append(subprocess.Popen(line, env=cmd_env, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return launchers[-1]
    start.new = [*"--size 28 --channels 1 --batch-size 8 --with_reconstruction --no-cuda --checkpoint-steps 1 --epochs 30000".split(), *SMALL,
                 "--folder", image_folder/"train", "--test-folder", image_folder/"test", "--out", tmp_path/"run"]
    yield start
    for p in launchers:
        if p.poll() is None: p.kill()
        for pid in worker_pids(tmp_path): kill(pid, signal.SIGKILL)
        p.communicate()


def worker_pids(top): return [int(t) for p in sorted(top.glob("pid.*")) if (t := p.read_text().strip())]


def kill(pid, sig=0):
    "Send a signal; was there such a process?"
    try: os.kill(pid, sig)
    except ProcessLookupError: return False
    return True


def check_whole(path, epochs):
    "So many epochs, each of all 30 images in 4 steps, and tested on all 12"
    rows = read_json(path/HISTORY, list)
    assert [(r["epoch"], r["global_step"], r["n"], r["test_n"]) for r in rows] == [(i, 4*i, 30, 12) for i in range(1, epochs + 1)]
    assert read_checkpoint(path).meta["epoch"] == epochs + 1


needs_torchrun = pytest.mark.skipif(torchrun() is None, reason="needs torchrun")


@needs_torchrun
def test_torchrun_is_asked_to_stop(launch, tmp_path):
    "SIGTERM to torchrun: both processes end with a checkpoint of that step, and torchrun goes on with it"
    p = launch(*launch.new)
    until(tmp_path/"run", 5, [p])
    p.send_signal(signal.SIGTERM)
    (code,), ((_, said),) = end([p], 240)
    meta = read_checkpoint(tmp_path/"run").meta
    assert code != 0 and not any(map(kill, worker_pids(tmp_path))), said
    assert f"stopped by SIGTERM after step {meta['step']} of 4 in epoch {meta['epoch']}" in said, said
    assert "--resume" in said, said
    p = launch("--resume", "--out", tmp_path/"run", "--epochs", meta["epoch"] + 1)
    (code,), said = end([p], 240)
    assert code == 0, said
    check_whole(tmp_path/"run", meta["epoch"] + 1)
    assert [s["processes"] for s in read_checkpoint(tmp_path/"run").meta["sessions"]] == [2, 2]


@needs_torchrun
def test_torchrun_loses_a_process(launch, run_cmd, tmp_path):
    "SIGKILL to the process that writes the checkpoints: the other ends as well, and one process goes on from the last checkpoint"
    p = launch(*launch.new)
    until(tmp_path/"run", 5, [p])
    assert kill(worker_pids(tmp_path)[0], signal.SIGKILL)
    (code,), ((_, said),) = end([p], 240)
    meta = read_checkpoint(tmp_path/"run").meta
    assert code != 0 and not any(map(kill, worker_pids(tmp_path))), said
    assert meta["global_step"] >= 5
    p = run_cmd("capsule_train", "--resume", "--out", tmp_path/"run", "--epochs", meta["epoch"] + 1)
    assert p.returncode == 0, p.stdout + p.stderr
    check_whole(tmp_path/"run", meta["epoch"] + 1)
    assert [s["processes"] for s in read_checkpoint(tmp_path/"run").meta["sessions"]] == [2, 1]
