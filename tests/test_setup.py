"""Set-up files agree with each other and with what the code imports."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]


def name_of(requirement: str) -> str:
    return re.split(r"[<>=!~\[ ;]", requirement)[0].lower().replace("_", "-")


def sources() -> list[Path]:
    names = ("benchmarks", "ldm", "scripts", "tests")
    folders = [path for name in names for path in (ROOT / name).rglob("*.py")]
    return folders + sorted(ROOT.glob("*.py"))


def test_conda_users_get_the_same_packages():
    environment = yaml.safe_load((ROOT / "environment.yaml").read_text())
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    pip.remove("--editable .")  # scripts import the installed package
    assert {name_of(r) for r in pip} == {name_of(r) for r in REQUIREMENTS}
    assert sorted(pip) == sorted(REQUIREMENTS)  # the bounds too
    assert f"python{PROJECT['requires-python']}" in environment["dependencies"]


def test_every_import_is_declared():
    declared = {name_of(r) for r in REQUIREMENTS}
    declared |= {name_of(r) for extra in PROJECT["optional-dependencies"].values() for r in extra}
    owners = packages_distributions()
    folders = (ROOT, ROOT / "scripts", ROOT / "tests")
    own = {path.stem for folder in folders for path in folder.glob("*.py")}
    own |= {"benchmarks", "docs", "ldm", "scripts", "tests"}
    undeclared = set()
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            for module in (m.split(".")[0] for m in modules):
                if module in sys.stdlib_module_names or module in own or module == "tomli":
                    continue
                names = {name_of(owner) for owner in owners.get(module, [module])}
                if not names & declared:
                    undeclared.add(f"{path.relative_to(ROOT)}: {module}")
    assert not undeclared


def test_the_guide_gives_a_reason_for_every_dependency():
    guide = (ROOT / "docs" / "development.md").read_text().lower()
    missing = [name_of(r) for r in PROJECT["dependencies"] if name_of(r) not in guide]
    assert not missing


@pytest.fixture
def checkout(tmp_path):
    """A copy without dependencies, in a folder whose name has a space, with a stand-in demo."""
    root = tmp_path / "a checkout"
    (root / "scripts").mkdir(parents=True)
    (root / "ldm").mkdir()
    (root / "ldm" / "__init__.py").touch()
    shutil.copy(ROOT / "Makefile", root)
    (root / "pyproject.toml").write_text("[project]\nname = 'x'\nversion = '0'\n")
    (root / "scripts" / "demo.py").write_text("import sys\nprint(sys.argv[1:])\n")
    return root


def make(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", *arguments],
        cwd=root,
        env={**keep, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def pretend_installed(root: Path) -> None:
    """A .venv that is up to date: this Python."""
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (root / ".venv" / ".installed").touch()


@needs_make
def test_make_demo_hands_paths_over_unchanged(checkout):
    pretend_installed(checkout)
    assert make(checkout, "demo").stdout == "[]\n"
    for path in ("my tiles", "o'brien", "50%"):
        done = make(checkout, "demo", f"DATA={path}")
        assert done.stdout == f"{['--data', path]}\n", done.stderr
    assert make(checkout, "demo", DATA="tiles").stdout == "['--data', 'tiles']\n"


@needs_make
def test_make_refuses_an_old_python(checkout):
    old = checkout / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")  # what the version check of an old Python returns
    old.chmod(0o755)
    done = make(checkout, "test", f"PYTHON={old.name}", PATH=f"{checkout}:{os.environ['PATH']}")
    assert done.returncode != 0
    assert "PYTHON=python3.9 is not Python 3.11 or later" in done.stderr
    assert not (checkout / ".venv").exists()


@needs_make
def test_make_installs_once_and_again_when_the_project_file_changes(checkout):
    pretend_installed(checkout)
    log = checkout / "log"
    (checkout / ".venv" / "bin" / "python").unlink()
    fake = checkout / ".venv" / "bin" / "python"
    fake.write_text(f'#!/bin/sh\necho "$@" >> "{log}"\n')
    fake.chmod(0o755)
    stamp = checkout / ".venv" / ".installed"
    os.utime(stamp, (1, 1))
    for _ in range(2):
        assert make(checkout, "setup", f"PYTHON={sys.executable}").returncode == 0
    assert log.read_text().count("pip install --quiet") == 1
    assert log.read_text().strip().endswith("--editable .[dev]")
    os.utime(checkout / "pyproject.toml", (4e9, 4e9))
    make(checkout, "setup", f"PYTHON={sys.executable}")
    assert log.read_text().count("pip install") == 2


def test_continuous_integration_runs_the_tests():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()
