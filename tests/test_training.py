"Training: what is computed, what is counted, what stops it, and that it goes on as if nothing had been."
import contextlib, errno, json, math, os, shutil, signal, threading
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.util import find_spec

import pytest, torch
from hypothesis import given, settings, strategies as st

from capsule_routing import runs
from capsule_routing.capsnet import CapsNet, caps_config
from capsule_routing.callbacks import Watch
from capsule_routing.checks import shown
from capsule_routing.data import ImageData, ImageSet, batches, eval_batches
from capsule_routing.tasks import classification
from capsule_routing.losses import capsule_loss, margin_loss, reconstruction_loss
from capsule_routing.runs import BEST, CONFIG, HISTORY, LAST, LOCK, RunLocked, digest, load_run, lock_run, read_json
from capsule_routing.settings import SCHEDULES
from capsule_routing.training import (CheckpointFailed, Interrupted, TrainConfig, Trainer, TrainingDiverged, evaluate, fit, lr_at, new_net,
                                      peak_memory, pick_device, pick_precision, resume_config)

TINY = caps_config(height=20, width=20, n_classes=3, conv_channels=4, n_types=2, d_primary=4, d_class=4, decoder=(8,))
CFG = TrainConfig(epochs=2, batch_size=8, test_batch_size=7, threads=1, precision="fp32", checkpoint_minutes=None)
FILES = {CONFIG, HISTORY, "history.csv", LAST, BEST}


def image_set(n, seed, size=20, classes=3):
    "Bright squares in one of three places: easy to tell apart"
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (n,), generator=g)
    x = torch.randint(0, 60, (n, 1, size, size), generator=g, dtype=torch.uint8)
    for i, k in enumerate(y.tolist()): x[i, :, 5*k:5*k+7, 5*k:5*k+7] += 150
    return ImageSet(x, y, tuple("abc"[:classes]))


@pytest.fixture(scope="module")
def data(): return ImageData("squares", image_set(33, 0), image_set(20, 1))   # 33 = 4*8 + 1: a last batch of one


def train(data, path=None, cfg=CFG, net=None, **kw): return fit(new_net(TINY, cfg.seed) if net is None else net, data, cfg, path, device="cpu", **kw)

def weights(path, which="last"): return digest(load_run(path, which).net.state_dict())

def plain(history): return [{k: v for k, v in r.items() if "second" not in k} for r in history]

def everything(path):
    "Digest of all tensors in last.safetensors: weights, moments, sums"
    return digest(runs.read_tensors(path/LAST)[0])


class Recorder:
    "Notes what the trainer tells"
    def __init__(self): self.steps, self.rows, self.saves = [], [], 0
    def on_step(self, s): self.steps.append(s)
    def on_epoch(self, r): self.rows.append(r)
    def on_checkpoint(self, p): self.saves += 1

class At:
    "Does something after a given step"
    def __init__(self, step, do): self.step, self.do = step, do
    def on_step(self, s):
        if s.global_step == self.step: self.do()

def signal_me(s=signal.SIGTERM): return lambda: os.kill(os.getpid(), s)


# what is computed

@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    "A run that nobody disturbed"
    path = tmp_path_factory.mktemp("whole")/"run"
    return path, train(data, path)


def test_it_learns(data):
    h = train(data, cfg=replace(CFG, epochs=25, lr=1e-2, schedule="constant"))
    assert h[-1]["test_accuracy"] > 0.9 and h[-1]["train_loss"] < 0.5*h[0]["train_loss"]


def test_one_step_is_adam_on_the_loss_of_the_paper(data):
    "Against plain torch: the same batch, the same loss, torch's Adam"
    cfg = replace(CFG, epochs=1, batch_size=33)
    net, ref = new_net(TINY, 1), new_net(TINY, 1)
    train(data, cfg=cfg, net=net)
    opt = torch.optim.Adam(ref.parameters(), lr=1e-3)
    x, y, *_ = next(iter(batches(data.train, 33, cfg.seed, 1, 2)))
    capsule_loss(ref(x, y), y, x, 0.0005).backward(); opt.step()
    for a, b in zip(net.parameters(), ref.parameters()): torch.testing.assert_close(a, b)


