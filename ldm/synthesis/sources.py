"""Real tiles that sampling starts from: variations instead of images from noise.

A tile is noised part of the way and denoised towards a class (SDEdit, Meng et al. 2022; DA-Fusion,
Trabucco et al. 2023). What is left of it keeps layout and colour plausible where a model that
starts from noise alone is not good enough yet.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.data.arrays import is_array, list_rows
from ldm.data.folders import refuse_held_out
from ldm.data.images import class_folders
from ldm.data.tile_files import content_sha256
from ldm.data.tiles import SYMMETRIES, TileFolder, symmetry
from ldm.errors import UserError
from ldm.files import digest_of
from ldm.models.classifier import GuidingClassifier
from ldm.models.diffusion import LatentDiffusion

BATCH = 64


class Sources:
    """The tiles of each class that images start from.

    Image `index` of a class starts from tile index modulo their number; each time all have been
    used, they are used in another of the eight flips and rotations. So a source depends on (class,
    index) alone.

    Args:
        root: Class folders of the classes of the models, or tiles without labels.
        diffusion: Gives the size of the tiles, and their latents.
        classes: Class names in label order.
        judge: Labels the tiles where the folder has no class folders: each tile counts for its
            likeliest class, the surest ones first.
        least: Tiles that the judge gives a smaller probability are left out.

    Attributes:
        by_class: Files of each class, in the order of use.
        digest: SHA-256 of the files and of which class they are used for.

    Raises:
        UserError: A folder of validation or test tiles, one without tiles for some class, or
            unlabelled tiles without a judge.
    """

    def __init__(
        self,
        root: str | Path,
        diffusion: LatentDiffusion,
        classes: Sequence[str],
        judge: GuidingClassifier | None = None,
        least: float = 0.0,
    ):
        self.root, self.diffusion = Path(root).expanduser(), diffusion
        refuse_held_out(self.root, "`start_from`")
        size = diffusion.first_stage_model.resolution
        labelled = set(classes) <= set(class_folders(self.root))
        self._tiles = TileFolder(self.root, size, labelled, list(classes) if labelled else None)
        if labelled:
            chosen = {name: [] for name in classes}
            for i, label in enumerate(self._tiles.labels):
                chosen[classes[label]].append(i)
        elif judge is None:
            raise UserError(
                f"`start_from` {root} has no folders {', '.join(classes)}: unlabelled tiles need "
                "`classifier`, which says what they are"
            )
        else:
            chosen = self._judged(classes, judge, least)
        self._chosen = chosen
        if is_array(self.root):
            files = list_rows(self.root)
        else:
            files = [path.relative_to(self.root).as_posix() for path in self._tiles.paths]
        self.by_class = {name: [files[i] for i in members] for name, members in chosen.items()}
        self.digest = digest_of(
            {
                name: [content_sha256(self.root / file) for file in files]
                for name, files in self.by_class.items()
            }
        )

    @torch.no_grad()
    def _judged(
        self, classes: Sequence[str], judge: GuidingClassifier, least: float
    ) -> dict[str, list[int]]:
        """Tiles of each class by falling probability, at t = 0."""
        net, probabilities = judge.logits_model(), []
        for start in range(0, len(self._tiles), BATCH):
            members = range(start, min(start + BATCH, len(self._tiles)))
            z_0 = self._encode(self._tiles[i]["image"] for i in members)
            t = torch.zeros(len(z_0), dtype=torch.int64, device=z_0.device)
            logits = net(z_0, t).float() / judge.temperature
            probabilities.append(logits.softmax(dim=1).cpu())
        p = torch.cat(probabilities).double().numpy()  # (N, K)
        order = np.argsort(-p.max(axis=1), kind="stable")
        return {
            name: [int(i) for i in order if p[i].argmax() == k and p[i, k] >= least]
            for k, name in enumerate(classes)
        }

    def require(self, names: Sequence[str]) -> None:
        """UserError unless there are tiles for each of these classes."""
        empty = [name for name in names if not self.by_class[name]]
        if empty:
            raise UserError(
                f"`start_from` {self.root}: no tile for {', '.join(empty)}; lower "
                "`start_confidence`, leave the class out, or give more tiles"
            )

    def file(self, name: str, index: int) -> str:
        """The file, relative to the folder, that an image starts from."""
        files = self.by_class[name]
        return files[index % len(files)]

    @torch.no_grad()
    def start(
        self, jobs: Sequence[tuple[str, int]], share: float | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Where images (class, index) start, and what is added to them in the end.

        Args:
            share: Of what the first stage loses of the sources, x - D(E(x)), in (0, 1].

        Returns:
            Clean scaled latents of the sources, (B, C, H, W); that share, (B, 3, H, W) in [-2, 2],
            or None.
        """
        images = [self._image(*job) for job in jobs]
        z_0 = self._encode(images)
        if share is None:
            return z_0, None
        kept = torch.cat([self.diffusion.decode_first_stage(z[None]) for z in z_0])
        return z_0, share * (torch.stack(images).to(kept.device) - kept)

    def _image(self, name: str, index: int) -> Tensor:
        """The tile (3, H, W) that an image starts from, flipped and turned, in [-1, 1]."""
        members = self._chosen[name]
        tile = self._tiles[members[index % len(members)]]["image"]
        return symmetry(tile, index // len(members) % SYMMETRIES)

    @torch.no_grad()
    def _encode(self, images: Iterable[Tensor]) -> Tensor:
        device = self.diffusion.scale_factor.device
        # One at a time: an image must not depend on those that are made beside it.
        batches = ({"image": image[None].to(device)} for image in images)
        return torch.cat([self.diffusion.latents(batch, sample=False) for batch in batches])
