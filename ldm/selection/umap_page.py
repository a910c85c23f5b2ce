"""An interactive plane picture: one HTML file that loads no other and needs no network.

Pointing at a dot shows its tile, class, kind and file; `#point=12` in the address shows point 12 as
soon as the page is open (points are numbered as the rows of umap.csv, from 0).
"""

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.tiles import decode_tiles, read_tile
from ldm.selection.projection import Points, class_colours

SIDE = 64  # pixels of a thumbnail
QUALITY = 80
GRID = 10_000  # coordinates are whole numbers from 0 to here

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark; --page: #ffffff; --card: #f5f6f8; --line: #dfe3e8;
  --text: #1d2229; --soft: #5c6672; }}
@media (prefers-color-scheme: dark) {{ :root {{ --page: #16191d; --card: #1f242a; --line: #343b44;
  --text: #e6e9ed; --soft: #9aa5b1; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; height: 100vh; display: flex; background: var(--page); color: var(--text);
  font: 14px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }}
#plot {{ flex: 1; min-width: 0; position: relative; }}
canvas {{ position: absolute; inset: 0; width: 100%; height: 100%; }}
aside {{ width: 260px; padding: 16px; overflow-y: auto; background: var(--card);
  border-left: 1px solid var(--line); }}
h1 {{ font-size: 16px; margin: 0 0 8px; }} h2 {{ font-size: 13px; margin: 14px 0 4px; }}
label {{ display: flex; gap: 8px; align-items: center; padding: 1px 0; cursor: pointer; }}
label svg {{ width: 16px; height: 16px; flex: none; }} .count {{ color: var(--soft); }}
.soft {{ color: var(--soft); font-size: 12px; margin: 6px 0; }}
#tip {{ position: absolute; display: none; padding: 8px; background: var(--page); max-width: 260px;
  border: 1px solid var(--line); border-radius: 6px; box-shadow: 0 3px 14px rgba(0,0,0,.25);
  pointer-events: none; overflow-wrap: anywhere; font-size: 12px; }}
#tip img {{ display: block; width: 128px; height: 128px; margin-bottom: 6px; border-radius: 3px; }}
</style></head><body>
<div id="plot"><canvas></canvas><canvas></canvas><div id="tip"></div></div>
<aside><h1>{title}</h1><p class="soft">{note}</p>
<noscript><p>This picture needs JavaScript; umap.png shows the same points.</p></noscript>
<h2>kinds</h2><div id="kinds"></div><h2>classes</h2><div id="classes"></div></aside>
<script type="application/json" id="data">{data}</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const plot = document.getElementById("plot"), tip = document.getElementById("tip");
const [dots, ring] = plot.querySelectorAll("canvas");  // the ring is redrawn alone: it is fast
const px = new Float32Array(data.x.length), py = new Float32Array(data.x.length);
const shown = {{ kinds: data.kinds.map(() => true), classes: data.classes.map(() => true) }};
const REACH = 14;  // pixels from the pointer to the dot that it means
let current = -1, size = 1;

// Marks are drawn into any 2D context, so the legend has the same ones.
function mark(pen, kind, colour, x, y, size) {{
  pen.fillStyle = pen.strokeStyle = colour;
  pen.lineWidth = Math.max(1, size / 3);
  pen.beginPath();
  if (kind === "rejected" || kind === "removed") {{
    pen.moveTo(x - size, y - size); pen.lineTo(x + size, y + size);
    pen.moveTo(x - size, y + size); pen.lineTo(x + size, y - size); pen.stroke();
  }} else if (kind === "surplus") {{
    pen.arc(x, y, size, 0, 7); pen.stroke();
  }} else if (kind === "accepted") {{
    pen.rect(x - size, y - size, 2 * size, 2 * size); pen.fill();
  }} else if (kind === "filled") {{
    pen.moveTo(x, y - 1.3 * size); pen.lineTo(x + 1.2 * size, y + size);
    pen.lineTo(x - 1.2 * size, y + size); pen.closePath(); pen.fill();
  }} else if (kind === "synthetic") {{
    pen.moveTo(x, y - 1.4 * size); pen.lineTo(x + 1.4 * size, y); pen.lineTo(x, y + 1.4 * size);
    pen.lineTo(x - 1.4 * size, y); pen.closePath(); pen.fill();
  }} else if (kind === "centroid") {{
    for (let i = 0; i < 10; i++) {{
      const r = (i % 2 ? 1.1 : 2.6) * size, a = Math.PI * (i / 5 - 0.5);
      pen.lineTo(x + r * Math.cos(a), y + r * Math.sin(a));
    }}
    pen.closePath(); pen.fill(); pen.strokeStyle = "#000"; pen.lineWidth = 1; pen.stroke();
  }} else {{ pen.arc(x, y, size, 0, 7); pen.fill(); }}
}}

function visible(i) {{ return shown.kinds[data.kind[i]] && shown.classes[data.label[i]]; }}

function clear(canvas) {{
  const scale = window.devicePixelRatio || 1, pen = canvas.getContext("2d");
  canvas.width = plot.clientWidth * scale; canvas.height = plot.clientHeight * scale;
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  return pen;
}}

function draw() {{
  const pen = clear(dots), margin = 28;
  const w = plot.clientWidth - 2 * margin, h = plot.clientHeight - 2 * margin;
  size = Math.min(5, Math.max(1.5, 110 / Math.sqrt(data.x.length)));
  for (let i = 0; i < data.x.length; i++) {{
    px[i] = margin + data.x[i] / data.grid * w;
    py[i] = margin + (1 - data.y[i] / data.grid) * h;
    if (!visible(i)) continue;
    const kind = data.kinds[data.kind[i]];
    pen.globalAlpha = kind === "centroid" ? 1 : 0.75;
    mark(pen, kind, data.colours[data.label[i]], px[i], py[i], kind === "centroid" ? 5 : size);
  }}
}}

