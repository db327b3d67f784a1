"What the fast paths promise: the same numbers, and sizes of allocations. No clock is looked at."
import json, math, os

from io import BytesIO
from pathlib import Path

import pytest, torch
import torch.nn.functional as F

from capsule_routing.capsnet import CapsConfig, CapsNet, caps_config
from capsule_routing.training import new_net
from capsule_routing.factored import has_bf16, route_factored
from capsule_routing.fourier import FourierConv2d, conv_plan, fourier_conv2d
from capsule_routing.layers import DynamicRouting, by_length
from capsule_routing.routing import route, votes
from capsule_routing.speed import (ALONE, PARTS, STAGES, Alone, BroadcastCaps, EinsumCaps, PeakBytes, ScriptCaps, alternate, bench_growth,
                                   bench_script, bench_table, native_bf16, machine, peak_bytes, run_bench, script_ratios, speed_results,
                                   staged_net, step_flop)
from capsule_routing.squash import squash

TINY = caps_config(conv_channels=8, n_types=2, d_primary=4, d_class=4, decoder=(16, 32))
N_VOTES = 128*1152*10*16
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

def distance(a, b): return ((a - b).norm()/b.norm().clamp_min(1e-300)).item()

def both(u, W, **kw):
    "Relative distances of values and of both gradients, factored against plain"
    a, b = route_factored(u, W, **kw), route(votes(u, W), **kw)
    g = torch.randn(b.shape, generator=torch.Generator().manual_seed(1), dtype=b.dtype).to(b.device)
    return [distance(a, b)] + [distance(x, y) for x, y in zip(torch.autograd.grad(a, (u, W), g), torch.autograd.grad(b, (u, W), g))]

def inputs(b, i, j, d, e, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    u = squash(torch.randn(b, i, d, generator=g, dtype=dtype)).to(device).requires_grad_()
    W = (torch.randn(i, j, d, e, generator=g, dtype=dtype)/10).to(device).requires_grad_()
    return u, W

def paper_layer(kind, b=128):
    "Forward and backward of the paper's capsule layer, as a function without arguments"
    u, _ = inputs(b, 1152, 1, 8, 1)
    layer = kind(1152, 8, 10, 16)
    gv = torch.ones(b, 10, 16)
    return lambda: torch.autograd.grad(layer(by_length(u)).pose, (u, layer.W), gv)

# --- the same numbers

@pytest.mark.parametrize("stop_grad", (False, True))
@pytest.mark.parametrize("n_iters", (1, 2, 3, 4, 7, 10))
def test_factored_equals_plain_in_64_bits(n_iters, stop_grad):
    assert max(both(*inputs(3, 17, 5, 4, 6, torch.float64), n_iters=n_iters, stop_grad=stop_grad)) < 1e-10

@pytest.mark.parametrize("sizes", ((1, 1, 1, 1, 1), (1, 9, 2, 3, 5), (5, 3, 11, 8, 2), (2, 40, 1, 2, 7), (4, 1, 6, 5, 3)))
def test_factored_equals_plain_for_any_sizes(sizes):
    for stop_grad in (False, True): assert max(both(*inputs(*sizes, torch.float64), stop_grad=stop_grad)) < 1e-10

def test_factored_equals_plain_in_32_bits_at_the_papers_sizes():
    assert max(both(*inputs(128, 1152, 10, 8, 16))) < 1e-5

@pytest.mark.parametrize("stop_grad", (False, True))
@pytest.mark.parametrize("n_iters", (1, 2, 4))
def test_factored_gradcheck(n_iters, stop_grad):
    u, W = inputs(2, 4, 3, 3, 2, torch.float64)
    if stop_grad: # finite differences see the couplings move: check against the plain one, whose own test is in test_paper
        assert max(both(u, W, n_iters=n_iters, stop_grad=True)) < 1e-10
    else: assert torch.autograd.gradcheck(lambda u, W: route_factored(u, W, n_iters), (u, W))

def test_the_layer_takes_the_factored_way(monkeypatch):
    import capsule_routing.layers as layers
    called = []
    monkeypatch.setattr(layers, "route_factored", lambda *a: called.append(1) or route_factored(*a))
    DynamicRouting(6, 3, 4, 5)(by_length(torch.rand(2, 6, 3)))
    assert called

@pytest.mark.parametrize("size,k,s,o", (((20, 20), 9, 2, 7), ((24, 24), 9, 2, 3), ((56, 33), 9, 2, 2), ((9, 9), 9, 2, 4), ((30, 17), 5, 3, 4), ((12, 12), 3, 1, 5)))
def test_fourier_convolution_equals_the_direct_one(size, k, s, o):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, *size, generator=g, dtype=torch.float64, requires_grad=True)
    w = torch.randn(o, 4, k, k, generator=g, dtype=torch.float64, requires_grad=True)
    a, b = fourier_conv2d(x, w, stride=s), F.conv2d(x, w, stride=s)
    gy = torch.randn(b.shape, generator=g, dtype=b.dtype)
    assert distance(a, b) < 1e-10
    assert max(distance(p, q) for p, q in zip(torch.autograd.grad(a, (x, w), gy), torch.autograd.grad(b, (x, w), gy))) < 1e-10

