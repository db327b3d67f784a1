"Exit 1 unless notebooks are clean and the exported modules equal them. Works on a copy; changes nothing here."
import filecmp,shutil,subprocess,sys,tempfile
from pathlib import Path

top = Path(__file__).resolve().parent.parent

def copy(dst):
    "Copy what git tracks, or would track, to `dst`"
    names = subprocess.run(['git','ls-files','-co','--exclude-standard','-z'], cwd=top, check=True,
                           capture_output=True, text=True).stdout.split('\0')
    for name in filter(None, names):
        src,new = top/name,dst/name
        if not src.exists(): continue
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(src, new, follow_symlinks=False)

def no_modules(dst):
    "Take the modules away: one that no notebook writes any more would survive an export"
    for p in (dst/'capsule_routing').glob('*.py'):
        if p.name!='__init__.py': p.unlink()

def nbdev(name, cwd): subprocess.run([sys.executable, '-c', f'from nbdev.cli import {name}; {name}.__wrapped__()'], cwd=cwd, check=True)

def differences(dst, folder, suffix):
    "Files of `folder` that are not byte-equal here and in `dst`"
    names = {p.relative_to(root) for root in (top,dst) for p in (root/folder).rglob('*'+suffix)
             if not any(o.startswith('.') or o=='__pycache__' for o in p.relative_to(root).parts)}
    return sorted(str(n) for n in names if not ((top/n).exists() and (dst/n).exists()
                                               and filecmp.cmp(top/n, dst/n, shallow=False)))

def main():
    with tempfile.TemporaryDirectory(prefix='capsule-fresh-') as tmp:
        dst = Path(tmp)/top.name.lstrip('.')
        copy(dst)
        no_modules(dst)
        nbdev('nbdev_clean', dst)
        nbdev('nbdev_export', dst)
        bad = [f'{o}: run nbdev_clean' for o in differences(dst, 'nbs', '.ipynb')]
        bad += [f'{o}: differs from its notebook, or no notebook writes it; run nbdev_export'
                for o in differences(dst, 'capsule_routing', '.py')]
    for o in bad: print(o)
    return int(bool(bad))

if __name__=='__main__': sys.exit(main())
