"""Checkpoints of other code, turned into ours: latent diffusion's and the published method's.

Three kinds of files (Rombach et al. 2022; Ye et al. 2023), by the names of their weights:

    autoencoder   encoder.*, decoder.*, quant_conv.*, post_quant_conv.*, and loss.* of training
    diffusion     model.diffusion_model.* (the UNet), model_ema.* (its average; names without dots),
                  first_stage_model.* (the autoencoder), scale_factor, betas and other tables
    classifier    the bare weights of a half UNet, `model_010000.pt`

Such files know no architecture: it comes from a configuration, native or published.
"""

import logging
import pickle
import types
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli import existing_path
from ldm.errors import UserError

if TYPE_CHECKING:
    import torch

    from ldm.models.base import HistoModule

log = logging.getLogger(__name__)

# Of a published model node: files and training settings, which importing weights does not need.
UNNEEDED = ("ckpt_path", "first_stage_ckpt", "lossconfig", "scheduler_config", "monitor")
BETAS_TOLERANCE = 1e-4  # relative; tables are stored in float32, other schedules differ by more

State = dict[str, "torch.Tensor"]


# --- Reading -------------------------------------------------------------------------------------


class _Unbuilt:
    """Stands where a pickle asks for an object of some class, which is not built."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Unbuilt":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Iterable[Any]) -> None:
        pass


# What a pickle may call: tensors are rebuilt by these. Names of types of storage, torch looks up.
ALLOWED = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    *(("torch", name) for name in ("float16", "bfloat16", "float32", "float64", "int64")),
}


def _unpickling_module(met: set[str]) -> types.ModuleType:
    """What `torch.load` takes for `pickle`: builds what is `ALLOWED`, notes the rest in `met`."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in ALLOWED:
                return super().find_class(module, name)
            met.add(f"{module}.{name}")
            return type(name.rpartition(".")[2], (_Unbuilt,), {})

    module = types.ModuleType("unpickling")
    module.Unpickler = Unpickler
    module.load = lambda file, **options: Unpickler(file, **options).load()
    return module


def read_foreign(path: str | Path, allow_pickle: bool = False) -> tuple[State, dict[str, Any]]:
    """The weights in a file of other code, on the CPU, and the plain values beside them.

    Args:
        allow_pickle: Also read files that hold other objects than tensors and plain data (those of
            Lightning 1 do: callbacks, settings). The objects are not built, whatever they are.

    Raises:
        UserError: No such file, no checkpoint, a pickle without `allow_pickle`, one of ours.
    """
    import torch

    from ldm.checkpoint import KEY, load_tensors

    path = existing_path(path, "FILE", "file")
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not _is_pickle_of_more(error):
            load_tensors(path, "FILE")  # says what is wrong with it
        if not allow_pickle:
            raise UserError(
                f"{path} holds pickled objects beside its weights, and a pickle may ask for any "
                "code to be run; if you know where it comes from, give --allow_pickle, which reads "
                "the weights and leaves the objects unbuilt"
            ) from None
        payload = _load_without_objects(path)
    except (RuntimeError, EOFError, ValueError, LookupError):
        payload = load_tensors(path, "FILE")
    if not isinstance(payload, dict):
        raise UserError(f"{path} holds a {type(payload).__name__}; needed is a state dictionary")
    if KEY in payload:
        raise UserError(f"{path} was written by this toolkit: it can be used as it is")
    inner = next(
        (payload[k] for k in ("state_dict", "model") if isinstance(payload.get(k), dict)), payload
    )
    state = {k.removeprefix("module."): v for k, v in inner.items() if isinstance(v, torch.Tensor)}
    if not state:
        raise UserError(f"{path} holds no weights by name; give a checkpoint with a state_dict")
    beside = {k: v for k, v in payload.items() if isinstance(v, int | float | str)}
    return state, beside


def _is_pickle_of_more(error: pickle.UnpicklingError) -> bool:
    # What weights_only says of a file that would be read, were it not for what it asks to call.
    return any(word in str(error) for word in ("Unsupported global", "Unsupported class", "GLOBAL"))


