"""YAML configurations: merge and check them, and turn `target`/`params` nodes into objects.

A configuration has the sections `model`, `data` and `lightning`, and `vars` for values that others
interpolate (`${vars.size}`). A node `{target: package.module.Class, params: {...}}` stands for an
object.

YAML written for the code that was published with the paper, or for latent diffusion (Rombach et
al. 2022), is translated once, when it is loaded (`upgrade_config`): everything after that sees only
native names. Importing this module imports no torch; checking or building a node imports the
classes that it names.
"""

import difflib
import importlib
import inspect
import logging
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.cli import existing_path
from ldm.errors import UserError
from ldm.run import LOGGERS

logger = logging.getLogger(__name__)

SECTIONS = ("model", "data", "lightning", "vars")
LIGHTNING_SECTIONS = ("trainer", "callbacks", "logger", "modelcheckpoint", "strategy")
DATA_VARIABLE = "HISTO_DATA"
TRAINER = "pytorch_lightning.Trainer"

# Targets of sections that may leave theirs out, as they may in the published code.
DEFAULT_TARGETS = {
    "lightning.callbacks.image_logger": "ldm.models.callbacks.ImageLogger",
    "lightning.modelcheckpoint": "pytorch_lightning.callbacks.ModelCheckpoint",
}

# Parameters that hold plain settings, and where their keys are defined: {key: default}, None for a
# required one.
SETTINGS = {"ddconfig": "ldm.modules.autoencoder.DDCONFIG_KEYS"}

# Published target -> native target. A name that both code bases use stands here as well, since its
# published parameters may need translation.
_OPENAI = "ldm.modules.diffusionmodules.openaimodel"
_LOSS = "LPIPSWithDiscriminator"
LEGACY_TARGETS = {
    "ldm.models.diffusion.ddpm.LatentDiffusion": "ldm.models.diffusion.LatentDiffusion",
    "ldm.models.autoencoder.AutoencoderKL": "ldm.models.autoencoder.AutoencoderKL",
    f"{_OPENAI}.UNetModel": "ldm.modules.unet.UNetModel",
    f"{_OPENAI}.EncoderUNetModel": "ldm.modules.unet.EncoderUNetModel",
    f"ldm.modules.losses.{_LOSS}": f"ldm.modules.losses.{_LOSS}",
    f"ldm.modules.losses.contperceptual.{_LOSS}": f"ldm.modules.losses.{_LOSS}",
    "ldm.lr_scheduler.LambdaLinearScheduler": "ldm.modules.lr_schedule.LambdaLinearScheduler",
    "ldm.data.histo.HistoTrain": "ldm.data.tiles.TileFolder",
    "main.DataModuleFromConfig": "ldm.data.datamodule.DataModuleFromConfig",
    "main.ImageLogger": "ldm.models.callbacks.ImageLogger",
}

_VQ = "vector-quantised first stages are not supported; use ldm.models.autoencoder.AutoencoderKL"
_PIXELS = "diffusion in pixel space is not supported; use ldm.models.diffusion.LatentDiffusion"
_CLASSIFIER = "train it with classifier_train.py"
_WARM_UP = "not supported; use ldm.modules.lr_schedule.LambdaLinearScheduler"
UNSUPPORTED_TARGETS = {
    "ldm.models.autoencoder.VQModel": _VQ,
    "ldm.models.autoencoder.VQModelInterface": _VQ,
    "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator": _VQ,
    "ldm.models.autoencoder.IdentityFirstStage": _PIXELS,
    "ldm.models.diffusion.ddpm.DDPM": _PIXELS,
    "ldm.models.diffusion.classifier.NoisyLatentImageClassifier": _CLASSIFIER,
    "ldm.lr_scheduler.LambdaWarmUpCosineScheduler": _WARM_UP,
    "ldm.lr_scheduler.LambdaWarmUpCosineScheduler2": _WARM_UP,
}

