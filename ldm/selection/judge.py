"""The judge of a selection: one network's features of the real and the synthetic tiles."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.data.tile_files import TileFiles
from ldm.errors import UserError
from ldm.features.centroids import Centroids
from ldm.features.extractor import Extractor
from ldm.features.sets import FeatureSet, cached_features

REAL_FILE, SYNTHETIC_FILE = "features_real.safetensors", "features_synthetic.safetensors"
CENTROIDS_FILE = "centroids.safetensors"


@dataclass(frozen=True)
class Judged:
    """Features and centroids that belong together (checked); the synthetic ones are in order."""

    real: FeatureSet
    synthetic: FeatureSet
    centroids: Centroids

    def __post_init__(self):
        for name, other in (("real tiles", self.real), ("centroids", self.centroids)):
            if self.synthetic.classes != other.classes:
                raise UserError(
                    f"the synthetic images have the classes {self.synthetic.classes}, the {name}"
                    f" {other.classes}; run scripts/vis.py on folders with the same classes"
                )
            if self.synthetic.extractor != other.extractor:
                raise UserError(
                    f"the features of the synthetic images and the {name} come from different"
                    " networks; run scripts/vis.py again with one network for both"
                )
        if self.real.tiles != self.centroids.tiles:
            raise UserError(
                "the centroids are not of the real tiles whose features lie beside them; run"
                " scripts/vis.py again"
            )


def is_vis_folder(source: str) -> bool:
    """Whether `source` is a folder of scripts/vis.py (or at least no place of a checkpoint)."""
    path = Path(source).expanduser()
    return path.is_dir() and not (path / "checkpoints" / "best.ckpt").is_file()


def read_judged(source: str, synthetic_root: Path) -> Judged:
    """What scripts/vis.py wrote for the images that are in the folder `synthetic_root` now."""
    folder = Path(source).expanduser()
    judged = Judged(
        FeatureSet.load(folder / REAL_FILE),
        FeatureSet.load(folder / SYNTHETIC_FILE).in_order(),
        Centroids.load(folder / CENTROIDS_FILE),
    )
    classes = judged.real.classes
    if TileFiles.below(synthetic_root, True, classes).digest != judged.synthetic.tiles:
        raise UserError(
            f"--synthetic {synthetic_root}: its images are not those of --features {source};"
            " run scripts/vis.py again"
        )
    return judged


def compute_judged(
    real_root: Path, synthetic_root: Path, extractor: Extractor, cache: Path | None, **loading: int
) -> Judged:
    """Features by a network, from the cache where it was asked for the same tiles before.

    Args:
        cache, loading: See `cached_features`; without a cache it is SYNTHETIC.features.
    """
    if cache is None:
        beside = synthetic_root.resolve()  # which has a name, other than "."
        cache = beside.with_name(f"{beside.name}.features")
    files = labelled_files(real_root, synthetic_root)
    real, synthetic = (cached_features(tiles, extractor, cache, **loading) for tiles in files)
    return Judged(real, synthetic.in_order(), centroids_of(real))


def labelled_files(real_root: Path, synthetic_root: Path) -> tuple[TileFiles, TileFiles]:
    """Both sets of tiles; UserError where the folders have other classes than one another."""
    real = TileFiles.below(real_root)
    return real, TileFiles.below(synthetic_root, classes=real.classes)


def centroids_of(real: FeatureSet) -> Centroids:
    """Centroids of labelled tiles."""
    return Centroids.of(real.values, real.labels, real.classes, real.extractor, real.tiles)


def conflicts(
    judged: Judged, real: TileFiles, downstream: Extractor | None
) -> tuple[dict[str, Any], list[str]]:
    """What judge and downstream model have in common: facts for the record, and warnings.

    Args:
        real: The labelled tiles of the training folder.
        downstream: The model that the images are for, where it is known.
    """
    judge = judged.synthetic
    name = judge.network or judge.extractor[:12]
    trained_here = None if judge.trained_on is None else judge.trained_on == real.listing
    facts: dict[str, Any] = {
        "judge": {"network": name, "identity": judge.extractor, "trained_on_real": trained_here},
        "downstream": None,
    }
    warnings = []
    if downstream is not None:
        same = downstream.identity == judge.extractor
        facts["downstream"] = {
            "network": downstream.name,
            "identity": downstream.identity,
            "is_the_judge": same,
        }
        if same:
            warnings.append(
                f"judge and downstream model are the same network ({name}): it is given what it"
                " agrees with already; judge with another one, for example --features timm:NAME"
            )
    if trained_here:
        warnings.append(
            f"the judge ({name}) was trained on the very tiles of --real: they lie closer to their"
            " class for it than new tiles do; a judge trained on others is a better witness"
        )
    return facts, warnings
