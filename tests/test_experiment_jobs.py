"""Jobs of an experiment: keys, records, one job as a process, and a graph of them by Snakemake."""

import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ldm.errors import NoRoom, UserError
from ldm.experiment import engine
from ldm.experiment.engine import Machine, slurm_resources
from ldm.experiment.execute import execute, take_gpus
from ldm.experiment.jobs import (
    ROOT,
    Job,
    JobBusy,
    Record,
    Records,
    convert_records,
    keys_of,
    needed_by,
)
from ldm.experiment.progress import Progress
from ldm.experiment.settings import Slurm
from ldm.files import lock_file, write_json

APPEND = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.open('a').write(sys.argv[2])"
FAIL = "print('all is well'); print('disk is full'); raise SystemExit(3)"
# Saves what it has and ends with status 75 when it is told to stop; quick at its second start.
STOPS = (
    "import pathlib, signal, sys, time; p = pathlib.Path(sys.argv[1]); again = p.exists();"
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(p.open('a').write('stopped') and 75));"
    "p.open('a').write('x'); time.sleep(0 if again else 60)"
)


def job(folder: Path, name: str, *after: str, text: str = "x", code: str = APPEND, **kwargs) -> Job:
    """Appends `text` to FOLDER/NAME."""
    out = folder / name
    command = ("-c", code, str(out), text)
    return Job(name, f"job {name}", command, after=after, output=(out,), **kwargs)


def run(folder: Path, *jobs: Job, machine: Machine | None = None, **kwargs):
    """Run by Snakemake: where the jobs stand, and what was printed."""
    machine, stream = machine or Machine(), io.StringIO()
    records = Records(folder / "jobs")
    progress = Progress(records, machine.jobs, stream=stream)
    standing = engine.run(records, jobs, machine, progress, **kwargs)
    return {name: one.state.value for name, one in standing.items()}, stream.getvalue()


def states(folder: Path, *jobs: Job) -> list[str]:
    return [one.state.value for one in Records(folder / "jobs").survey(jobs).values()]


def wait_for(what, process: subprocess.Popen | None = None) -> None:
    end = time.monotonic() + 90
    while not what():
        assert time.monotonic() < end, "waited in vain"
        assert process is None or process.poll() is None, "ended too early"
        time.sleep(0.05)


# Keys


def test_a_changed_setting_reruns_what_depends_on_it(tmp_path):
    """By content: copies, times and what makes no difference rerun nothing."""
    config = tmp_path / "config.yaml"
    config.write_text("a: 1  # one")

    def chain(text: str = "x", data: str = "", **environment: str) -> list[Job]:
        first = job(tmp_path, "a", text=text, files=(config,), environment=environment, data=data)
        return [first, job(tmp_path, "b", "a"), job(tmp_path, "c", "b"), job(tmp_path, "d")]

    def unchanged(*jobs: Job) -> list[bool]:
        return [keys_of(chain())[one.name] == keys_of(jobs)[one.name] for one in jobs]

    for changed in (chain("y"), chain(data="other tiles"), chain(K="v")):
        assert unchanged(*changed) == [False, False, False, True]
    before = keys_of(chain())
    config.write_text("# the same\na: 1")
    os.utime(config, (1, 1))
    assert keys_of(chain()) == before
    config.write_text("a: 2")
    assert [keys_of(chain())[name] == key for name, key in before.items()] == [False] * 3 + [True]

    def key(*words: str) -> str:
        return keys_of([Job("a", "a", ("eval.py", *words))])["a"]

    first = key("--lr", "1", "--num_workers", "4")
    assert key("--device", "cuda:1", "--lr", "1") == key("--num_workers=0", "--lr", "1") == first
    assert key("--lr", "2") != first


def test_what_a_job_needs(tmp_path):
    jobs = [
        job(tmp_path, "a"),
        job(tmp_path, "b"),
        job(tmp_path, "c", "a"),
        job(tmp_path, "d", "c"),
    ]
    assert [one.name for one in needed_by(jobs, ["d"])] == ["a", "c", "d"]


def test_what_an_earlier_version_finished_stays(tmp_path):
    """Keys as version 0.1.0 made them, with the stamp of the job before."""
    records = Records(tmp_path / "jobs")
    jobs = [job(tmp_path, "a"), job(tmp_path, "b", "a"), job(tmp_path, "c", "b")]

    def earlier(one: Job, *stamps: str) -> str:
        facts = ["", list(one.command), {}, "", *stamps]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    done = {"title": "t", "command": "python -c x", "number": "1", "seconds": 5.0}
    old = {
        "a": {"key": earlier(jobs[0]), "stamp": "s", **done},
        "b": {"key": earlier(jobs[1], "s"), "stamp": "t", **done},
        "c": {"key": "of another setting", "stamp": "u", **done},
    }
    for name, content in old.items():
        write_json(records.path(name), content)
        (tmp_path / name).write_text("x")
    convert_records(records, jobs)
    assert states(tmp_path, *jobs) == ["done", "done", "waiting"]
    assert records.read("b").seconds == 5.0


