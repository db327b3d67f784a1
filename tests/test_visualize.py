"Figures and measures: what stands in them is what the network computed, for any shape; what is measured agrees with numpy."
import math
import numpy as np, pytest, torch
from matplotlib.figure import Figure
from capsule_routing.capsnet import caps_config
from capsule_routing.data import ImageData, ImageSet
from capsule_routing.decoder import mask_capsules
from capsule_routing.glyphs import make_glyphs
from capsule_routing.layers import CapsuleLayer, by_length
from capsule_routing.measure import capsule_meaning, measure_meaning, routing_view, winner_share
from capsule_routing.pretrained import pretrained_net, pretrained_poses
from capsule_routing.registry import routing, trunk
from capsule_routing.runs import Run
from capsule_routing.squash import lengths, squash
from capsule_routing.tasks import evaluate
from capsule_routing.training import new_net
import capsule_routing.visualize as vis
from capsule_routing.visualize import (OFFSETS, Field, confusion_counts, confusion_figure, couplings_figure,
    dimension_figure, dimension_pictures, history_figure, lengths_figure, loss_trend, meaning_figure, mistakes_figure,
    overlap_figure, prediction_figure, r2_figure, receptive_field, reconstruction_figure, right_and_wrong, save_figure,
    save_training_figures, two_colours, type_tiles, voters_figure, worst_mistakes)


SMALL = dict(height=14, width=14, kernel=5, conv_channels=6, n_types=2, d_primary=4, d_class=6, decoder=(16,))
def small_net(seed=1, **sizes): return new_net(caps_config(**{**SMALL, **sizes}), seed).eval()

SHAPES = [dict(), dict(channels=3, n_classes=3, d_class=5, width=18), dict(channels=4, n_classes=2, n_iters=1, n_types=1, d_class=3)]

def images(net, n=6, seed=0):
    r = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (n, *net.cfg.image_shape), dtype=torch.uint8, generator=r)
    return ImageSet(x, torch.randint(net.cfg.n_classes, (n,), generator=r), [f"c{k}" for k in range(net.cfg.n_classes)])

def gray_of(ax): return np.asarray(ax.images[0].get_array(), float)


# What a dimension means

@pytest.mark.parametrize("sizes", SHAPES)
def test_the_middle_column_is_the_reconstruction(sizes):
    net = small_net(**sizes)
    x = images(net).x[:1].float()/255
    out = net(x)
    pics = dimension_pictures(net, out.poses[0])
    e = net.cfg.d_class
    assert pics.shape == (e, 11, *net.cfg.image_shape) and OFFSETS == tuple(round(-.25+.05*k, 2) for k in range(11))
    torch.testing.assert_close(pics[:, 5], out.recon.detach().expand(e, -1, -1, -1), atol=1e-6, rtol=0)   # out.recon is the longest's


def test_the_offset_is_added_to_one_dimension_only():
    net, r = small_net(), torch.Generator().manual_seed(3)
    poses = torch.rand(10, 6, generator=r)-.5
    offsets = (-.3, 0., .1, .2)
    pics = dimension_pictures(net, poses, 4, offsets)
    for d in range(6):
        for k, o in enumerate(offsets):
            want = poses.clone(); want[4, d] = poses[4, d]+o
            torch.testing.assert_close(pics[d, k], net.decoder(mask_capsules(want[None], torch.tensor([4])))[0].detach(), atol=1e-6, rtol=0)
            sets = poses.clone(); sets[4, d] = o
            assert not torch.allclose(pics[d, k], net.decoder(mask_capsules(sets[None], torch.tensor([4])))[0], atol=1e-6)
    other = poses.clone(); other[5] = 7.                                   # other capsules are masked
    assert torch.equal(dimension_pictures(net, other, 4, offsets), pics)
    assert poses.equal(torch.rand(10, 6, generator=torch.Generator().manual_seed(3))-.5)   # and the caller's poses stay


