"Texts from elsewhere, launchers, launch environments, half precision, results files: one line each, and nothing reaches the terminal."
import io, json, random, warnings
import pytest, torch
from capsule_routing import results
from capsule_routing.capsnet import caps_config
from capsule_routing.checks import BadValue
from capsule_routing.commands import Place, _no_memory
from capsule_routing.losses import capsule_loss
from capsule_routing.machine import processes
from capsule_routing.tasks import evaluate, predict
from capsule_routing.texts import Screen, figure_text, printable
from capsule_routing.training import new_net
from capsule_routing.visualize import confusion_figure, prediction_figure, save_figure
from capsule_routing.data import ImageSet

NET = caps_config(height=20, width=20, n_classes=3, conv_channels=4, n_types=2, d_primary=4, d_class=4, decoder=(8,))
ODD = ["$5 to $10", "$x^{$", "a\\$b$", "caf\udce9", "\x1b[2J\x07", "猫😀", "\u202eturned", "\r\nline", "", "\x00", "\ud800"]


def odd(r): return "".join(r.choice([chr(r.randrange(1, 0x300)), chr(r.randrange(0x110000)), r.choice("$\\{}^_\n\r\x1b\u202e")]) for _ in range(r.randrange(9)))

def test_any_text_can_be_shown():
    "Three thousand random texts: no control character passes, none raises, and a stream takes them in any encoding"
    r = random.Random(7)
    for s in [*ODD, *(odd(r) for _ in range(3000))]:
        assert all(c.isprintable() or c in "\u200c\u200d" for c in printable(s)), ascii(s)
        raw = io.BytesIO()
        to = io.TextIOWrapper(raw, encoding=r.choice(["ascii", "latin-1", "utf-8"]), errors="replace")
        print(s, file=Screen(to, "stdout"), flush=True)
        assert not set(raw.getvalue()) & ({*range(32)} - {9, 10}), ascii(s)

def test_different_names_stay_different():
    assert len({printable(s) for s in ODD}) == len(ODD) == len({figure_text(s) for s in ODD})

def test_any_text_can_be_drawn(tmp_path):
    r = random.Random(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for names in (ODD, [odd(r) for _ in range(12)]):
            save_figure(confusion_figure(torch.eye(len(names)).int(), names, names[0]), tmp_path/"a.png")
        save_figure(prediction_figure(torch.zeros(11, 1, 4, 4), torch.zeros(11, 1, 4, 4), ODD), tmp_path/"b.png")


@pytest.mark.parametrize("env, word", [(dict(WORLD_SIZE=w, RANK="0"), "WORLD_SIZE") for w in ("x", "0", "-1", "9"*20, "1.5", "")] +
    [(dict(WORLD_SIZE="2", RANK=r), "RANK") for r in ("2", "-1", "x", "")] + [(dict(WORLD_SIZE="2", RANK="0", LOCAL_RANK="x"), "LOCAL_RANK"), (dict(WORLD_SIZE="2", RANK="0", LOCAL_WORLD_SIZE="0"), "LOCAL_WORLD_SIZE"),
     (dict(WORLD_SIZE="2", RANK="0"), "MASTER_ADDR"), (dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="x"), "joined")], ids=str)
def test_odd_launchers_are_one_line(env, word, monkeypatch):
    for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"): monkeypatch.delenv(k, raising=False)
    for k, v in env.items(): monkeypatch.setenv(k, v)
    with pytest.raises(BadValue) as e:
        with processes(limit=2): pass
    assert word in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("e", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), RuntimeError("could not create a primitive"), RuntimeError("CUDA out of memory. Tried"),
    RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"), RuntimeError("std::bad_alloc"), OSError(12, "Cannot allocate memory"), RuntimeError("can't start new thread")], ids=lambda e: str(e)[:20])
def test_each_way_to_run_out_of_memory_is_known(e): assert _no_memory(e)


def test_an_unknown_home_is_one_line(monkeypatch):
    import click
    with pytest.raises(click.BadParameter, match="home folder"): Place().convert("~no-such-user-here/run")


