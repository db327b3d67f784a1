"""Against the paper, and against the mistakes of public implementations.

Each property below is a function of an implementation. Ours must pass it; and so that one can see that it would notice, each stands
with the mistakes that were found in the wild, written out as implementations that must fail it. A faithful copy with every mistake
switched off must pass as well, so that it is the mistake which fails and not the copy.
"""
import json, math, re
from dataclasses import replace
from functools import partial

import numpy as np, pytest, torch
from torch import nn
from torch.nn.functional import mse_loss, one_hot

from capsule_routing.checks import BadValue
from capsule_routing.squash import lengths, squash
from capsule_routing.routing import route, votes
from capsule_routing.factored import route_factored
from capsule_routing.layers import Capsules, DynamicRouting, PrimaryCaps, by_length
from capsule_routing.losses import capsule_loss, margin_loss, reconstruction_loss
from capsule_routing.decoder import Decoder, mask_capsules
from capsule_routing.capsnet import CapsConfig, CapsNet, CapsOut, caps_config, count_params

TINY = caps_config(conv_channels=8, n_types=2, d_primary=4, d_class=4, decoder=(16,32))
PROPERTIES = []


def must_hold(ours, copy=None, **mistakes):
    "Register a property: `ours` (one, or several by name) pass it, a faithful `copy` too, each of `mistakes` fails it"
    def register(check):
        named = ours if isinstance(ours, dict) else {"ours": ours}
        PROPERTIES.append((check, named | ({"copy": copy} if copy else {}), mistakes))
        return check
    return register


def seeded(n=0): return torch.Generator().manual_seed(n)

def close(a, b, tol=1e-6):
    "Same shape, and equal to `tol`"
    a,b = torch.as_tensor(a), torch.as_tensor(b)
    assert a.shape == b.shape, f"{tuple(a.shape)} is not {tuple(b.shape)}"
    assert torch.allclose(a.double(), b.double(), rtol=tol, atol=tol), f"differs by {(a.double()-b.double()).abs().max():.3g}"

def finite(*xs):
    for x in xs: assert x is not None and x.isfinite().all()

def poses_of(layer, u, trace=False):
    "A layer of capsules on tensors alone: poses in, poses out, and the activations are their lengths"
    v,there = layer(by_length(u), trace=True)[0] if trace else layer(by_length(u))
    close(there.detach(), lengths(v).detach())
    return v


# ---------- squash: Eq. 1 ----------

def squash_no_eps(s, dim=-1):
    n = s.norm(dim=dim, keepdim=True)
    return n**2/(1+n**2) * (s/n)

def squash_no_eps_rewritten(s, dim=-1):
    "No division by zero any more, but the root still has an infinite slope there"
    n2 = s.pow(2).sum(dim, keepdim=True)
    return n2.sqrt()/(1+n2) * s

def squash_first_power(s, dim=-1):
    n = (s.pow(2).sum(dim, keepdim=True) + 1e-16).sqrt()
    return n/(1+n) * (s/n)

def squash_other_axis(s, dim): return squash(s, dim=dim)


@must_hold(squash, lambda s: squash_no_eps(s), first_power=squash_first_power, not_at_all=lambda s: s, unit_length=lambda s: s/s.norm(dim=-1, keepdim=True))
def squash_is_equation_1(squash):
    s = torch.tensor([[3., 4.], [.3, -.4], [30., 40.]])
    close(squash(s), torch.tensor([[.6, .8], [.6, -.8], [.6, .8]]) * torch.tensor([[25/26], [.25/1.25], [2500/2501]]))


@must_hold(squash, squash_no_eps, over_capsules=partial(squash_other_axis, dim=1), over_batch=partial(squash_other_axis, dim=0))
def each_capsule_is_squashed_on_its_own(squash):
    s = 3*torch.randn(4, 5, 8, generator=seeded())  # (b, i, d)
    v = squash(s)
    assert v.norm(dim=-1).max() <= 1
    close(v[1,2], squash(s[1:2,2:3])[0,0])
    close(v/v.norm(dim=-1, keepdim=True), s/s.norm(dim=-1, keepdim=True), 1e-5)


@must_hold(squash, no_eps=squash_no_eps, no_eps_rewritten=squash_no_eps_rewritten)
def a_zero_capsule_is_squashed_to_zero_with_a_finite_gradient(squash):
    s = torch.zeros(2, 3, 8, requires_grad=True)
    v = squash(s)
    v.sum().backward()
    close(v.detach(), torch.zeros(2, 3, 8))
    finite(s.grad)


@must_hold(lengths, root_of_squares=lambda v: v.pow(2).sum(-1).sqrt(), sum_of_numbers=lambda v: v.sum(-1), squared=lambda v: v.pow(2).sum(-1))
def a_length_is_euclidean_with_a_finite_gradient_at_zero(lengths):
    v = torch.tensor([[.3, -.4], [0., 0.]], requires_grad=True)
    l = lengths(v)
    l.sum().backward()
    close(l.detach(), torch.tensor([.5, 0.]))
    finite(v.grad)


# ---------- routing: Eq. 2 and Procedure 1 ----------

