"""The report of the demo: that of an experiment, with the models behind its synthetic tiles."""

from dataclasses import replace

from ldm.evaluation.baselines import colour_histogram_baseline
from ldm.experiment.demo import LABELLED, SELECTED, Demo
from ldm.experiment.generator_report import Generator
from ldm.experiment.report import write_results
from ldm.experiment.results import Row, Table

TITLE = "HistoDiffusion: the whole method in one run"
ABOUT = (
    "An autoencoder and a latent diffusion model learn from unlabelled tiles. A classifier of noisy"
    " latents and the decoder learn from a few labels. Guided by that classifier, the diffusion"
    " model makes tiles of each class; those close to their class are kept, and a ViT is trained"
    " with and without them."
)


def write_report(demo: Demo, table: Table) -> str:
    """Write report.html, table.md, table.tex and table.csv; returns the headline.

    Args:
        table: What `ldm.experiment.gather` found of the demo.
    """
    minutes = sum(job["seconds"] or 0 for job in table.record["jobs"].values()) / 60
    caution = (
        f"All numbers and pictures are those of this one run. Its {minutes:.1f} minutes of"
        " computing show that the pieces fit together; they are far too few to say what the method"
        " is worth. The colour histogram knows no shapes: a network that does not beat it has"
        " learned stains at best."
    )
    if demo.source is None:
        caution += " The tiles are drawn by a program and are no medical images."
    shown = replace(table, title=TITLE, rows=[*table.rows, colour_row(demo, table)])
    return write_results(shown, demo.out, [generator(demo)], ABOUT, caution)


def colour_row(demo: Demo, table: Table) -> Row:
    """What colour alone is worth, learned from the labelled tiles in a second."""
    labelled = demo.data / LABELLED
    result = {
        split: colour_histogram_baseline(labelled, demo.data / split) for split in table.splits
    }
    real = next(row for row in table.rows if row.key == table.reference)
    return replace(
        real,
        key="colour_histogram",
        label="colour histogram, real tiles only",
        kind="baseline",
        seeds=1,
        summary={"per_seed": [{"seed": 0, **result}], "updates": None},
        predictions={},
    )


def generator(demo: Demo) -> Generator:
    """What made the demo's synthetic tiles."""
    sampling = demo.settings["sampling"]
    return Generator(
        autoencoder=demo.autoencoder,
        decoder=demo.decoder,
        diffusion=demo.diffusion,
        classifier=demo.classifier,
        guided=demo.guided,
        unguided=demo.unguided,
        selection=demo.data / demo.training_folder(SELECTED),
        labelled=demo.data / LABELLED,
        held_out=demo.data / "val",
        size=demo.size,
        scale=sampling["scale"],
        sampler=f"{sampling['steps']} DDIM steps, eta {sampling['eta']:g}",
    )
