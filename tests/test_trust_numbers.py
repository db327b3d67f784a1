"Finite numbers everywhere: random shapes, both precisions, magnitudes 0 and 1e-15 to 1e15; and what must not matter does not."
import torch, pytest
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

from capsule_routing.capsnet import CapsNet, CapsOut, caps_config
from capsule_routing.decoder import Decoder, mask_capsules
from capsule_routing.factored import route_factored
from capsule_routing.fourier import fourier_conv2d
from capsule_routing.losses import capsule_loss, margin_loss, reconstruction_loss
from capsule_routing.routing import route, votes
from capsule_routing.squash import lengths, squash

# The same examples every time: a failure here is one for everybody.
fixed = settings(derandomize=True, database=None, deadline=None, max_examples=150, suppress_health_check=list(HealthCheck),
                 phases=(Phase.generate, Phase.shrink))
few = settings(fixed, max_examples=80)

EPS = {torch.float32: 1e-6, torch.float64: 1e-14}
POWERS = range(-15, 16)
seeds, dtypes, iters = st.integers(0, 2**31-1), st.sampled_from(list(EPS)), st.integers(1, 5)
magnitudes = st.just(0.) | st.sampled_from([10.**p for p in POWERS])                  # the contract
tame = st.just(0.) | st.sampled_from([10.**p for p in POWERS if p <= 0])              # where rounding cannot tip a softmax over


def sizes(*most): return st.tuples(*(st.integers(1, m) for m in most))

def draw(seed, shape, dtype, size, n_zero=True):
    "Directions at random, lengths along the last axis between `size/10` and `size`, one vector in five zero"
    g = torch.Generator().manual_seed(seed)
    t = torch.randn(shape, generator=g, dtype=torch.float64)
    t = t / t.norm(dim=-1, keepdim=True) * (0.1 + 0.9*torch.rand(*shape[:-1], 1, generator=g, dtype=torch.float64))
    if n_zero: t = t * (torch.rand(*shape[:-1], 1, generator=g) > 0.2)
    return (t*size).to(dtype)

def back(y, *inputs):
    "Gradients of a fixed weighted sum of `y`, each weight between -0.7 and 1"
    w = torch.linspace(-0.7, 1, y.numel() or 1, dtype=y.dtype).view_as(y) if y.ndim else 1.
    return torch.autograd.grad((y*w).sum(), inputs, retain_graph=True)

def ready(*ts): return tuple(t.clone().requires_grad_() for t in ts)

def finite(*ts):
    for t in ts: assert t.isfinite().all(), t

def close(a, b, tol):
    "Within `tol` of the larger norm of the two"
    assert a.shape == b.shape and a.dtype == b.dtype
    a,b = a.double(),b.double()
    assert (a-b).norm() <= tol*max(a.norm(), b.norm()) + 1e-300, ((a-b).norm(), a.norm(), b.norm())

def sound(v, dtype):
    "Capsules: finite, of the dtype that came in, at most 1 long within rounding"
    assert v.dtype == dtype
    finite(v)
    assert (lengths(v) <= 1 + EPS[dtype]).all()


# ---------- squash and lengths ----------

@fixed
@given(sizes(6, 5, 20), st.integers(-3, 2), dtypes, magnitudes, seeds)
def test_squash(shape, dim, dtype, size, seed):
    s, = ready(draw(seed, shape, dtype, size).movedim(-1, dim))
    v = squash(s, dim)
    assert v.shape == s.shape
    sound(v.movedim(dim, -1), dtype)
    finite(*back(v, s))
    n = lengths(s.double(), dim)
    want = n**2/(1+n**2)                                                    # the length that Eq. 1 gives
    assert torch.allclose(lengths(v, dim).double(), want, rtol=10*EPS[dtype], atol=1e-8)


@fixed
@given(sizes(6, 5, 20), st.integers(-3, 2), dtypes, magnitudes, seeds)
def test_lengths(shape, dim, dtype, size, seed):
    s, = ready(draw(seed, shape, dtype, size).movedim(-1, dim))
    n = lengths(s, dim)
    finite(n, *back(n, s))
    assert (n >= 0).all() and (n <= size*(1 + EPS[dtype])).all()
    assert (back(n, s)[0].abs() <= 1 + EPS[dtype]).all()                    # no slope is steeper than 1
    close(n, s.detach().double().square().sum(dim).sqrt().to(dtype), 10*EPS[dtype])


# ---------- routing ----------

