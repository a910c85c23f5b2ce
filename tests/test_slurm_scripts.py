"""The SLURM scripts and their documentation, in real shells; srun, sbatch and python only record.

tests/slurm/run.sh is the proof on a real SLURM.
"""

import ast
import os
import re
import subprocess

import pytest
from pytorch_lightning.plugins.environments import LightningEnvironment
from shells import ROOT, make_site, parse, recorded, shell
from test_documentation import follow

from ldm.errors import UserError
from ldm.train import cluster_plugins

FOLDER = ROOT / "scripts" / "slurm"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.sbatch"))
GUIDE = ROOT / "docs" / "cluster.md"
NEEDED = ("job-name", "nodes", "ntasks-per-node", "cpus-per-task", "time", "requeue")
NEEDED += ("open-mode", "output", "signal")


@pytest.fixture
def site(tmp_path):
    return make_site(tmp_path)


def requeued(site):
    path = site.parent / "record.scontrol"
    words = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return words


def usage(name):
    """The commands in the head of a script, continued lines joined."""
    head = (FOLDER / name).read_text().split("\n#SBATCH", 1)[0]
    lines = [line[4:] for line in head.splitlines() if line.startswith("#   ")]
    return re.sub(r"\\\n\s*", "", "\n".join(lines)) + "\n"


@pytest.mark.parametrize("name", ["common.sh", *SCRIPTS])
def test_syntax(name):
    subprocess.run(["bash", "-n", FOLDER / name], check=True)


@pytest.mark.parametrize("name", SCRIPTS)
def test_options_stand_at_the_top_and_are_documented(name):
    text = (FOLDER / name).read_text()
    options = re.findall(r"^#SBATCH --([a-z-]+)", text, re.MULTILINE)
    assert set(NEEDED) <= set(options)
    # SLURM reads no further than the first command.
    assert text.rindex("#SBATCH") < text.index("\n. scripts/slurm/common.sh")
    assert f"scripts/slurm/{name}" in usage(name)
    assert f"`{name}`" in GUIDE.read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_usage_runs_and_parses(site, name):
    done = shell(site, usage(name))
    assert done.returncode == 0, done.stderr
    commands = recorded(site)
    assert commands
    for command in commands:
        parse(command)


def test_jobs_of_the_guide(tmp_path):
    """Shares, seeds and nodes that sbatch hands over; test_documentation looks at the rest."""
    commands = [c.words for c in follow("docs/cluster.md", make_site(tmp_path))]
    (share,) = [parse(c).part for c in commands if "--part" in c]
    assert share == (0, 16)
    assert [c[c.index("--seed") + 1] for c in commands if "--seed" in c] == ["0"] * 3
    trained = [parse(c) for c in commands if c[0] == "main.py" and "--name" in c]
    assert [args.num_nodes for args in trained] == [1, 4]


