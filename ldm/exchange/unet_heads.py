"""`UNet2DModel` of diffusers with the same number of attention heads at every width.

The file imports nothing of this toolkit, since exported models bring a copy of it.
"""

import inspect

from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention


class UNetWithHeads(UNet2DModel):
    """A UNet2DModel whose attention layers have a given number of heads, not a given head width.

    Args: The arguments of UNet2DModel, and
        num_heads: Heads of every attention layer.
    """

    def __init__(self, *, num_heads: int = 1, **options):
        super().__init__(**options)
        self.register_to_config(num_heads=num_heads)
        for layer in self.modules():
            if isinstance(layer, Attention):
                layer.heads = num_heads
                layer.scale = (layer.inner_dim // num_heads) ** -0.5

    # diffusers reads from the signature which of the stored settings are arguments.
    __init__.__signature__ = inspect.Signature(
        [
            *inspect.signature(UNet2DModel.__init__).parameters.values(),
            inspect.Parameter("num_heads", inspect.Parameter.KEYWORD_ONLY, default=1),
        ]
    )
