"""Jobs of a table: the graph, failures that stay local, locks, GPUs, and submission."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.stages import ROOT, Ledger, Stage, StageBusy, StageFailed
from ldm.table.config import Slurm
from ldm.table.scheduler import Scheduler, Slots, State, forgive, needed_by, survey
from ldm.table.submit import Task, _parameters, arrays, submit

APPEND = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.open('a').write(sys.argv[2])"


def job(folder: Path, name: str, *after: str, text: str = "x", code: str = APPEND, **kwargs):
    """Appends `text` to FOLDER/NAME."""
    out = folder / name
    return Stage(
        name,
        f"job {name}",
        ("-c", code, str(out), text),
        after=after,
        output=(out,),
        number=lambda: f"{len(out.read_text())} written",
        **kwargs,
    )


FAIL = "print('all is well'); print('disk is full'); raise SystemExit(3)"


def run(folder: Path, *stages: Stage, slots: Slots | None = None, **kwargs):
    """Run with a new scheduler: where the stages stand, and what was printed."""
    stream = io.StringIO()
    ledger = Ledger(folder / "jobs")
    standing = Scheduler(ledger, stages, slots or Slots(1), stream=stream, **kwargs).run()
    return {name: one.state.value for name, one in standing.items()}, stream.getvalue()


def test_a_failure_stops_only_what_needs_it(tmp_path):
    stages = [
        job(tmp_path, "a"),
        job(tmp_path, "bad", "a", code=FAIL),
        job(tmp_path, "after", "bad"),
        job(tmp_path, "far", "after"),
        job(tmp_path, "other", "a"),
    ]
    states, printed = run(tmp_path, *stages)
    assert states == {
        "a": "done",
        "bad": "failed",
        "after": "blocked",
        "far": "blocked",
        "other": "done",
    }
    assert "failed: disk is full" in printed and "jobs/bad.log" in printed
    standing = survey(Ledger(tmp_path / "jobs"), stages)
    assert standing["far"].blocked_by == "bad"
    assert standing["bad"].record.failed == 3

    # The same again does nothing; forgiven, it is tried again, and nothing else is.
    states, printed = run(tmp_path, *stages)
    assert states["bad"] == "failed" and "failed before: job bad: disk is full" in printed
    assert (tmp_path / "a").read_text() == "x"
    mended = [job(tmp_path, "bad", "a") if s.name == "bad" else s for s in stages]
    forgive(Ledger(tmp_path / "jobs"), stages)
    assert run(tmp_path, *stages)[0]["bad"] == "failed"
    assert set(run(tmp_path, *mended)[0].values()) == {"done"}
    assert {s.name: (tmp_path / s.name).read_text() for s in stages} == {
        s.name: "x" for s in stages
    }


def test_a_changed_setting_reruns_what_depends_on_it(tmp_path):
    def chain(text: str):
        return [
            job(tmp_path, "a", text=text),
            job(tmp_path, "b", "a"),
            job(tmp_path, "c", "b"),
            job(tmp_path, "d"),
        ]

    run(tmp_path, *chain("x"))
    stamps = {s.name: os.stat(tmp_path / s.name).st_ino for s in chain("x")}
    ledger = Ledger(tmp_path / "jobs")
    assert [one.state.value for one in survey(ledger, chain("y")).values()] == [
        "waiting", "waiting", "waiting", "done"
    ]  # fmt: skip
    run(tmp_path, *chain("y"))
    assert (tmp_path / "a").read_text() == "y"
    assert (tmp_path / "c").read_text() == "x"  # written anew, not appended to
    assert os.stat(tmp_path / "d").st_ino == stamps["d"]


def test_what_makes_no_difference_reruns_nothing(tmp_path):
    """Where and with how many processes it is computed, and comments of a configuration."""
    config = tmp_path / "config.yaml"
    config.write_text("a: 1  # one")
    ledger = Ledger(tmp_path)

    def key(*words: str) -> str:
        return ledger.key(Stage("a", "a", ("eval.py", *words), files=(config,)), {})

    first = key("--lr", "1", "--num_workers", "4")
    config.write_text("# the same\na: 1")
    assert key("--device", "cuda:1", "--lr", "1") == first
    assert key("--num_workers=0", "--lr", "1") == first
    assert key("--lr", "2") != first
    config.write_text("a: 2")
    assert key("--lr", "1") != first
    assert Ledger(tmp_path, "2.0").key(Stage("a", "a", ("x",)), {}) != ledger.key(
        Stage("a", "a", ("x",)), {}
    )


def test_missing_output_is_a_failure(tmp_path):
    states, printed = run(tmp_path, job(tmp_path, "a", code="print('done')"))
    assert states == {"a": "failed"}
    assert "was not written" in printed


MEET = """
import pathlib, sys, time
mine, other = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
mine.touch()
for _ in range(400):
    if other.exists():
        break
    time.sleep(0.05)
