"""Self-contained HTML: text, tables, pictures and small charts, in one file that loads no other.

Pictures are embedded as PNG, charts are SVG in the page's own colours, which follow the reader's
light or dark setting.
"""

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --card: #f5f6f8; --line: #dfe3e8;
  --text: #1d2229; --soft: #5c6672; --mark: #7b3fa0; --second: #c2571a; --third: #1b7f79;
  --warn: #fdf3e1; --warn-line: #e2b766; }
@media (prefers-color-scheme: dark) { :root { --page: #16191d; --card: #1f242a; --line: #343b44;
  --text: #e6e9ed; --soft: #9aa5b1; --mark: #c79be0; --second: #eb9a68; --third: #5fc4bd;
  --warn: #33290f; --warn-line: #7d6527; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 20px; margin: 44px 0 8px; padding-top: 12px; border-top: 1px solid var(--line); }
h3 { font-size: 15px; margin: 18px 0 6px; }
p { margin: 8px 0; max-width: 76ch; }
.soft, figcaption, .note { color: var(--soft); font-size: 13px; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px;
  margin: 18px 0; }
.fact { background: var(--card); border-radius: 8px; padding: 12px 14px; }
.fact b { display: block; font-size: 19px; line-height: 1.25; overflow-wrap: anywhere; }
.warning { background: var(--warn); border: 1px solid var(--warn-line); border-radius: 8px;
  padding: 10px 14px; margin: 16px 0; }
.warning p { max-width: none; margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; margin: 10px 0; min-width: 60%; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.best td { font-weight: 650; } tr.failed td { color: var(--second); }
tr.part td { border-top: 2px solid var(--line); }
table.wide { font-size: 13px; } table.wide td, table.wide th { padding-right: 12px; }
table.wide td:not(.n) { min-width: 8em; } table.wide td:first-child { min-width: 13em; }
table.wide th { vertical-align: bottom; }
main.wide { max-width: 1280px; }
ul { margin: 8px 0; padding-left: 20px; max-width: 90ch; } li { margin: 3px 0; }
ul.soft { padding-left: 18px; }
code { font: 12px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  overflow-wrap: anywhere; }
pre { font: 12px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; margin: 8px 0;
  white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--soft); }
figure { margin: 14px 0; } figcaption { margin-top: 6px; max-width: 90ch; }
figure > img { max-width: 100%; border-radius: 6px; background: #fff; }
.grid { display: grid; gap: 3px; align-items: start; width: max-content; }
.grid img { display: block; border-radius: 3px; }
.grid .head { color: var(--soft); font-size: 12px; padding: 0 6px 2px 0; align-self: end; }
.grid .name { font-weight: 600; font-size: 13px; padding: 6px 10px 0 0; }
.cell { text-align: center; font-size: 11px; line-height: 1.35; color: var(--soft);
  font-variant-numeric: tabular-nums; }
.cell.good img { outline: 2px solid var(--third); outline-offset: -2px; }
.cell.bad img { outline: 2px solid var(--second); outline-offset: -2px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 24px; }
.charts > svg { max-width: 470px; }
svg { width: 100%; height: auto; font: 11px system-ui, sans-serif; }
svg text { fill: var(--soft); } svg .axis { stroke: var(--line); }
svg .s0 { stroke: var(--mark); } svg .f0 { fill: var(--mark); }
svg .s1 { stroke: var(--second); } svg .f1 { fill: var(--second); }
svg .s2 { stroke: var(--third); } svg .f2 { fill: var(--third); }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .level { stroke: var(--soft); stroke-dasharray: 4 4; }
svg .title { font-size: 13px; font-weight: 600; fill: var(--text); }
svg .value { fill: var(--text); }
svg .band { fill: var(--soft); opacity: .16; } svg .reference { stroke: var(--soft); }
svg .bar { stroke-width: 1.5; fill: none; }
svg .share { fill: var(--mark); } svg .strong { fill: var(--page); }
svg .name { fill: var(--text); }
@media print { :root { color-scheme: light; --page: #ffffff; --card: #f5f6f8; --line: #dfe3e8;
  --text: #1d2229; --soft: #5c6672; --mark: #7b3fa0; --second: #c2571a; --third: #1b7f79;
  --warn: #fdf3e1; --warn-line: #e2b766; }
  body { font-size: 11px; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; } h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; } table { font-size: 9px !important; }
  td.n, th.n { white-space: normal; } th, td { padding-right: 6px !important; }
  figure, .fact, .charts > svg, tr { break-inside: avoid; } }
""".strip()

COLOURS = 3  # series that a chart can tell apart


class Tile(NamedTuple):
    """One picture of a grid.

    Attributes:
        pixels: uint8 (H, W, 3).
        caption: Below it; lines separated by a newline.
        kind: "good" or "bad" draws a border, "" none.
    """

    pixels: np.ndarray
    caption: str = ""
    kind: str = ""


class Series(NamedTuple):
    """One line of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


class Span(NamedTuple):
    """A cell of a table over several columns."""

    text: str
    columns: int


class Measured(NamedTuple):
    """Points with deviations: one series of an `error_chart`.

    Attributes:
        deviation: Of each point, None where unknown.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    deviation: Sequence[float | None]


def escape(text: object) -> str:
    return html.escape(str(text), quote=True)


def png_address(data: bytes) -> str:
    """A PNG (or JPEG) file as an address that an <img> takes."""
    kind = "jpeg" if data.startswith(b"\xff\xd8") else "png"
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()


def embeddable(path: Path, width: int = 1600, largest: int = 400_000) -> bytes:
    """A picture file for a page: as it is where it is small, else narrower and as JPEG.

    Args:
        width: In pixels, at most.
        largest: Bytes up to which a file is taken as it is.
    """
    from PIL import Image

    data = path.read_bytes()
    if len(data) <= largest:
        return data
    with Image.open(io.BytesIO(data)) as image:
        picture = image.convert("RGB")
    if picture.width > width:
        height = max(1, round(picture.height * width / picture.width))
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, format="JPEG", quality=88)
    return stream.getvalue()


def encode_png(pixels: np.ndarray) -> bytes:
    """uint8 (H, W, 3) as a PNG file."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG", optimize=True)
    return stream.getvalue()


@dataclass
class Page:
    """An HTML page that is put together from top to bottom. All text is escaped here."""

    title: str
    parts: list[str] = field(default_factory=list)
    wide: bool = False  # for tables with many columns

    def heading(self, text: str) -> None:
        self.parts.append(f"<h2>{escape(text)}</h2>")

    def subheading(self, text: str) -> None:
        self.parts.append(f"<h3>{escape(text)}</h3>")

    def text(self, text: str, soft: bool = False) -> None:
        self.parts.append(f"<p{' class=soft' if soft else ''}>{escape(text)}</p>")

    def bullets(self, lines: Iterable[str], soft: bool = False) -> None:
        items = "".join(f"<li>{escape(line)}</li>" for line in lines)
        self.parts.append(f"<ul{' class=soft' if soft else ''}>{items}</ul>")

    def warning(self, text: str) -> None:
        self.parts.append(f'<div class="warning"><p>{escape(text)}</p></div>')

    def facts(self, facts: Iterable[tuple[str, str]]) -> None:
        """Large values with small descriptions: (value, description)."""
        cells = "".join(
            f'<div class="fact"><b>{escape(value)}</b>'
            f'<span class="soft">{escape(what)}</span></div>'
            for value, what in facts
        )
        self.parts.append(f'<div class="facts">{cells}</div>')

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[object]],
        numbers: Iterable[int] = (),
        best: int | None = None,
        kinds: Sequence[str] = (),
        wide: bool = False,
    ) -> None:
        """A table.

        Args:
            numbers: Columns that are aligned to the right.
            best: Row to stress.
            kinds: Instead, of each row: words of "best" (stressed), "failed" (in another colour)
                and "part" (a line before it).
            wide: Many columns: smaller.
        """
        right = set(numbers)
        kinds = kinds or ["best" if i == best else "" for i in range(len(rows))]

        def cells(tag: str, values: Sequence[object]) -> str:
            words, i = [], 0
            for value in values:
                if isinstance(value, Span):
                    words.append(f"<{tag} colspan={value.columns}>{escape(value.text)}</{tag}>")
                    i += value.columns
                    continue
                words.append(f"<{tag}{' class=n' if i in right else ''}>{escape(value)}</{tag}>")
                i += 1
            return "".join(words)

        body = "".join(
            f'<tr class="{kind}">{cells("td", row)}</tr>'
            for kind, row in zip(kinds, rows, strict=True)
        )
        self.parts.append(
            f'<div class="scroll"><table{" class=wide" if wide else ""}><thead><tr>'
            f"{cells('th', columns)}</tr></thead><tbody>{body}</tbody></table></div>"
        )

    def commands(self, summary: str, lines: Iterable[str]) -> None:
        """Command lines that can be unfolded."""
        body = "".join(f"<p><code>{escape(line)}</code></p>" for line in lines)
        self.parts.append(f"<details><summary>{escape(summary)}</summary>{body}</details>")

    def folded(self, summary: str, text: str) -> None:
        """Text as it is, such as a YAML file, that can be unfolded."""
        self.parts.append(
            f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
        )

    def picture(self, png: bytes, caption: str) -> None:
        """A PNG or JPEG file in full width."""
        self.parts.append(_figure(png, caption))

    def pictures(self, summary: str, pictures: Iterable[tuple[bytes, str]]) -> None:
        """Picture files with captions that can be unfolded."""
        body = "".join(_figure(data, caption) for data, caption in pictures)
        self.parts.append(f"<details><summary>{escape(summary)}</summary>{body}</details>")

    def grid(
        self,
        rows: Sequence[tuple[str, Sequence[Sequence[Tile]]]],
        heads: Sequence[str],
        caption: str,
        side: int,
        gap: int = 14,
    ) -> None:
        """Rows of tiles in groups of columns.

        Args:
            rows: Name and, for each group, its tiles.
            heads: Title of each group.
            side: Pixels of a tile on the screen.
            gap: Pixels between groups.
        """
        widths = [max([1, *(len(groups[g]) for _, groups in rows)]) for g in range(len(heads))]
        template = f" {gap}px ".join(f"repeat({width}, {side}px)" for width in widths)
        cells = ["<span></span>"]
        for g, head in enumerate(heads):
            cells += ["<span></span>"] * (g > 0)
            cells.append(
                f'<span class="head" style="grid-column: span {widths[g]}">{escape(head)}</span>'
            )
        for name, groups in rows:
            cells.append(f'<span class="name">{escape(name)}</span>')
            for g, tiles in enumerate(groups):
                cells += ["<span></span>"] * (g > 0)
                cells += [_cell(tile, name, heads[g], side) for tile in tiles]
                cells += ["<span></span>"] * (widths[g] - len(tiles))
        self.parts.append(
            f'<figure><div class="scroll"><div class="grid" style="grid-template-columns: auto'
            f' {template}">{"".join(cells)}</div></div>'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )

    def charts(self, charts: Iterable[str]) -> None:
        """SVG drawings side by side, see `line_chart` and `bar_chart`."""
        self.parts.append(f'<div class="charts">{"".join(charts)}</div>')

    def render(self) -> str:
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{STYLE}</style></head>\n"
            f"<body><main{' class=wide' if self.wide else ''}><h1>{escape(self.title)}</h1>\n"
            + "\n".join(self.parts)
            + "\n"
            "</main></body></html>\n"
        )