# One job


def test_a_job_that_fails_says_why(tmp_path):
    records = Records(tmp_path / "jobs")
    for code, status, reason in (
        (FAIL, 3, "disk is full"),
        ("print('done')", 1, f"{tmp_path / 'a'} was not written"),
        (
            "import os; print('epoch 3', flush=True); os.kill(os.getpid(), 9)",
            -9,
            "killed by SIGKILL, perhaps for its memory; last line: epoch 3",
        ),
    ):
        one = job(tmp_path, "a", code=code)
        assert execute(records, one, keys_of([one])["a"]) == status
        assert records.read("a").reason == reason
        assert not records.path("a", "done").exists()


def test_a_job_goes_on_under_its_key_and_starts_anew_under_another(tmp_path):
    records, one = Records(tmp_path / "jobs"), job(tmp_path, "a", code=APPEND + ";sys.exit(75)")
    assert execute(records, one, "key") == 75
    assert records.read("a").failed is None
    assert execute(records, job(tmp_path, "a"), "key") == 0
    assert (tmp_path / "a").read_text() == "xx"
    assert execute(records, job(tmp_path, "a"), "key") == 0  # done: nothing is run
    assert (tmp_path / "a").read_text() == "xx"
    assert execute(records, job(tmp_path, "a", text="y"), "other") == 0
    assert (tmp_path / "a").read_text() == "y"
    (tmp_path / "a").unlink()
    assert execute(records, job(tmp_path, "a", text="y"), "other") == 0  # its output was missing
    assert (tmp_path / "a").read_text() == "y"


def test_a_command_that_outlives_its_runner_stays_locked(tmp_path):
    """Without its lock in the command's hands, a second run would start it beside the first."""
    wait = (
        "import os, pathlib, sys, time;"
        "pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(60)"
    )
    one = job(tmp_path, "a", code=wait)
    driver = (
        "import pathlib, sys\n"
        "from ldm.experiment.execute import execute\n"
        "from ldm.experiment.jobs import Job, Records\n"
        "job = Job('a', 'a', ('-c', sys.argv[2], sys.argv[1] + '/a'))\n"
        "execute(Records(pathlib.Path(sys.argv[1]) / 'jobs'), job, 'key')\n"
    )
    command = [sys.executable, "-c", driver, str(tmp_path), wait]
    runner = subprocess.Popen(command, cwd=ROOT)
    records, pid = Records(tmp_path / "jobs"), tmp_path / "a"
    wait_for(lambda: pid.exists() and pid.read_text(), runner)
    runner.kill()
    runner.wait()
    try:
        assert records.is_running("a")
        with pytest.raises(JobBusy):
            execute(records, one, "key")
    finally:
        os.kill(int(pid.read_text()), signal.SIGKILL)
    wait_for(lambda: not records.is_running("a"))


def test_gpus_are_shared_evenly_and_a_job_of_several_shares_none(tmp_path):
    def take(count: int = 1, share: int = 2):
        return take_gpus(tmp_path, ["4", "7"], share, count)

    with take() as one, take() as two, take() as three:
        assert sorted(one + two) == ["4", "7"] and three[0] in one + two
    with take(2) as both:
        assert sorted(both) == ["4", "7"]
        with lock_file(tmp_path / "gpu-4.1.lock") as free:
            assert free is None
    with take(0) as none, take_gpus(tmp_path, [], 1, 1) as no_choice:
        assert none == no_choice == []


# A graph of jobs, by Snakemake


