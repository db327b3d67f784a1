"The drawing page in a real browser, served over http with nothing else to reach: against torch, by mouse, touch and keyboard, on a phone."
import json, os, platform, statistics
from pathlib import Path
import pytest
import torch
from capsule_routing.data import DataUnavailable, load_data
from capsule_routing.draw import DrawHere, Live, SlidersHere, draw_page, rounded, write_site
from capsule_routing.pretrained import pretrained_net

pytestmark = pytest.mark.browser
top = Path(__file__).resolve().parent.parent
ELEMENT = "document.querySelector('capsule-draw')"
RESULT = top/"capsule_routing/results/draw-browser.json"

def html(title, body):
    return (f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
            f'content="light dark"><title>{title}</title><style>body {{ max-width: 60rem; margin: 0 auto; padding: 1rem; font-family: sans-serif }}</style></head>'
            f'<body><main><h1>{title}</h1>{body}</main></body></html>')

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "The site's files, and a page for each element as the site has them"
    home = tmp_path_factory.mktemp("site")
    write_site(home/"capsnet")
    Live.building = True
    try:
        for name, cls in (("draw", DrawHere), ("sliders", SlidersHere)):
            body = cls()._repr_mimebundle_()["text/markdown"].removeprefix("```{=html}").removesuffix("```")
            (home/f"{name}.html").write_text(html(name, body), encoding="utf-8")
    finally: Live.building = False
    return home

@pytest.fixture(scope="module")
def nets(): return pretrained_net(), rounded(pretrained_net())

@pytest.fixture(scope="module")
def test_images():
    try: return load_data("mnist", progress=False).test
    except (DataUnavailable, OSError) as e: pytest.skip(f"MNIST is not at hand: {e}")

def opened(open_page, serve, folder, **kw):
    page = open_page(serve(folder)+"draw.html", **kw)
    page.wait_for_function(ELEMENT+".capsules")
    return page

def looked(page, times):
    page.wait_for_function(f"{ELEMENT}.capsules.state.times.length >= {times}")
    page.wait_for_timeout(100)
    return page.evaluate(f"(() => {{ const s = {ELEMENT}.capsules.state; return {{lengths: s.result && [...s.result.steps[s.iterations-1].lengths], picture: [...s.picture], times: s.times}} }})()")

LOOK = f"""async pictures => {{ const {{ask, load}} = {ELEMENT}.capsules; await load(); const out = [];
  for (const p of pictures) {{ const began = performance.now(), r = await ask({{look: Uint8Array.from(p), iterations: 3}}); out.push({{lengths: [...r.steps[2].lengths], c: r.steps.map(s => [...s.c]), ms: performance.now() - began}}) }}
  return out }}"""
ONLY_LENGTHS = LOOK.replace("c: r.steps.map(s => [...s.c])", "c: []")

def test_computes_what_torch_computes(open_page, serve, folder, nets, test_images):
    "200 test images: lengths to 2e-3 and couplings of each iteration to 1e-3 against torch with the same weights; against those before rounding to 0.03, and the same classes"
    page, (net, less) = opened(open_page, serve, folder), nets
    x = test_images.x[:200]
    with torch.no_grad(): want, exact = less(x.float()/255).lengths, net(x.float()/255).lengths
    got = page.evaluate(ONLY_LENGTHS, x.flatten(1).tolist())
    lengths = torch.tensor([o["lengths"] for o in got])
    assert (lengths-want).abs().max() < 2e-3 and (lengths-exact).abs().max() < 0.03
    assert (lengths.argmax(1) == exact.argmax(1)).all()
    for k in range(0, 200, 20):
        o = page.evaluate(LOOK, x[k:k+1].flatten(1).tolist())[0]
        c = less.trace(x[k:k+1].float()/255)[1].c.flatten(1)
        assert (torch.tensor(o["c"])-c).abs().max() < 1e-3