# Trainer settings of Lightning 1, and those that another section of the configuration owns.
TRAINER_REMEDIES = {
    "callbacks": "write them under lightning.callbacks",
    "logger": "write it under lightning.logger",
    "default_root_dir": "the run folder is named by --logdir and --name",
    "gpus": "give --gpus on the command line, or lightning.trainer.devices",
    "distributed_backend": "use lightning.trainer.strategy",
    "checkpoint_callback": "use lightning.modelcheckpoint",
    "resume_from_checkpoint": "give --resume on the command line",
    "progress_bar_refresh_rate": "use lightning.trainer.enable_progress_bar",
    "weights_summary": "use lightning.trainer.enable_model_summary",
    "terminate_on_nan": "a non-finite loss always stops a run",
    "track_grad_norm": "the gradient norm is always logged",
    "amp_backend": "use lightning.trainer.precision",
    "amp_level": "use lightning.trainer.precision",
}

Problems = dict[str, str]  # dotted path -> what is wrong there and what to do

_ANYTHING = object()


@dataclass(frozen=True)
class _Inert:
    """A published parameter that means nothing here, as long as it has one of `values`."""

    values: tuple = (_ANYTHING,)
    remedy: str = "remove it"

    def covers(self, value: Any) -> bool:
        # True == 1 in Python; a flag written where a number belongs is not the inert value.
        return any(
            known is _ANYTHING
            or (known == value and isinstance(known, bool) == isinstance(value, bool))
            for known in self.values
        )


@dataclass
class _Upgrade:
    """What a translation has met on its way, for one log line and one error."""

    renamed: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    problems: Problems = field(default_factory=dict)

    def drop_inert(self, params: dict, path: str, table: Mapping[str, _Inert]) -> None:
        """Remove the names of `table` from `params`; a value that means something is a problem."""
        for name in [name for name in params if name in table]:
            value = params.pop(name)
            if table[name].covers(value):
                self.dropped.append(f"{path}.{name}")
            else:
                self.problems[f"{path}.{name}"] = (
                    f"{_shown(value)} is not supported; {table[name].remedy}"
                )


# --- Parameters of the published classes that have no counterpart, by native target --------------

