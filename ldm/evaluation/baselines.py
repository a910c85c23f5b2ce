"""What is reached without training a network: the rows that keep the other rows of a table honest.

On NCT-CRC the mean colour classifies more than half of the tiles and a colour histogram about 82%,
so a network that does no better has learned stains and not tissue. A linear probe tells what a
pre-trained backbone knows already.

Letters: N images, D features, H W pixels, K classes.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.data.images import decode_tiles, read_tile
from ldm.data.tile_files import TileFiles, new_rows
from ldm.errors import UserError
from ldm.evaluation.predictions import Predictions, predictions_name
from ldm.evaluation.runs import RESULT, read_result
from ldm.evaluation.sets import GroupTable, Splits, TransformedTiles, open_splits
from ldm.evaluation.summary import write_confusion, write_summary
from ldm.features.extractor import FEATURES, LOGITS, Extractor
from ldm.features.probe import STRENGTHS, logistic_regression
from ldm.features.sets import cached_features
from ldm.features.spreading import ALPHA, NEIGHBOURS, Spreading, unlabelled_pool
from ldm.files import remove_leftovers, write_json
from ldm.models.vit_settings import Settings
from ldm.run import hardware, provenance

BINS = 16
COLOUR_MEAN, COLOUR_HISTOGRAM, LINEAR_PROBE = "colour_mean", "colour_histogram", "linear_probe"
SPREADING = "label_spreading"
CLASSIFIER = "classifier"  # that was trained elsewhere, and is only asked
KINDS = (COLOUR_MEAN, COLOUR_HISTOGRAM, LINEAR_PROBE, SPREADING, CLASSIFIER)
BATCH_SIZE = 64  # of the network of a linear probe


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


def run_baseline(
    kind: str,
    data_path: Path,
    train_folder: str,
    logdir: Path,
    groups: GroupTable | None = None,
    extractor: Extractor | None = None,
    num_workers: int = 0,
    overwrite: bool = False,
    unlabelled: Path | None = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Fit one baseline on `train_folder`, choose its penalty on val, return the summary.

    Leaves `logdir`/`kind`/`train_folder` as eval.py leaves `logdir`/`train_folder`, with the single
    seed 0, since nothing in it is random. What is there already with the same settings and files is
    not computed again.

    Args:
        kind: One of `KINDS`.
        extractor: The network of a linear probe or label spreading, or the classifier.
        num_workers: Threads that decode images for it.
        unlabelled: Tiles that labels are spread over; names of folders are ignored.
        cache: Folder that keeps features of the network; if omitted `logdir`/features.
    """
    splits = open_splits(data_path, train_folder, Settings(input_size=1), None, groups)
    pool = None if unlabelled is None else unlabelled_pool(unlabelled)
    arch, settings = _identity(kind, extractor, pool)
    if kind == CLASSIFIER and not extractor.classifies(splits.classes):
        raise UserError(
            f"`features`: {extractor.name} is no classifier of {splits.classes}; use `kind`"
            " linear_probe"
        )
    current = {"settings": settings, "data": splits.identity}
    folder = logdir / kind / train_folder
    run = folder / "seed0"
    result = read_result(run, current, overwrite)
    remove_leftovers(folder, run)
    if result is None:
        start = time.monotonic()
        if kind == CLASSIFIER:
            found = _report(splits, _asked(extractor, num_workers, splits), run)
        else:
            features = partial(_features, kind, extractor, cache or logdir / FEATURES, num_workers)
            found = _fit_and_report(splits, features, run, pool)
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


def _identity(
    kind: str, extractor: Extractor | None, pool: TileFiles | None
) -> tuple[str, dict[str, Any]]:
    """Name of a baseline, and the settings that it depends on."""
    settings: dict[str, Any] = {"baseline": kind}
    arch = f"logistic regression on {kind.replace('_', ' ')}"
    if extractor is not None:
        settings |= {"network": extractor.name, "extractor": extractor.identity}
        arch = f"{kind.replace('_', ' ')} of {extractor.name}"
    if pool is None:
        settings["strengths"] = list(STRENGTHS)
    else:
        settings |= {"unlabelled": pool.digest, "neighbours": NEIGHBOURS, "alpha": ALPHA}
    return extractor.name if kind == CLASSIFIER else arch, settings


def _features(
    kind: str, extractor: Extractor | None, cache: Path, num_workers: int, files: TileFiles
) -> np.ndarray:
    """Features of a set, (N, D); those of a network are kept in the folder `cache`."""
    if kind in COLOURS:
        return colour_features(files.paths, kind)
    values = cached_features(files, extractor, cache, BATCH_SIZE, num_workers).values
    return values.double().numpy()


def _fit_and_report(
    splits: Splits, features: Callable[[TileFiles], np.ndarray], run: Path, pool: TileFiles | None
) -> dict[str, Any]:
    """Fit on the training set, predict val and test once, and write the predictions.

    Args:
        features: Of a set, (N, D).
        pool: Unlabelled tiles to spread the labels over; None for logistic regression.
    """
    # All images are read before anything is written.
    known = features(splits.train.files)
    held = {name: features(tiles.files) for name, tiles in splits.evaluated.items()}
    labels = np.array(splits.train.labels)
    facts: dict[str, Any] = {"features": known.shape[1]}
    if pool is not None:
        held_out = {name: tiles.files for name, tiles in splits.evaluated.items()}
        rows = new_rows(pool, splits.train.files, held_out, "unlabelled")
        known, spread = (torch.from_numpy(values) for values in (known, features(pool)[rows]))
        model = Spreading(known, labels, splits.classes, spread)
        found = {name: model.logits(torch.from_numpy(x)).exp().numpy() for name, x in held.items()}
        note = (
            f"labels spread over {len(rows)} unlabelled tiles, {model.neighbours} neighbours by"
            f" {known.shape[1]} standardised features, alpha {ALPHA:g}; nothing is chosen on val,"
            " and it is deterministic, so one seed"
        )
        facts |= {"unlabelled": len(rows)}
    else:
        strength, model = _choose(known, labels, held["val"], splits.val)
        found = {name: model.predict_proba(x) for name, x in held.items()}
        note = (
            f"logistic regression on {known.shape[1]} standardised features, C = {strength:g}"
            f" chosen on val among {len(STRENGTHS)}; deterministic, so one seed"
        )
        facts |= {"strength": strength, "validations": len(STRENGTHS)}
    return {**_report(splits, found, run), **facts, "notes": [note]}


def _report(splits: Splits, found: Mapping[str, np.ndarray], run: Path) -> dict[str, Any]:
    """Write the predictions for val and test, given as probabilities (N, K), and return scores."""
    result: dict[str, Any] = {"seed": 0, "split": splits.reported, "notes": []}
    result |= dict.fromkeys(("best_epoch", "updates", "epochs"))
    for name, p in found.items():
        predictions = Predictions.of(splits.evaluated[name], p)
        predictions.write(run / predictions_name(name))
        result[name] = predictions.scores()
    return result


def _asked(extractor: Extractor, num_workers: int, splits: Splits) -> dict[str, np.ndarray]:
    """Probabilities (N, K) of val and test by a classifier."""
    found = {
        name: extractor.extract(tiles.paths, BATCH_SIZE, num_workers).others[LOGITS]
        for name, tiles in splits.evaluated.items()
    }
    return {name: logits.double().softmax(dim=1).numpy() for name, logits in found.items()}


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
