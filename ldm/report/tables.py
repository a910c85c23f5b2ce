"""A table of text that is laid out once and written as Markdown, LaTeX or HTML."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

MINUS = "\N{MINUS SIGN}"
TEMPLATES = Path(__file__).parent / "templates"

# What LaTeX would take for a command, and what its fonts lack.
LATEX = str.maketrans(
    {
        "\\": "\\textbackslash{}",
        "~": "\\textasciitilde{}",
        "^": "\\textasciicircum{}",
        "<": "$<$",
        ">": "$>$",
        "*": "$^{*}$",
        "|": "\\textbar{}",
        "±": "$\\pm$",
        MINUS: "$-$",
        "Δ": "$\\Delta$",
        "×": "$\\times$",
        "†": "\\dag{}",
        "…": "\\dots{}",
        "“": "``",
        "”": "''",
        **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    }
)


def aligned(rows: Mapping[str, Mapping[str, Any]], width: int) -> str:
    """Lines for a terminal: a row per class, of cells of the same columns, `width` wide."""
    table = {"class": next(iter(rows.values())).keys()}
    table |= {name: row.values() for name, row in rows.items()}
    first = max(map(len, table))
    return "\n".join(
        f"{name:{first}}  " + "  ".join(f"{cell:>{width}}" for cell in cells)
        for name, cells in table.items()
    )


@dataclass
class TextTable:
    """A table whose cells are already text.

    Attributes:
        name: For references in LaTeX.
        heads: Titles of the columns.
        caption: Sentences below the table.
        numbers: Columns that are aligned to the right.
        kinds: "best", "failed" or "" for each row; empty where all rows are alike. The reason of a
            failed row stands in the cell `reason_at` and spans the following cells but the last,
            which are empty.
        breaks: Rows that a line comes before.
    """

    title: str
    heads: list[str]
    rows: list[list[str]]
    caption: list[str] = field(default_factory=list)
    numbers: set[int] = field(default_factory=set)
    kinds: list[str] = field(default_factory=list)
    breaks: set[int] = field(default_factory=set)
    name: str = ""

    @property
    def reason_at(self) -> int:
        """Column in which a failed row says why."""
        return min(self.numbers) + 2

    def kind(self, row: int) -> str:
        """What is special about a row."""
        return self.kinds[row] if self.kinds else ""

    def cells(self, row: int) -> list[tuple[str, int, int]]:
        """Cells of a row as (text, column, number of columns that it spans)."""
        values = self.rows[row]
        if self.kind(row) != "failed":
            return [(text, column, 1) for column, text in enumerate(values)]
        at, last = self.reason_at, len(values) - 1
        cells = [(text, column, 1) for column, text in enumerate(values[:at])]
        return [*cells, (values[at], at, last - at), (values[last], last, 1)]


def environment(**options) -> Environment:
    """Jinja templates of this package."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )
    made.policies["json.dumps_kwargs"] = {}  # sorted keys would part bokeh's references from it
    return made


def escape_markdown(text: str) -> str:
    """Text without anything that GitHub would take for markup."""
    return re.sub(r"([\\|*_<>`\[\]])", r"\\\1", " ".join(text.split()))


def to_markdown(table: TextTable) -> str:
    """The rows for GitHub, the best in bold; neither title nor caption."""
    import pandas

    rows = []
    for number, row in enumerate(table.rows):
        cells = [escape_markdown(cell) for cell in row]
        if table.kind(number) == "best":
            cells = [f"**{cell}**" if cell else "" for cell in cells]
        rows.append(cells)
    sides = ["right" if i in table.numbers else "left" for i in range(len(table.heads))]
    frame = pandas.DataFrame(rows, columns=[escape_markdown(head) for head in table.heads])
    return frame.to_markdown(index=False, tablefmt="pipe", colalign=sides, disable_numparse=True)


def escape_latex(text: str) -> str:
    """Text with everything escaped that LaTeX would take for a command."""
    text = " ".join(text.split()).translate(LATEX)
    # A row that starts with [ would be read as an argument of the line break before it.
    return f"{{}}{text}" if text.startswith("[") else text


def to_latex(tables: Sequence[TextTable], document: str) -> str:
    """Tables for a paper, labelled `tab:DOCUMENT-NAME`; they need booktabs and graphicx."""
    latex = environment(
        block_start_string="<%",
        block_end_string="%>",
        variable_start_string="<<",
        variable_end_string=">>",
        comment_start_string="<#",
        comment_end_string="#>",
    )
    latex.filters["latex"] = escape_latex
    labels = [re.sub("[^A-Za-z0-9-]", "-", f"{document}-{table.name}") for table in tables]
    pairs = list(zip(tables, labels, strict=True))
    return latex.get_template("tables.tex").render(tables=pairs)
