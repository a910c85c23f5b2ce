"""Every command of README.md and docs/ is one that works; a new one is found by itself."""

import contextlib
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
from shells import OTHERS, ROOT, make_site, parse, recorded_with_variables, shell

from docs import configuration
from ldm import cli
from ldm.commands import train
from ldm.errors import UserError

DOCUMENTS = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]
STARTERS = (*OTHERS, cli.PROGRAM, "export", "python", "sbatch", "srun", "torchrun")
STARTERS += (".venv/bin/python",)
IMAGES = ("histodiffusion", "histodiffusion.sif")  # containers of docs/cluster.md
# What a placeholder of a command stands for while it is parsed.
PLACEHOLDERS = {
    "CONFIG": "configs/latent-diffusion/histo-ldm-kl-8.yaml",
    "TABLE": "configs/tables/crc5.yaml",
}
OF_PLACEHOLDERS = {"HISTO_DATA": "D", "HISTO_AUTOENCODER": "logs/autoencoder"}


@dataclass(frozen=True)
class Snippet:
    """Commands that stand together.

    Attributes:
        where: Document and line.
        text: The commands, as a shell reads them.
    """

    where: str
    text: str


def is_command(line: str) -> bool:
    """Whether a line of a code block begins with a program, a shell variable or an assignment."""
    rest = re.sub(r"^\$ ", "", line)
    assigned = re.sub(r"""^(?:[A-Za-z_]+=(?:"[^"]*"|'[^']*'|\S*)\s*)+""", "", rest)
    words = assigned.split()
    return (
        (assigned != rest and not words)
        or bool(words)
        and (words[0] in STARTERS or re.fullmatch(r"\$[A-Z]+", words[0]) is not None)
    )


def code_blocks(lines: list[str]) -> list[tuple[int, list[str]]]:
    """Indented and fenced blocks, with the number of their first line (from 0)."""
    blocks, current, start, fenced = [], [], 0, False
    for i, line in enumerate([*lines, "end"]):
        if line.startswith("```"):
            fenced = not fenced
            inside, content = False, ""
        else:
            begins = bool(current) or i == 0 or not lines[i - 1].strip()
            indented = line.startswith("    ") and begins
            inside = fenced or indented or (bool(current) and not line.strip())
            content = line if fenced else line[4:]
        if inside:
            start = start if current else i
            current.append(content)
        elif current:
            blocks.append((start, current))
            current = []
    return blocks


def snippets(document: str) -> list[Snippet]:
    """The commands of a document: blocks of code, and code within sentences and tables."""
    lines = (ROOT / document).read_text().splitlines()
    found, prose = [], list(lines)
    for start, block in code_blocks(lines):
        prose[start : start + len(block)] = [""] * len(block)
        if not any(is_command(line) for line in block):
            continue
        if any(line.startswith("$ ") for line in block):  # what follows is what they print
            block = [line[2:] for line in block if line.startswith("$ ")]
        found.append((start, "\n".join(block)))
    text = "\n".join("" if line.startswith("```") else line for line in prose)
    for match in re.finditer(r"`([^`]+)`", text):
        code = " ".join(match[1].split())
        if " " in code and code.split()[0] in STARTERS:
            found.append((text.count("\n", 0, match.start()), code))
    return [Snippet(f"{document}:{line + 1}", code) for line, code in sorted(found)]


@dataclass(frozen=True)
class Command:
    """What a program was called with when a document was followed.

    Attributes:
        where: Document and line of the snippet.
        words: Its arguments, after the name of the program (of python without it).
        variables: HISTO_* of its environment, and those that the document exports later.
    """

    where: str
    words: list[str]
    variables: dict[str, str]


def follow(document: str, site: Path) -> list[Command]:
    """The commands that programs get when a document is followed in one shell."""
    parts = [f"python HERE {s.where}\n{s.text}" for s in snippets(document)]
    done = shell(site, "\n".join([*parts, "python HERE END"]))
    calls, where = [], document
    for words, variables in recorded_with_variables(site):
        if words[0] == "HERE":
            where, last = words[1], variables
        else:
            calls.append((where, words, variables))
    assert done.returncode == 0, f"{where}: {done.stderr}"
    return [Command(where, words, last | variables) for where, words, variables in calls]