def routing(u, W, n_iters=3, stop_grad=False, *, softmax_dim=-1, extra_passes=0, batch_logits=False, mean_children=False, detach=False,
            overwrite=False, squash_dim=-1, never_detach=False, squeeze=False, squash=squash):
    "Procedure 1 on poses and weights, with one switch for each mistake"
    u_hat = torch.einsum("ijde,bid->bije", W, u)
    stop = (stop_grad or detach) and not never_detach
    told = u_hat.detach() if stop else u_hat
    b = u_hat.new_zeros(u_hat.shape[:3])
    for k in range(n_iters+extra_passes):
        c = b.softmax(softmax_dim)
        last = k == n_iters+extra_passes-1
        s = torch.einsum("bij,bije->bje", c, u_hat if last else told)
        if mean_children: s = s/u.shape[1]
        v = squash(s, dim=squash_dim)
        if last: break
        agree = torch.einsum("bije,bje->bij", told, v)
        if batch_logits: agree = agree.mean(0, keepdim=True).expand_as(agree)
        b = agree if overwrite else b+agree
    return v.squeeze() if squeeze else v


def our_layer(u, W, n_iters=3, trace=False, **kw):
    m = DynamicRouting(u.shape[1], u.shape[2], W.shape[1], W.shape[3], n_iters, **kw).to(u.dtype)
    del m.W; m.W = W   # keeps the caller's graph
    return poses_of(m, u, trace)

OURS = {"plain": lambda u, W, n_iters=3, **kw: route(votes(u, W), n_iters, **kw), "factored": route_factored, "layer": our_layer,
        "layer_that_traces": partial(our_layer, trace=True), "layer_with_priors_still_zero": partial(our_layer, priors=True)}
def poses_and_weights(b=3, i=6, j=4, d=3, e=5, dtype=torch.float64, n=0):
    "Long votes, so that the couplings move well away from even"
    g = seeded(n)
    return squash(3*torch.randn(b, i, d, generator=g, dtype=dtype)), 1.5*torch.randn(i, j, d, e, generator=g, dtype=dtype)

def by_hand(u, W, n_iters):
    "Procedure 1 for one image, in plain loops over plain numbers"
    i_,j_,d_,e_ = W.shape
    hat = [[[sum(W[i,j,d,e].item()*u[i,d].item() for d in range(d_)) for e in range(e_)] for j in range(j_)] for i in range(i_)]
    b = [[0.]*j_ for _ in range(i_)]
    for _ in range(n_iters):
        c = [[math.exp(x)/sum(map(math.exp, row)) for x in row] for row in b]
        v = []
        for j in range(j_):
            s = [sum(c[i][j]*hat[i][j][e] for i in range(i_)) for e in range(e_)]
            n2 = sum(x*x for x in s)
            v.append([n2/(1+n2)*x/math.sqrt(n2) for x in s])
        b = [[b[i][j]+sum(p*q for p,q in zip(hat[i][j], v[j])) for j in range(j_)] for i in range(i_)]
    return torch.tensor(v, dtype=torch.float64)


@must_hold(OURS, routing, softmax_over_children=partial(routing, softmax_dim=1), softmax_over_batch=partial(routing, softmax_dim=0),
           mean_over_children=partial(routing, mean_children=True), squash_over_parents=partial(routing, squash_dim=1), one_pass_too_many=partial(routing, extra_passes=1))
def with_one_pass_a_parent_is_the_squashed_sum_of_even_shares(layer):
    u,W = poses_and_weights()
    u_hat = torch.einsum("ijde,bid->bije", W, u)
    close(layer(u, W, 1), squash(u_hat.sum(1)/4))


@must_hold(OURS, routing, softmax_over_children=partial(routing, softmax_dim=1), one_pass_too_many=partial(routing, extra_passes=1),
           one_pass_too_few=partial(routing, extra_passes=-1), logits_not_accumulated=partial(routing, overwrite=True),
           logits_averaged_over_batch=partial(routing, batch_logits=True), mean_over_children=partial(routing, mean_children=True))
def n_iters_passes_are_procedure_1_by_hand(layer):
    u,W = poses_and_weights(b=2, i=4, j=3, d=2, e=2)
    for r in (2, 3, 4): close(layer(u, W, r), torch.stack([by_hand(x, W, r) for x in u]))


@must_hold(OURS, routing, logits_averaged_over_batch=partial(routing, batch_logits=True), softmax_over_batch=partial(routing, softmax_dim=0), squash_over_batch=partial(routing, squash_dim=0))
def an_answer_does_not_depend_on_batch_mates(layer):
    u,W = poses_and_weights()
    alone = layer(u[:1], W)
    close(layer(u, W)[:1], alone)
    close(layer(torch.cat([u[:1], torch.zeros_like(u)]), W)[:1], alone)


@must_hold(OURS, routing, gradient_stopped_by_default=partial(routing, detach=True))
def the_gradient_goes_through_the_routing(layer):
    g,h = seeded(1),1e-6
    at = poses_and_weights()
    step = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in at]
    def f(t): return (layer(*[p+t*d for p,d in zip(at, step)], 3)*torch.linspace(-1, 1, 60).view(3, 4, 5)).sum()
    slope = (f(h)-f(-h))/(2*h)                               # of the whole routing, by finite differences
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    close(torch.autograd.grad(f(t), t)[0], slope, 1e-5)