def _figure(data: bytes, caption: str) -> str:
    image = f'<img src="{png_address(data)}" alt="{escape(caption)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _cell(tile: Tile, name: str, head: str, side: int) -> str:
    image = (
        f'<img src="{png_address(encode_png(tile.pixels))}" width="{side}" height="{side}"'
        f' alt="{escape(f"{name}, {head}")}">'
    )
    caption = "<br>".join(escape(line) for line in tile.caption.splitlines())
    return f'<div class="cell {tile.kind}">{image}{caption}</div>'


# Charts: 360 x 220 units, the axes at 44 from the left and 34 from below

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 30, 34
MATRIX_LEFT = 72  # of class names beside a confusion matrix


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers that cover [low, high].

    Raises:
        ValueError: A bound is not finite.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"bounds {low} and {high} of an axis must be finite")
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def line_chart(title: str, series: Sequence[Series], x_label: str, falling: bool = False) -> str:
    """Lines over a common axis, as SVG; values that are not finite are left out.

    Args:
        falling: Draw x from high to low, as a sampler goes through time steps.
    """
    assert 1 <= len(series) <= COLOURS, len(series)
    points = [
        [(x, y) for x, y in zip(s.x, s.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
        for s in series
    ]
    xs, ys = ([p[axis] for line in points for p in line] or [0.0] for axis in (0, 1))
    y_ticks = nice_ticks(min(*ys, 0.0) if min(ys) >= 0 else min(ys), max(ys))
    low, high = min(xs), max(xs)
    if high == low:
        high = low + 1

    def place(x: float, y: float) -> tuple[float, float]:
        share = (high - x if falling else x - low) / (high - low)
        return LEFT + share * (WIDTH - LEFT - RIGHT), _height(y, y_ticks)

    body = [_frame(title, y_ticks)]
    for x in nice_ticks(low, high):
        if low <= x <= high:
            at, _ = place(x, 0)
            body.append(f'<text x="{at:.1f}" y="{HEIGHT - 19}" text-anchor="middle">{x:.4g}</text>')
    body.append(f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">'
                f"{escape(x_label)}</text>")  # fmt: skip
    for i, line in enumerate(points):
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in line)
        body.append(f'<polyline class="line s{i}" points="{path}"/>')
    if not any(points):
        middle = (WIDTH + LEFT) / 2, HEIGHT / 2
        body.append('<text x="{}" y="{}" text-anchor="middle">no values</text>'.format(*middle))
    at = WIDTH - RIGHT
    for i in reversed(range(len(series) if len(series) > 1 else 0)):
        body.append(f'<text class="f{i}" x="{at}" y="{TOP - 4}" text-anchor="end">'
                    f"{escape(series[i].name)}</text>")  # fmt: skip
        at -= 6.2 * len(series[i].name) + 12
    return _svg(body, title)


def bar_chart(
    title: str,
    names: Sequence[str],
    values: Sequence[float],
    level: float | None = None,
    level_name: str = "",
) -> str:
    """Bars from 0 with their values, as SVG.

    Args:
        level: A dashed line across, for example of chance.
    """
    ticks = nice_ticks(0, max([*values, level or 0.0, 1e-9]))
    slot = (WIDTH - LEFT - RIGHT) / len(names)
    body = [_frame(title, ticks)]
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        x, y = LEFT + (i + 0.18) * slot, _height(value, ticks)
        height = _height(0, ticks) - y
        middle = LEFT + (i + 0.5) * slot
        body.append(
            f'<rect class="f0" x="{x:.1f}" y="{y:.1f}" width="{slot * 0.64:.1f}"'
            f' height="{height:.1f}" rx="2"/>'
            f'<text class="value" x="{middle:.1f}" y="{y - 4:.1f}" text-anchor="middle">{value:.2f}'
            f'</text><text x="{middle:.1f}" y="{HEIGHT - 19}" text-anchor="middle">{escape(name)}'
            "</text>"
        )
    if level is not None:
        y = _height(level, ticks)
        body.append(
            f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{WIDTH - RIGHT}" y="{TOP - 4}" text-anchor="end">'
            f"- - {escape(level_name)}</text>"
        )
    return _svg(body, title)


def error_chart(
    title: str,
    series: Sequence[Measured],
    x_label: str,
    level: tuple[str, float, float | None] | None = None,
    y_bounds: tuple[float, float] | None = None,
    x_ticks: Sequence[float] | None = None,
) -> str:
    """Points joined by lines, with bars of their deviations, as SVG. The y axis need not hold 0.

    Args:
        level: Name, value and deviation of a constant to compare with, drawn as a line in a band.
        y_bounds: Least range of y, so that several charts have one; see `error_bounds`.
        x_ticks: Values on the x axis, likewise; those of the points when not given.
    """
    assert 1 <= len(series) <= COLOURS, len(series)
    y_ticks = nice_ticks(*(y_bounds or error_bounds(series, level)))
    positions = sorted({x for one in series for x in one.x} | set(x_ticks or ()))
    low, high = positions[0], positions[-1]
    margin = 0.08 * (high - low) or 1.0

    def place(x: float) -> float:
        share = (x - low + margin) / (high - low + 2 * margin)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    body = [_frame(title, y_ticks)]
    at = float(LEFT)
    if level is not None:
        name, value, deviation = level
        if deviation:
            top, bottom = (_height(value + s * deviation, y_ticks) for s in (1, -1))
            body.append(f'<rect class="band" x="{LEFT}" width="{WIDTH - LEFT - RIGHT}"'
                        f' y="{top:.1f}" height="{bottom - top:.1f}"/>')  # fmt: skip
        y = _height(value, y_ticks)
        body.append(f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}"'
                    f' y1="{y:.1f}" y2="{y:.1f}"/>')  # fmt: skip
    for x in positions:
        body.append(f'<text x="{place(x):.1f}" y="{HEIGHT - 19}" text-anchor="middle">{x:.4g}'
                    "</text>")  # fmt: skip
    body.append(f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">'
                f"{escape(x_label)}</text>")  # fmt: skip
    for i, one in enumerate(series):
        shift = 5 * (i - (len(series) - 1) / 2)  # bars of two series would lie on one another
        points = [
            (place(x) + shift, y, s or 0.0)
            for x, y, s in zip(one.x, one.y, one.deviation, strict=True)
        ]
        path = " ".join(f"{x:.1f},{_height(y, y_ticks):.1f}" for x, y, _ in points)
        body.append(f'<polyline class="line s{i}" points="{path}"/>')
        for x, y, deviation in points:
            top, bottom = (_height(y + s * deviation, y_ticks) for s in (1, -1))
            bar = f"M{x:.1f} {top:.1f}V{bottom:.1f}"
            if deviation:
                bar += f"M{x - 3:.1f} {top:.1f}h6M{x - 3:.1f} {bottom:.1f}h6"
            body.append(f'<path class="bar s{i}" d="{bar}"/><circle class="f{i}" cx="{x:.1f}"'
                        f' cy="{_height(y, y_ticks):.1f}" r="3"/>')  # fmt: skip
        body.append(f'<text class="f{i}" x="{at:.1f}" y="{TOP - 4}">● {escape(one.name)}</text>')
        at += 6.2 * len(one.name) + 26
    if level is not None:
        body.append(f'<text x="{at:.1f}" y="{TOP - 4}">— {escape(level[0])}</text>')
    return _svg(body, title)


