"""Seeding of the global random generators."""

import random

import numpy as np
import torch


def seed_generators(*entropy: int, accelerators: bool = True) -> None:
    """Seed Python's, NumPy's and torch's global generators: timm draws from all three.

    Args:
        accelerators: Torch's generators of GPUs too, which takes a hundred times as long.
    """
    words = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    seed_torch = torch.manual_seed if accelerators else torch.default_generator.manual_seed
    seed_torch(int(words[2]))
