"""The networks that are compared: ours, and those of other libraries at the same sizes."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.bench.measure import count_flops
from ldm.errors import UserError

LIBRARIES = ("ours", "diffusers", "monai")
PEERS = LIBRARIES[1:]
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# Configurations of the autoencoder and the diffusion model, and options of the classifier.
SIZES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "demo": (
        "demo/autoencoder.yaml",
        "demo/diffusion.yaml",
        {"width": 64, "depth": 1, "channel_mult": (1, 2, 2)},
    ),
    "small": (
        "colorectal5/autoencoder.yaml",
        "colorectal5/diffusion.yaml",
        {"width": 64, "depth": 1, "channel_mult": (1, 2, 3)},
    ),
    "paper": (
        "autoencoder/autoencoder_histo_kl_64x64x3.yaml",
        "latent-diffusion/histo-ldm-kl-8.yaml",
        {},
    ),
}

Predictor = Callable[[Tensor, Tensor], Tensor]  # (z_t (B, C, h, w), t (B,)) -> eps
Encode = Callable[[Tensor], Tensor]  # x (B, 3, H, W) in [-1, 1] -> z (B, C, h, w), drawn


@dataclass(frozen=True)
class Networks:
    """Architecture of an autoencoder and a noise predictor that belong together.

    Attributes:
        unet: Parameters of `ldm.modules.unet.UNetModel`.
        ddconfig, embed_dim: Of `ldm.modules.autoencoder.AutoencoderKL`.
        size: Where it comes from, for the record.
    """

    unet: dict[str, Any]
    ddconfig: dict[str, Any]
    embed_dim: int
    size: str = ""

    @classmethod
    def of(cls, size: str) -> "Networks":
        """Those of one of `SIZES`."""
        from omegaconf import OmegaConf

        first, second, _ = SIZES[size]
        autoencoder, diffusion = (
            OmegaConf.load(CONFIGS / name).model.params for name in (first, second)
        )
        return cls(
            unet=OmegaConf.to_container(diffusion.unet_config.params, resolve=True),
            ddconfig=OmegaConf.to_container(autoencoder.ddconfig, resolve=True),
            embed_dim=autoencoder.embed_dim,
            size=size,
        )

    @property
    def latent(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return (self.unet["in_channels"], self.unet["image_size"], self.unet["image_size"])

    @property
    def pixels(self) -> int:
        """Side of an image."""
        return self.ddconfig["resolution"]


def require(libraries: list[str] | tuple[str, ...]) -> None:
    """UserError where one of the libraries is not installed."""
    for name in libraries:
        if name != "ours" and importlib.util.find_spec(name) is None:
            others = " ".join(other for other in libraries if other not in ("ours", name))
            raise UserError(
                f"this benchmark compares with {name}, which is not installed; python -m pip "
                f"install {name}, or leave it out: --peers {others}".rstrip()
            )


def load(library: str) -> None:
    """Import what `library` needs to build its networks."""
    if library == "diffusers":
        from diffusers import AutoencoderKL, UNet2DModel  # noqa: F401
        from diffusers.training_utils import EMAModel  # noqa: F401
    elif library == "monai":
        from monai.networks.nets import AutoencoderKL, DiffusionModelUNet  # noqa: F401
    import ldm.modules.autoencoder
    import ldm.modules.unet  # noqa: F401


def build_unet(library: str, params: dict[str, Any]) -> tuple[nn.Module, Predictor]:
    """The noise predictor of a library, and how to call it.

    diffusers' is the same function of the same number of weights (see `ldm.exchange`). MONAI's adds
    the time embedding, where the others scale and shift by it, so that it has 5 to 8% fewer of
    them. The operations are the same to 0.3%.

    Raises:
        UserError: An architecture that the library does not have.
    """
    if library == "ours":
        from ldm.modules.unet import UNetModel

        net = UNetModel(**params)
        return net, net
    if library == "diffusers":
        from diffusers import UNet2DModel

        from ldm.exchange.diffusers_export import unet_settings

        settings, heads = unet_settings(params)
        if heads is None:
            net = UNet2DModel(**settings)
        else:
            from ldm.exchange.unet_heads import UNetWithHeads

            net = UNetWithHeads(num_heads=heads, **settings)
        return net, lambda z_t, t: net(z_t, t, return_dict=False)[0]
    from monai.networks.nets import DiffusionModelUNet

    widths = [params["model_channels"] * m for m in params["channel_mult"]]
    heads, width = params.get("num_heads", 1), params.get("num_head_channels", -1)
    attention = [2**level in params["attention_resolutions"] for level in range(len(widths))]
    net = DiffusionModelUNet(
        spatial_dims=2,
        in_channels=params["in_channels"],
        out_channels=params["out_channels"],
        num_res_blocks=params["num_res_blocks"],
        channels=widths,
        attention_levels=attention,
        norm_num_groups=32,
        norm_eps=1e-5,
        resblock_updown=params.get("resblock_updown", False),
        num_head_channels=[w // heads if width == -1 else width for w in widths],
        use_flash_attention=True,
    )
    return net, lambda z_t, t: net(z_t, t)


def build_autoencoder(
    library: str, ddconfig: dict[str, Any], embed_dim: int
) -> tuple[nn.Module, Encode]:
    """The autoencoder of a library, and how to draw latents with it.

    Raises:
        UserError: An architecture that the library does not have.
    """
    if library == "ours":
        from ldm.modules.autoencoder import AutoencoderKL

        net = AutoencoderKL(ddconfig, embed_dim)
        return net, lambda x: net.encode(x).sample()
    if library == "diffusers":
        from diffusers import AutoencoderKL

        from ldm.exchange.diffusers_export import vae_settings

        net = AutoencoderKL(**vae_settings(ddconfig, embed_dim, 1.0))
        return net, lambda x: net.encode(x, return_dict=False)[0].sample()
    from monai.networks.nets import AutoencoderKL

    widths = [ddconfig["ch"] * m for m in ddconfig["ch_mult"]]
    net = AutoencoderKL(
        spatial_dims=2,
        in_channels=ddconfig.get("in_channels", 3),
        out_channels=ddconfig.get("out_ch", 3),
        num_res_blocks=ddconfig["num_res_blocks"],
        channels=widths,
        attention_levels=[False] * len(widths),
        latent_channels=embed_dim,
        norm_num_groups=32,
        use_flash_attention=True,
    )
    return net, lambda x: net.sampling(*net.encode(x))


def randomise(net: nn.Module) -> nn.Module:
    """Weights of a usual size everywhere.

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


def unet_flops(library: str, params: dict[str, Any], batch_size: int, train: bool) -> int:
    """Operations of the noise predictor on a batch: forward, and backward where it trains."""
    with torch.device("meta"):
        _, predict = build_unet(library, params)
        z_t = torch.empty(
            batch_size, params["in_channels"], params["image_size"], params["image_size"]
        )
        t = torch.empty(batch_size, dtype=torch.int64)

        def run() -> None:
            if train:
                predict(z_t, t).sum().backward()
            else:
                with torch.no_grad():
                    predict(z_t, t)

        return count_flops(run)


def encode_flops(library: str, ddconfig: dict[str, Any], embed_dim: int, batch_size: int) -> int:
    """Operations of encoding a batch of images."""
    with torch.device("meta"), torch.no_grad():
        net, _ = build_autoencoder(library, ddconfig, embed_dim)
        size = ddconfig["resolution"]
        x = torch.empty(batch_size, ddconfig.get("in_channels", 3), size, size)
        return count_flops(lambda: net.encode(x))
