"""The networks that are compared: ours, and those of other libraries at the same sizes.

Letters: B batch, C h w latent, H W image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import NetworkOptions
from ldm.devices import Devices, one_device

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# Configurations of the autoencoder and the diffusion model.
FILES = {
    "demo": ("demo/autoencoder.yaml", "demo/diffusion.yaml"),
    "small": ("colorectal5/autoencoder.yaml", "colorectal5/diffusion.yaml"),
    "paper": (
        "autoencoder/autoencoder_histo_kl_64x64x3.yaml",
        "latent-diffusion/histo-ldm-kl-8.yaml",
    ),
}

Predict = Callable[[Tensor, Tensor], Tensor]  # (z_t (B, C, h, w), t (B,)) -> eps (B, C, h, w)
Encode = Callable[[Tensor], Tensor]  # x (B, 3, H, W) in [-1, 1] -> a drawn z (B, C, h, w)


@dataclass(frozen=True)
class Networks:
    """Architecture of an autoencoder and a noise predictor that belong together."""

    unet: dict[str, Any]  # parameters of `ldm.modules.unet.UNetModel`
    ddconfig: dict[str, Any]  # parameters of `ldm.modules.autoencoder.AutoencoderKL`
    embed_dim: int  # channels of its latents

    @classmethod
    def of(cls, size: str) -> "Networks":
        """Read the architecture of a size, a key of `FILES`."""
        from omegaconf import OmegaConf

        first, second = (OmegaConf.load(CONFIGS / name).model.params for name in FILES[size])
        unet = OmegaConf.to_container(second.unet_config.params, resolve=True)
        ddconfig = OmegaConf.to_container(first.ddconfig, resolve=True)
        return cls(unet, ddconfig, first.embed_dim)

    @property
    def latent(self) -> tuple[int, int, int]:
        """Shape of a latent, (C, h, w)."""
        return (self.unet["in_channels"], self.unet["image_size"], self.unet["image_size"])

    @property
    def image(self) -> tuple[int, int, int]:
        """Shape of an image, (3, H, W)."""
        return (3, self.ddconfig["resolution"], self.ddconfig["resolution"])


@dataclass(frozen=True)
class Execution(Devices):
    """How networks are run on one device."""

    # Whether cuDNN tries its algorithms at the first step, as the configurations have it.
    search: bool = True

    @classmethod
    def of(cls, device: str, precision: str | None, **choices: Any) -> "Execution":
        """On a device by name; see `ldm.devices.Devices.with_precision`."""
        return cls(**vars(one_device(device))).with_precision(precision, **choices)

    @classmethod
    def asked(cls, args: NetworkOptions) -> "Execution":
        """As the options say."""
        choices = {"channels_last": args.channels_last, "compile": args.compile}
        return cls.of(args.device, args.precision, **choices)

    @property
    def dtype(self) -> str:
        """What the result says of precision."""
        return "bfloat16 autocast" if self.precision == "bf16-mixed" else "float32"

    def place(self, x: Any) -> Any:
        """Move a network or a tensor (B, C, H, W) to the device, in its layout."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return x.to(self.device, memory_format=layout)

    def maybe_compile(self, net: nn.Module) -> None:
        """Compile a network in place, if networks are to be compiled."""
        if self.compile:
            net.compile()


