"The explorer in a real browser, as a page of its own and as the processed page of its notebook: every slider by keyboard, the canvas against torch."
import importlib.util, json, re, shutil, subprocess, sys
from pathlib import Path
import pytest
import torch
from browser import missing
from capsule_routing.capsnet import CapsNet, caps_config
from capsule_routing.decoder import mask_capsules
from capsule_routing.explore import explorer_page, explorer_state
from capsule_routing.pretrained import PoseSet, first_of_each, pretrained_poses

pytestmark = pytest.mark.browser
top = Path(__file__).resolve().parent.parent
PIXELS = """c => { const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; return [c.width, c.height, Array.from(d)] }"""

class Torch:
    "What the decoder draws, in torch"
    def __init__(self, net, ps, images=20):
        n = min(images, int(ps.y.bincount()[ps.y.unique()].min()))
        self.net, self.capsules = net, ps.y.unique().tolist()
        self.poses = ps.poses[first_of_each(ps.y, n)].view(len(self.capsules), n, *ps.poses.shape[1:])
    def __call__(self, kind, image, added):
        p, c = self.poses[kind, image][None].clone(), self.capsules[kind]
        p[0, c] += torch.tensor(added)
        with torch.no_grad(): return self.net.decoder(mask_capsules(p, torch.tensor([c])))[0]

def seen(canvas):
    "The canvas as `(c, h, w)` in [0, 1]"
    w, h, data = canvas.evaluate(PIXELS)
    x = torch.tensor(data).view(h, w, 4)
    assert (x[..., 3] == 255).all()
    return x[..., :3].permute(2, 0, 1)/255

def agrees(canvas, want):
    got = seen(canvas)
    assert got.shape[1:] == want.shape[1:]
    gap = (got - want.expand_as(got)).abs().max().item()   # one channel is drawn in all three
    assert gap < 0.01, f"canvas differs from torch by {gap}"

@pytest.fixture(scope="module")
def mnist():
    net, ps = CapsNet.from_pretrained("mnist"), pretrained_poses("mnist")
    return net, ps, Torch(net, ps)

@pytest.fixture(scope="module")
def colour():
    "A net in colour of three classes, one without poses, with a decoder of one layer"
    torch.manual_seed(0)
    cfg = caps_config(channels=3, height=20, width=24, n_classes=3, conv_channels=4, n_types=2, d_primary=4, d_class=5, decoder=(), kernel=5)
    net = CapsNet(cfg).eval()
    with torch.no_grad(): net.decoder.layers[0].weight *= 10
    ps = PoseSet(torch.randn(5, 3, 5)/4, torch.tensor([0, 0, 0, 2, 2]), torch.tensor([4, 5, 8, 6, 7]))
    return net, ps, Torch(net, ps)


def all_by_keyboard(page, canvas, sliders, decode):
    "Move each slider by its arrow keys, the image with it; the values that they end at"
    assert len(sliders) == 16
    added = [0.]*16
    agrees(canvas, decode(0, 0, added))
    for d, s in enumerate(sliders):
        s.focus()
        for _ in range(1 + d % 5): page.keyboard.press("ArrowRight" if d % 3 else "ArrowLeft")
        added[d] = 0.05*(1 + d % 5)*(1 if d % 3 else -1)
        assert s.get_attribute("aria-valuetext") == f"{added[d]:+.2f}".replace("-", "−")
        agrees(canvas, decode(0, 0, added))
    return added

# The page of its own

def on_disk(tmp_path, *args, **kw):
    path = tmp_path/"page.html"
    path.write_text(explorer_page(*args, **kw), encoding="utf-8")
    return path.as_uri()

def test_page_all_sliders_by_keyboard(mnist, open_page, tmp_path):
    net, ps, decode = mnist
    page = open_page(on_disk(tmp_path, net, ps))
    canvas, sliders = page.locator("canvas"), page.get_by_role("slider").all()
    added = all_by_keyboard(page, canvas, sliders, decode)
    page.keyboard.press("End"); added[15] = 0.25
    agrees(canvas, decode(0, 0, added))
    page.get_by_label("class", exact=True).select_option("7"); agrees(canvas, decode(7, 0, added))
    page.get_by_label("image", exact=True).select_option("4"); agrees(canvas, decode(7, 3, added))
    assert page.locator("#caption").inner_text() == f"class 7, image 4 (number {int(ps.index[ps.y == 7][3])} of the test set)"
    page.get_by_role("button", name="Reset").click(); agrees(canvas, decode(7, 3, [0.]*16))
    assert [s.input_value() for s in sliders] == ["0"]*16