def test_history_row_by_hand(data):
    "One batch an epoch: the training loss is the loss of the first weights"
    cfg = replace(CFG, epochs=1, batch_size=33)
    net = new_net(TINY, 1)
    x, y, *_ = next(iter(batches(data.train, 33, cfg.seed, 1, 2)))
    with torch.no_grad(): out = net(x, y); m, r = margin_loss(out.lengths, y).item(), reconstruction_loss(out.recon, x).item()
    row, = train(data, cfg=cfg, net=net)
    assert row["train_margin"] == pytest.approx(m, rel=1e-5) and row["train_recon"] == pytest.approx(r, rel=1e-5)
    assert row["train_loss"] == pytest.approx(m + 0.0005*r, rel=1e-5)
    assert (row["epoch"], row["n"], row["test_n"], row["global_step"], row["lr"]) == (1, 33, 20, 1, 1e-3)
    assert row["test_errors"] == round((1-row["test_accuracy"])*20)


def test_same_reductions_in_training_and_test():
    "On the same images, unmoved and at a rate of nearly nothing, the two rows agree, with an uneven last batch"
    s = image_set(33, 0)
    d = ImageData("same", s, s)
    row, = train(d, cfg=replace(CFG, epochs=1, shift=0, lr=1e-30))
    assert row["train_margin"] == pytest.approx(row["test_margin"], rel=1e-5)
    net = new_net(TINY, 1)
    with torch.no_grad(): out = net(s.x/255.)
    right = (out.lengths.argmax(1) == s.y).all()
    assert right or row["train_recon"] != row["test_recon"]     # the masks differ where the answer is wrong
    nodec = replace(TINY, decoder=None)
    row, = train(d, cfg=replace(CFG, epochs=1, shift=0, lr=1e-30), net=new_net(nodec, 1))
    assert row["train_loss"] == pytest.approx(row["test_loss"], rel=1e-5) and "train_recon" not in row and "test_recon" not in row


def test_target_mask_in_training_longest_in_test(data, monkeypatch):
    seen = []
    class Spy(CapsNet):
        def forward(self, x, y=None): seen.append((self.training, y is not None)); return super().forward(x, y)
    torch.manual_seed(0)
    train(data, cfg=replace(CFG, epochs=1), net=Spy(TINY))
    assert set(seen) == {(True, True), (False, False)}


def test_schedule_ignores_the_test_set(data):
    "Other test images, other test losses: the same weights"
    other = ImageData("squares", data.train, image_set(9, 77))
    a, b = new_net(TINY, 1), new_net(TINY, 1)
    ha, hb = train(data, net=a), train(other, net=b)
    assert digest(a.state_dict()) == digest(b.state_dict())
    assert ha[-1]["test_loss"] != hb[-1]["test_loss"] and [r["lr"] for r in ha] == [r["lr"] for r in hb]


def test_paper_schedule():
    c = TrainConfig()
    for t in (0, 1, 500, 2000, 4001, 117_250): assert lr_at(t, c, 469) == pytest.approx(max(1e-3*0.96**(t/2000), 1e-6), rel=1e-12)
    assert lr_at(10**7, c, 469) == 1e-6 and lr_at(0, replace(c, lr=1e-7), 469) == 1e-7
    assert lr_at(20000, replace(c, decay_steps=20000), 1) == pytest.approx(0.96e-3)


def test_warm_up():
    "The first rates rise in a straight line to what the schedule says then; none without it"
    for schedule in SCHEDULES:
        c = TrainConfig(schedule=schedule, epochs=3)
        for t in range(60): assert lr_at(t, replace(c, warmup=40), 100) == pytest.approx(min(1, (t + 1)/40)*lr_at(t, c, 100), rel=1e-12)
    assert TrainConfig().warmup == 0 and lr_at(0, replace(TrainConfig(), warmup=1), 469) == 1e-3


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 5000), st.sampled_from(SCHEDULES), st.integers(1, 9), st.integers(1, 500))
def test_every_rate_is_between_nought_and_lr(t, schedule, epochs, steps):
    assert 0 <= lr_at(t, TrainConfig(schedule=schedule, epochs=epochs), steps) <= 1e-3


