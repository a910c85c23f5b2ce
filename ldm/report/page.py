"""A self-contained HTML page: one file that loads no other and needs no JavaScript."""

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.report.grids import TileRow
from ldm.report.tables import TextTable, environment


class Page:
    """A page that is put together from top to bottom; its template escapes all text."""

    def __init__(self, title: str, wide: bool = False):
        self.title, self.wide = title, wide
        self.blocks: list[dict[str, Any]] = []

    def add(self, block: str, **values: Any) -> None:
        """Append a block that the template `page.html` knows by this name."""
        self.blocks.append({"block": block, **values})

    def answer(self, question: str, answer: str) -> None:
        """What the page is about and what it found, a sentence or two each."""
        self.add("answer", question=question, answer=answer)

    def heading(self, text: str) -> None:
        self.add("heading", text=text)

    def text(self, text: str, soft: bool = False) -> None:
        self.add("text", text=text, soft=soft)

    def bullets(self, lines: Iterable[str]) -> None:
        self.add("bullets", lines=list(lines))

    def warning(self, text: str) -> None:
        self.add("warning", text=text)

    def facts(self, facts: Iterable[tuple[str, str]]) -> None:
        """Large values with small descriptions: (value, description)."""
        self.add("facts", facts=list(facts))

    def links(self, links: Iterable[tuple[str, str]]) -> None:
        """Files beside the page: (address relative to the page, what it is)."""
        self.add("links", links=list(links))

    def table(self, table: TextTable, wide: bool = False) -> None:
        """A table without its title, its caption as a list below it; `wide` has smaller letters."""
        self.add("table", table=table, wide=wide)

    def folded(self, summary: str, text: str) -> None:
        """Text as it is, such as commands or a YAML file, that can be unfolded."""
        self.add("folded", summary=summary, text=text)

    def pictures(self, pictures: Iterable[tuple[bytes, str]], summary: str = "") -> None:
        """PNG or JPEG files with captions, side by side, or folded under the words of `summary`."""
        shown = [(image_address(data), caption) for data, caption in pictures]
        self.add("pictures", summary=summary, pictures=shown)

    def frame(self, summary: str, page: str) -> None:
        """Another page, HTML that may hold scripts, to be unfolded."""
        self.add("frame", summary=summary, page=page)

    def grid(self, rows: Sequence[TileRow], heads: Sequence[str], caption: str, side: int) -> None:
        """Rows of tiles, `side` pixels on the screen, in groups of columns with these `heads`."""
        widths = [max([1, *(len(row.groups[g]) for row in rows)]) for g in range(len(heads))]
        shown = [
            (row.name, [[(encode_png(t.pixels), t) for t in group] for group in row.groups])
            for row in rows
        ]
        self.add("grid", rows=shown, heads=list(heads), widths=widths, caption=caption, side=side)

    def charts(self, charts: Iterable[str]) -> None:
        """SVG drawings side by side, see `ldm.report.plots`."""
        self.add("charts", charts=list(charts))

    def render(self) -> str:
        """The page as HTML."""
        template = environment(autoescape=True).get_template("page.html")
        return template.render(title=self.title, wide=self.wide, blocks=self.blocks)


def image_address(data: bytes) -> str:
    """A PNG or JPEG file as an address that an <img> takes."""
    kind = "jpeg" if data.startswith(b"\xff\xd8") else "png"
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()


def encode_png(pixels: np.ndarray) -> str:
    """uint8 (H, W, 3) as the address of a PNG."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG", optimize=True)
    return image_address(stream.getvalue())


def embeddable(path: Path, width: int = 1600, largest: int = 400_000) -> bytes:
    """A picture file for a page: unchanged up to `largest` bytes, else narrower and as JPEG."""
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