@must_hold(OURS, routing, option_ignored=partial(routing, never_detach=True), all_detached=lambda u, W, n_iters=3, stop_grad=False: routing(u.detach() if stop_grad else u, W, n_iters, stop_grad))
def a_stopped_gradient_takes_the_couplings_as_constants(layer):
    u,W = poses_and_weights()
    u_hat = votes(u, W)
    c = route(u_hat, 3, trace=True)[1].c[-1]                                 # the last couplings, as numbers
    def grads(f):
        p = u.clone().requires_grad_(),W.clone().requires_grad_()
        v = f(*p)
        return v.detach(), torch.autograd.grad((v*torch.arange(v.numel()).view_as(v)).sum(), p, allow_unused=True)
    v,want = grads(lambda u, W: squash(torch.einsum("bij,bije->bje", c, votes(u, W))))
    got_v,got = grads(lambda u, W: layer(u, W, 3, stop_grad=True))
    close(got_v, v)                                                          # forward is the same
    for g,w in zip(got, want):
        assert g is not None
        close(g, w)


@must_hold(OURS, routing, squash_without_eps=partial(routing, squash=squash_no_eps), squash_without_eps_rewritten=partial(routing, squash=squash_no_eps_rewritten))
def zero_capsules_are_routed_to_zero_with_finite_gradients(layer):
    u,W = torch.zeros(2, 6, 3, requires_grad=True),torch.randn(6, 4, 3, 5, generator=seeded()).requires_grad_()
    v = layer(u, W)
    lengths(v).sum().backward()
    close(v.detach(), torch.zeros(2, 4, 5))
    finite(u.grad, W.grad)


@must_hold(OURS, routing, squeezed=partial(routing, squeeze=True))
def a_batch_of_one_is_a_batch(layer):
    u,W = poses_and_weights()
    assert layer(u[:1], W).shape == (1, 4, 5)
    assert layer(u[:0], W).shape == (0, 4, 5)


@must_hold(OURS, routing, parents_weighted_by_place=lambda u, W, n_iters=3: routing(u, W, n_iters)*torch.linspace(.9, 1, 4).view(1, 4, 1))
def the_order_of_children_and_parents_means_nothing(layer):
    u,W = poses_and_weights()
    i,j = torch.tensor([3,0,5,1,4,2]),torch.tensor([2,0,3,1])
    close(layer(u[:,i], W[i][:,j]), layer(u, W)[:,j])


def traced_couplings(softmax_dim, extra=0):
    def f(u_hat, n_iters):
        b,cs = torch.zeros_like(u_hat[...,0]),[]
        for _ in range(n_iters+extra):
            c = b.softmax(softmax_dim); cs.append(c)
            b = b+torch.einsum("bije,bje->bij", u_hat, squash(torch.einsum("bij,bije->bje", c, u_hat)))
        return torch.stack(cs)
    return f

@must_hold(lambda u_hat, n_iters: route(u_hat, n_iters, trace=True)[1].c, traced_couplings(-1), softmax_over_children=traced_couplings(1),
           softmax_over_batch=traced_couplings(0), one_pass_too_many=traced_couplings(-1, 1))
def couplings_of_a_child_sum_to_one_over_its_parents_and_start_even(couplings):
    u_hat = votes(*poses_and_weights())
    for r in (1, 3):
        c = couplings(u_hat, r)
        assert len(c) == r
        close(c.sum(-1), torch.ones(r, 3, 6))
        close(c[0], torch.full((3, 6, 4), 1/4))


# ---------- primary capsules: section 4 ----------

class Primary(PrimaryCaps):
    "PrimaryCaps on its plain convolution, with a switch for the grouping and the squash"
    group,squashed = staticmethod(lambda x, d: x.unflatten(1, (-1, d)).permute(0, 1, 3, 4, 2).flatten(1, 3)), staticmethod(squash)
    def forward(self, x): return by_length(self.squashed(self.group(self.conv(x), self.d_out)))

def primary(group=None, squashed=None): return type("Mistaken", (Primary,), {k: staticmethod(v) for k,v in dict(group=group, squashed=squashed).items() if v})

@must_hold(PrimaryCaps, Primary, cut_across_locations=primary(lambda x, d: x.reshape(len(x), -1, d)),
           cut_across_rows=primary(lambda x, d: x.flatten(2).transpose(1, 2).reshape(len(x), d, -1).transpose(1, 2)),
           squash_over_capsules=primary(squashed=partial(squash, dim=1)), squash_over_batch=primary(squashed=partial(squash, dim=0)), not_squashed=primary(squashed=lambda s: 40*s))
def a_primary_capsule_takes_its_numbers_from_one_location(Primary):
    for ch,types,kernel,size,fast in ((3, 4, 5, 13, False), (16, 8, 9, 17, True)):
        torch.manual_seed(0)
        m = Primary(ch, types, d_out=8, kernel=kernel, stride=2)
        m.conv.pays = lambda x: fast                               # by the plain convolution, and by the faster one
        x = torch.rand(2, ch, size, size)
        y = x.clone(); y[0,:,0,0] += 3.                            # seen by the location at row 0, column 0 alone
        u,v = m(x).pose,m(y).pose
        close(m(x).activation, u.norm(dim=-1))
        assert u.shape == (2, types*5*5, 8) and u.norm(dim=-1).max() <= 1
        moved = ((u-v).abs() > 1e-5).any(-1)                       # (b, i)
        assert moved[0].sum() == types and not moved[1].any()      # one capsule of each type, in that image


# ---------- margin loss: Eq. 4 ----------

def margin(lengths, target, *, power=2, before=lambda v: v, down=.5, m_pos=.9, m_neg=.1, per_class_mean=False, batch_sum=False, one_class=False):
    "Eq. 4, with one switch for each mistake"
    n = lengths.shape[1]
    if target.ndim == 2 and one_class: target = target.int().argmax(1)
    t = one_hot(target, n).to(lengths.dtype) if target.ndim == 1 else target.to(lengths.dtype)
    v = before(lengths)
    l = t*(m_pos-v).relu()**power + down*(1-t)*(v-m_neg).relu()**power
    l = l.mean(1) if per_class_mean else l.sum(1)
    return l.sum() if batch_sum else l.mean()

