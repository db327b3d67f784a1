"Every routing of the package, one by one: what a layer of capsules must keep, and whole networks with it."
import inspect, json, signal
from functools import cache
import pytest, torch
from hypothesis import given, settings, strategies as st
from capsule_routing import names
from capsule_routing.callbacks import Interrupted
from capsule_routing.capsnet import CapsConfig, CapsNet, caps_config, count_params
from capsule_routing.checks import BadValue
from capsule_routing.data import ImageData, ImageSet
from capsule_routing.glyphs import make_glyphs
from capsule_routing.layers import Capsules
from capsule_routing.losses import capsule_loss
from capsule_routing.networks import CapsuleLossConfig, CNNConfig, config_from_dict
from capsule_routing.registry import routing
from capsule_routing.runs import digest, load_run
from capsule_routing.settings import TrainConfig
from capsule_routing.squash import squash
from capsule_routing.tasks import predict
from capsule_routing.training import fit, new_net
from capsule_routing.visualize import couplings_figure, save_training_figures, voters_figure

KINDS = names.ROUTINGS
COUPLED = [k for k in KINDS if "trace" in inspect.signature(routing[k].forward).parameters]
OPTIONS = dict(dynamic=[dict(priors=True), dict(stop_grad=True)], em=[dict(n_iters=1), dict(evidence=None)],
               attention=[dict(n_iters=3)], efficient=[dict(before=True)])
EACH = [(k, o) for k in KINDS for o in ({}, *OPTIONS.get(k, []))]
each_kind = pytest.mark.parametrize("kind", KINDS)
each = pytest.mark.parametrize("kind,options", EACH, ids=lambda o: o if isinstance(o, str) else "-".join(o) or "usual")