def test_first_weights_depend_on_the_seed_alone():
    torch.manual_seed(5); a = new_net(TINY, 3); x = torch.rand(3)
    torch.manual_seed(5); assert torch.equal(torch.rand(3), x)          # the caller's generator was left alone
    torch.rand(7); b = new_net(TINY, 3)
    assert digest(a.state_dict()) == digest(b.state_dict()) != digest(new_net(TINY, 4).state_dict())


def test_same_seed_same_weights_whatever_is_logged(data, whole, tmp_path):
    "The interval of the log, the size of test batches, the reporter and checkpoints are no part of the result"
    path, h = whole
    h2 = train(data, tmp_path/"b", replace(CFG, log_interval=1, test_batch_size=20, checkpoint_steps=2), reporter=Recorder())
    assert everything(path) == everything(tmp_path/"b")
    assert [r["train_loss"] for r in h] == [r["train_loss"] for r in h2]
    net = new_net(TINY, 1); train(data, cfg=replace(CFG, seed=1), net=net)                          # without a folder
    assert digest(net.state_dict()) == weights(path)
    other = new_net(TINY, 1); train(data, cfg=replace(CFG, seed=2), net=other)
    assert digest(other.state_dict()) != weights(path)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 16])
def test_any_number_of_images(n):
    d = ImageData("squares", image_set(n, 0), image_set(1, 1))
    row, = train(d, cfg=replace(CFG, epochs=1))
    assert row["n"] == n and row["global_step"] == -(-n//8) and math.isfinite(row["train_loss"])


def test_bf16(data):
    net = new_net(TINY, 1)
    h = train(data, cfg=replace(CFG, precision="bf16"), net=net)
    assert all(p.dtype == torch.float32 for p in net.parameters()) and math.isfinite(h[-1]["train_loss"])
    ref = train(data)
    assert h[0]["train_loss"] == pytest.approx(ref[0]["train_loss"], rel=0.05)


# what is counted

def test_evaluate_by_hand(data):
    net, s = new_net(TINY, 1), data.test
    with torch.no_grad(): out = net(s.x/255.)
    e = evaluate(net, s, 7)
    pred = out.lengths.argmax(1)
    assert e.n == 20 and e.n_errors == int((pred != s.y).sum()) and e.accuracy == (20 - e.n_errors)/20
    torch.testing.assert_close(e.lengths, out.lengths); assert torch.equal(e.pred, pred) and torch.equal(e.target, s.y)
    assert e.margin == pytest.approx(margin_loss(out.lengths, s.y).item(), rel=1e-5)
    assert e.recon == pytest.approx(reconstruction_loss(out.recon, s.x/255.).item(), rel=1e-5)
    assert e.loss == pytest.approx(e.margin + 0.0005*e.recon, rel=1e-6)


@pytest.mark.parametrize("bs", [1, 3, 19, 20, 1000])
def test_batch_size_of_evaluation_is_no_part_of_the_answer(data, bs):
    net = new_net(TINY, 1)
    a, b = evaluate(net, data.test, 20), evaluate(net, data.test, bs)
    assert a.n_errors == b.n_errors and a.loss == pytest.approx(b.loss, rel=1e-5)


def test_evaluate_changes_nothing(data):
    net = new_net(TINY, 1).train()
    before, x = digest(net.state_dict()), data.test.x.clone()
    evaluate(net, data.test)
    assert net.training and digest(net.state_dict()) == before and torch.equal(data.test.x, x)
    assert all(p.grad is None for p in net.parameters())


# what is kept

def test_never_one_file_an_epoch(data, tmp_path):
    train(data, tmp_path/"run", replace(CFG, epochs=3, checkpoint_steps=1))
    assert {p.name for p in (tmp_path/"run").iterdir()} - {LOCK} == FILES
    assert [r["epoch"] for r in read_json(tmp_path/"run"/HISTORY, list)] == [1, 2, 3]


def test_config_says_how(whole, data):
    path, h = whole
    c = read_json(path/CONFIG)
    assert c["training"] == asdict(CFG) and c["network"] == json.loads(json.dumps(TINY.to_dict()))
    assert c["data"]["name"] == "squares" and c["data"]["n_train"] == 33 and c["versions"]["torch"] == torch.__version__
    run = load_run(path)
    assert run.config == c and run.history == h == read_json(path/HISTORY, list)


def test_choices_of_the_machine_are_recorded(data, tmp_path):
    train(data, tmp_path/"run", replace(CFG, epochs=1, precision="auto", threads=None))
    t = read_json(tmp_path/"run"/CONFIG)["training"]
    assert t["precision"] in ("fp32", "bf16") and t["threads"] == torch.get_num_threads()


def test_best_is_the_epoch_with_fewest_errors(data, tmp_path):
    h = train(data, tmp_path/"run", replace(CFG, epochs=6, lr=1e-2, schedule="constant"))
    fewest = min(r["test_errors"] for r in h)
    best = load_run(tmp_path/"run", "best")
    assert evaluate(best.net, data.test).n_errors == fewest
    assert len(best.history) == next(r["epoch"] for r in h if r["test_errors"] == fewest)


def test_a_run_is_not_overwritten(whole, data):
    path, _ = whole
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    with pytest.raises(ValueError, match="already holds a run"): train(data, path)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before


def test_foreign_config_is_not_overwritten(data, tmp_path):
    (tmp_path/CONFIG).write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="not of a run"): train(data, tmp_path)
    assert (tmp_path/CONFIG).read_text() == '{"mine": 1}'


