"""Import of checkpoints written by latent diffusion and by the code published with the method.

There are three kinds of files (Rombach et al. 2022; Ye et al. 2023), told by the names of their
weights:

    autoencoder   encoder.*, decoder.*, quant_conv.*, post_quant_conv.*, and loss.* of training
    diffusion     model.diffusion_model.* (the UNet), model_ema.* (its average; names without dots),
                  first_stage_model.* (the autoencoder), scale_factor, betas and other tables
    classifier    the bare weights of a half UNet, `model_010000.pt`

Prefixes of compiled, distributed and flattened models are left out (`_orig_mod.`, `module.`,
`state_dict.`), and averages that stand in an entry of their own (`ema`, `params_ema`) are the
weights that are read.

Such a file does not describe its network, so the architecture comes from a configuration, native or
published.
"""

import logging
import math
import pickle
import re
import types
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.checkpoint import (
    DAMAGED,
    KEY,
    load_model,
    load_tensors,
    require_finite,
    write_checkpoint,
)
from ldm.cli import existing_path
from ldm.config import read_yaml, upgrade_config
from ldm.errors import UserError
from ldm.files import digest_of, file_sha256
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.base import HistoModule
from ldm.models.classifier import LatentSpace, NoisyLatentClassifier, network_config, process_params
from ldm.models.diffusion import LatentDiffusion

log = logging.getLogger(__name__)

# Files and training settings in a published model node, which importing weights does not need.
UNNEEDED = ("ckpt_path", "first_stage_ckpt", "lossconfig", "scheduler_config", "monitor")
BETAS_TOLERANCE = 1e-4  # relative; tables are stored in float32, other schedules differ by more
SCALE_TOLERANCE = 1e-5  # relative
# Entries that hold the weights; those of averages come first.
ENTRIES = ("ema", "model_ema", "params_ema", "state_dict_ema", "ema_state_dict")
ENTRIES += ("state_dict", "model", "params")
UNET, AVERAGE = "model.diffusion_model.", "model_ema.diffusion_model"

State = dict[str, torch.Tensor]


# --- Reading -------------------------------------------------------------------------------------


class _Placeholder:
    """Takes the place of an object that a pickle asks for, whose class is never called."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Placeholder":
        return super().__new__(cls)

    def _ignore(self, *args: Any, **kwargs: Any) -> None:
        """Take whatever a pickle gives the object."""

    __init__ = __setstate__ = __setitem__ = append = extend = _ignore


# What a pickle may call: these rebuild tensors. torch itself resolves the names of storage types.
ALLOWED = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    *(("torch", name) for name in ("float16", "bfloat16", "float32", "float64", "int64")),
}


def _unpickling_module(met: set[str]) -> types.ModuleType:
    """A `pickle_module` for `torch.load` that builds only `ALLOWED`; other names go to `met`."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in ALLOWED:
                return super().find_class(module, name)
            met.add(f"{module}.{name}")
            return type(name.rpartition(".")[2], (_Placeholder,), {})

    module = types.ModuleType("unpickling")
    module.Unpickler = Unpickler
    module.load = lambda file, **options: Unpickler(file, **options).load()
    return module


def read_foreign(path: str | Path, allow_pickle: bool = False) -> tuple[State, dict[str, Any]]:
    """Read the weights in a file of other code onto the CPU, and the plain values beside them.

    Args:
        allow_pickle: Also read files that hold other objects beside tensors and plain data, as
            those of Lightning 1 do (callbacks, settings). Such objects are never built.

    Raises:
        UserError: The file does not exist, is not a checkpoint, is one of this toolkit already, or
            needs `allow_pickle`.
    """
    path = existing_path(path, "FILE", "file")
    payload = read_payload(path, allow_pickle)
    if not isinstance(payload, dict):
        raise UserError(f"{path} holds a {type(payload).__name__}; needed is a state dictionary")
    if KEY in payload:
        raise UserError(f"{path} was written by this toolkit: it can be used as it is")
    state: State = {}
    for entry in (*ENTRIES, None):
        inner = payload if entry is None else payload.get(entry)
        found = inner.items() if isinstance(inner, dict) else ()
        state = {_plain_name(k): v for k, v in found if isinstance(v, torch.Tensor)}
        if state:
            break
    if not state:
        raise UserError(
            f"{path} holds no weights by name, only {', '.join(map(str, list(payload)[:8]))}; give "
            "a checkpoint with a state_dict"
        )
    if entry in ENTRIES[:-3]:
        log.info("%s: averaged weights, those of its entry %r", path, entry)
    beside = {k: v for k, v in payload.items() if isinstance(v, int | float | str)}
    return state, beside


