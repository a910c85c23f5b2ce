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
    flagged = numbers["flagged"][ALL]
    lines = [
        "# Copy check",
        "",
        f"{flagged['flagged']} of {flagged['tiles']} synthetic tiles are flagged as possible copies"
        f" of training tiles; about {flagged['expected_by_chance']:.1f} are expected by chance"
        f" among new tiles (a share of {check.quantile:g}, estimated on {len(check.held_out)}"
        " held-out tiles). Look at `suspicious.png` before a tile is called a copy.",
        "",
    ]
    if check.variations is not None:
        lines += _variation_lines(numbers["variations"])
    if len(check.comparisons) == 1:
        lines += ["No network was given: tiles are compared in pixels only.", ""]
    rows = [
        [name.replace("_", "-"), str(row["compared"]), str(row["without_structure"])]
        for name, row in numbers["tiles"].items()
    ]
    lines += _table(["set", "tiles compared", "without structure (left out)"], rows)
    settings = {**numbers["method"], **settings}
    given = {name: value for name, value in settings.items() if value is not None}
    rows = [[name.replace("_", " "), str(value)] for name, value in given.items()]
    lines += _table(["setting", "value"], rows)
    for name, space in numbers["spaces"].items():
        lines += _space_section(name, space)
    return "\n".join(lines + NOTES)


def _variation_lines(numbers: dict[str, Any]) -> list[str]:
    missing = numbers["tiles"] - numbers["source_compared"]
    words = (
        f"{numbers['tiles']} of the tiles are variations: they started from a real tile, the"
        f" `source` in manifest.csv. For {numbers['source_is_nearest']} of them it is the nearest"
        f" training tile in pixels, and {numbers['flagged_for_their_source']} lie so near to it"
        " that they are flagged."
    )
    if numbers["distance"] is not None:
        least, median = (numbers["distance"][name] for name in ("least", "0.5"))
        words += f" Distance to the own source: least {least:.3f}, median {median:.3f}."
    if missing:
        words += (
            f" The sources of {missing} were not compared: they are not in the training folder,"
            " or are background."
        )
    return [words, ""]


def _space_section(name: str, space: dict[str, Any]) -> list[str]:
    held_out = space["held_out"]
    lines = [f"## In {name}", ""]
    rows = [
        [
            row_name,
            str(row["tiles"]),
            str(row["flagged"]),
            str(row["closer_than_any_held_out"]),
            f"{row['authenticity']:.1%}",
            "too few tiles" if row["c_t"] is None else f"{row['c_t']:.2f}",
            f"{row['c_t_cells']} ({row['c_t_cells_left_out']} left out)",
        ]
        for row_name, row in space["synthetic"].items()
    ]
    rows.append(["held-out tiles", "", "", "", f"{held_out['authenticity']:.1%}", "", ""])
    head = ["synthetic", "tiles", "flagged", "closer than any held-out", "authenticity", "C_T"]
    lines += _table([*head, "cells"], rows)
    lines += [f"Flagged below a relative distance of {space['threshold']:.3f}. Quantiles:", ""]
    synthetic = space["synthetic"][ALL]
    rows = [
        [f"{label}, {kind}", *(f"{value:.3f}" for value in side[kind].values())]
        for kind in ("distance", "relative")
        for label, side in (("synthetic", synthetic), ("held-out", held_out))
    ]
    return lines + _table(["to the training set", *held_out["distance"]], rows)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [tables.to_markdown(tables.TextTable("", head, rows)), ""]


NOTES = [
    "## How to read this",
    "",
    "- A distance is that of a synthetic (or held-out) tile, in the best of its 8 orientations, to"
    " its nearest training tile: sqrt(2 - 2 r) for a correlation r, so 0 is a copy and 1.41 is"
    " unrelated.",
    f"- The relative distance is divided by the distance to the {SCALE_NEIGHBOUR}th nearest"
    " training tile. A tile is flagged where it is smaller than that of (almost) all held-out"
    " tiles; the rate of false alarms is shared by the spaces.",
    "- Authenticity (Alaa et al. 2022): share of tiles that are farther from their nearest"
    " training tile than that one is from its nearest other. Compare with the held-out tiles'"
    " value.",
    "- C_T (Meehan et al. 2020): Mann-Whitney z of the distances, averaged over k-means cells of"
    " the training set. Far below 0: nearer to the training set than new real tiles are, copying;"
    " near 0: as new; far above 0: unlike the training set. Blurred tiles are nearer in pixels"
    " than sharp ones without being copies.",
    "- Pixels show copies under flips, quarter turns, compression, slight blur and other stain."
    " Copies that are shifted, zoomed or in part are seen in features at best. A copy of a tile"
    f" of which the training set holds {SCALE_NEIGHBOUR} slightly differing versions is not seen.",
    "- Tiles without structure (background) look alike everywhere and are left out.",
    "",
]