@must_hold(margin_loss, margin, without_squares=partial(margin, power=1), fed_by_a_softmax=partial(margin, before=lambda v: v.softmax(1)),
           mean_over_classes=partial(margin, per_class_mean=True), absent_not_weighted=partial(margin, down=1.), margins_swapped=partial(margin, m_pos=.1, m_neg=.9))
def the_margin_loss_is_equation_4(loss):
    v,y = torch.tensor([[.7, .5, .05]], requires_grad=True),torch.tensor([0])
    l = loss(v, y)
    l.backward()
    close(l.detach(), .2**2 + .5*.4**2)
    close(v.grad, torch.tensor([[-.4, .4, 0.]]))

@must_hold(margin_loss, margin, fed_by_a_softmax=partial(margin, before=lambda v: v.softmax(1)), fed_by_a_softmax_over_the_batch=partial(margin, before=lambda v: v.softmax(0)))
def right_lengths_cost_nothing(loss):
    y = torch.arange(6) % 3
    assert loss(one_hot(y, 3).float(), y) == 0
    assert loss(one_hot(y, 3)*.8+.1, y) < 1e-12

@must_hold(margin_loss, margin, sum_over_the_batch=partial(margin, batch_sum=True), mean_over_classes=partial(margin, per_class_mean=True))
def the_margin_loss_is_summed_over_classes_and_averaged_over_images(loss):
    v,y = torch.rand(4, 5, generator=seeded()),torch.arange(4)
    close(loss(v, y), sum(loss(v[k:k+1], y[k:k+1]) for k in range(4))/4)
    close(loss(v.repeat(3, 1), y.repeat(3)), loss(v, y))
    close(loss(torch.cat([v, torch.zeros(4, 5)], 1), y), loss(v, y))   # classes that are right already add zero

@must_hold(margin_loss, margin, only_one_class_counts=partial(margin, one_class=True))
def several_classes_may_be_present(loss):
    v = torch.tensor([[.7, .5, .05]])
    for t in (torch.bool, torch.int64, torch.float32, torch.float64): close(loss(v, torch.tensor([[1, 1, 0]]).to(t)), .2**2 + .4**2)


# ---------- reconstruction loss: section 4.1 ----------

def with_recon(out, y, x, loss=lambda r, x: (r-x).square().sum()/len(x), weight=.0005): return margin(out.lengths, y) + weight*loss(out.recon, x)

@must_hold(reconstruction_loss, lambda r, x: (r-x).square().flatten(1).sum(1).mean(), mean_over_pixels=mse_loss, mean_over_rows=lambda r, x: (r-x).square().mean(2).sum()/len(x),
           sum_over_the_batch=lambda r, x: (r-x).square().sum(), not_squared=lambda r, x: (r-x).abs().sum()/len(x), root=lambda r, x: (r-x).flatten(1).norm(dim=1).mean())
def the_reconstruction_loss_is_a_sum_over_pixels_and_a_mean_over_images(loss):
    r,x = torch.full((3, 2, 28, 28), .25),torch.full((3, 2, 28, 28), .75)
    close(loss(r, x), 2*28*28*.25)

@must_hold(capsule_loss, with_recon, mean_over_pixels=partial(with_recon, loss=mse_loss), mean_over_rows=partial(with_recon, loss=lambda r, x: (r-x).square().mean(2).sum()/len(x)),
           weight_for_a_mean_on_a_sum=partial(with_recon, weight=.392), without_reconstruction=lambda out, y, x: margin(out.lengths, y))
def the_whole_loss_adds_five_ten_thousandths_of_the_summed_squares(loss):
    out = CapsOut(torch.tensor([[.7, .5, .05]]), None, torch.full((1, 1, 28, 28), .25))
    close(loss(out, torch.tensor([0]), torch.full((1, 1, 28, 28), .75)), .12 + .0005*784*.25)


# ---------- mask and decoder: section 4.1 ----------

@must_hold(mask_capsules, lambda p, w: (p*one_hot(w, p.shape[1])[...,None]).flatten(1), nothing_masked=lambda p, w: p.flatten(1), the_others_kept=lambda p, w: (p*(1-one_hot(w, p.shape[1])[...,None])).flatten(1),
           moved_to_the_front=lambda p, w: nn.functional.pad(p[torch.arange(len(p)), w], (0, p[0].numel()-p.shape[2])), gradient_lost=lambda p, w: (p.detach()*one_hot(w, p.shape[1])[...,None]).flatten(1).requires_grad_(),
           squeezed=lambda p, w: (p*one_hot(w, p.shape[1])[...,None]).flatten(1).squeeze())
def all_poses_but_the_chosen_are_masked_in_place(mask):
    poses = torch.arange(1., 25).view(3, 4, 2).requires_grad_()
    m = mask(poses, torch.tensor([2, 0, 3]))
    want = torch.zeros(3, 4, 2)
    for k,j in enumerate((2, 0, 3)): want[k,j] = poses[k,j].detach()
    close(m.detach(), want.flatten(1))
    m.sum().backward()
    assert poses.grad is not None
    close(poses.grad, (want != 0).float())
    assert mask(poses[:1], torch.tensor([1])).shape == (1, 8)