def _plain_name(name: str) -> str:
    """The name of a weight without what compiling, distributing and flattening put before it."""
    name = re.sub(r"_orig_mod\.?", "", str(name))
    return name.removeprefix("state_dict.").removeprefix("module.")


def read_payload(path: Path, allow_pickle: bool = False) -> Any:
    """Read what torch or safetensors saved in a file, see `read_foreign`."""
    try:
        if path.suffix != ".safetensors":
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Words of torch for a readable file that asks for other classes.
        words = ("Unsupported global", "Unsupported class", "GLOBAL")
        if not any(word in str(error) for word in words):
            load_tensors(path, "FILE")  # says what is wrong with it
        if not allow_pickle:
            raise UserError(
                f"{path} holds pickled objects beside its weights, and a pickle may ask for any "
                "code to be run; if you know where it comes from, set allow_pickle, which reads "
                "the weights and leaves the objects unbuilt"
            ) from None
        return _load_without_objects(path)
    except DAMAGED:
        pass
    return load_tensors(path, "FILE")  # or say what is wrong with it


def _load_without_objects(path: Path) -> Any:
    met: set[str] = set()
    try:
        payload = torch.load(
            path, map_location="cpu", weights_only=False, pickle_module=_unpickling_module(met)
        )
    except DAMAGED as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read even with allow_pickle ({reason[:120]})") from None
    log.warning(
        "%s holds pickled objects, which could run any code if they were built; they are not: %s",
        path,
        ", ".join(sorted(met)),
    )
    return payload


def read_model_node(path: str | Path, kind: str) -> dict[str, Any]:
    """Read the `model` section of a configuration, native or published, in native names.

    For an autoencoder it is its part `first_stage_config`, if there is one, whatever the rest asks
    for. Settings of training (files, loss, learning-rate schedule) are dropped and the data section
    is not read: importing needs neither, and both may refer to files that this machine does not
    have.

    Raises:
        UserError: The file has no model section, or a setting that is not supported.
    """
    config = read_yaml(path)
    node = config.get("model")
    if not OmegaConf.is_dict(node) or "target" not in node:
        raise UserError(f"config: {path} has no model: section with a target:")
    params = node.get("params") or {}
    if kind == "autoencoder" and params.get("first_stage_config"):
        node = params.first_stage_config
        params = node.get("params") or {}
    for part in (params, (params.get("first_stage_config") or {}).get("params") or {}):
        for name in UNNEEDED:
            if name in list(part):  # without resolving it
                del part[name]
    try:
        node = OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"config: {path}: {str(error).splitlines()[0]}") from None
    return upgrade_config({"model": node})["model"]


# --- Matching names ------------------------------------------------------------------------------


