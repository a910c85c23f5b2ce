"""The settings of an experiment: configs/tables/*.yaml, checked completely before anything runs.

Imports nothing heavy: `--status` and `--dry-run` answer at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from ldm.cli import existing_path
from ldm.errors import UserError

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]*(?:[-+][A-Za-z0-9_.]+)*")  # of folders and jobs
RESERVED = ("train", "val", "test", "real")

Options = dict[str, Any]  # of an entry point: names without dashes


@dataclass
class Data:
    """Where the tiles are. `root` holds `val`, `test` and the two folders that are named here."""

    root: str = MISSING
    labelled: str = "train5"  # the few labels
    unlabelled: str = "train"  # what the generators saw
    groups: str | None = None  # CSV of patients or slides, for intervals (see eval.py)
    group_column: str = "group"
    tiles: Options | None = None  # make procedural ones in `root`: arguments of make_tiles.py


@dataclass
class Model:
    """A trained model: `run`, or what it is trained with.

    `needs` hands another model over: to a `config` as environment variable, to a `classifier` as
    option (`needs: {first_stage: pretrained}`).
    """

    run: str | None = None  # run folder or checkpoint, from elsewhere; never written to
    config: Any = None  # of main.py: a file or several, relative to the repository
    overrides: list[str] = field(default_factory=list)  # of `config`
    classifier: Options | None = None  # options of classifier_train.py, on the labelled tiles
    arguments: Options = field(default_factory=dict)  # of main.py, such as precision
    env: dict[str, str] = field(default_factory=dict)
    needs: dict[str, str] = field(default_factory=dict)
    checkpoint: str = "last"  # or best: which one of a model trained here is used
    label: str | None = None  # what its training does, for people
    gpus: int = 1


@dataclass
class Generator:
    """What makes a pool of synthetic tiles; the names are those of `models`."""

    diffusion: str = MISSING
    classifier: str | None = None  # that guides
    decoder: str | None = None  # fine-tuned; its own without
    label: str | None = None  # for people; the name if omitted
    amount: int | None = (
        None  # tiles per class, also where no arm uses them; else as many as needed
    )
    factors: Options = field(default_factory=dict)  # columns of the table
    sampling: Options = field(default_factory=dict)  # over those of the section `sampling`


@dataclass
class Sampling:
    per_wanted: float = 2.0  # tiles made for one that the largest ratio wants
    options: Options = field(default_factory=dict)  # of sample_diffusion.py
    gpus: int = 1


@dataclass
class Judge:
    """Whose features choose: the classifier of a seed on the labelled tiles, a run of eval.py, or a
    timm network."""

    seed: int | None = None
    network: str | None = None  # that classifier: one of `baselines.networks`, not the arms' own
    run: str | None = None
    model: str | None = None
    options: Options = field(default_factory=dict)  # of scripts/vis.py


@dataclass
class Strategy:
    """How synthetic tiles are chosen: options of scripts/distance.py."""

    strategy: str = MISSING
    redraw: bool = False  # another draw for every seed of the evaluation (random only)
    sheets: bool = True  # contact sheets
    options: Options = field(default_factory=dict)


@dataclass
class Cells:
    """Arms that are left out or added: names or lists of them; all where nothing is given."""

    generator: Any = None
    selection: Any = None
    ratio: Any = None


@dataclass
class Grid:
    """All combinations, less those of `without`, and those of `also`."""

    generators: list[str] = field(default_factory=list)
    selection: list[str] = field(default_factory=list)
    ratios: list[int] = field(default_factory=list)  # synthetic tiles, percent of the labelled
    without: list[Cells] = field(default_factory=list)
    also: list[Cells] = field(default_factory=list)


@dataclass
class Evaluation:
    seeds: list[int] = MISSING
    arguments: Options = field(default_factory=dict)  # of eval.py
    gpus: int = 1


@dataclass
class Network:
    """A further network on the labelled tiles alone: options of eval.py over those of the arms."""

    label: str | None = None
    arguments: Options = field(default_factory=dict)


@dataclass
class Ceiling:
    """Real tiles instead of synthetic ones, in the same amount."""

    ratios: list[int] = field(default_factory=list)
    options: Options = field(default_factory=dict)  # of scripts/make_subset.py


@dataclass
class Baselines:
    kinds: list[str] = field(default_factory=list)  # of scripts/baselines.py
    options: dict[str, Options] = field(default_factory=dict)  # by kind
    networks: dict[str, Network] = field(default_factory=dict)
    ceiling: Ceiling | None = None


@dataclass
class Fidelity:
    """Distances of the chosen synthetic tiles to real ones, arm by arm."""

    real: str = "val"  # a folder of `data`, or a path
    judge: bool = False  # in the features of the judge
    options: Options = field(default_factory=dict)  # of scripts/fidelity.py


@dataclass
class Copies:
    """Copies of training tiles, pool by pool."""

    holdout: str = "val"  # a folder of `data`, or a path
    judge: bool = False  # in the features of the judge, too
    options: Options = field(default_factory=dict)  # of scripts/copy_check.py


@dataclass
class Slurm:
    """What SLURM is asked for, with `--slurm`."""

    cluster: str = "slurm"  # or local: processes of this machine, to try it out
    partition: str | None = None
    hours: float = 24.0  # time limit of a job; one that needs longer is requeued and goes on
    cpus: int = 8
    memory_gb: float | None = None
    gpus: bool = True  # False on a cluster without any
    parallel: int = 16  # jobs in the queue at once
    parameters: Options = field(default_factory=dict)  # further ones, such as slurm_account


@dataclass
class Settings:
    """A complete file of configs/tables."""

    name: str = MISSING
    title: str = ""
    out: str = MISSING
    paper: str | None = None  # YAML with the numbers of the paper
    vars: Options = field(default_factory=dict)  # for interpolation only
    data: Data = field(default_factory=Data)
    models: dict[str, Model] = field(default_factory=dict)
    generators: dict[str, Generator] = field(default_factory=dict)
    sampling: Sampling = field(default_factory=Sampling)
    judge: Judge = field(default_factory=Judge)
    selection: dict[str, Strategy] = field(default_factory=dict)
    grid: Grid = field(default_factory=Grid)
    evaluation: Evaluation = field(default_factory=Evaluation)
    baselines: Baselines = field(default_factory=Baselines)
    fidelity: Fidelity | None = None
    copies: Copies | None = None
    link: str = "symbolic"  # how tiles come into training folders, see scripts/distance.py
    slurm: Slurm = field(default_factory=Slurm)


def read_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Read, merge and check the settings of an experiment.

    Args:
        overrides: `section.key=value`.

    Raises:
        UserError: No such file, or anything wrong in it, all problems in one line.
    """
    source = existing_path(path, "--config", "file")
    try:
        config = OmegaConf.load(source)
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f"--config {path}: no YAML: {_first_line(error)}") from None
    if not OmegaConf.is_dict(config):
        raise UserError(f"--config {path}: must be a mapping with sections, see configs/tables")
    for word in overrides:
        key, equals, _ = word.partition("=")
        if not equals or key.startswith("-"):
            raise UserError(f"{word}: overrides have the form section.key=value")
    try:
        config = OmegaConf.merge(config, OmegaConf.from_dotlist(list(overrides)))
        raw = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"--config {path}: {_explain(error)}") from None
    return check_settings(raw, f"--config {path}")


