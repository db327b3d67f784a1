"Placed and transformed digits: every place, nothing cut, and what a matrix says is what the image does."
import math

import numpy as np
import pytest
import torch

from capsule_routing.affine import (AFFINE_BASELINE, AFFINE_CAPSNET, MARGIN, RANGES, affine_factors, affine_images, affine_matrix, affine_set,
                                    padded_set, placed_data, placed_set, room, warp)
from capsule_routing.baselines import BaselineConfig, BaselineNet
from capsule_routing.capsnet import CapsNet, caps_config, count_params
from capsule_routing.data import ImageData, ImageSet, batches
from capsule_routing.glyphs import make_glyphs
from capsule_routing.results import get_table, read_results, run_row, table_lines
from capsule_routing.settings import TrainConfig
from capsule_routing.tasks import evaluate
from capsule_routing.training import fit, new_net
from conftest import TINY_CONFIG

TINY = caps_config(height=40, width=40, **TINY_CONFIG)
BAR = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
BAR[:, :, 5:23, 11:17] = 200                          # upright, 6 wide and 18 high


@pytest.fixture(scope="module")
def glyphs():
    g = make_glyphs(300, seed=4)
    return ImageSet(g.x, g.y, range(10))


def row(*values): return torch.tensor([values], dtype=torch.float64)
def brightness(x): return x.double().sum((1, 2, 3))

def first_ink(image): return [(image[0] > 0).any(d).nonzero()[0, 0].item() for d in (1, 0)]   # row, column

def covariance(x):
    "Brightness as weights: covariance of x and y of one image"
    w = x[0, 0].double().numpy()
    y, x = np.mgrid[:w.shape[0], :w.shape[1]]
    return np.cov(np.stack([x.ravel(), y.ravel()]), aweights=w.ravel(), ddof=0)


# -- placed --

def test_training_gives_every_place_and_cuts_nothing(glyphs):
    big, seen = padded_set(glyphs), set()
    for epoch in range(12):
        for x, _, idx, _ in batches(big, 100, seed=1, epoch=epoch, shift=MARGIN):
            assert torch.allclose(x.double().sum((1, 2, 3))*255, brightness(glyphs.x[idx]), atol=0.02)
            for image, i in zip((x*255).round().to(torch.uint8), idx.tolist()):
                (r, c), (r0, c0) = first_ink(image), first_ink(glyphs.x[i])
                assert torch.equal(image[:, r - r0:r - r0 + 28, c - c0:c - c0 + 28], glyphs.x[i])
                seen.add((r - r0, c - c0))
    assert seen == {(r, c) for r in range(13) for c in range(13)}


def test_the_test_images_have_their_places_once(glyphs):
    p = placed_set(glyphs)
    assert torch.equal(p.x, placed_set(glyphs).x) and torch.equal(p.y, glyphs.y) and p.image_shape == (1, 40, 40)
    assert torch.equal(brightness(p.x), brightness(glyphs.x))
    assert not torch.equal(p.x, placed_set(glyphs, seed=1).x)
    frame = ImageSet(torch.full((3000, 1, 28, 28), 7, dtype=torch.uint8), torch.zeros(3000, dtype=torch.long), ("a", "b"))
    assert len(placed_set(frame).x.flatten(1).argmax(1).unique()) == 169


# -- transformed --

def test_factors_fill_the_ranges_evenly_and_do_not_depend_on_their_number():
    f = affine_factors(20_000, 1)
    assert torch.equal(f[:50], affine_factors(50, 1)) and not torch.equal(f[:50], affine_factors(50, 2))
    for v, (low, high) in zip(f.T, RANGES.values()):
        counts = torch.histc(v, 10, low, high)
        assert counts.sum() == 20_000 and counts.min() > 1800 and counts.max() < 2200
    assert f.T.corrcoef().fill_diagonal_(0).abs().max() < 0.03


def test_no_transformation_is_the_margin_alone(glyphs):
    A, t = affine_matrix(row(0, 0, 1, 1).expand(300, 4)), torch.zeros(300, 2, dtype=torch.float64)
    assert torch.equal(warp(glyphs.x, A, t), padded_set(glyphs).x)
    assert torch.equal(warp(glyphs.x, A, t, 28), glyphs.x)


