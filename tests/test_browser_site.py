"The site in a real browser, with nothing to reach but itself; and, where it was not built, what the notebooks alone can show."
import base64, gzip, importlib.util, os, re, shutil, struct
from configparser import ConfigParser
from pathlib import Path
from urllib.parse import unquote, urldefrag
import nbformat, pytest
from browser import missing

top = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("postrender", top/".ci/postrender.py")
postrender = importlib.util.module_from_spec(spec); spec.loader.exec_module(postrender)
notebooks = sorted((top/"nbs").glob("*.ipynb"))
def page_name(nb): return re.sub(r"^\d+[a-zA-Z0-9]*_", "", nb.stem).lower()+".html"
pages = [page_name(p) for p in notebooks]

@pytest.fixture(scope="session")
def site():
    "The folder of the site: `CAPSULE_ROUTING_SITE`, or `_docs` if Quarto made it from these notebooks"
    home = Path(os.environ.get("CAPSULE_ROUTING_SITE") or top/"_docs")
    if not (home/"site_libs").is_dir(): why = f"{home} is no site rendered by Quarto; python .ci/docs.py makes one"
    elif home == top/"_docs" and max(p.stat().st_mtime for p in notebooks) > (home/"index.html").stat().st_mtime: why = "_docs is older than the notebooks"
    else: return home
    if shutil.which("quarto"): missing(why)   # skips, or fails in CI
    pytest.skip(why)


# The notebooks alone

zoom = float(re.search(r"img \{ zoom: ([\d.]+)", (top/"nbs/custom.scss").read_text())[1])   # the style sheet enlarges figures

def figures(nb):
    "Cells of `nb` that show a picture on the site, with its bytes and saved size"
    for c in nbformat.read(nb, 4).cells:
        if c.cell_type != "code" or re.search(r"^#\| *(hide$|exec_doc$|include: *false)", c.source, re.M): continue   # an `exec_doc` cell is live on the site
        for o in c.outputs:
            png = o.get("data", {}).get("image/png")
            if png: yield c, base64.b64decode(png), o.get("metadata", {}).get("image/png", {})

@pytest.mark.parametrize("nb", notebooks, ids=lambda p: p.stem)
def test_figures_have_alt_texts_and_are_sharp(nb):
    "An alt text says what is to be seen, and two pixels or more lie under each of the page's"
    for c, png, size in figures(nb):
        alt = re.search(r'^#\| *fig-alt: *"(.{15,})"$', c.source, re.M)
        assert alt, f"{nb.stem}, cell {c.id}: no fig-alt"
        wide = struct.unpack(">I", png[16:20])[0]
        drawn = re.search(r"\bwidth=(\d+)", c.source)
        shown = size.get("width") or (int(drawn[1]) if drawn else wide)
        assert wide >= 1.5*min(shown*zoom, 860), f"{nb.stem}, cell {c.id}: {wide} pixels shown {shown} wide"


# The files of the site

def local(site, page, url):
    "The file that `url` on `page` names, and its place, or None for another host's"
    if postrender.foreign(url) or re.match(r"(data|mailto|javascript|blob|about):", url): return None
    path, place = urldefrag(unquote(url))
    path = path.split("?")[0]
    p = (site/page).parent/path if path else site/page
    return (p/"index.html" if p.is_dir() else p), place

@pytest.fixture(scope="session")
def parsed(site): return {p.relative_to(site).as_posix(): postrender.Loads(p.read_text(encoding="utf-8")) for p in site.rglob("*.html")}

def test_every_notebook_has_its_page(site, parsed): assert set(pages) <= set(parsed)

def test_links_lead_somewhere(site, parsed):
    broken = []
    for page, html in parsed.items():
        for url in html.links+html.urls:
            if not (got := local(site, page, url)): continue
            p, place = got
            name = Path(os.path.relpath(p, site)).as_posix()
            if not p.is_file() or name.startswith("..") or (place and name in parsed and place not in parsed[name].ids): broken.append(f"{page}: {url}")
    assert not broken, "\n".join(broken)

