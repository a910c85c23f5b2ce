"""Draw a few labelled tiles from many: by class, spread over the groups, by seed."""

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from ldm.data.storage import top_folder

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
        name = top_folder(self.file)
        assert name is not None
        return name


def _order(seed: int, name: str) -> bytes:
    """A place in a random order that does not change when others join."""
    return blake2b(f"{seed}:{name}".encode(), digest_size=16).digest()


def wanted_per_class(tiles: Sequence[Labelled], fraction: float) -> dict[str, int]:
    """How many tiles are `fraction` of each class, at least 1."""
    return {
        name: max(1, round(fraction * number))
        for name, number in sorted(Counter(tile.label for tile in tiles).items())
    }


def percent_of(counts: Mapping[str, int], ratio: int) -> dict[str, int]:
    """`ratio` percent of each class, rounded as scripts/distance.py rounds synthetic tiles."""
    return {name: (number * ratio + 50) // 100 for name, number in counts.items()}


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
    for i in sorted(range(len(tiles)), key=lambda i: _order(seed, tiles[i].file)):
        if tiles[i].group in chosen_groups and tiles[i].file not in held:
            queues[tiles[i].label][tiles[i].group].append(i)
    taken = {i for i, tile in enumerate(tiles) if tile.file in held}
    for name, groups in queues.items():
        turn = sorted(groups, key=lambda group: _order(seed, f"{name}:{group}"))
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
    groups = sorted(members.keys() - chosen, key=lambda group: _order(seed, group))
    for group in groups:
        if all(have[name] + number <= wanted[name] for name, number in members[group].items()):
            chosen.add(group)
            have += members[group]
    for group in sorted(set(groups) - chosen, key=lambda g: (members[g].total(), _order(seed, g))):
        if any(have[name] < wanted[name] for name in members[group]):
            chosen.add(group)
            have += members[group]
    return chosen


def count(tiles: Sequence[Labelled], decisions: Sequence[str]) -> dict[str, dict[str, int]]:
    """For each class, its tiles by decision and its groups in the subset."""
    rows: dict[str, dict[str, int]] = {}
    for name in sorted({tile.label for tile in tiles}):
        mine = [(t, d) for t, d in zip(tiles, decisions, strict=True) if t.label == name]
        rows[name] = {kind: sum(d == kind for _, d in mine) for kind in DECISIONS}
        rows[name]["groups"] = len({t.group for t, d in mine if d == SUBSET})
    return rows


def to_csv(tiles: Sequence[Labelled], decisions: Sequence[str]) -> str:
    """A row per tile: class, file, group, decision."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("class", "file", "group", "decision"))
    for tile, decision in zip(tiles, decisions, strict=True):
        writer.writerow((tile.label, tile.file, tile.group, decision))
    return stream.getvalue()