def test_the_fast_network_is_the_plain_network():
    "Same weights, same images, in 64 bits: lengths, reconstruction and every gradient, plain against ours, at the paper's widths"
    torch.manual_seed(0)
    cfg = CapsConfig(decoder=(32,))
    ours, plain = staged_net("memory kept", cfg).double(), staged_net("plain", cfg).double()
    plain.load_state_dict(ours.state_dict())
    x, y = torch.rand(32, 1, 28, 28).double(), torch.randint(10, (32,))
    assert ours.primary.conv.pays(torch.empty(32, 256, 20, 20).double()) and type(plain.primary.conv) is torch.nn.Conv2d
    outs = [net(x, y) for net in (ours, plain)]
    for a, b in zip(*outs): assert distance(a.detach(), b.detach()) < 1e-10
    for o in outs: (o.lengths.sum() + o.recon.sum()).backward()
    for (k, p), (_, q) in zip(ours.named_parameters(), plain.named_parameters()): assert distance(p.grad, q.grad) < 1e-9, k

def test_every_stage_is_the_same_function():
    first, x = staged_net("plain", TINY), torch.rand(3, 1, 28, 28)
    for stage in STAGES:
        net = staged_net(stage, TINY)
        net.load_state_dict(first.state_dict())
        assert distance(net(x).lengths.detach(), first(x).lengths.detach()) < 1e-5, stage

# --- in bfloat16, under autocast on a CPU: emulated where there are no instructions, with the same numbers

def in_bf16(f, inputs):
    "Relative distances of values and gradients, `f` under autocast against `f` in 32 bits"
    with torch.autocast("cpu", torch.bfloat16): a = f(*inputs)
    b = f(*inputs)
    g = torch.randn(b.shape, generator=torch.Generator().manual_seed(1))
    return [distance(a.float(), b)] + [distance(p, q) for p, q in zip(torch.autograd.grad(a, inputs, g.to(a.dtype)), torch.autograd.grad(b, inputs, g))]

@pytest.mark.parametrize("sizes", ((2, 12, 3, 4, 5), (3, 200, 10, 8, 16), (16, 1152, 10, 8, 16)))
def test_routing_in_bf16_is_near(sizes):
    for n in (1, 3): assert 1e-4 < max(in_bf16(lambda u, W: route_factored(u, W, n), inputs(*sizes))) < 0.015

def test_routing_in_bf16_gives_32_bits_and_keeps_64():
    u, W = inputs(2, 12, 3, 4, 5)
    with torch.autocast("cpu", torch.bfloat16): v, long = route_factored(u, W), route_factored(u.double(), W.double())
    assert v.dtype == torch.float32 and all(g.dtype == torch.float32 for g in torch.autograd.grad(v.sum(), (u, W)))
    assert torch.equal(long, route_factored(u.double(), W.double()))

@pytest.mark.parametrize("shape,o,k,s", (((2, 3, 13, 13), 4, 5, 2), ((3, 8, 30, 17), 6, 5, 3), ((8, 256, 20, 20), 256, 9, 2)))
def test_convolution_in_bf16_is_near(shape, o, k, s):
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(shape, generator=g).relu().requires_grad_(), torch.randn(o, shape[1], k, k, generator=g).requires_grad_()
    b = torch.randn(o, generator=g).requires_grad_()
    assert 1e-4 < max(in_bf16(lambda x, w, b: fourier_conv2d(x, w, b, s), (x, w, b))) < 0.015

