"""YAML configurations: merge and check them, and turn `target`/`params` nodes into objects.

A configuration has the sections `model`, `data` and `lightning`, and `vars` for values that others
interpolate (`${vars.size}`). A node `{target: package.module.Class, params: {...}}` stands for an
object.

YAML written for the code that was published with the paper, or for latent diffusion, is translated
when it is loaded (`ldm.legacy`): everything after that sees only native names. Importing this
module imports no torch; checking or building a node imports the classes that it names.
"""

import importlib
import inspect
import json
import os
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.errors import PydanticUndefinedAnnotation, PydanticUserError

from ldm.cli import (
    MOST,
    RANGE_ERRORS,
    Count,
    Positive,
    Rate,
    Seed,
    Share,
    Workers,
    existing_path,
    join_keys,
    nearest,
    reason,
    shown,
)
from ldm.errors import Problems, UserError
from ldm.legacy import LEGACY_TARGETS, Translation, environment_remedy
from ldm.run import LOGGERS

SECTIONS = ("model", "data", "lightning", "vars")
LIGHTNING_SECTIONS = ("trainer", "callbacks", "logger", "modelcheckpoint", "strategy")
LIGHTNING = "pytorch_lightning."
TRAINER = f"{LIGHTNING}Trainer"
TILES = "tiles in folders are ldm.data.tiles.TileFolder"
TYPES = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "any value"}
TYPES |= {NoneType: "null"}

# Parameters that hold plain settings, and the class whose parameters their keys are.
SETTINGS = {"ddconfig": "ldm.modules.autoencoder.Architecture"}

# What stands beside `target` and `params`, and what our checkpoints take beside the parameters of
# Lightning's class.
BESIDE = {"model": {"base_learning_rate": Annotated[float, Field(gt=0, le=10)]}}
ALSO = {"lightning.modelcheckpoint": {"keep_last": Count}}

# Range of each number among the parameters of native classes and of Lightning's, by its name.
# Types are those of the signatures; a list has the range of its numbers.
Number = Annotated[float, Field(ge=0, le=1e15)]  # of all native parameters that are not named here
Finite = Annotated[float, Field(allow_inf_nan=False)]  # of those of Lightning's callbacks
Below1 = Annotated[float, Field(ge=0, lt=1)]
OrMinus1 = Annotated[int, Field(ge=-1, le=MOST)]  # -1 stands for all, none, or what follows
Signed = Annotated[float, Field(ge=-1e3, le=1e3)]
Multiple = Annotated[float, Field(gt=0, le=1024)]  # of a width
Size = Annotated[int, Field(ge=1, le=2**14)]  # pixels of a side, channels, layers
_COUNTS = """accumulate_grad_batches batch_frequency batch_size check_val_every_n_epoch
    every_n_epochs every_n_train_steps max_images num_nodes prefetch scale_images
    total_steps"""
_SIZES = """ch ch_mult channels components disc_in_channels disc_num_layers embed_dim
    image_size in_channels model_channels out_ch out_channels patch
    resolution size z_channels"""
_OR_MINUS_1 = """devices max_epochs max_steps num_head_channels num_heads num_heads_upsample
    num_sanity_val_steps save_top_k"""
RANGES: dict[str, Any] = {
    **dict.fromkeys(_COUNTS.split(), Count),
    **dict.fromkeys(_SIZES.split(), Size),
    **dict.fromkeys(_OR_MINUS_1.split(), OrMinus1),
    "channel_mult": Multiple,
    **dict.fromkeys(("betas", "dropout", "ema_decay", "label_dropout", "plateau"), Below1),
    **dict.fromkeys(("embedding_rate", "min_snr_gamma", "scale_factor"), Positive),
    **dict.fromkeys(("time_shift", "time_std", "val_check_interval"), Positive),
    **dict.fromkeys(("linear_end", "linear_start", "strength"), Annotated[Below1, Field(gt=0)]),
    **dict.fromkeys(("logvar_init", "time_mean"), Signed),
    **dict.fromkeys(("exponent", "p"), Share),
    "cycle_lengths": Annotated[Number, Field(ge=1)],
    "num_res_blocks": Annotated[int, Field(ge=0, le=64)],
    "num_workers": Workers,
    "seed": Seed,
    "timesteps": Annotated[int, Field(ge=1, le=10**6)],  # tables of so many numbers are built
    "val_fraction": Annotated[float, Field(ge=0, le=0.5)],
    "weight_decay": Rate,
}

