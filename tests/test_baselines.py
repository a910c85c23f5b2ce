"""scripts/baselines.py: colour alone and linear probes, written as eval.py writes."""

import csv
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file

import eval as evaluation
from ldm.checkpoint import write_checkpoint
from ldm.data.tile_files import TileFiles
from ldm.errors import UserError
from ldm.evaluation.baselines import STRENGTHS, colour_features, colour_mean
from ldm.evaluation.metrics import HEADLINE
from ldm.features.probe import logistic_regression
from ldm.models.vit import TileClassifier
from scripts import baselines

CLASSES = sorted(tiny.CLASSES)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiles")
    for seed, (name, count) in enumerate({"train5": 12, "val": 5, "test": 8}.items()):
        tiny.tiles(folder / name, count, seed)
    return folder


@pytest.fixture
def data(source, tmp_path):
    return Path(shutil.copytree(source, tmp_path / "data"))


def argv(data, *options):
    fixed = ["--data_path", data, "--output_dir", "train5", "--logdir", data / "logs"]
    return [str(word) for word in (*fixed, "--num_workers", 0, "--device", "cpu", *options)]


def run(data, kind, *options):
    baselines.main(argv(data, "--kind", kind, *options))
    return json.loads((data / "logs" / kind / "train5" / "summary.json").read_text())


def shuffle_labels(folder, seed=0):
    """The same images in the same numbers per class, at random."""
    files = sorted(folder.rglob("*.png"))
    pixels = [path.read_bytes() for path in files]
    random.Random(seed).shuffle(pixels)
    for path, content in zip(files, pixels, strict=True):
        path.write_bytes(content)


def test_colour_mean_by_hand():
    pixels = np.array([[[255, 0, 0], [0, 0, 51]]], dtype=np.uint8)
    assert colour_mean(pixels).tolist() == pytest.approx([0.5, 0.0, 0.1])


def test_colour_alone_tells_plain_colours_apart_and_the_summary_is_that_of_eval(data, capsys):
    baselines.main(argv(data))  # both kinds of colour
    assert "95% over images" in capsys.readouterr().out
    evaluation.main(
        [
            *argv(data)[:4], "--arch", "test_vit", "--input-size", "32", "--epochs", "1",
            "--device", "cpu", "--num_workers", "0", "--logdir", str(data / "vit"),
        ]
    )  # fmt: skip
    network = json.loads((data / "vit/train5/summary.json").read_text())
    for kind, width in (("colour_mean", 3), ("colour_histogram", 48)):
        folder = data / "logs" / kind / "train5"
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["mean"]["accuracy"] == 1.0 and summary["split"] == "test"
        assert set(network) == set(summary)
        for split in ("val", "test"):
            assert set(summary["per_seed"][0][split]) == set(network["per_seed"][0][split])
            assert set(summary["bootstrap"][split]) == set(network["bootstrap"][split])
            name = f"seed0/predictions_{split}.csv"
            ours, theirs = (
                list(csv.DictReader(path.open(newline="")))
                for path in (folder / name, data / "vit/train5" / name)
            )
            assert [r["path"] for r in ours] == [r["path"] for r in theirs]
            assert list(ours[0]) == list(theirs[0])
        result = summary["per_seed"][0]
        assert result["features"] == width and result["strength"] in STRENGTHS
        assert summary["updates"] is None and summary["seeds"] == [0]
        assert summary["data"]["test"] == network["data"]["test"]
        files = {path.name for path in folder.iterdir()}
        assert files == {p.name for p in (data / "vit/train5").iterdir()}


def accuracy_of_one_penalty(data) -> float:
    train, test = (TileFiles.below(data / name) for name in ("train5", "test"))
    known, x = (colour_features(tiles.paths, "colour_histogram") for tiles in (train, test))
    model = logistic_regression(known, np.array(train.labels), strength=1.0)
    return float((model.predict(x) == test.labels).mean())


