"Run folders from strangers: going on with them, and the commands that read them."
import pickle, random, shutil
from pathlib import Path

import pytest, torch
from capsule_routing import runs
from capsule_routing.commands import capsule_evaluate, capsule_predict, capsule_train, run_verb
from capsule_routing.runs import BEST, CONFIG, HISTORY, LAST, digest, load_run, read_checkpoint, read_tensors
from capsule_routing.training import TrainConfig, fit, new_net
from test_training import TINY, image_set
from capsule_routing.data import ImageData

CFG = TrainConfig(epochs=1, batch_size=4, threads=1, precision="fp32", checkpoint_minutes=None, checkpoint_steps=2)


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


def test_command_that_diverges(run_cmd, image_folder, tmp_path):
    "A rate beyond all measure: exit 2 and one line with epoch, step and where the last good checkpoint is"
    p = run_cmd("capsule_train", *"--dataset folder --epochs 3 --batch-size 4 --size 28 --channels 1 --no-cuda --lr 1e30 --log-interval 1 --conv-channels 8 --primary-types 2 --out run".split(),
                "--folder", image_folder/"train", cwd=tmp_path)
    assert p.returncode == 2 and "Traceback" not in p.stderr, p.stderr
    line = p.stderr.strip().splitlines()[-1]
    assert "epoch 1, step" in line and "last good checkpoint is" in line and LAST in line, line
    ck = read_checkpoint(tmp_path/"run")
    assert all(t.isfinite().all() for t in ck.weights.values())