def _load_without_objects(path: Path) -> Any:
    import torch

    met: set[str] = set()
    try:
        payload = torch.load(
            path, map_location="cpu", weights_only=False, pickle_module=_unpickling_module(met)
        )
    except (pickle.UnpicklingError, RuntimeError, TypeError, AttributeError, EOFError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} cannot be read even with --allow_pickle ({reason[:120]})"
        ) from None
    log.warning(
        "%s holds pickled objects, which could run any code if they were built; they are not: %s",
        path,
        ", ".join(sorted(met)),
    )
    return payload


def read_model_node(path: str | Path) -> dict[str, Any]:
    """The `model` section of a configuration, native or published, in native names.

    Of training (files, loss, schedule of the learning rate) nothing is kept, and the data section
    is not looked at: neither is needed here, and both may ask for what this machine does not have.

    Raises:
        UserError: Not a configuration with a model section, or settings that are not supported.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from ldm.config import _read_yaml, upgrade_config

    config = _read_yaml(path)
    node = config.get("model")
    if not OmegaConf.is_dict(node) or "target" not in node:
        raise UserError(f"--config: {path} has no model: section with a target:")
    params = node.get("params") or {}
    for part in (params, (params.get("first_stage_config") or {}).get("params") or {}):
        for name in UNNEEDED:
            if name in list(part):  # without resolving it
                del part[name]
    try:
        node = OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"--config: {path}: {str(error).splitlines()[0]}") from None
    return upgrade_config({"model": node})["model"]


# --- Matching names ------------------------------------------------------------------------------


@dataclass
class Report:
    """What became of the weights of a file: names on the file's side, and ours that it lacks."""

    used: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For people: names in groups."""
        return [
            f"used         {len(self.used)} tensors",
            f"not used     {_grouped(self.unused)}",
            f"missing      {_grouped(self.missing)}",
            *(f"note         {note}" for note in self.notes),
        ]


def _grouped(names: list[str]) -> str:
    """`loss.* (64), betas`: by the part before the first dot."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.split(".", 1)[0], []).append(name)
    shown = [f"{g}.* ({len(n)})" if len(n) > 1 else n[0] for g, n in sorted(groups.items())]
    return ", ".join(shown) or "none"


class _Matcher:
    """Takes weights out of a foreign state, one network at a time."""

    def __init__(self, state: State):
        self.state = state
        self.report = Report(unused=sorted(state))

    def take(self, name: str) -> "torch.Tensor | None":
        if name not in self.state:
            return None
        if name in self.report.unused:
            self.report.unused.remove(name)
            self.report.used.append(name)
        return self.state[name]

    def fill(self, module: "torch.nn.Module", names: dict[str, str], where: str) -> None:
        """Load a network from the file's names of its weights.

        Args:
            names: Name in `module` -> name in the file.

        Raises:
            UserError: A weight of another shape: the configuration describes another network.
        """
        own, wrong, found = module.state_dict(), [], {}
        for name, theirs in names.items():
            value = self.take(theirs)
            if value is None:
                self.report.missing.append(theirs)
            elif value.shape != own[name].shape:
                wrong.append(f"{theirs} is {tuple(value.shape)}, here {tuple(own[name].shape)}")
            else:
                found[name] = value
        if wrong:
            raise UserError(
                f"{where}: {len(wrong)} weights have other shapes than --config says "
                f"({'; '.join(wrong[:3])}); give the configuration that the file was trained with"
            )
        module.load_state_dict({**own, **found})


def _require_target(node: dict[str, Any], name: str) -> None:
    if node["target"].rpartition(".")[2] != name:
        raise UserError(f"--config: model.target is {node['target']}; needed is a {name}")


def _same(module: "torch.nn.Module", prefix: str = "") -> dict[str, str]:
    return {name: prefix + name for name in module.state_dict()}


# --- The three kinds -----------------------------------------------------------------------------


