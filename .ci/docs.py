"Build the documentation: with Quarto where it is on PATH, else nbdev's processing alone, as with `--no-render`; every page must exist."
import inspect,json,os,re,shutil,subprocess,sys,warnings
from pathlib import Path
import traitlets.traitlets
from fastcore.docments import DocmentText
from nbdev.doclinks import NbdevLookup
from nbdev.serve_drv import main as process_page

top = Path(__file__).resolve().parent.parent

link_names,parameters,signature = NbdevLookup.link_line,DocmentText.params.fget,DocmentText.__str__

# A name that traitlets has for type checkers only, and that Python 3.11 looks up in the signatures of widgets.
if not hasattr(traitlets.traitlets, 'Self'): traitlets.traitlets.Self = object

def link_line(self, line):
    "Names of the API become links, but for those that are a link's text already"
    parts = re.split(r'(\[[^\]]*\]\([^)]*\))', line)
    return ''.join(o if i%2 else link_names(self, o) for i,o in enumerate(parts))

def comments(cls):
    "What the class's body says beside each field"
    found = {}
    for o in reversed(cls.__mro__):
        if o.__module__.startswith('capsule_routing'):
            found |= {a:b for a,b in re.findall(r'^ {4}(\w+) *:[^#\n]*# *(.*)$', inspect.getsource(o), re.M)}
    return found

def fields(self):
    "The parameters of a function, or the fields of a class without its own `__init__`, of which nbdev says `*args, **kwargs`"
    old = parameters(self)
    if not inspect.isclass(self.obj) or [o for o,_ in old]!=['*args', '**kwargs']: return old
    try: pars = inspect.signature(self.obj).parameters.values()
    except ValueError: return old
    said = comments(self.obj)
    return [(re.sub(r'\b(?:\w+\.)+(?=[A-Z])', '', str(o)).replace(': ', ':').replace(' = ', '=').replace("'", ''), said.get(o.name, '')) for o in pars]

def declared(self):
    "A class is declared as one"
    return re.sub('^def ', 'class ', signature(self)) if inspect.isclass(self.obj) else signature(self)

def page(*args):
    "Process one notebook; one that changes its folder does so for itself alone"
    try: process_page(*args)
    finally: os.chdir(top)

def process():
    "Write the processed notebooks to `_proc`, and return its path"
    from nbdev import serve_drv
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    serve_drv.main = page
    from capsule_routing.draw import Live
    Live.building = True # pages get the live elements, not their pictures
    NbdevLookup.link_line,DocmentText.params,DocmentText.__str__ = link_line,property(fields),declared
    refresh_quarto_yml()
    shutil.rmtree('_proc', ignore_errors=True)
    # A relative path: nbdev silently skips each file that has a dot-folder anywhere in its path.
    # One process: torch is imported once.
    return Path(proc_nbs('nbs', force=True, n_workers=0))

def render(proc):
    "Render `proc` with Quarto and move the site to `_docs`"
    shutil.rmtree('_docs', ignore_errors=True) # a failed build leaves no old site behind
    if subprocess.run(['quarto','render','--no-cache'], cwd=proc).returncode: sys.exit('quarto render failed: no site')
    shutil.move(proc/'_docs', '_docs')
    from capsule_routing.draw import write_site
    write_site('_docs/capsnet') # scripts and weights of the live elements

def pages(folder, suffix):
    "Fail unless each notebook has its non-empty page in `folder`; Quarto's bear the name without the number"
    names = sorted(p.stem if suffix=='.ipynb' else re.sub(r'^\d+[a-zA-Z0-9]*_', '', p.stem).lower() for p in Path('nbs').glob('*.ipynb'))
    missing = [n for n in names if not ((Path(folder)/n).with_suffix(suffix).exists()
                                        and (Path(folder)/n).with_suffix(suffix).stat().st_size)]
    if missing or not names: sys.exit(f"{folder}: no page for {', '.join(missing) or 'any notebook'}")
    if suffix=='.ipynb':
        empty = [n for n in names if not json.loads((Path(folder)/f'{n}.ipynb').read_text(encoding='utf-8'))['cells']]
        if empty: sys.exit(f"{folder}: empty page for {', '.join(empty)}")
    print(f'{len(names)} pages in {folder}')

if __name__=='__main__':
    os.chdir(top)
    sys.path.insert(0, str(top)) # the pages import this checkout
    # nbdev warns of each hidden cell that sets the plots' resolution beside its imports.
    warnings.filterwarnings('ignore', 'Found cells containing imports')
    proc = process()
    pages('_proc', '.ipynb')
    if '--no-render' in sys.argv[1:]: pass
    elif shutil.which('quarto'):
        render(proc)
        pages('_docs', '.html')
    else: print('Quarto is not on PATH: pages processed, not rendered')
