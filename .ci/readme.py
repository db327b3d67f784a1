"Write README.md and its figures from nbs/index.ipynb; with `--check`, exit 1 unless they are what it would write."
import base64,re,sys
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

top = Path(__file__).resolve().parent.parent
mark = '<!-- Written from nbs/index.ipynb by .ci/readme.py: edit the notebook. -->\n\n'

def directives(src):
    "`#| key: value` lines of `src` as a dict, and `src` without them"
    pat = re.compile(r'^#\|[ \t]*([\w-]+)(?:[ \t]*:?[ \t]*(.*))$', re.M)
    return {k:v.strip().strip('"\'') for k,v in pat.findall(src)}, pat.sub('', src).strip('\n')

def relink(md):
    "Links of a notebook's page, as seen from the top of the checkout"
    return re.sub(r'\]\((?!https?:|#|mailto:)(?:\./)?(?P<path>[^)]+)\)',
                  lambda m: f']({m["path"][3:]})' if m['path'].startswith('../') else f'](nbs/{m["path"]})', md)

def figure(cell, out, n, alt):
    "Name and bytes of the picture in `out`, and the Markdown that shows it"
    name = f'nbs/images/index-{cell.id}{f"-{n}" if n else ""}.png'
    md = nbformat.v4.new_output('display_data', {'text/markdown': f'![{alt}]({name})'})
    return name,base64.b64decode(out.data['image/png']),md

def convert(nb):
    "README's text and its figures, `{name: bytes}`"
    cells,figs = [],{}
    for cell in nb.cells:
        if cell.cell_type=='markdown': cell.source = relink(cell.source)
        elif cell.cell_type=='code':
            opts,cell.source = directives(cell.source)
            if 'hide' in opts or opts.get('include')=='false' or 'nbdev_export(' in cell.source: continue
            outs = [o for o in cell.outputs if o.get('name')!='stderr']
            for n,out in enumerate(outs):
                if 'image/png' not in out.get('data', {}): continue
                name,data,outs[n] = figure(cell, out, n, opts.get('fig-alt',''))
                figs[name] = data
            for out in outs:
                if 'text/markdown' in out.get('data', {}) : out.data = {'text/markdown': out.data['text/markdown']}
            cell.outputs = [] if opts.get('output')=='false' else outs
            if opts.get('echo')=='false': cell = nbformat.v4.new_markdown_cell('\n\n'.join(
                o.data['text/markdown'] if 'text/markdown' in o.get('data', {}) else
                f"```\n{(o.get('text') or o.data['text/plain']).rstrip()}\n```" for o in cell.outputs))
        cells.append(cell)
    nb.cells = cells
    nb.metadata['language_info'] = {'name':'python'}
    text = MarkdownExporter().from_notebook_node(nb)[0]
    text = '\n'.join(o.rstrip() for o in text.splitlines())
    return mark + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n', figs

def main(check):
    text,figs = convert(nbformat.read(top/'nbs/index.ipynb', 4))
    files = {'README.md': text.encode(), **figs}
    old = {str(p.relative_to(top).as_posix()) for p in (top/'nbs/images').glob('index-*.png')} - set(figs)
    bad = sorted(old | {k for k,v in files.items() if not (top/k).exists() or (top/k).read_bytes()!=v})
    if check:
        for o in bad: print(f'{o}: not what nbs/index.ipynb gives; run python .ci/readme.py')
        return int(bool(bad))
    for o in old: (top/o).unlink()
    for k,v in files.items():
        (top/k).parent.mkdir(parents=True, exist_ok=True)
        (top/k).write_bytes(v)
    return 0

if __name__=='__main__': sys.exit(main('--check' in sys.argv[1:]))