# going on

@pytest.mark.parametrize("step", [1, 3, 4, 5, 6, 9, 10])
def test_stopped_and_gone_on_is_bit_equal(data, whole, tmp_path, step):
    "At any step: within an epoch, at its last step, at the last of all"
    path, h = whole
    with pytest.raises(Interrupted) as e: train(data, tmp_path/"run", reporter=At(step, signal_me()))
    assert e.value.signum == 15 and "--resume" in str(e.value)
    assert plain(train(data, tmp_path/"run", net=new_net(TINY, 99), resume=True)) == plain(h)
    assert everything(tmp_path/"run") == everything(path) and weights(tmp_path/"run", "best") == weights(path, "best")


def test_stopped_at_every_step(data, whole, tmp_path):
    path, h = whole
    train_ = lambda resume: train(data, tmp_path/"run", resume=resume, reporter=type("R", (), dict(on_step=lambda self, s: signal_me(signal.SIGINT)()))())
    for k in range(10):
        with pytest.raises(Interrupted) as e: train_(k > 0)
        assert e.value.signum == 2
    assert plain(train_(True)) == plain(h) and everything(tmp_path/"run") == everything(path)


def test_more_epochs(data, whole, tmp_path):
    train(data, tmp_path/"run", replace(CFG, epochs=1))
    h = train(data, tmp_path/"run", CFG, resume=True)
    assert plain(h) == plain(whole[1]) and everything(tmp_path/"run") == everything(whole[0])
    assert read_json(tmp_path/"run"/CONFIG)["training"]["epochs"] == 2


def test_a_finished_run_has_nothing_to_do(data, whole):
    path, h = whole
    r = Recorder()
    before = everything(path)
    assert train(data, path, resume=True, reporter=r) == h and not r.steps and everything(path) == before


def test_signal_during_the_test(data, whole, tmp_path, monkeypatch):
    "The epoch's steps are done and kept; only the test is done again"
    def noisy(ds, *a, **kw):
        for i, b in enumerate(eval_batches(ds, *a, **kw)):
            if i == 1: os.kill(os.getpid(), signal.SIGTERM)
            yield b
    task = replace(classification(), eval_batches=noisy)
    with pytest.raises(Interrupted, match="after step 5 of 5 in epoch 1"): train(data, tmp_path/"run", task=task)
    assert plain(train(data, tmp_path/"run", resume=True)) == plain(whole[1]) and everything(tmp_path/"run") == everything(whole[0])


