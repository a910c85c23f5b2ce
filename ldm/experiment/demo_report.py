"""The report of the demo: that of an experiment, with the models behind its synthetic tiles.

Letters: K classes, H W pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas
import torch

from ldm.checkpoint import load_model
from ldm.data.images import read_tile
from ldm.data.tiles import TileFolder, to_uint8
from ldm.evaluation.baselines import colour_histogram_baseline
from ldm.experiment.demo import LABELLED, SELECTED, Demo
from ldm.experiment.numbers import read_json
from ldm.experiment.report import SIDE, write_results
from ldm.experiment.results import Row, Table
from ldm.report.grids import Tile, TileRow
from ldm.report.page import Page
from ldm.report.plots import Level, Series, bar_chart, line_chart
from ldm.report.tables import TextTable

SHOWN = {"real": 3, "unguided": 4, "guided": 6, "selected": 5}  # tiles per class
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

    def add_models(page: Page) -> None:
        """How the models behind the synthetic tiles train, decode and sample."""
        _training(page, demo)
        _reconstructions(page, demo)
        _classifier(page, demo, table.classes)
        _samples(page, demo)
        _selection(page, demo, table.classes)

    return write_results(shown, demo.out, add_models, ABOUT, caution)


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


def _training(page: Page, demo: Demo) -> None:
    page.heading("Training")
    charts = []
    for title, run, metric, validated in (
        ("Autoencoder: reconstruction error", demo.run("autoencoder"), "rec_loss", "rec_loss"),
        ("Diffusion: error of the predicted noise", demo.run("diffusion"), "loss_simple",
         "loss_simple_ema"),
        ("Classifier: accuracy, all noise levels", demo.run("classifier"), "accuracy", "accuracy"),
    ):  # fmt: skip
        logged = run.read_metrics()
        series = []
        for name, label in ((f"val/{validated}", "val"), (f"train/{metric}", "training batches")):
            rows = [row for row in logged if name in row]
            series.append(Series(label, [row["step"] for row in rows], [row[name] for row in rows]))
        charts.append(line_chart(title, series, "optimiser step"))
    page.charts(charts)


def _reconstructions(page: Page, demo: Demo) -> None:
    page.heading("Reconstructions")
    tiles = TileFolder(demo.data / "val", demo.size, labelled=True, check=False)
    chosen = [tiles.labels.index(label) for label in range(len(tiles.classes))]
    x = torch.stack([tiles[i]["image"] for i in chosen])  # (K, 3, H, W)
    rows = [("held-out tile", x)]
    runs = (("autoencoder", demo.run("autoencoder")), ("tuned decoder", demo.run("decoder")))
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


def _classifier(page: Page, demo: Demo, classes: Sequence[str]) -> None:
    page.heading("The classifier of noisy latents, and what it does")
    last = read_json(demo.run("classifier").root / "result.json")["last"]
    prefix = "val/accuracy_t"
    ranges = [name.removeprefix(prefix) for name in last if name.startswith(prefix)]
    ranges.sort(key=lambda name: int(name.split("-")[0]))
    accuracies = [last["val/accuracy_clean"], *(last[prefix + name] for name in ranges)]
    chance = 1 / len(classes)
    log = pandas.read_csv(demo.guided / "guidance.csv")
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
        ("without guidance", demo.unguided),
        (f"guidance scale {demo.scale:g}", demo.guided),
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


def _samples(page: Page, demo: Demo) -> None:
    page.heading("Guidance")
    sampling = demo.settings["sampling"]
    real = TileFolder(demo.data / LABELLED, demo.size, labelled=True, check=False)
    rows = []
    for label, name in enumerate(real.classes):
        first = [i for i, of in enumerate(real.labels) if of == label][: SHOWN["real"]]
        groups = [[Tile(to_uint8(real[i]["image"])) for i in first]]
        for kind, folder in (("unguided", demo.unguided), ("guided", demo.guided)):
            paths = sorted((folder / name).glob("*.png"))[: SHOWN[kind]]
            groups.append([Tile(read_tile(path)) for path in paths])
        rows.append(TileRow(name, groups))
    page.grid(
        rows,
        ["real", "without guidance", f"guided, scale {demo.scale:g}"],
        f"{sampling['steps']} DDIM steps, eta {sampling['eta']:g}. Tiles without guidance have no"
        " class: they stand in the row of the guided tiles that come from the same noise, in the"
        " same order, so the difference is what guidance did. Nothing was picked: these are the"
        " first ones.",
        SIDE,
    )


def _selection(page: Page, demo: Demo, classes: Sequence[str]) -> None:
    page.heading("Selection")
    folder = demo.data / demo.training_folder(SELECTED)
    found = pandas.read_csv(folder / "selection.csv", dtype={"class": str})
    grid = []
    for name in classes:
        of_class = found[found["class"] == name]
        accepted = of_class[of_class["decision"] == "accepted"].head(SHOWN["selected"])
        rejected = of_class[of_class["decision"] == "rejected"].tail(SHOWN["selected"])
        groups = [_chosen(accepted, "good", demo), _chosen(rejected, "bad", demo)]
        grid.append(TileRow(name, groups))
    page.grid(
        grid,
        ["accepted, the closest", "rejected, the farthest"],
        "Below each tile: a thousand times the mean squared distance to the centroid of its class;"
        " for rejected tiles also the class whose centroid is nearest.",
        SIDE,
    )
    counts = read_json(folder / "selection.json")["counts"]
    page.table(_counts_table(counts, classes))


def _chosen(rows: pandas.DataFrame, kind: str, demo: Demo) -> list[Tile]:
    tiles = []
    for row in rows.to_dict("records"):
        caption = f"{1000 * row['own_distance']:.2f}" + f"\n{row['nearest']}" * (kind == "bad")
        tiles.append(Tile(read_tile(demo.guided / row["file"]), caption, kind))
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
