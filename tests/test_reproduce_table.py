"""scripts/reproduce_table.py: its settings, rows and jobs, and a small table from end to end."""

import copy
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from inprocess import Here

import main as main_py
from ldm.cli import parse
from ldm.commands.preflight import check_commands
from ldm.config import load_configs, resolve, validate_config
from ldm.errors import UserError
from ldm.experiment.gather import read_paper
from ldm.experiment.jobs import ROOT, needed_by
from ldm.experiment.plan import Plan
from ldm.experiment.settings import read_settings
from scripts import reproduce_table

CONFIGS = sorted((ROOT / "configs" / "tables").glob("*.yaml"))

# Trained elsewhere: the usual case.
SMALL = {
    "name": "small",
    "out": "set by the test",
    "data": {"root": "set by the test"},
    "models": {
        "pretrained": {"run": "set by the test"},
        "guide": {"run": "set by the test"},
        "tuned": {"run": "set by the test"},
    },
    "generators": {
        "tuned": {"diffusion": "pretrained", "classifier": "guide", "decoder": "tuned"},
    },
    "sampling": {
        "per_wanted": 2,
        "options": {"custom_steps": 2, "classifier_scale": 1, "batch_size": 16, "device": "cpu"},
    },
    "judge": {"seed": 0, "options": {"umap_neighbors": 4}},
    "selection": {
        "random": {"strategy": "random", "redraw": True},
        "centroid": {"strategy": "centroid", "options": {"fill": True}},
    },
    "grid": {"generators": ["tuned"], "selection": ["random", "centroid"], "ratios": [100]},
    "evaluation": {
        "seeds": [0, 1],
        "arguments": {
            "match_steps": 2,
            "validations": 1,
            "arch": "test_vit",
            "patch_size": 16,
            "input-size": tiny.PIXELS,
            "batch-size": 6,
            "mixup": 0,
            "cutmix": 0,
            "aa": "none",
            "reprob": 0,
            "num_workers": 0,
            "device": "cpu",
        },
    },
}


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """Tiles and checkpoints of a user."""
    folder = tmp_path_factory.mktemp("given")
    for seed, (split, count) in enumerate({"train": 8, "train5": 2, "val": 8, "test": 2}.items()):
        tiny.tiles(folder / "tiles" / split, per_class=count, seed=seed)
    tiny.models(folder)
    tiles = [
        p for split in ("val", "test") for p in sorted((folder / "tiles" / split).rglob("*.png"))
    ]
    rows = [f"{path.parent.name}/{path.name},slide{i % 3}" for i, path in enumerate(tiles)]
    (folder / "slides.csv").write_text("\n".join(["path,group", *rows]))
    return folder


@pytest.fixture
def small(given, tmp_path):
    """Writes the settings, changed by a function; returns the file."""

    def write(change=lambda settings: None) -> Path:
        settings = copy.deepcopy(SMALL)
        settings["out"] = str(tmp_path / "out")
        settings["data"]["root"] = str(given / "tiles")
        names = {"pretrained": "diffusion", "guide": "classifier", "tuned": "autoencoder"}
        for name, file in names.items():
            settings["models"][name]["run"] = str(given / f"{file}.ckpt")
        change(settings)
        path = tmp_path / "table.yaml"
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
        return path

    return write


def plan_of(path: Path, *overrides: str) -> Plan:
    return Plan(read_settings(path, overrides))


