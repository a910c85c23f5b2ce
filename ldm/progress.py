"""How far a stage of a command is: bars on a terminal, and lines now and then in a log file."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from threading import Event, Lock, Thread
from typing import Any, TextIO

from tqdm import tqdm

LOG_EVERY = 30.0  # seconds between lines of progress in a log file, at least
LOG_FORMAT = "{desc}: {n_fmt} of {total_fmt} {unit} in {elapsed}, {remaining} left{postfix}"
FIRST_SIGN = 10.0  # seconds after which a first step is said to be under way


class FirstStep:
    """Tells from a thread, until `end`, that the first step of a stage is still under way.

    It does so after 10, 20, 40 ... seconds. The other steps will take as long at least, which gives
    an estimate of the time left before anything can be measured.

    Args:
        steps: Number of steps; None or infinite where it is not known.
        say: Shows a text.
    """

    def __init__(self, steps: float | None, say: Callable[[str], None]):
        self._others, self._say = (steps or 1) - 1, say
        self._ended, self._lock = Event(), Lock()
        Thread(target=self._watch, name="first step", daemon=True).start()

    def end(self) -> bool:
        """Say no more; returns whether this is the first call."""
        with self._lock:
            first = not self._ended.is_set()
            self._ended.set()
        return first

    def _watch(self) -> None:
        began, due = time.monotonic(), FIRST_SIGN
        while not self._ended.wait(began + due - time.monotonic()):
            text = f"first step under way, {due:.0f} s"
            if 0 < self._others < math.inf:
                text += f", at least {tqdm.format_interval(due * self._others)} left"
            with self._lock:  # nothing is said after `end`
                if not self._ended.is_set():
                    self._say(text)
            due *= 2


class LogLines:
    """A stream on which each state of a bar is a line of its own."""

    def __init__(self, stream: TextIO):
        self._stream, self._last = stream, ""

    def write(self, text: str) -> None:
        text = text.strip().removeprefix(": ")  # of a bar without a description
        if text and text != self._last:
            self._stream.write(text + "\n")
            self._last = text

    def flush(self) -> None:
        self._stream.flush()


class Bar(tqdm):
    """The progress of a stage, with the options of tqdm: a bar on a terminal, lines elsewhere.

    Args:
        step: How many units the first step advances, which may be a part of one.
    """

    _first: FirstStep | None = None

    def __init__(self, *arguments: Any, step: float = 1, **options: Any):
        stream = options.get("file") or sys.stderr
        self.live = stream.isatty()
        defaults: dict[str, Any] = {"dynamic_ncols": True}
        if not self.live:
            defaults = {"mininterval": LOG_EVERY, "bar_format": LOG_FORMAT}
            options["file"] = LogLines(stream)
        super().__init__(*arguments, **defaults | options)
        steps = None if self.total is None else math.ceil((self.total - self.n) / step)
        if not self.disable and steps != 0:
            self._first = FirstStep(steps, self.set_postfix_str)

    def moveto(self, n: int) -> None:
        if self.live:  # a file has no line above the last one
            super().moveto(n)

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            yield item
            self.begun()

    def begun(self) -> None:
        """Note that the first step is done."""
        if self._first is not None and self._first.end():
            self.set_postfix_str("", refresh=False)

    def update(self, n: float = 1) -> bool | None:
        self.begun()
        return super().update(n)

    def close(self) -> None:
        self.begun()
        super().close()
