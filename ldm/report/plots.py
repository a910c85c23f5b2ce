"""Charts by matplotlib, as SVG in the colours of a page or as PNG.

`draw_...` functions draw into given axes, so that a figure can have several panels; `..._chart`
functions give an SVG for `Page.charts`. Its text stays text, and its colours are variables of the
page's style sheet, so that charts follow the reader's light or dark setting.

Letters: K classes.
"""

import html
import io
import re
from collections.abc import Iterable, Sequence
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np

# The colours of the page, light, by the name that its style sheet gives them.
COLOURS = {
    "mark": "#7b3fa0",
    "second": "#c2571a",
    "third": "#1b7f79",
    "text": "#1d2229",
    "soft": "#5c6672",
    "line": "#dfe3e8",
    "page": "#ffffff",
}
SERIES = (COLOURS["mark"], COLOURS["second"], COLOURS["third"])  # that a chart can tell apart
WIDTH, HEIGHT = 4.4, 2.8  # inches
FEW = 20  # points of a line that are marked, and said in words
SVG_SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "histodiffusion"}
PNG_METADATA = {"Software": None}  # else files differ with the version of matplotlib


class Series(NamedTuple):
    """Points of one line."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    deviation: Sequence[float | None] = ()  # half of each point's bar; empty without bars
    pale: bool = False  # drawn behind the others


class Level(NamedTuple):
    """A constant to compare with: a line across, in a band of its deviation."""

    name: str
    value: float
    deviation: float | None = None


class Estimate(NamedTuple):
    """A value with its interval, None where unknown, and the values that it is the mean of."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    values: Sequence[float] = ()


def new_figure(width: float, height: float, dpi: int = 120) -> Any:
    """An empty matplotlib figure, inches, that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: Any) -> bytes:
    """A PNG file, the same bytes for the same figure."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata=PNG_METADATA)
    return stream.getvalue()


def to_svg(figure: Any, description: str) -> str:
    """An <svg> element for a page; the description is for readers who do not see it."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context(SVG_SETTINGS):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    box = re.search(r'viewBox="([^"]+)"', text)[1]
    body = text[text.index("<defs>") :]
    # Names of groups repeat from chart to chart; only what is referred to keeps its name.
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", body)
    # Black is what SVG takes where no colour is written, also in the dark.
    body = body.replace("<text ", f'<text fill="{COLOURS["soft"]}" ')
    for name, colour in COLOURS.items():
        body = body.replace(f'"{colour}"', f'"var(--{name})"').replace(colour, f"var(--{name})")
    words = html.escape(description, quote=True)
    return f'<svg viewBox="{box}" role="img" aria-label="{words}">{body}'


def _chart_axes(title: str, height: float = HEIGHT) -> tuple[Any, Any]:
    figure = new_figure(WIDTH, height)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=COLOURS["text"],
                   pad=18, wrap=True)  # fmt: skip
    plain(axes)
    axes.grid(axis="y", color=COLOURS["line"], linewidth=0.8)
    return figure, axes


def plain(axes: Any) -> None:
    """Leave out the frame of a panel, and write its numbers softly."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=9, labelcolor=COLOURS["soft"])
    axes.xaxis.label.set(color=COLOURS["soft"], fontsize=9)
    axes.yaxis.label.set(color=COLOURS["soft"], fontsize=9)
    axes.set_axisbelow(True)


def _legend(axes: Any) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.99), ncols=4, frameon=False, fontsize=9,
                labelcolor="linecolor", handlelength=1.2, columnspacing=1.2, borderpad=0.1,
                handletextpad=0.5)  # fmt: skip


def line_chart(title: str, series: Sequence[Series], x_label: str, falling: bool = False) -> str:
    """Lines over a common axis, from 0 where no value is below; `falling`: x from high to low."""
    figure, axes = _chart_axes(title)
    names = draw_series(axes, series)
    if not names:
        axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", fontsize=9)
    elif axes.dataLim.y0 >= 0:
        axes.set_ylim(0, 1.06 * axes.dataLim.y1 or 1.0)
    axes.set_xlabel(x_label)
    if falling:
        axes.invert_xaxis()
    if len(names) > 1:
        _legend(axes)
    shown = [line for line in series if len(line.x) < FEW]
    values = f": {'; '.join(map(_in_words, shown))}" if shown else ""
    return to_svg(figure, f"{title}, over {x_label}{values}")


