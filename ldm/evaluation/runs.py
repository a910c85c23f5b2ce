"""The runs of one evaluation: which seeds are to be trained, and what is written about them."""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ldm.checkpoint import read_checkpoint, write_checkpoint
from ldm.devices import Devices
from ldm.errors import UserError
from ldm.evaluation.bootstrap import intervals
from ldm.evaluation.confusion import write_confusion
from ldm.evaluation.predictions import predictions_name
from ldm.evaluation.sets import GroupTable, Splits, open_evaluation_sets, open_splits
from ldm.evaluation.settings import Settings
from ldm.evaluation.summary import summarise, write_summary
from ldm.evaluation.training import (
    BEST,
    LAST,
    Compute,
    Trainer,
    build_network,
    build_optimizer,
    evaluate,
    predictions_of,
)
from ldm.evaluation.vit import load_vit
from ldm.files import write_json
from ldm.run import git_revision, hardware, versions

log = logging.getLogger(__name__)

__all__ = ["differences", "evaluate_checkpoint", "summarise", "train_and_report"]

RESULT = "result.json"
EVAL_BATCH = 256  # of networks that are only evaluated


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between the settings and data of two runs, in words."""
    found = []
    for name, value in new["settings"].items():
        # An option that came later does by default what was done without it.
        before = old["settings"].get(name, getattr(Settings, name, None))
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
    groups: GroupTable | None = None,
    devices: Devices | None = None,
) -> dict[str, Any]:
    """Train one network per seed, choose its epoch on val, report test once.

    Without a test set val is reported, and the summary says so in `split`.

    Results are in `logdir`/`train_folder`: in seed<k> its result.json, metrics.csv,
    predictions_val.csv, predictions_test.csv and checkpoints/best.ckpt; of all seeds summary.json,
    confusion.csv, per_class.csv and confusion.png. A finished seed is not trained again and an
    unfinished one goes on from its last.ckpt, if settings and files are the same.

    Args:
        resume: A checkpoint to go on from instead; for a single seed.
        overwrite: Discard results that belong to other settings or files.
        groups: Patients, slides or regions of val and test, over which intervals are taken.
        devices: The processes that share the work, started once all is checked. Batches are divided
            among them, the first one writes.

    Returns:
        The content of summary.json.

    Raises:
        UserError: Anything wrong with settings, folders, images or earlier results, before the
            first step.
    """
    settings.check()
    splits = open_splits(data_path, train_folder, settings, num_classes, groups)
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
    if devices is None or len(results) == len(seeds):
        return _run(
            train_folder, settings, seeds, folder, compute, splits, results, checkpoints, stale
        )
    with devices.launch(backend=None) as (ranks, device):
        compute = replace(compute, device=device, ranks=ranks)
        return _run(
            train_folder, settings, seeds, folder, compute, splits, results, checkpoints, stale
        )


def _run(
    train_folder: str,
    settings: Settings,
    seeds: Sequence[int],
    folder: Path,
    compute: Compute,
    splits: Splits,
    results: dict[int, dict[str, Any]],
    checkpoints: dict[int, dict[str, Any]],
    stale: Sequence[Path],
) -> dict[str, Any]:
    """Train what is not in `results` yet and write the summary."""
    is_first = compute.ranks.is_first
    current = {"settings": settings.as_dict(), "data": splits.identity}
    if is_first:
        for run in stale:
            shutil.rmtree(run)
    for seed in seeds:
        if seed not in results:
            trainer = Trainer(settings, seed, splits, compute)
            if seed in checkpoints:
                trainer.restore(checkpoints.pop(seed))
                log.info("seed %d goes on after update %d", seed, trainer.updates)
            results[seed] = _train_one(trainer, folder / f"seed{seed}", train_folder, current)
        done = {s: results[s] for s in seeds if s in results}
        if not is_first:
            summary = summarise(train_folder, list(done.values()))
            continue
        summary = write_summary(
            folder,
            train_folder,
            list(done.values()),
            [folder / f"seed{s}" for s in done],
            splits.groups,
            splits.notes,
        )
    if is_first:
        write_confusion(folder, summary)
    return summary


def _read_training(path: Path, what: str, seed: int) -> dict[str, Any]:
    checkpoint = read_checkpoint(path, ("vit",), what)
    training = checkpoint.get("training")
    if training is None:
        raise UserError(
            f"{what} {path}: a finished network, nothing to go on with; use it with --eval"
        )
    if "updates" not in training:
        raise UserError(
            f"{what} {path}: is of an earlier version, which counted epochs; remove it to start"
            " again"
        )
    if training["seed"] != seed:
        raise UserError(f"{what} {path}: is of seed {training['seed']}, not {seed}; set --seed")
    return checkpoint


def _train_one(
    trainer: Trainer, run: Path, train_folder: str, current: dict[str, Any]
) -> dict[str, Any]:
    """Train to the end, load the selected network, evaluate it, write everything."""
    splits, compute = trainer.splits, trainer.compute
    log.log(
        logging.INFO if compute.ranks.is_first else logging.DEBUG,
        "%s seed %d: %s, %.2f million weights %s, %d images of %d classes, batch %d%s, learning"
        " rate %.3g, %d updates (%s passes), %d validations, %d x %s %s",
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
        trainer.marks[-1],
        trainer.passes(trainer.marks[-1]),
        len(trainer.marks),
        compute.ranks.size,
        compute.device.type,
        compute.precision,
    )  # fmt: skip
    trainer.fit(run, f"{train_folder} seed {trainer.seed}")

    best = trainer.best
    assert best is not None
    val = predictions_of(splits.val, best["logits"])
    is_first = compute.ranks.is_first
    if is_first:
        val.write(run / predictions_name("val"))
    result = {
        "train_folder": train_folder,
        "arch": trainer.settings.arch,
        "weights": trainer.model.origin,
        "seed": trainer.seed,
        "split": splits.reported,
        "best_epoch": trainer.passes(best["updates"]),
        "best_update": best["updates"],
        "updates": trainer.updates,
        "epochs": trainer.passes(trainer.updates),
        "validations": len(trainer.history),
        "batch_size": trainer.batch_size,
        "notes": trainer.notes,
        "seconds": round(trainer.seconds, 3),
        "images_per_second": float(np.median([h["images_per_second"] for h in trainer.history])),
        "val": val.scores(),
    }
    if splits.test is not None:
        trainer.evaluated.load_state_dict(trainer.best_state)
        loader = compute.evaluation_loader(splits.test, trainer.settings.batch_size)
        test = predictions_of(splits.test, evaluate(trainer.evaluated, loader, compute)[0])
        if is_first:
            test.write(run / predictions_name("test"))
        result["test"] = test.scores()
    result |= {
        **current,
        "precision": compute.precision,
        "devices": compute.ranks.size,
        "versions": versions(),
        "revision": git_revision(),
        "hardware": hardware(),
    }
    if not is_first:
        return result
    write_checkpoint(run / BEST, trainer.best_checkpoint())
    write_json(run / RESULT, result)  # last of all: its presence says that the seed is finished
    (run / LAST).unlink(missing_ok=True)
    return result


def evaluate_checkpoint(
    checkpoint: Path,
    data_path: Path,
    compute: Compute,
    out: Path,
    groups: GroupTable | None = None,
) -> dict[str, Any]:
    """Metrics of a trained network on those of `val` and `test` that are below `data_path`.

    Writes evaluation.json and evaluation_val.csv, evaluation_test.csv (predictions) in `out`.

    Raises:
        UserError: Not a checkpoint of eval.py, neither folder is there, or classes differ.
    """
    model, record = load_vit(checkpoint, compute.device, "--resume")
    sets = open_evaluation_sets(data_path, record["classes"], model.input_size, groups)
    if not sets:
        raise UserError(f"--data_path {data_path} has neither a val nor a test folder")
    report: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "arch": record["model"]["params"]["arch"],
        "bootstrap": {},
    }
    for name, tiles in sets.items():
        tiles.load()
        logits = evaluate(model, compute.evaluation_loader(tiles, EVAL_BATCH), compute)[0]
        predictions = predictions_of(tiles, logits)
        predictions.write(out / f"evaluation_{name}.csv")
        report[name] = predictions.scores()
        report["bootstrap"][name] = intervals([predictions])
    write_json(out / "evaluation.json", report)
    return report
