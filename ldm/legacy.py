"""Published configurations in native names: targets, parameters, and what has no counterpart here.

YAML written for the code that was published with the paper, or for latent diffusion (Rombach et al.
2022), names other classes and parameters. `Translation` collects what was met on the way.
"""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ldm.cli import join_keys, shown

logger = logging.getLogger(__name__)

DATA_VARIABLE = "HISTO_DATA"

# Targets of sections that may leave theirs out, as they may in the published code.
DEFAULT_TARGETS = {
    "lightning.callbacks.image_logger": "ldm.models.callbacks.ImageLogger",
    "lightning.modelcheckpoint": "pytorch_lightning.callbacks.ModelCheckpoint",
}

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
_WARM_UP = "not supported; use ldm.modules.lr_schedule.LambdaLinearScheduler"
UNSUPPORTED_TARGETS = {
    "ldm.models.autoencoder.VQModel": _VQ,
    "ldm.models.autoencoder.VQModelInterface": _VQ,
    "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator": _VQ,
    "ldm.models.autoencoder.IdentityFirstStage": _PIXELS,
    "ldm.models.diffusion.ddpm.DDPM": _PIXELS,
    "ldm.models.diffusion.classifier.NoisyLatentImageClassifier": (
        "train it with classifier_train.py"
    ),
    "ldm.lr_scheduler.LambdaWarmUpCosineScheduler": _WARM_UP,
    "ldm.lr_scheduler.LambdaWarmUpCosineScheduler2": _WARM_UP,
}


# --- Parameters of the published classes that mean nothing here, by native target ----------------

# Name -> the values that mean nothing (`ANY` for all), and why another value is not supported. What
# to do then is to set the parameter to the first of the values, or to remove it if that is None.
Unused = Mapping[str, tuple[tuple, str]]
ANY = ()
_UNCONDITIONAL = (
    "the diffusion model is unconditional and classes come from classifier guidance "
    "(sample_diffusion.py --classifier)"
)
_KEY = (("image",), "tiles come as `image`")
_STRICT = ((None, []), "checkpoints are loaded in full")
_OFF, _ZERO = ((False,), ""), ((0,), "")
_NO_TEXT = "there is no text conditioning"
_UNET_NAMES: Unused = {
    "dims": ((2,), "only images are"),
    "use_fp16": ((False,), "`precision` bf16-mixed is what there is"),
    "use_spatial_transformer": ((False,), _NO_TEXT),
    "transformer_depth": (ANY, ""),  # read by the spatial transformer only
    "context_dim": ((None,), _NO_TEXT),
    "n_embed": ((None,), "latents are not quantised"),
    "legacy": (ANY, ""),  # read by the spatial transformer only
}
UNUSED: dict[str, Unused] = {
    "ldm.models.diffusion.LatentDiffusion": {
        # `log_every_t`: logging of intermediate samples; `clip_denoised`: of pixel-space sampling,
        # latents were never clipped; the others: how a condition would be read and fed.
        **dict.fromkeys(
            ("log_every_t", "clip_denoised", "cond_stage_key", "concat_mode"), (ANY, "")
        ),
        **dict.fromkeys(("original_elbo_weight", "v_posterior", "logvar_init"), _ZERO),
        **dict.fromkeys(("use_positional_encodings", "learn_logvar", "load_only_unet"), _OFF),
        "num_timesteps_cond": ((1, None), ""),
        "cond_stage_config": (("__is_unconditional__", None), _UNCONDITIONAL),
        "cond_stage_trainable": ((False,), _UNCONDITIONAL),
        "cond_stage_forward": ((None,), _NO_TEXT),
        "conditioning_key": ((None,), _UNCONDITIONAL),
        "first_stage_key": _KEY,
        "ignore_keys": _STRICT,
        "given_betas": ((None,), "beta_schedule, linear_start and linear_end say them"),
        "cosine_s": ((0.008,), ""),
        "l_simple_weight": ((1,), "scale the learning rate"),
    },
    "ldm.models.autoencoder.AutoencoderKL": {
        "colorize_nlabels": ((None,), "images have three channels"),
        "image_key": _KEY,
        "ignore_keys": _STRICT,
    },
    "ldm.modules.unet.UNetModel": _UNET_NAMES,
    "ldm.modules.unet.EncoderUNetModel": {
        **_UNET_NAMES,
        "num_heads_upsample": (ANY, ""),  # a half UNet has no up-sampling path
    },
    "ldm.modules.losses.LPIPSWithDiscriminator": {
        "use_actnorm": _OFF,
        "disc_conditional": ((False,), "the discriminator sees the image alone"),
    },
    "ldm.modules.lr_schedule.LambdaLinearScheduler": {"verbosity_interval": (ANY, "")},
    "ldm.data.datamodule.DataModuleFromConfig": {
        "wrap": (ANY, ""),  # wraps a dataset in itself
        "test": ((None,), "evaluation has its own command, eval.py"),
        "predict": ((None,), "sampling has its own command, sample_diffusion.py"),
        "shuffle_test_loader": (ANY, ""),
        "shuffle_val_dataloader": ((False,), "validation keeps its order"),
        "use_worker_init_fn": (ANY, ""),  # of iterable datasets
    },
    "ldm.models.callbacks.ImageLogger": {
        "clamp": ((True,), "images are always clamped before they are written"),
        "rescale": ((True,), "images are always written in [0, 255]"),
        "disabled": ((False,), "lightning.callbacks.image_logger=null leaves it out"),
        "log_on_batch_idx": ((False,), "steps are optimiser steps"),
        "log_first_step": (ANY, ""),
        "log_images_kwargs": ((None, {}), ""),
    },
}
_LIGHTNING: Unused = {
    "find_unused_parameters": (
        (False,),
        "lightning.trainer.strategy=ddp_find_unused_parameters_true says it",
    )
}
_DDCONFIG: Unused = {
    "attn_type": (("vanilla",), ""),
    "resamp_with_conv": ((True,), ""),
    **dict.fromkeys(("use_linear_attn", "tanh_out", "give_pre_end"), _OFF),
}