def test_what_bf16_hands_on():
    "The convolution's results are half precision, as autocast's own are; gradients have the precision of what they belong to"
    x, w = torch.rand(2, 3, 9, 9).bfloat16().requires_grad_(), torch.rand(4, 3, 5, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16): y = fourier_conv2d(x, w, torch.zeros(4), 2)
    gx, gw = torch.autograd.grad(y.float().sum(), (x, w))
    assert (y.dtype, gx.dtype, gw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)

def test_has_bf16_knows_the_processor():
    assert isinstance(has_bf16(), bool)
    if Path("/proc/cpuinfo").exists(): assert has_bf16() == bool({"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split()))

# --- second derivatives, transforms, exports

SECOND = dict(routing=(route_factored, lambda u, W: route(votes(u, W)), lambda dt: inputs(2, 5, 3, 2, 3, dt)),
              stopped=(lambda u, W: route_factored(u, W, 3, True), lambda u, W: route(votes(u, W), 3, True), lambda dt: inputs(2, 5, 3, 2, 3, dt)),
              convolution=(lambda x, w: fourier_conv2d(x, w, stride=2), lambda x, w: F.conv2d(x, w, stride=2),
                           lambda dt: tuple(torch.randn(s, dtype=dt, generator=torch.Generator().manual_seed(3)).requires_grad_() for s in ((2, 2, 7, 8), (3, 2, 5, 5)))))
second = pytest.mark.parametrize("ours,plain,make", SECOND.values(), ids=SECOND)

@second
def test_second_derivatives_by_finite_differences(ours, plain, make):
    if ours is not SECOND["stopped"][0]: assert torch.autograd.gradgradcheck(ours, make(torch.float64))

@second
@pytest.mark.parametrize("wrt", ((0,), (1,), (0, 1)))
def test_a_gradient_penalty_is_the_plain_networks(ours, plain, make, wrt):
    "The squared norm of some of the gradients, and its own gradients by both inputs"
    ins, res = make(torch.float64), []
    for f in (ours, plain):
        y = (f(*ins)**2).sum()
        penalty = sum((g**2).sum() for g in torch.autograd.grad(y, [ins[k] for k in wrt], create_graph=True))
        res.append([penalty, *torch.autograd.grad(penalty + y, ins)])
    for a, b in zip(*res): assert distance(a, b) < 1e-10

def test_a_gradient_penalty_of_the_whole_network():
    torch.manual_seed(0)
    cfg = caps_config(conv_channels=128, n_types=16, decoder=(16,))
    ours, plain = staged_net("memory kept", cfg).double(), staged_net("einsum routing", cfg).double()
    plain.load_state_dict(ours.state_dict())
    x, res = torch.rand(64, 1, 28, 28).double().requires_grad_(), []
    assert ours.primary.conv.pays(torch.empty(64, 128, 20, 20).double())
    for net in (ours, plain):
        gx, = torch.autograd.grad(net(x).lengths.sum(), x, create_graph=True)
        res.append(torch.autograd.grad((gx**2).sum(), [p for k, p in net.named_parameters() if not k.startswith("decoder")], allow_unused=True))
    for a, b in zip(*res): assert a is b is None or distance(a, b) < 1e-9

TRANSFORMS = dict(grad=lambda f: torch.func.grad(lambda a, b: (f(a, b)**2).sum(), (0, 1)), jacrev=torch.func.jacrev, hessian=lambda f: torch.func.hessian(lambda a, b: f(a, b).sum()),
                  jvp=lambda f: lambda a, b: torch.func.jvp(f, (a, b), (a, b)), vmap=lambda f: torch.func.vmap(lambda a, b: f(a[None], b), (0, None)),
                  grad_of_each=lambda f: torch.func.vmap(torch.func.grad(lambda a, b: f(a[None], b).sum(), (0, 1)), (0, None)))

@second
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_torch_func(ours, plain, make, transform):
    ins = [t.detach() for t in make(torch.float64)]
    a, b = (r if isinstance(r, tuple) else (r,) for r in (transform(f)(*ins) for f in (ours, plain)))
    for p, q in zip(a, b): assert distance(p, q) < 1e-10

class Small(torch.nn.Module):
    "A convolution that takes the Fourier domain for 64 images, and a routing"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.W = FourierConv2d(128, 128, 9, 2), torch.nn.Parameter(torch.randn(576, 3, 8, 4)/10)
    def forward(self, x): return route_factored(squash(self.conv(x).reshape(-1, 576, 8)), self.W)

def exported(net, x): return torch.export.export(net, (x,), dynamic_shapes=(dict([(0, torch.export.Dim("b"))]),))

def saved_trace(net, x):
    file = BytesIO()
    torch.jit.save(torch.jit.trace(net, x, check_trace=False), file)
    file.seek(0)
    return torch.jit.load(file)

def saved_export(net, x):
    file = BytesIO()
    torch.export.save(exported(net, x), file)
    file.seek(0)
    return torch.export.load(file).module()

@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("export", (saved_trace, saved_export))
def test_exports_are_of_pytorchs_own_operations(export):
    "Saved, loaded, and right for other batches than the one that was traced"
    net, x = Small().eval(), torch.rand(64, 128, 20, 20, generator=torch.Generator().manual_seed(0))
    assert net.conv.pays(x)
    with torch.no_grad():
        other = export(net, x[:2])
        for n in (1, 7, 64): assert distance(other(x[:n]), net(x[:n])) < 1e-5

@second
def test_many_gradients_at_once(ours, plain, make):
    "`is_grads_batched` runs our backward under vmap"
    ins, res = make(torch.float64), []
    for f in (ours, plain):
        y = f(*ins)
        g = torch.randn(3, *y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
        res.append(torch.autograd.grad(y, ins, g, is_grads_batched=True))
    for a, b in zip(*res): assert distance(a, b) < 1e-10

# --- what is allocated

def test_no_tensor_is_as_large_as_the_votes():
    with PeakBytes() as m: paper_layer(DynamicRouting)()
    assert m.largest < 4*N_VOTES/10
    with PeakBytes() as m: paper_layer(EinsumCaps)()
    assert m.largest >= 4*N_VOTES                     # the measure sees them where they are

def test_peak_is_at_most_a_third_of_the_plain_versions():
    ours, plain, broadcast = (peak_bytes(paper_layer(k)) for k in (DynamicRouting, EinsumCaps, BroadcastCaps))
    assert ours <= plain/3 and ours <= broadcast/3

def test_a_batch_of_1000_stays_below_the_votes_alone():
    assert peak_bytes(paper_layer(DynamicRouting, 1000)) < 4*1000*1152*10*16

@pytest.mark.parametrize("name,sizes", (("batch_size", (1, 16, 256, 1024)), ("n_out", (2, 10, 50, 200)), ("n_in", (1152, 12800, 51200))))
def test_memory_grows_at_most_linearly(name, sizes):
    base = dict(batch_size=4, n_in=144, n_out=10)
    if name == "n_in": base["n_out"] = 3
    peaks = []
    for s in sizes:
        a = {**base, name: s}
        u, _ = inputs(a["batch_size"], a["n_in"], 1, 8, 1)
        layer, gv = DynamicRouting(a["n_in"], 8, a["n_out"], 16), torch.ones(a["batch_size"], a["n_out"], 16)
        peaks.append(peak_bytes(lambda: torch.autograd.grad(layer(by_length(u)).pose, (u, layer.W), gv)))
    for (m, p), (n, q) in zip(zip(sizes, peaks), zip(sizes[1:], peaks[1:])): assert q/p <= 1.05*n/m, (m, n, p, q)

def test_prediction_goes_in_portions():
    "The transforms of a thousand images need no more than those of 256"
    conv = FourierConv2d(64, 64, 9, 2)
    with torch.no_grad(): a, b = (peak_bytes(lambda: conv(torch.zeros(n, 64, 20, 20))) - 4*n*64*(400 + 2*36) for n in (256, 1024))
    assert b < 1.5*a

# --- choices

def test_what_pays_is_known_from_the_shapes():
    conv, x = FourierConv2d(256, 256, 9, 2), torch.empty(128, 256, 20, 20)
    assert conv.pays(x) and not conv.pays(x[:1]) and not conv.pays(x.bfloat16()) and not conv.pays(x.to("meta"))
    with torch.autocast("cpu", torch.bfloat16): assert conv.pays(x) and conv.pays(x.bfloat16()) and not conv.pays(x[:1])
    with torch.autocast("cpu", torch.float16): assert not conv.pays(x)
    assert not FourierConv2d(1, 256, 9)(torch.zeros(2, 1, 20, 20)).isnan().any()
    assert not FourierConv2d(8, 8, 9, 2).pays(torch.empty(128, 8, 20, 20))

def test_the_plan_covers_every_result():
    for n in range(9, 110):
        p = conv_plan((n, n + 3), 9, 2)
        assert p.out == tuple((s - 9)//2 + 1 for s in (n, n + 3))
        assert all(t*m >= o and (t - 1)*m < o for t, m, o in zip(p.n_tiles, p.tile, p.out)) and max(p.n) <= 12

def test_the_operations_of_the_papers_step():
    "By hand: the first convolution twice (its image needs no gradient), the rest three times, two operations a multiplication"
    conv1, primary, votes, decoder = 20*20*81*256, 6*6*81*256*256, 1152*10*8*16, 160*512 + 512*1024 + 1024*784
    sums = 5*1152*10*16                                # three weighted sums of the votes and two agreements; the first needs one gradient
    assert step_flop(CapsConfig(), 128) == pytest.approx(2*128*(2*conv1 + 3*(primary + votes + sums + decoder)), rel=1e-3)
    assert step_flop(CapsConfig(), 64)*2 == step_flop(CapsConfig(), 128)

def test_weights_gradients_and_moments_lie_alike_in_memory():
    "The fused Adam walks over all four as they lie"
    net = CapsNet(caps_config(conv_channels=128, n_types=16, decoder=(16,)))
    opt, x, y = torch.optim.Adam(net.parameters(), fused=True), torch.rand(64, 1, 28, 28), torch.zeros(64).long()
    assert net.primary.conv.pays(torch.empty(64, 128, 20, 20)) and net.trunk(x).is_contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        out = net(x, y)
        opt.zero_grad(); (out.lengths.sum() + out.recon.sum()).backward(); opt.step()
    def order(t): return [s for s, n in zip(t.stride(), t.shape) if n > 1]
    for k, p in net.named_parameters():
        for t in (p.grad, opt.state[p]["exp_avg"], opt.state[p]["exp_avg_sq"]): assert order(t) == order(p), k

def test_first_weights_leave_the_generator_alone():
    before = torch.get_rng_state()
    a, b = new_net(TINY, 3), new_net(TINY, 3)
    assert torch.equal(before, torch.get_rng_state()) and all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))

# --- the benchmark

def test_the_contenders_take_turns():
    order = []
    times = alternate({k: lambda k=k: order.append(k) for k in "ab"}, n=2, warmup=1)
    assert "".join(order) == "ababab" and all(len(t) == 2 and min(t) >= 0 for t in times.values())
    with pytest.raises(ValueError, match="n=0: must be at least 1"): alternate({}, n=0)

def test_a_result_names_its_machine_and_reads_as_a_table():
    res = json.loads(json.dumps(run_bench(("step", "routing"), n=1, batch_size=2, cfg=TINY)))
    assert {"device", "threads", "torch", "python", "capsule_routing", "date", "capability"} <= set(res["machine"]) == set(machine())
    assert set(res["step"]["seconds"]) == set(STAGES) and all(v["n"] == 1 for v in res["step"]["seconds"].values())
    assert all(k in bench_table(res) for k in (*STAGES, "DynamicRouting", "peak"))
    with pytest.raises(ValueError, match="'warp'"): run_bench(("warp",))

def test_the_script_is_dynamic_routing_with_four_passes_and_learnt_priors():
    script, ours = ScriptCaps(20, 4, 5, 6, n_iters=3).double(), DynamicRouting(20, 4, 5, 6, n_iters=4, priors=True).double()
    script.b.data.normal_(generator=torch.Generator().manual_seed(0))
    ours.load_state_dict(dict(W=script.W.detach().view(20, 4, 5, 6).transpose(1, 2), priors=script.b.detach()))
    u, W = inputs(3, 20, 1, 4, 1, torch.float64)
    a, b = script(by_length(u)).pose, ours(by_length(u)).pose
    assert distance(a.detach(), b.detach()) < 1e-6
    a.sum().backward(), b.sum().backward()
    assert distance(script.b.grad, ours.priors.grad) < 1e-6
    assert isinstance(staged_net("script", TINY).digit, ScriptCaps) and staged_net("script", TINY).digit.n_iters == 3


@pytest.mark.slow
def test_contenders_run_in_processes_of_their_own_whose_allocator_nobody_touches(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "0")
    r = bench_script(TINY, 3, n=2)
    names = [k for k in ALONE if native_bf16() or "bf16" not in k]
    assert list(r["seconds"]) == list(r["peak_bytes"]) == names and all(v["n"] == 2 for v in r["seconds"].values())
    with Alone("script", False, "fp32", TINY.to_dict(), 2, "cpu", 1) as p:
        assert p() > 0
        if os.path.exists("/proc/self/environ"): assert "MALLOC_" not in open(f"/proc/{p.pid}/environ").read()
    with pytest.raises((RuntimeError, BrokenPipeError)):
        with Alone("no such way", False, "fp32", TINY.to_dict(), 2, "cpu", 1) as p: p()
    s = {k: v["median"] for k, v in r["seconds"].items()}
    assert script_ratios(r)["ours"] == (s["script"]/s["ours"], s["script, memory kept"]/s["ours"])
    assert "script" in PARTS


def test_growth_reports_every_size():
    r = bench_growth(n=1, growth=dict(batch_size=(2, 4), n_out=(2, 3)))
    assert [q["size"] for q in r["rows"]["batch_size"]] == [2, 4] and all(q["peak_bytes"] > 0 for q in r["rows"]["n_out"])

def test_the_committed_results_hold_what_the_page_claims():
    res = speed_results()
    sec = {k: v["median"] for k, v in res["step"]["seconds"].items()}
    assert list(sec) == list(STAGES) and all(v["n"] >= 5 for v in res["step"]["seconds"].values())
    assert sec["plain"]/sec["memory kept"] >= 2 and res["step"]["batch_size"] == 128 and res["step"]["precision"] == "fp32"
    broadcast, _, ours = (v["median"] for v in res["routing"]["seconds"].values())
    assert broadcast/ours >= 4
    _, einsum, ours = res["routing"]["peak_bytes"].values()
    assert ours <= einsum/3
    if "script" in res: assert list(res["script"]["seconds"])[:5] == list(ALONE)[:5] and min(script_ratios(res["script"])["ours"]) > 1
    assert math.isfinite(res["limits"]["matmul"]) and res["command"].startswith("capsule_bench")
    assert speed_results("no-such-file") is None

# --- on a GPU

@cuda
def test_factored_equals_plain_on_a_gpu():
    allow, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    try: assert max(both(*inputs(128, 1152, 10, 8, 16, device="cuda"))) < 1e-5 and max(both(*inputs(3, 17, 5, 4, 6, torch.float64, "cuda"))) < 1e-10
    finally: torch.backends.cuda.matmul.allow_tf32 = allow

@cuda
def test_peak_on_a_gpu():
    def peak(kind):
        u, layer = squash(torch.randn(128, 1152, 8, device="cuda")).requires_grad_(), kind(1152, 8, 10, 16).cuda()
        torch.cuda.reset_peak_memory_stats(); before = torch.cuda.memory_allocated()
        torch.autograd.grad(layer(by_length(u)).pose.sum(), (u, layer.W))
        return torch.cuda.max_memory_allocated() - before
    assert peak(DynamicRouting) <= peak(EinsumCaps)/3

@cuda
def test_the_gpu_takes_cudnns_convolution():
    assert not FourierConv2d(256, 256, 9, 2).cuda().pays(torch.empty(128, 256, 20, 20, device="cuda"))
