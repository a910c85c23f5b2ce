"""Strategies of selection: what they reject, how they order, and that nothing else decides.

Features here are drawn, not computed; the commands are in test_selection.py.
"""

import csv
import dataclasses
import resource
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from ldm.errors import UserError
from ldm.evaluation.fidelity import fidelity
from ldm.features import neighbours
from ldm.features.judge import Judge
from ldm.features.neighbours import (
    centroid_distances,
    nearest,
    neighbour_distances,
    squared_distances,
)
from ldm.features.sets import FeatureSet
from ldm.selection.select import FILL_REASON, Selection, select
from ldm.selection.strategies import Choice, by_manifest

CLASSES = ["A", "B"]
STRATEGIES = ("centroid", "confidence", "knn", "coverage", "random")


def feature_set(values: torch.Tensor, labels, names=None, **more) -> FeatureSet:
    labels = torch.as_tensor(labels)
    names = names or [f"{i:05d}" for i in range(len(labels))]
    files = [f"{CLASSES[k]}/{name}" for k, name in zip(labels.tolist(), names, strict=True)]
    return FeatureSet(values, labels, files, list(CLASSES), "net", "tiles", **more)


def normal(n: int, seed: int, *centre: float, spread: float = 0.5) -> torch.Tensor:
    """n points around a centre, (n, 6)."""
    noise = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return torch.tensor(list(centre) + [0.0] * (6 - len(centre))) + spread * noise


def two_lobes(n: int, seed: int) -> torch.Tensor:
    return torch.cat([normal(n // 2, seed, -2), normal(n // 2, seed + 1, 2)])


# Real: class A has two lobes, class B lies apart. Synthetic: both lobes of A and many images
# between them, where the centroid is and no real tile.
REAL = feature_set(torch.cat([two_lobes(80, 0), normal(40, 2, 0, 5)]), [0] * 80 + [1] * 40)
BETWEEN = normal(120, 4, 0, spread=0.4)
WRONG = torch.tensor([[0.1, 5, 0, 0, 0, 0]])  # an image of "A" amid the real tiles of B
SYNTHETIC = torch.cat([two_lobes(200, 5), BETWEEN, WRONG, normal(60, 7, 0, 5)])
LABELS = [0] * (200 + len(BETWEEN) + 1) + [1] * 60
WRONG_FILE = f"A/{200 + len(BETWEEN):05d}"


def logits_of(values: torch.Tensor) -> torch.Tensor:
    """A linear classifier that the two classes are separable by, (N, 2)."""
    return torch.stack([2.5 - values[:, 1], values[:, 1] - 2.5], dim=1)


IMAGES = feature_set(SYNTHETIC, LABELS, others={"logits": logits_of(SYNTHETIC)})


def choose(name: str, wanted, images=IMAGES, real=REAL, fill=False, k=3, seed=0) -> Selection:
    images = images.in_order()
    distances = centroid_distances(images.values, real.centroids)
    sure = None
    if name == "confidence":
        sure = Judge.fit([real if images.logits is None else images]).probabilities([images])
    strategy = Choice(name, k, "judge", seed).make(images, real, distances, None, sure)
    return select(strategy, images, distances.numpy(), wanted, fill)


def values_of(selection: Selection, name: str = "A") -> torch.Tensor:
    place = {file: i for i, file in enumerate(IMAGES.files)}
    return IMAGES.values[[place[file] for file in selection.used(name)]]


# Of every strategy


@pytest.mark.parametrize("name", STRATEGIES)
def test_an_image_of_another_class_is_rejected_by_all_but_the_control_arm(name):
    selection = choose(name, [1000, 1000])
    decision = selection.decisions[selection.files.index(WRONG_FILE)]
    assert decision == ("accepted" if name == "random" else "rejected")
    assert len(selection.used("A")) > 100  # and it is not that everything is


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_larger_number_contains_a_smaller_one_in_the_same_order(name):
    few, many = choose(name, [10, 10]), choose(name, [60, 30])
    for of_class in CLASSES:
        assert many.used(of_class)[:10] == few.used(of_class)
        scores = [[s.scores[i] for i in s.of_class(of_class, "accepted")] for s in (few, many)]
        assert np.array_equal(scores[0], scores[1][:10], equal_nan=True)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_order_of_the_folder_does_not_matter(name):
    order = torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = replace(
        IMAGES,
        values=IMAGES.values[order],
        labels=IMAGES.labels[order],
        files=[IMAGES.files[i] for i in order],
        others={"logits": IMAGES.logits[order]},
    )
    assert choose(name, [20, 20], shuffled).to_csv() == choose(name, [20, 20]).to_csv()


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "random"])
def test_equal_images_go_by_file_name(name):
    values = torch.cat([normal(3, 0, -2), normal(1, 1, -2).expand(4, 6), normal(2, 2, 0, 5)])
    names = ["p", "q", "r", "9", "10", "a", "1", "0", "0"]
    images = feature_set(values, [0] * 7 + [1] * 2, names, others={"logits": logits_of(values)})
    used = choose(name, [7, 2], images).used("A")
    same = [file for file in used if file in ("A/9", "A/10", "A/a", "A/1")]
    assert same == ["A/1", "A/10", "A/9", "A/a"]


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "random"])
def test_shortfalls_are_filled_with_the_best_rejected_images(name):
    plain = choose(name, [1000, 50])
    accepted = len(plain.used("A"))
    total = LABELS.count(0)
    assert accepted < total
    filled = choose(name, [accepted + 1, 50], fill=True)
    assert filled.used("A")[:accepted] == plain.used("A")
    (row,) = filled.of_class("A", "filled")
    rejected = plain.of_class("A", "rejected")
    if name != "coverage":  # whose gain depends on what was taken before
        assert filled.files[row] == plain.files[rejected[0]]
        scores = [plain.scores[i] for i in rejected]
        assert scores == sorted(scores, reverse=True)
    assert filled.reasons[row].startswith(FILL_REASON)
    everything = choose(name, [1000, 50], fill=True)
    assert len(everything.used("A")) == total
    counts = everything.counts()["A"]
    assert (counts["filled"], counts["rejected"]) == (total - accepted, 0)
    assert counts["shortfall"] == 1000 - accepted


