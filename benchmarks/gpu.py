"""Measure training and sampling on a GPU: images/s, share of the card's peak, beside diffusers.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --minutes 3 --out gpu.json

The networks are the paper's, with random weights that both libraries share in number and layout;
all run in bf16 autocast, with fused optimisers. Each line is printed as soon as it is measured; a
line that the time left does not allow is named and left out. The peak is that of a bf16 matrix
product, measured at the start. Compiled lines come first, in processes that compile side by side
before anything is measured; cuDNN's search for algorithms, half a minute for each, comes last. At
the end a line for each task says what each choice (channels_last, compile, search) gave.

- training step: the paper's UNet on latents in memory, with L1 error, AdamW and averaged weights.
- autoencoder step: reconstruction and KL at 256 pixels, without LPIPS and discriminator.
- parts: kernels of attention, and norms, at the UNet's full resolution, and the step of AdamW.
  Where flash attention is faster than cuDNN's, which PyTorch prefers on Hopper, all lines use it.
- guided sampling: 50 DDIM steps guided by the half UNet, and decoding to uint8 in main memory.
  diffusers has no classifier guidance, so ours guides its networks and scheduler in a plain loop.
"""

import gc
import importlib.util
import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

if not __package__:  # run as a file: its own folder comes first on the path, the packages' does not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.common import Ready, no_lap, peak_memory, restart_peak, rounded, surroundings
from ldm.cli import Count, option, parse, run_command
from ldm.devices import usable_cores
from ldm.errors import UserError

if TYPE_CHECKING:
    import torch

    from benchmarks.networks import Execution, Networks

STARTED = time.monotonic()  # imports take some of the time, too
MATRIX = 8192  # side of the matrices whose product gives the peak
PARTS = 16  # images of the parts
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
    training = partial(build_training, networks=networks)
    guided = partial(
        build_sampling, networks=networks, classifier=classifier, steps=args.custom_steps
    )
    autoencoder = partial(build_autoencoder_training, networks=networks)
    return [
        Task("training step", training, args.train_batch, 12, 110, goal=0.4),
        Task("guided sampling", guided, args.sample_batch, 15, 90, goal=25.0),
        Task("autoencoder step", autoencoder, args.autoencoder_batch, 8, 60),
    ]


def build_sampling(
    library: str,
    execution: "Execution",
    batch_size: int,
    networks: "Networks",
    classifier: dict[str, Any],
    steps: int,
) -> Ready:
    """A contestant that samples under guidance, see `benchmarks.sample.build`."""
    from benchmarks import sample

    arm = "guided" if library == "ours" else f"guided_{library}"
    return sample.build(arm, networks, classifier, execution, batch_size, steps)


def build_training(
    library: str, execution: "Execution", batch_size: int, networks: "Networks"
) -> Ready:
    """A contestant that trains the noise predictor, see `benchmarks.train.build`."""
    import torch

    from benchmarks import train

    channels, height, width = networks.latent
    moments = torch.randn(batch_size, 2 * channels, height, width, device=execution.device)
    return train.build(library, networks, execution, lambda: repeat({"moments": moments}))


