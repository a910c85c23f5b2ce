"""Measure training and sampling on a GPU: images/s, share of the card's peak, beside diffusers.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --minutes 1.6 --out gpu.json

The networks are the paper's, with random weights that both libraries share in number and layout;
all run in bf16 autocast, with fused optimisers. Each result is printed as a line of JSON as soon as
it is measured, the most telling ones first; one that the time left does not allow is named and left
out. So cuDNN's search for algorithms, which took half a minute for the UNet on an H200, comes last.
The peak is that of a bf16 matrix product, measured at the start.

- training step: the paper's UNet on latents in memory, with L1 error, AdamW and averaged weights.
- autoencoder step: reconstruction and KL at 256 pixels, without LPIPS and discriminator.
- guided sampling: 50 DDIM steps guided by the half UNet, and decoding to uint8 in main memory.
  diffusers has no classifier guidance, so ours guides its networks and scheduler in a plain loop.
"""

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import repeat
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

if not __package__:  # run as a file: its own folder comes first on the path, the packages' does not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.common import Lap, Ready, prepare, rounded, seconds_per_call, surroundings
from ldm.cli import Count, option, parse, run_command
from ldm.errors import UserError

if TYPE_CHECKING:
    import torch

    from benchmarks.networks import Execution, Networks

STARTED = time.monotonic()  # imports take some of the time, too
MATRIX = 8192  # side of the matrices whose product gives the peak
SEARCH = 30.0  # seconds that cuDNN searches for the algorithms of a network
MEASURED = 3.0  # seconds that each line is measured for, after a warm-up
AUTOENCODER_RATE, KL_WEIGHT = 4.5e-6, 1e-6  # of the paper's configuration
MODES = ("channels_last", "compile", "search")  # of `benchmarks.networks.Execution`
PLAN = ((True, False, False), (True, True, False), (False, False, False), (True, False, True))


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure training and sampling on a GPU, beside diffusers."""

    program: ClassVar = "benchmarks/gpu.py"
    example: ClassVar = "  python benchmarks/gpu.py --minutes 1.6 --out gpu.json"

    minutes: Annotated[float, Field(gt=0, le=600)] = option(
        default=8.0, help="time for all; what does not fit is left out"
    )
    peer: bool = option(
        default=True, help="compare with diffusers, if it is installed", off=("--no_peer",)
    )
    train_batch: Count = option(
        default=64, help="images of a training step; halved until they fit, as the others"
    )
    autoencoder_batch: Count = option(default=16, help="images of an autoencoder's step")
    sample_batch: Count = option(default=32, help="images that are sampled at once")
    custom_steps: Annotated[int, Field(ge=1, le=1000)] = option(
        "-c", default=50, help="sampling steps"
    )
    out: Path | None = option(default=None, metavar="FILE", help="JSON file of the results")


@dataclass(frozen=True)
class Task:
    """What is measured.

    Attributes:
        title: Its name in the output.
        build: A contestant of (library, execution, images of a step).
        batch_size: Images of a step, if they fit.
        seconds: Expected time to build and measure it on a large GPU, without compilation.
        compilation: Expected time to compile it, seconds.
        goal: What is aimed at, by the name of a result.
    """

    title: str
    build: Callable[[str, "Execution", int], Ready]
    batch_size: int
    seconds: float
    compilation: float
    goal: dict[str, float] | None = None


def tasks_of(networks: "Networks", classifier: dict[str, Any], args: Options) -> list[Task]:
    """The tasks, the most telling first.

    Args:
        classifier: Settings of the guide's network, see `ldm.models.classifier.network_config`.
    """
    from benchmarks import sample, train

    def train_unet(library: str, execution: "Execution", batch_size: int) -> Ready:
        import torch

        channels, *sides = networks.latent
        moments = torch.randn(batch_size, 2 * channels, *sides, device=execution.device)
        return train.build(library, networks, execution, lambda: repeat({"moments": moments}))

    def guided(library: str, execution: "Execution", batch_size: int) -> Ready:
        arm = "guided" if library == "ours" else f"guided_{library}"
        return sample.build(arm, networks, classifier, execution, batch_size, args.custom_steps)

    step = partial(build_autoencoder_training, networks)
    return [
        Task("training step", train_unet, args.train_batch, 12, 110, {"share_of_peak": 0.4}),
        Task("guided sampling", guided, args.sample_batch, 15, 90, {"images_per_s": 25.0}),
        Task("autoencoder step", step, args.autoencoder_batch, 8, 60),
    ]


def build_autoencoder_training(
    networks: "Networks", library: str, execution: "Execution", batch_size: int
) -> Ready:
    """A contestant that trains an autoencoder with pixel and KL errors and Adam."""
    import torch

    from benchmarks.networks import build_autoencoder, count, count_flops, randomise
    from ldm.modules.losses import LPIPSWithDiscriminator

    device = execution.device
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = execution.search
    loss_of = LPIPSWithDiscriminator(
        0, kl_weight=KL_WEIGHT, disc_weight=0.0, perceptual_weight=0.0
    ).to(device)

    def reconstruct(net: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
        posterior = net.encode(x)
        if library == "ours":
            return net.decode(posterior.sample()), posterior
        posterior = posterior.latent_dist
        return net.decode(posterior.sample()).sample, posterior

    def run() -> None:
        net, _ = build_autoencoder(library, networks)
        reconstruct(net, torch.empty(batch_size, *networks.image))[0].sum().backward()

    with device:
        net, _ = build_autoencoder(library, networks)
        execution.place(randomise(net)).train()
    optimizer = torch.optim.Adam(
        net.parameters(), AUTOENCODER_RATE, betas=(0.5, 0.9), fused=device.type == "cuda"
    )
    for part in (net.encoder, net.decoder):
        execution.maybe_compile(part)
    x = execution.place(2 * torch.rand(batch_size, *networks.image) - 1)

    def step(lap: Lap) -> None:
        with execution.autocast():
            x_rec, posterior = reconstruct(net, x)
            loss, _ = loss_of.generator_loss(x, x_rec, posterior, 0)
        lap("forward")
        loss.backward()
        lap("backward")
        optimizer.step()
        optimizer.zero_grad()
        lap("optimiser")

    return Ready(step, count(net), count_flops(run))


def matmul_peak(device: "torch.device", side: int) -> float:
    """FLOP/s of the product of two bf16 matrices of random numbers."""
    import torch

    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    result = torch.empty_like(a)
    return 2 * side**3 / seconds_per_call(lambda: torch.mm(a, b, out=result), 0.5)


def attempt(
    task: Task, library: str, execution: "Execution", batch_size: int, at_least: float
) -> dict[str, Any]:
    """Build a contestant and measure it for `at_least` seconds, after a warm-up."""
    import torch

    # Give back the memory of the contestant before, and forget what was compiled for it.
    torch._dynamo.reset()
    gc.collect()
    if execution.device.type == "cuda":
        torch.cuda.empty_cache()
    began = time.monotonic()
    build = partial(task.build, library, execution, batch_size)
    turn = prepare(build, execution.device, at_least)
    ready, found = time.monotonic() - began, turn()
    flops, seconds = found["flops"], found["seconds"]["total"]
    return {
        "batch_size": batch_size,
        "images_per_s": rounded(batch_size / seconds),
        "seconds": {part: rounded(value) for part, value in found["seconds"].items()},
        "ready_after_s": rounded(ready),
        "tflop_per_s": rounded(flops / seconds / 1e12),
        "gflop_per_image": rounded(flops / batch_size / 1e9),
        "peak_memory_mib": rounded(found["memory"]),
        "parameters": found["parameters"],
    }


def measure_line(
    task: Task, library: str, execution: "Execution", at_least: float
) -> dict[str, Any]:
    """What `attempt` finds, with half of the images as long as they do not fit."""
    import torch

    batch_size = task.batch_size
    while True:
        try:
            return attempt(task, library, execution, batch_size, at_least)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
        batch_size //= 2


def measured(
    tasks: list[Task],
    libraries: list[str],
    device: "torch.device",
    until: float,
    at_least: float,
    side: int,
) -> Iterator[dict[str, Any]]:
    """Measure as much as the time allows, and give each result when it is there.

    Args:
        until: When to end, as `time.monotonic` says it.
        at_least: Seconds that each line is measured for, after its warm-up.
        side: Side of the matrices whose product gives the peak.
    """
    from benchmarks.networks import Execution

    peak = matmul_peak(device, side)
    yield {"task": "matmul", "tflop_per_s": rounded(peak / 1e12)}
    took: dict[tuple, float] = {}  # by task and mode, what the last line took
    lines = ((mode, task, library) for mode in PLAN for task in tasks for library in libraries)
    for mode, task, library in lines:
        line = {"task": task.title, "library": library, **dict(zip(MODES, mode, strict=True))}
        extra = line["compile"] * task.compilation + line["search"] * SEARCH
        needed = took.get((task.title, mode), task.seconds + extra)
        began = time.monotonic()
        if until - began < needed:
            yield {**line, "skipped": f"{needed:.0f} s needed, {until - began:.0f} s left"}
            continue
        try:
            line |= measure_line(task, library, Execution(device, "bf16", *mode), at_least)
            line["share_of_peak"] = rounded(line["tflop_per_s"] * 1e12 / peak)
        except Exception as error:  # of any library; the other lines are worth having
            line["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        took[task.title, mode] = time.monotonic() - began
        yield {**line, "took_s": rounded(took[task.title, mode])}


def best_of(task: Task, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The best line of each library, what ours is times another's, and the goal."""
    done = [line for line in lines if line["task"] == task.title and "images_per_s" in line]
    # The last one of each library in rising order.
    best = {line["library"]: line for line in sorted(done, key=itemgetter("images_per_s"))}
    rates = {library: line["images_per_s"] for library, line in best.items()}
    ours = rates.pop("ours", None)
    over = {library: rounded(ours / rate) for library, rate in rates.items() if ours}
    return {"task": task.title, "goal": task.goal, "best": best, "ours_over": over}


