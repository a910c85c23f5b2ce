"""Jobs of a table on a SLURM cluster, through submitit.

Jobs of one kind that wait for the same others make one array. Each starts when those before it have
ended, looks in the ledger whether they ended well, and runs its command as a runner on one machine
would. At the time limit or when it is preempted, its command is told to stop, and the job goes back
into the queue to go on later.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.cli import STOPPED
from ldm.errors import UserError
from ldm.files import write_json
from ldm.stages import (
    ROOT,
    Ledger,
    Stage,
    StageBusy,
    StageFailed,
    end_process,
    start_process,
    watch,
)
from ldm.table.config import Slurm
from ldm.table.scheduler import POLL, Standing, State, needed_by, survey

log = logging.getLogger(__name__)

SUBMITTED = "submitted.json"  # ids of jobs by name
LONGEST_STOP = 180  # seconds before the time limit when a job is told to stop
LEFT = (State.WAITING, State.STOPPED)  # what is submitted
MOST_REQUEUES = 1000  # at time limits


class NotReady(RuntimeError):
    """A job that this one needs has not ended well."""


class Task:
    """One job, as submitit pickles it.

    Args:
        ledger: Of the table.
        stages: The job and all that it needs, each after those that it needs.
        name: Of the job.
        waits: Whether to wait for those before it, as the cluster does not.
    """

    def __init__(self, ledger: Ledger, stages: Sequence[Stage], name: str, waits: bool):
        self.ledger, self.stages, self.name, self.waits = ledger, list(stages), name, waits
        self._process: subprocess.Popen | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_process": None}

    def __call__(self) -> str:
        """Run the job; its key number.

        Raises:
            NotReady: What it needs has failed, or was stopped for good.
            StageFailed: Its command failed.
        """
        while True:
            standing = survey(self.ledger, self.stages)
            one = standing[self.name]
            if one.finished:
                return one.finished.number
            if one.state is State.BLOCKED:
                raise NotReady(f"{self.name} needs {one.blocked_by}, which failed")
            before = [standing[name] for name in one.stage.after]
            if all(other.finished for other in before):
                try:
                    return self._run(one.stage, before)
                except StageBusy:
                    log.info("%s runs in another process", self.name)
            elif not self.waits:
                missing = next(o.stage.name for o in before if not o.finished)
                raise NotReady(f"{self.name} needs {missing}, which has not ended; submit it again")
            time.sleep(POLL)

    def _run(self, stage: Stage, before: Sequence[Standing]) -> str:
        stamps = {one.stage.name: one.finished.stamp for one in before if one.finished}

        def launch(command, log_path, environment, tick, lock) -> int:
            self._process = start_process(command, log_path, environment, lock)
            return watch(self._process, tick)

        try:
            key = self.ledger.key(stage, stamps)
            return self.ledger.run(stage, key, lambda: None, launch).number
        except StageFailed:
            record = self.ledger.read(stage.name)
            if record is not None and record.failed is None:
                # It was told to stop and has saved what it has (exit status 75).
                requeue()
                sys.exit(STOPPED)
            raise

    def checkpoint(self):
        """Called by submitit at the time limit and at a preemption: stop, to go on later."""
        import submitit

        if self._process is not None:
            end_process(self._process)
        return submitit.helpers.DelayedSubmission(self)


def requeue() -> None:
    """Put this SLURM job back into the queue, unless SLURM does so itself."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is not None:
        subprocess.run(["scontrol", "requeue", job], check=False, timeout=60)


class Report:
    """The last job: `scripts/reproduce_table.py --report` with the same settings."""

    def __init__(self, words: Sequence[str]):
        self.words = list(words)

    def __call__(self) -> int:
        command = [sys.executable, "scripts/reproduce_table.py", *self.words]
        return subprocess.run(command, cwd=ROOT, check=False).returncode


