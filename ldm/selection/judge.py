"""The judge of a selection: one network's features of the real and the synthetic tiles."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.data.tile_files import TileFiles
from ldm.devices import resolve_device
from ldm.errors import UserError
from ldm.features.centroids import Centroids
from ldm.features.extractor import Extractor
from ldm.features.sets import FeatureSet, cached_features
from ldm.features.source import parse_features

log = logging.getLogger(__name__)

REAL_FILE, SYNTHETIC_FILE = "features_real.safetensors", "features_synthetic.safetensors"
CENTROIDS_FILE = "centroids.safetensors"


@dataclass(frozen=True)
class Judged:
    """Features and centroids that belong together; the synthetic ones are in order.

    Raises:
        UserError: They do not: other classes, another network or other real tiles.
    """

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


@dataclass(frozen=True)
class NetworkOptions:
    """How features are computed, as `ldm.settings.FeatureOptions` has it.

    Attributes:
        cache: Folder of computed features.
    """

    pretrained_weights: str | None = None
    input_size: int | None = None
    batch_size: int | None = None
    num_workers: int | None = None
    device: str | None = None
    cache: str | None = None

    @property
    def loading(self) -> dict[str, int]:
        """Arguments of `cached_features`, those that were given."""
        both = {"batch_size": self.batch_size, "num_workers": self.num_workers}
        return {name: value for name, value in both.items() if value is not None}

    @property
    def given(self) -> list[str]:
        return [f"--{name}" for name, value in vars(self).items() if value is not None]


def is_vis_folder(source: str) -> bool:
    """Whether `source` is a folder of scripts/vis.py (or at least no place of a checkpoint)."""
    path = Path(source).expanduser()
    return path.is_dir() and not (path / "checkpoints" / "best.ckpt").is_file()


def read_judged(source: str, synthetic_root: Path) -> Judged:
    """What scripts/vis.py wrote for the images that are in the folder `synthetic_root` now.

    Raises:
        UserError: Missing or foreign files, or features of other images.
    """
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
    source: str, real_root: Path, synthetic_root: Path, options: NetworkOptions
) -> Judged:
    """Features by a network, from the cache where it was asked for the same tiles before.

    The cache (see `cached_features`) is beside the synthetic folder if no other is named:
    SYNTHETIC.features.

    Args:
        source: A network, see `parse_features`.
    """
    network = parse_features(source, options.pretrained_weights, options.input_size)
    extractor = network.open(resolve_device(options.device))
    beside = synthetic_root.resolve()  # which has a name, other than "."
    cache = Path(options.cache or beside.with_name(f"{beside.name}.features"))
    real, synthetic = labelled_features(real_root, synthetic_root, extractor, cache, cache, options)
    return Judged(real, synthetic.in_order(), centroids_of(real))


def labelled_features(
    real_root: Path,
    synthetic_root: Path,
    extractor: Extractor,
    real_cache: Path,
    synthetic_cache: Path,
    options: NetworkOptions,
) -> tuple[FeatureSet, FeatureSet]:
    """Features of two folders with the same classes, each kept in its cache."""
    # Both are indexed before any features are computed: differing classes are known at once.
    real = TileFiles.below(real_root, True)
    synthetic = TileFiles.below(synthetic_root, True, real.classes)
    return (
        cached_features(real, extractor, real_cache, **options.loading),
        cached_features(synthetic, extractor, synthetic_cache, **options.loading),
    )


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