@fixed
@given(sizes(4, 12, 5, 8), dtypes, magnitudes, iters, st.booleans(), seeds)
def test_route(shape, dtype, size, n, stop, seed):
    "Votes of any length in the contract"
    u_hat, = ready(draw(seed, shape, dtype, size))
    v,t = route(u_hat, n, stop, trace=True)
    sound(v, dtype); sound(t.v, dtype); finite(t.b, t.c)
    assert t.c.shape == (n, *shape[:3]) and (t.c >= 0).all()
    close(t.c.sum(-1), torch.ones_like(t.c[..., 0]), EPS[dtype])
    assert torch.equal(v, t.v[-1]) and torch.equal(v, route(u_hat, n, stop))
    finite(*back(v, u_hat), *back(lengths(v), u_hat))


@st.composite
def children(draws, power):
    "`u` and `W` whose votes are at most `10**power` long, though each of them may be up to 1e15 long"
    b,i,j,d,e = draws(sizes(4, 12, 5, 6, 6))
    dtype,seed = draws(dtypes),draws(seeds)
    p = draws(st.sampled_from(POWERS))
    q = draws(st.sampled_from([o for o in POWERS if o + p <= power]) if -15 + p <= power else st.just(-15))
    a,c = draws(st.sampled_from([(10.**p, 10.**q)]*9 + [(0., 10.**q), (10.**p, 0.)]))
    W = draw(seed+1, (i, j, d, e), dtype, c/d)                              # d rows, each at most c/d long
    return draw(seed, (b, i, d), dtype, a), W


@fixed
@given(children(15), iters, st.booleans())
def test_route_factored(uW, n, stop):
    u,W = ready(*uW)
    v = route_factored(u, W, n, stop)
    sound(v, u.dtype)
    finite(*back(v, u, W), *back(lengths(v), u, W))
    finite(votes(u, W), *back(route(votes(u, W), n, stop), u, W))


@fixed
@given(children(0), iters, st.booleans())
def test_factored_equals_plain(uW, n, stop):
    "Values and gradients, with respect to children and transformations"
    (u,W),tol = ready(*uW),20*EPS[uW[0].dtype]
    a,b = route_factored(u, W, n, stop),route(votes(u, W), n, stop)
    close(a, b, tol)
    for x,y in zip(back(a, u, W), back(b, u, W)): close(x, y, 10*tol)


ROUTINGS = dict(plain=lambda u, W, n: route(votes(u, W), n), factored=route_factored)
both = pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)


@both
@few
@given(uW=children(15), n=iters, other=magnitudes, seed=seeds)
def test_batch_mates_do_not_matter(routing, uW, n, other, seed):
    "The first image beside quite other ones: not one bit of its poses and of its gradient changes; nor does it send a gradient to them"
    u,W = uW
    mates = draw(seed, u.shape, u.dtype, min(other, 1e15/max(1., float(W.norm()))))
    new = torch.cat([u[:1], mates[1:]])
    got = []
    for x in ready(u, new):
        v = routing(x, W, n)
        g, = torch.autograd.grad(v[0].sum(), x)
        assert not g[1:].any()
        got.append((v[0], g[0]))
    for a,b in zip(*got): assert torch.equal(a, b)


@both
@few
@given(uW=children(0), n=iters)
def test_alone_or_in_a_batch(routing, uW, n):
    u,W = uW
    whole = routing(u, W, n)
    for k in range(len(u)): close(routing(u[k:k+1], W, n), whole[k:k+1], 20*EPS[u.dtype])


@both
@few
@given(uW=children(0), n=iters, rnd=st.randoms(use_true_random=False))
def test_order_of_children_and_parents(routing, uW, n, rnd):
    "Children in another order: the same parents. Parents in another order: the same, in that order."
    (u,W),tol = uW,20*EPS[uW[0].dtype]
    v = routing(u, W, n)
    i,j = (rnd.sample(range(m), m) for m in W.shape[:2])
    close(routing(u[:, i], W[i], n), v, tol)
    close(routing(u, W[:, j], n), v[:, j], tol)


# ---------- losses ----------

@fixed
@given(sizes(6, 8), dtypes, magnitudes, st.booleans(), seeds)
def test_margin_loss(shape, dtype, size, multi, seed):
    g = torch.Generator().manual_seed(seed)
    b,n = shape
    v, = ready((torch.rand(b, n, generator=g, dtype=torch.float64)*size).to(dtype))
    t = torch.rand(b, n, generator=g).round() if multi else torch.randint(n, (b,), generator=g)
    loss = margin_loss(v, t)
    finite(loss, *back(loss, v))
    assert loss >= 0 and loss.dtype == dtype
    close(torch.stack([margin_loss(v[k:k+1], t[k:k+1]) for k in range(b)]).mean(), loss, 10*EPS[dtype])   # batch-mates do not matter


