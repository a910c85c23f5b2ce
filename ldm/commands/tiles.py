"""Write procedural H&E-like tiles: OUT/{train,train5,val,test}/CLASS/slide00003_000017.png.

Run again after an interruption to go on; a complete folder is left as it is.
"""

import os
from dataclasses import asdict, dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from ldm.cli import Count, Dir, Seed, Threads, Whole, option, parse


@dataclass(frozen=True, kw_only=True)
class Options:
    example: ClassVar = "--out tiles --size 64 --train 60 --train5 6"

    out: Dir = option(..., "folder to make; new, empty or one to go on in")
    size: Annotated[int, Field(ge=32, le=512)] = option(64, "pixels")
    train: Count = option(60, "tiles per class")
    train5: Whole = option(6, "how many of them are copied to train5")
    val: Whole = option(20, "tiles per class")
    test: Whole = option(20, "tiles per class")
    seed: Seed = option(0, "seed of the tiles")
    classes: tuple[str, ...] | None = option(
        None, "some of the nine classes; if omitted, all", metavar="CLASS"
    )
    workers: Threads = option(lambda: os.cpu_count() or 1, "processes")


def main(argv: list[str] | None = None) -> None:
    args = parse(Options, argv)

    from ldm.data.procedural import CLASSES
    from ldm.data.tileset import make_tileset

    settings = {**asdict(args), "classes": args.classes or CLASSES}
    written = make_tileset(**settings)
    splits = " ".join(f"{s} {settings[s]}" for s in ("train", "train5", "val", "test"))
    count = len(settings["classes"])
    print(f"{args.out}: {written} files written ({splits} per class, {count} classes)")