def bar_chart(
    title: str, names: Sequence[str], values: Sequence[float], level: Level | None = None
) -> str:
    """Bars from 0 with their values."""
    figure, axes = _chart_axes(title)
    bars = axes.bar(names, values, width=0.64, color=SERIES[0])
    axes.bar_label(bars, fmt="%.2f", fontsize=9, color=COLOURS["text"], padding=2)
    if level is not None:
        axes.axhline(level.value, color=COLOURS["soft"], ls="--", lw=1, label=level.name)
        _legend(axes)
    shown = ", ".join(f"{n} {v:.2f}" for n, v in zip(names, values, strict=True))
    return to_svg(figure, f"{title}: {shown}")


def draw_series(axes: Any, series: Sequence[Series], colours: Sequence[str] = SERIES) -> set[str]:
    """Draw finite points joined by lines, a colour per name; returns the names that have any."""
    by_name = dict(zip(dict.fromkeys(line.name for line in series), colours, strict=False))
    names: set[str] = set()
    shift = 0.01 * np.ptp([x for line in series for x in line.x] or [0])
    for i, line in enumerate(series):
        x, y = np.asarray(line.x, dtype=float), np.asarray(line.y, dtype=float)
        shown = np.isfinite(x) & np.isfinite(y)
        if not shown.any():
            continue
        error = None
        if line.deviation:  # bars of two series would lie on one another
            error = np.array([one or 0.0 for one in line.deviation])[shown]
            x = x + shift * (i - (len(series) - 1) / 2)
        look = {"lw": 1, "alpha": 0.45, "zorder": 1} if line.pale else {"lw": 1.7}
        marker = "o" if shown.sum() < FEW else ""  # a single value would make no line
        label = None if line.name in names else line.name
        axes.errorbar(x[shown], y[shown], error, color=by_name[line.name], marker=marker, ms=4,
                      capsize=2, label=label, **look)  # fmt: skip
        names.add(line.name)
    return names


