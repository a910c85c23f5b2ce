"""ldm.cli: options of a dataclass on the command line, in mappings and in errors."""

import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import BeforeValidator

import main as main_py
from ldm import cli
from ldm.cli import (
    OPTIONS,
    Commas,
    Count,
    NotNegative,
    Seed,
    checked,
    like,
    option,
    options_of,
    parse,
    run_command,
)
from ldm.commands import load
from ldm.errors import Problems, UserError
from ldm.features.source import KINDS

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Shared:
    seed: Seed = option(23, "seed", "-s", group="run")
    workers: Count = option(2, "processes", published=("--num_workers",))


@dataclass(frozen=True, kw_only=True)
class Options(Shared):
    """Do a thing."""

    program: ClassVar = "thing.py"
    example: ClassVar = "a.png"

    files: tuple[str, ...] = option(..., "5% of images", positional=True, metavar="FILE")
    base: tuple[str, ...] = option((), "files", "-b", metavar="YAML")
    train: bool = option(False, "train", "-t", takes_value=True)
    keep_all: bool = option(False, "keep")
    crop: bool = option(True, "crop", off=("--no_crop",))
    mode: Literal["fast", "slow"] | None = option(None, "mode")
    sizes: Annotated[tuple[Count, ...], Commas] = option((1, 2), "sizes")
    span: tuple[int, int] | None = option(None, "span", nargs=2, metavar=("A", "B"))
    rate: NotNegative = option(0.5, "rate")
    more: tuple[str, ...] = option((), "more", repeats=True)
    seed: Seed = like(Shared, "seed", default=0)

    def problems(self):
        if self.keep_all and self.train:
            yield "keep_all", "does not go with train"


def options(words: str) -> Options:
    return parse(Options, words.split())


def complaints(capsys, settings: type, words: list[str]) -> list[str]:
    """What a command says against its words, a line for each mistake."""
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: parse(settings, words), settings)
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert stop.value.code == 2 and said.out == "" and all(": error: " in line for line in lines)
    return lines


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
    ],
)
def test_mistakes_are_one_line_and_status_2(capsys, words, parts):
    (said,) = complaints(capsys, Options, words.split())
    assert all(part in said for part in parts), said


def test_each_mistake_is_a_line(capsys):
    lines = complaints(
        capsys, Options, ["a", "--rate", "x", "--mode", "y", "--seed", "z", "--sede", "3"]
    )
    said = [line.split(": ")[2] for line in lines]
    unknown = "unknown argument --sede (did you mean --seed?)"
    assert sorted(said) == ["--mode", "--rate", "--seed", unknown]


