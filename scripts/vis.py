"""Features, class centroids and a UMAP picture of real and synthetic tiles.

    python scripts/vis.py --real D/train5 --synthetic OUT --weights logs/eval/train5/seed0 --out VIS

DIR/CLASS/images on both sides, with the same classes. Writes VIS/features_real.safetensors,
VIS/features_synthetic.safetensors, VIS/centroids.safetensors (scripts/distance.py reads these),
VIS/umap.png, VIS/umap.html (point at a dot to see its tile), VIS/umap.csv and VIS/fidelity.json
(distances of the two sets). With --selection, what scripts/distance.py decided is in the pictures.
Features of images that have not changed are taken from VIS.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import ArgumentParser, existing_path, number, resolve_device, run_command
from ldm.errors import UserError
from ldm.selection.options import add_network_options

TITLE = "UMAP of features"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(prog="vis.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--real", required=True, metavar="DIR", help="labelled real tiles, DIR/CLASS/images")
    add("--synthetic", required=True, metavar="DIR", help="what sample_diffusion.py wrote")
    add("--out", required=True, metavar="DIR", help="folder of the results")
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument(
        "--weights", metavar="CKPT", help="checkpoint (or seed folder) that eval.py wrote"
    )
    network.add_argument("--model", metavar="NAME", help="a timm network instead")
    add_network_options(parser, "--model")
    add(
        "--selection",
        metavar="SELECTION",
        help="training folder of scripts/distance.py, or its selection.csv: accepted and rejected"
        " images apart",
    )
    add(
        "--thumbnails",
        type=number(int, 0),
        default=2000,
        metavar="N",
        help="most tiles that umap.html holds (about 2 kB each), evenly by kind and class",
    )
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="seed of the UMAP picture")
    add("--umap_neighbors", type=number(int, 2), default=15, help="neighbourhood of UMAP")
    add("--umap_min_dist", type=number(float, 0, 1), default=0.1, help="how closely UMAP packs")
    args = parser.parse_args(argv)
    for name in ("pretrained_weights", "input_size"):
        if getattr(args, name) is not None and args.model is None:
            parser.error(f"argument --{name}: belongs to --model; a checkpoint brings its own")
    return args


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

    from ldm.evaluation.fidelity import FEWEST_TILES, fidelity
    from ldm.features.sets import TileFiles, cached_features
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
    # Both indexed before any features are computed: differing classes are known at once.
    real_files = TileFiles.below(real_root, True)
    classes = real_files.classes
    synthetic_files = TileFiles.below(synthetic_root, True, classes)
    if decisions is not None and decisions.keys() != set(synthetic_files.names):
        raise UserError(
            f"--selection {args.selection}: is not of the images in --synthetic {synthetic_root};"
            " give the selection that was made from them"
        )
    options = NetworkOptions(batch_size=args.batch_size, num_workers=args.num_workers)
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
    run_command(main)
