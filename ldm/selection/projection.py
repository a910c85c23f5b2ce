"""A plane picture of features: UMAP of real tiles, synthetic tiles and centroids together.

Letters: N points, D features, K classes.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ldm.devices import one_thread
from ldm.errors import UserError
from ldm.progress import FIRST_SIGN, Bar
from ldm.report import plots
from ldm.selection.select import KINDS, REMOVED

REAL, SYNTHETIC, CENTROID = "real", "synthetic", "centroid"
SPECTRAL_LEAST = 16  # points; with fewer, UMAP's spectral start has too few eigenvectors


class Points(NamedTuple):
    """Points of one kind on the plane."""

    kind: str  # real, centroid, synthetic, or what was decided on synthetic images
    labels: Sequence[int]  # n classes, in [0, K)
    files: Sequence[str]  # n names; empty for centroids
    xy: np.ndarray  # (n, 2)


def project(features: np.ndarray, neighbors: int, min_dist: float, seed: int) -> np.ndarray:
    """UMAP (McInnes et al. 2018) to the plane, (N, D) -> (N, 2); a seed gives one picture.

    Args:
        features: N at least 3.
        neighbors: Size of the neighbourhood; N - 1 where there are fewer points.
        min_dist: How closely UMAP packs points, in [0, 1].
    """
    import torch
    from umap import UMAP

    if len(features) < 3:
        raise UserError(f"a UMAP picture needs at least 3 points, there are {len(features)}")
    with warnings.catch_warnings():
        # Its hints are for tuning: a seed means one thread, a small graph is solved densely.
        warnings.simplefilter("ignore")
        reducer = UMAP(
            n_neighbors=min(neighbors, len(features) - 1),
            min_dist=min_dist,
            init="spectral" if len(features) >= SPECTRAL_LEAST else "random",
            random_state=seed,
            n_jobs=1,
            tqdm_kwds={"desc": "UMAP", "disable": False, "delay": FIRST_SIGN, "leave": False},
        )
        # numba, when it starts, sets PyTorch's threads to all cores, where each operation waits for
        # them. The graph of neighbours and the start of the layout come before UMAP's epochs.
        bar = Bar(total=1, desc="UMAP", bar_format="{desc}: {postfix}", delay=FIRST_SIGN)
        with one_thread(torch.device("cpu")), bar:
            return reducer.fit_transform(np.ascontiguousarray(features, dtype=np.float32))


def table(groups: Sequence[Points], classes: Sequence[str]) -> list[dict[str, str]]:
    """A row per point: set (real, synthetic or centroid), class, file, x, y, decision."""
    rows = []
    for group in groups:
        plain = group.kind in (REAL, SYNTHETIC, CENTROID)
        kind, decision = (group.kind, "") if plain else (SYNTHETIC, group.kind)
        files = group.files or [""] * len(group.labels)
        for label, file, (x, y) in zip(group.labels, files, group.xy, strict=True):
            place = {"class": classes[label], "file": file, "x": f"{x:.5f}", "y": f"{y:.5f}"}
            rows.append({"set": kind, **place, "decision": decision})
    return rows


def by_decision(
    labels: Sequence[int], files: Sequence[str], xy: np.ndarray, decisions: Mapping[str, str]
) -> list[Points]:
    """Synthetic points apart by what was decided on their files, in the order of their kinds."""
    groups = []
    for kind in (*KINDS, REMOVED):
        rows = [i for i, file in enumerate(files) if decisions[file] == kind]
        if rows:
            names = [files[i] for i in rows]
            groups.append(Points(kind, [labels[i] for i in rows], names, xy[rows]))
    return groups


def class_colours(K: int) -> list[tuple[float, float, float]]:
    """A colour per class, (red, green, blue) in [0, 1]; grey is the last that is used."""
    from matplotlib import colormaps

    if K > 20:
        return [colormaps["hsv"](k / K)[:3] for k in range(K)]
    palette = colormaps["tab10" if K <= 10 else "tab20"].colors
    return sorted(palette, key=lambda colour: len(set(colour)) == 1)[:K]  # greys come last


def place_names(centroids: np.ndarray, extent: np.ndarray, letters: int) -> np.ndarray:
    """Places above K centroids, (K, 2), at which names do not cover one another.

    Args:
        extent: Width and height of the picture, (2,).
        letters: Length of the longest name.
    """
    width, height = extent * (0.022 * letters, 0.05)
    places = centroids + (0, 0.6 * height)
    for _ in range(200):
        apart = places[:, None] - places[None]  # (K, K, 2)
        near = (abs(apart) < (width, height)).all(axis=-1) & ~np.eye(len(places), dtype=bool)
        if not near.any():
            break
        order = np.sign(np.arange(len(places))[:, None] - np.arange(len(places)))
        up = np.where(apart[..., 1] == 0, order, np.sign(apart[..., 1]))
        places[:, 1] += 0.26 * (near * up * (height - abs(apart[..., 1]))).sum(axis=1)
    return places


def draw(groups: Sequence[Points], classes: Sequence[str], title: str) -> bytes:
    """PNG with a panel per kind, all with the same axes, and the centroids in each."""
    from matplotlib.lines import Line2D
    from matplotlib.patheffects import withStroke

    kinds = [group for group in groups if group.kind != CENTROID]
    (centroids,) = (group for group in groups if group.kind == CENTROID)
    colors = class_colours(len(classes))
    everything = np.concatenate([group.xy for group in groups])
    low, high = everything.min(axis=0), everything.max(axis=0)
    margin = 0.05 * (high - low) + 1e-3
    places = place_names(centroids.xy, high - low, max(map(len, classes)))
    halo = withStroke(linewidth=3, foreground="white")

    columns = 2 if len(kinds) in (2, 4) else 3
    rows = -(-len(kinds) // columns)
    figure = plots.new_figure(1.4 + 4.8 * columns, 0.6 + 4.8 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in panels[len(kinds) :]:
        axes.remove()
    for axes, shown in zip(panels[: len(kinds)], kinds, strict=True):
        others = np.concatenate([group.xy for group in kinds if group is not shown])
        size = float(np.clip(6000 / max(1, len(shown.labels)), 5, 30))
        axes.scatter(*others.T, s=size / 2, color="0.88", linewidths=0, rasterized=True)
        own, stars = ([colors[i] for i in group.labels] for group in (shown, centroids))
        axes.scatter(*shown.xy.T, s=size, c=own, linewidths=0, alpha=0.85)
        axes.scatter(*centroids.xy.T, s=130, marker="*", c=stars, edgecolors="black",
                     linewidths=0.8, zorder=3)  # fmt: skip
        axes.set(xlim=(low[0] - margin[0], high[0] + margin[0]), xticks=[], yticks=[])
        axes.set(ylim=(low[1] - margin[1], high[1] + margin[1]))
        axes.set_title(f"{shown.kind} ({len(shown.labels)} tiles)", fontsize=11)
        axes.spines[:].set_color("0.75")
        for name, place, colour in zip(classes, places, colors, strict=True):
            axes.text(*place, name, color=colour, ha="center", va="bottom", fontsize=9,
                      fontweight="bold", zorder=4, path_effects=[halo])  # fmt: skip
    star = {"marker": "*", "ms": 11, "mfc": "none", "mec": "black", "label": "centroid"}
    dots = [{"marker": "o", "color": c, "label": n} for n, c in zip(classes, colors, strict=True)]
    handles = [Line2D([], [], linestyle="", **look) for look in (*dots, star)]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return plots.to_png(figure)