# Trainer settings of Lightning 1, and those that another section of the configuration owns.
TRAINER_REMEDIES = {
    "callbacks": "write them under lightning.callbacks",
    "logger": "write it under lightning.logger",
    "default_root_dir": "the run folder is named by `logdir` and `name`",
    "gpus": "give `gpus` on the command line, or lightning.trainer.devices",
    "distributed_backend": "use lightning.trainer.strategy",
    "checkpoint_callback": "use lightning.modelcheckpoint",
    "resume_from_checkpoint": "give `resume` on the command line",
    "progress_bar_refresh_rate": "use lightning.trainer.enable_progress_bar",
    "weights_summary": "use lightning.trainer.enable_model_summary",
    "terminate_on_nan": "a non-finite loss always stops a run",
    "track_grad_norm": "the gradient norm is always logged",
    "amp_backend": "use lightning.trainer.precision",
    "amp_level": "use lightning.trainer.precision",
}

Found = dict[str, str]  # dotted path -> what is wrong there and what to do

# --- Reading -------------------------------------------------------------------------------------


def load_configs(paths: Iterable[str | os.PathLike], overrides: Iterable[str] = ()) -> DictConfig:
    """Merge YAML files left to right, then overrides; resolved, and in native names.

    An override is like `lightning.trainer.devices=[0,1]`, its value YAML. A section or callback
    that is null is left out. Where a later file names another `target`, the `params` of the
    earlier one are left out: another class has its own. A file in published names can be merged
    with one in native names. Whatever is wrong, with the line of a file that is no YAML, is a
    UserError.
    """
    paths = list(paths)
    if not paths:
        raise UserError("no configuration: give at least one YAML file with `base`")
    translation = Translation()
    config = OmegaConf.create({})
    for path in paths:
        earlier, later = translation.in_one_language(_plain(config), _plain(read_yaml(path)))
        try:
            config = OmegaConf.merge(OmegaConf.create(earlier), OmegaConf.create(later))
        except (OmegaConfBaseException, TypeError) as error:
            raise UserError(
                f"{path} cannot be merged with the files before it: {_first_line(error)}; "
                "a section must be a mapping in all of them"
            ) from None
    for override in overrides:
        config = _with_override(config, override, translation)
    sections = {name: section for name, section in resolve(config).items() if section is not None}
    tree = translation.tree(sections)
    translation.log()
    if translation.problems:
        raise Problems({**_problems(tree), **translation.problems}, "configuration")
    return OmegaConf.create(tree)


def _plain(config: DictConfig) -> dict:
    return OmegaConf.to_container(config)


def resolve(config: DictConfig | Mapping) -> dict:
    """The configuration as plain dicts, lists and scalars, interpolations replaced by their values.

    An interpolation that fails and a value left as `???` are a UserError with the dotted path.
    """
    if not isinstance(config, Mapping | DictConfig):
        raise UserError(f"configuration {shown(config)} must be a mapping")
    if not isinstance(config, DictConfig):
        config = OmegaConf.create(dict(config))
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key, said = error.full_key or "configuration", _first_line(error)
        said = said.removeprefix("KeyError raised while resolving interpolation: ").strip('"')
        if said.startswith("Environment variable "):
            name = said.split("'")[1]
            raise UserError(f"{key}: {environment_remedy(name, key)}") from None
        if said.startswith("Missing mandatory value"):
            raise UserError(f"{key} has no value; give it with {key}=VALUE") from None
        raise UserError(f"{key}: {said}; write {key}=VALUE or correct the ${{...}}") from None