# Settings


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_published_tables_are_valid(path, given, tmp_path, monkeypatch):
    """Read, planned, and every command taken by its own parser."""
    monkeypatch.setenv("HISTO_DATA", str(given / "tiles"))
    for name in ("DIFFUSION", "SCRATCH", "AUTOENCODER", "DECODER"):
        file = {"AUTOENCODER": "autoencoder", "DECODER": "autoencoder"}.get(name, "diffusion")
        monkeypatch.setenv(f"HISTO_{name}", str(given / f"{file}.ckpt"))
    settings = read_settings(path, [f"out={tmp_path / 'out'}"])
    for model in settings.models.values():
        if model.run is not None:  # trained before, by commands that the file names
            model.run = str(given / "diffusion.ckpt")
    if settings.data.groups is not None:
        settings.data.groups = str(given / "slides.csv")
    plan = Plan(settings)
    check_commands(plan.jobs)
    for job in plan.jobs:
        if job.command[0] == "train":
            args = parse(main_py.Options, list(job.command[1:]))
            with pytest.MonkeyPatch.context() as patch:
                for name, value in job.environment.items():
                    patch.setenv(name, value)
                validate_config(resolve(load_configs(args.base, args.overrides)))
    keys = [row.key for row in plan.rows]
    read_paper(plan.settings.paper, plan.settings.name, keys)
    assert any(key.split("@")[0] == "real" for key in keys) and len(keys) > 5


def test_the_paper_s_grid_is_whole():
    assert len(CONFIGS) >= 2
    text = (ROOT / "configs" / "tables" / "crc5.yaml").read_text()
    settings = yaml.safe_load(text)
    assert settings["grid"]["ratios"] == [50, 100, 200, 300]
    assert set(settings["grid"]["selection"]) == {"random", "centroid"}
    assert len(settings["grid"]["generators"]) == 4
    assert settings["evaluation"]["arguments"]["arch"] == "vit_small"


def set_key(key: str, value):
    """A change of the settings."""

    def change(settings) -> None:
        node = settings
        *parents, last = key.split(".")
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value

    return change


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("grid.ratio", [100], r"unknown key grid.ratio \(did you mean ratios"),
        ("models.guide.runn", "x", r"unknown key models.guide.runn \(did you mean run"),
        ("selection.centroid.strategi", "x", "unknown key selection.centroid.strategi"),
        ("generators.tuned.decoder", "tunned", r"decoder: unknown tunned \(did you mean tuned"),
        ("grid.selection", ["centroids"], r"grid.selection: unknown centroids \(did you"),
        ("grid.without", [{"generator": "x"}], r"grid.without\[0\].generator: unknown x"),
        ("grid.ratios", [0], r"grid.ratios\[0\] 0 must be greater than or equal to 1"),
        ("models.guide.config", "x.yaml", "models.guide must have one of run, config"),
        ("models.guide.needs", {"first_stage": "tuned"}, "belongs to a model that is trained here"),
        ("selection.centroid.redraw", True, "redraw belongs to strategy random"),
        ("selection.centroid.ensemble", True, "ensemble belongs to strategy confidence"),
        (
            "selection.sure",
            {"strategy": "confidence", "ensemble": True, "options": {"confidence": "manifest"}},
            "selection.sure.ensemble needs a judge",
        ),
        (
            "selection.sure",
            {"strategy": "confidence", "ensemble": True, "options": {"choose": True}},
            "selection.sure.ensemble does not go with choose",
        ),
        ("evaluation.seeds", [1, 1], "seeds must be different"),
        ("evaluation.seeds", "many", "evaluation.seeds"),
        ("sampling.options.start_from", {"pseudo-random-200": None}, "start_from .* in quotes"),
        ("evaluation.seeds", [-1], r"seeds\[0\] -1 must be greater"),
        ("sampling.gpus", -1, "gpus -1 must be greater"),
        ("slurm.hours", float("inf"), "hours inf must be"),
        ("sampling.per_wanted", 0.5, "per_wanted 0.5 must be greater"),
        ("judge.run", "x", "judge must have one of"),
        ("judge.network", "wide", "judge.network: unknown wide"),
        ("judge.features", ["pixels"], "judge must have one of seed, run, model and features"),
        ("judge.umap", {}, "judge.umap belongs to judge.features"),
        ("draws", {"per_class": [0]}, r"draws.per_class\[0\] 0 must be greater"),
        ("generators.tuned.unlabelled", "train", "either diffusion or unlabelled"),
        ("generators.pool", {"unlabelled": "train5"}, "another folder than data.labelled"),
        ("link", "hardly", "link 'hardly' must be 'copy'"),
        ("slurm.cluster", "pbs", "slurm.cluster 'pbs' must be"),
        ("data.root", "${oc.env:HISTO_NOWHERE}", "HISTO_NOWHERE is not set"),
        ("baselines.kinds", ["real"], "the name real is taken"),
        ("generators", {"a b": {"diffusion": "pretrained"}}, "'a b' must be letters"),
    ],
)
def test_wrong_settings_are_one_line(small, key, value, expected):
    with pytest.raises(UserError, match=expected) as caught:
        read_settings(small(set_key(key, value)))
    assert len(str(caught.value).splitlines()) == 1


