"""Draw a few labelled tiles from many: by class, spread over the groups, by seed."""

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ldm.data.arrays import is_array
from ldm.data.folders import build_folder
from ldm.data.groups import Grouping, random_order
from ldm.data.images import read_tile
from ldm.data.storage import top_folder
from ldm.data.tile_files import TileFiles, pixels_sha256
from ldm.errors import UserError
from ldm.files import csv_text, digest_of_text, file_sha256
from ldm.run import MadeFolder, provenance

log = logging.getLogger(__name__)

LIST, RECORD = "subset.csv", "subset.json"
SUBSET, REST, UNUSED = "subset", "rest", "unused"
DECISIONS = (SUBSET, REST, UNUSED)


@dataclass(frozen=True)
class Labelled:
    """A tile of a labelled folder."""

    file: str  # below the folder, with `/`; the class is the first part
    group: str

    @property
    def label(self) -> str:
        return self.file.split("/", 1)[0]


def draw(
    tiles: Sequence[Labelled],
    wanted: Mapping[str, int],
    seed: int,
    by_group: bool,
    held: Collection[str] = (),
) -> list[str]:
    """What becomes of each tile: `SUBSET`, `REST` or `UNUSED`.

    Within a class, tiles are taken from its groups in turn, so that the subset shows as many
    patients, slides or regions as it can. With `by_group`, groups are first divided: as many as are
    needed for the wanted tiles are set apart, only tiles of those are drawn, and what is left of
    them is unused. So no group is in the subset and in the rest.

    Args:
        tiles: All tiles.
        wanted: Tiles of each class, beside those that are held; a class that has fewer gives what
            it has.
        seed: Another seed, other tiles. The same tiles for the same seed, in any order of `tiles`.
        held: Files that are in the subset already. Groups take their turns as if these had been
            drawn first.

    Returns:
        A decision per tile.
    """
    held = set(held)
    already = Counter((tile.label, tile.group) for tile in tiles if tile.file in held)
    free = [tile for tile in tiles if tile.file not in held]
    if by_group:
        chosen_groups = _divide(free, wanted, seed, {group for _, group in already})
    else:
        chosen_groups = {tile.group for tile in tiles}
    queues: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i in sorted(range(len(tiles)), key=lambda i: random_order(seed, tiles[i].file)):
        if tiles[i].group in chosen_groups and tiles[i].file not in held:
            queues[tiles[i].label][tiles[i].group].append(i)
    taken = {i for i, tile in enumerate(tiles) if tile.file in held}
    for name, groups in queues.items():
        turn = sorted(groups, key=lambda group: random_order(seed, f"{name}:{group}"))
        # (round, turn, tile): a group that has given tiles already waits for the others.
        spread = sorted(
            (already[name, group] + r, place, i)
            for place, group in enumerate(turn)
            for r, i in enumerate(groups[group])
        )
        taken.update(i for _, _, i in spread[: wanted[name]])
    left = UNUSED if by_group else REST
    return [
        SUBSET if i in taken else left if tile.group in chosen_groups else REST
        for i, tile in enumerate(tiles)
    ]


def _divide(
    tiles: Sequence[Labelled], wanted: Mapping[str, int], seed: int, begun: Collection[str]
) -> set[str]:
    """Groups that hold the `wanted` tiles of every class, and few more; `begun` are among them.

    First, in a random order, those that no class has too many tiles of; then the smallest of those
    that a class still needs.
    """
    members: dict[str, Counter] = defaultdict(Counter)
    for tile in tiles:
        members[tile.group][tile.label] += 1
    have: Counter = Counter()
    chosen = set(begun)
    for group in chosen & members.keys():
        have += members[group]
    groups = sorted(members.keys() - chosen, key=lambda group: random_order(seed, group))
    for group in groups:
        if all(have[name] + number <= wanted[name] for name, number in members[group].items()):
            chosen.add(group)
            have += members[group]
    # A stable sort: groups of one size stay in the random order.
    for group in sorted(groups, key=lambda group: members[group].total()):
        if group not in chosen and any(have[name] < wanted[name] for name in members[group]):
            chosen.add(group)
            have += members[group]
    return chosen


