"The explorer without a browser: moments and hints, the state that travels, the decoder's JavaScript under node, the page and its command."
import base64, io, json, math, re, shutil, subprocess
from pathlib import Path

import pytest
import torch

from capsule_routing.capsnet import CapsNet, caps_config
from capsule_routing.decoder import mask_capsules
from capsule_routing.explore import (CapsuleExplorer, decoder_bytes, explorer_file, explorer_page, explorer_state,
                                     image_poses, run_images)
from capsule_routing.measure import EFFECTS, dimension_effects, hint, image_moments
from capsule_routing.data import ImageSet
from capsule_routing.draw import run_page
from capsule_routing.pretrained import PoseSet, pretrained_poses
from capsule_routing.runs import load_run, save_run
from conftest import TINY_CONFIG

top = Path(__file__).resolve().parents[1]


def own_poses(cfg, y, seed=0):
    torch.manual_seed(seed)
    y = torch.tensor(y)
    return PoseSet(torch.randn(len(y), cfg.n_classes, cfg.d_class)/4, y, torch.arange(len(y)))

def tiny(seed=0, **kw):
    torch.manual_seed(seed)
    return CapsNet(caps_config(**{**TINY_CONFIG, **kw})).eval()

@pytest.fixture(scope="module")
def mnist(): return CapsNet.from_pretrained("mnist"), pretrained_poses("mnist")


# -- moments and hints --

def blob(w=3., h=5., lean=0., x=0., y=0., size=64):
    "A leaning Gaussian blob"
    j, i = torch.meshgrid(torch.arange(size)-(size-1)/2-x, torch.arange(size)-(size-1)/2-y, indexing="xy")
    return torch.exp(-((j + lean*i)/w)**2/2 - (i/h)**2/2)[None, None]

@pytest.mark.parametrize("lean", [-0.6, 0., 0.2, 0.6])
def test_moments_of_a_blob(lean):
    "Its slant is the angle of the shear, and its width and height do not depend on it"
    m = image_moments(blob(lean=lean, x=4, y=-6))
    assert m.slant.item() == pytest.approx(math.degrees(math.atan(lean)), abs=0.05)
    assert m.width.item() == pytest.approx(math.sqrt(12*9+1), abs=0.05) and m.height.item() == pytest.approx(math.sqrt(12*25+1), abs=0.05)
    assert (m.x.item(), m.y.item()) == pytest.approx((35.5, 25.5), abs=0.02)

def test_moments_of_a_flipped_picture():
    torch.manual_seed(0)
    x = torch.rand(5, 3, 20, 31)**4
    a, b = image_moments(x), image_moments(x.flip(3))
    for k in ("ink", "y", "width", "height"): assert torch.allclose(getattr(a, k), getattr(b, k), rtol=1e-4)
    assert torch.allclose(a.slant, -b.slant, atol=1e-3) and torch.allclose(a.x + b.x, torch.full((5,), 30.), atol=1e-3)

def test_effects_are_those_of_single_pictures(mnist):
    "The batched measurement equals the definition, one pose at a time"
    net, ps = mnist
    few = PoseSet(*(t[280:283] for t in ps))                  # three sevens
    want = torch.zeros(6)
    for p in few.poses:
        two = p.repeat(2, 1, 1)
        two[:, 7, 5] += torch.tensor([0.1, -0.1])
        with torch.no_grad(): more, less = torch.stack(image_moments(net.decoder(mask_capsules(two, torch.tensor([7, 7])))), 1)
        change = (more - less)/2
        change[0] = 100*(more[0] - less[0])/(more[0] + less[0])
        want += change/3
    got = dimension_effects(net, few)
    assert torch.allclose(got[7, 5, :6], want, atol=1e-3)
    assert got[0].isnan().all()                               # no pose of that class

