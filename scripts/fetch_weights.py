"""Fetch published weights into the caches that the other commands look into.

    python scripts/fetch_weights.py inception dinov2 lpips
    python scripts/fetch_weights.py --list

Run it where there is internet; no other command downloads anything. Prints name, path and SHA-256
of each file. What is there already is not fetched again. The caches follow TORCH_HOME and HF_HOME.
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import ArgumentParser, run_command

log = logging.getLogger("fetch_weights")

USUAL = ("inception", "dinov2", "lpips")
NAMES = ("inception", "lpips", "dinov2", "dinov2_base", "dinov2_large", "dinov2_giant")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(prog="fetch_weights.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"among {', '.join(NAMES)}; without any: {', '.join(USUAL)}",
    )
    parser.add_argument("--list", action="store_true", help="show what is here, fetch nothing")
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in NAMES]
    if unknown:
        parser.error(f"unknown weights {', '.join(unknown)}: choose among {', '.join(NAMES)}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)

    from ldm.checkpoint import file_sha256
    from ldm.errors import UserError
    from ldm.features.weights import WEIGHTS

    failures = []
    for name in dict.fromkeys(args.names or (NAMES if args.list else USUAL)):
        weights = WEIGHTS[name]
        path = weights.find()
        if args.list and path is None:
            place = "the cache of Hugging Face" if weights.timm_name else weights.place
            print(f"{name}: not here; {weights.purpose}; from {weights.url} to {place}")
            continue
        if path is None:
            try:
                path = weights.fetch()
            except UserError as error:  # the others may lie elsewhere: try them all
                failures.append(str(error))
                continue
        print(f"{name}: {path} sha256 {file_sha256(path)}")
    if failures:
        raise UserError(" | ".join(failures))


if __name__ == "__main__":
    run_command(main)