def test_page_names_and_hints(mnist, open_page, tmp_path):
    "Each slider has its name and, as its description, the hint, which changes with the class"
    net, ps, _ = mnist
    hints = explorer_state(net, ps)["hints"]
    page = open_page(on_disk(tmp_path, net, ps))
    for kind in (0, 7):
        page.get_by_label("class", exact=True).select_option(str(kind))
        for d in range(16):
            s = page.get_by_role("slider", name=f"dimension {d}", exact=True)
            assert page.locator("#"+s.get_attribute("aria-describedby")).inner_text() == hints[kind][d]
    assert hints[0] != hints[7]

def test_page_in_colour(colour, open_page, tmp_path):
    net, ps, decode = colour
    page = open_page(on_disk(tmp_path, net, ps, ("cat", "dog", "a </script> hen"), title="<b>"))
    assert page.title() == "<b>" and page.locator("#class option").all_inner_texts() == ["cat", "a </script> hen"]
    assert page.locator("#image option").count() == 2 and page.get_by_role("slider").count() == 5
    agrees(page.locator("canvas"), decode(0, 0, [0.]*5))
    page.get_by_label("class", exact=True).select_option("a </script> hen")
    page.get_by_role("slider").nth(4).fill("-0.2")
    agrees(page.locator("canvas"), decode(1, 0, [0, 0, 0, 0, -0.2]))

@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits(mnist, open_page, tmp_path, width, dark):
    "Nothing is wider than the screen, and on a desktop all sixteen sliders are on the first one"
    page = open_page(on_disk(tmp_path, *mnist[:2]), width=width, height=800, dark=dark)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for s in page.get_by_role("slider").all():
        box = s.bounding_box()
        assert box["width"] >= 100 and box["x"] >= 0 and box["x"]+box["width"] <= width
        if width > 1000: assert box["y"]+box["height"] <= 800
    assert page.locator("canvas").bounding_box()["width"] >= 140


# The page of the notebook

@pytest.fixture(scope="module")
def processed(tmp_path_factory):
    "This notebook and one after it, processed by one process as for the site: two notebooks, as dicts"
    home = tmp_path_factory.mktemp("docs")/"checkout"
    (home/"nbs").mkdir(parents=True)
    shutil.copy(top/"_quarto.yml", home); shutil.copytree(top/".ci", home/".ci", ignore=shutil.ignore_patterns("__pycache__", "run"))
    ini = (top/"settings.ini").read_text(encoding="utf-8")
    (home/"settings.ini").write_text(ini if re.search(r"^procs *=", ini, re.M) else ini+"\nprocs = capsule_routing.explore:OwnWidgets\n", encoding="utf-8")
    shutil.copytree(top/"capsule_routing", home/"capsule_routing", ignore=shutil.ignore_patterns("__pycache__"))
    (home/"nbs/_quarto.yml").symlink_to("../_quarto.yml")
    shutil.copy(top/"nbs/12_explore.ipynb", home/"nbs"); shutil.copy(top/"nbs/00_squash.ipynb", home/"nbs/90_later.ipynb")
    res = subprocess.run([sys.executable, ".ci/docs.py", "--no-render"], cwd=home, capture_output=True, text=True)
    assert res.returncode == 0, res.stdout+res.stderr
    return tuple(json.loads((home/"_proc"/f).read_text(encoding="utf-8")) for f in ("12_explore.ipynb", "90_later.ipynb"))

STATE = "application/vnd.jupyter.widget-state+json"

