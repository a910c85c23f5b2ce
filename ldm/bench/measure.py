"""What is measured: time by part, peak memory, floating-point operations; and the record of it."""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ldm.run import git_revision, hardware, versions

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
TOTAL, CPU = "total", "cpu"


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Stopwatch:
    """Time by part of something that is done several times over.

    On a CUDA device the parts are told apart by events on its stream, so that measuring them does
    not make it wait; a part lasts until the device has done it. Only both ends are synchronised.
    """

    def __init__(self, device: torch.device):
        self.device = device
        synchronise(device)
        self._marks: list[tuple[str, Any]] = []
        self._start, self._cpu = time.perf_counter(), time.process_time()
        self.lap("")

    def lap(self, part: str) -> None:
        """What was done since the last call (or the start) belongs to `part`."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((part, event))
            return
        synchronise(self.device)
        self._marks.append((part, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Sums by part, and `total`, by the wall clock, in seconds.

        On a CPU also `cpu`, the processor time of this process, all its threads together: it hardly
        depends on what else the machine does.
        """
        synchronise(self.device)
        result = {TOTAL: time.perf_counter() - self._start}
        if self.device.type == "cpu":
            result[CPU] = time.process_time() - self._cpu
        for (_, before), (part, after) in zip(self._marks, self._marks[1:], strict=False):
            # Events say milliseconds.
            took = (
                before.elapsed_time(after) / 1e3 if self.device.type == "cuda" else after - before
            )
            result[part] = result.get(part, 0.0) + took
        return result


class PeakMemory:
    """Peak memory in MiB, of what is done after `restart`.

    On a CUDA device: of its tensors. Otherwise: of the process, above what it held when this object
    was made, which is mostly libraries.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.restart()
        self._base = 0.0 if device.type == "cuda" else _resident_peak()

    def restart(self) -> None:
        """The peak becomes what is held now (off Linux, not that of a process)."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):
                CLEAR.write_text("5")

    def mib(self) -> float:
        if self.device.type == "cuda":
            return round(torch.cuda.max_memory_allocated(self.device) / 2**20, 1)
        return round(_resident_peak() - self._base, 1)


def _resident_peak() -> float:
    """Largest resident memory of this process, MiB."""
    try:
        # Not from getrusage: a new process starts there with the peak of the one that made it.
        lines = STATUS.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
    except (OSError, StopIteration):
        unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes on macOS, else KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def count_flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products and convolutions, two per multiply-add.

    Run it on the device "meta": nothing is computed, and attention is counted by its products,
    which the fused kernels of some devices would hide.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    numbers = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: rounded(value) for name, value in numbers.items()}


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def surroundings(packages: Sequence[str] = ()) -> dict[str, Any]:
    """When and where it was measured: date, hardware, versions (also of `packages`), revision."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "versions": {**versions(), **{name: version(name) for name in packages}},
        "revision": git_revision(),
    }
