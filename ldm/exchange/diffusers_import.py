"""Import of models of the diffusers library: the way back from `diffusers_export`.

The weights get the names that latent diffusion gives them, and are then imported as its files are.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ldm.config import instantiate_from_config
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.exchange.diffusers_export import HEADS_CLASS, PREDICTIONS, SCHEDULES, unet_state, vae_state
from ldm.exchange.foreign import UNET, State, read_payload
from ldm.modules.autoencoder import AutoencoderKL

FILE = "diffusion_pytorch_model"
# Layers of attention in earlier versions of the library.
EARLIER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read_folder(folder: Path, node: dict[str, Any], kind: str) -> State:
    """Read a pipeline, or the folder of one network in it, under the names of latent diffusion.

    Args:
        node: From `foreign.read_model_node`.
        kind: autoencoder or diffusion.

    Raises:
        UserError: The folder holds no such network, or another than the configuration describes.
    """
    params, state = node.get("params") or {}, {}
    first = node if kind == "autoencoder" else params.get("first_stage_config") or {}
    vae, unet = _part(folder, "AutoencoderKL"), _part(folder, "UNet2DModel", HEADS_CLASS)
    if (vae if kind == "autoencoder" else unet) is None:
        raise UserError(f"{folder} holds no {kind} of diffusers; give the folder of its pipeline")
    if vae is not None and (settings := first.get("params")):
        net = AutoencoderKL(settings["ddconfig"], settings["embed_dim"])
        state |= _in_our_names(net, _weights(vae), vae_state, "first_stage_model.")
    if kind == "autoencoder":
        return state
    config = params["unet_config"]
    net = instantiate_from_config(config)
    state |= _in_our_names(net, _weights(unet), lambda n: unet_state(n, config["params"]), UNET)
    return state | _process(folder, vae, params.get("parameterization", "eps"))


def _part(folder: Path, *names: str) -> Path | None:
    """The folder of a network of one of these classes: `folder` itself, or one in it."""
    for path in (folder, *sorted(folder.iterdir())):
        config = path / "config.json"
        if config.is_file() and _read(config, "_class_name") in names:
            return path
    return None


def _read(path: Path, key: str) -> Any:
    try:
        return json.loads(path.read_text()).get(key)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is no configuration of diffusers ({error})") from None


def _weights(folder: Path) -> State:
    for suffix in (".safetensors", ".bin"):
        whole = folder / (FILE + suffix)
        files = [whole] if whole.is_file() else sorted(folder.glob(f"{FILE}*{suffix}"))
        if files:
            return {k: v for file in files for k, v in read_payload(file).items()}
    raise UserError(f"{folder} holds no weights; needed is {FILE}.safetensors")


def _in_our_names(
    net: torch.nn.Module, theirs: State, translate: Callable[[torch.nn.Module], State], prefix: str
) -> State:
    """The weights `theirs` under our names, with `prefix`; those that are missing are left out.

    `translate` gives our weights under their names. Where each number of theirs belongs is found by
    translating a network whose weights are the numbers of their places.
    """
    own, places, count = net.state_dict(), {}, 0
    for name, value in own.items():
        places[name] = torch.arange(count, count + value.numel()).view(value.shape)
        count += value.numel()
    net.double().load_state_dict(places)  # float64 holds every place exactly
    flat = torch.full((count,), torch.nan)
    found = {".".join(EARLIER.get(w, w) for w in k.split(".")): v for k, v in theirs.items()}
    for name, place in translate(net).items():
        value = found.get(name)
        if value is not None and value.numel() != place.numel():
            raise UserError(
                f"{name} is {tuple(value.shape)} in the file, {tuple(place.shape)} by the "
                "configuration; give the one that describes the file"
            )
        if value is not None:
            flat[place.long().flatten()] = value.float().flatten()
    ours = {
        prefix + name: flat[place.flatten()].view(place.shape) for name, place in places.items()
    }
    return {name: value for name, value in ours.items() if not value.isnan().any()}


def _process(folder: Path, vae: Path | None, parameterization: str) -> State:
    """The noise schedule and the latent scale of a pipeline, as far as it says them."""
    state, file = {}, folder / "scheduler" / "scheduler_config.json"
    if file.is_file():
        names = {theirs: ours for ours, theirs in SCHEDULES.items()}
        name, prediction = _read(file, "beta_schedule"), _read(file, "prediction_type")
        if name not in names or PREDICTIONS.get(parameterization) != prediction:
            raise UserError(
                f"{file}: beta_schedule={name} with prediction_type={prediction} is not what the "
                f"configuration says (parameterization={parameterization}), or not supported"
            )
        numbers = ("num_train_timesteps", "beta_start", "beta_end")
        state["betas"] = NoiseSchedule(names[name], *(_read(file, n) for n in numbers)).betas
    if vae is not None and (scale := _read(vae / "config.json", "scaling_factor")) is not None:
        state["scale_factor"] = torch.tensor(float(scale))
    return state
