"""Documented commands: in a real shell whose programs only record their words, and for real."""

import importlib
import multiprocessing
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from ldm import cli
from ldm.commands import load

ROOT = Path(__file__).resolve().parents[1]
RECORD = """{
    printf "%s\\037" "$@"
    printf "\\035%s\\036" "$(env | grep ^HISTO_)"
} >> "$RECORD"; exit "${STATUS:-0}\""""
# Programs of an installation, which are recorded with their name.
OTHERS = (
    "apptainer",
    "bash",
    "conda",
    "cp",
    "docker",
    "make",
    "module",
    "pip",
    "snakemake",
    "wandb",
)

PROGRAMS = {
    # The step: without its own options, the command.
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'printf "%s\\n" "$*" >> "$RECORD.scontrol"',
    "python": RECORD,
    # One of its processes.
    "torchrun": 'while [[ $1 != *.py ]]; do shift; done; exec python "$@"',
    # A job that starts at once, with SLURM's variables; of an array the first element.
    "sbatch": """
        while [[ $1 != *.sbatch ]]; do
            case $1 in
                --array=*) array=${1#*=} ;;
                --wrap) shift; /bin/bash -c "$1" >&2 || exit; echo 7; exit ;;
                --nodes=*) nodes=${1#*=} ;;
                --ntasks-per-node=*) tasks=${1#*=} ;;
                --*) ;;
                *) echo "sbatch: $1 is no option" >&2; exit 1 ;;
            esac
            shift
        done
        script=$1; shift
        said() { sed -n "s/^#SBATCH --$1=//p" "$script"; }
        export SLURM_JOB_ID=7 SLURM_JOB_NAME=$(said job-name) SLURM_NNODES=${nodes:-$(said nodes)}
        export SLURM_NTASKS_PER_NODE=${tasks:-$(said ntasks-per-node)}
        export SLURM_CPUS_PER_TASK=$(said cpus-per-task)
        if [ -n "${array:-}" ]; then
            export SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=${array%-*}
            export SLURM_ARRAY_TASK_COUNT=$((${array#*-} + 1))
        fi
        /bin/bash "$script" "$@" >&2 || exit
        echo 7""",
    **{name: f'set -- {name} "$@"; {RECORD}' for name in (*OTHERS, cli.PROGRAM)},
}
# What takes long to import: done once, in the process that those of commands are forked from.
HEAVY = ("shells", "albumentations", "pytorch_lightning", "timm", "ldm.train", "ldm.api", "umap")
ENTRY_POINTS = ("main.py", "classifier_train.py", "sample_diffusion.py", "eval.py")


def make_site(folder: Path) -> Path:
    """A checkout in `folder` whose python records its arguments, beside the programs above."""
    (folder / "bin").mkdir()
    for name, body in PROGRAMS.items():
        path = folder / "bin" / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    checkout = folder / "checkout"
    (checkout / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(folder / "bin" / "python", checkout / ".venv" / "bin" / "python")
    for name in ("benchmarks", "scripts", "configs", *ENTRY_POINTS):
        (checkout / name).symlink_to(ROOT / name)
    return checkout


def shell(site: Path, command: str, **variables: str) -> subprocess.CompletedProcess:
    """Run a script in the checkout."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "HISTO"))}
    environment |= {"PATH": f"{site.parent / 'bin'}:{os.environ['PATH']}"}
    environment |= {"RECORD": str(site.parent / "record"), **variables}
    return subprocess.run(
        ["/bin/bash", "-e", "-c", command],
        cwd=site,
        env=environment,
        capture_output=True,
        text=True,
    )


def recorded_with_variables(site: Path) -> list[tuple[list[str], dict[str, str]]]:
    """The words of the programs that ran (of python without its name) with their HISTO_* variables.

    They are forgotten then.
    """
    path = site.parent / "record"
    commands = path.read_text().split("\036")[:-1] if path.exists() else []
    path.unlink(missing_ok=True)
    parts = [command.split("\035") for command in commands]
    return [
        (words.split("\037")[:-1], dict(line.split("=", 1) for line in variables.splitlines()))
        for words, variables in parts
    ]


def recorded(site: Path) -> list[list[str]]:
    """The words of the programs that ran."""
    return [words for words, _ in recorded_with_variables(site)]


def parse(command: list[str]):
    """The words as the entry point takes them."""
    module, *words = command
    if module == cli.PROGRAM:
        return cli.parse(load(words[0]).Options, words[1:]) if words[0] in cli.COMMANDS else None
    if module == "-m":
        module, *words = words
    else:
        assert (ROOT / module).is_file(), module
        module = module.removesuffix(".py").replace("/", ".")
    entry = importlib.import_module(module)
    if hasattr(entry, "Options"):
        return cli.parse(entry.Options, words)
    return entry.make_parser().parse_args(words)


def run(words: list[str], folder: Path, variables: dict[str, str]) -> str:
    """Run a command (without its `python`) in a process of its own; what it says if it fails."""
    log = folder.parent / "log"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(HEAVY))
    process = context.Process(target=_be, args=(words, folder, variables, log))
    process.start()
    process.join()
    output = log.read_bytes().decode() if log.exists() else ""
    if process.exitcode:
        return f"status {process.exitcode}: {' | '.join(output.strip().splitlines()[-3:])}"
    return "a file's lines are written over: \\r" if "\r" in output else ""


def _be(words: list[str], folder: Path, variables: dict[str, str], log: Path) -> None:
    """Be the process of a command, with its output in a file."""
    os.chdir(folder)
    for name in [name for name in os.environ if name.startswith("HISTO_")]:
        del os.environ[name]
    os.environ.update(variables)
    with open(log, "w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    program, *argv = words[1:] if words[0] == "-m" else words
    entry = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    sys.argv = [program, *argv]
    cli.run_command(partial(entry.main, argv), getattr(entry, "Options", None))