def test_stored_answer_before_the_weights(open_page, serve, folder):
    "What stands there before a touch is what the network says, and nothing large was fetched for it"
    asked = []
    page = opened(open_page, serve, folder)
    page.on("request", lambda r: asked.append(r.url))
    assert "This is 5." in page.locator("#says").inner_text()
    stored = page.evaluate(f"[...{ELEMENT}.capsules.state.result.steps[2].lengths]")
    page.locator("#primary").focus(); page.keyboard.press("ArrowRight")
    assert page.locator("#where").inner_text() == "Row 3, column 4"
    page.locator("#back").click(); assert page.locator("#step").inner_text() == "iteration 2 of 3"
    assert not [u for u in asked if ".bin" in u]
    picture = page.evaluate(f"[...{ELEMENT}.capsules.state.picture]")
    got = page.evaluate(ONLY_LENGTHS, [picture])[0]["lengths"]
    assert max(abs(a-b) for a, b in zip(got, stored)) < 2e-3
    assert len([u for u in asked if ".bin" in u]) == 2

def line(page, points, press, move, lift):
    box = page.locator("#pad").bounding_box()
    at = [(box["x"]+x*box["width"], box["y"]+y*box["height"]) for x, y in points]
    press(*at[0])
    for a, b in zip(at, at[1:]):
        for k in range(1, 9): move(a[0]+(b[0]-a[0])*k/8, a[1]+(b[1]-a[1])*k/8)
    lift()

SEVEN = [(0.28, 0.2), (0.72, 0.18), (0.5, 0.85)]

def test_mouse(open_page, serve, folder):
    "A seven, undone, cleared; then another beside it is undone alone"
    page = opened(open_page, serve, folder)
    page.locator("#clear").click()
    assert page.locator("#says").inner_text() == "Draw a digit." and page.locator("#clear").is_disabled()
    def move(x, y): page.mouse.move(x, y); page.wait_for_timeout(20)
    def press(x, y): page.mouse.move(x, y); page.mouse.down()
    line(page, SEVEN, press, move, page.mouse.up)
    page.wait_for_function(f"{ELEMENT}.capsules.state.times.length > 0")
    page.wait_for_function(f"{ELEMENT}.shadowRoot.getElementById('says').textContent === 'This is 7.'")
    got = looked(page, 1)
    assert got["lengths"].index(max(got["lengths"])) == 7 and max(got["lengths"]) > 0.5 and len(got["picture"]) == 784
    assert page.locator("#first-says").inner_text().startswith("from 7, length")
    page.locator("#undo").click()
    page.wait_for_function(f"{ELEMENT}.shadowRoot.getElementById('says').textContent === 'Draw a digit.'")

def test_touch(open_page, serve, folder):
    page = opened(open_page, serve, folder, width=390, height=844, has_touch=True, is_mobile=True)
    page.locator("#clear").tap()
    page.locator("#pad").scroll_into_view_if_needed()
    cdp = page.context.new_cdp_session(page)
    def touch(kind): return lambda x, y: cdp.send("Input.dispatchTouchEvent", dict(type=kind, touchPoints=[dict(x=x, y=y)]))
    line(page, SEVEN, touch("touchStart"), touch("touchMove"), lambda: cdp.send("Input.dispatchTouchEvent", dict(type="touchEnd", touchPoints=[])))
    page.wait_for_function(f"{ELEMENT}.shadowRoot.getElementById('says').textContent === 'This is 7.'")
    assert page.evaluate(f"{ELEMENT}.capsules.state.marks.length") == 1     # one stroke, and no scrolling taken for one

def test_keyboard_alone(open_page, serve, folder):
    "Tab to the canvas, type each digit: the network reads it; one over another, undo, clear; sliders and class by keys"
    page = opened(open_page, serve, folder)
    for _ in range(3):
        page.keyboard.press("Tab")
        if page.evaluate(f"{ELEMENT}.shadowRoot.activeElement?.id") == "pad": break
    assert page.evaluate(f"{ELEMENT}.shadowRoot.activeElement.id") == "pad"
    for k in range(10):
        page.keyboard.press(f"Digit{k}")
        page.wait_for_function(f"{ELEMENT}.shadowRoot.getElementById('says').textContent === 'This is {k}.'")
    nine = page.evaluate(f"{ELEMENT}.capsules.state.marks.length")
    page.keyboard.press("Shift+Digit1")
    assert page.evaluate(f"{ELEMENT}.capsules.state.marks.length") > nine
    page.keyboard.press("Control+z")
    assert page.evaluate(f"{ELEMENT}.capsules.state.marks.length") == nine
    page.wait_for_function(f"{ELEMENT}.shadowRoot.getElementById('says').textContent === 'This is 9.'")
    before = page.evaluate("c => c.toDataURL()", page.locator("#moved").element_handle())
    page.locator("#dim-0").focus(); page.keyboard.press("End")
    page.wait_for_function(f"{ELEMENT}.shadowRoot.getElementById('moved-says').textContent.startsWith('ink')")
    page.wait_for_function(f"before => {ELEMENT}.shadowRoot.getElementById('moved').toDataURL() !== before", arg=before)
    assert page.locator("#dim-0").get_attribute("aria-valuetext") == "+0.25"
    page.locator("#bars button").nth(3).focus(); page.keyboard.press("Enter")
    assert page.locator("#h-pose").inner_text() == "Sixteen numbers of your 3"
    page.locator("#pad").focus(); page.keyboard.press("Escape")
    page.wait_for_function(f"{ELEMENT}.shadowRoot.getElementById('says').textContent === 'Draw a digit.'")

