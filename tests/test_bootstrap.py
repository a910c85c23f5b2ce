"""Bootstrap intervals over groups, and the tables and picture of confusions."""

import csv
import io

import numpy as np
import pytest
from PIL import Image

from ldm.errors import UserError
from ldm.evaluation.bootstrap import accuracy_and_macro_f1, intervals, resampled_confusions
from ldm.evaluation.metrics import confusion_matrix, scores
from ldm.evaluation.predictions import Predictions
from ldm.evaluation.summary import write_confusion
from ldm.report.plots import COLOURS, confusion_picture

CLASSES = ["a", "b", "c"]


def predictions(labels, predicted, groups=None) -> Predictions:
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    names = [f"{CLASSES[y]}/{i:05}.png" for i, y in enumerate(labels)]
    return Predictions(CLASSES, names, labels, predicted, np.eye(3)[predicted], groups)


def slides(generator, number=30, tiles=20, right=0.7):
    """Slides whose tiles are classified all right or all wrong."""
    labels = np.repeat(generator.integers(3, size=number), tiles)
    wrong = np.repeat(generator.random(number) > right, tiles)
    groups = [f"slide{i // tiles}" for i in range(number * tiles)]
    return predictions(labels, np.where(wrong, (labels + 1) % 3, labels), groups)


def width(interval, name="accuracy"):
    return interval[name][1] - interval[name][0]


def without_groups(run: Predictions) -> Predictions:
    return predictions(run.labels, run.predicted)


def test_over_images_it_is_the_binomial_interval():
    labels = np.arange(1200) % 3
    run = predictions(labels, np.where(np.arange(1200) < 240, (labels + 1) % 3, labels))
    found = intervals([run])
    expected = 1.96 * (0.8 * 0.2 / 1200) ** 0.5
    assert found["accuracy"] == pytest.approx([0.8 - expected, 0.8 + expected], abs=0.002)
    assert (found["groups"], found["resamples"], found["level"]) == (None, 2000, 0.95)
    assert width(intervals([run], level=0.5)) < 0.5 * width(found)


def test_over_groups_it_holds_what_it_promises_and_over_images_it_does_not():
    """Of 150 test sets of 30 slides, how many intervals hold the accuracy of all slides, 0.7."""
    generator = np.random.default_rng(0)
    held = {"groups": 0, "images": 0}
    for _ in range(150):
        run = slides(generator)
        for name, shown in (("groups", run), ("images", without_groups(run))):
            low, high = intervals([shown], resamples=200)["accuracy"]
            held[name] += low <= 0.7 <= high
    assert held["groups"] / 150 > 0.88, "95% promised; percentile intervals of 30 groups give less"
    assert held["images"] / 150 < 0.5, "the bad version: 20 tiles of a slide count as 20 slides"


def test_groups_of_one_image_are_images():
    run = without_groups(slides(np.random.default_rng(1)))
    single = predictions(run.labels, run.predicted, [f"{i:05}" for i in range(len(run.labels))])
    a, b = intervals([run]), intervals([single])
    assert a["accuracy"] == b["accuracy"] and a["macro_f1"] == b["macro_f1"]
    assert (a["groups"], b["groups"]) == (None, len(run.labels))


def test_it_is_of_the_mean_over_networks_on_the_same_draws():
    run = slides(np.random.default_rng(2))
    # A network that is wrong where the first is right: their mean accuracy is the same in any draw.
    other = np.where(run.predicted == run.labels, (run.labels + 1) % 3, run.labels)
    opposite = predictions(run.labels, other, run.groups)
    assert width(intervals([run])) > 0.1
    assert width(intervals([run, opposite])) == pytest.approx(0, abs=1e-12)
    assert intervals([run, run])["macro_f1"] == intervals([run])["macro_f1"]


def test_every_resample_is_whole_groups_and_the_metrics_are_those_of_the_table():
    run = slides(np.random.default_rng(3), number=12, tiles=5)
    total = np.concatenate(list(resampled_confusions([run], resamples=50, seed=4)))
    assert total.shape == (50, 1, 3, 3) and (total.sum((-1, -2)) == 60).all()
    assert (total % 5 == 0).all(), "five tiles of a slide come together"
    assert not (total == total[0]).all()
    values = accuracy_and_macro_f1(total)
    for i in range(50):
        expected = scores(total[i, 0].astype(int), CLASSES)
        assert values["accuracy"][i, 0] == pytest.approx(expected["accuracy"])
        assert values["macro_f1"][i, 0] == pytest.approx(expected["macro_f1"])


def test_the_order_of_images_and_the_size_of_parts_do_not_matter(monkeypatch):
    run = slides(np.random.default_rng(5))
    order = np.random.default_rng(6).permutation(len(run.labels))
    mixed = predictions(run.labels[order], run.predicted[order], [run.groups[i] for i in order])
    whole = intervals([run])
    assert intervals([mixed]) == whole
    monkeypatch.setattr("ldm.evaluation.bootstrap.CHUNK_BYTES", 30_000)
    assert intervals([run]) == whole
    first, other = (next(resampled_confusions([run], seed=seed)) for seed in (0, 1))
    assert not np.array_equal(first, other)


def test_predictions_of_other_images_do_not_go_together():
    run = predictions([0, 1, 2], [0, 1, 1])
    with pytest.raises(UserError, match="network 2 .* on the same set"):
        intervals([run, predictions([0, 1, 1], [0, 1, 1])])


# --- Tables and picture --------------------------------------------------------------------------


def test_confusion_tables_and_picture(tmp_path):
    runs = []
    for seed, predicted in ((3, [0, 0, 1, 1, 0]), (5, [0, 1, 1, 1, 1])):
        values = scores(confusion_matrix([0, 0, 0, 1, 1], predicted, 3), CLASSES)
        runs.append({"seed": seed, "val": values, "test": values})
    summary = {"train_folder": "t", "arch": "vit", "split": "test", "per_seed": runs}
    write_confusion(tmp_path, summary)
    rows = list(csv.reader((tmp_path / "confusion.csv").open(newline="")))
    assert rows[0] == ["split", "seed", "label", "a", "b", "c"] and len(rows) == 1 + 2 * 2 * 3
    assert rows[1] == ["val", "3", "a", "2", "1", "0"]
    assert rows[-2] == ["test", "5", "b", "0", "2", "0"]
    table = list(csv.DictReader((tmp_path / "per_class.csv").open(newline="")))
    first = next(r for r in table if (r["split"], r["seed"], r["class"]) == ("test", "3", "a"))
    assert (first["images"], first["predicted"], first["sensitivity"]) == ("3", "3", "0.666667")
    empty = next(r for r in table if r["class"] == "c")
    assert empty["sensitivity"] == "" and empty["specificity"] == "1"
    assert Image.open(tmp_path / "confusion.png").size[0] > 400


def test_the_picture_is_darkest_where_a_row_has_its_most():
    """Shares of the row, not counts: one image of a rare class is as dark as all of a common."""
    counts = np.array([[900.0, 100.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    image = Image.open(io.BytesIO(confusion_picture(counts, ["A", "a long name", "B"], "title")))
    pixels = np.asarray(image.convert("RGB")).astype(int)
    full = np.array([int(COLOURS["mark"][i : i + 2], 16) for i in (1, 3, 5)])
    dark = (np.abs(pixels - full) < 25).all(axis=-1)  # 90% and 100%, but not 10% and 0
    columns, rows = (np.flatnonzero(dark.sum(axis=axis) > 20) for axis in (0, 1))
    assert columns.size and rows.size
    assert np.diff(columns).max() > 40, "a dark cell at the left and one at the right"
