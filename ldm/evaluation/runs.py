"""The runs of one evaluation: which seeds are to be trained, and what is written about them."""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from ldm.checkpoint import read_checkpoint, write_checkpoint
from ldm.data.seeds import seed_generators
from ldm.devices import Devices, Ranks
from ldm.errors import UserError
from ldm.evaluation.bootstrap import intervals
from ldm.evaluation.predictions import predictions_name
from ldm.evaluation.sets import EVALUATED, GroupTable, Splits, open_evaluation_sets, open_splits
from ldm.evaluation.summary import summarise, write_confusion, write_summary
from ldm.evaluation.training import Predictor, RunBatches, TrainingData, predictions_of
from ldm.files import remove_leftovers, require_outside, write_json
from ldm.models.callbacks import LastCheckpoint
from ldm.models.vit import load_vit
from ldm.models.vit_settings import Settings
from ldm.models.vit_training import (
    Course,
    ValidateAtMarks,
    VitTraining,
    build_network,
    build_optimizer,
)
from ldm.run import RunFolder, hardware, provenance
from ldm.run import differences as settings_differences
from ldm.train import OWN_NAMES, fit

log = logging.getLogger(__name__)

RESULT = "result.json"
LAST, BEST = Path("checkpoints", "last.ckpt"), Path("checkpoints", "best.ckpt")
SAVE_SECONDS = 60.0  # between writes of last.ckpt; a run that is killed loses at most this much
EVAL_BATCH = 256  # of networks that are only evaluated


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between the settings and data of two runs, in words."""
    # An option that came later does by default what was done without it.
    defaults = {name: getattr(Settings, name, None) for name in new["settings"]}
    found = settings_differences(old["settings"], new["settings"], defaults)
    for name in sorted({*old["data"], *new["data"]}):
        before, now = old["data"].get(name), new["data"].get(name)
        if before is None or now is None:
            found.append(f"there was {'no' if before is None else 'a'} {name} set")
        elif before["sha256"] != now["sha256"]:
            found.append(f"the files of {name} changed")
    return found


def is_current(run: Path, earlier: dict[str, Any], now: dict[str, Any], overwrite: bool) -> bool:
    """Whether a run was made with the settings and data of now.

    Raises:
        UserError: It was not, and is not to be overwritten.
    """
    changed = differences(earlier, now)
    if changed and not overwrite:
        raise UserError(
            f"{run} holds a run with other settings: {'; '.join(changed)}; add `overwrite` to"
            " replace it, or choose another `logdir`"
        )
    return not changed


def read_result(run: Path, now: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The result of a finished run, if it has the settings and data of now (see `is_current`)."""
    if not (run / RESULT).is_file():
        return None
    try:
        result = json.loads((run / RESULT).read_text())
        if not is_current(run, result, now, overwrite):
            return None
        summarise(run.name, [result])  # fails where anything is missing
    except UserError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError):
        raise UserError(
            f"{run / RESULT} is damaged; remove it, and the run is done again"
        ) from None
    log.info("%s is finished: not made again", run)
    return result


@dataclass
class Earlier:
    """What earlier starts of the same command left."""

    results: dict[int, dict[str, Any]] = field(default_factory=dict)  # of finished seeds
    checkpoints: dict[int, Path] = field(default_factory=dict)  # to go on from, of unfinished ones
    stale: list[Path] = field(default_factory=list)  # folders with other settings, to be replaced

    @classmethod
    def find(
        cls,
        folder: Path,
        seeds: Sequence[int],
        current: dict[str, Any],
        resume: str | Path | None,
        overwrite: bool,
    ) -> "Earlier":
        """Look into the folders of all seeds.

        Args:
            current: The settings and data of now.
            resume: Checkpoint to go on from, instead of `last.ckpt` in the folder of a seed.
        """
        found = cls()
        for seed in seeds:
            run = folder / f"seed{seed}"
            if (run / RESULT).is_file():
                if resume is not None:
                    raise UserError(
                        f"`resume` {resume}: {run} is finished; choose another `logdir`"
                    )
                result = read_result(run, current, overwrite)
                if result is None:
                    found.stale.append(run)
                else:
                    found.results[seed] = result
            elif resume is not None:
                earlier = _read_training(resume, "`resume`", seed)["training"]
                if changed := differences(earlier, current):
                    raise UserError(
                        f"`resume` {resume}: {'; '.join(changed)}; give the same as then"
                    )
                found.checkpoints[seed] = Path(resume)
            elif (run / LAST).is_file():
                earlier = _read_training(run / LAST, "earlier run", seed)["training"]
                if is_current(run, earlier, current, overwrite):
                    found.checkpoints[seed] = run / LAST
                else:
                    found.stale.append(run)
        return found


