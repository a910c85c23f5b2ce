"""What is reached without training a network: the rows that keep the other rows of a table honest.

On NCT-CRC the mean colour classifies more than half of the tiles and a colour histogram about 82%,
so a network that does no better has learned stains and not tissue. A linear probe tells what a
pre-trained backbone knows already.

Letters: N images, D features, H W pixels, K classes.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.tiles import TileFolder, decode_tiles, read_tile
from ldm.errors import UserError
from ldm.evaluation.metrics import confusion_matrix, scores
from ldm.evaluation.predictions import Predictions, predictions_name
from ldm.evaluation.runs import RESULT, read_result
from ldm.evaluation.sets import GroupTable, Splits, TransformedTiles, open_splits
from ldm.evaluation.summary import write_confusion, write_summary
from ldm.features.extractor import LOGITS, Extractor, directions
from ldm.features.probe import STRENGTHS, logistic_regression
from ldm.files import remove_leftovers, write_json
from ldm.models.vit_settings import Settings
from ldm.run import hardware, provenance

BINS = 16
COLOUR_MEAN, COLOUR_HISTOGRAM, LINEAR_PROBE = "colour_mean", "colour_histogram", "linear_probe"
CLASSIFIER = "classifier"  # that was trained elsewhere, and is only asked
KINDS = (COLOUR_MEAN, COLOUR_HISTOGRAM, LINEAR_PROBE, CLASSIFIER)
BATCH_SIZE = 64  # of the network of a linear probe
Ask = Callable[[TransformedTiles], np.ndarray]  # features (N, D) or probabilities (N, K)


def colour_mean(image: np.ndarray) -> np.ndarray:
    """Mean of R, G and B in [0, 1]; uint8 (H, W, 3) -> (3,) float64."""
    return image.reshape(-1, 3).mean(axis=0) / 255


def colour_histogram(image: np.ndarray) -> np.ndarray:
    """Shares of pixels in 16 bins of each of R, G and B; uint8 (H, W, 3) -> (48,) float64."""
    bins = image.reshape(-1, 3) // (256 // BINS)  # (H W, 3)
    counts = [np.bincount(bins[:, channel], minlength=BINS) for channel in range(3)]
    return np.concatenate(counts) / len(bins)


COLOURS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    COLOUR_MEAN: colour_mean,
    COLOUR_HISTOGRAM: colour_histogram,
}


def colour_features(paths: Sequence[Path], kind: str) -> np.ndarray:
    """Features of tiles by colour alone, (N, D) float64."""
    return np.stack(decode_tiles(paths, lambda path: COLOURS[kind](read_tile(path))))


def colour_histogram_baseline(train_dir: Path, test_dir: Path) -> dict[str, Any]:
    """`ldm.evaluation.metrics.scores` of logistic regression on 3 x 16-bin colour histograms.

    Args:
        train_dir, test_dir: Folders of class folders to learn from and to report.
    """
    train = TileFolder(train_dir, size=1, labelled=True, check=False)
    test = TileFolder(test_dir, size=1, labelled=True, classes=train.classes, check=False)
    features, reported = (colour_features(t.paths, COLOUR_HISTOGRAM) for t in (train, test))
    model = logistic_regression(features, np.array(train.labels), strength=1.0)
    matrix = confusion_matrix(test.labels, model.predict(reported), len(train.classes))
    return scores(matrix, train.classes)


def run_baseline(
    kind: str,
    data_path: Path,
    train_folder: str,
    logdir: Path,
    groups: GroupTable | None = None,
    extractor: Extractor | None = None,
    num_workers: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Fit one baseline on `train_folder`, choose its penalty on val, return the summary.

    Leaves `logdir`/`kind`/`train_folder` as eval.py leaves `logdir`/`train_folder`, with the single
    seed 0, since nothing in it is random. What is there already with the same settings and files
    is not computed again.

    Args:
        kind: One of `KINDS`.
        extractor: The network of a linear probe, or the classifier.
        num_workers: Threads that decode images for it.
    """
    splits = open_splits(data_path, train_folder, Settings(input_size=1), None, groups)
    settings: dict[str, Any] = {"baseline": kind, "strengths": list(STRENGTHS)}
    arch = f"logistic regression on {kind.replace('_', ' ')}"
    if kind in COLOURS:
        extractor = None
    else:
        assert extractor is not None
        settings |= {"network": extractor.name, "extractor": extractor.identity}
        arch = f"linear probe of {extractor.name}"
    if kind == CLASSIFIER:
        arch = extractor.name
        if not extractor.classifies(splits.train.classes):
            raise UserError(
                f"`features`: {extractor.name} is no classifier of {splits.train.classes}; use"
                " `kind` linear_probe"
            )
    current = {"settings": settings, "data": splits.identity}

    def ask(tiles: TransformedTiles) -> np.ndarray:
        """Features of tiles, of length 1 where a network makes them; or what a classifier says."""
        if extractor is None:
            return colour_features(tiles.paths, kind)
        found = extractor.extract(tiles.paths, BATCH_SIZE, num_workers)
        if kind == CLASSIFIER:
            return found.others[LOGITS].double().softmax(dim=1).numpy()  # (N, K)
        return directions(found.features, tiles.paths).double().numpy()  # (N, D)

    folder = logdir / kind / train_folder
    run = folder / "seed0"
    result = read_result(run, current, overwrite)
    remove_leftovers(folder, run)
    if result is None:
        start = time.monotonic()
        found = (_report if kind == CLASSIFIER else _fit_and_report)(splits, ask, run)
        result = {
            "train_folder": train_folder,
            "arch": arch,
            **found,
            "seconds": round(time.monotonic() - start, 3),
            **current,
            **provenance(),
            "hardware": hardware(),
        }
        write_json(run / RESULT, result)
    summary = write_summary(folder, train_folder, [result], [run], splits.groups, splits.notes)
    write_confusion(folder, summary)
    return summary