def test_hints_of_the_package(mnist):
    "Short, two changes at most, and not the same for each class"
    hints = explorer_state(*mnist)["hints"]
    assert len(hints) == 10 and all(len(h) == 16 for h in hints)
    one = r"(ink|slant|width|height) [+−][\d.]+(%|°| px)|(left|right|up|down) [\d.]+ px"
    for h in sum(hints, []): assert re.fullmatch(rf"({one})(, ({one}))?|shape only|hardly anything", h), h
    assert len(set(map(tuple, hints))) == 10

def test_hints_scale_with_the_image():
    "One pixel is much of 28 and little of 200"
    row = torch.tensor([float(k == "right") for k in EFFECTS])
    assert hint(row, 28) == "right 1.0 px" and hint(row, 400) == "hardly anything"


# -- what travels --

def test_half_precision_and_layout():
    net = tiny(decoder=(7,), n_classes=3, d_class=2)
    raw, sizes = decoder_bytes(net)
    assert sizes == [6, 7, 784] and len(raw) == 2*(7*7 + 8*784)
    got = torch.frombuffer(bytearray(raw), dtype=torch.float16)
    first = net.decoder.layers[0]
    assert (got[:42].view(6, 7) == first.weight.T.half()).all() and (got[42:49] == first.bias.half()).all()

def test_state_is_small(mnist):
    s = explorer_state(*mnist)
    assert len(s["weights"]) == 2_822_688 and len(s["poses"]) == 10*20*16*4
    assert len(json.dumps({k: v for k, v in s.items() if not isinstance(v, bytes)})) < 20_000
    assert len(explorer_page(*mnist).encode()) < 4e6

def test_as_many_images_as_the_rarest_class_has():
    net = tiny()
    s = explorer_state(net, own_poses(net.cfg, [1]*5 + [4]*2 + [7]*3), images=10)
    assert (s["capsules"], s["names"], s["images"], s["numbers"]) == ([1, 4, 7], ["1", "4", "7"], 2, [[0, 1], [5, 6], [7, 8]])

@pytest.mark.parametrize("change,why", [
    (dict(poses=torch.zeros(3, 10, 5)), r"poses=float32 \(3, 10, 5\): must have shape \(3, 10, 4\)"),
    (dict(y=torch.tensor([0, 1, 10])), "y=10: must be a class from 0 to 9"),
    (dict(poses=torch.full((3, 10, 4), math.nan)), "must be finite"),
    (dict(index=torch.arange(2)), r"must have shape \(2, 10, 4\)"),
    (dict(poses=torch.zeros(0, 10, 4), y=torch.zeros(0).long(), index=torch.zeros(0).long()), "at least one"),
])
def test_poses_that_do_not_fit(change, why):
    net = tiny()
    with pytest.raises(ValueError, match=why) as e: explorer_page(net, own_poses(net.cfg, [0, 1, 2])._replace(**change))
    assert "\n" not in str(e.value)

def test_networks_that_can_not_be_shown():
    net = tiny()
    ps = own_poses(net.cfg, [0, 1])
    with pytest.raises(ValueError, match="no decoder"): CapsuleExplorer(tiny(decoder=None), ps)
    with pytest.raises(ValueError, match="channels=4: only 1 or 3"): CapsuleExplorer(tiny(channels=4), ps)
    with pytest.raises(TypeError, match="must be a CapsNet or a Run, got Linear"): CapsuleExplorer(torch.nn.Linear(2, 2), ps)
    with pytest.raises(TypeError, match="must be a PoseSet"): CapsuleExplorer(net, ps.poses)
    with pytest.raises(ValueError, match="images=0: must be at least 1"): CapsuleExplorer(net, ps, images=0)
    with pytest.raises(ValueError, match="classes='?abc'?: must be 10 names"): CapsuleExplorer(net, ps, classes="abc")
    with torch.no_grad(): net.decoder.layers[0].weight[0, 0] = 1e6
    with pytest.raises(ValueError, match="too large for 16 bits"): CapsuleExplorer(net, ps)


# -- the JavaScript, under node --

