"""The copy check: nearest training tiles of synthetic tiles, judged by those of held-out tiles.

Letters: M synthetic tiles, N training tiles, H held-out tiles, all with structure (see
`pixels.LEAST_CONTRAST`): tiles without are background, alike everywhere, and are only counted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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


def check_apart(train: TileFiles, held_out: TileFiles) -> None:
    """UserError where held-out tiles are among the training tiles, byte for byte."""
    names = dict(zip(train.digests, train.names, strict=True))
    shared = [
        f"{name} = {names[digest]}"
        for name, digest in zip(held_out.names, held_out.digests, strict=True)
        if digest in names
    ]
    if shared:
        more = f" and {len(shared) - 3} more" if len(shared) > 3 else ""
        raise UserError(
            f"`holdout` {held_out.root}: {len(shared)} of {len(held_out)} tiles are in `train`"
            f" {train.root} too ({', '.join(shared[:3])}{more}); give tiles that the generator"
            " never saw"
        )


def check_groups_apart(train: TileFiles, held_out: TileFiles, pattern: str) -> None:
    """UserError where a patient, slide or region has tiles in both sets."""
    group = by_regex(pattern)
    ours, theirs = ({group(name) for name in tiles.names} for tiles in (train, held_out))
    shared = sorted(ours & theirs)
    if shared:
        raise UserError(
            f"`holdout` {held_out.root}: {len(shared)} of its {len(theirs)} groups are in `train`"
            f" {train.root} too ({', '.join(shared[:3])}); give tiles of others"
        )


@dataclass(frozen=True)
class Compared:
    """One set of tiles against the training set, in one space.

    Attributes:
        neighbours: Their nearest training tiles.
        own: Distance of each of these to its nearest other training tile, (M,).
        cells: Cell of each, (M,).
    """

    neighbours: Neighbours
    own: np.ndarray
    cells: np.ndarray

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
    """Synthetic and held-out tiles against the training set, in one space.

    Attributes:
        name: "pixels" or "features".
        threshold: Relative distances below it are flagged.
    """

    name: str
    synthetic: Compared
    held_out: Compared
    threshold: float

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


@dataclass(frozen=True)
class Space:
    """How tiles are compared: vectors of length 1 in one representation.

    Attributes:
        name: "pixels" or "features".
        train: (N, D).
        synthetic, held_out: M and H rows of what `orient` takes.
        train_again: Training tiles at some indices, as `orient` takes them.
        orient: From B rows to all their orientations, (B, 8, D).
        unturned: Vectors of the training tiles that do not depend on how a tile is turned, (N, D).
    """

    name: str
    train: Tensor
    synthetic: Tensor
    held_out: Tensor
    train_again: Callable[[Tensor], Tensor]
    orient: Callable[[Tensor], Tensor]
    unturned: Tensor


def pixel_space(synthetic: Tensor, held_out: Tensor, train: Tensor) -> Space:
    """The space of small pictures, see `ldm.features.pixels`."""
    parts = [pixels.oriented_vectors(part.float()).mean(dim=1) for part in train.split(4096)]
    orient = pixels.oriented_vectors
    return Space("pixels", train, synthetic, held_out, train.__getitem__, orient, torch.cat(parts))


def feature_space(
    synthetic: TileFiles,
    held_out: TileFiles,
    train: TileFiles,
    extractor: Extractor,
    batch_size: int,
    cache: Path,
) -> Space:
    """The space of a network's features; orientations are those of the image it sees."""

    def features(tiles: TileFiles, name: str, views: Views = pixels.ORIENTED) -> Tensor:
        file = cache / f"{name}_features.safetensors"
        return cached_features(tiles, extractor, file, batch_size, usable_cores(), views).values

    vectors = features(train, "train", pixels.CENTRE)
    return Space(
        "features",
        vectors,
        features(synthetic, "synthetic"),
        features(held_out, "held_out"),
        lambda index: features(train.select(index.tolist()), "neighbours"),
        lambda rows: rows,
        vectors,
    )


def compare(
    space: Space, groups: Tensor, level: float, device: torch.device | str = "cpu"
) -> Comparison:
    """Nearest training tiles of both sets, and the nearest others of these training tiles.

    Args:
        groups: Group of each training tile, (N,) int64; tiles of one group are not each other's
            neighbours.
        level: Rate of false alarms.
    """
    fewest = min(len(space.synthetic), len(space.held_out))
    cells = training_cells(space.unturned.numpy(), fewest)
    found = [
        nearest(queries, space.train, SCALE_NEIGHBOUR, space.orient, device=device, what=what)
        for queries, what in ((space.synthetic, "synthetic"), (space.held_out, "held out"))
    ]
    chosen = torch.cat([part.index for part in found]).unique()
    near = nearest(
        space.train_again(chosen), space.train, 1, space.orient, groups, groups[chosen], device,
        "their neighbours",
    )  # fmt: skip
    own = torch.empty(len(space.train), dtype=torch.float64)
    own[chosen] = near.distance
    sides = [Compared(part, own[part.index].numpy(), cells[part.index.numpy()]) for part in found]
    return Comparison(space.name, *sides, alarm_threshold(sides[1].relative, level))


@dataclass(frozen=True)
class CopyCheck:
    """What is known of every tile.

    Attributes:
        synthetic, held_out, train: TileFiles with structure, in the order of the comparisons.
        without_structure: TileFiles without, by set.
        comparisons: In one or two spaces, pixels first.
        variations: Sources of synthetic tiles; None where all are made of noise.
        quantile: Rate of false alarms over all spaces.
    """

    synthetic: TileFiles
    held_out: TileFiles
    train: TileFiles
    without_structure: dict[str, TileFiles]
    comparisons: list[Comparison]
    variations: Variations | None
    quantile: float

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
    check_apart(train, held_out)
    if group_regex:
        check_groups_apart(train, held_out, group_regex)
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

    groups = torch.from_numpy(groups)
    comparisons = [compare(pixel_space(**vectors), groups, level, device)]
    if extractor is not None:
        space = feature_space(**kept, extractor=extractor, batch_size=batch_size, cache=cache)
        comparisons.append(compare(space, groups, level, device))
    variations = find_variations(
        kept["synthetic"], train, kept["train"], vectors["synthetic"], vectors["train"]
    )
    return CopyCheck(**kept, without_structure=without, comparisons=comparisons,
                     variations=variations, quantile=quantile)  # fmt: skip


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