def test_nothing_foreign_is_loaded(site): assert postrender.leaks(site) == []

def own_host():
    cfg = ConfigParser(delimiters=["="]); cfg.read(top/"settings.ini", encoding="utf-8")
    return cfg["DEFAULT"]["doc_host"]+cfg["DEFAULT"]["doc_baseurl"], cfg["DEFAULT"]["git_url"]

def test_links_of_a_page(parsed):
    "Each opens in Colab; names of the API lead to their source; our own pages are linked by relative addresses"
    own, git = own_host()
    for nb, page in zip(notebooks, pages):
        links = parsed[page].links
        assert [u for u in links if u.startswith("https://colab.research.google.com/github/") and u.endswith(f"/nbs/{nb.name}")], page
        assert not [u for u in links if u.startswith(own)], page
        src = [u for u in links if re.match(re.escape(git)+r"/blob/\w+/capsule_routing/\w+\.py#L\d+$", u)]
        if re.search(r"^#\| *exports?\s*\n(?:.*\n)*?def [a-z]", "\n".join(c.source+"\n" for c in nbformat.read(nb, 4).cells if c.cell_type == "code"), re.M):
            assert src, f"{page}: no link to source"
    assert [u for p in pages for u in parsed[p].links if "arxiv.org/abs/1710.09829" in u]

@pytest.mark.parametrize("page", pages)
def test_weight(site, parsed, page):
    "The page and its figures: 1 MB, 6 with the explorer. So is all it asks for, scripts and fonts included, as hosts send it (text compressed)."
    live = "application/vnd.jupyter.widget-view+json" in (site/page).read_text(encoding="utf-8")
    own, sent = [site/page], {}
    for u in parsed[page].urls:
        if not (got := local(site, page, u)): continue
        if not got[0].relative_to(site).as_posix().startswith("site_libs/"): own.append(got[0])
        sent[got[0]] = 0
    for p in [*sent, site/page]:
        raw = p.read_bytes()
        sent[p] = len(gzip.compress(raw, 6)) if p.suffix in (".html", ".js", ".css", ".svg", ".json") else len(raw)
    limit = 6e6 if live else 1e6
    assert sum(p.stat().st_size for p in set(own)) <= limit
    assert sum(sent.values()) <= limit, sent


# In the browser

SEEN = """() => {
  const rgba = s => { const m = s.match(/[\\d.]+/g); return m ? m.map(Number) : [0,0,0,0] };
  const over = (a, b) => { const k = a[3] === undefined ? 1 : a[3]; return [0,1,2].map(i => a[i]*k + b[i]*(1-k)) };
  const lum = c => { const f = c.map(v => { v /= 255; return v <= .03928 ? v/12.92 : ((v+.055)/1.055)**2.4 }); return .2126*f[0]+.7152*f[1]+.0722*f[2] };
  const ground = e => { const stack = []; for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor); if (c[3] !== 0) { stack.push(c); if (c[3] === undefined || c[3] === 1) break } }
    return stack.reverse().reduce((b, c) => over(c, b), [255,255,255]) };
  const faint = [];
  for (const e of document.querySelectorAll('body *')) {
    const text = [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.data).join('').trim();
    if (!text || !e.checkVisibility({opacityProperty: true, visibilityProperty: true}) || e.closest('svg, script, style, .katex-mathml, .visually-hidden, option')) continue;
    const b = e.getBoundingClientRect(); if (b.width < 2 || b.height < 2) continue;
    const s = getComputedStyle(e), bg = ground(e); let c = rgba(s.color);
    let o = 1; for (let a = e; a; a = a.parentElement) o *= Number(getComputedStyle(a).opacity);
    c[3] = (c[3] === undefined ? 1 : c[3])*o; c = over(c, bg);
    const [hi, lo] = [lum(c), lum(bg)].sort((a, b) => b-a), ratio = (hi+.05)/(lo+.05), size = parseFloat(s.fontSize);
    if (ratio < (size >= 24 || size >= 18.6 && s.fontWeight >= 700 ? 3 : 4.5)) faint.push(`${ratio.toFixed(2)} ${e.tagName.toLowerCase()}.${e.className} "${text.slice(0, 40)}"`);
  }
  return [...new Set(faint)];
}"""
IMAGES = """() => [...document.querySelectorAll('main img')].map(i => [i.getAttribute('src').slice(0, 80), i.getAttribute('alt') || '', i.naturalWidth, i.getBoundingClientRect().width, i.complete])"""
SPILL = """() => { const w = innerWidth; if (document.documentElement.scrollWidth <= w) return [];
  return ['page is ' + document.documentElement.scrollWidth + ' wide', ...[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > w+1).slice(0, 5).map(e => e.tagName + '.' + e.className)] }"""