RUN = """
import {makeExplorer, signed, caption} from "./decode.mjs"; import {readFileSync} from "node:fs";
const {state, asked} = JSON.parse(readFileSync("in.json"));
for (const k of ["weights", "poses"]) state[k] = new DataView(Uint8Array.from(atob(state[k]), c => c.charCodeAt(0)).buffer);
const picture = makeExplorer(state);
console.log(JSON.stringify({pixels: asked.map(([k, i, added]) => Array.from(picture(k, i, added))), said: asked.map(([k, i]) => caption(state, k, i)), signed: [0.05, -0.25, -1e-9].map(signed)}));
"""

@pytest.mark.skipif(not shutil.which("node"), reason="node is not on PATH; the browser's tests run the same file")
@pytest.mark.parametrize("which", ["mnist", "fp32", "colour"])
def test_javascript_agrees_with_torch(which, mnist, tmp_path):
    "Within 5e-4, weights of 32 bits too"
    if which == "mnist": net, ps = mnist
    else:
        net = tiny(decoder=(512, 1024), d_class=16) if which == "fp32" else tiny(channels=3, height=20, width=24, n_classes=4, decoder=(), kernel=5)
        with torch.no_grad():
            for p in net.decoder.parameters(): p *= 2
        ps = own_poses(net.cfg, [0, 0, 2, 2])
    s, dims = explorer_state(net, ps, images=2), net.cfg.d_class
    g = torch.Generator().manual_seed(1)
    asked = [(k, i, (torch.rand(dims, generator=g)/2 - 0.25).tolist()) for k in range(len(s["names"])) for i in range(2)]
    state = {k: base64.b64encode(v).decode() if isinstance(v, bytes) else v for k, v in s.items()}
    (tmp_path/"decode.mjs").write_text(explorer_file("capsnet.js", "decode.js"), encoding="utf-8")
    (tmp_path/"in.json").write_text(json.dumps(dict(state=state, asked=asked)))
    (tmp_path/"run.mjs").write_text(RUN)
    out = subprocess.run(["node", "run.mjs"], cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", timeout=60)
    assert out.returncode == 0, out.stderr
    got = json.loads(out.stdout)
    for (k, i, added), pixels, said in zip(asked, got["pixels"], got["said"]):
        c = s["capsules"][k]
        at = (ps.y == c).nonzero().flatten()[i]
        p = ps.poses[at][None].clone()
        p[0, c] += torch.tensor(added)
        with torch.no_grad(): want = net.decoder(mask_capsules(p, torch.tensor([c]))).flatten()
        assert (torch.tensor(pixels) - want).abs().max() < 5e-4
        assert said == f"class {c}, image {i+1} (number {int(ps.index[at])} of the test set)"
    assert got["signed"] == ["+0.05", "−0.25", "0.00"]

def test_one_source():
    "The widget and the page carry the same decoding file, and nothing is fetched by either"
    net = tiny()
    ps = own_poses(net.cfg, [0, 1])
    js = explorer_file("capsnet.js", "decode.js")
    assert js in explorer_page(net, ps) and CapsuleExplorer(net, ps).view._esm.startswith(js)
    for name in ("capsnet.js", "draw.js", "sliders.js", "draw.css", "sliders.css", "draw_page.html"):     # these fetch what lies beside them
        assert not re.search(r"https?:|//cdn|XMLHttpRequest|url\((?!data:)", explorer_file(name)), name
    for name in ("decode.js", "widget.js", "page.js", "widget.css", "page.css", "page.html"):
        text = explorer_file(name)
        assert not re.search(r"https?:|//cdn|fetch\(|XMLHttpRequest|^import |url\(", text, re.M), name


# -- the widget as a Python object --

def test_widget_draws_what_torch_draws(mnist):
    net, ps = mnist
    ex = CapsuleExplorer(start="3")
    ex.which.index = 4
    for d, s in enumerate(ex.sliders): s.value = 0.05*(d % 11 - 5)
    p = ps.poses[ps.y == 3][4:5].clone()
    p[0, 3] += torch.tensor([0.05*(d % 11 - 5) for d in range(16)])
    with torch.no_grad(): want = net.decoder(mask_capsules(p, torch.tensor([3])))[0]
    assert (ex.picture() - want).abs().max() < 1e-5
    ex.reset()
    assert [s.value for s in ex.sliders] == [0]*16

def test_sliders_are_the_papers(mnist):
    ex = CapsuleExplorer()
    assert {(s.min, s.max, s.step, s.value) for s in ex.sliders} == {(-0.25, 0.25, 0.05, 0.)}
    assert ex.which.options == tuple(map(str, range(1, 21))) and ex.kind.options == tuple(map(str, range(10)))
    before = [h.value for h in ex.labels]
    ex.kind.index = 4
    assert [h.value for h in ex.labels] == ex.view.hints[4] != before

def test_bundle_has_a_picture(mnist):
    from PIL import Image
    ex = CapsuleExplorer()
    data = ex._repr_mimebundle_()
    assert data["text/plain"] == "CapsuleExplorer(10 classes, 16 dimensions)" and data["application/vnd.jupyter.widget-view+json"]["model_id"] == ex.model_id
    im = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    assert im.size == (224, 224) and im.mode == "L"
    x = torch.frombuffer(bytearray(im.tobytes()), dtype=torch.uint8).view(224, 224)[4::8, 4::8]
    assert (x/255 - ex.picture()[0]).abs().max() < 0.003

def test_saved_state_is_whole():
    "As the docs are built: with the defaults dropped, the view keeps its JavaScript, and no link between widgets is there to break the pages"
    from ipywidgets import Widget
    net = tiny()
    ex = CapsuleExplorer(net, own_poses(net.cfg, [0, 1]))
    state = Widget.get_manager_state(drop_defaults=True)["state"]
    view = state[ex.view.model_id]
    assert "makeExplorer" in view["state"]["_esm"] and {b["path"][0] for b in view["buffers"]} == {"weights", "poses"}
    assert view["state"]["sliders"] == [f"IPY_MODEL_{s.model_id}" for s in ex.sliders]
    assert not [m for m in state.values() if "source" in m["state"]]

@pytest.mark.parametrize("nb", sorted((top/"nbs").glob("*.ipynb")), ids=lambda p: p.stem)
def test_no_state_is_committed(nb):
    "A notebook holds the picture; the widget's megabytes are made when the site is built"
    text = json.loads(nb.read_text(encoding="utf-8"))
    assert "widgets" not in text["metadata"]
    assert not [c["id"] for c in text["cells"] for o in c.get("outputs", []) if "application/vnd.jupyter.widget-view+json" in o.get("data", {})]


# -- from a run --

def test_from_a_run_folder(trained):
    "Network, images and class names are the run's own"
    run = load_run(trained.path)
    ex = CapsuleExplorer(trained.path, images=2)
    assert ex.view.names == ["one", "two", "zero"] and len(ex.sliders) == 4
    test = run_images(run)
    assert test.classes == ("one", "two", "zero")
    at = (test.y == 1).nonzero()[1]
    with torch.no_grad(): want = run.net(test.x[at].float()/255, torch.tensor([1])).recon[0]
    ex.kind.index, ex.which.index = 1, 1
    assert (ex.picture() - want).abs().max() < 1e-5

def test_run_whose_images_are_gone(own_run, tmp_path):
    run = load_run(own_run)
    gone = run._replace(config={**run.config, "settings": {**run.config["settings"], "test_folder": str(tmp_path/"gone")}})
    with pytest.raises(ValueError, match="its poses are made from its test images, which can't be had: .*gone") as e: CapsuleExplorer(gone)
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="does not name its data"): CapsuleExplorer(run._replace(config={}))
    assert len(CapsuleExplorer(gone, own_poses(run.cfg, [0, 1, 2])).view.names) == 3       # poses given: no images needed

