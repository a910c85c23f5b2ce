"""Measure training and sampling on a GPU: images/s, share of the card's peak, beside diffusers.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --minutes 1.6 --out gpu.json

The networks are the paper's, with random weights that both libraries share in number and layout;
all run in bf16 autocast, with fused optimisers. Each line is printed as soon as it is measured, the
most telling ones first; a line that the time left does not allow is named and left out. So cuDNN's
search for algorithms, which took half a minute for the UNet on an H200, comes last. The peak is
that of a bf16 matrix product, measured at the start.

- training step: the paper's UNet on latents in memory, with L1 error, AdamW and averaged weights.
- autoencoder step: reconstruction and KL at 256 pixels, without LPIPS and discriminator.
- parts: kernels of attention, and norms, at the UNet's full resolution, forward and backward.
- guided sampling: 50 DDIM steps guided by the half UNet, and decoding to uint8 in main memory.
  diffusers has no classifier guidance, so ours guides its networks and scheduler in a plain loop.
"""

import gc
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

if not __package__:  # run as a file: its own folder comes first on the path, the packages' does not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.common import Ready, no_lap, peak_memory, restart_peak, rounded, surroundings
from ldm.cli import Count, option, parse, run_command
from ldm.errors import UserError

if TYPE_CHECKING:
    import torch

    from benchmarks.networks import Execution, Networks

STARTED = time.monotonic()  # imports take some of the time, too
MATRIX = 8192  # side of the matrices whose product gives the peak
PARTS = 16  # images of the parts
SEARCH = 30.0  # seconds that cuDNN searches for the algorithms of a network
LONG = 2.0  # seconds of a step whose operators are not listed
OPERATORS = 12  # that are listed, of those that take most time
MEASURED = 3.0  # seconds that each line is measured for, after a warm-up
AUTOENCODER_RATE, KL_WEIGHT = 4.5e-6, 1e-6  # of the paper's configuration


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure training and sampling on a GPU, beside diffusers."""

    program: ClassVar = "python benchmarks/gpu.py"
    example: ClassVar = "--minutes 1.6 --out gpu.json"

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
        goal: What is aimed at: a share of the peak below 1, or images/s.
    """

    title: str
    build: Callable[[str, "Execution", int], Ready]
    batch_size: int
    seconds: float
    compilation: float
    goal: float | None = None


def tasks_of(networks: "Networks", classifier: dict[str, Any], args: Options) -> list[Task]:
    """The tasks, the most telling first.

    Args:
        classifier: Settings of the guide's network, see `ldm.models.classifier.network_config`.
    """
    from benchmarks import sample

    def train_unet(library: str, execution: "Execution", batch_size: int) -> Ready:
        return build_training(library, networks, execution, batch_size)

    def train_autoencoder(library: str, execution: "Execution", batch_size: int) -> Ready:
        return build_autoencoder_training(library, networks, execution, batch_size)

    def guided(library: str, execution: "Execution", batch_size: int) -> Ready:
        arm = "guided" if library == "ours" else f"guided_{library}"
        return sample.build(arm, networks, classifier, execution, batch_size, args.custom_steps)

    return [
        Task("training step", train_unet, args.train_batch, 12, 110, goal=0.4),
        Task("guided sampling", guided, args.sample_batch, 15, 90, goal=25.0),
        Task("autoencoder step", train_autoencoder, args.autoencoder_batch, 8, 60),
    ]


def build_training(
    library: str, networks: "Networks", execution: "Execution", batch_size: int
) -> Ready:
    """A contestant that trains the noise predictor, see `benchmarks.train.build`."""
    import torch

    from benchmarks import train

    channels, height, width = networks.latent
    moments = torch.randn(batch_size, 2 * channels, height, width, device=execution.device)
    return train.build(library, networks, execution, lambda: repeat({"moments": moments}))


