"""The settings of an experiment: configs/tables/*.yaml, checked completely before anything runs.

Imports nothing heavy: `--status` and `--dry-run` answer at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ldm.cli import MOST, Count, Positive, Seed, Whole, existing_path, nearest
from ldm.config import read_yaml, resolve
from ldm.errors import Problems, UserError

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]*(?:[-+][A-Za-z0-9_.]+)*")  # of folders and jobs
RESERVED = ("train", "val", "test", "real")
# Parts of pydantic's place of an error that name a member of a union, not a key.
UNION_PARTS = ("constrained-int", "list[constrained-int]")


def _plain(value: Any) -> Any:
    if any(isinstance(one, Mapping | list) for one in as_list(value)):
        raise ValueError(
            "must be a value or a list of values; put text that begins with a brace in quotes"
        )
    return value


# Of an entry point: names without dashes.
Options = dict[str, Annotated[Any, AfterValidator(_plain)]]
Ratio = Annotated[
    int, Field(ge=1, le=MOST, strict=True)
]  # synthetic tiles in percent of the labelled ones


class Section(BaseModel):
    """A mapping of the file: another key than these is an error."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)


class Data(Section):
    """Where the tiles are. `root` holds `val`, `test` and the two folders that are named here."""

    root: str  # folder of the tiles
    labelled: str = "train5"  # folder of the few labelled tiles
    unlabelled: str = "train"  # folder of the tiles that generators saw
    groups: str | None = None  # CSV of patients or slides, for intervals (`eval.py --groups`)
    group_column: str = "group"  # column of `groups`
    tiles: Options | None = None  # options of make_tiles.py, which makes procedural tiles


class Model(Section):
    """A trained model: `run`, or what it is trained with.

    `needs` hands another model over: to a `config` as environment variable, to a `classifier` as
    option (`needs: {first_stage: pretrained}`).
    """

    run: str | None = None  # run folder or checkpoint, from elsewhere; never written to
    config: Any = None  # configuration of main.py: one file or several
    overrides: list[str] = []  # overrides of `config`
    classifier: Options | None = None  # options of classifier_train.py, on the labelled tiles
    arguments: Options = {}  # options of main.py, such as precision
    env: dict[str, str] = {}  # environment variables of its training
    needs: dict[str, str] = {}  # other models, by the variable or option that takes them
    checkpoint: Literal["last", "best"] = "last"  # which checkpoint is used
    label: str | None = None  # description of its training for people
    gpus: Whole = 1  # GPUs of a job


class Draws(Section):
    """Labelled tiles drawn anew for every seed of the evaluation, in several numbers.

    Models of kind `classifier`, pools, selections, baselines and ceilings are made for each draw.
    """

    # Labels per class; every number is an experiment of its own.
    per_class: list[Annotated[int, Field(ge=1, strict=True)]]
    options: Options = {}  # options of scripts/make_subset.py, such as group_csv


class Generator(Section):
    """What makes a pool of synthetic tiles; the names are those of `models`.

    Or real tiles that the judge labels: `unlabelled`, a folder of `data` or a path.
    """

    diffusion: str | None = None  # diffusion model, a name of `models`
    unlabelled: str | None = None  # real tiles, in place of `diffusion`
    classifier: str | None = None  # classifier that guides, a name of `models`
    decoder: str | None = None  # fine-tuned decoder, a name of `models`
    label: str | None = None  # description for people; the name if omitted
    # Tiles per class, also where no arm uses them; else as many as needed.
    amount: Count | None = None
    factors: Options = {}  # values for columns of the table, by name
    sampling: Options = {}  # options that replace those of the section `sampling`


class Sampling(Section):
    """How many tiles every generator makes, and how."""

    per_wanted: float = Field(2.0, ge=1, le=1000)  # tiles made for each that is wanted
    options: Options = {}  # options of sample_diffusion.py
    gpus: Whole = 1  # GPUs of a job


