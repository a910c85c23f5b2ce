"""The guidance sweep: scores that fall where they should, and the command on tiny real models."""

import csv
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.nn.functional as F
from PIL import Image

from ldm.checkpoint import write_checkpoint
from ldm.errors import UserError
from ldm.evaluation.sweep import (
    Row,
    best,
    draw,
    markdown,
    pairwise_distance,
    score,
    write_sweep,
)
from ldm.features.sets import FeatureSet
from ldm.models.vit import TileClassifier
from scripts import guidance_sweep

K, D, PER_CLASS = 3, 16, 40


def judged(seed: int, spread: float = 0.3, per_class: int = PER_CLASS) -> FeatureSet:
    """Three clouds on the sphere; the judge gives each point its nearest cloud."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(K).repeat_interleave(per_class)
    centres = torch.eye(D)[:K]
    noise = spread * torch.randn(len(labels), D, generator=generator) / D**0.5 * 2
    features = F.normalize(centres[labels] + noise, dim=1)
    return tiles_with(features, labels, features @ centres.T)


def tiles_with(features: torch.Tensor, labels: torch.Tensor, logits: torch.Tensor) -> FeatureSet:
    classes = ["a", "b", "c"]
    return FeatureSet(features, labels, [], classes, "", "", others={"logits": logits})


def shuffled(tiles: FeatureSet) -> FeatureSet:
    order = torch.randperm(len(tiles.labels), generator=torch.Generator().manual_seed(0))
    return dataclasses.replace(tiles, labels=tiles.labels[order])


def collapsed(tiles: FeatureSet) -> FeatureSet:
    """One tile of each class, again and again, almost."""
    first = torch.arange(K).repeat_interleave(PER_CLASS) * PER_CLASS
    features = F.normalize(tiles.values[first] + 1e-4 * tiles.values, dim=1)
    return tiles_with(features, tiles.labels, tiles.logits[first])


def test_tiles_like_real_ones_score_well():
    scores = SimpleNamespace(**score(judged(0), judged(1)))
    assert scores.images == K * PER_CLASS
    assert scores.agreement > 0.95
    assert abs(scores.class_kernel_distance) < 2 * scores.class_kernel_distance_error + 1e-3
    assert scores.recall > 0.8 and scores.precision > 0.8
    assert scores.diversity == pytest.approx(1, abs=0.1)


def test_wrong_classes_show_in_agreement_and_class_distance_alone():
    right, wrong = (
        SimpleNamespace(**score(judged(0), other)) for other in (judged(1), shuffled(judged(1)))
    )
    assert wrong.agreement == pytest.approx(1 / K, abs=0.15)
    assert wrong.class_kernel_distance > 10 * abs(right.class_kernel_distance)
    # Without the labels it is the same set.
    assert wrong.kernel_distance == pytest.approx(right.kernel_distance)
    assert wrong.recall == right.recall


def test_collapse_shows_in_recall_and_diversity():
    scores = SimpleNamespace(**score(judged(0), collapsed(judged(1))))
    assert scores.agreement == 1
    assert scores.recall < 0.1
    assert scores.diversity < 0.05
    assert scores.class_kernel_distance > 5 * abs(score(judged(0), judged(1))["kernel_distance"])


def test_agreement_is_a_mean_over_classes():
    tiles = judged(1)
    predicted = tiles.labels.clone()
    predicted[:PER_CLASS] = 1  # the whole of class 0 is missed
    logits = F.one_hot(predicted[20:], K)
    scores = score(judged(0), tiles_with(tiles.values[20:], tiles.labels[20:], logits))
    assert scores["agreement"] == pytest.approx(2 / 3)  # not 80 / 100
    assert scores["agreement_error"] == 0


def test_pairwise_distance_by_brute_force():
    features = judged(2).values[:7].double()
    pairs = [1 - features[i] @ features[j] for i in range(7) for j in range(7) if i != j]
    assert pairwise_distance(features) == pytest.approx(sum(pairs).item() / 42)


def test_too_few_tiles():
    with pytest.raises(
        UserError, match="the synthetic tiles: a class has 7 tiles, each needs 8 or more"
    ):
        score(judged(0), judged(1, per_class=7))


def row(scale: float, distance: float, error: float, agreement: float, **values) -> Row:
    errors = {"class_kernel_distance_error": error, "agreement": agreement}
    scores = {**score(judged(0), judged(1)), "class_kernel_distance": distance, **errors}
    settings = {"guidance": "classifier", "interval": "all", "sampler": "ddim", "steps": 25}
    facts = {"eta": 1.0, "probability": 0.5, "guidance_to_noise": 0.1, "images_per_s": 2.0}
    return {"scale": scale, **settings, **facts, **scores, "folder": "f", **values}


def test_best_is_clearest_among_the_closest():
    rows = [
        row(0, 0.020, 0.002, 0.2),
        row(5, 0.011, 0.002, 0.5),
        row(10, 0.010, 0.002, 0.4),
        row(30, 0.013, 0.002, 0.9),  # clearer, but further than the error allows
    ]
    assert best(rows)["scale"] == 5


def test_table_and_picture(tmp_path):
    rows = [
        row(0, 0.02, 0.002, 0.25, probability=None, guidance_to_noise=None),
        row(10, 0.01, 0.002, 0.75),
        row(10, 0.03, 0.002, 0.5, interval="200:800"),
    ]
    write_sweep(tmp_path, rows, 0.9, {"temperature": 1.5})
    with (tmp_path / "sweep.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [float(r["agreement"]) for r in table] == [0.25, 0.75, 0.5]
    assert table[0]["probability"] == "" and table[2]["interval"] == "200:800"
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert (record["temperature"], record["best"]["scale"]) == (1.5, 10)
    lines = markdown(rows, real_agreement=0.9).splitlines()
    assert len({line.count("|") for line in lines}) == 1, "every line has the same cells"
    assert ["**" in line for line in lines[2:]] == [False, True, False, False]
    assert draw(rows, 0.9) == draw(rows, 0.9) != draw(rows[:2], 0.9)


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models that belong together, a judge and held-out tiles."""
    folder = tiny.models(tmp_path_factory.mktemp("sweep"))
    for name, classes in (("judge", tiny.CLASSES), ("stranger", ["A", "B", "C"])):
        torch.manual_seed(0)
        net = TileClassifier("test_vit", 3, 32, patch_size=8)
        net.classes = classes
        write_checkpoint(folder / f"{name}.ckpt", tiny.vit_checkpoint(net))
    tiny.tiles(folder / "real", per_class=8)
    tiny.tiles(folder / "few", per_class=7)
    return folder


