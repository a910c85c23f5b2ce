"""Run one job of an experiment: `python -m ldm.experiment.execute FOLDER NAME`.

This process stands between Snakemake and a command. It keeps the record and the log, holds the
job's lock, chooses GPUs, and stops the command when it is told to stop or when Snakemake is gone.
Snakemake would call a command that saved a checkpoint and stopped a failure, and start the next.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ldm.cli import COMMANDS, JOB_VARIABLE, NO_ROOM, STOPPED
from ldm.experiment.jobs import Job, JobBusy, Record, Records
from ldm.experiment.numbers import key_number
from ldm.files import lock_file, remove, write_json, write_text

PLAN = "plan.json"
PLANNED = TypeAdapter(dict[str, tuple[Job, str]])  # job and key, by name
GRACE = 60.0  # seconds in which a stopped command has to end by itself, its checkpoint written
POLL = 0.2  # seconds between attempts to get a lock

FULL_DISK = "no room on the disk"  # why a job was stopped
# Statuses of a command that somebody stopped: it goes on later, and has not failed.
INTERRUPTED = (STOPPED, 128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM)

# Variables that Snakemake sets for its jobs. A command gets them as they were before.
THREADS = "OMP_NUM_THREADS"
SET_BY_SNAKEMAKE = (
    *(THREADS, "GOTO_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"),
    *("VECLIB_MAXIMUM_THREADS", "NUMEXPR_NUM_THREADS", "TMPDIR", "TMP", "TEMPDIR", "TEMP"),
)

# A command, its log, its variables, and the descriptor of a lock that it is to hold until it ends;
# returns the exit status.
Launch = Callable[[Sequence[str], Path, Mapping[str, str], int], int]


def save_plan(folder: Path, jobs: Sequence[Job], keys: Mapping[str, str], **facts: Any) -> None:
    """Write FOLDER/plan.json for the Snakefile and the processes of the jobs."""
    planned = {job.name: (job, keys[job.name]) for job in jobs}
    write_json(folder / PLAN, {"jobs": PLANNED.dump_python(planned, mode="json"), **facts})


def load_plan(folder: Path) -> dict[str, Any]:
    """What `save_plan` wrote, with the jobs as (Job, key) by name."""
    content = json.loads((folder / PLAN).read_text())
    return {**content, "jobs": PLANNED.validate_python(content["jobs"])}


def wait_or_kill(process: subprocess.Popen, seconds: float) -> None:
    """Wait for a process that was asked to end; kill it with its children when it has not."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def launch(
    command: Sequence[str], log_path: Path, environment: Mapping[str, str], lock: int
) -> int:
    """Run a command as a process that any exception here, or the end of our parent, ends too."""
    parent = os.getppid()
    start = ["-m", "ldm.commands"] if command[0] in COMMANDS else []
    with log_path.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, *start, *command],
            env={**environment, JOB_VARIABLE: "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(lock,),  # a command whose starter was killed still counts as running
            start_new_session=True,  # it gets one signal, from here
        )
    try:
        while True:
            try:
                return process.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                if os.getppid() != parent:
                    sys.exit(STOPPED)
    except BaseException:
        process.terminate()
        wait_or_kill(process, GRACE)
        raise


def execute(
    records: Records,
    job: Job,
    key: str,
    variables: Mapping[str, str] | None = None,
    launch: Launch = launch,
) -> int:
    """Run a job, or take what another process has finished; returns its exit status.

    That is 1 when it wrote less than it should, 75 when it was stopped by somebody else, 74
    when there was no room on a disk. The command has these variables (of this process if omitted)
    and the job's own. JobBusy is raised where another process is running it.
    """
    environment = {**(os.environ if variables is None else variables), **job.environment}
    with lock_file(records.path(job.name, "lock")) as lock:
        if lock is None:
            raise JobBusy(job.name)
        status = 0
        if records.finished(job, key) is None:
            run = partial(launch, job.command, records.path(job.name, "log"), environment, lock)
            status = _record(records, job, key, run)
        if status == 0:
            write_text(records.path(job.name, "done"), "")
        return status