def capsules(b, i, d, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return Capsules(squash(torch.randn(b, i, d, generator=g, dtype=dtype)), torch.rand(b, i, generator=g, dtype=dtype))

def layer_of(kind, n_in=5, d_in=4, n_out=3, d_out=4, seed=0, **options):
    torch.manual_seed(seed)
    if kind == "em": d_out = d_in
    layer = routing[kind](n_in, d_in, n_out, d_out, **options)
    for p in layer.parameters(): p.data += 0.05*torch.randn_like(p)      # what starts at zero as well
    return layer

def part(caps, k): return Capsules(caps.pose[k], caps.activation[k])


@each
@settings(max_examples=8, deadline=None)
@given(b=st.integers(0, 3), i=st.integers(1, 7), d=st.sampled_from([1, 4, 9]), j=st.integers(1, 4), e=st.integers(2, 5))
def test_any_sizes(kind, options, b, i, d, j, e):
    layer,caps = layer_of(kind, i, d, j, e, **options),capsules(b, i, d)
    out = layer(caps)
    assert out.pose.shape == (b, j, d if kind == "em" else e) and out.activation.shape == (b, j)
    assert out.pose.isfinite().all() and (out.activation >= 0).all() and (out.activation <= 1 + 1e-6).all()


@each
def test_gradients_are_those_of_finite_differences(kind, options):
    "By pose, activation and each parameter; a stopped gradient is another function on purpose"
    if options == dict(stop_grad=True): return
    layer,caps = layer_of(kind, 3, 4, 2, **options).double(),capsules(2, 3, 4, dtype=torch.float64)
    keys,values = zip(*layer.named_parameters())
    def f(u, a, *values): return tuple(torch.func.functional_call(layer, dict(zip(keys, values)), (Capsules(u, a),)))
    assert torch.autograd.gradcheck(f, [o.detach().clone().requires_grad_() for o in (*caps, *values)], fast_mode=True)


@each
def test_batch_mates_do_not_matter(kind, options):
    layer,caps = layer_of(kind, **options),capsules(4, 5, 4)
    all_,alone = layer(caps),[layer(part(caps, slice(k, k+1))) for k in range(4)]
    for whole,parts in zip(all_, zip(*alone)): assert torch.allclose(whole, torch.cat(parts), atol=1e-5)


@each
@pytest.mark.parametrize("a", [0., 1.])
def test_nothing_in_gives_numbers_and_finite_gradients(kind, options, a):
    layer,z = layer_of(kind, **options),torch.zeros(2, 5, 4, requires_grad=True)
    out = layer(Capsules(z, torch.full((2, 5), a)))
    (out.pose.sum() + out.activation.sum()).backward()
    assert all(o.isfinite().all() for o in (*out, z.grad))
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@each
def test_half_precision_goes_in_and_full_comes_out(kind, options):
    layer,caps = layer_of(kind, **options),capsules(3, 5, 4)
    with torch.autocast("cpu", torch.bfloat16): out = layer(Capsules(caps.pose.bfloat16(), caps.activation.bfloat16()))
    assert {o.dtype for o in out} == {torch.float32} and all(o.isfinite().all() for o in out)
    for half,full in zip(out, layer(caps)): assert torch.allclose(half, full, atol=0.1)
    assert {o.dtype for o in layer.double()(capsules(3, 5, 4, dtype=torch.float64))} == {torch.float64}


@pytest.mark.parametrize("kind", COUPLED)
def test_traces(kind):
    "Shapes, couplings that sum to one over the parents, and a last iteration that is the answer"
    layer,caps = layer_of(kind),capsules(2, 5, 4)
    out,steps = layer(caps, trace=True)
    r = getattr(layer, "n_iters", 1)
    assert steps.c.shape == steps.b.shape == (r, 2, 5, 3) and steps.v.shape == (r, 2, 3, 4)
    assert torch.allclose(steps.c.sum(-1), torch.ones(()), atol=1e-5)
    assert torch.allclose(steps.v[-1], out.pose, atol=1e-5) and torch.allclose(steps.activation[-1], out.activation, atol=1e-5)
    assert torch.allclose(layer(caps).pose, out.pose, atol=1e-5)


@each_kind
def test_children_may_come_in_any_order(kind):
    "With all that belongs to them: each parameter's first axis is the child's, but where it is not one a child"
    layer,caps,k = layer_of(kind),capsules(2, 5, 4),torch.tensor([3, 0, 4, 1, 2])
    other = layer_of(kind, seed=1)
    other.load_state_dict({n: p[k] if len(p) == 5 else p for n,p in layer.state_dict().items()})
    if kind == "fc": other.linear.weight.data = layer.linear.weight.data.unflatten(1, (5, 4))[:,k].flatten(1)
    got = other(part(caps, (slice(None), k)))
    for o,p in zip(got, layer(caps)): assert torch.allclose(o, p, atol=1e-5)


@pytest.mark.parametrize("kind,bad,said", [
    ("shared", dict(n_types=2), "n_types=2: must divide the 5 capsules"), ("shared", dict(n_types=0), "n_types=0: must be at least 1"),
    ("uniform", dict(init_std=-1), "init_std=-1: must be"), ("uniform", dict(init_std="a"), "init_std='a': must be"),
    ("em", dict(n_iters=0), "n_iters=0: must be at least 1"), ("em", dict(final_lambda=0), "final_lambda=0: must be a number above 0"),
    ("em", dict(evidence=-1), "evidence=-1: must be"), ("em", dict(beta_u=None), "beta_u=None: must be"),
    ("em", dict(grid=3), "grid=3: must be rows and columns"), ("em", dict(grid=(2, 2)), "must divide the 5 capsules"),
    ("self", dict(init_std=True), "init_std=True: must be"), ("attention", dict(n_iters=1.5), "n_iters=1.5: must be a whole number"),
    ("efficient", dict(before=0), "before=0: must be True or False"), ("dynamic", dict(priors=1), "priors=1: must be True or False")])
def test_bad_options_are_refused_in_one_line(kind, bad, said):
    with pytest.raises(BadValue) as e: layer_of(kind, **bad)
    assert said in str(e.value) and "\n" not in str(e.value)


@each_kind
def test_unknown_options_and_wrong_sizes_are_refused_in_one_line(kind):
    with pytest.raises(BadValue, match="^routing_options=.*nonsense"): CapsNet(config(kind, routing_options=dict(nonsense=1)))
    with pytest.raises(BadValue, match=r"^pose=float32 \(2, 4, 4\): must have shape \(any, 5, 4\)$"): layer_of(kind)(capsules(2, 4, 4))


@pytest.mark.parametrize("sizes,said", [((5, 8, 3, 8), "d_in=8: must be a square number"), ((5, 4, 3, 9), "d_out=9: must be 4")])
def test_em_wants_square_poses(sizes, said):
    with pytest.raises(BadValue) as e: routing["em"](*sizes)
    assert said in str(e.value)


# Whole networks

def config(kind, **more):
    options = more.pop("routing_options", {})
    return caps_config(**dict(dict(conv_channels=4, n_types=2, d_primary=4, d_class=4, decoder=(8,), routing=kind,
                                   routing_options=options), **more))

NETWORKS = {**{k: config(k) for k in KINDS},
            **{c.kind: c(trunk_options=dict(channels=4), n_types=2, d_primary=4, d_class=4, decoder=(8,)) for c in (CNNConfig, CapsuleLossConfig)}}
each_network = pytest.mark.parametrize("name", NETWORKS)
def some(*fast): return [k if k in fast else pytest.param(k, marks=pytest.mark.slow) for k in NETWORKS]

@cache
def glyphs(n, seed):
    g = make_glyphs(n, seed=seed)
    return ImageSet(g.x, g.y, tuple("0123456789"))

def data(): return ImageData("glyphs", glyphs(32, 1), glyphs(16, 2))

class Stop:
    def on_step(self, s):
        if s.global_step == 3: signal.raise_signal(signal.SIGTERM)


@each_kind
def test_lengths_are_activations_and_the_drawing_is_of_the_most_active(kind):
    net,x = new_net(NETWORKS[kind], 1),glyphs(16, 2).x[:3]/255
    caps,out = net.digit(net.capsules(x)),net(x)
    assert torch.equal(out.lengths, caps.activation) and torch.equal(out.poses, caps.pose)
    assert torch.equal(out.recon, net(x, caps.activation.argmax(1)).recon)


@each_network
def test_every_weight_learns(name):
    net,ds = new_net(NETWORKS[name], 1),glyphs(16, 2)
    out = net(ds.x/255, ds.y)
    loss = capsule_loss(out, ds.y, ds.x/255) if name != "cnn" else torch.nn.functional.cross_entropy(out.logits, ds.y)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and (p.grad != 0).any() for p in net.parameters())


