"""What is printed while an experiment runs: a line for every job that ended."""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TextIO

from ldm.experiment.jobs import Record, Records, Standing, State

TAIL = 15  # lines of a failed job's log that are shown
STOPPED_WORDS = "stopped; the same command goes on here"


@dataclass
class Progress:
    """Follows the records of jobs.

    On a terminal, the seconds of a job alone count up; elsewhere the start has a line, too.
    """

    records: Records
    at_once: int = 1  # how many jobs run at once
    tails: bool = False  # whether the end of a failed job's log is shown
    stream: TextIO = field(default_factory=lambda: sys.stdout)

    def __post_init__(self):
        self.titles: dict[str, str] = {}  # of the jobs that have not ended
        self._seen: dict[str, int] = {}  # time of a record when it was looked at last
        self._started: dict[str, float] = {}
        self._settled = 0
        self._open = False  # the line on the terminal is not complete
        self._counts = self.at_once == 1 and self.stream.isatty()

    def begin(self, standing: Mapping[str, Standing]) -> None:
        """Tell what was done before."""
        self.total = len(standing)
        done = [one for one in standing.values() if one.state is State.DONE]
        self._settled = len(done)
        if done:
            seconds = sum(one.record.seconds for one in done if one.record)
            self._say(f"{len(done)} of {len(standing)} jobs were done before ({seconds:.0f} s)")
        for name, one in standing.items():
            if one.state is State.FAILED and one.record:
                self._settled += 1
                self._say(f"failed before: {one.job.title}: {one.record.reason}")
            if one.state in (State.WAITING, State.STOPPED, State.RUNNING):
                self.titles[name] = one.job.title
                self._seen[name] = self._time(name)

    def look(self) -> None:
        """Print what has changed."""
        for name in list(self.titles):
            now = self._time(name)
            if now != self._seen[name]:
                self._seen[name] = now
                record = self.records.read(name)
                if record is not None:
                    self._changed(name, record)
        if self._started and self._counts:
            name, start = next(iter(self._started.items()))
            line = self._line(self._settled + 1, self.titles[name], time.monotonic() - start)
            self.stream.write(f"\r{line}")
            self.stream.flush()
            self._open = True

    def end(self) -> None:
        """Print what has changed since the last look, and what was stopped."""
        self.look()
        for name in self._started:
            record = self.records.read(name)
            seconds = record.seconds if record else 0.0
            self._say(self._line(self._settled, self.titles[name], seconds, STOPPED_WORDS))

    def _changed(self, name: str, record: Record) -> None:
        if record.done or record.failed is not None:
            self._started.pop(name, None)
            self._settled += 1
            words, tail = record.number, []
            if record.failed is not None:
                words = f"failed: {record.reason} ({self.records.path(name, 'log')})"
                tail = self.records.tail(name, TAIL) if self.tails else []
            self._say(self._line(self._settled, self.titles.pop(name), record.seconds, words))
            for row in tail:
                self._say(f"    {row}")
        elif name not in self._started:
            self._started[name] = time.monotonic() - record.seconds
            if not self._counts:
                self._say(f"started: {self.titles[name]}")

    def _time(self, name: str) -> int:
        try:
            return self.records.path(name).stat().st_mtime_ns
        except OSError:
            return 0

    def _line(self, number: int, title: str, seconds: float, words: str = "") -> str:
        count = f"[{number:{len(str(self.total))}}/{self.total}]"
        return f"{count} {title:52} {seconds:7.0f} s  {words}".rstrip()

    def _say(self, text: str) -> None:
        self.stream.write(f"{chr(13) if self._open else ''}{text}\n")
        self.stream.flush()
        self._open = False
