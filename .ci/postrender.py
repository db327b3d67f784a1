"Quarto's step after rendering: scripts are served with the site, taken from npm by the lock `web.json` and from the installed anywidget; each notebook gets its link to Colab."
import base64,hashlib,json,os,re,shutil,subprocess,sys,tarfile,tempfile
from configparser import ConfigParser
from html.parser import HTMLParser
from importlib.metadata import files
from pathlib import Path

here = Path(__file__).resolve().parent
web = 'site_libs/web'

# What a page may ask of another host, and the file that answers instead; `None`: the page is better without it.
answers = {r'\brequire(js)?[\w.-]*\.js':'require.js', r'/jquery[\w.-]*\.js':'jquery.js', r'html-manager.*/embed-amd\.js':'embed-amd.js',
           r'/katex(\.min)?\.js':'katex.js', r'/katex(\.min)?\.css':'katex.css', r'polyfill':None}

def unpack(name, version, integrity, to):
    "Fetch one package from npm, compare it with the lock, and unpack it into `to`"
    npm = shutil.which('npm')
    if not npm: raise FileNotFoundError('npm is needed to build the site: it brings the scripts of formulas and widgets')
    out = subprocess.run([npm,'pack','--json','--silent','--ignore-scripts','--prefer-offline','--pack-destination',str(to),f'{name}@{version}'],
                         cwd=to, check=True, stdout=subprocess.PIPE, text=True).stdout
    tgz = Path(to)/json.loads(out)[0]['filename'].replace('@','').replace('/','-') # old npm says @scope/name
    algo,want = integrity.split('-', 1)
    if base64.b64encode(hashlib.new(algo, tgz.read_bytes()).digest()).decode()!=want: sys.exit(f'{name} {version}: not the package that {here.name}/web.json names')
    with tarfile.open(tgz) as t:
        return {m.name.split('/',1)[1]:t.extractfile(m).read() for m in t if m.isfile()}

def anywidget():
    "The JavaScript half of anywidget, as its wheel brings it"
    f = next((o for o in files('anywidget') or [] if o.as_posix().endswith('nbextensions/anywidget/index.js')), None)
    if f is None: sys.exit('anywidget is installed without its share/jupyter/nbextensions: install it from a wheel')
    return Path(f.locate()).read_bytes()

def assets():
    "Everything that `site_libs/web` holds, `{name: bytes}`"
    lock = json.loads((here/'web.json').read_text())
    with tempfile.TemporaryDirectory() as tmp: got = {k:unpack(k, v['version'], v['integrity'], tmp) for k,v in lock.items() if not v.get('test')}
    katex = got['katex']
    css = re.sub(r',url\([^)]*\.(woff|ttf)\) format\("\w+"\)', '', katex['dist/katex.min.css'].decode()) # browsers take woff2
    amd = got['@jupyter-widgets/html-manager']['dist/embed-amd.js'].decode()
    return {'require.js':got['requirejs']['require.js'], 'jquery.js':got['jquery']['dist/jquery.min.js'],
            'embed-amd.js':re.sub(r'\n//# sourceMappingURL=.*', '', amd).encode(), 'anywidget.js':anywidget(),
            'katex.js':katex['dist/katex.min.js'], 'katex.css':css.encode(),
            **{k[5:]:v for k,v in katex.items() if k.startswith('dist/fonts/') and k.endswith('.woff2')}}

def localise(html, root='.', site=None):
    "`html` with its foreign scripts and styles taken from `web` below `root`, and its links to `site`, our own address, made relative"
    used = set()
    def tag(m):
        url = m['url']
        for pat,name in answers.items():
            if not re.search(pat, url): continue
            if name is None: return ''
            used.add(name)
            attrs = re.sub(r'\s(integrity|crossorigin|referrerpolicy)(=("[^"]*"|\'[^\']*\'))?', '', m[0].replace(url, f'{root}/{web}/{name}'))
            # html-manager asks require.js for a widget's module by name, and for an unknown name asks a foreign host.
            conf = f"""<script>requirejs.config({{paths: {{anywidget: '{root}/{web}/anywidget'}}}})</script>""" if name=='require.js' else ''
            return attrs+conf
        return m[0]
    html = re.sub(r'''<(?:script|link)\b[^>]*?\s(?:src|href)=["'](?P<url>(?:https?:)?//[^"']+)["'][^>]*>(?:</script>)?''', tag, html)
    if site: # nbdev links names in prose to our address; private names have no place there
        html = re.sub(rf'<a\b[^>]*?\shref=["\']{re.escape(site)}/[\w.-]+#_\w*["\'][^>]*>(.*?)</a>', r'\1', html, flags=re.S)
        html = re.sub(rf'\[(`[^`\]]+`)\]\({re.escape(site)}/[^)\s]*\)', r'\1', html) # nor has Markdown in a signature's comments
        html = re.sub(rf'(<a\b[^>]*?\shref=["\']){re.escape(site)}(?:/|(?=["\'#]))', rf'\1{root}/', html)
    return html,used

def notebook(page):
    "The notebook of a page: nbdev drops the number, `10b_pretrained` is shown as `pretrained.html`"
    return next((p for p in sorted((here.parent/'nbs').glob('*.ipynb')) if re.sub(r'^\d+[a-zA-Z0-9]*_', '', p.stem).lower()==page.stem), None)