def test_signal_handlers_are_given_back(data):
    mine = lambda *a: None
    old = signal.signal(signal.SIGTERM, mine)
    try:
        train(data, cfg=replace(CFG, epochs=1))
        assert signal.getsignal(signal.SIGTERM) is mine
        with pytest.raises(Interrupted): train(data, reporter=At(2, signal_me()))
        assert signal.getsignal(signal.SIGTERM) is mine
    finally: signal.signal(signal.SIGTERM, old)


def test_second_ctrl_c_is_obeyed_at_once(data, tmp_path):
    def twice(): signal_me(signal.SIGINT)(); signal_me(signal.SIGINT)()
    with pytest.raises(KeyboardInterrupt) as e: train(data, tmp_path/"run", reporter=At(2, twice))
    assert not isinstance(e.value, Interrupted)


def test_training_in_another_thread(data, whole):
    "Where signals cannot be caught it trains all the same"
    net, t = new_net(TINY, 1), []
    t = threading.Thread(target=lambda: train(data, net=net)); t.start(); t.join()
    assert digest(net.state_dict()) == weights(whole[0])


def test_threads_are_used_and_given_back(data):
    seen, was = [], torch.get_num_threads()
    train(data, cfg=replace(CFG, threads=2, epochs=1), reporter=At(1, lambda: seen.append(torch.get_num_threads())))
    assert seen == [2] and torch.get_num_threads() == was


@pytest.mark.parametrize("change", [dict(lr=0.01), dict(batch_size=4), dict(seed=2), dict(shift=1), dict(recon_weight=0.1), dict(schedule="constant"),
                                    dict(decay_steps=5), dict(warmup=3), dict(precision="bf16"), dict(deterministic=True)], ids=str)
def test_other_mathematics_is_refused_on_resume(data, whole, change):
    (k, v), = change.items()
    with pytest.raises(ValueError) as e: train(data, whole[0], replace(CFG, epochs=3, **change), resume=True)
    assert str(e.value).startswith(f"{k}={v!r}: the run was begun with {getattr(CFG, k)!r}")


def test_harmless_settings_may_change_on_resume(data, whole, tmp_path):
    train(data, tmp_path/"run", replace(CFG, epochs=1))
    c = replace(CFG, log_interval=3, test_batch_size=5, checkpoint_minutes=1., checkpoint_steps=1, threads=None, precision="auto")
    train(data, tmp_path/"run", c, resume=True)
    assert everything(tmp_path/"run") == everything(whole[0])


def test_one_cycle_knows_its_length():
    with pytest.raises(ValueError, match="^epochs=9: the run was begun with 5"): resume_config(asdict(TrainConfig(epochs=5, schedule="one_cycle")), epochs=9)
    with pytest.raises(TypeError, match="nonsense"): resume_config(asdict(TrainConfig()), nonsense=1)


def test_other_data_is_refused_on_resume(data, whole):
    x = data.train.x.clone(); x[0, 0, 0, 0] ^= 1
    one_bit = ImageSet(x, data.train.y, data.train.classes)
    for d in (data._replace(name="circles"), data._replace(train=data.train.take(32)), data._replace(train=one_bit), data._replace(test=data.train)):
        with pytest.raises(ValueError, match="other data"): train(d, whole[0], replace(CFG, epochs=3), resume=True)


def test_other_network_is_refused_on_resume(data, whole):
    with pytest.raises(ValueError, match="^d_class=8: the network in .* has 4"): train(data, whole[0], net=new_net(replace(TINY, d_class=8), 1), resume=True)


