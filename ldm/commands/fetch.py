"""Fetch published weights into the caches that the other commands look into.

Run it where there is internet; no other command downloads anything. Prints name, path and SHA-256
of each file. What is there already is not fetched again. The caches follow TORCH_HOME and HF_HOME.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ldm.cli import option, parse

log = logging.getLogger("fetch_weights")

USUAL = ("inception", "dinov2", "lpips")
NAMES = ("inception", "lpips", "dinov2", "dinov2_base", "dinov2_large", "dinov2_giant")


@dataclass(frozen=True, kw_only=True)
class Options:
    example: ClassVar = "inception dinov2 lpips"

    names: tuple[str, ...] = option(
        (),
        f"among {', '.join(NAMES)}; if omitted: {', '.join(USUAL)}",
        positional=True,
        metavar="NAME",
    )
    list: bool = option(False, "show what is here, fetch nothing")

    def problems(self) -> Iterator[tuple[str, str]]:
        for name in self.names:
            if name not in NAMES:
                yield "names", f"unknown weights {name}; choose among {', '.join(NAMES)}"


def main(argv: list[str] | None = None) -> None:
    args = parse(Options, argv)

    from ldm.errors import UserError
    from ldm.features.weights import WEIGHTS
    from ldm.files import file_sha256

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
