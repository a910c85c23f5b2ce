"""ldm.evaluation.metrics against hand-worked numbers, scikit-learn and the published mistake."""

import json

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    multilabel_confusion_matrix,
    recall_score,
    roc_auc_score,
)
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix
from torchmetrics.functional.classification import multiclass_calibration_error

from ldm.evaluation.metrics import (
    calibration_error,
    confusion_matrix,
    format_summary,
    macro_auc,
    mean_and_std,
    scores,
)

NAMES = [f"class{k}" for k in range(9)]


def noisy_predictions(labels, num_classes, errors, seed=0):
    """Predictions of which a share is drawn at random."""
    generator = np.random.default_rng(seed)
    wrong = generator.random(len(labels)) < errors
    return np.where(wrong, generator.integers(num_classes, size=len(labels)), labels)


def test_three_classes_by_hand():
    #        predicted a  b  c
    confusion = np.array([[4, 1, 0], [2, 3, 0], [0, 0, 0]])
    result = scores(confusion, ["a", "b", "c"])
    a, b, c = (result["per_class"][name] for name in "abc")
    assert result["accuracy"] == pytest.approx(7 / 10)
    assert a == pytest.approx(
        dict(
            images=5, predicted=6, precision=4 / 6, sensitivity=4 / 5, specificity=3 / 5, f1=8 / 11
        )
    )
    assert (b["sensitivity"], b["specificity"], b["f1"]) == pytest.approx((3 / 5, 4 / 5, 6 / 9))
    # Neither among the images nor predicted: only "everything else is not c" is defined.
    assert (c["precision"], c["sensitivity"], c["f1"], c["specificity"]) == (None, None, None, 1.0)
    assert result["macro_f1"] == pytest.approx((8 / 11 + 6 / 9) / 2)
    assert result["sensitivity"] == pytest.approx((4 / 5 + 3 / 5) / 2)
    assert result["specificity"] == pytest.approx((3 / 5 + 4 / 5 + 1) / 3)
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("present", [range(9), [0, 2, 3, 8], [4]], ids=["all", "four", "one"])
@pytest.mark.parametrize("predicted", [range(9), [0, 1, 2]], ids=["all", "three"])
def test_equal_to_scikit_learn(present, predicted):
    generator = np.random.default_rng(1)
    labels = generator.choice(list(present), 300)
    predictions = noisy_predictions(labels, 9, 0.5)
    predictions[~np.isin(predictions, list(predicted))] = predicted[0]
    matrix = confusion_matrix(labels, predictions, 9)
    assert (matrix == sklearn_confusion_matrix(labels, predictions, labels=range(9))).all()

    result = scores(matrix, NAMES)
    assert result["accuracy"] == pytest.approx(accuracy_score(labels, predictions))
    assert result["macro_f1"] == pytest.approx(f1_score(labels, predictions, average="macro"))
    # Sensitivity of the classes that have images, specificity of those that do not have all.
    occurring = np.unique(labels)
    assert result["sensitivity"] == pytest.approx(
        recall_score(labels, predictions, labels=occurring, average="macro")
    )
    binary = multilabel_confusion_matrix(labels, predictions, labels=range(9))
    negatives = binary[:, 0].sum(axis=1)
    assert result["specificity"] == pytest.approx(
        np.mean(binary[negatives > 0, 0, 0] / negatives[negatives > 0])
    )


def test_a_class_that_is_never_predicted_counts_as_zero():
    result = scores(confusion_matrix([0, 0, 1, 1], [0, 0, 0, 0], 2), ["a", "b"])
    assert result["per_class"]["b"]["f1"] == 0.0
    assert result["per_class"]["b"]["precision"] is None
    assert result["sensitivity"] == 0.5 and result["specificity"] == 0.5


def test_two_classes_swap_sensitivity_and_specificity():
    labels = np.array([0] * 30 + [1] * 70)
    result = scores(confusion_matrix(labels, noisy_predictions(labels, 2, 0.4), 2), ["a", "b"])
    a, b = result["per_class"].values()
    assert a["sensitivity"] == b["specificity"] and b["sensitivity"] == a["specificity"]


def test_independent_of_order_and_batches():
    labels = np.repeat(np.arange(9), 40)
    predictions = noisy_predictions(labels, 9, 0.3)
    whole = scores(confusion_matrix(labels, predictions, 9), NAMES)
    order = np.random.default_rng(2).permutation(len(labels))
    for batch_size in (1, 7, 64, 1000):
        total = np.zeros((9, 9), dtype=np.int64)
        for i in range(0, len(labels), batch_size):
            part = order[i : i + batch_size]
            total += confusion_matrix(labels[part], predictions[part], 9)
        assert scores(total, NAMES) == whole


def test_the_published_mean_over_batches_is_wrong():
    """The published script averages macro F1 of the batches of a loader that is sorted by class."""
    labels = np.repeat(np.arange(9), 400)
    predictions = noisy_predictions(labels, 9, 0.11)
    true_value = f1_score(labels, predictions, average="macro")
    per_batch = [
        f1_score(labels[i : i + 384], predictions[i : i + 384], average="macro")
        for i in range(0, len(labels), 384)
    ]
    assert true_value == pytest.approx(0.90, abs=0.02)
    assert np.mean(per_batch) < 0.25
    ours = scores(confusion_matrix(labels, predictions, 9), NAMES)
    assert ours["macro_f1"] == pytest.approx(true_value)


