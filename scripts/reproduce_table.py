"""A whole table of experiments: every arm trained, evaluated and compared, from one file.

    python scripts/reproduce_table.py --config configs/tables/crc5.yaml
    python scripts/reproduce_table.py --config configs/tables/crc5.yaml --gpus 0,1,2,3
    python scripts/reproduce_table.py --config configs/tables/crc5.yaml --submit
    python scripts/reproduce_table.py --config configs/tables/crc5.yaml --status

Each cell is a job, one command of the other entry points, with its own folder below the table's
`out`. Run again, what is done is not run again, what was interrupted goes on, and what depends on a
changed setting is made anew. A job that fails stops only what needs it: the table says so. Writes
OUT/table.md, table.tex, table.csv, table.json and report.html.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ldm.cli import STOPPED, Count, option, parse, run_command
from ldm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Options:
    """A whole table of experiments: every arm trained, evaluated and compared, from one file.

    Settings are those of --config; section.key=value overrides one. Run again, what is done is not
    run again, and what was interrupted goes on.
    """

    program: ClassVar = "reproduce_table.py"
    example: ClassVar = (
        "  python scripts/reproduce_table.py --config configs/tables/crc5.yaml --gpus 0,1,2,3"
    )

    config: str = option(metavar="YAML", help="the table, see configs/tables")
    status: bool = option(default=False, help="show where every job stands, and exit")
    dry_run: bool = option(default=False, help="print the commands in order, and exit")
    report: bool = option(default=False, help="only write the table again, from what is there")
    submit: bool = option(default=False, help="hand the jobs to SLURM, as the section slurm says")
    only: tuple[str, ...] = option(
        default=(),
        metavar="ROW",
        help="only the jobs of these rows, for example 'real' '*-centroid-100'",
    )
    jobs: Count | None = option(
        default=None, metavar="N", help="jobs at once; if omitted one per GPU, or 1"
    )
    gpus: str | None = option(
        default=None,
        metavar="LIST",
        help="GPUs to share out, such as 0,1,2; each job gets one (or as many as it asks for)",
    )
    retry: bool = option(default=False, help="run again what failed before")
    overrides: tuple[str, ...] = option(
        default=(), positional=True, metavar="section.key=value", help="settings"
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        given = [name for name in ("status", "dry_run", "report", "submit") if getattr(self, name)]
        for name in given[1:]:
            yield name, f"not allowed with --{given[0]}; give one of them"


def parse_arguments(argv: list[str] | None = None) -> Options:
    return parse(Options, argv)


def show_status(standing, rows) -> str:
    """A line per job, then a line per row."""
    from ldm.table.scheduler import State

    width = max(len(one.stage.name) for one in standing.values())
    lines = []
    for name, one in standing.items():
        seconds = f"{one.record.seconds:9.0f} s" if one.record else " " * 11
        words = one.finished.number if one.finished else ""
        if one.state is State.FAILED and one.record:
            words = one.record.reason
        elif one.state is State.BLOCKED:
            words = f"needs {one.blocked_by}"
        lines.append(f"{name:{width}}  {one.state.value:8}{seconds}  {words}".rstrip())
    counts = {state: 0 for state in State}
    for one in standing.values():
        counts[one.state] += 1
    words = [f"{count} {state.value}" for state, count in counts.items() if count]
    seconds = sum(one.record.seconds for one in standing.values() if one.record)
    lines += ["", f"{len(standing)} jobs: {', '.join(words)}; {seconds:.0f} s so far"]
    finished = 0
    for row in rows:
        finished += all(standing[job].state is State.DONE for job in row.jobs.values())
    lines.append(f"{len(rows)} rows: {finished} complete")
    return "\n".join(lines)


def write_table(plan, standing) -> str:
    """Write all results; returns the headline."""
    from ldm.experiment.report import write_results
    from ldm.table.gather import gather, write_json_table

    table = gather(plan, standing)
    write_json_table(table, plan.out / "table.json")
    return write_results(table, plan.out)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)

    from ldm.stages import Ledger, show_command, show_path
    from ldm.table.config import read_settings
    from ldm.table.plan import Plan
    from ldm.table.preflight import check_commands
    from ldm.table.scheduler import Scheduler, Slots, forgive, survey

    gpus = [word.strip() for word in (args.gpus or "").split(",") if word.strip()]
    if len(set(gpus)) < len(gpus):
        raise UserError(f"--gpus {args.gpus}: names a GPU twice; name each once")
    plan = Plan(read_settings(args.config, args.overrides))
    rows = plan.select_rows(args.only)
    stages = plan.jobs_of(rows)
    ledger = Ledger(plan.jobs_folder)
    if args.status:
        print(show_status(survey(ledger, stages), rows))
        return 0
    check_commands(stages)
    if args.dry_run:
        for stage in stages:
            print(f"# {stage.name}: {stage.title}")
            print(show_command(stage.command, stage.environment))
        print(f"# {len(stages)} jobs, {len(rows)} rows")
        return 0
    plan.jobs_folder.mkdir(parents=True, exist_ok=True)
    plan.link_splits()
    if args.retry:
        forgive(ledger, stages)
    start = time.monotonic()
    if args.submit:
        if not submit_jobs(plan, ledger, stages, args):
            return 0
    elif not args.report:
        # As exceptions, so that the commands that run are ended too.
        for name in ("SIGTERM", "SIGUSR1"):
            signal.signal(getattr(signal, name), lambda *_: sys.exit(STOPPED))
        Scheduler(ledger, stages, Slots(args.jobs or len(gpus) or 1, gpus)).run()

    standing = survey(ledger, plan.stages)
    print(write_table(plan, standing))
    print(f"{show_path(plan.out / 'report.html')} and table.md, {time.monotonic() - start:.0f} s")
    return report_failures([standing[stage.name] for stage in stages])


def submit_jobs(plan, ledger, stages, args: Options) -> bool:
    """Hand the jobs over; True when they are processes of this machine, and have ended."""
    from ldm.stages import show_path
    from ldm.table.submit import submit

    settings, folder = plan.settings.slurm, plan.out / "submitit"
    words = ["--config", str(Path(args.config).absolute()), "--report", *args.overrides]
    jobs = submit(ledger, stages, settings, folder, words)
    print(f"{len(jobs)} jobs submitted; their files are in {show_path(folder)}")
    if settings.cluster == "slurm":
        print("--status shows where they stand; the last job writes the table")
        return False
    for job in jobs:
        job.wait()
    return True


def report_failures(standing) -> int:
    """Name what failed; the exit status."""
    from ldm.table.scheduler import State

    failed = [one for one in standing if one.state is State.FAILED]
    for one in failed:
        print(f"failed: {one.stage.name}: {one.record.reason}", file=sys.stderr)
    if failed:
        print("--retry runs what failed again", file=sys.stderr)
        return 1
    return STOPPED if any(one.state is State.STOPPED for one in standing) else 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    run_command(main, Options)