def test_a_failure_stops_only_what_needs_it(tmp_path):
    jobs = [
        job(tmp_path, "a"),
        job(tmp_path, "bad", "a", code=FAIL),
        job(tmp_path, "after", "bad"),
        job(tmp_path, "far@1", "after"),
        job(tmp_path, "other", "a"),
    ]
    found, printed = run(tmp_path, *jobs)
    assert list(found.values()) == ["done", "failed", "blocked", "blocked", "done"]
    assert "failed: disk is full" in printed and "jobs/bad.log" in printed
    ends = [line[:5] for line in printed.splitlines() if not line.startswith("started: ")]
    assert ends == ["[1/5]", "[2/5]", "[3/5]"]
    records = Records(tmp_path / "jobs")
    standing = records.survey(jobs)
    assert standing["far@1"].blocked_by == "bad" and standing["bad"].record.failed == 3

    # The same again does nothing. What failed is tried again when it is forgotten, or changed.
    found, printed = run(tmp_path, *jobs)
    assert found["bad"] == "failed" and "failed before: job bad: disk is full" in printed
    records.forget_failures(jobs)
    assert states(tmp_path, *jobs)[1] == "stopped"
    mended = [job(tmp_path, "bad", "a") if one.name == "bad" else one for one in jobs]

    # In a copy, with all times new and without Snakemake's own records, nothing is made again.
    shutil.rmtree(tmp_path / "jobs" / ".snakemake")
    for path in tmp_path.rglob("*"):
        path.touch()
    assert set(run(tmp_path, *mended)[0].values()) == {"done"}
    assert [(tmp_path / one.name).read_text() for one in jobs] == ["x"] * 5

    # A setting of the first job: all that depends on it, written anew and not appended to.
    changed = [job(tmp_path, "a", text="y"), *mended[1:], job(tmp_path, "new")]
    assert states(tmp_path, *changed) == ["waiting"] * 6
    assert set(run(tmp_path, *changed)[0].values()) == {"done"}
    assert [(tmp_path / one.name).read_text() for one in changed] == ["y"] + ["x"] * 5


def test_the_first_failure_ends_a_run_that_does_not_keep_going(tmp_path):
    jobs = [job(tmp_path, "bad", code=FAIL), job(tmp_path, "other")]
    assert run(tmp_path, *jobs, keep_going=False)[0] == {"bad": "failed", "other": "waiting"}


MEET = """
import os, pathlib, sys, time
mine, other = map(pathlib.Path, sys.argv[1:])
mine.write_text(os.environ['CUDA_VISIBLE_DEVICES'] + ' ' + os.environ['OMP_NUM_THREADS'])
for _ in range(600):
    if other.exists():
        break
    time.sleep(0.05)
else:
    raise SystemExit('nobody came')
"""