@fixed
@given(sizes(4, 3, 6, 6), dtypes, magnitudes, seeds)
def test_reconstruction_loss(shape, dtype, size, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=g, dtype=dtype)
    r, = ready((torch.rand(shape, generator=g, dtype=torch.float64)*size).to(dtype))
    loss = reconstruction_loss(r, x)
    finite(loss, *back(loss, r))
    assert loss >= 0 and loss.dtype == dtype
    close(torch.stack([reconstruction_loss(r[k:k+1], x[k:k+1]) for k in range(len(x))]).mean(), loss, 10*EPS[dtype])


# ---------- decoder ----------

@fixed
@given(sizes(5, 6, 8), dtypes, magnitudes, seeds)
def test_mask(shape, dtype, size, seed):
    "The chosen pose exactly, zeros exactly, and gradients for the chosen alone"
    (b,n,e),g = shape,torch.Generator().manual_seed(seed)
    poses, = ready(draw(seed, shape, dtype, size))
    which = torch.randint(n, (b,), generator=g)
    m = mask_capsules(poses, which).unflatten(1, (n, e))
    keep = F.one_hot(which, n).bool()
    assert torch.equal(m[keep], poses[keep]) and not m[~keep].any()
    d, = back(m, poses)
    finite(d)
    assert not d[~keep].any()


@few
@given(sizes(4, 5, 6), sizes(3, 5, 5), st.lists(st.integers(1, 9), max_size=2), dtypes, magnitudes, seeds)
def test_decoder_and_the_whole_loss(shape, image, widths, dtype, size, seed):
    "From poses of any length in the contract to the loss, and back to poses and weights"
    (b,n,e),g = shape,torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Decoder(n, e, image, widths).to(dtype)
    poses, = ready(draw(seed, shape, dtype, size))
    y,x = torch.randint(n, (b,), generator=g),torch.rand(b, *image, generator=g, dtype=dtype)
    out = CapsOut(lengths(poses), poses, net(mask_capsules(poses, y)))
    assert out.recon.shape == x.shape and (out.recon >= 0).all() and (out.recon <= 1).all()
    loss = capsule_loss(out, y, x)
    finite(loss, *back(loss, poses, *net.parameters()))
    alone = net(mask_capsules(poses[:1], y[:1]))                            # batch-mates do not matter
    assert torch.allclose(alone, out.recon[:1], atol=1e-3 if size > 1e3 else 10*EPS[dtype])


# ---------- the convolution ----------

@fixed
@given(sizes(3, 4, 4), st.integers(1, 5), st.integers(1, 5), st.tuples(*[st.integers(0, 12)]*2), st.booleans(), dtypes, st.sampled_from(POWERS), st.sampled_from(POWERS), seeds)
def test_fourier_convolution(bco, k, stride, more, bias, dtype, p, q, seed):
    "Against torch's own in 64 bits, values and gradients, by norm, relative to the terms that are added"
    (b,c,o),stride,tol = bco,min(stride, k),{torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
    x = draw(seed, (b, c, k+more[0], k+more[1]), dtype, 10.**p, n_zero=False)
    w = draw(seed+1, (o, c, k, k), dtype, 10.**q, n_zero=False)
    z = draw(seed+2, (o,), dtype, 10.**(p+q), n_zero=False) if bias else None
    ours,theirs = ready(x, w, *([z] if bias else [])),ready(*(t.double() for t in (x, w, *([z] if bias else []))))
    large = ready(*(t.detach().abs() for t in theirs))                      # what the terms are before they cancel
    a,b,c = fourier_conv2d(*ours, stride=stride),F.conv2d(*theirs, stride=stride),F.conv2d(*large, stride=stride)
    def near(m, n, scale): assert m.dtype == dtype and (m.double()-n).norm() <= tol*scale.norm(), ((m-n).norm(), scale.norm())
    near(a, b, c)
    for m,n,scale in zip(back(a, *ours), back(b, *theirs), torch.autograd.grad(c.sum(), large)): near(m, n, scale)


# ---------- all of it ----------

@settings(few, max_examples=15)
@given(st.sampled_from([0., 1e-15, 1e-3, 1.]), st.integers(1, 4), dtypes, seeds)
def test_network(size, b, dtype, seed):
    "An image of any brightness, black ones too: finite lengths, poses, drawings, loss and gradients; each image for itself"
    cfg,g = caps_config(height=19, width=18, n_classes=4, conv_channels=4, n_types=2, d_primary=3, d_class=5, decoder=(7,)),torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = CapsNet(cfg).to(dtype)
    x,y = torch.rand(b, 1, 19, 18, generator=g, dtype=dtype)*size,torch.randint(4, (b,), generator=g)
    out = net(x, y)
    sound(out.poses, dtype); finite(*out)
    loss = capsule_loss(out, y, x)
    finite(loss, *back(loss, *net.parameters()))
    for a,o in zip(net(x[:1], y[:1]), out): close(a, o[:1], 100*EPS[dtype])