def test_labels_that_say_nothing_are_worth_chance(data):
    accuracies, chosen = [], []
    for seed in range(30):
        shuffle_labels(data / "train5", seed)
        accuracies.append(accuracy_of_one_penalty(data))
        if seed < 3:
            chosen.append(run(data, "colour_histogram", "--overwrite")["mean"]["accuracy"])
    # A class of one colour is right or wrong as a whole, so one draw deviates by about 1/3.
    assert np.mean(accuracies) == pytest.approx(1 / 3, abs=3 * (1 / 3) / 30**0.5)
    assert np.mean(chosen) < 0.6, "the penalty is chosen on val, whose labels are true"


def test_a_change_of_order_changes_nothing(data):
    first = run(data, "colour_histogram")
    for name in ("train5", "val", "test"):
        for i, path in enumerate(sorted((data / name).rglob("*.png"))):
            path.rename(path.with_name(f"{100 - i:03}_{path.name}"))
    baselines.main(argv(data, "--kind", "colour_histogram", "--logdir", data / "again"))
    second = json.loads((data / "again/colour_histogram/train5/summary.json").read_text())
    assert second["mean"] == pytest.approx(first["mean"])


def test_val_chooses_the_penalty_and_test_does_not(data):
    """With its classes exchanged the test set is all wrong, and the choice stays."""
    first = run(data, "colour_mean")
    assert first["mean"]["accuracy"] == 1.0
    for old, new in (("ADI", "x"), ("LYM", "ADI"), ("TUM", "LYM"), ("x", "TUM")):
        (data / "test" / old).rename(data / "test" / new)
    second = run(data, "colour_mean", "--overwrite")
    assert second["mean"]["accuracy"] == 0.0, "colour and nothing else"
    assert first["per_seed"][0]["strength"] == second["per_seed"][0]["strength"]
    assert first["per_seed"][0]["val"] == second["per_seed"][0]["val"]
    assert (first["mean"]["accuracy"], second["mean"]["accuracy"]) == (1.0, 0.0)


