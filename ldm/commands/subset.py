"""Draw a few-label subset of a labelled folder, class by class and spread over the groups.

The subset is a folder of copies or links with subset.csv, which says of every tile of --data
whether it is in the subset or in the rest (its class, file and group), and subset.json with
settings and counts. With --by_group no patient, slide or region is in both. With --include D/train5
--ratio 100 it is D/train5 and as many real tiles more: the ceiling of an experiment with synthetic
tiles.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ldm.cli import Count, Dir, Seed, contradictions, existing_path, option, parse
from ldm.data.groups import grouping_of
from ldm.errors import UserError
from ldm.files import require_outside
from ldm.settings import GroupOptions

log = logging.getLogger("make_subset")

_amount = partial(option, group="how many tiles")


@dataclass(frozen=True, kw_only=True)
class Options(GroupOptions):
    example: ClassVar = """\
--data D/train --fraction 0.05 --group_csv slides.csv --by_group \\
      --out D/train5"""

    data: Dir = option(..., "labelled tiles, DIR/CLASS/images")
    out: Dir = option(..., "folder to make")
    fraction: Annotated[float, Field(gt=0, le=1)] | None = _amount(
        None, "share of the tiles of each class (published: 0.05)", metavar="SHARE"
    )
    per_class: Count | None = _amount(
        None, "tiles of each class, the same number for all", metavar="N"
    )
    ratio: Count | None = _amount(
        None,
        "with --include: further tiles of each class, in percent of those it has there",
        metavar="PERCENT",
    )
    include: Dir | None = _amount(
        None, "a labelled folder that is in the subset as a whole; only what it lacks is drawn"
    )
    by_group: bool = option(
        False, "no group is both in the subset and in the rest; the remaining tiles are unused"
    )
    seed: Seed = option(0, "seed of the draw")
    link: Literal["copy", "hard", "symbolic"] = option("copy", "copy the files, or link to them")

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if {self.fraction, self.per_class, self.ratio} == {None}:
            yield "fraction", "is missing; give it, or --per_class or --ratio"
        yield from contradictions(self, "fraction", "per_class", "ratio")
        if self.ratio is not None and self.include is None:
            yield "ratio", "is in percent of --include; give that too"


def main(argv: list[str] | None = None) -> None:
    args = parse(Options, argv)
    data = existing_path(args.data, "--data", "tiles")
    out = Path(args.out).expanduser()
    include = None if args.include is None else existing_path(args.include, "--include", "tiles")
    require_outside({"--out": out}, {"--data": data, "--include": include})
    grouping = grouping_of(args)
    if args.by_group and grouping is None:
        raise UserError(
            "--by_group: needs to know the groups; give --group_level, --group_regex or --group_csv"
        )

    from ldm.data.subset import Amount, Subset
    from ldm.report.tables import aligned

    amount = Amount(args.fraction, args.per_class, args.ratio)
    subset = Subset.plan(data, amount, grouping, args.by_group, args.seed, include)
    if not subset.make(out, args.link):
        print(f"{out} is there already, made with the same settings")
        return
    print(aligned(subset.counts(), 7))
    total = len(subset.tiles)
    if include is None:
        print(f"{len(subset.drawn)} of {total} tiles in {out}")
    else:
        print(
            f"{len(subset.included)} tiles of {include} and {len(subset.drawn)} of {data} in {out}"
        )