def test_help_shows_what_the_fields_say(capsys):
    with pytest.raises(SystemExit) as stop:
        options("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and said.startswith("usage: thing.py FILE ... [options]")
    for part in (
        "Do a thing.",
        "required: FILE 5% of images",
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
    wrong = {"files": ["a"], "rate": -1, "sede": 3, "workers": "three", "crop": 3, "mode": "fats"}
    with pytest.raises(Problems) as error:
        checked(Options, wrong)
    assert error.value.found.keys() == wrong.keys() - {"files"}
    assert "did you mean seed?" in error.value.found["sede"]
    with pytest.raises(Problems) as error:
        checked(Options, {"files": ["a"], "keep_all": True, "train": True})
    assert error.value.found == {"keep_all": "does not go with train"}


@pytest.mark.parametrize(
    ("key", "settings", "said"),
    [
        ("keep_all", Options, "--keep_all: leave --rate or `rates` out"),
        ("model.rate", Options, "model.rate: leave --rate or `rates` out"),
        ("keep_all", None, "keep_all: leave `rate` or `rates` out"),
        (None, Options, "leave --rate or `rates` out"),
    ],
)
def test_only_commands_show_settings_as_options(capsys, key, settings, said):
    def main():
        raise UserError("leave `rate` or `rates` out", key)

    with pytest.raises(SystemExit) as stop:
        run_command(main, settings)
    assert stop.value.code == 2
    assert capsys.readouterr().err.partition("error: ")[2] == f"{said}\n"


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
    args = parse(main_py.Options, words.split())
    assert (args.base, args.train, args.overrides) == (("C", "D"), True, ("k.a=1",))
    assert parse(main_py.Options, ["--scale_lr", "k.a=1"]).scale_lr
    assert not parse(main_py.Options, ["--scale_lr", "False", "k.a=1"]).scale_lr


def test_words_that_are_no_overrides_are_named(capsys):
    said = complaints(capsys, main_py.Options, ["--base", "C", "-t", "nonsense", "--no-such"])
    assert len(said) == 2 and "--no-such" in said[0] and "nonsense" in said[1]


def test_published_options_of_the_trainer_are_overrides():
    words = "--accumulate_grad_batches 2 -b C --benchmark -t --val-check-interval=0.5 k=1"
    prefix = "lightning.trainer."
    expected = ["accumulate_grad_batches=2", "benchmark=true", "val_check_interval=0.5"]
    found = parse(main_py.Options, words.split())
    assert found.train and found.base == ("C",)
    assert set(found.overrides) == {*(prefix + each for each in expected), "k=1"}


def test_a_published_switch_may_have_its_default():
    words = ["--data_dir", "D", "--classifier_use_fp16", "False", "--lr", "0.5"]
    assert parse(importlib.import_module("classifier_train").Options, words).lr == 0.5


@pytest.mark.parametrize(
    ("command", "words", "instead"),
    [
        ("main", "--no-test", "leave it out"),
        ("main", "-d", "--dry_run"),
        ("main", "-f x", "--name"),
        ("main", "-p x", "--logdir"),
        ("main", "--accelerator gpu", "--gpus"),
        ("classifier_train", "--data_dir D --classifier_use_fp16 True", "--precision 16-mixed"),
    ],
)
def test_published_options_without_meaning_say_what_to_give(command, words, instead, capsys):
    (said,) = complaints(capsys, importlib.import_module(command).Options, words.split())
    assert instead in said


COMMANDS = {
    "main": "",
    "benchmarks.encode": "",
    "benchmarks.gpu": "",
    "benchmarks.loading": "",
    "benchmarks.sample": "",
    "benchmarks.train": "",
    "classifier_train": "--data_dir D",
    "sample_diffusion": "-r M",
    "eval": "--data_path D --output_dir S",
    "scripts.baselines": "--data_path D --output_dir S",
    "scripts.cache_latents": "-r M --data D --out O",
    "scripts.copy_check": "--synthetic S --train T --holdout H --out O",
    "scripts.demo": "",
    "scripts.distance": "--real R --synthetic S --features F --out O",
    "scripts.export_diffusers": "--checkpoint M --out O",
    "scripts.fetch_weights": "",
    "scripts.fidelity": "--real R --fake F --out O",
    "scripts.guidance_sweep": "-r M --judge J --real R --out O",
    "scripts.import_checkpoint": "F --kind autoencoder --config C --out O",
    "scripts.index_corpus": "R --out O",
    "scripts.make_subset": "--data D --out O --per_class 2",
    "scripts.make_tiles": "--out O",
    "scripts.reproduce_table": "--config C",
    "scripts.vis": "--real R --synthetic S --out O --weights W",
    "scripts.write_shards": "I --out O",
}


def published_forms() -> list[tuple[str, str]]:
    """Command and form, for example `--num_workers 3`."""
    text = (ROOT / "tests" / "published_options.txt").read_text().partition("\n\n")[2]
    found = []
    for part in text.split("["):
        command, _, forms = part.partition("]")
        found += [(command, " ".join(form.split())) for form in forms.split("|") if form.strip()]
    return found


@pytest.fixture
def options_of_command(monkeypatch):
    """The settings class of a command, with values judged one by one only."""

    def find(command: str) -> type:
        settings = importlib.import_module(command).Options
        monkeypatch.setattr(settings, "problems", lambda self: (), raising=False)
        return settings

    return find


@pytest.mark.parametrize("command", COMMANDS)
def test_every_published_form_of_an_option_still_works(options_of_command, command):
    settings, needed = options_of_command(command), COMMANDS[command].split()
    forms = [form for name, form in published_forms() if name == command]
    assert forms
    for form in forms:
        words = needed.copy()
        name = form.split()[0]
        if name in words:  # is given by the form instead
            del words[words.index(name) : words.index(name) + 2]
        changed = parse(settings, [*words, *form.split()]) != parse(settings, needed)
        assert changed or re.search(r"(True|no|auto|--model-ema)$", form), f"{form} does nothing"


@pytest.mark.parametrize(
    ("command", "words", "published"),
    [
        ("scripts.vis", "--features RUN", "--weights RUN"),
        ("scripts.vis", "--features timm:NET", "--model NET"),
        ("scripts.copy_check", "--features RUN", "--weights RUN"),
        ("scripts.copy_check", "--features timm:NET --input_size 8", "--model NET --input_size 8"),
        ("scripts.fidelity", "--features RUN", "--weights RUN"),
        ("scripts.fidelity", "--features dinov2 --weights F", "--extractor dinov2 --weights F"),
        ("scripts.fidelity", "--features timm:NET", "--extractor timm:NET"),
        (
            "scripts.baselines",
            "--kind linear_probe --features timm:N",
            "--kind linear_probe --arch N",
        ),
        (
            "scripts.baselines",
            "--kind linear_probe --features R",
            "--kind linear_probe --weights R",
        ),
    ],
)
def test_features_names_the_network_in_every_command(command, words, published):
    needed = COMMANDS[command].replace("--weights W", "").split()
    module = importlib.import_module(command)
    found = parse(module.Options, [*needed, *words.split()])
    assert found.network == parse(module.Options, [*needed, *published.split()]).network
    assert found.network
    with pytest.raises(UserError, match="not allowed with"):
        parse(module.Options, [*needed, *words.split(), *published.split()])


PUBLISHED = {"vis.py": "features", "selective_filtering.py": "select"}


@pytest.mark.parametrize(
    ("script", "verb"),
    [*((script, verb) for verb, script in cli.COMMANDS.items()), *PUBLISHED.items()],
)
def test_scripts_are_further_names_of_commands(script, verb):
    # By its file: other tests import scripts/vis.py under the same name.
    spec = importlib.util.spec_from_file_location("one_script", ROOT / script)
    here = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(here)
    assert (here.main, here.Options) == (load(verb).main, load(verb).Options)
    assert cli.typed(here.Options) == f"histodiffusion {verb}"


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("words", "said", "usage", "also"),
    [
        (["scripts/vis.py"], "vis.py", "python scripts/vis.py", "what sample_diffusion.py wrote"),
        (
            ["-m", "ldm.commands", "features"],
            "histodiffusion features",
            "histodiffusion features",
            "what histodiffusion sample wrote",
        ),
    ],
)
def test_a_command_is_called_as_it_was_typed(words, said, usage, also):
    done = run(*words, "--no_such")
    assert done.returncode == 2 and done.stderr.startswith(f"{said}: error: ")
    text = run(*words, "--help").stdout
    assert text.startswith(f"usage: {usage} --real") and f"\n  {usage} --real D/train5" in text
    assert also in " ".join(text.split())


def test_the_overview_lists_commands_in_the_order_of_use():
    lines = run("-m", "ldm.commands", "--help").stdout.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(cli.COMMANDS)
    unknown = run("-m", "ldm.commands", "sampel")
    assert unknown.returncode == 2 and "did you mean sample?" in unknown.stderr


def test_completion_knows_commands_options_and_choices(tmp_path):
    script = run("-m", "ldm.commands", "--print-completion", "bash").stdout
    ask = 'COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _shtab_histodiffusion; echo "${COMPREPLY[@]}"'
    for words, found in (
        ("sam", "sample"),
        ("sample --cl", "--classifier"),
        ("table --st", "--status"),
        ("sample --sampler d", "ddim"),
    ):
        text = f"{script}\nCOMP_WORDS=(histodiffusion {words}); {ask}"
        done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
        assert found in done.stdout.split(), done


@pytest.mark.parametrize("command", ["vis", "copy_check", "baselines", "fidelity"])
def test_help_lists_all_networks_that_make_features(command, capsys):
    with pytest.raises(SystemExit):
        parse(importlib.import_module(f"scripts.{command}").Options, ["--help"])
    assert set(KINDS) <= set(re.findall(r"\w+", capsys.readouterr().out))


# By type of the annotation: values that no option of this type takes.
BAD_VALUES = {
    int: ["x", "1.5", "nan", "-9", "9" * 30, "9" * 5000],
    float: ["x", "nan", "inf", "-9", "1e30"],
    bool: ["maybe", "2"],
    Literal: ["neither"],
}


def kinds_of(annotation) -> set:
    """The types in an annotation, however deep."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return {Literal}
    if isinstance(annotation, type) and not arguments:
        return {annotation} - {NoneType}
    return {kind for argument in arguments for kind in kinds_of(argument)}


def parts_of(annotation) -> list:
    """What `Annotated` adds, however deep, but for lists with commas."""
    found = [part for part in getattr(annotation, "__metadata__", ()) if part is not Commas]
    found += [bound for part in found for bound in getattr(part, "metadata", ())]
    return found + [p for inner in typing.get_args(annotation) for p in parts_of(inner)]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("scripts.write_shards", ["--size", "9" * 400]),
        ("scripts.write_shards", ["--size", "0"]),
        ("scripts.write_shards", ["--size", "many"]),
        ("sample_diffusion", ["--part", "9" * 400]),
        ("sample_diffusion", ["--part", "3/3"]),
        ("sample_diffusion", ["--classifier", "c", "--temperature", "0"]),
        ("scripts.guidance_sweep", ["--intervals", "all,9:1"]),
        ("scripts.guidance_sweep", ["--intervals", "9" * 400]),
    ],
)
def test_values_with_a_form_of_their_own(command, words):
    with pytest.raises(UserError) as error:
        parse(importlib.import_module(command).Options, [*COMMANDS[command].split(), *words])
    assert f"{words[-2]}: " in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_refuses_values_of_the_wrong_kind(command, capsys, tmp_path, monkeypatch):
    """By its name and the value, one line each, all of them at once, and before anything else."""
    monkeypatch.chdir(tmp_path)
    module, needed = importlib.import_module(command), COMMANDS[command].split()

    def lines_about(words: list[str]) -> list[str]:
        with pytest.raises(SystemExit) as stop:
            run_command(lambda: module.main([*needed, *words]), module.Options)
        assert stop.value.code == 2
        return capsys.readouterr().err.splitlines()

    together = []
    for name, field in options_of(module.Options).items():
        kinds, parts = kinds_of(field.type), parts_of(field.type)
        own_form = any(isinstance(part, BeforeValidator) for part in parts)
        if own_form or len(kinds) != 1 or not kinds <= BAD_VALUES.keys():
            continue
        several = field.metadata["option"]["nargs"] == 2
        above_0 = any(getattr(part, "ge", 0) > 0 or hasattr(part, "gt") for part in parts)
        for value in ["0"] * above_0 + BAD_VALUES[kinds.pop()]:
            words = [f"--{name}", value, value] if several else [f"--{name}={value}"]
            (said,) = lines_about(words)
            assert f"--{name}: " in said and value[:40] in said and len(said) < 300, said
        together += words
    names = sorted(word.partition("=")[0] for word in together if word.startswith("--"))
    lines = lines_about(together) if names else []
    assert sorted(line.split(": ")[2] for line in lines) == names
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command, capsys):
    """Says what each option does, and ends with an example that the command understands."""
    settings = importlib.import_module(command).Options
    with pytest.raises(SystemExit) as stop:
        parse(settings, ["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    ungrouped = 0
    for name, field in options_of(settings).items():
        facts = field.metadata["option"]
        assert facts["help"][0] != " " and len(facts["help"]) > 5
        assert (facts["metavar"] or name if facts["positional"] else f"--{name}") in said
        ungrouped += facts["group"] == OPTIONS and field.default is not field.default_factory
        if field.default is True:  # a default that reads as its opposite
            assert f"--{name} True|False" in said
            assert not re.match(r"no_|without_|skip_", name), name
            assert not re.match(r"no |do not|without|leave|skip", facts["help"]), name
    assert ungrouped <= 8, "give options groups"
    seed = options_of(settings).get("seed")
    assert (
        seed is None
        or seed.default in (None, 0)
        or re.search("published|trainings", seed.metadata["option"]["help"])
    )
    assert said.startswith(f"usage: {cli.typed(settings)} ")
    assert said.rstrip().endswith(f"{cli.typed(settings)} {settings.example.rstrip()}")
    parse(settings, shlex.split(settings.example.replace("\\\n", " ")))


def test_help_answers_at_once():
    """No command imports a library that takes long before its options are right."""
    heavy = {"torch", "omegaconf", "pandas", "numpy", "pyarrow", "PIL", "timm", "matplotlib"}
    code = f"""
import importlib, sys
from ldm.cli import parse
for name, words in {COMMANDS}.items():
    parse(importlib.import_module(name).Options, words.split())
    print(name, *{heavy} & sys.modules.keys())
"""
    assert run("-c", code).stdout.split() == list(COMMANDS)