def _grouped(names: list[str]) -> str:
    """Shorten a list of names by their part before the first dot: `loss.* (64), betas`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.split(".", 1)[0], []).append(name)
    shown = [f"{g}.* ({len(n)})" if len(n) > 1 else n[0] for g, n in sorted(groups.items())]
    return ", ".join(shown) or "none"


class Matcher:
    """Assigns the weights of a foreign file to networks, and keeps count of them.

    Attributes:
        used, unused, missing: Names of weights, as in the file.
        notes: Remarks for the user.
    """

    def __init__(self, state: State):
        self.state = state
        self.unused = sorted(state)
        self.used: list[str] = []
        self.missing: list[str] = []
        self.notes: list[str] = []

    def lines(self) -> list[str]:
        """Lines for the user, with the names in groups."""
        return [
            f"used         {len(self.used)} tensors",
            f"not used     {_grouped(self.unused)}",
            f"missing      {_grouped(self.missing)}",
            *(f"note         {note}" for note in self.notes),
        ]

    def take(self, name: str) -> torch.Tensor | None:
        """The tensor of that name, marked as used; None if the file does not have it."""
        if name not in self.state:
            return None
        if name in self.unused:
            self.unused.remove(name)
            self.used.append(name)
        return self.state[name]

    def fill(self, module: torch.nn.Module, names: dict[str, str], where: str) -> None:
        """Load a network from the file's names of its weights.

        Args:
            names: Name in `module` -> name in the file.

        Raises:
            UserError: A weight has another shape (the configuration describes another network), or
                is not finite.
        """
        own, wrong, found = module.state_dict(), [], {}
        for name, theirs in names.items():
            value = self.take(theirs)
            if value is None:
                self.missing.append(theirs)
            elif value.shape != own[name].shape:
                wrong.append(f"{theirs} is {tuple(value.shape)}, here {tuple(own[name].shape)}")
            else:
                found[name] = value
        if wrong:
            raise UserError(
                f"{where}: {len(wrong)} weights have other shapes than the configuration says "
                f"({'; '.join(wrong[:3])}); give the configuration that the file was trained with"
            )
        require_finite(((names[name], value) for name, value in found.items()), where)
        module.load_state_dict({**own, **found})


def _require_target(node: dict[str, Any], name: str) -> None:
    if node["target"].rpartition(".")[2] != name:
        raise UserError(f"config: model.target is {node['target']}; needed is a {name}")


def _identical_names(module: torch.nn.Module, prefix: str = "") -> dict[str, str]:
    return {name: prefix + name for name in module.state_dict()}


# --- The three kinds -----------------------------------------------------------------------------


def import_autoencoder(state: State, node: dict[str, Any]) -> tuple[HistoModule, Matcher]:
    """Build an autoencoder from its own file, or from the first stage in a diffusion model's file.

    Args:
        state: From `read_foreign`.
        node: From `read_model_node`.
    """
    params = node.get("params") or {}
    wanted = {k: params[k] for k in ("ddconfig", "embed_dim") if k in params}
    if len(wanted) < 2:
        raise UserError("config: the model section describes no autoencoder (ddconfig, embed_dim)")
    module = AutoencoderKL(**wanted)
    prefix = "first_stage_model." if any(k.startswith("first_stage_model.") for k in state) else ""
    matcher = Matcher(state)
    matcher.fill(module.net, _identical_names(module.net, prefix), "autoencoder")
    return module, matcher


def import_diffusion(
    state: State,
    node: dict[str, Any],
    autoencoder: str | None = None,
    scale_factor: float | None = None,
) -> tuple[HistoModule, Matcher]:
    """Build an unconditional latent diffusion model.

    Args:
        state, node: As for `import_autoencoder`.
        autoencoder: Autoencoder checkpoint of this toolkit, for a file without first stage.
        scale_factor: Latent scale, for a file that does not hold it.

    Raises:
        UserError: The weights have other shapes or another noise schedule than the configuration
            says; or the latent scale or the autoencoder is missing or given twice and different.
    """
    _require_target(node, "LatentDiffusion")
    matcher = Matcher(state)
    params = dict(node.get("params") or {})
    stated = params.pop("scale_factor", None)
    other = None
    if autoencoder is not None:
        other = load_model(autoencoder, "autoencoder", what="autoencoder")
    in_file = any(k.startswith("first_stage_model.") for k in state)
    params["first_stage_config"] = _first_stage_config(params, in_file, other)
    has_unet, has_average = (any(k.startswith(p) for k in state) for p in (UNET, AVERAGE))
    params["use_ema"] = has_average and has_unet
    if has_average and not has_unet:
        matcher.notes.append("only averaged weights (model_ema.*): they are the UNet's")
    elif not has_average:
        matcher.notes.append("no averaged weights (model_ema.*): samples come from the UNet")
    scale = _scale(matcher, stated, scale_factor)
    module = LatentDiffusion(**params, scale_factor=scale)
    net = module.first_stage_model
    if in_file:
        matcher.fill(net, _identical_names(net, "first_stage_model."), "first stage")
        if other is not None and other.net.fingerprint() != net.fingerprint():
            raise UserError(
                f"autoencoder: {autoencoder} is not the autoencoder in the file; leave it out"
            )
    else:
        net.load_state_dict(other.net.state_dict())
    names = _identical_names(module.unet, UNET if has_unet else "")
    if has_average and not has_unet:
        names = _average_names(module.unet)
    matcher.fill(module.unet, names, "UNet")
    if params["use_ema"]:
        _fill_average(matcher, module)
    _check_schedule(matcher, module.schedule)
    module.scale_factor = torch.tensor(scale)
    return module, matcher


def _first_stage_config(
    params: dict[str, Any], in_file: bool, other: HistoModule | None
) -> dict[str, Any]:
    """The configuration of the autoencoder: that of the file's own, or of `other`.

    Args:
        params: Of the diffusion model's configuration.
        in_file: Whether the file holds an autoencoder.
        other: The autoencoder that the user names, if any.
    """
    described = params.get("first_stage_config") or {}
    if in_file and described.get("params"):
        return described
    if other is not None:
        return other.rebuild_config()
    if in_file:
        raise UserError(
            "config: model.params.first_stage_config does not describe the autoencoder in the "
            "file; add its ddconfig and embed_dim, or name an autoencoder checkpoint"
        )
    raise UserError(
        "the file holds no autoencoder (first_stage_model.*); import that first and name it as "
        "autoencoder"
    )


def _average_names(unet: torch.nn.Module) -> dict[str, str]:
    return {name: AVERAGE + name.replace(".", "") for name in unet.state_dict()}


def _fill_average(matcher: Matcher, module: HistoModule) -> None:
    """Fill the average of the UNet's weights, its count of updates and its decay."""
    ema = module.ema
    matcher.fill(ema.net, _average_names(ema.net), "averaged UNet")
    updates, decay = matcher.take("model_ema.num_updates"), matcher.take("model_ema.decay")
    if updates is not None and math.isfinite(updates):
        ema.num_updates.fill_(int(updates))
    if decay is not None and 0 <= round(float(decay), 6) < 1:
        module.ema_decay = ema.decay = round(float(decay), 6)
    elif decay is not None:  # 0.9999 in float16
        note = f"model_ema.decay is {float(decay):g}: {ema.decay:g} of the configuration is kept"
        matcher.notes.append(note)


