"""Measure training and sampling on a GPU: images/s, share of the card's peak, beside diffusers.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --minutes 3 --out gpu.json

The networks are the paper's, with random weights that both libraries share in number and layout;
all run in bf16 autocast, with fused optimisers. Each line of JSON is printed as soon as it is
measured; a line that the time left does not allow is named and left out. The peak is that of a bf16
matrix product, measured at the start. Compiled lines come first, in processes that compile side by
side before anything is measured; cuDNN's search for algorithms, half a minute for each, comes last.
At the end a line for each task has the ratios between the libraries' best, and what each choice
(channels_last, compile, search) gave.

- training step: the paper's UNet on latents in memory, with L1 error, AdamW and averaged weights.
- autoencoder step: reconstruction and KL at 256 pixels, without LPIPS and discriminator.
- parts: kernels of attention, and norms, at the UNet's full resolution, and the step of AdamW.
  Where flash attention is faster than cuDNN's, which PyTorch prefers on Hopper, all lines use it.
- guided sampling: 50 DDIM steps guided by the half UNet, and decoding to uint8 in main memory.
  diffusers has no classifier guidance, so ours guides its networks and scheduler in a plain loop.
"""

import contextlib
import gc
import importlib.util
import json
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

if not __package__:  # run as a file: its own folder comes first on the path, the packages' does not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.common import (
    Lap,
    Ready,
    no_lap,
    peak_memory,
    restart_peak,
    rounded,
    seconds_per_call,
    surroundings,
)
from ldm.cli import Count, option, parse, run_command
from ldm.devices import usable_cores
from ldm.errors import UserError

if TYPE_CHECKING:
    import torch

    from benchmarks.networks import Execution, Networks

    Line = tuple["Task", str, Execution]  # task, library, and how it is run

STARTED = time.monotonic()  # imports take some of the time, too
MATRIX = 8192  # side of the matrices whose product gives the peak
PARTS, BLOCK = 16, 2**20  # images of the parts, and weights in each of 100 tensors
SEARCH = 30.0  # seconds that cuDNN searches for the algorithms of a network
LONG = 2.0  # seconds of a step whose kernels are not listed
LISTED = 12  # kinds of kernels (on a CPU, operators), those that take most time
# Kinds of kernels by what their names hold; the first that fits counts.
KINDS = {
    "layout": ("nchwToNhwc", "nhwcToNchw"),
    "attention": ("fmha", "flash", "sdpa"),
    "optimiser": ("multi_tensor", "Adam"),
    "norm": ("GroupNorm", "RowwiseMoments", "GammaBeta", "InternalGradients", "ComputeFusedParams"),
    "compiled": ("triton",),
    "product": ("gemm", "conv", "cutlass", "xmma", "wgrad", "dgrad", "fprop", "nvjet"),
    "copy": ("copy", "Memcpy", "Memset", "CatArray"),
    "elementwise": ("elementwise",),
}
CHOICES = ("compile", "channels_last", "search")
MODES = (  # in the order of measuring; without cuDNN's search, compiled networks come first
    {"channels_last": True, "compile": True, "search": False},
    {"channels_last": False, "compile": False, "search": False},
    {"channels_last": True, "compile": False, "search": False},
    {"channels_last": True, "compile": False, "search": True},
)
FLASH = "TORCH_CUDNN_SDPA_DEPRIORITIZED"  # PyTorch's own variable: flash attention before cuDNN's
PATIENCE, PAUSE = 4, 15.0  # times, and seconds, that a process waits for memory others hold
MEASURED = 3.0  # seconds that each line is measured for, after a warm-up
AUTOENCODER_RATE, KL_WEIGHT = 4.5e-6, 1e-6  # of the paper's configuration


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure training and sampling on a GPU, beside diffusers."""

    program: ClassVar = "python benchmarks/gpu.py"
    example: ClassVar = "--minutes 3 --out gpu.json"

    minutes: Annotated[float, Field(gt=0, le=600)] = option(
        8.0, "time for all; what does not fit is left out"
    )
    peer: bool = option(True, "compare with diffusers, if it is installed", off=("--no_peer",))
    train_batch: Count = option(
        64, "images of a training step; halved until they fit, as the others"
    )
    autoencoder_batch: Count = option(16, "images of an autoencoder's step")
    sample_batch: Count = option(64, "images that are sampled at once")
    custom_steps: Annotated[int, Field(ge=1, le=1000)] = option(50, "sampling steps", "-c")
    out: Path | None = option(None, "JSON file of the results", metavar="FILE")


@dataclass(frozen=True)
class Task:
    """What is measured."""

    title: str
    build: Callable[[str, "Execution", int], Ready]  # of library, execution, images of a step
    batch_size: int  # images of a step, if they fit
    seconds: float  # expected to build and measure it on a large GPU, without compilation
    compilation: float  # seconds, expected
    goal: float | None = None  # a share of the peak below 1, or images/s


def tasks_of(networks: "Networks", classifier: dict[str, Any], args: Options) -> list[Task]:
    """The tasks, the most telling first; `classifier` has the settings of the guide's network."""
    from benchmarks import sample

    training = partial(build_training, networks)
    settings = {"networks": networks, "steps": args.custom_steps, "classifier": classifier}
    guided = partial(sample.build, **settings)
    autoencoder = partial(build_autoencoder_training, networks)
    return [
        Task("training step", training, args.train_batch, 12, 110, goal=0.4),
        Task("guided sampling", guided, args.sample_batch, 15, 90, goal=25.0),
        Task("autoencoder step", autoencoder, args.autoencoder_batch, 8, 60),
    ]