def test_weights_near_the_largest_float_are_refused():
    net = new_net(NET)
    with torch.no_grad():
        for p in net.parameters(): p.fill_(3e38)
    x = torch.randint(0, 256, (4, 1, 20, 20), dtype=torch.uint8)
    for f in (lambda: predict(net, x), lambda: evaluate(net, ImageSet(x, torch.zeros(4, dtype=torch.long), "abc"))):
        with pytest.raises(BadValue, match="no numbers"): f()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_with_a_decoder(dtype):
    net, x, y = new_net(NET), torch.rand(4, 1, 20, 20), torch.tensor([0, 1, 2, 0])
    full = net(x)
    out = net.to(dtype)(x.to(dtype), y)
    assert (out.lengths - full.lengths).abs().max() < 0.02 and out.recon.isfinite().all()
    capsule_loss(out, y, x).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_transforms_of_torch_func_and_forward_mode():
    from torch.autograd import forward_ad
    from torch.func import functional_call, grad, vmap
    net, x, y = new_net(NET), torch.rand(3, 1, 20, 20), torch.tensor([0, 1, 2])
    p = dict(net.named_parameters())
    def loss(p, x, y): return capsule_loss(functional_call(net, p, (x, y)), y, x)
    each = vmap(grad(lambda p, a, b: loss(p, a[None], b[None])), (None, 0, 0))(p, x, y)
    loss(p, x, y).backward()
    for k, w in p.items(): torch.testing.assert_close(each[k].mean(0), w.grad, atol=1e-5, rtol=1e-3)
    with forward_ad.dual_level(): t = forward_ad.unpack_dual(net(forward_ad.make_dual(x, x)).lengths).tangent
    h = 1e-3
    torch.testing.assert_close(t, (net(x*(1+h)).lengths - net(x*(1-h)).lengths)/(2*h), atol=1e-3, rtol=1e-2)


def test_pruning_and_vectors_of_contiguous_weights():
    "The weights lie permuted in memory, and PyTorch views them as one row: laid straight, all of that works"
    from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters
    net, x = new_net(NET), torch.rand(2, 1, 20, 20)
    was = net(x).lengths
    other = new_net(NET, 5)
    for p in (*net.parameters(), *other.parameters()): p.data = p.data.contiguous()
    vector_to_parameters(parameters_to_vector(net.parameters()), other.parameters())
    torch.testing.assert_close(other(x).lengths, was)
    prune.l1_unstructured(net.digit, "W", 0.5)
    assert (net.digit.W == 0).float().mean() == pytest.approx(0.5, abs=0.01) and net(x).lengths.isfinite().all()


def damage(v, r):
    "The same with one value, somewhere within, exchanged or taken away"
    keys = [*v] if isinstance(v, dict) else [*range(len(v))] if isinstance(v, list) else []
    if not keys or r.random() < 0.25: return r.choice([None, -1, 0, 10**400, 1e308, "", "\x1b[1m", [], [[]], {}, True, [1], {"a": 1}, float("nan")])
    k, v = r.choice(keys), v.copy()
    if isinstance(v, dict) and r.random() < 0.15: del v[k]
    else: v[k] = damage(v[k], r)
    return v

def test_damaged_results_files_are_read_or_refused(tmp_path):
    "Four hundred: a table or one line, whatever is exchanged however deep"
    good, r = [json.loads(p.read_text()) for p in sorted((results.files("capsule_routing")/"results"/"table1").iterdir())][:1], random.Random(11)
    (tmp_path/"table1").mkdir()
    good[0]["history"] = good[0]["history"][-2:]
    table, refused = results.get_table("table1"), 0
    for i in range(400):
        (tmp_path/"table1"/"a.json").write_text(json.dumps(damage(good[0], r)))
        try: assert results.table_text(table, results.read_results("table1", tmp_path))
        except ValueError as e:
            assert "\n" not in str(e) and "a.json" in str(e), e
            refused += 1
    assert 100 < refused < 400
