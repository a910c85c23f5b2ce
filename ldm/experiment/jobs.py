"""The jobs of an experiment: one command each, and the record of what became of it.

What decides the result of a job (its command, the content of its configurations, the tiles and
checkpoints that it reads, the jobs before it) makes its key. A job that finished under its present
key is not run again; one that was interrupted under it goes on as far as its command can; under
another key, what it wrote is removed first.

Snakemake decides when a job runs (`ldm.experiment.engine`). The keys are ours, because Snakemake
knows a job's parameters only from its metadata folder, which a copied experiment may lack, and
because the comments of a configuration, or the device, are no reason to train again.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from ldm.cli import COMMANDS
from ldm.files import ROOT, digest_of, lock_file, write_json

# Options that say how something is computed, not what: another value makes nothing anew.
NEUTRAL = ("--device", "--num_workers", "--workers")


@dataclass(frozen=True)
class Job:
    """One command."""

    name: str  # name of its log and record
    title: str  # what it does, in a few words
    command: tuple[str, ...]  # command of `histodiffusion`, or else words for Python, and arguments
    after: tuple[str, ...] = ()  # names of the jobs whose results it uses
    output: tuple[Path, ...] = ()  # what it writes; removed when it has to be made anew
    files: tuple[Path, ...] = ()  # configurations that it reads; their content is part of the key
    # Variables that it needs; part of the key.
    environment: Mapping[str, str] = field(default_factory=dict)
    data: str = ""  # further facts that decide the result, such as digests of tiles and checkpoints
    gpus: int = 1  # how many GPUs it is to be given, where there are any

    @property
    def kind(self) -> str:
        """What sort of work it is: the first word of its name."""
        return self.name.partition("-")[0]

    @property
    def shown(self) -> str:
        """The command as one types it in a shell."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, "histodiffusion", *map(shlex.quote, self.command)])


@dataclass(frozen=True)
class Record:
    """What is remembered of a job that was begun."""

    key: str  # key that it was begun under
    title: str  # its title at that time
    command: str  # the command as one types it
    seconds: float = 0.0  # wall-clock time of all attempts under this key
    done: bool = False  # whether it ended well
    number: str = ""  # key number of its result, in words
    # Exit status of a command that failed; None of one that was stopped or goes on.
    failed: int | None = None
    reason: str = ""  # why it failed or was stopped, on one line


class State(Enum):
    """Where a job stands, as far as files tell."""

    DONE = "done"
    RUNNING = "running"
    FAILED = "failed"
    STOPPED = "stopped"  # interrupted; the next run goes on where it was
    BLOCKED = "blocked"  # a job that it needs failed
    WAITING = "waiting"  # not begun, or to be made anew


@dataclass(frozen=True)
class Standing:
    """A job's state, with what is known of it."""

    job: Job
    state: State
    record: Record | None = None  # None of a job that was never begun, or has to be made anew
    blocked_by: str = ""  # name of the failed job


class JobBusy(Exception):
    """Another process is running the job."""


class Records:
    """NAME.json, NAME.log, NAME.lock and NAME.done of every job, in one folder.

    Snakemake waits for NAME.done, an empty file that is made from the record. A lock goes when
    the process that runs the job and its command are gone: there is none to clean up after a
    crash.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, name: str, kind: str = "json") -> Path:
        return self.folder / f"{name}.{kind}"

    def read(self, name: str) -> Record | None:
        """What is known of a job; None where it was never begun."""
        try:
            return Record(**json.loads(self.path(name).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, name: str, record: Record) -> None:
        write_json(self.path(name), vars(record))

    def finished(self, job: Job, key: str) -> Record | None:
        """The record of a job that ended well under this key and whose output is still there."""
        record = self.read(job.name)
        if record and record.done and record.key == key:
            return record if all(path.exists() for path in job.output) else None
        return None

    def is_running(self, name: str) -> bool:
        """Whether a process, here or on another machine, holds the job."""
        if not self.path(name, "lock").is_file():
            return False
        with lock_file(self.path(name, "lock")) as descriptor:
            return descriptor is None

    def survey(self, jobs: Sequence[Job]) -> dict[str, Standing]:
        """Where every job stands, by name; `jobs` stand after those that they need."""
        keys, found = keys_of(jobs), {}
        for job in jobs:
            found[job.name] = self._standing(job, keys[job.name], found)
        return found

    def _standing(self, job: Job, key: str, before: Mapping[str, Standing]) -> Standing:
        needed = [before[name] for name in job.after]
        for one in needed:
            if one.state in (State.FAILED, State.BLOCKED):
                return Standing(job, State.BLOCKED, blocked_by=one.blocked_by or one.job.name)
        ready = all(one.state is State.DONE for one in needed)
        if ready and (done := self.finished(job, key)):
            return Standing(job, State.DONE, done)
        record = self.read(job.name)
        known = record if record and record.key == key and not record.done else None
        if self.is_running(job.name):
            return Standing(job, State.RUNNING, known)
        if known is None or not ready:
            return Standing(job, State.WAITING)
        return Standing(job, State.STOPPED if known.failed is None else State.FAILED, known)

    def forget_failures(self, jobs: Sequence[Job]) -> None:
        """Let those of the jobs that failed be run again, going on with what they wrote."""
        for job in jobs:
            record = self.read(job.name)
            if record is not None and record.failed is not None:
                self.write(job.name, Record(record.key, job.title, job.shown, record.seconds))

    def tail(self, name: str, lines: int) -> list[str]:
        """The last lines of a job's log that are not empty, without colours."""
        try:
            text = self.path(name, "log").read_text(errors="replace").replace("\r", "\n")
        except OSError:
            return []
        text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
        return [row for row in text.splitlines() if row.strip()][-lines:]


