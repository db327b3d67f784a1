"Exit 1 unless nbdev 3, which reads pyproject.toml, exports the same modules as nbdev 2, which reads settings.ini. Makes an environment of its own; changes nothing here."
import os,shutil,subprocess,sys,tempfile
from pathlib import Path
from fresh import copy,differences,no_modules

def environment(home):
    "A virtual environment with nbdev 3; the folder of its commands"
    uv = shutil.which('uv')
    if uv: make,install = [uv,'venv','-q','--python',sys.executable,home],[uv,'pip','install','-q','--python',home]
    else: make,install = [sys.executable,'-m','venv',home],[home/'bin/python','-m','pip','install','-q']
    subprocess.run(make, check=True)
    subprocess.run([*install,'nbdev>=3,<4'], check=True)
    return home/'bin'

def main():
    with tempfile.TemporaryDirectory(prefix='capsule-nbdev3-') as tmp:
        commands,dst = environment(Path(tmp)/'env'),Path(tmp)/'checkout'
        copy(dst)
        no_modules(dst)
        env = {k:v for k,v in os.environ.items() if k not in ('PYTHONPATH','VIRTUAL_ENV')}
        subprocess.run([commands/'nbdev-export'], cwd=dst, env=env, check=True)
        # Its index names addresses of the site only where pyproject.toml has them.
        bad = [o for o in differences(dst, 'capsule_routing', '.py') if not o.endswith('_modidx.py')]
        n = len(list((dst/'capsule_routing').glob('*.py')))
    for o in bad: print(f'{o}: nbdev 3 exports it otherwise')
    if not bad: print(f'nbdev 3 exports the same {n-1} modules')
    return int(bool(bad))

if __name__=='__main__': sys.exit(main())