class Judge(Section):
    """Whose features choose: the classifier of a seed on the labelled tiles, a run of eval.py, a
    timm network, or whatever scripts/distance.py takes ({NAME} stands for a model's checkpoint)."""

    seed: Seed | None = None  # seed of a classifier on the labelled tiles
    network: str | None = None  # name of `baselines.networks`; if omitted the arms' own network
    run: str | None = None  # run of eval.py
    model: str | None = None  # network of timm
    features: list[str] = []  # networks that judge together, such as diffusion:{flow}@400
    options: Options = {}  # options of scripts/vis.py; with `features` of scripts/distance.py
    # Options of scripts/vis.py: with `features`, draw a UMAP by the first of them, too.
    umap: Options | None = None


class Strategy(Section):
    """How synthetic tiles are chosen: options of scripts/distance.py."""

    strategy: str  # `--strategy` of scripts/distance.py
    redraw: bool = False  # draw anew for every seed of the evaluation (strategy random only)
    sheets: bool = True  # write contact sheets
    # The classifiers of the row "real only" judge, too (strategy confidence, `judge.features`).
    ensemble: bool = False
    options: Options = {}  # further options of scripts/distance.py


class Cells(Section):
    """Arms that are left out or added: names or lists of them; all where nothing is given."""

    generator: Any = None  # names of `generators`
    selection: Any = None  # names of `selection`
    ratio: Ratio | list[Ratio] | None = None  # synthetic tiles, percent of the labelled


class Grid(Section):
    """All combinations, less those of `without`, and those of `also`."""

    generators: list[str] = []  # names of the section `generators`
    selection: list[str] = []  # names of the section `selection`
    ratios: list[Ratio] = []  # synthetic tiles, percent of the labelled
    without: list[Cells] = []
    also: list[Cells] = []


class Evaluation(Section):
    """How every arm is trained and tested."""

    seeds: list[Seed]  # seeds of the networks of every arm
    arguments: Options = {}  # options of eval.py
    gpus: Whole = 1  # GPUs of a job


class Network(Section):
    """A further classifier on the labelled tiles alone: options of eval.py over those of the arms,
    or of scripts/baselines.py."""

    label: str | None = None  # description for people; the name if omitted
    arguments: Options = {}  # options of the command


class Ceiling(Section):
    """Real tiles instead of synthetic ones, in the same amount."""

    ratios: list[Ratio] = []  # further real tiles, percent of the labelled
    options: Options = {}  # options of scripts/make_subset.py


class Baselines(Section):
    """Further rows of the table, without synthetic tiles."""

    kinds: list[str] = []  # kinds of scripts/baselines.py
    options: dict[str, Options] = {}  # options of scripts/baselines.py, by kind
    networks: dict[str, Network] = {}  # further classifiers of eval.py
    # Logistic regressions on features, where {NAME} stands for a model's checkpoint.
    probes: dict[str, Network] = {}
    ceiling: Ceiling | None = None


class Fidelity(Section):
    """Distances of the chosen synthetic tiles to real ones, arm by arm."""

    real: str = "val"  # a folder of `data`, or a path
    judge: bool = False  # compare in the features of the judge
    options: Options = {}  # options of scripts/fidelity.py


class Copies(Section):
    """Copies of training tiles, pool by pool."""

    holdout: str = "val"  # a folder of `data`, or a path
    judge: bool = False  # search in the features of the judge, too
    options: Options = {}  # options of scripts/copy_check.py


class Slurm(Section):
    """What SLURM is asked for, with `--slurm`."""

    cluster: Literal["slurm", "local"] = "slurm"  # local: processes of this machine, to try it
    partition: str | None = None  # the cluster's default if omitted
    hours: Positive = 24.0  # time limit of a job; one that needs longer is requeued and goes on
    cpus: Count = 8  # cores of a job
    memory_gb: Positive | None = None  # memory of a job; the cluster's default if omitted
    gpus: bool = True  # false on a cluster without GPUs
    parallel: Count = 16  # jobs in the queue at once
    parameters: dict[str, Any] = {}  # further parameters of sbatch, such as slurm_account


