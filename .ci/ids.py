"Give new cells readable ids, which stand in the exported modules: the name of what a cell defines, `test-…` of what it tests, the first words of a text."
import ast,re,sys
from pathlib import Path
import nbformat

top = Path(__file__).resolve().parent.parent
def nameless(id): return bool(re.fullmatch('[0-9a-f]{8}|[0-9a-f-]{36}', id))
def spelled(words): return re.sub(r'[^a-z0-9]+', '-', ' '.join(words).lower()).strip('-')

def name(cell):
    "A name for `cell` out of what it says"
    if cell.cell_type!='code': return spelled(re.findall(r"[\w']+", cell.source)[:4]) or 'text'
    code = '\n'.join(o for o in cell.source.splitlines() if not re.match(r'\s*[%!]', o))
    body = ast.parse(code).body
    made = [o.name for o in body if hasattr(o, 'name')] or [ast.unparse(o.targets[0]) for o in body if isinstance(o, ast.Assign)]
    tested = re.search(r'^test_\w+\(\W*(\w+)', code, re.M)
    if made and not tested: return spelled(made[:1]) or 'code'
    return f'test-{spelled([tested[1]])}' if tested else spelled(re.findall(r'\w+', re.sub('^#.*$', '', code, flags=re.M))[:3]) or 'code'

def main(paths):
    for p in paths:
        nb = nbformat.read(p, 4)
        taken = {c.id for c in nb.cells}
        for c in filter(lambda c: nameless(c.id), nb.cells):
            new = first = name(c)
            n = 1
            while new in taken: n += 1; new = f'{first}-{n}'
            taken.add(new)
            print(f'{Path(p).name}: {c.id} is {new}')
            c.id = new
        nbformat.write(nb, p)

if __name__=='__main__': main(sys.argv[1:] or sorted((top/'nbs').glob('*.ipynb')))