def draw_probabilities(images, classes, sharpness, seed=0):
    """Probabilities and labels that were drawn from them: perfectly calibrated."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, sharpness, (images, classes))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return p, (p.cumsum(axis=1) > generator.random((images, 1))).argmax(axis=1)


@pytest.mark.parametrize("bins", [1, 15, 40])
@pytest.mark.parametrize("sharpness", [0.3, 3.0])
def test_calibration_error_equals_torchmetrics(bins, sharpness):
    p, labels = draw_probabilities(500, 5, sharpness)
    theirs = multiclass_calibration_error(
        torch.tensor(p), torch.tensor(labels), num_classes=5, n_bins=bins, norm="l1"
    )
    assert calibration_error(p, labels, bins) == pytest.approx(theirs.item(), abs=1e-6)


def test_calibration_error_by_hand():
    p = [[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.45, 0.55]]
    # Ranges of a half: (0.5, 1] has all four; three right, mean confidence 0.7375.
    assert calibration_error(p, [0, 1, 1, 1], bins=2) == pytest.approx(0.75 - 0.7375)
    # Ranges of a tenth hold one image each: gaps 0.1, 0.8, 0.3 and 0.45.
    assert calibration_error(p, [0, 1, 1, 1], bins=10) == pytest.approx(
        (0.1 + 0.8 + 0.3 + 0.45) / 4
    )
    assert calibration_error([[1.0, 0.0]], [0]) == 0.0 and calibration_error([[1.0, 0.0]], [1]) == 1


def test_calibration_error_grows_with_overconfidence_and_not_with_order():
    p, labels = draw_probabilities(4000, 5, 1.5)
    sharp = p**4 / (p**4).sum(axis=1, keepdims=True)
    assert calibration_error(p, labels) < 0.03 < 0.2 < calibration_error(sharp, labels)
    order = np.random.default_rng(1).permutation(4000)
    assert calibration_error(p[order], labels[order]) == pytest.approx(calibration_error(p, labels))
    # The bad version: a mean over batches is larger, since small batches are never calibrated.
    batches = [calibration_error(p[i : i + 32], labels[i : i + 32]) for i in range(0, 4000, 32)]
    assert np.mean(batches) > 4 * calibration_error(p, labels)


@pytest.mark.parametrize(
    "p, labels", [([[0.5, 0.5]], [0, 1]), (np.zeros((0, 2)), []), ([[2.0, 3.0]], [0]), ([0.5], [0])]
)
def test_calibration_error_refuses_what_are_no_probabilities(p, labels):
    with pytest.raises(AssertionError):
        calibration_error(p, labels)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("digits", [1, 6], ids=["ties", "none"])
def test_auc_equals_scikit_learn(classes, digits):
    generator = np.random.default_rng(3)
    labels = generator.integers(classes, size=200)
    p = generator.dirichlet(np.ones(classes), size=200) + 0.5 * np.eye(classes)[labels]
    p = np.round(p, digits)
    p /= p.sum(axis=1, keepdims=True)
    expected = [roc_auc_score(labels == k, p[:, k]) for k in range(classes)]
    assert macro_auc(p, labels) == pytest.approx(np.mean(expected))
    # Without images of a class the others count; of one class alone nothing is known.
    some = labels != 0
    if classes == 2:
        assert macro_auc(p[some], labels[some]) is None
        return
    of_others = [roc_auc_score(labels[some] == k, p[some, k]) for k in range(1, classes)]
    assert macro_auc(p[some], labels[some]) == pytest.approx(np.mean(of_others))


def test_better_predictions_have_better_numbers():
    labels = np.repeat(np.arange(9), 40)
    runs = [
        scores(confusion_matrix(labels, noisy_predictions(labels, 9, errors), 9), NAMES)
        for errors in (0.8, 0.4, 0.0)
    ]
    for name in ("accuracy", "macro_f1", "sensitivity", "specificity"):
        assert runs[0][name] < runs[1][name] < runs[2][name] == 1.0


def test_mean_and_deviation_over_runs():
    runs = [
        dict(accuracy=a, macro_f1=0.5, sensitivity=None, specificity=0.9) for a in (0.6, 0.8, 0.7)
    ]
    mean, std = mean_and_std(runs)
    assert mean["accuracy"] == pytest.approx(0.7) and std["accuracy"] == pytest.approx(0.1)
    assert mean["sensitivity"] is None and std["sensitivity"] is None
    assert mean_and_std(runs[:1])[1]["accuracy"] is None  # one run has no deviation


def test_format_summary_says_when_val_was_reported():
    values = scores(confusion_matrix([0, 1, 1], [0, 1, 0], 2), ["a", "b"])
    runs = [{"seed": s, "best_epoch": 3, "val": values, "test": values} for s in (0, 1)]
    mean, std = mean_and_std([values, values])
    summary = {
        "train_folder": "train5",
        "arch": "vit_small",
        "n_train": 9,
        "n_val": 3,
        "n_test": 3,
        "per_seed": runs,
        "mean": mean,
        "std": std,
    }
    with_test = format_summary({**summary, "split": "test"})
    assert "0.6667" in with_test and "deviation" in with_test and "optimistic" not in with_test
    assert "optimistic" in format_summary({**summary, "split": "val"})


@pytest.mark.parametrize(
    "labels, predictions", [([0, 1], [0]), ([0, 3], [0, 1]), ([0, 1], [-1, 1]), ([[0]], [[0]])]
)
def test_refuses_what_is_no_labelling(labels, predictions):
    with pytest.raises(AssertionError):
        confusion_matrix(labels, predictions, 3)


def test_refuses_an_empty_set_and_wrong_names():
    with pytest.raises(AssertionError, match="without images"):
        scores(np.zeros((2, 2), dtype=int), ["a", "b"])
    with pytest.raises(AssertionError):
        scores(np.eye(2, dtype=int), ["a", "b", "c"])
