"""What a table of experiments consists of, for everything that prints, plots or tests it.

`ldm.experiment.plan` decides which rows there are, `ldm.experiment.gather` reads their files, and
`ldm.experiment.report` writes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

PUBLISHED_GAIN = "selected - real"  # of the paper's best arm: its numbers belong to no row


@dataclass(frozen=True)
class Row:
    """One arm: a training set, and what classifiers trained on it reached."""

    key: str  # "in_domain-tuned-centroid-100"
    label: str  # for people
    # generator, decoder, guidance, selection, ratio, labels (per class, where there are several)
    factors: dict[str, str | int]
    kind: str  # "real", "synthetic", "pseudo", "baseline", "ceiling"
    status: str  # "done", "partial", "failed", "missing"
    failures: list[str]  # one line per failed job
    images: int | None  # training images, all of them
    synthetic: int | None  # of these, synthetic
    wanted: int | None  # synthetic ones that were asked for
    seeds: int  # networks that were asked for
    summary: dict | None  # summary.json of eval.py, over the seeds that are done
    predictions: dict[int, dict[str, Path]]  # seed -> split -> CSV of predictions
    fidelity: dict | None  # JSON of scripts/fidelity.py
    copies: dict | None  # JSON of scripts/copy_check.py, of the whole pool
    chosen_copies: dict | None  # of the synthetic tiles in the folder: tiles, flagged
    samples: Path | None  # pool that it was drawn from (folder of sample_diffusion.py)
    selection: Path | None  # training folder (selection.json, contact sheets)


@dataclass(frozen=True)
class Table:
    """All arms of one table, and what they were made with."""

    name: str
    title: str
    rows: list[Row]
    reference: str  # key of the row that differences are taken to (real tiles only)
    splits: list[str]  # ["val", "test"]
    classes: list[str]
    settings: dict  # resolved configuration
    paper: dict  # row key, or "selected - real" -> {metric: value}, as published
    umap: Path | None  # folder of scripts/vis.py
    record: dict  # versions, hardware, revision, seconds by job
    # Label and folder of every model that is there, and of the first pool of each generator.
    models: dict[str, tuple[str, Path]] = field(default_factory=dict)
    pools: dict[str, tuple[str, Path]] = field(default_factory=dict)

    def reference_of(self, row: Row) -> str:
        """Key of the row that differences of a row are taken to: as many labels, nothing else."""
        if "labels" not in row.factors:
            return self.reference
        labels = row.factors["labels"]
        real = [one for one in self.rows if one.kind == "real"]
        return next(one.key for one in real if one.factors["labels"] == labels)
