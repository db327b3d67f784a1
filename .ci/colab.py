"""Give each notebook two cells that are alike everywhere; with `--check`, exit 1 unless each has them.

The first fetches the package in Colab, from the address in settings.ini; the last exports the modules, where nbdev is installed."""
import sys
from configparser import ConfigParser
from pathlib import Path
import nbformat

top = Path(__file__).resolve().parent.parent

LAST = '''#| hide
# Export the modules, where nbdev is installed.
from importlib.util import find_spec
if find_spec('nbdev'):
    import nbdev
    nbdev.nbdev_export()'''

def first(cfg):
    "The cell for Colab. While the owner is a placeholder nothing is fetched: the name may be somebody's"
    if cfg['user']=='OWNER': get = ("raise SystemExit('capsule_routing has no public address yet: install its wheel here "
                                    "with %pip, then run this cell again')")
    else: get = f"%pip install -q git+{cfg['git_url']}"
    return f'''#| hide
# Colab: fetch the package. Elsewhere this cell does nothing.
import sys
from importlib.util import find_spec
if 'google.colab' in sys.modules and find_spec('capsule_routing') is None:
    {get}'''

def settings():
    cfg = ConfigParser(delimiters=['='])
    cfg.read(top/'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']

def update(path, check):
    "Is `path` as it should be? If not, and unless `check`, write it: the cell for Colab stands below the title"
    nb = nbformat.read(path, 4)
    was = [(c.id,c.source) for c in nb.cells]
    cells = [c for c in nb.cells if c.id!='colab']
    title = next(i for i,c in enumerate(cells) if c.cell_type=='markdown')
    cells.insert(title+1, nbformat.v4.new_code_cell(first(settings()), id='colab'))
    if 'nbdev_export()' in cells[-1].source: cells[-1].source = LAST
    ok = was==[(c.id,c.source) for c in cells]
    if not ok and not check:
        nb.cells = cells
        nbformat.write(nb, path)
    return ok

def main(check):
    bad = [p.name for p in sorted((top/'nbs').glob('*.ipynb')) if not update(p, check)]
    if check: sys.exit(f"no cell for Colab, or an old one, or an old last one: {', '.join(bad)}; run python .ci/colab.py") if bad else print('each notebook can be opened in Colab')
    else: print(f"written: {', '.join(bad) or 'nothing to do'}")

if __name__=='__main__': main('--check' in sys.argv[1:])