def curves_picture(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    level: Level | None = None,
) -> bytes:
    """Lines with bars over evenly spaced values of x, as PNG; the legend is beside them."""
    from matplotlib import colormaps

    figure = new_figure(9.0, 4.8, dpi=150)
    axes = figure.add_subplot()
    positions = sorted({float(x) for line in series for x in line.x})
    moved = [line._replace(x=[positions.index(x) for x in line.x]) for line in series]
    palette = colormaps["tab10" if len(series) <= 10 else "tab20"]
    draw_series(axes, moved, [palette(i % palette.N) for i in range(len(series))])
    if level is not None:
        deviation = level.deviation or 0.0
        axes.axhspan(level.value - deviation, level.value + deviation, color=COLOURS["soft"],
                     alpha=0.16, linewidth=0)  # fmt: skip
        axes.axhline(level.value, color=COLOURS["soft"], linewidth=1, label=level.name)
    axes.set_xticks(range(len(positions)), [f"{x:g}" for x in positions])
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(axis="y", color=COLOURS["line"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    return to_png(figure)


def _in_words(line: Series) -> str:
    pairs = [pair for pair in zip(line.x, line.y, strict=True) if np.isfinite(pair).all()]
    return f"{line.name} {', '.join(f'{y:.3g} at {x:g}' for x, y in pairs)}"


def estimate_chart(title: str, estimates: Sequence[Estimate], x_label: str, level: Level) -> str:
    """Values with their intervals, one below the other, beside a line (0 for differences)."""
    names = ["\n".join(wrap(one.name, 34, max_lines=3)) for one in estimates]
    lines = max(name.count("\n") for name in names)
    figure, axes = _chart_axes(title, 1.1 + (0.26 + 0.13 * lines) * len(estimates))
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=COLOURS["line"], linewidth=0.8)
    axes.axvline(level.value, color=COLOURS["soft"], linewidth=1, label=level.name)
    for place, one in enumerate(estimates):
        axes.plot(one.values, [place] * len(one.values), "|", ms=7, color=COLOURS["soft"])
        if one.low is not None and one.high is not None:
            clear = one.low > level.value or one.high < level.value
            axes.plot([one.low, one.high], [place, place], color=SERIES[0], linewidth=1.6)
            axes.plot(one.value, place, "o", ms=5, color=SERIES[0],
                      mfc=SERIES[0] if clear else COLOURS["page"])  # fmt: skip
        else:
            axes.plot(one.value, place, "x", ms=5, color=COLOURS["soft"])
    axes.set_yticks(range(len(estimates)), names)
    axes.tick_params(axis="y", labelcolor=COLOURS["text"])
    axes.set_ylim(len(estimates) - 0.5, -0.5)
    axes.set_xlabel(x_label)
    _legend(axes)
    sign = "" if level.value else "+"
    shown = (
        f"{one.name} {one.value:{sign}.1f}"
        + ("" if one.low is None else f" ({one.low:{sign}.1f} to {one.high:{sign}.1f})")
        for one in estimates
    )
    return to_svg(figure, f"{title}, {x_label}: {'; '.join(shown)}")


def draw_confusion(axes: Any, counts: np.ndarray, classes: Sequence[str]) -> None:
    """A confusion matrix (K, K), a row per true class: shares as colours and percent; counts."""
    from matplotlib.patches import Rectangle

    k = len(classes)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    for (i, j), count in np.ndenumerate(counts):
        share = float(shares[i, j])
        corner, strength = (j - 0.49, i - 0.49), 0.05 + 0.95 * share
        axes.add_patch(Rectangle(corner, 0.98, 0.98, color=SERIES[0], alpha=strength, linewidth=0))
        if count:
            number = f"{count:.0f}" if count % 1 == 0 else f"{count:.1f}"
            colour = COLOURS["page" if share > 0.5 else "text"]
            axes.text(j, i, f"{100 * share:.0f}%\n{number}", ha="center", va="center",
                      fontsize=min(9.0, 52 / k), color=colour)  # fmt: skip
    tilted = k * max(map(len, classes)) > 30  # letters that stand side by side
    axes.set_xticks(
        range(k), classes, rotation=40 if tilted else 0, ha="right" if tilted else "center"
    )
    axes.set_yticks(range(k), classes)
    axes.set(xlim=(-0.5, k - 0.5), ylim=(k - 0.5, -0.5), xlabel="predicted", ylabel="true")
    axes.set_aspect("equal")


def confusion_picture(counts: np.ndarray, classes: Sequence[str], title: str) -> bytes:
    """A confusion matrix as PNG, see `draw_confusion`."""
    side = 1.8 + 0.72 * len(classes)
    figure = new_figure(max(side + 0.6, 4.2), max(side, 3.4), dpi=150)
    draw_confusion(figure.add_subplot(), counts, classes)
    figure.suptitle(title, fontsize=10, wrap=True)
    return to_png(figure)


def confusion_chart(title: str, counts: np.ndarray, classes: Sequence[str]) -> str:
    """A confusion matrix for a page, see `draw_confusion`."""
    figure, axes = _chart_axes(title, HEIGHT + 1)
    axes.grid(visible=False)
    draw_confusion(axes, counts, classes)
    axes.tick_params(labelcolor=COLOURS["text"])
    right = ", ".join(
        f"{name} {counts[k, k]:g} of {counts[k].sum():g} right" for k, name in enumerate(classes)
    )
    return to_svg(figure, f"Confusion matrix of {title}: {right}")


def draw_histogram(
    axes: Any, sides: Iterable[tuple[str, np.ndarray, str]], x_label: str, bins: int = 60
) -> None:
    """Overlapping histograms, in percent, of sets of numbers from 0: (name, values, colour)."""
    sides = list(sides)
    highest = max(values.max() for _, values, _ in sides)
    edges = np.linspace(0, highest or 1, bins + 1)
    for name, values, colour in sides:
        share = np.full(len(values), 100 / len(values))
        axes.hist(values, edges, weights=share, label=f"{name} ({len(values)})",
                  histtype="stepfilled", color=colour, alpha=0.6)  # fmt: skip
    axes.set(xlabel=x_label, ylabel="% of tiles", xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)


def mark_threshold(axes: Any, value: float, words: str) -> None:
    """A dashed vertical line with words to its left."""
    axes.axvline(value, color="crimson", linestyle="--", linewidth=1)
    axes.text(value, 0.97, f"{words}  ", color="crimson", ha="right", va="top",
              transform=axes.get_xaxis_transform())  # fmt: skip