class Net(CapsNet):
    "CapsNet with a switch for what stands in for the mask's choice"
    def which(self, v_len, y): return v_len.argmax(1) if y is None else y
    def mask(self, v, which): return mask_capsules(v, which)
    def measure(self, v): return lengths(v)
    def forward(self, x, y=None):
        v = self.digit(self.primary(self.trunk(x))).pose
        l = self.measure(v)
        return CapsOut(l, v, self.decoder(self.mask(v, self.which(l, y))))

def mistaken(**methods): return type("Mistaken", (Net,), methods)

def net_and_images(Net, b=12, seed=0, cfg=TINY):
    torch.manual_seed(seed)
    net = Net(cfg)
    net.digit.W.data *= 60                        # long poses of different lengths
    return net, torch.rand(b, *cfg.image_shape)

@must_hold(CapsNet, Net, by_prediction=mistaken(which=lambda self, l, y: l.argmax(1)), by_prediction_when_evaluating=mistaken(which=lambda self, l, y: y if self.training and y is not None else l.argmax(1)),
           not_masked=mistaken(mask=lambda self, v, w: v.flatten(1)), the_shortest=mistaken(which=lambda self, l, y: l.argmin(1)))
def the_target_is_reconstructed_while_training_even_when_the_network_is_wrong(Net):
    net,x = net_and_images(Net)
    wrong = (lengths(net(x).poses).argmax(1)+1) % 10
    for mode in (True, False):
        out = net.train(mode)(x, wrong)
        close(out.recon, net.decoder(mask_capsules(out.poses, wrong)))
    assert (out.recon-net.decoder(mask_capsules(out.poses, lengths(out.poses).argmax(1)))).abs().max() > 1e-3

@must_hold(CapsNet, Net, softmax_over_the_batch=mistaken(which=lambda self, l, y: l.softmax(0).argmax(1)), not_masked=mistaken(mask=lambda self, v, w: v.flatten(1)),
           first_class=mistaken(which=lambda self, l, y: torch.zeros(len(l)).long()), the_shortest=mistaken(which=lambda self, l, y: l.argmin(1)))
def the_longest_capsule_is_reconstructed_when_predicting(Net):
    net,x = net_and_images(Net)
    out = net(x)
    close(out.recon, net.decoder(mask_capsules(out.poses, out.poses.norm(dim=-1).argmax(1))))
    for k in range(len(x)): close(net(x[k:k+1]).recon[0], out.recon[k], 1e-5)

@must_hold(CapsNet, Net, softmax_of_the_lengths=mistaken(measure=lambda self, v: lengths(v).softmax(1)), squared_lengths=mistaken(measure=lambda self, v: v.pow(2).sum(-1)),
           softmax_over_the_batch=mistaken(measure=lambda self, v: lengths(v).softmax(0)), squeezed=mistaken(measure=lambda self, v: lengths(v).squeeze()))
def what_comes_out_are_lengths_of_poses_for_one_image_too(Net):
    net,x = net_and_images(Net, b=3)
    out = net(x)
    close(out.lengths, out.poses.norm(dim=-1))
    one = net(x[:1], torch.tensor([3]))
    assert [o.shape for o in one] == [(1, 10), (1, 10, 4), (1, 1, 28, 28)]
    close(one.lengths, out.lengths[:1], 1e-5)


# ---------- the whole network ----------

def with_primary(primary):
    def make(cfg):
        net = CapsNet(cfg)
        net.primary = primary(cfg.features[0], cfg.n_types, cfg.d_primary, cfg.kernel, 2)
        return net
    return make

@must_hold(CapsNet, with_primary(Primary), squash_without_eps=with_primary(primary(squashed=squash_no_eps)), squash_without_eps_rewritten=with_primary(primary(squashed=squash_no_eps_rewritten)),
           root_of_squares=mistaken(measure=lambda self, v: v.pow(2).sum(-1).sqrt()))
def a_black_image_and_dead_capsules_give_finite_gradients(Net):
    net,x,y = Net(TINY),torch.zeros(2, 1, 28, 28),torch.tensor([3, 4])
    for p in net.parameters(): nn.init.zeros_(p)
    loss = capsule_loss(net(x, y), y, x)
    loss.backward()
    close(loss.detach(), .81 + .0005*784*.25, 1e-5)
    finite(*(p.grad for p in net.parameters()))

def changed(change):
    def make(cfg):
        net = CapsNet(cfg)
        change(net)
        return net
    return make

def routed_bias(net): net.digit.bias = nn.Parameter(torch.zeros(1152, 10, 16))
def shared_weights(net): net.digit.W = nn.Parameter(torch.zeros(32, 10, 8, 16))
def learnt_logits(net): net.digit.priors = nn.Parameter(torch.zeros(1152, 10))
def padded(net): net.digit.W = nn.Parameter(torch.zeros(32*10*10, 10, 8, 16))

@must_hold(CapsNet, bias_on_the_votes=changed(routed_bias), weights_shared_between_locations=changed(shared_weights), logits_learnt=changed(learnt_logits), padded_convolution=changed(padded))
def the_parameters_are_the_papers_to_the_last_one(Net):
    assert count_params(Net(CapsConfig(decoder=None))) == 6_804_224
    assert count_params(Net(CapsConfig())) == 8_215_568

