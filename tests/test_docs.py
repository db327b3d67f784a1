"The site's settings, its sidebar, and the processing of its pages."
import importlib.util,json,re,shutil,subprocess,sys
from configparser import ConfigParser
from pathlib import Path
import nbformat,pytest,yaml
from fastcore.docments import DocmentText
from nbdev.doclinks import NbdevLookup

top = Path(__file__).resolve().parent.parent
notebooks = sorted((top/'nbs').glob('*.ipynb'))
cfg = ConfigParser(delimiters=['=']); cfg.read(top/'settings.ini'); cfg = cfg['DEFAULT']
site = yaml.safe_load((top/'_quarto.yml').read_text())

def entries(contents):
    for o in contents: yield from [o] if isinstance(o, str) else entries(o['contents'])

def test_sidebar_names_each_notebook_once():
    names = list(entries(site['website']['sidebar']['contents']))
    assert sorted(names)==[p.name for p in notebooks]
    assert names[:2]==['index.ipynb', '12b_draw.ipynb']
    lesson = next(o['contents'] for o in site['website']['sidebar']['contents'] if isinstance(o, dict) and o['section']=='The lesson')
    assert len(lesson)==8 and lesson==sorted(lesson)

def test_settings_that_the_pages_need():
    html = site['format']['html']
    assert html['html-math-method']=='katex' # its object form breaks pages with widgets
    assert html['keep-md'] is True and site['format']['commonmark']=={'variant':'+tex_math_dollars'}
    assert (top/'nbs/_quarto.yml').is_symlink() and (top/'nbs/_quarto.yml').resolve()==top/'_quarto.yml'
    scss = (top/'nbs/custom.scss').read_text()
    assert '$web-font-path: false' in scss
    assert site['metadata-files']==['nbdev.yml'] and cfg['custom_sidebar']=='True'

spec = importlib.util.spec_from_file_location('docs', top/'.ci/docs.py')
docs = importlib.util.module_from_spec(spec); spec.loader.exec_module(docs)

def test_a_link_is_not_linked_once_more():
    "nbdev links names of the API; one that is a link's text already stays what it is"
    line = docs.link_line(NbdevLookup(), 'See `squash`, [`squash`](x.html) and [the `squash`](00_squash.ipynb).')
    assert line.count('[`squash`](https:')==1 and '[`squash`](x.html) and [the `squash`](00_squash.ipynb).' in line

def test_fields_are_documented(monkeypatch):
    "A class without its own `__init__` shows its fields, with types and comments"
    from capsule_routing.routing import RoutingTrace
    from capsule_routing.callbacks import Callback
    monkeypatch.setattr(DocmentText, 'params', property(docs.fields)); monkeypatch.setattr(DocmentText, '__str__', docs.declared)
    said = str(DocmentText(RoutingTrace, docstring=False))
    assert said.startswith('class RoutingTrace(') and 'c:Tensor, # Coupling coefficients' in said and 'args' not in said
    assert str(DocmentText(Callback, docstring=False))=='class Callback():'

def test_every_link_derives_from_user():
    "The address of the repository and of the site stand in settings.ini alone"
    assert f"/{cfg['user']}/" in cfg['git_url'] and cfg['user'] in cfg['doc_host']
    raw = (top/'settings.ini').read_text()
    assert len([o for o in raw.splitlines() if not o.startswith('#') and re.search(rf"\b{cfg['user']}\b", o)])==1
    texts = {p.name:p.read_text(encoding='utf-8') for p in [top/'_quarto.yml', *(top/'.github').rglob('*.yaml')]}
    # Colab's cell needs the address: .ci/colab.py writes it
    texts |= {p.name:'\n'.join(c.source for c in nbformat.read(p, 4).cells if c.id!='colab') for p in notebooks}
    assert not [k for k,v in texts.items() if re.search(rf"\b{cfg['user']}\b", v)]

def test_every_notebook_has_its_cell_for_colab():
    res = subprocess.run([sys.executable, '.ci/colab.py', '--check'], cwd=top, capture_output=True, text=True)
    assert res.returncode==0, res.stdout+res.stderr

def test_workflows_use_the_pins():
    for p in (top/'.github/workflows').glob('*.yaml'):
        steps = [s for j in yaml.safe_load(p.read_text())['jobs'].values() for s in j['steps']]
        runs = [s['run'] for s in steps if 'run' in s]
        assert "pip install -e '.[dev]'" in runs # the pins are dev_requirements
        assert not [o for o in runs if re.search(r'pip install(?! -e )', o)]
        assert not [s for s in steps if s.get('uses','').startswith('fastai/')]
        for f in re.findall(r'\.ci/\w+\.py\b', ' '.join(runs)): assert (top/f).exists()

@pytest.mark.parametrize('nb', notebooks, ids=lambda p: p.stem)
def test_notebook_is_a_page(nb):
    "Title cell, readable ids, small figures, no saved error"
    cells = nbformat.read(nb, 4).cells
    head = next(c for c in cells if c.cell_type=='markdown').source.splitlines()
    assert re.fullmatch('# .+', head[0]) and any(re.fullmatch('> .+', o) for o in head[1:3])
    ids = [c.id for c in cells]
    assert len(ids)==len(set(ids))
    assert not [i for i in ids if re.fullmatch('[0-9a-f]{8}', i)], 'ids stand in the exported module: name them'
    for c in cells:
        for o in c.get('outputs', []):
            assert o.output_type!='error', c.id
            png = o.get('data', {}).get('image/png', '')
            assert len(png)*3/4 <= 100_000, f'{c.id}: {len(png)*3//4} bytes'

@pytest.mark.slow
@pytest.mark.parametrize('dot', [False, True], ids=['plain','dot-folder'])
def test_pages_are_processed(tmp_path, dot):
    "Every notebook gets its page, in a dot-folder too, where nbdev alone writes none and says nothing"
    home = tmp_path/('.hidden' if dot else 'plain')/'checkout'
    home.mkdir(parents=True)
    for name in ('settings.ini','_quarto.yml'): shutil.copy(top/name, home)
    for name in ('.ci','capsule_routing'): shutil.copytree(top/name, home/name, ignore=shutil.ignore_patterns('__pycache__','run'))
    (home/'nbs').mkdir()
    (home/'nbs/_quarto.yml').symlink_to('../_quarto.yml')
    some = notebooks[:2] if dot else notebooks
    for p in [*some, *(top/'nbs'/o for o in ('custom.scss','site.js','favicon.svg'))]: shutil.copy(p, home/'nbs')
    res = subprocess.run([sys.executable, '.ci/docs.py', '--no-render'], cwd=home, capture_output=True, text=True)
    assert res.returncode==0, res.stdout+res.stderr
    assert f'{len(some)} pages in _proc' in res.stdout
    for p in some:
        page = json.loads((home/'_proc'/p.name).read_text())
        text = ''.join(''.join(c['source']) for c in page['cells'])
        assert len(page['cells'])>1 and 'nbdev_export' not in text, p.name
        assert not re.search(r'\[\[[^\]]*\]\([^)]*\)\]\(', text), f'{p.name}: a link within a link'
    assert cfg['user'] in (home/'_proc/nbdev.yml').read_text()
