"""Scan a corpus once: decode and hash every tile, and find the bad ones.

Files are scanned in threads (decoding and hashing release the interpreter's lock). What is known of
a finished file goes to a journal beside the index at once, so an interrupted scan goes on where it
stopped; an earlier index serves the same way, so only new and changed files are looked at again.
"""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.groups import Grouping
from ldm.data.images import UnsupportedImage, declared_white, map_ahead
from ldm.data.index import VERSION, CorpusIndex, content_hash, index_table
from ldm.data.slides import Tiling, report
from ldm.data.storage import LAYOUTS, Layout, Place, SlideLayout, find_files, path_order
from ldm.errors import UserError
from ldm.files import Journal, read_journal, remove_leftovers, write_csv, write_text
from ldm.progress import Bar

UNREADABLE, TRUNCATED, UNSUPPORTED = "unreadable", "truncated", "unsupported"
TOO_SMALL, DUPLICATE = "too small", "duplicate"
PROBLEMS = (UNREADABLE, TRUNCATED, UNSUPPORTED, TOO_SMALL, DUPLICATE)
PROBLEM_COLUMNS = ("root", "path", "problem", "reason", "width", "height", "size")
AHEAD = 16  # files per thread that wait, so that a scan of millions holds no million of results

EMPTY = dict.fromkeys(("group", "hash", "width", "height", "problem", "reason"))
Row = dict[str, Any]  # of the index, by column
Stamp = tuple[int, str, int, int]  # root number, file, its bytes, its time of change


def journal_of(out: Path) -> Path:
    """Path of the journal in which an unfinished scan keeps what it has found."""
    return out.with_name(f".{out.name}.scan")


def problems_of(out: Path) -> Path:
    """Path of the table of problems that belongs to an index."""
    return out.with_name(f"{out.stem}.problems.csv")


def page_of(out: Path) -> Path:
    """Path of the page of slides that belongs to an index."""
    return out.with_name(f"{out.stem}.html")


def _stamps(roots: Sequence[Path], layout: Layout) -> tuple[list[Stamp], list[dict[str, int]]]:
    """The files of the roots, and for each root its folders and their times of change."""
    stamps, folders = [], []
    for number, root in enumerate(roots):
        files, times = find_files(root, layout)
        folders.append(times)
        for file in files:
            try:
                state = layout.state(root, file)
                stamps.append((number, file, state.st_size, state.st_mtime_ns))
            except FileNotFoundError:  # a broken link; it cannot be read either
                stamps.append((number, file, 0, 0))
    return stamps, folders


def _scan(
    roots: Sequence[Path],
    layout: Layout,
    stamps: Sequence[Stamp],
    path: Path,
    header: Row,
    earlier: dict[Stamp, list[Row]],
    workers: int,
) -> list[Row]:
    """The rows of all files; those that `earlier` lacks are read, and put down in the journal."""
    rows = [row for stamp in stamps for row in earlier.get(stamp, ())]
    todo = [stamp for stamp in stamps if stamp not in earlier]
    scanned = map_ahead(lambda stamp: scan_file(roots, layout, stamp), todo, workers, AHEAD)
    bar = Bar(total=len(stamps), initial=len(stamps) - len(todo), unit="file")
    with Journal(path) as journal, bar:
        journal.add(header)
        for stamp, found in zip(todo, scanned, strict=True):
            journal.add([*stamp, found])
            rows += found
            bar.update()
    return sorted(rows, key=lambda row: (row["root"], path_order(row["path"])))


def scan_file(roots: Sequence[Path], layout: Layout, stamp: Stamp) -> list[Row]:
    """The rows of the tiles in one file, without what depends on other files or on options."""
    number, file, file_size, modified = stamp
    common = {"root": number, "file_size": file_size, "modified": modified, **EMPTY}
    try:
        places, reason = layout.places(roots[number], file), "no tile in it"
    except (UserError, OSError) as error:
        places, reason = [], _reason(error)
    rows = [common | place._asdict() for place in places]
    for row, place in zip(rows, places, strict=True):
        row |= {"size": place.size or file_size, **_scan_tile(roots[number], layout, place)}
    nothing = {**Place(file, file, 0, file_size, None)._asdict(), "problem": UNREADABLE}
    return rows or [{**common, **nothing, "reason": reason}]


def _scan_tile(root: Path, layout: Layout, place: Place) -> Row:
    """The hash of a tile and its width and height, or its problem and the reason."""
    content, found = None, {}
    try:
        content = layout.content(root, place)
        found["hash"] = content_hash(content)
        found["height"], found["width"], _ = layout.decode(root, place, content).shape
    except (UserError, OSError) as error:
        problem = TRUNCATED if _starts_as_image(content) else UNREADABLE
        problem = UNSUPPORTED if isinstance(error, UnsupportedImage) else problem
        found |= {"problem": problem, "reason": _reason(error)}
    return found


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _starts_as_image(content: Any) -> bool:
    """Whether a tile whose pixels cannot be read has a readable header."""
    if not isinstance(content, bytes):
        return False
    try:
        with Image.open(io.BytesIO(content)):
            return True
    except (OSError, SyntaxError, ValueError):
        return content.startswith(np.lib.format.MAGIC_PREFIX)


