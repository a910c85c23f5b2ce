"""eval.py and the classifier behind it, on tiny real networks and coloured tiles."""

import argparse
import csv
import functools
import json
import logging
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from ranks import in_ranks
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.auto_augment import AugmentOp

import eval as command
from ldm.checkpoint import KEY, read_checkpoint, write_checkpoint
from ldm.data.seeds import seed_generators
from ldm.data.stain import from_density, stain_matrix
from ldm.data.tiles import read_tile
from ldm.devices import Devices, Ranks
from ldm.errors import Stopped, UserError
from ldm.evaluation import runs
from ldm.evaluation.baselines import colour_histogram
from ldm.evaluation.metrics import OF_PROBABILITIES, confusion_matrix, scores
from ldm.evaluation.predictions import Predictions
from ldm.evaluation.runs import Arm, build_training, train_to_the_end
from ldm.evaluation.sets import TransformedTiles, open_splits, random_d4, train_transform
from ldm.evaluation.training import Predictor, RunBatches
from ldm.models.vit import TileClassifier, eval_transform, load_pretrained, load_vit
from ldm.models.vit_settings import Settings
from ldm.models.vit_training import Course, Validation, VitTraining, build_network
from ldm.run import RunFolder

ROOT = Path(command.__file__).parent
NETWORK = dict(arch="test_vit", patch_size=16, input_size=tiny.PIXELS)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiles")
    for seed, (name, count) in enumerate({"train5+fake50%": 7, "val": 5, "test": 6}.items()):
        tiny.tiles(folder / name, count, seed)
    return folder


@pytest.fixture
def data(source, tmp_path):
    """train5+fake50% (21 images of 3 classes), val (15) and test (18), free to be changed."""
    return Path(shutil.copytree(source, tmp_path / "data"))


def argv(data, *options, epochs=2, subset="train5+fake50%"):
    """A short command; `options` come last and so win."""
    fixed = f"--arch test_vit --patch_size 16 --input-size {tiny.PIXELS} --epochs {epochs}"
    fixed += " --device cpu --num_workers 0 --lr 0.05"
    paths = ["--data_path", str(data), "--output_dir", subset, "--logdir", str(data / "logs")]
    return [*fixed.split(), *paths, *map(str, options)]


def run(data, *options, **kwargs):
    command.main(argv(data, *options, **kwargs))
    return json.loads((data / "logs" / "train5+fake50%" / "summary.json").read_text())


def loaded_splits(data, settings):
    splits = open_splits(data, "train5+fake50%", settings)
    splits.load()
    return splits


def prepared(data, settings, seed=0, subset="train5+fake50%", workers=0, splits=None):
    """The arm of an evaluation, and the network and the batches of a seed."""
    if splits is None:
        splits = open_splits(data, subset, settings)
        splits.load()
    arm = Arm(subset, data / "logs" / subset, settings, splits, Devices(), workers)
    return arm, *build_training(arm, seed, Ranks())


def trained(data, settings, seed=0, **options):
    """The network of a seed after its training."""
    arm, model, batches = prepared(data, settings, seed, **options)
    train_to_the_end(arm, model, batches, RunFolder(data / "run"), None)
    return model


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def predictions(model, folder, transform=None):
    """Metrics by the longest way round: one image at a time, from its file."""
    transform = transform or eval_transform(model.input_size)
    labels, predicted = [], []
    for label, name in enumerate(sorted(tiny.CLASSES)):
        for path in sorted((folder / name).iterdir()):
            image = transform(Image.fromarray(read_tile(path)))
            labels.append(label)
            predicted.append(model(image[None]).argmax().item())
    return scores(confusion_matrix(labels, predicted, 3), sorted(tiny.CLASSES))


# --- The command ---------------------------------------------------------------------------------


def test_trains_selects_on_val_and_reports_test(data, capsys):
    summary = run(data, "--seeds", 0, 1, epochs=8)
    folder = data / "logs" / "train5+fake50%"
    assert summary["split"] == "test" and summary["selected_on"] == "val"
    assert summary["seeds"] == [0, 1]
    assert (summary["n_train"], summary["n_val"], summary["n_test"]) == (21, 15, 18)
    assert summary["mean"]["accuracy"] > 0.6, "three plain colours; chance is 1/3"
    for result in summary["per_seed"]:
        seed_folder = folder / f"seed{result['seed']}"
        model, record = load_vit(seed_folder)
        assert record["classes"] == model.classes == sorted(tiny.CLASSES)
        # The stored network is the one whose numbers are reported.
        for split in ("test", "val"):
            shown = {**result[split]}
            assert all(0 <= shown.pop(name) <= 1 for name in OF_PROBABILITIES)
            assert predictions(model, data / split) == shown
        rows = (seed_folder / "metrics.csv").read_text().splitlines()
        assert len(rows) == 1 + 8
        best = max(range(8), key=lambda e: float(rows[1 + e].split(",")[4]))
        assert result["best_epoch"] in range(1, 9)
        assert result["val"]["accuracy"] == pytest.approx(float(rows[1 + best].split(",")[4]), 1e-5)
        assert [path.name for path in (seed_folder / "checkpoints").iterdir()] == ["best.ckpt"]
    values = [result["test"]["accuracy"] for result in summary["per_seed"]]
    assert summary["mean"]["accuracy"] == pytest.approx(sum(values) / 2)
    assert summary["std"]["accuracy"] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))
    printed = capsys.readouterr().out
    assert "deviation" in printed and "test set of 18 images" in printed


def test_without_a_test_set_val_is_reported_and_said_so(data, capsys):
    shutil.rmtree(data / "test")
    summary = run(data)
    assert summary["split"] == "val" and "test" not in summary["per_seed"][0]
    assert summary["mean"]["accuracy"] == summary["per_seed"][0]["val"]["accuracy"]
    assert summary["std"]["accuracy"] is None
    assert "optimistic" in capsys.readouterr().out


def test_the_test_set_is_read_once(data, monkeypatch):
    seen = []
    original = TransformedTiles.__getitem__

    def counted(self, key):
        seen.append(self.paths[key if isinstance(key, int) else key[0]].parent.parent.name)
        return original(self, key)

    monkeypatch.setattr(TransformedTiles, "__getitem__", counted)
    run(data, epochs=3)
    assert seen.count("test") == 18 and seen.count("val") == 3 * 15
    assert "test" not in seen[: -seen.count("test")], "test comes after everything else"


