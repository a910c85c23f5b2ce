"""The patient, slide or region (group) that a tile belongs to, from its path or from a table."""

import csv
import re
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

from ldm.cli import existing_path
from ldm.errors import UserError
from ldm.settings import GroupOptions


def random_order(seed: int, name: str) -> bytes:
    """A sorting key: names in an order that the seed decides and that joining names keep."""
    return blake2b(f"{seed}:{name}".encode(), digest_size=16).digest()


Grouping = Callable[[str], str]  # from a tile's path below its root to the name of its group


def by_regex(pattern: str) -> Grouping:
    """Groups are the first parenthesis of a regular expression that is searched in the path."""
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise UserError(f"group_regex={pattern!r} is no regular expression: {error}") from None
    if regex.groups < 1:
        raise UserError(
            f"group_regex={pattern!r} needs parentheses around the patient, slide or region"
        )

    def group(path: str) -> str:
        match = regex.search(path)
        if match is None or match.group(1) is None:
            raise UserError(f"group_regex={pattern!r} does not match {path}; correct it")
        return match.group(1)

    return group


def by_level(level: int) -> Grouping:
    """Groups are the folders `level` levels below the root, 1 for the first level."""

    def group(path: str) -> str:
        folders = path.split("/")[:-1]
        if len(folders) < level:
            raise UserError(f"group_level={level}: {path} lies only {len(folders)} folders deep")
        return folders[level - 1]

    return group


def by_csv(table: Path, column: str, rows: str | None = None) -> Grouping:
    """Groups stand in a CSV with a column `path` or `file` (below the root, with `/`).

    Args:
        column: Name of the column of groups.
        rows: `COLUMN=VALUE` reads only these rows, of a table of several splits. None reads all.
    """
    with table.open(newline="", encoding="utf-8-sig", errors="replace") as stream:
        reader = csv.DictReader(stream)
        found = list(reader.fieldnames or ())
        name = next((name for name in ("path", "file") if name in found), None)
        if name is None or column not in found:
            raise UserError(
                f"group_csv={table}: columns {found} must have path (or file) and {column};"
                " name the right one with group_column"
            )
        only, equals, only_value = (rows or "").partition("=")
        if rows is not None and (not equals or only not in found):
            raise UserError(f"group_rows={rows!r}: write COLUMN=VALUE, COLUMN among {found}")
        group_of: dict[str, str] = {}
        for row in reader:
            if rows is not None and row[only] != only_value:
                continue
            value = (row[column] or "").strip()
            if group_of.setdefault(row[name], value) != value:
                raise UserError(
                    f"group_csv={table}: {row[name]} is in {column} {group_of[row[name]]} and in"
                    f" {value}; correct it, or choose rows with group_rows"
                )

    def group(path: str) -> str:
        if not group_of.get(path):
            raise UserError(f"group_csv={table} has no {column} for {path}; add it")
        return group_of[path]

    return group


def grouping_of(args: GroupOptions) -> Grouping | None:
    """The grouping that the options ask for; None without one.

    Raises:
        UserError: The table or the expression cannot be used.
    """
    if args.group_csv is not None:
        table = existing_path(args.group_csv, "group_csv", "file")
        return by_csv(table, args.group_column or "group", args.group_rows)
    if args.group_regex is not None:
        return by_regex(args.group_regex)
    return None if args.group_level is None else by_level(args.group_level)
