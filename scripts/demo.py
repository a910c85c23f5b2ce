"""The whole method on one machine in minutes: tiles, training, sampling, selection, evaluation.

    python scripts/demo.py                      # procedural tiles, nothing to download
    python scripts/demo.py --data DIR           # DIR/{train,train5,val,test}/CLASS/images
    python scripts/demo.py sampling.scale=5     # see configs/demo/demo.yaml

Each stage is one command of the other entry points. Run again, it goes on where it stopped. Writes
OUT/report.html and OUT/table.csv; the log of each stage is OUT/stages/NAME.log.
"""

import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ldm.cli import existing_path, option, parse, run_command


@dataclass(frozen=True, kw_only=True)
class Options:
    """The whole method on one machine in minutes: tiles, training, sampling, selection, evaluation.

    Settings are those of configs/demo/demo.yaml; section.key=value overrides one. Run again, it
    goes on where it stopped.
    """

    program: ClassVar = "demo.py"
    example: ClassVar = "  python scripts/demo.py --out logs/demo sampling.scale=5"

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


def parse_arguments(argv: list[str] | None = None) -> Options:
    return parse(Options, argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    data = existing_path(args.data, "--data", "dir") if args.data else None

    from ldm.demo.plan import Plan, read_settings
    from ldm.stages import Line, Runner, StageFailed, show_path

    # As an exception, so that the stage that runs is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    start = time.monotonic()
    plan = Plan(Path(args.out), data, read_settings(args.overrides, args.fast))
    runner = Runner(plan.stages, plan.count)
    try:
        plan.execute(runner)
    except StageFailed as failure:
        return failure.status
    line = Line(runner.stream, plan.count, plan.count, "report and table")

    from ldm.demo.report import write_report

    before = time.monotonic()
    headline = write_report(plan, runner.finished)
    line.end(f"{time.monotonic() - before:.0f} s", headline)
    print(f"{show_path(plan.out / 'report.html')} and table.csv, {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    run_command(main, Options)