def _read_training(path: str | Path, what: str, seed: int) -> dict[str, Any]:
    checkpoint = read_checkpoint(path, ("vit",), what)
    training = checkpoint.get("training")
    if training is None:
        raise UserError(
            f"{what} {path}: a finished network, nothing to go on with; use it with `eval`"
        )
    if "updates" not in training:
        raise UserError(
            f"{what} {path}: is of an earlier version, which counted epochs; remove it to start"
            " again"
        )
    if training["seed"] != seed:
        raise UserError(f"{what} {path}: is of seed {training['seed']}, not {seed}; set `seed`")
    return checkpoint


@dataclass(frozen=True)
class Arm:
    """What the networks of all seeds of an evaluation have in common."""

    name: str  # of the training folder
    folder: Path  # of the results
    settings: Settings
    splits: Splits
    devices: Devices
    workers: int  # loader processes

    @property
    def facts(self) -> dict[str, Any]:
        """The settings and data that a result holds for."""
        return {"settings": asdict(self.settings), "data": self.splits.identity}


def train_and_report(
    data_path: Path,
    train_folder: str,
    settings: Settings,
    seeds: Sequence[int],
    logdir: Path,
    devices: Devices,
    workers: int = 0,
    num_classes: int | None = None,
    resume: str | Path | None = None,
    overwrite: bool = False,
    groups: GroupTable | None = None,
) -> dict[str, Any] | None:
    """Train one network per seed, choose its epoch on val, report test once.

    Without a test set val is reported, and the summary says so in `split`.

    Results are in `logdir`/`train_folder`: in seed<k> its result.json, metrics.csv,
    predictions_val.csv, predictions_test.csv and checkpoints/best.ckpt; of all seeds summary.json,
    confusion.csv, per_class.csv and confusion.png. A finished seed is not trained again and an
    unfinished one goes on from its last.ckpt, if settings and files are the same.

    Args:
        devices: They share each batch; other processes are started once all is checked, and the
            first one writes.
        num_classes: What the user believes; compared with the folders.
        resume: A checkpoint to go on from instead; for a single seed.
        overwrite: Discard results that belong to other settings or files.
        groups: Patients, slides or regions of val and test, over which intervals are taken.

    Returns:
        The content of summary.json; None in another process than the first.
    """
    settings.check()
    splits = open_splits(data_path, train_folder, settings, num_classes, groups)
    arm = Arm(train_folder, logdir / train_folder, settings, splits, devices, workers)
    sets = [data_path / name for name in (train_folder, *EVALUATED)]
    require_outside({"`logdir`": arm.folder}, {"`data_path`": sets})
    earlier = Earlier.find(arm.folder, seeds, arm.facts, resume, overwrite)
    if len(earlier.results) == len(seeds):
        return _report(arm, seeds, earlier, Ranks())
    # What a user can get wrong comes first, then the images, then the earlier results go.
    build_optimizer(settings, build_network(settings, splits.classes), settings.lr)
    splits.load()
    with devices.launch(backend=None) as (ranks, _):
        return _report(arm, seeds, earlier, ranks)


def _report(
    arm: Arm, seeds: Sequence[int], earlier: Earlier, ranks: Ranks
) -> dict[str, Any] | None:
    """Train the seeds that have no result yet, and write the summary after each."""
    results = earlier.results
    summary = None
    if ranks.is_first:
        for run in earlier.stale:
            shutil.rmtree(run)
        runs = [arm.folder / f"seed{seed}" for seed in seeds]
        remove_leftovers(arm.folder, *runs, *((run / LAST).parent for run in runs))
    for seed in seeds:
        if seed not in results:
            results[seed] = train_one(arm, seed, ranks, earlier.checkpoints.get(seed))
        if ranks.is_first:
            done = [s for s in seeds if s in results]
            summary = write_summary(
                arm.folder,
                arm.name,
                [results[s] for s in done],
                [arm.folder / f"seed{s}" for s in done],
                arm.splits.groups,
                arm.splits.notes,
            )
    if summary is not None:
        write_confusion(arm.folder, summary)
    return summary


def build_training(arm: Arm, seed: int, ranks: Ranks) -> tuple[VitTraining, TrainingData]:
    """The network of a seed, ready to be trained, and its batches."""
    settings, splits = arm.settings, arm.splits
    course = Course.of(settings, len(splits.train), ranks.size)
    judge = Predictor(arm.devices, arm.workers, ranks).judge(splits.val, settings.batch_size)
    seed_generators(seed)
    network = build_network(settings, splits.classes)
    model = VitTraining(network, settings, course, seed, judge, arm.facts)
    batches = RunBatches(splits.train, course, seed, ranks, lambda: model.updates)
    return model, TrainingData(splits.train, batches, arm.workers)


