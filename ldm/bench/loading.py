"""The data path alone: tiles read, decoded, augmented and put into batches; or cached latents.

Tiles are procedural ones, so that anyone can measure. They are few and lie in the page cache: what
is measured is the work of the processor, not the disk.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import default_collate

from ldm.bench.contest import Runner, Standing, compete
from ldm.bench.measure import TOTAL, ratios, rounded, spread, surroundings
from ldm.bench.networks import Networks
from ldm.data.caching import CachePlan, Encoding, make_cache
from ldm.data.datamodule import DataModuleFromConfig
from ldm.data.procedural import CLASSES, render_tile
from ldm.modules.autoencoder import AutoencoderKL
from ldm.modules.blocks import GROUPS

KINDS = ("png", "jpeg", "webp", "latents")
QUALITY = 90  # of the formats that lose something
PASS = 100_000  # images of a pass, more than are measured
PREFETCH = 2  # batches per worker, as in training


def write_tiles(folder: Path, kind: str, count: int, pixels: int) -> Path:
    """So many tiles as files of one format; returns their folder."""
    root = folder / kind
    root.mkdir(parents=True)
    options = {} if kind == "png" else {"quality": QUALITY}
    for i in range(count):
        tile = render_tile(CLASSES[i % len(CLASSES)], i // len(CLASSES), pixels)
        Image.fromarray(tile).save(root / f"{i:06d}.{kind}", **options)
    return root


@dataclass(frozen=True)
class Source:
    """Where training data comes from.

    Attributes:
        root: Folder of tiles, or of a cache of latents.
        tiles: How many there are.
        pixels: Side of a tile.
        batch_size: Tiles per batch.
        workers: Loader processes.
        augment: Of the tiles.
        is_cache: Whether `root` is a cache.
    """

    root: Path
    tiles: int
    pixels: int
    batch_size: int
    workers: int
    augment: tuple[str, ...] = ("d4",)
    is_cache: bool = False

    def module(self) -> DataModuleFromConfig:
        """The data module that a training would have."""
        common = {"num_workers": self.workers, "prefetch": PREFETCH, "val_fraction": 0.0}
        if self.is_cache:
            return DataModuleFromConfig(self.batch_size, latents=str(self.root), **common)
        # By its weight a few tiles make a pass of many.
        corpus = {"root": str(self.root), "weight": max(1.0, PASS / self.tiles)}
        node = {
            "target": "ldm.data.corpora.Corpora",
            "params": {
                "corpora": {"bench": corpus},
                "size": self.pixels,
                "augment": list(self.augment),
            },
        }
        return DataModuleFromConfig(self.batch_size, node, **common)

    def batches(self) -> Iterator[dict[str, Any]]:
        """Batches without end."""
        loader = self.module().train_dataloader()
        while True:
            yield from loader


def write_cache(root: Path, tiles: Source, networks: Networks) -> Path:
    """A cache of latents of the shape of `networks`, of tiles that are there.

    The time to read latents does not depend on what they say, so the autoencoder is a small one.
    """
    ddconfig = {
        "ch": GROUPS,
        "ch_mult": [1] * len(networks.ddconfig["ch_mult"]),
        "num_res_blocks": 1,
        "z_channels": networks.embed_dim,
        "resolution": networks.pixels,
    }
    torch.manual_seed(0)
    net = AutoencoderKL(ddconfig, networks.embed_dim).requires_grad_(False)
    plan = CachePlan(root, net, tiles.module(), encoding=Encoding(batch_size=8, workers=0))
    make_cache(plan, torch.device("cpu"))
    return root


def make_sources(
    networks: Networks,
    folder: Path,
    kinds: Sequence[str],
    batch_size: int,
    tiles: int,
    augment: Sequence[str] = ("d4",),
    workers: int = 0,
) -> dict[str, Source]:
    """Write tiles of these kinds below `folder`; latents are those of PNG files."""
    sources = {}
    for kind in sorted(set(kinds), key=KINDS.index):
        options = {"pixels": networks.pixels, "batch_size": batch_size, "workers": workers}
        files = "png" if kind == "latents" else kind
        root = folder / files
        if not root.exists():
            write_tiles(folder, files, tiles, networks.pixels)
        source = Source(root, tiles, augment=tuple(augment), **options)
        if kind == "latents":
            cache = write_cache(folder / kind, source, networks)
            source = Source(cache, tiles, augment=(), is_cache=True, **options)
        sources[kind] = source
    return sources


@dataclass(frozen=True)
class Reading:
    """A contestant that takes batches from a source."""

    source: Source
    batches: int
    device: torch.device = torch.device("cpu")

    def load(self) -> None:
        """Nothing: the libraries are those of this module."""

    def build(self) -> Runner:
        return _Reader(self)


class _Reader:
    def __init__(self, reading: Reading):
        self.facts: dict[str, Any] = {}
        self.reading = reading
        self._stream = reading.source.batches()

    def run(self) -> dict[str, float]:
        # What the workers had prepared while others were measured is no speed.
        for _ in range(self.reading.source.workers * PREFETCH + 1):
            next(self._stream)
        start = time.perf_counter()
        for _ in range(self.reading.batches):
            next(self._stream)
        return {TOTAL: time.perf_counter() - start}


def milliseconds_by_part(source: Source, images: int, repeats: int) -> dict[str, float]:
    """Processor time per image, ms: read (and decode), the rest of an item, put into a batch."""
    tiles = source.module().train_dataset
    turns: dict[str, list[float]] = {}
    for _ in range(repeats):
        start = time.process_time()
        if not source.is_cache:
            for i in range(images):
                tiles.read(i % source.tiles)
        decoded = time.process_time()
        items = [tiles[i % source.tiles] for i in range(images)]
        made = time.process_time()
        for first in range(0, images, source.batch_size):
            default_collate(items[first : first + source.batch_size])
        end = time.process_time()
        decode = decoded - start
        parts = {"decode": decode, "transform": made - decoded - decode, "collate": end - made}
        if source.is_cache:
            parts = {"read": made - decoded, "collate": end - made}
        for name, value in parts.items():
            turns.setdefault(name, []).append(1e3 * value / images)
    return {name: spread(values)["median"] for name, values in turns.items()}


def bench_data(
    networks: Networks,
    folder: Path,
    kinds: Sequence[str],
    workers: Sequence[int],
    batch_size: int,
    batches: int,
    repeats: int,
    tiles: int = 64,
    augment: Sequence[str] = ("d4",),
    needed: float | None = None,
) -> dict[str, Any]:
    """Images per second that each kind of file gives, for each number of loader processes.

    Kinds take turns; what their processes had prepared meanwhile is thrown away.

    Args:
        folder: Scratch, empty.
        batches: Per turn.
        needed: Images per second that training would take, to compare with.
    """
    sources = make_sources(networks, folder, kinds, batch_size, tiles, augment)
    per_turn = batch_size * batches
    standings: dict[str, dict[str, Standing]] = {}
    for number in workers:
        contestants = {
            kind: Reading(replace(source, workers=number), batches)
            for kind, source in sources.items()
        }
        standings[str(number)] = compete(contestants, repeats, "none")
    rates = {
        kind: {number: standing[kind].rates(per_turn) for number, standing in standings.items()}
        for kind in kinds
    }
    result: dict[str, Any] = {
        "bench": "data",
        "size": networks.size,
        "image": [networks.pixels] * 2,
        "latent": list(networks.latent),
        "batch_size": batch_size,
        "augment": list(augment),
        "repeats": repeats,
        "bytes_per_tile": {
            kind: round(sum(f.stat().st_size for f in source.root.iterdir()) / tiles)
            for kind, source in sources.items()
            if not source.is_cache
        },
        "cpu_ms_per_image": {
            kind: milliseconds_by_part(source, per_turn, repeats)
            for kind, source in sources.items()
        },
        "images_per_s": {
            kind: {number: spread(values) for number, values in by_workers.items()}
            for kind, by_workers in rates.items()
        },
    }
    if "latents" in rates and len(rates) > 1:
        result["latents_over"] = {
            kind: {
                number: spread(ratios(rates["latents"][number], rates[kind][number]))
                for number in rates[kind]
            }
            for kind in kinds
            if kind != "latents"
        }
    if needed is not None:
        result["needed_images_per_s"] = needed
        result["share_of_needed"] = {
            kind: rounded(max(spread(v)["median"] for v in by_workers.values()) / needed)
            for kind, by_workers in rates.items()
        }
        # As if processes did not hinder one another.
        result["cores_needed"] = {
            kind: rounded(needed * sum(parts.values()) / 1e3)
            for kind, parts in result["cpu_ms_per_image"].items()
        }
    return {**result, **surroundings()}
