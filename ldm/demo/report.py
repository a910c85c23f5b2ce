"""report.html and table.csv of the demo, from what its stages left behind."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ldm import __version__
from ldm.checkpoint import load_model
from ldm.data.images import list_images, read_tile
from ldm.data.tiles import TileFolder, to_uint8
from ldm.evaluation.baselines import colour_histogram_baseline
from ldm.evaluation.metrics import HEADLINE
from ldm.evaluation.report import Page, Series, Tile, bar_chart, line_chart
from ldm.experiment.demo import LABELLED, RANDOM, REAL, SELECTED, Demo
from ldm.experiment.jobs import Record
from ldm.experiment.numbers import mean_probability, read_csv, read_json
from ldm.files import write_text
from ldm.run import git_revision, hardware, versions

SIDE = 64  # pixels of a tile on the screen
DEVIATIONS = tuple(f"{name}_std" for name in HEADLINE)
COLUMNS = ("arm", "real", "synthetic", "split", "runs", *HEADLINE, *DEVIATIONS)
NAMES = {
    REAL: "real only",
    RANDOM: "real + random synthetic",
    SELECTED: "real + selected synthetic",
}


def write_report(plan: Demo, stages: Mapping[str, Record]) -> str:
    """Write OUT/report.html and OUT/table.csv; returns the headline of the table."""
    rows = table_rows(plan)
    page = Page("HistoDiffusion: the whole method in one run")
    _opening(page, plan, stages, rows)
    _table(page, plan, rows)
    _training(page, plan)
    _reconstructions(page, plan)
    _classifier(page, plan)
    _samples(page, plan)
    _selection(page, plan)
    _stages(page, stages)
    write_text(plan.out / "report.html", page.render())
    write_text(plan.out / "table.csv", to_csv(rows))
    real, selected = (next(r for r in rows if r["arm"] == NAMES[kind]) for kind in (REAL, SELECTED))
    return f"accuracy {real['accuracy']:.3f} real, {selected['accuracy']:.3f} with selected"


# The table


def table_rows(plan: Demo) -> list[dict[str, Any]]:
    """A row per arm, and one of what colour alone is worth."""
    counts = {kind: plan.selection(kind)["counts"] for kind in (RANDOM, SELECTED)}
    split = plan.summary(REAL)["split"]
    baseline = colour_histogram_baseline(plan.data / LABELLED, plan.data / split)
    labelled = plan.summary(REAL)["n_train"]
    rows = [
        {
            "arm": "colour histogram, real only",
            "real": labelled,
            "synthetic": 0,
            "split": split,
            "runs": 1,
            **{name: baseline[name] for name in HEADLINE},
            **dict.fromkeys(DEVIATIONS),
        }
    ]
    for kind, name in NAMES.items():
        summary = plan.summary(kind)
        rows.append(
            {
                "arm": name,
                "real": labelled,
                "synthetic": sum(row["accepted"] for row in counts.get(kind, {}).values()),
                "split": summary["split"],
                "runs": len(summary["seeds"]),
                **{metric: summary["mean"][metric] for metric in HEADLINE},
                **{f"{metric}_std": summary["std"][metric] for metric in HEADLINE},
            }
        )
    return rows


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table with unrounded fractions; an unknown deviation is an empty cell."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _table(page: Page, plan: Demo, rows: Sequence[Mapping[str, Any]]) -> None:
    summary = plan.summary(REAL)
    split, images = summary["split"], summary[f"n_{summary['split']}"]

    def shown(row: Mapping[str, Any], name: str) -> str:
        value, deviation = row[name], row[f"{name}_std"]
        if value is None:
            return "undefined"
        return f"{value:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")

    page.heading("What the synthetic tiles are worth here")
    page.table(
        ["trained on", "real", "synthetic", *(name.replace("_", " ") for name in HEADLINE)],
        [
            [r["arm"], r["real"], r["synthetic"], *(shown(r, name) for name in HEADLINE)]
            for r in rows
        ],
        numbers=range(1, 3 + len(HEADLINE)),
    )
    error = max(math.sqrt(r["accuracy"] * (1 - r["accuracy"]) / images) for r in rows)
    steps, seeds = plan.settings["evaluation"]["steps"], len(summary["seeds"])
    runs = "1 seed" if seeds == 1 else f"{seeds} seeds"
    page.text(
        f"On {images} tiles of {split} (real here means: not made by the diffusion model); the"
        f" epoch was chosen on val. Every network was trained for about {steps} steps, whatever its"
        f" number of tiles. ± is the deviation over {runs}; it leaves out that {images} tiles are"
        " few: they alone give an accuracy a standard error of up to"
        f" {error:.3f}, and smaller differences between rows mean nothing. The colour histogram"
        " knows no shapes: a network that does not beat it has learned stains at best.",
        soft=True,
    )


# Sections


def _opening(
    page: Page, plan: Demo, stages: Mapping[str, Record], rows: Sequence[Mapping[str, Any]]
) -> None:
    minutes = sum(stage.seconds for stage in stages.values()) / 60
    machine = hardware()
    processor = machine["gpus"][0] if machine["gpus"] else machine["processor"]
    labelled, classes = rows[1]["real"], _classes(plan)
    page.text(
        "An autoencoder and a latent diffusion model learn from unlabelled tiles. A classifier of"
        " noisy latents and the decoder learn from a few labels. Guided by that classifier, the"
        " diffusion model makes tiles of each class; those close to their class are kept, and a ViT"
        " is trained with and without them."
    )
    page.warning(
        f"All numbers and pictures are those of this one run. Its {minutes:.1f} minutes of"
        " computing show that the pieces fit together; they are far too few to say what the method"
        " is worth."
        + ("" if plan.source else " The tiles are drawn by a program and are no medical images.")
    )
    where = str(plan.source) if plan.source else "procedural H&E-like tiles"
    page.facts(
        [
            (f"{minutes:.1f} min", "computing, all stages together"),
            (processor, f"{machine['cores']} processor cores"),
            (f"{len(classes)} classes", f"{where}, {plan.size} px"),
            (f"{labelled} labels", f"and {_unlabelled(plan)} tiles without"),
        ]
    )


def _training(page: Page, plan: Demo) -> None:
    page.heading("Training")
    charts = []
    for title, run, name in (
        ("Autoencoder: reconstruction error", plan.autoencoder, "train/rec_loss"),
        ("Diffusion: error of the predicted noise", plan.diffusion, "train/loss_simple"),
        ("Classifier: accuracy, all noise levels", plan.classifier, "train/accuracy"),
    ):
        rows = [row for row in run.read_metrics() if name in row]
        series = Series(name, [row["step"] for row in rows], [row[name] for row in rows])
        charts.append(line_chart(title, [series], "optimiser step, training batches"))
    page.charts(charts)


def _reconstructions(page: Page, plan: Demo) -> None:
    page.heading("Reconstructions")
    tiles = TileFolder(plan.data / "val", plan.size, labelled=True, check=False)
    chosen = [tiles.labels.index(label) for label in range(len(tiles.classes))]
    x = torch.stack([tiles[i]["image"] for i in chosen])  # (K, 3, H, W)
    rows = [("held-out tile", x)]
    for name, run in (("autoencoder", plan.autoencoder), ("tuned decoder", plan.decoder)):
        net = load_model(run.last, "autoencoder").net
        with torch.no_grad():
            rows.append((name, net(x, sample=False)[0]))
    page.grid(
        [(name, [[Tile(pixels)] for pixels in to_uint8(images)]) for name, images in rows],
        tiles.classes,
        "One tile per class, none of them seen in training. The decoder of the last row was tuned"
        " so that an auxiliary classifier can tell the classes of what it decodes.",
        SIDE,
        gap=2,
    )


def _classifier(page: Page, plan: Demo) -> None:
    page.heading("The classifier of noisy latents, and what it does")
    last = read_json(plan.classifier.root / "result.json")["last"]
    quarters = {
        name.removeprefix("val/accuracy_t"): value
        for name, value in last.items()
        if name.startswith("val/accuracy_t")
    }
    names = sorted(quarters, key=lambda name: int(name.split("-")[0]))
    classes = _classes(plan)
    guidance = read_csv(plan.guided / "guidance.csv")
    t = [float(row["t"]) for row in guidance]

    def column(name: str) -> list[float]:
        return [float(row[name]) for row in guidance]

    page.charts(
        [
            bar_chart(
                "Accuracy on val by time step t",
                ["clean", *(f"t {name}" for name in names)],
                [last["val/accuracy_clean"], *(quarters[name] for name in names)],
                level=1 / len(classes),
                level_name=f"chance {1 / len(classes):.2f}",
            ),
            line_chart(
                "Probability of the wanted class while sampling",
                [Series("p(y | z_t)", t, column("probability"))],
                "time step t",
                falling=True,
            ),
            line_chart(
                "Size of the guidance relative to the noise",
                [Series("ratio", t, column("guidance_to_noise"))],
                "time step t",
                falling=True,
            ),
        ]
    )
    scale = plan.settings["sampling"]["scale"]
    page.table(
        ["sampled", "probability of the wanted class", *classes],
        [
            [name, *(f"{mean_probability(folder, c):.2f}" for c in (None, *classes))]
            for name, folder in (
                ("without guidance", plan.unguided),
                (f"guidance scale {scale:g}", plan.guided),
            )
        ],
        numbers=range(1, 2 + len(classes)),
    )
    page.text(
        "The probability is that of the very classifier that guides, so it says that guidance"
        " works, not that the tiles are right: on that, the features below are a second opinion.",
        soft=True,
    )


def _samples(page: Page, plan: Demo) -> None:
    page.heading("Samples")
    sampling = plan.settings["sampling"]
    real = TileFolder(plan.data / LABELLED, plan.size, labelled=True, check=False)
    rows = []
    for label, name in enumerate(real.classes):
        first = [i for i, of in enumerate(real.labels) if of == label][:3]
        groups = [[Tile(to_uint8(real[i]["image"])) for i in first]]
        for folder, count in ((plan.unguided, 4), (plan.guided, 6)):
            paths = sorted((folder / name).glob("*.png"))[:count]
            groups.append([Tile(read_tile(path)) for path in paths])
        rows.append((name, groups))
    page.grid(
        rows,
        ["real", "without guidance", f"guided, scale {sampling['scale']:g}"],
        f"{sampling['steps']} DDIM steps, eta {sampling['eta']:g}. Tiles without guidance have no"
        " class: they stand in the row of the guided tiles that come from the same noise, in the"
        " same order, so the difference is what guidance did. Nothing was picked: these are the"
        " first ones.",
        SIDE,
    )


def _selection(page: Page, plan: Demo) -> None:
    page.heading("Selection")
    page.picture(
        (plan.features / "umap.png").read_bytes(),
        "Features of the ViT that was trained on the real tiles, as a UMAP picture. Distances on"
        " the plane are only a hint; the selection is made in the space of the features.",
    )
    classes = _classes(plan)
    rows = read_csv(plan.data / plan.training_folder(SELECTED) / "selection.csv")
    grid = []
    for name in classes:
        of_class = [row for row in rows if row["class"] == name]
        accepted = [row for row in of_class if row["decision"] == "accepted"]
        rejected = [row for row in of_class if row["decision"] == "rejected"]

        def tiles(chosen: Sequence[Mapping[str, str]], kind: str) -> list[Tile]:
            result = []
            for row in chosen:
                caption = f"{1000 * float(row['own_distance']):.2f}"
                if kind == "bad":
                    caption += f"\n{row['nearest']}"
                result.append(Tile(read_tile(plan.guided / row["file"]), caption, kind))
            return result

        grid.append((name, [tiles(accepted[:5], "good"), tiles(rejected[-5:], "bad")]))
    page.grid(
        grid,
        ["accepted, the closest", "rejected, the farthest"],
        "Below each tile: a thousand times the mean squared distance to the centroid of its class;"
        " for rejected tiles also the class whose centroid is nearest.",
        SIDE,
    )
    counts = plan.selection(SELECTED)["counts"]
    columns = ("generated", "rejected", "surplus", "accepted", "wanted", "shortfall")
    page.table(
        ["class", *columns],
        [[name, *(counts[name][column] for column in columns)] for name in classes],
        numbers=range(1, 1 + len(columns)),
    )
    page.text(
        f"Wanted are {plan.ratio}% of the labelled tiles of each class. A shortfall is not filled"
        " with rejected tiles. The control arm draws what is wanted from all generated tiles.",
        soft=True,
    )


def _stages(page: Page, stages: Mapping[str, Record]) -> None:
    page.heading("What ran")
    total = sum(stage.seconds for stage in stages.values())
    page.table(
        ["stage", "seconds", "result"],
        [[s.title, f"{s.seconds:.0f}", s.number] for s in stages.values()]
        + [["together", f"{total:.0f}", ""]],
        numbers=(1,),
    )
    page.commands(
        "The commands, to be typed in the repository", (s.command for s in stages.values())
    )
    machine = hardware()
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    page.text(
        f"{machine['processor']}, {machine['cores']} cores, {gpus}. HistoDiffusion {__version__},"
        f" revision {git_revision() or 'unknown'}; {packages}.",
        soft=True,
    )


def _classes(plan: Demo) -> list[str]:
    return list(plan.selection(SELECTED)["counts"])


def _unlabelled(plan: Demo) -> int:
    return len(list_images(plan.data / "train"))
