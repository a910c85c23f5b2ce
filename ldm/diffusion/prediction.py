"""Kinds of network output, and the noise that each implies.

Samplers, guidance and validation work with noise predictors; training compares the network's output
with the target of its own kind.
"""

from torch import Tensor, nn

from ldm.diffusion.process import Process


class NoisePrediction:
    """The network predicts the noise eps (Ho et al. 2020)."""

    def __init__(self, process: Process):
        self.process = process

    def target(self, z_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Output that the network should give for `process.q_sample(...)`, (B, C, H, W)."""
        return eps

    def eps(self, z_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The noise that z_t and the network's output imply."""
        return output

    def simple_error(self, t: Tensor, error: Tensor) -> Tensor:
        """Error that `loss_simple` averages, from the `error` of the output."""
        return error

    def validation_error(
        self, output: Tensor, z_0: Tensor, z_t: Tensor, t: Tensor, eps: Tensor
    ) -> Tensor:
        """Like `simple_error`, computed from the output itself."""
        return self.eps(z_t, t, output) - eps


class VPrediction(NoisePrediction):
    """The network predicts v (Salimans & Ho 2022, appendix D); losses are those of the noise."""

    def target(self, z_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return self.process.v(z_0, t, eps)

    def eps(self, z_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        return self.process.eps_of_v(z_t, t, output)

    def simple_error(self, t: Tensor, error: Tensor) -> Tensor:
        # The error of eps is sqrt(alpha_bar_t) times that of v, see `NoiseSchedule.eps_of_v`.
        return self.process.signal(t, error) * error


class VelocityPrediction(NoisePrediction):
    """The network predicts eps - z_0, the velocity of a rectified flow; losses are its own."""

    def target(self, z_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return eps - z_0

    def eps(self, z_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        return z_t + self.process.signal(t, z_t) * output

    def validation_error(
        self, output: Tensor, z_0: Tensor, z_t: Tensor, t: Tensor, eps: Tensor
    ) -> Tensor:
        return output - self.target(z_0, t, eps)


PREDICTIONS = {"eps": NoisePrediction, "v": VPrediction, "flow": VelocityPrediction}


class NoisePredictor(nn.Module):
    """Adapter that makes a network of any prediction kind a noise predictor.

    Args:
        net: (z_t (B, C, H, W), t (B,), y (B,) or None) -> its prediction, (B, C, H, W).
        prediction: Kind of that prediction.
    """

    def __init__(self, net: nn.Module, prediction: NoisePrediction):
        super().__init__()
        self.net = net
        self.prediction = prediction

    def forward(self, z_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.prediction.eps(z_t, t, self.net(z_t, t, y))
