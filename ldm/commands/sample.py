"""Sample tiles; the options are in ldm/synthesis/options.py."""

import logging
from pathlib import Path

from ldm.cli import parse
from ldm.devices import shared_devices
from ldm.files import require_outside
from ldm.synthesis.options import Options

log = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    args = parse(Options, argv)
    # Everything that can be wrong is found before other processes are started.
    tiles = {f"`{name}`": getattr(args, name) for name in ("start_from", "balance")}
    tiles = {name: Path(path) for name, path in tiles.items() if path}
    require_outside({"`out`": Path(args.out) if args.out else None}, tiles)
    devices = shared_devices(args.device, args.devices, args.num_nodes).with_precision(
        args.precision, channels_last=args.channels_last, compile=args.compile
    )

    from ldm.checkpoint import checkpoint_path
    from ldm.synthesis.folder import SampleFolder, write_shards
    from ldm.synthesis.models import load_models, make_settings
    from ldm.synthesis.production import require_room, synthesise
    from ldm.synthesis.request import check_models, choose_counts, choose_sampling, choose_sources
    from ldm.synthesis.synthesiser import Synthesiser

    models = load_models(
        args.model, args.classifier, args.first_stage, autoguidance_path=args.autoguidance
    )
    check_models(args, models)
    sampling, counts = choose_sampling(args, models), choose_counts(args, models)
    sources = choose_sources(args, models, counts)
    # Of RUN/checkpoints/x.ckpt it is RUN/samples/LABEL, else a folder beside the checkpoint.
    run = checkpoint_path(args.model, "`model`").parent
    run = run.parent if run.name == "checkpoints" else run
    outdir = Path(args.out) if args.out else run / "samples" / sampling.label
    settings = make_settings(sampling, models, devices, args.out_size)
    part = args.part or (0, 1)
    folder = SampleFolder(outdir, settings, models.facts)
    pixels = args.out_size or models.diffusion.first_stage_model.resolution
    require_room(folder, counts, part, pixels)

    with devices.launch() as (ranks, device):
        synthesiser = Synthesiser(models.to(device), sampling, devices)
        report = synthesise(synthesiser, folder, counts, args.batch_size, ranks, part, sources)
    if not ranks.is_first:
        return 0
    for warning in folder.guidance_log.warnings(sampling):
        log.warning("warning: %s", warning)
    shards = write_shards(folder, args.tar) if args.tar else []
    if part != (0, 1):
        print(
            f"part {part[0]} of {part[1]}: {report.made} images made, {report.present} were "
            f"there, in {outdir}; once all parts are made, the same command without --part"
        )
    elif report.made:
        print(
            f"{report.made} images of {len(counts)} classes in {outdir}, {report.seconds:.1f} s, "
            f"{report.images_per_s:.2f} images/s"
        )
        print(
            f"next: histodiffusion select --real LABELLED --synthetic {outdir} --features NETWORK"
            " --out TRAINING"
        )
    else:
        print(f"nothing to do: all {report.present} images are in {outdir}")
    if shards:
        print(f"{len(shards)} shards: {shards[0]} ... {shards[-1].name}")
    return 0