def test_what_is_there_is_not_computed_again(data, monkeypatch):
    first = run(data, "colour_mean")
    table = data / "groups.csv"
    rows = ["split,file,slide"]
    for split in ("val", "test"):
        for i, path in enumerate(sorted((data / split).rglob("*.png"))):
            rows.append(f"{split},{path.relative_to(data / split).as_posix()},{split}{i // 4}")
    table.write_text("\n".join(rows) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldm.evaluation.baselines.colour_features", None)  # a call is a TypeError
        assert run(data, "colour_mean") == first
        grouped = run(data, "colour_mean", "--groups", table, "--group_column", "slide")
        assert grouped["bootstrap"]["test"]["groups"] == 6
        assert grouped["per_seed"] == first["per_seed"]
    shutil.copy(data / "val/ADI/1_0.png", data / "train5/ADI/another.png")
    with pytest.raises(UserError, match="files of train changed; add [-`]*overwrite`?"):
        run(data, "colour_mean")


def timm_weights(path, arch="test_resnet", seed=0):
    """A file as timm's repositories have them: plain safetensors with a head of 1000 classes."""
    torch.manual_seed(seed)
    save_file(TileClassifier(arch, 1000, input_size=32).net.state_dict(), path)
    return path


def test_linear_probe_of_timm_weights_and_of_a_run(data):
    weights = timm_weights(data / "model.safetensors")
    options = ("--arch", "test_resnet", "--input_size", 32, "--weights", weights)
    summary = run(data, "linear_probe", *options)
    assert summary["per_seed"][0]["features"] == 96
    assert "model.safetensors" in summary["arch"]
    assert summary["mean"]["accuracy"] > 0.6, "random features of plain colours; chance is 1/3"
    # Other weights are another baseline.
    timm_weights(weights, seed=1)
    with pytest.raises(UserError, match="extractor .* there, .* now; add [-`]*overwrite`?"):
        run(data, "linear_probe", *options)

    torch.manual_seed(0)
    model = TileClassifier("test_vit", 3, input_size=32)
    model.classes = CLASSES
    checkpoint = data / "run/checkpoints/best.ckpt"
    write_checkpoint(checkpoint, tiny.vit_checkpoint(model))
    probe = run(data, "linear_probe", "--weights", data / "run", "--overwrite")
    assert probe["per_seed"][0]["features"] == 64 and "test_vit of" in probe["arch"]
    assert all(0 <= probe["mean"][name] <= 1 for name in HEADLINE)


def test_label_spreading_over_unlabelled_tiles(data, tmp_path):
    pool = tmp_path / "pool"
    tiny.tiles(pool, 20, seed=7)
    shutil.copytree(data / "train5", pool / "labelled")  # are left out
    weights = timm_weights(data / "model.safetensors")
    options = ["--arch", "test_resnet", "--input_size", 32, "--weights", weights]
    options += ["--cache", tmp_path / "kept"]
    summary = run(data, "label_spreading", *options, "--unlabelled", pool)
    assert summary["per_seed"][0]["unlabelled"] == 60
    assert "strength" not in summary["per_seed"][0]
    assert summary["mean"]["accuracy"] > 0.6, "random features of plain colours; chance is 1/3"
    assert run(data, "label_spreading", *options, "--unlabelled", pool) == summary
    # Kept features serve other baselines, too: of train5, val and test.
    before = set((tmp_path / "kept").iterdir())
    run(data, "linear_probe", *options)
    assert set((tmp_path / "kept").iterdir()) == before and len(before) == 4
    min((pool / "ADI").iterdir()).unlink()
    with pytest.raises(UserError, match="unlabelled .* there, .* now; add [-`]*overwrite`?"):
        run(data, "label_spreading", *options, "--unlabelled", pool)
    with pytest.raises(UserError, match="15 of its tiles are those of `val`"):
        run(data, "label_spreading", *options, "--unlabelled", data / "val", "--overwrite")


def test_fine_tuning_of_timm_weights(data):
    """eval.py --finetune with a file as timm has them: the body is loaded, the head is new."""
    weights = timm_weights(data / "model.safetensors")
    words = [
        *argv(data)[:4], "--arch", "test_resnet", "--input-size", "32", "--epochs", "1",
        "--device", "cpu", "--num_workers", "0", "--logdir", str(data / "vit"), "--drop-path", "0",
        "--finetune", str(weights),
    ]  # fmt: skip
    evaluation.main(words)
    summary = json.loads((data / "vit/train5/summary.json").read_text())
    assert "the head is new" in summary["per_seed"][0]["weights"]
    assert summary["data"]["finetune"]["sha256"]


def spoil_image(data):
    Image.new("I;16", (8, 8)).save(data / "test/ADI/deep.png")


@pytest.mark.parametrize(
    "spoil, options, message",
    [
        (None, "--kind linear_probe", "linear_probe needs a network: --weights RUN"),
        (None, "--kind colour_mean --arch vit_small", "belongs to --kind linear_probe"),
        (None, "--kind classifier --cache {data}/kept", "belongs to --kind linear_probe"),
        (None, "--kind linear_probe --weights {data} --input_size 32", "belongs to --arch"),
        (None, "--kind linear_probe --arch vit_smal --weights {data}/val", "nearest: vit_small"),
        (None, "--kind linear_probe --arch vit_small", r"nothing is downloaded; give a local file"),
        (
            None,
            "--kind linear_probe --weights {data} --unlabelled {data}",
            "--kind label_spreading",
        ),
        (None, "--kind label_spreading --arch vit_small", "unlabelled.*belongs to"),
        (None, "--kind linear_probe --weights nowhere", "nor an existing path"),
        (None, "--output_dir nowhere", "nowhere does not exist"),
        (None, "--group_column x", "belongs to --groups"),
        (spoil_image, "", "more than 8 bits"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(data, spoil, options, message):
    if spoil:
        spoil(data)
    words = [word.format(data=data) for word in options.split()]
    with pytest.raises(UserError, match=message) as caught:
        baselines.main(argv(data, *words))
    assert "\n" not in str(caught.value)
    assert not (data / "logs").exists()


def test_an_unknown_kind_is_refused(data):
    with pytest.raises(UserError, match="kind: 'texture' must be one of colour_mean, colour_h"):
        baselines.main(argv(data, "--kind", "colour_mean,texture"))
