"""Jobs of every fate, submitted as those of a table; run by table.sh on its cluster."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ldm.stages import Ledger, Stage
from ldm.table.config import Slurm
from ldm.table.scheduler import State, survey
from ldm.table.submit import submit

WRITE = "import pathlib, sys; pathlib.Path(sys.argv[1]).open('a').write('x')"
FAIL = "print('disk is full'); raise SystemExit(3)"
# Ends with status 75 when it is told to stop, as training does; quick at its second start.
STOPS = """
import pathlib, signal, sys, time
out = pathlib.Path(sys.argv[1])
again = out.exists()
out.open('a').write('x')
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print('started', 'again' if again else '', flush=True)
time.sleep(0 if again else 600)
"""
ALONE = STOPS.replace("time.sleep(0 if again else 600)", "sys.exit(0 if again else 75)")
MINUTES = 4  # SLURM's limit; submitit's signal comes three minutes before


def main(work: Path) -> None:
    def job(name: str, kind: str, *after: str, code: str = WRITE) -> Stage:
        out = work / name
        command = ("-c", code, str(out))
        return Stage(name, name, command, after, output=(out,), kind=kind, gpus=0)

    stages = [
        job("first", "a"),
        job("left", "b", "first"),
        job("right", "b", "first"),
        job("bad", "c", "left", code=FAIL),
        job("after-bad", "d", "bad"),
        job("limit", "e", "right", code=STOPS),
        job("stops", "f", "right", code=ALONE),
        job("last", "g", "left", "limit", "stops"),
    ]
    ledger = Ledger(work / "jobs")
    settings = Slurm(
        partition="low", cpus=1, hours=MINUTES / 60, gpus=False, parallel=2,
        parameters={"slurm_additional_parameters": {"requeue": True}},
    )  # fmt: skip
    jobs = submit(ledger, stages, settings, work / "submitit", ["--help"])
    names = [job.job_id for job in jobs]
    print("jobs", *names)
    assert names[1].split("_")[0] == names[2].split("_")[0], "left and right are no array"
    assert submit(ledger, stages, settings, work / "submitit", ["--help"]) == [], "submitted twice"
    wanted = {stage.name: State.DONE for stage in stages}
    wanted |= {"bad": State.FAILED, "after-bad": State.BLOCKED}
    end, before = time.monotonic() + 900, None
    while True:
        now = {name: one.state for name, one in survey(ledger, stages).items()}
        if now != before:
            states = ", ".join(f"{n} {s.value}" for n, s in now.items())
            print(time.strftime("%X"), states, flush=True)
        if now == wanted:
            break
        assert time.monotonic() < end, "too slow"
        before = now
        time.sleep(2)
    assert (work / "limit").read_text() == "xx", "not stopped and started again"
    assert (work / "stops").read_text() == "xx", "not requeued after status 75"
    assert (work / "left").read_text() == "x", "started twice"
    print("passed: an array, a failure that stayed local, a time limit and a stop, both requeued")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