@must_hold(CapsNet, silent=changed(lambda net: nn.init.normal_(net.digit.W, std=1e-5)), shouting=changed(lambda net: nn.init.normal_(net.digit.W, std=3.)), dead=changed(lambda net: nn.init.zeros_(net.digit.W)))
def the_first_poses_have_sensible_lengths_and_every_weight_learns(Net):
    torch.manual_seed(0)
    net = Net(caps_config(conv_channels=32, decoder=None))
    v = net(torch.rand(2, 1, 28, 28))
    v.lengths.sum().backward()
    assert 1e-3 < v.lengths.mean() < .5
    finite(*(p.grad for p in net.parameters()))
    assert net.primary.conv.weight.grad.abs().max() > 1e-3 and (net.digit.W.grad != 0).float().mean() > .99


OK = [pytest.param(check, impl, id=f"{check.__name__}-{name}") for check,ours,_ in PROPERTIES for name,impl in ours.items()]
BAD = [pytest.param(check, impl, id=f"{check.__name__}-{name}") for check,_,bad in PROPERTIES for name,impl in bad.items()]

@pytest.mark.parametrize("check,impl", OK)
def test_holds(check, impl): check(impl)

@pytest.mark.parametrize("check,impl", BAD)
def test_mistake_is_caught(check, impl):
    with pytest.raises(AssertionError): check(impl)


# ---------- any images ----------