def test_a_damaged_result_is_named(data):
    first = run(data)
    (path,) = data.rglob("seed0/result.json")
    whole = json.loads(path.read_text())
    partial = [{k: v for k, v in whole.items() if k != name} for name in ("test", "versions")]
    cut = [json.dumps(one).encode() for one in partial]
    for damaged in (b"", b"{", b"3", b"[]", b"{}", b"\xff", b"\0", *cut):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"result\.json is damaged; remove it"):
            run(data)
    path.unlink()
    assert run(data)["per_seed"][0]["test"] == first["per_seed"][0]["test"]


def test_the_same_command_again_trains_nothing(data, monkeypatch):
    first = run(data)
    monkeypatch.setattr(runs, "build_training", None)  # a call would be a TypeError
    assert run(data) == first


def test_more_seeds_keep_those_that_are_finished(data):
    first = run(data, "--seed", 1)["per_seed"][0]
    summary = run(data, "--seeds", 0, 1)
    assert summary["per_seed"][1] == first and summary["per_seed"][0]["seed"] == 0


def test_other_settings_or_files_do_not_mix_with_earlier_results(data):
    first = run(data)
    with pytest.raises(UserError, match=r"lr 0\.05 there, 0\.01 now; add [-`]*overwrite`?"):
        run(data, "--lr", "0.01")
    second = run(data, "--lr", "0.01", "--overwrite")
    assert second["settings"]["lr"] == 0.01 and second["per_seed"] != first["per_seed"]

    shutil.copy(data / "val/ADI/1_0.png", data / "val/ADI/another.png")
    with pytest.raises(UserError, match="the files of val changed"):
        run(data, "--lr", "0.01")