_UNCONDITIONAL = (
    "the diffusion model is unconditional and classes come from classifier guidance "
    "(sample_diffusion.py --classifier); set it to"
)
_NO_TEXT = _Inert((None,), "there is no text conditioning; remove it")
_KEY = _Inert(("image",), "tiles come as `image`; set it to image")
_STRICT = _Inert((None, []), "checkpoints are loaded in full; remove it")
_UNET = {
    "dims": _Inert((2,), "only images are; set it to 2"),
    "use_fp16": _Inert((False,), "set it to False and give --precision bf16-mixed"),
    "use_spatial_transformer": _Inert((False,), "there is no text conditioning; set it to False"),
    "transformer_depth": _Inert(),  # read by the spatial transformer only
    "context_dim": _NO_TEXT,
    "n_embed": _Inert((None,), "latents are not quantised; remove it"),
    "legacy": _Inert(),  # read by the spatial transformer only
}
INERT = {
    "ldm.models.diffusion.LatentDiffusion": {
        "num_timesteps_cond": _Inert((None, 1), "set it to 1"),
        "log_every_t": _Inert(),  # logging of intermediate samples
        "cond_stage_config": _Inert(
            (None, "__is_unconditional__"), f"{_UNCONDITIONAL} __is_unconditional__"
        ),
        # How a condition would be read and fed: without effect, since there is none.
        "cond_stage_key": _Inert(),
        "concat_mode": _Inert(),
        "cond_stage_trainable": _Inert((False,), f"{_UNCONDITIONAL} False"),
        "cond_stage_forward": _NO_TEXT,
        "conditioning_key": _Inert((None,), f"{_UNCONDITIONAL} null"),
        "first_stage_key": _KEY,
        "ignore_keys": _STRICT,
        "clip_denoised": _Inert(),  # of pixel-space sampling; latents were never clipped
        "given_betas": _Inert((None,), "use beta_schedule, linear_start and linear_end"),
        "cosine_s": _Inert((0.008,), "set it to 0.008"),
        "original_elbo_weight": _Inert((0,), "set it to 0"),
        "v_posterior": _Inert((0,), "set it to 0"),
        "l_simple_weight": _Inert((1,), "set it to 1 and scale the learning rate"),
        "use_positional_encodings": _Inert((False,), "set it to False"),
        "learn_logvar": _Inert((False,), "set it to False"),
        "logvar_init": _Inert((0,), "set it to 0"),
        "load_only_unet": _Inert((False,), "set it to False"),
    },
    "ldm.models.autoencoder.AutoencoderKL": {
        "colorize_nlabels": _Inert((None,), "images have three channels; remove it"),
        "image_key": _KEY,
        "ignore_keys": _STRICT,
    },
    "ldm.modules.unet.UNetModel": _UNET,
    "ldm.modules.unet.EncoderUNetModel": {
        **_UNET,
        "num_heads_upsample": _Inert(),  # a half UNet has no up-sampling path
    },
    "ldm.modules.losses.LPIPSWithDiscriminator": {
        "use_actnorm": _Inert((False,), "set it to False"),
        "disc_conditional": _Inert(
            (False,), "the discriminator sees the image alone; set it to False"
        ),
    },
    "ldm.modules.lr_schedule.LambdaLinearScheduler": {"verbosity_interval": _Inert()},
    "ldm.data.datamodule.DataModuleFromConfig": {
        "wrap": _Inert(),  # wraps a dataset in itself
        "test": _Inert((None,), "evaluation has its own command, eval.py; remove it"),
        "predict": _Inert((None,), "sampling has its own command, sample_diffusion.py; remove it"),
        "shuffle_test_loader": _Inert(),
        "shuffle_val_dataloader": _Inert((False,), "validation keeps its order; set it to False"),
        "use_worker_init_fn": _Inert(),  # of iterable datasets
    },
    "ldm.models.callbacks.ImageLogger": {
        "clamp": _Inert(
            (True,), "images are always clamped before they are written; set it to True"
        ),
        "rescale": _Inert((True,), "images are always written in [0, 255]; set it to True"),
        "disabled": _Inert((False,), "set lightning.callbacks.image_logger=null instead"),
        "log_on_batch_idx": _Inert((False,), "steps are optimiser steps; set it to False"),
        "log_first_step": _Inert(),
        "log_images_kwargs": _Inert((None, {}), "remove it"),
    },
}
_DDCONFIG = {
    "attn_type": _Inert(("vanilla",), "set it to vanilla"),
    "use_linear_attn": _Inert((False,), "set it to False"),
    "resamp_with_conv": _Inert((True,), "set it to True"),
    "tanh_out": _Inert((False,), "set it to False"),
    "give_pre_end": _Inert((False,), "set it to False"),
}


# --- Reading -------------------------------------------------------------------------------------


def load_configs(paths: Iterable[str | os.PathLike], overrides: Iterable[str] = ()) -> DictConfig:
    """Merge YAML files left to right, then dot-list overrides; resolved, and in native names.

    A section or callback that is null (`lightning.callbacks.image_logger=null`) is left out. Where
    a later file names another `target`, the `params` of the earlier one are left out: another class
    has its own.

    Args:
        overrides: Such as `model.params.embed_dim=4` or `lightning.trainer.devices=[0,1]`; what
            follows the = is YAML.

    Raises:
        UserError: A file that is missing, not a mapping or not YAML (with its line); a malformed
            override; an interpolation that fails; published settings that are not supported, with
            every other problem that `validate_config` finds.
    """
    paths = list(paths)
    if not paths:
        raise UserError("no configuration: give at least one YAML file with --base")
    config = OmegaConf.create({})
    for path in paths:
        later = _read_yaml(path)
        kept = _without_replaced(OmegaConf.to_container(config), OmegaConf.to_container(later))
        try:
            config = OmegaConf.merge(OmegaConf.create(kept), later)
        except (OmegaConfBaseException, TypeError) as error:
            raise UserError(
                f"{path} cannot be merged with the files before it: {_first_line(error)}; "
                "a section must be a mapping in all of them"
            ) from None
    for override in overrides:
        _apply_override(config, override)
    sections = {name: section for name, section in resolve(config).items() if section is not None}
    tree, upgrade = _upgraded(sections)
    if upgrade.problems:
        raise _error({**_problems(tree), **upgrade.problems})
    return OmegaConf.create(tree)


