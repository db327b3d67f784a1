"The step after rendering, on small pages: no Quarto, no npm, no browser."
import importlib.util,io,json,subprocess,sys,tarfile
from pathlib import Path
import pytest

top = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location('postrender', top/'.ci/postrender.py')
pr = importlib.util.module_from_spec(spec); spec.loader.exec_module(pr)

@pytest.mark.parametrize('url,name', [
    ('https://cdnjs.cloudflare.com/ajax/libs/require.js/2.3.6/require.min.js', 'require.js'),
    ('https://cdn.jsdelivr.net/npm/requirejs@2.3.6/require.min.js', 'require.js'),
    ('https://cdnjs.cloudflare.com/ajax/libs/jquery/3.5.1/jquery.min.js', 'jquery.js'),
    ('https://code.jquery.com/jquery-3.7.1.slim.min.js', 'jquery.js'),
    ('https://unpkg.com/@jupyter-widgets/html-manager@*/dist/embed-amd.js', 'embed-amd.js'),
    ('https://cdn.jsdelivr.net/npm/@jupyter-widgets/html-manager@1.0.15/dist/embed-amd.js', 'embed-amd.js'),
    ('//cdn.jsdelivr.net/npm/katex@latest/dist/katex.min.js', 'katex.js')])
def test_known_scripts_are_taken_from_the_site(url, name):
    html = f'<head>\n<script src="{url}" integrity="sha512-a+b/c==" crossorigin="anonymous" data-relocate-top="true"></script>\n</head>'
    new,used = pr.localise(html, '..')
    assert used=={name} and f'src="../site_libs/web/{name}"' in new
    assert 'integrity' not in new and 'crossorigin' not in new and 'data-relocate-top="true"' in new
    assert ("requirejs.config({paths: {anywidget: '../site_libs/web/anywidget'}})" in new)==(name=='require.js')
    assert new.count('</script>')==1+(name=='require.js') and pr.localise(new, '..')==(new,set())

def test_katex_style_and_the_polyfill():
    new,used = pr.localise('<link rel="stylesheet" href="https://cdn.jsdelivr.net/npm/katex@0.16/dist/katex.min.css">'
                           '<script src="https://cdnjs.cloudflare.com/polyfill/v3/polyfill.min.js?features=es6"></script><p>kept</p>')
    assert new=='<link rel="stylesheet" href="./site_libs/web/katex.css"><p>kept</p>' and used=={'katex.css'}

def test_own_links_become_relative():
    html = '''<a class="x" href="https://me.github.io/pkg/runs.html#load_run">a</a><a href='https://me.github.io/pkg/'>b</a>
<a href="https://me.github.io/pkgs/">other</a><link rel="canonical" href="https://me.github.io/pkg/runs.html">'''
    new,_ = pr.localise(html, '.', 'https://me.github.io/pkg')
    assert 'href="./runs.html#load_run"' in new and "href='./'" in new
    assert pr.localise('<p><a href="https://me.github.io/pkg/runs.html#_open"><code>_open</code></a> <a href="#_x">y</a>', '.', 'https://me.github.io/pkg')[0]=='<p><code>_open</code> <a href="#_x">y</a>'
    assert pr.localise('<pre># A [`Run`](https://me.github.io/pkg/runs.html#run) or</pre>', '.', 'https://me.github.io/pkg')[0]=='<pre># A `Run` or</pre>'
    assert 'https://me.github.io/pkgs/' in new and '"canonical" href="https://me.github.io/pkg/runs.html"' in new

@pytest.mark.parametrize('html', ['<script src="https://a.org/x.js"></script>', '<script defer src=//a.org/x.js></script>',
    '<link rel="stylesheet" href="http://a.org/x.css">', '<link rel="preload icon" href="https://a.org/i">', '<img alt="" src="https://a.org/i.png">',
    '<img src="a.png" srcset="a.png 1x, https://a.org/b.png 2x">', '<iframe src="https://a.org"></iframe>', '<video><source src="https://a.org/v"></video>',
    '<p style="background: url(https://a.org/i.png)">', '<style>@import "https://a.org/x.css";</style>', "<style>p {background: url('//a.org/x')}</style>"])
def test_what_is_left_is_found(tmp_path, html):
    (tmp_path/'deep').mkdir()
    (tmp_path/'deep/page.html').write_text(html)
    assert len(pr.leaks(tmp_path))==1 and pr.leaks(tmp_path)[0].startswith('deep/page.html: ')

def test_links_are_no_loads(tmp_path):
    (tmp_path/'page.html').write_text('''<a href="https://a.org">a</a><link rel="canonical" href="https://a.org"><meta property="og:url" content="https://a.org">
<script>var u = "https://a.org/x.js"</script><img src="data:image/png;base64,AA"><script type="application/json">{"u": "<img src='https://a.org/i'>"}</script>''')
    (tmp_path/'x.css').write_text('a {background: url("data:image/svg+xml,<svg xmlns=\'http://www.w3.org/2000/svg\'/>")}')
    assert pr.leaks(tmp_path)==[]

