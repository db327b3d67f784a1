"Give each notebook the cell that fetches the package in Colab, its address read from settings.ini; with `--check`, exit 1 unless each has it."
import sys
from configparser import ConfigParser
from pathlib import Path
import nbformat

top = Path(__file__).resolve().parent.parent

def source():
    "The cell. At the end of a notebook `nbdev_export` does nothing where `IN_TEST` is set: in Colab there is nothing to export to."
    cfg = ConfigParser(delimiters=['=']); cfg.read(top/'settings.ini', encoding='utf-8'); cfg = cfg['DEFAULT']
    tools = ' '.join(f"'{o}'" for o in cfg['dev_requirements'].split() if o.startswith(('nbdev','execnb','fastcore')))
    return f'''#| hide
# Colab: fetch the package. Elsewhere this cell does nothing.
import sys
if 'google.colab' in sys.modules:
    %env IN_TEST=1
    %pip install -q {tools} git+{cfg['git_url']}'''

def update(path, check):
    "Is `path` as it should be? If not, and unless `check`, write it: the cell stands below the title"
    nb = nbformat.read(path, 4)
    cells = [c for c in nb.cells if c.id!='colab']
    cell = nbformat.v4.new_code_cell(source(), id='colab')
    title = next(i for i,c in enumerate(cells) if c.cell_type=='markdown')
    ok = next((c.source for c in nb.cells if c.id=='colab'), None)==cell.source and nb.cells[title+1].id=='colab'
    if not ok and not check:
        nb.cells = [*cells[:title+1], cell, *cells[title+1:]]
        nbformat.write(nb, path)
    return ok

def main(check):
    bad = [p.name for p in sorted((top/'nbs').glob('*.ipynb')) if not update(p, check)]
    if check: sys.exit(f"no cell for Colab, or an old one: {', '.join(bad)}; run python .ci/colab.py") if bad else print('each notebook can be opened in Colab')
    else: print(f"written: {', '.join(bad) or 'nothing to do'}")

if __name__=='__main__': main('--check' in sys.argv[1:])
