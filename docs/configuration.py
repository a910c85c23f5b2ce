"""Writes the tables of docs/configuration.md from the code: `make docs`.

Types, ranges and defaults are those of signatures and of `ldm.config.RANGES`; meanings are those of
docstrings and, for the settings of an experiment, of the comments beside the fields.
"""

import importlib
import inspect
import json
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ldm.cli import bounds_in_words  # noqa: E402
from ldm.config import RANGES, get_obj_from_str, type_in_words  # noqa: E402
from ldm.experiment import settings as experiment  # noqa: E402

PAGE = ROOT / "docs" / "configuration.md"
MARK = "<!-- The rest is written by `make docs` from docstrings and comments in the code. -->\n"
CHAPTERS = {"models": "Models", "modules": "Networks, losses and schedules", "data": "Data"}
FURTHER = ("ldm.modules.autoencoder.Architecture",)  # holds keys, but is no target
HEAD = ("| key | type | default | meaning |", "|---|---|---|---|")
REFERENCE = r"(?:[Ss]ee|[Aa]s|[Aa]s for) `([\w.]+)`"


def entries(doc: str) -> dict[str, str]:
    """What the section Args of a docstring says, by name."""
    text = re.split(r"\n\S", inspect.cleandoc(doc).partition("\nArgs:")[2])[0]
    found = {}
    for names, meaning in re.findall(r"\n    (\w[\w, ]*): (.*(?:\n     .*)*)", text):
        found |= dict.fromkeys(names.split(", "), " ".join(meaning.split()))
    return found


def meaning(owner: Any, key: str) -> str:
    """What a key means, by the docstring of its class, of a parent, or of what these refer to."""
    own = ""
    for cls in inspect.getmro(owner) if inspect.isclass(owner) else (owner,):
        doc = cls.__doc__ or "" if cls.__module__.startswith("ldm.") else ""
        own = own or entries(doc).get(key, "")
        if own and not re.match(r"(See|As for) `|.*, see `", own):
            return own
        for name in re.findall(REFERENCE, own or doc):
            module, _, attribute = name.rpartition(".")
            other = getattr(importlib.import_module(module or cls.__module__), attribute, None)
            if callable(other) and other is not owner and (found := meaning(other, key)):
                return found
    return own


def summary(owner: Any) -> str:
    """The first paragraph of a docstring."""
    return " ".join(inspect.cleandoc(owner.__doc__ or "").split("\n\n")[0].split())


def row(key: str, kind: Any, default: Any, limits: Any, text: str) -> str:
    """A line of a table; `default` is `...` for a key that must be given."""
    lowest = dict.fromkeys(("ge", "gt", "lt"))
    within = bounds_in_words(limits, lowest) or bounds_in_words(kind, lowest)
    shown = "required" if default is ... else f"`{json.dumps(default, default=str)}`"
    shown = "[its own keys](#tables)" if isinstance(default, experiment.Section) else shown
    cells = (f"`{key}`", ", ".join(filter(None, [type_in_words(kind), within])), shown, text)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def rows_of_class(cls: Any) -> Iterator[str]:
    """The keys of a class that a node names."""
    hints = typing.get_type_hints(cls.__init__, include_extras=True)
    for key, parameter in inspect.signature(cls).parameters.items():
        kind = hints.get(key, Any)
        limits = RANGES.get(key) if "number" in type_in_words(kind) else None
        default = ... if parameter.default is parameter.empty else parameter.default
        yield row(key, kind, default, limits, meaning(cls, key))


def rows_of_section(section: type[experiment.Section]) -> Iterator[str]:
    """The keys of a section of a table; meanings are comments beside or above the fields."""
    hints, above = typing.get_type_hints(section, include_extras=True), ""
    for line in inspect.getsource(section).splitlines():
        if name := re.match(r"    (\w+): ", line):
            field = section.model_fields[name[1]]
            text = line.partition("  # ")[2] or above
            text = text or " ".join(summary(inner) for _, inner in inside(field.annotation))
            default = ... if field.is_required() else field.default
            text = f"{text[:1].upper()}{text[1:]}".rstrip(".")
            yield row(name[1], hints[name[1]], default, field, text)
        above = line.strip()[2:] if line.startswith("    # ") else ""


def inside(kind: Any) -> list[tuple[str, type[experiment.Section]]]:
    """The section that a type holds, with what is added to its path."""
    parts = [kind, *typing.get_args(kind)]
    found = [p for p in parts if inspect.isclass(p) and issubclass(p, experiment.Section)]
    return [(".NAME" if typing.get_origin(kind) is dict else "", cls) for cls in found]


def sections(section: type[experiment.Section], path: str = "") -> Iterator[tuple[type, str]]:
    """Every section of a table with its dotted path, in which NAME is of the user's choice."""
    yield section, path
    for key, field in section.model_fields.items():
        for name, inner in inside(field.annotation):
            yield from sections(inner, f"{path}.{key}{name}".lstrip("."))


def page() -> str:
    """The page, of which what stands above the mark is written by hand."""
    lines = [PAGE.read_text().partition(MARK)[0] + MARK]
    configured = "\n".join(path.read_text() for path in ROOT.glob("configs/**/*.yaml"))
    targets = sorted({*re.findall(r"target: (ldm\.\S+)", configured), *FURTHER})
    for chapter, title in CHAPTERS.items():
        lines += [f"## {title}", ""]
        for name in targets:
            if name.startswith(f"ldm.{chapter}."):
                cls = get_obj_from_str(name)
                lines += [f"### {name}", "", summary(cls), "", *HEAD, *rows_of_class(cls), ""]
    paths: dict[type, str] = {}
    for section, path in sections(experiment.Settings):
        paths[section] = f"{paths[section]}, {path}" if section in paths else path
    lines += ["## Tables", ""]
    for section, path in paths.items():
        lines += [f"### {path or 'The file'}", "", summary(section), "", *HEAD]
        lines += [*rows_of_section(section), ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