def test_style_sheets_are_read(tmp_path):
    (tmp_path/'x.css').write_text('@import url("https://fonts.googleapis.com/css2?family=Lato"); b {background: url(//a.org/i.png)} i {background: url(i.png)}')
    assert len(pr.leaks(tmp_path))==2

def test_a_leak_fails_the_build(tmp_path):
    (tmp_path/'page.html').write_text('<script src="https://a.org/new-thing.js"></script>')
    res = subprocess.run([sys.executable, top/'.ci/postrender.py', tmp_path], capture_output=True, text=True)
    assert res.returncode==1 and 'page.html: https://a.org/new-thing.js' in res.stderr

def test_the_packages_are_compared_with_the_lock(tmp_path, monkeypatch):
    def pack(args, cwd, **kw):
        with tarfile.open(Path(cwd)/'some-one.tgz', 'w:gz') as t:
            info = tarfile.TarInfo('package/a/b.js'); info.size = 2
            t.addfile(info, io.BytesIO(b'ok'))
        return subprocess.CompletedProcess(args, 0, json.dumps([{'filename':'@some/one.tgz'}]))
    monkeypatch.setattr(pr.shutil, 'which', lambda name: name)  # no npm is needed here
    monkeypatch.setattr(pr.subprocess, 'run', pack)
    with pytest.raises(SystemExit, match='some 1: not the package that .ci/web.json names'): pr.unpack('some', '1', 'sha512-AAAA', tmp_path)
    want = 'sha512-'+pr.base64.b64encode(pr.hashlib.sha512((tmp_path/'some-one.tgz').read_bytes()).digest()).decode()
    monkeypatch.setattr(pr.subprocess, 'run', lambda args, **kw: subprocess.CompletedProcess(args, 0, json.dumps([{'filename':'some-one.tgz'}])))
    assert pr.unpack('some', '1', want, tmp_path)=={'a/b.js':b'ok'}

def test_the_lock_names_exact_versions():
    lock = json.loads((top/'.ci/web.json').read_text())
    assert {'requirejs','jquery','@jupyter-widgets/html-manager','katex','axe-core'}==set(lock)
    assert [k for k,v in lock.items() if v.get('test')]==['axe-core'] # a tool of the tests, no part of the site
    for v in lock.values(): assert v['version'].replace('.','').isdigit() and v['integrity'].startswith('sha512-')

def test_anywidget_comes_from_the_wheel(): assert b'define' in pr.anywidget()

def test_every_notebook_opens_in_colab():
    for nb in (top/'nbs').glob('*.ipynb'):
        page = Path('out')/(nb.stem.split('_',1)[1] if nb.stem[0].isdigit() else nb.stem)
        assert pr.notebook(page.with_suffix('.html'))==nb
    assert pr.notebook(Path('404.html')) is None
    html = pr.open_in('<main><header id="title-block-header" class="a"><h1>T</h1></header><p></p><header></header>', '01_x.ipynb', 'https://github.com/me/pkg', 'main')
    assert 'href="https://colab.research.google.com/github/me/pkg/blob/main/nbs/01_x.ipynb">Open in Colab</a>' in html
    assert html.count('open-in')==1 and html.index('open-in') < html.index('</header>')

def test_api_is_linked_to_the_paper():
    block = """<p><a href="https://h/x.py#L1" style="float:right; font-size:smaller">source</a></p>
<section id="{0}"><h3>{0}</h3><div><pre>def {0}(<span>s</span>) # {1}</pre></div><p><em>{2}</em></p><div class="cell"><pre># Eq. 9</pre></div></section>"""
    html = '<section>' + block.format('a','`v` of <b>Eq. 1</b>','') + block.format('b','none','The loss (section 4.1).').replace('source</a></p>','source</a></p>\n</section>\n</section>') + block.format('c','none','Ours alone.')
    new = pr.cite(html)
    assert pr.re.findall(r'>source</a>(?:<a href="https://arxiv.org/abs/1710.09829"[^>]*>(.*?)</a>)?', new)==['paper, Eq. 1','paper, section 4.1','']

def test_a_page_can_be_skipped_into():
    html = '<html><body class="nav-fixed"><header></header><main id="quarto-document-content"></main></body></html>'
    assert '<body class="nav-fixed">\n<a class="skip-link" href="#quarto-document-content">' in pr.skippable(html)

def test_files_beside_the_notebooks_lie_in_the_repository():
    html = '<a class="x" href="../CONTRIBUTING.md">how</a><a href="../LICENSE">l</a><a href="../x.html">x</a>'
    new = pr.files_of(html, 'https://github.com/me/pkg', 'main')
    assert 'href="https://github.com/me/pkg/blob/main/CONTRIBUTING.md"' in new and 'main/LICENSE"' in new and 'href="../x.html"' in new