def build_training(
    networks: "Networks", library: str, execution: "Execution", batch_size: int
) -> Ready:
    """A contestant that trains the noise predictor, see `benchmarks.train.build`."""
    import torch

    from benchmarks import train

    channels, height, width = networks.latent
    moments = torch.randn(batch_size, 2 * channels, height, width, device=execution.device)
    return train.build(library, networks, execution, lambda: repeat({"moments": moments}))


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
        with execution.autocast(device):
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


def matmul_peak(device: "torch.device", side: int) -> float:
    """FLOP/s of the product of two bf16 matrices of random numbers."""
    import torch

    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    result = torch.empty_like(a)
    return 2 * side**3 / seconds_per_call(lambda: torch.mm(a, b, out=result), 0.5)


def release(device: "torch.device") -> None:
    """Give back the memory of the contestant before, and forget what was compiled for it."""
    import torch

    if "torch._dynamo" in sys.modules:  # which takes seconds to import
        torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    restart_peak(device)


def warm_up(
    task: Task, library: str, execution: "Execution", patience: int = 0
) -> Callable[[float], dict[str, Any]]:
    """Build a contestant, with half of the images as long as they do not fit.

    First it waits `patience` times for memory that other processes may give back. Returns a
    function that measures the contestant for so many seconds.
    """
    import torch

    device, batch_size = execution.device, task.batch_size
    while True:
        release(device)
        base = 0.0 if device.type == "cuda" else peak_memory(device)
        try:
            ready = task.build(library, execution, batch_size)
            start = time.perf_counter()
            ready.step(no_lap)
            synchronise(device)
            break
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
        if patience:
            patience -= 1
            time.sleep(PAUSE)
        else:
            batch_size //= 2
    first_step = time.perf_counter() - start  # with compilation

    def measure(at_least: float) -> dict[str, Any]:
        step = partial(ready.step, no_lap)
        restart_peak(device)
        seconds = seconds_per_call(step, at_least)
        return {
            "batch_size": batch_size,
            "images_per_s": rounded(batch_size / seconds),
            "seconds": rounded(seconds),
            "first_step_s": rounded(first_step),
            "tflop_per_s": rounded(ready.flops / seconds / 1e12),
            "gflop_per_image": rounded(ready.flops / batch_size / 1e9),
            "peak_memory_mib": rounded(peak_memory(device) - base),
            "parameters": ready.parameters,
            "kernels": kernels(step, device) if seconds < LONG else {},
        }

    return measure


_warm: list[Callable[[float], dict[str, Any]]] = []  # of a process that was started for a line


def _warm_up_until(deadline: float, *line: Any) -> None:
    """Warm up, or end this process at the deadline (`time.monotonic`)."""
    import torch

    signal.setitimer(signal.ITIMER_REAL, max(1e-3, deadline - time.monotonic()))
    choose_attention({})
    _warm.append(warm_up(*line, PATIENCE))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    signal.setitimer(signal.ITIMER_REAL, 0)


def _measure(at_least: float) -> dict[str, Any]:
    return _warm[0](at_least)