def import_autoencoder(state: State, node: dict[str, Any]) -> "tuple[HistoModule, Report]":
    """An autoencoder from a file of one, or from the first stage in a diffusion model's file.

    Args:
        state: From `read_foreign`.
        node: From `read_model_node`: an autoencoder's, or a diffusion model's.
    """
    from ldm.models.autoencoder import AutoencoderKL

    params = node.get("params") or {}
    node = params.get("first_stage_config") or node
    params = node.get("params") or {}
    wanted = {k: params[k] for k in ("ddconfig", "embed_dim") if k in params}
    if len(wanted) < 2:
        raise UserError(
            "--config: the model section describes no autoencoder (ddconfig, embed_dim)"
        )
    module = AutoencoderKL(**wanted)
    prefix = "first_stage_model." if any(k.startswith("first_stage_model.") for k in state) else ""
    matcher = _Matcher(state)
    matcher.fill(module.net, _same(module.net, prefix), "autoencoder")
    return module, matcher.report


def import_diffusion(
    state: State,
    node: dict[str, Any],
    autoencoder: str | None = None,
    scale_factor: float | None = None,
) -> "tuple[HistoModule, Report]":
    """An unconditional latent diffusion model.

    Args:
        state, node: As for `import_autoencoder`.
        autoencoder: Checkpoint of ours, for a file without first stage.
        scale_factor: For a file that does not hold it.

    Raises:
        UserError: Weights of other shapes, another noise schedule, two different latent scales or
            autoencoders, or none.
    """
    import torch

    from ldm.checkpoint import load_model
    from ldm.models.diffusion import LatentDiffusion

    _require_target(node, "LatentDiffusion")
    matcher = _Matcher(state)
    params = dict(node.get("params") or {})
    stated = params.pop("scale_factor", None)
    own_first_stage = any(k.startswith("first_stage_model.") for k in state)
    other = (
        None
        if autoencoder is None
        else load_model(autoencoder, "autoencoder", what="--autoencoder")
    )
    if own_first_stage and not (params.get("first_stage_config") or {}).get("params"):
        if other is None:
            raise UserError(
                "--config: model.params.first_stage_config does not describe the autoencoder in "
                "the file; add its ddconfig and embed_dim, or give --autoencoder CKPT"
            )
        params["first_stage_config"] = other.rebuild_config()
    if not own_first_stage:
        if other is None:
            raise UserError(
                "the file holds no autoencoder (first_stage_model.*); import that first and give "
                "--autoencoder CKPT"
            )
        params["first_stage_config"] = other.rebuild_config()

    averaged = any(k.startswith("model_ema.") for k in state)
    if not averaged:
        matcher.report.notes.append("no averaged weights (model_ema.*): samples come from the UNet")
    params["use_ema"] = averaged
    scale = _scale(matcher, stated, scale_factor)
    module = LatentDiffusion(**params, scale_factor=scale)
    if own_first_stage:
        net = module.first_stage_model
        matcher.fill(net, _same(net, "first_stage_model."), "first stage")
        if other is not None and other.net.fingerprint() != net.fingerprint():
            raise UserError(
                f"--autoencoder: {autoencoder} is not the autoencoder in the file; leave it out"
            )
    else:
        module.first_stage_model.load_state_dict(other.net.state_dict())
    unet = "model.diffusion_model."
    matcher.fill(module.unet, _same(module.unet, unet), "UNet")
    if averaged:
        names = {
            name: "model_ema." + f"diffusion_model.{name}".replace(".", "")
            for name in module.ema.net.state_dict()
        }
        matcher.fill(module.ema.net, names, "averaged UNet")
        updates = matcher.take("model_ema.num_updates")
        if updates is not None:
            module.ema.num_updates.fill_(int(updates))
        decay = matcher.take("model_ema.decay")
        if decay is not None:
            module.ema_decay = module.ema.decay = round(float(decay), 6)
    _check_schedule(matcher, module.schedule)
    module.scale_factor = torch.tensor(scale)
    return module, matcher.report


