"""The demo: stages that are remembered, the plan, the report, and the whole in a few steps."""

import csv
import importlib
import io
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import tiny

from ldm.cli import run_command
from ldm.demo.plan import RANDOM, REAL, SELECTED, Plan, read_settings
from ldm.errors import UserError
from ldm.stages import ROOT, Runner, Stage, StageFailed
from scripts import demo

# Stages


def stage(folder: Path, name: str = "a", text: str = "x", **kwargs) -> Stage:
    """Appends to FOLDER/name/log, and writes nothing else."""
    out = folder / name
    code = (
        f"import pathlib; p = pathlib.Path({str(out)!r}); p.mkdir(exist_ok=True);"
        f" (p / 'log').open('a').write({text!r}); print('said', {text!r})"
    )
    return Stage(
        name, "a stage", ("-c", code), output=(out,), number=lambda: f"made {text}", **kwargs
    )


def run(folder: Path, *stages: Stage) -> list[str]:
    """What a new runner prints for each stage."""
    lines = []
    runner = Runner(folder / "stages", len(stages), stream=io.StringIO())
    for one in stages:
        before = len(runner.stream.getvalue())
        runner.run(one)
        lines.append(runner.stream.getvalue()[before:])
    return lines


def test_a_finished_stage_is_not_run_again(tmp_path):
    (first,) = run(tmp_path, stage(tmp_path))
    assert re.fullmatch(r"\[1/1\] a stage +\d+ s  made x\n", first)
    (second,) = run(tmp_path, stage(tmp_path))
    assert "done before" in second and "made x" in second
    assert (tmp_path / "a" / "log").read_text() == "x"
    assert "said x" in (tmp_path / "stages" / "a.log").read_text()


def test_another_command_starts_anew(tmp_path):
    run(tmp_path, stage(tmp_path))
    run(tmp_path, stage(tmp_path, text="y"))
    assert (tmp_path / "a" / "log").read_text() == "y"
    assert "said x" not in (tmp_path / "stages" / "a.log").read_text()


def test_missing_output_is_made_again(tmp_path):
    run(tmp_path, stage(tmp_path))
    (tmp_path / "a" / "log").unlink()
    (tmp_path / "a").rmdir()
    assert "done before" not in run(tmp_path, stage(tmp_path))[0]


@pytest.mark.parametrize("change", ["command", "file", "environment", "data"])
def test_what_comes_after_a_changed_stage_is_made_anew(tmp_path, change):
    config = tmp_path / "config.yaml"
    config.write_text("one")

    def chain(text="x", environment=None, data=""):
        first = stage(
            tmp_path, "a", text, files=(config,), environment=environment or {}, data=data
        )
        return first, stage(tmp_path, "b", after=("a",)), stage(tmp_path, "c")

    run(tmp_path, *chain())
    if change == "file":
        config.write_text("two")
    changed = {
        "command": {"text": "y"},
        "file": {},
        "environment": {"environment": {"K": "v"}},
        "data": {"data": "other tiles"},
    }
    lines = run(tmp_path, *chain(**changed[change]))
    assert ["done before" in line for line in lines] == [False, False, True]
    assert all("done before" in line for line in run(tmp_path, *chain(**changed[change])))


def test_an_interrupted_stage_goes_on(tmp_path):
    """Its output stays, its time adds up; a failure is shown with the end of the log."""
    out = tmp_path / "a"
    code = (
        f"import pathlib, sys; p = pathlib.Path({str(out)!r}); p.mkdir(exist_ok=True);"
        " n = len(list(p.iterdir())); (p / str(n)).touch();"
        " print(*range(40), sep='\\n'); print('attempt', n); sys.exit(7 if n < 1 else 0)"
    )
    failing = Stage("a", "fails once", ("-c", code), output=(out,))
    runner = Runner(tmp_path / "stages", 1, stream=io.StringIO())
    with pytest.raises(StageFailed) as failure:
        runner.run(failing)
    assert failure.value.status == 7
    shown = runner.stream.getvalue()
    assert "failed with exit status 7" in shown
    assert "attempt 0" in shown and "\n    39\n" in shown and "\n    12\n" not in shown
    assert str(tmp_path / "stages" / "a.log") in shown
    runner.run(failing)
    assert sorted(path.name for path in out.iterdir()) == ["0", "1"]
    assert "attempt 0" in (tmp_path / "stages" / "a.log").read_text()