def test_nothing_to_resume(data, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such run folder"): train(data, tmp_path/"run", resume=True)
    with pytest.raises(ValueError, match="resume=True: needs the path"): train(data, resume=True)


def test_killed_before_the_first_checkpoint(data, whole, tmp_path):
    "A folder with no more than a lock and a config is begun anew"
    (tmp_path/"run").mkdir(); (tmp_path/"run"/LOCK).touch()
    (tmp_path/"run"/CONFIG).write_bytes((whole[0]/CONFIG).read_bytes()); (tmp_path/"run"/f".{LAST}.tmp").write_bytes(b"half")
    train(data, tmp_path/"run", resume=True)
    assert everything(tmp_path/"run") == everything(whole[0]) and {p.name for p in (tmp_path/"run").iterdir()} - {LOCK} == FILES


def test_derived_files_do_not_matter_on_resume(data, whole, tmp_path):
    "history.json may lag behind or be gone: it is written again from last.safetensors"
    with pytest.raises(Interrupted): train(data, tmp_path/"run", reporter=At(7, signal_me()))
    (tmp_path/"run"/HISTORY).unlink(); (tmp_path/"run"/CONFIG).unlink()
    train(data, tmp_path/"run", resume=True)
    assert plain(read_json(tmp_path/"run"/HISTORY, list)) == plain(whole[1]) and load_run(tmp_path/"run")


def test_killed_after_the_last_checkpoint_of_all(data, whole, tmp_path):
    "Nothing is left to train, but history.json is one epoch behind: it is brought up to date"
    path = tmp_path/"run"
    shutil.copytree(whole[0], path)
    runs.write_atomic(path/HISTORY, json.dumps(whole[1][:1]).encode())
    assert train(data, path, resume=True) == whole[1] == read_json(path/HISTORY, list)


def test_second_training_in_a_folder_is_refused(data, tmp_path):
    (tmp_path/"run").mkdir()
    with lock_run(tmp_path/"run"):
        with pytest.raises(RunLocked, match="another process is training"): train(data, tmp_path/"run")
    assert not (tmp_path/"run"/CONFIG).exists()
    train(data, tmp_path/"run", replace(CFG, epochs=1))


# what stops it

def test_full_disk(data, tmp_path, monkeypatch):
    "One line; the checkpoint before stands, whole; and when there is room the run goes on"
    path, real = tmp_path/"run", runs.write_atomic
    def full(p, b, *more):
        if p.name == LAST and (path/LAST).exists() and len(read_json(path/HISTORY, list)) == 1: raise OSError(errno.ENOSPC, "No space left on device", str(p))
        return real(p, b, *more)
    monkeypatch.setattr(runs, "write_atomic", full)
    with pytest.raises(CheckpointFailed) as e: train(data, path)
    line = str(e.value)
    assert "No space left on device" in line and "epoch 2, step 0" in line and LAST in line and "\n" not in line
    monkeypatch.undo()
    h = train(data, path, resume=True)
    assert [r["epoch"] for r in h] == [1, 2]


def test_folder_that_cannot_be_made(data, tmp_path):
    (tmp_path/"file").touch()
    with pytest.raises((ValueError, OSError), match="file"): train(data, tmp_path/"file")
    with pytest.raises((ValueError, OSError)): train(data, tmp_path/"file"/"run")


@pytest.mark.parametrize("interval", [1, 3, 100])
def test_nan_stops_at_the_next_look(data, tmp_path, interval):
    "Poisoned after step 7 (step 2 of epoch 2): the loss is NaN from step 8 on; the checkpoint of epoch 1 stands"
    net = new_net(TINY, 1)
    rec = Recorder()
    def on_step(s):
        rec.on_step(s)
        if s.global_step == 7: net.register_forward_hook(lambda m, i, o: o._replace(lengths=o.lengths*float("nan")))
    rec2 = type("R", (), dict(on_step=lambda self, s: on_step(s)))()
    with pytest.raises(TrainingDiverged) as e: train(data, tmp_path/"run", replace(CFG, log_interval=interval), net=net, reporter=rec2)
    line = str(e.value)
    assert "epoch 2" in line and "epoch 2, step 0" in line and LAST in line and "\n" not in line
    assert rec.steps[-1].global_step < 7 + interval + 1
    run = load_run(tmp_path/"run")
    assert len(run.history) == 1 and all(p.isfinite().all() for p in run.net.parameters())


def test_bad_weights_are_never_kept(data, tmp_path):
    "The loss is still a number, a weight is not: the checkpoint is not written"
    net = new_net(TINY, 1)
    def poison():
        next(net.decoder.parameters()).data.view(-1)[0] = float("inf")
    with pytest.raises(TrainingDiverged): train(data, tmp_path/"run", replace(CFG, checkpoint_steps=1, log_interval=10**6), net=net, reporter=At(3, poison))
    assert load_run(tmp_path/"run")


# what it says

def test_reporter(data):
    r = Recorder()
    h = train(data, cfg=replace(CFG, log_interval=2), reporter=r)
    assert [s.global_step for s in r.steps] == list(range(1, 11)) and r.rows == h
    assert [s.loss is not None for s in r.steps] == [False, True, False, True, True]*2
    assert [(s.epoch, s.step, s.steps, s.images, s.n_images) for s in r.steps[4:6]] == [(1, 5, 5, 33, 33), (2, 1, 5, 8, 33)]
    assert r.steps[0].lr == 1e-3


def test_losses_shown_add_up(data):
    "The shown losses are means over the images since the last look"
    r = Recorder()
    row, = train(data, cfg=replace(CFG, epochs=1, log_interval=2), reporter=r)
    shown = [s for s in r.steps if s.loss is not None]
    n = [b.images - a for a, b in zip([0] + [s.images for s in shown], shown)]
    assert sum(s.loss*k for s, k in zip(shown, n))/33 == pytest.approx(row["train_loss"], rel=1e-12)


def test_nothing_is_printed(data, tmp_path, capfd):
    train(data, tmp_path/"run")
    assert capfd.readouterr() == ("", "")


def test_the_loss_is_looked_at_only_at_intervals(data, monkeypatch):
    "Nothing waits for the device in between: no tensor becomes a Python number"
    looks, real = [], Watch.read
    monkeypatch.setattr(Watch, "read", lambda self, t: (looks.append(t.step), real(self, t))[1])
    train(data, cfg=replace(CFG, epochs=1, log_interval=3))
    assert looks == [0, 3, 5]


@pytest.mark.parametrize("bad", [dict(epochs=0), dict(epochs=1.5), dict(epochs=True), dict(batch_size=-1), dict(lr=0), dict(lr=float("inf")), dict(lr="x"),
                                 dict(schedule="papers"), dict(seed=-1), dict(shift=-2), dict(recon_weight=-1), dict(recon_weight=float("nan")),
                                 dict(precision="fp16"), dict(threads=0), dict(log_interval=0), dict(checkpoint_minutes=0), dict(checkpoint_steps=0),
                                 dict(deterministic=1), dict(compile="yes"), dict(test_batch_size=None), dict(decay_steps=0), dict(warmup=-1), dict(warmup=2.), dict(lr=10**400)], ids=str)
def test_bad_settings(bad):
    (k, v), = bad.items()
    with pytest.raises(ValueError) as e: TrainConfig(**bad)
    assert str(e.value).startswith(f"{k}={shown(v)}: must be") and "\n" not in str(e.value)


def test_data_that_does_not_fit(data):
    with pytest.raises(ValueError, match=r"\(1, 20, 20\).*\(1, 28, 28\)"): train(data, net=CapsNet(caps_config(conv_channels=4, n_types=2, d_primary=4, d_class=4, decoder=None)))
    with pytest.raises(ValueError, match="class 2.*0 to 1"): train(data, net=new_net(replace(TINY, n_classes=2), 1))
    with pytest.raises(TypeError, match="net='Linear': must be a network with its sizes"): fit(torch.nn.Linear(2, 2), data, CFG)
    with pytest.raises(TypeError, match="TrainConfig"): fit(new_net(TINY, 1), data, dict(epochs=1))


def test_precision_is_chosen_by_capability(monkeypatch):
    "and never emulated"
    import capsule_routing.machine as machine
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for has in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has and not including_emulation)
        monkeypatch.setattr(machine, "has_bf16", lambda: has)
        for d in (cpu, gpu): assert pick_precision("auto", d) == ("bf16" if has else "fp32") and pick_precision("fp32", d) == "fp32"
        if has: assert pick_precision("bf16", cpu) == "bf16"
    with pytest.warns(UserWarning, match="precision=bf16: .* has no bf16 products, fp32 is used"): assert pick_precision("bf16", cpu) == "fp32"
    assert pick_device(no_cuda=True).type == "cpu" and peak_memory() > 2**20