# Of each


def test_centroid_prefers_the_centre_and_coverage_the_spread():
    real = REAL.values[REAL.labels == 0]
    near, spread = choose("centroid", [80, 10]), choose("coverage", [80, 10])
    centre = real.mean(0)
    distance = [(values_of(s) - centre).norm(dim=1).mean() for s in (near, spread)]
    assert distance[0] < 0.6 * distance[1]
    recall = [fidelity(real, values_of(s))["recall"] for s in (near, spread)]
    assert recall[0] < 0.2 and recall[1] > 0.8
    # Both lobes, which are equally large, get about the same number.
    left = (values_of(spread)[:, 0] < -1).sum().item()
    assert abs(left - 40) <= 8
    assert fidelity(real, values_of(spread))["precision"] > 0.8


def test_coverage_is_greedy_in_the_discrepancy():
    real, x = REAL.values[REAL.labels == 0].double(), IMAGES.values[:40].double()
    images = feature_set(IMAGES.values[:40], [0] * 40)
    width = 2 * neighbour_distances(real, 3).median() ** 2

    def kernel(a, b):
        return torch.exp(-torch.cdist(a, b).square() / width)

    chosen = []
    for _ in range(15):
        values = []
        for i in range(40):
            part = x[[*chosen, i]]
            discrepancy = kernel(part, part).mean() - 2 * kernel(part, real).mean()
            values.append(torch.inf if i in chosen else discrepancy.item())
        chosen.append(int(np.argmin(values)))
    distances = centroid_distances(images.values, REAL.centroids)
    strategy = Choice("coverage", 3, "judge", 0).make(images, REAL, distances, None, None)
    strategy = dataclasses.replace(strategy, rejections=[None] * 40)
    selection = select(strategy, images, distances.numpy(), [15, 0])
    assert selection.used("A") == [f"A/{i:05d}" for i in chosen]


