"""The whole method on one machine in minutes: tiles, training, sampling, selection, evaluation.

Settings are those of configs/demo/demo.yaml; section.key=value overrides one. Each job is one
command of the other entry points. Run again, it goes on where it stopped. Writes OUT/report.html
and OUT/table.csv; the log of each job is OUT/jobs/NAME.log.
"""

import math
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ldm.cli import STOPPED, Dir, existing_path, option, parse
from ldm.devices import usable_cores
from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.experiment.settings import Settings

DEMO = "configs/demo/demo.yaml"
OWN, FAST = "configs/demo/own.yaml", "configs/demo/fast.yaml"  # merged over it
START = "configs/demo/pretrained.yaml"  # merged over the flow's
JOBS = 2  # at once: networks this small gain little from a second thread
BATCH = 64  # of the flow
PATCH, SIDE = 4, 16  # pixels of a position of a latent, and of one of the coarsest level


@dataclass(frozen=True, kw_only=True)
class Options:
    example: ClassVar = "--out logs/demo sampling.options.classifier_scale=5"

    out: Dir = option("logs/demo", "folder of all results")
    data: Dir | None = option(
        None,
        "your own tiles, DIR/{train,train5,val,test}/CLASS/images, and a flow from random weights; "
        "if omitted, procedural ones",
    )
    fast: bool = option(False, "a few steps of everything, to test the wiring")
    overrides: tuple[str, ...] = option(
        (), "settings", positional=True, metavar="section.key=value"
    )


def read_demo(args: Options) -> "Settings":
    """The settings of the demo: a table, with the folders and the devices that are here."""
    from omegaconf import OmegaConf

    from ldm.checkpoint import read_checkpoint
    from ldm.config import read_yaml, resolve
    from ldm.devices import resolve_device
    from ldm.experiment.settings import check_settings, with_override
    from ldm.files import ROOT

    files = [DEMO, *([OWN] if args.data else []), *([FAST] if args.fast else [])]
    config = OmegaConf.merge(*(read_yaml(ROOT / file) for file in files))
    for word in args.overrides:
        config = with_override(config, word)
    config.out = args.out
    check_settings(resolve(config), DEMO)
    check_vars(config.vars)
    data, flow = config.data, config.models.flow
    if args.data is not None:
        data.root, data.tiles = str(existing_path(args.data, "data", "dir").absolute()), None
    config.vars.ratio = affordable_ratio(config)
    if config.vars.pretrained is not None:
        start = existing_path(str(config.vars.pretrained), "vars.pretrained", "file")
        read_checkpoint(start, ("diffusion",), "vars.pretrained")
        config.models.pretrained = {"run": str(start)}
        flow.needs = {"HISTO_PRETRAINED": "pretrained"}
        flow.config.append(START)
    batch = BATCH
    if resolve_device(None).type == "cpu" and usable_cores() >= JOBS:
        # A process on each core, half a batch in each.
        flow.arguments.devices, batch = JOBS, BATCH // JOBS
    flow.overrides += [
        f"vars.latent={config.vars.size // PATCH}",
        f"data.params.batch_size={batch}",
    ]
    return check_settings(resolve(config), DEMO)


def check_vars(values: Any) -> None:
    """UserError unless the numbers that the demo computes with are such numbers."""
    for name, least in (("size", SIDE), ("ratio", 1), ("most", 1)):
        if type(value := values[name]) is not int or value < least or value % least:
            allowed = f"a multiple of {least}" if least > 1 else "a whole number from 1"
            raise UserError(f"vars.{name} {value!r} must be {allowed}")


def affordable_ratio(config: Any) -> int:
    """The ratio of the demo, lowered where it wants more than `vars.most` tiles of a class."""
    from ldm.experiment.inputs import Split

    data, count = config.data, 1
    if data.tiles is not None:
        count = data.tiles[data.labelled]
    elif (labelled := Path(data.root) / data.labelled).is_dir():
        count = max(Split(labelled).counts.values())
    most = int(100 * config.vars.most / (config.sampling.per_wanted * count))
    return max(math.ceil(100 / count), min(config.vars.ratio, most))  # a tile at least


def main(argv: list[str] | None = None) -> int:
    args = parse(Options, argv)

    from ldm.commands.preflight import check_commands
    from ldm.experiment import engine
    from ldm.experiment.gather import gather
    from ldm.experiment.jobs import Records, State, show_path
    from ldm.experiment.plan import Plan
    from ldm.experiment.progress import Progress

    # As an exception, so that the job that runs is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    start = time.monotonic()
    plan = Plan(read_demo(args))
    check_commands(plan.jobs)
    plan.prepare()
    records = Records(plan.jobs_folder)
    records.forget_failures(plan.jobs)
    progress = Progress(records, JOBS, tails=True)
    standing = engine.run(records, plan.jobs, engine.Machine(JOBS), progress, keep_going=False)
    failed = [one.record.failed for one in standing.values() if one.state is State.FAILED]
    if failed:
        return failed[0] if failed[0] > 0 else 1
    if any(one.state is not State.DONE for one in standing.values()):
        return STOPPED

    from ldm.experiment.report import write_results

    print(write_results(gather(plan, standing), plan.out))
    print(f"{show_path(plan.out / 'report.html')} and table.csv, {time.monotonic() - start:.0f} s")
    print("next: open the report in a browser; --data DIR takes tiles of your own")
    return 0
