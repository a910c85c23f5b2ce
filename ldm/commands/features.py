"""Features, class centroids and a UMAP picture of real and synthetic tiles.

DIR/CLASS/images on both sides, with the same classes. Writes VIS/features_real.safetensors,
VIS/features_synthetic.safetensors, VIS/centroids.safetensors (scripts/distance.py reads these),
VIS/umap.png, VIS/umap.html (point at a dot to see its tile), VIS/umap.csv and VIS/fidelity.json
(distances of the two sets). With --selection, what scripts/distance.py decided is in the pictures.
Features of images that have not changed are taken from VIS.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from ldm.cli import MOST, Dir, Seed, Share, Whole, existing_path, like, option, output_path, parse
from ldm.devices import resolve_device
from ldm.errors import UserError
from ldm.features.source import known_forms
from ldm.files import remove_leftovers, require_outside, write_json
from ldm.settings import FeatureOptions, NetworkChoice


@dataclass(frozen=True, kw_only=True)
class Options(NetworkChoice, FeatureOptions):
    example: ClassVar = """\
--real D/train5 --synthetic OUT --features logs/eval/train5/seed0 \\
      --out VIS"""

    features: str | None = like(
        NetworkChoice, "features", None, help=f"network that makes the features: {known_forms()}"
    )
    real: Dir = option(..., "labelled real tiles, DIR/CLASS/images")
    synthetic: Dir = option(..., "what sample_diffusion.py wrote")
    out: Dir = option(..., "folder of the results")
    selection: str | None = option(
        None,
        "training folder of scripts/distance.py, or its selection.csv: accepted and rejected "
        "images apart",
        metavar="SELECTION",
    )
    thumbnails: Whole = option(
        2000,
        "most tiles that umap.html holds (about 2 kB each), evenly by kind and class",
        metavar="N",
    )
    seed: Seed = option(0, "seed of the UMAP picture")
    umap_neighbors: Annotated[int, Field(ge=2, le=MOST)] = option(15, "neighbourhood of UMAP")
    umap_min_dist: Share = option(0.1, "how closely UMAP packs")

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if self.network is None:
            yield "features", "is missing; give a checkpoint of eval.py, or timm:NAME"


def main(argv: list[str] | None = None) -> None:
    args = parse(Options, argv)
    real_root = existing_path(args.real, "--real", "tiles")
    synthetic_root = existing_path(args.synthetic, "--synthetic", "tiles")
    out = output_path(args.out, "--out", "dir")
    require_outside({"--out": out}, {"--real": real_root, "--synthetic": synthetic_root})
    remove_leftovers(out)

    from ldm.evaluation.fidelity import FEWEST_TILES, fidelity
    from ldm.features.sets import cached_features
    from ldm.features.source import parse_features
    from ldm.selection import judge
    from ldm.selection.training_folder import read_decisions
    from ldm.selection.umap_page import plane_groups, write_pictures

    decisions = None
    if args.selection:
        selection = existing_path(args.selection, "--selection")
        decisions = read_decisions(selection, "--selection")
    source = parse_features(args.network, args.pretrained_weights, args.input_size)
    extractor = source.open(resolve_device(args.device))
    # Both are listed before any features are computed: differing classes are known at once.
    real_files, synthetic_files = judge.labelled_files(real_root, synthetic_root)
    if decisions is not None and decisions.keys() != set(synthetic_files.names):
        raise UserError(
            f"--selection {args.selection}: is not of the images in --synthetic {synthetic_root};"
            " give the selection that was made from them"
        )
    real, synthetic = (
        cached_features(files, extractor, out / name, **args.loading)
        for files, name in ((real_files, judge.REAL_FILE), (synthetic_files, judge.SYNTHETIC_FILE))
    )
    real.save_centroids(out / judge.CENTROIDS_FILE)
    groups = plane_groups(
        real, synthetic, decisions, args.umap_neighbors, args.umap_min_dist, args.seed
    )
    write_pictures(out, groups, real.classes, real_root, synthetic_root, args.thumbnails)
    counts = {"real": len(real.files), "synthetic": len(synthetic.files)}
    print("{real} real and {synthetic} synthetic tiles: ".format(**counts), end="")
    print(f"{out}/umap.png and umap.html")
    if min(counts.values()) < FEWEST_TILES:
        print(f"fewer than {FEWEST_TILES} tiles on a side: no {out}/fidelity.json")
        return
    closeness = fidelity(real.values, synthetic.values, args.seed)
    write_json(out / "fidelity.json", {**closeness, **counts, "network": extractor.identity})
    print(", ".join(f"{name} {value:.3f}" for name, value in closeness.items()))