@pytest.mark.parametrize("factors", [(20, 0, 1, 1), (-20, 0, 1, 1), (0, 0.2, 1, 1), (0, -0.2, 1, 1), (0, 0, 1.2, 1), (0, 0, 0.8, 1), (0, 0, 1, 1.2), (0, 0, 1, 0.8), (13, -0.1, 1.15, 0.85)])
def test_a_bar_is_transformed_as_the_matrix_says(factors):
    A = affine_matrix(row(*factors))
    out = warp(BAR, A, torch.zeros(1, 2, dtype=torch.float64))
    got, want = covariance(out), A[0].numpy() @ covariance(BAR) @ A[0].numpy().T
    assert np.abs(got - want).max() < 0.6 and np.abs(got - want).max() < 0.03*want.max()
    assert brightness(out).item() == pytest.approx(brightness(BAR).item()*factors[2]*factors[3], rel=0.02)


@pytest.mark.parametrize("turn", [20, -20, 10])
def test_a_positive_angle_turns_anticlockwise(turn):
    (_, axes), (_, upright) = (np.linalg.eigh(covariance(x)) for x in (warp(BAR, affine_matrix(row(turn, 0, 1, 1)), torch.zeros(1, 2, dtype=torch.float64)), BAR))
    x, y = axes[:, 1]*np.sign(axes[1, 1])                # the long axis, its end that points down
    assert math.degrees(math.atan2(x, y)) == pytest.approx(turn, abs=0.5) and abs(upright[0, 1]) < 1e-9   # anticlockwise moves the lower end to the right


def test_each_pixel_is_the_mean_of_its_four_neighbours_before(glyphs):
    f = affine_factors(20, 9)
    A, t = affine_matrix(f), torch.from_numpy(np.random.default_rng(0).uniform(-5, 5, (20, 2)))
    out = warp(glyphs.x[:20], A, t)
    for n in range(20):
        old, back = np.pad(glyphs.x[n, 0].numpy().astype(float), 20), np.linalg.inv(A[n].numpy())
        for r, c in [(20, 20), (12, 17), (25, 14), (18, 26), (5, 5)]:
            x, y = back @ (np.array([c, r]) - 19.5 - t[n].numpy()) + 13.5 + 20
            i, j = math.floor(y), math.floor(x)
            v, u = y - i, x - j
            want = (1-v)*((1-u)*old[i, j] + u*old[i, j+1]) + v*((1-u)*old[i+1, j] + u*old[i+1, j+1])
            assert out[n, 0, r, c].item() == pytest.approx(want, abs=0.51)


@pytest.mark.parametrize("seed", range(3))
def test_digits_stay_wholly_inside_and_keep_their_ink(glyphs, seed):
    f = affine_factors(300, seed)
    for corner in (None, (0., 0.), (0., 1.), (1., 0.), (1., 1.)):
        if corner: f[:, 4:] = torch.tensor(corner, dtype=torch.float64)
        big = affine_images(glyphs.x, factors=f)
        kept = brightness(big)/(brightness(glyphs.x)*f[:, 2]*f[:, 3])
        assert (kept - 1).abs().max() < 0.04
        low, high = room(glyphs.x, affine_matrix(f), 40)
        t = low + f[:, 4:]*(high - low)
        window = warp(glyphs.x, affine_matrix(f), t, 60)                                                       # a larger window
        assert (window[:, :, 10:50, 10:50].int() - big.int()).abs().max() <= 1                                 # shows the same
        window[:, :, 10:50, 10:50] = 0
        assert window.max() == 0                                                                               # and nothing more


def test_places_reach_from_border_to_border(glyphs):
    f = affine_factors(300, 1)
    for k, edge in ((0., (slice(None), slice(0, 2))), (1., (slice(None), slice(38, 40)))):
        f[:, 4:] = torch.tensor([k, 0.5])
        assert (affine_images(glyphs.x, factors=f)[:, 0, edge[0], edge[1]].amax((1, 2)) > 0).float().mean() > 0.8


def test_an_image_is_the_same_in_any_batch_and_wherever_it_stood(glyphs):
    x = affine_images(glyphs.x, seed=5)
    assert torch.equal(x, affine_images(glyphs.x, seed=5)) and torch.equal(x[:3], affine_images(glyphs.x[:3], seed=5))
    assert torch.equal(x, affine_images(glyphs.x, seed=5, chunk=7))
    assert not torch.equal(x, affine_images(glyphs.x, seed=6))
    placed = affine_images(placed_set(glyphs).x, seed=5)
    assert (placed.int() - x.int()).abs().max() <= 1 and (placed == x).float().mean() > 0.999