def test_all_problems_are_told_at_once(small):
    def wrong_values(settings):
        settings["grid"]["ratios"] = [-1]
        settings["grid"]["generator"] = ["tuned"]
        settings["evaluation"]["seeds"] = "many"

    with pytest.raises(UserError) as caught:
        read_settings(small(wrong_values))
    for words in ("grid.ratios[0] -1", "grid.generator (did you mean generators", "seeds 'many'"):
        assert words in str(caught.value)

    def wrong_names(settings):
        settings["grid"]["generators"] = ["tunde"]
        settings["judge"]["run"] = "x"

    with pytest.raises(UserError, match="did you mean tuned.*judge must have one of"):
        read_settings(small(wrong_names))


def test_a_circle_of_models(small):
    def change(settings):
        for name, other in (("a", "b"), ("b", "a")):
            settings["models"][name] = {"config": "x.yaml", "needs": {"HISTO_X": other}}

    with pytest.raises(UserError, match="models.a needs itself"):
        read_settings(small(change))


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("models.guide.run", "nowhere.ckpt", "models.guide.run: no file .*nowhere.ckpt"),
        ("data.root", "nowhere", "data.root: nowhere|data.root: .*nowhere does not exist"),
        ("data.labelled", "train1", "its folder train1"),
        ("data.tiles", {"train5": 2}, "must lie in out"),
        ("data.groups", "groups.csv", "data.groups: groups.csv does not exist"),
    ],
)
def test_what_is_missing_is_told_before_anything_runs(small, key, value, expected):
    with pytest.raises(UserError, match=expected):
        plan_of(small(set_key(key, value)))


def test_all_that_is_missing_is_told_at_once(small):
    def change(settings):
        settings["models"]["guide"]["run"] = "nowhere.ckpt"
        settings["models"]["more"] = {"config": "configs/nowhere.yaml"}
        settings["data"]["groups"] = "groups.csv"

    with pytest.raises(UserError) as caught:
        plan_of(small(change))
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for key in ("models.guide.run", "models.more.config", "data.groups"):
        assert key in message


def test_a_user_s_folder_is_never_taken_for_one_of_ours(small, tmp_path, given):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        plan_of(small())
    with pytest.raises(UserError, match="lies in data.root"):
        plan_of(small(), f"out={given / 'tiles' / 'table'}")


def test_options_are_checked_by_the_commands_themselves(small):
    def change(settings):
        settings["evaluation"]["arguments"]["arhc"] = "x"
        settings["sampling"]["options"]["eta"] = 7

    with pytest.raises(UserError) as caught:
        check_commands(plan_of(small(change)).jobs)
    message = str(caught.value)
    assert "--arhc" in message and "--eta" in message
    assert message.count("--arhc") == 1  # not once per seed
    assert len(message.splitlines()) == 1


# Rows and jobs


