"""Measure how fast training tiles are read, decoded, augmented and put into batches.

Files, tar shards and cached latents are compared. Tiles are procedural, so that anyone can measure.
They are few and lie in the page cache: the work of the processor is measured, not the disk.
"""

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from benchmarks.common import BenchmarkOptions, print_result, rounded, spread
from ldm.cli import Count, Positive, Workers, option, parse, run_command

if TYPE_CHECKING:
    from benchmarks.networks import Networks
    from ldm.data.datamodule import DataModuleFromConfig

KINDS = ("png", "jpeg", "webp", "shards", "latents")
QUALITY = 90  # of the formats that lose something
PASS = 100_000  # images of a pass, more than are measured
PREFETCH = 2  # batches per worker, as in training


@dataclass(frozen=True, kw_only=True)
class Options(BenchmarkOptions):
    program: ClassVar = "python -m benchmarks.loading"
    example: ClassVar = "--workers 0 8 16 --needed 300"

    size: Literal["demo", "small", "paper"] = option(
        "paper", "size of the tiles (paper: 256 pixels)"
    )
    kinds: tuple[Literal["png", "jpeg", "webp", "shards", "latents"], ...] = option(
        KINDS, "kinds of files: png, jpeg, webp, shards, latents", metavar="KIND"
    )
    workers: tuple[Workers, ...] = option(
        (0, 1, 2), "loader processes, one number after the other", metavar="N"
    )
    batch_size: Count = option(32, "images of a batch")
    tiles: Count = option(64, "files that are read again and again")
    needed: Positive | None = option(None, "images per second that training would take")


@dataclass(frozen=True)
class Source:
    """Where training data comes from."""

    root: Path  # folder of tiles, of tar shards or of cached latents
    kind: str  # one of `KINDS`
    tiles: int  # how many there are
    pixels: int  # side of a tile
    batch_size: int
    workers: int = 0  # loader processes

    def module(self) -> "DataModuleFromConfig":
        """The data module that a training would have."""
        from ldm.data.datamodule import DataModuleFromConfig

        common = {"num_workers": self.workers, "prefetch": PREFETCH, "val_fraction": 0.0}
        if self.kind == "latents":
            return DataModuleFromConfig(self.batch_size, latents=str(self.root), **common)
        # Its weight lets a few tiles make a pass of many.
        corpus = {"root": str(self.root), "weight": max(1.0, PASS / self.tiles)}
        if self.kind == "shards":
            corpus |= {"layout": "shards", "index": f"{self.root}.parquet"}
        params = {"corpora": {"tiles": corpus}, "size": self.pixels, "augment": ["d4"]}
        node = {"target": "ldm.data.corpora.Corpora", "params": params}
        return DataModuleFromConfig(self.batch_size, node, **common)

    def batches(self) -> Iterator[dict[str, Any]]:
        """Batches without end."""
        loader = self.module().train_dataloader()
        while True:
            yield from loader


