"""Scores of guided samples by setting: does guidance reach the class, and at what price?

Letters: N images, D features, K classes. A judge, a classifier of images that took no part in the
guidance, says which class a synthetic tile looks like; held-out real tiles say how far the tiles of
each class are from tissue.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
from ldm.features.sets import cached_features
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


@dataclass(frozen=True)
class JudgedTiles:
    """A labelled set of tiles as the judge sees it.

    Attributes:
        features: (N, D), rows of length 1.
        predicted: Classes that the judge gives, (N,) int64 in [0, K).
        labels: Classes that the tiles are meant to show, (N,) int64 in [0, K).
    """

    features: Tensor
    predicted: Tensor
    labels: Tensor

    def of_class(self, k: int) -> Tensor:
        """Features of class k."""
        return self.features[self.labels == k]

    def agreement(self, num_classes: int) -> Tensor:
        """Share of the tiles of each class that the judge gives that class, (K,)."""
        hits = (self.predicted == self.labels).double()
        return torch.stack([hits[self.labels == k].mean() for k in range(num_classes)])


def judge(root: Path, extractor: Extractor, cache: Path, classes: Sequence[str]) -> JudgedTiles:
    """Features (kept in `cache`) and predicted classes of the tiles below root/CLASS/."""
    found = cached_features(TileFiles.below(root, True, classes), extractor, cache)
    assert found.logits is not None, "the judge classifies these classes"
    return JudgedTiles(found.values, found.logits.argmax(dim=1), found.labels)


@dataclass(frozen=True)
class Scores:
    """What a setting gives.

    Attributes:
        images: N.
        agreement: Share of tiles that the judge gives their class, mean over classes.
        agreement_error: Standard error of `agreement`.
        kernel_distance: KID to the real tiles of all classes together (Binkowski et al. 2018).
        class_kernel_distance: KID to the real tiles of the same class, mean over classes: low only
            where tiles are of the right class, look real and vary as real ones do.
        class_kernel_distance_error: Its deviation over random subsets, as the mean of K numbers.
        precision: Share of tiles within the real manifold (Kynkaanniemi et al. 2019).
        recall: Share of real tiles within the synthetic manifold.
        diversity: Mean distance of two tiles of a class, relative to that of real tiles; 1 is as
            varied as tissue, 0 is one tile again and again.
    """

    images: int
    agreement: float
    agreement_error: float
    kernel_distance: float
    class_kernel_distance: float
    class_kernel_distance_error: float
    precision: float
    recall: float
    diversity: float


def score(real: JudgedTiles, synthetic: JudgedTiles, num_classes: int, seed: int = 0) -> Scores:
    """Scores of synthetic tiles against held-out real ones.

    Args:
        num_classes: K; both sets have at least `FEWEST_TILES` tiles of each class.
        seed: Seed of the subsets that kernel distances are averaged over.
    """
    classes = range(num_classes)
    check_counts(real, "the real tiles", num_classes)
    check_counts(synthetic, "the synthetic tiles", num_classes)
    shares = synthetic.agreement(num_classes)  # (K,)
    counts = torch.bincount(synthetic.labels, minlength=num_classes)  # (K,)
    overall = fidelity(_scaled(real.features), _scaled(synthetic.features), seed)
    own = [
        fidelity(_scaled(real.of_class(k)), _scaled(synthetic.of_class(k)), seed) for k in classes
    ]
    spreads = [
        sum(pairwise_distance(tiles.of_class(k)) for k in classes) for tiles in (synthetic, real)
    ]
    deviations = [values["kernel_distance_std"] for values in own]
    return Scores(
        images=len(synthetic.labels),
        agreement=shares.mean().item(),
        agreement_error=(shares * (1 - shares) / counts).sum().sqrt().item() / num_classes,
        kernel_distance=overall["kernel_distance"],
        class_kernel_distance=sum(values["kernel_distance"] for values in own) / num_classes,
        class_kernel_distance_error=float(np.linalg.norm(deviations)) / num_classes,
        precision=overall["precision"],
        recall=overall["recall"],
        diversity=spreads[0] / spreads[1],
    )


def check_counts(tiles: JudgedTiles, what: str, num_classes: int) -> None:
    """UserError unless there are enough tiles of each class to compare distributions."""
    fewest = int(torch.bincount(tiles.labels, minlength=num_classes).min())
    if fewest < FEWEST_TILES:
        raise UserError(
            f"{what}: a class has {fewest} tiles, each needs {FEWEST_TILES} or more; add some"
        )


def _scaled(features: Tensor) -> Tensor:
    # KID's kernel is (x . y / D + 1)^3: with rows of length sqrt(D) it sees their cosine.
    return features.double() * features.shape[1] ** 0.5


def pairwise_distance(features: Tensor) -> float:
    """Mean of 1 - cosine over all pairs of different rows of length 1, (N, D), N at least 2."""
    # The sum over all pairs is |sum of rows|^2, of which N pairs are rows with themselves.
    n = len(features)
    cosine = (features.double().sum(0).square().sum() - n) / (n * (n - 1))
    return 1 - cosine.item()


@dataclass(frozen=True)
class Row:
    """A setting with its scores.

    Attributes:
        guidance: "classifier" or "cfg", what `scale` multiplies.
        interval: Guided time steps, as "LOW:HIGH" or "all".
        probability: Mean p(y) of the guiding classifier at the end; None without one.
        guidance_to_noise: Largest mean |guidance| / |eps| over the steps; None without guidance.
        folder: Folder of its tiles.
    """

    guidance: str
    scale: float
    interval: str
    sampler: str
    steps: int
    eta: float
    scores: Scores
    probability: float | None
    guidance_to_noise: float | None
    images_per_s: float
    folder: str

    @property
    def series(self) -> str:
        """Everything but the scale, in words."""
        name = f"{self.sampler}, {self.steps} steps"
        return name if self.interval == "all" else f"{name}, t in {self.interval}"

    def cells(self) -> dict[str, Any]:
        """Column to value, the scores among them."""
        row = asdict(self)
        scores, folder = row.pop("scores"), row.pop("folder")
        return {**row, **scores, "folder": folder}


class Sweep:
    """Samples with one setting after another into OUT/tiles/SETTING, and scores them.

    What is there already is not made again.

    Args:
        judge_net: Classifier of the models' classes.
        real_root: Held-out real tiles, real_root/CLASS/.
        per_class: Images of each class.
        batch_size: Images sampled together.

    Attributes:
        rows: Scores of each setting.
    """

    def __init__(
        self,
        models: Models,
        devices: Devices,
        judge_net: Extractor,
        real_root: Path,
        out: Path,
        per_class: int,
        batch_size: int,
    ):
        self.models, self.devices, self.judge_net = models, devices, judge_net
        self.real_root, self.out = real_root, out
        self.per_class, self.batch_size = per_class, batch_size
        cache = out / "features" / "real.safetensors"
        self.real = judge(real_root, judge_net, cache, models.classes)
        check_counts(self.real, f"`real` {real_root}", len(models.classes))
        self.rows: list[Row] = []
        self._sheet: list[tuple[str, list[Card]]] = []  # a row for each setting

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
        rows = folder.rows.values()
        seconds = sum(row["seconds"] for row in rows)
        probabilities = [row["prob"] for row in rows if row["prob"] is not None]
        quantity = "guidance_to_noise" if by_classifier else "extrapolation_to_noise"
        ratios = [getattr(means, quantity) for means in folder.guidance_log]
        row = Row(
            guidance="classifier" if by_classifier else "cfg",
            scale=sampling.scale if by_classifier else sampling.cfg_scale,
            interval="all" if sampling.interval is None else "{}:{}".format(*sampling.interval),
            sampler=sampling.sampler,
            steps=sampling.steps,
            eta=sampling.eta,
            scores=score(self.real, synthetic, len(classes), sampling.seed),
            probability=sum(probabilities) / len(probabilities) if probabilities else None,
            guidance_to_noise=max((ratio for ratio in ratios if ratio is not None), default=None),
            images_per_s=len(rows) / seconds,
            folder=root.relative_to(out).as_posix(),
        )
        self.rows.append(row)
        cards = [
            Card([read_tile(root / folder.rows[name, i]["file"])], [name])
            for name in classes
            for i in range(SHEET_TILES)
        ]
        self._sheet.append((f"{row.series}, scale {row.scale:g}", cards))

    def write(self, facts: dict[str, Any]) -> Row:
        """Write sweep.csv, sweep.md, sweep.json, sweep.png and tiles.png; return the best row.

        Args:
            facts: For sweep.json.
        """
        out, net = self.out, self.judge_net
        agreement = self.real.agreement(len(self.models.classes)).mean().item()
        facts = {
            "models": self.models.files,
            **facts,
            "judge": {"name": net.name, "identity": net.identity, "agreement": agreement},
            "real": {"folder": str(self.real_root), "tiles": len(self.real.labels)},
        }
        write_bytes(out / "tiles.png", card_sheet([], self._sheet, SHEET_SIDE, 1))
        write_sweep(out, self.rows, agreement, facts)
        return best(self.rows)


def best(rows: Sequence[Row]) -> Row:
    """The setting to use.

    Of the settings whose `class_kernel_distance` is within one error of the lowest, the one that
    the judge agrees with most: as close to tissue of the right class as any, and clearest in class.
    """
    lowest = min(rows, key=lambda row: row.scores.class_kernel_distance).scores
    limit = lowest.class_kernel_distance + lowest.class_kernel_distance_error
    close = [row for row in rows if row.scores.class_kernel_distance <= limit]
    return max(close, key=lambda row: row.scores.agreement)


def write_sweep(
    out: Path, rows: Sequence[Row], real_agreement: float, facts: Mapping[str, Any]
) -> None:
    """Write sweep.csv (numbers with six digits), sweep.md, sweep.png and sweep.json.

    Args:
        facts: What else sweep.json is to say of how the scores were made.
    """
    cells = [row.cells() for row in rows]
    short = [
        {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in one.items()} for one in cells
    ]
    write_csv(out / "sweep.csv", short, list(cells[0]))
    write_text(out / "sweep.md", markdown(rows, real_agreement))
    write_bytes(out / "sweep.png", draw(rows, real_agreement))
    content = {"best": best(rows).cells(), "settings": cells, **provenance()}
    write_json(out / "sweep.json", {**facts, **content, "hardware": hardware()})


def markdown(rows: Sequence[Row], real_agreement: float) -> str:
    """The table for people, the best setting in bold, real tiles in the last line."""
    heads = ["scale", "sampler", "steps", "guided t", "agreement", "class KID x 1000", "KID x 1000"]
    heads += ["precision", "recall", "diversity", "guidance / noise", "images/s"]
    chosen = best(rows)
    lines = []
    for row in rows:
        s = row.scores
        error = 1000 * s.class_kernel_distance_error
        lines.append([
            f"{row.scale:g}", row.sampler, str(row.steps), row.interval,
            f"{s.agreement:.3f} ± {s.agreement_error:.3f}",
            f"{1000 * s.class_kernel_distance:.1f} ± {error:.1f}",
            f"{1000 * s.kernel_distance:.1f}",
            f"{s.precision:.2f}", f"{s.recall:.2f}", f"{s.diversity:.2f}",
            "" if row.guidance_to_noise is None else f"{row.guidance_to_noise:.3f}",
            f"{row.images_per_s:.2f}",
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
    names = dict.fromkeys(row.series for row in rows)
    colours = [f"C{i}" for i in range(len(names))]
    scales = sorted({row.scale for row in rows})
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
    line = sorted((row for row in rows if row.series == label), key=lambda row: row.scale)
    values = [getattr(row.scores, score) for row in line]
    errors = [getattr(row.scores, f"{score}_error", 0.0) for row in line]
    return plots.Series(label, [row.scale for row in line], values, errors)


def _scale_axis(axes, scales: Sequence[float]) -> None:
    # Scales are tried in multiples, and 0, which is unguided, among them.
    least = min((scale for scale in scales if scale > 0), default=1.0)
    axes.set_xscale("symlog", linthresh=least)
    axes.set_xlim(-0.5 * least, 1.5 * max(scales[-1], least))
    axes.set_xticks(scales, [f"{scale:g}" for scale in scales])
    axes.minorticks_off()
    axes.set_xlabel("guidance scale")
