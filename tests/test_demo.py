"""The demo: stages that are remembered, the plan, the report, and the whole in a few steps."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from inprocess import Here

from ldm.cli import parse, run_command
from ldm.commands import demo
from ldm.commands.preflight import check_commands
from ldm.errors import UserError
from ldm.experiment.jobs import Records, State, keys_of
from ldm.experiment.plan import Plan
from ldm.files import ROOT

# The plan


ARMS = ["pseudo-random-100", "variations-random-100", "variations-selected-100"]


def plan_of(out: Path, *words: str) -> Plan:
    return Plan(demo.read_demo(parse(demo.Options, ["--out", str(out), *words])))


def test_the_demo_is_a_table(tmp_path):
    """Its settings arrive in the commands; pools that are only looked at belong to no row."""
    words = ("sampling.options.classifier_scale=5", "evaluation.seeds=[3]")
    plan = plan_of(tmp_path / "out", "--fast", *words, "evaluation.arguments.match_steps=70")
    check_commands(plan.jobs)
    baselines = ["colour_histogram", "features", "readout", "spread"]
    assert [row.key for row in plan.rows] == [*baselines, "real", *ARMS]
    assert [job.name for job in plan.jobs_of(plan.rows)] == [job.name for job in plan.jobs]
    jobs = {job.name: job.command for job in plan.jobs}
    assert sorted(jobs) == sorted(
        ["tiles", "train-flow", "train-readout", "eval-real-seed3"]
        + [f"baseline-{name}" for name in baselines]
        + [f"sample-{name}" for name in ("unguided", "guided", "variations")]
        + ["features-variations"]
        + [name for arm in ARMS for name in (f"select-{arm}", f"eval-{arm}-seed3")]
    )

    def option(job: str, name: str) -> str:
        return jobs[job][jobs[job].index(name) + 1]

    assert option("sample-guided", "--classifier_scale") == "5"
    assert option("sample-unguided", "--classifier_scale") == "0"
    assert option("sample-variations", "--n_samples") == "4"
    assert option("sample-variations", "--start_from").endswith("pseudo-random-100")
    assert option("eval-real-seed3", "--match_steps") == "70"
    assert "vars.steps=2" in jobs["train-flow"]


@pytest.mark.parametrize("own", [False, True], ids=["procedural", "own tiles"])
def test_what_the_flow_starts_from(tmp_path, user_data, own):
    """The weights that come with the demo are for its procedural tiles, and may be left out."""

    def starts(*words: str) -> tuple[str | None, str]:
        words = (*words, *(("--data", str(user_data)) if own else ()))
        plan = plan_of(tmp_path / "out", *words)
        job = next(job for job in plan.jobs if job.name == "train-flow")
        start = job.environment.get("HISTO_PRETRAINED")
        assert ("configs/demo/pretrained.yaml" in job.command) == (start is not None)
        return start, keys_of(plan.jobs)[job.name]

    weights = str(ROOT / "configs/demo/pretrained.ckpt")
    first = starts()[0]
    assert first is None if own else Path(first).samefile(weights)
    assert starts("vars.pretrained=null")[0] is None
    with pytest.raises(UserError, match="missing.ckpt does not exist"):
        starts("vars.pretrained=missing.ckpt")
    other = tmp_path / "other.ckpt"
    torch.save(torch.load(weights) | {"epoch": 7}, other)
    first = starts(f"vars.pretrained={other}")
    torch.save(torch.load(weights) | {"epoch": 8}, other)
    assert starts(f"vars.pretrained={other}") != first  # the flow is trained again


@pytest.mark.parametrize(
    "word, expected",
    [
        ("sampling.skale=3", "demo.yaml: unknown key sampling.skale"),
        ("sampling", "section.key=value"),
        ("sampling.per_wanted=many", "sampling.per_wanted 'many' must be"),
        ("evaluation.seeds=1", "evaluation.seeds 1 must be"),
        ("judge=3", "judge 3 must be"),
        ("vars.ratio=many", "ratios.0. 'many' must be"),
        ("vars.most=0", "vars.most 0 must be a whole number from 1"),
        ("vars.size=50", "vars.size 50 must be a multiple of 16"),
        ("vars=3", "vars"),
        ("models.flow.overrides=null", "models.flow.overrides"),
        ("vars.pretrained=README.md", "vars.pretrained.*README.md"),
        ("vars.pretrained=5", "5 does not exist"),
    ],
)
def test_bad_overrides(tmp_path, word, expected):
    with pytest.raises(UserError, match=expected):
        plan_of(tmp_path / "out", word)


@pytest.fixture
def user_data(tmp_path) -> Path:
    root = tmp_path / "mine"
    for seed, split in enumerate(("train", "train5", "val", "test")):
        tiny.tiles(root / split, per_class=2, seed=seed, pixels=64)
    return root


@pytest.mark.parametrize("most, ratio", [(40, 1250), (2, 62)])
def test_a_folder_of_the_user(tmp_path, user_data, most, ratio):
    """Where it has more labels than can be sampled for, the ratio is lowered."""
    words = ("--data", str(user_data), f"vars.most={most}")
    plan = plan_of(tmp_path / "out", *words)
    arms = [
        f"{arm}-{ratio}" for arm in ("pseudo-random", "variations-random", "variations-selected")
    ]
    assert [row.key for row in plan.rows[-3:]] == arms
    jobs = {job.name: job.command for job in plan.jobs}
    assert any(word.endswith(arms[0]) for word in jobs["sample-variations"])
    plan.prepare()
    assert (plan.data / "val").resolve() == (user_data / "val").resolve()
    before = keys_of(plan.jobs)
    tile = user_data / "train" / "ADI" / "0_0.png"
    tile.write_bytes(tile.read_bytes() + b"x")
    after = keys_of(plan_of(tmp_path / "out", *words).jobs)
    same = {name for name, key in after.items() if before[name] == key}
    # They read no unlabelled tiles.
    seeds = {f"eval-real-seed{seed}" for seed in range(3)}
    assert same == {"baseline-colour_histogram", *seeds}


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
        plan_of(tmp_path)


def check_self_contained(text: str) -> None:
    for address in re.findall(r"src=\"([^\"]*)\"", text):
        assert address.startswith(("data:image/png;base64,", "data:image/jpeg;base64,"))
    text = re.sub(r' srcdoc="[^"]*"', "", text)  # the map, which has its own tests
    text = re.sub(r' srcdoc="[^"]*"', "", text)  # the map, which has its own tests
    assert not re.search(r"https?://|<script|<link|url\([^#]|@import", text)


# The whole


@pytest.mark.slow
def test_whole_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(demo, "usable_cores", lambda: 1)  # one process trains: it is this one
    out, here = tmp_path / "demo", Here()
    plan = plan_of(out, "--fast")
    here.run(plan)
    assert sorted(here.ran) == sorted(
        ["tiles", "train", "classify", *["sample"] * 3, "features"]
        + [*["select"] * 3, *["evaluate"] * 4, *["baselines"] * 4]
    )
    # All is done: the command only writes the report.
    assert demo.main(["--fast", "--out", str(out)]) == 0
    assert "18 of 18 jobs were done before" in capsys.readouterr().out

    with (out / "table.csv").open(newline="") as stream:
        rows = {row["row"]: row for row in csv.DictReader(stream) if row["split"] == "test"}
    assert list(rows) == ["colour_histogram", "features", "readout", "spread", "real", *ARMS]
    assert all(int(row["images"]) - int(row["synthetic"]) == 18 for row in rows.values())
    assert 0 < int(rows[ARMS[0]]["synthetic"]) <= int(rows[ARMS[1]]["synthetic"]) == 18
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows.values())

    text = (out / "report.html").read_text()
    check_self_contained(text)
    headings = ("Guidance", "From noise to a tile", "Feature space", "How it was made", "Training")
    for heading in headings:
        assert f"<h2>{heading}</h2>" in text
    for address in re.findall('<a href="([^"]*)"', text):
        assert (out / address).exists()

    # The pools that are guided and all that uses them; the network on real tiles is none of that.
    changed = plan_of(out, "--fast", "sampling.options.classifier_scale=1")
    found = Records(plan.jobs_folder).survey(changed.jobs).items()
    assert {name for name, one in found if one.state is State.WAITING} == {
        *("sample-guided", "sample-variations", "features-variations"),
        *(name for arm in ARMS[1:] for name in (f"select-{arm}", f"eval-{arm}-seed0")),
    }


@pytest.mark.slow
def test_command_on_a_folder_of_the_user(tmp_path, user_data):
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), "--fast"]
    command += ["--data", str(user_data), "--out", str(tmp_path / "out")]
    first = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    assert len(first.stdout.splitlines()) == 37  # start and end of a job; report, where, what next
    assert (tmp_path / "out" / "report.html").is_file()
    second = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert second.returncode == 0
    assert "17 of 17 jobs were done before" in second.stdout
