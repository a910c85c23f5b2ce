"""A whole table of experiments: every arm trained, evaluated and compared, from one file.

Settings are those of --config; section.key=value overrides one. Each cell is a job, one command of
the other entry points, with its own folder below the table's `out`; Snakemake runs them. Run again,
what is done is not run again, what was interrupted goes on, and what depends on a changed setting
is made anew. A job that fails stops only what needs it: the table says so. Writes OUT/table.md,
table.tex, table.csv, table.json and report.html.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from ldm.cli import STOPPED, Count, contradictions, option, parse
from ldm.errors import UserError

_ran = partial(option, group="what is run, and where")
_shown = partial(option, group="instead of a run")


@dataclass(frozen=True, kw_only=True)
class Options:
    example: ClassVar = "--config configs/tables/crc5.yaml --gpus 0,1,2,3"

    config: str = option(..., "the table, see configs/tables", metavar="YAML")
    status: bool = _shown(False, "show where every job stands, and exit")
    dry_run: bool = _shown(False, "print the commands in order, and exit")
    report: bool = _shown(False, "only write the table again, from what is there")
    slurm: bool = _ran(
        False,
        "run the jobs on SLURM, as the section slurm says; this process waits for them",
        published=("--submit",),
    )
    only: tuple[str, ...] = _ran(
        (), "only the jobs of these rows, for example 'real' '*-centroid-100'", metavar="ROW"
    )
    jobs: Count | None = _ran(None, "jobs at once; if omitted one per GPU, or 1", metavar="N")
    gpus: str | None = _ran(
        None,
        "GPUs to share out, such as 0,1,2; each job gets one (or as many as it asks for)",
        metavar="LIST",
    )
    retry: bool = _ran(False, "run again what failed before")
    overrides: tuple[str, ...] = option(
        (), "settings", positional=True, metavar="section.key=value"
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from contradictions(self, "status", "dry_run", "report", "slurm")


def show_status(standing, rows) -> str:
    """A line per job, then a line per row."""
    from ldm.experiment.jobs import State

    width = max(map(len, standing))
    lines = []
    for name, one in standing.items():
        seconds = f"{one.record.seconds:9.0f} s" if one.record else " " * 11
        words = one.record.number or one.record.reason if one.record else ""
        if one.state is State.BLOCKED:
            words = f"needs {one.blocked_by}"
        lines.append(f"{name:{width}}  {one.state.value:8}{seconds}  {words}".rstrip())
    states = [one.state for one in standing.values()]
    words = [f"{states.count(state)} {state.value}" for state in State if state in states]
    seconds = sum(one.record.seconds for one in standing.values() if one.record)
    lines += ["", f"{len(standing)} jobs: {', '.join(words)}; {seconds:.0f} s so far"]
    finished = 0
    for row in rows:
        finished += all(standing[job].state is State.DONE for job in row.jobs.values())
    lines.append(f"{len(rows)} rows: {finished} complete")
    return "\n".join(lines)


def choose_machine(args: Options, settings):
    """Where the jobs run, as the options and the section `slurm` say."""
    from ldm.experiment.engine import Machine

    gpus = [word.strip() for word in (args.gpus or "").split(",") if word.strip()]
    if len(set(gpus)) < len(gpus):
        raise UserError(f"--gpus {args.gpus}: names a GPU twice; name each once")
    if args.slurm and settings.cluster == "slurm":
        return Machine(settings.parallel, slurm=settings)
    jobs = args.jobs or (settings.parallel if args.slurm else len(gpus) or 1)
    return Machine(jobs, gpus)


def main(argv: list[str] | None = None) -> int:
    args = parse(Options, argv)
    os.environ.setdefault("PYTHONUNBUFFERED", "1")

    from ldm.commands.preflight import check_commands
    from ldm.experiment import engine
    from ldm.experiment.jobs import Records, convert_records, show_path
    from ldm.experiment.plan import Plan
    from ldm.experiment.progress import Progress
    from ldm.experiment.settings import read_settings

    plan = Plan(read_settings(args.config, args.overrides))
    machine = choose_machine(args, plan.settings.slurm)
    rows = plan.select_rows(args.only)
    jobs = plan.jobs_of(rows)
    records = Records(plan.jobs_folder)
    convert_records(records, plan.jobs)
    if args.status:
        print(show_status(records.survey(jobs), rows))
        return 0
    check_commands(jobs)
    if args.dry_run:
        for job in jobs:
            print(f"# {job.name}: {job.title}")
            print(job.shown)
        print(f"# {len(jobs)} jobs, {len(rows)} rows")
        return 0
    plan.prepare()
    start = time.monotonic()
    if not args.report:
        # As exceptions, so that the commands that run are ended too.
        for name in ("SIGTERM", "SIGUSR1"):
            signal.signal(getattr(signal, name), lambda *_: sys.exit(STOPPED))
        if args.retry:
            records.forget_failures(jobs)
        engine.run(records, jobs, machine, Progress(records, machine.jobs))

    from ldm.experiment.gather import gather
    from ldm.experiment.report import write_results

    standing = records.survey(plan.jobs)
    print(write_results(gather(plan, standing), plan.out))
    print(f"{show_path(plan.out / 'report.html')} and table.md, {time.monotonic() - start:.0f} s")
    print("next: open the report in a browser; --status says where every job stands")
    return report_failures([standing[job.name] for job in jobs])


def report_failures(standing) -> int:
    """Name what failed; the exit status."""
    from ldm.experiment.jobs import State

    failed = [one for one in standing if one.state is State.FAILED]
    for one in failed:
        print(f"failed: {one.job.name}: {one.record.reason}", file=sys.stderr)
    if failed:
        print("--retry runs what failed again", file=sys.stderr)
        return 1
    # A command that still runs has lost the process that started it.
    unfinished = State.STOPPED, State.RUNNING
    return STOPPED if any(one.state in unfinished for one in standing) else 0