def test_dimension_figure_of_an_image_is_that_of_its_poses():
    net = small_net(channels=3)
    x = images(net).x[0]
    with torch.no_grad(): poses = net(x[None].float()/255).poses[0]
    a, b = (dimension_figure(net, s, 2) for s in (x, poses))
    assert np.array_equal(gray_of(a.axes[0]), gray_of(b.axes[0])) and gray_of(a.axes[0]).shape == (6*14, 11*14, 3)
    assert [t.get_text() for t in a.axes[0].get_xticklabels()][5] == "0" and len(a.axes[0].get_yticks()) == 6


def test_dimensions_of_the_package():
    "A seven of MNIST, with nothing but the package"
    net, ps = pretrained_net("mnist"), pretrained_poses("mnist")
    pics = dimension_pictures(net, ps.poses[280], 7)
    assert ps.y[280] == 7 and pics.shape == (16, 11, 1, 28, 28)
    assert (pics[:, 0]-pics[:, 10]).abs().amax((1, 2, 3)).max() > 0.05
    fig = dimension_figure(net, ps.poses[280])
    assert "capsule of 7" in fig.axes[0].get_title()


# Who routes to whom

def lit(net, row, col):
    "Network and image such that only the capsule of type 1 at (row, col) has a pose: both kernels look at their middle pixel"
    with torch.no_grad():
        for conv in (net.trunk, net.primary.conv): conv.weight.zero_(); conv.bias.zero_()
        mid = net.cfg.kernel//2
        net.trunk.weight[:, :, mid, mid] = 1
        d = net.cfg.d_primary
        net.primary.conv.weight[d:2*d, :, mid, mid] = 1                    # channels d to 2d are type 1
    x = torch.zeros(1, *net.cfg.image_shape)
    x[..., 2*row+2*mid, 2*col+2*mid] = 1
    return x


@pytest.mark.parametrize("row,col", [(0, 0), (2, 4), (1, 3)])
def test_a_capsule_is_shown_at_its_place(row, col):
    net = small_net(n_types=3, width=18)                                    # a grid of 3 x 5, to tell rows from columns
    assert net.cfg.grid == (3, 5)
    x = lit(net, row, col)
    view = routing_view(net, x)
    u = net.capsules(x).activation.view(3, 3, 5)
    assert (u > 0).nonzero().tolist() == [[1, row, col]]
    assert (view.support[-1, 0].abs().sum(0) > 1e-9).nonzero().tolist() == [[1, row, col]]
    assert ((view.c[-1, 0]-.1).abs().amax(0) > 1e-6).nonzero().tolist() == [[1, row, col]]      # the others have nothing to say, and stay
    tiles = type_tiles(view.support[-1, 0].abs().sum(0), cols=2)            # tiles of 3 x 5: type 1 at the right of the first row
    assert tiles.shape == (7, 11)
    assert np.argwhere(np.nan_to_num(tiles) > 1e-9).tolist() == [[row, 6+col]]


def test_couplings_figure_shows_the_couplings():
    net = small_net(n_types=3, width=18)
    x = images(net).x[0]
    view = routing_view(net, x)
    fig = couplings_figure(net, x, 3)
    for k, ax in enumerate(fig.axes[1:4]):
        assert ax.get_title() == f"iteration {k+1}"
        np.testing.assert_allclose(np.ma.filled(ax.images[0].get_array(), np.nan), type_tiles(view.c[k, 0, 3]), rtol=1e-6)