else:
    raise SystemExit('nobody came')
"""


def test_jobs_run_at_once(tmp_path):
    """Each waits for the other, which one after another would never end well."""
    pair = [
        job(tmp_path, "a", code=MEET, text=str(tmp_path / "b")),
        job(tmp_path, "b", code=MEET, text=str(tmp_path / "a")),
    ]
    assert set(run(tmp_path, *pair, slots=Slots(2))[0].values()) == {"done"}


WRITE_GPUS = (
    "import os, pathlib, sys;"
    "pathlib.Path(sys.argv[1]).write_text(os.environ.get('CUDA_VISIBLE_DEVICES', 'unset'))"
)


def test_every_job_gets_its_gpus(tmp_path):
    stages = [
        job(tmp_path, "one", code=WRITE_GPUS),
        job(tmp_path, "two", code=WRITE_GPUS, gpus=2),
        job(tmp_path, "none", code=WRITE_GPUS, gpus=0),
    ]
    run(tmp_path, *stages, slots=Slots(2, ["4", "7"]))
    assert (tmp_path / "one").read_text() in ("4", "7")
    assert sorted((tmp_path / "two").read_text().split(",")) == ["4", "7"]
    assert (tmp_path / "none").read_text() == ""
    run(tmp_path, job(tmp_path, "free", code=WRITE_GPUS))
    assert (tmp_path / "free").read_text() == os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
    with pytest.raises(UserError, match="two wants 2 GPUs and --gpus names 1"):
        Scheduler(Ledger(tmp_path / "jobs"), stages, Slots(1, ["0"]))


def test_gpus_are_shared_evenly():
    slots, stage = Slots(4, ["0", "1"]), job(Path("x"), "a")
    taken = [slots.take(stage) for _ in range(4)]
    assert sorted(gpu for one in taken for gpu in one) == ["0", "0", "1", "1"]
    assert slots.take(stage) is None
    slots.give_back(stage, taken[0])
    big = job(Path("x"), "b", gpus=2)
    assert slots.take(big) is None  # it wants whole ones
    for one in taken[1:]:
        slots.give_back(stage, one)
    assert sorted(slots.take(big)) == ["0", "1"]
    assert slots.take(stage) is None
    slots.give_back(big, ["0", "1"])
    assert slots.take(stage) is not None


def test_two_runners_share_the_work(tmp_path):
    slow = "import time; time.sleep(0.3); " + APPEND
    stages = [job(tmp_path, name, code=slow) for name in "abcd"]
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(run(tmp_path, *stages)[0])) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [set(states.values()) for states in found] == [{"done"}, {"done"}]
    # Written twice, a file would hold xx.
    assert [(tmp_path / name).read_text() for name in "abcd"] == ["x"] * 4


def test_a_job_outlives_its_runner_and_stays_locked(tmp_path):
    """Without its lock in the command's hands, a second runner would start it beside the first."""
    wait = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(60)"
    stage = job(tmp_path, "a", code=wait)
    driver = (
        "import pathlib, sys; sys.path.insert(0, sys.argv[1])\n"
        "from ldm.stages import Ledger, Stage\n"
        "stage = Stage('a', 'a', ('-c', sys.argv[3], sys.argv[2] + '/a', 'x'))\n"
        "Ledger(pathlib.Path(sys.argv[2]) / 'jobs').run(stage, 'key', lambda: None)\n"
    )
    runner = subprocess.Popen([sys.executable, "-c", driver, str(ROOT), str(tmp_path), wait])
    ledger = Ledger(tmp_path / "jobs")
    try:
        while not (tmp_path / "a").exists():
            assert runner.poll() is None
            time.sleep(0.05)
        runner.kill()
        runner.wait()
        assert ledger.is_running("a")
        with pytest.raises(StageBusy):
            ledger.run(stage, "key", lambda: None)
    finally:
        found = subprocess.run(["pgrep", "-f", f"{tmp_path}/a x"], capture_output=True, text=True)
        for pid in found.stdout.split():
            os.kill(int(pid), signal.SIGKILL)
    while ledger.is_running("a"):
        time.sleep(0.05)
    assert survey(ledger, [stage])["a"].state is State.WAITING  # begun under another key


