"What a user adds by name is saved, loaded and resumed; what a config cannot name is refused."
import json, re, signal, subprocess, sys
from pathlib import Path
import nbformat, pytest, torch
from torch import einsum, nn
from capsule_routing.capsnet import CapsConfig, caps_config
from capsule_routing.callbacks import Callback, EarlyStopping, Interrupted
from capsule_routing.checks import BadValue
from capsule_routing.data import ImageData, ImageSet
from capsule_routing.layers import CapsuleLayer, DynamicRouting, by_length
from capsule_routing.registry import routing, trunk
from capsule_routing.routing import votes
from capsule_routing.runs import digest, load_run, save_run
from capsule_routing.settings import TrainConfig
from capsule_routing.squash import squash
from capsule_routing.tasks import Task, predict
from capsule_routing.training import fit, new_net

SIZES = dict(conv_channels=4, n_types=2, d_primary=4, d_class=4, decoder=(8,))
CFG = TrainConfig(epochs=2, batch_size=8, lr=3e-3, threads=1, precision="fp32")
top = Path(__file__).resolve().parent.parent


@routing("even")
class Even(CapsuleLayer):
    "Every child gives every parent the same share, which is learnt for each parent."
    def __init__(self, n_in, d_in, n_out, d_out, share=0.1):
        super().__init__(n_in, d_in, n_out, d_out)
        self.W = nn.Parameter(0.1*torch.randn(n_in, n_out, d_in, d_out))
        self.share = nn.Parameter(torch.full((n_out,), float(share)))            # one parameter more than dynamic routing

    def forward(self, caps):
        return by_length(squash(einsum("j,bije->bje", self.share, votes(caps.pose, self.W))))


@trunk("normed")
class Normed(nn.Sequential):
    "Has buffers, one of whole numbers, beside its weights."
    def __init__(self, in_channels, channels=4):
        super().__init__(nn.Conv2d(in_channels, channels, 3, 2), nn.BatchNorm2d(channels), nn.ReLU())


class Softer(DynamicRouting):
    "A subclass with the very parameters of its parent; it answers something else."
    def forward(self, caps, trace=False): return by_length(super().forward(caps).pose/2)


class Added(DynamicRouting):
    "One parameter more than its parent."
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.more = nn.Parameter(torch.ones(1))


class Stop:
    def __init__(self, step): self.step = step
    def on_step(self, s):
        if s.global_step == self.step: signal.raise_signal(signal.SIGTERM)


class Noise(Callback):
    def before_step(self, t): t.batch = t.batch._replace(x=(t.batch.x + 0.1*torch.rand_like(t.batch.x)).clamp(0, 1))


