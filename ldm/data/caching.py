"""Making a cache of latents: every tile of a data module encoded once (see `ldm.data.latents`)."""

import time
import zlib
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm import __version__
from ldm.data.datamodule import DataModuleFromConfig, start_worker
from ldm.data.index import make_table, write_table
from ldm.data.latents import (
    DTYPES,
    MANIFEST,
    VERSION,
    LatentTiles,
    Shards,
    read_manifest,
    scale_from_sums,
)
from ldm.data.tiles import SYMMETRIES, Tiles, symmetry
from ldm.devices import Devices, Ranks, one_thread
from ldm.errors import UserError
from ldm.files import digest_of_text, free_space, remove_leftovers, require_space, write_bytes
from ldm.modules.autoencoder import AutoencoderKL as AutoencoderNet
from ldm.progress import Bar
from ldm.run import MadeFolder, hardware, provenance

SHARD_BYTES = 64 * 2**20  # a shard is held in memory until it is written
SCALE_TILES = 2048  # over which the scale of the latents is measured, as training does
Jobs = Sequence[tuple[str, int]]  # shards: split, number


class Views(Dataset):
    """Images of tiles by (index, view): view 0 is the tile as it is, others are augmented.

    A view is a function of the seed, the tile's name and its number. If the 8 symmetries of the
    square are the only augmentation, the views of a tile are distinct, all 8 of them for 8 views.
    """

    def __init__(self, tiles: Tiles, seed: int):
        self.tiles = tiles
        self.plain = tiles.without_augmentation()
        self.seed = seed

        # Whether there are the 8 symmetries and no other views.
        self.is_symmetric = tiles.augment == ["d4"] and tiles.crop == "center"

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        index, view = key
        if view == 0:
            return self.plain[index]["image"]
        name = self.tiles.relative_paths[index]
        if not self.is_symmetric:
            return self.tiles[index, _number(self.seed, name, view)]["image"]
        order = np.random.default_rng(_number(self.seed, name)).permutation(SYMMETRIES - 1) + 1
        return symmetry(self.plain[index]["image"], int(order[view - 1])).contiguous()

    def __len__(self) -> int:
        return len(self.tiles)


