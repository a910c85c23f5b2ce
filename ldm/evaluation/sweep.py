"""Scores of guided samples by setting: does guidance reach the class, and at what price?

Letters: N images, D features, K classes. A judge, a classifier of images that took no part in the
guidance, says which class a synthetic tile looks like; held-out real tiles say how far the tiles of
each class are from tissue.

A setting with its scores is a row, with the columns of sweep.csv:

    guidance             "classifier" or "cfg", what `scale` multiplies
    scale, sampler, steps, eta   of the sampling
    interval             guided time steps, "LOW:HIGH" or "all"
    probability          mean p(y) of the guiding classifier at the end; None without one
    guidance_to_noise    largest mean |guidance| / |eps| over the steps; None without guidance
    images_per_s, folder of its tiles
    images ... diversity see `score`
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.tile_files import TileFiles
from ldm.data.tiles import read_tile
from ldm.devices import Devices
from ldm.errors import UserError
from ldm.evaluation.fidelity import FEWEST_TILES, fidelity
from ldm.features.extractor import Extractor
from ldm.features.sets import FeatureSet, cached_features
from ldm.files import write_bytes, write_csv, write_json, write_text
from ldm.report import plots
from ldm.report.grids import Card, card_sheet
from ldm.report.tables import TextTable, to_markdown
from ldm.run import hardware, provenance
from ldm.synthesis.folder import SampleFolder
from ldm.synthesis.models import Models, make_settings
from ldm.synthesis.production import synthesise
from ldm.synthesis.settings import Sampling
from ldm.synthesis.synthesiser import Synthesiser

SHEET_TILES = 2  # of each class, in tiles.png
SHEET_SIDE = 96  # pixels of each

Row = dict[str, Any]  # a setting with its scores, see above


def judge(root: Path, extractor: Extractor, cache: Path, classes: Sequence[str]) -> FeatureSet:
    """Features (kept in `cache`) and logits of the tiles below root/CLASS/."""
    found = cached_features(TileFiles.below(root, True, classes), extractor, cache)
    assert found.logits is not None, "the judge classifies these classes"
    return found


def agreement(tiles: FeatureSet) -> Tensor:
    """Share of the tiles of each class that the judge gives that class, (K,)."""
    hits = (tiles.logits.argmax(dim=1) == tiles.labels).double()
    return torch.stack([hits[tiles.labels == k].mean() for k in range(len(tiles.classes))])


def score(real: FeatureSet, synthetic: FeatureSet, seed: int = 0) -> dict[str, float]:
    """Scores of synthetic tiles against held-out real ones.

    Args:
        real, synthetic: Features of length 1, with the judge's logits; both sets have at least
            `FEWEST_TILES` tiles of each class.
        seed: Seed of the subsets that kernel distances are averaged over.

    Returns:
        images: N.
        agreement, agreement_error: Share of tiles that the judge gives their class, mean over
            classes, and its standard error.
        kernel_distance: KID to the real tiles of all classes together (Binkowski et al. 2018).
        class_kernel_distance, class_kernel_distance_error: KID to the real tiles of the same class,
            mean over classes: low only where tiles are of the right class, look real and vary as
            real ones do; and its deviation over random subsets, as the mean of K numbers.
        precision, recall: Shares of tiles within the real manifold, and of real tiles within the
            synthetic one (Kynkaanniemi et al. 2019).
        diversity: Mean distance of two tiles of a class, relative to that of real tiles; 1 is as
            varied as tissue, 0 is one tile again and again.
    """
    check_counts(real, "the real tiles")
    check_counts(synthetic, "the synthetic tiles")
    # KID's kernel is (x . y / D + 1)^3: with rows of length sqrt(D) it sees their cosine.
    scaled = [tiles.values.double() * tiles.values.shape[1] ** 0.5 for tiles in (real, synthetic)]
    of_class = [(real.labels == k, synthetic.labels == k) for k in range(len(real.classes))]
    overall = fidelity(*scaled, seed)
    own = [fidelity(scaled[0][mine], scaled[1][theirs], seed) for mine, theirs in of_class]
    counts = torch.bincount(synthetic.labels)  # (K,)
    spreads = [
        sum(pairwise_distance(tiles.values[rows[i]]) for rows in of_class)
        for i, tiles in enumerate((real, synthetic))
    ]
    shares, classes = agreement(synthetic), len(real.classes)  # (K,)
    deviations = [values["kernel_distance_std"] for values in own]
    return {
        "images": len(synthetic.labels),
        "agreement": shares.mean().item(),
        "agreement_error": (shares * (1 - shares) / counts).sum().sqrt().item() / classes,
        "kernel_distance": overall["kernel_distance"],
        "class_kernel_distance": sum(values["kernel_distance"] for values in own) / classes,
        "class_kernel_distance_error": float(np.linalg.norm(deviations)) / classes,
        "precision": overall["precision"],
        "recall": overall["recall"],
        "diversity": spreads[1] / spreads[0],
    }


def check_counts(tiles: FeatureSet, what: str) -> None:
    """UserError unless there are enough tiles of each class to compare distributions."""
    fewest = int(torch.bincount(tiles.labels, minlength=len(tiles.classes)).min())
    if fewest < FEWEST_TILES:
        raise UserError(
            f"{what}: a class has {fewest} tiles, each needs {FEWEST_TILES} or more; add some"
        )


def pairwise_distance(features: Tensor) -> float:
    """Mean of 1 - cosine over all pairs of different rows of length 1, (N, D), N at least 2."""
    # The sum over all pairs is |sum of rows|^2, of which N pairs are rows with themselves.
    n = len(features)
    cosine = (features.double().sum(0).square().sum() - n) / (n * (n - 1))
    return 1 - cosine.item()


@dataclass
class Sweep:
    """Samples with one setting after another into OUT/tiles/SETTING, and scores them.

    What is there already is not made again.
    """

    models: Models
    devices: Devices
    judge_net: Extractor  # classifier of the models' classes
    real_root: Path  # held-out real tiles, real_root/CLASS/
    out: Path
    per_class: int  # images of each class
    batch_size: int  # images sampled together
    rows: list[Row] = field(init=False, default_factory=list)  # one of each setting
    _sheet: list[tuple[str, list[Card]]] = field(init=False, default_factory=list)  # likewise

    def __post_init__(self):
        cache = self.out / "features" / "real.safetensors"
        self.real = judge(self.real_root, self.judge_net, cache, self.models.classes)
        check_counts(self.real, f"`real` {self.real_root}")

    def measure(self, sampling: Sampling) -> None:
        """Sample with one setting, what is not there yet, and score it."""
        models, out = self.models, self.out
        by_classifier, classes = models.classifier is not None, models.classes
        root = out / "tiles" / sampling.label
        settings = make_settings(sampling, models, self.devices)
        folder = SampleFolder(root, settings, models.facts)
        counts = dict.fromkeys(classes, self.per_class)
        synthesise(Synthesiser(models, sampling, self.devices), folder, counts, self.batch_size)
        cache = out / "features" / f"{sampling.label}.safetensors"
        synthetic = judge(root, self.judge_net, cache, classes)
        made = folder.rows.values()
        probabilities = [row["prob"] for row in made if row["prob"] is not None]
        quantity = "guidance_to_noise" if by_classifier else "extrapolation_to_noise"
        ratios = [getattr(means, quantity) for means in folder.guidance_log]
        row: Row = {
            "guidance": "classifier" if by_classifier else "cfg",
            "scale": sampling.scale if by_classifier else sampling.cfg_scale,
            "interval": "all" if sampling.interval is None else "{}:{}".format(*sampling.interval),
            "sampler": sampling.sampler,
            "steps": sampling.steps,
            "eta": sampling.eta,
            "probability": sum(probabilities) / len(probabilities) if probabilities else None,
            "guidance_to_noise": max((r for r in ratios if r is not None), default=None),
            "images_per_s": len(made) / sum(row["seconds"] for row in made),
            **score(self.real, synthetic, sampling.seed),
            "folder": root.relative_to(out).as_posix(),
        }
        self.rows.append(row)
        cards = [
            Card([read_tile(root / folder.rows[name, i]["file"])], [name])
            for name in classes
            for i in range(SHEET_TILES)
        ]
        self._sheet.append((f"{series(row)}, scale {row['scale']:g}", cards))

    def write(self, facts: dict[str, Any]) -> Row:
        """Write sweep.csv, sweep.md, sweep.json, sweep.png and tiles.png; return the best row.

        Args:
            facts: For sweep.json.
        """
        out, net, agreed = self.out, self.judge_net, agreement(self.real).mean().item()
        facts = {
            "models": self.models.files,
            **facts,
            "judge": {"name": net.name, "identity": net.identity, "agreement": agreed},
            "real": {"folder": str(self.real_root), "tiles": len(self.real.labels)},
        }
        write_bytes(out / "tiles.png", card_sheet([], self._sheet, SHEET_SIDE, 1))
        write_sweep(out, self.rows, agreed, facts)
        return best(self.rows)


def series(row: Row) -> str:
    """Everything of a setting but the scale, in words."""
    name = f"{row['sampler']}, {row['steps']} steps"
    return name if row["interval"] == "all" else f"{name}, t in {row['interval']}"


def best(rows: Sequence[Row]) -> Row:
    """The setting to use.

    Of the settings whose `class_kernel_distance` is within one error of the lowest, the one that
    the judge agrees with most: as close to tissue of the right class as any, and clearest in class.
    """
    lowest = min(rows, key=lambda row: row["class_kernel_distance"])
    limit = lowest["class_kernel_distance"] + lowest["class_kernel_distance_error"]
    close = [row for row in rows if row["class_kernel_distance"] <= limit]
    return max(close, key=lambda row: row["agreement"])


def write_sweep(
    out: Path, rows: Sequence[Row], real_agreement: float, facts: Mapping[str, Any]
) -> None:
    """Write sweep.csv (numbers with six digits), sweep.md, sweep.png and sweep.json.

    Args:
        facts: What else sweep.json is to say of how the scores were made.
    """
    short = [{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows]
    write_csv(out / "sweep.csv", short, list(rows[0]))
    write_text(out / "sweep.md", markdown(rows, real_agreement))
    write_bytes(out / "sweep.png", draw(rows, real_agreement))
    content = {"best": best(rows), "settings": list(rows), **provenance()}
    write_json(out / "sweep.json", {**facts, **content, "hardware": hardware()})


def markdown(rows: Sequence[Row], real_agreement: float) -> str:
    """The table for people, the best setting in bold, real tiles in the last line."""
    heads = ["scale", "sampler", "steps", "guided t", "agreement", "class KID x 1000", "KID x 1000"]
    heads += ["precision", "recall", "diversity", "guidance / noise", "images/s"]
    chosen = best(rows)
    lines = []
    for row in rows:
        distance, error = row["class_kernel_distance"], row["class_kernel_distance_error"]
        ratio = row["guidance_to_noise"]
        lines.append([
            f"{row['scale']:g}", row["sampler"], str(row["steps"]), row["interval"],
            f"{row['agreement']:.3f} ± {row['agreement_error']:.3f}",
            f"{1000 * distance:.1f} ± {1000 * error:.1f}", f"{1000 * row['kernel_distance']:.1f}",
            *(f"{row[name]:.2f}" for name in ("precision", "recall", "diversity")),
            "" if ratio is None else f"{ratio:.3f}", f"{row['images_per_s']:.2f}",
        ])  # fmt: skip
    lines.append(["real tiles", "", "", "", f"{real_agreement:.3f}", *[""] * 7])
    kinds = ["best" if row is chosen else "" for row in rows] + [""]
    return to_markdown(TextTable("", heads, lines, kinds=kinds)) + "\n"


PANELS = (
    ("agreement", "judge agrees with the class"),
    ("class_kernel_distance", "KID to real tiles of the class"),
    ("recall", "recall (precision dashed)"),
    ("diversity", "diversity within a class"),
)


def draw(rows: Sequence[Row], real_agreement: float) -> bytes:
    """PNG of the scores over the guidance scale, a line per sampler, steps and interval."""
    figure = plots.new_figure(12.0, 3.6)
    panels = figure.subplots(1, len(PANELS))
    names = dict.fromkeys(map(series, rows))
    colours = [f"C{i}" for i in range(len(names))]
    scales = sorted({row["scale"] for row in rows})
    for axes, (name, title) in zip(panels, PANELS, strict=True):
        plots.draw_series(axes, [_line(rows, label, name) for label in names], colours)
        if name == "recall":
            for label, colour in zip(names, colours, strict=True):
                dashed = _line(rows, label, "precision")
                axes.plot(dashed.x, dashed.y, color=colour, ls="--", marker="o", ms=3)
        if name == "agreement":
            axes.axhline(real_agreement, color="0.5", lw=1, ls=":")
            axes.annotate("real tiles", (0.02, real_agreement), xycoords=("axes fraction", "data"),
                          fontsize=8, color="0.4", va="bottom")  # fmt: skip
        _scale_axis(axes, scales)
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    if len(names) > 1:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center",
                      ncols=min(4, len(names)), frameon=False, fontsize=8)  # fmt: skip
    return plots.to_png(figure)


def _line(rows: Sequence[Row], label: str, score: str) -> plots.Series:
    """A score over the scale, for the settings that differ in nothing else."""
    line = sorted((r for r in rows if series(r) == label), key=lambda row: row["scale"])
    values = [row[score] for row in line]
    errors = [row.get(f"{score}_error", 0.0) for row in line]
    return plots.Series(label, [row["scale"] for row in line], values, errors)


def _scale_axis(axes, scales: Sequence[float]) -> None:
    # Scales are tried in multiples, and 0, which is unguided, among them.
    least = min((scale for scale in scales if scale > 0), default=1.0)
    axes.set_xscale("symlog", linthresh=least)
    axes.set_xlim(-0.5 * least, 1.5 * max(scales[-1], least))
    axes.set_xticks(scales, [f"{scale:g}" for scale in scales])
    axes.minorticks_off()
    axes.set_xlabel("guidance scale")