def test_a_stopped_job_goes_on(tmp_path):
    """Status 75 is no failure: what it wrote stays, and the next run goes on."""
    code = (
        "import pathlib, sys; p = pathlib.Path(sys.argv[1]); before = p.exists();"
        "p.open('a').write('x'); sys.exit(0 if before else 75)"
    )
    stages = [job(tmp_path, "a", code=code), job(tmp_path, "b", "a")]
    states, printed = run(tmp_path, *stages)
    assert states == {"a": "stopped", "b": "waiting"}
    assert "goes on here" in printed
    assert run(tmp_path, *stages)[0] == {"a": "done", "b": "done"}
    assert (tmp_path / "a").read_text() == "xx"


def test_an_ended_scheduler_ends_its_jobs(tmp_path):
    """What ends this process (SIGTERM, as an exception) ends the commands before."""
    pids = [tmp_path / "a", tmp_path / "b"]
    code = (
        "import os, pathlib, sys, time;"
        "pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(60)"
    )
    stages = [job(tmp_path, path.name, code=code) for path in pids]
    scheduler = Scheduler(Ledger(tmp_path / "jobs"), stages, Slots(2), stream=io.StringIO())

    def collect(standing, threads):
        if all(path.exists() and path.read_text() for path in pids):
            raise SystemExit(75)
        time.sleep(0.05)

    scheduler._collect = collect
    with pytest.raises(SystemExit):
        scheduler.run()
    for path in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
    assert {s.state for s in survey(Ledger(tmp_path / "jobs"), stages).values()} == {State.STOPPED}


def test_a_killed_job_says_so(tmp_path):
    code = "import os; print('epoch 3', flush=True); os.kill(os.getpid(), 9)"
    _, printed = run(tmp_path, job(tmp_path, "a", code=code))
    assert "killed by SIGKILL, perhaps for its memory; last line: epoch 3" in printed


def test_what_a_job_needs(tmp_path):
    stages = [
        job(tmp_path, "a"),
        job(tmp_path, "b"),
        job(tmp_path, "c", "a"),
        job(tmp_path, "d", "c"),
    ]
    assert [s.name for s in needed_by(stages, ["d"])] == ["a", "c", "d"]


# Submission


def test_arrays_hold_what_can_start_together(tmp_path):
    stages = [
        job(tmp_path, "judge", kind="eval"),
        job(tmp_path, "sample-g", kind="sample"),
        job(tmp_path, "sample-h", kind="sample"),
        job(tmp_path, "features-g", "sample-g", "judge", kind="features"),
        job(tmp_path, "select-1", "features-g", kind="select"),
        job(tmp_path, "select-2", "features-g", kind="select"),
        job(tmp_path, "eval-1", "select-1", kind="eval"),
        job(tmp_path, "eval-2", "select-2", kind="eval"),
    ]
    assert [[s.name for s in array] for array in arrays(stages)] == [
        ["judge"],
        ["sample-g", "sample-h"],
        ["features-g"],
        ["select-1", "select-2"],
        ["eval-1", "eval-2"],
    ]