def _record(records: Records, job: Job, key: str, run: Callable[[], int]) -> int:
    """Run a job's command by `run`, and keep its record; returns the exit status."""
    log_path, known = records.path(job.name, "log"), records.read(job.name)
    records.path(job.name, "done").unlink(missing_ok=True)
    goes_on = known and known.key == key and not known.done
    before = known.seconds if goes_on else 0.0
    if not goes_on:
        for path in (records.path(job.name), *job.output, log_path):
            remove(path)
    start = time.monotonic()

    def note(**facts: Any) -> None:
        seconds = round(before + time.monotonic() - start, 1)
        records.write(job.name, Record(key, job.title, job.shown, seconds, **facts))

    # Written first: whatever is found later beside this key may be gone on with.
    note()
    try:
        status = run()
    except BaseException:
        note()
        raise
    missing = [path for path in job.output if not path.exists()]
    if status == 0 and missing:
        with log_path.open("a") as stream:
            stream.write(f"{missing[0]} was not written\n")
        status = 1
    if status == 0:
        note(done=True, number=key_number(job))
    elif status in INTERRUPTED:
        note()
        return STOPPED
    elif status == NO_ROOM:
        note(reason=FULL_DISK)
    else:
        note(failed=status, reason=explain_failure(records, job.name, status))
    return status


def explain_failure(records: Records, name: str, status: int) -> str:
    """Why a job failed, on one line: the end of its log, and a signal by its name."""
    words = " ".join(records.tail(name, 1))
    if status < 0:
        ended = f"killed by {signal.Signals(-status).name}"
        if -status == signal.SIGKILL:
            ended += ", perhaps for its memory"
        words = f"{ended}; last line: {words}" if words else ended
    return words.strip()[:300] or f"exit status {status}"


@contextmanager
def take_gpus(folder: Path, gpus: Sequence[str], share: int, count: int) -> Iterator[list[str]]:
    """Wait for `count` GPUs and hold them for the block: Snakemake names none.

    At most `share` jobs are on one GPU; a job of several GPUs has each of them to itself. The
    locks lie in `folder`; where there are no GPUs, nothing is taken.
    """
    # The first place of every GPU, then the second: evenly.
    parts = [(gpu, [place]) for place in range(share) for gpu in gpus]
    if count > 1:
        parts = [(gpu, list(range(share))) for gpu in gpus]
    chosen: list[str] = []
    with ExitStack() as held:
        if gpus and count:
            # One job chooses at a time, until it has all: else two could wait for each other.
            with lock_file(folder / "gpus.lock", wait=True):
                while len(chosen) < count:
                    for gpu, places in parts:
                        files = [folder / f"gpu-{gpu.replace('/', '_')}.{i}.lock" for i in places]
                        if len(chosen) < count and gpu not in chosen and _hold(held, files):
                            chosen.append(gpu)
                    if len(chosen) < count:
                        time.sleep(POLL)
        yield chosen


def _hold(held: ExitStack, files: Sequence[Path]) -> bool:
    """Lock all of the files or none; `held` unlocks them. Returns whether they are locked."""
    with ExitStack() as attempt:
        if all(attempt.enter_context(lock_file(file)) is not None for file in files):
            held.enter_context(attempt.pop_all())
            return True
    return False


def requeue() -> None:
    """Put this SLURM job back into the queue: its command was stopped at the time limit."""
    command = ["scontrol", "requeue", os.environ["SLURM_JOB_ID"]]
    subprocess.run(command, check=False, timeout=60)


def main(folder: Path, name: str) -> int:
    """Run a job of FOLDER/plan.json; returns its exit status."""
    plan, received = load_plan(folder), []
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def stop(number: int, _) -> None:
        for one in signals:
            signal.signal(one, signal.SIG_IGN)
        received.append(number)
        sys.exit(STOPPED)

    for one in signals:
        signal.signal(one, stop)
    status = 0
    try:
        status = run_when_free(plan, folder, name)
    finally:
        # SIGUSR1 comes before the time limit; SIGTERM of a job that is cancelled or preempted.
        if plan["slurm"] and (signal.SIGUSR1 in received or status == STOPPED):
            requeue()
    return status


def run_when_free(plan: Mapping[str, Any], folder: Path, name: str) -> int:
    """Run a job as soon as its GPUs are free and no command of an earlier run is at it."""
    (job, key), parent = plan["jobs"][name], os.getppid()
    variables = {k: v for k, v in os.environ.items() if k not in SET_BY_SNAKEMAKE}
    variables |= plan["variables"]
    with take_gpus(folder, plan["gpus"], plan["share"], job.gpus) as gpus:
        if plan["gpus"]:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        while os.getppid() == parent:
            try:
                return execute(Records(folder), job, key, variables)
            except JobBusy:
                time.sleep(POLL)
    return STOPPED


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