def images(n, shape=(1, 28, 28), seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 10
    x = torch.randint(0, 100, (n, *shape), generator=g)
    x[torch.arange(n), :, 2*y + 4] = 255                     # a class is a bright row
    return ImageSet(x.byte(), y, tuple("0123456789"))


def data_of(cfg): return ImageData("rows", images(40, cfg.image_shape), images(20, cfg.image_shape, 1))


NETWORKS = dict(
    routing=caps_config(routing="even", routing_options=dict(share=0.2), **SIZES),
    priors=caps_config(routing_options=dict(priors=True), **SIZES),
    layers=caps_config(layers=((6, 5), (7, 3)), routing_options=dict(init_std=0.5), **SIZES),
    own_layers=caps_config(routing="even", layers=((6, 5),), **SIZES),
    trunk=CapsConfig(3, 32, 40, trunk="normed", trunk_options=dict(channels=6), kernel=5, n_types=2, d_class=4, decoder=None))


def spread(out, batch):
    right = out.lengths.gather(1, batch.y[:, None])
    return dict(loss=(0.9 - right + out.lengths).relu().square().sum(1).mean())


HOW = dict(usual=dict(), own=dict(task=Task("spread", spread), callbacks=[Noise(), EarlyStopping(patience=9)],
                                  optimizer=lambda ps: torch.optim.AdamW(ps, 3e-3, weight_decay=0.1)))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", NETWORKS)
def test_saved_loaded_and_resumed_bit_equal(name, how, tmp_path):
    cfg,how = NETWORKS[name],HOW[how]
    data = data_of(cfg)
    whole,rest = new_net(cfg, 1),new_net(cfg, 2)
    fit(whole, data, CFG, tmp_path/"whole", device="cpu", **how)
    with pytest.raises(Interrupted): fit(new_net(cfg, 1), data, CFG, tmp_path/"halves", device="cpu", reporter=Stop(3), **how)
    fit(rest, data, CFG, tmp_path/"halves", resume=True, device="cpu", **how)
    assert digest(rest.state_dict()) == digest(whole.state_dict())
    for run in ("whole", "halves"):
        got = load_run(tmp_path/run)
        assert got.cfg == cfg and type(got.net.digit) is type(whole.digit)
        assert torch.equal(predict(got.net, data.test).lengths, predict(whole, data.test).lengths)


@pytest.mark.parametrize("name", NETWORKS)
def test_save_run_and_back(name, tmp_path):
    net = new_net(NETWORKS[name], 1)
    save_run(tmp_path/"run", net)
    x = images(5, net.cfg.image_shape).x
    assert torch.equal(predict(load_run(tmp_path/"run").net, x).lengths, predict(net, x).lengths)


@pytest.mark.parametrize("kind", [Softer, Added, Even])
@pytest.mark.parametrize("keep", ["fit", "save_run"])
def test_layer_without_a_name_is_refused(kind, keep, tmp_path):
    "Trained and saved it would come back as the layer that the config names: a wrong answer without a word"
    net = new_net(caps_config(**SIZES), 1)
    net.digit = kind(*net.digit.sizes)
    with pytest.raises(BadValue) as e:
        if keep == "fit": fit(net, data_of(net.cfg), CFG, tmp_path/"run", device="cpu")
        else: save_run(tmp_path/"run", net)
    assert "\n" not in str(e.value) and kind.__name__ in str(e.value) and "config" in str(e.value)
    assert not list((tmp_path/"run").glob("*.safetensors"))


def test_without_a_run_folder_any_layer_trains():
    net = new_net(caps_config(**SIZES), 1)
    net.digit = Added(*net.digit.sizes)
    assert len(fit(net, data_of(net.cfg), CFG, device="cpu")) == CFG.epochs


@pytest.mark.parametrize("field,what", [("routing", "routing"), ("trunk", "trunk")])
def test_unregistered_name_in_a_run_folder(field, what, tmp_path):
    "In a process that has not imported the module: one line, which says what to do"
    cfg = NETWORKS[field]
    save_run(tmp_path/"run", new_net(cfg, 1))
    code = f"from capsule_routing.runs import load_run; load_run({str(tmp_path/'run')!r})"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=top, timeout=120)
    last = run.stderr.strip().splitlines()[-1]
    assert run.returncode and getattr(cfg, field) in last and "not registered" in last and "import" in last, run.stderr


def test_every_option_is_in_the_folder(tmp_path):
    save_run(tmp_path/"run", new_net(NETWORKS["routing"], 1))
    saved = json.loads((tmp_path/"run"/"config.json").read_text())["network"]
    assert saved["routing"] == "even" and saved["routing_options"] == dict(share=0.2)


def test_traces_are_asked_only_of_routings_that_have_them():
    x = images(2).x/255
    with pytest.raises(BadValue, match="no couplings"): new_net(NETWORKS["routing"], 1).trace(x)
    for name in ("priors", "layers"):
        caps,steps = new_net(NETWORKS[name], 1).trace(x)
        assert torch.allclose(steps.c.sum(-1), torch.ones(()), atol=1e-5)


def test_dataloader_takes_an_image_set():
    ds = images(10)
    x,y = next(iter(torch.utils.data.DataLoader(ds, batch_size=4)))
    assert x.dtype == torch.float32 and torch.equal(x, ds.x[:4]/255) and torch.equal(y, ds.y[:4])


@pytest.mark.slow
def test_under_lightning(tmp_path):
    "The file that the page shows, as it stands"
    pytest.importorskip("lightning")
    cells = {c.id: c.source for c in nbformat.read(top/"nbs/21_your_own.ipynb", 4).cells}
    file = tmp_path/"with_lightning.py"
    file.write_text("\n".join(re.sub(r"^%%writefile.*\n", "", cells[k]) for k in ("lightning", "lightning-use")))
    run = subprocess.run([sys.executable, "-W", "ignore", file.name], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert load_run(tmp_path/"lit-run").cfg.n_classes == 10
