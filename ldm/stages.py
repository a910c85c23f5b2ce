"""Commands that depend on one another, each finished one remembered.

A stage is one command line of an entry point. What decides its result (the command, its
configurations, the stages before it) makes its key. A stage that finished under the same key is not
run again; one that was interrupted goes on as far as its command can; with another key, what it
wrote is removed first.

`Runner` runs stages one after another (the demo); `ldm.table.scheduler` runs a graph of them,
several at once. Both keep their records in a `Ledger`, which any number of processes may share.
"""

import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import yaml

from ldm import __version__
from ldm.cli import STOPPED
from ldm.files import write_json

ROOT = Path(__file__).resolve().parents[1]  # where the entry points are
TAIL = 15  # lines of a failed stage's log that are shown
GRACE = 60.0  # seconds that a stopped stage has to end by itself, its checkpoint written

# Options that say how something is computed, not what: another value makes nothing anew.
NEUTRAL = ("--device", "--num_workers", "--workers")

# Statuses of a command that somebody stopped: it goes on later, and has not failed.
INTERRUPTED = (STOPPED, 128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM)


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: Of its log and marker.
        title: What it does, in a few words.
        command: Script and arguments.
        after: Names of the stages whose results it uses.
        output: What it writes: removed when it has to be made anew.
        files: Configurations that it reads; their content is part of the key.
        environment: Variables that it needs.
        data: Further facts that decide the result.
        number: Reads a key number from the results.
        kind: What sort of work it is; stages of one kind can share a job array.
        gpus: How many GPUs it is to be given, where there are any.
    """

    name: str
    title: str
    command: tuple[str, ...]
    after: tuple[str, ...] = ()
    output: tuple[Path, ...] = ()
    files: tuple[Path, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    data: str = ""
    number: Callable[[], str] = str
    kind: str = ""
    gpus: int = 1


@dataclass(frozen=True)
class Finished:
    """What is remembered of a finished stage.

    Attributes:
        command: As one can type it in the repository's folder.
        number: Its key number, in words.
        seconds: Wall-clock time, of all attempts.
        stamp: Of this execution; part of the keys of the stages after it.
    """

    key: str
    title: str
    command: str
    number: str
    seconds: float
    stamp: str


@dataclass(frozen=True)
class Record:
    """What the ledger holds of a stage that was begun, whether or not it ended.

    Attributes:
        finished: Set when it ended well.
        failed: Exit status of a command that failed, else None.
        reason: The last line of its log, when it failed.
    """

    key: str
    seconds: float = 0.0
    finished: Finished | None = None
    failed: int | None = None
    reason: str = ""


class StageFailed(Exception):
    """A command ended with a status other than 0; `status` is that of the whole."""

    def __init__(self, status: int):
        super().__init__(f"exit status {status}")
        self.status = status


class StageBusy(Exception):
    """Another process is running the stage."""


# A command, its log, variables, what to call about once per second, and the descriptor of a lock
# that the process is to hold until it ends.
Launch = Callable[[Sequence[str], Path, Mapping[str, str], Callable[[], None], int], int]


def start_process(
    command: Sequence[str], log_path: Path, environment: Mapping[str, str], lock: int
) -> subprocess.Popen:
    """A script of this repository as a process, its output in a file."""
    with log_path.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # So that a stage whose runner was killed still counts as running.
            pass_fds=(lock,),
        )


def end_process(process: subprocess.Popen, ask: bool = True) -> None:
    """End a process: it is asked to, has `GRACE` seconds for that, and is killed then.

    Args:
        ask: False where it has been asked already.
    """
    if ask:
        process.terminate()
    try:
        process.wait(timeout=GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def launch(
    command: Sequence[str],
    log_path: Path,
    environment: Mapping[str, str],
    tick: Callable[[], None],
    lock: int,
) -> int:
    """Run a script of this repository as a process; returns its status.

    An exception out of `tick` ends the process.
    """
    process = start_process(command, log_path, environment, lock)
    return watch(process, tick)


def watch(process: subprocess.Popen, tick: Callable[[], None]) -> int:
    """Wait for a process, calling `tick` about once per second; ended by any exception."""
    try:
        while True:
            try:
                return process.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                tick()
    except BaseException as stop:
        # Ctrl-C reaches the process by itself.
        end_process(process, ask=not isinstance(stop, KeyboardInterrupt))
        raise


class Ledger:
    """NAME.json, NAME.log and NAME.lock of every stage, in one folder.

    Args:
        folder: Of these files.
        version: Part of all keys: another version makes everything anew.

    A lock belongs to whoever runs the stage, and goes when that process and its command are gone:
    there is none to clean up after a crash.
    """

    def __init__(self, folder: Path, version: str = ""):
        self.folder = folder
        self.version = version

    def marker(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def read(self, name: str) -> Record | None:
        """What is known of a stage; None where it was never begun."""
        try:
            content = json.loads(self.marker(name).read_text())
            if "stamp" in content:
                done = Finished(**content)
                return Record(done.key, done.seconds, done)
            return Record(**content)
        except (OSError, ValueError, TypeError):
            return None

    def key(self, stage: Stage, stamps: Mapping[str, str]) -> str:
        """The key of a stage, given the stamps of those before it."""
        command = _without_neutral(stage.command)
        facts: list[Any] = [self.version, command, dict(stage.environment), stage.data]
        facts += [_content(path) for path in stage.files]
        facts += [stamps[name] for name in stage.after]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def done(self, stage: Stage, key: str) -> Finished | None:
        """The record of a stage that finished under this key and whose output is still there."""
        known = self.read(stage.name)
        if known and known.key == key and all(path.exists() for path in stage.output):
            return known.finished
        return None

    def is_running(self, name: str) -> bool:
        """Whether a process, here or on another machine, holds the stage."""
        if not (self.folder / f"{name}.lock").is_file():
            return False
        try:
            with self._locked(name):
                return False
        except StageBusy:
            return True

    def forgive(self, name: str) -> None:
        """Forget that a stage failed: it counts as stopped, and goes on when it is run."""
        with self._locked(name):
            known = self.read(name)
            if known and known.failed is not None:
                write_json(self.marker(name), {"key": known.key, "seconds": known.seconds})

    def run(
        self,
        stage: Stage,
        key: str,
        tick: Callable[[], None],
        launch: Launch = launch,
        extra: Mapping[str, str] | None = None,
    ) -> Finished:
        """Run a stage, or take what another process has finished meanwhile.

        Args:
            tick: Called about once per second; what it raises ends the command.
            extra: Variables of this machine (which GPU), no part of the key.

        Raises:
            StageBusy: Another process is at it.
            StageFailed: The command failed; or was stopped, if `failed` of the record is None.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked(stage.name) as lock:
            done = self.done(stage, key)
            if done is None:
                done = self._execute(
                    stage, key, tick, launch, {**stage.environment, **(extra or {})}, lock
                )
            return done

    def _execute(self, stage, key, tick, launch, environment, lock: int) -> Finished:
        marker, log_path = self.marker(stage.name), self.log(stage.name)
        known = self.read(stage.name)
        before = 0.0
        if known and known.key == key and not known.finished:
            before = known.seconds  # it goes on
        else:
            marker.unlink(missing_ok=True)
            for path in (*stage.output, log_path):
                remove(path)
        start = time.monotonic()

        def note(status: int | None = None) -> float:
            seconds = round(before + time.monotonic() - start, 1)
            content: dict[str, Any] = {"key": key, "seconds": seconds}
            if status is not None and status not in INTERRUPTED:
                content |= {"failed": status, "reason": self.reason(stage.name, status)}
            write_json(marker, content)
            return seconds

        # Written first: whatever is found later beside this key may be gone on with.
        note()
        try:
            status = launch(stage.command, log_path, environment, tick, lock)
        except BaseException:
            note()
            raise
        missing = [path for path in stage.output if not path.exists()]
        if status == 0 and missing:
            with log_path.open("a") as stream:
                stream.write(f"{missing[0]} was not written\n")
            status = 1
        seconds = note(status or None)
        if status != 0:
            raise StageFailed(status)
        stamp = hashlib.sha256(f"{key} {time.time_ns()}".encode()).hexdigest()
        shown = show_command(stage.command, stage.environment)
        try:
            number = stage.number()
        except (OSError, LookupError, ValueError, TypeError):
            number = ""  # something to show, not to fail for
        done = Finished(key, stage.title, shown, number, seconds, stamp)
        write_json(marker, vars(done))
        return done

    def tail(self, name: str, lines: int = TAIL) -> list[str]:
        """The last lines of a stage's log that are not empty."""
        try:
            text = self.log(name).read_text(errors="replace").replace("\r", "\n")
        except OSError:
            return []
        return [row for row in text.splitlines() if row.strip()][-lines:]

    def reason(self, name: str, status: int) -> str:
        """Why a stage failed, on one line: the end of its log, and a signal by its name."""
        words = " ".join(re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", row) for row in self.tail(name, 1))
        if status < 0:
            ended = f"killed by {signal.Signals(-status).name}"
            if -status == signal.SIGKILL:
                ended += ", perhaps for its memory"
            words = f"{ended}; last line: {words}" if words else ended
        return words.strip()[:300] or f"exit status {status}"

    @contextmanager
    def _locked(self, name: str) -> Iterator[int]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{name}.lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StageBusy(name) from None
            try:
                yield file.fileno()
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)