def to_dark(page):
    page.locator(".quarto-color-scheme-toggle:visible").first.click()
    page.wait_for_function("document.body.classList.contains('quarto-dark')")

@pytest.mark.parametrize("name", pages)
def test_page(site, serve, open_page, name):
    "Opens without an error; formulas are set; pictures have alt texts and are sharp; legible in light and dark; fits a desktop and a phone"
    page = open_page(serve(site)+name)
    assert page.locator("span.math").count() == page.locator("span.math .katex").count() and not page.locator(".katex-error").count()
    for src, alt, real, shown, loaded in page.evaluate(IMAGES):
        assert loaded and real, src
        assert len(alt) >= 15, f"{src}: no alt text"
        assert real >= 1.5*shown, f"{src}: {real} pixels shown {shown} wide"
    assert page.evaluate(SEEN) == []
    assert page.evaluate(SPILL) == []
    to_dark(page)
    assert page.evaluate(SEEN) == []
    page.set_viewport_size(dict(width=390, height=844))
    assert page.evaluate(SPILL) == []
    assert page.locator("main h1").is_visible()

@pytest.fixture(scope="session")
def axe(tmp_path_factory):
    "The script of axe-core, by the lock"
    import json
    if not shutil.which("npm"): missing("npm is not on PATH: it brings axe-core")
    lock = json.loads((top/".ci/web.json").read_text())["axe-core"]
    return postrender.unpack("axe-core", lock["version"], lock["integrity"], tmp_path_factory.mktemp("axe"))["axe.min.js"].decode()

AXE = """async () => (await axe.run({resultTypes: ['violations']})).violations.filter(v => ['serious', 'critical'].includes(v.impact))
  .flatMap(v => v.nodes.slice(0, 3).map(n => `${v.id}: ${n.html.slice(0, 160)}`))"""

@pytest.mark.parametrize("name", pages)
def test_axe_finds_nothing_serious(site, serve, open_page, axe, name):
    page = open_page(serve(site)+name)
    page.evaluate(axe)
    assert page.evaluate(AXE) == []

def test_search(site, serve, open_page):
    page = open_page(serve(site))
    page.locator("#quarto-search button, #quarto-search input").first.click()
    page.keyboard.type("squash")
    hit = page.locator(".aa-Panel a[href*='squash.html']").first
    hit.wait_for()
    hit.click()
    page.wait_for_url("**/squash.html*")
    assert page.title().startswith("Squash")

def test_dark_is_remembered(site, serve, open_page):
    page = open_page(serve(site)+"squash.html")
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    to_dark(page)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.goto(serve(site)+"routing.html")
    assert page.evaluate("document.body.classList.contains('quarto-dark')")

def test_story_in_the_sidebar(site, serve, open_page):
    page = open_page(serve(site)+"squash.html")
    heads = page.locator("#quarto-sidebar .sidebar-item-section > .sidebar-item-container .menu-text").all_inner_texts()
    assert heads[:2] == ["The lesson", "Play"] and "Under the hood" in heads
    names = page.locator("#quarto-sidebar .menu-text").all_inner_texts()
    assert names[0] == "capsule_routing" and names[2:4] == ["A capsule network in sixty lines", "The lesson"] and heads.index("Play") == 1   # the second is Draw

