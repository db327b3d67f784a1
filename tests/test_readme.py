"README.md says what nbs/index.ipynb says, and what it says holds."
import base64,hashlib,re,subprocess,sys
from configparser import ConfigParser
from pathlib import Path
import nbformat,pytest

top = Path(__file__).resolve().parent.parent
readme = (top/'README.md').read_text(encoding='utf-8')
index = nbformat.read(top/'nbs/index.ipynb', 4)
source = '\n'.join(c.source for c in index.cells)
ours = '.ci/readme.py' in readme.splitlines()[0] # else nbdev_readme, with Quarto, has written it

def commands(text): return re.findall(r'^(?:pip|nbdev_\w+|capsule_\w+|python) .*$', text, re.M)
def outputs(kind):
    return [''.join(o['data'][kind]) for c in index.cells if c.cell_type=='code' and not re.search(r'^#\| *hide', c.source, re.M)
            for o in c.outputs if kind in o.get('data', {})]

def test_commands_equal():
    assert commands(readme)==commands(source)
    assert "pip install -e '.[dev]' && nbdev_test && pytest" in commands(readme)
    assert [c for c in commands(readme) if c.startswith('pip install -e . && capsule_train ')]
    assert "pip install -e '.[dev]' && nbdev_test && pytest" in (top/'.ci/run').read_text()

def test_figures_equal():
    "Pictures byte for byte, and every number that a cell prints"
    links = re.findall(r'!\[[^]]*\]\(([^)]+\.png)\)', readme)
    figs = outputs('image/png')
    assert len(links)==len(figs)>0
    want = sorted(hashlib.sha256(base64.b64decode(f)).hexdigest() for f in figs)
    assert sorted(hashlib.sha256((top/o).read_bytes()).hexdigest() for o in links)==want
    assert all((top/o).stat().st_size<=100_000 for o in links)
    for md in outputs('text/markdown'):
        for number in re.findall(r'\d[\d.,]*%?', md): assert number in readme

@pytest.mark.skipif(not ours, reason='written with Quarto')
def test_regenerated_equals_committed():
    res = subprocess.run([sys.executable, '.ci/readme.py', '--check'], cwd=top, capture_output=True, text=True)
    assert res.returncode==0, res.stdout+res.stderr

def test_installs_from_a_checkout_only():
    installs = re.findall(r'(?:pip|uv pip|conda) install[^&\n`]*', readme)
    assert installs
    for o in installs: assert o.split('install')[1].strip().strip("'") in ('-e .', "-e '.[dev]"), o

def test_relative_links_exist():
    links = re.findall(r'\]\(([^)#\s]+)[^)]*\)', readme)
    assert [o for o in links if o.endswith('.ipynb')]
    for o in links:
        if not o.startswith('http'): assert (top/o).exists(), o

cfg = ConfigParser(delimiters=['='])
cfg.read(top/'settings.ini')
cfg = cfg['DEFAULT']

def test_links_within_the_project_are_relative():
    "An address of its own would be wrong until `user` in settings.ini is real, and in each fork"
    assert cfg['git_url'] not in readme and cfg['doc_host'] not in readme

def test_python_range_is_the_packages(): assert f"Python {cfg['min_python']}" in readme

def test_one_version():
    "Of settings.ini, where the package has it from, in the list of changes and in the citation"
    for f,line in (('CHANGELOG.md', f"## {cfg['version']}"), ('CITATION.cff', f"version: {cfg['version']}"), ('capsule_routing/__init__.py', f'__version__ = "{cfg["version"]}"')):
        assert line in (top/f).read_text(encoding='utf-8').splitlines(), f