def test_run_without_decoder(tmp_path):
    run = load_run(save_run(tmp_path/"run", tiny(decoder=None), dict(data=dict(name="glyphs"))))
    for f in (CapsuleExplorer, explorer_page):
        with pytest.raises(ValueError, match="no decoder to draw with"): f(run)

def test_image_poses_are_the_networks(glyph_images):
    net = tiny()
    images = ImageSet(glyph_images.x, glyph_images.y, range(10))
    ps = image_poses(net, images, 3)
    with torch.no_grad(): assert torch.allclose(net(images.x[ps.index].float()/255).poses, ps.poses, atol=1e-6)
    assert (images.y[ps.index] == ps.y).all() and ps.y.bincount().max() <= 3 and not ps.poses.requires_grad
    with pytest.raises(ValueError, match="images=.*whose image_shape is"): image_poses(tiny(channels=3), images)


# -- the command --

def refused(p, *parts):
    assert p.returncode == 2 and len(p.stderr.splitlines()) == 1 and all(x in p.stderr for x in parts), (p.returncode, p.stdout, p.stderr)

@pytest.mark.slow
def test_command_writes_the_page_of_a_run(trained, run_cmd, tmp_path):
    p = run_cmd("capsule_explore", trained.path, "--out", "new/page.html", "--images", "2", "--no-open", cwd=tmp_path)
    assert p.returncode == 0 and p.stderr == "" and p.stdout.startswith("page      new/page.html"), p.stderr
    run = load_run(trained.path)
    want = run_page(run.net, run_images(run), 2, f"What a capsule sees: {trained.path.name}")
    assert (tmp_path/"new/page.html").read_text(encoding="utf-8") == want
    assert [f.name for f in (tmp_path/"new").iterdir()] == ["page.html"]