def test_realism_by_hand():
    # Real tiles at 0, 1, 3 and 7; with one neighbour their balls reach 1, 1, 2 and 4.
    real = feature_set(torch.tensor([[0.0], [1], [3], [7], [50], [51]]), [0] * 4 + [1] * 2)
    x = [[2.0], [-2.0], [9.0], [3.0], [30.0], [50.5]]
    selection = choose("knn", [9, 9], feature_set(torch.tensor(x), [0] * 5 + [1]), real, k=1)
    scores = dict(zip(selection.files, selection.scores.tolist(), strict=True))
    # At 2: 1 / 1 of the tile at 1, 2 / 1 of 3, 4 / 5 of 7. On a tile it is infinite.
    assert scores == {
        "A/00003": np.inf,
        "A/00000": 2,
        "A/00002": 2,  # 4 / 2
        "A/00001": 0.5,
        "A/00004": pytest.approx(4 / 23),
        "B/00005": 2,
    }
    assert selection.used("A") == ["A/00003", "A/00000", "A/00002"]
    reasons = dict(zip(selection.files, selection.reasons, strict=True))
    assert reasons["A/00001"] == "outside the balls of its class"
    assert reasons["A/00004"] == "nearest real tile is B"
    assert "inf" in selection.to_csv()


def test_realism_with_equal_real_tiles_is_a_number():
    real = feature_set(torch.tensor([[0.0], [0], [0], [5], [6]]), [0, 0, 0, 1, 1])
    images = feature_set(torch.tensor([[0.0], [1.0]]), [0, 0])
    selection = choose("knn", [2, 2], images, real, k=1)
    assert selection.scores.tolist() == [np.inf, 0.0]


def test_confidence_takes_the_most_probable():
    selection = choose("confidence", [1000, 5])
    own = logits_of(IMAGES.values).double().softmax(1)[:, 0]
    assert selection.scores[0] == own[: LABELS.count(0)].max().item()
    assert selection.scores[0] <= 1 and np.all(np.diff(selection.scores[:100]) <= 0)
    wrong = selection.files.index(WRONG_FILE)
    assert selection.reasons[wrong].startswith("judged B, probability 0.99")


def test_a_network_without_classes_judges_by_regression_on_the_real_tiles():
    images = replace(IMAGES, others={})
    selection = choose("confidence", [50, 50], images)
    of_b = [i for i, k in enumerate(selection.labels) if k == 1]
    wrong = selection.files.index(WRONG_FILE)
    assert selection.decisions[wrong] == "rejected"
    assert selection.reasons[wrong].startswith("judged B")
    assert all(selection.decisions[i] in ("accepted", "surplus") for i in of_b)
    # The judge knows the real tiles alone: labels of the images change nothing in it.
    turned = replace(images, labels=1 - images.labels)
    rejected = choose("confidence", [50, 50], turned).decisions.count("rejected")
    assert rejected == len(LABELS) - 1


def test_a_judge_of_several_networks_is_the_mean_of_their_calibrated_opinions(tmp_path):
    labels = torch.tensor([0] * 20 + [1] * 20)
    good, noise = normal(40, 0, 0.0, 0.0), normal(40, 1, 0.0, 0.0)
    good[:, 0] += labels
    sets = [feature_set(good, labels), replace(feature_set(noise, labels), extractor="other")]
    judge = Judge.fit(sets, tmp_path)
    alone = [Judge.fit([one]).probabilities([one]) for one in sets]
    p = judge.probabilities(sets)
    mean = torch.stack([q.log() for q in alone]).mean(dim=0) / judge.temperature
    torch.testing.assert_close(p, mean.softmax(dim=1))
    assert min(*judge.temperatures, judge.temperature) >= 1
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = Judge.fit(sets, tmp_path).probabilities(sets)
    assert torch.equal(again, p) and len(written) == 2
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def test_a_classifier_is_calibrated_on_further_tiles_alone():
    """It may have been trained on the labelled tiles, where it is always right and very sure."""
    labels = [0, 1] * 50
    sure = torch.tensor([[9.0, -9.0] if label == 0 else [-9.0, 9.0] for label in labels])
    values = normal(100, 0, 0.0)
    known = feature_set(values, labels, others={"logits": sure})
    often_wrong = [1 - label if i < 20 else label for i, label in enumerate(labels)]
    val = feature_set(values, often_wrong, others={"logits": sure})
    assert Judge.fit([known]).temperatures == [1.0]
    judge = Judge.fit([known], val=[val])
    # 80 of 100 are right: p = 0.8 where the logits differ by log 4.
    assert judge.temperatures[0] == pytest.approx(10.0)
    assert judge.calibrated_on == val.tiles


