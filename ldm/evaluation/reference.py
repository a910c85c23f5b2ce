"""Features of the sets whose fidelity is measured, and the file that keeps the real set's."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ldm.data.folders import DECISIONS, PREFIX, RECORD
from ldm.data.tile_files import TileFiles
from ldm.errors import UserError
from ldm.evaluation.fidelity import KID_SUBSETS, NEIGHBOURS, count_warnings, measure_classes
from ldm.features.extractor import Extractor
from ldm.features.sets import FeatureSet
from ldm.run import hardware, provenance

log = logging.getLogger(__name__)


def tiles_of_part(root: Path, synthetic: bool, what: str) -> TileFiles:
    """Images of a folder, with or without class folders.

    Of a training folder that scripts/distance.py made, these are the real or the synthetic ones.

    Args:
        synthetic: Which part of such a folder is meant.
        what: How error messages call the folder, for example `fake`.
    """
    files = TileFiles.if_classes(root, what)
    if not ((root / RECORD).is_file() and (root / DECISIONS).is_file()):
        return files
    part = "synthetic" if synthetic else "real"
    rows = [i for i, p in enumerate(files.paths) if p.name.startswith(PREFIX) == synthetic]
    if not rows:
        raise UserError(f"{what}: {root} has no {part} images; give a folder of tiles")
    return files.select(rows, part)


def set_record(features: FeatureSet) -> dict[str, Any]:
    """Facts about a set of tiles that stand beside a measured value."""
    facts = {name: features.facts[name] for name in ("part", "sha256", "pixels", "formats")}
    return {"dir": features.facts["root"], "images": len(features.values), **facts}


def reference(
    files: TileFiles | None,
    extractor: Extractor,
    stats: Path | None,
    overwrite: bool,
    **loading: int,
) -> FeatureSet:
    """Features of the real set, from the file `stats` where it is of these images and network.

    Args:
        files: The real tiles; None when the file stands for them.
        stats: File of features, made where there is none. None keeps none.
        overwrite: Replace the file when it is of other images or of another network.
        loading: See `FeatureSet.compute`.
    """
    if stats is not None and stats.exists():
        try:
            known = FeatureSet.load(stats)
        except UserError:
            known = None
        if known is None or not known.facts.get("raw"):
            raise UserError(
                f"`stats` {stats}: not a file that scripts/fidelity.py --stats wrote; give another"
                " name"
            )
        differs = list(_differences(known, files, extractor))
        if not differs:
            log.info("features of %d images from %s", len(known.values), stats)
            return known
        if not overwrite:
            raise UserError(
                f"`stats` {stats}: is of {' and '.join(differs)}; give another name, or `real` and"
                " `overwrite` to make it anew"
            )
    assert files is not None, "the command has checked that there is one of them"
    found = FeatureSet.compute(files, extractor, raw=True, **loading)
    if stats is not None:
        found.save(stats)
        log.info("%s: features of %d images in %s", files.root, len(found.values), stats)
    return found


def compare_sets(
    real: FeatureSet, fake: FeatureSet, extractor: Extractor, stats: Path | None, seed: int
) -> dict[str, Any]:
    """What scripts/fidelity.py writes of one synthetic set: values, both sets, how, warnings.

    Args:
        real, fake: Raw features by `extractor`.
        stats: File that keeps the features of the real set, for the record.
        seed: See `fidelity`.
    """
    overall, per_class = measure_classes(
        real.values, real.class_names, fake.values, fake.class_names, seed
    )
    return {
        "overall": overall,
        "per_class": per_class,
        "extractor": {**extractor.record(), "features": real.values.shape[1]},
        "real": {**set_record(real), "stats": str(stats) if stats else None},
        "fake": set_record(fake),
        "warnings": [
            *count_warnings(overall, per_class),
            *set_warnings(real, fake, extractor.trained_on),
        ],
        "settings": {"kid_subsets": KID_SUBSETS, "kid_seed": seed, "neighbours": NEIGHBOURS},
        **provenance(),
        "hardware": hardware(),
    }


def _differences(known: FeatureSet, files: TileFiles | None, extractor: Extractor) -> Iterator[str]:
    """What a file of features belongs to instead of this network and these images."""
    theirs, ours = known.facts["extractor"], extractor.record()
    if theirs["identity"] != ours["identity"]:
        yield (
            f"another extractor ({theirs['name']}, weights {theirs['weights_sha256'][:8]};"
            f" now {ours['name']}, weights {ours['weights_sha256'][:8]})"
        )
    # Contents are read only where the files may have changed.
    if (
        files is not None
        and files.stamp() != known.facts["stamp"]
        and (files.part, files.listing) != (known.facts["part"], known.facts["sha256"])
    ):
        yield f"other images than those in {files.root} now"


def set_warnings(real: FeatureSet, fake: FeatureSet, trained_on: str | None) -> list[str]:
    """What makes two sets differ beside their content, and what the network has seen.

    Args:
        trained_on: Set that the network was trained on, see `Extractor`.
    """
    warnings = []
    real_facts, fake_facts = real.facts, fake.facts
    if real_facts["sha256"] == fake_facts["sha256"]:
        warnings.append("both sets are the same files")
    for fact, differ, result in (
        ("pixels", "tiles differ in size", "resampling counts as a difference; resize both alike"),
        ("formats", "files differ in format", "traces of compression count as a difference"),
    ):
        if real_facts[fact].keys() != fake_facts[fact].keys():
            both = f"{_most(real_facts[fact])} real, {_most(fake_facts[fact])} fake"
            warnings.append(f"{differ} ({both}): {result}")
    if not (real.classes and fake.classes):
        plain = (fake_facts if real.classes else real_facts)["root"]
        warnings.append(f"{plain} has no class folders: there are no values per class")
    if trained_on is not None and trained_on == real_facts["sha256"]:
        warnings.append(
            "the extractor was trained on the very tiles of the real set, whose features lie apart"
            " from those of new tiles; take held-out tiles or another extractor"
        )
    return warnings


def _most(counts: dict[str, int]) -> str:
    names = list(counts)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def require_known_classes(real: Sequence[str], fake: Sequence[str], root: Path) -> None:
    """UserError when a set with classes has some that the real set, which has classes, lacks."""
    unknown = sorted(set(fake) - set(real))
    if real and unknown:
        raise UserError(
            f"`fake` {root}: class folders {unknown} are not among those of the real set"
            f" {sorted(set(real))}; rename or remove them"
        )
