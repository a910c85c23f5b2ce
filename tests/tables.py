"""A table of experiments with real small files, for the tests that render or compare arms.

Networks are replaced by a random model of their mistakes; everything else (tiles, CSVs, sheets) is
what the commands would have written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.procedural import render_tile
from ldm.evaluation.metrics import mean_and_std
from ldm.evaluation.predictions import Predictions, predictions_name
from ldm.experiment.results import Row, Table
from ldm.files import write_csv, write_json, write_png, write_text
from scripts import copy_check

CLASSES = ["ADI", "LYM", "TUM"]


def predictions(
    rng: np.random.Generator,
    easy: np.ndarray,
    groups: list[str] | None = None,
    classes: list[str] = CLASSES,
) -> Predictions:
    """One network: image i is right where easy_i plus noise is positive."""
    count, k = len(easy), len(classes)
    labels = np.arange(count) * k // count
    score = easy + rng.normal(size=count)
    wrong = (labels + rng.integers(1, k, count)) % k
    predicted = np.where(score > 0, labels, wrong)
    p = np.full((count, k), 0.1 / (k - 1))
    p[np.arange(count), predicted] = 0.9
    paths = [f"{classes[label]}/{i:04d}.png" for i, label in enumerate(labels)]
    return Predictions(list(classes), paths, labels, predicted, p, groups)


def row(key: str, kind: str = "synthetic", **values) -> Row:
    """A row without results; `values` are fields that differ."""
    fields = {
        "label": key,
        "factors": {},
        "status": "done",
        "failures": [],
        "images": 60,
        "synthetic": 0,
        "wanted": 0,
        "seeds": len(SEEDS),
        "summary": None,
        "predictions": {},
        "fidelity": None,
        "copies": None,
        "chosen_copies": None,
        "samples": None,
        "selection": None,
    }
    return Row(key=key, kind=kind, **{**fields, **values})


# A whole table

SPLITS = ("val", "test")
SEEDS = (0, 1, 2, 3)
LABELLED = 45  # real training tiles
GENERATORS = {"in_domain": "pre-trained", "scratch": "from scratch"}
RATIOS = (50, 100, 200)
SHORTFALL = "in_domain-centroid-200"
PARTIAL = "scratch-centroid-100"
FAILED, MISSING = "scratch-centroid-200", "scratch-random-200"
REASON = "RuntimeError: CUDA out of memory | tried 2 GiB_of 1 <b>"


def tiles(folder: Path, per_class: int, first: int = 0, size: int = 48) -> Path:
    """Procedural tiles, a folder per class."""
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            picture = Image.fromarray(render_tile(name, first + i, size))
            picture.save(folder / name / f"{i:06d}.png")
    return folder


def summary(runs: dict[int, dict[str, Predictions]], **values) -> dict[str, Any]:
    """What eval.py writes about these seeds, as far as tables read it."""
    per_seed = [
        {"seed": seed, **{split: run.scores() for split, run in of.items()}}
        for seed, of in runs.items()
    ]
    mean, std = mean_and_std([one["test"] for one in per_seed])
    interval = [mean["accuracy"] - 0.03, mean["accuracy"] + 0.03]
    return {
        "seeds": list(runs),
        "split": "test",
        "updates": 2000,
        "epochs": 40.0,
        "validations": 40,
        "mean": mean,
        "std": std,
        "per_seed": per_seed,
        "bootstrap": {
            "test": {"accuracy": interval, "groups": 30, "resamples": 1000, "level": 0.95}
        },
        "notes": [],
        **values,
    }


class Maker:
    """Arms on the same val and test images, in groups of about ten."""

    def __init__(self, folder: Path, images: int = 300, groups: int | None = 30):
        self.folder = folder
        self.rng = np.random.default_rng(7)
        self.easy = {split: self.rng.normal(0.6, 1, images) for split in SPLITS}
        self.groups = None
        if groups:
            self.groups = [f"slide{i % groups}" for i in range(images)]

    def runs(self, key: str, gain: float, seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
        """Fields `summary` and `predictions` of a row, whose networks are `gain` better."""
        made: dict[int, dict[str, Predictions]] = {}
        files: dict[int, dict[str, Path]] = {}
        for seed in seeds:
            luck = gain + self.rng.normal(0, 0.08)
            made[seed], files[seed] = {}, {}
            for split, easy in self.easy.items():
                made[seed][split] = predictions(self.rng, easy + luck, self.groups)
                path = self.folder / "eval" / key / f"seed{seed}" / predictions_name(split)
                made[seed][split].write(path)
                files[seed][split] = path
        return {"summary": summary(made), "predictions": files}


def fidelity(fid: float, recall: float) -> dict[str, Any]:
    """What scripts/fidelity.py writes, as far as tables read it."""
    overall = {"images_real": 150, "images_fake": 90, "fid": fid, "kid": fid / 900, "kid_std": 2e-3}
    return {
        "overall": {**overall, "precision": 0.81, "recall": recall},
        "per_class": {},
        "extractor": {"name": "inception"},
        "real": {"dir": "D/val", "images": 150},
        "fake": {"dir": "accepted", "images": 90},
        "warnings": ["90 synthetic tiles: FID is biased below 2,000; read KID beside it"],
    }


def traces(folder: Path) -> dict[str, dict[str, tuple[str, Path]]]:
    """What training, sampling and selection leave of `folder`/samples: `models` and `pools`."""
    steps = [f"{10 * i},{0.9 - 0.1 * i}," for i in range(4)] + ["40,,0.4"]
    logs = {
        "diffusion": "step,train/loss_simple,val/loss_simple_ema",
        "guide": "step,train/accuracy,val/accuracy",
    }
    for name, head in logs.items():
        write_text(
            folder / "models" / name / "metrics/version_0/metrics.csv",
            "\n".join([head, *steps, ""]),
        )
    last = {"val/accuracy_clean": 0.9, "val/accuracy_t500-999": 0.4, "val/accuracy_t0-499": 0.8}
    write_json(folder / "models/guide/result.json", {"last": last})
    write_png(folder / "models/diffusion/images/samples_00000040.png", render_tile("LYM", 0, 48))
    for key in ("real", SHORTFALL):
        write_text(
            folder / "eval" / key / "seed0/metrics.csv", "updates,val_accuracy\n9,0.2\n18,0.4\n"
        )
    for scale, name in enumerate(GENERATORS):
        pool = folder / "samples" / name
        write_json(pool / "settings.json", {"images": {"scale": scale}})
        write_csv(
            pool / "manifest.csv", [{"class": c, "prob": 0.5} for c in CLASSES], ["class", "prob"]
        )
        for t in (9, 700, 80.5):
            for c in CLASSES:
                write_png(pool / ".stages" / c / f"{t:g}.png", render_tile(c, int(t), 48))
    write_text(pool / "guidance.csv", "t,guidance_to_noise,probability\n700,0.1,0.3\n9,0.2,0.8\n")
    chosen = folder / "data" / SHORTFALL
    rows = [
        {"class": c, "file": f"{c}/{i:06d}.png", "decision": decision, "score": 0.1 * i,
         "nearest": c if decision == "accepted" else "ADI", "own_distance": 0.001 * i}
        for c in CLASSES for i in range(4)
        for decision in ["accepted" if i < 2 and c != "LYM" else "rejected"]
    ]  # fmt: skip
    write_csv(chosen / "selection.csv", rows, list(rows[0]))
    counts = {
        "generated": 4,
        "rejected": 2,
        "surplus": 0,
        "accepted": 2,
        "wanted": 3,
        "shortfall": 1,
    }
    of_lym = {**counts, "rejected": 4, "accepted": 0, "shortfall": 3}
    write_json(
        chosen / "selection.json",
        {"counts": {c: of_lym if c == "LYM" else counts for c in CLASSES}},
    )
    return {
        "models": {"diffusion": ("a diffusion model", folder / "models/diffusion"),
                   "guide": ("a noise classifier", folder / "models/guide")},
        "pools": {name: (label, folder / "samples" / name) for name, label in GENERATORS.items()},
    }  # fmt: skip


def make_table(folder: Path) -> Table:
    """Every kind of row, and one of each thing that can go wrong."""
    maker = Maker(folder)
    data, copies = tiles(folder / "D" / "train5", 6), {}
    held_out = tiles(folder / "D" / "val", 16, first=100)
    train = tiles(folder / "D" / "train", 20, first=200)
    for number, name in enumerate(GENERATORS):
        pool = tiles(folder / "samples" / name, 8, first=300 + 50 * number)
        # One copy of a training tile, turned.
        with Image.open(train / "TUM" / "000003.png") as image:
            image.rotate(90).save(pool / "TUM" / "000000.png")
        out = folder / "copies" / name
        copy_check.main(
            ["--synthetic", str(pool), "--train", str(train), "--holdout", str(held_out)]
            + ["--out", str(out), "--quantile", "0.05", "--sheet", "6"]
        )
        copies[name] = json.loads((out / "report.json").read_text())
    picture = Image.open(out / "suspicious.png")
    for name in CLASSES:
        sheet = folder / "sheets" / SHORTFALL / f"{name}.png"
        sheet.parent.mkdir(parents=True, exist_ok=True)
        picture.save(sheet)
    umap = folder / "features" / "in_domain"
    umap.mkdir(parents=True)
    picture.save(umap / "umap.png")
    (umap / "umap.html").write_text("<!doctype html>")

    rows = [
        row("real", "real", label="real tiles only", images=LABELLED, **maker.runs("real", 0.0)),
        row("colour_histogram", "baseline", label="colour histogram", images=LABELLED,
            seeds=1, **maker.runs("colour_histogram", -0.6, (0,))),
        row("ceiling-100", "ceiling", label="real tiles, 100% more", images=2 * LABELLED,
            **maker.runs("ceiling-100", 0.9)),
    ]  # fmt: skip
    rows[1].summary["updates"] = None  # no network
    for generator, words in GENERATORS.items():
        for strategy in ("random", "centroid"):
            for ratio in RATIOS:
                key = f"{generator}-{strategy}-{ratio}"
                wanted = LABELLED * ratio // 100
                gain = (0.5 if strategy == "centroid" else 0.05) * (generator == "in_domain")
                gain *= min(ratio, 100) / 100
                values: dict[str, Any] = {
                    "label": f"{words}, {strategy} {ratio}%",
                    "factors": {"generator": generator, "selection": strategy, "ratio": ratio},
                    "wanted": wanted,
                    "synthetic": wanted - 7 * (key == SHORTFALL),
                    "samples": folder / "samples" / generator,
                    "selection": folder / "data" / key,
                    "copies": copies[generator],
                    "fidelity": fidelity(80 - 20 * gain, 0.3 + gain / 2),
                }
                values["images"] = LABELLED + values["synthetic"]
                values["chosen_copies"] = {"tiles": values["synthetic"], "flagged": 9}
                if key in (FAILED, MISSING):
                    empty = ("images", "synthetic", "fidelity", "chosen_copies")
                    values |= dict.fromkeys(empty)
                    values["status"] = "failed" if key == FAILED else "missing"
                    values["failures"] = [REASON] if key == FAILED else []
                else:
                    seeds = SEEDS[:2] if key == PARTIAL else SEEDS
                    values |= maker.runs(key, gain, seeds)
                    if key == PARTIAL:
                        values |= {"status": "partial", "failures": ["seed 2: killed: memory"]}
                rows.append(row(key, **values))
    settings = {
        "name": "wiring",
        "data": {"root": str(data.parent), "labelled": "train5"},
        "selection": {"random": {"strategy": "random"}, "centroid": {"strategy": "centroid"}},
        "evaluation": {"seeds": list(SEEDS), "arguments": {"match_steps": 2000}},
    }
    record = {
        "versions": {"python": "3.11", "torch": "2.6.0"},
        "hardware": {"processor": "a processor", "cores": 2, "threads": 1, "gpus": []},
        "revision": "0123456789abcdef",
        "jobs": {
            "eval-real-0": {
                "title": "real tiles only, seed 0",
                "kind": "eval",
                "state": "done",
                "command": "python eval.py --data_path D --output_dir train5 --seed 0",
                "number": "accuracy 0.61",
                "seconds": 71.5,
            },
            f"eval-{FAILED}-0": {
                "title": FAILED, "state": "failed", "command": None, "number": None,
                "seconds": 4000.0,
            },
        },
    }  # fmt: skip
    paper = {"selected - real": {"accuracy": 6.4}, "real": {"accuracy": 70.1, "macro_f1": None}}
    title = "Procedural tiles: a table with <everything> & more"
    split = list(SPLITS)
    return Table("wiring", title, rows, "real", split, CLASSES, settings, paper, umap, record,
                 **traces(folder))  # fmt: skip