@pytest.mark.parametrize("shape", [(1,28,28), (3,32,32), (3,64,64), (2,17,40)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("decoder", [(16,32), (), None])
def test_any_image_forward_and_backward(shape, decoder):
    c,h,w = shape
    cfg = replace(TINY, channels=c, height=h, width=w, n_classes=7, decoder=decoder)
    net,x,y = CapsNet(cfg),torch.rand(2, *shape),torch.tensor([6, 0])
    out = net(x, y)
    assert out.lengths.shape == (2, 7) and out.poses.shape == (2, 7, 4)
    assert out.recon is None if decoder is None else out.recon.shape == x.shape
    assert net.primary(net.trunk(x)).pose.shape == (2, cfg.n_primary, 4)
    capsule_loss(out, y, x).backward()
    finite(*(p.grad for p in net.parameters()))
    assert all((p.grad != 0).any() for p in net.parameters())

def test_full_sizes_forward_and_backward():
    net,x,y = CapsNet(),torch.rand(2, 1, 28, 28),torch.tensor([6, 0])
    out = net(x, y)
    assert [tuple(o.shape) for o in out] == [(2, 10), (2, 10, 16), (2, 1, 28, 28)]
    capsule_loss(out, y, x).backward()
    finite(*(p.grad for p in net.parameters()))

def test_it_learns_and_train_and_eval_agree():
    torch.manual_seed(0)
    net = CapsNet(replace(TINY, n_classes=2))
    x,y = torch.zeros(32, 1, 28, 28),torch.arange(32) % 2
    x[y == 0,:,8:20,10] = 1.; x[y == 1,:,14,8:20] = 1.
    x = (x+.2*torch.rand(x.shape)).clamp(max=1)
    opt = torch.optim.Adam(net.parameters(), 3e-3)
    first = None
    for _ in range(40):
        loss = capsule_loss(net(x, y), y, x)
        opt.zero_grad(); loss.backward(); opt.step()
        first = first or loss.item()
    assert loss < .2*first and (net(x).lengths.argmax(1) == y).all()
    a,b = net.train()(x, y),net.eval()(x, y)
    for p,q in zip(a, b): close(p, q)

def test_layers_stack():
    net = nn.Sequential(DynamicRouting(20, 4, 8, 6, init_std=1.), DynamicRouting(8, 6, 5, 3, n_iters=1, init_std=1.),
                        DynamicRouting(5, 3, 2, 7, stop_grad=True, init_std=1.))
    u = squash(torch.randn(3, 20, 4)).requires_grad_()
    v = poses_of(net, u)
    lengths(v).sum().backward()
    assert v.shape == (3, 2, 7)
    finite(u.grad, *(m.W.grad for m in net))

def test_names_of_the_weights():
    net = CapsNet(TINY)
    names = list(net.state_dict())
    assert names[:5] == ["trunk.weight", "trunk.bias", "primary.conv.weight", "primary.conv.bias", "digit.W"]
    assert names[5:] and all(n.startswith("decoder.") for n in names[5:])
    first = CapsNet(TINY)                                      # and those of before version 0.2
    first.load_state_dict({n.replace("trunk.", "conv1."): t for n,t in net.state_dict().items()})
    for n,t in net.state_dict().items(): assert torch.equal(first.state_dict()[n], t), n


# ---------- precision, compilation, devices ----------

def test_autocast_rounds_neither_squash_nor_couplings_nor_losses():
    "And of the routing the products alone, on a CPU: half a percent of the poses, by norm; a trace is exact"
    net,x = net_and_images(CapsNet)
    y = torch.zeros(12).long()
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, y)
        loss = capsule_loss(out, y, x)
    assert {o.dtype for o in out} | {loss.dtype} == {torch.float32}
    loss.backward()
    finite(*(p.grad for p in net.parameters()))
    u = squash(torch.randn(12, 72, 4))
    full = poses_of(net.digit, u)
    with torch.autocast("cpu", torch.bfloat16):
        close(poses_of(net.digit, u, True), full, 1e-5)
        assert (poses_of(net.digit, u) - full).norm() < 0.015*full.norm()

def test_float64_stays_float64():
    net,x = net_and_images(CapsNet, b=2)
    out = net.double()(x.double(), torch.tensor([1, 2]))
    assert {o.dtype for o in out} == {torch.float64} and capsule_loss(out, torch.tensor([1, 2]), x.double()).dtype == torch.float64

def test_the_whole_network_is_one_graph():
    net,x = net_and_images(CapsNet, b=2)
    y = torch.tensor([1, 2])
    def step(x, y): return capsule_loss(net(x, y), y, x)
    compiled = torch.compile(step, backend="eager", fullgraph=True)(x, y)   # a look at a value would break the graph, and raise
    close(compiled.detach(), step(x, y).detach(), 1e-5)
    compiled.backward()
    finite(*(p.grad for p in net.parameters()))

@pytest.mark.skipif(torch.__version__ < "2.6" and not torch.cuda.is_available(), reason="this torch asks the driver for a fake tensor on a GPU too")
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_no_value_is_looked_at_on_a_gpu():
    "A fake tensor says that it is on a GPU, and has no values: a check that asked for one would wait there, and raises here"
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
    with FakeTensorMode(), torch.device("cuda"):
        net,x,y = CapsNet(TINY),torch.rand(2, 1, 28, 28),torch.zeros(2).long()
        for t in (y, torch.zeros(2, 10)): capsule_loss(net(x, y), t, x)
        net(x)
        with pytest.raises(DataDependentOutputException): bool((x > 0).all())   # the test would notice

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_no_wait_for_the_gpu():
    net,x,y = CapsNet(TINY).cuda(),torch.rand(2, 1, 28, 28).cuda(),torch.tensor([1, 2]).cuda()
    capsule_loss(net(x, y), y, x).backward()
    torch.cuda.set_sync_debug_mode("error")
    try: capsule_loss(net(x, y), y, x).backward()
    finally: torch.cuda.set_sync_debug_mode("default")


# ---------- bad input ----------

# all are `BadValue`, of both kinds; `kind` is the one that a caller would catch
REFUSED = [
    (lambda: CapsConfig(height=16), ValueError, r"image_shape=\(1, 16, 28\): .*at least 17"),
    (lambda: caps_config(width=8, kernel=5), ValueError, r"image_shape=\(1, 28, 8\): .*at least 9"),
    (lambda: CapsConfig(channels=0), ValueError, "channels=0: must be at least 1"),
    (lambda: caps_config(conv_channels=-256), ValueError, "channels=-256: must be at least 1"),
    (lambda: CapsConfig(n_classes=1), ValueError, "n_classes=1: must be at least 2"),
    (lambda: CapsNet(caps_config(n_iters=0)), ValueError, "n_iters=0: must be at least 1"),
    (lambda: CapsNet(caps_config(n_iters=2.5)), TypeError, "n_iters=2.5: must be a whole number"),
    (lambda: CapsConfig(kernel="9"), TypeError, "kernel='9': must be a whole number"),
    (lambda: CapsConfig(d_class=float("nan")), TypeError, "d_class=nan: must be a whole number"),
    (lambda: CapsConfig(n_types=True), TypeError, "n_types=True: must be a whole number"),
    (lambda: CapsConfig(decoder="512"), TypeError, "decoder='512': must be a tuple or None"),
    (lambda: CapsConfig(decoder=(512, -1)), ValueError, "decoder=-1: must be at least 1"),
    (lambda: CapsNet(caps_config(stop_grad="no")), TypeError, "stop_grad='no': must be True or False"),
    (lambda: CapsConfig.from_dict({"hieght": 28}), ValueError, "'hieght': must be one of .*did you mean height"),
    (lambda: CapsConfig.from_dict("x"), TypeError, "config='x': must be a dict"),
    (lambda: CapsNet(10), TypeError, "cfg=10: must be a CapsConfig"),
    (lambda: CapsNet(TINY)(torch.rand(2, 3, 28, 28)), ValueError, r"x=float32 \(2, 3, 28, 28\): must have shape \(any, 1, 28, 28\)"),
    (lambda: CapsNet(TINY)(torch.rand(1, 28, 28)), ValueError, r"x=float32 \(1, 28, 28\): must have shape"),
    (lambda: CapsNet(TINY)(torch.zeros(1, 1, 28, 28).byte()), TypeError, "x=uint8 .*: must hold floating point"),
    (lambda: CapsNet(TINY)([[0.]]), TypeError, r"x=\[\[0.0\]\]: must be a tensor, got list"),
    (lambda: CapsNet(TINY)(torch.full((1, 1, 28, 28), torch.nan)), ValueError, r"x=float32 \(1, 1, 28, 28\): must be finite"),
    (lambda: CapsNet(TINY)(torch.full((1, 1, 28, 28), torch.inf)), ValueError, r"x=float32 \(1, 1, 28, 28\): must be finite"),
    (lambda: CapsNet(TINY)(torch.rand(1, 1, 28, 28), torch.tensor([10])), ValueError, "which=10: must be a class from 0 to 9"),
    (lambda: CapsNet(TINY)(torch.rand(1, 1, 28, 28), 3), TypeError, "which=3: must be a tensor, got int"),
    (lambda: PrimaryCaps(0), ValueError, "in_ch=0: must be at least 1"),
    (lambda: PrimaryCaps(3)(torch.rand(1, 4, 20, 20)), ValueError, r"x=float32 \(1, 4, 20, 20\): must have shape \(any, 3, any, any\)"),
    (lambda: DynamicRouting(4, 2, 3, 2, n_iters=0), ValueError, "n_iters=0: must be at least 1"),
    (lambda: DynamicRouting(4, 2, 3, 2)(by_length(torch.rand(1, 5, 2))), ValueError, r"pose=float32 \(1, 5, 2\): must have shape \(any, 4, 2\)"),
    (lambda: DynamicRouting(4, 2, 3, 2)(Capsules(torch.ones(1, 4, 2).int(), torch.ones(1, 4))), TypeError, "pose=int32 .*: must hold floating point"),
    (lambda: margin_loss(torch.rand(2, 3), torch.tensor([0, 3])), ValueError, "target=3: must be a class from 0 to 2"),
    (lambda: margin_loss(torch.rand(2, 3), torch.tensor([0, -1])), ValueError, "target=-1: must be a class from 0 to 2"),
    (lambda: margin_loss(torch.rand(2, 3), torch.tensor([0., 1.])), TypeError, "target=float32 .*: must be integers"),
    (lambda: margin_loss(torch.rand(2, 3), torch.tensor([True, False])), TypeError, "target=bool .*: must be integers"),
    (lambda: margin_loss(torch.rand(2, 3), torch.tensor([0])), ValueError, r"target=int64 \(1,\): must have shape \(2,\)"),
    (lambda: margin_loss(torch.rand(2, 3), torch.rand(3, 2)), ValueError, r"target=float32 \(3, 2\): must have shape \(2,\) or \(2, 3\)"),
    (lambda: margin_loss(torch.rand(2, 3), torch.tensor(1)), ValueError, r"target=int64 \(\): must have shape"),
    (lambda: margin_loss(torch.rand(2, 3), torch.full((2, 3), torch.nan)), ValueError, "target=nan: must lie between 0 and 1"),
    (lambda: margin_loss(torch.rand(2, 3), torch.full((2, 3), -1)), ValueError, "target=-1.*: must lie between 0 and 1"),
    (lambda: margin_loss(torch.rand(2, 3), [0, 1]), TypeError, r"target=\[0, 1\]: must be a tensor, got list"),
    (lambda: margin_loss(torch.rand(6), torch.arange(6)), ValueError, r"lengths=float32 \(6,\): must have shape \(any, any\)"),
    (lambda: margin_loss(torch.ones(2, 3).int(), torch.tensor([0, 1])), TypeError, "lengths=int32 .*: must hold floating point"),
    (lambda: reconstruction_loss(torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4, 5)), ValueError, r"x=float32 \(1, 1, 4, 5\): must have shape \(1, 1, 4, 4\)"),
    (lambda: reconstruction_loss(torch.rand(1, 1, 4, 4), torch.randn(1, 1, 4, 4)-1), ValueError, "x=.*: must lie between 0 and 1"),
    (lambda: reconstruction_loss(torch.rand(1, 1, 4, 4), torch.full((1, 1, 4, 4), torch.nan)), ValueError, "x=.*nan.*: must lie between 0 and 1"),
    (lambda: reconstruction_loss(torch.rand(1, 1, 4, 4), torch.ones(1, 1, 4, 4).byte()), TypeError, "x=uint8 .*: must hold floating point"),
    (lambda: mask_capsules(torch.rand(2, 3, 4), torch.tensor([0, 3])), ValueError, "which=3: must be a class from 0 to 2"),
    (lambda: mask_capsules(torch.rand(2, 3, 4), torch.eye(3)[:2]), TypeError, r"which=float32 \(\d,\): must be integers"),
    (lambda: mask_capsules(torch.rand(2, 12), torch.tensor([0, 1])), ValueError, r"poses=float32 \(2, 12\): must have shape"),
    (lambda: Decoder(10, 16, (28, 28)), ValueError, r"image_shape=\(28, 28\): must be"),
    (lambda: Decoder(10, 16, (1, 28, 28), (0,)), ValueError, "widths=0: must be at least 1"),
    (lambda: Decoder(10, 16, (1, 28, 28))(torch.rand(1, 16)), ValueError, r"masked=float32 \(1, 16\): must have shape \(any, 160\)"),
]

