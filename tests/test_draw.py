"The drawing page without a browser: its weights and back, its JavaScript under node, what it refuses."
import json, shutil, subprocess
import pytest
import torch
from capsule_routing.capsnet import CapsNet, caps_config
from capsule_routing.data import ImageSet
from capsule_routing.decoder import mask_capsules
from capsule_routing.draw import CapsuleDraw, DrawHere, SlidersHere, Live, browser_can, draw_config, draw_page, int8_weights, rounded, run_page, write_site
from capsule_routing.explore import explorer_file
from capsule_routing.prepare import fit_digit
from capsule_routing.strokes import STROKES, digit_strokes, stroke_ink

def tiny(**kw):
    torch.manual_seed(0)
    return CapsNet(caps_config(**{**dict(conv_channels=16, n_types=4, d_primary=4, d_class=6, decoder=(16, 32)), **kw})).eval()

NETS = {"small": {}, "two layers": dict(layers=((20, 5),)), "priors": dict(routing_options=dict(priors=True, n_iters=2)),
        "large": dict(conv_channels=64, n_types=16, d_class=8)}

@pytest.fixture(params=NETS, ids=str)
def net(request):
    net = tiny(**NETS[request.param])
    with torch.no_grad():
        for k, p in net.named_parameters(): p.mul_(3) if "W" in k else p.normal_(0, 1) if "priors" in k else None
    return net

def node(folder, script, **given):
    "What a script prints as JSON; it finds `capsnet.mjs` and its input beside itself"
    if not shutil.which("node"): pytest.skip("no node on PATH")
    (folder/"capsnet.mjs").write_text(explorer_file("capsnet.js"), encoding="utf-8")
    (folder/"in.json").write_text(json.dumps(given))
    (folder/"run.mjs").write_text('import * as caps from "./capsnet.mjs"; import fs from "fs"; const given = JSON.parse(fs.readFileSync("in.json")); '
                                  'const bytes = p => new Uint8Array(fs.readFileSync(p)).buffer;\n'+script)
    out = subprocess.run(["node", "run.mjs"], cwd=folder, capture_output=True, text=True, encoding="utf-8", timeout=60)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout)

def test_weights_and_back(net):
    "Each number within half a step of its channel's 127, small tensors as their 16 bits; rounding twice is rounding once"
    new = rounded(net)
    for (k, a), b in zip(net.named_parameters(), new.parameters()):
        step = a.abs().max()/127
        assert (a-b).abs().max() <= 0.51*step+1e-6, k
    again = rounded(new)
    for a, b in zip(new.parameters(), again.parameters()): assert torch.allclose(a, b, atol=1e-6)
    parts, header = int8_weights(net)
    assert {k: len(v) for k, v in parts.items()} == header["bytes"] and json.loads(json.dumps(header)) == header

def test_javascript_computes_what_torch_computes(net, tmp_path):
    x = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)) * (torch.rand(3, 1, 28, 28) < 0.2)
    parts, header = int8_weights(net)
    for k, v in parts.items(): (tmp_path/k).write_bytes(v)
    got = node(tmp_path, """const read = k => caps.readTensors(given.header, bytes(k), k), look = caps.makeNetwork(given.header, read("network")), paint = caps.makePainter(given.header, read("decoder"));
        const out = given.x.map(x => { const s = look(Uint8Array.from(x), 5).steps, d = given.header.sizes.dims, v = s[given.n - 1].v;
          return {lengths: s.map(o => [...o.lengths]), c: s.map(o => [...o.c]), adds: [...s[4].adds], s: [...s[4].s], pixels: [...paint(2, v.slice(2*d, 3*d))]} });
        console.log(JSON.stringify(out))""", header=header, x=x.flatten(1).tolist(), n=net.cfg.n_iters)
    less = rounded(net)
    for k, o in enumerate(got):
        for r in (1, net.cfg.n_iters, 5):
            less.digit.n_iters = r
            caps, tr = less.trace(x[k:k+1].float()/255)
            assert torch.allclose(caps.activation[0], torch.tensor(o["lengths"][r-1]), atol=1e-5)
            assert torch.allclose(tr.c[r-1, 0].flatten(), torch.tensor(o["c"][r-1]), atol=1e-5)
            if r == net.cfg.n_iters:
                want = less.decoder(mask_capsules(caps.pose, torch.tensor([2]))).flatten()
                assert torch.allclose(want, torch.tensor(o["pixels"]), atol=1e-5)
        s = torch.tensor(o["s"]).view(10, -1).norm(dim=1)                 # what the places add is the length of the sum
        assert torch.allclose(torch.tensor(o["adds"]).view(-1, 10).sum(0), s, atol=1e-3)