def write_tiles(root: Path, kind: str, count: int, pixels: int) -> None:
    """Write tiles as files of an image format."""
    from PIL import Image

    from ldm.data.procedural import CLASSES, render_tile

    root.mkdir()
    options = {} if kind == "png" else {"quality": QUALITY}
    for i in range(count):
        tile = render_tile(CLASSES[i % len(CLASSES)], i // len(CLASSES), pixels)
        Image.fromarray(tile).save(root / f"{i:06d}.{kind}", **options)


def write_latents(root: Path, tiles: Path, networks: "Networks") -> None:
    """Write a cache of latents of the shape of `networks`.

    The time to read latents does not depend on what they say, so the autoencoder is a small one.
    """
    from ldm.checkpoint import write_checkpoint
    from ldm.commands import cache
    from ldm.models.autoencoder import AutoencoderKL

    ddconfig = {
        "ch": 32,
        "ch_mult": [1] * len(networks.ddconfig["ch_mult"]),
        "num_res_blocks": 1,
        "z_channels": networks.embed_dim,
        "resolution": networks.image[1],
    }
    module = AutoencoderKL(ddconfig=ddconfig, embed_dim=networks.embed_dim)
    payload: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(payload)
    checkpoint = root.with_suffix(".ckpt")
    write_checkpoint(checkpoint, payload)
    words = ["-r", checkpoint, "--data", tiles, "--out", root, "--val_fraction", 0]
    cache.main([str(w) for w in [*words, "--num_workers", 0, "--device", "cpu"]])


def make_source(folder: Path, kind: str, networks: "Networks", tiles: int, batch: int) -> Source:
    """Write tiles of a kind below `folder`; shards and latents are those of PNG files."""
    from ldm.commands import index, shards

    root = folder / kind
    pixels = networks.image[1]
    files = folder / (kind if kind in ("png", "jpeg", "webp") else "png")
    if not files.exists():
        write_tiles(files, files.name, tiles, pixels)
    with redirect_stdout(sys.stderr):  # the output is one line of JSON
        if kind == "shards":
            index.main([str(files), "--out", f"{files}.parquet"])
            shards.main([f"{files}.parquet", "--out", str(root)])
        elif kind == "latents":
            write_latents(root, files, networks)
    return Source(root, kind, tiles, pixels, batch)


def measure_rates(sources: Sequence[Source], args: BenchmarkOptions) -> dict[str, Any]:
    """Images per second by kind, in turns. What was prepared between turns is thrown away."""
    from torch.utils.benchmark import Timer

    rates: dict[str, list[float]] = {source.kind: [] for source in sources}
    streams = [(source, source.batches()) for source in sources]
    for source, stream in streams * args.repeats:
        for _ in range(source.workers * PREFETCH + 1):
            next(stream)
        timer = Timer("next(stream)", globals={"stream": stream})
        took = timer.blocked_autorange(min_run_time=args.min_run_time).mean
        rates[source.kind].append(source.batch_size / took)
    return {kind: spread(values) for kind, values in rates.items()}


def cpu_milliseconds(source: Source, seconds: float) -> dict[str, float]:
    """Processor time per image by part, ms: decode (or read), transform, collate."""
    from torch.utils.benchmark import Timer
    from torch.utils.data import default_collate

    data = source.module().train_dataset
    items = [data[i % source.tiles] for i in range(source.batch_size)]

    def milliseconds(statement: str) -> float:
        names = {"data": data, "items": items, "collate": default_collate}
        names["numbers"] = cycle(range(source.tiles))
        timer = Timer(statement, timer=time.process_time, globals=names)
        return 1e3 * timer.blocked_autorange(min_run_time=seconds).mean

    item = milliseconds("data[next(numbers)]")
    collate = milliseconds("collate(items)") / source.batch_size
    if source.kind == "latents":
        return {"read": rounded(item), "collate": rounded(collate)}
    decode = milliseconds("data.read(next(numbers))")
    parts = {"decode": decode, "transform": item - decode, "collate": collate}
    return {name: rounded(value) for name, value in parts.items()}


def main(argv: list[str] | None = None) -> None:
    args = parse(Options, argv)

    from benchmarks.networks import Networks

    networks = Networks.of(args.size)
    with tempfile.TemporaryDirectory(prefix="benchmark") as folder:
        sources = [
            make_source(Path(folder), kind, networks, args.tiles, args.batch_size)
            for kind in dict.fromkeys(args.kinds)
        ]
        rates = {
            workers: measure_rates([replace(one, workers=workers) for one in sources], args)
            for workers in dict.fromkeys(args.workers)
        }
        cpu = {source.kind: cpu_milliseconds(source, args.min_run_time) for source in sources}
        files = {s.kind: [f for f in s.root.rglob("*") if f.is_file()] for s in sources}
        sizes = {k: round(sum(f.stat().st_size for f in v) / args.tiles) for k, v in files.items()}
    facts = {"shape": [args.batch_size, *networks.image], "latent": networks.latent}
    facts |= {"images_per_s": rates, "cpu_ms_per_image": cpu, "bytes_per_tile": sizes}
    if args.needed is not None:
        # As if processes did not hinder one another.
        seconds = {kind: sum(parts.values()) / 1e3 for kind, parts in cpu.items()}
        facts["cores_needed"] = {kind: rounded(args.needed * s) for kind, s in seconds.items()}
        best = {kind: max(rate[kind]["median"] for rate in rates.values()) for kind in cpu}
        facts["share_of_needed"] = {kind: rounded(r / args.needed) for kind, r in best.items()}
    print_result(args, bench="loading", **facts)


if __name__ == "__main__":
    run_command(main, Options)