def _earlier_rows(header: dict[str, Any], out: Path) -> dict[Stamp, list[Row]]:
    """Rows that an earlier index and an unfinished scan have of these folders, by file.

    Problems that depend on other tiles or on an option are taken out of them again.
    """
    earlier: dict[Stamp, list[Row]] = {}
    scanned = header["scanned"]
    try:
        index = CorpusIndex.read(out)
        if (index.layout, index.tiling) == (header["layout"], header.get("tiling")):
            for row in index.table.to_pylist():
                folder = index.scanned[row["root"]]
                if folder not in scanned:
                    continue
                row["root"] = scanned.index(folder)
                if row["problem"] in (None, TOO_SMALL, DUPLICATE):
                    row["problem"] = row["reason"] = None
                row["group"] = None
                stamp = (row["root"], row["file"], row["file_size"], row["modified"])
                earlier.setdefault(stamp, []).append(row)
    except UserError:
        pass  # there is none yet, or none of use; it will be written
    usable = False

    def take(entry: Any) -> None:
        nonlocal usable
        if isinstance(entry, dict):
            usable = entry == header
        elif usable:
            number, file, size, modified, rows = entry
            earlier[number, file, size, modified] = rows

    if journal_of(out).is_file():
        read_journal(journal_of(out), take)

    def stays(row: Row) -> bool:
        """Whether nobody has declared since how pixels of more than 8 bits are to be read."""
        folder = (Path(scanned[row["root"]]) / row["path"]).parent
        return row["problem"] != UNSUPPORTED or declared_white(folder) is None

    return {stamp: rows for stamp, rows in earlier.items() if all(map(stays, rows))}


def find_problems(rows: Sequence[Row], min_size: int, keep_duplicates: bool) -> Counter:
    """Fill in the problems that show only beside other tiles or options.

    Rows must be in the order of the index. Of tiles with the same bytes the first is kept.

    Args:
        min_size: Pixels that the shorter side of a tile must have.
        keep_duplicates: Report them in `reason` only.

    Returns:
        How many tiles have each problem; kept duplicates count too.
    """
    counts: Counter = Counter()
    first: dict[str, Row] = {}
    for row in rows:
        if row["problem"] is None and min(row["width"], row["height"]) < min_size:
            row["problem"] = TOO_SMALL
            row["reason"] = f"{row['width']} x {row['height']} pixels, min_size is {min_size}"
        if row["problem"] is None:
            original = first.setdefault(row["hash"], row)
            if original is not row:
                row["reason"] = f"same bytes as {original['path']} of root {original['root']}"
                row["problem"] = None if keep_duplicates else DUPLICATE
                counts[DUPLICATE] += keep_duplicates
        if row["problem"] is not None:
            counts[row["problem"]] += 1
    return counts


def index_corpora(
    roots: Sequence[Path],
    out: Path,
    layout: str = "folder",
    min_size: int = 1,
    grouping: Grouping | None = None,
    keep_duplicates: bool = False,
    workers: int = 1,
    tiling: Tiling | None = None,
) -> tuple[CorpusIndex, Counter]:
    """Scan the roots and write the index and its table of problems, and a page of slides.

    Every tile is decoded and hashed, but for those of files that an earlier index or the journal
    beside it knows.

    Args:
        workers: Number of threads.
        tiling: How slides are cut.

    Returns:
        The index; and how many tiles have each problem, how many "files" there are and how many of
        them were "known".
    """
    remove_leftovers(out, problems_of(out))
    reader = LAYOUTS[layout] if tiling is None else SlideLayout(tiling)
    stamps, folders = _stamps(roots, reader)
    scanned = [str(root.resolve()) for root in roots]
    options = tiling and asdict(tiling)
    # Line of the journal that stands before the rows of a scan.
    header = {"version": VERSION, "layout": layout, "scanned": scanned}
    header |= {"tiling": options} if options else {}
    earlier = _earlier_rows(header, out)
    rows = _scan(roots, reader, stamps, journal_of(out), header, earlier, workers)
    counts = find_problems(rows, min_size, keep_duplicates)
    bad = (row for row in rows if row["reason"] is not None)  # kept duplicates included
    bad = (r | {"root": roots[r["root"]], "problem": r["problem"] or DUPLICATE} for r in bad)
    columns = [{name: row[name] for name in PROBLEM_COLUMNS} for row in bad]
    write_csv(problems_of(out), columns, PROBLEM_COLUMNS)
    good = [row for row in rows if row["problem"] is None]
    for number in sorted(set(range(len(roots))) - {row["root"] for row in good}):
        raise UserError(f"{roots[number]}: no tile is good; {problems_of(out)} says why")
    for row in good if grouping or tiling else ():
        name = row["file"] if tiling else row["path"]
        row["group"] = grouping(name) if grouping else name
    index = CorpusIndex(out, layout, scanned, folders, index_table(rows), options)
    index.write()
    if tiling:
        slides: dict[Path, list[str]] = {}
        for row in good:
            slides.setdefault(roots[row["root"]] / row["file"], []).append(row["path"])
        write_text(page_of(out), report(slides, tiling))
    journal_of(out).unlink()
    counts |= {"files": len(stamps), "known": sum(stamp in earlier for stamp in stamps)}
    return index, counts