def test_state_stays_on_its_page(processed):
    "The weights travel once, on the page that shows them; the page after it has no widgets"
    own, later = processed
    assert "widgets" not in later["metadata"]
    state = own["metadata"]["widgets"][STATE]["state"]
    views = [o["data"] for c in own["cells"] for o in c.get("outputs", []) if "application/vnd.jupyter.widget-view+json" in o.get("data", {})]
    assert len(views) == 1 and views[0]["image/png"]
    weights = [m for m in state.values() for b in m.get("buffers", []) if b["path"] == ["weights"]]
    assert len(weights) == 1 and weights[0]["state"]["_esm"]
    assert len(json.dumps(own)) < 6e6

@pytest.fixture(scope="module")
def widget_page(processed, tmp_path_factory):
    "A folder with the notebook as HTML, its widgets' scripts beside it"
    from nbconvert import HTMLExporter
    import nbformat
    spec = importlib.util.spec_from_file_location("postrender", top/".ci/postrender.py")
    postrender = importlib.util.module_from_spec(spec); spec.loader.exec_module(postrender)
    out = tmp_path_factory.mktemp("page")
    try: assets = postrender.assets()
    except (OSError, subprocess.CalledProcessError) as e: missing(f"the widgets' scripts can't be had from npm ({e})")
    for name in ("jquery.js", "require.js", "embed-amd.js", "anywidget.js"): (out/name).write_bytes(assets[name])
    for c in processed[0]["cells"]: c.pop("has_sd", None)   # nbdev's mark on its own cells
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(nbformat.reads(json.dumps(processed[0]), 4))
    head = """<!DOCTYPE html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>explore</title>
<style>body { max-width: 46rem; margin: 0 auto; padding: 1rem; font-family: sans-serif } pre { overflow: auto } img { max-width: 100% }</style>
<script src="jquery.js"></script><script src="require.js"></script><script>requirejs.config({paths: {anywidget: './anywidget'}})</script><script src="embed-amd.js"></script>"""
    (out/"explore.html").write_text(head+body, encoding="utf-8")
    assert (out/"explore.html").stat().st_size < 6e6
    return out

def shown(page):
    page.wait_for_function("document.querySelectorAll('.noUi-handle[aria-valuetext]').length >= 16 && document.querySelector('.capsule-view canvas')")
    return page.locator(".capsule-view canvas"), page.locator(".capsule-rows .noUi-handle").all()

def test_widget_all_sliders_by_keyboard(mnist, widget_page, serve, open_page):
    "No kernel behind it"
    net, ps, decode = mnist
    page = open_page(serve(widget_page)+"explore.html")
    canvas, handles = shown(page)
    added = all_by_keyboard(page, canvas, handles, decode)
    kind, image = page.get_by_label("class", exact=True), page.get_by_label("image", exact=True)
    kind.select_option("7"); agrees(canvas, decode(7, 0, added))
    image.select_option("4"); agrees(canvas, decode(7, 3, added))
    assert f"number {int(ps.index[ps.y == 7][3])} of" in page.locator(".capsule-caption").inner_text()
    page.get_by_role("button", name="Reset").click()
    page.wait_for_function("[...document.querySelectorAll('.capsule-rows .noUi-handle')].every(h => h.getAttribute('aria-valuetext') === '0.00')")
    agrees(canvas, decode(7, 3, [0.]*16))

def test_widget_names_and_hints(mnist, widget_page, serve, open_page):
    hints = explorer_state(*mnist[:2])["hints"]
    page = open_page(serve(widget_page)+"explore.html")
    _, handles = shown(page)
    for kind in (0, 7):
        page.get_by_label("class", exact=True).select_option(str(kind))
        for d, s in enumerate(handles): assert s.get_attribute("aria-label") == f"dimension {d}, {hints[kind][d]}"
        assert page.locator(".capsule-row .widget-label:not(:first-child), .capsule-row > .widget-label").all_inner_texts()[-16:] == hints[kind]

@pytest.mark.parametrize("width", [390, 1280])
def test_widget_fits(widget_page, serve, open_page, width):
    "Sliders, values and hints stay within the screen"
    page = open_page(serve(widget_page)+"explore.html", width=width)
    canvas, handles = shown(page)
    for box in [canvas.bounding_box(), *(o.bounding_box() for o in page.locator(".capsule-explorer .widget-readout, .capsule-row > .widget-label").all())]:
        assert box["width"] > 0 and box["x"] >= 0 and box["x"]+box["width"] <= width
    assert len(handles) == 16
