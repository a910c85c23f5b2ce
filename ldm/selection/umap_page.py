"""An interactive plane picture by bokeh: one HTML file that loads no other and needs no network.

Pointing at a dot shows its tile, class, kind and file; `#point=12` in the address shows point 12 as
soon as the page is open (points are numbered as the rows of umap.csv, from 0).
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas
import torch
from PIL import Image

from ldm.data.images import decode_tiles, read_tile
from ldm.features.sets import FeatureSet
from ldm.files import write_bytes, write_csv, write_text
from ldm.report.tables import environment
from ldm.selection.projection import (
    CENTROID,
    REAL,
    SYNTHETIC,
    Points,
    by_decision,
    class_colours,
    draw,
    place_names,
    project,
    table,
)
from ldm.selection.select import ACCEPTED, FILLED, REJECTED, REMOVED, SURPLUS

TITLE = "UMAP of features"
SIDE = 64  # pixels of a thumbnail
QUALITY = 80
MARKERS = {  # of bokeh, and the same as a letter
    "real": ("circle", "●"),
    "synthetic": ("diamond", "◆"),
    ACCEPTED: ("square", "■"),
    FILLED: ("triangle", "▲"),
    SURPLUS: ("circle_x", "⊗"),
    REJECTED: ("x", "×"),
    REMOVED: ("cross", "+"),
    CENTROID: ("star", "★"),
}
TOOLTIP = """
<div style="max-width: 260px; overflow-wrap: anywhere">
<img src="@point{custom}" alt="" width="128" style="display: block">
<div>@label, @kind</div><div>@file</div><div>point @point</div></div>"""
PICTURE = 'return window.points[value].picture || "data:,"'
# Bokeh keeps the visibility of a glyph on its renderer; there is one for each kind and class.
TOGGLE = """
for (const [name, renderer] of Object.entries(renderers)) {
  const [kind, label] = name.split(" ").map(Number);
  renderer.visible = kinds.active.includes(kind) && classes.active.includes(label);
}"""


def choose_evenly(groups: Sequence[Points], most: int) -> list[int]:
    """Numbers of the points that get a thumbnail: at most `most`, evenly by kind and class.

    Every kind and class gets the same number as far as it has so many points, spread over its own.
    """
    pools: list[list[int]] = []
    start = 0
    for group in groups:
        if group.files:
            labels = np.asarray(group.labels)
            pools += [(start + np.flatnonzero(labels == k)).tolist() for k in np.unique(labels)]
        start += len(group.labels)
    chosen: list[int] = []
    # The smallest first: what they leave over goes to the others.
    for left, pool in zip(range(len(pools), 0, -1), sorted(pools, key=len), strict=True):
        share = min(len(pool), (most - len(chosen)) // left)
        chosen += [pool[i] for i in np.linspace(0, len(pool) - 1, share).round().astype(int)]
    return sorted(chosen)


def thumbnail(path: Path) -> str:
    """A tile as the address of a small WebP picture, which an <img> takes."""
    image = Image.fromarray(read_tile(path))
    image.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    image.save(stream, format="WEBP", quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


def render(
    groups: Sequence[Points],
    classes: Sequence[str],
    roots: Mapping[str, Path],
    thumbnails: int,
    title: str,
) -> str:
    """The page as HTML text.

    Args:
        roots: Folder that the files of a kind are below, by kind.
        thumbnails: Most tiles to embed (about 2 kB each).
    """
    from bokeh.embed import json_item
    from bokeh.resources import Resources

    points = point_records(groups, classes, roots, thumbnails)
    tiles, shown = (sum(bool(p[key]) for p in points) for key in ("file", "picture"))
    note = "Point at a dot to see its tile; distances on the plane are only a hint."
    if shown < tiles:
        note += f" {shown} of {tiles} tiles are in this file, evenly by kind and class."
    plot = json_item(_layout(groups, classes, points, f"{title}. {note}"))
    scripts = Resources(mode="inline", components=["bokeh", "bokeh-widgets"]).render_js()
    template = environment(autoescape=True).get_template("umap.html")
    return template.render(title=title, scripts=scripts, plot=plot, points=points)


def point_records(
    groups: Sequence[Points], classes: Sequence[str], roots: Mapping[str, Path], thumbnails: int
) -> list[dict[str, str | None]]:
    """Kind, class (label), file and picture of each point; no picture where it has no thumbnail."""
    records: list[dict[str, str | None]] = []
    paths: list[Path | None] = []
    for group in groups:
        files = list(group.files) or [""] * len(group.labels)
        for label, file in zip(group.labels, files, strict=True):
            records.append(
                {"kind": group.kind, "label": classes[label], "file": file, "picture": None}
            )
            paths.append(roots[group.kind] / file if file else None)
    chosen = choose_evenly(groups, thumbnails)
    pictures = decode_tiles([paths[i] for i in chosen], thumbnail)
    for i, picture in zip(chosen, pictures, strict=True):
        records[i]["picture"] = picture
    return records


def _layout(groups: Sequence[Points], classes: Sequence[str], points: Sequence[dict], title: str):
    """Bokeh's plot with check boxes for kinds and classes."""
    from bokeh.layouts import column
    from bokeh.models import CheckboxGroup, CustomJS, CustomJSHover, Div, HoverTool
    from bokeh.plotting import figure

    tools = "pan,wheel_zoom,box_zoom,reset,save"
    plot = figure(sizing_mode="stretch_both", min_height=400, tools=tools)
    plot.axis.visible = plot.grid.visible = False
    colours = [tuple(round(255 * v) for v in colour[:3]) for colour in class_colours(len(classes))]
    size = float(np.clip(220 / np.sqrt(len(points)), 4, 10))
    frame = pandas.DataFrame(points, columns=["kind", "label", "file"])
    frame["point"] = frame.index
    frame["x"], frame["y"] = np.concatenate([group.xy for group in groups]).T
    kinds, renderers = [group.kind for group in groups], {}
    for (kind, name), rows in frame.groupby(["kind", "label"], sort=False):
        k, label, centroid = kinds.index(kind), list(classes).index(name), kind == CENTROID
        renderers[f"{k} {label}"] = plot.scatter(
            "x",
            "y",
            source=rows.to_dict("list"),
            marker=MARKERS[kind][0],
            size=18 if centroid else size,
            color=colours[label],
            line_color="black" if centroid else colours[label],
            alpha=1.0 if centroid else 0.75,
        )
    picture = CustomJSHover(code=PICTURE)
    plot.add_tools(HoverTool(tooltips=TOOLTIP, formatters={"@point": picture}))
    _add_names(plot, groups, classes, colours)
    boxes = {}
    dots = {name: ("●", f"rgb{colour}") for name, colour in zip(classes, colours, strict=True)}
    shapes = {kind: (MARKERS[kind][1], "black") for kind in kinds}
    for name, of_points, signs in (("kinds", "kind", shapes), ("classes", "label", dots)):
        styles = [
            f"label:nth-child({i + 1}) span::before {{ content: '{sign} '; color: {colour} }}"
            for i, (sign, colour) in enumerate(signs.values())
        ]
        labels = [f"{text} ({(frame[of_points] == text).sum()})" for text in signs]
        active = [*range(len(signs))]
        boxes[name] = CheckboxGroup(labels=labels, active=active, inline=True, stylesheets=styles)
    for box in boxes.values():
        box.js_on_change("active", CustomJS(args={**boxes, "renderers": renderers}, code=TOGGLE))
    return column(Div(text=html.escape(title)), plot, *boxes.values(), sizing_mode="stretch_both")


