"""The copy check: nearest training tiles of synthetic tiles, judged by those of held-out tiles.

Letters: M synthetic tiles, N training tiles, H held-out tiles, all with structure (see
`pixels.LEAST_CONTRAST`): tiles without are background, alike everywhere, and are only counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.copies.search import Neighbours, nearest
from ldm.copies.statistics import (
    CopyingTest,
    alarm_threshold,
    authenticity,
    copying_test,
    fewest_held_out,
    training_cells,
)
from ldm.copies.variations import Variations, find_variations
from ldm.data.groups import by_regex
from ldm.data.tile_files import TileFiles
from ldm.devices import usable_cores
from ldm.errors import UserError
from ldm.features import pixels
from ldm.features.extractor import Extractor, Views
from ldm.features.sets import cached_features
from ldm.features.source import PIXELS, FeatureSource

SCALE_NEIGHBOUR = 10  # whose distance is the unit of relative distances
FEWEST_TRAIN = 20  # tiles with structure
PER_STEP = 64  # small pictures that are made together


def check_apart(train: TileFiles, held_out: TileFiles, pattern: str | None) -> None:
    """UserError where held-out tiles, or their patients or slides, are in the training set too."""
    known = dict(zip(train.digests, train.names, strict=True))
    pairs = zip(held_out.names, held_out.digests, strict=True)
    same = [f"{name} = {known[digest]}" for name, digest in pairs if digest in known]
    shared = {f"{len(held_out)} tiles": same}
    if pattern:
        group = by_regex(pattern)
        ours, theirs = ({group(name) for name in tiles.names} for tiles in (train, held_out))
        shared[f"{len(theirs)} groups"] = sorted(ours & theirs)
    for what, found in shared.items():
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise UserError(
                f"`holdout` {held_out.root}: {len(found)} of its {what} are in `train`"
                f" {train.root} too ({', '.join(found[:3])}{more}); give tiles that the generator"
                " never saw"
            )


@dataclass(frozen=True)
class Compared:
    """One set of tiles against the training set, in one space."""

    neighbours: Neighbours  # their nearest training tiles
    own: np.ndarray  # distance of each of these to its nearest other training tile, (M,)
    cells: np.ndarray  # cell of each, (M,)

    @property
    def distance(self) -> np.ndarray:
        return self.neighbours.distance.numpy()

    @property
    def relative(self) -> np.ndarray:
        return self.neighbours.relative.numpy()

    def authenticity(self, members: np.ndarray | slice = slice(None)) -> float:
        return authenticity(self.distance[members], self.own[members])


@dataclass(frozen=True)
class Comparison:
    """Synthetic and held-out tiles against the training set, in one space."""

    name: str  # "pixels" or "features"
    synthetic: Compared
    held_out: Compared
    threshold: float  # relative distances below it are flagged

    @property
    def suspicion(self) -> np.ndarray:
        """Relative distances of synthetic tiles over the threshold, (M,): flagged below 1."""
        return self.synthetic.relative / self.threshold

    def copying(self, members: np.ndarray) -> CopyingTest:
        """C_T of some synthetic tiles against all held-out ones."""
        ours, theirs = self.synthetic, self.held_out
        return copying_test(
            ours.distance[members], ours.cells[members], theirs.distance, theirs.cells
        )


def compare(
    name: str,
    train: Tensor,
    queries: Sequence[Tensor],
    orient: Callable[[Tensor], Tensor],
    train_again: Callable[[Tensor], Tensor],
    unturned: Tensor,
    groups: Tensor,
    level: float,
    device: torch.device | str = "cpu",
) -> Comparison:
    """Nearest training tiles of both sets, and the nearest others of these training tiles.

    Args:
        name: "pixels" or "features".
        train: (N, D), of length 1.
        queries: Synthetic and held-out tiles, M and H rows of what `orient` takes.
        orient: From B rows to all their orientations, (B, 8, D).
        train_again: Training tiles at some indices, as `orient` takes them.
        unturned: Vectors of the training tiles that do not depend on how a tile is turned, (N, D).
        groups: Group of each training tile, (N,) int64; tiles of one group are not each other's
            neighbours.
        level: Rate of false alarms.
    """
    cells = training_cells(unturned.numpy(), min(map(len, queries)))
    found = [
        nearest(rows, train, SCALE_NEIGHBOUR, orient, device=device, what=what)
        for rows, what in zip(queries, ("synthetic", "held out"), strict=True)
    ]
    chosen = torch.cat([part.index for part in found]).unique()
    again, what = train_again(chosen), "their neighbours"
    near = nearest(again, train, 1, orient, groups, groups[chosen], device, what)
    own = torch.empty(len(train), dtype=torch.float64)
    own[chosen] = near.distance
    sides = [Compared(part, own[part.index].numpy(), cells[part.index.numpy()]) for part in found]
    return Comparison(name, *sides, alarm_threshold(sides[1].relative, level))


@dataclass(frozen=True)
class CopyCheck:
    """What is known of every tile."""

    # Tiles with structure, in the order of the comparisons.
    synthetic: TileFiles
    held_out: TileFiles
    train: TileFiles
    without_structure: dict[str, TileFiles]  # those without, by set
    comparisons: list[Comparison]  # in one or two spaces, pixels first
    variations: Variations | None  # sources of synthetic tiles; None where all are made of noise
    quantile: float  # rate of false alarms over all spaces

    @property
    def suspicion(self) -> np.ndarray:
        """The least of the spaces, (M,): flagged below 1."""
        return np.min([c.suspicion for c in self.comparisons], axis=0)

    @property
    def flagged(self) -> np.ndarray:
        """(M,) bool."""
        return self.suspicion < 1

    def closest(self, i: int) -> Comparison:
        """The space in which synthetic tile i is the most suspicious."""
        return min(self.comparisons, key=lambda c: c.suspicion[i])

    def reason(self, i: int) -> str:
        """Why synthetic tile i is flagged; empty where it is not."""
        return "; ".join(
            f"{c.name}: relative distance {c.synthetic.relative[i]:.3f} < {c.threshold:.3f}"
            for c in self.comparisons
            if c.suspicion[i] < 1
        )

    def reasons(self) -> dict[str, str]:
        """Why, by name, of the flagged tiles."""
        return {self.synthetic.names[i]: self.reason(i) for i in np.flatnonzero(self.flagged)}


def check_copies(
    synthetic: TileFiles,
    held_out: TileFiles,
    train: TileFiles,
    cache: Path,
    extractor: Extractor | None = None,
    quantile: float = 0.01,
    group_regex: str | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> CopyCheck:
    """Compare in pixels and, given a network, in features.

    Args:
        cache: Folder for vectors, which a second call with the same files reads.
        quantile: Share of new tiles that may be flagged by mistake; the spaces share it.
        group_regex: Its first group is the patient or slide in a tile's path. No group may be in
            both `held_out` and `train`, and training tiles of one group are not compared with one
            another.
        batch_size: Images per pass of the network.
    """
    check_apart(train, held_out, group_regex)
    kept, vectors, without = {}, {}, {}
    sets = {"synthetic": synthetic, "held_out": held_out, "train": train.distinct()}
    pictures = FeatureSource(PIXELS).open("cpu")
    for name, tiles in sets.items():
        file = cache / f"{name}_pixels.safetensors"
        found = cached_features(tiles, pictures, file, PER_STEP, usable_cores(), raw=True)
        structured = found.others[pixels.CONTRAST] >= pixels.LEAST_CONTRAST
        index = structured.nonzero().flatten()
        kept[name], vectors[name] = tiles.select(index.tolist()), found.values[index]
        without[name] = tiles.select((~structured).nonzero().flatten().tolist())
    names = kept["train"].names
    if group_regex:
        names = list(map(by_regex(group_regex), names))
    _, groups = np.unique(names, return_inverse=True)
    level = quantile if extractor is None else quantile / 2
    check_counts(kept, len(set(groups)), level)

    rest = {"groups": torch.from_numpy(groups), "level": level, "device": device}
    comparisons = [_in_pixels(**vectors, **rest)]
    if extractor is not None:
        comparisons.append(_in_features(kept, extractor, batch_size, cache, **rest))
    variations = find_variations(
        kept["synthetic"], train, kept["train"], vectors["synthetic"], vectors["train"]
    )
    return CopyCheck(**kept, without_structure=without, comparisons=comparisons,
                     variations=variations, quantile=quantile)  # fmt: skip


def _in_pixels(train: Tensor, synthetic: Tensor, held_out: Tensor, **rest: Any) -> Comparison:
    """The comparison of small pictures, see `ldm.features.pixels`."""
    orient, queries = pixels.oriented_vectors, (synthetic, held_out)
    unturned = torch.cat([orient(part.float()).mean(dim=1) for part in train.split(4096)])
    return compare("pixels", train, queries, orient, train.__getitem__, unturned, **rest)


def _in_features(
    kept: dict[str, TileFiles], extractor: Extractor, batch_size: int, cache: Path, **rest: Any
) -> Comparison:
    """The comparison of a network's features; orientations are those of the image it sees."""

    def features(tiles: TileFiles, name: str, views: Views = pixels.ORIENTED) -> Tensor:
        file = cache / f"{name}_features.safetensors"
        return cached_features(tiles, extractor, file, batch_size, usable_cores(), views).values

    def train_again(index: Tensor) -> Tensor:
        return features(kept["train"].select(index.tolist()), "neighbours")

    train = features(kept["train"], "train", pixels.CENTRE)
    queries = [features(kept[name], name) for name in ("synthetic", "held_out")]
    return compare("features", train, queries, lambda rows: rows, train_again, train, **rest)


def check_counts(kept: dict[str, TileFiles], groups: int, level: float) -> None:
    """UserError where tiles with structure are too few to say anything."""
    if len(kept["train"]) < FEWEST_TRAIN or groups < 2:
        raise UserError(
            f"`train` {kept['train'].root}: {len(kept['train'])} tiles with structure in {groups}"
            f" groups; at least {FEWEST_TRAIN} in 2 are needed"
        )
    if not len(kept["synthetic"]):
        raise UserError(
            f"`synthetic` {kept['synthetic'].root}: no tile has any structure (densities deviate"
            f" by less than {pixels.LEAST_CONTRAST}); look at the images"
        )
    needed = fewest_held_out(level)
    if len(kept["held_out"]) < needed:
        raise UserError(
            f"`holdout` {kept['held_out'].root}: {len(kept['held_out'])} tiles with structure,"
            f" {needed} are needed for so low a rate of false alarms; give more tiles or raise"
            " `quantile`"
        )
