"""Distances between sets of features go in the right direction and match closed forms."""

import pytest
import torch

from ldm.errors import UserError
from ldm.evaluation.fidelity import fidelity


def normal(count: int, seed: int, shift: float = 0.0, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return shift + spread * torch.randn(count, 4, generator=generator)


def test_the_same_distribution_is_close_and_a_shifted_one_is_not():
    same = fidelity(normal(1000, 0), normal(1000, 1))
    shifted = fidelity(normal(1000, 0), normal(1000, 1, shift=3.0))
    assert same["frechet_distance"] < 0.1 and abs(same["kernel_distance"]) < 0.2
    assert same["precision"] > 0.8 and same["recall"] > 0.8
    # Two Gaussians of one covariance: the squared distance of their means, 4 x 9.
    assert shifted["frechet_distance"] == pytest.approx(36, rel=0.05)
    assert shifted["kernel_distance"] > 10 and shifted["precision"] < 0.1


def test_a_collapsed_set_has_low_recall_but_keeps_precision():
    collapsed = fidelity(normal(600, 0), normal(600, 1, spread=0.1))
    assert collapsed["precision"] > 0.9 and collapsed["recall"] < 0.2


def test_real_and_synthetic_are_not_interchangeable():
    narrow, wide = normal(500, 0, spread=0.1), normal(500, 1)
    assert fidelity(real=wide, synthetic=narrow)["recall"] < 0.2
    assert fidelity(real=narrow, synthetic=wide)["precision"] < 0.2


def test_order_does_not_matter_for_the_closed_forms():
    real, synthetic = normal(200, 0), normal(200, 1, shift=0.5)
    shuffled = synthetic[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    first, second = fidelity(real, synthetic), fidelity(real, shuffled)
    for name in ("frechet_distance", "precision", "recall"):
        assert first[name] == pytest.approx(second[name], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("real", "synthetic", "words"),
    [
        (normal(7, 0), normal(50, 1), "7 tiles are too few"),
        (normal(50, 0), normal(50, 1)[:, :3], "same network"),
    ],
)
def test_sets_that_do_not_compare(real, synthetic, words):
    with pytest.raises(UserError, match=words):
        fidelity(real, synthetic)