@pytest.mark.parametrize("sizes", SHAPES)
def test_support_adds_up_to_the_length_of_s(sizes):
    net = small_net(**sizes)
    x = images(net).x
    view = routing_view(net, x)
    s = view.support.sum((3, 4, 5))
    torch.testing.assert_close(s**2/(1+s**2), view.lengths, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(view.lengths[-1], net(x.float()/255).lengths.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(view.c.sum(2), torch.ones_like(view.entropy))
    torch.testing.assert_close(view.entropy[0], torch.ones_like(view.entropy[0]))
    assert (view.entropy <= 1+1e-6).all()
    c = view.c[-1, 0, :, 0, 0, 0].double()
    assert math.isclose(view.entropy[-1, 0, 0, 0, 0], -(c*c.log()).sum()/math.log(len(c)), abs_tol=1e-5)


@pytest.mark.parametrize("kernel", [3, 5])
def test_receptive_field_by_the_gradient(kernel):
    net = small_net(kernel=kernel, height=15, width=19)
    (h, w), fields = net.cfg.grid, receptive_field(net)
    for row, col in ((0, 0), (h-1, w-1), (1, 2)):
        x = torch.rand(1, *net.cfg.image_shape, requires_grad=True)
        net.primary.conv(torch.nn.functional.softplus(torch.nn.Conv2d.forward(net.trunk, x)))[0, :, row, col].sum().backward()
        for f, k, seen in zip(fields, (row, col), ((x.grad != 0).any(3), (x.grad != 0).any(2))):
            seen = seen.flatten().nonzero().flatten()
            assert (int(seen[0]), len(seen)) == (f.start+k*f.step, f.size)


def test_receptive_field_of_other_stacks():
    torch.manual_seed(0)
    conv,stack = torch.nn.Conv2d,torch.nn.Sequential
    assert receptive_field(conv(1, 1, 3), (1, 9, 12)) == (Field(0, 1, 3),)*2
    deep = stack(conv(1, 4, 3, padding=1), torch.nn.ReLU(), conv(4, 4, 3, stride=2, padding=1), conv(4, 1, (1, 5)))
    assert receptive_field(deep, (1, 24, 40)) == (Field(-2, 2, 5), Field(-2, 2, 13))
    pooled = stack(conv(3, 4, 3, padding=1), torch.nn.MaxPool2d(2), conv(4, 4, 3, dilation=2))
    assert receptive_field(pooled, (3, 30, 30)) == (Field(-1, 2, 12),)*2
    with pytest.raises(ValueError, match="must be a CapsNet or a Run"): receptive_field(deep)


def test_voters_lie_at_the_centres():
    net = small_net(n_types=3, width=18)
    x = lit(net, 2, 4)
    fig = voters_figure(net, x[0], [1])
    image, cells = fig.axes[1].images
    a = np.asarray(cells.get_array())
    assert np.argwhere(abs(a) > 1e-9).tolist() == [[2, 4]]
    left, right, bottom, top = cells.get_extent()
    lit_at = x[0, 0].nonzero()[0].tolist()
    centre = top+(bottom-top)*(2+.5)/a.shape[0], left+(right-left)*(4+.5)/a.shape[1]
    assert np.allclose(centre, lit_at)                                      # the cell lies on the pixel that it saw


# Any routing, any trunk, any number of layers

@pytest.fixture
def others():
    "A routing without couplings, one with couplings but no votes, and a trunk with norms and a shortcut"
    nn = torch.nn
    class Plain(CapsuleLayer):
        def __init__(self, n_in, d_in, n_out, d_out):
            super().__init__(n_in, d_in, n_out, d_out)
            self.lin = nn.Linear(n_in*d_in, n_out*d_out)
        def forward(self, caps): return by_length(squash(self.lin(caps.pose.flatten(1)).unflatten(1, self.sizes[2:])))
    class Gates(Plain):
        def forward(self, caps, trace=False):
            out = super().forward(caps)
            c = torch.ones(1, len(caps.pose), self.sizes[0], self.sizes[2]).softmax(3)
            return (out, vis_trace(c, c.log(), out.pose[None])) if trace else out
    class Block(nn.Module):
        def __init__(self, in_channels, channels=6):
            super().__init__()
            self.first = nn.Conv2d(in_channels, channels, 3, padding=1)
            self.norm, self.second = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1)
        def forward(self, x):
            x = self.norm(self.first(x)).relu()
            return (x+self.second(x)).relu()
    from capsule_routing.routing import RoutingTrace as vis_trace
    routing["test-plain"], routing["test-gates"], trunk["test-block"] = Plain, Gates, Block
    yield
    del routing["test-plain"], routing["test-gates"], trunk["test-block"]


def test_a_routing_without_couplings(others, tmp_path):
    "One line that says so; what needs none is drawn, at the end of a run too"
    net = small_net(routing="test-plain")
    ds = images(net, 8)
    for draw in (couplings_figure, voters_figure, lengths_figure, winner_share):
        with pytest.raises(ValueError, match="routing='?test-plain'?: has no couplings") as e: draw(net, ds.x[:1])
        assert "\n" not in str(e.value)
    save(reconstruction_figure(net, ds.x, ds.y))
    save(overlap_figure(net, ds.x[:1], torch.tensor([[1, 2]])))
    assert [p.name for p in save_training_figures(net, ds, tmp_path)] == ["reconstructions.png", "dimensions.png"]


def test_a_routing_without_votes(others, tmp_path):
    net = small_net(routing="test-gates")
    ds = images(net, 8)
    assert routing_view(net, ds.x).support is None
    for draw in (couplings_figure, lengths_figure): save(draw(net, ds.x[0]))
    assert torch.allclose(winner_share(net, ds.x).share, torch.full((8,), .1))
    with pytest.raises(ValueError, match="routing='?test-gates'?: has no votes"): voters_figure(net, ds.x[0])
    assert len(save_training_figures(net, ds, tmp_path)) == 3


def test_another_trunk(others, tmp_path):
    "Norms stay as they were, although the network is in training mode; places lie where they look"
    net = small_net(trunk="test-block", kernel=3, height=16, width=20, conv_channels=6).train()
    ds = images(net, 8)
    before = {k: v.clone() for k,v in net.state_dict().items()}
    assert receptive_field(net) == (Field(-2, 2, 7),)*2
    for draw in (couplings_figure, voters_figure, lengths_figure): save(draw(net, ds.x[0]))
    assert len(save_training_figures(net, ds, tmp_path)) == 3
    assert net.training and all(before[k].equal(v) for k,v in net.state_dict().items())


def test_layers_in_between(tmp_path):
    "The couplings are those of the class layer, and the bar says whose; a map of places is refused"
    net = small_net(layers=((12, 5), (7, 4)))
    ds = images(net, 8)
    view = routing_view(net, ds.x)
    assert view.c.shape == (3, 8, 10, 7, 1, 1)
    caps,trace = net.trace(ds.x.float()/255)
    torch.testing.assert_close(view.c[..., 0, 0], trace.c.transpose(2, 3).detach())
    s = view.support.sum((3, 4, 5))
    torch.testing.assert_close(s**2/(1+s**2), view.lengths, atol=1e-5, rtol=1e-4)
    fig = couplings_figure(net, ds.x[0])
    assert any("coupling of capsules of layer 2" in ax.get_ylabel() for ax in fig.axes)
    save(fig)
    with pytest.raises(ValueError, match="layers=.*stand on no grid"): voters_figure(net, ds.x[0])
    assert len(save_training_figures(net, ds, tmp_path)) == 3


def test_the_winners_share():
    "By hand, from the trace; in batches as at once"
    net = small_net()
    x = images(net, 7).x
    won = winner_share(net, x, batch_size=3)
    caps,trace = net.trace(x.float()/255)
    for i in range(7):
        winner = int(lengths(trace.v[-1, i]).argmax())
        to = trace.c[-1, i, :, winner].detach()
        assert won.winner[-1, i] == winner == caps.activation[i].argmax()
        assert math.isclose(won.share[i], to.mean(), rel_tol=1e-4)
        assert math.isclose(won.largest[i], (to == trace.c[-1, i].amax(1)).float().mean(), abs_tol=1e-6)
    for r in range(1, 4):
        fewer = small_net(n_iters=r)
        assert fewer(x.float()/255).lengths.argmax(1).equal(won.winner[r-1])


# The meaning of a dimension

def test_correlations_are_numpys():
    r = torch.Generator().manual_seed(1)
    x, f, y = torch.randn(90, 4, generator=r), torch.randn(90, 3, generator=r), torch.arange(90) % 2
    m = measure_meaning(x, y, f, "abc", ("u", "v"))
    for k in range(2):
        both = np.corrcoef(torch.cat([x, f], 1)[y == k].double().T.numpy())
        np.testing.assert_allclose(m.corr[k], both[:4, 4:], atol=1e-6)
    assert (m.classes, m.factors, m.n_fit.tolist(), m.n_test.tolist(), m.n_wrong) == (("u", "v"), ("a", "b", "c"), [23, 23], [22, 22], None)


def test_r2_is_one_where_it_is_linear_and_none_on_noise():
    r = torch.Generator().manual_seed(2)
    x, y = torch.randn(400, 8, generator=r), torch.zeros(400, dtype=torch.long)
    f = torch.stack([x@torch.arange(8.)+3, torch.randn(400, generator=r)], 1)
    m = measure_meaning(x, y, f, ("linear", "noise"))
    assert abs(m.r2[0, 0]-1) < 1e-5 and m.r2[0, 1] < 0.02
    few = measure_meaning(x[:24], y[:24], f[:24], ("linear", "noise"))        # 12 images to fit 8 numbers: on its own half the noise is nearly fitted
    assert few.r2[0, 1] < 0 and abs(few.r2[0, 0]-1) < 1e-4


def test_r2_is_held_out():
    "By hand: even places fit, odd places score, about the mean of the odd ones"
    r = torch.Generator().manual_seed(5)
    x, f = torch.randn(40, 3, generator=r).double(), torch.randn(40, 1, generator=r).double()
    f = f+x[:, :1]
    A = lambda t: np.column_stack([t, np.ones(len(t))])
    w = np.linalg.lstsq(A(x[::2]), f[::2].numpy(), rcond=None)[0]
    test = f[1::2].numpy()
    want = 1-((test-A(x[1::2])@w)**2).sum()/((test-test.mean())**2).sum()
    assert abs(float(measure_meaning(x, torch.zeros(40, dtype=torch.long), f, "a").r2[0, 0])-want) < 1e-6


def test_classes_are_never_pooled():
    "Simpson: in each class the factor falls as the number grows, over all images together it rises"
    r = torch.Generator().manual_seed(3)
    y = torch.arange(600) % 3
    inside = torch.randn(600, generator=r)
    x = (inside+10*y)[:, None].float()
    f = (-inside+10*y)[:, None].float()
    assert np.corrcoef(x[:, 0], f[:, 0])[0, 1] > 0.9
    m = measure_meaning(x, y, f, ("f",))
    assert (m.corr < -0.999).all() and (m.r2 > 0.999).all()
    shuffled = (10*y+torch.randn(600, generator=r))[:, None].float()           # nothing within a class, much between them
    m = measure_meaning(x, y, shuffled, ("f",))
    assert (m.corr.abs() < 0.3).all() and (m.r2 < 0.1).all() and np.corrcoef(x[:, 0], shuffled[:, 0])[0, 1] > 0.9


def test_what_never_changes_has_no_correlation():
    r = torch.Generator().manual_seed(4)
    x, f = torch.randn(60, 3, generator=r), torch.randn(60, 2, generator=r)
    x[:, 1], f[:, 0] = 0.7, 2.
    m = measure_meaning(x, torch.zeros(60, dtype=torch.long), f, "ab")
    assert m.corr[0].isnan().tolist() == [[True, False], [True, True], [True, False]] and m.r2[0].isnan().tolist() == [True, False]
    for fig in (meaning_figure(m), r2_figure(m)): save(fig)


def test_capsule_meaning_takes_the_right_capsule_and_keeps_mistakes():
    net = small_net(height=20, width=20)
    g = make_glyphs(400, seed=1, size=20)
    m = capsule_meaning(net, g)
    with torch.no_grad(): out = net(g.x.float()/255)
    own = out.poses[torch.arange(400), g.y]
    want = measure_meaning(own, g.y, g.factors, g.factor_names)
    torch.testing.assert_close(m.corr, want.corr, atol=1e-5, rtol=0)
    wrong = out.lengths.argmax(1) != g.y
    assert m.n_wrong.tolist() == [int(wrong[g.y == c].sum()) for c in range(10)] and int((m.n_fit+m.n_test).sum()) == 400
    assert m.classes == tuple("0123456789") and m.factors == g.factor_names
    sevens = ImageSet(g.x[g.y == 7], g.y[g.y == 7], range(10), g.factors[g.y == 7], g.factor_names)
    one = capsule_meaning(net, sevens)
    assert one.classes == ("7",) and torch.allclose(one.corr[0], m.corr[7], atol=1e-5)
    save(meaning_figure(m, (7, "3")))


# Figures for any network

def save(fig):
    "Drawn as a file, it is a PNG of a modest size that pyplot has not heard of"
    import sys
    assert isinstance(fig, Figure)
    data, size = fig._repr_png_()
    assert data.startswith(b"\x89PNG") and len(data) < 100_000 and size["width"] > 0
    if "matplotlib.pyplot" in sys.modules: assert not sys.modules["matplotlib.pyplot"].get_fignums()


@pytest.mark.parametrize("sizes", SHAPES, ids=["grey", "colour", "four"])
def test_every_figure_for_any_image(sizes):
    net = small_net(**sizes)
    ds = images(net, 8)
    ev = evaluate(net, ds)
    k = net.cfg.n_classes
    labels = torch.stack([ds.y[:2], (ds.y[:2]+1) % k], 1)
    run = Run(None, net, net.cfg, dict(data=dict(classes=[f"class {c}" for c in range(k)])), [])
    some = right_and_wrong(ev, 2, 1)
    for fig in (reconstruction_figure(run, ds.x[some], ds.y[some]), dimension_figure(run, ds.x[0]), couplings_figure(run, ds.x[0]),
                voters_figure(run, ds.x[0]), lengths_figure(run, ds.x[:2]), overlap_figure(run, ds.x[:2], labels),
                confusion_figure(confusion_counts(ev, k), ds.classes), mistakes_figure(ev, ds.x, ds.classes, cols=2, n=2),
                prediction_figure(ds.x[:3].float()/255, net(ds.x[:3].float()/255).recon, ["a", "b", "c"])): save(fig)


def test_reconstructions_are_those_of_the_two_capsules():
    net = small_net()
    ds = images(net, 6)
    x = ds.x.float()/255
    out = net(x)
    pred = out.lengths.argmax(1)
    target = pred.clone(); target[2] = (pred[2]+1) % 10
    fig = reconstruction_figure(net, ds.x, target)
    axes = np.array(fig.axes).reshape(3, 6)
    for i in range(6):
        np.testing.assert_allclose(gray_of(axes[1, i]), net.decoder(mask_capsules(out.poses, target)).detach()[i, 0], atol=1e-6)
        assert len(axes[2, i].images) == (i == 2)
    np.testing.assert_allclose(gray_of(axes[2, 2]), out.recon.detach()[2, 0], atol=1e-6)
    assert axes[0, 2].get_title() == f"{int(target[2])}\nnamed {int(pred[2])}" and axes[0, 0].get_title() == f"{int(target[0])}\n"
    assert len(reconstruction_figure(net, ds.x, pred).axes) == 12            # nothing wrong, no third row


def test_two_things_are_drawn_from_their_own_capsules():
    net = small_net()
    x = images(net, 3).x
    with torch.no_grad(): out = net(x.float()/255)
    found = out.lengths.topk(2).indices
    labels = found.flip(1).clone(); labels[2, 0] = next(c for c in range(10) if c not in found[2].tolist())
    axes = np.array(overlap_figure(net, x, labels).axes).reshape(4, 3)
    first = torch.tensor([int(found[0, 1]), int(found[1, 1]), int(axes[2, 2].get_title())])
    assert first[2] in found[2] and [a.get_title() for a in axes[2, :2]] == [str(int(k)) for k in first[:2]]   # in the order of the labels
    a = net.decoder(mask_capsules(out.poses, first)).detach()
    np.testing.assert_allclose(gray_of(axes[2, 0])[..., 0], a[0, 0], atol=1e-6)
    assert "named" in axes[0, 2].get_title() and "named" not in axes[0, 0].get_title()
    white = two_colours(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    assert torch.equal(white, torch.ones(1, 3, 2, 2))


def test_examples_and_worst_mistakes():
    net = small_net()
    ev = evaluate(net, images(net, 60))
    some, worst = right_and_wrong(ev, 3, 5), worst_mistakes(ev, 5)
    right = (ev.pred == ev.target).nonzero().flatten()
    assert some[-len(worst):].tolist() == worst.tolist() and all(i in right for i in some[:-len(worst)])
    gap = ev.lengths.gather(1, ev.pred[:, None])-ev.lengths.gather(1, ev.target[:, None])
    assert worst[0] == gap.argmax() and not len(right_and_wrong(ev, 0, 0))
    perfect = ev._replace(target=ev.pred)
    assert len({int(perfect.target[i]) for i in right_and_wrong(perfect, 4)}) == min(4, len(ev.pred.unique())) and not len(worst_mistakes(perfect))
    save(mistakes_figure(perfect, images(net, 60).x, range(10)))
    counts = confusion_counts(ev, 10)
    assert counts.sum() == 60 and counts.trace() == len(right) and counts[ev.target[worst[0]], ev.pred[worst[0]]] > 0


def test_history():
    row = lambda k, l: dict(epoch=k+1, train_loss=2*l, test_loss=l, test_errors=9, test_n=1000)
    noise = np.random.default_rng(0).normal(size=30)
    assert loss_trend([row(k, 1-.01*k+.001*noise[k]) for k in range(30)])[::3] == ("falls", 10)
    assert loss_trend([row(k, 1+.01*noise[k]) for k in range(30)]).says == "level"
    assert loss_trend([row(k, 1+.01*k) for k in range(6)]).says == "rises"
    t = loss_trend([row(k, 1.+k) for k in range(3)])
    assert t.says == "too few epochs" and math.isnan(t.slope)
    for n in (1, 60): save(history_figure([row(k, 1/(k+1)) for k in range(n)]))
    fig = history_figure(Run(None, None, None, {}, [dict(row(k, 1.), n=500, train_errors=3) for k in range(5)]))
    assert len(fig.axes[1].lines) == 2 and np.allclose(fig.axes[1].lines[0].get_ydata(), .9)


# Files

def test_training_figures(tmp_path):
    net = small_net(channels=3)
    data = ImageData("x", images(net, 5), images(net, 30))
    net.train()
    paths = save_training_figures(Run(None, net, net.cfg, {}, []), data, tmp_path/"run")
    assert [p.name for p in paths] == ["reconstructions.png", "dimensions.png", "couplings.png"]
    assert sorted(p.name for p in (tmp_path/"run").iterdir()) == sorted(p.name for p in paths)   # no remains
    assert net.training                                                      # as it was
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths)
    (tmp_path/"file").write_text("")
    with pytest.raises(OSError): save_training_figures(net, data, tmp_path/"file")


def test_a_figure_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path/"a.png"
    path.write_bytes(b"old")
    fig, _ = vis.new_figure(1, 1)
    def fails(*a, **k): raise RuntimeError("no")
    monkeypatch.setattr(fig, "savefig", fails)
    with pytest.raises(RuntimeError): save_figure(fig, path)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.png"]
    for end in ("pdf", "svg"): assert save_figure(vis.new_figure(1, 1)[0], tmp_path/f"b.{end}").stat().st_size > 100


def test_training_ends_with_the_pictures(trained):
    names = ["reconstructions.png", "dimensions.png", "couplings.png"]
    assert all((trained.path/n).read_bytes().startswith(b"\x89PNG") for n in names)
    line = next(l for l in trained.stdout.splitlines() if l.startswith("pictures"))
    assert [w.strip() for w in line.removeprefix("pictures").split(",")] == [f"tiny/{n}" for n in names]


def test_a_finished_run_survives_its_pictures(tmp_path, capsys):
    from capsule_routing.commands import _pictures
    net = small_net()
    data = ImageData("x", images(net), images(net))
    (tmp_path/"file").write_text("")
    assert _pictures(net, data, tmp_path/"file") == [] and _pictures(small_net(decoder=None), data, tmp_path) == []
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and "no pictures" in err[0] and "the run is complete" in err[0]


# What is refused

net = small_net()
x = images(net).x
BAD = {
    "no network": (lambda: couplings_figure(3, x[0]), "net=3: must be a CapsNet or a Run, got int"),
    "no decoder": (lambda: dimension_figure(small_net(decoder=None), x[0]), "no decoder"),
    "no decoder, recon": (lambda: reconstruction_figure(small_net(decoder=None), x, torch.zeros(6).long()), "no decoder"),
    "no decoder, files": (lambda: save_training_figures(small_net(decoder=None), images(net), "nowhere"), "no decoder"),
    "shape": (lambda: voters_figure(net, torch.zeros(1, 28, 28)), "must have shape (any, 1, 14, 14)"),
    "dtype": (lambda: lengths_figure(net, x.long()), "must hold floating point numbers"),
    "type": (lambda: lengths_figure(net, x.numpy()), "must be a tensor"),
    "none": (lambda: lengths_figure(net, x[:0]), "images=uint8 (0, 1, 14, 14): must be 1 to 6"),
    "too many": (lambda: lengths_figure(net, torch.cat([x, x])), "must be 1 to 6"),
    "too many, recon": (lambda: reconstruction_figure(net, x.repeat(3, 1, 1, 1), torch.zeros(18, dtype=torch.long)), "must be 1 to 16"),
    "two images": (lambda: couplings_figure(net, x[:2]), "images=uint8 (2, 1, 14, 14): must be one image"),
    "target": (lambda: reconstruction_figure(net, x[:1], torch.tensor([10])), "target=10: must be a class from 0 to 9"),
    "which": (lambda: couplings_figure(net, x[0], 10), "which=10: must be at most 9"),
    "which kind": (lambda: couplings_figure(net, x[0], 1.), "which=1.0: must be a whole number"),
    "which of some": (lambda: voters_figure(net, x[0], [3, -1]), "which=-1: must be at least 0"),
    "poses": (lambda: dimension_pictures(net, torch.zeros(10, 16)), "poses=float32 (10, 16): must have shape (10, 6)"),
    "offsets": (lambda: dimension_pictures(net, torch.zeros(10, 6), 0, [math.nan]), "offsets=[nan]: must be some finite numbers"),
    "labels": (lambda: overlap_figure(net, x[:2], torch.zeros(2, dtype=torch.long)), "labels=int64 (2,): must have shape (2, 2)"),
    "label": (lambda: overlap_figure(net, x[:1], torch.tensor([[0, 11]])), "labels=11: must be a class from 0 to 9"),
    "names": (lambda: lengths_figure(net, x[:1], ("a",)), "classes=('a',): must be 10 names"),
    "counts": (lambda: confusion_figure([[1]], ("a", "b")), "counts=(1, 1): must be (2, 2) for 2 classes"),
    "history": (lambda: history_figure([]), "must be a run or its rows"),
    "history rows": (lambda: history_figure([dict(epoch=1)]), "must be a run or its rows"),
    "factors": (lambda: capsule_meaning(net, images(net)), "have no factors"),
    "too few": (lambda: measure_meaning(torch.zeros(20, 16), torch.zeros(20, dtype=torch.long), torch.zeros(20, 1), "a", ("cat",)), "class cat has 20 images"),
    "nan": (lambda: measure_meaning(torch.full((9, 1), math.nan), torch.zeros(9, dtype=torch.long), torch.zeros(9, 1), "a"), "must be finite"),
    "class to show": (lambda: meaning_figure(measure_meaning(torch.rand(9, 1), torch.zeros(9, dtype=torch.long), torch.rand(9, 1), "a"), [4]), "classes='4': must be one of 0"),
    "ending": (lambda: save_figure(vis.new_figure(1, 1)[0], "a.jpg"), "path='a.jpg': must end in .png, .pdf or .svg"),
    "data": (lambda: save_training_figures(net, x, "nowhere"), "must be an ImageData or an ImageSet, got Tensor"),
}

@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, words = BAD[case]
    with pytest.raises((ValueError, TypeError)) as e: call()
    assert words in str(e.value) and "\n" not in str(e.value) and not list(tmp_path.iterdir())