@pytest.mark.parametrize("call,kind,says", REFUSED, ids=[f"{k:02d}" for k in range(len(REFUSED))])
def test_refused_in_one_line_that_names_the_value(call, kind, says):
    with pytest.raises(kind, match="^[a-z_]+=.+: (must|height and width must)") as e: call()
    assert isinstance(e.value, BadValue) and re.search(says, str(e.value)), str(e.value)
    assert "\n" not in str(e.value)

def test_config_through_json():
    deep = replace(TINY, decoder=None, layers=((8, 6), (5, 3)), routing_options=dict(n_iters=2, stop_grad=True))
    for cfg in (CapsConfig(), TINY, deep, CapsConfig(3, 64, 48, 5)):
        assert CapsConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    assert CapsConfig(n_classes=np.int64(7)).to_dict()["n_classes"] == 7   # any whole number, kept as an int

@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 9])
def test_the_smallest_image_that_fits_does_and_one_less_does_not(k):
    cfg = replace(TINY, kernel=k, trunk_options=dict(channels=8, kernel=k), height=2*k-1, width=2*k-1)
    assert cfg.grid == (1, 1) and CapsNet(cfg)(torch.rand(1, *cfg.image_shape)).lengths.shape == (1, 10)
    with pytest.raises(ValueError): replace(cfg, height=2*k-2)

def test_no_images_no_loss():
    net = CapsNet(TINY)
    x,y = torch.zeros(0, 1, 28, 28),torch.zeros(0).long()
    loss = capsule_loss(net(x, y), y, x)
    loss.backward()
    assert loss == 0
    finite(*(p.grad for p in net.parameters()))