def _without_replaced(earlier: Any, later: Any) -> Any:
    """`earlier` without the parameters of nodes whose class `later` replaces."""
    if not (isinstance(earlier, dict) and isinstance(later, dict)):
        return earlier
    old, new = (
        LEGACY_TARGETS.get(str(name), name) for name in (earlier.get("target"), later.get("target"))
    )
    if old is not None and new is not None and old != new:
        earlier = {key: value for key, value in earlier.items() if key != "params"}
    return {key: _without_replaced(value, later.get(key)) for key, value in earlier.items()}


def resolve(config: DictConfig | Mapping) -> dict:
    """The configuration as plain dicts, lists and scalars, interpolations replaced by their values.

    Raises:
        UserError: An interpolation that fails, or a value left as `???`, by its dotted path.
    """
    if not isinstance(config, Mapping | DictConfig):
        raise UserError(f"configuration {_shown(config)} must be a mapping")
    if not isinstance(config, DictConfig):
        config = OmegaConf.create(dict(config))
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = error.full_key or "configuration"
        reason = (
            _first_line(error)
            .removeprefix("KeyError raised while resolving interpolation: ")
            .strip('"')
        )
        if reason.startswith("Environment variable "):
            name = reason.split("'")[1]
            raise UserError(f"{key}: {_environment_remedy(name, key)}") from None
        if reason.startswith("Missing mandatory value"):
            raise UserError(f"{key} has no value; give it with {key}=VALUE") from None
        raise UserError(f"{key}: {reason}; write {key}=VALUE or correct the ${{...}}") from None


def _read_yaml(path: str | os.PathLike) -> DictConfig:
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


def _apply_override(config: DictConfig, override: str) -> None:
    key, equals, _ = override.partition("=")
    if not equals or not all(part.isidentifier() or part.isdigit() for part in key.split(".")):
        raise UserError(
            f"override {override!r}: write it as section.name=value, like model.params.embed_dim=4"
        )
    try:
        config.merge_with_dotlist([override])
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or _first_line(error)
        raise UserError(f"override {override!r}: the value is not valid YAML: {reason}") from None
    except (OmegaConfBaseException, ValueError, IndexError, TypeError) as error:
        raise UserError(f"override {override!r}: {_first_line(error)}") from None


# --- Translation of published configurations -----------------------------------------------------


def upgrade_config(config: DictConfig | Mapping) -> DictConfig | dict:
    """A copy in which published target and parameter names are translated to native ones.

    What means nothing here is dropped, with one log line for all; a native configuration comes back
    equal.

    Raises:
        UserError: Settings of the published code that are not supported, all together.
    """
    tree, upgrade = _upgraded(resolve(config))
    if upgrade.problems:
        raise _error(upgrade.problems)
    return OmegaConf.create(tree) if isinstance(config, DictConfig) else tree


def _upgraded(tree: dict) -> tuple[dict, _Upgrade]:
    upgrade = _Upgrade()
    tree = _upgrade_value(tree, "", upgrade)
    if upgrade.renamed or upgrade.dropped:
        parts = []
        if upgrade.renamed:
            parts.append(
                f"published names read as native ones: {', '.join(dict.fromkeys(upgrade.renamed))}"
            )
        if upgrade.dropped:
            parts.append(f"without effect here, ignored: {', '.join(upgrade.dropped)}")
        logger.info("configuration: %s", "; ".join(parts))
    return tree, upgrade