def _number(*facts: object) -> int:
    """A number in [0, 2^62), a function of the facts."""
    digest = blake2b("/".join(map(str, facts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


class CachePlan:
    """What a cache will hold, and how far it is made.

    Args:
        root: Folder of the cache.
        net: The autoencoder that encodes the tiles.
        data: The tiles; its `validation`, or what it holds out, is cached too.
        views: Number of views of each training tile; validation tiles have one.
        dtype: "float16" or "float32".
        seed: Seed of the views.
        devices: Precision and memory layout.
        shard_tiles: Tiles per shard; None for about 64 MiB.
    """

    def __init__(
        self,
        root: Path,
        net: AutoencoderNet,
        data: DataModuleFromConfig,
        views: int = 1,
        dtype: str = "float16",
        seed: int = 0,
        devices: Devices | None = None,
        shard_tiles: int | None = None,
    ):
        self.root, self.net, self.seed = root, net, seed
        self.devices = devices or Devices()
        if data.latents is not None:
            raise UserError(f"data: its tiles are a cache already (latents={data.latents})")
        self.sets = {"train": data.train_dataset}
        if data.val_dataset is not None:
            self.sets["validation"] = data.val_dataset
        size = net.latent_size
        for split, tiles in self.sets.items():
            if not isinstance(tiles, Tiles):
                raise UserError(
                    f"data: {split} is a {type(tiles).__name__}; only ldm.data.tiles.TileFolder and"
                    " ldm.data.corpora.Corpora can be cached"
                )
            if tiles.size != net.resolution:
                raise UserError(
                    f"data: {split} has tiles of size={tiles.size}, the autoencoder works on "
                    f"{net.resolution} pixels; set it to that"
                )
        train = Views(self.sets["train"], seed)
        if views > 1 and not train.tiles.is_random:
            raise UserError(
                f"views={views}: the training tiles have no augmentation, so all views are alike;"
                " give one (augment=d4, or data.params.train.params.augment), or views=1"
            )
        if views > SYMMETRIES and train.is_symmetric:
            raise UserError(f"views={views}: augment=[d4] has {SYMMETRIES} views; give fewer")
        computed = self.devices.record()
        self.settings: dict[str, Any] = {
            "autoencoder": net.fingerprint(),
            "latent": [net.embed_dim, size, size],
            "dtype": dtype,
            "precision": computed["precision"],
            "channels_last": computed["channels_last"],
            "seed": seed,
            "classes": data.classes,
            "corpora": [[c.name, c.weight] for c in train.tiles.corpora] or None,
            "splits": {
                split: self._describe(tiles, views if split == "train" else 1, dtype, shard_tiles)
                for split, tiles in self.sets.items()
            },
        }
        self.shards = {split: Shards.of(root, self.settings, split) for split in self.sets}
        self.made = MadeFolder(root, self.settings, MANIFEST)
        read_manifest(root, "out")  # of this version, or none
        self.made.exists()

    def _describe(
        self, tiles: Tiles, views: int, dtype: str, shard_tiles: int | None
    ) -> dict[str, Any]:
        numbers = 2 * self.net.embed_dim * self.net.latent_size**2
        tile_bytes = views * numbers * DTYPES[dtype].itemsize
        rows = zip(*self.table(tiles).values(), strict=True)
        lines = (f"{name}\0{label}\0{group}\0{corpus}\n" for name, _, label, group, corpus in rows)
        return {
            "tiles": len(tiles),
            "views": views,
            "shard_tiles": shard_tiles or max(1, SHARD_BYTES // tile_bytes),
            "sha256": digest_of_text(lines),
            "augment": [] if views == 1 else tiles.augment,
            "crop": "center" if views == 1 else tiles.crop,
            "resize": tiles.resize,
            "preprocess": tiles.preprocess,
        }

    @staticmethod
    def table(tiles: Tiles) -> dict[str, Sequence]:
        """The columns of a split's Parquet file."""
        count = len(tiles)
        return {
            "name": tiles.relative_paths,
            "path": [tiles.path(i) for i in range(count)],
            "label": tiles.labels,
            "group": [None] * count if tiles.groups is None else tiles.groups,
            "corpus": tiles.corpus_numbers().tolist(),
        }

    def missing(self) -> Jobs:
        """The shards that are still to be made; UserError if one of the others is damaged."""
        missing = []
        for split, shards in self.shards.items():
            for number in range(len(shards)):
                if shards.path(number).exists():
                    shards.open(number)
                else:
                    missing.append((split, number))
        return missing

    def images(self, jobs: Jobs) -> int:
        """How many images these shards take."""
        return sum(len(self.shards[s].range(n)) * self.shards[s].views for s, n in jobs)

    def bytes_of(self, jobs: Jobs) -> int:
        """Disk use of these shards."""
        return sum(self.shards[s].bytes_of(n) for s, n in jobs)

    def require_space(self, jobs: Jobs) -> None:
        """Check that these shards fit on the disk; UserError otherwise."""
        require_space(self.root, self.bytes_of(jobs), "out: cache of latents")

    def describe(self, jobs: Jobs) -> str:
        """Tiles, views, sizes and disk use, one per line."""
        lines = []
        for split, shards in self.shards.items():
            facts = self.settings["splits"][split]
            names = [a if isinstance(a, str) else str(a.get("target")) for a in facts["augment"]]
            augment = f" (augmented: {', '.join(names) or facts['crop'] + ' crops'})"
            lines.append(
                f"{split:<12} {shards.tiles:,} tiles x {shards.views} views"
                f"{augment if shards.views > 1 else ''} in {len(shards):,} files"
            )
        channels, height, width = self.settings["latent"]
        total = sum(s.bytes_of(n) for s in self.shards.values() for n in range(len(s)))
        classes = self.settings["classes"]
        return "\n".join(
            [
                *lines,
                f"classes      {', '.join(classes) if classes else 'none (unlabelled)'}",
                f"latents      mean and log-variance, {channels}x{height}x{width} each, "
                f"{self.settings['dtype']}, encoded in {self.settings['precision']}",
                f"autoencoder  {self.settings['autoencoder'][:12]}",
                f"disk         {gibibytes(total)}, of which "
                f"{gibibytes(self.bytes_of(jobs))} are to be made; "
                f"{gibibytes(free_space(self.root))} free",
            ]
        )

    def start(self) -> None:
        """Claim the folder: write the manifest, then the tables of the tiles.

        In this order, so that a folder whose maker was killed in between is known as ours.
        """
        self.made.write_record({"version": VERSION, "complete": False})
        for split, tiles in self.sets.items():
            table = make_table(self.table(tiles), {"label": "int32", "corpus": "int16"})
            write_table(self.root / f"{split}.parquet", table)

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Look at all shards, compute the statistics, complete the manifest; returns it.

        Args:
            facts: What the manifest says of this start.
        """
        tiles = LatentTiles(self.shards["train"], self.table(self.sets["train"]))
        count = min(SCALE_TILES, len(tiles))
        chosen = torch.linspace(0, len(tiles) - 1, count).long().unique().tolist()
        sums = tiles.latent_sums(chosen)
        number, total, squares = sums.tolist()
        statistics = {
            "scale_factor": scale_from_sums(sums),
            "tiles": len(chosen),
            "mean": total / number,
            "std": (squares / number - (total / number) ** 2) ** 0.5,
        }
        last_start = {**facts, **provenance(), "hardware": hardware()}
        last_start["versions"] = {"histodiffusion": __version__, **last_start["versions"]}
        facts = {"complete": True, "statistics": statistics, "last_start": last_start}
        return self.made.write_record({"version": VERSION, **facts})


def make_cache(
    plan: CachePlan,
    device: torch.device,
    ranks: Ranks | None = None,
    batch_size: int = 32,
    workers: int = 2,
) -> dict[str, Any] | None:
    """Make the shards that are missing.

    Args:
        ranks: Processes that share the work; this one alone by default.
        batch_size: Images encoded together.
        workers: Loader processes of each process.

    Returns:
        The manifest in the first process, None in the others. `last_start` tells of this call if
        shards were missing.

    Raises:
        UserError: A tile cannot be read or encoded; finished shards stay.
    """
    ranks = ranks or Ranks()
    # One list for all: each would find what the others have made already.
    jobs = ranks.broadcast(plan.missing())
    if ranks.is_first:
        for folder in (plan.root, *(shards.folder for shards in plan.shards.values())):
            remove_leftovers(folder)
        plan.require_space(jobs)
        if jobs:
            plan.start()
    ranks.barrier()
    start = time.perf_counter()
    mine = jobs[ranks.rank :: ranks.size]
    if mine:
        with one_thread(device):
            _encode(plan, device, mine, not ranks.is_first, batch_size, workers)
    ranks.barrier()
    if not ranks.is_first:
        return None
    manifest = read_manifest(plan.root, "out")
    if jobs or not manifest["complete"]:
        seconds = round(time.perf_counter() - start, 3)
        manifest = plan.finish(images=plan.images(jobs), seconds=seconds, batch_size=batch_size)
    return manifest


def _batches(shards: Shards, number: int, batch_size: int) -> list[list[tuple[int, int]]]:
    """Keys (index, view) of a shard, a list per batch."""
    keys = [(i, v) for i in shards.range(number) for v in range(shards.views)]
    return [keys[k : k + batch_size] for k in range(0, len(keys), batch_size)]


def _encode(
    plan: CachePlan, device: torch.device, jobs: Jobs, quiet: bool, batch_size: int, workers: int
) -> None:
    """Encode and write these shards."""
    layout = torch.channels_last if plan.devices.channels_last else torch.contiguous_format
    net = plan.net.to(device, memory_format=layout).eval()
    total = plan.images(jobs)
    with Bar(total=total, disable=quiet, unit="img", step=min(batch_size, total) or 1) as bar:
        for split, shards in plan.shards.items():
            numbers = [number for name, number in jobs if name == split]
            if not numbers:
                continue
            # One loader for all shards of a split, since starting its processes takes seconds. A
            # generator, since there may be millions of keys.
            loader = DataLoader(
                Views(plan.sets[split], plan.seed),
                batch_sampler=(b for n in numbers for b in _batches(shards, n, batch_size)),
                num_workers=workers,
                pin_memory=device.type == "cuda",
                worker_init_fn=start_worker,
            )
            stream = iter(loader)
            for number in numbers:
                moments, sums = [], []
                for _ in _batches(shards, number, batch_size):
                    x = next(stream).to(device, memory_format=layout, non_blocking=True)
                    with torch.inference_mode(), plan.devices.autocast(device):
                        found = net.encode(x)
                        posterior = torch.cat([found.mean, found.logvar], dim=1).float()
                    moments.append(posterior.cpu())  # (b, 2C, h, w)
                    mean, logvar = moments[-1].double().chunk(2, dim=1)
                    both = mean.sum((1, 2, 3)), (mean.square() + logvar.exp()).sum((1, 2, 3))
                    sums.append(torch.stack(both, dim=1))  # (b, 2)
                    bar.update(len(x))
                _write_shard(shards, number, torch.cat(moments), torch.cat(sums))


def _write_shard(shards: Shards, number: int, moments: Tensor, sums: Tensor) -> None:
    shape = (len(shards.range(number)), shards.views)
    with np.errstate(over="ignore"):
        stored = moments.numpy().astype(DTYPES[shards.dtype]).reshape(*shape, *shards.moments)
    if not np.isfinite(stored).all():
        largest = float(moments.abs().max())
        raise UserError(
            f"the autoencoder's latents reach {largest:.3g}, which {shards.dtype} cannot hold; use "
            "dtype=float32, and check that the autoencoder is a trained one"
        )
    crc = [zlib.crc32(view) for view in stored.reshape(-1, *shards.moments)]
    arrays = {
        "moments": stored,
        "sums": sums.numpy().reshape(*shape, 2),
        "crc": np.array(crc, np.uint32).reshape(shape),
    }
    write_bytes(shards.path(number), save(arrays, {"format": f"histodiffusion latents {VERSION}"}))


def gibibytes(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.2f} MiB"
