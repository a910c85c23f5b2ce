"""The judge of a selection: what networks see in the real tiles and in the candidates."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.data.arrays import file_of
from ldm.data.tile_files import TileFiles, new_rows
from ldm.errors import UserError
from ldm.evaluation.predictions import Predictions
from ldm.features.extractor import Extractor
from ldm.features.judge import Judge
from ldm.features.sets import FeatureSet, cached_features
from ldm.features.spreading import unlabelled_pool

REAL_FILE, SYNTHETIC_FILE = "features_real.safetensors", "features_synthetic.safetensors"
CENTROIDS_FILE = "centroids.safetensors"


@dataclass(frozen=True)
class Judged:
    """Features that belong together (checked); the synthetic ones are in order."""

    real: FeatureSet  # of all networks side by side, see `FeatureSet.joined`
    synthetic: FeatureSet  # likewise
    networks: tuple[FeatureSet, ...] = ()  # the synthetic tiles by network; empty for a single one
    judge: Judge | None = None  # what gives classes to tiles; None where none was asked for
    # What `measured` found; None where there are no labelled tiles to measure on.
    val: dict[str, Any] | None = None
    # Name, cross-entropy and accuracy of each network that has a regression, on left-out real
    # tiles.
    left_out: tuple[dict[str, Any], ...] = ()

    @cached_property
    def probabilities(self) -> Tensor | None:
        """Of the judge for the synthetic tiles, (N, K) float64."""
        return self.judge and self.judge.probabilities(self.networks or [self.synthetic])

    def __post_init__(self):
        if self.synthetic.classes != self.real.classes:
            raise UserError(
                f"the synthetic images have the classes {self.synthetic.classes}, the real tiles"
                f" {self.real.classes}; run scripts/vis.py on folders with the same classes"
            )
        if self.synthetic.extractor != self.real.extractor:
            raise UserError(
                "the features of the synthetic images and the real tiles come from different"
                " networks; run scripts/vis.py again with one network for both"
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
    real, synthetic = (FeatureSet.load(folder / name) for name in (REAL_FILE, SYNTHETIC_FILE))
    judged = Judged(real, synthetic.in_order())
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
    spread_root: Path | None = None,
    **loading: int,
) -> Judged:
    """Features by networks, from the cache where they were asked for the same tiles before.

    Args:
        candidates_root: Synthetic tiles in class folders, or tiles whose labels are unknown.
        unlabelled: They are the latter: names of folders are ignored, each tile counts for the
            class that the judge gives it to, and tiles among the real ones are left out.
        extractors: Opened one after the other, where it is a generator.
        cache, loading: See `cached_features`; without a cache it is CANDIDATES.features.
        with_judge: Fit a judge, see `ldm.features.judge.Judge`.
        val_root: Labelled tiles that the judge is measured on.
        choose: Use the network alone whose regression has the lowest cross-entropy on left-out
            real tiles.
        spread_root: Unlabelled tiles over which the judge spreads the labels, in place of
            regressions; names of folders are ignored.
    """
    if cache is None:
        beside = candidates_root.resolve()  # which has a name, other than "."
        cache = file_of(beside).with_name(f"{beside.name}.features")
    files = _tile_files(real_root, candidates_root, unlabelled, val_root, spread_root)
    held_out = {"val": files["val"]} if "val" in files else {}
    rows = {}
    if unlabelled:
        rows["candidates"] = new_rows(files["candidates"], files["real"], held_out, "unlabelled")
    if spread_root is not None:
        rows["spread"] = new_rows(files["spread"], files["real"], held_out, "spread")
    by_network = [
        {name: cached_features(tiles, one, cache, **loading) for name, tiles in files.items()}
        for one in extractors
    ]
    sets = {name: [found[name] for found in by_network] for name in files}
    if "spread" in sets:
        sets["spread"] = [one.select(rows["spread"]) for one in sets["spread"]]
    judge, left_out = None, ()
    if with_judge:
        judge = Judge.fit(sets["real"], cache, sets.get("val"), sets.get("spread"))
        left_out = _left_out_scores(judge, sets["real"])
    if choose:
        best = _best_network(judge, left_out)
        judge = judge.alone(best)
        sets = {name: [values[best]] for name, values in sets.items()}
    found = sets["candidates"]
    if unlabelled:
        labels = judge.probabilities(found).argmax(dim=1)
        found = [replace(one, labels=labels).select(rows["candidates"]) for one in found]
    found = tuple(one.in_order() for one in found)
    both = FeatureSet.joined(sets["real"]), FeatureSet.joined(found)
    val = measured(judge, sets["val"]) if "val" in sets else None
    return Judged(*both, found, judge, val, left_out)


def _left_out_scores(judge: Judge, real: Sequence[FeatureSet]) -> tuple[dict[str, Any], ...]:
    """How good the regression of each network is on left-out real tiles."""
    return tuple(
        {"network": one.network, **probe.scores(one.labels)}
        for one, probe in zip(real, judge.probes, strict=True)
        if probe is not None
    )


def _best_network(judge: Judge, left_out: Sequence[dict[str, Any]]) -> int:
    """Number of the network with the lowest cross-entropy on left-out tiles."""
    if None in judge.probes:
        raise UserError(
            "`choose`: a classifier of these classes may have seen the tiles that would be left"
            " out; name other networks"
        )
    return min(range(len(left_out)), key=lambda k: left_out[k]["cross_entropy"])


def _tile_files(
    real_root: Path,
    candidates_root: Path,
    unlabelled: bool,
    val_root: Path | None,
    spread_root: Path | None,
) -> dict[str, TileFiles]:
    """The real tiles, the candidates and, if they are asked for, those of `val` and `spread`."""
    if unlabelled:
        real = TileFiles.below(real_root)
        candidates = replace(TileFiles.below(candidates_root, False), classes=real.classes)
    else:
        real, candidates = labelled_files(real_root, candidates_root)
    files = {"real": real, "candidates": candidates}
    if val_root is not None:
        files["val"] = TileFiles.below(val_root, classes=real.classes)
    if spread_root is not None:
        files["spread"] = replace(unlabelled_pool(spread_root), classes=real.classes)
    return files


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
    scores["networks"] = []
    for probe, one in zip(judge.probes, val, strict=True):
        right = Judge([probe], [1.0]).probabilities([one]).argmax(dim=1) == one.labels
        accuracy = float(right.double().mean())
        scores["networks"].append({"network": one.network, "accuracy": accuracy})
    return scores


def labelled_files(real_root: Path, synthetic_root: Path) -> tuple[TileFiles, TileFiles]:
    """Both sets of tiles; UserError where the folders have other classes than one another."""
    real = TileFiles.below(real_root)
    return real, TileFiles.below(synthetic_root, classes=real.classes)


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
    # Beside others, a classifier is a second opinion: it is asked itself, and calibrated on val.
    only_such = len(known) == len(networks) and all(known)
    facts: dict[str, Any] = {
        "judge": {"network": name, "identity": judge.extractor, "trained_on_real": trained_here},
        "downstream": None,
    }
    warnings = []
    if downstream is not None:
        same = downstream.identity in [one.extractor for one in networks]
        model = {"network": downstream.name, "identity": downstream.identity}
        facts["downstream"] = {**model, "is_the_judge": same}
        if same:
            warnings.append(
                f"judge and downstream model are the same network ({name}): it is given what it"
                " agrees with already; judge with another one, for example `features` timm:NAME"
            )
    if only_such:
        warnings.append(
            f"the judge ({name}) was trained on the very tiles of `real`: they lie closer to their"
            " class for it than new tiles do; a judge trained on others is a better witness"
        )
    return facts, warnings
