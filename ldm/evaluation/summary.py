"""What is written about all networks of one training set: summary.json, tables and a picture.

Letters: K classes, S seeds.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ldm.evaluation.bootstrap import FEW_GROUPS, intervals
from ldm.evaluation.metrics import VAL_WARNING, mean_and_std
from ldm.evaluation.predictions import Predictions, predictions_name
from ldm.files import write_bytes, write_json, write_text
from ldm.report.plots import confusion_picture

SUMMARY = "summary.json"
SPLITS = ("val", "test")
OVER_IMAGES = (
    "the intervals are over images, as no groups were given (`groups`): tiles of one slide or"
    " region are alike, so they are too narrow"
)


def write_summary(
    folder: Path,
    train_folder: str,
    results: Sequence[dict[str, Any]],
    seed_folders: Sequence[Path],
    groups: Mapping[str, list[str] | None] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Write summary.json into a folder, and return its content.

    Args:
        train_folder: Name of the training set in the summary.
        results: Contents of result.json, one per seed.
        seed_folders: Folder of each seed, which holds its predictions_SPLIT.csv.
        groups: Group of each image by split; if omitted, the groups in the predictions are used.
        notes: Remarks on the sets.
    """
    summary = summarise(train_folder, results)
    said = [*notes, *(note for result in results for note in result.get("notes", []))]
    if results[0].get("updates") is not None:
        said.append(_length(results[0]))
    summary["bootstrap"] = {}
    for split in SPLITS:
        if split not in results[0]:
            continue
        paths = [place / predictions_name(split) for place in seed_folders]
        runs = read_predictions(paths, (groups or {}).get(split))
        if runs is None:
            said.append(
                f"no interval for {split}: an earlier version kept no predictions of some seed;"
                " `overwrite` with a changed setting, or another `logdir`, trains it again"
            )
            continue
        found = intervals(runs)
        summary["bootstrap"][split] = found
        if found["groups"] is None:
            said.append(OVER_IMAGES)
        elif found["groups"] < FEW_GROUPS:
            said.append(
                f"{split} has {found['groups']} groups: intervals of fewer than {FEW_GROUPS} are"
                " too narrow"
            )
    if summary["split"] == "val":
        said.append(VAL_WARNING)
    summary["notes"] = list(dict.fromkeys(said))
    write_json(folder / SUMMARY, summary)
    return summary


def _length(result: Mapping[str, Any]) -> str:
    """How long networks were trained, in words: it decides whether arms can be compared."""
    if result["settings"].get("match_steps") is not None:
        return (
            f"{result['updates']} updates ({result['epochs']} passes) and {result['validations']}"
            " validations, by `match_steps`: the same for training sets of any size"
        )
    return (
        f"{result['epochs']} passes ({result['updates']} updates): larger training sets get more"
        " updates; `match_steps` gives all the same"
    )


def read_predictions(paths: Sequence[Path], groups: list[str] | None) -> list[Predictions] | None:
    """Read the predictions of all seeds; None if a file is missing.

    Files that have other groups than these are written again.
    """
    if not all(path.is_file() for path in paths):
        return None
    runs = [Predictions.read(path) for path in paths]
    if groups is None:
        groups = next((run.groups for run in runs if run.groups is not None), None)
    for path, run in zip(paths, runs, strict=True):
        if run.groups != groups:
            run.groups = groups
            run.write(path)
    return runs


def summarise(train_folder: str, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of summary.json from the results of the seeds."""
    first = results[0]
    split = first["split"]
    mean, std = mean_and_std([result[split] for result in results])
    shared = ("train_folder", "arch", "settings", "data", "notes")
    return {
        "train_folder": train_folder,
        "arch": first["arch"],
        "seeds": [result["seed"] for result in results],
        "split": split,
        "selected_on": "val",
        **{name: first.get(name) for name in ("updates", "epochs", "validations")},
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


def write_confusion(folder: Path, summary: dict[str, Any]) -> None:
    """Write confusion.csv and per_class.csv of val and test, and confusion.png of what is reported.

    Args:
        summary: Content of summary.json.
    """
    runs, split = summary["per_seed"], summary["split"]
    matrices, classes = {}, {}
    for name in SPLITS:
        for run in (run for run in runs if name in run):
            part, key = run[name], (name, run["seed"])
            names = list(part["per_class"])
            matrices[key] = pd.DataFrame(part["confusion"], names, names)
            classes[key] = pd.DataFrame.from_dict(part["per_class"], "index")
    for file, tables, index in (("confusion", matrices, "label"), ("per_class", classes, "class")):
        table = pd.concat(tables, names=["split", "seed", index])
        text = table.to_csv(float_format="%.6g", lineterminator="\n")
        write_text(folder / f"{file}.csv", text)
    counts = np.array([run[split]["confusion"] for run in runs])  # (S, K, K)
    title = f"{summary['train_folder']}: {summary['arch']}, {split} set"
    if len(runs) > 1:
        title += f", mean of {len(runs)} seeds"
    write_bytes(folder / "confusion.png", confusion_picture(counts.mean(axis=0), names, title))