def test_empty_and_full_images_are_no_trouble():
    x = torch.zeros(2, 3, 28, 28, dtype=torch.uint8); x[1] = 255
    out = affine_images(x, seed=1)
    assert out.shape == (2, 3, 40, 40) and out[0].max() == 0 and out[1].max() == 255
    assert affine_images(x[:0], seed=1).shape == (0, 3, 40, 40)


@pytest.mark.parametrize("make, said", [
    (lambda: affine_images(torch.zeros(2, 1, 28, 28)), "x=float32 (2, 1, 28, 28): must be a uint8 tensor"),
    (lambda: affine_images(BAR, factors=torch.zeros(1, 4)), "factors=float32 (1, 4): must have shape (1, 6)"),
    (lambda: affine_images(BAR, size=0), "size=0: must be at least 1"),
    (lambda: affine_factors(-1), "n=-1: must be at least 0"),
    (lambda: affine_factors(5, -1), "seed=-1: must be at least 0"),
    (lambda: placed_set(ImageSet(BAR, torch.tensor([0]), ("a", "b")), margin=-1), "margin=-1: must be at least 0"),
])
def test_what_cannot_be_is_refused_in_a_line(make, said):
    with pytest.raises((ValueError, TypeError)) as e: make()
    assert said in str(e.value) and "\n" not in str(e.value)


# -- the table --

def test_the_networks_are_of_one_size():
    with torch.device("meta"): a, b = count_params(CapsNet(AFFINE_CAPSNET)), count_params(BaselineNet(AFFINE_BASELINE))
    assert a == 13_475_648 and abs(b/a - 1) < 0.002
    assert AFFINE_BASELINE.pool and AFFINE_BASELINE.dropout > 0


def test_the_table_is_the_papers():
    t = get_table("affnist")
    assert {r.name: r.paper for r in t.rows} == {"baseline": {"placed": "99.22", "affine": "66"}, "r3-recon": {"placed": "99.23", "affine": "79"}}
    assert t.train == dict(shift=6, stop_at=0.992, warmup=50)
    assert table_lines(t, []).count("not run") == 4


def test_its_data_are_padded_for_training_and_placed_for_testing():
    d = placed_data(limit=100, dataset="glyphs")
    assert (d.name, len(d.train), len(d.test), d.train.image_shape, d.test.image_shape) == ("placed-glyphs", 100, 2000, (1, 40, 40), (1, 40, 40))
    assert d.train.x[:, :, :6].max() == 0 and d.test.x[:, :, :6].max() > 0


def test_a_small_table_is_run_and_read(glyphs, tmp_path):
    data = ImageData("placed", padded_set(glyphs.take(200)), placed_set(glyphs.take(120)))
    t = get_table("affnist")
    small = (BaselineConfig(height=40, width=40, convs=((4, 5), (4, 5)), pool=True, units=(16,)), TINY)
    t = t._replace(rows=tuple(r._replace(network=n) for r, n in zip(t.rows, small)))
    for row in t.rows:
        got = run_row(t, row, 1, tmp_path, data=data, epochs=1, batch_size=32, precision="fp32", device=torch.device("cpu"))
        assert got["training"]["shift"] == 6 and got["training"]["stop_at"] == 0.992
        assert got["metrics"]["placed"] == pytest.approx(100 - got["metrics"]["error"], abs=1e-5)
        net = new_net(row.network, 1)
        fit(net, data, TrainConfig(**{**t.train, "epochs": 1, "batch_size": 32, "seed": 1, "precision": "fp32"}), device="cpu")
        assert got["metrics"]["affine"] == pytest.approx(100*evaluate(net, affine_set(data.test)).accuracy, abs=1e-5)
    assert "not run" not in table_lines(t, read_results("affnist", tmp_path))


def test_a_run_stops_after_the_epoch_that_arrives(glyphs):
    data = ImageData("placed", padded_set(glyphs), placed_set(glyphs.take(100)))
    def accuracies(**more):
        cfg = TrainConfig(epochs=8, batch_size=25, lr=3e-3, shift=MARGIN, threads=1, **more)
        return [r["test_accuracy"] for r in fit(new_net(TINY, 1), data, cfg, device="cpu")]
    a = accuracies()
    n = next(i for i in range(1, 8) if a[i] > max(a[:i]))          # not the first epoch, and better than all before
    assert accuracies(stop_at=a[n]) == a[:n + 1]