def _tolerance(stored: torch.Tensor, least: float) -> float:
    """Relative tolerance for numbers that a file stores, perhaps in half precision."""
    return max(least, 2 * torch.finfo(stored.dtype).eps) if stored.is_floating_point() else least


def _scale(matcher: Matcher, stated: float | None, given: float | None) -> float:
    """The latent scale: from the file, as given, or from the configuration; they must agree."""
    stored = matcher.take("scale_factor")
    if isinstance(stated, list) or (stored is not None and stored.numel() != 1):
        raise UserError("a latent scale for each channel is not imported; give a single number")
    if stored is not None:
        if not 0 < float(stored) < math.inf:
            raise UserError(f"the file's scale_factor={float(stored)} must be positive and finite")
        tolerance = _tolerance(stored, SCALE_TOLERANCE)
        said = {"scale_factor": given, "config: model.params.scale_factor": stated}
        said = {name: value for name, value in said.items() if value is not None}
        if stated == 1 and float(stored) != 1:
            # What a published configuration without a scale means; the file has a measured one.
            del said["config: model.params.scale_factor"]
            matcher.notes.append(f"scale_factor {float(stored):.6g} from the file")
        for name, value in said.items():
            if abs(float(stored) - value) > tolerance * abs(value):
                raise UserError(
                    f"{name}={value}: the file holds {float(stored):.6g}; leave it out, or give "
                    "the file's"
                )
        # What is said has all its digits.
        rounded = tolerance > SCALE_TOLERANCE
        return float(next(iter(said.values()))) if said and rounded else float(stored)
    if given is not None:
        return given
    if stated is None:
        raise UserError(
            "the file holds no scale_factor, and the configuration says none: give scale_factor "
            "(1 / standard deviation of the latents that it was trained on)"
        )
    matcher.notes.append(f"scale_factor {stated} from the configuration")
    return float(stated)