def files_of(html, git_url, branch):
    "`html` whose links to files beside `nbs`, which are no part of the site, lead to the repository"
    return re.sub(r'(<a\b[^>]*?\shref=")\.\./([A-Z]+(?:\.md|\.cff)?")', rf'\1{git_url}/blob/{branch}/\2', html)

def open_in(html, nb, git_url, branch):
    "`html` with links below its title that open `nb` in Colab and on its host"
    path = f'blob/{branch}/nbs/{nb}'
    links = f'<p class="open-in"><a href="{git_url.replace("https://github.com", "https://colab.research.google.com/github")}/{path}">Open in Colab</a> <a href="{git_url}/{path}">Notebook on GitHub</a></p>\n'
    return re.sub(r'<header id="title-block-header".*?(?=</header>)', lambda m: m[0]+links, html, count=1, flags=re.S)

def cite(html, paper='https://arxiv.org/abs/1710.09829'):
    "`html` with a link to the paper beside each `source` link whose signature or docstring names an equation, section, figure or table of it"
    def add(m):
        said = re.search(r'\b(Eqs?\.|[Ss]ection|[Ff]igure|Table|Procedure) \d+(\.\d+)*', re.sub('<[^>]+>', '', m['doc']))
        return m[0] if not said else f'{m["link"]}<a href="{paper}" style="float:right; font-size:smaller; margin-right:1em">paper, {said[0]}</a>{m["doc"]}'
    return re.sub(r'(?P<link><a href="[^"]*"[^>]*>source</a>)(?P<doc></p>\s*(?:</section>\s*)*<section.*?</pre>(?:(?!<div|<section|</section|<p><a href).)*)', add, html, flags=re.S)

def skippable(html):
    "`html` whose first link leads past the menus"
    return re.sub(r'<body[^>]*>', lambda m: m[0]+'\n<a class="skip-link" href="#quarto-document-content">Skip to the content</a>', html, count=1)

class Loads(HTMLParser):
    "Collects in `urls` what a browser fetches to show a page, and in `links` where its links lead; in `ids` the places that a link can name"
    loading = dict(script='src', img='src', source='src', video='src', audio='src', track='src', iframe='src', embed='src', object='data', input='src', image='href', use='href')
    quiet = {'canonical','next','prev','up','alternate','license','author','help','bookmark'}
    def __init__(self, html):
        super().__init__()
        self.urls,self.links,self.ids,self.style = [],[],set(),False
        self.feed(html)
    def handle_starttag(self, tag, attrs):
        a = {k:v or '' for k,v in attrs}
        self.style = tag=='style'
        self.ids |= {a[k] for k in ('id','name') if k in a}
        if tag=='a' and 'href' in a: self.links.append(a['href'])
        if tag=='link' and not set(a.get('rel','').lower().split()) & self.quiet: self.urls.append(a.get('href',''))
        if self.loading.get(tag) in a: self.urls.append(a[self.loading[tag]])
        if 'srcset' in a: self.urls += [o.split()[0] for o in a['srcset'].split(',') if o.strip()]
        if 'style' in a: self.urls += css_urls(a['style'])
    def handle_data(self, data):
        if self.style: self.urls += css_urls(data)
    def handle_endtag(self, tag): self.style = False

def css_urls(css): return [a or b for a,b in re.findall(r'''url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)''', css)]

def foreign(url): return bool(re.match(r'\s*(https?:|ftp:|//)', url))

def leaks(out):
    "What any page or style sheet below `out` would still fetch from another host"
    found = []
    for p in sorted(out.rglob('*')):
        if p.suffix=='.html': urls = Loads(p.read_text(encoding='utf-8')).urls
        elif p.suffix=='.css': urls = css_urls(p.read_text(encoding='utf-8'))
        else: continue
        found += [f'{p.relative_to(out).as_posix()}: {u}' for u in urls if foreign(u)]
    return found

def main(out):
    cfg = ConfigParser(delimiters=['=']); cfg.read(here.parent/'settings.ini', encoding='utf-8'); cfg = cfg['DEFAULT']
    used = set()
    for p in sorted(out.rglob('*.html')):
        old = p.read_text(encoding='utf-8')
        root = os.path.relpath(out, p.parent).replace(os.sep, '/')
        new,names = localise(old, root, cfg['doc_host']+cfg['doc_baseurl'])
        used |= names
        nb = notebook(p)
        if 'id="quarto-document-content"' in new and 'class="skip-link"' not in new: new = skippable(new)
        new = files_of(new, cfg['git_url'], cfg['branch'])
        if nb and 'class="open-in"' not in new: new = open_in(cite(new), nb.name, cfg['git_url'], cfg['branch'])
        if new!=old: p.write_text(new, encoding='utf-8')
    if used:
        for name,data in assets().items():
            (out/web/name).parent.mkdir(parents=True, exist_ok=True)
            (out/web/name).write_bytes(data)
    left = leaks(out)
    if left: sys.exit('still asked of other hosts:\n'+'\n'.join(left))
    print(f"served with the site: {', '.join(sorted(used)) or 'nothing needed'}", file=sys.stderr)

if __name__=='__main__':
    try: main(Path(sys.argv[1] if len(sys.argv)>1 else os.environ['QUARTO_PROJECT_OUTPUT_DIR']).resolve())
    except (OSError, subprocess.CalledProcessError) as e: sys.exit(f'postrender: {e}')