def test_rows_and_jobs(small):
    plan = plan_of(small())
    assert [row.key for row in plan.rows] == ["real", "tuned-random-100", "tuned-centroid-100"]
    names = [job.name for job in plan.jobs]
    assert names == [
        "eval-real-seed0",
        "eval-real-seed1",
        "sample-tuned",
        "features-tuned",
        "select-tuned-random-100@0",
        "eval-tuned-random-100-seed0",
        "select-tuned-random-100@1",
        "eval-tuned-random-100-seed1",
        "select-tuned-centroid-100",
        "eval-tuned-centroid-100-seed0",
        "eval-tuned-centroid-100-seed1",
    ]
    needs = {job.name: set(job.after) for job in plan.jobs}
    assert needs["features-tuned"] == {"sample-tuned", "eval-real-seed0"}
    assert needs["eval-tuned-centroid-100-seed1"] == {"select-tuned-centroid-100"}
    random, centroid = plan.rows[1:]
    assert centroid.wanted == 6  # as many as the labelled ones
    assert random.factors == {
        "generator": "tuned",
        "decoder": "tuned",
        "guidance": "classifier 1",
        "selection": "random",
        "ratio": 100,
    }


def test_another_network_judges(small, tmp_path):
    """Trained once, for its own row too."""

    def change(settings):
        networks = {"longer": {"arguments": {"match_steps": 4}}}
        settings["baselines"] = {**settings.get("baselines", {}), "networks": networks}
        settings["judge"] = {"seed": 1, "network": "longer"}

    plan = plan_of(small(change))
    jobs = {job.name: job for job in plan.jobs}
    assert set(jobs["features-tuned"].after) == {"sample-tuned", "eval-longer-seed1"}
    command = jobs["features-tuned"].command
    weights = Path(command[command.index("--weights") + 1])
    assert weights == tmp_path / "out" / "eval" / "longer" / "train5" / "seed1"
    row = next(row for row in plan.rows if row.key == "longer")
    assert row.jobs == {0: "eval-longer-seed0", 1: "eval-longer-seed1"}
    trained = jobs["eval-longer-seed1"].command
    assert trained[trained.index("--match_steps") + 1] == "4"


def test_the_grid_can_be_written_down_in_parts(small):
    def change(settings):
        settings["generators"]["own"] = {"diffusion": "pretrained", "classifier": "guide"}
        settings["grid"] = {
            "generators": ["tuned", "own"],
            "selection": ["random", "centroid"],
            "ratios": [50, 100],
            "without": [{"selection": "random", "ratio": 50}, {"generator": "own", "ratio": [50]}],
            "also": [{"generator": "own", "selection": "centroid", "ratio": 300}],
        }

    plan = plan_of(small(change))
    assert [row.key for row in plan.rows[1:]] == [
        "tuned-random-100",
        "tuned-centroid-50",
        "tuned-centroid-100",
        "own-random-100",
        "own-centroid-100",
        "own-centroid-300",
    ]
    amounts = {s.name: s.command for s in plan.jobs if s.name.startswith("sample-")}
    for name, amount in (("sample-tuned", "4"), ("sample-own", "12")):  # 2 per class, twice
        words = amounts[name]
        assert words[words.index("--n_samples") + 1] == amount


def test_uneven_classes_get_what_they_want(small, given, tmp_path):
    root = tmp_path / "uneven"
    for split in ("train", "val", "test"):
        (root / split).parent.mkdir(exist_ok=True)
        (root / split).symlink_to(given / "tiles" / split)
    tiny.tiles(root / "train5", per_class=3)
    (root / "train5" / "TUM" / "0_0.png").unlink()
    plan = plan_of(small(), f"data.root={root}", "grid.ratios=[50]")
    (sample,) = [s.command for s in plan.jobs if s.name == "sample-tuned"]
    # Half of 3 is 2, half of 2 is 1: as scripts/distance.py rounds.
    assert sample[sample.index("--counts") + 1] == "ADI=4,LYM=4,TUM=2"