def read_yaml(path: str | os.PathLike) -> DictConfig:
    """One YAML file, as it is written; errors name line and column."""
    path = existing_path(path, "configuration", "file")
    try:
        text = path.read_text(encoding="utf-8")
        # OmegaConf would make a mapping of a scalar, so the kind of the root is looked at first.
        root = yaml.compose(text)
        if root is None or root.tag == "tag:yaml.org,2002:null":
            return OmegaConf.create({})
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path} is not a mapping; it needs sections such as model: and data:")
        return OmegaConf.create(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise UserError(f"{where}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {_first_line(error)}") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {error.full_key or 'value'}: {_first_line(error)}") from None


def _with_override(config: DictConfig, override: str, translation: Translation) -> DictConfig:
    key, equals, _ = override.partition("=")
    if not equals or not all(part.isidentifier() or part.isdigit() for part in key.split(".")):
        raise UserError(
            f"override {override!r}: write it as section.name=value, like model.params.embed_dim=4"
        )
    try:
        written = _plain(OmegaConf.from_dotlist([override]))
        earlier, later = translation.in_one_language(_plain(config), written)
        config = OmegaConf.create(earlier)
        if later == written:
            config.merge_with_dotlist([override])  # which knows places in lists
        else:
            config.merge_with(later)
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or _first_line(error)
        raise UserError(f"override {override!r}: the value is not valid YAML: {reason}") from None
    except (OmegaConfBaseException, ValueError, IndexError, TypeError) as error:
        raise UserError(f"override {override!r}: {_first_line(error)}") from None
    return config


# --- Translation of published configurations -----------------------------------------------------


def upgrade_config(config: DictConfig | Mapping) -> dict:
    """A resolved copy in native names; what means nothing here is dropped, with one log line."""
    translation = Translation()
    tree = translation.tree(resolve(config))
    translation.log()
    if translation.problems:
        raise Problems(translation.problems, "configuration")
    return tree


# --- Checking ------------------------------------------------------------------------------------


def validate_config(config: DictConfig | Mapping) -> None:
    """Check a whole configuration against the classes that it names, before anything is built.

    Names are exact: a native class is given only what its signature spells out, while a class
    of another package that takes `**kwargs` is believed. All that is wrong is one `Problems`.
    """
    problems = _problems(resolve(config))
    if problems:
        raise Problems(problems, "configuration")


def _problems(tree: dict) -> Found:
    problems: Found = {}
    for section in tree:
        if section not in SECTIONS:
            problems[str(section)] = f"unknown section{nearest(section, SECTIONS)}"
    for section in ("model", "data"):
        if _is_node(tree.get(section)):
            _check_nodes(tree[section], section, problems)
        else:
            problems[section] = "must be a mapping with target: and params:"
    if tree.get("lightning") is not None:
        _check_lightning(tree["lightning"], problems)
    return problems


def _check_lightning(section: Any, problems: Found) -> None:
    if not isinstance(section, dict):
        problems["lightning"] = f"must be a mapping of {', '.join(LIGHTNING_SECTIONS)}"
        return
    for name in section:
        if name not in LIGHTNING_SECTIONS:
            problems[f"lightning.{name}"] = f"unknown section{nearest(name, LIGHTNING_SECTIONS)}"

    trainer = section.get("trainer") or {}
    if isinstance(trainer, dict):
        own = {name: value for name, value in trainer.items() if name not in TRAINER_REMEDIES}
        for name in [name for name in trainer if name not in own]:
            remedy = f"not a setting here; {TRAINER_REMEDIES[name]}"
            problems[f"lightning.trainer.{name}"] = remedy
        _check_params(TRAINER, get_obj_from_str(TRAINER), own, "lightning.trainer", problems)
    else:
        problems["lightning.trainer"] = "must be a mapping of Trainer settings"

    loggers = section.get("logger")
    nodes = {f"lightning.{name}": section.get(name) for name in ("modelcheckpoint", "strategy")}
    if isinstance(loggers, list):
        nodes |= {f"lightning.logger[{i}]": node for i, node in enumerate(loggers)}
    elif loggers is not None:
        nodes["lightning.logger"] = loggers
    callbacks = section.get("callbacks") or {}
    if isinstance(callbacks, dict):
        nodes |= {f"lightning.callbacks.{name}": node for name, node in callbacks.items()}
    else:
        problems["lightning.callbacks"] = "must be a mapping from a name to target: and params:"
    for path, node in nodes.items():
        is_logger = path.startswith("lightning.logger")
        if _is_node(node):
            _check_nodes(node, path, problems)
        elif is_logger and node not in LOGGERS:
            problems[path] = (
                f"{shown(node)} must be {' or '.join(LOGGERS)}, a mapping with target: and "
                "params:, or a list of such; the CSV files are always written"
            )
        elif not is_logger and node is not None:
            problems[path] = "must be null or a mapping with target: and params:"


def _nodes(value: Any, path: str) -> Iterator[tuple[str, dict]]:
    """Every node in a tree of plain containers with its dotted path, outer ones first."""
    if _is_node(value):
        yield path, value
    items: Iterable[tuple[str, Any]] = ()
    if isinstance(value, dict):
        items = ((join_keys(path, key), item) for key, item in value.items())
    elif isinstance(value, list):
        items = ((f"{path}[{i}]", item) for i, item in enumerate(value))
    for where, item in items:
        yield from _nodes(item, where)


def _check_nodes(
    outer: dict, path: str, problems: Found, supplied: AbstractSet[str] = frozenset()
) -> None:
    """Collect what is wrong with a node, beside which `supplied` are given, and within it."""
    for where, node in _nodes(outer, path):
        _check_node(node, where, problems, supplied if node is outer else frozenset())


def _check_node(node: dict, path: str, problems: Found, supplied: AbstractSet[str]) -> None:
    beside = BESIDE.get(path, {})
    _check_names(node, {"target": None, "params": {}, **beside}, path, problems)
    for key, annotation in beside.items():
        if mismatch := _mismatch(node.get(key), annotation):
            problems[join_keys(path, key)] = mismatch
    name, where = node["target"], join_keys(path, "params")
    params = {} if node.get("params") is None else node["params"]
    try:
        constructor = get_obj_from_str(name)
    except UserError as error:
        more = f"; {TILES}" if path.startswith("data.") and TILES not in str(error) else ""
        problems[join_keys(path, "target")] = f"{error}{more}"
        constructor = None
    if not isinstance(params, dict):
        problems[where] = f"{shown(params)} must be a mapping"
    elif callable(constructor):
        _check_params(name, constructor, params, where, problems, supplied, ALSO.get(path, {}))
    elif constructor is not None:
        problems[join_keys(path, "target")] = f"{name} is no class; name one"


def _check_params(
    name: str,
    constructor: Callable,
    params: dict,
    path: str,
    problems: Found,
    supplied: AbstractSet[str] = frozenset(),
    also: Mapping[str, Any] | None = None,
) -> None:
    try:
        signature = list(inspect.signature(constructor).parameters.values())
    except ValueError:  # built in, without a signature: there is nothing to compare with
        return
    known = {
        p.name: None if p.default is p.empty and p.name not in supplied else p
        for p in signature
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    if not _is_own(name) and any(p.kind is p.VAR_KEYWORD for p in signature):
        known = {**dict.fromkeys(params, ...), **known}
    also = also or {}
    _check_names(params, {**known, **also}, path, problems, name)
    types = {**_type_hints(constructor), **also}
    for key, value in params.items():
        where = join_keys(path, key)
        mismatch = _mismatch(value, types.get(key, Any))
        if not mismatch and (_is_own(name) or name.startswith(LIGHTNING)):
            other = Number if _is_own(name) or name == TRAINER else Finite
            mismatch = _out_of_range(value, RANGES.get(key, other))
        if mismatch:
            problems[where] = mismatch
        elif key in SETTINGS and isinstance(value, dict):
            _check_params(SETTINGS[key], get_obj_from_str(SETTINGS[key]), value, where, problems)


def _check_names(
    given: dict, known: Mapping[str, Any], path: str, problems: Found, owner: str = ""
) -> None:
    """Check names against those that `owner` knows; one whose value is None must be given."""
    for key in given:
        if key not in known:
            of = f" of {owner}" if owner else ""
            problems[join_keys(path, key)] = f"unknown name{of}{nearest(key, known)}"
    missing = [key for key, default in known.items() if default is None and key not in given]
    if missing:
        problems[path] = f"{owner} also needs {', '.join(missing)}".strip()


def _type_hints(constructor: Callable) -> dict[str, Any]:
    function = constructor.__init__ if inspect.isclass(constructor) else constructor
    try:
        return typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError):  # names that only a type checker imports
        return {}


def _mismatch(value: Any, annotation: Any) -> str | None:
    try:
        checker = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
        checker.validate_json(json.dumps(value, default=str), strict=True)
        return None
    except (PydanticUserError, PydanticUndefinedAnnotation):
        return None  # the annotation says nothing of YAML
    except ValidationError as error:
        errors = error.errors(include_url=False)
    # A node stands for an object, which is built later.
    if isinstance(value, dict) and any(one["type"] == "is_instance_of" for one in errors):
        return None
    if errors[0]["type"] in (*RANGE_ERRORS, "literal_error"):
        return reason(errors[0], annotation)
    return f"{shown(value)} must be of type {type_in_words(annotation)}"


def _out_of_range(value: Any, allowed: Any) -> str | None:
    """What is wrong with a number, or with one in a list, by its range; None for other values."""
    if isinstance(value, list) and not value and allowed in (Size, Count, Multiple):
        return "[] must hold a number"
    numbers = value if isinstance(value, list) else [value]
    found = (
        _mismatch(number, allowed)
        for number in numbers
        if isinstance(number, int | float) and not isinstance(number, bool)
    )
    return next(filter(None, found), None)


# --- Building ------------------------------------------------------------------------------------


def instantiate_from_config(config: DictConfig | Mapping, **extra: Any) -> Any:
    """The object that a `{target, params}` node stands for: the one place that builds from a node.

    Nodes within `params` are checked here and passed on plain. `extra` arguments of the
    constructor take precedence over `params`. Names that do not exist are one UserError.
    """
    node = upgrade_config(config)
    if not _is_node(node):
        raise UserError(
            f"configuration with keys {sorted(map(str, node))} has no target: name the class there "
            f"({TILES})"
        )
    node.pop("base_learning_rate", None)  # of the model's section, for the command
    problems: Found = {}
    _check_nodes(node, "", problems, supplied=extra.keys())
    if problems:
        raise Problems(problems, node["target"])
    try:
        return get_obj_from_str(node["target"])(**{**(node.get("params") or {}), **extra})
    except (ValueError, ArithmeticError) as error:
        if isinstance(error, UserError) or not _is_own(node["target"]):
            raise
        raise UserError(f"{node['target']} does not take these params: {error}") from error


def get_obj_from_str(name: str) -> Any:
    """The object that a dotted name `package.module.name` stands for."""
    module_name, _, attribute = name.rpartition(".") if isinstance(name, str) else ("", "", "")
    if not module_name or not attribute:
        raise UserError(
            f"target {shown(name)} must be a dotted name like ldm.models.autoencoder.AutoencoderKL"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            known = {*LEGACY_TARGETS, *LEGACY_TARGETS.values()}
            hint = nearest(name, known, "; check the spelling, or install its package")
            raise UserError(f"unknown target {name}{hint}") from None
        raise UserError(
            f"target {name} needs the package {error.name}, which is not installed"
        ) from None
    except (ValueError, TypeError):  # empty or relative parts
        raise UserError(f"target {shown(name)} is not a dotted name") from None
    value = getattr(module, attribute, None)
    # What a native module has only imported is no name of its own.
    foreign = _is_own(name) and not _is_own(getattr(value, "__module__", name))
    if value is None or foreign or inspect.ismodule(value):
        own = [k for k, v in vars(module).items() if getattr(v, "__module__", "") == module_name]
        raise UserError(f"unknown target {name}{nearest(attribute, own)}")
    return value


def require_own_targets(config: DictConfig | Mapping, source: str | os.PathLike) -> None:
    """Refuse targets outside this package in a file from elsewhere: they could run any code."""
    for path, node in _nodes(resolve(config), ""):
        if not _is_own(str(node["target"])):
            raise UserError(
                f"{source}: {join_keys(path, 'target')}={shown(node['target'])} is not a class of "
                "this package, so it is not built; use a checkpoint that main.py wrote"
            )


# --- Wording -------------------------------------------------------------------------------------


def type_in_words(kind: Any) -> str:
    """A type as a reader of YAML knows it."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return type_in_words(parts[0])
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in parts)
    if origin in (UnionType, typing.Union):
        return " or ".join(dict.fromkeys(type_in_words(part) for part in parts))
    if origin is not None:
        return "mapping" if issubclass(origin, Mapping) else f"list of {type_in_words(parts[0])}"
    return TYPES.get(kind, "text" if hasattr(kind, "__fspath__") else "mapping")


def tile_roots(data: Any) -> list[Path]:
    """Every folder of tiles that a `data` section names by a key `root`, at any depth."""
    if isinstance(data, list | tuple):
        return [root for part in data for root in tile_roots(part)]
    if not isinstance(data, Mapping):
        return []
    named = data.get("root")
    own = [named] if isinstance(named, str | os.PathLike) else list(named or [])
    return [Path(root).expanduser() for root in own] + tile_roots(list(data.values()))


def _is_node(value: Any) -> bool:
    return isinstance(value, dict) and "target" in value


def _is_own(name: str) -> bool:
    return name.split(".", 1)[0] == __name__.split(".", 1)[0]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].strip()