def test_a_stopped_demo_stops_its_stage(tmp_path):
    def stop(command, log_path, environment, tick, lock):
        raise KeyboardInterrupt

    runner = Runner(tmp_path, 1, stream=io.StringIO(), launch=stop)
    with pytest.raises(KeyboardInterrupt):
        runner.run(stage(tmp_path))
    assert "goes on here" in runner.stream.getvalue()

    pid = tmp_path / "pid"
    code = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    driver = (
        "import signal, sys, io, pathlib; sys.path.insert(0, sys.argv[1])\n"
        "from ldm.stages import Runner, Stage\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "Runner(pathlib.Path(sys.argv[2]), 1).run(Stage('b', 'sleeps', ('-c', sys.argv[3])))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", driver, str(ROOT), str(tmp_path / "s"), code],
        stdout=subprocess.DEVNULL,
    )
    while not (pid.exists() and pid.read_text()):
        assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=30) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


# The plan


def test_fewer_samples_than_wanted_lower_the_ratio(tmp_path):
    settings = read_settings(["tiles.train5=10", "sampling.per_wanted=2"])
    plan = Plan(tmp_path / "out", None, settings)
    assert (plan.per_class, plan.ratio) == (20, 100)
    settings["tiles"]["train5"], settings["sampling"]["most_per_class"] = 124, 40
    plan = Plan(tmp_path / "out", None, settings)
    assert (plan.per_class, plan.ratio) == (40, 16)  # 20 of 124
    assert plan.training_folder(SELECTED) == "train5+selected16%"


def test_every_arm_gets_the_same_number_of_steps(tmp_path):
    settings = read_settings(["evaluation.steps=100", "evaluation.arguments.batch-size=6"])
    plan = Plan(tmp_path / "out", None, settings)
    for kind, per_class in ((REAL, 4), (RANDOM, 8)):
        tiny.tiles(plan.data / plan.training_folder(kind), per_class=per_class)
    epochs = {}
    for kind in (REAL, RANDOM):
        command = plan.evaluation_stage(kind, "").command
        epochs[kind] = int(command[command.index("--epochs") + 1])
    assert epochs == {REAL: 50, RANDOM: 25}  # 12 and 24 tiles: 2 and 4 steps in an epoch


@pytest.mark.parametrize(
    "word, expected",
    [
        ("sampling.skale=3", "skale.*demo.yaml"),
        ("sampling", "section.key=value"),
        ("sampling.steps.more=3", "no such setting"),
        ("sampling.steps=many", "must be a number"),
        ("evaluation.seeds=1", "must be a list"),
        ("tiles=3", "must be a section"),
        ("--scale=3", "section.key=value"),
    ],
)
def test_bad_overrides(word, expected):
    with pytest.raises(UserError, match=expected):
        read_settings([word])


@pytest.fixture
def user_data(tmp_path) -> Path:
    root = tmp_path / "mine"
    for seed, split in enumerate(("train", "train5", "val", "test")):
        tiny.tiles(root / split, per_class=2, seed=seed, pixels=64)
    return root


def test_a_folder_of_the_user(tmp_path, user_data):
    plan = Plan(tmp_path / "out", user_data, read_settings())
    assert (plan.labelled, plan.count) == (2, 13)
    plan.link_splits()
    assert (plan.data / "val").resolve() == (user_data / "val").resolve()
    made = plan.data / "train5+selected100%"
    made.mkdir()
    plan.link_splits()
    assert made.is_dir()  # the same tiles: nothing changes
    plan.stages.mkdir()  # as the runner does: it tells whose folder this is
    Plan(tmp_path / "out", None, read_settings()).link_splits()
    assert not made.exists()
    assert (user_data / "val" / "TUM").is_dir()  # a link was removed, not what it points to
    tile = user_data / "train" / "ADI" / "0_0.png"
    tile.write_bytes(tile.read_bytes() + b"x")
    assert Plan(tmp_path / "out", user_data, read_settings()).identity != plan.identity


