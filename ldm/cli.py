"""What every command has in common: options from a dataclass, one-line errors, exit statuses.

A command is a dataclass. A field is an option: its annotation says the type and the range, `option`
says the default, the help, other names and the group in `--help`:

    @dataclass(frozen=True, kw_only=True)
    class TrainSettings:
        \"\"\"Train a network.\"\"\"  # if omitted, the docstring of the module says what is done

        program: ClassVar = "python -m examples.train"
        steps: Count = option(100, "optimiser steps", "-n")

    settings = parse(TrainSettings)

pydantic checks the values, so that YAML files and Python callers (`checked`) meet the same types
and ranges as the command line. argparse only splits the words. No library does both: jsonargparse
gives the fields of a dataclass neither short names nor published spellings, tyro no booleans with a
value (`--anneal_lr True`), pydantic-settings no lists of words (`--seeds 0 1 2`), and none reads
`-t KEY=VALUE` as a flag and an override.

Imports nothing heavy, so that `--help` answers at once.
"""

import argparse
import dataclasses
import difflib
import functools
import logging
import os
import re
import select
import sys
import textwrap
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from ldm.errors import NoRoom, Problems, Stopped, UserError
from ldm.files import FULL, ROOT

TRACEBACK_VARIABLE = "HISTO_TRACEBACK"
PROGRAM = "histodiffusion"
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on
# Set for a job of a table, which ends with this status where a disk is full: it has not failed.
JOB_VARIABLE, NO_ROOM = "HISTO_JOB", 74  # EX_IOERR
TRUE_WORDS, FALSE_WORDS = ("true", "yes", "y", "1", "t"), ("false", "no", "n", "0", "f")

# The commands in the order of use, with the scripts of a checkout that are their other names.
COMMANDS = {
    "demo": "scripts/demo.py",
    "tiles": "scripts/make_tiles.py",
    "index": "scripts/index_corpus.py",
    "shards": "scripts/write_shards.py",
    "subset": "scripts/make_subset.py",
    "fetch": "scripts/fetch_weights.py",
    "train": "main.py",
    "cache": "scripts/cache_latents.py",
    "classify": "classifier_train.py",
    "sweep": "scripts/guidance_sweep.py",
    "sample": "sample_diffusion.py",
    "copies": "scripts/copy_check.py",
    "features": "scripts/vis.py",
    "select": "scripts/distance.py",
    "evaluate": "eval.py",
    "baselines": "scripts/baselines.py",
    "fidelity": "scripts/fidelity.py",
    "table": "scripts/reproduce_table.py",
    "import": "scripts/import_checkpoint.py",
    "export": "scripts/export_diffusers.py",
}
OF_SCRIPTS = {script: f"{PROGRAM} {verb}" for verb, script in COMMANDS.items()}
SCRIPT = re.compile(rf"(?:python )?(?<![\w/.-])({'|'.join(map(re.escape, OF_SCRIPTS))})\b")

RANGE_ERRORS = ("greater_than_equal", "less_than_equal", "greater_than", "less_than")
REQUIRED, OPTIONS = "required", "options"  # titles in --help
BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}

# --- Types of options ----------------------------------------------------------------------------

MOST = 10**9  # more than any number of images, steps or bytes per image