@pytest.mark.parametrize("has", [True, False])
def test_a_run_records_its_precision_and_goes_on_with_it(data, tmp_path, monkeypatch, has):
    "where the products are missing in 32 bits, and says so"
    import capsule_routing.machine as machine
    used = []
    monkeypatch.setattr(torch, "autocast", lambda *a, was=torch.autocast, **kw: used.append(a) or was(*a, **kw))
    monkeypatch.setattr(machine, "has_bf16", lambda: True)
    train(data, tmp_path/"run", replace(CFG, epochs=1, precision="auto"))
    recorded = lambda: read_json(tmp_path/"run"/CONFIG)["training"]["precision"]
    assert recorded() == "bf16" and ("cpu", torch.bfloat16) in used
    used.clear()
    monkeypatch.setattr(machine, "has_bf16", lambda: has)
    with (contextlib.nullcontext() if has else pytest.warns(UserWarning, match="fp32 is used")):
        train(data, tmp_path/"run", replace(CFG, precision="auto"), resume=True)
    assert recorded() == ("bf16" if has else "fp32") and (("cpu", torch.bfloat16) in used) == has


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda(data, tmp_path):
    "bf16, no wait but the log, and --deterministic repeats bit for bit"
    d = []
    for i in range(2):
        net = new_net(TINY, 1)
        fit(net, data, replace(CFG, precision="auto", deterministic=True), tmp_path/str(i))
        d.append(digest(net.state_dict()))
    assert d[0] == d[1] and read_json(tmp_path/"0"/CONFIG)["training"]["precision"] == "bf16"