def _fit_and_report(splits: Splits, features: Ask, run: Path) -> dict[str, Any]:
    """Fit on the training set, choose on val, predict test once; write the predictions."""
    # All images are read before anything is written.
    known, val_features = features(splits.train), features(splits.val)  # (N, D)
    test_features = None if splits.test is None else features(splits.test)
    strength, model = _choose(known, np.array(splits.train.labels), val_features, splits.val)
    held = {id(splits.val): val_features, id(splits.test): test_features}
    result = _report(splits, lambda tiles: model.predict_proba(held[id(tiles)]), run)
    note = (
        f"logistic regression on {known.shape[1]} standardised features, C = {strength:g} chosen on"
        f" val among {len(STRENGTHS)}; deterministic, so one seed"
    )
    facts = {"strength": strength, "features": known.shape[1], "validations": len(STRENGTHS)}
    return {**result, **facts, "notes": [note]}


def _report(splits: Splits, predict: Ask, run: Path) -> dict[str, Any]:
    """Predict val and test once by probabilities (N, K), and write the predictions."""
    result: dict[str, Any] = {"seed": 0, "split": splits.reported, "notes": []}
    result |= dict.fromkeys(("best_epoch", "updates", "epochs"))
    for name, p in [(name, predict(tiles)) for name, tiles in splits.evaluated.items()]:
        predictions = Predictions.of(splits.evaluated[name], p.argmax(axis=1), p)
        predictions.write(run / predictions_name(name))
        result[name] = predictions.scores()
    return result


def _choose(
    features: np.ndarray, labels: np.ndarray, val_features: np.ndarray, val: TransformedTiles
) -> tuple[float, Any]:
    """Strength and model whose penalty is best on val: by accuracy, then by cross-entropy."""
    ranked = []
    for strength in STRENGTHS:
        model = logistic_regression(features, labels, strength)
        p = model.predict_proba(val_features)  # (N, K)
        own = p[np.arange(len(p)), val.labels]
        loss = -np.log(np.maximum(own, np.finfo(float).tiny)).mean()
        accuracy = (p.argmax(axis=1) == val.labels).mean()
        ranked.append((accuracy, -loss, strength, model))
    return max(ranked, key=lambda one: one[:2])[2:]
