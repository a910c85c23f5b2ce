"""How close synthetic tiles come to real ones as a set, on features of any network.

The arithmetic is torch-fidelity's; the features are ours (`ldm.selection.features`), so no weights
are fetched. Numbers of different networks do not compare, nor do Frechet distances of sets of
different sizes.
"""

import torch
from torch import Tensor

from ldm.errors import UserError

KID_SUBSETS = 50
KID_SUBSET_SIZE = 1000  # at most; smaller sets are taken whole in halves
FEWEST_TILES = 8
NEIGHBOURS = 3  # of improved precision and recall


def fidelity(real: Tensor, synthetic: Tensor, seed: int = 0) -> dict[str, float]:
    """Distances of two sets of features.

    Args:
        real, synthetic: Features, (N, D) and (M, D); at least 8 of each.
        seed: Of the subsets that the kernel distance is averaged over.

    Returns:
        `frechet_distance` (Heusel et al. 2017; biased for sets of a few thousand and less),
        `kernel_distance` and `kernel_distance_std` (Binkowski et al. 2018; unbiased), `precision`
        and `recall` in [0, 1] (Kynkaanniemi et al. 2019).

    Raises:
        UserError: Too few tiles, or features of different widths.
    """
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    if real.ndim != 2 or synthetic.ndim != 2 or real.shape[1] != synthetic.shape[1]:
        raise UserError(
            f"features of shapes {tuple(real.shape)} and {tuple(synthetic.shape)} do not compare; "
            "compute both with the same network"
        )
    fewest = min(len(real), len(synthetic))
    if fewest < FEWEST_TILES:
        raise UserError(
            f"{fewest} tiles are too few to compare distributions; give at least {FEWEST_TILES}"
        )
    real, synthetic = real.double(), synthetic.double()
    statistics = [fid_features_to_statistics(f) for f in (synthetic, real)]
    frechet = fid_statistics_to_metric(*statistics, verbose=False)
    kernel = kid_features_to_metric(
        synthetic,
        real,
        kid_subsets=KID_SUBSETS,
        kid_subset_size=min(KID_SUBSET_SIZE, fewest // 2),
        rng_seed=seed,
        verbose=False,
    )
    with torch.no_grad():
        manifold = prc_features_to_metric(
            synthetic,
            real,
            prc_neighborhood=NEIGHBOURS,
            prc_batch_size=10_000,
            save_cpu_ram=True,
            verbose=False,
        )
    return {
        "frechet_distance": float(frechet["frechet_inception_distance"]),
        "kernel_distance": float(kernel["kernel_inception_distance_mean"]),
        "kernel_distance_std": float(kernel["kernel_inception_distance_std"]),
        "precision": float(manifold["precision"]),
        "recall": float(manifold["recall"]),
    }