def sweep(folder: Path, out: Path, *options: str, judge: str = "judge", real: str = "real") -> None:
    guidance_sweep.main(
        ["-r", str(folder / "diffusion.ckpt"), "--judge", str(folder / f"{judge}.ckpt")]
        + ["--real", str(folder / real), "--out", str(out), "-n", "8", "--device", "cpu", *options]
    )


def test_command(folder, tmp_path, capsys):
    guide = ("--classifier", str(folder / "classifier.ckpt"))
    grid = ("--scales", "0,5", "--steps", "2", "--intervals", "all,0:600", *guide)
    sweep(folder, tmp_path / "out", *grid)
    out = capsys.readouterr().out
    assert "[3/3]" in out  # unguided once, not per interval
    assert "best by these numbers: --classifier_scale" in out
    with (tmp_path / "out" / "sweep.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(float(r["scale"]), r["interval"]) for r in rows] == [
        (0, "all"),
        (5, "all"),
        (5, "0:600"),
    ]
    assert all(int(r["images"]) == 24 and float(r["images_per_s"]) > 0 for r in rows)
    ratios = [r["guidance_to_noise"] for r in rows]
    assert ratios[0] == "" and float(ratios[1]) >= float(ratios[2]) > 0
    record = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert record["best"]["scale"] in (0, 5) and record["real"]["tiles"] == 24
    for name in ("sweep.png", "tiles.png"):
        assert min(Image.open(tmp_path / "out" / name).size) > 100
    # The same command again samples nothing, and a further scale only what it needs.
    images = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "tiles").rglob("*.png")}
    sweep(folder, tmp_path / "out", *grid[:1], "0,5,9", *grid[2:])
    assert {p: p.stat().st_mtime_ns for p in images} == images
    assert "[5/5]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "takes no labels, so there is nothing to sweep over; give --classifier"),
        ({"judge": "stranger"}, r"knows the classes \['A', 'B', 'C'\], the models"),
        ({"real": "few"}, "a class has 7 tiles, each needs 8 or more"),
        ({"real": "nowhere"}, "--real: .*nowhere does not exist"),
    ],
)
def test_bad_input(folder, tmp_path, options, message):
    guide = ("--classifier", str(folder / "classifier.ckpt")) if options else ()
    with pytest.raises(UserError, match=message):
        sweep(folder, tmp_path / "out", *guide, **options)
    assert not (tmp_path / "out" / "tiles").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--scales", "1,x"), "'x' is not a number"),
        (("--intervals", "9:1"), "'9:1' is neither all nor LOW:HIGH"),
        (("--guidance_norm",), "--guidance_norm: needs --classifier"),
        (("-n", "4"), "4 must be at least 8"),
        (("--samplers", "leapfrog"), "leapfrog"),
    ],
)
def test_bad_options(folder, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        sweep(folder, tmp_path / "out", *options)