@pytest.mark.parametrize("fault", ["missing", "class", "empty", "inside"])
def test_bad_folders_are_one_line(tmp_path, user_data, monkeypatch, capsys, fault):
    out = tmp_path / "out"
    if fault == "missing":
        (user_data / "val").rename(user_data / "validation")
        expected = "no folder val"
    elif fault == "class":
        (user_data / "test" / "LYM").rename(user_data / "test" / "Lymph")
        expected = "Lymph"
    elif fault == "empty":
        for path in (user_data / "train5" / "ADI").iterdir():
            path.unlink()
        expected = "train5/ADI has no images"
    else:
        out, expected = user_data / "out", "lies in --data"
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: demo.main(["--data", str(user_data), "--out", str(out)]))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert expected in error
    assert len(error.splitlines()) == 1
    assert not out.exists()


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="other files"):
        Plan(tmp_path, None, read_settings())


# The report


def check_self_contained(text: str) -> None:
    for address in re.findall(r"src=\"([^\"]*)\"", text):
        assert address.startswith("data:image/png;base64,")
    assert not re.search(r"https?://|<script|<link|url\([^#]|@import", text)


# The whole


class Here:
    """Runs a stage's command in this process: the imports of fourteen processes take minutes."""

    def __init__(self):
        self.ran: list[str] = []

    def __call__(self, command, log_path, environment, tick, lock) -> int:
        script, *argv = command
        self.ran.append(script)
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        with pytest.MonkeyPatch.context() as patch, log_path.open("a") as stream:
            for name, value in environment.items():
                patch.setenv(name, value)
            with redirect_stdout(stream), redirect_stderr(stream), pytest.raises(SystemExit) as end:
                run_command(lambda: module.main(argv))
        return end.value.code


def execute(plan: Plan) -> tuple[list[str], str]:
    """Run a plan; the scripts that ran, and what was printed."""
    from ldm.demo.report import write_report

    here = Here()
    runner = Runner(plan.stages, plan.count, stream=io.StringIO(), launch=here)
    plan.execute(runner)
    write_report(plan, runner.finished)
    return here.ran, runner.stream.getvalue()


SMALL = ["sampling.most_per_class=4", "features.umap_neighbors=5"]


@pytest.mark.slow
def test_whole_demo(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "demo"
    ran, printed = execute(Plan(out, None, read_settings(SMALL, fast=True)))
    assert ran == (
        ["scripts/make_tiles.py", "main.py", "main.py", "classifier_train.py", "main.py"]
        + ["sample_diffusion.py", "sample_diffusion.py", "eval.py", "scripts/vis.py"]
        + ["scripts/distance.py"] * 2
        + ["eval.py"] * 2
    )
    assert len(printed.splitlines()) == 13

    with (out / "table.csv").open(newline="") as stream:
        rows = {row["label"]: row for row in csv.DictReader(stream) if row["split"] == "test"}
    assert list(rows) == [
        "colour histogram, real only",
        "real only",
        "real + random synthetic",
        "real + selected synthetic",
    ]
    assert all(int(row["images"]) - int(row["synthetic"]) == 18 for row in rows.values())
    assert rows["real + random synthetic"]["synthetic"] == "18"
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows.values())

    text = (out / "report.html").read_text()
    check_self_contained(text)
    for heading in ("Reconstructions", "Guidance", "Selection", "How it was made", "Training"):
        assert f"<h2>{heading}</h2>" in text
    assert "main.py --base configs/demo/autoencoder.yaml -t --name autoencoder" in text

    assert execute(Plan(out, None, read_settings(SMALL, fast=True)))[0] == []
    ran, printed = execute(Plan(out, None, read_settings([*SMALL, "sampling.scale=1"], fast=True)))
    # Guided samples and all that uses them; the ViT on real tiles is none of that.
    assert (
        ran
        == ["sample_diffusion.py", "scripts/vis.py"] + ["scripts/distance.py"] * 2 + ["eval.py"] * 2
    )
    assert printed.count("done before") == 7


@pytest.mark.slow
def test_command_on_a_folder_of_the_user(tmp_path, user_data):
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), "--fast", *SMALL]
    command += ["--data", str(user_data), "--out", str(tmp_path / "out")]
    first = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    assert len(first.stdout.splitlines()) == 14
    assert (tmp_path / "out" / "report.html").is_file()
    second = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert second.returncode == 0
    assert second.stdout.count("done before") == 12
