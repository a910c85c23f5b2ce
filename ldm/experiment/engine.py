"""Snakemake as the engine of an experiment: order, jobs side by side, resources, SLURM.

Snakemake runs in a process of its own, in a session of its own, with its output in a file. The pipe
to its standard input is how it learns that this process has ended, however that happened: it then
stops its jobs, and each command saves what it has.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.devices import usable_cores
from ldm.errors import NoRoom, UserError
from ldm.experiment.execute import FULL_DISK, GRACE, THREADS, save_plan, wait_or_kill
from ldm.experiment.jobs import Job, Records, Standing, State, keys_of
from ldm.experiment.progress import Progress
from ldm.experiment.settings import Slurm
from ldm.files import CHECKOUT, ROOT, lock_file, remove_leftovers, require_space, write_text

POLL = 0.2  # seconds between looks at the records
PATIENCE = 10.0  # seconds beyond `GRACE` that a stopped run has to be gone
STOP_BEFORE = 180  # seconds before SLURM's time limit when a job is told to stop
LOG = "snakemake.log"
ROOM = 1_000_000  # bytes without which Snakemake is thought to have failed for a full disk


@dataclass(frozen=True)
class Machine:
    """Where jobs run."""

    jobs: int = 1  # how many run at once
    # Numbers or UUIDs of the GPUs that are shared out; empty where commands choose.
    gpus: Sequence[str] = ()
    slurm: Slurm | None = None  # what SLURM is asked for; None for processes of this machine

    @property
    def share(self) -> int:
        """Jobs on one GPU, at most."""
        return -(-self.jobs // len(self.gpus)) if self.gpus else 0

    @property
    def threads(self) -> int:
        """Threads of a job."""
        if self.slurm is not None:
            return self.slurm.cpus
        return max(1, usable_cores() // self.jobs)

    @property
    def variables(self) -> dict[str, str]:
        """Variables of all commands: side by side, each has its share of the cores as threads."""
        if THREADS in os.environ:
            return {THREADS: os.environ[THREADS]}
        return {THREADS: str(self.threads)} if self.jobs > 1 and self.slurm is None else {}

    def check(self, jobs: Sequence[Job]) -> None:
        """Raise a UserError if a job wants more GPUs than there are, or there is no SLURM."""
        if self.slurm is not None and shutil.which("sbatch") is None:
            raise UserError("`slurm`: no command sbatch here; run it on a machine of the cluster")
        for job in jobs:
            if self.gpus and job.gpus > len(self.gpus):
                raise UserError(
                    f"{job.name} wants {job.gpus} GPUs and `gpus` names {len(self.gpus)}; name"
                    " more, or lower its `gpus`"
                )

    def resources(self, job: Job) -> dict[str, Any]:
        """What Snakemake is to reserve for a job."""
        if self.slurm is not None:
            return slurm_resources(self.slurm, job)
        whole = self.share if job.gpus > 1 else 1  # a job of several GPUs shares none of them
        return {"gpu_places": job.gpus * whole} if self.gpus else {}

    def options(self) -> list[str]:
        """Options of Snakemake's command."""
        if self.slurm is None:
            options = ["--cores", str(self.jobs * self.threads), "--latency-wait", "1"]
            options += ["--resources", f"gpu_places={len(self.gpus) * self.share}"]
            return options
        options = ["--executor", "slurm", "--jobs", str(self.slurm.parallel), "--slurm-requeue"]
        options += ["--latency-wait", "60"]  # seconds that files of other machines may take
        options += ["--slurm-init-seconds-before-status-checks", "15"]
        # The plugin asks sacct wherever that command exists, also where accounting is off.
        options += ["--slurm-status-command", "sacct" if has_accounting() else "squeue"]
        if "slurm_account" not in self.slurm.parameters:
            options.append("--slurm-no-account")
        return options


def has_accounting() -> bool:
    """Whether SLURM's accounting answers here."""
    if shutil.which("sacct") is None:
        return False
    return subprocess.run(["sacct", "--noheader"], capture_output=True, check=False).returncode == 0


def slurm_resources(slurm: Slurm, job: Job) -> dict[str, Any]:
    """What SLURM is asked for, as resources of snakemake-executor-plugin-slurm."""
    extra = {"signal": f"USR1@{STOP_BEFORE}"}
    found: dict[str, Any] = {
        "runtime": max(1, round(60 * slurm.hours)),  # minutes
        "mem_mb": round(1000 * slurm.memory_gb) if slurm.memory_gb else 0,  # 0: the cluster's own
        "slurm_partition": slurm.partition,
        "gpu": job.gpus if slurm.gpus else 0,
    }
    parameters = dict(slurm.parameters)
    parameters |= parameters.pop("slurm_additional_parameters", {})
    for name, value in parameters.items():
        if name == "slurm_account":
            found[name] = value
        elif name == "timeout_min":
            found["runtime"] = value
        else:
            extra[name.removeprefix("slurm_")] = value
    words = []
    for name, value in extra.items():
        option = f"--{name.replace('_', '-')}"
        words.append(option if value is True else f"{option}={value}")
    found["slurm_extra"] = " ".join(words)
    return {name: value for name, value in found.items() if value is not None}