def test_code_is_folded_and_opened(site, serve, open_page):
    "Exported source and tests are folded by one switch, which is remembered; a link into a fold opens it; the first stop leads past the menus"
    page = open_page(serve(site)+"routing.html")
    boxes = page.locator("details.code-fold")
    assert boxes.count() > 8 and page.locator("details.code-fold[open]").count() == 0
    page.get_by_role("button", name="all", exact=True).click()
    assert page.locator("details.code-fold[open]").count() == boxes.count()
    page.goto(serve(site)+"squash.html")
    assert page.locator("details.code-fold[open]").count() == page.locator("details.code-fold").count() > 3
    page.get_by_role("button", name="folded", exact=True).click()
    page.keyboard.press("Home")
    page.reload()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip-link"
    assert page.locator(".page-navigation a").count() == 2

def test_without_scripts_all_code_is_open(site, serve, open_page):
    page = open_page(serve(site)+"routing.html", java_script_enabled=False)
    assert page.locator("details.code-fold[open]").count() == page.locator("details.code-fold").count() > 3

@pytest.mark.parametrize("name", ["squash.html", "routing.html", "losses.html"])
def test_equations_and_numbers_on_a_phone(site, serve, open_page, name):
    "The number of an equation does not lie over it"
    page = open_page(serve(site)+name, width=390)
    over = page.evaluate("""() => [...document.querySelectorAll('.katex-display .katex-tag')].filter(t => {
      const a = t.getBoundingClientRect(), last = t.previousElementSibling.getBoundingClientRect();
      return a.left < last.right }).length""")
    assert page.locator(".katex-display .katex-tag").count() and over == 0

def test_explorer_is_live(site, serve, open_page):
    "The picture follows sliders and class as torch draws it"
    from test_browser_explore import Torch, agrees, shown
    from capsule_routing.capsnet import CapsNet
    from capsule_routing.pretrained import pretrained_poses
    decode = Torch(CapsNet.from_pretrained("mnist"), pretrained_poses("mnist"))
    page = open_page(serve(site)+"explore.html")
    canvas, handles = shown(page)
    assert len(handles) == 16
    kind, added = int(page.get_by_label("class", exact=True).input_value() or 0), [0.]*16
    agrees(canvas, decode(kind, 0, added))
    for d in range(16):
        handles[d].focus(); page.keyboard.press("ArrowRight"); added[d] = 0.05
    agrees(canvas, decode(kind, 0, added))
    page.get_by_label("class", exact=True).select_option("3"); agrees(canvas, decode(3, 0, added))
    page.get_by_role("button", name="Reset").click()
    page.wait_for_function("[...document.querySelectorAll('.capsule-rows .noUi-handle')].every(h => h.getAttribute('aria-valuetext') === '0.00')")
    agrees(canvas, decode(3, 0, [0.]*16))

@pytest.mark.parametrize("width", [390, 1280])
def test_explorer_fits(site, serve, open_page, width):
    "Nothing covers anything: every slider, readout, text and choice has a place of its own inside the page"
    from test_browser_explore import shown
    page = open_page(serve(site)+"explore.html", width=width)
    shown(page)
    boxes = page.locator(".capsule-rows .widget-hslider, .capsule-view canvas, .capsule-left .widget-dropdown, .capsule-reset").all()
    at = [(b["x"], b["y"], b["x"]+b["width"], b["y"]+b["height"]) for b in (e.bounding_box() for e in boxes)]
    for a in at: assert a[0] >= 0 and a[2] <= width+1
    for i, a in enumerate(at):
        for b in at[:i]: assert a[0] >= b[2]-1 or b[0] >= a[2]-1 or a[1] >= b[3]-1 or b[1] >= a[3]-1, "one lies over another"