def build_autoencoder_training(
    library: str, networks: "Networks", execution: "Execution", batch_size: int
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

    def step(lap: Callable[[str], None]) -> None:
        with execution.autocast():
            x_rec, posterior = reconstruct(net, x)
            loss, _ = loss_of.generator_loss(x, x_rec, posterior, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Ready(step, count(net), count_flops(run))


def synchronise(device: "torch.device") -> None:
    """Wait until the device has done what it was asked for."""
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize()


def seconds_per_call(call: Callable[[], Any], device: "torch.device", at_least: float) -> float:
    """Seconds of a call, the median of blocks of calls that take `at_least` seconds together."""

    def block(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronise(device)
        return (time.perf_counter() - start) / calls

    synchronise(device)
    times = [block(1)]
    calls, spent = max(1, math.ceil(at_least / 4 / times[0])), times[0]
    if spent < at_least:
        times = []  # a single call includes the time to begin
        while spent < at_least:
            times.append(block(calls))
            spent += calls * times[-1]
    return statistics.median(times)


def matmul_peak(device: "torch.device", side: int) -> float:
    """FLOP/s of the product of two bf16 matrices of random numbers."""
    import torch

    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    result = torch.empty_like(a)
    torch.mm(a, b, out=result)
    return 2 * side**3 / seconds_per_call(lambda: torch.mm(a, b, out=result), device, 0.5)


def release(device: "torch.device") -> None:
    """Give back the memory of the contestant before, and forget what was compiled for it."""
    import torch

    if "torch._dynamo" in sys.modules:  # which takes seconds to import
        torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    restart_peak(device)


def attempt(
    task: Task, library: str, execution: "Execution", batch_size: int, at_least: float
) -> dict[str, Any]:
    """Build a contestant and measure it for `at_least` seconds, after a warm-up."""
    device = execution.device
    release(device)
    base = 0.0 if device.type == "cuda" else peak_memory(device)
    ready = task.build(library, execution, batch_size)
    start = time.perf_counter()
    ready.step(no_lap)
    synchronise(device)
    first = time.perf_counter() - start
    seconds = seconds_per_call(lambda: ready.step(no_lap), device, at_least)
    memory = peak_memory(device) - base
    shares = operators(lambda: ready.step(no_lap), device) if seconds < LONG else {}
    return {
        "batch_size": batch_size,
        "images_per_s": rounded(batch_size / seconds),
        "seconds": rounded(seconds),
        "first_step_s": rounded(first),
        "tflop_per_s": rounded(ready.flops / seconds / 1e12),
        "gflop_per_image": rounded(ready.flops / batch_size / 1e9),
        "peak_memory_mib": rounded(memory),
        "parameters": ready.parameters,
        "operators": shares,
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


def plan(
    tasks: list[Task], peers: list[str], device: "torch.device"
) -> Iterator[tuple[Task, str, "Execution"]]:
    """Lines in the order of measuring: task, library, and how it is run."""
    from benchmarks.networks import Execution

    # channels_last, compile, search
    for mode in (
        (True, False, False),
        (True, True, False),
        (False, False, False),
        (True, False, True),
    ):
        for task in tasks:
            for library in ["ours", *peers]:
                yield task, library, Execution(device, "bf16", *mode)


def parts(networks: "Networks", device: "torch.device", batch_size: int) -> dict[str, float]:
    """Milliseconds of the choices for attention and norms at the UNet's full resolution."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    width, side = networks.unet["model_channels"], networks.unet["image_size"]
    heads = networks.unet.get("num_heads", 1)
    options = {"device": device, "dtype": torch.bfloat16, "requires_grad": True}
    qkv = torch.randn(3, batch_size, heads, side**2, width // heads, **options)
    x = torch.randn(batch_size, width, side, side, **options)
    weight = torch.ones(width, device=device)

    def attention() -> None:
        F.scaled_dot_product_attention(*qkv).sum().backward()

    def norm(autocast: bool) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            scale = weight if autocast else weight.to(x.dtype)
            F.silu(F.group_norm(x, 32, scale, scale)).to(x.dtype).sum().backward()

    calls = {"norm autocast": lambda: norm(True), "norm bf16": lambda: norm(False)}
    result = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel(backend):
            try:
                attention()
            except RuntimeError:  # a device without this kernel
                continue
            name = f"attention {backend.name.split('_')[0].lower()}"
            result[name] = seconds_per_call(attention, device, 0.2)
    result |= {name: seconds_per_call(call, device, 0.2) for name, call in calls.items()}
    return {name: rounded(1000 * seconds) for name, seconds in result.items()}


def operators(call: Callable[[], Any], device: "torch.device") -> dict[str, float]:
    """The operators that take most of a call: share of the device's time by name."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
        call()
        synchronise(device)
    times = {
        event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CPU  # with the time of the kernels that they start
    }
    total = sum(times.values())
    first = sorted(times, key=times.get, reverse=True)[:OPERATORS]
    return {name: rounded(times[name] / total) for name in first}


def measured(
    networks: "Networks",
    tasks: list[Task],
    peers: list[str],
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
    peak = matmul_peak(device, side)
    yield {"task": "matmul", "tflop_per_s": rounded(peak / 1e12)}
    yield {"task": "parts", "ms": parts(networks, device, PARTS)}
    took: dict[tuple, float] = {}  # by task and mode, what the last line took
    for task, library, execution in plan(tasks, peers, device):
        left = until - time.monotonic()
        mode = (task.title, execution)
        extra = execution.compile * task.compilation + execution.search * SEARCH
        needed = took.get(mode, task.seconds + extra)
        facts = {name: getattr(execution, name) for name in ("compile", "channels_last", "search")}
        line = {"task": task.title, "library": library, **facts}
        if left < needed:
            yield {**line, "skipped": f"{needed:.0f} s needed, {left:.0f} s left"}
            continue
        began = time.monotonic()
        try:
            line |= measure_line(task, library, execution, at_least)
            line["share_of_peak"] = rounded(line["tflop_per_s"] * 1e12 / peak)
        except Exception as error:  # of any library; the other lines are worth having
            line["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        took[mode] = time.monotonic() - began
        yield {**line, "took_s": rounded(took[mode])}
    release(device)


def describe(line: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    """A result as a line of text, with ratios where the other library was measured alike.

    Args:
        lines: Those before.
    """
    if line["task"] == "matmul":
        return f"peak of a bf16 matrix product: {line['tflop_per_s']:g} TFLOP/s"
    if line["task"] == "parts":
        return "parts, ms: " + ", ".join(f"{name} {ms:g}" for name, ms in line["ms"].items())
    layout = "channels_last" if line["channels_last"] else "contiguous"
    mode = f"{'compiled' if line['compile'] else 'eager'}, {layout}"
    mode += ", cuDNN search" if line["search"] else ""
    text = f"{line['task']}, {line['library']}, {mode}: "
    for word in ("skipped", "failed"):
        if word in line:
            return f"{text}{word} ({line[word][:300]})"
    text += (
        f"{line['images_per_s']:g} images/s, {line['tflop_per_s']:g} TFLOP/s, "
        f"{line['share_of_peak']:.1%} of the peak, {line['peak_memory_mib'] / 1024:.1f} GiB, "
        f"batch {line['batch_size']}, first step {line['first_step_s']:g} s"
    )
    keys = ("task", "compile", "channels_last", "search")
    for other in lines:
        if "images_per_s" in other and all(other[key] == line[key] for key in keys):
            ours, theirs = (line, other) if line["library"] == "ours" else (other, line)
            times = ours["images_per_s"] / theirs["images_per_s"]
            text += f"; ours / {theirs['library']}: {times:.2f} times images/s"
            if theirs["peak_memory_mib"]:
                memory = ours["peak_memory_mib"] / theirs["peak_memory_mib"]
                text += f", {memory:.2f} times memory"
    if line["library"] == "ours" and line["operators"]:
        shares = [f"{name} {share:.0%}" for name, share in list(line["operators"].items())[:6]]
        text += f"; {', '.join(shares)}"
    return text


def best_of(task: Task, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The best line of each library, what ours is times another's, and the goal."""
    best: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line["task"] == task.title and "images_per_s" in line:
            before = best.setdefault(line["library"], line)
            if line["images_per_s"] > before["images_per_s"]:
                best[line["library"]] = line
    summary: dict[str, Any] = {"task": task.title, "best": best}
    ours = best.get("ours")
    if ours is not None:
        summary["ours_over"] = {
            name: rounded(ours["images_per_s"] / line["images_per_s"])
            for name, line in best.items()
            if name != "ours"
        }
        if task.goal is not None:
            reached = ours["share_of_peak" if task.goal < 1 else "images_per_s"]
            summary |= {"goal": task.goal, "reached": reached}
    return summary


def measure_all(
    networks: "Networks",
    tasks: list[Task],
    peers: list[str],
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

    lines: list[dict[str, Any]] = []
    facts = surroundings(peers)
    card = "no GPU"
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
        facts["memory_mib"] = torch.cuda.get_device_properties(device).total_memory // 2**20
        card += f", {facts['memory_mib'] / 1024:.0f} GiB, CUDA {torch.version.cuda}"
    print(card, ", ".join(f"{k} {v}" for k, v in facts["versions"].items()), sep="; ", flush=True)
    for line in measured(networks, tasks, peers, device, until, at_least, side):
        print(describe(line, lines), flush=True)
        lines.append(line)
        summaries = [best_of(task, lines) for task in tasks]
        if out is not None:
            write_json(out, {**facts, "lines": lines, "summaries": summaries})
    for summary in summaries:
        words = [
            f"{n:.2f} times {name}'s images/s" for name, n in summary.get("ours_over", {}).items()
        ]
        if "goal" in summary:
            words.append(f"{summary['reached']:g} where the goal is {summary['goal']:g}")
        print(f"best of {summary['task']}: {', '.join(words) or 'not measured'}", flush=True)
    return int(any("failed" in line for line in lines))


def main(argv: list[str] | None = None) -> int:
    args = parse(Options, argv)

    import torch

    if not torch.cuda.is_available():
        raise UserError("benchmarks/gpu.py measures a CUDA GPU, and there is none here")

    from benchmarks.networks import Networks
    from benchmarks.sample import CLASSIFIERS

    device = torch.device("cuda")
    peers = ["diffusers"] if args.peer and importlib.util.find_spec("diffusers") else []
    if args.peer and not peers:
        print("diffusers is not installed: ours alone (python -m pip install diffusers)")
    networks = Networks.of("paper")
    tasks = tasks_of(networks, CLASSIFIERS["paper"], args)
    until, at_least = STARTED + 60 * args.minutes, min(MEASURED, 60 * args.minutes / 40)
    return measure_all(networks, tasks, peers, device, until, at_least, args.out)


if __name__ == "__main__":
    run_command(main, Options)
