"Read many rendered photographs with the network in the package; the results go into the package: `python .ci/photographs.py --n 500 --seed 0`."
import argparse,json,platform,time
from pathlib import Path
import numpy as np,PIL,scipy,torch
from PIL import Image
import capsule_routing
from capsule_routing.data import load_data
from capsule_routing.photographs import STYLES,photograph
from capsule_routing.prepare import digits
from capsule_routing.pretrained import pretrained_net
from capsule_routing.tasks import predict

top = Path(__file__).resolve().parent.parent

def read(x, y, style, seeds):
    "Of photographs of the digits `x`: is the one digit that was found the right one?, `(n,)`"
    found = [digits(np.asarray(Image.fromarray(photograph(d[None], style, s)).convert('L'))) for d,s in zip(x, seeds)]
    seen = np.stack([f[0].picture if len(f)==1 else np.zeros((28, 28), np.uint8) for f in found])
    lengths = predict(NET, torch.from_numpy(seen)[:,None]).lengths
    one = np.array([len(f)==1 for f in found])
    return one & (lengths.argmax(1).numpy()==y) & (lengths.amax(1).numpy()>=0.5), one

if __name__=='__main__':
    p = argparse.ArgumentParser()
    p.add_argument('--n', type=int, default=500)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', type=Path, default=top/'capsule_routing'/'results'/'photographs.json')
    a = p.parse_args()
    NET = pretrained_net()
    test = load_data('mnist', progress=False).test
    pick = np.random.default_rng(a.seed).permutation(len(test))[:a.n]
    t0,styles = time.time(),{}
    for k,s in enumerate(STYLES):
        at = pick[k::len(STYLES)]
        right,one = read(test.x[at,0].numpy(), test.y[at].numpy(), s, a.seed*100_000 + at)
        styles[s] = dict(n=len(at), n_right=int(right.sum()), n_not_one=int((~one).sum()), accuracy=right.mean().item())
        print(s, styles[s], flush=True)
    n = sum(r['n'] for r in styles.values())
    right = sum(r['n_right'] for r in styles.values())
    res = dict(command=f'python .ci/photographs.py --n {a.n} --seed {a.seed}', seed=a.seed, n=n, n_right=right, accuracy=right/n,
               dataset='mnist', split='test', styles=styles, seconds=round(time.time()-t0, 1), device=f'cpu, {platform.machine()}',
               versions=dict(capsule_routing=capsule_routing.__version__, python=platform.python_version(), torch=torch.__version__,
                             numpy=np.__version__, scipy=scipy.__version__, pillow=PIL.__version__))
    a.out.write_text(json.dumps(res, indent=1)+'\n')
    print(f'{100*right/n:.1f}% of {n}')