class Runner:
    """Runs stages in order and remembers them.

    Args:
        folder: Of the ledger.
        total: Number of stages, for the progress lines.
        stream: Where the progress lines go; standard output when not given.
        launch: Runs a command, see `launch`.

    Attributes:
        finished: By name, in order.
    """

    def __init__(
        self, folder: Path, total: int, stream: TextIO | None = None, launch: Launch = launch
    ):
        self.ledger = Ledger(folder, __version__)
        self.total = total
        self.stream = sys.stdout if stream is None else stream
        self.launch = launch
        self.finished: dict[str, Finished] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, stage: Stage) -> Finished:
        """Run a stage unless it is done, with one line that says what, how long and a key number.

        Raises:
            StageFailed: After the last lines of its log were shown.
        """
        key = self.ledger.key(stage, {name: done.stamp for name, done in self.finished.items()})
        line = Line(self.stream, len(self.finished) + 1, self.total, stage.title)
        done = self.ledger.done(stage, key)
        if done is not None:
            line.end(f"done before ({done.seconds:.0f} s)", done.number)
        else:
            done = self._execute(stage, key, line)
            line.end(f"{done.seconds:.0f} s", done.number)
        self.finished[stage.name] = done
        return done

    def _execute(self, stage: Stage, key: str, line: "Line") -> Finished:
        try:
            return self.ledger.run(stage, key, line.tick, self.launch)
        except StageBusy:
            line.end("", f"another process is running it; its log is {self._log(stage)}")
            raise StageFailed(STOPPED) from None
        except StageFailed as failure:
            known = self.ledger.read(stage.name)
            seconds = known.seconds if known else 0.0
            line.end(f"{seconds:.0f} s", f"failed with exit status {failure.status}")
            self.stream.write("\n".join(f"    {row}" for row in self.ledger.tail(stage.name)))
            self.stream.write(f"\n{stage.name} failed; its log is {self._log(stage)}\n")
            raise
        except BaseException:
            line.end("", "stopped; the same command goes on here")
            raise

    def _log(self, stage: Stage) -> Path:
        return self.ledger.log(stage.name)


