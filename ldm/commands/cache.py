"""Encode tiles once, so that diffusion and classifier training read latents instead of images.

Mean and log-variance of the posterior are stored, so training still draws the latents. --data takes
folders of tiles, or training configurations, whose `data` section says what is training and what
validation, how tiles are cropped and augmented, and how corpora are weighted; section.key=value
overrides these. Train with data.params.latents=OUT. Run the same command again after an
interruption: finished files are kept.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ldm.cli import Ckpt, Count, Dir, Seed, Workers, existing_path, like, option, parse
from ldm.devices import shared_devices
from ldm.errors import UserError
from ldm.files import require_outside
from ldm.settings import LoaderOptions, ProcessOptions

DATA_TARGET = "ldm.data.datamodule.DataModuleFromConfig"
OF_FOLDERS = ("val_data", "labelled", "augment", "val_fraction", "group_regex")
VAL_FRACTION = 0.05
FOLDERS = "folders of tiles"


@dataclass(frozen=True, kw_only=True)
class Options(ProcessOptions, LoaderOptions):
    example: ClassVar = """\
--model logs/autoencoder --out latents --views 8 \\
      --data configs/latent-diffusion/histo-ldm-kl-8.yaml 'data.params.train.params.augment=[d4]'"""

    model: Ckpt = option(
        ...,
        "autoencoder, checkpoint or run folder; of a diffusion model, its first stage",
        "-r",
        published=("--resume",),
    )
    data: tuple[str, ...] = option(
        ...,
        "folders of tiles, or training configurations, merged left to right",
        metavar="DIR|YAML",
    )
    out: Dir = option(..., "folder of the cache")
    views: Count = option(
        1, "augmented views of each training tile; the first is without augmentation"
    )
    dtype: Literal["float16", "float32"] = option("float16", "type of the numbers that are stored")
    seed: Seed = option(
        23, "seed of hold-out and views; trainings have the same, and hold out the same tiles", "-s"
    )
    shard_tiles: Count | None = option(
        None, "tiles per file; if omitted, as many as make 64 MiB", metavar="N"
    )
    dry_run: bool = option(False, "print what would be made, and exit")
    overrides: tuple[str, ...] = option(
        (),
        "settings that override those of the configurations",
        positional=True,
        metavar="section.key=value",
    )

    val_data: tuple[Dir, ...] | None = option(None, "folders of validation tiles", group=FOLDERS)
    labelled: bool = option(False, "the folders are DIR/CLASS/images", group=FOLDERS)
    augment: Literal["d4", "stain", "d4,stain"] | None = option(
        None,
        "augmentation of the views after the first: d4 (the 8 symmetries of the square), stain, "
        "or both",
        group=FOLDERS,
    )
    val_fraction: Annotated[float, Field(ge=0, le=0.5)] | None = option(
        None, f"share held out without --val_data; if omitted {VAL_FRACTION}", group=FOLDERS
    )
    group_regex: str | None = option(
        None,
        "tiles whose paths have the same first group stay on one side of the hold-out",
        group=FOLDERS,
        metavar="REGEX",
    )
    batch_size: Count = like(LoaderOptions, "batch_size", 32, help="images encoded together")
    workers: Workers = like(LoaderOptions, "workers", 2, help="loader processes of each process")

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.data:
            yield "data", "give at least one folder or YAML file"


def data_config(args: Options, pixels: int) -> dict[str, Any]:
    """The data node that `--data` means, for tiles of `pixels`.

    Raises:
        UserError: Missing files, folders beside YAML files, or options of folders with YAML files.
    """
    from ldm.config import load_configs, resolve
    from ldm.data.arrays import is_array

    paths = [existing_path(path, "--data", "tiles") for path in args.data]
    folders = [path for path in paths if path.is_dir() or is_array(path)]
    if folders and len(folders) < len(paths):
        raise UserError("--data: give either folders of tiles or YAML files, not both")
    if folders:
        if args.overrides:
            raise UserError(f"{args.overrides[0]}: overrides go with YAML files as --data")
        return _folders_config(args, folders, pixels)
    given = [name for name in OF_FOLDERS if getattr(args, name) not in (None, False)]
    if given:
        raise UserError(
            f"--{given[0]} goes with folders as --data; write it into the YAML file, or override it"
        )
    # Only the data: whatever a model needs, a checkpoint in the environment say, may be absent.
    overrides = [*args.overrides, "model=null", "lightning=null"]
    config = resolve(load_configs(paths, overrides))
    if not isinstance(config.get("data"), dict):
        raise UserError(
            f"--data {' '.join(args.data)}: no section data; give a training configuration"
        )
    node = config["data"]
    if node.get("target") != DATA_TARGET:
        raise UserError(f"--data: data.target={node.get('target')} must be {DATA_TARGET}")
    params = {**node["params"], "latents": None}
    params.setdefault("seed", args.seed)
    for name in ("train", "validation"):
        # Every tile is decoded once; keeping it would only take memory.
        if params.get(name) and "cache" in (params[name].get("params") or {}):
            settings = {**params[name]["params"], "cache": False}
            params[name] = {**params[name], "params": settings}
    return {"target": DATA_TARGET, "params": params}


def _folders_config(args: Options, folders: list[Path], pixels: int) -> dict[str, Any]:
    def tiles(roots: list[Path], augment: list[str]) -> dict[str, Any]:
        params = {"root": [str(root) for root in roots], "size": pixels, "labelled": args.labelled}
        return {"target": "ldm.data.tiles.TileFolder", "params": {**params, "augment": augment}}

    augment = args.augment.split(",") if args.augment else []
    if augment and args.views == 1:
        raise UserError(f"--augment {args.augment} needs --views above 1; give --views 8, say")
    params: dict[str, Any] = {
        "batch_size": args.batch_size,
        "train": tiles(folders, augment),
        "seed": args.seed,
        "group_regex": args.group_regex,
    }
    if args.val_data:
        for name in ("val_fraction", "group_regex"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name} holds out training tiles; leave it out with --val_data")
        validation = [existing_path(path, "--val_data", "tiles") for path in args.val_data]
        params["validation"] = tiles(validation, [])
    else:
        params["val_fraction"] = VAL_FRACTION if args.val_fraction is None else args.val_fraction
    return {"target": DATA_TARGET, "params": params}


def main(argv: list[str] | None = None) -> None:
    args = parse(Options, argv)
    out = Path(args.out).expanduser()

    from ldm.config import instantiate_from_config, tile_roots
    from ldm.data.caching import CachePlan, gibibytes, make_cache
    from ldm.models.classifier import LatentSpace

    # Everything that can be wrong is found before other processes are started.
    devices = shared_devices(args.device, args.devices, args.num_nodes).with_precision(
        args.precision, channels_last=args.channels_last
    )
    net = LatentSpace.load(args.model, "--model").first_stage
    node = data_config(args, net.resolution)
    require_outside({"--out": out}, {"--data": tile_roots(node)})
    data = instantiate_from_config(node)
    plan = CachePlan(out, net, data, args.views, args.dtype, args.seed, devices, args.shard_tiles)
    jobs = plan.missing()
    if args.dry_run:
        print(plan.describe(jobs))
        return
    plan.require_space(jobs)

    with devices.launch() as (ranks, device):
        if ranks.is_first:
            print(plan.describe(jobs), file=sys.stderr)
        manifest = make_cache(plan, device, ranks, args.batch_size, args.workers)
    if manifest is None:
        return
    scale = manifest["statistics"]["scale_factor"]
    if jobs:
        images, seconds = (manifest["last_start"][name] for name in ("images", "seconds"))
        print(
            f"{images:,} latents ({gibibytes(plan.bytes_of(jobs))}) in {out}, {seconds:.1f} s, "
            f"{images / seconds:.1f} images/s; scale factor {scale:.6f}"
        )
    else:
        print(f"nothing to do: {out} is complete; scale factor {scale:.6f}")
    print(f"train a model with data.params.latents={out}, a classifier with --latents {out}")
