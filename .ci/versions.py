"""The package with the oldest and the newest versions that settings.ini admits, each in an environment of its own; needs uv. Not part of `.ci/run`.

    python .ci/versions.py [oldest] [newest] [--keep] [--save] [-- arguments of pytest]

For each: the whole suite, every tier (with what developing needs), and the package alone as a user installs it, which brings fastcore 1 to the oldest and fastcore 2 to the newest.
`--save` writes what came out to `capsule_routing/results/versions.json`, which the page on trust shows.
"""
import configparser,datetime,json,os,re,shutil,subprocess,sys,tempfile
from pathlib import Path

top = Path(__file__).resolve().parent.parent
cfg = configparser.ConfigParser(delimiters=['='])
cfg.read(top/'settings.ini')
cfg = cfg['DEFAULT']
saved = top/'capsule_routing/results/versions.json'
shown = 'torch torchvision numpy pillow safetensors fastcore nbdev'.split()

# Runs in a bare environment: every module, then the three verbs.
alone = r"""
import importlib, json, subprocess, sys, sysconfig
from importlib.util import find_spec
from pathlib import Path
import capsule_routing
from PIL import Image
here = Path(capsule_routing.__file__).parent
names = sorted(p.stem for p in here.glob('*.py') if not p.stem.startswith('_'))
for o in names: importlib.import_module('capsule_routing.'+o)
assert find_spec('nbdev') is None and find_spec('pytest') is None
def verb(name, *args):
    p = subprocess.run([Path(sysconfig.get_path('scripts'))/name, *args], capture_output=True, text=True)
    assert p.returncode==0, (name, args, p.stdout, p.stderr)
    return p.stdout
for o in ('capsule_train', 'capsule_evaluate', 'capsule_predict'): assert '--' in verb(o, '--help')
tiny = '--dataset glyphs --limit 96 --no-cuda --conv-channels 8 --primary-types 2 --primary-size 4 --decoder-widths 16,32 --with_reconstruction --out run'.split()
verb('capsule_train', *tiny, '--epochs', '1', '--batch-size', '32')
verb('capsule_train', '--out', 'run', '--resume', '--epochs', '2')
verb('capsule_evaluate', 'run')
Image.new('L', (28, 28)).save('dark.png')
assert 'dark.png' in verb('capsule_predict', 'run', 'dark.png')
assert len(json.loads(Path('run/history.json').read_text()))==2
print(len(names), 'modules, 4 commands')
"""

def run(*args, **kw): return subprocess.run([str(o) for o in args], **kw)

def environment(home, which, what):
    "A new environment with the oldest or newest versions of `what`; its Python"
    version = cfg['min_python'] if which=='oldest' else sys.executable
    run('uv', 'venv', '-q', '--clear', '--seed', '--python', version, home, check=True)
    python = home/('Scripts/python.exe' if os.name=='nt' else 'bin/python')
    resolution = 'lowest-direct' if which=='oldest' else 'highest'
    run('uv', 'pip', 'install', '-q', '--python', python, '--resolution', resolution, *what, cwd=top, check=True)
    return python

def versions(python):
    "Python's version and those of the packages that the table shows"
    code = f"""import json,platform
from importlib.metadata import version,PackageNotFoundError
def of(n):
    try: return version(n)
    except PackageNotFoundError: return '-'
print(json.dumps([platform.python_version(), *map(of, {shown})]))"""
    return json.loads(run(python, '-c', code, check=True, capture_output=True, text=True).stdout)

def env(python):
    "This environment, led to the other one"
    keep = {k:v for k,v in os.environ.items() if k not in ('PYTHONPATH','PYTHONHOME','VIRTUAL_ENV')}
    return keep | dict(OMP_NUM_THREADS='1', MPLBACKEND='agg', PATH=f'{python.parent}{os.pathsep}{os.environ["PATH"]}')

def suite(python, args):
    "Run pytest, its output shown as it comes; its last line, and whether all passed"
    p = subprocess.Popen([str(o) for o in (python, '-m', 'pytest', '-p', 'no:cacheprovider', '-n', '0', *(args or ['-m', '']))], cwd=top, env=env(python)|dict(PYTHONUNBUFFERED='1'),
                         text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    last = ''
    for line in p.stdout:
        print(line, end='', flush=True)
        if re.search(r'\d+ (passed|failed|error)', line): last = line.strip().strip('= ')
    p.wait()
    return last or f'exit code {p.returncode}', p.returncode==0

def package(python):
    "Import and train without nbdev, outside the checkout; what it said, and whether it worked"
    with tempfile.TemporaryDirectory() as d: p = run(python, '-c', alone, cwd=d, env=env(python), capture_output=True, text=True)
    if p.returncode: print(p.stdout+p.stderr)
    return (p.stdout.strip() or f'exit code {p.returncode}'), p.returncode==0

def save(new):
    "Put these rows in the place of the saved ones of the same kind"
    key = lambda o: (o['versions'], o['what'])
    kept = [o for o in (json.loads(saved.read_text()) if saved.exists() else []) if key(o) not in map(key, new)]
    saved.write_text(json.dumps(sorted([*kept, *new], key=key, reverse=True), indent=1)+'\n')

def main(args):
    args,rest = (args[:args.index('--')],args[args.index('--')+1:]) if '--' in args else (args,[])
    names = [o for o in args if o in ('oldest','newest')] or ['oldest','newest']
    home,rows,ok = Path(tempfile.mkdtemp(prefix='capsule-versions-')),[],True
    try:
        for name in names:
            for kind,what,check in (('suite', ['-e', '.[dev]'], lambda p: suite(p, rest)), ('alone', ['.'], package)):
                print(f'== {name}, {kind}', flush=True)
                python = environment(home/f'{name}-{kind}', name, what)
                said,good = check(python)
                rows.append([name, kind, *versions(python), said]); ok &= good
                print(said, flush=True)
    finally:
        if '--keep' in args: print(f'kept: {home}')
        else: shutil.rmtree(home, ignore_errors=True)
    head = ['versions', 'what', 'Python', *shown, 'result']
    if '--save' in args: save([dict(zip(head, o)) | dict(date=datetime.date.today().isoformat()) for o in rows])
    print('\n'.join('| ' + ' | '.join(o) + ' |' for o in [head, ['---']*len(head), *rows]))
    return int(not ok)

if __name__=='__main__': sys.exit(main(sys.argv[1:]))
