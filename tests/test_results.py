"Tables of the paper, their runs and files, and the network in the package."
import hashlib, json, math, os, re, shutil
from dataclasses import replace
from importlib.resources import files

import pytest
import torch

from capsule_routing import pretrained, registry, results
from capsule_routing.baselines import BaselineConfig
from capsule_routing.networks import config_from_dict
from capsule_routing.capsnet import CapsConfig, CapsNet, caps_config, count_params
from capsule_routing.commands import capsule_reproduce, run_verb
from capsule_routing.data import DataUnavailable, load_data
from capsule_routing.decoder import mask_capsules
from capsule_routing.pretrained import PRETRAINED, pretrained_net, pretrained_poses, pretrained_record
import capsule_routing.affine, capsule_routing.multimnist  # they register their tables
assert capsule_routing.affine and capsule_routing.multimnist
from capsule_routing.registry import table
from capsule_routing.results import (Row, Table, get_table, mean_deviation, read_results, run_name, run_row, same_kind, table_lines,
                                     table_rows)
from capsule_routing.settings import RECIPES, TrainConfig, lr_at
from capsule_routing.tasks import classification, evaluate
from conftest import TINY_CONFIG

ROW = Row("tiny", "a tiny one", caps_config(**TINY_CONFIG), {"error": "1.0"})
BASE = Row("base", "a baseline, with dropout", BaselineConfig(convs=((4, 5),), pool=True, units=(8,)))
TOY = Table("toy", "Toy", "nowhere", (ROW,), lambda data_dir=None, limit=None, dataset=None: load_data("glyphs", limit=limit))
KW = dict(epochs=3, limit=200, batch_size=32, lr=3e-3, precision="fp32", device=torch.device("cpu"))
timeless = lambda r: {k: v for k, v in r.items() if k not in ("seconds", "sessions", "history")} | {"history": [{k: v for k, v in h.items() if "second" not in k} for h in r["history"]]}


# -- tables --

def test_table1_is_the_papers():
    rows = {r.name: r for r in get_table("table1").rows}
    assert {k: r.paper["error"] for k, r in rows.items()} == {"baseline": "0.39", "r1": "0.34±0.032", "r1-recon": "0.29±0.011", "r3": "0.35±0.036", "r3-recon": "0.25±0.005"}
    with torch.device("meta"): sizes = {k: count_params(CapsNet(r.network)) for k, r in rows.items() if k != "baseline"}
    assert sizes == {"r1": 6_804_224, "r1-recon": 8_215_568, "r3": 6_804_224, "r3-recon": 8_215_568}
    assert isinstance(rows["baseline"].network, BaselineConfig)
    assert all(replace(r.network, routing_options={}, decoder=None) == CapsConfig(decoder=None) for k, r in rows.items() if k != "baseline")


def test_the_routing_table_changes_iterations_and_gradient_alone():
    rows = get_table("routing").rows
    assert {(r.network.n_iters, r.network.routing_options.get("stop_grad", False)) for r in rows} == {(i, s) for i in range(1, 6) for s in (False, True)}
    assert all(replace(r.network, routing_options={}) == CapsConfig() for r in rows)


def test_the_recipe_fast_keeps_losses_and_shifts():
    fast, paper = TrainConfig(**RECIPES["fast"]), TrainConfig()
    same = ("shift", "recon_weight", "batch_size", "precision", "stop_at")
    assert [getattr(fast, k) for k in same] == [getattr(paper, k) for k in same]
    steps = 469
    assert max(lr_at(i, fast, steps) for i in range(fast.epochs*steps)) == pytest.approx(2e-3, rel=1e-3)
    assert lr_at(fast.epochs*steps - 1, fast, steps) < 1e-8


# -- runs --

class Stop:
    "Stops a run at its n-th step"
    def __init__(self, at): self.at = at
    def on_step(self, s):
        if s.global_step == self.at: raise KeyboardInterrupt


