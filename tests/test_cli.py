"""ldm.cli: options of a dataclass on the command line, in mappings and in errors."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest

import main as main_py
from ldm.cli import Commas, Count, NotNegative, Seed, checked, like, option, parse, run_command
from ldm.errors import Problems, UserError

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Shared:
    seed: Seed = option("-s", default=23, help="seed", group="run")
    workers: Count = option(default=2, help="processes", published=("--num_workers",))


@dataclass(frozen=True, kw_only=True)
class Options(Shared):
    """Do a thing."""

    program: ClassVar = "thing.py"
    example: ClassVar = "  thing.py a.png"

    files: tuple[str, ...] = option(positional=True, metavar="FILE", help="5% of images")
    base: tuple[str, ...] = option("-b", default=(), metavar="YAML", help="files")
    train: bool = option("-t", default=False, takes_value=True, help="train")
    keep_all: bool = option(default=False, help="keep")
    crop: bool = option(default=True, off=("--no_crop",), help="crop")
    mode: Literal["fast", "slow"] | None = option(default=None, help="mode")
    sizes: Annotated[tuple[Count, ...], Commas] = option(default=(1, 2), help="sizes")
    span: tuple[int, int] | None = option(default=None, nargs=2, metavar=("A", "B"), help="span")
    rate: NotNegative = option(default=0.5, help="rate")
    more: tuple[str, ...] = option(default=(), repeats=True, help="more")
    seed: Seed = like(Shared, "seed", default=0)

    def problems(self):
        if self.keep_all and self.train:
            yield "keep_all", "does not go with train"


def options(words: str) -> Options:
    return parse(Options, words.split())


def complaint(capsys, settings: type, words: list[str]) -> str:
    """The one line that a command says against its words."""
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: parse(settings, words), settings)
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a b", {"files": ("a", "b"), "seed": 0, "workers": 2, "crop": True}),
        ("a -s 4 --num_workers 3", {"seed": 4, "workers": 3}),
        ("a --num-workers=3", {"workers": 3}),
        ("a --keep-all", {"keep_all": True}),
        ("--keep_all a", {"keep_all": True, "files": ("a",)}),
        ("--keep_all y", {"keep_all": True, "files": ("y",)}),
        ("--keep_all False a", {"keep_all": False, "files": ("a",)}),
        ("--keep_all=no a", {"keep_all": False}),
        ("a -t", {"train": True}),
        ("a -t y", {"train": True, "files": ("a",)}),
        ("a -t 0", {"train": False}),
        ("a --no-crop", {"crop": False}),
        ("a --crop False", {"crop": False}),
        ("a --sizes 3,4,3", {"sizes": (3, 4, 3)}),
        ("a --span -1 2", {"span": (-1, 2)}),
        ("a -b x y -t b", {"base": ("x", "y"), "files": ("a", "b")}),
        ("a --more x y --more z", {"more": ("x", "y", "z")}),
        ("a -b x --base y", {"base": ("y",)}),
    ],
)
def test_forms(words, expected):
    found = options(words)
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("", ["FILE", "missing"]),
        ("a --rate nan", ["--rate", "'nan'"]),
        ("a --rate inf", ["--rate", "'inf'"]),
        ("a --rate -1", ["--rate", "-1", "at least 0"]),
        ("a --seed -1", ["--seed", "-1", "[0, 4294967295]"]),
        ("a --num_workers 1.5", ["--workers", "'1.5'"]),
        ("a --sizes 1,x", ["--sizes", "'x'"]),
        ("a --mode fasst", ["--mode", "'fasst'", "fast, slow", "did you mean fast?"]),
        ("a --crop=maybe", ["--crop", "maybe", "True"]),
        ("a --sede 3", ["--sede", "--seed"]),
        ("a --span 1", ["--span", "2"]),
        ("a --train=2", ["--train", "'2'"]),
        ("a --seed", ["--seed"]),
        ("a --keep_all -t", ["--keep_all", "train"]),
        ("a --rate x --mode y --seed z", ["--rate", "--mode", "--seed", "3 problems"]),
    ],
)
def test_mistakes_are_one_line_and_status_2(capsys, words, parts):
    said = complaint(capsys, Options, words.split())
    assert all(part in said for part in parts), said


def test_help_shows_what_the_fields_say(capsys):
    with pytest.raises(SystemExit) as stop:
        options("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and said.startswith("usage: thing.py FILE ... [options]")
    for part in (
        "Do a thing.",
        "5% of images (required)",
        "-s, --seed N seed (default: 0)",
        "processes (default: 2; published: --num_workers)",
        "--sizes SIZES sizes (default: 1,2)",
        "crop (default: True; switch off: --no_crop)",
        "--mode fast|slow mode",
        "--span A B span",
    ):
        assert part in said
    assert said.endswith("example: thing.py a.png")


def test_a_mapping_is_checked_as_the_command_line_is():
    assert checked(Options, {"files": ["a"], "sizes": [3], "rate": 1}).sizes == (3,)
    wrong = {"files": ["a"], "rate": -1, "sede": 3, "workers": "3", "crop": 1, "mode": "fats"}
    with pytest.raises(Problems) as error:
        checked(Options, wrong)
    assert error.value.found.keys() == wrong.keys() - {"files"}
    assert "did you mean seed?" in error.value.found["sede"]
    with pytest.raises(Problems) as error:
        checked(Options, {"files": ["a"], "keep_all": True, "train": True})
    assert error.value.found == {"keep_all": "does not go with train"}


@pytest.mark.parametrize(
    ("key", "settings", "start"),
    [
        ("keep_all", Options, "--keep_all: text"),
        ("model.rate", Options, "model.rate: text"),
        ("keep_all", None, "keep_all: text"),
        (None, Options, "text"),
    ],
)
def test_only_commands_show_a_key_as_an_option(capsys, key, settings, start):
    def main():
        raise UserError("text", key)

    with pytest.raises(SystemExit) as stop:
        run_command(main, settings)
    assert stop.value.code == 2
    assert capsys.readouterr().err.partition("error: ")[2] == f"{start}\n"


# --- Commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "--base C D -t k.a=1",
        "--base C D -t True k.a=1",
        "--base C D k.a=1 -t",
        "--base C D k.a=1 --train=yes",
        "-t --base C D k.a=1",
        "-t 1 --base C D k.a=1",
        "k.a=1 --base C D -t",
        "--train k.a=1 -b C D",
    ],
)
def test_an_override_may_follow_a_bare_flag(words):
    args = main_py.parse_arguments(words.split())
    assert (args.base, args.train, args.overrides) == (("C", "D"), True, ("k.a=1",))
    assert main_py.parse_arguments(["--scale_lr", "k.a=1"]).scale_lr
    assert not main_py.parse_arguments(["--scale_lr", "False", "k.a=1"]).scale_lr


def test_words_that_are_no_overrides_are_named(capsys):
    said = complaint(capsys, main_py.Options, ["--base", "C", "-t", "nonsense", "--no-test"])
    assert "nonsense" in said and "--no-test" in said


def test_help_is_light():
    code = "import sys, main; main.parse_arguments([]); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert "pydantic" in loaded and not {"torch", "omegaconf", "pandas", "numpy"} & set(loaded)