def test_command_opens_the_page(own_run, monkeypatch, capsys):
    "Without --out in the run folder, and a browser is asked to show it; an older page is replaced as a whole"
    import webbrowser
    from capsule_routing.commands import capsule_explore, run_verb
    asked = []
    monkeypatch.setattr(webbrowser, "open", lambda url: asked.append(url) or len(asked) > 1)
    (own_run/"explore.html").write_text("old")
    assert run_verb(capsule_explore, [str(own_run)]) == 0
    url = (own_run/"explore.html").resolve().as_uri()
    assert asked == [url] and f"no browser could be started; open {url}" in capsys.readouterr().out
    assert capsule_explore(own_run, images=1) == own_run/"explore.html"
    assert len(asked) == 2 and "no browser" not in capsys.readouterr().out
    assert (own_run/"explore.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")

@pytest.mark.slow
def test_command_refuses(trained, own_run, run_cmd, tmp_path):
    (tmp_path/"file").write_text("x"); (tmp_path/"dir.html").mkdir(); (tmp_path/"old.html").write_text("old")
    def bad(args, *parts): refused(run_cmd("capsule_explore", *args, "--no-open", cwd=tmp_path), *parts)
    bad(["no-run"], "capsule_explore: no-run: no such run folder")
    bad([trained.path, "--out", "page.png"], "--out: page.png does not end in .html")
    bad([trained.path, "--out", "dir.html"], "dir.html: Is a directory")
    bad([trained.path, "--out", "file/page.html"], "--out: file is a file, not a folder")
    bad([trained.path, "--images", "0"], "--images: 0 is not in the range 1<=x<=1000")
    bad(["--weights", "best"], "--weights best: needs a RUN")
    bad([trained.path, "--folder", "none", "--out", "old.html"], "none")
    bad([trained.path, "--imags", "3"], "--images")
    save_run(tmp_path/"blind", tiny(decoder=None), dict(data=dict(name="glyphs")))
    bad(["blind"], "RUN blind: has no decoder to draw with; train one with --with-reconstruction")
    last = own_run/"last.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    bad([own_run], "last.safetensors")
    assert (tmp_path/"old.html").read_text() == "old" and not list(tmp_path.rglob("explore.html"))

def test_command_without_a_run(run_cmd, tmp_path):
    "The network in the package, with no data folder and no network connection"
    p = run_cmd("capsule_explore", "--no-open", cwd=tmp_path)
    assert p.returncode == 0 and p.stderr == "", p.stderr
    assert 10e6 < (tmp_path/"explore.html").stat().st_size < 13e6
