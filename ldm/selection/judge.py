"""The judge of a selection: what networks see in the real tiles and in the candidates."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.data.arrays import holder
from ldm.data.tile_files import TileFiles
from ldm.errors import UserError
from ldm.evaluation.predictions import Predictions
from ldm.features.centroids import Centroids, class_centroids
from ldm.features.extractor import Extractor
from ldm.features.probe import Judge, Probe
from ldm.features.sets import FeatureSet, cached_features

REAL_FILE, SYNTHETIC_FILE = "features_real.safetensors", "features_synthetic.safetensors"
CENTROIDS_FILE = "centroids.safetensors"


@dataclass(frozen=True)
class Judged:
    """Features and centroids that belong together (checked); the synthetic ones are in order.

    Attributes:
        real, synthetic, centroids: Of all networks side by side, see `FeatureSet.joined`.
        networks: The synthetic tiles by network; empty for a single one.
        judge: What gives classes to tiles; None where none was asked for.
        val: What `measured` found; None where there are no labelled tiles to measure on.
        left_out: Name, cross-entropy and accuracy of each network that has a regression, on
            left-out real tiles.
    """

    real: FeatureSet
    synthetic: FeatureSet
    centroids: Centroids
    networks: tuple[FeatureSet, ...] = ()
    judge: Judge | None = None
    val: dict[str, Any] | None = None
    left_out: tuple[dict[str, Any], ...] = ()

    @cached_property
    def probabilities(self) -> Tensor | None:
        """Of the judge for the synthetic tiles, (N, K) float64."""
        return self.judge and self.judge.probabilities(self.networks or [self.synthetic])

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


def read_judged(source: str, synthetic_root: Path, with_judge: bool = False) -> Judged:
    """What scripts/vis.py wrote for the images that are in the folder `synthetic_root` now.

    Args:
        with_judge: Fit a judge.
    """
    folder = Path(source).expanduser()
    judged = Judged(
        FeatureSet.load(folder / REAL_FILE),
        FeatureSet.load(folder / SYNTHETIC_FILE).in_order(),
        Centroids.load(folder / CENTROIDS_FILE),
    )
    files = TileFiles.below(synthetic_root, True, judged.real.classes)
    # The names too: they are copied to a new folder by them.
    same_names = sorted(files.names) == sorted(judged.synthetic.files)
    if files.digest != judged.synthetic.tiles or not same_names:
        raise UserError(
            f"`synthetic` {synthetic_root}: its images are not those of `features` {source};"
            " run scripts/vis.py again"
        )
    return replace(judged, judge=Judge.fit([judged.real])) if with_judge else judged


def compute_judged(
    real_root: Path,
    candidates_root: Path,
    unlabelled: bool,
    extractors: Iterable[Extractor],
    cache: Path | None,
    with_judge: bool,
    val_root: Path | None = None,
    choose: bool = False,
    **loading: int,
) -> Judged:
    """Features by networks, from the cache where they were asked for the same tiles before.

    Args:
        candidates_root: Synthetic tiles in class folders, or tiles whose labels are unknown.
        unlabelled: They are the latter: names of folders are ignored, each tile counts for the
            class that the judge gives it to, and tiles among the real ones are left out.
        extractors: Opened one after the other, where it is a generator.
        cache, loading: See `cached_features`; without a cache it is CANDIDATES.features.
        with_judge: Fit a judge, see `ldm.features.probe.Judge`.
        val_root: Labelled tiles that the judge is measured on.
        choose: Use the network alone whose regression has the lowest cross-entropy on left-out
            real tiles.
    """
    if cache is None:
        beside = candidates_root.resolve()  # which has a name, other than "."
        cache = holder(beside).with_name(f"{beside.name}.features")
    files = _tile_files(real_root, candidates_root, unlabelled, val_root)
    rows = _free_rows(files[1], files[0], files[2:]) if unlabelled else []
    # By set of tiles, then by network.
    real, found, *val = zip(
        *([cached_features(tiles, one, cache, **loading) for tiles in files] for one in extractors),
        strict=True,
    )
    probed = [one for one in real if one.logits is None] if with_judge else []
    left_out = [(one, Probe.of(one, cache).scores(one.labels)) for one in probed]
    if choose:
        if len(probed) < len(real):
            raise UserError(
                "`choose`: a classifier of these classes may have seen the tiles that would be left"
                " out; name other networks"
            )
        best = min(range(len(real)), key=lambda k: left_out[k][1]["cross_entropy"])
        real, found, *val = ((sets[best],) for sets in (real, found, *val))
    judge = Judge.fit(real, cache, *val) if with_judge else None
    if unlabelled:
        labels = judge.probabilities(found).argmax(dim=1)
        found = [replace(one, labels=labels).select(rows) for one in found]
    found = tuple(one.in_order() for one in found)
    joined = FeatureSet.joined(real)
    return Judged(
        joined,
        FeatureSet.joined(found),
        centroids_of(joined),
        found,
        judge,
        measured(judge, *val) if val else None,
        tuple({"network": one.network, **scores} for one, scores in left_out),
    )


def _tile_files(
    real_root: Path, candidates_root: Path, unlabelled: bool, val_root: Path | None
) -> list[TileFiles]:
    """The real tiles, the candidates and, if they are asked for, those of validation."""
    if unlabelled:
        real = TileFiles.below(real_root)
        candidates = replace(TileFiles.below(candidates_root, False), classes=real.classes)
    else:
        real, candidates = labelled_files(real_root, candidates_root)
    val = [] if val_root is None else [TileFiles.below(val_root, classes=real.classes)]
    return [real, candidates, *val]


def _free_rows(pool: TileFiles, real: TileFiles, val: Sequence[TileFiles]) -> list[int]:
    """Unlabelled tiles that are neither among the real ones nor repeat another byte by byte."""
    known, first = set(real.digests), {}
    for i, digest in enumerate(pool.digests):
        if digest not in known:
            first.setdefault(digest, i)
    for tiles in val:
        leaked = len(first.keys() & set(tiles.digests))
        if leaked:
            raise UserError(
                f"`unlabelled` {pool.root}: {leaked} of its tiles are those of `val` {tiles.root},"
                " which must not be trained on; give other tiles"
            )
    if not first:
        raise UserError(f"`unlabelled` {pool.root}: all its tiles are labelled; give other tiles")
    return list(first.values())


def measured(judge: Judge, val: Sequence[FeatureSet]) -> dict[str, Any]:
    """What a judge is worth on labelled tiles: `Predictions.scores`, with more by class.

    Each class also has its `confidence`, the mean probability of the tiles that are judged to be
    of it, which is its precision where the judge is calibrated. `networks` has the accuracy of each
    network alone.

    Args:
        val: Features of the tiles by each network.
    """
    first = val[0]
    p = judge.probabilities(val).numpy()  # (N, K)
    labels, judged = first.labels.numpy(), p.argmax(axis=1)
    scores = Predictions(first.classes, first.files, labels, judged, p).scores()
    for k, row in enumerate(scores["per_class"].values()):
        own = p[judged == k, k]
        row["confidence"] = float(own.mean()) if len(own) else None
    alone = [
        Judge([probe], [1.0]).probabilities([one]).argmax(dim=1) == one.labels
        for probe, one in zip(judge.probes, val, strict=True)
    ]
    names = [one.network for one in val]
    scores["networks"] = [
        {"network": name, "accuracy": float(right.double().mean())}
        for name, right in zip(names, alone, strict=True)
    ]
    return scores


def labelled_files(real_root: Path, synthetic_root: Path) -> tuple[TileFiles, TileFiles]:
    """Both sets of tiles; UserError where the folders have other classes than one another."""
    real = TileFiles.below(real_root)
    return real, TileFiles.below(synthetic_root, classes=real.classes)


def centroids_of(real: FeatureSet) -> Centroids:
    """Centroids of labelled tiles."""
    values = class_centroids(real.values, real.labels, len(real.classes))
    return Centroids(values, real.classes, real.extractor, real.tiles)


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
    networks = judged.networks or (judge,)
    known = [one.trained_on == real.listing for one in networks if one.trained_on is not None]
    trained_here = any(known) if known else None
    facts: dict[str, Any] = {
        "judge": {"network": name, "identity": judge.extractor, "trained_on_real": trained_here},
        "downstream": None,
    }
    warnings = []
    if downstream is not None:
        same = downstream.identity in [one.extractor for one in networks]
        facts["downstream"] = {
            "network": downstream.name,
            "identity": downstream.identity,
            "is_the_judge": same,
        }
        if same:
            warnings.append(
                f"judge and downstream model are the same network ({name}): it is given what it"
                " agrees with already; judge with another one, for example `features` timm:NAME"
            )
    if trained_here:
        warnings.append(
            f"the judge ({name}) was trained on the very tiles of `real`: they lie closer to their"
            " class for it than new tiles do; a judge trained on others is a better witness"
        )
    return facts, warnings