def test_without_a_compiler_the_network_runs_as_it_is(data, monkeypatch):
    import capsule_routing.training as training
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler found .* runs without torch.compile"):
        assert training.pick_compile("on", torch.device("cpu")) == "off"
    with pytest.warns(UserWarning): fit(new_net(TINY, 1), data, replace(CFG, compile="on", epochs=1))


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")
def test_a_compiled_run_learns_the_same(data):
    a, b = ([r["train_loss"] for r in fit(new_net(TINY, 1), data, replace(CFG, compile=c, epochs=1))] for c in ("off", "on"))
    assert a == pytest.approx(b, rel=1e-3)


# -- on a GPU --

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

@cuda
@pytest.mark.parametrize("extra", [dict(), dict(average=0.99, schedule="one_cycle"), dict(precision="bf16")], ids=str)
def test_steps_on_a_gpu_never_wait_for_it(data, extra):
    t = Trainer(new_net(TINY, 1), data, replace(CFG, threads=1, **{"precision": "fp32", **extra}), device="cuda")
    def step(batch):
        t.batch = batch
        t.one_step()
    with ExitStack() as t.stack:
        t.began = None
        t.prepare(None)
        for event in ("before_fit", "before_epoch"): t.call(event)
        made = list(batches(t.train_set, 16, 1, 1, 2))
        step(made[0])                                            # the first step makes Adam's moments
        torch.cuda.set_sync_debug_mode("error")
        try:
            for b in made[1:2]: step(b)
        finally: torch.cuda.set_sync_debug_mode("default")


@cuda
def test_deterministic_runs_on_a_gpu_are_bit_equal(data):
    nets = [new_net(TINY, 1) for _ in "ab"]
    for n in nets: fit(n, data, replace(CFG, deterministic=True), device="cuda")
    assert digest(nets[0].state_dict()) == digest(nets[1].state_dict())


@cuda
@pytest.mark.skipif(not find_spec("triton"), reason="no Triton")
def test_cuda_graphs_learn_the_same(data):
    a, b = ([r["train_loss"] for r in fit(new_net(TINY, 1), data, replace(CFG, compile=c, precision="fp32"), device="cuda")] for c in ("off", "on"))
    assert a == pytest.approx(b, rel=1e-3)
