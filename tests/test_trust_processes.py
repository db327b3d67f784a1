"Several processes: the same weights as one, every test image once, and nobody waits for the dead."
import os, signal, socket, subprocess, sys, time
from dataclasses import replace

import pytest, torch
from conftest import ROOT
from test_training import TINY, image_set
from capsule_routing import runs
from capsule_routing.data import ImageData
from capsule_routing.runs import HISTORY, load_run, read_checkpoint, read_json
from capsule_routing.training import TrainConfig, fit, new_net

pytestmark = pytest.mark.skipif(not torch.distributed.is_available() or os.name == "nt", reason="needs torch.distributed with gloo")

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


def until(path, steps, procs):
    "Until the last checkpoint is so many steps in"
    while all(p.poll() is None for p in procs):
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
