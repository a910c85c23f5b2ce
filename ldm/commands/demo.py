"""The whole method on one machine in minutes: tiles, training, sampling, selection, evaluation.

Settings are those of configs/demo/demo.yaml; section.key=value overrides one. Each job is one
command of the other entry points. Run again, it goes on where it stopped. Writes OUT/report.html
and OUT/table.csv; the log of each job is OUT/jobs/NAME.log.
"""

import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ldm.cli import STOPPED, existing_path, option, parse


@dataclass(frozen=True, kw_only=True)
class Options:
    example: ClassVar = "--out logs/demo sampling.scale=5"

    out: str = option(default="logs/demo", metavar="DIR", help="folder of all results")
    data: str | None = option(
        default=None,
        metavar="DIR",
        help="your own tiles, DIR/{train,train5,val,test}/CLASS/images; if omitted, procedural "
        "ones",
    )
    fast: bool = option(default=False, help="a few steps of everything, to test the wiring")
    overrides: tuple[str, ...] = option(
        default=(), positional=True, metavar="section.key=value", help="settings"
    )


def main(argv: list[str] | None = None) -> int:
    args = parse(Options, argv)
    data = existing_path(args.data, "--data", "dir") if args.data else None

    from ldm.commands.preflight import check_commands
    from ldm.experiment import engine
    from ldm.experiment.demo import Demo, read_settings
    from ldm.experiment.gather import gather
    from ldm.experiment.jobs import Records, State, show_path
    from ldm.experiment.progress import Progress

    # As an exception, so that the job that runs is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    start = time.monotonic()
    demo = Demo(Path(args.out), data, read_settings(args.overrides, args.fast))
    plan = demo.plan
    check_commands(plan.jobs)
    plan.prepare()
    records = Records(plan.jobs_folder)
    records.forget_failures(plan.jobs)
    progress = Progress(records, extra=1, tails=True)
    standing = engine.run(records, plan.jobs, engine.Machine(), progress, keep_going=False)
    failed = [one.record.failed for one in standing.values() if one.state is State.FAILED]
    if failed:
        return failed[0] if failed[0] > 0 else 1
    if any(one.state is not State.DONE for one in standing.values()):
        return STOPPED

    from ldm.experiment.report import write_results

    before = time.monotonic()
    headline = write_results(gather(plan, standing), plan.out)
    progress.step("report and table", time.monotonic() - before, headline)
    print(f"{show_path(plan.out / 'report.html')} and table.csv, {time.monotonic() - start:.0f} s")
    print("next: open the report in a browser; --data DIR takes tiles of your own")
    return 0