def _means_nothing(value: Any, values: tuple) -> bool:
    # True == 1 in Python; a flag written where a number belongs is another value.
    return not values or any(
        known == value and isinstance(known, bool) == isinstance(value, bool) for known in values
    )


# --- Translation ---------------------------------------------------------------------------------


@dataclass
class Translation:
    """Translates configurations, and collects what it meets for one log line and one error."""

    renamed: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)  # dotted path: what is wrong, what to do

    def log(self) -> None:
        """One line that says which names were translated and which are without effect."""
        said = {
            "published names read as native ones": dict.fromkeys(self.renamed),
            "without effect here, ignored": self.dropped,
        }
        parts = [f"{what}: {', '.join(names)}" for what, names in said.items() if names]
        if parts:
            logger.info("configuration: %s", "; ".join(parts))

    def tree(self, value: Any, path: str = "") -> Any:
        """A copy of a whole configuration, or of what stands at `path` in it, in native names."""
        if isinstance(value, list):
            return [self.tree(item, f"{path}[{i}]") for i, item in enumerate(value)]
        if not isinstance(value, dict):
            return value
        value = dict(value)
        if path in ("lightning", "lightning.callbacks"):
            value = {key: item for key, item in value.items() if item is not None}
        if path == "lightning":
            self.drop_unused(value, path, _LIGHTNING)
        if path in DEFAULT_TARGETS:
            value.setdefault("target", DEFAULT_TARGETS[path])
        # The node itself first: a nested node that it drops needs no translation of its own.
        if isinstance(value.get("target"), str):
            value = self.node(value, path)
        return {
            key: item if path == "vars" else self.tree(item, join_keys(path, key))
            for key, item in value.items()
        }

    def node(self, node: dict, path: str, defaults: bool = True) -> dict:
        """A copy of one `{target, params}` node in native names; nodes within it stay as they are.

        With `defaults`, those of the published class are written down where ours are others; not
        for a file that only changes a native node.
        """
        published = node["target"]
        if published in UNSUPPORTED_TARGETS:
            problem = f"{published}: {UNSUPPORTED_TARGETS[published]}"
            self.problems[join_keys(path, "target")] = problem
        if published not in LEGACY_TARGETS:
            return node
        native = LEGACY_TARGETS[published]
        if native != published:
            self.renamed.append(f"{published} as {native}")
        if not isinstance(node.get("params"), dict | None):
            return {**node, "target": native}
        params = dict(node.get("params") or {})
        where = join_keys(path, "params")
        self.drop_unused(params, where, UNUSED.get(native, {}))
        if published in _TRANSLATIONS:
            _TRANSLATIONS[published](params, where, self, defaults)
        return {**node, "target": native, "params": params}

    def drop_unused(self, params: dict, path: str, unused: Unused) -> None:
        """Remove the names of `unused` from `params`; a value that means something is a problem."""
        for name in [name for name in params if name in unused]:
            value, (values, why) = params.pop(name), unused[name]
            if _means_nothing(value, values):
                self.dropped.append(f"{path}.{name}")
                continue
            remedy = "remove it" if values[0] is None else f"set it to {values[0]}"
            words = "; ".join(filter(None, [f"{shown(value)} is not supported", why, remedy]))
            self.problems[f"{path}.{name}"] = words

    def in_one_language(self, earlier: Any, later: Any, path: str = "") -> tuple[Any, Any]:
        """Two trees, before they are merged, in which nodes that meet have the same names.

        Where a published node meets a native one, the published one is translated. A node without a
        target continues in the names of what it is merged with. Where `later` names another class,
        the parameters of `earlier` are left out, since another class has its own.
        """
        if not (isinstance(earlier, dict) and isinstance(later, dict)):
            return earlier, later
        old, new = earlier.get("target"), later.get("target")
        if isinstance(old, str) and isinstance(new, str):
            if native_name(old) != native_name(new):
                earlier = {key: value for key, value in earlier.items() if key != "params"}
            elif is_published(old) and not is_published(new):
                earlier = self.node(earlier, path)
            elif is_published(new) and not is_published(old):
                later = self.node(later, path, defaults=False)
        earlier, later = dict(earlier), dict(later)
        for key in earlier.keys() & later.keys():
            earlier[key], later[key] = self.in_one_language(
                earlier[key], later[key], join_keys(path, key)
            )
        return earlier, later