def measure_all(
    tasks: list[Task],
    libraries: list[str],
    device: "torch.device",
    until: float,
    at_least: float = MEASURED,
    out: Path | None = None,
    side: int = MATRIX,
) -> int:
    """Print each result at once and write all so far to the file `out`, see `measured`.

    Returns:
        Exit status: 1 if a line failed.
    """
    import torch

    from ldm.files import write_json

    facts = surroundings(libraries[1:])
    if device.type == "cuda":
        facts["memory_mib"] = torch.cuda.get_device_properties(device).total_memory // 2**20
    print(json.dumps(facts), flush=True)
    lines: list[dict[str, Any]] = []
    summaries: list[dict[str, Any]] = []
    for line in measured(tasks, libraries, device, until, at_least, side):
        print(json.dumps(line), flush=True)
        lines.append(line)
        summaries = [best_of(task, lines) for task in tasks]
        if out is not None:
            write_json(out, {**facts, "lines": lines, "summaries": summaries})
    print(*map(json.dumps, summaries), sep="\n", flush=True)
    return int(any("failed" in line for line in lines))


def main(argv: list[str] | None = None) -> int:
    args = parse(Options, argv)

    import torch

    if not torch.cuda.is_available():
        raise UserError("benchmarks/gpu.py measures a CUDA GPU, and there is none here")

    from benchmarks.networks import Networks
    from benchmarks.sample import CLASSIFIERS

    libraries = ["ours"]
    if args.peer and find_spec("diffusers"):
        libraries.append("diffusers")
    tasks = tasks_of(Networks.of("paper"), CLASSIFIERS["paper"], args)
    until, at_least = STARTED + 60 * args.minutes, min(MEASURED, 60 * args.minutes / 40)
    return measure_all(tasks, libraries, torch.device("cuda"), until, at_least, args.out)


if __name__ == "__main__":
    run_command(main, Options)