Count = Annotated[int, Field(ge=1, le=MOST)]
Whole = Annotated[int, Field(ge=0, le=MOST)]
Workers = Annotated[int, Field(ge=0, le=1024)]
Threads = Annotated[int, Field(ge=1, le=1024)]
Pixels = Annotated[int, Field(ge=8, le=2**14)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
NotNegative = Annotated[float, Field(ge=0, le=MOST, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=MOST, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0, le=10)]  # learning rates
Share = Annotated[float, Field(ge=0, le=1)]


class Metavar(str):
    """What stands for a value in `--help`, beside the type of an option."""


Dir = Annotated[str, Metavar("DIR")]
File = Annotated[str, Metavar("FILE")]
Ckpt = Annotated[str, Metavar("CKPT")]  # a checkpoint, or the folder of a run


def _split(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    return tuple(value) if isinstance(value, list) else value


Commas = BeforeValidator(_split)  # Annotated[tuple[int, ...], Commas] reads 32,16


# --- Declaring -----------------------------------------------------------------------------------


def option(
    default: Any,
    help: str,
    *names: str,
    group: str = OPTIONS,
    metavar: str | tuple[str, ...] | None = None,
    published: Sequence[str] = (),
    off: Sequence[str] = (),
    nargs: str | int | None = None,
    positional: bool = False,
    repeats: bool = False,
    takes_value: bool = False,
) -> Any:
    """A field of a settings class that is an option of the command line.

    Args:
        default: A function gives it where the option is read; `...` makes the option required.
        names: Short names, such as `-n`; the long one is that of the field.
        published: Further names, of the published scripts or of earlier versions.
        off: Names that set a boolean to False.
        nargs: As argparse takes it. By default one word, or one and more for a tuple.
        positional: Words without an option; of the form section.key=value for `overrides`.
        repeats: Values of a repeated option are added to the earlier ones.
        takes_value: Any boolean word after a boolean option is its value (`--anneal_lr 1`), as in
            published scripts. Otherwise only True and False are, and other words may follow.
    """
    facts = {"option": {name: value for name, value in locals().items() if name != "default"}}
    if default is ...:
        return dataclasses.field(metadata=facts)
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=facts)
    return dataclasses.field(default=default, metadata=facts)


def like(settings: type, name: str, default: Any = ..., **changes: Any) -> Any:
    """The option `name` of another settings class, with another default, help or names."""
    original = next(field for field in dataclasses.fields(settings) if field.name == name)
    facts = {**original.metadata["option"], **changes}
    return option(default, facts.pop("help"), *facts.pop("names"), **facts)


def options_of(settings: type) -> dict[str, dataclasses.Field]:
    """The options of a settings class: its own before those of the classes that it extends."""
    fields = {field.name: field for field in dataclasses.fields(settings)}
    order = [name for cls in settings.__mro__ for name in cls.__dict__.get("__annotations__", {})]
    return {name: fields[name] for name in dict.fromkeys(order) if name in fields}


# --- Checking ------------------------------------------------------------------------------------


def checked(settings: type, values: Mapping[str, Any]) -> Any:
    """The settings object of a mapping, such as a section of a YAML file.

    `Problems` has every unknown name (with the nearest valid one), missing or wrong value, and what
    the method `problems` of the class finds in values that are right one by one.
    """
    known = options_of(settings)
    found = {
        str(name): f"unknown name{nearest(name, known)}" for name in values if name not in known
    }
    values = {name: value for name, value in values.items() if name in known}
    try:
        result = _adapter(settings).validate_python(values)
        if not found:
            for name, text in getattr(result, "problems", tuple)():
                found.setdefault(name, text)
    except ValidationError as error:
        hints = typing.get_type_hints(settings, include_extras=True)
        for one in error.errors(include_url=False):
            name = str(one["loc"][0])
            found.setdefault(name, reason(one, hints[name]))
    if found:
        raise Problems(found)
    return result


def contradictions(settings: Any, *names: str) -> Iterator[tuple[str, str]]:
    """Options of which only one may be given, for the method `problems` of a settings class."""
    values = {name: getattr(settings, name) for name in names}
    given = [name for name, value in values.items() if value is not None and value is not False]
    for name in given[1:]:
        yield name, f"not allowed with --{given[0]}; give one of them"


@functools.cache
def _adapter(settings: type) -> TypeAdapter:
    return TypeAdapter(settings)


def reason(error: Mapping[str, Any], annotation: Any = None) -> str:
    """What pydantic found wrong with a value, in one sentence with value and what is allowed."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "missing":
        return "is missing; give it"
    if kind == "value_error":
        return str(context["error"])
    if kind in ("int_parsing", "int_type", "int_from_float"):
        return f"{shown(value)} is not a whole number"
    if kind == "int_parsing_size":
        return f"{shown(value)} is too large"
    if kind in ("float_parsing", "float_type"):
        return f"{shown(value)} is not a number"
    if kind in ("bool_parsing", "bool_type"):
        return f"{shown(value)} is neither True nor False"
    if kind == "literal_error":
        choices = _literals(annotation)
        return f"{shown(value)} must be one of {', '.join(choices)}{nearest(value, choices, '')}"
    if kind in RANGE_ERRORS:
        return f"{_shortened(str(value))} must be {bounds_in_words(annotation, context) or context}"
    return f"{shown(value)} {error['msg'].replace('Input should', 'must', 1)}"


def _parts(annotation: Any) -> Iterator[Any]:
    """An annotation and what stands within it, from the outside to the inside."""
    yield annotation
    for part in typing.get_args(annotation):
        yield from _parts(part)


def _literals(annotation: Any) -> list[str]:
    literals = (part for part in _parts(annotation) if typing.get_origin(part) is typing.Literal)
    return [str(choice) for literal in literals for choice in typing.get_args(literal)]


def bounds_in_words(annotation: Any, violated: Mapping[str, Any]) -> str:
    """`in [1, 8]`, or `at least 1`, of a type; the limit `MOST` only where it is `violated`."""
    bounds: dict[str, Any] = {}  # by pydantic's names: gt, ge, lt, le
    for part in _parts(annotation):
        for bound in getattr(part, "metadata", ()):
            bounds |= {key: getattr(bound, key) for key in BOUNDS if hasattr(bound, key)}
    if bounds.get("le") == MOST:
        bounds = {key: value for key, value in bounds.items() if key in violated}
    if len(bounds) < 2:
        return " and ".join(f"{BOUNDS[key]} {value}" for key, value in bounds.items())
    low = f"[{bounds['ge']}" if "ge" in bounds else f"({bounds.get('gt', '-inf')}"
    return f"in {low}, " + (f"{bounds['le']}]" if "le" in bounds else f"{bounds['lt']})")


def nearest(name: Any, known: Iterable[str], otherwise: str | None = None) -> str:
    """` (did you mean X?)`, or else `otherwise`, by default what is allowed."""
    known = sorted(known)
    matches = difflib.get_close_matches(str(name), known, n=1)
    if matches:
        return f" (did you mean {matches[0]}?)"
    if otherwise is not None:
        return otherwise
    return f" (allowed: {', '.join(known)})" if known else " (there are none)"


def shown(value: Any) -> str:
    """A value as an error shows it: at most 60 characters."""
    return _shortened(repr(value))


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def join_keys(path: str, key: Any) -> str:
    """The dotted path of a key below another."""
    return f"{path}.{key}" if path else str(key)


# --- Command line --------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Splits the command line into words by option; `parse` checks them."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows what follows an option once, not after each of its names."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, action.dest.upper())
        return f"{', '.join(action.option_strings)} {value}".rstrip()


def parse(settings: type, argv: Sequence[str] | None = None) -> Any:
    """The settings that a command line means; all of a user's mistakes are one `Problems`."""
    parser = make_parser(settings)
    words = sys.argv[1:] if argv is None else argv
    fields = options_of(settings)
    found: dict[str, str] = {}
    words = _replaced(words, getattr(settings, "replaced", {}), found)
    given, rest = parser.parse_known_intermixed_args(_spelled(words, parser, fields))
    values = vars(given)
    if "overrides" in fields:
        _move_overrides(values)
        for word in values["overrides"]:
            if "=" not in word:
                found[f"unknown argument {word}; overrides have the form section.key=value"] = ""
    for before, word in zip(["", *rest], rest, strict=False):
        if before.startswith("-") and not word.startswith("-"):
            continue  # the value of an unknown option
        known = [f"--{name}" for name in fields]
        found[f"unknown argument {word}{nearest(word, known, '')}"] = ""
    flags = {name: _flag(field) for name, field in fields.items()}
    try:
        result = checked(settings, values)
    except Problems as problems:
        found |= {flags[name]: _as_typed(text, fields) for name, text in problems.found.items()}
    if found:
        raise Problems(found)
    return result


def description(settings: type) -> str:
    """What a command does: the docstring of its options, or else of their module."""
    doc = settings.__doc__ or ""
    if doc.startswith(f"{settings.__name__}("):  # what dataclass writes: the module says more
        doc = sys.modules[settings.__module__].__doc__ or ""
    return doc


def typed(settings: type | None) -> str:
    """The start of the command line as the user typed it: `python scripts/vis.py`.

    What was started as a module or an installed command is called by its `program`, or else as
    the command of its module.
    """
    if _is_script():
        return f"python {sys.argv[0]}"
    verb = settings.__module__.rpartition(".")[2].rstrip("_") if settings else ""
    return getattr(settings, "program", f"{PROGRAM} {verb}".rstrip())


def _is_script() -> bool:
    of_module = getattr(sys.modules["__main__"], "__spec__", None) is not None
    return sys.argv[0].endswith(".py") and not of_module


@functools.cache
def make_parser(settings: type) -> _Parser:
    """The parser of a command, which splits words and prints `--help`."""
    program, fields = typed(settings), options_of(settings)
    first, _, more = _as_typed(description(settings), {}).partition("\n\n")
    example = f"example:\n  {program} {settings.example}" if hasattr(settings, "example") else ""
    parser = _Parser(
        prog=program,
        usage=_usage(program, fields),
        description=" ".join(first.split()),
        epilog="\n\n".join(filter(None, [textwrap.dedent(more).strip(), example])),
        add_help=False,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    groups = {title: parser.add_argument_group(title) for title in (REQUIRED, OPTIONS)}
    groups[OPTIONS].add_argument("-h", "--help", action="help", help="show this text and exit")
    for name, field in fields.items():
        group = REQUIRED if _is_required(field) else field.metadata["option"]["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        _add_option(groups[group], name, field, fields)
    return parser


def _add_option(
    group: Any, name: str, field: dataclasses.Field, fields: Mapping[str, dataclasses.Field]
) -> None:
    help = _as_typed(_help(field), fields)
    facts = field.metadata["option"]
    metavar, nargs = _metavar(field), facts["nargs"]
    if metavar is None:
        parts = list(_parts(field.type))
        several = any(typing.get_origin(part) is tuple for part in parts)
        number = "" if several else "N" if int in parts else "X" if float in parts else ""
        metavar = "|".join(_literals(field.type)) or number or name.upper()
    if _is_bool(field):
        metavar = "" if field.default is False else "True|False"
    elif nargs is None and _is_tuple(field):
        nargs = "+"
    if facts["positional"]:
        nargs = nargs if nargs != "+" else "*"  # a missing word is a problem like any other
        group.add_argument(name, nargs=nargs or "?", metavar=metavar, help=help)
        return
    common = {"dest": name, "nargs": nargs, "action": "extend" if facts["repeats"] else "store"}
    group.add_argument(*facts["names"], f"--{name}", metavar=metavar, help=help, **common)
    if facts["published"]:
        group.add_argument(*facts["published"], help=argparse.SUPPRESS, **common)
    for word in facts["off"]:
        group.add_argument(
            word, dest=name, action="store_const", const="False", help=argparse.SUPPRESS
        )


def _help(field: dataclasses.Field) -> str:
    facts = field.metadata["option"]
    notes = []
    default = field.default
    if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if default is not False and default not in (None, (), (None,), dataclasses.MISSING):
        between = "," if Commas in getattr(field.type, "__metadata__", ()) else " "
        values = default if isinstance(default, tuple) else (default,)
        words = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
        notes.append(f"default: {between.join(words)}")
    if facts["off"]:
        notes.append(f"switch off: {' '.join(facts['off'])}")
    if facts["published"]:
        notes.append(f"published: {' '.join(facts['published'])}")
    text = facts["help"] + (f" ({'; '.join(notes)})" if notes else "")
    return text.replace("%", "%%")


def _usage(program: str, fields: Mapping[str, dataclasses.Field]) -> str:
    """The options that must be given; `--help` lists the others."""
    words = []
    for name, field in fields.items():
        facts = field.metadata["option"]
        needed = _is_required(field)
        if not (needed or facts["positional"]):
            continue
        word = f"{_metavar(field) or name.upper()}{' ...' if _is_tuple(field) else ''}"
        if not facts["positional"]:
            word = f"{_flag(field)} {word}"
        words.append(word if needed else f"[{word}]")
    return " ".join([program, *words, "[options]"]).replace("%", "%%")


def _replaced(
    words: Sequence[str], replaced: Mapping[str, str], found: dict[str, str]
) -> list[str]:
    """The words, with published options that are none here turned into overrides or `found`."""
    result: list[str] = []
    words = [str(word) for word in words]
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        if name not in replaced:
            result.append(word)
            continue
        if not equals and words and not words[0].startswith("-") and "=" not in words[0]:
            value = words.pop(0)
        if " " in replaced[name]:
            if value.lower() == "false":  # the published default of such a switch
                continue
            found[name] = f"is no option here; {replaced[name]}"
        else:
            result.append(f"{replaced[name]}={value or 'true'}")
    return result


def _spelled(
    words: Sequence[str], parser: _Parser, fields: Mapping[str, dataclasses.Field]
) -> list[str]:
    """The words with underscores in names of options, and with a value after each boolean.

    A bare `-t` gets the value True here: argparse would take the next word, which may be an
    override or a file.
    """
    known = parser._option_string_actions
    free_words = any(
        field.metadata["option"]["positional"] and name != "overrides"
        for name, field in fields.items()
    )
    result: list[str] = []
    words = [str(word) for word in words]
    for i, word in enumerate(words):
        if word == "--":
            return result + words[i:]
        if not word.startswith("-") or result[-1:] == ["--"]:
            result.append(word)
            continue
        name, equals, value = word.partition("=")
        if name not in known and name.startswith("--"):
            spelled = f"--{name[2:].replace('-', '_')}"
            name = spelled if spelled in known else name
        result.append(f"{name}{equals}{value}")
        action = known.get(name)
        field = fields.get(action.dest) if action else None
        if field is None or equals or not _is_bool(field) or action.nargs == 0:
            continue
        following = words[i + 1] if i + 1 < len(words) else "--"
        if not _is_value(following, field.metadata["option"]["takes_value"], free_words):
            result[-1] = f"{name}=True"
    return result


def _is_value(word: str, takes_value: bool, free_words: bool) -> bool:
    """Whether a word after a boolean option is its value; `free_words` need no option."""
    if word.strip().lower() in ("true", "false"):
        return True
    if not takes_value:
        return False
    if free_words:
        return word.strip().lower() in (*TRUE_WORDS, *FALSE_WORDS)
    return not word.startswith("-") and "=" not in word  # if it is no boolean word, that is said


def _move_overrides(values: dict[str, Any]) -> None:
    """Take `section.key=value` out of lists of words (`--base a.yaml section.key=value`)."""
    overrides: list[str] = []
    own = values.pop("overrides", None) or []
    for name, value in values.items():
        if isinstance(value, list):
            overrides += [word for word in value if _is_override(word)]
            values[name] = [word for word in value if not _is_override(word)]
    values["overrides"] = overrides + own


def _is_override(word: str) -> bool:
    return "=" in word and not Path(word).expanduser().exists()


def _flag(field: dataclasses.Field) -> str:
    if field.metadata["option"]["positional"]:
        return _metavar(field) or field.name.upper()
    return f"--{field.name}"


def _metavar(field: dataclasses.Field) -> str | tuple[str, ...] | None:
    of_type = (part for part in _parts(field.type) if isinstance(part, Metavar))
    return field.metadata["option"]["metavar"] or next(of_type, None)


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory  # both are missing


def _is_bool(field: dataclasses.Field) -> bool:
    return bool in _parts(field.type)


def _is_tuple(field: dataclasses.Field) -> bool:
    """Whether the option takes several words: a tuple that is not read from one, as `Commas` do."""
    parts = list(_parts(field.type))
    if any(isinstance(part, BeforeValidator) for part in parts):
        return False
    return any(typing.get_origin(part) is tuple for part in parts)


# --- Running -------------------------------------------------------------------------------------


def existing_path(text: str | os.PathLike, what: str, kind: str = "any") -> Path:
    """The path, if it is there and a file, a folder ("dir") or either ("any").

    A path configs/... that is not in the working folder is that of this package. Of a folder of
    tiles ("tiles") it may be that of a file of arrays, or lead into one. An error calls it
    `what`.
    """
    path = Path(text).expanduser()
    if path.parts[:1] == ("configs",) and not path.exists() and (ROOT / path).exists():
        path = ROOT / path
    if not (path.exists() or (kind == "tiles" and path.parent.is_file())):
        raise UserError(f"{path} does not exist; check the path", what)
    if kind == "file" and not path.is_file():
        raise UserError(f"{path} is a folder; give a file", what)
    if kind == "dir" and not path.is_dir():
        raise UserError(f"{path} is a file; give a folder", what)
    return path


def output_path(text: str | os.PathLike, what: str, kind: str) -> Path:
    """The path of a file ("file") or folder ("dir") to write; the other must not be there."""
    path = Path(text).expanduser()
    return existing_path(path, what, kind) if path.exists() else path


def _one_line(error: BaseException | str) -> str:
    """The message on one line, freed of the worker traceback that a DataLoader puts before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if lines[0].startswith("Caught ") and "DataLoader worker" in lines[0]:
        return lines[-1].split("UserError: ", 1)[-1]
    return " ".join(lines)


def _messages(error: BaseException, settings: type | None) -> list[str]:
    """What is said of an error: a line for each mistake, with settings called as their options.

    A setting is the key of the error, or stands in backquotes: `out` in a text becomes --out.
    """
    if isinstance(error, OSError) and error.strerror:
        return [f"{error.strerror}: {error.filename}" if error.filename else error.strerror]
    fields = options_of(settings) if settings else {}
    key = getattr(error, "key", None)
    start = f"{_flag(fields[key]) if key in fields else key}: " if key else ""
    texts = [error.reason if key else str(error)]
    if isinstance(error, Problems) and len(error.found) > 1:
        texts = error.lines
    return [_as_typed(start + _one_line(text), fields) for text in texts]


def _as_typed(text: str, fields: Mapping[str, dataclasses.Field]) -> str:
    """A text with settings in backquotes as options, and scripts as what was typed."""
    names = {name: _flag(field) for name, field in fields.items()}
    text = re.sub(r"`(\w+)`", lambda found: names.get(found[1], found[0]), text)
    return text if _is_script() else SCRIPT.sub(lambda found: OF_SCRIPTS[found[1]], text)


class _Formatter(logging.Formatter):
    def __init__(self, settings: type | None):
        super().__init__("%(message)s")
        self.fields = options_of(settings) if settings else {}

    def format(self, record: logging.LogRecord) -> str:
        return _as_typed(super().format(record), self.fields)


def _nobody_reads() -> bool:
    """Whether the reader of the output has left, as `head` does; what is left of it is dropped."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False  # a pipe of another process broke
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def run_command(main: Callable[[], int | None], settings: type | None = None) -> NoReturn:
    """Run an entry point: a user's mistake or a file-system error is one line and exit status 2.

    Several mistakes are a line each. Set HISTO_TRACEBACK=1 to see where an error came from.

    Args:
        settings: Class of the command's options, by whose names errors call settings.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter(settings))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        status = main() or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except Stopped as stop:
        print(stop, file=sys.stderr)
        status = STOPPED
    except (UserError, OSError) as error:
        if os.environ.get(TRACEBACK_VARIABLE) == "1":
            raise
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            sys.exit(128 + 13)  # as SIGPIPE ends a command
        program = re.sub(r"^python (-m )?(.*/)?", "", typed(settings))
        with suppress(OSError):  # standard error may be a file on a full disk
            for message in _messages(error, settings):
                print(f"{program}: error: {message}", file=sys.stderr)
        full = isinstance(error, NoRoom) or getattr(error, "errno", None) in FULL
        status = NO_ROOM if full and JOB_VARIABLE in os.environ else 2
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python would try again at its end, and change the status
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)
