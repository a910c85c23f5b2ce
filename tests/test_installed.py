"""The package as pip installs it: from a wheel, in an empty folder, away from any checkout."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.cli import COMMANDS, existing_path
from ldm.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def test_configurations_of_the_package_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert existing_path("configs/demo/demo.yaml", "config") == ROOT / "configs/demo/demo.yaml"
    own = tmp_path / "configs" / "demo" / "demo.yaml"
    own.parent.mkdir(parents=True)
    own.touch()
    assert existing_path("configs/demo/demo.yaml", "config").samefile(own)
    with pytest.raises(UserError, match="config: configs/nowhere.yaml does not exist"):
        existing_path("configs/nowhere.yaml", "config")


def copied(recipe: str) -> list[str]:
    """What the recipe of a container copies from the checkout."""
    text = (ROOT / recipe).read_text()
    if recipe == "Dockerfile":
        lines = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY ")]
    else:
        section = text.partition("%files\n")[2].partition("\n\n")[0]
        lines = [line.split()[:1] for line in section.splitlines()]
    return sorted(name for line in lines for name in line)


def test_containers_copy_what_a_wheel_is_made_of():
    names = copied("Dockerfile")
    assert names == copied("histodiffusion.def") and all((ROOT / name).exists() for name in names)
    kept = [
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"
    ]
    assert names == sorted(kept)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Folder of a wheel's content, made of what a container copies."""
    folder = tmp_path_factory.mktemp("installed")
    checkout, wheels, target = (folder / name for name in ("checkout", "wheels", "target"))
    checkout.mkdir()
    for name in copied("Dockerfile"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, checkout / name, symlinks=True)
        else:
            shutil.copy(ROOT / name, checkout)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, checkout]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = wheels.iterdir()
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True)
    shutil.rmtree(checkout)
    return target


def histodiffusion(installed: Path, folder: Path, *words: str) -> str:
    """What the installed command prints when it is typed in a folder."""
    done = subprocess.run(
        [installed / "bin" / "histodiffusion", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_wheel_holds_all_that_commands_need(installed, tmp_path):
    said = histodiffusion(installed, tmp_path, "--help")
    assert [line.split()[0] for line in said.splitlines()[2:] if line[:2] == "  "] == [*COMMANDS]
    packed = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")}
    assert packed == {str(p.relative_to(installed / "ldm")) for p in installed.rglob("*.yaml")}


@pytest.mark.slow
def test_an_installed_table_runs_its_jobs_where_it_was_started(installed, tmp_path):
    """Through Snakemake, with configurations of the package."""
    words = ["--config", "configs/tables/wiring.yaml", "--only", "colour_mean", "out=results"]
    words += ["data.root=results/tiles", "data.tiles.train=6"]
    histodiffusion(installed, tmp_path, "table", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
    text = (tmp_path / "results" / "table.md").read_text()
    assert re.search(r"^\| colour mean +\| +18 \| +1 \|", text, re.MULTILINE)  # tiles, seeds
