"The table of routings: shared work, stopping, merging, attacks within their radius, alarms, intervals."
import shutil, signal, time
import pytest, torch
from capsule_routing.compare import Mean, differences, equal_skill, holm, interval, paired, read_runs, t_width, t_within
from capsule_routing.reproduce import plan_lines, plan_routings, reproduce_routings
from capsule_routing.robust import ATTACKS, alarm_level, attacked, standing
from capsule_routing.routings import Work, chosen, next_trial, result_file, work_on
from capsule_routing.rows import BUDGETS, ROWS, get_row, row_network, table_images
from capsule_routing.runs import lock_run, make_folder, read_json
from capsule_routing.training import new_net

cpu = torch.device("cpu")
TINY = "routings --size tiny --dataset glyphs --threads 1".split()


@pytest.fixture(scope="module")
def images(): return table_images("glyphs", "tiny")


@pytest.fixture(scope="module")
def table(tmp_path_factory, images):
    "A folder with one seed of two rows, and what was said"
    w, said = Work("tiny", "glyphs", tmp_path_factory.mktemp("table"), cpu, threads=1), []
    assert work_on(w, [get_row("uniform"), get_row("fc")], [1], images, said.append) == []
    return w, said


def test_every_row_has_a_network_for_every_size():
    for size in BUDGETS:
        for row in ROWS: assert row_network(row, size).image_shape == (1, 40, 40)


def test_every_row_has_as_many_trials_and_the_best_wins(table):
    w, _ = table
    b = BUDGETS["tiny"]
    for row in ("uniform", "fc"):
        trials = read_json(result_file(w, row, "search"))["trials"]
        assert len(trials) == len(b.rates) + len(b.decays) and next_trial(b, trials) is None
        r = read_json(result_file(w, row, "s1"))
        assert (r["training"]["lr"], r["training"]["weight_decay"]) == chosen(trials)


def test_the_second_seed_of_no_row_comes_before_the_first_of_another(images, tmp_path):
    said = []
    work_on(Work("tiny", "glyphs", tmp_path, cpu, threads=1), [get_row("uniform"), get_row("shared")], [1, 2], images, said.append)
    assert [s.split(":")[0] for s in said if "seed" in s] == ["uniform, seed 1", "shared, seed 1", "uniform, seed 2", "shared, seed 2"]


def test_the_same_seed_gives_the_same_figures(table, images, tmp_path):
    again = Work("tiny", "glyphs", tmp_path, cpu, threads=1)
    work_on(again, [get_row("uniform")], [1], images, lambda line: None)
    a, b = (read_json(result_file(o, "uniform", "s1")) for o in (table[0], again))
    for r in (a, b):
        r["metrics"].pop("seconds")
        for e in r["epochs"]: e.pop("seconds")
    assert a["metrics"] == b["metrics"] and a["epochs"] == b["epochs"]


def test_a_held_run_is_passed_over_and_named(table, images):
    w, _ = table
    with lock_run(make_folder(result_file(w, "fc", "s2").with_suffix(""))):
        assert work_on(w, [get_row("uniform"), get_row("fc")], [2], images, lambda line: None) == [(2, "fc")]
    assert result_file(w, "uniform", "s2").exists() and not result_file(w, "fc", "s2").exists()


def test_results_merge_by_copying(table, tmp_path):
    w, _ = table
    shutil.copy(result_file(w, "fc", "s1"), tmp_path)
    assert {r["row"] for r in read_runs("tiny", "glyphs", tmp_path)} == {"fc"}
    shutil.copy(result_file(w, "uniform", "s1"), tmp_path)
    assert {r["row"] for r in read_runs("tiny", "glyphs", tmp_path)} == {"fc", "uniform"}


def test_a_plan_counts_and_trains_nothing(table, images):
    w, _ = table
    before = sorted(p.name for p in w.folder.iterdir())
    (name, done, n, s), = plan_routings(w, [get_row("fc")], [1, 7, 8], images)
    assert (name, done, n) == ("fc", 1, 3) and s > 0 and "1 of 3 runs done" in plan_lines([(name, done, n, s)])[0]
    assert sorted(p.name for p in w.folder.iterdir()) == before


@pytest.mark.parametrize("how", ATTACKS)
@pytest.mark.parametrize("row", ["uniform", "cnn", "em"])
def test_an_attack_stays_within_its_radius(how, row, images):
    x, y = images.test.x[:6].float()/255, images.test.y[:6]
    with standing(net := new_net(row_network(get_row(row), "tiny"))), torch.no_grad():
        for radius in (0.02, 0.3):
            new = ATTACKS[how](net, x, y, radius)
            assert (new - x).abs().max() <= radius + 1e-6 and new.min() >= 0 and new.max() <= 1
            assert (new != x).any()
    assert all(p.requires_grad for p in net.parameters()) and net.training


