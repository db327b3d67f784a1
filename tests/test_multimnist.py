"Composites of two digits: what they are made of, that they come again, and that the loop trains on them."
import os, socket, subprocess, sys
from dataclasses import replace

import pytest
import torch

from capsule_routing.baselines import MULTI_BASELINE, BaselineConfig, BaselineNet
from capsule_routing.capsnet import CapsNet, caps_config, count_params
from capsule_routing.data import ImageData
from capsule_routing.glyphs import make_glyphs
from capsule_routing.multimnist import MULTI_CAPSNET, PairSet, digits_missed, make_pairs, other_class, pair_data, pair_plan, take_apart
from capsule_routing.results import get_table, read_results, run_row, table_lines
from capsule_routing.runs import load_run
from capsule_routing.settings import TrainConfig
from capsule_routing.tasks import evaluate, task_for
from capsule_routing.training import fit, new_net
from conftest import ROOT, TINY_CONFIG

TINY = caps_config(height=36, width=36, **TINY_CONFIG)
CFG = dict(epochs=2, batch_size=32, lr=3e-3, shift=4)


def glyph_pairs(n=200, n_pairs=200, seed=0, **kw):
    g = make_glyphs(n, seed)
    return PairSet(g.x, g.y, tuple(range(10)), n_pairs, **kw)

def together(batches): return [torch.cat(t) for t in zip(*batches)]


@pytest.fixture(scope="module")
def data(): return ImageData("pairs", glyph_pairs(200, 200), replace(glyph_pairs(100, 150), seed=6))


# -- composites --

def test_composites_are_the_clipped_sum_pixel_by_pixel():
    ds = glyph_pairs()
    plan = pair_plan(ds.labels, 200, 5, 3, 4)
    x, y, idx, parts = together(ds.batches(37, seed=5, epoch=3))
    assert torch.equal(y, ds.labels[torch.stack([plan.first, plan.second], 1)]) and torch.equal(idx, torch.arange(200))
    for n in range(200):
        for k, at in enumerate((plan.first[n], plan.second[n])):
            dx, dy = plan.shifts[n, k].tolist()
            part = torch.zeros(36, 36)
            part[4+dy:32+dy, 4+dx:32+dx] = ds.x[at, 0]/255
            assert torch.equal(parts[n, k, 0], part)
        assert torch.equal(x[n], (parts[n, 0] + parts[n, 1]).clamp(max=1))
    assert x.max() == 1 and x.min() == 0


def test_classes_differ_and_shifts_fill_their_range():
    y = make_glyphs(500).y
    plan = pair_plan(y, 20_000, 1, 1, 4)
    assert (y[plan.first] != y[plan.second]).all()
    for k in range(2):
        for axis in range(2):
            counts = (plan.shifts[:, k, axis] + 4).bincount(minlength=9)
            assert len(counts) == 9 and counts.min() > 0.85*20_000/9 and counts.max() < 1.15*20_000/9
    assert plan.shifts.flatten(1).T.double().corrcoef().fill_diagonal_(0).abs().max() < 0.03   # four independent shifts


