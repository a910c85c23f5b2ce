"""A graph of stages, several at once: what can run runs, and a failure stops only what needs it."""

import contextlib
import logging
import os
import queue
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TextIO

from ldm.errors import UserError
from ldm.stages import Finished, Launch, Ledger, Record, Stage, StageBusy, StageFailed, launch

log = logging.getLogger(__name__)

POLL = 2.0  # seconds between looks at stages that another process runs
THREADS = "OMP_NUM_THREADS"


class State(Enum):
    """Of a stage, as far as files tell."""

    DONE = "done"
    RUNNING = "running"
    FAILED = "failed"
    STOPPED = "stopped"  # interrupted: it goes on where it was
    BLOCKED = "blocked"  # a stage that it needs failed
    WAITING = "waiting"  # not begun, or to be made anew


@dataclass(frozen=True)
class Standing:
    """A stage's state, with what is known of it."""

    stage: Stage
    state: State
    finished: Finished | None = None
    record: Record | None = None
    blocked_by: str = ""  # the failed stage


def survey(ledger: Ledger, stages: Sequence[Stage]) -> dict[str, Standing]:
    """Where every stage stands, by name.

    Args:
        stages: Each after those that it needs.
    """
    found: dict[str, Standing] = {}
    for stage in stages:
        found[stage.name] = _standing(ledger, stage, found)
    return found


def _standing(ledger: Ledger, stage: Stage, before: Mapping[str, Standing]) -> Standing:
    record = ledger.read(stage.name)
    needed = [before[name] for name in stage.after]
    for one in needed:
        if one.state in (State.FAILED, State.BLOCKED):
            return Standing(stage, State.BLOCKED, blocked_by=one.blocked_by or one.stage.name)
    stamps = {one.stage.name: one.finished.stamp for one in needed if one.finished}
    key = ledger.key(stage, stamps) if len(stamps) == len(needed) else None
    done = ledger.done(stage, key) if key else None
    if done is not None:
        return Standing(stage, State.DONE, done, record)
    if ledger.is_running(stage.name):
        return Standing(stage, State.RUNNING, record=record)
    if record is None or record.key != key or record.finished is not None:
        return Standing(stage, State.WAITING)
    state = State.STOPPED if record.failed is None else State.FAILED
    return Standing(stage, state, record=record)


def forgive(ledger: Ledger, stages: Sequence[Stage]) -> None:
    """Let those of the stages that failed be run again."""
    for stage in stages:
        record = ledger.read(stage.name)
        if record is not None and record.failed is not None:
            with contextlib.suppress(StageBusy):
                ledger.forgive(stage.name)


def needed_by(stages: Sequence[Stage], names: Sequence[str]) -> list[Stage]:
    """The named stages and all that they need, in the order of `stages`."""
    by_name = {stage.name: stage for stage in stages}
    wanted: set[str] = set()
    stack = list(names)
    while stack:
        name = stack.pop()
        if name not in wanted:
            wanted.add(name)
            stack += by_name[name].after
    return [stage for stage in stages if stage.name in wanted]