def test_models_trained_here(small, monkeypatch):
    """Each needs others; what its YAML reads of the environment is part of the job."""
    monkeypatch.setenv("HISTO_LC25000", "/corpora/lc25000")

    def change(settings):
        settings["models"] |= {
            "ae": {"config": "configs/colorectal5/autoencoder.yaml", "gpus": 2},
            "ldm": {
                "config": "configs/demo/diffusion.yaml",
                "needs": {"HISTO_AUTOENCODER": "ae"},
                "env": {"HISTO_DATA": "/tiles"},
            },
            "guide": {
                "classifier": {"iterations": 5, "noised": False},
                "needs": {"first_stage": "ldm"},
                "checkpoint": "best",
            },
        }
        settings["generators"]["tuned"]["diffusion"] = "ldm"

    plan = plan_of(small(change))
    jobs = {job.name: job for job in plan.jobs}
    assert jobs["train-ae"].gpus == 2
    assert jobs["train-ae"].environment["HISTO_LC25000"] == "/corpora/lc25000"
    assert jobs["train-ae"].environment["HISTO_DATA"] == str(plan.data)
    assert jobs["train-ldm"].environment["HISTO_DATA"] == "/tiles"
    last = str(plan.out / "models" / "ae" / "checkpoints" / "last.ckpt")
    assert jobs["train-ldm"].environment["HISTO_AUTOENCODER"] == last
    assert "--noised=False" in jobs["train-guide"].command
    assert set(jobs["sample-tuned"].after) == {"train-ldm", "train-guide"}
    guide = str(plan.out / "models" / "guide" / "checkpoints" / "best.ckpt")
    assert guide in jobs["sample-tuned"].command
    check_commands(plan.jobs)


# Draws of labels


def with_draws(settings) -> None:
    """Two numbers of labels, each with a draw of its own for each of two seeds."""
    settings["draws"] = {"per_class": [2, 3]}
    settings["models"]["guide"] = {
        "classifier": {"iterations": 5},
        "needs": {"first_stage": "pretrained"},
    }
    settings["generators"]["pool"] = {"unlabelled": "train", "label": "pseudo-labelled"}
    settings["generators"]["tuned"]["sampling"] = {"start_from": "{labelled}", "strength": 0.5}
    settings["judge"] = {"features": ["pixels", "diffusion:{pretrained}@20"]}
    settings["selection"]["sure"] = {"strategy": "confidence", "sheets": False}
    settings["grid"] |= {"generators": ["tuned", "pool"], "selection": ["random", "sure"]}
    settings["grid"]["without"] = [{"generator": "pool", "selection": "random"}]
    guide = {"kind": "classifier", "features": "guide:{guide}@{pretrained}"}
    probe = {"features": "diffusion:{pretrained}@20"}
    settings["baselines"] = {
        "kinds": ["colour_histogram"],
        "probes": {"judge": {"arguments": probe}, "guide": {"arguments": guide}},
        "ceiling": {"ratios": [100]},
    }


def with_variations_of_pseudo_labelled_tiles(settings) -> None:
    with_draws(settings)
    settings["models"]["guide"]["classifier"]["data_dir"] = "{pool-sure-100}"
    settings["generators"]["tuned"]["sampling"]["start_from"] = "{pool-sure-100}"


def test_pseudo_labelled_tiles_train_the_guide_and_are_started_from(small, given):
    plan = plan_of(small(with_variations_of_pseudo_labelled_tiles))
    check_commands(plan.jobs)
    jobs = {job.name: job for job in plan.jobs}
    for part in ("@2-0", "@2-1", "@3-0", "@3-1"):
        chosen = f"select-pool-sure-100{part}"
        for name, option in (
            (f"train-guide{part}", "data_dir"),
            (f"sample-tuned{part}", "start_from"),
        ):
            assert chosen in jobs[name].after
            place = jobs[name].command.index(f"--{option}") + 1
            assert jobs[name].command[place].endswith(f"data/pool-sure-100{part}")


