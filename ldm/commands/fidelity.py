"""FID, KID, precision and recall of synthetic tiles against real ones, per class and overall.

DIR/CLASS/images, or a folder of images without classes; of a training folder of
scripts/distance.py, the synthetic tiles. --reconstruct compares real tiles with what an autoencoder
makes of them, and gives PSNR, too. Prints a table and writes a JSON object (a list for
several sets) in which images, extractor and pre-processing stand beside the values. --stats keeps
the features of the real set in a file, which may later stand in for --real.

Nothing is downloaded: scripts/fetch_weights.py gets weights where there is internet.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ldm.cli import Ckpt, Dir, File, Seed, existing_path, option, output_path, parse
from ldm.devices import resolve_device
from ldm.errors import UserError
from ldm.features.source import known_forms
from ldm.files import remove_leftovers, require_outside, write_json
from ldm.settings import TIMM, DeviceOption, LoaderOptions

log = logging.getLogger("fidelity")

NETWORK = "network that makes the features"  # a group of options
NETWORKS = ("inception", "dinov2", "dinov2_base", "dinov2_large", "dinov2_giant")


@dataclass(frozen=True, kw_only=True)
class Options(LoaderOptions, DeviceOption):
    example: ClassVar = """\
--real D/test --fake OUT --features dinov2 --out fidelity.json"""

    real: Dir | None = option(None, "real tiles, preferably ones that no model was trained on")
    fake: tuple[Dir, ...] = option(
        (),
        "synthetic tiles, for example what sample_diffusion.py wrote; several make one table",
        repeats=True,
    )
    reconstruct: tuple[Ckpt, ...] = option(
        (),
        "autoencoder, or diffusion model with its first stage: compare the real tiles with their "
        "reconstructions; several make one table",
        repeats=True,
    )
    out: File = option(..., "JSON file to write")
    features: str | None = option(
        None,
        f"network that makes the features: {known_forms()}; if omitted inception",
        metavar="NAME|RUN|FILE",
        group=NETWORK,
    )
    extractor: str | None = option(
        None,
        "the same as --features NAME; or vit, with --weights RUN",
        metavar="NAME",
        group=NETWORK,
    )
    weights: str | None = option(
        None,
        "weights of the extractor: a file, or a run (seed's folder) of eval.py; if omitted, "
        "those in the caches of torch and Hugging Face",
        metavar="PATH",
        group=NETWORK,
    )
    stats: File | None = option(
        None, "features of the real set: read, or written if missing; may later replace --real"
    )
    overwrite: bool = option(False, "replace --stats that is of other tiles")
    seed: Seed = option(0, "seed of the subsets of KID")

    @property
    def network(self) -> tuple[str, str | None]:
        """Network and weights as `ldm.features.source.parse_features` takes them."""
        if self.extractor == "vit":
            return f"vit:{self.weights}", None
        named = self.features or self.extractor
        return (named, self.weights) if named else (self.weights or "inception", None)

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.features is not None:
            if self.extractor is not None:
                yield "extractor", "not allowed with --features; give one of them"
            named = self.features in NETWORKS or self.features.startswith(TIMM)
            if self.weights is not None and not named:
                yield "weights", "not allowed with --features RUN; give one of them"
        if self.extractor == "vit" and self.weights is None:
            yield "extractor", "vit: give --weights RUN, a seed's folder of eval.py"
        if self.overwrite and not (self.stats and self.real):
            yield "overwrite", "belongs to --stats and --real; give them too, or leave it out"
        if not (self.fake or self.reconstruct):
            yield "fake", "is missing; give it, or --reconstruct"
        if self.reconstruct and self.real is None:
            yield "reconstruct", "belongs to --real; give it, too"
        if self.real is None and self.stats is None:
            yield "real", "is needed without --stats; give one of them"


def to_markdown(results: list[dict]) -> str:
    """A row per set over all tiles, then a row per set and class."""
    rows = [(r["fake"]["dir"], "all", r["overall"]) for r in results]
    for name in dict.fromkeys(name for r in results for name in r["per_class"]):
        rows += [(r["fake"]["dir"], name, r["per_class"].get(name)) for r in results]
    lines = [
        "| fake | class | images real / fake | FID | KID x 1000 | precision | recall |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for root, name, m in rows:
        if m is None:
            continue
        cells = [root, name, f"{m['images_real']} / {m['images_fake']}"]
        if m["fid"] is None:
            cells += ["", "", "", ""]
        else:
            cells += [
                f"{m['fid']:.4g}",
                f"{1000 * m['kid']:.4g} ± {1000 * m['kid_std']:.2g}",
                f"{m['precision']:.3f}",
                f"{m['recall']:.3f}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def print_notes(results: list[dict]) -> None:
    """Print what is not in the table: the network, what was lost of tiles, and warnings."""
    extractor = results[0]["extractor"]
    print(f"extractor: {extractor['name']}, weights {extractor['weights_sha256'][:12]}")
    print(f"pre-processing: {extractor['preprocessing']}")
    for result in results:
        if lost := result.get("reconstruction"):
            print(
                f"{result['fake']['dir']}: PSNR {lost['psnr']:.2f} dB, distance in features "
                f"{lost['feature_distance']:.4f} (1 - cosine)"
            )
        for warning in result["warnings"]:
            log.warning("%s: %s", result["fake"]["dir"], warning)


def main(argv: list[str] | None = None) -> None:
    args = parse(Options, argv)

    from ldm.data.images import class_folders

    fake_roots = [existing_path(path, "--fake", "tiles") for path in args.fake]
    out = output_path(args.out, "--out", "file")
    if args.weights:
        existing_path(args.weights, "--weights")
    stats = Path(args.stats).expanduser() if args.stats else None
    if stats is not None and stats.resolve() == out.resolve():
        raise UserError(f"--stats {stats} is --out too; give two files")
    if args.real is None:
        existing_path(stats, "--stats (without --real)", "file")
    real_root = existing_path(args.real, "--real", "tiles") if args.real else None
    # Beside the class folders of a set is no harm done.
    folders = {"--real": [real_root] if real_root else [], "--fake": fake_roots}
    classes = {k: [r / n for r in roots for n in class_folders(r)] for k, roots in folders.items()}
    require_outside({"--out": out, "--stats": stats}, classes)
    remove_leftovers(out, *([stats] if stats else []))

    from ldm.evaluation.reconstructions import reconstruct_set, reconstruction_error
    from ldm.evaluation.reference import (
        compare_sets,
        reference,
        require_known_classes,
        tiles_of_part,
    )
    from ldm.features.sets import FeatureSet
    from ldm.features.source import parse_features
    from ldm.models.classifier import LatentSpace

    # All are indexed before any features are computed: what is wrong with one is known at once.
    real_files = None if real_root is None else tiles_of_part(real_root, False, "--real")
    fake_files = [tiles_of_part(root, True, "--fake") for root in fake_roots]
    if real_files is not None:
        for files in fake_files:
            require_known_classes(real_files.class_names, files.class_names, files.root)
    device = resolve_device(args.device)
    nets = [
        LatentSpace.load(path, "--reconstruct").first_stage.to(device) for path in args.reconstruct
    ]
    extractor = parse_features(*args.network).open(device)
    loading = {"batch_size": args.batch_size, "num_workers": args.workers}
    real = reference(real_files, extractor, stats, args.overwrite, **loading)
    for files in fake_files:
        require_known_classes(real.class_names, files.class_names, files.root)
    results = []
    for files in fake_files:
        found = FeatureSet.compute(files, extractor, raw=True, **loading)
        results.append(compare_sets(real, found, extractor, stats, args.seed))
    for path, net in zip(args.reconstruct, nets, strict=True):
        found = reconstruct_set(real_files, net, path, extractor, **loading)
        record = compare_sets(real, found, extractor, stats, args.seed)
        results.append({**record, "reconstruction": reconstruction_error(real, found)})
    write_json(out, results if len(results) > 1 else results[0])
    print(to_markdown(results))
    print(f"\nreal: {real.facts['root']}, {len(real.values)} tiles")
    print_notes(results)
