"""HistoDiffusion: synthetic augmentation of histopathology tiles with latent diffusion."""

__version__ = "0.1.0"