@dataclass(frozen=True)
class Amount:
    """How many tiles of each class a subset has; one of the three is given."""

    fraction: float | None = None  # share of the tiles of each class
    per_class: int | None = None  # the same number of each class
    ratio: int | None = None  # further tiles, in percent of those that are included

    def wanted(self, tiles: Sequence[Labelled], included: Mapping[str, int]) -> dict[str, int]:
        """Tiles to draw of each class, beside those that are included."""
        if self.ratio is not None:
            # Rounded as scripts/distance.py rounds synthetic tiles.
            return {name: (n * self.ratio + 50) // 100 for name, n in included.items()}
        there = sorted(Counter(tile.label for tile in tiles).items())
        total = {
            name: self.per_class or max(1, round(self.fraction * number)) for name, number in there
        }
        return {name: max(0, number - included.get(name, 0)) for name, number in total.items()}


@dataclass(frozen=True)
class Subset:
    """A drawn subset of a labelled folder, to be made as a folder of its own."""

    data: Path  # the labelled folder
    tiles: list[Labelled]  # all its tiles
    decisions: list[str]  # what becomes of each, see `draw`
    wanted: dict[str, int]  # tiles of each class that should be drawn
    grouped: bool  # whether the groups of the tiles are known
    by_group: bool  # whether no group is both in the subset and in the rest
    seed: int
    included: TileFiles | None  # tiles of another folder that are all in the subset
    held: set[str]  # those of `tiles` whose contents are among the included ones

    @classmethod
    def plan(
        cls,
        data: Path,
        amount: Amount,
        grouping: Grouping | None = None,
        by_group: bool = False,
        seed: int = 0,
        include: Path | None = None,
    ) -> "Subset":
        """Draw a subset, without making it."""
        files = TileFiles.below(data)
        tiles = [Labelled(n, n if grouping is None else grouping(n)) for n in files.names]
        included, held = None, set()
        if include is not None:
            included = TileFiles.below(include, classes=files.classes)
            held = _same_contents(files, included)
            if by_group and len(held) < len(included):
                log.warning(
                    "%d of %d images of %s are not in %s: which groups they are of is unknown",
                    *(len(included) - len(held), len(included), include, data),
                )
        wanted = amount.wanted(tiles, {} if included is None else included.counts)
        decisions = draw(tiles, wanted, seed, by_group, held)
        return cls(
            data, tiles, decisions, wanted, grouping is not None, by_group, seed, included, held
        )

    @cached_property
    def drawn(self) -> list[str]:
        """Files of the subset that were not included already."""
        pairs = zip(self.tiles, self.decisions, strict=True)
        return [t.file for t, d in pairs if d == SUBSET and t.file not in self.held]

    @cached_property
    def table(self) -> str:
        """What becomes of each tile, as CSV: class, file, group, decision."""
        rows = [
            {"class": tile.label, "file": tile.file, "group": tile.group, "decision": decision}
            for tile, decision in zip(self.tiles, self.decisions, strict=True)
        ]
        return csv_text(rows, ("class", "file", "group", "decision"))

    def settings(self, link: str) -> dict[str, Any]:
        """What decides the content of the folder."""
        settings: dict[str, Any] = {
            "wanted": self.wanted,
            "by_group": self.by_group,
            "seed": self.seed,
            "link": link,
            "tiles": digest_of_text([self.table]),
        }
        if self.included is not None:
            settings["include"] = self.included.inclusion
        return settings

    def counts(self) -> dict[str, dict[str, int]]:
        """For each class its tiles by decision and, where known, its groups in the subset."""
        pairs = list(zip(self.tiles, self.decisions, strict=True))
        number = Counter((tile.label, decision) for tile, decision in pairs)
        used = {(tile.label, tile.group) for tile, decision in pairs if decision == SUBSET}
        groups = Counter(name for name, _ in used)
        return {
            name: {decision: number[name, decision] for decision in DECISIONS}
            | ({"groups": groups[name]} if self.grouped else {})
            for name in sorted({tile.label for tile in self.tiles})
        }

    def make(self, out: Path, link: str) -> bool:
        """Make the folder of the subset.

        Args:
            link: See `ldm.data.folders.build_folder`.

        Returns:
            False where it was there already.

        Raises:
            UserError: There is something else at `out`, or two files would have one name.
        """
        made = MadeFolder(out, self.settings(link), RECORD)
        if made.exists():
            return False
        drawn = Counter(top_folder(file) for file in self.drawn)
        included = {} if self.included is None else self.included.counts
        record = {"settings": dict(made.settings), "counts": self.counts()}
        record |= {"included": included, "drawn": dict(drawn), **provenance()}
        notes = {LIST: self.table, RECORD: json.dumps(record, indent=2) + "\n"}
        build_folder(out, self._sources(), notes, link)
        short = [
            f"{name} {drawn[name]} of {n}" for name, n in self.wanted.items() if drawn[name] < n
        ]
        if short:
            log.warning("fewer tiles than wanted: %s", ", ".join(short))
        if REST not in self.decisions:
            log.warning("no tile is left for the rest; ask for fewer tiles to have one")
        return True

    def _sources(self) -> dict[str, Path]:
        """Where each file of the folder comes from; a drawn one makes way for an included one."""
        there = {}
        if self.included is not None:
            there = dict(zip(self.included.names, self.included.paths, strict=True))
        found: dict[str, Path] = {}
        for file in self.drawn:
            folder, _, name = file.rpartition("/")
            target = f"{folder}/more_{name}" if file in there else file
            if target in there or target in found:
                raise UserError(
                    f"include: its files {file} and {target} are other images than {file} of"
                    f" {self.data}; rename them"
                )
            found[target] = self.data / file
        return found | there


def _same_contents(files: TileFiles, others: TileFiles) -> set[str]:
    """Names of those files whose contents are among the others, whatever these are called."""
    if is_array(files.root) or is_array(others.root):  # whose rows may be files in the other
        known = {pixels_sha256(read_tile(path)) for path in others.paths}
        same = (pixels_sha256(read_tile(path)) in known for path in files.paths)
        return {name for name, found in zip(files.names, same, strict=True) if found}
    sizes, digests = {path.stat().st_size for path in others.paths}, set(others.digests)
    # Hashing is slow on large sets, and only a file of one of these sizes can be the same.
    return {
        name
        for name, path in zip(files.names, files.paths, strict=True)
        if path.stat().st_size in sizes and file_sha256(path) in digests
    }
