"""A small classifier on features of a noise predictor (readout guidance, Luo et al. 2024).

Letters: B batch, D features, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.blocks import timestep_embedding

TIME_WIDTH = 64


class Readout(nn.Module):
    """p(y | features of a UNet at z_t, t): one hidden layer that also gets the time.

    Args:
        features: D.
        classes: K.
        width: Width of the hidden layer.
        dropout: Dropout of the features and of the hidden layer.
    """

    def __init__(self, features: int, classes: int, width: int = 256, dropout: float = 0.3):
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("deviation", torch.ones(features))
        self.inner = nn.Linear(features, width)
        self.time = nn.Linear(TIME_WIDTH, width)
        self.out = nn.Linear(width, classes)
        self.dropout = nn.Dropout(dropout)

    def standardise(self, features: Tensor) -> None:
        """Store mean and deviation of the training features (N, D), which standardise inputs."""
        self.mean.copy_(features.mean(dim=0))
        self.deviation.copy_(features.std(dim=0) + 1e-6)

    def forward(self, features: Tensor, t: Tensor) -> Tensor:
        """Logits (B, K) of features (B, D) at times t (B,)."""
        scaled = (features - self.mean) / self.deviation
        h = self.inner(self.dropout(scaled)) + self.time(timestep_embedding(t, TIME_WIDTH))
        return self.out(self.dropout(F.silu(h)))
