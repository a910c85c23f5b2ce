"""Commands in order, each finished one remembered.

A stage is one command line of an entry point. What decides its result (the command, its
configurations, the stages before it) makes its key. A stage that finished under the same key is not
run again; one that was interrupted goes on as far as its command can; with another key, what it
wrote is removed first.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from ldm import __version__
from ldm.run import write_json

ROOT = Path(__file__).resolve().parents[2]  # where the entry points are
TAIL = 15  # lines of a failed stage's log that are shown
GRACE = 20.0  # seconds that a stopped stage has to end by itself


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


class StageFailed(Exception):
    """A command ended with a status other than 0; `status` is that of the whole."""

    def __init__(self, status: int):
        super().__init__(f"exit status {status}")
        self.status = status


Launch = Callable[[Sequence[str], Path, Mapping[str, str], Callable[[], None]], int]


def launch(
    command: Sequence[str],
    log_path: Path,
    environment: Mapping[str, str],
    tick: Callable[[], None],
) -> int:
    """Run a script of this repository as a process, its output in a file; returns its status.

    Args:
        tick: Called about once per second.
    """
    with log_path.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while True:
                try:
                    return process.wait(timeout=1.0)
                except subprocess.TimeoutExpired:
                    tick()
        except BaseException as stop:
            if not isinstance(stop, KeyboardInterrupt):  # that one reaches the process by itself
                process.terminate()
            try:
                process.wait(timeout=GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise


class Runner:
    """Runs stages in order and remembers them.

    Args:
        folder: Of NAME.json and NAME.log of every stage.
        total: Number of stages, for the progress lines.
        stream: Where the progress lines go; standard output when not given.
        launch: Runs a command, see `launch`.

    Attributes:
        finished: By name, in order.
    """

    def __init__(
        self, folder: Path, total: int, stream: TextIO | None = None, launch: Launch = launch
    ):
        self.folder = folder
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
        marker = self.folder / f"{stage.name}.json"
        key, known = self._key(stage), _read(marker)
        line = Line(self.stream, len(self.finished) + 1, self.total, stage.title)
        same = known.get("key") == key
        if same and "stamp" in known and all(path.exists() for path in stage.output):
            done = Finished(**known)
            line.end(f"done before ({done.seconds:.0f} s)", done.number)
        else:
            unfinished = same and "stamp" not in known
            done = self._execute(stage, key, known["seconds"] if unfinished else None, line)
            write_json(marker, asdict(done))
            line.end(f"{done.seconds:.0f} s", done.number)
        self.finished[stage.name] = done
        return done

    def _key(self, stage: Stage) -> str:
        facts: list[Any] = [__version__, stage.command, dict(stage.environment), stage.data]
        facts += [path.read_text() for path in stage.files]
        facts += [self.finished[name].stamp for name in stage.after]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _execute(self, stage: Stage, key: str, spent: float | None, line: "Line") -> Finished:
        """Run the command; `spent` are the seconds of earlier attempts, None to begin anew."""
        marker, log_path = (self.folder / f"{stage.name}.{kind}" for kind in ("json", "log"))
        if spent is None:
            marker.unlink(missing_ok=True)
            for path in (*stage.output, log_path):
                _remove(path)
        before, start = spent or 0.0, time.monotonic()
        # Written first: whatever is found later beside this key may be gone on with.
        write_json(marker, {"key": key, "seconds": before})
        try:
            status = self.launch(stage.command, log_path, stage.environment, line.tick)
        except BaseException:
            line.end("", "stopped; the same command goes on here")
            raise
        finally:
            seconds = round(before + time.monotonic() - start, 1)
            write_json(marker, {"key": key, "seconds": seconds})
        if status != 0:
            line.end(f"{seconds:.0f} s", f"failed with exit status {status}")
            text = log_path.read_text(errors="replace").replace("\r", "\n")
            tail = [row for row in text.splitlines() if row.strip()][-TAIL:]
            self.stream.write("\n".join(f"    {row}" for row in tail))
            self.stream.write(f"\n{stage.name} failed; its log is {log_path}\n")
            raise StageFailed(status)
        stamp = hashlib.sha256(f"{key} {time.time_ns()}".encode()).hexdigest()
        shown = show_command(stage.command, stage.environment)
        return Finished(key, stage.title, shown, stage.number(), seconds, stamp)


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


def show_path(path: Path) -> str:
    """Relative to the repository's folder where it is in it."""
    path = path.absolute()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def show_command(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """As one types it in a shell in the repository's folder."""
    import shlex

    variables = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    return " ".join([*variables, "python", *(shlex.quote(word) for word in command)])


def _read(marker: Path) -> dict[str, Any]:
    try:
        content = json.loads(marker.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
