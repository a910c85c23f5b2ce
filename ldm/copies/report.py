"""What a copy check found, as a table, as numbers and in words."""

from pathlib import Path
from typing import Any

import numpy as np

from ldm.copies.check import SCALE_NEIGHBOUR, Comparison, CopyCheck
from ldm.copies.pictures import histogram, sheet
from ldm.copies.statistics import FEWEST_IN_CELL
from ldm.data.tile_files import TileFiles
from ldm.features import pixels
from ldm.files import write_bytes, write_csv, write_json, write_text
from ldm.report import tables
from ldm.run import provenance

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75)
ALL = "all"  # name of the row over all classes


def write_report(check: CopyCheck, out: Path, settings: dict[str, Any], pairs: int) -> None:
    """Write copies.csv, report.json, report.md, suspicious.png and histogram.png.

    Args:
        settings: Of the command.
        pairs: In suspicious.png.
    """
    numbers = summary(check)
    # The most suspicious first; ties by name.
    order = np.lexsort((np.array(check.synthetic.names), check.suspicion))
    rows = rows_of(check, order)
    write_csv(out / "copies.csv", rows, list(rows[0]))
    write_bytes(out / "suspicious.png", sheet(check, order[:pairs]))
    write_bytes(out / "histogram.png", histogram(check))
    write_json(out / "report.json", {**numbers, "settings": settings, **provenance()})
    write_text(out / "report.md", to_markdown(check, numbers, settings))


def rows_of(check: CopyCheck, order: np.ndarray) -> list[dict[str, Any]]:
    """A row per synthetic tile in this order, those without structure last."""
    rows: list[dict[str, Any]] = []
    percentiles = [percentile(c) for c in check.comparisons]
    flagged, suspicion, labels = check.flagged, check.suspicion, _labels(check.synthetic)
    for i in order:
        row = {
            "class": labels[i],
            "file": check.synthetic.names[i],
            "structure": "yes",
            "flagged": "yes" if flagged[i] else "no",
            "reason": check.reason(i),
            "suspicion": f"{suspicion[i]:.4f}",
        }
        for comparison, share in zip(check.comparisons, percentiles, strict=True):
            side, name = comparison.synthetic, comparison.name
            row |= {
                f"{name}_train": check.train.names[side.neighbours.index[i]],
                f"{name}_orientation": pixels.ORIENTATIONS[side.neighbours.orientation[i]],
                f"{name}_distance": f"{side.distance[i]:.5f}",
                f"{name}_relative": f"{side.relative[i]:.5f}",
                f"{name}_percentile": f"{share[i]:.2f}",
            }
        if check.variations is not None:
            distance = check.variations.distance[i]
            row["source"] = check.variations.sources[i]
            row["source_distance"] = "" if np.isnan(distance) else f"{distance:.5f}"
        rows.append(row)
    background = check.without_structure["synthetic"]
    row = {"structure": "no", "flagged": "no", "reason": "background: not compared"}
    for label, name in zip(_labels(background), background.names, strict=True):
        rows.append({"class": label, "file": name, **row})
    return rows


def _labels(tiles: TileFiles) -> list[str]:
    """Class name of each tile; empty texts for a set without classes."""
    return tiles.class_names or [""] * len(tiles)


def percentile(comparison: Comparison) -> np.ndarray:
    """Percentage of held-out tiles whose relative distance is at most a synthetic tile's, (M,)."""
    reference = np.sort(comparison.held_out.relative)
    at_most = np.searchsorted(reference, comparison.synthetic.relative, side="right")
    return 100 * at_most / len(reference)


def summary(check: CopyCheck) -> dict[str, Any]:
    """All numbers, as they go into report.json."""
    labels = np.array(_labels(check.synthetic))
    classes = [name for name in np.unique(labels).tolist() if name]
    members = {ALL: np.ones(len(labels), bool)} | {name: labels == name for name in classes}
    flagged = check.flagged
    return {
        "tiles": {
            name: {
                "folder": str(tiles.root),
                "compared": len(tiles),
                "without_structure": len(check.without_structure[name]),
            }
            for name, tiles in vars(check).items()
            if name in ("synthetic", "held_out", "train")
        },
        "method": {
            "pixels": f"optical density, {pixels.SIDE} px, channels standardised",
            "least_contrast": pixels.LEAST_CONTRAST,
            "orientations": len(pixels.ORIENTATIONS),
            "scale_neighbour": SCALE_NEIGHBOUR,
            "fewest_tiles_in_a_cell": FEWEST_IN_CELL,
        },
        "flagged": {
            name: {
                "tiles": int(rows.sum()),
                "flagged": int(flagged[rows].sum()),
                "expected_by_chance": check.quantile * int(rows.sum()),
            }
            for name, rows in members.items()
        },
        "spaces": {c.name: _numbers(c, members) for c in check.comparisons},
        **({} if check.variations is None else {"variations": _variation_numbers(check)}),
    }


