"Glyphs: the same in every process, hard for a linear classifier, and shaped by the factors that stand beside them."
import subprocess, sys

import pytest
import torch
import torch.nn.functional as F

from capsule_routing.glyphs import FACES, FACTORS, glyph_table, make_glyphs, render_glyphs

NAMES = [f.name for f in FACTORS]
MIDDLE = torch.tensor([(f.low + f.high) / 2 for f in FACTORS])


def vary(digit, name, values, face=0, size=28):
    "One digit with one factor at the given values: images `(k, size, size)` in [0, 1]"
    rows = MIDDLE.repeat(len(values), 1)
    rows[:, NAMES.index(name)] = torch.tensor(values)
    which = torch.full((len(values),), digit)
    return render_glyphs(which, 0*which + face, rows, size)[:, 0].double() / 255


def centre(x, axis):
    "Mean place of the ink along an axis, in pixels from the first"
    ink = x.sum(2 if axis == 1 else 1)
    return (ink * torch.arange(ink.shape[1])).sum(1) / ink.sum(1)


def height(x):
    "Rows with ink, edges counted by how dark they are"
    return x.amax(2).sum(1)


def row_centres(x, row):
    "Mean place of the ink in one row"
    return (x[:, row] * torch.arange(x.shape[2])).sum(1) / x[:, row].sum(1)


@pytest.mark.slow
def test_a_fresh_process_draws_the_same_glyphs():
    code = ("import hashlib, numpy, torch; numpy.random.seed(5); torch.manual_seed(5)\n"
            "from capsule_routing.glyphs import make_glyphs\n"
            "g = make_glyphs(300, seed=4)\n"
            "print(hashlib.sha256(b''.join(t.numpy().tobytes() for t in (g.x, g.y, g.factors, g.face))).hexdigest())")
    out = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert out[0] == out[1]