class Settings(Section):
    """A complete file of configs/tables."""

    name: str  # name of the experiment
    title: str = ""  # title of the page; the name if omitted
    about: str = ""  # what is done, at the top of the report
    caution: str = ""  # what readers of the report must not conclude
    out: str  # folder of everything that the experiment makes
    paper: str | None = None  # YAML file with published numbers
    vars: dict[str, Any] = {}  # values for interpolation, such as ${vars.steps}
    data: Data
    draws: Draws | None = None  # draws of labels in place of `data.labelled`
    models: dict[str, Model] = {}
    generators: dict[str, Generator] = {}
    sampling: Sampling = Sampling()
    judge: Judge = Judge()
    selection: dict[str, Strategy] = {}
    grid: Grid = Grid()
    evaluation: Evaluation
    baselines: Baselines = Baselines()
    fidelity: Fidelity | None = None
    copies: Copies | None = None
    # How tiles come into training folders, see scripts/distance.py.
    link: Literal["copy", "hard", "symbolic"] = "symbolic"
    slurm: Slurm = Slurm()


def read_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Read, merge (`section.key=value`) and check settings; all problems are one UserError."""
    config = read_yaml(existing_path(path, "config", "file"))
    for word in overrides:
        config = with_override(config, word)
    return check_settings(resolve(config), f"`config` {path}")


def with_override(config: DictConfig, word: str) -> DictConfig:
    """A configuration with one value replaced or added by `section.key=value`."""
    key, equals, _ = word.partition("=")
    if not equals or key.startswith("-"):
        raise UserError(f"{word}: overrides have the form section.key=value")
    try:
        return OmegaConf.merge(config, OmegaConf.from_dotlist([word]))
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError) as error:
        raise UserError(f"{word}: {str(error).splitlines()[0]}") from None


def check_settings(raw: Mapping[str, Any], source: str) -> Settings:
    """Settings from plain dictionaries; `source`, for messages, says where they come from."""
    try:
        settings = Settings.model_validate(raw)
    except ValidationError as error:
        problems = list(dict.fromkeys(_describe(one) for one in error.errors()))
    else:
        problems = [*_bad_names(settings), *_unknown_names(settings), *_contradictions(settings)]
    if problems:
        raise Problems(dict.fromkeys(problems, ""), source)
    return settings


def as_list(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


def _describe(problem: Mapping[str, Any]) -> str:
    """An error of pydantic in words: key, value, what is allowed."""
    place = [part for part in problem["loc"] if part not in UNION_PARTS]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)[1:]
    if problem["type"] == "extra_forbidden":
        return f"unknown key {where}{nearest(place[-1], _section_at(place[:-1]).model_fields)}"
    if problem["type"] == "missing":
        return f"{where} is missing; add it"
    words = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return f"{where} {problem['input']!r} {words}"


def _section_at(place: Sequence[str | int]) -> Any:
    kind: Any = Settings
    for part in place:
        known = getattr(kind, "model_fields", None)
        kind = known[part].annotation if known else get_args(kind)[-1]
        kind = next((one for one in get_args(kind) if NoneType in get_args(kind)), kind)
    return kind


def _bad_names(settings: Settings) -> Iterable[str]:
    """Names that cannot be those of folders and jobs, or mean something else already."""
    baselines = settings.baselines
    named = {
        "models": settings.models,
        "generators": settings.generators,
        "selection": settings.selection,
        "baselines.networks": baselines.networks,
        "baselines.probes": baselines.probes,
        "baselines.kinds": baselines.kinds,
        "name": [settings.name],
    }
    for section, names in named.items():
        for name in names:
            if not NAME.fullmatch(name):
                yield f"{section}: {name!r} must be letters, digits, _ . - and +"
    keys = [*baselines.kinds, *baselines.networks, *baselines.probes]
    for name in keys:
        if keys.count(name) > 1 or name in (*RESERVED, settings.data.labelled):
            yield f"baselines: the name {name} is taken; choose another"


def _unknown_names(settings: Settings) -> Iterable[str]:
    """Names of one section that stand in another and mean nothing there."""
    models, grid = settings.models, settings.grid
    used = [  # where, name, what is known
        *(
            (f"models.{name}.needs.{key}", other, models)
            for name, model in models.items()
            for key, other in model.needs.items()
        ),
        *(
            (f"generators.{name}.{part}", getattr(generator, part), models)
            for name, generator in settings.generators.items()
            for part in ("diffusion", "classifier", "decoder")
        ),
        ("judge.network", settings.judge.network, settings.baselines.networks),
    ]
    cells = [("grid.generators", grid.generators, settings.generators)]
    cells.append(("grid.selection", grid.selection, settings.selection))
    for part in ("without", "also"):
        for index, one in enumerate(getattr(grid, part)):
            where = f"grid.{part}[{index}]"
            cells.append((f"{where}.generator", one.generator, settings.generators))
            cells.append((f"{where}.selection", one.selection, settings.selection))
    used += [(where, name, known) for where, names, known in cells for name in as_list(names)]
    for where, name, known in used:
        if name is not None and name not in known:
            yield f"{where}: unknown {name}{nearest(name, known)}"
    try:
        TopologicalSorter({name: model.needs.values() for name, model in models.items()}).prepare()
    except CycleError as error:
        for name in sorted(set(error.args[1])):
            yield f"models.{name} needs itself; break the circle"


def _contradictions(settings: Settings) -> Iterable[str]:
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
    for name, strategy in settings.selection.items():
        if strategy.redraw and strategy.strategy != "random":
            yield f"selection.{name}.redraw belongs to strategy random; remove it"
        if strategy.ensemble:
            yield from _no_ensemble(f"selection.{name}", strategy, settings.judge)
    for name, generator in settings.generators.items():
        if (generator.diffusion is None) == (generator.unlabelled is None):
            yield f"generators.{name} must have either diffusion or unlabelled"
        if settings.draws is None and _is_labelled(generator.unlabelled, settings.data):
            yield f"generators.{name}.unlabelled must be another folder than data.labelled"
    judge = settings.judge
    keys = ("seed", "network", "run", "model", "features")
    judged = [key for key in keys if getattr(judge, key) not in (None, [])]
    if len(judged) > 1 and judged != ["seed", "network"]:
        yield f"judge must have one of seed, run, model and features, not {', '.join(judged)}"
    if judge.umap is not None and not judge.features:
        yield "judge.umap belongs to judge.features; without them there always is one: remove it"
    seeds = settings.evaluation.seeds
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        yield "evaluation.seeds must be different whole numbers from 0, such as [0, 1, 2]"


def _no_ensemble(where: str, strategy: Strategy, judge: Judge) -> Iterable[str]:
    """Why classifiers cannot judge along in a selection."""
    if strategy.strategy != "confidence" or not judge.features:
        yield f"{where}.ensemble belongs to strategy confidence with judge.features; remove it"
    if strategy.options.get("confidence") == "manifest":
        yield f"{where}.ensemble needs a judge, not options.confidence manifest; remove one"
    if strategy.options.get("choose") or judge.options.get("choose"):
        yield f"{where}.ensemble does not go with choose, which takes one network; remove one"


def _is_labelled(unlabelled: str | None, data: Data) -> bool:
    """Whether a folder of `data`, or a path, is that of the labelled tiles."""
    if unlabelled is None:
        return False
    return Path(data.root, data.labelled) in (Path(unlabelled), Path(data.root, unlabelled))
