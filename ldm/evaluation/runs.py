"""The runs of one evaluation: which seeds are to be trained, and what is written about them."""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.checkpoint import read_checkpoint, write_checkpoint
from ldm.errors import UserError
from ldm.evaluation.metrics import mean_and_std
from ldm.evaluation.sets import open_evaluation_sets, open_splits
from ldm.evaluation.settings import Settings
from ldm.evaluation.training import (
    BEST,
    LAST,
    Compute,
    Trainer,
    build_network,
    build_optimizer,
    evaluate,
)
from ldm.evaluation.vit import load_vit
from ldm.run import git_revision, hardware, versions, write_json

log = logging.getLogger(__name__)

RESULT, SUMMARY = "result.json", "summary.json"
EVAL_BATCH = 256  # of networks that are only evaluated


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between the settings and data of two runs, in words."""
    found = []
    for name, value in new["settings"].items():
        before = old["settings"].get(name)
        if before != value:
            found.append(f"{name} was {before}, is {value}")
    for name in sorted({*old["data"], *new["data"]}):
        before, now = old["data"].get(name), new["data"].get(name)
        if before is None or now is None:
            found.append(f"there was {'no' if before is None else 'a'} {name} set")
        elif before["sha256"] != now["sha256"]:
            found.append(f"the files of {name} changed")
    return found


def train_and_report(
    data_path: Path,
    train_folder: str,
    settings: Settings,
    seeds: Sequence[int],
    logdir: Path,
    compute: Compute,
    num_classes: int | None = None,
    resume: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train one network per seed, choose its epoch on val, report test once.

    Without a test set val is reported, and the summary says so in `split`.

    Results are in `logdir`/`train_folder`: seed<k>/result.json, seed<k>/metrics.csv,
    seed<k>/checkpoints/best.ckpt and summary.json. A finished seed is not trained again and an
    unfinished one goes on from its last.ckpt, if settings and files are the same.

    Args:
        resume: A checkpoint to go on from instead; for a single seed.
        overwrite: Discard results that belong to other settings or files.

    Returns:
        The content of summary.json.

    Raises:
        UserError: Anything wrong with settings, folders, images or earlier results, before the
            first step.
    """
    settings.check()
    splits = open_splits(data_path, train_folder, settings, num_classes)
    current = {"settings": settings.as_dict(), "data": splits.identity}
    folder = logdir / train_folder

    results: dict[int, dict[str, Any]] = {}
    checkpoints: dict[int, dict[str, Any]] = {}
    stale: list[Path] = []
    for seed in seeds:
        run = folder / f"seed{seed}"
        if resume is not None:
            if (run / RESULT).is_file():
                raise UserError(f"--resume {resume}: {run} is finished; choose another --logdir")
            checkpoints[seed] = _read_training(resume, "--resume", seed)
            changed = differences(checkpoints[seed]["training"], current)
            if changed:
                raise UserError(f"--resume {resume}: {'; '.join(changed)}; give the same as then")
            continue
        if (run / RESULT).is_file():
            earlier = json.loads((run / RESULT).read_text())
        elif (run / LAST).is_file():
            checkpoints[seed] = _read_training(run / LAST, "earlier run", seed)
            earlier = checkpoints[seed]["training"]
        else:
            continue
        changed = differences(earlier, current)
        if changed and not overwrite:
            raise UserError(
                f"{run} holds a run with other settings: {'; '.join(changed)}; add --overwrite to"
                " replace it, or choose another --logdir"
            )
        if changed:
            stale.append(run)
            checkpoints.pop(seed, None)
        elif seed not in checkpoints:
            results[seed] = earlier
            log.info("%s is finished: not trained again", run)

    if len(results) < len(seeds):
        # What a user can get wrong comes first, then the images, then the earlier results go.
        build_optimizer(settings, build_network(settings, splits.classes), settings.lr)
        splits.load()
    for run in stale:
        shutil.rmtree(run)
    for seed in seeds:
        if seed not in results:
            trainer = Trainer(settings, seed, splits, compute)
            if seed in checkpoints:
                trainer.restore(checkpoints.pop(seed))
                log.info("seed %d goes on after epoch %d", seed, trainer.epoch)
            results[seed] = _train_one(trainer, folder / f"seed{seed}", train_folder, current)
        summary = summarise(train_folder, [results[s] for s in seeds if s in results])
        write_json(folder / SUMMARY, summary)
    return summary


