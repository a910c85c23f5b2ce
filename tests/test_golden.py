"""The networks have the parameter names, shapes and outputs of published checkpoints
(tests/golden)."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ldm.modules.autoencoder import AutoencoderKL
from ldm.modules.discriminator import NLayerDiscriminator
from ldm.modules.lr_schedule import LambdaLinearScheduler
from ldm.modules.unet import EncoderUNetModel, UNetModel

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 2e-5  # float32, sums in another order


def load(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    description = json.loads((GOLDEN / f"{name}.json").read_text())
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return description, dict(arrays)


def golden_weights(net: nn.Module) -> nn.Module:
    """Set the weights that follow from each parameter's name."""
    state = net.state_dict()
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        shape = tuple(tensor.shape)
        r = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
        if len(shape) >= 2:
            w = r * 0.5 / np.sqrt(np.prod(shape[1:]))
        elif key.endswith("running_var"):
            w = np.abs(1 + 0.1 * r)
        elif key.endswith("weight"):
            w = 1 + 0.1 * r
        else:
            w = 0.1 * r
        state[key] = torch.from_numpy(np.asarray(w, dtype=np.float32))
    net.load_state_dict(state, strict=True)
    return net.eval()


def assert_shapes(net: nn.Module, description: dict) -> None:
    ours = {k: list(v.shape) for k, v in net.state_dict().items() if v.is_floating_point()}
    assert ours == description["shapes"]


def assert_close(ours: torch.Tensor, reference: np.ndarray) -> None:
    np.testing.assert_allclose(ours.detach().numpy(), reference, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["unet_paper_family", "unet_plain"])
def test_unet(name):
    description, data = load(name)
    net = golden_weights(UNetModel(**description["config"]))
    assert_shapes(net, description)
    assert sum(p.numel() for p in net.parameters()) == description["n_params"]
    with torch.no_grad():
        assert_close(net(torch.from_numpy(data["x"]), torch.from_numpy(data["t"])), data["y"])


def test_autoencoder():
    description, data = load("autoencoder_paper_family")
    net = golden_weights(AutoencoderKL(**description["config"]))
    assert_shapes(net, description)
    with torch.no_grad():
        posterior = net.encode(torch.from_numpy(data["x"]))
        assert_close(torch.cat([posterior.mean, posterior.logvar], dim=1), data["moments"])
        assert_close(net.decode(posterior.mode()), data["reconstruction_of_mean"])
        # A sum over 192 latent values of magnitude up to 100: relative, not absolute.
        np.testing.assert_allclose(posterior.kl().numpy(), data["kl"], rtol=1e-5)


def test_classifier_and_its_gradient():
    description, data = load("classifier_paper_family")
    net = golden_weights(EncoderUNetModel(**description["config"]))
    assert_shapes(net, description)
    x = torch.from_numpy(data["x"]).requires_grad_(True)
    logits = net(x, torch.from_numpy(data["t"]))
    assert_close(logits, data["logits"])
    log_p = logits.log_softmax(dim=-1).gather(1, torch.from_numpy(data["labels"])[:, None])
    (gradient,) = torch.autograd.grad(log_p.sum(), x)
    assert_close(gradient, data["grad_log_prob"])


def test_patch_discriminator():
    description, data = load("patch_discriminator")
    net = golden_weights(NLayerDiscriminator(**description["config"]))
    assert_shapes(net, description)
    with torch.no_grad():
        assert_close(net(torch.from_numpy(data["x"])), data["y"])


def test_lambda_linear_schedule():
    description, data = load("lambda_linear")
    schedule = LambdaLinearScheduler(**description["config"])
    np.testing.assert_allclose([schedule(int(s)) for s in data["step"]], data["f"], rtol=1e-12)


def test_every_golden_file_is_used():
    names = {p.stem for p in GOLDEN.glob("*.json")}
    source = "".join(p.read_text() for p in Path(__file__).parent.glob("test_*.py"))
    assert names and all(f'"{name}"' in source for name in names)
