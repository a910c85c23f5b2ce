"""Train a ViT on real and synthetic tiles and report what it is worth on held-out real ones.

    python eval.py --arch vit_small --data_path D --output_dir train5+fake50%

trains on `D/train5+fake50%`, chooses the epoch on `D/val` and reports `D/test` once. As in the
published script, `--output_dir` is the name of the training subset; the results go to
`logs/eval/<that name>/`. The same command again goes on where it stopped.
"""

import argparse
import os
from dataclasses import fields
from pathlib import Path

from ldm.cli import ArgumentParser, existing_path, number, run_command
from ldm.devices import one_device, shared_devices
from ldm.errors import UserError
from ldm.models.vit_settings import PRECISIONS, SCHEDULES, Settings


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="eval.py",
        description="Train a classifier on D/SUBSET, choose its epoch on D/val, report D/test: "
        "accuracy, macro F1, sensitivity and specificity of the whole set.",
    )
    positive, rate = number(float, 0), number(float, 0, 1)

    def setting(group, name: str, *aliases: str, **kwargs) -> None:
        """An option that is a field of Settings, whose default is written there alone."""
        default = getattr(Settings, name)
        # An option without a value says in its help what then happens.
        kwargs["default"] = argparse.SUPPRESS if default is None else default
        flags = aliases or (f"--{name}",)
        group.add_argument(*flags, dest=name, **kwargs)

    run = parser.add_argument_group("run")
    run.add_argument("--data_path", required=True, metavar="D", help="folder of the sets")
    run.add_argument(
        "--output_dir",
        required=True,
        metavar="SUBSET",
        help="training folder in D, for example train5+fake50%%; it names the results too",
    )
    run.add_argument("--logdir", default="logs/eval", help="results go to LOGDIR/SUBSET")
    run.add_argument("--seed", type=number(int, 0), default=argparse.SUPPRESS, help="seed (0)")
    run.add_argument(
        "--seeds",
        type=number(int, 0),
        nargs="+",
        default=argparse.SUPPRESS,
        help="several seeds: one network each, then mean and deviation",
    )
    run.add_argument(
        "--num_classes",
        type=number(int, 2),
        default=argparse.SUPPRESS,
        help="checked against the class folders, which decide",
    )
    run.add_argument(
        "--resume",
        default=argparse.SUPPRESS,
        metavar="CKPT",
        help="checkpoint to go on from (an interrupted run goes on by itself), or to --eval",
    )
    run.add_argument(
        "--eval",
        action="store_true",
        help="no training: evaluate --resume CKPT, or else the result of this SUBSET and seed",
    )
    run.add_argument(
        "--overwrite",
        action="store_true",
        help="replace results that are of other settings or files",
    )
    run.add_argument(
        "--groups",
        metavar="CSV",
        help="patient, slide or region of each tile of val and test, for intervals over these:"
        " columns path (or file, below the set's folder) and group, and split where paths repeat",
    )
    run.add_argument(
        "--group_column", metavar="NAME", help="column of --groups (group when not given)"
    )
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:INDEX or mps")
    run.add_argument(
        "--devices",
        type=number(int, 1),
        metavar="N",
        help="devices of this machine that share each batch (1, or what torchrun or srun started)",
    )
    run.add_argument("--num_nodes", type=number(int, 1), help="machines (1, or what they started)")
    run.add_argument(
        "--num_workers",
        type=number(int, 0),
        default=min(8, os.cpu_count() or 1),
        help="loader processes",
    )
    setting(
        run,
        "precision",
        choices=PRECISIONS,
        help="auto: bf16-mixed on GPUs that have it, else 32",
    )

    model = parser.add_argument_group("network")
    setting(model, "arch", help="vit_tiny, vit_small, vit_base, vit_large or any timm name")
    setting(
        model,
        "patch_size",
        type=number(int, 1),
        help="pixels; 16 with the four names above, else the architecture's own",
    )
    setting(model, "input_size", "--input-size", type=number(int, 8), help="pixels")
    setting(
        model,
        "avgpool_patchtokens",
        type=int,
        choices=(0, 1),
        help="1: mean of the patch tokens instead of the class token",
    )
    setting(
        model,
        "finetune",
        "--finetune",
        "--pretrained_weights",
        metavar="FILE",
        help="local weights to start from; from scratch without",
    )
    setting(
        model,
        "checkpoint_key",
        metavar="ENTRY",
        help="entry of FILE that holds the weights, for example teacher; found without",
    )
    setting(model, "drop", type=rate, help="dropout before the head")
    setting(model, "attn_drop_rate", type=rate, help="dropout of attention weights")
    setting(model, "drop_path", "--drop-path", type=rate, help="stochastic depth")

    optim = parser.add_argument_group("optimisation")
    setting(optim, "epochs", type=number(int, 1), help="passes over the training set")
    setting(
        optim,
        "match_steps",
        type=number(int, 1),
        metavar="N",
        help="exactly N updates instead of --epochs, whatever the set's size, so that training sets"
        " of different sizes compare",
    )
    setting(
        optim,
        "validations",
        type=number(int, 1),
        metavar="V",
        help="with --match_steps: validate V times at equal distances (40)",
    )
    setting(
        optim,
        "warmup_updates",
        type=number(int, 0),
        metavar="W",
        help="with --match_steps: updates of warm-up (a tenth)",
    )
    setting(
        optim,
        "batch_size",
        "--batch-size",
        type=number(int, 1),
        help="images per step, of all devices together; a smaller set makes one smaller batch",
    )
    setting(optim, "opt", help="any timm optimizer")
    setting(optim, "lr", type=positive, help="learning rate at a batch of 512, scaled to the batch")
    setting(optim, "min_lr", "--min-lr", type=positive, help="floor of the schedule")
    setting(optim, "warmup_lr", "--warmup-lr", type=positive, help="start of the warm-up")
    setting(
        optim,
        "warmup_epochs",
        "--warmup-epochs",
        type=number(int, 0),
        help="5, or a tenth of the epochs where that is less",
    )
    setting(
        optim,
        "cooldown_epochs",
        "--cooldown-epochs",
        type=number(int, 0),
        help="further epochs at the floor",
    )
    setting(optim, "sched", choices=SCHEDULES, help="learning rate schedule")
    setting(optim, "weight_decay", "--weight-decay", type=positive, help="weight decay")
    setting(optim, "momentum", type=rate, help="of the optimizers that have one, for example sgd")
    setting(
        optim,
        "clip_grad",
        "--clip-grad",
        type=positive,
        metavar="NORM",
        help="largest gradient norm; not clipped without",
    )
    setting(
        optim,
        "model_ema",
        "--model-ema",
        action=argparse.BooleanOptionalAction,
        help="evaluate the moving average of the weights",
    )
    setting(
        optim,
        "model_ema_decay",
        "--model-ema-decay",
        type=number(float, 0, 0.9999999),
        help="its decay per step, after a warm-up of (1 + n) / (10 + n)",
    )

    augment = parser.add_argument_group("augmentation")
    augment.add_argument(
        "--no_crop_flip",
        dest="crop_flip",
        action="store_false",
        help="no random resized crop and no mirroring: the centre, as in the evaluation",
    )
    setting(
        augment,
        "d4",
        action="store_true",
        help="turn by quarters and mirror both ways, as suits tissue",
    )
    setting(
        augment,
        "stain_jitter",
        type=number(float, 0, 0.99),
        metavar="S",
        help="multiply haematoxylin, eosin and the rest by random numbers in [1 - S, 1 + S], as"
        " other laboratories would; 0 for none",
    )
    setting(augment, "aa", metavar="POLICY", help="timm augmentation policy, or none")
    setting(
        augment,
        "color_jitter",
        "--color-jitter",
        type=positive,
        help="strength, with --aa none (a policy jitters colours itself)",
    )
    setting(
        augment,
        "train_interpolation",
        "--train-interpolation",
        choices=("random", "bilinear", "bicubic"),
        help="of random resized crops",
    )
    setting(augment, "reprob", type=rate, help="probability of random erasing")
    setting(augment, "remode", choices=("const", "rand", "pixel"), help="what it fills in")
    setting(augment, "recount", type=number(int, 1), help="most areas erased in an image")
    setting(augment, "smoothing", type=number(float, 0, 0.99), help="label smoothing")
    setting(augment, "mixup", type=positive, help="mixup alpha; 0 for none")
    setting(augment, "cutmix", type=positive, help="cutmix alpha; 0 for none")
    setting(augment, "mixup_prob", "--mixup-prob", type=rate, help="share of batches mixed")
    setting(
        augment,
        "mixup_switch_prob",
        "--mixup-switch-prob",
        type=rate,
        help="share of those that cutmix takes when both are on",
    )
    setting(
        augment,
        "mixup_mode",
        "--mixup-mode",
        choices=("batch", "pair", "elem"),
        help="what shares one mixing ratio",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    given = vars(args)
    settings = Settings(**{f.name: given[f.name] for f in fields(Settings) if f.name in given})
    if "seed" in given and "seeds" in given:
        raise UserError("--seed and --seeds exclude each other; give one")
    seeds = list(dict.fromkeys(given.get("seeds", [given.get("seed", 0)])))
    resume = given.get("resume")
    if (resume or args.eval) and len(seeds) > 1:
        raise UserError("--resume and --eval are for one network; give one --seed")
    data_path = existing_path(args.data_path, "--data_path", "dir")
    if settings.finetune:
        existing_path(settings.finetune, "--finetune", "file")

    if args.eval and args.devices not in (None, 1):
        raise UserError(f"--devices {args.devices} is for training; leave it out with --eval")
    if args.eval:
        devices = one_device(args.device)
    else:
        devices = shared_devices(args.device, args.devices, args.num_nodes)
    devices = devices.with_precision(settings.precision)
    if devices.precision == "16-mixed" and devices.accelerator != "gpu":
        raise UserError(
            f"--precision 16-mixed needs a CUDA device, not {devices.accelerator}; use 32"
        )

    from ldm.evaluation.metrics import (
        HEADLINE,
        format_intervals,
        format_per_class,
        format_summary,
    )
    from ldm.evaluation.runs import evaluate_checkpoint, train_and_report
    from ldm.evaluation.sets import GroupTable

    groups = None
    if args.groups is not None:
        table = existing_path(args.groups, "--groups", "file")
        groups = GroupTable(table, args.group_column or "group")
    elif args.group_column is not None:
        raise UserError("--group_column: belongs to --groups; give that or leave it out")
    folder = Path(args.logdir) / args.output_dir
    if args.eval:
        checkpoint = existing_path(
            resume or folder / f"seed{seeds[0]}",
            "--resume" if resume else "--eval (of a trained network; or give --resume CKPT)",
        )
        report = evaluate_checkpoint(
            checkpoint, data_path, devices, folder, args.num_workers, groups
        )
        for name in ("val", "test"):
            if name in report:
                headline = ", ".join(f"{k} {report[name][k]:.4f}" for k in HEADLINE)
                print(f"{name}: {headline}\n{format_intervals(report['bootstrap'][name])}")
                print(f"{format_per_class([report[name]])}\n")
        print(f"{folder / 'evaluation.json'}")
        return 0

    summary = train_and_report(
        data_path,
        args.output_dir,
        settings,
        seeds,
        Path(args.logdir),
        devices,
        args.num_workers,
        num_classes=given.get("num_classes"),
        resume=resume,
        overwrite=args.overwrite,
        groups=groups,
    )
    if "notes" not in summary:
        return 0  # another process than the first, which reports
    print(format_summary(summary))
    print(f"\n{folder / 'summary.json'}")
    return 0


if __name__ == "__main__":
    run_command(main)