def mistake(words: list[str]) -> str | None:
    """What a command says against its words; None where it takes them."""
    output = io.StringIO()
    if "..." in words:
        return "a command is printed in full: ... is no argument"
    missing = [w for w in words if re.match(r"(configs|scripts|tests|benchmarks)/", w)]
    missing = [w for w in missing if not (ROOT / w).exists()]
    if missing:
        return f"{missing[0]} does not exist"
    if words[0] == "make":
        targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        wanted = [word for word in words[1:] if "=" not in word]
        return None if set(wanted) <= set(targets) else f"make has no target {wanted}"
    if words[:2] == ["conda", "env"]:
        return None if (ROOT / words[words.index("-f") + 1]).exists() else "no such environment"
    if words[:2] in (["docker", "run"], ["apptainer", "run"]):
        image = next(i for i, word in enumerate(words) if word in IMAGES)
        words = [cli.PROGRAM, *words[image + 1 :]]
    if words[0] in OTHERS or words[:2] == ["-m", "pip"]:
        return None
    try:
        with contextlib.redirect_stderr(output):
            args = parse([PLACEHOLDERS.get(word, word) for word in words])
            if words[0] == "main.py" and args.base:
                train.load_configuration(args)
    except SystemExit as stop:
        return f"status {stop.code}: {output.getvalue().strip()}" if stop.code else None
    except (UserError, AssertionError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_are_taken_by_their_own_parsers(document, tmp_path, monkeypatch):
    """Every option exists, every configuration resolves with what the document exports."""
    site = make_site(tmp_path)
    commands = follow(document, site)
    monkeypatch.chdir(site)
    others = {k: v for k, v in os.environ.items() if not k.startswith("HISTO_")}
    wrong = []
    for command in commands:
        variables = command.variables | (OF_PLACEHOLDERS if "CONFIG" in command.words else {})
        with mock.patch.dict(os.environ, others | variables, clear=True):
            text = mistake(command.words)
        if text:
            wrong.append(f"{command.where}: {' '.join(command.words)}: {text}")
    assert not wrong, "\n".join(wrong)
    assert commands or not snippets(document)


def test_commands_are_found():
    """In blocks, in tables and in sentences, with what they print left out."""
    pages = ("README.md", "docs/commands.md", "docs/training.md")
    found = [s.text for page in pages for s in snippets(page)]
    texts = "\n".join(found)
    for words in (
        "make demo",
        "export HISTO_DATA=",
        "conda env create",
        "eval.py --arch vit_small",
    ):
        assert words in texts
    assert "parameters   unet" not in texts and len(found) > 20
    # No command is left that was not found: neither in an example of a layout nor after other code.
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        for snippet in snippets(document):
            for line in snippet.text.splitlines():
                text = text.replace(line, "")
        text = re.sub(r"\s+", " ", text)
        for snippet in snippets(document):
            text = text.replace(snippet.text, "")
        left = re.findall(r"(?:python|torchrun|sbatch) (?:\S+ )*?\S+\.(?:py|sbatch)\b.{20}", text)
        assert not left, f"{document}: {left}"


def test_the_page_of_all_keys_is_up_to_date():
    page = configuration.page()
    assert not re.findall(r".*\|  \|$", page, re.MULTILINE)  # a key without a meaning
    assert configuration.PAGE.read_text() == page, "run `make docs`"


# Where a path of an earlier revision is named.
FORMER = {"scripts/bench.py"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_exist(document):
    pattern = r"\b(?:benchmarks|configs|docs|ldm|scripts|tests)/[\w./-]*\w"
    named = set(re.findall(pattern, (ROOT / document).read_text())) - FORMER
    missing = [name for name in sorted(named) if not (ROOT / name).exists()]
    assert not missing
