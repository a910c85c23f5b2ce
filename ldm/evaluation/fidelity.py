"""How close synthetic tiles come to real ones as a set, on features of any network.

The arithmetic is torch-fidelity's; the features are ours (`ldm.features`), so no weights are
fetched. Numbers of different networks do not compare, nor do Frechet distances of sets of
different sizes.

Letters: N, M images of the two sets, D features.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

KID_SUBSETS = 50
KID_SUBSET_SIZE = 1000  # at most; smaller sets are taken whole in halves
FEWEST_TILES = 8
# Names of the values of `fidelity` in the records of scripts/fidelity.py.
METRICS = {
    "frechet_distance": "fid",
    "kernel_distance": "kid",
    "kernel_distance_std": "kid_std",
    "precision": "precision",
    "recall": "recall",
}
NEIGHBOURS = 3  # of improved precision and recall
DISTANCES = 50_000_000  # at most, in memory together (400 MB) for precision and recall
UNBIASED_FROM = 2000  # images of a set, below which a Frechet distance is mostly bias
MOST_SHIFT = 0.05  # of a class's share, beyond which two sets are not of the same mixture


def kid_subset_size(real: int, synthetic: int) -> int:
    """Images of each side in one of the subsets that the kernel distance is averaged over."""
    return min(KID_SUBSET_SIZE, min(real, synthetic) // 2)


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Frechet distance of the Gaussians that fit two sets of features (Heusel et al. 2017).

    |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)), with covariances S of N - 1.

    Args:
        first, second: (N, D) and (M, D) float64.
    """
    if min(len(first), len(second)) > first.shape[1]:
        statistics = [fid_features_to_statistics(features) for features in (first, second)]
        found = fid_statistics_to_metric(*statistics, verbose=False)
        return float(found["frechet_inception_distance"])
    # Covariances of low rank, as those of single classes are. With S = A^T A of the centred, scaled
    # features A, the trace of (S_1 S_2)^(1/2) is the sum of the singular values of A_1 A_2^T, which
    # is N x M where S_1 S_2 is D x D: seconds less per class, and free of the square roots of
    # rounding errors in D - N eigenvalues that should be 0.
    means = [features.mean(dim=0) for features in (first, second)]
    scaled = [
        (features - mean) / (len(features) - 1) ** 0.5
        for features, mean in zip((first, second), means, strict=True)
    ]
    # A longer set shrinks to D rows that have the same covariance.
    factors = [a if len(a) <= a.shape[1] else torch.linalg.qr(a, mode="r").R for a in scaled]
    traces = sum(float(a.square().sum()) for a in scaled)
    mixed = float(torch.linalg.svdvals(factors[0] @ factors[1].T).sum())
    return float((means[0] - means[1]).square().sum()) + traces - 2 * mixed


def fidelity(real: Tensor, synthetic: Tensor, seed: int = 0) -> dict[str, float]:
    """Distances of two sets of features, (N, D) and (M, D); at least 8 of each.

    Args:
        seed: Seed of the subsets that the kernel distance is averaged over.

    Returns:
        `frechet_distance` (Heusel et al. 2017; biased for sets of a few thousand and less),
        `kernel_distance` and `kernel_distance_std` (Binkowski et al. 2018; unbiased), `precision`
        and `recall` in [0, 1] (Kynkaanniemi et al. 2019).
    """
    assert real.ndim == synthetic.ndim == 2 and real.shape[1] == synthetic.shape[1]
    assert min(len(real), len(synthetic)) >= FEWEST_TILES
    real, synthetic = real.double(), synthetic.double()
    frechet = frechet_distance(synthetic, real)
    kernel = kid_features_to_metric(
        synthetic,
        real,
        kid_subsets=KID_SUBSETS,
        kid_subset_size=kid_subset_size(len(real), len(synthetic)),
        rng_seed=seed,
        verbose=False,
    )
    with torch.no_grad():
        manifold = prc_features_to_metric(
            synthetic,
            real,
            prc_neighborhood=NEIGHBOURS,
            prc_batch_size=max(1, min(10_000, DISTANCES // max(len(real), len(synthetic)))),
            save_cpu_ram=True,
            verbose=False,
        )
    return {
        "frechet_distance": frechet,
        "kernel_distance": float(kernel["kernel_inception_distance_mean"]),
        "kernel_distance_std": float(kernel["kernel_inception_distance_std"]),
        "precision": float(manifold["precision"]),
        "recall": float(manifold["recall"]),
    }


def measure(real: Tensor, fake: Tensor, seed: int = 0) -> dict[str, Any]:
    """`fidelity` with numbers of images, as scripts/fidelity.py writes it.

    Where one side has fewer than 8 images, the values are None and `reason` says so.
    """
    found = {"images_real": len(real), "images_fake": len(fake)}
    if min(found.values()) < FEWEST_TILES:
        few = f"fewer than {FEWEST_TILES} images: {len(real)} real, {len(fake)} fake"
        return {**found, **dict.fromkeys(METRICS.values()), "kid_subset_size": None, "reason": few}
    values = fidelity(real, fake, seed)
    found |= {short: values[name] for name, short in METRICS.items()}
    return {**found, "kid_subset_size": kid_subset_size(len(real), len(fake))}


def measure_classes(
    real: Tensor,
    real_classes: Sequence[str],
    fake: Tensor,
    fake_classes: Sequence[str],
    seed: int = 0,
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """All images together, and each class of the real set against the same class of the other.

    The classes are those of each row, empty lists of sets without classes.
    """
    overall = measure(real, fake, seed)
    per_class = {}
    if real_classes and fake_classes:
        for name in sorted(set(real_classes)):
            rows = [
                features[torch.tensor([label == name for label in labels])]
                for features, labels in ((real, real_classes), (fake, fake_classes))
            ]
            per_class[name] = measure(*rows, seed)
    return overall, per_class


def count_warnings(overall: dict[str, Any], per_class: dict[str, dict[str, Any]]) -> list[str]:
    """What the numbers of images say about the values: biased, missing, or of another mixture."""
    warnings = []
    names = {"all tiles": overall, **per_class}
    missing = [f"{name} ({m['reason']})" for name, m in names.items() if "reason" in m]
    if missing:
        warnings.append(f"no values of {', '.join(missing)}")
    small = {
        name: min(m["images_real"], m["images_fake"])
        for name, m in names.items()
        if "reason" not in m and min(m["images_real"], m["images_fake"]) < UNBIASED_FROM
    }
    if small:
        listed = ", ".join(f"{name} {count}" for name, count in small.items())
        warnings.append(
            f"FID is biased upwards below {UNBIASED_FROM} images of a side, the more the fewer"
            f" there are ({listed}): read KID, which is unbiased, and compare FID only between"
            " sets of equal numbers"
        )
    totals = [sum(m[key] for m in per_class.values()) for key in ("images_real", "images_fake")]
    if per_class and all(totals):
        shares = {
            name: (m["images_real"] / totals[0], m["images_fake"] / totals[1])
            for name, m in per_class.items()
        }
        name, (a, b) = max(shares.items(), key=lambda item: abs(item[1][0] - item[1][1]))
        if abs(a - b) > MOST_SHIFT:
            warnings.append(
                f"the classes are mixed otherwise ({name} is {a:.0%} of the real and {b:.0%} of the"
                " fake tiles), which counts as a difference over all tiles; read the values per"
                " class"
            )
    return warnings