@pytest.mark.parametrize("recipe", [pytest.param("paper", marks=pytest.mark.slow), "fast"])
@pytest.mark.parametrize("at,ROW", [(1, ROW), (7, ROW), (8, ROW), (15, ROW), (9, BASE)])
def test_an_interrupted_row_ends_as_the_whole_one(tmp_path, at, recipe, ROW):
    whole = run_row(TOY, ROW, 3, tmp_path/"whole", recipe, **KW)
    with pytest.raises(KeyboardInterrupt): run_row(TOY, ROW, 3, tmp_path/"parts", recipe, reporter=Stop(at), checkpoint_steps=1, **KW)
    assert not list((tmp_path/"parts"/"toy").glob("*.json"))
    parts = run_row(TOY, ROW, 3, tmp_path/"parts", recipe, checkpoint_steps=1, **KW)
    a, b = timeless(whole), timeless(parts)
    assert a.pop("training") | {"checkpoint_steps": 1} == b.pop("training") and a == b


def test_a_finished_row_is_read_and_not_trained(tmp_path, monkeypatch):
    got = run_row(TOY, ROW, 1, tmp_path, **{**KW, "epochs": 1})
    monkeypatch.setattr(results, "fit", lambda *a, **k: pytest.fail("trained again"))
    assert run_row(TOY, ROW, 1, tmp_path, **{**KW, "epochs": 1}) == got
    assert read_results("toy", tmp_path) == [got]


def test_what_counts_is_the_last_epoch_not_the_best(tmp_path, monkeypatch):
    "A first epoch without a single error, a last one with nothing but errors"
    real = results.read_checkpoint
    def told(p):
        ck = real(p)
        h = [dict(row) for row in ck.meta["history"]]
        h[0]["test_errors"], h[-1]["test_errors"] = 0, h[-1]["test_n"]
        return ck._replace(meta={**ck.meta, "history": h})
    monkeypatch.setattr(results, "read_checkpoint", told)
    r = run_row(TOY, ROW, 1, tmp_path, **{**KW, "epochs": 3})
    assert len(r["history"]) == 3 and r["epoch"] == 3
    assert r["n_errors"] == r["n"] == r["history"][-1]["test_n"] and r["metrics"]["error"] == 100


@pytest.mark.parametrize("other,line", [(dict(lr=0.5), "lr="), (dict(batch_size=4), "batch_size="), (dict(precision="bf16"), "precision='fp32', asked for is 'bf16'"),
                                        (dict(row=ROW._replace(network=replace(ROW.network, routing_options=dict(n_iters=2)))), "routing_options="),
                                        (dict(row=ROW._replace(task="classification")), "task=")], ids=str)
def test_a_finished_row_of_other_settings_is_refused(tmp_path, other, line):
    kw = {**KW, "epochs": 1}
    run_row(TOY, ROW, 1, tmp_path, **kw)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    other = dict(other); row = other.pop("row", ROW)
    with pytest.raises(ValueError, match=f"{re.escape(line)}.*; choose another out") as e: run_row(TOY, row, 1, tmp_path, **{**kw, **other})
    assert "\n" not in str(e.value) and before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert run_row(TOY, ROW, 1, tmp_path, **kw, log_interval=3)["epoch"] == 1                         # what changes no figure may differ


def odd(**change):
    "A results file with one part of it spoilt"
    file = next((files("capsule_routing")/"results"/"table1").iterdir())
    return json.dumps(json.loads(file.read_text()) | change)

ODD = [odd(network={"n_classes": 0}), odd(network={"kind": "strange"}), odd(network={"n_itres": 1}), odd(training={"lr": "fast"}),
       odd(training={"speed": 9}), odd(history=[], training={"stop_at": 0.9}), odd(metrics={"error": "small"}), odd(data={}), odd(n=None)]