def environment_remedy(variable: str, key: str) -> str:
    """What to say where a setting comes from an environment variable that is not set."""
    return (
        f"the environment variable {variable} is not set; export {variable}=DIR or give {key}=DIR"
    )


def native_name(target: str) -> str:
    """The native target that a target, published or native, stands for."""
    return LEGACY_TARGETS.get(target, target)


def is_published(target: str) -> bool:
    """Whether a target is a name that only published configurations have."""
    return native_name(target) != target


# Defaults of the published constructor, which need not be ours.
_DIFFUSION_DEFAULTS = {
    "timesteps": 1000,
    "beta_schedule": "linear",
    "linear_start": 1e-4,
    "linear_end": 2e-2,
    "loss_type": "l2",
}


def _translate_diffusion(params: dict, path: str, translation: Translation, defaults: bool) -> None:
    if defaults:
        for name, value in _DIFFUSION_DEFAULTS.items():
            params.setdefault(name, value)
    # What is called "linear" there is linear in sqrt(beta), and "sqrt_linear" is linear in beta.
    if "beta_schedule" in params:
        schedule = params["beta_schedule"]
        native = {"linear": "scaled_linear", "sqrt_linear": "linear"}
        params["beta_schedule"] = native.get(schedule, schedule)
    if not (defaults or "scale_by_std" in params or "scale_factor" in params):
        return
    # scale_by_std measures the scale of the latents, which is what a scale_factor of None asks for.
    by_std, scale = params.pop("scale_by_std", False), params.pop("scale_factor", None)
    if not isinstance(by_std, bool):
        translation.problems[f"{path}.scale_by_std"] = f"{shown(by_std)} must be true or false"
    if by_std and scale not in (None, 1.0):
        translation.problems[f"{path}.scale_factor"] = (
            f"{shown(scale)} contradicts scale_by_std=True, which measures it; remove one of them"
        )
    if by_std or defaults or scale is not None:
        params["scale_factor"] = None if by_std else 1.0 if scale is None else scale


def _translate_autoencoder(
    params: dict, path: str, translation: Translation, defaults: bool
) -> None:
    loss = params.get("lossconfig")
    if isinstance(loss, dict) and loss.get("target") == "torch.nn.Identity":
        params["lossconfig"] = None  # a first stage that is not trained
    if isinstance(params.get("ddconfig"), dict):
        params["ddconfig"] = dict(params["ddconfig"])
        translation.drop_unused(params["ddconfig"], f"{path}.ddconfig", _DDCONFIG)


def _translate_data(params: dict, path: str, translation: Translation, defaults: bool) -> None:
    if params.get("num_workers", 0) is None:
        del params["num_workers"]


def _translate_histo_train(
    params: dict, path: str, translation: Translation, defaults: bool
) -> None:
    # The published class holds private paths; here an override or the environment names the folder.
    if params.get("root") is None and defaults:
        params["root"] = os.environ.get(DATA_VARIABLE) or None
        if params["root"] is None:
            translation.problems[f"{path}.root"] = environment_remedy(DATA_VARIABLE, f"{path}.root")


_TRANSLATIONS: dict[str, Callable[[dict, str, Translation, bool], None]] = {
    "ldm.models.diffusion.ddpm.LatentDiffusion": _translate_diffusion,
    "ldm.models.autoencoder.AutoencoderKL": _translate_autoencoder,
    "main.DataModuleFromConfig": _translate_data,
    "ldm.data.histo.HistoTrain": _translate_histo_train,
}