def test_ink_is_fitted_alike(tmp_path):
    "The same 784 numbers in Python and in JavaScript, whatever the sheet's size and wherever the ink"
    g = torch.Generator().manual_seed(2)
    inks = [stroke_ink(digit_strokes(k), 90, 0.1) for k in STROKES]+[torch.zeros(5, 9)]
    for h, w in ((3, 3), (1, 40), (57, 20), (200, 31)): inks.append((torch.rand(h, w, generator=g) < 0.3)*torch.rand(h, w, generator=g))
    off = torch.zeros(64, 80); off[40:60, 3:8] = 0.5; inks.append(off)
    got = node(tmp_path, "console.log(JSON.stringify(given.inks.map(({ink, h, w}) => [...caps.fitDigit(ink, h, w)])))",
               inks=[dict(ink=i.double().flatten().tolist(), h=i.shape[0], w=i.shape[1]) for i in inks])
    for ink, pixels in zip(inks, got): assert fit_digit(ink.double().numpy()).flatten().tolist() == pixels

def test_fitted_as_mnist_was():
    ink = torch.zeros(100, 100); ink[10:60, 20:30] = 0.4
    x = torch.tensor(fit_digit(ink.numpy()))
    assert x.shape == (28, 28) and x.max() == 255
    assert (x > 0).any(1).sum() == 20 and (x > 0).any(0).sum() == 4 and (x[4:24, 12:16] == 255).all()

@pytest.mark.parametrize("change, why", [(dict(decoder=None), "no decoder"), (dict(channels=3), "images are"), (dict(height=20), "images are"),
                                         (dict(routing_options=dict(n_iters=10)), "more than 9")])
def test_refused(change, why, tmp_path):
    net = tiny(**change)
    assert why in browser_can(net) and "\n" not in browser_can(net)
    for f in (int8_weights, draw_page, CapsuleDraw):
        with pytest.raises(ValueError, match=f"net=.*can't run in a browser: .*{why}"): f(net)

def test_a_damaged_network_is_refused():
    net = tiny()
    with torch.no_grad(): net.trunk.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity in conv1.W"): int8_weights(net)

def test_page_of_a_run(glyph_images):
    "Its own test images to start from; where the browser can't run the network, the sliders"
    images, names = ImageSet(glyph_images.x, glyph_images.y, range(10)), [f"</script> {k}" for k in range(10)]
    images = images._replace(classes=tuple(names)) if hasattr(images, "_replace") else ImageSet(glyph_images.x, glyph_images.y, names)
    page = run_page(tiny(), images, 2, "<mine>")
    assert "<title>&lt;mine&gt;</title>" in page and page.count("</script>") == 2 and "capsule-draw" in page
    _, config = draw_config(tiny(), images=images, classes=names, per_class=2)
    assert all(len(s["pictures"]) == 2 for s in config["starts"]) and [s["name"] for s in config["starts"]] == names
    assert 'id="state"' in run_page(tiny(routing_options=dict(n_iters=10)), images, 2)

def test_site_files(tmp_path, monkeypatch):
    write_site(tmp_path)
    config = json.loads((tmp_path/"mnist.json").read_text())
    for url in (*config["files"].values(), config["first"], config["worker"]): assert (tmp_path/url.split("?")[0]).is_file()
    assert sum(len((tmp_path/f"mnist-{k}.bin").read_bytes()) for k in config["files"]) < 8.4e6
    assert sum((tmp_path/k).stat().st_size for k in ("capsnet.js", "draw.js", "sliders.js", "mnist.json", "first.json")) < 300e3
    first = json.loads((tmp_path/"first.json").read_text())
    assert len(first["steps"]) == 5 and len(first["paints"]) == 2
    for cls in (DrawHere, SlidersHere):
        assert set(cls()._repr_mimebundle_()) == {"text/plain", "image/png"}
    monkeypatch.setattr(Live, "building", True)
    for cls in (DrawHere, SlidersHere):
        text = cls()._repr_mimebundle_()["text/markdown"]
        assert text.startswith("```{=html}\n<capsule-") and "shadowrootmode" in text and len(text) < 40e3
