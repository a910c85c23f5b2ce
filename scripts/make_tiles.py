"""Write procedural H&E-like tiles: OUT/{train,train5,val,test}/CLASS/slide00003_000017.png.

Run again after an interruption to go on; a complete folder is left as it is.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import ArgumentParser, number, run_command


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="make_tiles.py", description=__doc__)
    parser.add_argument(
        "--out", required=True, help="folder to make; new, empty or one to go on in"
    )
    parser.add_argument("--size", type=number(int, 32, 512), default=64, help="pixels")
    parser.add_argument("--train", type=number(int, 1), default=60, help="tiles per class")
    parser.add_argument(
        "--train5", type=number(int, 0), default=6, help="how many of them are copied to train5"
    )
    parser.add_argument("--val", type=number(int, 0), default=20, help="tiles per class")
    parser.add_argument("--test", type=number(int, 0), default=20, help="tiles per class")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="another seed, other tiles")
    parser.add_argument("--classes", nargs="+", metavar="CLASS", help="some of the nine classes")
    parser.add_argument(
        "--workers", type=number(int, 1), default=os.cpu_count() or 1, help="processes"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)

    from ldm.data.procedural import CLASSES
    from ldm.data.tileset import make_tileset

    settings = vars(args)
    settings["classes"] = args.classes or CLASSES
    written = make_tileset(**settings)
    splits = " ".join(f"{s} {settings[s]}" for s in ("train", "train5", "val", "test"))
    print(f"{args.out}: {written} files written ({splits} per class, {len(args.classes)} classes)")


if __name__ == "__main__":
    run_command(main)
