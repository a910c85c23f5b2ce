"""Export of a diffusion model as a pipeline of the diffusers library.

`UNet2DModel` and `AutoencoderKL` of that library compute the same functions as ours (Dhariwal &
Nichol 2021; Rombach et al. 2022); their weights have other names, and q, k and v of the attention
are separate tensors. `UNet2DModel` has no setting for one number of heads at every width. For such
a network, as the paper's, the exported folder brings a short class that sets it.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from ldm.errors import UserError
from ldm.files import atomic_folder, file_sha256, write_json, write_text
from ldm.models.diffusion import LatentDiffusion
from ldm.modules.autoencoder import Architecture
from ldm.modules.blocks import AttentionBlock, ResBlock
from ldm.report.tables import environment

log = logging.getLogger(__name__)

State = dict[str, torch.Tensor]
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}
SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}
TOLERANCE = 1e-4  # largest difference between the two libraries, of values about 1, float32

# The class for networks whose heads differ in width; its file is copied into the exported folder.
HEADS_MODULE = "unet_heads"
HEADS_CLASS = "UNetWithHeads"


def unet_settings(params: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    """The arguments of `UNet2DModel` for the parameters of our `UNetModel`.

    Returns:
        The arguments, and the number of heads where the width of a head cannot express it (else
        None).

    Raises:
        UserError: The network has an option that `UNet2DModel` does not have.
    """
    _require_exportable(params)
    widths = [int(m * params["model_channels"]) for m in params.get("channel_mult", (1, 2, 4, 8))]
    attention = [2**level in params["attention_resolutions"] for level in range(len(widths))]
    # A level without attention has a class of its own for each way of resampling.
    resample, plain, block = "conv", ("Down", "Up"), "Block2D"
    if params.get("resblock_updown", False):
        resample, plain = "resnet", ("ResnetDownsample", "ResnetUpsample")
    head_width, heads = _heads(params, widths, attention)
    settings = {
        "sample_size": params["image_size"],
        "in_channels": params["in_channels"],
        "out_channels": params["out_channels"],
        "block_out_channels": widths,
        "layers_per_block": params["num_res_blocks"],
        "down_block_types": [f"AttnDown{block}" if a else f"{plain[0]}{block}" for a in attention],
        "up_block_types": [
            f"AttnUp{block}" if a else f"{plain[1]}{block}" for a in reversed(attention)
        ],
        "downsample_type": resample,
        "upsample_type": resample,
        "resnet_time_scale_shift": (
            "scale_shift" if params.get("use_scale_shift_norm") else "default"
        ),
        "dropout": params.get("dropout", 0.0),
        "norm_num_groups": 32,
        # If omitted, the attention in the middle has no normalisation.
        "attn_norm_num_groups": 32,
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "attention_head_dim": head_width,
    }
    return settings, heads


def make_unet(params: dict[str, Any]) -> torch.nn.Module:
    """The network of diffusers for the parameters of our `UNetModel`, see `unet_settings`."""
    from diffusers import UNet2DModel

    from ldm.exchange.unet_heads import UNetWithHeads

    settings, heads = unet_settings(params)
    if heads is None:
        return UNet2DModel(**settings)
    return UNetWithHeads(num_heads=heads, **settings)


def _require_exportable(params: dict[str, Any]) -> None:
    """UserError for a UNet with an option that `UNet2DModel` does not have."""
    get = params.get
    if get("num_classes") is not None:
        raise UserError(
            "a label adapter cannot be exported: diffusers' UNet2DModel has no prediction without "
            "a label; export the diffusion model that it started from"
        )
    if not get("resblock_updown", False) and not get("conv_resample", True):
        raise UserError(
            "unet_config.params.conv_resample=False: diffusers' UNet2DModel resamples with a "
            "convolution or in residual blocks only; this network cannot be exported"
        )
    if get("num_heads_upsample", -1) not in (-1, get("num_heads", 1)):
        raise UserError(
            f"unet_config.params.num_heads_upsample={get('num_heads_upsample')}: diffusers' "
            "UNet2DModel has the same heads on both paths; this network cannot be exported"
        )
    mults = list(get("channel_mult", (1, 2, 4, 8)))
    if mults[0] != 1:
        raise UserError(
            f"unet_config.params.channel_mult={mults}: diffusers' UNet2DModel starts at the width "
            "of its first level; it can be exported if the first multiplier is 1"
        )


def _heads(
    params: dict[str, Any], widths: list[int], attention: list[bool]
) -> tuple[int, int | None]:
    """Width of an attention head, and the number of heads where no one width can express it.

    Args:
        widths: Channels of each level.
        attention: Whether each level has attention.
    """
    heads, head_width = params.get("num_heads", 1), params.get("num_head_channels", -1)
    if head_width != -1:
        return head_width, None
    # The middle block has attention in any case.
    attended = {width for width, has in zip(widths, attention, strict=True) if has} | {widths[-1]}
    if len(attended) == 1:
        return attended.pop() // heads, None
    return 32, heads  # any width that divides all levels; `UNetWithHeads` sets the number of heads


def _res_block(state: State, old: str, new: str) -> State:
    names = {
        "in_layers.0": "norm1",
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.0": "norm2",
        "out_layers.3": "conv2",
        "skip_connection": "conv_shortcut",
    }
    return {
        f"{new}.{theirs}.{part}": state[f"{old}.{ours}.{part}"]
        for ours, theirs in names.items()
        for part in ("weight", "bias")
        if f"{old}.{ours}.{part}" in state
    }


def _attention(state: State, old: str, new: str, heads: int, new_order: bool) -> State:
    """Split the 3C channels of `qkv`, (heads, 3, D) or (3, heads, D), into q, k and v."""
    result = {
        f"{new}.group_norm.{part}": state[f"{old}.norm.{part}"] for part in ("weight", "bias")
    }
    for part in ("weight", "bias"):
        qkv = state[f"{old}.qkv.{part}"]
        qkv = qkv.flatten(1) if part == "weight" else qkv  # (3C, C) or (3C,)
        rest = qkv.shape[1:]
        if new_order:
            pieces = qkv.unflatten(0, (3, -1))
        else:
            pieces = qkv.unflatten(0, (heads, 3, -1)).transpose(0, 1).reshape(3, -1, *rest)
        for name, piece in zip(("to_q", "to_k", "to_v"), pieces, strict=True):
            result[f"{new}.{name}.{part}"] = piece.contiguous()
        out = state[f"{old}.proj_out.{part}"]
        result[f"{new}.to_out.0.{part}"] = out.flatten(1) if part == "weight" else out
    return result


def unet_state(net: torch.nn.Module, params: dict[str, Any]) -> State:
    """The weights of our `UNetModel` under the names of `UNet2DModel`."""
    state = net.state_dict()
    new_order = params.get("use_new_attention_order", False)
    names = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    result = {
        f"{theirs}.{part}": state[f"{ours}.{part}"]
        for ours, theirs in names.items()
        for part in ("weight", "bias")
    }

    def put(layer: torch.nn.Module, old: str, resnet: str, attention: str, sampler: str) -> None:
        """Copy one layer to its place; a layer that is neither of the two blocks resamples."""
        if isinstance(layer, AttentionBlock):
            result.update(_attention(state, old, attention, layer.num_heads, new_order))
        elif isinstance(layer, ResBlock):
            result.update(_res_block(state, old, resnet))
        else:
            for ours in (".op", ".conv"):
                for part in ("weight", "bias"):
                    if f"{old}{ours}.{part}" in state:
                        result[f"{sampler}.conv.{part}"] = state[f"{old}{ours}.{part}"]

    per_level, levels = params["num_res_blocks"], len(params.get("channel_mult", (1, 2, 4, 8)))
    for i, block in list(enumerate(net.input_blocks))[1:]:
        level, place = divmod(i - 1, per_level + 1)
        there = f"down_blocks.{level}"
        sampler = f"{there}.downsamplers.0"
        resnet = sampler if place == per_level else f"{there}.resnets.{place}"
        for j, layer in enumerate(block):
            old = f"input_blocks.{i}.{j}"
            put(layer, old, resnet, f"{there}.attentions.{place}", sampler)
    for j, layer in enumerate(net.middle_block):
        old = f"middle_block.{j}"
        put(layer, old, f"mid_block.resnets.{j // 2}", "mid_block.attentions.0", "")
    for i, block in enumerate(net.output_blocks):
        level, place = divmod(i, per_level + 1)
        there = f"up_blocks.{level}"
        sampler = f"{there}.upsamplers.0"
        for j, layer in enumerate(block):
            # The first layer of a block is its residual block, a later one resamples.
            resnet = f"{there}.resnets.{place}" if j == 0 else sampler
            old = f"output_blocks.{i}.{j}"
            put(layer, old, resnet, f"{there}.attentions.{place}", sampler)
    assert levels * (per_level + 1) == len(net.output_blocks)
    return result


def vae_settings(ddconfig: dict[str, Any], embed_dim: int, scale_factor: float) -> dict[str, Any]:
    """The arguments of diffusers' `AutoencoderKL` for our `ddconfig`.

    Raises:
        UserError: `AutoencoderKL` of diffusers does not have this architecture.
    """
    config = vars(Architecture(**ddconfig))
    if config["z_channels"] != embed_dim:
        raise UserError(
            f"ddconfig.z_channels={config['z_channels']} and embed_dim={embed_dim} differ: "
            "diffusers' AutoencoderKL has one number for both; this autoencoder cannot be exported"
        )
    if config["attn_resolutions"]:
        raise UserError(
            f"ddconfig.attn_resolutions={list(config['attn_resolutions'])}: attention between the "
            "levels of an autoencoder is not exported"
        )
    widths = [config["ch"] * m for m in config["ch_mult"]]
    return {
        "in_channels": config["in_channels"],
        "out_channels": config["out_ch"],
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": widths,
        "layers_per_block": config["num_res_blocks"],
        "latent_channels": embed_dim,
        "norm_num_groups": 32,
        "sample_size": config["resolution"],
        "scaling_factor": scale_factor,
    }


def vae_state(net: torch.nn.Module) -> State:
    """The weights of our autoencoder under the names of diffusers' `AutoencoderKL`."""
    levels = len(net.decoder.up)
    result = {}
    for name, value in net.state_dict().items():
        words = name.split(".")
        if words[1] in ("down", "up"):
            side, kind, level, part, *rest = words
            # Ours are stored by resolution on both sides, theirs in the order of use.
            level = int(level) if kind == "down" else levels - 1 - int(level)
            if part == "block":
                i, *rest = rest
                words = [side, f"{kind}_blocks", str(level), "resnets", i, *rest]
            else:
                words = [side, f"{kind}_blocks", str(level), f"{kind}samplers", "0", *rest]
        elif words[1] == "mid":
            side, _, part, *rest = words
            place = {"block_1": "resnets.0", "block_2": "resnets.1", "attn_1": "attentions.0"}
            words = [side, "mid_block", place[part], *rest]
            if part == "attn_1":
                layers = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v"}
                words[3] = {**layers, "proj_out": "to_out.0"}[words[3]]
                if value.ndim == 4:  # a 1x1 convolution here, a linear layer there
                    value = value.flatten(1)
        words = ["conv_norm_out" if w == "norm_out" else w for w in words]
        words = ["conv_shortcut" if w == "nin_shortcut" else w for w in words]
        result[".".join(words)] = value
    return result


