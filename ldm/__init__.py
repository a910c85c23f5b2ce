"""HistoDiffusion: synthetic augmentation of histopathology tiles with latent diffusion."""

from typing import Any

__version__ = "0.1.0"
# Of ldm.api, imported at first use: `import ldm` is light, and commands answer --help at once.
_API = ("fit_probe", "load", "select", "train_classifier", "write_tiles")


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("ldm.api"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_API])