def test_jobs_run_at_once_each_with_its_gpus(tmp_path, monkeypatch):
    """Two jobs wait for each other, which one after another would never end well."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(engine, "usable_cores", lambda: 6)
    jobs = [
        job(tmp_path, "a", code=MEET, text=str(tmp_path / "b")),
        job(tmp_path, "b", code=MEET, text=str(tmp_path / "a")),
        job(tmp_path, "both", "a", "b", code=MEET, text=str(tmp_path), gpus=2),
        job(tmp_path, "none", "a", code=MEET, text=str(tmp_path), gpus=0),
    ]
    machine = Machine(2, ["4", "7"])
    found, printed = run(tmp_path, *jobs, machine=machine)
    assert set(found.values()) == {"done"}
    # A job that ends between two looks has a line for its end alone.
    assert all(f"] job {name}" in printed for name in ("a", "b", "both", "none"))
    written = [(tmp_path / name).read_text() for name in ("a", "b", "both", "none")]
    assert sorted(written[:2]) == ["4 3", "7 3"]  # half of the cores
    assert written[2] in ("4,7 3", "7,4 3") and written[3] == " 3"
    with pytest.raises(UserError, match="both wants 2 GPUs and [-`]*gpus`? names 1"):
        run(tmp_path, *jobs, machine=Machine(1, ["0"]))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_start_of_a_job_is_told(tmp_path):
    """Of one that is seen while it runs; on a terminal, the seconds of a job alone count up."""
    records, one = Records(tmp_path / "jobs"), job(tmp_path, "a")
    told = "started: job a\n"
    for at_once, stream, expected in (
        (2, io.StringIO(), told),
        (1, io.StringIO(), told),
        (2, Terminal(), told),
        (1, Terminal(), "\r[1/1] job a"),
    ):
        records.path("a").unlink(missing_ok=True)
        progress = Progress(records, at_once, stream=stream)
        progress.begin(records.survey([one]))
        records.write("a", Record("key", one.title, one.shown))
        progress.look()
        printed = stream.getvalue()
        assert printed.startswith(expected) and printed.count("\n") == expected.count("\n")


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, monkeypatch):
    """At once, but for a run that was killed: its commands may save what they have."""
    lock, expected = tmp_path / "jobs" / "run.lock", "another run is going on"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    monkeypatch.setattr(engine, "GRACE", 1.0)
    monkeypatch.setattr(engine, "PATIENCE", 0.5)
    for owner, seconds in ((os.getpid(), 0.0), (dead.pid, 1.5)):
        start = time.monotonic()
        with lock_file(lock), pytest.raises(UserError, match=expected) as caught:
            lock.write_text(f"{socket.gethostname()} {owner}")
            run(tmp_path, job(tmp_path, "a"))
        assert len(str(caught.value).splitlines()) == 1
        assert time.monotonic() - start >= seconds
    assert not (tmp_path / "a").exists()


DRIVER = """
import pathlib, signal, sys
from ldm.experiment import engine
from ldm.experiment.jobs import Job, Records
from ldm.experiment.progress import Progress
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
folder = pathlib.Path(sys.argv[1])
jobs = [
    Job('a', 'job a', ('-c', sys.argv[2], str(folder / 'a'), 'x'), output=(folder / 'a',)),
    Job('b', 'job b', ('-c', sys.argv[3], str(folder / 'b'), 'x'), ('a',), (folder / 'b',)),
]
records = Records(folder / 'jobs')
engine.run(records, jobs, engine.Machine(), Progress(records))
"""


@pytest.mark.parametrize(
    "end", ["SIGTERM", "SIGKILL", pytest.param("SIGKILL of Snakemake", marks=pytest.mark.slow)]
)
def test_a_run_that_is_ended_anyhow_stops_its_commands_and_goes_on(tmp_path, end):
    command = [sys.executable, "-c", DRIVER, str(tmp_path), STOPS, APPEND]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    out, records = tmp_path / "a", Records(tmp_path / "jobs")
    wait_for(out.exists, process)
    if end == "SIGKILL of Snakemake":
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
    else:
        process.send_signal(getattr(signal, end))
    printed = process.communicate(timeout=90)[0]
    if end == "SIGTERM":
        assert process.returncode == 75
        assert "stopped; the same command goes on here" in printed
    wait_for(lambda: not records.is_running("a"))
    assert out.read_text() == "xstopped"
    assert records.read("a").failed is None and records.read("b") is None
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert again.returncode == 0, again.stderr
    assert (out.read_text(), (tmp_path / "b").read_text()) == ("xstoppedx", "x")
    assert len([line for line in again.stdout.splitlines() if line.startswith("[")]) == 2


def test_what_is_stopped_by_somebody_else_is_no_failure(tmp_path):
    code = (
        "import pathlib, sys; p = pathlib.Path(sys.argv[1]); before = p.exists();"
        "p.open('a').write('x'); sys.exit(0 if before else 75)"
    )
    jobs = [job(tmp_path, "a", code=code), job(tmp_path, "b", "a")]
    found, printed = run(tmp_path, *jobs)
    assert found == {"a": "stopped", "b": "waiting"}
    assert "goes on here" in printed


def test_a_full_disk_is_no_failure(tmp_path):
    """Of a job of its own, that is; the command ends as for any mistake elsewhere."""
    code = (
        "import pathlib, sys; from ldm import cli, files; p = pathlib.Path(sys.argv[1]);"
        "room = p.exists(); p.open('a').write('x');"
        "cli.run_command(lambda: None if room else files.require_space(p, 10**18))"
    )
    jobs = [job(tmp_path, "a", code=code), job(tmp_path, "b", "a"), job(tmp_path, "other")]
    with pytest.raises(NoRoom, match=r"^a: no room on the disk .*a\.log"):
        run(tmp_path, *jobs)
    assert states(tmp_path, *jobs) == ["stopped", "waiting", "done"]
    assert set(run(tmp_path, *jobs)[0].values()) == {"done"}
    assert (tmp_path / "a").read_text() == "xx", "it goes on with what is there"


# SLURM, as far as it goes without one; the rest is tests/slurm/table.sh


def test_what_slurm_is_asked_for():
    one = Job("a", "a", ("x",))
    asked = slurm_resources(Slurm(partition="gpu", hours=0.5, memory_gb=4), one)
    assert asked == {
        "runtime": 30,
        "mem_mb": 4000,
        "slurm_partition": "gpu",
        "gpu": 1,
        "slurm_extra": "--signal=USR1@180",
    }
    parameters = {
        "slurm_account": "lab",
        "slurm_constraint": "a100",
        "timeout_min": 5,
        "slurm_additional_parameters": {"exclusive": True},
    }
    asked = slurm_resources(Slurm(gpus=False, parameters=parameters), one)
    assert (asked["slurm_account"], asked["runtime"], asked["gpu"]) == ("lab", 5, 0)
    assert asked["slurm_extra"] == "--signal=USR1@180 --constraint=a100 --exclusive"


def test_without_slurm_it_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no command sbatch"):
        run(tmp_path, job(tmp_path, "a"), machine=Machine(slurm=Slurm()))


def test_what_ails_snakemake_itself_is_one_line(tmp_path):
    """A wrong parameter of SLURM, for example; here a folder that it cannot write to."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / ".snakemake").write_text("")
    with pytest.raises(UserError, match="Snakemake failed: .*snakemake.log") as caught:
        run(tmp_path, job(tmp_path, "a"))
    assert len(str(caught.value).splitlines()) == 1
    assert states(tmp_path, job(tmp_path, "a")) == ["waiting"]