def scheduler_settings(model: LatentDiffusion) -> dict[str, Any]:
    """The arguments of `DDIMScheduler` that make it visit the same time steps as our sampler.

    They agree for every number of sampling steps S < T that divides T: our steps are
    floor(k T / S) + 1, theirs k floor(T / S) + 1, and both end at time step 0.
    """
    settings = model.schedule.settings
    if model.parameterization not in PREDICTIONS:
        raise UserError(
            f"the diffusion model predicts {model.parameterization}: diffusers' LDMPipeline has no "
            "scheduler for a rectified flow, so it cannot be exported"
        )
    parameterization = PREDICTIONS[model.parameterization]
    terminal = settings.get("rescale_zero_terminal_snr", False)
    return {
        "num_train_timesteps": settings["timesteps"],
        "beta_schedule": SCHEDULES[settings["name"]],
        "beta_start": settings["linear_start"],
        "beta_end": settings["linear_end"],
        "prediction_type": parameterization,
        "clip_sample": False,
        "rescale_betas_zero_snr": terminal,
        "set_alpha_to_one": terminal,
        "steps_offset": 1,
        "timestep_spacing": "trailing" if terminal else "leading",
    }


def build_pipeline(model: LatentDiffusion, use_ema: bool = True) -> Any:
    """An `LDMPipeline` of diffusers with the weights of `model`.

    Raises:
        UserError: The model has an option that diffusers does not have.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, LDMPipeline

    params = model.unet_config["params"]
    first = model.first_stage_config["params"]
    if "ddconfig" not in first or model.scale_factor.ndim:
        what = "a latent scale for each channel" if model.scale_factor.ndim else "patch PCA"
        raise UserError(
            f"the diffusion model has {what}, for which diffusers has no counterpart; export a "
            "model of an autoencoder with a single latent scale"
        )
    scale = float(model.scale_factor)
    vae = AutoencoderKL(**vae_settings(first["ddconfig"], first["embed_dim"], scale))
    vae.load_state_dict(vae_state(model.first_stage_model))
    unet = make_unet(params)
    unet.load_state_dict(unet_state(model.network(use_ema), params))
    scheduler = DDIMScheduler(**scheduler_settings(model))
    pipeline = LDMPipeline(vqvae=vae.eval(), unet=unet.eval(), scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def largest_difference(model: LatentDiffusion, pipeline: Any, use_ema: bool = True) -> float:
    """The largest difference between our networks and the exported ones, on random inputs."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn((1, *model.latent_shape), generator=generator)
    first, vqvae, scaled = model.first_stage_model, pipeline.vqvae, z / float(model.scale_factor)
    with torch.no_grad():
        times = [torch.tensor([t]) for t in (0, model.schedule.T // 2, model.schedule.T - 1)]
        pairs = [(model.network(use_ema)(z, t), pipeline.unet(z, t).sample) for t in times]
        pairs.append((first.decode(scaled), vqvae.decode(scaled).sample))
        x = pairs[-1][0].clamp(-1, 1)
        pairs.append((first.encode(x).mode(), vqvae.encode(x).latent_dist.mode()))
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1)) for a, b in pairs)