def error_bounds(
    series: Sequence[Measured], level: tuple[str, float, float | None] | None = None
) -> tuple[float, float]:
    """Least and greatest value of a chart with its bars."""
    values = [
        y + sign * (s or 0.0)
        for one in series
        for y, s in zip(one.y, one.deviation, strict=True)
        for sign in (-1, 1)
    ]
    if level is not None:
        values += [level[1] + sign * (level[2] or 0.0) for sign in (-1, 1)]
    return min(values), max(values)


def matrix_chart(title: str, classes: Sequence[str], counts: Sequence[Sequence[float]]) -> str:
    """A confusion matrix, rows (true classes) in percent, as SVG.

    Args:
        counts: (K, K), true class by row.
    """
    side = (WIDTH - MATRIX_LEFT - 2) / len(classes)
    top = TOP + 22
    body = [f'<text class="title" x="0" y="13">{escape(title)}</text>']
    body.append(f'<text x="{(MATRIX_LEFT + WIDTH) / 2}" y="{TOP}" text-anchor="middle">predicted'
                "</text>")  # fmt: skip
    for k, name in enumerate(classes):
        middle = (k + 0.5) * side
        fits = int(side / 6.2)
        body.append(
            f'<text class="name" x="{MATRIX_LEFT + middle:.1f}" y="{top - 6}" text-anchor="middle">'
            f"{_cut(name, fits)}</text>"
            f'<text class="name" x="{MATRIX_LEFT - 6}" y="{top + middle + 4:.1f}"'
            f' text-anchor="end">{_cut(name, MATRIX_LEFT // 7)}</text>'
        )
        images = sum(counts[k])
        for j, count in enumerate(counts[k]):
            share = count / images if images else 0.0
            x, y = MATRIX_LEFT + j * side, top + k * side
            words = f"{name} predicted as {classes[j]}: {count:g} of {images:g}"
            shown = f"{100 * share:.0f}" if share >= 0.005 else ""
            body.append(
                f'<g><title>{escape(words)}</title><rect class="share" x="{x:.1f}" y="{y:.1f}"'
                f' width="{side - 1:.1f}" height="{side - 1:.1f}"'
                f' fill-opacity="{0.05 + 0.95 * share:.2f}"/>'
                f'<text class="{"strong" if share > 0.5 else "value"}" x="{x + side / 2:.1f}"'
                f' y="{y + side / 2 + 4:.1f}" text-anchor="middle">{shown}</text></g>'
            )
    return _svg(body, title, height=int(top + side * len(classes) + 4))


def _cut(name: str, letters: int) -> str:
    """As much of a name as fits, the whole of it when pointed at."""
    if len(name) <= max(letters, 3):
        return escape(name)
    return f"{escape(name[: max(letters, 3) - 1])}…<title>{escape(name)}</title>"


def _height(y: float, ticks: Sequence[float]) -> float:
    share = (y - ticks[0]) / (ticks[-1] - ticks[0])
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _frame(title: str, ticks: Sequence[float]) -> str:
    """Title, horizontal lines and their numbers."""
    words = [f'<text class="title" x="0" y="13">{escape(title)}</text>']
    for tick in ticks:
        y = _height(tick, ticks)
        words.append(
            f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>'
        )
    return "".join(words)


def _svg(body: Iterable[str], title: str, height: int = HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"{''.join(body)}</svg>"
    )