def keys_of(jobs: Sequence[Job]) -> dict[str, str]:
    """The key of every job by name; a job's key contains those of the jobs before it."""
    keys: dict[str, str] = {}
    for job in jobs:
        facts: list[Any] = [deciding_words(job.command), dict(job.environment), job.data]
        facts += [content_of(path) for path in job.files]
        facts += [keys[name] for name in job.after]
        keys[job.name] = digest_of(facts)
    return keys


def needed_by(jobs: Sequence[Job], names: Sequence[str]) -> list[Job]:
    """The named jobs and all that they need, in the order of `jobs`."""
    by_name = {job.name: job for job in jobs}
    wanted: set[str] = set()
    stack = list(names)
    while stack:
        name = stack.pop()
        if name not in wanted:
            wanted.add(name)
            stack += by_name[name].after
    return [job for job in jobs if job.name in wanted]


def arguments(options: Mapping[str, Any]) -> list[str]:
    """Options as words: True is `--n`, False `--n=False`, None nothing, a list several words."""
    words: list[str] = []
    for name, value in options.items():
        if value is False:
            words.append(f"--{name}=False")
        elif value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            dashes = "-" if len(name) == 1 else "--"
            shown = [show_path(v) if isinstance(v, Path) else str(v) for v in values]
            words += [dashes + name, *([] if value is True else shown)]
    return words


def show_path(path: Path) -> str:
    """The path, relative to `ROOT` where it is in it: also that of a configuration of ours."""
    path = path.absolute()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def deciding_words(command: Sequence[str]) -> list[str]:
    """The words of a command that decide its result; its script first, as in version 0.1.0."""
    words, skip = [COMMANDS.get(command[0], command[0])], False
    for word in command[1:]:
        if skip:
            skip = False
        elif word in NEUTRAL:
            skip = True
        elif word.split("=")[0] not in NEUTRAL:
            words.append(word)
    return words


def content_of(path: Path) -> str:
    """What a configuration says: another comment is no change."""
    text = path.read_text()
    if path.suffix not in (".yaml", ".yml"):
        return text
    try:
        return json.dumps(yaml.safe_load(text), default=str)
    except yaml.YAMLError:
        return text


def convert_records(records: Records, jobs: Sequence[Job]) -> None:
    """Rewrite records of version 0.1.0 that are still valid under the present keys."""
    keys, stamps = keys_of(jobs), {}
    for job in jobs:
        try:
            old = json.loads(records.path(job.name).read_text())
        except (OSError, ValueError):
            continue
        if "done" in old or any(name not in stamps for name in job.after):
            continue
        if old.get("key") != _earlier_key(job, stamps):
            continue
        done = "stamp" in old
        if done:
            stamps[job.name] = old["stamp"]
        facts = {name: old[name] for name in ("number", "failed", "reason") if name in old}
        record = Record(keys[job.name], job.title, job.shown, old["seconds"], done, **facts)
        records.write(job.name, record)


def _earlier_key(job: Job, stamps: Mapping[str, str]) -> str:
    """The key that version 0.1.0 gave a job; `stamps` are of the jobs before it."""
    facts: list[Any] = ["", deciding_words(job.command), dict(job.environment), job.data]
    facts += [content_of(path) for path in job.files]
    facts += [stamps[name] for name in job.after]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