function nearest(x, y) {{
  let best = -1, least = REACH * REACH;
  for (let i = 0; i < data.x.length; i++) {{
    if (!visible(i)) continue;
    const d = (px[i] - x) ** 2 + (py[i] - y) ** 2;
    if (d <= least) {{ least = d; best = i; }}
  }}
  return best;
}}

function line(text, soft) {{
  const p = document.createElement("div");
  p.textContent = text; if (soft) p.className = "soft";
  tip.append(p);
}}

function show(i) {{
  if (i === current) return;
  current = i;
  const pen = clear(ring);
  tip.replaceChildren();
  tip.style.display = i >= 0 ? "block" : "none";
  if (i >= 0) {{
    pen.strokeStyle = getComputedStyle(document.body).color; pen.lineWidth = 2;
    pen.beginPath(); pen.arc(px[i], py[i], 2 * size + 4, 0, 7); pen.stroke();
    const picture = data.thumbnails[i];
    if (picture) {{ const img = new Image(); img.src = picture; tip.append(img); }}
    line(data.classes[data.label[i]] + ", " + data.kinds[data.kind[i]]);
    line(data.file[i] || "mean of the real tiles of its class", true);
    if (!picture && data.file[i]) line("without a thumbnail", true);
    line("point " + i, true);
    const x = px[i], w = tip.offsetWidth, h = tip.offsetHeight;
    tip.style.left = (x + 16 + w > plot.clientWidth ? Math.max(0, x - 16 - w) : x + 16) + "px";
    tip.style.top = Math.max(0, Math.min(py[i] - h / 2, plot.clientHeight - h)) + "px";
  }}
}}

function legend(id, names, colour, kind, member) {{
  names.forEach((name, k) => {{
    const row = document.createElement("label"), box = document.createElement("input");
    const dot = document.createElement("canvas"), count = document.createElement("span");
    box.type = "checkbox"; box.checked = true; dot.width = dot.height = 16;
    dot.style.cssText = "position: static; width: 16px; height: 16px";
    mark(dot.getContext("2d"), kind(k), colour(k), 8, 8, 4);
    count.className = "count"; count.textContent = member.filter(m => m === k).length;
    box.addEventListener("change", () => {{ shown[id][k] = box.checked; show(-1); draw(); }});
    row.append(box, dot, name, count);
    document.getElementById(id).append(row);
  }});
}}

function fromAddress() {{
  const found = /^#point=(\\d+)$/.exec(location.hash);
  if (found && +found[1] < data.x.length) show(+found[1]);
}}

legend("kinds", data.kinds, () => "#808890", k => data.kinds[k], data.kind);
legend("classes", data.classes, k => data.colours[k], () => "real", data.label);
plot.addEventListener("mousemove", event => {{
  const box = plot.getBoundingClientRect();
  show(nearest(event.clientX - box.left, event.clientY - box.top));
}});
plot.addEventListener("mouseleave", () => show(-1));
window.addEventListener("resize", () => {{
  const i = current;
  current = -1; draw(); show(i);
}});
window.addEventListener("hashchange", fromAddress);
draw();
fromAddress();
</script></body></html>
"""


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
    """The page.

    Args:
        roots: By kind, the folder that its files are below.
        thumbnails: Most tiles to embed (about 2 kB each).
    """
    paths: list[Path | None] = []
    for group in groups:
        if group.files:
            paths += [roots[group.kind] / file for file in group.files]
        else:
            paths += [None] * len(group.labels)
    chosen = choose_evenly(groups, thumbnails)
    pictures = decode_tiles([paths[i] for i in chosen], thumbnail)
    tiles = sum(path is not None for path in paths)
    note = "Point at a dot to see its tile; distances on the plane are only a hint."
    if len(chosen) < tiles:
        note += f" {len(chosen)} of {tiles} tiles are in this file, evenly by kind and class."
    data = page_data(groups, classes) | {
        "thumbnails": dict(zip(map(str, chosen), pictures, strict=True))
    }
    # "</script>" or "<!--" in a name would change what the element that holds it is.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return PAGE.format(title=escape(title), note=escape(note), data=text)


def page_data(groups: Sequence[Points], classes: Sequence[str]) -> dict[str, Any]:
    """Points by columns: kind and class as numbers, places on a grid of whole numbers."""
    places = np.concatenate([group.xy for group in groups]).astype(np.float64)
    low, high = places.min(axis=0), places.max(axis=0)
    scaled = (places - low) / np.maximum(high - low, 1e-9)
    x, y = (scaled * GRID).round().astype(int).T.tolist()

    def column(values: Callable[[int, Points], Sequence[Any]]) -> list[Any]:
        return [value for k, group in enumerate(groups) for value in values(k, group)]

    return {
        "grid": GRID,
        "classes": list(classes),
        "colours": [
            "#" + "".join(f"{round(255 * value):02x}" for value in colour[:3])
            for colour in class_colours(len(classes))
        ],
        "kinds": [group.kind for group in groups],
        "kind": column(lambda k, group: [k] * len(group.labels)),
        "label": column(lambda k, group: [int(label) for label in group.labels]),
        "file": column(lambda k, group: list(group.files) or [""] * len(group.labels)),
        "x": x,
        "y": y,
    }