def test_classifiers_on_the_labelled_tiles_judge_along(small, given):
    def change(settings) -> None:
        with_draws(settings)
        settings["selection"]["sure"]["ensemble"] = True

    plan = plan_of(small(change))
    check_commands(plan.jobs)
    jobs = {job.name: job for job in plan.jobs}
    for part in ("@2-0", "@3-1"):
        job, classifier = jobs[f"select-tuned-sure-100{part}"], f"eval-real{part}-seed{part[-1]}"
        assert classifier in job.after
        assert classifier not in jobs[f"select-tuned-random-100{part}"].after
        start = job.command.index("--features") + 1
        networks = job.command[start : start + 3]
        assert networks[0] == "pixels" and networks[1].startswith("diffusion:")
        assert networks[2].endswith(f"eval/real{part}/labels{part}/seed{part[-1]}")
        # Selections and probes share what they compute.
        probe = jobs[f"baseline-judge{part}"].command
        kept = [words[words.index("--cache") + 1] for words in (job.command, probe)]
        assert kept[0] == kept[1]
        assert "--cache" not in jobs[f"baseline-guide{part}"].command


def test_a_judge_may_not_be_trained_on_what_it_chooses(small, given):
    def circle(settings) -> None:
        with_variations_of_pseudo_labelled_tiles(settings)
        settings["judge"]["features"] = ["guide:{guide}@{pretrained}"]

    with pytest.raises(UserError, match=r"pool-sure-100@2-0 is trained on them"):
        plan_of(small(circle))


def test_everything_that_sees_labels_is_made_for_each_draw(small, given, tmp_path):
    plan = plan_of(small(with_draws))
    check_commands(plan.jobs)
    arms = ["colour_histogram", "judge", "guide", "real"]
    arms += ["tuned-random-100", "tuned-sure-100", "pool-sure-100", "ceiling-100"]
    assert [row.key for row in plan.rows] == [f"{arm}@{n}" for n in (2, 3) for arm in arms]
    jobs = {job.name: job for job in plan.jobs}
    assert len(jobs) == 4 * (len(arms) + 1 + 1 + 1 + 4)  # labels, guide, pool, folders
    for row in plan.rows:
        labels = row.factors["labels"]
        assert list(row.jobs) == [0, 1]
        parts = [f"@{labels}-{seed}" for seed in (0, 1)]
        for job, part in zip(row.jobs.values(), parts, strict=True):
            assert part in job
            # It sees its own labels only.
            needed = {one.name for one in needed_by(plan.jobs, [job])}
            assert f"subset-labels{part}" in needed
            assert {f"@{name.split('@')[1].split('-seed')[0]}" for name in needed} == {part}
    assert plan.rows[4].wanted == 6 and plan.rows[-3].wanted == 9
    words = jobs["sample-tuned@3-1"].command
    assert words[words.index("--start_from") + 1].endswith("data/labels@3-1")
    assert words[words.index("--classifier") + 1].endswith("models/guide@3-1/checkpoints/last.ckpt")
    words = jobs["select-pool-sure-100@3-1"].command
    assert words[words.index("--unlabelled") + 1].endswith("data/train")
    assert words[words.index("--features") + 2] == f"diffusion:{given / 'diffusion.ckpt'}@20"


def test_a_small_table_with_draws(small, here, tmp_path):
    """Rows over the labels, each against real tiles with as many labels."""

    def change(settings):
        with_draws(settings)
        settings["judge"] = {"features": ["pixels"]}
        settings["grid"]["generators"] = ["pool"]
        settings["baselines"] = {"kinds": ["colour_histogram"]}

    path = small(change)
    here.run(plan_of(path))
    assert reproduce_table.main(["--config", str(path)]) == 0
    out = tmp_path / "out"
    table = json.loads((out / "table.json").read_text())
    rows = {row["key"]: row for row in table["rows"]}
    assert {row["status"] for row in rows.values()} == {"done"}
    assert [rows[f"real@{n}"]["images"] for n in (2, 3)] == [6, 9]
    assert rows["pool-sure-100@3"]["images"] == 9 + rows["pool-sure-100@3"]["synthetic"]
    for row in rows.values():
        assert row["summary"]["seeds"] == [0, 1] and set(row["predictions"]) == {"0", "1"}
    drawn = [{p.name for p in (out / "data" / f"labels@2-{s}").rglob("*.png")} for s in (0, 1)]
    assert drawn[0] != drawn[1]
    with (out / "table.csv").open(newline="") as stream:
        lines = {line["row"]: line for line in csv.DictReader(stream) if line["split"] == "val"}
    for name in ("colour_histogram", "pool-sure-100"):
        for n in ("2", "3"):
            one, real = lines[f"{name}@{n}"], lines[f"real@{n}"]
            gain = float(one["accuracy"]) - float(real["accuracy"])
            assert float(one["delta_accuracy"]) == pytest.approx(gain)
            assert one["factor_labels"] == n
    for split in ("val", "test"):
        assert (out / f"labels_{split}.png").read_bytes().startswith(b"\x89PNG")
    assert "Accuracy over labels per class" in (out / "report.html").read_text()


