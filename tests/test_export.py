"Exported files answer as the network does, in batches of any size, and none is kept that does not."
from importlib.util import find_spec
import pytest, torch
from capsule_routing import export
from capsule_routing.capsnet import CapsNet, caps_config
from capsule_routing.checks import BadValue
from capsule_routing.commands import capsule_export, run_verb
from capsule_routing.export import export_net, load_exported, rounded
from capsule_routing.training import new_net

needs_onnx = pytest.mark.skipif(not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))), reason="needs onnx, onnxscript and onnxruntime")
TINY = caps_config(height=20, width=20, n_classes=3, conv_channels=4, n_types=2, d_primary=4, d_class=4, decoder=(8,))

def images(n, shape): return torch.rand(n, *shape, generator=torch.Generator().manual_seed(n))

def apart(net, path, n):
    "The largest difference of all answers"
    x = images(n, net.cfg.image_shape)
    with torch.no_grad(): return max(float((a-b).abs().max()) for a, b in zip(load_exported(path)(x), (t for t in net(x) if t is not None), strict=True))


def test_torch_takes_batches_of_any_size(tmp_path):
    net = new_net(TINY)
    path = export_net(net, tmp_path/"net.pt2", "torch")
    assert max(apart(net, path, n) for n in (1, 7, 128)) < 1e-5 and [p.name for p in tmp_path.iterdir()] == ["net.pt2"]


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("net", [lambda: new_net(TINY), lambda: new_net(caps_config(conv_channels=4, n_types=2, decoder=None)), CapsNet.from_pretrained], ids=["tiny", "no decoder", "pretrained"])
def test_onnxruntime_agrees(net, tmp_path):
    path = export_net(net := net(), tmp_path/"net.onnx", "onnx")
    assert max(apart(net, path, n) for n in (1, 7, 128)) < 1e-5


def test_a_file_that_answers_otherwise_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "load_exported", lambda path: lambda x: (torch.zeros(len(x), 3), torch.zeros(len(x), 3, 4), torch.zeros(len(x), 1, 20, 20)))
    with pytest.raises(BadValue, match="was not kept"): export_net(new_net(TINY), tmp_path/"net.pt2", "torch")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    assert run_verb(capsule_export, ["mnist", "--out", str(tmp_path/"a.onnx")]) == 2
    assert capsys.readouterr().err == "capsule_export: --format onnx: needs more packages: pip install onnx onnxscript onnxruntime\n"


def test_rounding_is_within_half_a_step():
    w = torch.randn(50, 3)
    q, scale = rounded(w)
    assert q.dtype == torch.int8 and ((q*scale - w).abs() <= scale*0.5001).all()
