"Images of one's own: sizes, augmentation, weights to start from, an honest clock."
import json, re, shutil
import pytest, torch
from conftest import TINY

SMALL = "--batch-size 8 --size 28 --channels 1 --no-cuda --threads 1 --precision fp32 --quiet".split()


def train(run_cmd, where, folder, *args, ok=True):
    p = run_cmd("capsule_train", "--folder", folder/"train", "--test-folder", folder/"test", *args, cwd=where)
    assert "Traceback" not in p.stderr and (p.returncode == 0) == ok, p.stdout+p.stderr
    return p


def weights(path):
    from capsule_routing.runs import load_run
    return load_run(path).net.state_dict()


def test_a_dry_run_says_all_and_writes_nothing(run_cmd, image_folder, tmp_path):
    p = train(run_cmd, tmp_path, image_folder, *SMALL[:-1], "--dry-run", "--size-of-network", "auto", "--epochs", 3)
    for word in ("30 training", "parameters", "auto: conv_channels 64", "about", "steps", "GB", "was written"): assert word in p.stdout, p.stdout
    assert not list(tmp_path.iterdir())


def test_more_than_an_hour_is_said_with_the_shorter_command(run_cmd, image_folder, tmp_path):
    p = train(run_cmd, tmp_path, image_folder, *SMALL[:-1], "--dry-run", "--epochs", 30_000)   # the paper's sizes, 120,000 steps
    line = next(l for l in p.stdout.splitlines() if l.startswith("time"))
    assert re.search(r"about [\d.,]+ (h|min) on ", line) and "with capsule_train" in line and "--recipe fast" in line


@pytest.mark.slow
def test_augmented_and_weighted_runs_go_on_after_an_epoch_to_the_bit(run_cmd, start_cmd, image_folder, tmp_path):
    how = [*SMALL, *TINY, "--augment", "flip,colour", "--class-weights", "--epochs", 2]
    train(run_cmd, tmp_path, image_folder, *how, "--out", "whole")
    train(run_cmd, tmp_path, image_folder, *[*how[:-1], 1], "--out", "halves")
    p = run_cmd("capsule_train", "--resume", "--out", "halves", "--epochs", 2, "--quiet", cwd=tmp_path)
    assert p.returncode == 0, p.stderr
    a,b = weights(tmp_path/"whole"),weights(tmp_path/"halves")
    assert all(torch.equal(a[k], b[k]) for k in a)
    config = json.loads((tmp_path/"whole"/"config.json").read_text())
    assert config["settings"]["augment"] == "flip,colour" and config["training"]["shift"] == 0
    p = run_cmd("capsule_train", "--resume", "--out", "halves", "--augment", "flip", cwd=tmp_path)
    assert p.returncode == 2 and "--augment" in p.stderr and "was begun with flip,colour" in p.stderr


@pytest.mark.slow
def test_a_run_starts_from_another_ones_weights(run_cmd, trained, image_folder, tmp_path):
    two = tmp_path/"two"
    for part in ("train", "test"):
        for c in ("zero", "one"): shutil.copytree(image_folder/part/c, two/part/c)
    train(run_cmd, tmp_path, two, *SMALL, "--init", trained.path, "--epochs", 1, "--lr", 1e-9, "--out", "fine")
    a,b = weights(trained.path),weights(tmp_path/"fine")
    assert (a["trunk.weight"]-b["trunk.weight"]).abs().max() < 1e-5 and len(b["digit.weight" if "digit.weight" in b else next(k for k in b if k[:5] == "digit")])
    p = train(run_cmd, tmp_path, two, *SMALL, "--init", trained.path, "--conv-channels", 5, "--out", "misfit", ok=False)
    assert p.stderr.count("\n") == 1 and "--init" in p.stderr and "does not fit" in p.stderr and not (tmp_path/"misfit").exists()


@pytest.mark.slow
def test_more_epochs_of_a_fast_run_name_the_command(run_cmd, image_folder, tmp_path):
    train(run_cmd, tmp_path, image_folder, *SMALL, *TINY, "--recipe", "fast", "--epochs", 1, "--out", "fast")
    p = run_cmd("capsule_train", "--resume", "--out", "fast", "--epochs", 3, cwd=tmp_path)
    assert p.returncode == 2 and p.stderr.count("\n") == 1 and "--init fast" in p.stderr and "--recipe fast" in p.stderr


@pytest.mark.slow
def test_the_cnn_is_trained_and_evaluated(run_cmd, image_folder, tmp_path):
    train(run_cmd, tmp_path, image_folder, *SMALL, "--network", "cnn", "--epochs", 1, "--out", "cnn")
    p = run_cmd("capsule_evaluate", "cnn", cwd=tmp_path)
    assert p.returncode == 0 and "accuracy" in p.stdout, p.stderr


def test_shifts_of_a_black_border_are_zero_padding_and_of_a_white_one_white(glyph_images):
    "Bit for bit what zero padding gives where the border is black"
    from capsule_routing.data import shift_images
    x = glyph_images.x.clone()
    x[:, :, [0, -1]] = 0; x[..., [0, -1]] = 0
    d = torch.arange(len(x)) % 5 - 2
    moved = shift_images(x, d, -d)
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    for i, k in enumerate(d.tolist()): assert torch.equal(moved[i], padded[i, :, 2+k:30+k, 2-k:30-k])
    assert torch.equal(shift_images(255-x, d, -d), 255-moved)


def test_a_stray_file_is_passed_over_with_a_line(image_folder, tmp_path):
    from capsule_routing.data import load_data
    shutil.copytree(image_folder, tmp_path/"all")
    (tmp_path/"all/train/one/notes.txt").write_text("mine")
    data = load_data(folder=tmp_path/"all/train", test_folder=tmp_path/"all/test", channels=1)
    assert len(data.train) == 30 and "passed over 1" in data.note and "notes.txt" in data.note
