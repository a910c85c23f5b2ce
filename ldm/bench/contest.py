"""Contestants that take turns, each in a process of its own.

So that what else the machine does falls on all of them alike, and ratios are between runs of the
same turn; and so that the memory of one is not that of another.
"""

import gc
import multiprocessing
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch

from ldm.bench.measure import CPU, TOTAL, PeakMemory, ratios, rounded, spread
from ldm.errors import UserError

PROCESSES = ("each", "turn", "none")
LESS = "use a smaller --batch_size or --size, or --processes turn"


class Runner(Protocol):
    """A contestant that is ready.

    Attributes:
        facts: What there is to say of it.
    """

    facts: dict[str, Any]

    def run(self) -> dict[str, float]:
        """Seconds of one run, by part and `total`."""


class Contestant(Protocol):
    """How to make a `Runner`; it is sent to another process."""

    device: torch.device

    def load(self) -> None:
        """Import the libraries, whose memory does not count."""

    def build(self) -> Runner: ...


@dataclass
class Standing:
    """What a contestant did.

    Attributes:
        seconds: Of each turn, by part.
        memory: Peak in MiB; None where it cannot be told from that of others.
        facts: See `Runner`.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    seconds: list[dict[str, float]] = field(default_factory=list)
    memory: float | None = None

    def totals(self) -> list[float]:
        return [seconds[TOTAL] for seconds in self.seconds]

    def rates(self, images: int) -> list[float]:
        """Images per second of each turn."""
        return [images / seconds for seconds in self.totals()]

    def parts(self) -> dict[str, float]:
        """Median seconds of each part."""
        names = self.seconds[0]
        return {name: spread([s[name] for s in self.seconds])["median"] for name in names}


class _Here:
    """A contestant in this process."""

    def __init__(self, name: str, contestant: Contestant):
        contestant.load()
        self._memory = PeakMemory(contestant.device)
        self._runner = contestant.build()
        gc.collect()
        self._memory.restart()  # building may take more for a moment
        self.facts = self._runner.facts

    def run(self) -> tuple[dict[str, float], float]:
        return self._runner.run(), self._memory.mib()

    def close(self) -> None:
        del self._runner


class _Apart:
    """A contestant in a process of its own.

    Raises:
        UserError: Its own, or its process ended.
    """

    def __init__(self, name: str, contestant: Contestant):
        self.name = name
        # Not a fork: that would start with the memory, the threads and the CUDA of this process.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, contestant))
        self._process.start()
        theirs.close()
        try:
            self.facts = self._receive()
        except BaseException:
            self.close()
            raise

    def run(self) -> tuple[dict[str, float], float]:
        self._connection.send("run")
        return self._receive()

    def _receive(self) -> Any:
        try:
            ok, value = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            status = self._process.exitcode
            why = "killed, as for too much memory" if status == -9 else "its error is above"
            raise UserError(
                f"the process of {self.name} ended with status {status} ({why}); {LESS}"
            ) from None
        if not ok:
            raise UserError(f"{self.name}: {value}")
        return value

    def close(self) -> None:
        with suppress(OSError):  # it has ended
            self._connection.send("end")
        self._connection.close()
        self._process.join(60)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


def _serve(connection: Connection, contestant: Contestant) -> None:
    """What the process of a contestant does: build it, then run it when asked."""
    try:
        here = _Here("", contestant)
        connection.send((True, here.facts))
        while connection.recv() == "run":
            connection.send((True, here.run()))
    except UserError as error:
        connection.send((False, str(error)))
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        connection.send((False, f"{reason}; {LESS}"))
    except (EOFError, KeyboardInterrupt):
        pass  # the other side has ended, and says so itself


def compete(
    contestants: Mapping[str, Contestant], repeats: int, processes: str = "each"
) -> dict[str, Standing]:
    """Let the contestants run in turn, `repeats` times after a warm-up.

    Args:
        processes: "each": a process per contestant, all at once. "turn": a new one at every turn,
            with a warm-up of its own, so that one is in memory at a time. "none": all in this
            process, which starts faster, but memory cannot be told apart.

    Raises:
        UserError: A contestant could not be built or run.
    """
    host = _Here if processes == "none" else _Apart
    standings = {name: Standing() for name in contestants}

    def note(name: str, outcome: tuple[dict[str, float], float]) -> None:
        seconds, memory = outcome
        standing = standings[name]
        standing.seconds.append(seconds)
        if processes != "none":
            standing.memory = max(standing.memory or 0.0, memory)

    if processes == "turn":
        for _ in range(repeats):
            for name, contestant in contestants.items():
                with ExitStack() as stack:
                    one = host(name, contestant)
                    stack.callback(one.close)
                    standings[name].facts = one.facts
                    one.run()  # warms up
                    note(name, one.run())
        return standings
    with ExitStack() as stack:
        hosts = {}
        for name, contestant in contestants.items():
            hosts[name] = host(name, contestant)
            stack.callback(hosts[name].close)
            standings[name].facts = hosts[name].facts
        for one in hosts.values():
            one.run()
        for _ in range(repeats):
            for name, one in hosts.items():
                note(name, one.run())
    return standings


def compared(
    standings: Mapping[str, Standing], pairs: list[tuple[str, str]], images: int
) -> dict[str, Any]:
    """The numbers of a contest: by contestant, and of pairs as the first over the second.

    Args:
        images: In the time, and the operations, that a contestant reports.
    """
    rates = {name: standing.rates(images) for name, standing in standings.items()}
    result: dict[str, Any] = {
        "images_per_s": {name: spread(values) for name, values in rates.items()},
        "images_per_s_ratio": {
            f"{a}_over_{b}": spread(ratios(rates[a], rates[b])) for a, b in pairs
        },
        "seconds": {name: standing.parts() for name, standing in standings.items()},
    }
    if all(CPU in seconds for s in standings.values() for seconds in s.seconds):
        cpu = {name: [seconds[CPU] for seconds in s.seconds] for name, s in standings.items()}
        # As above the first is better where the ratio is above 1.
        result["images_per_cpu_s_ratio"] = {
            f"{a}_over_{b}": spread(ratios(cpu[b], cpu[a])) for a, b in pairs
        }
    memory = {name: s.memory for name, s in standings.items() if s.memory is not None}
    if memory:
        result["peak_memory_mib"] = memory
        result["peak_memory_ratio"] = {
            f"{a}_over_{b}": rounded(memory[a] / memory[b]) for a, b in pairs if memory[b] > 0
        }
    flops = {name: s.facts["flops"] for name, s in standings.items() if "flops" in s.facts}
    if flops:
        # Operations that are no matrix product or convolution are left out.
        result["gflop_per_image"] = {n: rounded(f / images / 1e9) for n, f in flops.items()}
        result["tflop_per_s"] = {
            name: rounded(count / spread(standings[name].totals())["median"] / 1e12)
            for name, count in flops.items()
        }
    return {**result, "parameters": {n: s.facts["parameters"] for n, s in standings.items()}}