def _scale(matcher: _Matcher, stated: float | None, given: float | None) -> float:
    """The latent scale: of the file, of the command line or of the configuration."""
    stored = matcher.take("scale_factor")
    if stored is not None:
        if given is not None and abs(float(stored) - given) > 1e-5 * given:
            raise UserError(
                f"--scale_factor {given}: the file holds {float(stored):.6g}; leave it out"
            )
        return float(stored)
    if given is not None:
        return given
    if stated is None:
        raise UserError(
            "the file holds no scale_factor, and the configuration says none: give --scale_factor "
            "X (1 / standard deviation of the latents that it was trained on)"
        )
    matcher.report.notes.append(f"scale_factor {stated} from the configuration")
    return float(stated)


def _check_schedule(matcher: _Matcher, schedule) -> None:
    """Compare the file's tables with the configuration's: the same weights mean nothing else."""
    import torch

    known = {"betas": schedule.betas, "alphas_cumprod": schedule.alphas_cumprod}
    seen = False
    for name, ours in known.items():
        theirs = matcher.take(name)
        if theirs is None:
            continue
        seen = True
        theirs = theirs.double()
        if theirs.shape != ours.shape or not torch.allclose(
            theirs, ours, rtol=BETAS_TOLERANCE, atol=1e-7
        ):
            raise UserError(
                f"the file's noise schedule is not the configuration's: {name} goes from "
                f"{theirs[0]:.6g} to {theirs[-1]:.6g} in {len(theirs)} steps there, from "
                f"{ours[0]:.6g} to {ours[-1]:.6g} in {len(ours)} here; correct timesteps, "
                "beta_schedule, linear_start and linear_end in --config"
            )
    if not seen:
        matcher.report.notes.append("no table of betas to compare the schedule with")


def import_classifier(
    state: State,
    first_stage: str,
    classes: list[str],
    node: dict[str, Any] | None = None,
    scale_factor: float | None = None,
    noised: bool = False,
) -> "tuple[HistoModule, Report]":
    """A noisy-latent classifier.

    Args:
        state: From `read_foreign`.
        first_stage: Checkpoint of ours: the diffusion model that is guided (or its autoencoder,
            with `scale_factor`).
        classes: Names, in the order of the classifier's outputs.
        node: `EncoderUNetModel` with its parameters; None for the published classifier's.
        noised: Whether it was trained on noisy latents; the published code trains at t = 0.
    """
    from ldm.models.classifier import LatentSpace, NoisyLatentClassifier, network_config

    space = LatentSpace.load(first_stage, what="--autoencoder")
    scale = scale_factor if space.scale_factor is None else space.scale_factor
    if scale is None:
        raise UserError(
            f"--autoencoder: {first_stage} holds no latent scale; give the diffusion checkpoint, "
            "or --scale_factor X"
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
            f"--classes: {len(classes)} names, --config says {net['params']['out_channels']} "
            "outputs"
        )
    outputs = {k: len(v) for k, v in state.items() if k in ("out.2.c_proj.bias", "out.3.bias")}
    for name, count in outputs.items():
        if count != len(classes):
            raise UserError(
                f"--classes: {len(classes)} names, the file has {count} outputs ({name})"
            )
    schedule = space.schedule
    module = NoisyLatentClassifier(
        net_config=net,
        autoencoder_fingerprint=space.first_stage.fingerprint(),
        scale_factor=scale,
        timesteps=schedule["timesteps"],
        beta_schedule=schedule["name"],
        linear_start=schedule["linear_start"],
        linear_end=schedule["linear_end"],
        noised=noised,
    )
    module.classes = list(classes)
    matcher = _Matcher(state)
    matcher.fill(module.net, _same(module.net), "classifier")
    return module, matcher.report


def write_imported(
    module: "HistoModule", report: Report, source: Path, out: Path, beside: dict[str, Any]
) -> None:
    """Write a checkpoint of ours, which says what it was made from."""
    from ldm.checkpoint import KEY, write_checkpoint
    from ldm.files import file_sha256

    payload: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(payload)
    payload[KEY]["source"] = {
        "file": source.name,
        "sha256": file_sha256(source),
        "unused": report.unused,
        "missing": report.missing,
    }
    payload |= {k: v for k, v in beside.items() if k in ("epoch", "global_step")}
    write_checkpoint(out, payload)
