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
.fact b { display: block; font-size: 19px; line-height: 1.25; }
.warning { background: var(--warn); border: 1px solid var(--warn-line); border-radius: 8px;
  padding: 10px 14px; margin: 16px 0; }
.warning p { max-width: none; margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; margin: 10px 0; min-width: 60%; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.best td { font-weight: 650; }
code { font: 12px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  overflow-wrap: anywhere; }
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
svg { width: 100%; height: auto; font: 11px system-ui, sans-serif; }
svg text { fill: var(--soft); } svg .axis { stroke: var(--line); }
svg .s0 { stroke: var(--mark); } svg .f0 { fill: var(--mark); }
svg .s1 { stroke: var(--second); } svg .f1 { fill: var(--second); }
svg .s2 { stroke: var(--third); } svg .f2 { fill: var(--third); }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .level { stroke: var(--soft); stroke-dasharray: 4 4; }
svg .title { font-size: 13px; font-weight: 600; fill: var(--text); }
svg .value { fill: var(--text); }
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


def escape(text: object) -> str:
    return html.escape(str(text), quote=True)


def png_address(data: bytes) -> str:
    """A PNG file as an address that an <img> takes."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


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

    def heading(self, text: str) -> None:
        self.parts.append(f"<h2>{escape(text)}</h2>")

    def subheading(self, text: str) -> None:
        self.parts.append(f"<h3>{escape(text)}</h3>")

    def text(self, text: str, soft: bool = False) -> None:
        self.parts.append(f"<p{' class=soft' if soft else ''}>{escape(text)}</p>")

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
    ) -> None:
        """A table.

        Args:
            numbers: Columns that are aligned to the right.
            best: Row to stress.
        """
        right = set(numbers)

        def cells(tag: str, values: Sequence[object]) -> str:
            words = []
            for i, value in enumerate(values):
                words.append(f"<{tag}{' class=n' if i in right else ''}>{escape(value)}</{tag}>")
            return "".join(words)

        body = "".join(
            f"<tr{' class=best' if i == best else ''}>{cells('td', row)}</tr>"
            for i, row in enumerate(rows)
        )
        self.parts.append(
            f'<div class="scroll"><table><thead><tr>{cells("th", columns)}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )

    def commands(self, summary: str, lines: Iterable[str]) -> None:
        """Command lines that can be unfolded."""
        body = "".join(f"<p><code>{escape(line)}</code></p>" for line in lines)
        self.parts.append(f"<details><summary>{escape(summary)}</summary>{body}</details>")

    def picture(self, png: bytes, caption: str) -> None:
        """A PNG file in full width."""
        image = f'<img src="{png_address(png)}" alt="{escape(caption)}">'
        self.parts.append(f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>")

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
        widths = [max(1, *(len(groups[g]) for _, groups in rows)) for g in range(len(heads))]
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
            f"<body><main><h1>{escape(self.title)}</h1>\n" + "\n".join(self.parts) + "\n"
            "</main></body></html>\n"
        )


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


def _svg(body: Iterable[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(body)}</svg>"
    )