def _add_names(plot, groups: Sequence[Points], classes: Sequence[str], colours) -> None:
    """Write the names of the classes above their centroids."""
    for group in groups:
        if group.kind == CENTROID:
            everything = np.concatenate([one.xy for one in groups])
            extent = np.ptp(everything, axis=0)
            places = place_names(group.xy, extent, max(map(len, classes)))
            plot.text(
                *places.T.tolist(), list(classes), text_color=colours, text_align="center",
                text_font_style="bold", text_font_size="13px", background_fill_color="white",
                background_fill_alpha=0.8,
            )  # fmt: skip


def plane_groups(
    real: FeatureSet,
    synthetic: FeatureSet,
    decisions: Mapping[str, str] | None,
    neighbors: int,
    min_dist: float,
    seed: int,
) -> list[Points]:
    """Real, synthetic and centroid points on one plane, see `project`.

    With decisions, by synthetic file, the synthetic points of each are a group.
    """
    sets = (real.values, synthetic.values, real.centroids)
    plane = project(torch.cat(sets).numpy(), neighbors, min_dist, seed)
    ends = np.cumsum([len(values) for values in sets])
    real_xy, synthetic_xy, centroids_xy = np.split(plane, ends[:-1])
    made = (synthetic.labels.tolist(), synthetic.files, synthetic_xy)
    return [
        Points(REAL, real.labels.tolist(), real.files, real_xy),
        *([Points(SYNTHETIC, *made)] if decisions is None else by_decision(*made, decisions)),
        Points(CENTROID, range(len(real.classes)), (), centroids_xy),
    ]


def write_pictures(
    out: Path,
    groups: Sequence[Points],
    classes: Sequence[str],
    real_root: Path,
    synthetic_root: Path,
    thumbnails: int,
) -> None:
    """Write OUT/umap.csv, umap.png and umap.html with at most so many thumbnails."""
    roots = {group.kind: synthetic_root for group in groups} | {REAL: real_root}
    rows = table(groups, classes)
    write_csv(out / "umap.csv", rows, list(rows[0]))
    write_bytes(out / "umap.png", draw(groups, classes, TITLE))
    write_text(out / "umap.html", render(groups, classes, roots, thumbnails, TITLE))