def parts(networks: "Networks", device: "torch.device") -> dict[str, float]:
    """Milliseconds of the choices for attention and norms at the UNet's full resolution."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    width, side = networks.unet["model_channels"], networks.unet["image_size"]
    heads = networks.unet.get("num_heads", 1)
    options = {"device": device, "dtype": torch.bfloat16, "requires_grad": True}
    qkv = torch.randn(3, PARTS, heads, side**2, width // heads, **options)
    x = torch.randn(PARTS, width, side, side, **options)
    weight = torch.ones(width, device=device)

    def attention(backend: SDPBackend | None, backward: bool) -> None:
        chosen = sdpa_kernel(backend) if backend else contextlib.nullcontext()
        with chosen, torch.set_grad_enabled(backward):
            found = F.scaled_dot_product_attention(*qkv)
            if backward:
                found.sum().backward()

    def norm(autocast: bool) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            scale = weight if autocast else weight.to(x.dtype)
            F.silu(F.group_norm(x, 32, scale, scale)).to(x.dtype).sum().backward()

    calls: dict[str, Callable[[], Any]] = {
        "norm autocast": partial(norm, True),
        "norm bf16": partial(norm, False),
        "attention": partial(attention, None, True),  # the kernel that PyTorch prefers
    }
    for name in ("flash", "cudnn"):
        backend = getattr(SDPBackend, f"{name.upper()}_ATTENTION")
        with contextlib.suppress(RuntimeError):  # a device without this kernel
            attention(backend, True)
            calls[f"attention {name}"] = partial(attention, backend, True)
            calls[f"attention {name} forward"] = partial(attention, backend, False)
    weights = [torch.zeros(BLOCK, device=device, requires_grad=True) for _ in range(100)]
    for p in weights:
        p.grad = torch.zeros_like(p)
    for name in ("fused", "foreach"):
        step = torch.optim.AdamW(weights, **{name: True}).step
        calls[f"AdamW {name}, {100 * BLOCK // 10**6} M weights"] = step
    return {name: rounded(1000 * seconds_per_call(call, 0.2)) for name, call in calls.items()}


def choose_attention(ms: dict[str, float]) -> None:
    """Use flash attention, here and in processes from here, where `parts` found it faster."""
    import torch

    flash, cudnn = (ms.get(f"attention {name}", math.inf) for name in ("flash", "cudnn"))
    if flash < cudnn < math.inf:
        os.environ[FLASH] = "1"
    if FLASH in os.environ:
        torch.backends.cuda.enable_cudnn_sdp(False)


def kernels(call: Callable[[], Any], device: "torch.device") -> dict[str, float]:
    """The kinds of kernels (on a CPU, operators) that take most of a call: shares of its time."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiler:
        call()
        synchronise(device)
    times: Counter[str] = Counter()
    for event in profiler.key_averages():
        if not on_gpu:
            times[event.key] += event.self_cpu_time_total
        elif event.device_type == DeviceType.CUDA:
            times[kind_of(event.key)] += event.self_device_time_total
    total = times.total()
    return {name: rounded(time_ / total) for name, time_ in times.most_common(LISTED)}


def kind_of(kernel: str) -> str:
    """The kind of a kernel by its name, see `KINDS`."""
    fits = (kind for kind, words in KINDS.items() if any(word in kernel for word in words))
    return next(fits, kernel.split("<")[0][-40:])