def _upgrade_value(value: Any, path: str, upgrade: _Upgrade) -> Any:
    if isinstance(value, list):
        return [_upgrade_value(item, f"{path}[{i}]", upgrade) for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    value = dict(value)
    if path in ("lightning", "lightning.callbacks"):
        value = {key: item for key, item in value.items() if item is not None}
    if path == "lightning":
        inert = _Inert(
            (False,), "set lightning.trainer.strategy=ddp_find_unused_parameters_true instead"
        )
        upgrade.drop_inert(value, path, {"find_unused_parameters": inert})
    if path in DEFAULT_TARGETS:
        value.setdefault("target", DEFAULT_TARGETS[path])
    # The node itself first: a nested node that it drops needs no translation of its own.
    if isinstance(value.get("target"), str):
        value = _upgrade_node(value, path, upgrade)
    return {
        key: item if path == "vars" else _upgrade_value(item, _join(path, key), upgrade)
        for key, item in value.items()
    }


def _upgrade_node(node: dict, path: str, upgrade: _Upgrade) -> dict:
    published = node["target"]
    if published in UNSUPPORTED_TARGETS:
        upgrade.problems[_join(path, "target")] = f"{published}: {UNSUPPORTED_TARGETS[published]}"
    if published not in LEGACY_TARGETS:
        return node
    native = LEGACY_TARGETS[published]
    if native != published:
        upgrade.renamed.append(f"{published} as {native}")
    if not isinstance(node.get("params"), dict | None):
        return {**node, "target": native}
    params = dict(node.get("params") or {})
    where = _join(path, "params")
    upgrade.drop_inert(params, where, INERT.get(native, {}))
    if published in _TRANSLATIONS:
        _TRANSLATIONS[published](params, where, upgrade)
    return {**node, "target": native, "params": params}


def _translate_diffusion(params: dict, path: str, upgrade: _Upgrade) -> None:
    # The published constructor's own defaults, which need not be ours.
    for name, value in {
        "timesteps": 1000,
        "linear_start": 1e-4,
        "linear_end": 2e-2,
        "loss_type": "l2",
    }.items():
        params.setdefault(name, value)
    # What is called "linear" there is linear in sqrt(beta), and "sqrt_linear" is linear in beta.
    schedule = params.setdefault("beta_schedule", "linear")
    params["beta_schedule"] = {"linear": "scaled_linear", "sqrt_linear": "linear"}.get(
        schedule, schedule
    )
    # scale_by_std measures the scale of the latents, which is what a scale_factor of None asks for.
    by_std, scale = params.pop("scale_by_std", False), params.pop("scale_factor", None)
    if by_std and scale not in (None, 1.0):
        upgrade.problems[f"{path}.scale_factor"] = (
            f"{_shown(scale)} contradicts scale_by_std=True, which measures it; remove one of them"
        )
    params["scale_factor"] = None if by_std else 1.0 if scale is None else scale


def _translate_autoencoder(params: dict, path: str, upgrade: _Upgrade) -> None:
    loss = params.get("lossconfig")
    if isinstance(loss, dict) and loss.get("target") == "torch.nn.Identity":
        params["lossconfig"] = None  # a first stage that is not trained
    if isinstance(params.get("ddconfig"), dict):
        params["ddconfig"] = dict(params["ddconfig"])
        upgrade.drop_inert(params["ddconfig"], f"{path}.ddconfig", _DDCONFIG)


def _translate_data(params: dict, path: str, upgrade: _Upgrade) -> None:
    if params.get("num_workers", 0) is None:
        del params["num_workers"]


def _translate_histo_train(params: dict, path: str, upgrade: _Upgrade) -> None:
    # The published class holds private paths; here an override or the environment names the folder.
    if params.get("root") is None:
        params["root"] = os.environ.get(DATA_VARIABLE) or None
        if params["root"] is None:
            upgrade.problems[f"{path}.root"] = _environment_remedy(DATA_VARIABLE, f"{path}.root")


_TRANSLATIONS: dict[str, Callable[[dict, str, _Upgrade], None]] = {
    "ldm.models.diffusion.ddpm.LatentDiffusion": _translate_diffusion,
    "ldm.models.autoencoder.AutoencoderKL": _translate_autoencoder,
    "main.DataModuleFromConfig": _translate_data,
    "ldm.data.histo.HistoTrain": _translate_histo_train,
}


# --- Checking ------------------------------------------------------------------------------------


def validate_config(config: DictConfig | Mapping) -> None:
    """Check a whole configuration against the classes that it names, before anything is built.

    Names are exact: a native class is given only what its signature spells out, so `**kwargs` there
    admits nothing. A class of another package that takes `**kwargs` is believed.

    Raises:
        UserError: Every unknown section, target or parameter (with the nearest valid name), missing
            parameter and value of the wrong type, in one message.
    """
    problems = _problems(resolve(config))
    if problems:
        raise _error(problems)


def _problems(tree: dict) -> Problems:
    problems: Problems = {}
    for section in tree:
        if section not in SECTIONS:
            problems[str(section)] = f"unknown section{_nearest(section, SECTIONS)}"
    for section in ("model", "data"):
        if not _is_node(tree.get(section)):
            problems[section] = "must be a mapping with target: and params:"
    if _is_node(tree.get("model")):
        _check_node(tree["model"], "model", problems, beside=("base_learning_rate",))
        rate = tree["model"].get("base_learning_rate")
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not rate > 0:
            problems["model.base_learning_rate"] = f"{_shown(rate)} must be a number above 0"
    if _is_node(tree.get("data")):
        _check_node(tree["data"], "data", problems)
    if tree.get("lightning") is not None:
        _check_lightning(tree["lightning"], problems)
    return problems


def _check_lightning(section: Any, problems: Problems) -> None:
    if not isinstance(section, dict):
        problems["lightning"] = f"must be a mapping of {', '.join(LIGHTNING_SECTIONS)}"
        return
    for name in section:
        if name not in LIGHTNING_SECTIONS:
            problems[f"lightning.{name}"] = f"unknown section{_nearest(name, LIGHTNING_SECTIONS)}"

    trainer = section.get("trainer") or {}
    if isinstance(trainer, dict):
        own = {name: value for name, value in trainer.items() if name not in TRAINER_REMEDIES}
        for name in trainer:
            if name in TRAINER_REMEDIES:
                remedy = f"not a setting here; {TRAINER_REMEDIES[name]}"
                problems[f"lightning.trainer.{name}"] = remedy
        _check_params(TRAINER, get_obj_from_str(TRAINER), own, "lightning.trainer", problems)
    else:
        problems["lightning.trainer"] = "must be a mapping of Trainer settings"

    callbacks = section.get("callbacks") or {}
    nodes = {f"lightning.{name}": section.get(name) for name in ("modelcheckpoint", "strategy")}
    loggers = section.get("logger")
    for i, node in enumerate(loggers if isinstance(loggers, list) else [loggers]):
        path = f"lightning.logger[{i}]" if isinstance(loggers, list) else "lightning.logger"
        if _is_node(node):
            _check_node(node, path, problems)
        elif not (node in LOGGERS or (node is None and loggers is None)):
            problems[path] = (
                f"{_shown(node)} must be {' or '.join(LOGGERS)}, a mapping with target: and "
                "params:, or a list of such; the CSV files are always written"
            )
    keep = _pop_keep_last(nodes)
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        problems["lightning.modelcheckpoint.params.keep_last"] = (
            f"{_shown(keep)} must be a whole number above 0"
        )
    if isinstance(callbacks, dict):
        nodes |= {f"lightning.callbacks.{name}": node for name, node in callbacks.items()}
    else:
        problems["lightning.callbacks"] = "must be a mapping from a name to target: and params:"
    for path, node in nodes.items():
        if _is_node(node):
            _check_node(node, path, problems)
        elif node is not None:
            problems[path] = "must be null or a mapping with target: and params:"


def _pop_keep_last(nodes: dict[str, Any]) -> Any:
    """Take `keep_last` out of the node of checkpoints: ours, no parameter of Lightning's class."""
    node = nodes["lightning.modelcheckpoint"]
    params = node.get("params") if isinstance(node, dict) else None
    if not isinstance(params, dict) or "keep_last" not in params:
        return None
    rest = {name: value for name, value in params.items() if name != "keep_last"}
    nodes["lightning.modelcheckpoint"] = {**node, "params": rest}
    return params["keep_last"]


def _check_node(
    node: dict,
    path: str,
    problems: Problems,
    beside: Sequence[str] = (),
    supplied: AbstractSet[str] = frozenset(),
) -> None:
    """Collect what is wrong with one node and those within it.

    Args:
        beside: Keys that may stand beside `target` and `params`.
        supplied: Parameters that the caller passes itself.
    """
    allowed = ("target", "params", *beside)
    for key in node:
        if key not in allowed:
            problems[_join(path, key)] = f"unknown name{_nearest(key, allowed)}"
    where = _join(path, "params")
    params = {} if node.get("params") is None else node["params"]
    try:
        constructor = get_obj_from_str(node["target"])
    except UserError as error:
        problems[_join(path, "target")] = str(error)
        constructor = None
    if not isinstance(params, dict):
        problems[where] = f"{_shown(params)} must be a mapping"
    elif callable(constructor):
        _check_params(node["target"], constructor, params, where, problems, supplied)
    elif constructor is not None:
        problems[_join(path, "target")] = f"{node['target']} is no class; name one"
    _check_within(params, where, problems)


def _check_within(value: Any, path: str, problems: Problems) -> None:
    """Check the nodes anywhere inside plain containers."""
    if isinstance(value, dict):
        items = ((_join(path, key), item) for key, item in value.items())
    elif isinstance(value, list):
        items = ((f"{path}[{i}]", item) for i, item in enumerate(value))
    else:
        return
    for where, item in items:
        if _is_node(item):
            _check_node(item, where, problems)
        else:
            _check_within(item, where, problems)


def _check_params(
    name: str,
    constructor: Callable,
    params: dict,
    path: str,
    problems: Problems,
    supplied: AbstractSet[str] = frozenset(),
) -> None:
    try:
        signature = list(inspect.signature(constructor).parameters.values())
    except ValueError:  # built in, without a signature: there is nothing to compare with
        return
    named = {p.name: p for p in signature if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = not _is_own(name) and any(p.kind is p.VAR_KEYWORD for p in signature)
    types_of = _type_hints(constructor)
    for key, value in params.items():
        where = _join(path, key)
        if key not in named:
            if not takes_any:
                problems[where] = f"unknown name of {name}{_nearest(key, named)}"
        elif not _fits(value, types_of.get(key, Any)):
            wanted = inspect.formatannotation(types_of[key]).replace("typing.", "")
            problems[where] = f"{_shown(value)} must be {wanted.replace('collections.abc.', '')}"
        elif key in SETTINGS and isinstance(value, dict):
            _check_settings(value, get_obj_from_str(SETTINGS[key]), where, problems)
    required = [key for key, p in named.items() if p.default is p.empty]
    missing = [key for key in required if key not in params and key not in supplied]
    if missing:
        problems[path] = f"{name} also needs {', '.join(missing)}"


def _check_settings(
    settings: dict, known: Mapping[str, Any], path: str, problems: Problems
) -> None:
    for key in settings:
        if key not in known:
            problems[_join(path, key)] = f"unknown name{_nearest(key, known)}"
    missing = [key for key, default in known.items() if default is None and key not in settings]
    if missing:
        problems[path] = f"also needs {', '.join(missing)}"


def _type_hints(constructor: Callable) -> dict[str, Any]:
    function = constructor.__init__ if inspect.isclass(constructor) else constructor
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):  # names that only a type checker imports
        return {}


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a YAML value can be meant for an annotation; True where that says nothing of YAML."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in args)
    if origin is typing.Literal:
        return value in args
    kind = origin or annotation
    if kind in (None, types.NoneType):
        return value is None
    if kind in (bool, str):
        return isinstance(value, kind)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind in (dict, Mapping):
        return isinstance(value, dict)
    if kind in (list, tuple, Sequence, Iterable):
        # A fixed-length tuple is left to the class, which can say what its places mean.
        item = args[0] if args and (kind is not tuple or args[1:] == (...,)) else Any
        return isinstance(value, list) and all(_fits(element, item) for element in value)
    if kind in (Path, os.PathLike):
        return isinstance(value, str)
    return (
        annotation is Any
        or not inspect.isclass(kind)
        or not isinstance(value, str | int | float | list)
    )


# --- Building ------------------------------------------------------------------------------------


def instantiate_from_config(config: DictConfig | Mapping, **extra: Any) -> Any:
    """The object that a `{target, params}` node stands for: the one place that builds from a node.

    Nodes within `params` are checked here and passed on plain, for the object to build.

    Args:
        extra: Further arguments of the constructor; they take precedence over `params`.

    Raises:
        UserError: Names that do not exist, here or in a node within, all together.
    """
    node = resolve(config)
    if not _is_node(node):
        raise UserError(
            f"configuration with keys {sorted(map(str, node))} has no target: name the class there"
        )
    node, upgrade = _upgraded(node)
    problems: Problems = {}
    _check_node(node, "", problems, beside=("base_learning_rate",), supplied=extra.keys())
    problems |= upgrade.problems
    if problems:
        raise _error(problems, node["target"])
    return get_obj_from_str(node["target"])(**{**(node.get("params") or {}), **extra})


def get_obj_from_str(name: str) -> Any:
    """The object that a dotted name `package.module.name` stands for.

    Raises:
        UserError: No such module or name in it (with the nearest one), or a package that is not
            installed.
    """
    module_name, _, attribute = name.rpartition(".") if isinstance(name, str) else ("", "", "")
    if not module_name or not attribute:
        raise UserError(
            f"target {_shown(name)} must be a dotted name like ldm.models.autoencoder.AutoencoderKL"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            known = {*LEGACY_TARGETS, *LEGACY_TARGETS.values()}
            raise UserError(f"unknown target {name}{_nearest(name, known, listed=False)}") from None
        raise UserError(
            f"target {name} needs the package {error.name}, which is not installed"
        ) from None
    except (ValueError, TypeError):  # empty or relative parts
        raise UserError(f"target {_shown(name)} is not a dotted name") from None
    value = getattr(module, attribute, None)
    # What a native module has only imported is no name of its own.
    foreign = _is_own(name) and not _is_own(getattr(value, "__module__", name))
    if value is None or foreign or inspect.ismodule(value):
        own = [
            key
            for key, item in vars(module).items()
            if getattr(item, "__module__", "") == module_name
        ]
        raise UserError(f"unknown target {name}{_nearest(attribute, own)}")
    return value


def require_own_targets(config: DictConfig | Mapping, source: str | os.PathLike) -> None:
    """Refuse any target outside this package, for a configuration that came with someone's weights.

    Raises:
        UserError: Naming `source` and the target. Building it could run any code on this machine.
    """
    for path, target in _targets(resolve(config), ""):
        if not _is_own(str(target)):
            raise UserError(
                f"{source}: {path}={_shown(target)} is not a class of this package, "
                "so it is not built; use a checkpoint that main.py wrote"
            )


def _targets(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        if "target" in value:
            yield _join(path, "target"), value["target"]
        for key, item in value.items():
            yield from _targets(item, _join(path, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _targets(item, f"{path}[{i}]")


# --- Wording -------------------------------------------------------------------------------------


def _is_node(value: Any) -> bool:
    return isinstance(value, dict) and "target" in value


def _is_own(name: str) -> bool:
    return name.split(".", 1)[0] == __name__.split(".", 1)[0]


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].strip()


def _nearest(name: Any, known: Iterable[str], listed: bool = True) -> str:
    """` (did you mean X?)`, or else what is allowed."""
    known = sorted(known)
    matches = difflib.get_close_matches(str(name), known, n=1)
    if matches:
        return f" (did you mean {matches[0]}?)"
    if not known:
        return " (there are none)"
    return (
        f" (allowed: {', '.join(known)})"
        if listed
        else "; check the spelling, or install its package"
    )


def _environment_remedy(variable: str, key: str) -> str:
    return (
        f"the environment variable {variable} is not set; export {variable}=DIR or give {key}=DIR"
    )


def _error(problems: Problems, subject: str = "configuration") -> UserError:
    lines = [f"{path}: {text}" for path, text in problems.items()]
    if len(lines) == 1:
        return UserError(f"{subject}: {lines[0]}")
    return UserError(f"{subject}: {len(lines)} problems: {' | '.join(lines)}")