def _check_schedule(matcher: Matcher, schedule) -> None:
    """Compare the file's noise schedule with the configuration's."""
    known = {"betas": schedule.betas, "alphas_cumprod": schedule.alphas_cumprod}
    seen = False
    for name, ours in known.items():
        theirs = matcher.take(name)
        if theirs is None:
            continue
        seen = True
        tolerance, theirs = _tolerance(theirs, BETAS_TOLERANCE), theirs.double()
        if theirs.shape != ours.shape or not torch.allclose(
            theirs, ours, rtol=tolerance, atol=1e-7
        ):
            raise UserError(
                f"the file's noise schedule is not the configuration's: {name} goes from "
                f"{theirs[0]:.6g} to {theirs[-1]:.6g} in {len(theirs)} steps there, from "
                f"{ours[0]:.6g} to {ours[-1]:.6g} in {len(ours)} here; correct timesteps, "
                "beta_schedule, linear_start and linear_end in the configuration"
            )
    if not seen:
        matcher.notes.append("no table of betas to compare the schedule with")


def import_classifier(
    state: State,
    first_stage: str,
    classes: list[str],
    node: dict[str, Any] | None = None,
    scale_factor: float | None = None,
    noised: bool = False,
) -> tuple[HistoModule, Matcher]:
    """Build a noisy-latent classifier.

    Args:
        state: From `read_foreign`.
        first_stage: Checkpoint of the diffusion model that is guided, or of its autoencoder
            (with `scale_factor`), of this toolkit.
        classes: Names, in the order of the classifier's outputs.
        node: `EncoderUNetModel` with its parameters; None for the published classifier's.
        noised: Whether it was trained on noisy latents; the published code trains at t = 0.
    """
    space = LatentSpace.load(first_stage, what="autoencoder")
    scale = scale_factor if space.scale_factor is None else space.scale_factor
    if scale is None:
        raise UserError(
            f"autoencoder: {first_stage} holds no latent scale; give the diffusion checkpoint, "
            "or a scale_factor"
        )
    if node is not None:
        _require_target(node, "EncoderUNetModel")
    net = (
        network_config(space.first_stage, len(classes))
        if node is None
        else {"target": node["target"], "params": node["params"]}
    )
    if net["params"]["out_channels"] != len(classes):
        raise UserError(
            f"classes: {len(classes)} names, but the configuration says "
            f"{net['params']['out_channels']} outputs"
        )
    outputs = {k: len(v) for k, v in state.items() if k in ("out.2.c_proj.bias", "out.3.bias")}
    for name, count in outputs.items():
        if count != len(classes):
            raise UserError(f"classes: {len(classes)} names, the file has {count} outputs ({name})")
    module = NoisyLatentClassifier(
        net_config=net,
        autoencoder_fingerprint=space.first_stage.fingerprint(),
        scale_factor=scale,
        **process_params(space.schedule),
        noised=noised,
        first_stage=space.first_stage,
    )
    module.classes = list(classes)
    matcher = Matcher(state)
    matcher.fill(module.net, _identical_names(module.net), "classifier")
    return module, matcher


def write_imported(
    module: HistoModule, matcher: Matcher, source: Path, out: Path, beside: dict[str, Any]
) -> None:
    """Write the imported model as a checkpoint that records its source file."""
    payload: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(payload)
    files = [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.is_file())
    digests = [file_sha256(file) for file in files]
    payload[KEY]["source"] = {
        "file": source.name,
        "sha256": digests[0] if source.is_file() else digest_of(digests),
        "unused": matcher.unused,
        "missing": matcher.missing,
    }
    payload |= {k: v for k, v in beside.items() if k in ("epoch", "global_step")}
    write_checkpoint(out, payload)
