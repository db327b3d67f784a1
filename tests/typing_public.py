"""The public names as the README and the notebooks use them, for a type checker: `python -m mypy` (settings in pyproject.toml).

Nothing here runs. A line that a user may write must pass; what a function gives is held to its type by the name it is given to."""
from pathlib import Path
from typing import List, Optional

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from capsule_routing.baselines import BaselineConfig
from capsule_routing.networks import build_net, config_from_dict
from capsule_routing.callbacks import Callback, CSVLog, EarlyStopping, StopAt
from capsule_routing.capsnet import CapsConfig, CapsNet, CapsOut, count_params
from capsule_routing.data import ImageData, ImageSet, batches, load_data
from capsule_routing.decoder import Decoder, mask_capsules
from capsule_routing.factored import route_factored
from capsule_routing.glyphs import make_glyphs
from capsule_routing.layers import Capsules, CapsuleLayer, DynamicRouting, PrimaryCaps
from capsule_routing.losses import capsule_loss, margin_loss, reconstruction_loss
from capsule_routing.registry import routing, trunk
from capsule_routing.routing import route, votes
from capsule_routing.runs import Run, load_run
from capsule_routing.settings import RECIPES, TrainConfig
from capsule_routing.squash import lengths, squash
from capsule_routing.tasks import Evaluation, Task, classification, evaluate, predict
from capsule_routing.training import fit, new_net


def mathematics(s: Tensor, W: Tensor) -> Tensor:
    v: Tensor = squash(s, dim=-1)
    n: Tensor = lengths(v)
    u_hat: Tensor = votes(v, W)
    out: Tensor = route_factored(v, W, n_iters=3)
    route(u_hat, 3, priors=None)
    return out + n.sum()


def losses(out: CapsOut, y: Tensor, x: Tensor) -> Tensor:
    total: Tensor = margin_loss(out.lengths, y) + capsule_loss(out, y) + capsule_loss(out, y, x)
    if out.recon is not None: total = total + reconstruction_loss(out.recon, x)
    decoder = Decoder(n_classes=10, d_pose=16, image_shape=(1, 28, 28), widths=(512, 1024))
    masked: Tensor = mask_capsules(out.poses, y)
    decoder(masked)
    return total


@routing("typed")
class Typed(CapsuleLayer):
    def __init__(self, n_in: int, d_in: int, n_out: int, d_out: int, heads: int = 2):
        super().__init__(n_in, d_in, n_out, d_out)
        self.W = nn.Parameter(torch.randn(n_in, n_out, d_in, d_out)/10)

    def forward(self, caps: Capsules, trace: bool = False) -> Capsules:
        s = torch.einsum("ijde,bid->bje", self.W, caps.pose)
        v = squash(s)
        return Capsules(v, lengths(v))


@trunk("typed")
class Trunk(nn.Conv2d):
    def __init__(self, in_channels: int, channels: int = 8): super().__init__(in_channels, channels, 9)


def networks(x: Tensor) -> CapsOut:
    cfg = CapsConfig(decoder=None)
    CapsConfig(channels=3, height=64, width=48, n_classes=5, trunk="conv9", trunk_options=dict(channels=64), layers=((32, 8),),
               routing="typed", routing_options=dict(heads=4), decoder=(32,))
    again = CapsConfig.from_dict(cfg.to_dict())
    iters: Optional[int] = again.n_iters
    shape: tuple = cfg.image_shape
    net = CapsNet(cfg)
    net.load_state_dict(build_net(cfg).state_dict())
    build_net(BaselineConfig(n_classes=3)), config_from_dict(cfg.to_dict()), new_net(cfg, seed=1)
    n: int = count_params(net)
    caps: Capsules = net.capsules(x)
    upper, told = DynamicRouting(1152, 8, 10, 16, n_iters=3)(caps, trace=True)
    PrimaryCaps(256, n_types=32)(x)
    trained = CapsNet.from_pretrained("mnist")
    out: CapsOut = trained(x)
    drawn: Optional[Tensor] = out.recon
    out.lengths.argmax(1), drawn, n, iters, shape, upper, told
    return out


class Note(Callback):
    def after_epoch(self, t): print(t.history[-1])


def training(folder: Path) -> List[dict]:
    data: ImageData = load_data("glyphs", limit=4000, folder=None)
    load_data(); load_data("folder", folder="pictures", size=28, channels=None)
    cfg = TrainConfig(epochs=2, batch_size=32, lr=3e-3, checkpoint_steps=None)
    TrainConfig(**RECIPES["fast"])
    net = new_net(CapsConfig(decoder=None))
    task: Task = classification(recon_weight=0.0005)
    history: list = fit(net, data, cfg)
    fit(net, data, cfg, path=folder, resume=True, device="cpu", extra=dict(by="me"), task=task,
        optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1), callbacks=[Note(), CSVLog(), EarlyStopping(3), StopAt(0.99)])
    return history


def results(folder: Path) -> Optional[Evaluation]:
    run: Run = load_run(folder)
    load_run(str(folder), weights="best")
    images: ImageSet = load_data("glyphs").test
    make_glyphs(100, seed=1).x.shape
    out: CapsOut = predict(run.net, images)
    predict(run.net, torch.zeros(2, 1, 28, 28), batch_size=10)
    e = evaluate(run.net, images)
    if e is not None: print(e.n, e.n_errors)
    print(run.cfg.n_classes, run.path.name, run.history[-1], out.lengths)
    return e


def own_loop(images: ImageSet) -> None:
    net = CapsNet(CapsConfig())
    opt = torch.optim.Adam(net.parameters())
    for x, y in DataLoader(images, batch_size=32, shuffle=True):
        opt.zero_grad()
        margin_loss(net(x).lengths, y).backward()
        opt.step()
    for b in batches(images, 32):
        print(b.x.shape, b.y.shape)
