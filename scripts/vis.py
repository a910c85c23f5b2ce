"""Features, class centroids and a UMAP picture of real and synthetic tiles.

    python scripts/vis.py --real D/train5 --synthetic OUT --weights logs/eval/train5/seed0 --out VIS

DIR/CLASS/images on both sides, with the same classes. Writes VIS/features_real.safetensors,
VIS/features_synthetic.safetensors, VIS/centroids.safetensors (scripts/distance.py reads these),
VIS/umap.png, VIS/umap.html (point at a dot to see its tile), VIS/umap.csv and VIS/fidelity.json
(distances of the two sets). With --selection, what scripts/distance.py decided is in the pictures.
Features of images that have not changed are taken from VIS.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from ldm.cli import Seed, Share, Whole, existing_path, option, parse, run_command
from ldm.devices import resolve_device
from ldm.errors import UserError
from ldm.settings import FeatureOptions, NetworkChoice

TITLE = "UMAP of features"


@dataclass(frozen=True, kw_only=True)
class Options(NetworkChoice, FeatureOptions):
    """Features, class centroids and a UMAP picture of real and synthetic tiles.

    With --selection, what scripts/distance.py decided is in the pictures. Features of images that
    have not changed are taken from OUT.
    """

    program: ClassVar = "vis.py"
    example: ClassVar = """\
  python scripts/vis.py --real D/train5 --synthetic OUT --features logs/eval/train5/seed0 \\
      --out VIS"""

    real: str = option(metavar="DIR", help="labelled real tiles, DIR/CLASS/images")
    synthetic: str = option(metavar="DIR", help="what sample_diffusion.py wrote")
    out: str = option(metavar="DIR", help="folder of the results")
    selection: str | None = option(
        default=None,
        metavar="SELECTION",
        help="training folder of scripts/distance.py, or its selection.csv: accepted and rejected "
        "images apart",
    )
    thumbnails: Whole = option(
        default=2000,
        metavar="N",
        help="most tiles that umap.html holds (about 2 kB each), evenly by kind and class",
    )
    seed: Seed = option(default=0, help="seed of the UMAP picture")
    umap_neighbors: Annotated[int, Field(ge=2)] = option(default=15, help="neighbourhood of UMAP")
    umap_min_dist: Share = option(default=0.1, help="how closely UMAP packs")

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if self.features is None and self.weights is None and self.model is None:
            yield "features", "is missing; give a checkpoint of eval.py, or timm:NAME"


def parse_arguments(argv: list[str] | None = None) -> Options:
    return parse(Options, argv).with_network()


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    real_root = existing_path(args.real, "--real", "dir")
    synthetic_root = existing_path(args.synthetic, "--synthetic", "dir")
    if args.weights:
        existing_path(args.weights, "--weights")
    if args.pretrained_weights:
        existing_path(args.pretrained_weights, "--pretrained_weights", "file")
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")

    import torch

    from ldm.data.tile_files import TileFiles
    from ldm.evaluation.fidelity import FEWEST_TILES, fidelity
    from ldm.features.sets import cached_features
    from ldm.features.source import TIMM, VIT, FeatureSource
    from ldm.files import write_bytes, write_json, write_text
    from ldm.selection.judge import (
        CENTROIDS_FILE,
        REAL_FILE,
        SYNTHETIC_FILE,
        NetworkOptions,
        centroids_of,
    )
    from ldm.selection.projection import (
        CENTROID,
        REAL,
        SYNTHETIC,
        Points,
        by_decision,
        draw,
        project,
        to_csv,
    )
    from ldm.selection.training_folder import read_decisions
    from ldm.selection.umap_page import render

    decisions = None
    if args.selection:
        selection = existing_path(args.selection, "--selection")
        decisions = read_decisions(selection, "--selection")
    device = resolve_device(args.device)
    if args.weights:
        source = FeatureSource(VIT, args.weights)
    else:
        weights = args.pretrained_weights and Path(args.pretrained_weights).expanduser()
        source = FeatureSource(TIMM, args.model, weights, args.input_size)
    extractor = source.open(device)
    # Both are listed before any features are computed: differing classes are known at once.
    real_files = TileFiles.below(real_root)
    classes = real_files.classes
    synthetic_files = TileFiles.below(synthetic_root, classes=classes)
    if decisions is not None and decisions.keys() != set(synthetic_files.names):
        raise UserError(
            f"--selection {args.selection}: is not of the images in --synthetic {synthetic_root};"
            " give the selection that was made from them"
        )
    options = NetworkOptions(batch_size=args.batch_size, num_workers=args.workers)
    real = cached_features(real_files, extractor, out / REAL_FILE, **options.loading)
    synthetic = cached_features(synthetic_files, extractor, out / SYNTHETIC_FILE, **options.loading)
    centroids = centroids_of(real)
    centroids.save(out / CENTROIDS_FILE)

    stacked = torch.cat([real.values, synthetic.values, centroids.values])
    plane = project(stacked.numpy(), args.umap_neighbors, args.umap_min_dist, args.seed)
    n_real, n_both = len(real.files), len(real.files) + len(synthetic.files)
    labels, places = synthetic.labels.tolist(), plane[n_real:n_both]
    if decisions is None:
        made_groups = [Points(SYNTHETIC, labels, synthetic.files, places)]
    else:
        made_groups = by_decision(labels, synthetic.files, places, decisions)
    groups = [
        Points(REAL, real.labels.tolist(), real.files, plane[:n_real]),
        *made_groups,
        Points(CENTROID, range(len(classes)), (), plane[n_both:]),
    ]
    roots = {REAL: real_root, **{group.kind: synthetic_root for group in made_groups}}
    write_text(out / "umap.csv", to_csv(groups, classes))
    write_bytes(out / "umap.png", draw(groups, classes, TITLE))
    write_text(out / "umap.html", render(groups, classes, roots, args.thumbnails, TITLE))
    counts = {"real": n_real, "synthetic": len(synthetic.files)}
    print(f"{n_real} real and {len(synthetic.files)} synthetic tiles: {out}/umap.png and umap.html")
    if min(counts.values()) < FEWEST_TILES:
        print(f"fewer than {FEWEST_TILES} tiles on a side: no {out}/fidelity.json")
        return
    closeness = fidelity(real.values, synthetic.values, args.seed)
    write_json(out / "fidelity.json", {**closeness, **counts, "network": extractor.identity})
    print(", ".join(f"{name} {value:.3f}" for name, value in closeness.items()))


if __name__ == "__main__":
    run_command(main, Options)