def test_partners_are_even_over_all_images_of_other_classes():
    y = torch.tensor([0]*6 + [1]*3 + [2])
    first = torch.arange(10).repeat_interleave(3000)
    other = other_class(y, first, torch.rand(30_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    for i in range(10):
        counts, allowed = other[first == i].bincount(minlength=10), y != y[i]
        assert counts[~allowed].sum() == 0
        want = 3000/allowed.sum()
        assert ((counts[allowed] - want).abs() < 5*want**0.5).all()


@pytest.mark.parametrize("u", [0., 1 - 2**-53])
def test_the_ends_of_the_random_numbers_are_in_range(u):
    y = torch.tensor([2, 0, 1, 1, 0, 2, 2])
    for i in range(7): assert y[other_class(y, torch.tensor([i]), torch.tensor([u], dtype=torch.float64))] != y[i]


def test_an_epoch_is_the_same_in_any_batches_from_any_start_and_shared_by_any_processes():
    ds = glyph_pairs(100, 130)
    whole = together(ds.batches(130, seed=2, epoch=4))
    for b in (1, 16, 129, 1000):
        for start in (0, 1):
            if start*b < 130:
                for t, u in zip(whole, together(ds.batches(b, seed=2, epoch=4, start=start))): assert torch.equal(t[start*b:], u)
    for world in (2, 3):
        shares = [list(ds.batches(20, seed=2, epoch=4, rank=r, world=world)) for r in range(world)]
        mixed = together([torch.cat(t) for t in zip(*step)] for step in zip(*shares))
        for t, u in zip(whole, mixed): assert torch.equal(t, u)
    assert list(ds.batches(130, seed=2, epoch=4, start=1)) == []


def test_seeds_and_epochs_give_others_and_the_test_composites_stay():
    ds = glyph_pairs(100, 100)
    x = lambda **kw: next(ds.batches(100, **kw))[0]
    assert not torch.equal(x(seed=1, epoch=1), x(seed=1, epoch=2)) and not torch.equal(x(seed=1, epoch=1), x(seed=2, epoch=1))
    a, b = together(ds.eval_batches(7)), together(ds.eval_batches(100))
    assert all(map(torch.equal, a, b)) and torch.equal(a[1], ds.y)
    assert not torch.equal(next(replace(ds, seed=1).eval_batches(100))[0], b[0])


def test_a_shorter_shift_stays_in_the_wider_margin():
    ds = glyph_pairs(50, 50)
    x, _, _, parts = next(ds.batches(50, shift=0))
    assert x.shape == (50, 1, 36, 36) and (parts[..., :4, :] == 0).all() and (parts[..., 32:, :] == 0).all()


@pytest.mark.parametrize("make, said", [
    (lambda: glyph_pairs(20, 0), "n_pairs=0: must be at least 1"),
    (lambda: glyph_pairs(20, 5.5), "n_pairs=5.5: must be a whole number"),
    (lambda: glyph_pairs(20, 5, shift=-1), "shift=-1: must be at least 0"),
    (lambda: glyph_pairs(20, 5).batches(0), "batch_size=0: must be at least 1"),
    (lambda: glyph_pairs(20, 5).batches(5, shift=6), "shift=6: must be at most 4"),
    (lambda: glyph_pairs(20, 5).batches(5, rank=1), "rank=1: must be at most 0"),
    (lambda: PairSet(torch.zeros(3, 1, 8, 8), torch.zeros(3, dtype=torch.long), ("a",), 5), "must be a uint8 tensor"),
    (lambda: PairSet(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.ones(3, dtype=torch.long), ("a", "b"), 5), "y=1: the only class; a pair needs two"),
    (lambda: make_pairs(torch.zeros(3, 1, 8, 8), torch.zeros(2, 1, 8, 8), torch.zeros(3, 2, 2, dtype=torch.long)), "second=float32 (2, 1, 8, 8): must have shape (3, 1, 8, 8)"),
    (lambda: make_pairs(torch.zeros(3, 1, 8, 8), torch.zeros(3, 1, 8, 8), torch.zeros(3, 2, dtype=torch.long)), "shifts=int64 (3, 2): must have shape (3, 2, 2)"),
])
def test_what_cannot_be_is_refused_in_a_line(make, said):
    with pytest.raises((ValueError, TypeError)) as e: make()
    assert said in str(e.value) and "\n" not in str(e.value)


# -- networks and the loop --

def test_the_papers_networks():
    with torch.device("meta"):
        assert count_params(CapsNet(MULTI_CAPSNET)) == 11_361_808
        assert count_params(BaselineNet(MULTI_BASELINE)) == 24_563_978


class Stop:
    "Stops a run at its n-th step"
    def __init__(self, at): self.at = at
    def on_step(self, s):
        if s.global_step == self.at: raise KeyboardInterrupt


def test_a_run_stopped_within_an_epoch_goes_on_to_the_same_weights(data, tmp_path):
    cfg = TrainConfig(**CFG, checkpoint_steps=3)
    whole = new_net(TINY, 1)
    history = fit(whole, data, cfg, tmp_path/"whole", device="cpu")
    with pytest.raises(KeyboardInterrupt): fit(new_net(TINY, 1), data, cfg, tmp_path/"stopped", device="cpu", reporter=Stop(11))
    again = new_net(TINY, 1)
    resumed = fit(again, data, cfg, tmp_path/"stopped", resume=True, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))
    assert [h["test_loss"] for h in history] == [h["test_loss"] for h in resumed]


def test_an_image_is_wrong_unless_both_are_named(data):
    net = new_net(TINY, 1).eval()
    e = evaluate(net, data.test, 64)
    x, y, _, parts = together(data.test.eval_batches(1000))
    with torch.no_grad(): out = net(x, y)
    two = [set(t) for t in out.lengths.topk(2).indices.tolist()]
    assert e.n == 150 and e.n_errors == sum(set(t) != n for t, n in zip(y.tolist(), two))
    assert digits_missed(e.pred, e.target) == pytest.approx(1 - sum(len(set(t) & n) for t, n in zip(y.tolist(), two))/300)
    assert out.recon.shape == parts.shape
    assert e.recon == pytest.approx((out.recon - parts).square().sum().item()/150, rel=1e-5)


def test_taking_apart_draws_each_capsule_alone(data):
    net = new_net(TINY, 2).eval()
    x, y, *_ = next(data.test.eval_batches(9))
    got = take_apart(net, x, 3)
    with torch.no_grad(): each = net(x, got.classes).recon
    assert torch.allclose(got.images, each, atol=1e-6)
    assert torch.equal(got.lengths.argsort(1, descending=True), torch.arange(3).expand(9, 3))
    with pytest.raises(ValueError, match="no decoder"): take_apart(new_net(replace(TINY, decoder=None), 1), x)
    with pytest.raises(ValueError, match="k=0: must be at least 1"): take_apart(net, x, 0)


def test_the_order_of_the_two_does_not_matter_to_the_loss(data):
    net, b = new_net(TINY, 1), next(data.test.eval_batches(20))
    task = task_for(net, data.test, 0.5)
    one, other = (task.loss(net(o.x, o.y), o) for o in (b, b._replace(y=b.y.flip(1), parts=b.parts.flip(1))))
    assert task.name == "pairs" and set(one) == {"loss", "margin", "recon"}
    for k in one: assert one[k].item() == pytest.approx(other[k].item(), rel=1e-5)


WORKER = """
import sys
sys.path.insert(0, sys.argv[1])
from test_multimnist import *
from capsule_routing.machine import processes
data = ImageData("pairs", glyph_pairs(60, 33), replace(glyph_pairs(40, 21), seed=6))
with processes(no_cuda=True, limit=60): fit(new_net(TINY, 1), data, TWO, sys.argv[2], device="cpu")
"""
TWO = TrainConfig(epochs=2, batch_size=8, test_batch_size=4, threads=1, lr=3e-3, shift=4, precision="fp32")   # the last batch: one composite


@pytest.mark.skipif(not torch.distributed.is_available() or os.name == "nt", reason="needs torch.distributed with gloo")
@pytest.mark.slow
def test_two_processes_train_as_one_and_count_every_composite_once(tmp_path):
    data = ImageData("pairs", glyph_pairs(60, 33), replace(glyph_pairs(40, 21), seed=6))
    history = fit(new_net(TINY, 1), data, TWO, tmp_path/"one", device="cpu")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    args = [sys.executable, "-c", WORKER, str(ROOT/"tests"), str(tmp_path/"two")]
    procs = [subprocess.Popen(args, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE, text=True) for r in range(2)]
    try: said = [p.communicate(timeout=200)[1] for p in procs]
    finally: [p.kill() for p in procs if p.poll() is None]
    assert [p.returncode for p in procs] == [0, 0], said
    one, two = load_run(tmp_path/"one"), load_run(tmp_path/"two")
    for (k, a), b in zip(one.net.state_dict().items(), two.net.state_dict().values()): assert torch.allclose(a, b, atol=1e-4, rtol=1e-3), k
    for a, b in zip(history, two.history):
        assert (b["n"], b["test_n"]) == (33, 21) and b["test_loss"] == pytest.approx(a["test_loss"], rel=1e-3)
        assert abs(a["test_errors"] - b["test_errors"]) <= 1


# -- the table --

def test_the_table_is_the_papers():
    t = get_table("multimnist")
    assert {r.name: r.paper["error"] for r in t.rows} == {"baseline": "8.1", "r1-recon": "7.5", "r3-recon": "5.2"}
    assert t.train == dict(shift=4, decay_steps=20_000, warmup=50)
    caps = [r.network for r in t.rows[1:]]
    assert [c.n_iters for c in caps] == [1, 3] and replace(caps[0], routing_options={}) == caps[1] == MULTI_CAPSNET
    text = table_lines(t, [])
    assert text.count("not run") == 6


def test_its_data_keep_training_and_test_digits_apart():
    d = pair_data(limit=300, dataset="glyphs")
    assert (d.name, len(d.train), len(d.test), d.train.image_shape) == ("pairs-of-glyphs", 300, 2000, (1, 36, 36))
    assert d.train.x.shape == (300, 1, 28, 28) and d.test.x.shape == (2000, 1, 28, 28)
    assert not {bytes(i) for i in d.train.x.flatten(1).numpy()} & {bytes(i) for i in d.test.x.flatten(1).numpy()}


def test_a_small_table_is_run_and_read(data, tmp_path):
    small = (TINY, BaselineConfig(height=36, width=36, convs=((4, 5), (4, 5)), pool=True, units=(16,), multi=True))
    t = get_table("multimnist")
    t = t._replace(rows=tuple(r._replace(network=n) for r, n in zip((t.rows[2], t.rows[0]), small)))
    for row in t.rows:
        got = run_row(t, row, 1, tmp_path, data=data, epochs=1, batch_size=32, device=torch.device("cpu"))
        assert set(got["metrics"]) == {"error", "digit"}
        assert got["metrics"]["error"]/2 - 1e-6 <= got["metrics"]["digit"] <= got["metrics"]["error"]
        assert got["training"]["shift"] == 4 and got["training"]["decay_steps"] == 20_000 and got["training"]["warmup"] == 50 and got["n"] == 150
    text = table_lines(t, read_results("multimnist", tmp_path))
    assert "not run" not in text and "5.2" in text