def test_iterations(open_page, serve, folder):
    "The stepper shows each iteration; the switch shows what a network with so many would say"
    page = opened(open_page, serve, folder)
    assert page.locator("#on").is_disabled()
    page.locator("#play").click()
    page.wait_for_function(f"{ELEMENT}.capsules.state.step === 1")
    assert "extremes are 0.100 and 0.100" in page.locator("#range").inner_text()
    page.wait_for_function(f"{ELEMENT}.capsules.state.step === 3")
    page.get_by_label("5", exact=True).check()
    assert page.locator("#step").inner_text() == "iteration 5 of 5"
    five = page.evaluate(f"[...{ELEMENT}.capsules.state.result.steps[4].lengths]")
    bars = page.locator("#bars small").all_inner_texts()
    assert bars == [f"{v:.2f}" for v in five]

def test_no_class_is_there(open_page, serve, folder):
    page = opened(open_page, serve, folder)
    dots = [[[0.1, 0.1]], [[0.9, 0.9]], [[0.9, 0.1]], [[0.1, 0.9]]]
    page.locator("#clear").click()
    box = page.locator("#pad").bounding_box()
    for ((x, y),) in dots: page.mouse.click(box["x"]+x*box["width"], box["y"]+y*box["height"])
    page.wait_for_function(f"{ELEMENT}.capsules.state.marks.length === 4 && !{ELEMENT}.shadowRoot.getElementById('says').textContent.startsWith('Draw')")
    page.wait_for_timeout(1000)
    lengths = page.evaluate(f"[...{ELEMENT}.capsules.state.result.steps[2].lengths]")
    says = page.locator("#says").inner_text()
    assert (says == "No class is there.") == (max(lengths) < 0.5)

def test_photograph(open_page, serve, folder):
    "Dark on light and light on dark, a clean picture: the same digit"
    import io
    from PIL import Image
    from capsule_routing.strokes import digit_strokes, stroke_ink
    page, ink = opened(open_page, serve, folder), stroke_ink(digit_strokes("3"), 200)
    for n, x in enumerate((0.9-0.8*ink, 0.1+0.8*ink)):
        b = io.BytesIO(); Image.fromarray((255*x).byte().numpy()).save(b, "png")
        page.locator("#photo").set_input_files(dict(name="a.png", mimeType="image/png", buffer=b.getvalue()))
        got = looked(page, n+1)
        assert got["lengths"].index(max(got["lengths"])) == 3 and max(got["lengths"]) > 0.8

@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_fits(open_page, serve, folder, width, dark):
    page = opened(open_page, serve, folder, width=width, height=844, dark=dark)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#pad").bounding_box()["width"] >= 280
    if width > 1000: assert page.locator("#bars").bounding_box()["y"] < 600

def test_page_from_disk_and_memory(open_page, tmp_path):
    "One file, opened from disk, needs nothing; the browser holds less than 200 MB for it"
    (tmp_path/"page.html").write_text(draw_page(), encoding="utf-8")
    page = open_page((tmp_path/"page.html").as_uri())
    page.locator("#first-says").filter(has_text="from 5").wait_for()      # the page's own first lines forbid `eval`, and with it Playwright's waiting for a function
    assert page.locator("#says").inner_text() == "This is 5."
    cdp = page.context.new_cdp_session(page)
    heap = cdp.send("Runtime.getHeapUsage")
    assert heap["usedSize"]+heap.get("backingStorageSize", 0) < 200e6