@pytest.mark.parametrize("n", [20, 100, 1999])
def test_the_alarm_is_false_for_five_percent(n):
    e = torch.rand(n, generator=torch.Generator().manual_seed(n))
    assert int((e > alarm_level(e)).sum()) == n*5//100


def test_attacked_counts_shares(images):
    got = attacked(new_net(row_network(get_row("uniform"), "tiny")), images.test.take(10), "pgd", 0.1, level=-1.)
    assert 0 <= got.error <= 1 and got.detected in (None, 1.)          # every error is above -1


@pytest.mark.parametrize("df, t95, t99", [(1, 12.7062, 63.6567), (2, 4.3027, 9.9248), (4, 2.7764, 4.6041), (7, 2.3646, 3.4995), (30, 2.0423, 2.7500)])
def test_students_t_is_that_of_the_printed_tables(df, t95, t99):
    assert t_width(df) == pytest.approx(t95, abs=1e-3) and t_width(df, 0.99) == pytest.approx(t99, abs=1e-3)
    assert t_within(t95, df) == pytest.approx(0.95, abs=1e-5)


def test_intervals_and_corrections():
    m = interval([2.1, 2.4, 2.0, 2.3, 2.2])
    assert m.mean == pytest.approx(2.2) and m.half == pytest.approx(0.19632, abs=1e-4) and interval([1.]) == Mean(1., None, 1)
    assert holm([0.02, 0.01, 0.5]) == pytest.approx([0.04, 0.03, 0.5]) and holm([]) == []
    one, _ = paired({1: 2., 2: 4., 3: 3.}, {1: 1., 2: 1., 3: 1.}, 1)
    ten, _ = paired({1: 2., 2: 4., 3: 3.}, {1: 1., 2: 1., 3: 1.}, 10)
    assert one.mean == ten.mean == 2 and one.half == pytest.approx(2.4841, abs=1e-3) and ten.half > 3*one.half


def test_only_seeds_that_both_have_are_compared():
    runs = [dict(row=r, title=r, seed=s, metrics=dict(error=v)) for r, s, v in (("uniform", 1, 3.), ("uniform", 2, 4.), ("em", 2, 6.), ("em", 3, 99.))]
    assert differences(runs, "error")["em"][0] == Mean(2., None, 1)


def test_equal_skill_takes_the_first_epoch_that_is_good_enough():
    def run(row, seed, val): return dict(row=row, seed=seed, metrics={}, epochs=[dict(epoch=k, val=v, affine=10*v) for k, v in enumerate(val, 1)])
    got = equal_skill([run("a", 1, [9, 4, 5]), run("b", 1, [6, 3, 1]), run("b", 2, [8, 7, 2])])
    assert [r["metrics"]["equal_at"] for r in got] == [2, 2, 3]        # of seed 2 there is one row alone


def test_the_function_of_the_command_shows_what_is_there(table):
    w, _ = table
    at = w.folder.parent/"shown"
    shutil.copytree(w.folder, at/"routings", ignore=lambda d, names: [n for n in names if not n.endswith(".json")])
    said = []
    runs = reproduce_routings(["uniform"], [1], "tiny", "glyphs", at, show=True, say=said.append)
    assert {r["row"] for r in runs} == {"uniform", "fc"} and "not run" not in said[0]


@pytest.mark.slow
def test_a_stopped_table_goes_on_and_an_own_routing_is_a_row(run_cmd, start_cmd, tmp_path):
    (tmp_path/"own.py").write_text("from capsule_routing.layers import DynamicRouting\nfrom capsule_routing.registry import routing\n"
                                   "@routing('mine')\nclass Mine(DynamicRouting): pass\n")
    args = [*TINY, "--rows", "mine,uniform", "--import", "own", "--seeds", "1,2,3,4,5,6"]
    p = start_cmd("capsule_reproduce", *args, cwd=tmp_path)
    first = tmp_path/"runs/reproduce/routings/tiny-glyphs-mine-s1.json"
    for _ in range(1200):
        if first.exists() or p.poll() is not None: break
        time.sleep(0.1)
    p.send_signal(signal.SIGTERM)
    p.communicate(timeout=60)
    q = run_cmd("capsule_reproduce", *args, "--dry-run", cwd=tmp_path)
    assert q.returncode == 0 and "of 12 runs done" in q.stdout.splitlines()[-1], q.stdout + q.stderr
    q = run_cmd("capsule_reproduce", *args, cwd=tmp_path)
    assert q.returncode == 0 and "mine, seed 1" not in q.stdout, q.stdout + q.stderr
    assert len(list(first.parent.glob("*-s?.json"))) == 12 and first.with_name("tiny-glyphs.csv").exists()


def test_what_the_table_fixes_is_refused_in_one_line(run_cmd, tmp_path):
    p = run_cmd("capsule_reproduce", "routings", "--epochs", "3", cwd=tmp_path)
    assert p.returncode == 2 and p.stderr.strip() == "capsule_reproduce: --epochs 3: can not be chosen for the table routings"