def test_a_bad_image_costs_no_earlier_result(data):
    run(data)
    (data / "val/ADI/1_0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"val/ADI/1_0\.png"):
        run(data, "--overwrite")
    assert (data / "logs/train5+fake50%/seed0/result.json").is_file()


def test_eval_only(data, capsys):
    trained = run(data)["per_seed"][0]
    command.main(argv(data, "--eval"))
    report = json.loads((data / "logs/train5+fake50%/evaluation.json").read_text())
    assert report["test"] == trained["test"] and report["val"] == trained["val"]
    for split in ("val", "test"):
        again, first = (
            (data / "logs/train5+fake50%" / name).read_text()
            for name in (f"evaluation_{split}.csv", f"seed0/predictions_{split}.csv")
        )
        assert again == first
        assert report["bootstrap"][split]["groups"] is None

    # A checkpoint by name, other sets, and no training folder.
    other = data / "other"
    tiny.tiles(other / "test", 2, seed=9)
    checkpoint = data / "logs/train5+fake50%/seed0/checkpoints/best.ckpt"
    command.main(argv(other, "--eval", "--resume", checkpoint, subset="elsewhere"))
    report = json.loads((other / "logs/elsewhere/evaluation.json").read_text())
    assert report["test"]["images"] == 6 and "val" not in report
    (other / "test" / "TUM").rename(other / "test" / "NORM")
    with pytest.raises(UserError, match=r"missing \['TUM'\], extra \['NORM'\]"):
        command.main(argv(other, "--eval", "--resume", checkpoint, subset="elsewhere"))


def test_a_training_folder_may_be_a_link(data, tmp_path):
    target = (data / "train5+fake50%").rename(tmp_path / "on another disk")
    (data / "train5+fake50%").symlink_to(target, target_is_directory=True)
    assert run(data)["n_train"] == 21


def test_a_warning_when_an_evaluated_image_was_trained_on(data, caplog):
    shutil.copy(data / "test/ADI/2_0.png", data / "train5+fake50%/ADI/copy.png")
    with caplog.at_level(logging.WARNING):
        open_splits(data, "train5+fake50%", Settings(**NETWORK))
    assert "1 images of test are in the training set too (ADI/copy.png)" in caplog.text


# --- Resume and randomness -----------------------------------------------------------------------


@contextmanager
def stopped_at(update, by=KeyboardInterrupt):
    """Save after every update, and stop a run during one, by Ctrl-C or by a scheduler's signal."""
    original = VitTraining.training_step

    def training_step(self, *args):
        if self.updates == update:
            if by is KeyboardInterrupt:
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(by):
        patch.setattr(runs, "SAVE_SECONDS", 1e-6)
        patch.setattr(VitTraining, "training_step", training_step)
        yield


TIMES = ("seconds", "images_per_second")


def rows_without_times(folder):
    header, *rows = [line.split(",") for line in (folder / "metrics.csv").read_text().split()]
    kept = [i for i, name in enumerate(header) if name not in TIMES]
    return [[row[i] for i in kept] for row in rows]


EVERYTHING = ("--no-model-ema", "--drop", "0.1", "--opt", "sgd", "--clip-grad", "0.1")


@pytest.fixture(scope="module")
def uninterrupted(source, tmp_path_factory):
    """The folder of a seed that was trained with some options in one go, once for all tests."""

    @functools.cache
    def trained_once(*options) -> Path:
        logs = tmp_path_factory.mktemp("straight")
        command.main(argv(source, *options, "--logdir", logs, epochs=4))
        return logs / "train5+fake50%" / "seed0"

    return trained_once


@pytest.mark.parametrize("earlier", [False, True], ids=["today", "earlier version"])
@pytest.mark.parametrize("options", [(), EVERYTHING])
def test_resumed_equals_uninterrupted(data, uninterrupted, options, earlier):
    with stopped_at(2):
        command.main(argv(data, *options, epochs=4))
    run_folder = data / "logs/train5+fake50%/seed0"
    assert read_checkpoint(run_folder)["training"]["updates"] == 2
    assert not (run_folder / "result.json").exists()
    if earlier:
        as_written_earlier(run_folder / "checkpoints" / "last.ckpt")
        load_vit(run_folder / "checkpoints" / "last.ckpt")
    torch.manual_seed(123)  # what other code does with random numbers must not matter
    command.main(argv(data, *options, epochs=4))
    assert_equal_runs(uninterrupted(*options), run_folder)


def assert_equal_runs(reference, run_folder):
    a, b = (read_checkpoint(f / "checkpoints/best.ckpt") for f in (reference, run_folder))
    assert same(a["state_dict"], b["state_dict"])
    assert rows_without_times(reference) == rows_without_times(run_folder)
    assert len(rows_without_times(reference)) == 4
    for name in ("predictions_val.csv", "predictions_test.csv"):
        assert (reference / name).read_text() == (run_folder / name).read_text()


MATCHED = ("--epochs", 300, "--match_steps", 11, "--validations", 4, "--batch-size", 8)


@pytest.mark.parametrize(
    ("stop", "by"), [(3, KeyboardInterrupt), (4, KeyboardInterrupt), (7, Stopped)]
)
def test_resumed_in_the_middle_of_a_pass_equals_uninterrupted(data, uninterrupted, stop, by):
    """Two batches of 8 are a pass of 21 images; validations come after 3, 6, 9 and 11 updates."""
    with stopped_at(stop, by):
        command.main(argv(data, *MATCHED))
    run_folder = data / "logs/train5+fake50%/seed0"
    # A signal lets the update end in which it comes.
    assert read_checkpoint(run_folder)["training"]["updates"] == stop + (by is Stopped)
    best, _ = load_vit(run_folder / "checkpoints" / "last.ckpt")
    assert best.classes == sorted(tiny.CLASSES), "an unfinished run can be evaluated"
    torch.manual_seed(123)
    command.main(argv(data, *MATCHED))
    assert_equal_runs(uninterrupted(*MATCHED), run_folder)


def as_written_earlier(path):
    """Rewrite a checkpoint as it was before `fit` trained this network."""
    payload = read_checkpoint(path)
    training, record = payload["training"], payload[KEY]
    weights = training.pop("weights")
    for part, name in (("net.", "model"), ("ema.", "ema")):
        found = {k.removeprefix(part): v for k, v in weights.items() if k.startswith(part)}
        training[name] = found or None
    del training["loss_sum"], training["since_validation"]
    training |= {"optimizer": payload["optimizer_states"][0], "scaler": {}}
    record["model"]["target"] = "ldm.evaluation.vit.TileClassifier"
    state = payload["state_dict"]
    write_checkpoint(path, {KEY: record, "state_dict": state, "training": training})


def test_an_interrupted_run_that_counted_epochs_is_refused(data):
    with stopped_at(1):
        command.main(argv(data))
    last = data / "logs/train5+fake50%/seed0/checkpoints/last.ckpt"
    payload = read_checkpoint(last)
    payload["training"]["epoch"] = payload["training"].pop("updates")
    write_checkpoint(last, payload)
    with pytest.raises(UserError, match="earlier version.*remove it to start again"):
        command.main(argv(data))


def test_results_without_the_later_options_still_count(data, monkeypatch):
    """A finished run that knows nothing of an option was made with what is its default."""
    first = run(data)
    path = data / "logs/train5+fake50%/seed0/result.json"
    earlier = json.loads(path.read_text())
    for name in ("match_steps", "crop_flip", "d4"):
        del earlier["settings"][name]
    path.write_text(json.dumps(earlier))
    monkeypatch.setattr(runs, "build_training", None)
    assert run(data)["mean"] == first["mean"]
    with pytest.raises(UserError, match=r"d4 False there, True now"):
        run(data, "--d4")


def test_two_processes_make_the_network_of_one(data, tmp_path):
    """Mixup, cutmix and averaging included; only sums are in another order."""
    options = ("--batch-size", 16, "--drop-path", 0, "--lr", 0.01, "--epochs", 4)
    options = (*options, "--logdir", tmp_path / "logs")
    assert in_ranks(2, command.main, argv(data, *options, "--devices", 2)) == [0, 0]
    two = tmp_path / "logs" / "train5+fake50%"
    command.main(argv(data, *options[:-1], tmp_path / "one"))
    one = tmp_path / "one" / "train5+fake50%"
    a, b = (read_checkpoint(f / "seed0/checkpoints/best.ckpt")["state_dict"] for f in (one, two))
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.allclose(value, b[name], atol=1e-4), name
    summaries = [json.loads((f / "summary.json").read_text()) for f in (one, two)]
    results = [summary["per_seed"][0] for summary in summaries]
    assert [result["devices"] for result in results] == [1, 2]
    for name in ("updates", "best_update", "batch_size"):
        assert results[0][name] == results[1][name]
    for split in ("val", "test"):
        p, q = (Predictions.read(f / f"seed0/predictions_{split}.csv") for f in (one, two))
        assert p.paths == q.paths and abs(p.probabilities - q.probabilities).max() < 1e-3
    losses = [
        [float(row.split(",")[2]) for row in (f / "seed0/metrics.csv").read_text().split()[1:]]
        for f in (one, two)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3) and len(losses[0]) == 4


def test_shares_of_a_batch_keep_the_pairs_that_mixup_makes(data):
    """Three processes, batches of 12: opposite images of a share are opposite in the batch."""
    splits = loaded_splits(data, Settings(**NETWORK))
    course = Course(12, 1, (1, 2, 3))
    ranks = [Ranks(), *(Ranks(rank, 3) for rank in range(3))]
    drawn = [list(RunBatches(splits.train, course, 0, each, lambda: 0)) for each in ranks]
    for batch, *parts in zip(*drawn, strict=True):
        assert sorted(sum(parts, [])) == sorted(batch) and {len(part) for part in parts} == {4}
        for part in parts:
            for mine, other in zip(part, part[::-1], strict=True):
                assert batch.index(mine) + batch.index(other) == 11
    # The bad version, every third image: its opposites are others.
    strided = batch[::3]
    assert batch.index(strided[0]) + batch.index(strided[-1]) != 11


def test_too_few_images_for_the_devices():
    with pytest.raises(UserError, match="21 training images.* too few for 11 devices"):
        Course.of(Settings(**NETWORK), 21, ranks=11)


def test_predictions_do_not_depend_on_the_batch(data):
    settings = Settings(**NETWORK)
    splits = loaded_splits(data, settings)
    torch.manual_seed(0)
    model = build_network(settings, splits.classes)
    predictor = Predictor(Devices(), workers=0)
    found = [
        predictor.logits(model, predictor.loader(splits.test, size)) for size in (1, 4, 18, 100)
    ]
    for logits in found:
        assert logits.shape == (18, 3) and torch.allclose(logits, found[0], atol=1e-5)


def test_resume_by_name_and_its_refusals(data, tmp_path, monkeypatch):
    with stopped_at(1):
        command.main(argv(data))
    last = data / "logs/train5+fake50%/seed0/checkpoints/last.ckpt"
    elsewhere = ("--logdir", tmp_path / "elsewhere", "--resume", last)
    with pytest.raises(UserError, match="epochs 2 there, 3 now"):
        command.main(argv(data, *elsewhere, epochs=3))
    with pytest.raises(UserError, match="is of seed 0, not 1"):
        command.main(argv(data, *elsewhere, "--seed", 1))
    command.main(argv(data, *elsewhere))
    with pytest.raises(UserError, match="is finished; choose another"):
        command.main(argv(data, *elsewhere))
    best = tmp_path / "elsewhere/train5+fake50%/seed0/checkpoints/best.ckpt"
    with pytest.raises(UserError, match="finished network"):
        command.main(argv(data, "--logdir", tmp_path / "third", "--resume", best))


def test_batches_do_not_depend_on_loader_processes(data):
    settings = Settings(**NETWORK, epochs=2, batch_size=8)
    found = []
    for workers in (0, 2):
        _, _, batches = prepared(data, settings, 5, workers=workers)
        torch.manual_seed(workers)
        found.append([batch["image"] for batch in batches.train_dataloader()])
    assert len(found[0]) == 2 * (21 // 8)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][0], found[0][2]), "another epoch, other images"


def test_seeds_differ_and_repeat(data):
    settings = Settings(**NETWORK, epochs=1)
    states = [trained(data, settings, seed).best_state for seed in (0, 0, 1)]
    assert same(states[0], states[1]) and not same(states[0], states[2])


# --- Training details ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch_size, mixup, batch, steps",
    [(256, 0.8, 20, 1), (256, 0.0, 21, 1), (8, 0.8, 8, 2), (7, 0.0, 7, 3), (20, 0.8, 20, 1)],
)
def test_no_epoch_is_empty_and_mixed_batches_are_even(data, batch_size, mixup, batch, steps):
    settings = Settings(**NETWORK, epochs=1, batch_size=batch_size, mixup=mixup, cutmix=mixup)
    arm, model, batches = prepared(data, settings)
    assert (model.course.batch_size, model.course.steps) == (batch, steps)
    labels = [len(found["label"]) for found in batches.train_dataloader()]
    assert labels == [batch] * steps
    assert model.learning_rate == pytest.approx(5e-4 * batch / 512)
    train_to_the_end(arm, model, batches, RunFolder(data / "run"), None)
    assert len(model.history) == 1


def test_matched_arms_get_the_same_updates_schedule_and_validations(data):
    """Whatever the size of the set: 21 images and 9, in batches of 8."""
    small = data / "small"
    tiny.tiles(small, 3, seed=7)
    found = {}
    for subset in ("train5+fake50%", "small"):
        settings = Settings(**NETWORK, batch_size=8, match_steps=21, validations=4, lr=0.05)
        settings.check()
        model = trained(data, settings, subset=subset)
        count = model.optimizers(False).state[model.net.net.head.bias]["step"].item()
        rows = model.history
        found[subset] = ([row["updates"] for row in rows], [row["lr"] for row in rows], count)
        images = 21 if subset != "small" else 9
        assert rows[-1]["epoch"] == round(21 / (images // 8), 2)
    assert found["small"] == found["train5+fake50%"]
    updates, rates, count = found["small"]
    assert updates == [6, 11, 16, 21] and count == 21
    floor, top = 1e-5, 8 / 512 * 0.05
    assert rates == pytest.approx(
        [floor + (top - floor) * (1 + math.cos(math.pi * (u - 1) / 21)) / 2 for u in updates]
    )
    # The bad version: equal epochs, and the larger set gets twice the updates.
    settings = Settings(**NETWORK, batch_size=8, epochs=4)
    lengths = [Course.of(settings, images).updates for images in (21, 9)]
    assert lengths == [8, 4]


def test_match_steps_from_the_command(data):
    summary = run(data, *MATCHED)
    assert (summary["updates"], summary["epochs"], summary["validations"]) == (11, 5.5, 4)
    result = summary["per_seed"][0]
    assert result["best_update"] in (3, 6, 9, 11)
    assert result["best_epoch"] == result["best_update"] / 2
    # More validations than updates are wanted by default: one after each.
    summary = run(data, "--epochs", 300, "--match_steps", 3, "--overwrite")
    assert summary["validations"] == 3


def test_predictions_of_every_image(data):
    summary = run(data)
    folder = data / "logs/train5+fake50%/seed0"
    for split in ("val", "test"):
        with (folder / f"predictions_{split}.csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        names = sorted(tiny.CLASSES)
        assert list(rows[0]) == ["path", "group", "label", "predicted", *(f"p_{n}" for n in names)]
        files = [p.relative_to(data / split).as_posix() for p in (data / split).rglob("*.png")]
        assert [row["path"] for row in rows] == sorted(files)
        for row in rows:
            p = [float(row[f"p_{name}"]) for name in names]
            assert sum(p) == pytest.approx(1) and row["path"].startswith(row["label"] + "/")
            assert row["predicted"] == names[p.index(max(p))] and row["group"] == ""
        right = sum(row["label"] == row["predicted"] for row in rows)
        assert right / len(rows) == summary["per_seed"][0][split]["accuracy"]
        # What is read back gives the same numbers.
        read = Predictions.read(folder / f"predictions_{split}.csv").scores()
        expected = summary["per_seed"][0][split]
        for name in OF_PROBABILITIES:
            assert read.pop(name) == pytest.approx(expected[name])
        assert read == {key: expected[key] for key in read}


def write_groups(data, split=True, per_group=3):
    """A table of regions, `per_group` tiles each, for val and test."""
    path = data / "groups.csv"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["split", "file", "region"] if split else ["file", "region"])
        for name in ("val", "test"):
            for number, file in enumerate(sorted((data / name).rglob("*.png"))):
                below = file.relative_to(data / name).as_posix()
                row = [below, f"{name}{number // per_group}"]
                writer.writerow([name, *row] if split else row)
    return path


def test_intervals_over_groups(data, capsys):
    table = write_groups(data)
    summary = run(data)
    over_images = summary["bootstrap"]["test"]
    assert over_images["groups"] is None
    assert sum("over images, as no groups were given" in note for note in summary["notes"]) == 1
    # Groups given later are written into the predictions that are there; nothing is trained.
    files = [data / f"logs/train5+fake50%/seed0/predictions_{s}.csv" for s in ("val", "test")]
    before = [Predictions.read(file) for file in files]
    with_groups = run(data, "--groups", table, "--group_column", "region")
    assert with_groups["per_seed"] == summary["per_seed"]
    assert [with_groups["bootstrap"][s]["groups"] for s in ("val", "test")] == [5, 6]
    assert any("test has 6 groups" in note for note in with_groups["notes"])
    assert not any("over images" in note for note in with_groups["notes"])
    for old, file, split in zip(before, files, ("val", "test"), strict=True):
        new = Predictions.read(file)
        assert new.groups == [f"{split}{i // 3}" for i in range(len(new.paths))]
        assert new.scores() == old.scores() and old.groups is None
    # They are remembered, so that the same command without the table says the same.
    assert run(data)["bootstrap"] == with_groups["bootstrap"]
    assert "95% over 6 groups: accuracy" in capsys.readouterr().out
    names = {path.name for path in (data / "logs/train5+fake50%").iterdir()}
    assert names == {"confusion.csv", "confusion.png", "per_class.csv", "seed0", "summary.json"}


@pytest.mark.parametrize(
    "spoil, options, message",
    [
        (dict(split=False), "", "val set: .* is in region .*add a column split"),
        ({}, "--group_column slide", r"must have path \(or file\) and slide"),
        (None, "", r"val set: .* has no region for ADI/1_0\.png; add it"),
    ],
)
def test_a_table_of_groups_that_does_not_fit(data, spoil, options, message):
    table = write_groups(data, **(spoil or {}))
    if spoil is None:
        table.write_text("file,region\n")
    else:  # the same names in val and test, in other regions
        for path in (data / "test").rglob("2_*.png"):
            path.rename(path.with_name(path.name.replace("2_", "1_", 1)))
        table = write_groups(data, **spoil)
    words = ["--groups", table, "--group_column", "region", *options.split()]
    with pytest.raises(UserError, match=message) as caught:
        command.main(argv(data, *words))
    assert "\n" not in str(caught.value) and "group_rows" not in str(caught.value)
    assert not (data / "logs").exists()


def test_notes_about_sets_that_mislead(data):
    for i in range(5):
        (data / f"train5+fake50%/ADI/0_{i}.png").unlink()
    shutil.copy(data / "test/LYM/2_0.png", data / "train5+fake50%/LYM/copy.png")
    notes = run(data)["notes"]
    assert any("8 training images of LYM, 2 of ADI" in note for note in notes)
    assert any("1 images of test are in the training set" in note for note in notes)
    assert any("batches of 16 instead of 256" in note for note in notes)
    assert any("`match_steps` gives all the same" in note for note in notes)
    matched = run(data, "--epochs", 300, "--match_steps", 3, "--overwrite")["notes"]
    assert any("3 updates (3 passes) and 3 validations, by `match_steps`" in n for n in matched)
    assert not any("gives all the same" in note for note in matched)


def test_balanced_sets_have_no_note_of_it(data):
    assert not any("not balanced" in note for note in run(data)["notes"])


def test_predictions_that_are_missing_leave_out_the_interval_and_say_so(data):
    run(data)
    (data / "logs/train5+fake50%/seed0/predictions_val.csv").unlink()
    summary = run(data)
    assert list(summary["bootstrap"]) == ["test"]
    assert any(note.startswith("no interval for val") for note in summary["notes"])


def test_a_broken_table_of_predictions_is_one_line(tmp_path):
    path = tmp_path / "predictions_val.csv"
    head = "path,group,label,predicted,p_A"
    rows = (f"{head}\na.png,,B,A,1\n", f"{head}\na.png,,A,A,7\n", f"{head}\na.png,,A,A,nan\n")
    for text in ("", "path,label\n", *rows):
        path.write_text(text)
        with pytest.raises(UserError, match="not a table of predictions"):
            Predictions.read(path)


def test_defaults_are_the_published_settings():
    published = dict(
        arch="vit_small", input_size=224, epochs=300, batch_size=256, opt="adamw", lr=5e-4,
        sched="cosine", min_lr=1e-5, warmup_lr=1e-6, weight_decay=0.05, drop_path=0.1, drop=0.0,
        mixup=0.8, cutmix=1.0, mixup_prob=1.0, mixup_switch_prob=0.5, mixup_mode="batch",
        smoothing=0.1, aa="rand-m9-mstd0.5-inc1", reprob=0.25, remode="pixel", recount=1,
        color_jitter=0.4, model_ema=True, model_ema_decay=0.99996, clip_grad=None, momentum=0.9,
        train_interpolation="bicubic",
    )  # fmt: skip
    settings = Settings()
    assert {name: getattr(settings, name) for name in published} == published
    assert settings.warmup == 5 and Settings(epochs=20).warmup == 2


def scheduled_rates(model):
    """The learning rate of every update, and the optimizer."""
    optimizer, rates = model.configure_optimizers(), []
    for update in range(model.course.updates):
        model.schedule.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates, optimizer


def test_learning_rate_warms_up_and_falls_to_its_floor(data):
    settings = Settings(
        **NETWORK, epochs=10, batch_size=10, warmup_epochs=2, cooldown_epochs=2, lr=0.05
    )
    _, model, _ = prepared(data, settings)
    assert model.course.marks == tuple(range(2, 25, 2)) and model.course.steps == 2
    rates, optimizer = scheduled_rates(model)
    top = 0.05 * 10 / 512
    assert rates[:3] == pytest.approx([1e-6, 1e-6 + (top - 1e-6) / 4, 1e-6 + (top - 1e-6) / 2])
    # timm's cosine counts the warm-up as part of its length.
    assert rates[10] == pytest.approx(1e-5 + (top - 1e-5) * (1 + math.cos(math.pi / 2)) / 2)
    assert rates[20:] == pytest.approx([1e-5] * 4)
    # Biases, norms and embeddings are not decayed.
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {0.0, 0.05}


def test_a_floor_above_the_rate_of_a_tiny_batch_is_lowered(data):
    settings = Settings(**NETWORK, epochs=10, batch_size=2)
    _, model, _ = prepared(data, settings)
    rates, _ = scheduled_rates(model)
    assert max(rates) <= model.learning_rate * (1 + 1e-9) < 1e-5


def test_the_average_is_what_counts_and_does_not_stay_at_its_start(data):
    settings = Settings(**NETWORK, epochs=8, batch_size=10, lr=0.05, mixup=0.0, cutmix=0.0)
    arm, model, batches = prepared(data, settings)
    start = model.net.net.blocks[0].mlp.fc1.weight.detach().clone()
    published = start.clone()  # the published script's average: a fixed decay from the start on
    judge, moved = model.judge, []

    def watching(net):
        now = model.net.net.blocks[0].mlp.fc1.weight.detach()
        published.lerp_(now, 1 - 0.99996**model.course.steps)
        moved.append((now - start).norm())
        return judge(net)

    model.judge = watching
    train_to_the_end(arm, model, batches, RunFolder(data / "run"), None)
    average = model.ema.net.net.blocks[0].mlp.fc1.weight
    assert len(moved) == 8 and (average - start).norm() > 0.5 * moved[-1]
    assert (published - start).norm() < 0.01 * moved[-1], "the bad version, which learns nothing"
    assert not torch.equal(average, model.net.net.blocks[0].mlp.fc1.weight)
    assert model.evaluated is model.ema.net


def test_a_network_of_shuffled_labels_is_worth_chance(data):
    """After the last update: a state that is chosen on val is above chance by the choice alone."""
    plain = dict(mixup=0.0, cutmix=0.0, aa="none", reprob=0.0, smoothing=0.0, drop_path=0.0)
    plain |= dict(crop_flip=False, model_ema=False, batch_size=21, lr=0.05)
    settings = Settings(**NETWORK, **plain, match_steps=20, validations=1)
    splits = loaded_splits(data, settings)
    labels = list(splits.train.labels)

    def accuracy(seed: int) -> float:
        return trained(data, settings, seed, splits=splits).best["val_accuracy"]

    assert accuracy(0) > 0.9
    found = []
    for seed in range(8):
        splits.train.labels = np.random.default_rng(seed).permutation(labels).tolist()
        found.append(accuracy(seed))
    # A class of one colour is right or wrong as a whole, so a network deviates by about 1/3.
    assert np.mean(found) == pytest.approx(1 / 3, abs=3 * (1 / 3) / 8**0.5)


def test_ties_on_val_go_to_the_lower_loss(data):
    arm, model, batches = prepared(data, Settings(**NETWORK, epochs=4))
    offered = iter([(5, 1.0), (5, 0.8), (5, 0.9), (4, 0.1)])

    def judge(_):
        right, loss = next(offered)
        return Validation(torch.zeros(15, 3), loss, {"accuracy": right / 15})

    model.judge = judge
    train_to_the_end(arm, model, batches, RunFolder(data / "run"), None)
    assert model.best["updates"] == 2


def test_a_loss_that_is_no_number_stops_the_run(data):
    arm, model, batches = prepared(data, Settings(**NETWORK, epochs=1))
    with torch.no_grad():
        model.net.net.head.bias.fill_(math.nan)
    with pytest.raises(UserError, match="the loss is nan at step 0"):
        train_to_the_end(arm, model, batches, RunFolder(data / "run"), None)


def test_posterize_keeps_a_bit():
    level = 10.0  # reached by 2% of the draws of rand-m9-mstd0.5
    assert AugmentOp("PosterizeIncreasing").level_fn(level, {}) == (0,), "timm's: a black image"
    for policy in ("rand-m9-mstd0.5-inc1", "original", "augmix-m5-w4-d2", "v0r"):
        transform = train_transform(Settings(**NETWORK, aa=policy))
        policy_step = transform.transforms[2]
        operations = getattr(policy_step, "ops", None) or sum(policy_step.policy, [])
        found = [op for op in operations if op.name.startswith("Posterize")]
        assert found and all(op.level_fn(level, {})[0] >= 1 for op in found)
    strongest = train_transform(Settings(**NETWORK, aa="rand-m10-n8-inc1"))
    for seed in range(50):
        seed_generators(seed)
        assert strongest(Image.new("RGB", (40, 40), "pink")).shape == (3, 32, 32)


NOTHING = dict(aa="none", color_jitter=0.0, reprob=0.0, mixup=0.0, cutmix=0.0)


def test_no_augmentation_at_all_is_the_view_of_the_evaluation(source):
    image = Image.fromarray(read_tile(next((source / "test/TUM").iterdir()))).resize((50, 40))
    plain = train_transform(Settings(**NETWORK, **NOTHING, crop_flip=False))
    model = TileClassifier(**NETWORK, num_classes=3)
    assert torch.allclose(plain(image), model._normalised(eval_transform(32)(image)[None])[0])
    assert torch.equal(plain(image), plain(image))
    cropped = train_transform(Settings(**NETWORK, **NOTHING))
    assert not torch.equal(cropped(image), cropped(image)), "published: crops and mirrors"
    # Erasing and policies stay when only the crop is switched off.
    erased = train_transform(Settings(**NETWORK, crop_flip=False, reprob=1.0))
    assert not torch.equal(erased(image), erased(image))


def test_d4_draws_all_eight_symmetries_alike(source):
    image = Image.fromarray(read_tile(next((source / "test/TUM").iterdir())))
    turned = train_transform(Settings(**NETWORK, **NOTHING, crop_flip=False, d4=True))
    x = train_transform(Settings(**NETWORK, **NOTHING, crop_flip=False))(image)
    eight = [torch.rot90(y, k, (1, 2)) for y in (x, x.flip(2)) for k in range(4)]
    seen = []
    for seed in range(400):
        seed_generators(seed)
        found = turned(image)
        seen.append(next(k for k, y in enumerate(eight) if torch.equal(y, found)))
    counts = [seen.count(k) for k in range(8)]
    assert min(counts) > 25 and sum(counts) == 400, "50 of each are expected"
    # timm's own mirroring would only double what is there already.
    steps = train_transform(Settings(d4=True)).transforms
    assert "RandomHorizontalFlip" not in map(lambda step: type(step).__name__, steps)
    assert steps[1] is random_d4


def test_stain_jitter_scales_each_stain_within_its_bounds():
    amounts = np.array([0.8, 0.6, 0.1])  # of haematoxylin, eosin and the rest
    colour = from_density(amounts.astype(np.float32) @ stain_matrix().astype(np.float32))
    image = Image.fromarray(np.broadcast_to(colour, (32, 32, 3)).copy())
    plain = train_transform(Settings(**NETWORK, **NOTHING, crop_flip=False))
    jittered = train_transform(Settings(**NETWORK, **NOTHING, crop_flip=False, stain_jitter=0.3))
    mean, std = (np.array(v) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    ratios = []
    for seed in range(200):
        seed_generators(seed)
        pixel = jittered(image)[:, 0, 0].double().numpy() * std + mean
        ratios.append(-np.log(pixel) @ np.linalg.inv(stain_matrix()) / amounts)
    ratios = np.array(ratios)[:, :2]  # the rest is little: rounding to grey levels shows
    assert ratios.min() > 0.66 and ratios.max() < 1.34, "0.7 to 1.3, and rounding"
    assert (ratios.min(axis=0) < 0.75).all() and (ratios.max(axis=0) > 1.25).all()
    assert abs(np.corrcoef(ratios.T)[0, 1]) < 0.3, "each stain is drawn on its own"
    white = Image.new("RGB", (32, 32), "white")
    assert torch.equal(jittered(white), plain(white)), "glass has no stain"


# --- Network and weights -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arch, options, features",
    [
        ("vit_tiny", dict(patch_size=8, input_size=64), 192),
        ("vit_tiny", dict(input_size=64), 192),
        ("vit_tiny", dict(input_size=32, avgpool_patchtokens=True), 192),
        ("test_resnet", dict(input_size=40, drop_path=0.1), 96),
        ("test_efficientnet", dict(input_size=64), 256),
    ],
)
def test_architectures(arch, options, features):
    model = TileClassifier(arch, 3, **options).eval()
    size = options["input_size"]
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        assert model(images).shape == (2, 3)
        assert model.forward_features(images).shape == (2, features)
    if arch == "vit_tiny":
        patch = options.get("patch_size", 16)
        assert model.net.pos_embed.shape[1] == 1 + (size // patch) ** 2
        # The class token after the norm, or the mean of the others.
        tokens = model.net.forward_features(model._normalised(images))
        if "avgpool_patchtokens" not in options:
            assert torch.equal(model.forward_features(images), tokens[:, 0])
        else:
            expected = model.net.fc_norm(tokens[:, 1:].mean(dim=1))
            assert torch.allclose(model.forward_features(images), expected)


def test_vit_small_is_the_published_size():
    model = TileClassifier("vit_small", 9)
    assert sum(p.numel() for p in model.parameters()) == 21_669_129
    assert model.net.patch_embed.patch_size == (16, 16) and model.feature_dim == 384


@pytest.mark.parametrize(
    "arch, options, message",
    [
        ("vit_smal", {}, "nearest: vit_small"),
        ("facebook/vit", {}, "nor in timm"),
        ("vit_tiny", dict(input_size=60), "not a multiple of the 16 px patches"),
        ("test_resnet", dict(patch_size=8, input_size=32), "takes no patch_size"),
        ("test_resnet", dict(attn_drop_rate=0.1, input_size=32), "takes no attn_drop_rate"),
        ("test_resnet", dict(avgpool_patchtokens=True, input_size=32), "no class token"),
    ],
)
def test_architectures_that_do_not_go(arch, options, message):
    with pytest.raises(UserError, match=message):
        TileClassifier(arch, 3, **options)


def test_uint8_input_is_normalised_as_timm_does(source):
    model = TileClassifier(**NETWORK, num_classes=3)
    path = next((source / "test/TUM").iterdir())
    image = Image.fromarray(read_tile(path)).resize((50, 40))
    whole = create_transform(32, interpolation="bicubic", crop_pct=0.875)(image)
    ours = model._normalised(eval_transform(32)(image)[None])[0]
    assert torch.allclose(ours, whole, atol=1e-6)


def head(state):
    return {key for key in state if key.startswith("head.")}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_another_script(tmp_path, suffix):
    """A teacher's backbone with a projection head, at another resolution: all but the head fits."""
    teacher = TileClassifier("test_vit", 7, patch_size=16, input_size=64).net.state_dict()
    state = {f"module.backbone.{key}": value for key, value in teacher.items()}
    state["module.head.mlp.0.weight"] = torch.zeros(4, 4)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"epoch": 3, "args": argparse.Namespace(lr=1), "teacher": state}, path)
    else:
        save_file(state, path)
    model = TileClassifier(**NETWORK, num_classes=3)
    before = {key: value.clone() for key, value in model.net.state_dict().items()}
    load_pretrained(model, path, classes=tiny.CLASSES)
    after = model.net.state_dict()
    assert "the head is new" in model.origin
    for key, value in after.items():
        if key in head(after):
            assert torch.equal(value, before[key])
        elif key != "pos_embed":
            assert torch.equal(value, teacher[key])
    assert after["pos_embed"].shape[1] < teacher["pos_embed"].shape[1]


def test_own_checkpoint_keeps_its_head_for_the_same_classes_only(data, tmp_path):
    checkpoint = save_vit(tmp_path / "a.ckpt", sorted(tiny.CLASSES))
    wanted = read_checkpoint(checkpoint)["state_dict"]["net.head.weight"]
    for classes, kept in ((sorted(tiny.CLASSES), True), (["ADI", "LYM", "MUC"], False)):
        settings = Settings(**NETWORK, finetune=str(checkpoint))
        model = build_network(settings, classes)
        assert torch.equal(model.net.head.weight, wanted) is kept
    summary = run(data, "--finetune", checkpoint)
    assert "head included" in summary["per_seed"][0]["weights"]
    save_vit(checkpoint, sorted(tiny.CLASSES), seed=1)
    with pytest.raises(UserError, match="the files of finetune changed"):
        run(data, "--finetune", checkpoint)


def save_vit(path, classes, seed=0):
    torch.manual_seed(seed)
    model = TileClassifier(**NETWORK, num_classes=len(classes))
    model.classes = classes
    write_checkpoint(
        path,
        tiny.vit_checkpoint(model),
    )
    return path


def test_weights_that_do_not_fit(tmp_path):
    model = TileClassifier(**NETWORK, num_classes=3)
    state = model.net.state_dict()
    path = tmp_path / "weights.pth"

    torch.save({k: v for k, v in state.items() if "blocks.1.mlp" not in k}, path)
    with pytest.raises(UserError, match=r"do not fit.*Missing.*blocks\.1\.mlp"):
        load_pretrained(model, path)
    torch.save({**state, "extra.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"do not fit.*Unexpected.*extra\.weight"):
        load_pretrained(model, path)
    with pytest.raises(UserError, match="no such weights"):
        load_pretrained(model, path, entry="teacher")
    torch.save({"epoch": 1}, path)
    with pytest.raises(UserError, match="holds no tensors"):
        load_pretrained(model, path)
    path.write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(UserError, match="cannot be read"):
        load_pretrained(model, path)
    path.with_suffix(".safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_pretrained(model, path.with_suffix(".safetensors"))


# --- Mistakes ------------------------------------------------------------------------------------


def spoil_class_names(data):
    (data / "val/TUM").rename(data / "val/TUMOUR")


def spoil_class_folder(data):
    for path in (data / "test/LYM").iterdir():
        path.unlink()


def spoil_image(data):
    path = data / "test/LYM/2_3.png"
    path.write_bytes(path.read_bytes()[:200])


def spoil_train(data):
    shutil.rmtree(data / "train5+fake50%/ADI")
    shutil.rmtree(data / "train5+fake50%/LYM")


def spoil_one_train_class(data):
    shutil.rmtree(data / "train5+fake50%/LYM")


def spoil_train_class_folder(data):
    for path in (data / "train5+fake50%/LYM").iterdir():
        path.unlink()


def spoil_val(data):
    shutil.rmtree(data / "val")


@pytest.mark.parametrize(
    "spoil, options, message",
    [
        (spoil_class_names, "", r"val: class folders .*missing \['TUM'\], extra \['TUMOUR'\]"),
        (spoil_class_folder, "", "test/LYM has no images"),
        (spoil_image, "", r"test/LYM/2_3\.png: .*unreadable or truncated"),
        (spoil_train, "", "one class folder"),
        (spoil_one_train_class, "", "has no class folder LYM, which .*val has: .* add images of"),
        (spoil_train_class_folder, "", "train5.*LYM has no images"),
        (None, "--group_column region", "belongs to --groups"),
        (None, "--groups nothing.csv", "nothing.csv does not exist"),
        (spoil_val, "", "val does not exist"),
        (None, "--output_dir nowhere", "nowhere does not exist"),
        (None, "--output_dir .", "must name a folder below .?data_path"),
        (None, "--output_dir val/ADI", "is what the network is evaluated on"),
        (None, "--output_dir ../data", "must name a folder below .?data_path"),
        (None, "--data_path /nowhere", "/nowhere does not exist"),
        (None, "--num_classes 9", "has 3 class folders"),
        (None, "--arch vit_smal", "nearest: vit_small"),
        (None, "--input-size 40", "not a multiple"),
        (None, "--batch-size 15", "must be even"),
        (None, "--epochs 5 --warmup-epochs 5", "--warmup_epochs: 5 must be less than epochs"),
        (None, "--cooldown-epochs 2 --sched constant", "needs a sched that decays"),
        (None, "--match_steps 9", "--epochs: 2: match_steps 9 counts updates; leave one"),
        (None, "--match_steps 9 --epochs 300 --warmup-epochs 1", "and warmup_updates; leave"),
        (None, "--match_steps 9 --epochs 300 --validations 10", "at most match_steps 9; lower"),
        (None, "--match_steps 9 --epochs 300 --warmup_updates 9", "must be less than match_st"),
        (None, "--validations 10", "--validations: 10 belongs to match_steps"),
        (None, "--warmup_updates 1", "--warmup_updates: 1 belongs to match_steps"),
        (None, "--color-jitter 0.1", "no effect with aa"),
        (None, "--aa strong", "no policy that timm knows"),
        (None, "--opt adamww", "use .*adamw"),
        (None, "--finetune nothing.pth", "nothing.pth does not exist"),
        (None, "--checkpoint_key teacher", "the file finetune"),
        (None, "--precision 16-mixed", "needs a CUDA device"),
        (None, "--device cuda:77", "cuda:77"),
        (None, "--device cpu --devices 4096", "4096: there is no GPU to use here"),
        (None, "--eval --devices 2", "is for training"),
        (None, "--seed 0 --seeds 1 2", "not allowed with --seeds"),
        (None, "--resume x --seeds 1 2", "one network"),
        (None, "--resume x", "no file x"),
        (None, "--eval", "seed0 does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(data, spoil, options, message):
    if spoil:
        spoil(data)
    with pytest.raises(UserError, match=message) as caught:
        command.main(argv(data, *options.split()))
    assert "\n" not in str(caught.value)
    assert not (data / "logs").exists()


def test_evaluating_a_checkpoint_of_another_kind(data, tmp_path):
    autoencoder = tiny.save(tiny.autoencoder(), tmp_path / "autoencoder.ckpt")
    with pytest.raises(UserError, match="of kind autoencoder; needed is vit"):
        command.main(argv(data, "--eval", "--resume", autoencoder))


def start(*arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "eval.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    "options", [("--epochs", "0"), ("--drop-path", "1.5"), ("--lr", "nan"), ("--no-such-flag",)]
)
def test_options_that_are_wrong_by_themselves(data, options):
    with pytest.raises(UserError, match=options[0].replace("-", "[-_]")):
        command.main(argv(data, *options))


def test_exit_status_2_and_one_line_from_a_shell(data):
    done = start(*argv(data, "--data_path", data / "nowhere"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("eval.py: error: ") and done.stderr.count("\n") == 1
    assert "nowhere does not exist" in done.stderr


def test_help_answers_at_once():
    """Measured in processor time, which a busy machine does not stretch."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = start("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "--model_ema" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_options_of_the_published_script(data):
    """Its flags keep their names, so that its command lines still run."""
    line = (
        "--batch-size 8 --epochs 1 --num_classes 3 --avgpool_patchtokens 1 --arch test_vit"
        " --patch_size 16 --input-size 32 --drop 0.0 --attn_drop_rate 0.1 --drop-path 0.1"
        " --model-ema --model-ema-decay 0.999 --opt adamw --clip-grad 1.0 --weight-decay 0.05"
        " --momentum 0.9 --sched cosine --lr 5e-4 --min-lr 1e-5 --warmup-lr 1e-6"
        " --warmup-epochs 0 --cooldown-epochs 1 --color-jitter 0.4 --aa rand-m9-mstd0.5-inc1"
        " --smoothing 0.1 --train-interpolation bicubic --reprob 0.25 --remode pixel --recount 1"
        " --mixup 0.8 --cutmix 1.0 --mixup-prob 1.0 --mixup-switch-prob 0.5 --mixup-mode batch"
        " --device cpu --seed 3 --num_workers 0"
    )
    summary = run(data, *line.split())
    assert summary["settings"]["clip_grad"] == 1.0 and summary["seeds"] == [3]
    assert summary["per_seed"][0]["epochs"] == 2, "one epoch and one of cooldown"


# --- The baseline --------------------------------------------------------------------------------


def test_colour_histogram_by_hand():
    pixels = torch.zeros(2, 2, 3, dtype=torch.uint8).numpy()
    pixels[0, 0] = (255, 16, 15)
    expected = torch.zeros(48)
    expected[[0, 15, 16, 17, 32]] = torch.tensor([0.75, 0.25, 0.75, 0.25, 1.0])
    assert colour_histogram(pixels).tolist() == expected.tolist()


def test_a_pass_draws_the_share_of_real_tiles_that_is_asked_for(data):
    for index in range(30):
        for folder in (data / "train5+fake50%").iterdir():
            shutil.copy(min(folder.iterdir()), folder / f"synthetic_{index}.png")
    splits = open_splits(data, "train5+fake50%", Settings(**NETWORK, real_share=0.5))
    tiles = splits.train
    real = [not name.rpartition("/")[2].startswith("synthetic_") for name in tiles.relative_paths]
    drawn = [tiles.drawn(seed=0, epoch=epoch) for epoch in range(2)]
    for one in drawn:
        assert len(one) == tiles.pass_length() == len(tiles)
        assert sum(real[i] for i in one) == round(len(tiles) / 2)
    assert len(set(drawn[0]) & set(drawn[1])) < len(set(drawn[0]))
    added = np.concatenate(drawn)
    assert {i for i in range(len(tiles)) if not real[i]} <= set(added.tolist())
    for path in (data / "train5+fake50%").glob("*/synthetic_*"):
        path.unlink()
    with pytest.raises(UserError, match="0 added tiles"):
        open_splits(data, "train5+fake50%", Settings(**NETWORK, real_share=0.5))