def test_what_slurm_is_asked_for():
    asked = _parameters(Slurm(partition="gpu", hours=0.5, parallel=3), "table-eval", 1)
    assert asked["slurm_partition"] == "gpu" and asked["slurm_array_parallelism"] == 3
    assert (asked["timeout_min"], asked["gpus_per_node"]) == (30, 1)
    assert _parameters(Slurm(gpus=False), "table-eval", 1)["gpus_per_node"] is None
    more = Slurm(parameters={"slurm_account": "lab", "timeout_min": 5})
    assert _parameters(more, "x", 1)["slurm_account"] == "lab"
    assert _parameters(more, "x", 1)["timeout_min"] == 5


def test_submitted_jobs_wait_for_one_another(tmp_path):
    """By submitit's executor of local processes, which all start at once."""
    stages = [
        job(tmp_path, "a", kind="one"),
        job(tmp_path, "bad", "a", kind="two", code=FAIL),
        job(tmp_path, "b", "a", kind="two"),
        job(tmp_path, "after", "bad", kind="three"),
    ]
    ledger = Ledger(tmp_path / "jobs")
    settings = Slurm(cluster="local", hours=0.05, cpus=1)
    jobs = submit(ledger, stages, settings, tmp_path / "submitit", [])
    for one in jobs:
        one.wait()
    states = {name: one.state.value for name, one in survey(ledger, stages).items()}
    assert states == {"a": "done", "bad": "failed", "b": "done", "after": "blocked"}
    assert [(tmp_path / name).read_text() for name in "ab"] == ["x", "x"]
    assert submit(ledger, stages, settings, tmp_path / "submitit", []) == []


def test_unknown_slurm_parameters_are_one_line(tmp_path):
    settings = Slurm(cluster="local", parameters={"slurm_acount": "lab"})
    with pytest.raises(UserError, match="slurm.parameters: .*acount") as caught:
        submit(Ledger(tmp_path), [job(tmp_path, "a")], settings, tmp_path / "s", [])
    assert len(str(caught.value).splitlines()) == 1


def test_a_task_stops_its_command_and_comes_back(tmp_path, monkeypatch):
    """At the time limit submitit calls `checkpoint`: the command has ended when it returns."""
    code = (
        "import os, pathlib, signal, sys, time; p = pathlib.Path(sys.argv[1]);"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75));"
        "p.open('a').write('x'); time.sleep(60 * (len(p.read_text()) < 2))"
    )
    stages = [job(tmp_path, "a", code=code)]
    ledger = Ledger(tmp_path / "jobs")
    task = Task(ledger, stages, "a", waits=False)
    asked = []
    monkeypatch.setattr("ldm.table.submit.requeue", lambda: asked.append(1))
    again = []

    def limit():
        while not (tmp_path / "a").exists():
            time.sleep(0.05)
        time.sleep(0.3)
        again.append(task.checkpoint())

    thread = threading.Thread(target=limit)
    thread.start()
    with pytest.raises(SystemExit) as stop:
        task()
    thread.join()
    assert stop.value.code == 75 and asked == [1]
    assert survey(ledger, stages)["a"].state is State.STOPPED
    assert again[0].function() == "2 written"
    assert survey(ledger, stages)["a"].state is State.DONE


def test_a_task_whose_forerunner_is_missing_does_not_wait_on_slurm(tmp_path):
    stages = [job(tmp_path, "a"), job(tmp_path, "b", "a")]
    with pytest.raises(RuntimeError, match="b needs a, which has not ended"):
        Task(Ledger(tmp_path / "jobs"), stages, "b", waits=False)()
    with pytest.raises(StageFailed):
        Task(Ledger(tmp_path / "jobs"), [job(tmp_path, "f", code=FAIL)], "f", waits=False)()