def test_light_sliders(open_page, serve, folder, nets):
    "A picture and sixteen sliders before any script's file; the first touch brings the decoder; nothing moves on the page"
    from test_browser_explore import agrees
    from capsule_routing.decoder import mask_capsules
    from capsule_routing.pretrained import pretrained_poses
    page = open_page(serve(folder)+"sliders.html")
    shift = "new Promise(yes => { let sum = 0; new PerformanceObserver(l => { for (const e of l.getEntries()) sum += e.value }).observe({type: 'layout-shift', buffered: true}); setTimeout(() => yes(sum), 300) })"
    sliders, canvas = page.get_by_role("slider").all(), page.locator("#picture")
    assert len(sliders) == 16
    added = [0.]*16
    for d in (0, 5, 15):
        sliders[d].focus(); page.keyboard.press("ArrowRight"); page.keyboard.press("ArrowRight"); added[d] = 0.1
    page.wait_for_function("document.querySelector('capsule-sliders').dataset.ready && document.querySelector('capsule-sliders').shadowRoot.getElementById('said').textContent.startsWith('ink')")
    page.wait_for_timeout(200)
    ps = pretrained_poses(); k = int((ps.y == 7).nonzero()[0])
    p = ps.poses[k][None].clone(); p[0, 7] += torch.tensor(added)
    with torch.no_grad(): agrees(canvas, nets[1].decoder(mask_capsules(p, torch.tensor([7])))[0])
    assert sliders[5].get_attribute("aria-valuetext") == "+0.10"
    assert page.evaluate(shift) < 0.05
    page.get_by_label("class").select_option("3"); page.get_by_role("button", name="Reset").click()
    page.wait_for_function("document.querySelector('capsule-sliders').shadowRoot.getElementById('said').textContent === 'class 3, image 1'")

def test_sliders_without_javascript(chromium, serve, folder):
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page(); page.goto(serve(folder)+"sliders.html")
    assert page.locator(".frame").bounding_box()["width"] >= 140 and page.get_by_role("slider").count() == 16
    context.close()

@pytest.mark.skipif(os.environ.get("CAPSULE_ROUTING_EXHAUSTIVE") != "1", reason="ten minutes; CAPSULE_ROUTING_EXHAUSTIVE=1 runs it and writes its result")
def test_all_test_images(open_page, serve, folder, nets, test_images, chromium):
    "All 10,000 test images: the class differs from torch's before rounding in at most two"
    page, (net, less) = opened(open_page, serve, folder), nets
    page.evaluate(ONLY_LENGTHS, test_images.x[:5].flatten(1).tolist())
    gap = rough = differ = wrong = 0; ms = []
    for k in range(0, len(test_images.x), 250):
        x = test_images.x[k:k+250]
        got = page.evaluate(ONLY_LENGTHS, x.flatten(1).tolist())
        ours = torch.tensor([o["lengths"] for o in got]); ms += [o["ms"] for o in got]
        with torch.no_grad(): exact = net(x.float()/255).lengths
        if k < 1000:
            with torch.no_grad(): gap = max(gap, (ours-less(x.float()/255).lengths).abs().max().item())
        rough = max(rough, (ours-exact).abs().max().item())
        differ += int((ours.argmax(1) != exact.argmax(1)).sum()); wrong += int((ours.argmax(1) != test_images.y[k:k+250]).sum())
    page.locator("#pad").focus(); page.evaluate(f"{ELEMENT}.capsules.state.times.length = 0")
    for k in range(30): page.keyboard.press(f"Digit{k % 10}"); page.wait_for_timeout(400)
    times = page.evaluate(f"{ELEMENT}.capsules.state.times")
    from capsule_routing.machine import device_name
    RESULT.write_text(json.dumps(dict(
        command="CAPSULE_ROUTING_EXHAUSTIVE=1 pytest -n 0 -m browser tests/test_browser_draw.py -k all_test_images", dataset="mnist", n=len(test_images.x),
        differ=differ, n_errors=wrong, lengths=gap, lengths_unrounded=rough, look_ms=statistics.median(ms), stroke_ms=statistics.median(times), strokes=len(times),
        device=device_name(torch.device("cpu")), browser=f"Chromium {chromium.version}", versions=dict(torch=torch.__version__, python=platform.python_version())), indent=1)+"\n")
    assert differ <= 2 and gap < 2e-3
