"""Encode tiles once, so that diffusion and classifier training read latents instead of images.

    python scripts/cache_latents.py -r logs/autoencoder --out latents --views 8 \\
        --data configs/latent-diffusion/histo-ldm-kl-8.yaml 'data.params.train.params.augment=[d4]'
    python main.py --base configs/latent-diffusion/histo-ldm-kl-8.yaml -t \\
        data.params.latents=latents

Mean and log-variance of the posterior are stored, so training still draws the latents. `--data`
takes folders of tiles, or training configurations, whose `data` section says what is training and
what validation, how tiles are cropped and augmented, and how corpora are weighted. Run the same
command again after an interruption: finished files are kept.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import ArgumentParser, existing_path, number, run_command
from ldm.devices import shared_devices
from ldm.errors import UserError

DATA_TARGET = "ldm.data.datamodule.DataModuleFromConfig"
OF_FOLDERS = ("val_data", "labelled", "augment", "val_fraction", "group_regex")
VAL_FRACTION = 0.05


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="cache_latents.py",
        description=__doc__.splitlines()[0],
        epilog="With YAML files as --data, section.key=value overrides them.",
    )
    add = parser.add_argument
    add(
        "-r",
        "--resume",
        required=True,
        metavar="CKPT",
        help="autoencoder, checkpoint or run folder; of a diffusion model, its first stage",
    )
    add(
        "--data",
        nargs="+",
        required=True,
        metavar="DIR|YAML",
        help="folders of tiles, or training configurations, merged left to right",
    )
    add("--out", required=True, metavar="DIR", help="folder of the cache")
    add("--views", type=number(int, 1), default=1, help="augmented views of each training tile, "
        "the first without augmentation")  # fmt: skip
    add("--dtype", choices=("float16", "float32"), default="float16", help="of what is stored")
    add("-s", "--seed", type=number(int, 0, 2**32 - 1), default=23, help="of hold-out and views; "
        "training holds out the same tiles with the same seed")  # fmt: skip
    add(
        "--shard_tiles",
        type=number(int, 1),
        metavar="N",
        help="tiles per file (as many as make 64 MiB when not given)",
    )

    add = parser.add_argument_group("folders of tiles").add_argument
    add("--val_data", nargs="+", metavar="DIR", help="folders of validation tiles")
    add("--labelled", action="store_true", help="the folders are DIR/CLASS/images")
    add("--augment", choices=("d4", "stain", "d4,stain"), help="of the views after the first")
    add(
        "--val_fraction",
        type=number(float, 0, 0.5),
        help=f"share held out without --val_data ({VAL_FRACTION} when not given)",
    )
    add("--group_regex", metavar="REGEX", help="tiles with the same group 1 stay on one side")

    add = parser.add_argument_group("machine").add_argument
    add("--batch_size", type=number(int, 1), default=32, help="images encoded together")
    add("--num_workers", type=number(int, 0), default=2, help="loader processes of each process")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:INDEX or mps")
    add(
        "--devices",
        type=number(int, 1),
        help="processes on this machine, one per GPU, or per CPU core (each computes with one "
        "thread there); 1 when not given, or what torchrun or srun started",
    )
    add("--num_nodes", type=number(int, 1), help="machines, with torchrun or srun on each")
    add(
        "--precision",
        choices=("auto", "32", "bf16"),
        default="auto",
        help="auto: bf16 on GPUs that have it, else 32",
    )
    add("--channels_last", action="store_true", help="memory layout that suits tensor cores")
    add("--dry-run", action="store_true", help="print what would be made, and exit")
    args, rest = parser.parse_known_args(argv)
    for word in rest:
        if word.startswith("-") or "=" not in word:
            parser.error(f"unknown argument {word}; overrides have the form section.key=value")
    # `--data a.yaml key=value`: what follows the files lands in --data.
    args.overrides = [word for word in args.data if _is_override(word)] + rest
    args.data = [word for word in args.data if not _is_override(word)]
    if not args.data:
        parser.error("argument --data: give at least one folder or YAML file")
    return args


def _is_override(word: str) -> bool:
    return "=" in word and not Path(word).expanduser().exists()


def data_config(args: argparse.Namespace, pixels: int) -> dict[str, Any]:
    """The data node that `--data` means, for tiles of `pixels`.

    Raises:
        UserError: Missing files, folders beside YAML files, or options of folders with YAML files.
    """
    from ldm.config import load_configs, resolve

    paths = [existing_path(path, "--data") for path in args.data]
    folders = [path for path in paths if path.is_dir()]
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


def _folders_config(args: argparse.Namespace, folders: list[Path], pixels: int) -> dict[str, Any]:
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
        validation = [existing_path(path, "--val_data", "dir") for path in args.val_data]
        params["validation"] = tiles(validation, [])
    else:
        params["val_fraction"] = VAL_FRACTION if args.val_fraction is None else args.val_fraction
    return {"target": DATA_TARGET, "params": params}


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    out = Path(args.out).expanduser()

    from ldm.config import instantiate_from_config
    from ldm.data.caching import CachePlan, Encoding, gibibytes, make_cache
    from ldm.models.classifier import LatentSpace

    # Everything that can be wrong is found before other processes are started.
    devices = shared_devices(args.device, args.devices, args.num_nodes).with_precision(
        args.precision, channels_last=args.channels_last
    )
    net = LatentSpace.load(args.resume, "-r").first_stage
    data = instantiate_from_config(data_config(args, net.resolution))
    encoding = Encoding(devices, args.batch_size, args.num_workers)
    plan = CachePlan(out, net, data, args.views, args.dtype, args.seed, encoding, args.shard_tiles)
    jobs = plan.missing()
    if args.dry_run:
        print(plan.describe(jobs))
        return
    plan.require_space(jobs)

    with devices.launch() as (ranks, device):
        if ranks.is_first:
            print(plan.describe(jobs), file=sys.stderr)
        report = make_cache(plan, device, ranks)
    if not ranks.is_first:
        return
    scale = report.statistics["scale_factor"]
    if report.made:
        size = gibibytes(plan.bytes_of(jobs))
        print(
            f"{report.made:,} latents ({size}) in {out}, {report.seconds:.1f} s, "
            f"{report.made / report.seconds:.1f} images/s; scale factor {scale:.6f}"
        )
    else:
        print(f"nothing to do: {out} is complete; scale factor {scale:.6f}")
    print(
        f"train with data.params.latents={out} (main.py) or --latents {out} (classifier_train.py)"
    )


if __name__ == "__main__":
    run_command(main)