def manifest(folder, rows, columns=("file", "prob")) -> None:
    with (folder / "manifest.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *rows])


def test_confidence_by_the_manifest(tmp_path):
    images = feature_set(torch.zeros(4, 2), [0, 0, 0, 1], ["a", "b", "c", "d"])
    rows = [("B/d", "0.7"), ("A/a", "0.6"), ("A/b", "0.5"), ("A/c", "0.9"), ("A/gone", "")]
    manifest(tmp_path, rows)
    selection = select(by_manifest(images, tmp_path), images, np.zeros((4, 2)), [5, 5])
    assert selection.used("A") == ["A/c", "A/a"]
    assert selection.reasons[2] == "probability 0.500 is not above 0.5"


@pytest.mark.parametrize(
    "rows, columns, expected",
    [
        (None, (), "'no row'"),
        ([("A/a", "0.5")], ("file", "probability"), "'no row'"),
        ([("A/a", "")], ("file", "prob"), "'no row'"),
        ([("A/a", "nan")], ("file", "prob"), "'nan'"),
        ([("A/a",)], ("file", "prob"), "'no row'"),
        ([("A/b", "0.5")], ("file", "prob"), "1 images, the first is A/a"),
    ],
)
def test_manifests_that_do_not_serve(tmp_path, rows, columns, expected):
    if rows is not None:
        manifest(tmp_path, rows, columns)
    with pytest.raises(UserError, match=expected):
        by_manifest(feature_set(torch.zeros(1, 2), [0], ["a"]), tmp_path)


@pytest.mark.parametrize(
    "name, real, expected",
    [
        ("knn", [0, 0, 0, 1, 1, 1, 1], "`neighbors` 3: class A has 3 real tiles"),
        ("coverage", [0, 0, 1], "`strategy` coverage: class B has 1 real tiles"),
        ("confidence", [0, 0, 1], "class B has 1 labelled tiles"),
    ],
)
def test_what_a_strategy_cannot_do_without(name, real, expected):
    images = feature_set(torch.eye(2), [0, 1])
    with pytest.raises(UserError, match=expected):
        choose(name, [1, 1], images, feature_set(torch.rand(len(real), 2), real))


# Distances


def test_distances_in_chunks_are_those_of_the_whole(monkeypatch):
    x, y = IMAGES.values[:50], REAL.values
    whole = centroid_distances(x, y[:3])
    monkeypatch.setattr(neighbours, "CHUNK", 7)
    monkeypatch.setattr(neighbours, "BLOCKS", (7, 5))
    assert torch.equal(centroid_distances(x, y[:3]), whole)
    true = torch.cdist(x.double(), y.double())
    assert torch.allclose(squared_distances(x, y), true.square(), rtol=0, atol=1e-12)
    index, distance = nearest(x, y)
    assert torch.equal(index, true.argmin(1))
    assert torch.allclose(distance, true.min(1).values, rtol=0, atol=1e-12)
    third = torch.cdist(x.double(), x.double()).sort(dim=1).values[:, 3]
    assert torch.allclose(neighbour_distances(x, 3), third, rtol=0, atol=1e-7)


@pytest.mark.slow
def test_a_hundred_thousand_candidates():
    """Every strategy on 100,000 images, 384 features, 9 classes, 5,000 real tiles."""
    generator = torch.Generator().manual_seed(0)
    classes = list("ABCDEFGHI")
    centres = torch.randn(9, 384, generator=generator)

    def drawn(n: int) -> FeatureSet:
        labels = torch.arange(n) * 9 // n
        x = centres[labels].add_(torch.randn(n, 384, generator=generator), alpha=1.3)
        files = [f"{classes[k]}/{i:06d}" for i, k in enumerate(labels.tolist())]
        x = torch.nn.functional.normalize(x, dim=1)
        others = {"logits": x @ centres.T}
        return FeatureSet(x, labels, files, classes, "net", "tiles", others=others)

    real, images = drawn(5000), drawn(100_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    for name in STRATEGIES:
        start = time.process_time()
        selection = choose(name, [550] * 9, images, real)
        assert [len(selection.used(c)) for c in classes] == [550] * 9
        assert len(selection.to_csv().splitlines()) == 100_001
        assert time.process_time() - start < 300
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2**20  # 1 GiB; all distances to the real tiles would be 4