def _read_training(path: Path, what: str, seed: int) -> dict[str, Any]:
    checkpoint = read_checkpoint(path, ("vit",), what)
    training = checkpoint.get("training")
    if training is None:
        raise UserError(
            f"{what} {path}: a finished network, nothing to go on with; use it with --eval"
        )
    if training["seed"] != seed:
        raise UserError(f"{what} {path}: is of seed {training['seed']}, not {seed}; set --seed")
    return checkpoint


def _train_one(
    trainer: Trainer, run: Path, train_folder: str, current: dict[str, Any]
) -> dict[str, Any]:
    """Train to the end, load the selected network, evaluate it, write everything."""
    splits, compute = trainer.splits, trainer.compute
    log.info(
        "%s seed %d: %s, %.2f million weights %s, %d images of %d classes, batch %d%s, learning"
        " rate %.3g, %d epochs of %d steps, %s %s",
        train_folder,
        trainer.seed,
        trainer.settings.arch,
        sum(p.numel() for p in trainer.model.parameters()) / 1e6,
        trainer.model.origin,
        len(splits.train),
        len(splits.classes),
        trainer.batch_size,
        "" if trainer.batch_size == trainer.settings.batch_size else
        f" (of {trainer.settings.batch_size} asked for)",
        trainer.lr,
        trainer.epochs,
        trainer.steps,
        compute.device,
        compute.precision,
    )  # fmt: skip
    trainer.fit(run, f"{train_folder} seed {trainer.seed}")

    best = trainer.best
    assert best is not None
    result = {
        "train_folder": train_folder,
        "arch": trainer.settings.arch,
        "weights": trainer.model.origin,
        "seed": trainer.seed,
        "split": splits.reported,
        "best_epoch": best["epoch"],
        "epochs": trainer.epochs,
        "batch_size": trainer.batch_size,
        "seconds": round(trainer.seconds, 3),
        "images_per_second": float(np.median([h["images_per_second"] for h in trainer.history])),
        "val": best["val"],
    }
    if splits.test is not None:
        trainer.evaluated.load_state_dict(trainer.best_state)
        loader = compute.loader(splits.test, trainer.settings.batch_size)
        result["test"] = evaluate(trainer.evaluated, loader, compute)[0]
    result |= {
        **current,
        "precision": compute.precision,
        "versions": versions(),
        "revision": git_revision(),
        "hardware": hardware(),
    }
    write_checkpoint(run / BEST, trainer.best_checkpoint())
    write_json(run / RESULT, result)  # last of all: its presence says that the seed is finished
    (run / LAST).unlink(missing_ok=True)
    return result


def summarise(train_folder: str, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The content of summary.json from the results of the seeds."""
    first = results[0]
    split = first["split"]
    mean, std = mean_and_std([result[split] for result in results])
    shared = ("train_folder", "arch", "settings", "data")
    return {
        "train_folder": train_folder,
        "arch": first["arch"],
        "seeds": [result["seed"] for result in results],
        "split": split,
        "selected_on": "val",
        "mean": mean,
        "std": std,
        **{f"n_{name}": first["data"][name]["images"] for name in ("train", "val", split)},
        "per_seed": [
            {key: value for key, value in result.items() if key not in shared} for result in results
        ],
        "settings": first["settings"],
        "data": first["data"],
        "versions": first["versions"],
    }


def evaluate_checkpoint(checkpoint: Path, data_path: Path, compute: Compute) -> dict[str, Any]:
    """Metrics of a trained network on those of `val` and `test` that are below `data_path`.

    Raises:
        UserError: Not a checkpoint of eval.py, neither folder is there, or classes differ.
    """
    model, record = load_vit(checkpoint, compute.device, "--resume")
    sets = open_evaluation_sets(data_path, record["classes"], model.input_size)
    if not sets:
        raise UserError(f"--data_path {data_path} has neither a val nor a test folder")
    report = {"checkpoint": str(checkpoint), "arch": record["model"]["params"]["arch"]}
    for name, tiles in sets.items():
        tiles.load()
        report[name] = evaluate(model, compute.loader(tiles, EVAL_BATCH), compute)[0]
    return report