@contextmanager
def only_run(folder: Path) -> Iterator[int]:
    """Be the only run of an experiment for the block; yields the descriptor of the lock.

    Where the run before was killed, wait until its commands have saved what they have. Another
    run that is going on is a UserError.
    """
    path, end = folder / "run.lock", time.monotonic() + GRACE + PATIENCE
    while True:
        with lock_file(path) as descriptor:
            if descriptor is not None:
                path.write_text(f"{socket.gethostname()} {os.getpid()}")
                yield descriptor
                return
        if time.monotonic() > end or not _was_killed(path):
            raise UserError(
                f"another run is going on in {folder.parent} (host and process:"
                f" {path.read_text() or 'unknown'}); wait for its end, or give another folder for"
                " the results"
            )
        time.sleep(POLL)


def _was_killed(lock: Path) -> bool:
    """Whether the run that wrote its host and process number into the lock is gone."""
    host, _, number = lock.read_text().partition(" ")
    if host != socket.gethostname() or not number:
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # it is another user's
    return False


def run(
    records: Records,
    jobs: Sequence[Job],
    machine: Machine,
    progress: Progress,
    keep_going: bool = True,
) -> dict[str, Standing]:
    """Run what is not done yet, until nothing is left that can run; returns where every job stands.

    With `keep_going` the others go on after a failure. Whatever ends this process (a signal,
    Ctrl-C) ends the jobs first. A UserError says that another run is going on, that a
    disk is full, or that Snakemake itself failed.
    """
    machine.check(jobs)
    with only_run(records.folder) as lock:
        remove_leftovers(records.folder)
        standing = records.survey(jobs)
        progress.begin(standing)
        settled = (State.DONE, State.FAILED, State.BLOCKED)
        left = [name for name, one in standing.items() if one.state not in settled]
        if left:
            keys = keys_of(jobs)
            save_plan(
                records.folder,
                jobs,
                keys,
                targets=left,
                # Of a checkout, tables may be started from anywhere.
                root=str(CHECKOUT or Path.cwd()),
                threads=machine.threads,
                variables=machine.variables,
                gpus=list(machine.gpus),
                share=machine.share,
                slurm=machine.slurm is not None,
                resources={job.name: machine.resources(job) for job in jobs},
            )
            for name, one in standing.items():
                if one.state is State.DONE:
                    write_text(records.path(name, "done"), "")
                else:
                    records.path(name, "done").unlink(missing_ok=True)
            _run_snakemake(records, machine, keep_going, lock, progress)
        standing = records.survey(jobs)
        progress.end()
        if left:
            _check_engine(records, standing)
        return standing


def _run_snakemake(
    records: Records, machine: Machine, keep_going: bool, lock: int, progress: Progress
) -> None:
    command = [sys.executable, "-m", "ldm.experiment.engine"]
    command += ["--snakefile", str(ROOT / "workflow" / "Snakefile")]
    command += ["--directory", str(records.folder), *machine.options()]
    # A job runs when its marker is missing; its parameters hold the key of `keys_of`.
    command += ["--rerun-triggers", "params", "--rerun-incomplete", "--nolock"]
    command += ["--drop-metadata"]  # ours are the records; its own ignore the umask
    command += ["--scheduler", "greedy", "--nocolor"]  # greedy: by priority, the order of the plan
    if keep_going:
        command.append("--keep-going")
    paths = (CHECKOUT and str(CHECKOUT), os.environ.get("PYTHONPATH"))
    path = os.pathsep.join(filter(None, paths))
    with (records.folder / LOG).open("wb") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(lock,),
            start_new_session=True,
        )
    try:
        while True:
            try:
                process.wait(timeout=POLL)
                return
            except subprocess.TimeoutExpired:
                progress.look()
    except BaseException:
        process.stdin.close()  # tells it to stop its jobs
        wait_or_kill(process, GRACE + PATIENCE)
        progress.end()
        raise


def _check_engine(records: Records, standing: Mapping[str, Standing]) -> None:
    """UserError when a disk was full, or jobs that could run were left: Snakemake has failed."""
    for name, one in standing.items():
        if one.state is State.STOPPED and one.record.reason == FULL_DISK:
            raise NoRoom(f"{name}: {FULL_DISK} ({records.path(name, 'log')}); make some and repeat")
    if any(one.state in (State.FAILED, State.STOPPED) for one in standing.values()):
        return
    if any(one.state is State.WAITING for one in standing.values()):
        require_space(records.folder, ROOM, "Snakemake")
        path = records.folder / LOG
        rows = [row.strip() for row in path.read_text(errors="replace").splitlines() if row.strip()]
        raise UserError(f"Snakemake failed: {' '.join(rows[-3:])[:500]} (see {path})")


def main(words: Sequence[str]) -> None:
    """Run Snakemake's command until standard input ends, which is when its starter has ended."""
    slurm = "slurm" in words

    def follow() -> None:
        os.read(sys.stdin.fileno(), 1)
        # The processes of the jobs are in this group. Snakemake waits for them, and starts no more.
        os.killpg(0, signal.SIGTERM)
        if slurm:  # jobs on other machines are cancelled by Snakemake when it is interrupted
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=follow, daemon=True).start()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from snakemake.cli import main as snakemake

    snakemake(list(words))


if __name__ == "__main__":
    main(sys.argv[1:])
