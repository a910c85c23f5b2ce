"""Runs the jobs of an experiment in the process of a test."""

from contextlib import redirect_stderr, redirect_stdout

import pytest

from ldm.cli import run_command
from ldm.commands import load
from ldm.experiment.execute import execute
from ldm.experiment.jobs import Records, State, keys_of
from ldm.experiment.plan import Plan


class Here:
    """Runs the jobs of a plan in this process: importing torch for each would take minutes."""

    def __init__(self):
        self.ran: list[str] = []

    def launch(self, command, log_path, environment, lock) -> int:
        verb, *argv = command
        self.ran.append(verb)
        module = load(verb)
        with pytest.MonkeyPatch.context() as patch, log_path.open("a") as stream:
            for name, value in environment.items():
                patch.setenv(name, value)
            with redirect_stdout(stream), redirect_stderr(stream), pytest.raises(SystemExit) as end:
                run_command(lambda: module.main(argv), module.Options)
        return end.value.code

    def run(self, plan: Plan) -> None:
        """What Snakemake does, one job after another; keeps going after a failure."""
        plan.prepare()
        records, keys = Records(plan.jobs_folder), keys_of(plan.jobs)
        for job in plan.jobs:
            if records.survey(plan.jobs)[job.name].state is State.WAITING:
                execute(records, job, keys[job.name], launch=self.launch)
