"""report.html and the tables of the demo, from what its stages left behind."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.data.images import list_images
from ldm.demo.plan import RANDOM, REAL, SELECTED, Plan
from ldm.evaluation.baselines import colour_histogram_baseline
from ldm.evaluation.predictions import predictions_name
from ldm.experiment.generator_report import Generator
from ldm.experiment.report import write_results
from ldm.run import git_revision, hardware, versions
from ldm.stages import Finished
from ldm.table.results import Row, Table

NAMES = {
    REAL: "real only",
    RANDOM: "real + random synthetic",
    SELECTED: "real + selected synthetic",
}
HISTOGRAM = "colour histogram, real only"
ABOUT = (
    "An autoencoder and a latent diffusion model learn from unlabelled tiles. A classifier of noisy"
    " latents and the decoder learn from a few labels. Guided by that classifier, the diffusion"
    " model makes tiles of each class; those close to their class are kept, and a ViT is trained"
    " with and without them."
)


def write_report(plan: Plan, stages: Mapping[str, Finished]) -> str:
    """Write OUT/report.html, table.md, table.tex and table.csv; returns the headline."""
    minutes = sum(stage.seconds for stage in stages.values()) / 60
    split = plan.summary(REAL)["split"]
    caution = (
        f"All numbers and pictures are those of this one run. Its {minutes:.1f} minutes of"
        " computing show that the pieces fit together; they are far too few to say what the method"
        f" is worth. With {plan.summary(REAL)[f'n_{split}']} tiles of {split}, small differences"
        " between rows mean nothing. The colour histogram knows no shapes: a network that does not"
        " beat it has learned stains at best."
    )
    if not plan.source:
        caution += " The tiles are drawn by a program and are no medical images."
    return write_results(_table(plan, stages), plan.out, [_generator(plan)], ABOUT, caution)


def _table(plan: Plan, stages: Mapping[str, Finished]) -> Table:
    summary = plan.summary(REAL)
    split = summary["split"]
    baseline = colour_histogram_baseline(plan.data / REAL, plan.data / split)
    rows = [
        _row("colour_histogram", HISTOGRAM, "baseline", plan, {"seed": 0, split: baseline}),
        *(_row(kind, name, "real" if kind == REAL else "synthetic", plan)
          for kind, name in NAMES.items()),
    ]  # fmt: skip
    return Table(
        name="demo",
        title="HistoDiffusion: the whole method in one run",
        rows=rows,
        reference=REAL,
        splits=["val", "test"] if split == "test" else ["val"],
        classes=list(plan.selection(SELECTED)["counts"]),
        settings={**plan.settings, "selection": {RANDOM: {"strategy": "random"}}},
        paper={},
        umap=plan.features,
        record={
            "versions": versions(),
            "hardware": hardware(),
            "revision": git_revision(),
            "jobs": {
                name: {"title": one.title, "state": "done", "command": one.command,
                       "number": one.number, "seconds": one.seconds}
                for name, one in stages.items()
            },
        },
    )  # fmt: skip


def _row(
    key: str, label: str, kind: str, plan: Plan, result: Mapping[str, Any] | None = None
) -> Row:
    """An arm of the demo; a baseline brings its result, which eval.py did not make."""
    folder = plan.training_folder(REAL if kind == "baseline" else key)
    summary = {"per_seed": [result], "updates": None} if result else plan.summary(key)
    counts = plan.selection(key)["counts"].values() if kind == "synthetic" else ()
    predictions: dict[int, dict[str, Path]] = {}
    if result is None:
        root = plan.out / "eval" / folder
        for seed in summary["seeds"]:
            files = {s: root / f"seed{seed}" / predictions_name(s) for s in ("val", "test")}
            predictions[seed] = {s: path for s, path in files.items() if path.is_file()}
    synthetic = sum(row["accepted"] for row in counts)
    return Row(
        key=key,
        label=label,
        factors={"selection": key, "ratio": plan.ratio} if kind == "synthetic" else {},
        kind=kind,
        status="done",
        failures=[],
        images=len(list_images(plan.data / folder)),
        synthetic=synthetic,
        wanted=sum(row["wanted"] for row in counts) if kind == "synthetic" else None,
        seeds=len(summary["per_seed"]),
        summary=summary,
        predictions=predictions,
        fidelity=None,
        copies=None,
        chosen_copies=None,
        samples=None,
        selection=plan.data / folder if kind == "synthetic" else None,
    )


def _generator(plan: Plan) -> Generator:
    sampling = plan.settings["sampling"]
    return Generator(
        autoencoder=plan.autoencoder,
        decoder=plan.decoder,
        diffusion=plan.diffusion,
        classifier=plan.classifier,
        guided=plan.guided,
        unguided=plan.unguided,
        selection=plan.data / plan.training_folder(SELECTED),
        labelled=plan.data / REAL,
        held_out=plan.data / "val",
        size=plan.size,
        scale=sampling["scale"],
        sampler=f"{sampling['steps']} DDIM steps, eta {sampling['eta']:g}",
    )