def test_another_checkpoint_is_another_job(small, given, tmp_path):
    """By content: the same file elsewhere, or touched, is the same."""
    path = small()
    first = {s.name: s.data for s in plan_of(path).jobs}
    (given / "diffusion.ckpt").touch()
    assert {s.name: s.data for s in plan_of(path).jobs} == first
    other = tmp_path / "other.ckpt"
    other.write_bytes((given / "diffusion.ckpt").read_bytes() + b"x")
    changed = {s.name: s.data for s in plan_of(path, f"models.pretrained.run={other}").jobs}
    assert {name for name in first if changed[name] != first[name]} == {"sample-tuned"}


# The whole


@pytest.fixture
def here(monkeypatch):
    monkeypatch.chdir(ROOT)
    return Here()


def test_a_small_table(small, given, here, tmp_path, capsys):
    """From samples to report; what a second run does, and one whose selection fails."""

    def change(settings):
        settings["fidelity"] = {"real": "test", "judge": True}
        settings["copies"] = {"judge": True, "options": {"quantile": 0.1}}
        settings["baselines"] = {"kinds": ["colour_mean"], "ceiling": {"ratios": [100]}}

    path = small(change)
    argv = ["--config", str(path)]
    here.run(plan_of(path))
    assert reproduce_table.main(argv) == 0  # all is done, so only the results are written
    assert "18 of 18 jobs were done before" in capsys.readouterr().out
    assert here.ran == (
        ["baselines"]
        + ["evaluate"] * 2
        + ["sample", "features", "copies"]
        + ["select", "evaluate"] * 2
        + ["fidelity"]
        + ["select", "evaluate", "evaluate", "fidelity"]
        + ["subset", "evaluate", "evaluate"]
    )
    out = tmp_path / "out"
    for name in ("table.md", "table.tex", "table.csv", "report.html", "table.json"):
        assert (out / name).is_file()
    table = json.loads((out / "table.json").read_text())
    rows = {row["key"]: row for row in table["rows"]}
    assert {row["status"] for row in rows.values()} == {"done"}
    assert list(rows) == ["colour_mean", "real", *list(rows)[2:4], "ceiling-100"]
    assert rows["ceiling-100"]["images"] == 12 and rows["ceiling-100"]["synthetic"] == 0
    assert rows["colour_mean"]["summary"]["seeds"] == [0]
    random = rows["tuned-random-100"]
    assert random["summary"]["seeds"] == [0, 1]
    assert random["fidelity"]["overall"]["images_fake"] == 6
    assert random["copies"]["flagged"]["all"]["tiles"] <= 12
    # Copies among the tiles of an arm (the first draw), not only in its pool.
    with (out / "copies" / "tuned" / "copies.csv").open(newline="") as stream:
        flagged = {line["file"] for line in csv.DictReader(stream) if line["flagged"] == "yes"}
    for row, folder in ((random, "tuned-random-100@0"), (rows[list(rows)[3]], list(rows)[3])):
        chosen = (out / "data" / folder).glob("*/synthetic_*")
        names = {f"{p.parent.name}/{p.name.removeprefix('synthetic_')}" for p in chosen}
        assert row["chosen_copies"] == {"tiles": 6, "flagged": len(names & flagged)}
    assert (random["synthetic"], random["wanted"], random["images"]) == (6, 6, 12)
    assert set(random["predictions"]) == {"0", "1"}
    # Each seed has a draw of its own.
    drawn = [
        {p.name for p in (out / "data" / f"tuned-random-100@{seed}").rglob("synthetic_*")}
        for seed in (0, 1)
    ]
    assert drawn[0] != drawn[1]

    # On a finished table only the results are written: here with intervals over slides.
    before = len(here.ran)
    capsys.readouterr()
    assert random["summary"]["bootstrap"]["test"]["groups"] is None
    assert reproduce_table.main([*argv, f"data.groups={given / 'slides.csv'}"]) == 0
    assert len(here.ran) == before
    assert "18 of 18 jobs were done before" in capsys.readouterr().out
    table = json.loads((out / "table.json").read_text())
    assert [row["summary"]["bootstrap"]["test"]["groups"] for row in table["rows"]] == [3] * 5

    # An option of one strategy: its arm alone is made anew. It cannot be, and the row says so.
    overrides = ["evaluation.seeds=[0]", "selection.centroid.options.ratio=3"]
    here.run(plan_of(path, *overrides))
    assert reproduce_table.main([*argv, *overrides, "--report"]) == 1
    assert here.ran[before:] == ["select"]
    failed = {row["key"]: row for row in json.loads((out / "table.json").read_text())["rows"]}[
        "tuned-centroid-100"
    ]
    assert failed["status"] == "failed"
    assert "--ratio 3" in failed["failures"][0]
    assert "--ratio 3" in (out / "table.md").read_text()

    capsys.readouterr()
    assert reproduce_table.main([*argv, "--status"]) == 0
    status = capsys.readouterr().out
    assert "5 rows: 4 complete" in status