def build_autoencoder_training(
    library: str, execution: "Execution", batch_size: int, networks: "Networks"
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


@dataclass(frozen=True)
class Warm:
    """A contestant that has taken its first step."""

    ready: Ready
    device: "torch.device"
    batch_size: int
    first_step: float  # seconds, with compilation
    base: float  # MiB that this process held before it was built

    def measure(self, at_least: float) -> dict[str, Any]:
        """Its numbers, measured for `at_least` seconds."""

        def step() -> None:
            self.ready.step(no_lap)

        restart_peak(self.device)
        seconds = seconds_per_call(step, self.device, at_least)
        return {
            "batch_size": self.batch_size,
            "images_per_s": rounded(self.batch_size / seconds),
            "seconds": rounded(seconds),
            "first_step_s": rounded(self.first_step),
            "tflop_per_s": rounded(self.ready.flops / seconds / 1e12),
            "gflop_per_image": rounded(self.ready.flops / self.batch_size / 1e9),
            "peak_memory_mib": rounded(peak_memory(self.device) - self.base),
            "parameters": self.ready.parameters,
            "kernels": kernels(step, self.device) if seconds < LONG else {},
        }


def warm_up(task: Task, library: str, execution: "Execution", patience: int = 0) -> Warm:
    """Build a contestant, with half of the images as long as they do not fit into memory.

    Args:
        patience: How often to wait for memory that other processes may give back.
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
            return Warm(ready, device, batch_size, time.perf_counter() - start, base)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
        if patience:
            patience -= 1
            time.sleep(PAUSE)
        else:
            batch_size //= 2


def work(pipe: Any, task: Task, library: str, execution: "Execution", at_least: float) -> None:
    """Warm up, say so, and measure when asked to; runs in a process of its own."""
    try:
        choose_attention()
        warm = warm_up(task, library, execution, PATIENCE)
        if execution.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()
        pipe.send({})
        pipe.recv()
        pipe.send(warm.measure(at_least))
    except Exception as error:  # of any library; the other lines are worth having
        pipe.send({"failed": said(error)})


class Worker:
    """A process that warms up beside others, and measures when it is asked to."""

    def __init__(self, task: Task, library: str, execution: "Execution", at_least: float):
        spawn = get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        args = (theirs, task, library, execution, at_least)
        self.process = spawn.Process(target=work, args=args, daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is seen

    def answer(self, until: float) -> dict[str, Any]:
        """What it says next, or why it says nothing until then (`time.monotonic`)."""
        try:
            if self.pipe.poll(max(0.0, until - time.monotonic())):
                return self.pipe.recv()
            self.process.terminate()
            return {"skipped": "not compiled in time"}
        except EOFError:
            return {"failed": "its process was killed, as for too much memory"}

    def measure(self, until: float) -> dict[str, Any]:
        self.pipe.send(None)
        numbers = self.answer(until)
        self.process.terminate()  # gives its memory back
        self.process.join()
        return numbers


def said(error: Exception) -> str:
    """An error as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def plan(
    tasks: list[Task], peers: list[str], device: "torch.device"
) -> list[tuple[Task, str, "Execution"]]:
    """Lines in the order of measuring: task, library, and how it is run."""
    from benchmarks.networks import Execution

    modes = [  # channels_last, compile, search
        (True, True, False),
        (False, False, False),
        (True, False, False),
        (True, False, True),
    ]
    return [
        (task, library, Execution(device, "bf16", *mode))
        for mode in modes
        for task in tasks
        for library in ["ours", *peers]
    ]


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

    def attention(backward: bool = True) -> None:
        with torch.set_grad_enabled(backward):
            found = F.scaled_dot_product_attention(*qkv)
        if backward:
            found.sum().backward()

    def norm(autocast: bool) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            scale = weight if autocast else weight.to(x.dtype)
            F.silu(F.group_norm(x, 32, scale, scale)).to(x.dtype).sum().backward()

    def milliseconds(call: Callable[..., None], *args: bool) -> float:
        return rounded(1000 * seconds_per_call(lambda: call(*args), device, 0.2))

    result = {"norm autocast": milliseconds(norm, True), "norm bf16": milliseconds(norm, False)}
    result["attention"] = milliseconds(attention)  # the kernel that PyTorch prefers
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        name = f"attention {backend.name.split('_')[0].lower()}"
        with sdpa_kernel(backend):
            try:
                result[name] = milliseconds(attention)
            except RuntimeError:  # a device without this kernel
                continue
            result[f"{name} forward"] = milliseconds(attention, False)
    weights = [torch.zeros(2**20, device=device, requires_grad=True) for _ in range(100)]
    for p in weights:
        p.grad = torch.zeros_like(p)
    for name in ("fused", "foreach"):
        step = torch.optim.AdamW(weights, **{name: True}).step
        result[f"AdamW {name}, 105 M weights"] = milliseconds(step)
    return result


def choose_attention(ms: dict[str, float] | None = None) -> None:
    """Have this process and those that it starts use flash attention where it is the faster one.

    Args:
        ms: What `parts` found; None in a process that was started: what was chosen before.
    """
    import torch

    flash, cudnn = ((ms or {}).get(f"attention {name}", math.inf) for name in ("flash", "cudnn"))
    if flash < cudnn < math.inf:
        os.environ[FLASH] = "1"
    if FLASH in os.environ:
        torch.backends.cuda.enable_cudnn_sdp(False)


def kernels(call: Callable[[], Any], device: "torch.device") -> dict[str, float]:
    """The kinds of kernels (on a CPU, operators) that take most of a call: shares of its time."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
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
    """Measure as much as the time allows, and give each result when it is there.

    Args:
        until: When to end, as `time.monotonic` says it.
        at_least: Seconds that each line is measured for, after its warm-up.
        side: Side of the matrices whose product gives the peak.
    """
    peak = matmul_peak(device, side)
    yield {"task": "matmul", "tflop_per_s": rounded(peak / 1e12)}
    ms = parts(networks, device, PARTS)
    choose_attention(ms)
    yield {"task": "parts", "ms": ms, "flash": FLASH in os.environ}
    release(device)
    contest = plan(tasks, peers, device)
    compiled = compile_ahead(contest, until, at_least)
    took: dict[tuple, float] = {}  # by task and mode, what the last line took
    for task, library, execution in contest:
        left = until - time.monotonic()
        mode = (task.title, execution)
        extra = execution.compile * task.compilation + execution.search * SEARCH
        needed = took.get(mode, task.seconds + extra)
        facts = {name: getattr(execution, name) for name in CHOICES}
        line = {"task": task.title, "library": library, **facts}
        began = time.monotonic()
        worker = compiled.get((library, *mode))
        if isinstance(worker, Worker):
            line |= worker.measure(until)
        elif worker is not None:
            line |= worker
        elif left < needed:
            line["skipped"] = f"{needed:.0f} s needed, {left:.0f} s left"
        else:
            try:
                line |= warm_up(task, library, execution).measure(at_least)
            except Exception as error:  # of any library; the other lines are worth having
                line["failed"] = said(error)
            took[mode] = time.monotonic() - began
        if "tflop_per_s" in line:
            line["share_of_peak"] = rounded(line["tflop_per_s"] * 1e12 / peak)
        yield {**line, "took_s": rounded(time.monotonic() - began)}
    release(device)


def compile_ahead(
    contest: list[tuple[Task, str, "Execution"]], until: float, at_least: float
) -> dict[tuple, Worker | dict[str, Any]]:
    """Processes that have compiled the lines for which there is time, side by side.

    Returns:
        By library, task and mode, the process, or why there is none.
    """
    left = until - time.monotonic()
    lines = [
        (task, library, execution)
        for task, library, execution in contest
        if execution.compile and task.seconds + task.compilation <= left
    ]
    if lines:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", f"{usable_cores() // len(lines)}")
    found: dict[tuple, Worker | dict[str, Any]] = {
        (line[1], line[0].title, line[2]): Worker(*line, at_least) for line in lines
    }
    last = until - 3 * at_least * len(lines)
    return {key: worker.answer(last) or worker for key, worker in found.items()}


def describe(line: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    """A result as a line of text, with ratios where the other library was measured alike.

    Args:
        lines: Those before.
    """
    if line["task"] == "matmul":
        return f"peak of a bf16 matrix product: {line['tflop_per_s']:g} TFLOP/s"
    if line["task"] == "parts":
        text = "parts, ms: " + ", ".join(f"{name} {ms:g}" for name, ms in line["ms"].items())
        return text + f"; all lines with {FLASH}=1" * line["flash"]
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
    for other in lines:
        if "images_per_s" in other and all(other[key] == line[key] for key in ("task", *CHOICES)):
            ours, theirs = (line, other) if line["library"] == "ours" else (other, line)
            times = ours["images_per_s"] / theirs["images_per_s"]
            text += f"; ours / {theirs['library']}: {times:.2f} times images/s"
            if theirs["peak_memory_mib"]:
                memory = ours["peak_memory_mib"] / theirs["peak_memory_mib"]
                text += f", {memory:.2f} times memory"
    shares = [f"{name} {share:.0%}" for name, share in list(line["kernels"].items())[:6]]
    return "; ".join([text, ", ".join(shares)]) if shares else text


def choices(task: Task, lines: list[dict[str, Any]]) -> str:
    """What each choice gave ours: times images/s of the line that differs in nothing else."""
    rates = {
        tuple(line[name] for name in CHOICES): line
        for line in lines
        if line["task"] == task.title and line["library"] == "ours" and "images_per_s" in line
    }
    words = []
    for mode, line in rates.items():
        for place, name in enumerate(CHOICES):
            other = rates.get((*mode[:place], False, *mode[place + 1 :]))
            if mode[place] and other is not None:
                times = line["images_per_s"] / other["images_per_s"]
                words.append(f"{name} {times:.2f}, first step {line['first_step_s']:g} s")
    return f"choices for {task.title}, times images/s: {'; '.join(words) or 'not measured'}"


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
            rate = ours["images_per_s"]
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
            words.append(f"{summary['reached']:g} images/s, the goal is {summary['goal']:g}")
        print(f"best of {summary['task']}: {', '.join(words) or 'not measured'}", flush=True)
    for task in tasks:
        print(choices(task, lines), flush=True)
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
