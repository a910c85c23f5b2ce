"""The demo: stages that are remembered, the plan, the report, and the whole in a few steps."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from inprocess import Here

from ldm.cli import run_command
from ldm.commands.preflight import check_commands
from ldm.errors import UserError
from ldm.experiment.demo import Demo, read_settings
from ldm.experiment.jobs import ROOT, Records, State, keys_of
from scripts import demo

# The plan


def test_fewer_samples_than_wanted_lower_the_ratio(tmp_path):
    settings = read_settings(["tiles.train5=10", "sampling.per_wanted=2"])
    demo = Demo(tmp_path / "out", None, settings)
    assert (demo.per_class, demo.ratio) == (20, 100)
    settings["tiles"]["train5"], settings["sampling"]["most_per_class"] = 124, 40
    demo = Demo(tmp_path / "out", None, settings)
    assert (demo.per_class, demo.ratio) == (40, 16)  # 20 of 124
    assert demo.plan.rows[-1].key == "guided-selected-16"


def test_the_demo_is_an_experiment(tmp_path):
    """Its settings arrive in the commands; its pools without guidance belong to no row."""
    overrides = ["sampling.scale=5", "evaluation.steps=70", "evaluation.seeds=[3]"]
    plan = Demo(tmp_path / "out", None, read_settings(overrides, fast=True)).plan
    check_commands(plan.jobs)
    arms = ["colour_histogram", "real", "guided-random-100", "guided-selected-100"]
    assert [row.key for row in plan.rows] == arms
    assert [job.name for job in plan.jobs_of(plan.rows)] == [job.name for job in plan.jobs]
    jobs = {job.name: job.command for job in plan.jobs}
    assert list(jobs) == (
        ["tiles", "baseline-colour_histogram", "eval-real-seed3"]
        + ["train-autoencoder", "train-diffusion", "train-classifier", "train-decoder"]
        + ["sample-unguided", "sample-guided", "features-guided"]
        + [f"{what}-guided-random-100{seed}" for what, seed in (("select", ""), ("eval", "-seed3"))]
        + [
            f"{what}-guided-selected-100{seed}"
            for what, seed in (("select", ""), ("eval", "-seed3"))
        ]
    )

    def option(job: str, name: str) -> str:
        return jobs[job][jobs[job].index(name) + 1]

    assert option("sample-guided", "--classifier_scale") == "5"
    assert option("sample-guided", "--n_samples") == "4"
    assert option("sample-unguided", "--n_samples") == "2"
    assert option("eval-real-seed3", "--match_steps") == "70"
    assert "lightning.trainer.max_steps=2" in jobs["train-decoder"]


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
    demo = Demo(tmp_path / "out", user_data, read_settings())
    assert (demo.per_class, len(demo.plan.jobs)) == (4, 16)
    demo.plan.prepare()
    assert (demo.plan.data / "val").resolve() == (user_data / "val").resolve()
    before = keys_of(demo.plan.jobs)
    tile = user_data / "train" / "ADI" / "0_0.png"
    tile.write_bytes(tile.read_bytes() + b"x")
    after = keys_of(Demo(tmp_path / "out", user_data, read_settings()).plan.jobs)
    same = {name for name, key in after.items() if before[name] == key}
    # They read no unlabelled tiles.
    assert same == {"baseline-colour_histogram", "eval-real-seed0", "eval-real-seed1"}


@pytest.mark.parametrize("fault", ["missing", "class", "empty", "inside"])
def test_bad_folders_are_one_line(tmp_path, user_data, monkeypatch, capsys, fault):
    out = tmp_path / "out"
    if fault == "missing":
        (user_data / "val").rename(user_data / "validation")
        expected = "val does not exist"
    elif fault == "class":
        (user_data / "test" / "LYM").rename(user_data / "test" / "Lymph")
        expected = "Lymph"
    elif fault == "empty":
        for path in (user_data / "train5" / "ADI").iterdir():
            path.unlink()
        expected = "no tiles in ADI"
    else:
        out, expected = user_data / "out", "lies in data.root"
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
        Demo(tmp_path, None, read_settings())


def check_self_contained(text: str) -> None:
    for address in re.findall(r"src=\"([^\"]*)\"", text):
        assert address.startswith("data:image/png;base64,")
    text = re.sub(r' srcdoc="[^"]*"', "", text)  # the map, which has its own tests
    assert not re.search(r"https?://|<script|<link|url\([^#]|@import", text)


# The whole


SMALL = ["sampling.most_per_class=4", "features.umap_neighbors=5"]


@pytest.mark.slow
def test_whole_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    out, here = tmp_path / "demo", Here()
    plan = Demo(out, None, read_settings(SMALL, fast=True)).plan
    here.run(plan)
    assert sorted(here.ran) == sorted(
        ["tiles", "train", "train", "classify", "train"]
        + ["sample", "sample", "features"]
        + ["select"] * 2
        + ["evaluate"] * 3
        + ["baselines"]
    )
    # All is done: the command only writes the report.
    assert demo.main(["--fast", "--out", str(out), *SMALL]) == 0
    assert "14 of 14 jobs were done before" in capsys.readouterr().out

    with (out / "table.csv").open(newline="") as stream:
        rows = {row["row"]: row for row in csv.DictReader(stream) if row["split"] == "test"}
    arms = [f"guided-{kind}-100" for kind in ("random", "selected")]
    assert list(rows) == ["colour_histogram", "real", *arms]
    assert all(int(row["images"]) - int(row["synthetic"]) == 18 for row in rows.values())
    assert rows["guided-random-100"]["synthetic"] == "18"
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows.values())

    text = (out / "report.html").read_text()
    check_self_contained(text)
    for heading in ("Guidance", "From noise to a tile", "How it was made", "Training"):
        assert f"<h2>{heading}</h2>" in text
    for address in re.findall('<a href="([^"]*)"', text):
        assert (out / address).exists()
    assert "main.py --base configs/demo/autoencoder.yaml -t --name autoencoder" in text

    # Guided samples and all that uses them; the ViT on real tiles is none of that.
    changed = Demo(out, None, read_settings([*SMALL, "sampling.scale=1"], fast=True)).plan
    waiting = [
        name
        for name, one in Records(plan.jobs_folder).survey(changed.jobs).items()
        if one.state is State.WAITING
    ]
    arms = [f"guided-{kind}-100" for kind in ("random", "selected")]
    assert waiting == ["sample-guided", "features-guided"] + [
        name for arm in arms for name in (f"select-{arm}", f"eval-{arm}-seed0")
    ]


@pytest.mark.slow
def test_command_on_a_folder_of_the_user(tmp_path, user_data):
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), "--fast", *SMALL]
    command += ["--data", str(user_data), "--out", str(tmp_path / "out")]
    first = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    assert len(first.stdout.splitlines()) == 16  # a line per job, report, where and what next
    assert (tmp_path / "out" / "report.html").is_file()
    second = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert second.returncode == 0
    assert "13 of 13 jobs were done before" in second.stdout