def test_global_generators_are_neither_read_nor_moved():
    before = torch.random.get_rng_state()
    a = make_glyphs(50, seed=1)
    torch.manual_seed(99)
    assert torch.equal(make_glyphs(50, seed=1).x, a.x)
    torch.random.set_rng_state(before)
    make_glyphs(50, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_image_k_is_the_same_for_any_n():
    few, many = make_glyphs(5, seed=7), make_glyphs(600, seed=7)   # more than one chunk
    for a, b in zip(few[:3] + few[4:], many[:3] + many[4:]): assert torch.equal(a, b[:5])


def test_training_and_test_sets_share_no_factor():
    from capsule_routing.data import GLYPHS_TEST, GLYPHS_TEST_SEED, GLYPHS_TRAIN
    train, test = make_glyphs(GLYPHS_TRAIN), make_glyphs(GLYPHS_TEST, GLYPHS_TEST_SEED)
    rows = {tuple(r) for r in train.factors.tolist()}
    assert len(rows) == GLYPHS_TRAIN and not rows & {tuple(r) for r in test.factors.tolist()}
    # nor is one stream the other, some places on
    assert not {r[0] for r in train.factors.double().tolist()[:500]} & {v for r in test.factors.double().tolist()[:500] for v in r}


def test_factors_fill_their_ranges_evenly_and_independently():
    g = make_glyphs(4000, seed=11)
    low, high = (torch.tensor([getattr(f, k) for f in FACTORS]) for k in ("low", "high"))
    u = (g.factors - low) / (high - low)
    assert (u >= 0).all() and (u <= 1).all()
    assert (u.mean(0) - 0.5).abs().max() < 0.03 and (u.std(0) - 12**-0.5).abs().max() < 0.02
    together = torch.cat([u, F.one_hot(g.y).float(), F.one_hot(g.face).float()], 1)
    assert torch.corrcoef(together.T)[:len(NAMES)].fill_diagonal_(0).abs().max() < 0.08
    assert g.y.bincount().min() > 300 and g.face.bincount(minlength=len(FACES)).min() > 180


def test_slant_leans_right_by_its_angle():
    x = vary(0, "slant", [-20., 0., 20.])
    def middle(row):                                               # between the two strokes of a 0, each at its own centre
        cut = row_centres(x, row).round().long()
        left = torch.arange(28) < cut[:, None]
        r = x[:, row]
        return sum((r * m * torch.arange(28)).sum(1) / (r * m).sum(1) for m in (left, ~left)) / 2
    lean = middle(11) - middle(16)
    assert torch.allclose(lean - lean[1], 5 * torch.tan(torch.tensor([-20., 0, 20]).double() * torch.pi / 180), atol=0.25)


def test_thickness_is_in_pixels():
    x = vary(1, "thickness", [1.6, 2.6, 3.6])
    across = x[:, 14].sum(1)
    assert torch.allclose(across - across[0], torch.tensor([0., 1, 2]).double(), atol=0.05)
    assert (across - torch.tensor([1.6, 2.6, 3.6])).abs().max() < 0.5


def test_width_stretches_sideways_only():
    x = vary(0, "width", [0.7, 1.0, 1.2])
    middle = [(r > 0.5).nonzero() for r in x[:, 14]]
    outer = torch.tensor([float(m.max() - m.min()) for m in middle])
    assert outer[0] < outer[1] < outer[2] and (height(x) - height(x)[1]).abs().max() < 0.3


def test_scale_is_the_height_in_pixels():
    stroke = glyph_table()[1][0].item()                            # in digit heights
    tall = height(vary(0, "scale", [14., 17., 20.]))               # middle to middle of the strokes, and one stroke
    assert torch.allclose(tall, torch.tensor([14., 17, 20]).double() * (1 - stroke) + 2.6, atol=0.35)


@pytest.mark.parametrize("name, axis", [("shift_x", 2), ("shift_y", 1)])
def test_shifts_move_the_ink(name, axis):
    at = centre(vary(5, name, [-2.5, 0., 1.5]), axis)
    assert torch.allclose(at - at[1], torch.tensor([-2.5, 0, 1.5]).double(), atol=0.05)


def test_waviness_swings_the_middle_right():
    x = vary(0, "waviness", [-1.5, 0., 1.5], size=56)              # twice the pixels, twice the swing
    assert torch.allclose(row_centres(x, 28) - row_centres(x, 28)[1], torch.tensor([-3., 0, 3]).double(), atol=0.3)
    assert row_centres(x, 14)[2] < row_centres(x, 14)[1] < row_centres(x, 14)[0]


def test_another_size_is_the_same_picture():
    big, small = make_glyphs(20, seed=2, size=56), make_glyphs(20, seed=2)
    halved = F.avg_pool2d(big.x.float(), 2)
    assert big.x.shape == (20, 1, 56, 56) and (halved - small.x.float()).abs().mean() < 8


def test_every_digit_of_every_face_has_ink_and_stays_inside():
    n = len(FACES)
    x = render_glyphs(torch.arange(10).repeat(n), torch.arange(n).repeat_interleave(10), MIDDLE.repeat(10*n, 1))[:, 0].double() / 255
    assert x.sum((1, 2)).min() > 30
    assert torch.cat([x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]], 1).max() == 0


@pytest.mark.slow
def test_a_linear_classifier_errs_on_a_twentieth_and_more():
    def pixels(g): return torch.cat([g.x.flatten(1).float() / 255, torch.ones(len(g.x), 1)], 1)
    train, test = make_glyphs(10_000), make_glyphs(2_000, seed=2**32)
    x, errors = pixels(train), []
    for decay in (1e-2, 1e-3):
        W = torch.zeros(x.shape[1], 10, requires_grad=True)
        opt = torch.optim.LBFGS([W], max_iter=60, history_size=20, line_search_fn="strong_wolfe")
        def loss():
            opt.zero_grad()
            l = F.cross_entropy(x @ W, train.y) + decay * W.square().sum()
            l.backward()
            return l
        opt.step(loss)
        loss()
        assert W.grad.norm() < 0.05                                # converged
        errors.append(((pixels(test) @ W).argmax(1) != test.y).float().mean().item())
    print("errors of the linear classifier", errors)
    assert 0.05 <= min(errors) < 0.5                               # hard, but not noise


@pytest.mark.parametrize("args, error, text", [
    (dict(n=0), ValueError, "n=0"), (dict(n=2.5), TypeError, "n=2.5"), (dict(n=True), TypeError, "n=True"),
    (dict(seed=-1), ValueError, "seed=-1"), (dict(seed="x"), TypeError, "seed='x'"), (dict(size=7), ValueError, "size=7")])
def test_bad_arguments_are_named(args, error, text):
    with pytest.raises(error, match=text) as e: make_glyphs(**{"n": 3, **args})
    assert "\n" not in str(e.value)


def test_importing_the_module_loads_no_matplotlib():
    code = "import sys, capsule_routing.glyphs; print([m for m in ('matplotlib', 'PIL', 'torchvision') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
