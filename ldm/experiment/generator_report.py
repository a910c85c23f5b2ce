"""Sections of a report on the models behind synthetic tiles: how they train, decode and sample.

Letters: K classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.report.grids import Tile, TileRow
from ldm.report.page import Page
from ldm.report.plots import Level, Series, bar_chart, line_chart
from ldm.report.tables import TextTable

if TYPE_CHECKING:
    import pandas

    from ldm.run import RunFolder

SIDE = 64  # pixels of a tile on the screen
SHOWN = {"real": 3, "unguided": 4, "guided": 6, "selected": 5}  # tiles per class


@dataclass(frozen=True)
class Generator:
    """What made the synthetic tiles of one experiment.

    Attributes:
        autoencoder, decoder, diffusion, classifier: Runs of its models.
        guided, unguided: Folders of sampled tiles, from the same noise.
        selection: Training folder with the selected tiles among `guided`.
        labelled, held_out: Folders of real tiles, DIR/CLASS/images.
        size: Pixels of a tile.
        scale: Of the guidance.
        sampler: In words, for example "20 DDIM steps, eta 1".
    """

    autoencoder: RunFolder
    decoder: RunFolder
    diffusion: RunFolder
    classifier: RunFolder
    guided: Path
    unguided: Path
    selection: Path
    labelled: Path
    held_out: Path
    size: int
    scale: float
    sampler: str


def add_generator(page: Page, generator: Generator, classes: Sequence[str]) -> None:
    """Add the sections on a generator to a page."""
    _training(page, generator)
    _reconstructions(page, generator)
    _classifier(page, generator, classes)
    _samples(page, generator)
    _selection(page, generator, classes)


def _training(page: Page, generator: Generator) -> None:
    page.heading("Training")
    charts = []
    for title, run, metric, validated in (
        ("Autoencoder: reconstruction error", generator.autoencoder, "rec_loss", "rec_loss"),
        ("Diffusion: error of the predicted noise", generator.diffusion, "loss_simple",
         "loss_simple_ema"),
        ("Classifier: accuracy, all noise levels", generator.classifier, "accuracy", "accuracy"),
    ):  # fmt: skip
        logged = run.read_metrics()
        series = []
        for name, label in ((f"val/{validated}", "val"), (f"train/{metric}", "training batches")):
            rows = [row for row in logged if name in row]
            series.append(Series(label, [row["step"] for row in rows], [row[name] for row in rows]))
        charts.append(line_chart(title, series, "optimiser step"))
    page.charts(charts)


def _reconstructions(page: Page, generator: Generator) -> None:
    import torch

    from ldm.checkpoint import load_model
    from ldm.data.tiles import TileFolder, to_uint8

    page.heading("Reconstructions")
    tiles = TileFolder(generator.held_out, generator.size, labelled=True, check=False)
    chosen = [tiles.labels.index(label) for label in range(len(tiles.classes))]
    x = torch.stack([tiles[i]["image"] for i in chosen])  # (K, 3, H, W)
    rows = [("held-out tile", x)]
    runs = (("autoencoder", generator.autoencoder), ("tuned decoder", generator.decoder))
    for name, run in runs:
        net = load_model(run.last, "autoencoder").net
        with torch.no_grad():
            rows.append((name, net(x, sample=False)[0]))
    page.grid(
        [TileRow(name, [[Tile(pixels)] for pixels in to_uint8(images)]) for name, images in rows],
        tiles.classes,
        "One tile per class, none of them seen in training. The decoder of the last row was tuned"
        " so that an auxiliary classifier can tell the classes of what it decodes.",
        SIDE,
    )


def _classifier(page: Page, generator: Generator, classes: Sequence[str]) -> None:
    import json

    import pandas

    page.heading("The classifier of noisy latents, and what it does")
    last = json.loads((generator.classifier.root / "result.json").read_text())["last"]
    prefix = "val/accuracy_t"
    ranges = [name.removeprefix(prefix) for name in last if name.startswith(prefix)]
    ranges.sort(key=lambda name: int(name.split("-")[0]))
    accuracies = [last["val/accuracy_clean"], *(last[prefix + name] for name in ranges)]
    chance = 1 / len(classes)
    log = pandas.read_csv(generator.guided / "guidance.csv")
    page.charts(
        [
            bar_chart(
                "Accuracy on val by time step t",
                ["clean", *(f"t {name}" for name in ranges)],
                accuracies,
                Level(f"chance {chance:.2f}", chance),
            ),
            *(
                line_chart(title, [Series("", log["t"], log[column])], "time step t", falling=True)
                for title, column in (
                    ("Probability of the wanted class while sampling", "probability"),
                    ("Size of the guidance relative to the noise", "guidance_to_noise"),
                )
            ),
        ]
    )
    rows = []
    for name, folder in (
        ("without guidance", generator.unguided),
        (f"guidance scale {generator.scale:g}", generator.guided),
    ):
        manifest = pandas.read_csv(folder / "manifest.csv", dtype={"class": str})
        of_class = manifest.groupby("class")["prob"].mean()
        values = [manifest["prob"].mean(), *(of_class[c] for c in classes)]
        rows.append([name, *(f"{value:.2f}" for value in values)])
    caption = [
        "The probability is that of the very classifier that guides, so it says that guidance"
        " works, not that the tiles are right: on that, the features below are a second opinion."
    ]
    heads = ["sampled", "probability of the wanted class", *classes]
    page.table(TextTable("", heads, rows, caption, set(range(1, len(heads)))))


def _samples(page: Page, generator: Generator) -> None:
    from ldm.data.images import read_tile
    from ldm.data.tiles import TileFolder, to_uint8

    page.heading("Guidance")
    real = TileFolder(generator.labelled, generator.size, labelled=True, check=False)
    rows = []
    for label, name in enumerate(real.classes):
        first = [i for i, of in enumerate(real.labels) if of == label][: SHOWN["real"]]
        groups = [[Tile(to_uint8(real[i]["image"])) for i in first]]
        for kind, folder in (("unguided", generator.unguided), ("guided", generator.guided)):
            paths = sorted((folder / name).glob("*.png"))[: SHOWN[kind]]
            groups.append([Tile(read_tile(path)) for path in paths])
        rows.append(TileRow(name, groups))
    page.grid(
        rows,
        ["real", "without guidance", f"guided, scale {generator.scale:g}"],
        f"{generator.sampler}. Tiles without guidance have no class: they stand in the row of the"
        " guided tiles that come from the same noise, in the same order, so the difference is what"
        " guidance did. Nothing was picked: these are the first ones.",
        SIDE,
    )


def _selection(page: Page, generator: Generator, classes: Sequence[str]) -> None:
    import json

    import pandas

    page.heading("Selection")
    found = pandas.read_csv(generator.selection / "selection.csv", dtype={"class": str})
    grid = []
    for name in classes:
        of_class = found[found["class"] == name]
        accepted = of_class[of_class["decision"] == "accepted"].head(SHOWN["selected"])
        rejected = of_class[of_class["decision"] == "rejected"].tail(SHOWN["selected"])
        groups = [_chosen(accepted, "good", generator), _chosen(rejected, "bad", generator)]
        grid.append(TileRow(name, groups))
    page.grid(
        grid,
        ["accepted, the closest", "rejected, the farthest"],
        "Below each tile: a thousand times the mean squared distance to the centroid of its class;"
        " for rejected tiles also the class whose centroid is nearest.",
        SIDE,
    )
    counts = json.loads((generator.selection / "selection.json").read_text())["counts"]
    page.table(_counts_table(counts, classes))


def _chosen(rows: pandas.DataFrame, kind: str, generator: Generator) -> list[Tile]:
    from ldm.data.images import read_tile

    tiles = []
    for row in rows.to_dict("records"):
        caption = f"{1000 * row['own_distance']:.2f}" + f"\n{row['nearest']}" * (kind == "bad")
        tiles.append(Tile(read_tile(generator.guided / row["file"]), caption, kind))
    return tiles


def _counts_table(counts: Mapping[str, Mapping], classes: Sequence[str]) -> TextTable:
    columns = ["generated", "rejected", "surplus", "accepted", "wanted", "shortfall"]
    rows = [[name, *(str(counts[name][column]) for column in columns)] for name in classes]
    caption = [
        "A shortfall is not filled with rejected tiles. The control arm draws what is wanted from"
        " all generated tiles."
    ]
    empty = [name for name in classes if not counts[name]["accepted"]]
    if empty:
        caption.append(
            f"No tile of {', '.join(empty)} was accepted: there the classifier learns from real"
            " tiles alone, and the classes are no longer balanced."
        )
    return TextTable("", ["class", *columns], rows, caption, set(range(1, 1 + len(columns))))
