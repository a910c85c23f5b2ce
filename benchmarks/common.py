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
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from ldm.cli import Count, NotNegative, option
from ldm.errors import UserError
from ldm.settings import DEVICE_HELP, PRECISION_HELP

# Imported before the memory of a contestant is measured: libraries are not what is compared.
IMPORTS = {
    "all": (
        "torch._dynamo",
        "torch.utils.benchmark",
        "torch.utils.flop_counter",
        "ldm.data.corpora",
        "ldm.data.datamodule",
        "ldm.exchange.diffusers_export",
        "ldm.modules.ema",
        "ldm.synthesis.synthesiser",
    ),
    "ours": (),
    "diffusers": ("diffusers.models", "diffusers.training_utils"),
    "monai": ("monai.networks.nets",),
}
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

Lap = Callable[[str], None]  # called at the end of each part of a step, with the part's name
Turns = Mapping[str, Sequence[Mapping[str, Any]]]  # by contestant, what `run_turn` returns


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Options of every benchmark."""

    repeats: Count = option(default=5, help="turns of each contestant")
    min_run_time: NotNegative = option(default=1.0, help="shortest time of a turn, in seconds")


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(BenchmarkOptions):
    """Options of the benchmarks that run networks."""

    size: Literal["demo", "small", "paper"] = option(default="small", help="size of the networks")
    batch_size: Count = option(default=8, help="images of a step")
    peers: tuple[Literal["diffusers", "monai"], ...] = option(
        default=("diffusers",),
        nargs="*",
        metavar="LIBRARY",
        help="libraries to compare with, diffusers or monai; without a name: ours alone",
    )
    precision: Literal["auto", "32", "bf16"] | None = option(
        default=None, help=PRECISION_HELP.format("bf16")
    )
    channels_last: bool = option(default=False, help="memory layout that suits tensor cores")
    compile: bool = option(default=False, help="compile the networks")
    device: str = option(default="auto", help=DEVICE_HELP)


@dataclass(frozen=True)
class Ready:
    """A contestant that is built.

    Attributes:
        step: Processes one batch.
        parameters: Number of weights.
        flops: Floating-point operations of a step, or None where they are not counted.
    """

    step: Callable[[Lap], None]
    parameters: int
    flops: int | None = None


@dataclass(frozen=True)
class Contestant:
    """How to build a contestant, in whichever process.

    Attributes:
        build: A function that can be pickled and returns what is to be measured.
        device: The torch.device to run on.
        library: A key of `IMPORTS`.
    """

    build: Callable[[], Ready]
    device: Any
    library: str = "ours"


def no_lap(part: str) -> None:
    """Measure no parts."""


def measure(step: Callable[[Lap], None], min_run_time: float, device: Any) -> dict[str, float]:
    """Seconds of a step: `total` (median), `cpu` (mean), and those of its parts in one more step.

    `cpu`, on CPUs only, is the time of all processors together, which hardly depends on what else
    the machine does.
    """
    import torch
    from torch.utils.benchmark import Timer

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
    # The Timer waits for the device. It sets the number of threads, to one unless told otherwise.
    timer = Timer("count()", globals={"count": count}, num_threads=torch.get_num_threads())
    result = {"total": timer.blocked_autorange(min_run_time=min_run_time).median}
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


class Host:
    """A contestant that is built and warmed up in this process."""

    def __init__(self, contestant: Contestant, min_run_time: float):
        for module in (*IMPORTS["all"], *IMPORTS[contestant.library]):
            import_module(module)
        self.min_run_time, self.device = min_run_time, contestant.device
        restart_peak(self.device)
        self.base = 0.0 if self.device.type == "cuda" else peak_memory(self.device)
        self.ready = contestant.build()
        gc.collect()
        restart_peak(self.device)  # building may take more for a moment
        self.ready.step(no_lap)

    def run_turn(self) -> dict[str, Any]:
        """Measure a turn: seconds of a step, and the peak memory (MiB) since it was built."""
        seconds = measure(self.ready.step, self.min_run_time, self.device)
        facts = {"parameters": self.ready.parameters, "flops": self.ready.flops}
        return {"seconds": seconds, "memory": peak_memory(self.device) - self.base, **facts}


_hosts: list[Host] = []  # the contestant of this process, where it was started for one


def _build(contestant: Contestant, min_run_time: float) -> None:
    _hosts.append(Host(contestant, min_run_time))


def _run_turn() -> dict[str, Any]:
    return _hosts[0].run_turn()


def call_in(pool: Executor, name: str, call: Callable, *args: Any) -> Any:
    """The result of a call in the process of the contestant `name`, its errors as one line."""
    import torch

    remedy = "use a smaller --batch_size or --size, or fewer --peers"
    try:
        return pool.submit(call, *args).result()
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except ModuleNotFoundError as error:
        raise UserError(
            f"{name}: {error}; python -m pip install {error.name}, or leave it out of --peers"
        ) from None
    except torch.OutOfMemoryError as error:
        raise UserError(f"{name}: {str(error).split('. ')[0]}; {remedy}") from None
    except BrokenProcessPool:
        raise UserError(
            f"the process of {name} ended early: it was killed, as for too much memory, or its "
            f"error is above; {remedy}"
        ) from None


def compete(contestants: Mapping[str, Contestant], args: BenchmarkOptions) -> Turns:
    """Let the contestants run in turn, `args.repeats` times, each built and warmed up before.

    Raises:
        UserError: A contestant could not be built or run.
    """
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    # Not a fork, which would start with the memory, the threads and the CUDA of this process.
    spawn = get_context("spawn")
    with ExitStack() as stack:
        pools = {}
        for name, contestant in contestants.items():
            pools[name] = stack.enter_context(ProcessPoolExecutor(1, spawn))
            call_in(pools[name], name, _build, contestant, args.min_run_time)
        for _ in range(args.repeats):
            for name, pool in pools.items():
                turns[name].append(call_in(pool, name, _run_turn))
    return turns


def rounded(value: float) -> float:
    """The number with four significant digits."""
    return float(f"{value:.4g}")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    numbers = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: rounded(value) for name, value in numbers.items()}


def compared(turns: Turns, pairs: Sequence[tuple[str, str]], images: int) -> dict[str, Any]:
    """The numbers of a contest: by contestant, and for pairs (a, b) as a over b, turn by turn.

    Args:
        turns: Of each contestant.
        pairs: Names; where a ratio of rates is above 1, the first of the pair is faster.
        images: Images of a step.
    """
    # By contestant and part, turn by turn.
    seconds = {
        name: {part: [turn["seconds"][part] for turn in own] for part in own[0]["seconds"]}
        for name, own in turns.items()
    }
    medians = {
        name: {part: spread(values)["median"] for part, values in parts.items()}
        for name, parts in seconds.items()
    }

    def rate_ratios(part: str) -> dict[str, dict[str, float]]:
        return {
            f"{a}_over_{b}": spread(
                [y / x for x, y in zip(seconds[a][part], seconds[b][part], strict=True)]
            )
            for a, b in pairs
            if part in seconds[a]
        }

    memory = {name: max(turn["memory"] for turn in own) for name, own in turns.items()}
    # Of matrix products and convolutions.
    flops = {name: own[0]["flops"] for name, own in turns.items() if own[0]["flops"]}
    return {
        "images_per_s": {
            name: spread([images / value for value in parts["total"]])
            for name, parts in seconds.items()
        },
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