@pytest.mark.parametrize("name", some("em", "cnn-capsule-loss"))
def test_saved_loaded_and_resumed_bit_equal(name, tmp_path):
    cfg,how = NETWORKS[name],TrainConfig(epochs=2, batch_size=8, lr=3e-3, threads=1, precision="fp32")
    whole,rest = new_net(cfg, 1),new_net(cfg, 2)
    fit(whole, data(), how, tmp_path/"whole", device="cpu")
    with pytest.raises(Interrupted): fit(new_net(cfg, 1), data(), how, tmp_path/"halves", device="cpu", reporter=Stop())
    fit(rest, data(), how, tmp_path/"halves", resume=True, device="cpu")
    assert digest(rest.state_dict()) == digest(whole.state_dict())
    got = load_run(tmp_path/"halves")
    assert got.cfg == cfg and torch.equal(predict(got.net, glyphs(16, 2)).lengths, predict(whole, glyphs(16, 2)).lengths)


@pytest.mark.parametrize("kind", [k for k in some("em") if getattr(k, "values", [k])[0] in KINDS])
def test_figures(kind, tmp_path):
    "Couplings where there are some, one line where there are none; the other pictures in any case"
    net,x = new_net(NETWORKS[kind], 1),glyphs(16, 2).x[0]/255
    made = {p.stem for p in save_training_figures(net, glyphs(16, 2), tmp_path)}
    assert made == {"reconstructions", "dimensions"} | ({"couplings"} if kind in COUPLED else set())
    if kind not in COUPLED:
        with pytest.raises(BadValue, match="no couplings to show"): couplings_figure(net, x)
    elif kind in ("dynamic", "uniform"): voters_figure(net, x)
    else:
        with pytest.raises(BadValue, match="no votes to draw"): voters_figure(net, x)


@each_kind
def test_two_layers(kind):
    cfg = config(kind, layers=((6, 4),))
    assert CapsNet(cfg)(glyphs(16, 2).x[:2]/255).lengths.isfinite().all()
    assert config_from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


@settings(max_examples=10, deadline=None)
@given(side=st.integers(17, 30), types=st.integers(1, 4), d=st.integers(2, 8), n=st.integers(2, 12), e=st.integers(5, 16), decoder=st.sampled_from([None, (8,), (32, 64)]))
def test_networks_without_capsules_are_as_large(side, types, d, n, e, decoder):
    sizes = dict(height=side, n_classes=n, trunk_options=dict(channels=8), n_types=types, d_primary=d, d_class=e, decoder=decoder)
    with torch.device("meta"): a,*rest = (count_params(c(**sizes).build()) for c in (CapsConfig, CNNConfig, CapsuleLossConfig))
    assert all(abs(b/a - 1) <= .05 for b in rest)


def test_help_names_the_routings_without_torch(run_cmd):
    p = run_cmd("capsule_train", "--help")
    text = " ".join(p.stdout.split())
    assert ", ".join(KINDS) in text and set(KINDS) <= set(routing)


def learns(kind, steps=40, lr=3e-3, **options):
    "Share of new glyphs that are named, after so many steps of 32"
    d = 16 if kind == "em" else 8
    ds,test = glyphs(32*steps, 3),glyphs(400, 4)
    net = new_net(caps_config(conv_channels=16, n_types=32//d, d_primary=d, routing=kind, routing_options=options, decoder=None), 0)
    opt = torch.optim.Adam(net.parameters(), lr)
    for x,y in zip((ds.x/255).split(32), ds.y.split(32)):
        opt.zero_grad(); capsule_loss(net(x), y).backward(); opt.step()
    return (predict(net, test).lengths.argmax(1) == test.y).float().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_learns(kind):
    "Chance is 10%"
    how = dict(shared=dict(steps=150), em=dict(steps=100, n_iters=2)).get(kind, {})
    assert learns(kind, **how) > .3
