"""Features, class centroids and a UMAP picture of real and synthetic tiles.

    python scripts/vis.py --real D/train5 --synthetic OUT --weights logs/eval/train5/seed0 --out VIS

DIR/CLASS/images on both sides, with the same classes. Writes VIS/features_real.safetensors,
VIS/features_synthetic.safetensors, VIS/centroids.safetensors (scripts/distance.py reads these),
VIS/umap.png, VIS/umap.csv and VIS/fidelity.json (distances of the two sets). Features of images
that have not changed are taken from VIS.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import ArgumentParser, existing_path, number, resolve_device, run_command
from ldm.errors import UserError


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
    add(
        "--pretrained_weights",
        metavar="FILE",
        help="local weights of --model; without it, those in the cache of timm (no downloads)",
    )
    add(
        "--input_size",
        type=number(int, 8),
        help="pixels that --model sees; its own when not given",
    )
    add("--batch_size", type=number(int, 1), default=64, help="images per pass")
    add("--num_workers", type=number(int, 0), default=2, help="loader processes for large sets")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:INDEX or mps")
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

    from ldm.data.tiles import TileFolder
    from ldm.evaluation.fidelity import FEWEST_TILES, fidelity
    from ldm.run import write_bytes, write_json, write_text
    from ldm.selection.centroids import Centroids, class_centroids
    from ldm.selection.features import Extractor, folder_features
    from ldm.selection.projection import Points, draw, project, to_csv

    device = resolve_device(args.device)
    if args.weights:
        extractor = Extractor.from_checkpoint(args.weights, device)
    else:
        extractor = Extractor.from_timm(
            args.model, args.pretrained_weights, device, args.input_size
        )
    # Both indexed before any features are computed: differing classes are known at once.
    classes = TileFolder(real_root, 1, labelled=True, check=False).classes
    TileFolder(synthetic_root, 1, labelled=True, classes=classes, check=False)

    def features(root: Path, name: str):
        cache = out / f"features_{name}.safetensors"
        return folder_features(root, extractor, cache, classes, args.batch_size, args.num_workers)

    real, synthetic = features(real_root, "real"), features(synthetic_root, "synthetic")
    centroids = Centroids(
        class_centroids(real.values, real.labels, len(classes)),
        classes,
        extractor.identity,
        real.tiles,
    )
    centroids.save(out / "centroids.safetensors")

    stacked = torch.cat([real.values, synthetic.values, centroids.values])
    plane = project(stacked.numpy(), args.umap_neighbors, args.umap_min_dist, args.seed)
    n_real, n_both = len(real.files), len(real.files) + len(synthetic.files)
    groups = [
        Points("real", real.labels.tolist(), real.files, plane[:n_real]),
        Points("synthetic", synthetic.labels.tolist(), synthetic.files, plane[n_real:n_both]),
        Points("centroid", range(len(classes)), (), plane[n_both:]),
    ]
    write_text(out / "umap.csv", to_csv(groups, classes))
    write_bytes(out / "umap.png", draw(groups, classes, "UMAP of features"))
    counts = {"real": n_real, "synthetic": len(synthetic.files)}
    print(f"{n_real} real and {len(synthetic.files)} synthetic tiles: {out}/umap.png")
    if min(counts.values()) < FEWEST_TILES:
        print(f"fewer than {FEWEST_TILES} tiles on a side: no {out}/fidelity.json")
        return
    closeness = fidelity(real.values, synthetic.values, args.seed)
    write_json(out / "fidelity.json", {**closeness, **counts, "network": extractor.identity})
    print(", ".join(f"{name} {value:.3f}" for name, value in closeness.items()))


if __name__ == "__main__":
    run_command(main)