def said() -> str:
    """What the code says: the fixed parts of all its strings but docstrings."""
    parts = []
    for path in [*ROOT.glob("*.py"), *(ROOT / "ldm").rglob("*.py")]:
        tree = ast.parse(path.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        parts += [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docstrings
        ]
    return "\0".join(parts)


def test_errors_of_the_guide_are_what_is_printed():
    table = GUIDE.read_text().split("\n## Errors\n")[1].split("\n## ")[0]
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    quotes = [quote for row in rows for quote in re.findall(r"`([^`]+)`", row)]
    assert len(rows) > 10 and len(quotes) > 15
    text = said()
    for quote in quotes:
        # What stands for something else, and where a message is put together of several.
        variable = r"HISTO_|NAME|manifest\.json|nan|inf|\b[A-Z]\b|\.\.\.|[\[\]();]"
        fragments = [part.strip() for part in re.split(variable, quote)]
        fragments = [part for part in fragments if len(part) > 2]
        assert fragments, quote
        for part in fragments:
            assert part in text, f"nothing prints {part!r} of {quote!r}"


@pytest.mark.parametrize("status", [0, 1, 2, 75, 130, 137, 138, 143])
def test_what_is_requeued(site, status):
    """A stop and the scheduler's signals; no mistake, crash or lack of memory."""
    done = shell(site, "sbatch scripts/slurm/command.sbatch eval.py", STATUS=str(status))
    assert done.returncode == status
    assert requeued(site) == (["requeue 7"] if status in (75, 138, 143) else [])


def test_an_element_of_an_array_is_requeued_alone(site):
    """The number of one element is that of the whole array: with it, all would start again."""
    shell(site, "sbatch --array=0-3 scripts/slurm/evaluate.sbatch", STATUS="75")
    assert requeued(site) == ["requeue 7_0"]
    assert recorded(site) == [["eval.py", "--seed", "0"]]


def test_restarts_are_limited(site):
    for count, expected in ((2, ["requeue 7"]), (3, [])):
        done = shell(
            site,
            "sbatch scripts/slurm/command.sbatch eval.py",
            STATUS="75",
            HISTO_RESTARTS="3",
            SLURM_RESTART_COUNT=str(count),
        )
        assert done.returncode == 75 and requeued(site) == expected
    assert "not requeued: HISTO_RESTARTS=3" in done.stderr


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("--base a.yaml", "train-7"),  # else a requeued job would begin a new run
        ("--base a.yaml --name mine", "mine"),
        ("--base a.yaml --name=mine", "mine"),
        ("--base a.yaml -n mine", "mine"),
        ("--resume logs/run", None),
    ],
)
def test_a_training_job_has_a_name(site, words, name):
    shell(site, f"sbatch --nodes=2 scripts/slurm/train.sbatch {words}")
    args = parse(recorded(site)[0])
    assert args.name == name and args.train and (args.devices, args.num_nodes) == (4, 2)


def test_setup_is_sourced_and_tasks_get_their_cores(site):
    (site / "site.sh").write_text('echo "cores $SRUN_CPUS_PER_TASK"\nexport HISTO_DATA=/tiles\n')
    (site.parent / "bin" / "srun").write_text(
        '#!/bin/bash\necho "$HISTO_DATA $SRUN_CPUS_PER_TASK"\n'
    )
    done = shell(
        site, "sbatch scripts/slurm/train.sbatch --base x", HISTO_SETUP=str(site / "site.sh")
    )
    assert "/tiles 8" in done.stderr
    done = shell(site, "sbatch scripts/slurm/train.sbatch --base x", HISTO_SETUP="/nowhere")
    assert done.returncode == 2


def test_submitted_from_elsewhere(site, tmp_path):
    away = tmp_path / "away"
    (away / "scripts").mkdir(parents=True)
    (away / "scripts" / "slurm").symlink_to(FOLDER)
    done = shell(site, f"cd {away} && sbatch scripts/slurm/train.sbatch --base x")
    assert done.returncode == 2 and "is not the repository's folder" in done.stderr
    assert recorded(site) == []


def test_lightning_leaves_requeueing_to_the_script(monkeypatch):
    """Its own handler would requeue a second time and go on from a checkpoint of its own."""
    for name in [name for name in os.environ if name.startswith(("SLURM", "TORCHELASTIC"))]:
        monkeypatch.delenv(name)
    assert cluster_plugins() == []
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    with pytest.raises(UserError, match="--ntasks-per-node=2"):
        cluster_plugins()
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    (plugin,) = cluster_plugins()
    assert plugin.auto_requeue is False
    with monkeypatch.context() as shell_of_a_user:  # srun --pty -J train bash
        shell_of_a_user.setenv("SLURM_STEP_ID", "0")
        shell_of_a_user.setattr("ldm.devices.has_terminal", lambda: True)
        (plugin,) = cluster_plugins()
        assert isinstance(plugin, LightningEnvironment)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "torchrun inside a job")
    assert cluster_plugins() == []