def export(checkpoint: Path, model: LatentDiffusion, out: Path, use_ema: bool = True) -> float:
    """Write the pipeline to the new folder `out`, completely or not at all.

    Args:
        checkpoint: File that `model` was loaded from, for the record.

    Returns:
        The largest difference between the two libraries, read back from the folder.

    Raises:
        UserError: `out` exists, or the exported networks compute something else.
    """
    if out.exists():
        raise UserError(f"out: {out} exists; give another name, or remove it")
    pipeline = build_pipeline(model, use_ema)
    difference = largest_difference(model, pipeline, use_ema)
    if not difference < TOLERANCE:
        raise UserError(
            f"{checkpoint}: the exported networks differ by {difference:.2g} from ours, above "
            f"{TOLERANCE:g}; nothing is written"
        )
    record = {
        "checkpoint": checkpoint.name,
        "sha256": file_sha256(checkpoint),
        "averaged_weights": use_ema and model.ema is not None,
        "largest_difference": difference,
        "record": model.record,
    }
    with atomic_folder(out) as folder:
        pipeline.save_pretrained(folder)
        has_code = type(pipeline.unet).__name__ == HEADS_CLASS
        if has_code:
            _add_heads_class(folder)
        facts = {"name": out.name, "T": model.schedule.T, "has_code": has_code, **record}
        facts["pixels"] = model.first_stage_model.resolution
        card = environment().get_template("pipeline.md").render(facts)
        write_text(folder / "README.md", card)
        write_json(folder / "histodiffusion.json", record)
    return difference


def _add_heads_class(folder: Path) -> None:
    """Copy the class `HEADS_CLASS` into an exported folder and name it in the folder's index."""
    code = Path(__file__).with_name(f"{HEADS_MODULE}.py")
    shutil.copyfile(code, folder / "unet" / code.name)
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = [HEADS_MODULE, HEADS_CLASS]
    write_json(folder / "model_index.json", index)
