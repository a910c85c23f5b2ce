"""What the benchmarks share: options, contestants that take turns, and the line of JSON.

A contestant is a library that does a task. Contestants take turns, each in a process of its own:
other work on the machine falls on all of them alike, ratios are taken between runs of the same
turn, and the memory of one is not counted as that of another.
"""

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from ldm.cli import Count, NotNegative, like, option
from ldm.errors import UserError
from ldm.settings import DeviceOption, ProcessOptions

# Imported in every process before memory is measured: libraries are not what is compared.
IMPORTS = (
    *("torch._dynamo", "torch.utils.benchmark", "torch.utils.flop_counter"),
    *("ldm.data.corpora", "ldm.data.datamodule", "ldm.exchange.diffusers_export"),
    *("ldm.modules.ema", "ldm.synthesis.synthesiser"),
    *("diffusers.models", "diffusers.training_utils", "monai.networks.nets"),
)
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

Lap = Callable[[str], None]  # called at the end of each part of a step, with the part's name
Turn = Mapping[str, Any]  # what a call of `prepare`'s function returns


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Options of every benchmark."""

    repeats: Count = option(5, "turns of each contestant")
    min_run_time: NotNegative = option(1.0, "shortest time of a turn, in seconds")


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(BenchmarkOptions, DeviceOption):
    """Options of the benchmarks that run networks."""

    size: Literal["demo", "small", "paper"] = option("small", "size of the networks")
    batch_size: Count = option(8, "images of a step")
    peers: tuple[Literal["diffusers", "monai"], ...] = option(
        ("diffusers",),
        "libraries to compare with, diffusers or monai; without a name: ours alone",
        nargs="*",
        metavar="LIBRARY",
    )
    precision: Literal["auto", "32", "bf16"] | None = like(ProcessOptions, "precision", None)
    channels_last: bool = like(ProcessOptions, "channels_last", False)
    compile: bool = option(False, "compile the networks")


@dataclass(frozen=True)
class Ready:
    """A contestant that is built."""

    step: Callable[[Lap], None]  # processes one batch
    parameters: int  # number of weights
    flops: int  # floating-point operations of a step


def no_lap(part: str) -> None:
    """Measure no parts."""


def seconds_per_call(call: Callable[[], Any], at_least: float) -> float:
    """Seconds of a call, the median over calls that take `at_least` seconds together."""
    import torch
    from torch.utils.benchmark import Timer

    # The Timer waits for the device. It sets the number of threads, to one unless told otherwise.
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=at_least).median


def measure(step: Callable[[Lap], None], min_run_time: float, device: Any) -> dict[str, float]:
    """Seconds of a step: `total` (median), on CPUs `cpu` (mean), and of its parts in one more."""
    import torch

    calls, marks = 0, []

    def count() -> None:
        nonlocal calls
        calls += 1
        step(no_lap)

    def lap(part: str) -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize()
        marks.append((part, time.perf_counter()))

    start = time.process_time()
    result = {"total": seconds_per_call(count, min_run_time)}
    if device.type == "cpu":
        result["cpu"] = (time.process_time() - start) / calls
    lap("")
    step(lap)
    return result | {part: after - before for (_, before), (part, after) in pairwise(marks)}


def restart_peak(device: Any) -> None:
    """Let the peak of the memory be what is held now."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR.exists():
        CLEAR.write_text("5")  # resets VmHWM, see proc(5)