class Line:
    """One line of progress: what runs, then how long it took and a key number.

    On a terminal the seconds count up while it runs.
    """

    def __init__(self, stream: TextIO, index: int, total: int, title: str):
        self.stream = stream
        self.head = f"[{index:{len(str(total))}}/{total}] {title:44}"
        self.live = stream.isatty()
        self.start = time.monotonic()
        self.stream.write(self.head)
        self.stream.flush()

    def tick(self) -> None:
        if self.live:
            self.stream.write(f"\r{self.head} {time.monotonic() - self.start:5.0f} s")
            self.stream.flush()

    def end(self, seconds: str, number: str) -> None:
        self.stream.write(
            f"{f'{chr(13)}{self.head}' if self.live else ''} {seconds:>7}  {number}\n"
        )
        self.stream.flush()


def arguments(options: Mapping[str, Any]) -> list[str]:
    """Options as words: `{"n": 3}` is `--n 3`, a list several words, None nothing.

    True is a flag, `--n`; False is `--n=False`, for options that take True or False.
    """
    words: list[str] = []
    for name, value in options.items():
        if value is False:
            words.append(f"--{name}=False")
        elif value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            words += [f"--{name}", *([] if value is True else map(str, values))]
    return words


def _without_neutral(command: Sequence[str]) -> list[str]:
    """The words that decide a result."""
    words, skip = [], False
    for word in command:
        if skip:
            skip = False
        elif word in NEUTRAL:
            skip = True
        elif word.split("=")[0] not in NEUTRAL:
            words.append(word)
    return words


def _content(path: Path) -> str:
    """What a configuration says: another comment is no change."""
    text = path.read_text()
    if path.suffix not in (".yaml", ".yml"):
        return text
    try:
        return json.dumps(yaml.safe_load(text), default=str)
    except yaml.YAMLError:
        return text


def show_path(path: Path) -> str:
    """Relative to the repository's folder where it is in it."""
    path = path.absolute()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def show_command(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """As one types it in a shell in the repository's folder."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    return " ".join([*variables, "python", *(shlex.quote(word) for word in command)])


def remove(path: Path) -> None:
    """A file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