def _variation_numbers(check: CopyCheck) -> dict[str, Any]:
    """How near the synthetic tiles are to those that they started from, in pixels."""
    found, pixel_space = check.variations, check.comparisons[0]
    neighbours = pixel_space.synthetic.neighbours
    known = found.index.numpy() >= 0
    distance = found.distance[known]
    limit = pixel_space.threshold * neighbours.scale.numpy()[known]
    return {
        "tiles": sum(map(bool, found.sources)),
        "source_compared": int(known.sum()),
        "source_is_nearest": int((neighbours.index == found.index).sum()),
        "flagged_for_their_source": int((distance < limit).sum()),
        "distance": _quantiles(distance) if len(distance) else None,
    }


def _numbers(comparison: Comparison, members: dict[str, np.ndarray]) -> dict[str, Any]:
    synthetic, held_out = comparison.synthetic, comparison.held_out
    closer = synthetic.relative < held_out.relative.min()
    result: dict[str, Any] = {
        "threshold": comparison.threshold,
        "held_out": {
            "authenticity": held_out.authenticity(),
            "distance": _quantiles(held_out.distance),
            "relative": _quantiles(held_out.relative),
        },
        "synthetic": {},
    }
    for name, rows in members.items():
        test = comparison.copying(rows)
        result["synthetic"][name] = {
            "tiles": int(rows.sum()),
            "flagged": int((comparison.suspicion[rows] < 1).sum()),
            "closer_than_any_held_out": int(closer[rows].sum()),
            "authenticity": synthetic.authenticity(rows),
            "c_t": test.c_t,
            "c_t_cells": test.cells,
            "c_t_cells_left_out": test.left_out,
            "c_t_share_of_held_out": test.weight,
            "distance": _quantiles(synthetic.distance[rows]),
            "relative": _quantiles(synthetic.relative[rows]),
        }
    return result


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return {
        "least": float(values.min()),
        **{f"{q:g}": float(np.quantile(values, q)) for q in QUANTILES},
    }


def to_markdown(check: CopyCheck, numbers: dict[str, Any], settings: dict[str, Any]) -> str:
    """The report in words and tables, for a supplement; `numbers` are those of `summary`."""

    def table(head: list[str], rows: list[list[Any]]) -> str:
        cells = [[str(cell) for cell in row] for row in rows]
        return tables.to_markdown(tables.TextTable("", head, cells))

    said = {**numbers["method"], **settings}
    content = {
        "flagged": numbers["flagged"][ALL],
        "variations": numbers.get("variations"),
        "quantile": check.quantile,
        "held_out": len(check.held_out),
        "scale_neighbour": SCALE_NEIGHBOUR,
        "table": table,
        "tiles": [
            [name.replace("_", "-"), row["compared"], row["without_structure"]]
            for name, row in numbers["tiles"].items()
        ],
        "settings": [[k.replace("_", " "), v] for k, v in said.items() if v is not None],
        "spaces": [_space(name, space) for name, space in numbers["spaces"].items()],
    }
    return tables.environment().get_template("copies.md").render(content)


def _space(name: str, space: dict[str, Any]) -> tuple[Any, ...]:
    """Name, threshold, rows of counts, rows of quantiles and names of the quantiles."""
    held_out, synthetic = space["held_out"], space["synthetic"][ALL]
    counts = [
        [
            *(label, row["tiles"], row["flagged"], row["closer_than_any_held_out"]),
            f"{row['authenticity']:.1%}",
            "too few tiles" if row["c_t"] is None else f"{row['c_t']:.2f}",
            f"{row['c_t_cells']} ({row['c_t_cells_left_out']} left out)",
        ]
        for label, row in space["synthetic"].items()
    ]
    counts.append(["held-out tiles", "", "", "", f"{held_out['authenticity']:.1%}", "", ""])
    quantiles = [
        [f"{label}, {kind}", *(f"{value:.3f}" for value in side[kind].values())]
        for kind in ("distance", "relative")
        for label, side in (("synthetic", synthetic), ("held-out", held_out))
    ]
    return name, space["threshold"], counts, quantiles, list(held_out["distance"])