def peak_memory(device: Any) -> float:
    """Peak memory in MiB: of the tensors on a CUDA device, else of this process (NaN off Linux)."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Not from getrusage: a new process starts there with the peak of the one that made it.
    lines = STATUS.read_text().splitlines() if STATUS.exists() else ["VmHWM: nan"]
    return float(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 2**10


def prepare(
    build: Callable[[], Ready], device: Any, min_run_time: float
) -> Callable[[], dict[str, Any]]:
    """Build a contestant and warm it up in this process; returns what measures a turn of it."""
    for module in IMPORTS:
        if find_spec(module.partition(".")[0]):
            import_module(module)
    restart_peak(device)
    base = 0.0 if device.type == "cuda" else peak_memory(device)
    ready = build()
    gc.collect()
    restart_peak(device)  # building may take more for a moment
    ready.step(no_lap)

    def turn() -> dict[str, Any]:
        seconds, memory = measure(ready.step, min_run_time, device), peak_memory(device) - base
        facts = {"parameters": ready.parameters, "flops": ready.flops}
        return {"seconds": seconds, "memory": memory, **facts}

    return turn


_turns: list[Callable[[], dict[str, Any]]] = []  # of a process that was started for a contestant


def _start(*arguments: Any) -> None:
    _turns.append(prepare(*arguments))


def _run_turn() -> dict[str, Any]:
    return _turns[0]()


def compete(
    builds: Mapping[str, Callable[[], Ready]], device: Any, args: BenchmarkOptions
) -> dict[str, list[Turn]]:
    """Let contestants that `builds` make, by name, run in turn, `args.repeats` times."""
    import torch

    turns: dict[str, list[Turn]] = {name: [] for name in builds}
    # Not a fork, which would start with the memory, the threads and the CUDA of this process.
    spawn = get_context("spawn")
    with ExitStack() as stack:
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, spawn)) for name in builds}
        try:
            for name, build in builds.items():
                pools[name].submit(_start, build, device, args.min_run_time).result()
            for _ in range(args.repeats):
                for name, pool in pools.items():
                    turns[name].append(pool.submit(_run_turn).result())
        except (UserError, torch.OutOfMemoryError, BrokenProcessPool) as error:
            why = str(error).split(". ")[0]
            if isinstance(error, BrokenProcessPool):
                why = "its process was killed, as for too much memory, or its error is above"
            remedy = "use a smaller --batch_size or --size, or fewer --peers"
            raise UserError(f"{name}: {why}; {remedy}") from None
    return turns


def rounded(value: float) -> float:
    """The number with four significant digits."""
    return float(f"{value:.4g}")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    numbers = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: rounded(value) for name, value in numbers.items()}


def compared(
    turns: Mapping[str, Sequence[Turn]], pairs: Sequence[tuple[str, str]], images: int
) -> dict[str, Any]:
    """The numbers of a contest: by contestant, and for pairs (a, b) as a over b, turn by turn."""
    import pandas as pd

    # A row per turn, a column per part of a step.
    seconds = {name: pd.DataFrame([turn["seconds"] for turn in own]) for name, own in turns.items()}
    medians = {name: table.median().map(rounded).to_dict() for name, table in seconds.items()}
    memory = {name: max(turn["memory"] for turn in own) for name, own in turns.items()}
    flops = {name: own[0]["flops"] for name, own in turns.items()}  # of products, convolutions

    def rate_ratios(part: str) -> dict[str, dict[str, float]]:
        of_part = [pair for pair in pairs if part in seconds[pair[0]]]
        return {f"{a}_over_{b}": spread(seconds[b][part] / seconds[a][part]) for a, b in of_part}

    return {
        "images_per_s": {name: spread(images / table["total"]) for name, table in seconds.items()},
        "images_per_s_ratio": rate_ratios("total"),
        "images_per_cpu_s_ratio": rate_ratios("cpu"),
        "seconds": medians,
        "peak_memory_mib": {name: rounded(mib) for name, mib in memory.items()},
        "peak_memory_ratio": {
            f"{a}_over_{b}": rounded(memory[a] / memory[b]) for a, b in pairs if memory[b]
        },
        "gflop_per_image": {name: rounded(n / images / 1e9) for name, n in flops.items()},
        "tflop_per_s": {n: rounded(f / medians[n]["total"] / 1e12) for n, f in flops.items()},
        "parameters": {name: own[0]["parameters"] for name, own in turns.items()},
    }


def run_contest(
    args: NetworkOptions,
    execution: Any,
    builds: Mapping[str, Callable[[], Ready]],
    pairs: Sequence[tuple[str, str]],
    **facts: Any,
) -> None:
    """Let contestants compete, and print what `compared` says of them beside `facts`."""
    for name in args.peers:
        if find_spec(name) is None:
            raise UserError(f"{name} is missing: python -m pip install {name}", "peers")
    numbers = compared(compete(builds, execution.device, args), pairs, args.batch_size)
    print_result(args, **facts, dtype=execution.dtype, **numbers)


def print_result(args: BenchmarkOptions, **facts: Any) -> None:
    """Print one line of JSON: the options, what was measured, and where and when."""
    print(json.dumps({**vars(args), **facts, **surroundings(getattr(args, "peers", ()))}))


def surroundings(peers: Iterable[str]) -> dict[str, Any]:
    """When and where something is measured, beside which libraries."""
    from ldm.run import git_revision, hardware, versions

    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "versions": {**versions(), **{name: version(name) for name in peers}},
        "revision": git_revision(),
    }
