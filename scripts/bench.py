"""Measure speed and memory beside other libraries, and print one line of JSON.

    python scripts/bench.py train --size paper --batch_size 32 --compile --channels_last
    python scripts/bench.py train --size paper --from latents images --peers
    python scripts/bench.py sample -r DIFFUSION --classifier CLASSIFIER
    python scripts/bench.py encode --size paper --peers diffusers monai
    python scripts/bench.py data --size paper --workers 0 8 16 --needed 300

Contestants take turns, each in a process of its own, after a warm-up; numbers are the median, the
least and the greatest of the turns, and ratios are between runs of the same turn. Nothing has to
be there: networks have fresh weights, tiles are procedural. docs/benchmarks.md has results.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import ArgumentParser, number, run_command
from ldm.errors import UserError

SIZES = ("demo", "small", "paper")
PEERS = ("diffusers", "monai")
SOURCES = ("latents", "images")
KINDS = ("png", "jpeg", "webp", "latents")
PROCESSES = ("each", "turn", "none")
AUGMENT = ("d4", "stain")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(prog="bench.py", description=__doc__.splitlines()[0])
    subcommands = parser.add_subparsers(dest="bench", required=True, metavar="WHAT")

    def command(name: str, run, what: str, description: str) -> ArgumentParser:
        one = subcommands.add_parser(name, help=what, description=description)
        one.set_defaults(run=run)
        one.add_argument("--repeats", type=number(int, 1), default=5, help="turns, after a warm-up")
        return one

    def networks(one: ArgumentParser, batch_size: int, peers: tuple[str, ...]) -> None:
        add = one.add_argument
        add("--batch_size", type=number(int, 1), default=batch_size, help="images at a time")
        add(
            "--peers",
            nargs="*",
            choices=peers,
            default=["diffusers"],
            metavar="LIBRARY",
            help=f"libraries to compare with ({', '.join(peers)}); without a name: ours alone",
        )
        add("--precision", choices=("auto", "32", "bf16"), default="auto", help="as for sampling")
        add("--channels_last", action="store_true", help="memory layout that suits tensor cores")
        add("--compile", action="store_true", help="compile the networks")
        add("--device", default="auto", help="auto, cpu, cuda, cuda:INDEX or mps")
        add(
            "--processes",
            choices=PROCESSES,
            default="each",
            help="each: one per contestant, all in memory; turn: a new one at every turn, so that "
            "one contestant is in memory at a time; none: all in this one, a quick look without "
            "numbers of memory",
        )

    train = command(
        "train",
        bench_train,
        "a step of diffusion training",
        "Time of a step by part (data, encode, forward, backward, optimiser), memory, TFLOP/s.",
    )
    networks(train, 4, PEERS)
    add = train.add_argument
    add("--size", choices=SIZES, default="small", help="of the networks")
    add(
        "--from",
        dest="sources",
        nargs="+",
        choices=SOURCES,
        default=["latents"],
        metavar="SOURCE",
        help="train from cached latents, from images that are encoded, or one beside the other",
    )
    add("--steps", type=number(int, 1), default=5, help="training steps per turn")
    add("--workers", type=number(int, 0), default=0, help="loader processes of each contestant")
    add(
        "--fused",
        choices=("auto", "true", "false"),
        default="auto",
        help="AdamW in one kernel; auto: on GPUs",
    )

    sample = command("sample", bench_sample, "sampling", "Images per second of DDIM at eta 0.")
    networks(sample, 8, PEERS[:1])
    add = sample.add_argument
    add("--size", choices=SIZES, help="size of networks with fresh weights (demo when not given)")
    add("-r", "--resume", metavar="CKPT", help="diffusion checkpoint or run folder instead")
    add("--classifier", metavar="CKPT", help="noisy-latent classifier for -r")
    add("-c", "--custom_steps", type=number(int, 1, 1000), default=10, help="sampling steps")
    add("--no_decode", action="store_true", help="latents only, no images")
    add("--no_guided", action="store_true", help="leave guided sampling out")

    encode = command("encode", bench_encode, "the autoencoder's encoder", "Images per second.")
    networks(encode, 8, PEERS)
    add = encode.add_argument
    add("--size", choices=SIZES, default="small", help="of the autoencoder")
    add("--steps", type=number(int, 1), default=5, help="batches per turn")

    data = command(
        "data",
        bench_data,
        "reading, decoding and augmenting tiles",
        "Images per second of the data path alone, by kind of file and loader processes.",
    )
    add = data.add_argument
    add("--size", choices=SIZES, default="paper", help="of the tiles (paper: 256 pixels)")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help="of files")
    add(
        "--workers",
        nargs="+",
        type=number(int, 0),
        default=[0, 1, 2],
        help="loader processes; 0: none besides this one",
    )
    add("--batch_size", type=number(int, 1), default=32, help="images of a batch")
    add("--batches", type=number(int, 1), default=4, help="batches per turn")
    add("--tiles", type=number(int, 1), default=64, help="files that are read again and again")
    add("--augment", nargs="*", choices=AUGMENT, default=["d4"], help="of the tiles")
    add("--needed", type=number(float, 1e-3), help="images per second that training would take")

    args = parser.parse_args(argv)
    if args.bench == "sample" and args.size is not None and args.resume is not None:
        raise UserError("--size makes networks with fresh weights; leave it out with -r")
    if args.bench == "sample" and args.classifier is not None and args.resume is None:
        raise UserError("--classifier belongs to a diffusion checkpoint; give -r too")
    return args


def _execution(args: argparse.Namespace):
    """How the networks are run, and that all libraries are there."""
    from ldm.bench.networks import require
    from ldm.bench.training import Execution
    from ldm.devices import one_device

    devices = one_device(args.device).with_precision(args.precision)
    require(args.peers)
    device, precision = devices.device, devices.record()["precision"]
    fused = getattr(args, "fused", "false")
    fused = device.type == "cuda" if fused == "auto" else fused == "true"
    return Execution(device, precision, args.channels_last, args.compile, fused)


def bench_train(args: argparse.Namespace) -> dict:
    from ldm.bench.networks import Networks
    from ldm.bench.training import bench_training

    return bench_training(
        Networks.of(args.size),
        ["ours", *args.peers],
        list(dict.fromkeys(args.sources)),
        args.batch_size,
        args.steps,
        args.repeats,
        _execution(args),
        args.workers,
        args.processes,
    )


def bench_sample(args: argparse.Namespace) -> dict:
    from ldm.bench.networks import Networks
    from ldm.bench.sampling import Weights, bench_sampling

    execution = _execution(args)
    if args.resume is None:
        weights = Weights(Networks.of(args.size or "demo"))
    else:
        weights = Weights(diffusion=args.resume, classifier=args.classifier)
    return bench_sampling(
        weights,
        args.batch_size,
        args.custom_steps,
        args.repeats,
        execution,
        args.processes,
        not args.no_decode,
        tuple(args.peers),
        not args.no_guided,
    )


def bench_encode(args: argparse.Namespace) -> dict:
    from ldm.bench.encoding import bench_encoding
    from ldm.bench.networks import Networks

    return bench_encoding(
        Networks.of(args.size),
        ["ours", *args.peers],
        args.batch_size,
        args.steps,
        args.repeats,
        _execution(args),
        args.processes,
    )


def bench_data(args: argparse.Namespace) -> dict:
    import tempfile

    from ldm.bench.loading import bench_data
    from ldm.bench.networks import Networks

    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        return bench_data(
            Networks.of(args.size),
            Path(folder),
            list(dict.fromkeys(args.kinds)),
            list(dict.fromkeys(args.workers)),
            args.batch_size,
            args.batches,
            args.repeats,
            args.tiles,
            args.augment,
            args.needed,
        )


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    print(json.dumps(args.run(args)))
    return 0


if __name__ == "__main__":
    run_command(main)