def build_unet(library: str, params: dict[str, Any]) -> tuple[nn.Module, Predict]:
    """The noise predictor of a library, and how to call it.

    diffusers' is the same function of the same weights (see `ldm.exchange.diffusers_export`).
    MONAI's adds the time embedding where the others scale and shift by it, so that it has 5 to
    8% fewer weights; the operations are the same to 0.3%.
    """
    if library == "ours":
        from ldm.modules.unet import UNetModel

        net = UNetModel(**params)
        return net, net
    if library == "diffusers":
        from ldm.exchange.diffusers_export import make_unet

        net = make_unet(params)
        return net, lambda z_t, t: net(z_t, t, return_dict=False)[0]
    from monai.networks.nets import DiffusionModelUNet

    widths = [params["model_channels"] * m for m in params["channel_mult"]]
    heads, width = params.get("num_heads", 1), params.get("num_head_channels", -1)
    net = DiffusionModelUNet(
        spatial_dims=2,
        in_channels=params["in_channels"],
        out_channels=params["out_channels"],
        num_res_blocks=params["num_res_blocks"],
        channels=widths,
        attention_levels=[2**i in params["attention_resolutions"] for i in range(len(widths))],
        norm_num_groups=32,
        norm_eps=1e-5,
        resblock_updown=params.get("resblock_updown", False),
        num_head_channels=[w // heads if width == -1 else width for w in widths],
        use_flash_attention=True,
    )
    return net, net


def build_autoencoder(library: str, networks: Networks) -> tuple[nn.Module, Encode]:
    """The autoencoder of a library, and how to draw latents with it."""
    ddconfig = networks.ddconfig
    if library == "ours":
        from ldm.modules.autoencoder import AutoencoderKL

        net = AutoencoderKL(ddconfig, networks.embed_dim)
        return net, lambda x: net.encode(x).sample()
    if library == "diffusers":
        from diffusers import AutoencoderKL

        from ldm.exchange.diffusers_export import vae_settings

        net = AutoencoderKL(**vae_settings(ddconfig, networks.embed_dim, 1.0))
        return net, lambda x: net.encode(x, return_dict=False)[0].sample()
    from monai.networks.nets import AutoencoderKL

    widths = [ddconfig["ch"] * m for m in ddconfig["ch_mult"]]
    net = AutoencoderKL(
        spatial_dims=2,
        in_channels=3,
        out_channels=3,
        num_res_blocks=ddconfig["num_res_blocks"],
        channels=widths,
        attention_levels=[False] * len(widths),
        latent_channels=networks.embed_dim,
        norm_num_groups=32,
        use_flash_attention=True,
    )
    return net, lambda x: net.sampling(*net.encode(x))


def make_encoder(
    library: str, networks: Networks, execution: Execution
) -> tuple[nn.Module, Encode]:
    """A frozen autoencoder with random weights, and how to draw latents with it."""
    net, encode = build_autoencoder(library, networks)
    execution.place(randomise(net)).eval().requires_grad_(False)
    execution.maybe_compile(net.encoder)
    return net, encode


def randomise(net: nn.Module) -> nn.Module:
    """Give a network weights of a usual size.

    Fresh networks end in zeros, some libraries' in more layers than others', and arithmetic with
    zeros and the tiny numbers that follow from them does not take the usual time.
    """
    for p in net.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return net


def count(net: nn.Module) -> int:
    """Number of weights."""
    return sum(p.numel() for p in net.parameters())


def count_flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products and convolutions, two per multiply-add.

    `run` works on the device "meta": nothing is computed, and attention is counted by its products,
    which the fused kernels of some devices would hide.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def unet_flops(library: str, networks: Networks, batch_size: int, train: bool = False) -> int:
    """Operations of the noise predictor on a batch: forward, and backward where it trains."""

    def run() -> None:
        _, predict = build_unet(library, networks.unet)
        eps = predict(torch.empty(batch_size, *networks.latent), torch.empty(batch_size).long())
        if train:
            eps.sum().backward()

    return count_flops(run)


@torch.no_grad()
def autoencoder_flops(
    library: str, networks: Networks, batch_size: int, decode: bool = False
) -> int:
    """Operations of encoding a batch of images, or of decoding a batch of latents."""

    def run() -> None:
        net, _ = build_autoencoder(library, networks)
        if decode:
            net.decode(torch.empty(batch_size, *networks.latent))
        else:
            net.encode(torch.empty(batch_size, *networks.image))

    return count_flops(run)
