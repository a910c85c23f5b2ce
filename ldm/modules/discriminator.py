"""PatchGAN discriminator (Isola et al. 2017, appendix 6.1.2): one real-or-fake score per patch."""

from torch import Tensor, nn


def _init_weights(module: nn.Module) -> None:
    # N(0, 0.02), the initialisation of DCGAN (Radford et al. 2016) and published discriminators.
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class NLayerDiscriminator(nn.Module):
    """Strided convolutions with batch normalisation.

    Args:
        input_nc: Image channels.
        ndf: Channels of the first layer; they double per layer up to 8 times.
        n_layers: Number of strided layers; 3 gives a receptive field of 70 pixels.
    """

    def __init__(self, input_nc: int = 3, ndf: int = 64, n_layers: int = 3):
        super().__init__()
        layers = [nn.Conv2d(input_nc, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        channels = ndf
        for n in range(1, n_layers + 1):
            width = ndf * min(2**n, 8)
            stride = 2 if n < n_layers else 1
            layers += [
                nn.Conv2d(channels, width, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.LeakyReLU(0.2, inplace=True),
            ]
            channels = width
        layers.append(nn.Conv2d(channels, 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*layers)
        # Smallest side in pixels: each of the last two layers takes one of the rest, one remains.
        self.smallest = 3 * 2**n_layers
        self.apply(_init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (B, 1, h, w) of images (B, input_nc, H, W); larger means more real."""
        return self.main(x)