@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"row": 1}', "\x00\xff", *ODD], ids=lambda s: repr(s[:20]))
def test_a_file_that_is_no_result_is_refused(tmp_path, text, capsys):
    (tmp_path/"table1").mkdir()
    (tmp_path/"table1"/"odd.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="odd.json") as e: read_results("table1", tmp_path)
    assert "\n" not in str(e.value)
    assert run_verb(capsule_reproduce, ["table1", "--show", "--out", tmp_path]) == 2
    assert "odd.json" in (err := capsys.readouterr().err) and err.count("\n") == 1


def test_further_metrics_come_from_the_trained_network(tmp_path):
    seen = []
    def after(net, data, device):
        assert not net.training
        seen.append(evaluate(net, data.test).n_errors)
        return {"again": seen[0]}
    r = run_row(TOY._replace(after=after), ROW, 1, tmp_path, recipe="fast", **KW)
    assert r["metrics"]["again"] == r["n_errors"] == seen[0]


def test_a_row_may_name_its_own_task(tmp_path, monkeypatch):
    def doubled(recon_weight, loss):
        usual = classification(recon_weight, loss, "doubled")
        return replace(usual, loss=lambda out, b: {k: 2*v for k, v in usual.loss(out, b).items()})
    monkeypatch.setitem(registry.task, "doubled", doubled)
    kw = {**KW, "epochs": 1}
    plain, own = run_row(TOY, ROW, 1, tmp_path/"a", **kw), run_row(TOY, ROW._replace(task="doubled"), 1, tmp_path/"b", **kw)
    assert "task" not in plain and own["task"] == "doubled" and len(same_kind([plain, own])) == 2
    assert own["history"][0]["train_loss"] > 1.5*plain["history"][0]["train_loss"]
    with pytest.raises(ValueError, match="task='doubled', asked for is None; choose another out"): run_row(TOY, ROW, 1, tmp_path/"b", **kw)


def test_a_table_that_no_imported_module_registers_says_what_to_do():
    with pytest.raises(ValueError, match="table='cifar': is not registered; known are .*; import the module") as e: get_table("cifar")
    assert "\n" not in str(e.value) and {"table1", "routing", "multimnist", "affnist"} <= set(table)


def test_names_of_runs_tell_apart_what_differs():
    names = {run_name(*a) for a in [("r3", 1, "paper", 250), ("r3", 2, "paper", 250), ("r3", 1, "fast", 12), ("r3", 1, "fast", 5), ("r3", 1, "fast", 5, 1000),
                                    ("r3", 1, "fast", 5, None, "glyphs"), ("r1", 1, "paper", 250)]}
    assert len(names) == 7


def test_an_unknown_recipe_is_refused(tmp_path):
    with pytest.raises(ValueError, match="recipe='slow': must be one of paper, fast"): run_row(TOY, ROW, 1, tmp_path, "slow")
    assert not list(tmp_path.iterdir())


# -- reading --

def fake(row="tiny", seed=1, error=1., **training):
    return dict(row=row, seed=seed, network={}, training={"schedule": "paper", "lr": 1e-3, **training}, data=dict(name="mnist", n_train=60000, n_test=10000),
                device="a machine", seconds=90., epoch=2, metrics={"error": error})


def test_only_the_seed_may_differ_within_a_mean():
    a, b, c = fake(seed=1, error=1.), fake(seed=2, error=3.), fake(seed=3, error=9., lr=1.)
    d, e = {**fake(seed=4), "data": dict(name="glyphs", n_train=1, n_test=1)}, {**fake(seed=5), "network": {"n_iters": 1}}
    assert [[r["seed"] for r in g] for g in same_kind([a, b, c, d, e])] == [[1, 2], [3], [4], [5]]
    rows = table_rows(TOY, [a, b, c])
    assert [r[2] for r in rows[1:]] == ["2.00±1.414", "9.00"] and [r[3] for r in rows[1:]] == ["2", "1"]
    assert same_kind([a, fake(seed=2, threads=7)]) == [[a, fake(seed=2, threads=7)]]


def test_runs_of_before_the_redesign_are_of_one_kind_with_those_of_today():
    old = next(r for r in read_results("table1") if r["row"] == "r1-recon")
    today = next(r.network for r in get_table("table1").rows if r.name == "r1-recon").to_dict()
    assert "n_iters" in old["network"] and old["network"] != today
    assert same_kind([old, {**old, "seed": 2, "network": today}]) == [[old, {**old, "seed": 2, "network": today}]]


def test_mean_and_deviation_are_those_of_the_sample():
    v = [0.25, 0.31, 0.28, 0.22]
    assert mean_deviation(v) == f"{sum(v)/4:.2f}±{math.sqrt(sum((x-sum(v)/4)**2 for x in v)/3):.3f}"
    assert mean_deviation([0.5]) == "0.50"


@pytest.mark.parametrize("name", ["table1", "routing", "multimnist", "affnist"])
def test_rows_without_a_run_say_so(name):
    t = get_table(name)
    lines = table_lines(t, []).splitlines()
    assert len(lines) == 2 + len(t.rows) and all("not run" in l for l in lines[2:])
    assert len({l.count("|") for l in lines}) == 1


@pytest.mark.parametrize("name", ["table1", "routing", "multimnist", "affnist"])
def test_files_in_the_package_are_whole(name):
    t = get_table(name)
    for r in read_results(name):
        assert set(r) >= set("table row command seed network training data device versions seconds n n_errors epoch metrics history".split())
        assert r["table"] == name and r["row"] in [o.name for o in t.rows] and r["command"].startswith("capsule_")
        last = r["history"][-1]
        assert (last["test_errors"], last["test_n"], last["epoch"]) == (r["n_errors"], r["n"], r["epoch"]) and len(r["history"]) == r["epoch"]
        assert r["metrics"]["error"] == pytest.approx(100*r["n_errors"]/r["n"], abs=1e-4) and set(t.metrics) <= set(r["metrics"])
        net = next(o.network for o in t.rows if o.name == r["row"])
        assert config_from_dict(r["network"]) == net


# -- the command --

@pytest.mark.slow
def test_reproduce_from_the_shell(tmp_path, run_cmd):
    args = ["table1", "--rows", "r1", "--seeds", "1", "--recipe", "fast", "--epochs", "1", "--limit", "32", "--dataset", "glyphs", "--no_cuda", "--threads", "1"]
    p = run_cmd("capsule_reproduce", *args, cwd=tmp_path)
    assert p.returncode == 0, p.stderr
    assert "0.34±0.032" in p.stdout and "glyphs 32" in p.stdout
    file = tmp_path/"runs/reproduce/table1/r1-fast-1ep-32im-glyphs-s1.json"
    r = json.loads(file.read_text())
    assert sorted(r["command"].split()) == sorted("capsule_reproduce table1 --rows r1 --seeds 1 --recipe fast --epochs 1 --limit 32 --dataset glyphs --no-cuda --threads 1".split())
    at = file.stat().st_mtime_ns
    again = run_cmd("capsule_reproduce", *args, "--quiet", cwd=tmp_path)
    assert again.returncode == 0 and again.stdout.splitlines()[-3:] == p.stdout.splitlines()[-3:] and file.stat().st_mtime_ns == at


def test_reproduce_shows_without_training(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "fit", lambda *a, **k: pytest.fail("trained"))
    assert run_verb(capsule_reproduce, ["table1", "--show"]) == 0
    out = capsys.readouterr().out
    assert "in the package" in out and "not run" in out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("args,line", [
    ([], "capsule_reproduce: TABLE: is missing"),
    (["tabel1"], "capsule_reproduce: TABLE: 'tabel1' is not one of 'table1', 'multimnist', 'affnist', 'routing'"),
    (["table1", "--rows", "r3,r7"], "capsule_reproduce: --rows r7: must be one of baseline, r1, r1-recon, r3, r3-recon"),
    (["table1", "--seeds", "1,x"], "capsule_reproduce: --seeds: 'x' is not a valid integer"),
    (["table1", "--seeds", "-1"], "capsule_reproduce: --seeds: -1 is not in the range"),
    (["table1", "--recipe", "slow"], "capsule_reproduce: --recipe: 'slow' is not one of 'paper', 'fast'"),
    (["table1", "--epochs", "0"], "capsule_reproduce: --epochs: 0 is not in the range x>=1")])
def test_reproduce_refuses_in_one_line(tmp_path, capsys, monkeypatch, args, line):
    monkeypatch.chdir(tmp_path)
    assert run_verb(capsule_reproduce, args) == 2
    err = capsys.readouterr().err
    assert err.startswith(line) and err.count("\n") == 1 and not list(tmp_path.iterdir())


# -- the network in the package --

@pytest.mark.parametrize("name", PRETRAINED)
def test_checksums_are_those_of_the_record(name):
    record = pretrained_record(name)
    assert set(record["sha256"]) == {f"{name}.safetensors", f"{name}-poses.safetensors"}
    for f, want in record["sha256"].items():
        assert hashlib.sha256((files("capsule_routing")/"weights"/f).read_bytes()).hexdigest() == want


def test_a_damaged_file_is_refused(tmp_path, monkeypatch):
    shutil.copytree(files("capsule_routing")/"weights", tmp_path/"weights")
    monkeypatch.setattr(pretrained, "files", lambda name: tmp_path)
    for f, load in (("mnist.safetensors", pretrained_net), ("mnist-poses.safetensors", pretrained_poses)):
        raw = bytearray((tmp_path/"weights"/f).read_bytes()); raw[-1] ^= 1
        (tmp_path/"weights"/f).write_bytes(raw)
        with pytest.raises(ValueError, match=f"{f}: damaged"): load("mnist")


def test_the_network_in_the_package():
    net, record = CapsNet.from_pretrained("mnist"), pretrained_record("mnist")
    assert net.cfg == CapsConfig() and not net.training and {p.dtype for p in net.parameters()} == {torch.float32}
    assert CapsConfig.from_dict(record["network"]) == net.cfg
    run = record["runs"][0]
    assert run["history"][-1]["test_errors"] == run["n_errors"] and run["n"] == 10_000 and run["history"][-1]["epoch"] == record["training"]["epochs"]
    with pytest.raises(ValueError, match="name='cifar10': must be one of mnist"): CapsNet.from_pretrained("cifar10")


def test_at_least_99_5_percent():
    record = pretrained_record("mnist")
    assert record["runs"][0]["n_errors"] <= 50 and record["n_errors_fp16"] <= 50


def test_poses_come_from_the_network_and_draw_digits():
    p, net = pretrained_poses("mnist"), CapsNet.from_pretrained("mnist")
    assert p.poses.shape == (400, 10, 16) and p.y.tolist() == [c for c in range(10) for _ in range(40)] and len(set(p.index.tolist())) == 400
    assert float(p.poses.norm(dim=-1).max()) <= 1
    with torch.inference_mode(): drawn = net.decoder(mask_capsules(p.poses, p.y))
    assert ((drawn > 0.5).float().mean((1, 2, 3)) > 0.01).all()     # ink, in every one


@pytest.fixture(scope="module")
def mnist_test():
    if not os.environ.get("CAPSULE_ROUTING_DATA"): pytest.skip("no CAPSULE_ROUTING_DATA")
    try: return load_data("mnist", progress=False, timeout=5).test
    except DataUnavailable as e: pytest.skip(str(e))


@pytest.mark.slow
def test_accuracy_on_all_of_mnists_test_set(mnist_test):
    e = evaluate(CapsNet.from_pretrained("mnist"), mnist_test)
    assert (e.n, e.n_errors) == (10_000, pytest.approx(pretrained_record("mnist")["n_errors_fp16"], abs=2))   # another machine rounds otherwise


def test_poses_are_of_the_images_they_name(mnist_test):
    p, net = pretrained_poses("mnist"), CapsNet.from_pretrained("mnist")
    assert torch.equal(mnist_test.y[p.index], p.y)
    with torch.inference_mode(): now = net(mnist_test.x[p.index[::20]].float()/255).poses
    assert float((now - p.poses[::20]).norm()/now.norm()) < 2e-3