def arrays(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Stages that can be submitted together: of one kind and size, waiting for the same arrays.

    Args:
        stages: Each after those that it needs.

    Returns:
        Each array after those that it waits for.
    """
    groups: dict[tuple, list[Stage]] = {}
    group_of: dict[str, tuple] = {}
    for stage in stages:
        before = frozenset(group_of[name] for name in stage.after if name in group_of)
        key = (stage.kind, stage.gpus, before)
        groups.setdefault(key, []).append(stage)
        group_of[stage.name] = key
    return list(groups.values())


def submit(
    ledger: Ledger,
    stages: Sequence[Stage],
    settings: Slurm,
    folder: Path,
    report: Sequence[str],
) -> list[Any]:
    """Submit what is neither done nor in the queue, and the writing of the table after it.

    Args:
        folder: Of submitit's files.
        report: Arguments of scripts/reproduce_table.py for the last job.

    Returns:
        The submitit jobs, on SLURM the last one that of the report.

    Raises:
        UserError: SLURM's commands are missing, or a parameter is unknown.
    """
    import submitit

    # The cluster's processes find this package, installed or not, wherever they start.
    known = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT) if not known else f"{ROOT}{os.pathsep}{known}"
    standing = survey(ledger, stages)
    slurm = settings.cluster == "slurm"
    # Job ids by name, of this time and of earlier ones that are in the queue still.
    ids = _in_queue(folder / SUBMITTED) if slurm else {}
    left = [s for s in stages if standing[s.name].state in LEFT and s.name not in ids]
    try:
        executor = submitit.AutoExecutor(folder, cluster=settings.cluster, **_limits(slurm))
    except RuntimeError as error:
        raise UserError(f"--submit: {error}; run it on a machine of the cluster") from None
    jobs: list[Any] = []
    for array in arrays(left):
        first = array[0]
        before = {ids[name] for stage in array for name in stage.after if name in ids}
        parameters = _parameters(settings, f"table-{first.kind}", first.gpus)
        _update(executor, parameters | _after(before, slurm))
        tasks = [Task(ledger, needed_by(stages, [s.name]), s.name, not slurm) for s in array]
        with executor.batch():
            submitted = [executor.submit(task) for task in tasks]
        jobs += submitted
        ids |= {stage.name: job.job_id for stage, job in zip(array, submitted, strict=True)}
        write_json(folder / SUBMITTED, ids)
    if slurm and jobs:
        parameters = _parameters(settings, "table-report", 0)
        _update(executor, parameters | _after(ids.values(), slurm))
        jobs.append(executor.submit(Report(report)))
    return jobs


def _in_queue(record: Path) -> dict[str, str]:
    """Jobs that an earlier submission left in SLURM's queue, running or waiting."""
    try:
        known = json.loads(record.read_text())
    except (OSError, ValueError):
        return {}
    command = ["squeue", "--noheader", "--array", "--format=%i"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"--submit: squeue does not answer ({error}); try again later") from None
    here = set(listed.stdout.split())
    return {name: job for name, job in known.items() if job in here}


def _limits(slurm: bool) -> dict[str, int]:
    return {"slurm_max_num_timeout": MOST_REQUEUES} if slurm else {}


def _parameters(settings: Slurm, name: str, gpus: int) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": name,
        "timeout_min": max(1, round(60 * settings.hours)),
        "cpus_per_task": settings.cpus,
        "tasks_per_node": 1,
        "nodes": 1,
        "mem_gb": settings.memory_gb,
        "gpus_per_node": gpus if settings.gpus else 0,
    }
    if settings.cluster == "slurm":
        values["gpus_per_node"] = values["gpus_per_node"] or None
        values |= {
            "slurm_partition": settings.partition,
            "slurm_array_parallelism": settings.parallel,
            "slurm_signal_delay_s": LONGEST_STOP,
        }
    return values | settings.parameters


def _after(jobs: Iterable[str], slurm: bool) -> dict[str, str]:
    """When those before have ended, well or not: a job that can never start is never seen."""
    before = sorted(jobs)
    return {"slurm_dependency": ":".join(["afterany", *before])} if slurm and before else {}


def _update(executor, parameters: Mapping[str, Any]) -> None:
    # A parameter of the array before stays otherwise.
    executor.parameters.pop("dependency", None)
    executor.parameters.pop("gpus_per_node", None)
    try:
        executor.update_parameters(**parameters)
    except (NameError, AssertionError, ValueError) as error:
        words = " ".join(str(error).split())
        raise UserError(f"slurm.parameters: {words[:300]}") from None