def measured(
    networks: "Networks",
    tasks: list[Task],
    peers: list[str],
    device: "torch.device",
    until: float,
    at_least: float,
    side: int,
) -> Iterator[dict[str, Any]]:
    """Measure for `at_least` seconds each what fits `until` then, and give each result at once."""
    from benchmarks.networks import Execution

    peak = matmul_peak(device, side)
    yield {"task": "matmul", "tflop_per_s": rounded(peak / 1e12)}
    ms = parts(networks, device)
    choose_attention(ms)
    yield {"task": "parts", "ms": ms, "flash": FLASH in os.environ}
    release(device)
    libraries = ["ours", *peers]
    executions = [Execution.of(str(device), "bf16", **mode) for mode in MODES]
    contest = [(task, lib, run) for run in executions for task in tasks for lib in libraries]
    compiled = compile_ahead(contest, until, at_least)
    took: dict[tuple, float] = {}  # by task and mode, what the last line took
    for task, library, execution in contest:
        mode, began, left = (task, execution), time.monotonic(), until - time.monotonic()
        extra = execution.compile * task.compilation + execution.search * SEARCH
        needed = took.get(mode, task.seconds + extra)
        choices = {name: getattr(execution, name) for name in CHOICES}
        line = {"task": task.title, "library": library, **choices}
        try:
            if warm := compiled.get((task, library, execution)):
                pool, done = warm
                with pool:  # whose end gives its memory back
                    done.result()
                    line |= pool.submit(_measure, at_least).result()
            elif left < needed:
                line["skipped"] = f"{needed:.0f} s needed, {left:.0f} s left"
            else:
                line |= warm_up(task, library, execution)(at_least)
        except BrokenProcessPool:
            line["skipped"] = "not compiled in time, or its process was killed"
        except Exception as error:  # of any library; the other lines are worth having
            line["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if "skipped" not in line and not execution.compile:
            took[mode] = time.monotonic() - began
        if "tflop_per_s" in line:
            line["share_of_peak"] = rounded(line["tflop_per_s"] * 1e12 / peak)
        yield {**line, "took_s": rounded(time.monotonic() - began)}
    release(device)


def compile_ahead(
    contest: list["Line"], until: float, at_least: float
) -> dict["Line", tuple[ProcessPoolExecutor, Future]]:
    """Compile the lines for which there is time side by side, in a process for each."""
    left = until - time.monotonic()
    lines = [
        (task, library, execution)
        for task, library, execution in contest
        if execution.compile and task.seconds + task.compilation <= left
    ]
    if lines:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", f"{usable_cores() // len(lines)}")
    deadline, found = until - 3 * at_least * len(lines), {}
    for line in lines:
        pool = ProcessPoolExecutor(1, get_context("spawn"))
        found[line] = pool, pool.submit(_warm_up_until, deadline, *line)
    wait(done for _, done in found.values())
    return found


def summary_of(task: Task, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The best line of each library, ours over the others' images/s, the goal, and the choices:

    times images/s of ours over the line that differs in nothing else.
    """
    own = [line for line in lines if line["task"] == task.title and "images_per_s" in line]
    rates = {(line["library"], *(line[c] for c in CHOICES)): line["images_per_s"] for line in own}
    best = {line["library"]: line for line in sorted(own, key=lambda line: line["images_per_s"])}
    summary: dict[str, Any] = {"task": task.title, "best": best, "choices": {}}
    if (ours := best.get("ours")) is None:
        return summary
    rate = ours["images_per_s"]
    others = [line for library, line in best.items() if library != "ours"]
    summary["ours_over"] = {one["library"]: rounded(rate / one["images_per_s"]) for one in others}
    for key, value in rates.items():
        for place, name in enumerate(CHOICES, 1):
            without = rates.get((*key[:place], False, *key[place + 1 :]))
            if key[0] == "ours" and key[place] and without:
                summary["choices"][name] = rounded(value / without)
    if task.goal is not None:
        goal = rate * task.goal / ours["share_of_peak"] if task.goal < 1 else task.goal
        summary |= {"goal": rounded(goal), "reached": rate}
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
    """Print each result at once, write all so far to `out`; returns 1 if a line failed, else 0."""
    import torch

    from ldm.files import write_json

    lines, facts = [], surroundings(peers)
    if device.type == "cuda":
        facts["memory_mib"] = torch.cuda.get_device_properties(device).total_memory // 2**20
        facts["cuda"] = torch.version.cuda
    print(json.dumps(facts), flush=True)
    for line in measured(networks, tasks, peers, device, until, at_least, side):
        print(json.dumps(line), flush=True)
        lines.append(line)
        summaries = [summary_of(task, lines) for task in tasks]
        if out is not None:
            write_json(out, {**facts, "lines": lines, "summaries": summaries})
    for summary in summaries:
        print(json.dumps({name: value for name, value in summary.items() if name != "best"}))
    return int(any("failed" in line for line in lines))


def main(argv: list[str] | None = None) -> int:
    args = parse(Options, argv)

    import torch

    if not torch.cuda.is_available():
        raise UserError("benchmarks/gpu.py measures a CUDA GPU, and there is none here")

    from benchmarks.networks import Networks
    from benchmarks.sample import CLASSIFIERS

    peers = ["diffusers"] if args.peer and importlib.util.find_spec("diffusers") else []
    if args.peer and not peers:
        print("diffusers is not installed: ours alone", file=sys.stderr)
    networks = Networks.of("paper")
    tasks = tasks_of(networks, CLASSIFIERS["paper"], args)
    until, at_least = STARTED + 60 * args.minutes, min(MEASURED, 60 * args.minutes / 40)
    return measure_all(networks, tasks, peers, torch.device("cuda"), until, at_least, args.out)


if __name__ == "__main__":
    run_command(main, Options)
