"""Jobs of every fate, as those of a table, on SLURM; run by table.sh on its cluster."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ldm.experiment import engine
from ldm.experiment.jobs import Job, Records, State
from ldm.experiment.progress import Progress
from ldm.experiment.settings import Slurm

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
MINUTES = 4  # SLURM's limit; the signal comes three minutes before


def main(work: Path) -> None:
    def job(name: str, *after: str, code: str = WRITE) -> Job:
        out = work / name
        return Job(name, name, ("-c", code, str(out)), after, output=(out,), gpus=0)

    jobs = [
        job("first"),
        job("left", "first"),
        job("bad", "left", code=FAIL),
        job("after-bad", "bad"),
        job("limit", "first", code=STOPS),
        job("stops", "first", code=ALONE),
        job("last", "left", "limit", "stops"),
    ]
    records = Records(work / "jobs")
    slurm = Slurm(partition="low", cpus=1, hours=MINUTES / 60, gpus=False, parallel=4)
    machine = engine.Machine(slurm.parallel, slurm=slurm)
    standing = engine.run(records, jobs, machine, Progress(records, slurm.parallel))
    wanted = {job.name: State.DONE for job in jobs}
    wanted |= {"bad": State.FAILED, "after-bad": State.BLOCKED}
    assert {name: one.state for name, one in standing.items()} == wanted, standing
    assert records.read("bad").reason == "disk is full"
    assert (work / "limit").read_text() == "xx", "not stopped and started again"
    assert (work / "stops").read_text() == "xx", "not requeued after status 75"
    assert (work / "left").read_text() == "x", "started twice"
    print("passed: a failure that stayed local, a time limit and a stop, both requeued")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