def test_only_some_rows(small, tmp_path, monkeypatch):
    """As a user starts it, by Snakemake."""
    monkeypatch.chdir(ROOT)
    argv = ["--config", str(small()), "evaluation.seeds=[0]", "--only", "real"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("signal.signal", lambda *_: None)
        assert reproduce_table.main(argv) == 0
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [row["status"] for row in table["rows"]] == ["done", "missing", "missing"]
    ran = [name for name, job in table["record"]["jobs"].items() if job["state"] == "done"]
    assert ran == ["eval-real-seed0"]
    with pytest.raises(UserError, match=r"only.? reel: fits no row \(did you mean real"):
        reproduce_table.main(["--config", str(small()), "--only", "reel"])


def test_status_and_dry_run_write_nothing_and_are_quick(small, tmp_path):
    """Neither imports torch."""
    path = small()
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1));"
        "from scripts.reproduce_table import main;"
        "main([*sys.argv[1:], '--status']); main([*sys.argv[1:], '--dry-run']);"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    command = [sys.executable, "-c", code, str(ROOT), "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "11 jobs: 11 waiting" in done.stdout and "# sample-tuned" in done.stdout


def test_a_reader_that_leaves_is_no_error(small):
    """`--status | head`."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, str(ROOT / "scripts" / "reproduce_table.py"), "--config", small()]
    done = subprocess.run([*command, "--status"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.slow
def test_the_whole_wiring(tmp_path):
    """configs/tables/wiring.yaml, as a user starts it."""
    command = [sys.executable, str(ROOT / "scripts" / "reproduce_table.py")]
    command += ["--config", str(ROOT / "configs" / "tables" / "wiring.yaml"), "--jobs", "2"]
    command += [f"out={tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert {row["status"] for row in rows} == {"done"}
    synthetic = [row for row in rows if row["kind"] == "synthetic"]
    assert all(row["fidelity"] and row["copies"] for row in synthetic)