def check_settings(raw: Mapping[str, Any], source: str) -> Settings:
    """Settings from plain dictionaries.

    Args:
        source: Where they come from, for messages.

    Raises:
        UserError: Anything wrong, all problems in one line.
    """
    unknown = list(_unknown_keys(raw, Settings, ""))
    if unknown:
        raise UserError(f"{source}: {'; '.join(unknown)}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Settings), raw)
        settings = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or _first_line(error)
        raise UserError(f"{source}: {key} is missing; add it") from None
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        where = f"{key}: " if key else ""
        raise UserError(f"{source}: {where}{_first_line(error)}") from None
    assert isinstance(settings, Settings)
    problems = list(_problems(settings))
    if problems:
        raise UserError(f"{source}: {'; '.join(problems)}")
    return settings


def as_list(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


def _explain(error: OmegaConfBaseException) -> str:
    words = _first_line(error)
    found = re.search(r"Environment variable '(\w+)' not found", words)
    if found:
        key = getattr(error, "full_key", None)
        where = f" (read by {key})" if key else ""
        return f"variable {found[1]} is not set{where}; export {found[1]}=..."
    return words


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def nearest(name: str, known: Iterable[str]) -> str:
    """What an unknown name may have meant: `did you mean x?`, or the known ones."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"known are {', '.join(known)}" if known else "there is none"


def _unknown_keys(value: Any, kind: Any, path: str) -> Iterable[str]:
    """Keys that no setting has, with the nearest one that exists."""
    if type(None) in get_args(kind):  # Optional: its other half
        (kind,) = [one for one in get_args(kind) if one is not type(None)]
    arguments = get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        hints = get_type_hints(kind)
        for key, inner in value.items():
            where = f"{path}.{key}" if path else str(key)
            if key in hints:
                yield from _unknown_keys(inner, hints[key], where)
            else:
                yield f"unknown key {where}; {nearest(str(key), hints)}"
    elif get_origin(kind) is dict and isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _unknown_keys(inner, arguments[1], f"{path}.{key}")
    elif get_origin(kind) is list and isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _unknown_keys(inner, arguments[0], f"{path}[{index}]")


def _problems(settings: Settings) -> Iterable[str]:
    """What is wrong across sections."""
    yield from _bad_names(settings)
    for name, model in settings.models.items():
        where = f"models.{name}"
        given = [k for k in ("run", "config", "classifier") if getattr(model, k) is not None]
        if len(given) != 1:
            yield f"{where} must have one of run, config and classifier, not {given or 'none'}"
        elif given == ["run"]:
            for extra in ("overrides", "arguments", "env", "needs"):
                if getattr(model, extra):
                    yield f"{where}.{extra} belongs to a model that is trained here; remove it"
        elif given == ["classifier"] and (model.overrides or model.arguments):
            yield f"{where}: overrides and arguments belong to a config; use classifier"
        if model.checkpoint not in ("last", "best"):
            yield f"{where}.checkpoint {model.checkpoint} must be last or best"
        for key, other in model.needs.items():
            yield from _unknown(f"{where}.needs.{key}", other, settings.models)
    for name, generator in settings.generators.items():
        if generator.amount is not None and generator.amount < 1:
            yield f"generators.{name}.amount {generator.amount} must be at least 1"
        for part in ("diffusion", "classifier", "decoder"):
            other = getattr(generator, part)
            if other is not None:
                yield from _unknown(f"generators.{name}.{part}", other, settings.models)
    yield from _circles(settings.models)
    grid = settings.grid
    for key, names, known in (
        ("generators", grid.generators, settings.generators),
        ("selection", grid.selection, settings.selection),
    ):
        for name in names:
            yield from _unknown(f"grid.{key}", name, known)
    for section in ("without", "also"):
        for index, cells in enumerate(getattr(grid, section)):
            where = f"grid.{section}[{index}]"
            for key, known in (
                ("generator", settings.generators),
                ("selection", settings.selection),
            ):
                for name in as_list(getattr(cells, key) or []):
                    yield from _unknown(f"{where}.{key}", name, known)
    for ratio in _ratios(settings):
        if isinstance(ratio, bool) or not isinstance(ratio, int) or ratio < 1:
            yield f"ratio {ratio} must be a whole number from 1, percent of the labelled tiles"
    for name, strategy in settings.selection.items():
        if strategy.redraw and strategy.strategy != "random":
            yield f"selection.{name}.redraw belongs to strategy random; remove it"
    judge = settings.judge
    judged = [k for k in ("seed", "network", "run", "model") if getattr(judge, k) is not None]
    if len(judged) > 1 and judged != ["seed", "network"]:
        yield f"judge must have one of seed, run and model, not {', '.join(judged)}"
    if judge.network is not None:
        yield from _unknown("judge.network", judge.network, settings.baselines.networks)
    seeds = settings.evaluation.seeds
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        yield "evaluation.seeds must be different whole numbers from 0, such as [0, 1, 2]"
    if settings.sampling.per_wanted < 1:
        yield f"sampling.per_wanted {settings.sampling.per_wanted} must be at least 1"
    if settings.slurm.cluster not in ("slurm", "local"):
        yield f"slurm.cluster {settings.slurm.cluster} must be slurm or local"
    if settings.link not in ("copy", "hard", "symbolic"):
        yield f"link {settings.link} must be copy, hard or symbolic"


def _bad_names(settings: Settings) -> Iterable[str]:
    named = {
        "models": settings.models,
        "generators": settings.generators,
        "selection": settings.selection,
        "baselines.networks": settings.baselines.networks,
        "baselines.kinds": settings.baselines.kinds,
        "name": [settings.name],
    }
    for section, names in named.items():
        for name in names:
            if not NAME.fullmatch(str(name)):
                yield f"{section}: {name!r} must be letters, digits, _ . - and +"
    keys = [*settings.baselines.kinds, *settings.baselines.networks]
    for name in keys:
        if keys.count(name) > 1 or name in (*RESERVED, settings.data.labelled):
            yield f"baselines: the name {name} is taken; choose another"


def _unknown(where: str, name: Any, known: Mapping[str, Any]) -> Iterable[str]:
    if name not in known:
        yield f"{where}: unknown {name}; {nearest(str(name), known)}"


def _circles(models: Mapping[str, Model]) -> Iterable[str]:
    for name in models:
        seen, stack = set(), list(models[name].needs.values())
        while stack:
            other = stack.pop()
            if other not in seen and other in models:
                seen.add(other)
                stack += models[other].needs.values()
        if name in seen:
            yield f"models.{name} needs itself; break the circle"


def _ratios(settings: Settings) -> list:
    grid, ceiling = settings.grid, settings.baselines.ceiling
    found: list = [*grid.ratios, *(ceiling.ratios if ceiling else ())]
    for cells in (*grid.without, *grid.also):
        found += as_list(cells.ratio) if cells.ratio is not None else []
    return found