def train_one(arm: Arm, seed: int, ranks: Ranks, checkpoint: Path | None = None) -> dict[str, Any]:
    """Train to the end, evaluate the selected network on test, write all, return result.json."""
    model, data = build_training(arm, seed, ranks)
    run = RunFolder(arm.folder / f"seed{seed}")
    if checkpoint is not None:
        payload = _read_training(checkpoint, "earlier run", seed)
        log.info("seed %d goes on after update %d", seed, payload["training"]["updates"])
        if "model" in payload["training"]:
            model.resume_earlier_version(payload)
            checkpoint = None
    if model.updates < model.course.updates:
        train_to_the_end(arm, model, data, run, checkpoint)
    result, predictions = _results(arm, model, ranks)
    if ranks.is_first:
        for split, found in predictions.items():
            found.write(run.root / predictions_name(split))
        write_checkpoint(run.root / BEST, model.best_checkpoint())
        write_json(run.root / RESULT, result)  # last: its presence says that the seed is finished
        run.last.unlink(missing_ok=True)
    return result


def train_to_the_end(
    arm: Arm, model: VitTraining, data: TrainingData, run: RunFolder, checkpoint: Path | None
) -> None:
    """Train a network in its run folder, going on from a checkpoint if there is one."""
    show = f"{arm.name} seed {model.seed}"
    interval = timedelta(seconds=SAVE_SECONDS)
    fit(
        model,
        data,
        run,
        arm.devices,
        checkpoint=checkpoint,
        callbacks=[
            ValidateAtMarks(show),
            LastCheckpoint(train_time_interval=interval, dirpath=run.checkpoints, **OWN_NAMES),
        ],
        settings={
            # All updates are one epoch for Lightning: passes are those of `RunBatches`.
            "max_epochs": 1,
            "max_steps": model.course.updates,
            "limit_val_batches": 0,
            "use_distributed_sampler": False,
            "sync_batchnorm": arm.devices.ranks > 1 and arm.devices.accelerator == "gpu",
        },
        loggers=False,  # metrics.csv has a row per validation
        summary=f"{show}: {_described(arm, model)}",
    )


def _described(arm: Arm, model: VitTraining) -> str:
    """What is trained, in one line."""
    course, settings, splits = model.course, arm.settings, arm.splits
    weights = sum(p.numel() for p in model.net.parameters()) / 1e6
    asked = settings.batch_size
    batch = f"{course.batch_size}{'' if course.batch_size == asked else f' (of {asked} asked for)'}"
    return (
        f"{settings.arch}, {weights:.2f} million weights {model.net.origin},"
        f" {len(splits.train)} images of {len(splits.classes)} classes, batch {batch}, learning"
        f" rate {model.learning_rate:.3g}, {course.updates} updates"
        f" ({course.passes(course.updates)} passes), {len(course.marks)} validations"
    )


def _results(arm: Arm, model: VitTraining, ranks: Ranks) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of result.json, and the predictions of val and test."""
    settings, splits, course, best = arm.settings, arm.splits, model.course, model.best
    assert best is not None
    predictions = {"val": predictions_of(splits.val, best["logits"])}
    if splits.test is not None:
        predictor = Predictor(arm.devices, arm.workers, ranks)
        network = model.evaluated.to(predictor.device)
        network.load_state_dict(model.best_state)
        loader = predictor.loader(splits.test, settings.batch_size)
        predictions["test"] = predictions_of(splits.test, predictor.logits(network, loader))
    speeds = [row["images_per_second"] for row in model.history]
    return {
        "train_folder": arm.name,
        "arch": settings.arch,
        "weights": model.net.origin,
        "seed": model.seed,
        "split": splits.reported,
        "best_epoch": course.passes(best["updates"]),
        "best_update": best["updates"],
        "updates": model.updates,
        "epochs": course.passes(model.updates),
        "validations": len(model.history),
        "batch_size": course.batch_size,
        "notes": list(course.notes),
        "seconds": round(model.seconds, 3),
        "images_per_second": float(np.median(speeds)),
        **{split: found.scores() for split, found in predictions.items()},
        **arm.facts,
        "precision": arm.devices.precision,
        "devices": ranks.size,
        **provenance(),
        "hardware": hardware(),
    }, predictions


def evaluate_checkpoint(
    checkpoint: Path,
    data_path: Path,
    devices: Devices,
    out: Path,
    workers: int = 0,
    groups: GroupTable | None = None,
) -> dict[str, Any]:
    """Metrics of a trained network on those of `val` and `test` that are below `data_path`.

    Writes evaluation.json and evaluation_val.csv, evaluation_test.csv (predictions) in `out`.
    """
    model, record = load_vit(checkpoint, devices.device, "`resume`")
    sets = open_evaluation_sets(data_path, record["classes"], model.input_size, groups)
    if not sets:
        raise UserError(f"`data_path` {data_path} has neither a val nor a test folder")
    report: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "arch": record["model"]["params"]["arch"],
        "bootstrap": {},
    }
    predictor = Predictor(devices, workers)
    for name, tiles in sets.items():
        tiles.load()
        logits = predictor.logits(model, predictor.loader(tiles, EVAL_BATCH))
        predictions = predictions_of(tiles, logits)
        predictions.write(out / f"evaluation_{name}.csv")
        report[name] = predictions.scores()
        report["bootstrap"][name] = intervals([predictions])
    write_json(out / "evaluation.json", report)
    return report
