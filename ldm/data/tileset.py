"""A folder of procedural tiles in the layout of every training folder: SPLIT/CLASS/image.

File names carry the slide, `slide00003_000017.png`, so tiles can be grouped by it. No slide is in
two splits, and a split holds the same tiles whatever the size of the others.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from ldm.data.procedural import CLASSES, TILES_PER_SLIDE, VERSION, render_tile, slide_of
from ldm.errors import UserError
from ldm.files import remove_leftovers, write_bytes, write_png
from ldm.run import MadeFolder

RECORD = "tiles.json"
# Index of the first tile of each split, per class.
FIRST = {"train": 0, "val": 50_000, "test": 100_000}
MOST = 50_000
POOL_FROM = 2000  # tiles; for fewer, starting processes (each imports torch) takes longer
assert all(first % TILES_PER_SLIDE == 0 for first in FIRST.values())  # no slide in two splits


def tile_name(index: int) -> str:
    return f"slide{slide_of(index):05d}_{index:06d}.png"


def few_labels(train: int, train5: int) -> list[int]:
    """Which of the training tiles make the few-label subset: evenly spread over the slides."""
    return [i * train // train5 for i in range(train5)]


def _render(out: Path, size: int, seed: int, task: tuple[str, str, int]) -> None:
    split, name, index = task
    write_png(out / split / name / tile_name(index), render_tile(name, index, size, seed))


def _check(counts: Mapping[str, int], train5: int, classes: Sequence[str]) -> None:
    unknown = [name for name in classes if name not in CLASSES]
    if unknown or not classes or len(set(classes)) != len(classes):
        raise UserError(f"classes={' '.join(classes)}: give distinct names of {' '.join(CLASSES)}")
    for split, count in counts.items():
        least = 1 if split == "train" else 0
        if not least <= count <= MOST:
            raise UserError(f"{split}={count} must be in [{least}, {MOST}]")
    if not 0 <= train5 <= counts["train"]:
        raise UserError(f"train5={train5} must be in [0, {counts['train']}] (train)")


def make_tileset(
    out: str | os.PathLike,
    size: int = 64,
    train: int = 60,
    train5: int = 6,
    val: int = 20,
    test: int = 20,
    seed: int = 0,
    classes: Sequence[str] = CLASSES,
    workers: int = 1,
) -> int:
    """Write OUT/{train,train5,val,test}/CLASS/*.png; what is there already is kept.

    Args:
        out: New or empty folder, or one that an interrupted call with the same values left.
        size: Pixels.
        train, val, test: Tiles per class; a split of 0 tiles has no folder.
        train5: Number of training tiles per class that are copied to the few-label subset.
        workers: Processes.

    Returns:
        How many files were written: 0 when all were there.

    Raises:
        UserError: A value is not allowed, or the folder has other contents.
    """
    out = Path(out).expanduser()
    counts = {"train": train, "val": val, "test": test}
    _check(counts, train5, classes)
    settings = {"version": VERSION, "size": size, **counts, "train5": train5}
    made = MadeFolder(out, {**settings, "seed": seed, "classes": list(classes)}, RECORD, key=None)
    made.exists()
    made.begin()

    remove_leftovers(*(out / split / name for split in (*counts, "train5") for name in classes))
    tasks = [
        (split, name, index)
        for split, count in counts.items()
        for name in classes
        for index in range(FIRST[split], FIRST[split] + count)
        if not (out / split / name / tile_name(index)).exists()
    ]
    render = partial(_render, out, size, seed)
    if workers > 1 and len(tasks) >= POOL_FROM:
        with ProcessPoolExecutor(workers) as pool:
            list(pool.map(render, tasks, chunksize=64))
    else:
        for task in tasks:
            render(task)

    copies = 0
    for name in classes:
        for i in few_labels(train, train5):
            target = out / "train5" / name / tile_name(i)
            if not target.exists():
                write_bytes(target, (out / "train" / name / tile_name(i)).read_bytes())
                copies += 1
    return len(tasks) + copies
