"""Published weights that the toolkit can use: where they lie on this machine and come from.

Nothing here downloads but `fetch`, which only scripts/fetch_weights.py calls.
"""

import contextlib
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import UserError
from ldm.features.source import DINOV2

# What timm calls the file in the repositories that its pretrained configurations name.
HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def cached_weights(config) -> Path | None:
    """The weights of a timm pretrained configuration in the Hugging Face or torch cache, if any."""
    if config is None:
        return None
    if config.hf_hub_id:
        from huggingface_hub import try_to_load_from_cache

        for place in _hub_places(config):
            found = try_to_load_from_cache(**place)
            if isinstance(found, str):  # otherwise None, or a note that there is no such file
                return Path(found)
    if config.url:
        path = _torch_cache(config.url)
        if path.is_file():
            return path
    return None


def _hub_places(config) -> list[dict[str, str | None]]:
    """Where the weights of a timm configuration may be on the hub, as huggingface_hub takes it."""
    repository, _, revision = config.hf_hub_id.partition("@")
    files = (config.hf_hub_filename,) if config.hf_hub_filename else HUB_FILES
    return [{"repo_id": repository, "filename": f, "revision": revision or None} for f in files]


def _torch_cache(url: str) -> Path:
    """Where the file of `url` lies in the cache of torch."""
    import torch

    return Path(torch.hub.get_dir(), "checkpoints", os.path.basename(url))


@dataclass(frozen=True)
class Weights:
    """A file of published weights."""

    name: str  # short name, as commands take it
    purpose: str  # what it is for
    url: str  # where it comes from
    # timm's name, of those in the cache of Hugging Face; None of files in the cache of torch.
    timm_name: str | None = None
    # First digits of the SHA-256, which the file's name carries; None if unknown.
    hash_prefix: str | None = None

    @property
    def place(self) -> Path:
        """Where the file is looked for, and where `fetch` puts it (torch's cache)."""
        return _torch_cache(self.url)

    def find(self) -> Path | None:
        """The file in a cache of this machine, or None."""
        if self.timm_name is not None:
            from timm import get_pretrained_cfg

            return cached_weights(get_pretrained_cfg(self.timm_name))
        return self.place if self.place.is_file() else None

    def require(self) -> Path:
        """The file in a cache of this machine."""
        found = self.find()
        if found is None:
            # timm's repositories have a directory layout of their own, so only a file of torch's
            # cache can be put into place by hand.
            by_hand = "" if self.timm_name else f" or download {self.url} to {self.place}"
            raise UserError(
                f"the weights of {self.name} are not on this machine and nothing is downloaded"
                f" here; where there is internet run: python scripts/fetch_weights.py {self.name}"
                f"{by_hand}; then copy the file and give its path as the weights"
            )
        return found

    def fetch(self) -> Path:
        """Download the file into its cache; it appears complete and with the right hash, or not."""
        try:
            if self.timm_name is not None:
                return _fetch_timm(self.timm_name)
            from torch.hub import download_url_to_file

            self.place.parent.mkdir(parents=True, exist_ok=True)
            download_url_to_file(self.url, str(self.place), self.hash_prefix, progress=True)
            return self.place
        except RuntimeError as error:  # what torch says of a wrong hash
            raise UserError(f"{self.name}: {self.url}: {_short(error)}; try again later") from None
        except OSError as error:  # of urllib and huggingface_hub alike
            target = "give its path" if self.timm_name else f"put it at {self.place}"
            raise UserError(
                f"{self.name}: {self.url} cannot be fetched ({_short(error)}); run this where"
                f" there is internet, copy the file here and {target}"
            ) from None


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


def _fetch_timm(timm_name: str) -> Path:
    import timm
    from huggingface_hub import constants, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    places = _hub_places(timm.get_pretrained_cfg(timm_name))
    if not constants.HF_HUB_OFFLINE:
        # huggingface_hub retries for half a minute, with a line each, before it gives up.
        with contextlib.suppress(urllib.error.HTTPError):  # a server that answers is there
            request = urllib.request.Request(hf_hub_url(**places[0]), method="HEAD")
            urllib.request.urlopen(request, timeout=20).close()
    for place in places:
        try:
            return Path(hf_hub_download(**place))
        except LocalEntryNotFoundError:  # no connection; an EntryNotFoundError too
            raise
        except EntryNotFoundError:
            continue
    raise UserError(f"{timm_name}: none of its files is on the hub ({places})")


_KNOWN = (
    Weights(
        "inception",
        "FID and KID as published (histodiffusion fidelity --extractor inception)",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
        "weights-inception-2015-12-05-6726825d.pth",
        hash_prefix="6726825d",
    ),
    Weights(
        "lpips",
        "backbone of LPIPS, torchvision's VGG-16 (autoencoder training)",
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        hash_prefix="397923af",
    ),
    *(
        Weights(
            name,
            f"{timm_name} (histodiffusion fidelity --extractor {name}, --model, --features timm:)",
            f"https://huggingface.co/timm/{timm_name}",
            timm_name=timm_name,
        )
        for name, timm_name in DINOV2.items()
    ),
)
WEIGHTS = {weights.name: weights for weights in _KNOWN}
