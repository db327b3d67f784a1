"Collect finished runs of this machine into one committed results file: `collect.py NAME RUN...` writes capsule_routing/results/NAME.json."
import json, sys
from pathlib import Path

from capsule_routing.commands import _command, capsule_train
from capsule_routing.speed import machine

top = Path(__file__).resolve().parent.parent

def row(run):
    "What one run computed, from its own files"
    config,history = (json.loads((Path(run)/f).read_text()) for f in ('config.json', 'history.json'))
    t,last = config['training'],history[-1]
    if last['epoch'] != t['epochs']: raise SystemExit(f"{run}: ended after {last['epoch']} of {t['epochs']} epochs")
    same = dict(dataset=config['data']['name'], n_train=config['data']['n_train'], network=config['network'], device=f"{machine()['device'] if config['device'] == 'cpu' else config['device']}, {t['threads']} thread{'s' if t['threads'] != 1 else ''}",
                versions=config['versions'], training={k: v for k,v in t.items() if k not in ('seed', 'log_interval')})
    mine = dict(seed=t['seed'], n=last['test_n'], n_errors=last['test_errors'], epoch=last['epoch'],
                seconds=round(sum(h['seconds'] for h in history), 1), history=history)
    return same,mine

def main(name, runs):
    rows = [row(r) for r in runs]
    for same,_ in rows[1:]:
        if same != rows[0][0]: raise SystemExit('the runs differ in more than the seed')
    s = json.loads((Path(runs[0])/'config.json').read_text())['settings']
    seeds = ','.join(str(m['seed']) for _,m in rows)
    command = f"{_command(capsule_train, s, ('seed', 'data_dir'))} --seed {f'{{{seeds}}}' if len(rows) > 1 else seeds}"
    out = top/'capsule_routing'/'results'/f'{name}.json'
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(dict(command=command, runs=[m for _,m in rows], **rows[0][0]), indent=1) + '\n')
    print(out)

if __name__ == '__main__': main(sys.argv[1], sys.argv[2:])