class Slots:
    """Places for commands on this machine, each with its GPUs.

    Args:
        jobs: Commands at once.
        gpus: Their numbers or UUIDs; empty where commands choose for themselves.
    """

    def __init__(self, jobs: int, gpus: Sequence[str] = ()):
        self.jobs, self.gpus = jobs, list(gpus)
        self.share = -(-jobs // len(self.gpus)) if self.gpus else 0  # commands on one GPU, at most
        self.running = 0
        self.load: Counter[str] = Counter()

    def check(self, stage: Stage) -> None:
        """UserError for a stage that wants more GPUs than there are."""
        if self.gpus and stage.gpus > len(self.gpus):
            raise UserError(
                f"{stage.name} wants {stage.gpus} GPUs and --gpus names {len(self.gpus)}; name"
                " more, or lower its `gpus`"
            )

    def take(self, stage: Stage) -> list[str] | None:
        """GPUs for a stage (none are needed where none were named); None while there is no room.

        A stage of several GPUs has them to itself.
        """
        if self.running >= self.jobs:
            return None
        room = 1 if stage.gpus > 1 else self.share
        free = [g for g in self.gpus if self.load[g] < room]
        chosen = sorted(free, key=lambda g: self.load[g])[: stage.gpus]
        if self.gpus and len(chosen) < stage.gpus:
            return None
        self.running += 1
        self.load.update(self._weights(stage, chosen))
        return chosen

    def give_back(self, stage: Stage, gpus: Sequence[str]) -> None:
        self.running -= 1
        self.load.subtract(self._weights(stage, gpus))

    def _weights(self, stage: Stage, gpus: Sequence[str]) -> dict[str, int]:
        return dict.fromkeys(gpus, self.share if stage.gpus > 1 else 1)

    def environment(self, gpus: Sequence[str]) -> dict[str, str]:
        """Variables of a command: its GPUs, and its share of the cores."""
        variables = {}
        if self.gpus:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        if self.jobs > 1 and THREADS not in os.environ:
            # Each command would start a thread per core, and they would take turns.
            variables[THREADS] = str(max(1, (os.cpu_count() or 1) // self.jobs))
        return variables


class _Halt(Exception):
    """The scheduler ends: the command that runs is to end, too."""


class Scheduler:
    """Runs what is not done yet.

    Args:
        ledger: Shared with any number of other schedulers.
        stages: Each after those that it needs.
        slots: Of this machine.
        stream: Of the progress lines; standard output when not given.
    """

    def __init__(
        self,
        ledger: Ledger,
        stages: Sequence[Stage],
        slots: Slots,
        stream: TextIO | None = None,
        launch: Launch = launch,
    ):
        self.ledger, self.stages, self.slots = ledger, stages, slots
        self.stream = sys.stdout if stream is None else stream
        self.launch = launch
        self._halted = threading.Event()
        self._ended: queue.Queue[tuple[Stage, list[str], BaseException | None]] = queue.Queue()
        self._settled = 0
        self._stopped: set[str] = set()  # by somebody else, while we ran them
        for stage in stages:
            slots.check(stage)

    def run(self) -> dict[str, Standing]:
        """Run until nothing is left that can run; returns where every stage stands then.

        Raises:
            Whatever ends this process (a signal, Ctrl-C), after the commands have ended.
        """
        standing = survey(self.ledger, self.stages)
        done = [one for one in standing.values() if one.state is State.DONE]
        self._settled = len(done)
        if done:
            seconds = sum(one.finished.seconds for one in done if one.finished)
            self._say(f"{len(done)} of {len(self.stages)} jobs were done before ({seconds:.0f} s)")
        for one in standing.values():
            if one.state is State.FAILED:
                self._settled += 1
                reason = one.record.reason if one.record else ""
                self._say(f"failed before: {one.stage.title}: {reason}")
        threads: dict[str, threading.Thread] = {}
        elsewhere: set[str] = set()
        try:
            while True:
                self._update(standing, threads)
                for name in self._startable(standing, threads):
                    gpus = self.slots.take(standing[name].stage)
                    if gpus is not None:
                        threads[name] = self._start(standing, name, gpus)
                busy = {n for n, s in standing.items() if s.state is State.RUNNING} - set(threads)
                for name in sorted(busy - elsewhere):
                    self._say(f"another process runs: {standing[name].stage.title}")
                elsewhere |= busy
                if not threads and not busy:
                    return standing
                self._collect(standing, threads)
        except BaseException:
            self._halted.set()
            for thread in threads.values():
                thread.join()
            raise

    def _update(self, standing: dict[str, Standing], threads: Mapping) -> None:
        """Look again at what waits and at what others run."""
        for stage in self.stages:
            name, now = stage.name, standing[stage.name]
            if name in threads or now.state in (State.DONE, State.FAILED, State.BLOCKED):
                continue
            standing[name] = _standing(self.ledger, stage, standing)

    def _startable(self, standing: Mapping[str, Standing], threads: Mapping) -> list[str]:
        return [
            name
            for name, one in standing.items()
            if name not in threads
            and one.state in (State.WAITING, State.STOPPED)
            and name not in self._stopped
            and all(standing[before].state is State.DONE for before in one.stage.after)
        ]

    def _start(self, standing: dict[str, Standing], name: str, gpus: list[str]) -> threading.Thread:
        stage = standing[name].stage
        stamps = {n: standing[n].finished.stamp for n in stage.after}
        key = self.ledger.key(stage, stamps)
        standing[name] = Standing(stage, State.RUNNING)

        def tick() -> None:
            if self._halted.is_set():
                raise _Halt

        def work() -> None:
            ended: BaseException | None = None
            try:
                extra = self.slots.environment(gpus)
                self.ledger.run(stage, key, tick, self.launch, extra)
            except BaseException as error:
                ended = error
            self._ended.put((stage, gpus, ended))

        thread = threading.Thread(target=work, name=name)
        thread.start()
        if self.slots.jobs > 1:
            self._say(f"started: {stage.title}")
        return thread

    def _collect(self, standing: dict[str, Standing], threads: dict) -> None:
        """Wait a little for a stage of ours to end, and note how."""
        try:
            stage, gpus, error = self._ended.get(timeout=POLL)
        except queue.Empty:
            return
        threads.pop(stage.name).join()
        self.slots.give_back(stage, gpus)
        if isinstance(error, StageBusy):
            standing[stage.name] = Standing(stage, State.RUNNING)
            return
        if error is not None and not isinstance(error, StageFailed):
            raise error
        now = standing[stage.name] = _standing(self.ledger, stage, standing)
        self._settled += 1
        if now.finished:
            self._line(stage, now.finished.seconds, now.finished.number)
        elif now.state is State.FAILED and now.record:
            words = f"failed: {now.record.reason} ({self.ledger.log(stage.name)})"
            self._line(stage, now.record.seconds, words)
        else:
            # Somebody stopped the command: it is not for this process to start it again.
            self._stopped.add(stage.name)
            seconds = now.record.seconds if now.record else 0.0
            self._line(stage, seconds, "stopped; the same command goes on here")

    def _line(self, stage: Stage, seconds: float, words: str) -> None:
        total = len(self.stages)
        head = f"[{self._settled:{len(str(total))}}/{total}] {stage.title:52}"
        self._say(f"{head} {seconds:7.0f} s  {words}")

    def _say(self, text: str) -> None:
        self.stream.write(f"{text}\n")
        self.stream.flush()
