"""Groups of options that several commands share; each stands here once. Imports nothing heavy."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

from ldm.cli import Ckpt, Count, Dir, File, Pixels, Seed, Workers, contradictions, option

DEVICE_HELP = "auto, cpu, cuda, cuda:INDEX or mps"
PRECISION_HELP = (
    "auto: {} where the device is fast in it (GPUs; CPUs with AVX-512 bf16 or AMX), else 32; "
    "if omitted auto on GPUs, 32 on CPUs"
)
MACHINE = "machine"
# Of sample_diffusion.py, where nothing is given.
DEFAULT_STEPS, DEFAULT_SCALE, DEFAULT_COUNT, DEFAULT_STRENGTH = 50, 10.0, 10, 0.6
TIMM = "timm:"  # begins the name of a network of timm

_run = partial(option, group="run")
_devices = partial(option, group="devices, memory and speed")
_machine = partial(option, group=MACHINE)
_groups = partial(option, group="groups of tiles")
_features = partial(option, group="features")


def some_cores() -> int:
    """How many workers read images by default."""
    return min(8, os.cpu_count() or 1)


@dataclass(frozen=True, kw_only=True)
class SpeedOptions:
    """How training uses its devices: several of them, compiled networks, layouts, fused steps."""

    strategy: Literal["auto", "ddp", "fsdp", "deepspeed"] = _devices(
        "auto",
        "of several devices: ddp keeps the model on each, fsdp shards the diffusion UNet, its "
        "average and its optimiser; auto is ddp",
    )
    compile: bool = _devices(False, "compile the networks: a slow start, then faster")
    channels_last: bool = _devices(False, "memory layout that suits tensor cores")
    tf32: bool | None = _devices(
        None,
        "True: matrix products and convolutions of float32 on tensor cores, with 10 bits of "
        "mantissa; False: neither; if omitted, as PyTorch does: convolutions only",
        takes_value=True,
    )
    fused: Literal["auto", "true", "false"] = _devices(
        "auto",
        "optimiser steps in one kernel; auto: on GPUs, without gradient clipping and float16",
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions(SpeedOptions):
    """A training run: where it writes, what it resumes, on which devices it trains."""

    name: str | None = _run(
        None, "name of the run: it writes to LOGDIR/NAME, and goes on where it stopped", "-n"
    )
    resume: str | None = _run(None, "run folder or checkpoint to go on from", "-r", metavar="RUN")
    seed: Seed = _run(23, "seed of all randomness, as in the published main.py", "-s")
    logdir: Dir = _run("logs", "folder of all runs", "-l")
    dry_run: bool = _run(False, "print what would be trained, and exit")
    gpus: str | None = _devices(
        None,
        "GPUs as in Lightning 1: '0,1' these two, '2' any two, '0,' number 0 alone, '-1' all",
        metavar="LIST",
    )
    devices: Count | None = _devices(None, "number of devices of the best available kind")
    num_nodes: Count = _devices(1, "number of machines")
    precision: Literal["auto", "32", "bf16-mixed", "16-mixed", "bf16-true", "64"] | None = _devices(
        None, PRECISION_HELP.format("bf16-mixed")
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """The sets of an evaluation, the groups of their tiles, and its earlier results."""

    data_path: str = _run(..., "folder of the sets", metavar="D")
    subset: str = _run(
        ...,
        "training folder in D, for example train5+fake50%; it names the results too",
        metavar="SUBSET",
        published=("--output_dir",),
    )
    overwrite: bool = _run(False, "replace results that are of other settings or files")
    groups: str | None = _run(
        None,
        "patient, slide or region of each tile of val and test, for intervals over these: "
        "columns path (or file, below the set's folder) and group, and split where paths repeat",
        metavar="CSV",
    )
    group_column: str | None = _run(None, "column of `groups`; if omitted group", metavar="NAME")
    workers: Workers = _run(some_cores, "loader processes", published=("--num_workers",))

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.group_column is not None and self.groups is None:
            yield "group_column", "belongs to `groups`; give that too, or leave it out"


@dataclass(frozen=True, kw_only=True)
class DeviceOption:
    """The one device that a command computes on."""

    device: str = _machine("auto", DEVICE_HELP)


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """Reading images: how many at a time, by how many threads."""

    batch_size: Count = _machine(64, "images per pass of the network")
    workers: Workers = _machine(2, "threads that decode images", published=("--num_workers",))


@dataclass(frozen=True, kw_only=True)
class SharedDevices(DeviceOption):
    """Several processes that share the work of a command; see `ldm.devices.shared_devices`."""

    devices: Count | None = _machine(
        None,
        "processes on this machine that share the work, one per GPU or CPU core; if omitted 1, "
        "or what torchrun or srun started",
    )
    num_nodes: Count | None = _machine(
        None, "machines, with torchrun or srun on each; if omitted 1, or as started"
    )


@dataclass(frozen=True, kw_only=True)
class ProcessOptions(SharedDevices):
    """How a command runs networks without training them, in one process or several."""

    precision: Literal["auto", "32", "bf16"] | None = _machine(None, PRECISION_HELP.format("bf16"))
    channels_last: bool = _machine(False, "memory layout that suits tensor cores")


@dataclass(frozen=True, kw_only=True)
class GroupOptions:
    """Which patient, slide or region a tile belongs to; read by `ldm.data.groups.grouping_of`."""

    group_level: Count | None = _groups(
        None,
        "the group (patient, slide, region) is the folder N levels below the root; an array or a "
        "shard counts as a folder",
        metavar="N",
    )
    group_regex: str | None = _groups(
        None,
        "the group is the first parenthesis of this expression, searched in the path below the "
        "root",
        metavar="REGEX",
    )
    group_csv: File | None = _groups(
        None, "the groups are in a CSV with a column path (or file), below the root"
    )
    group_column: str | None = _groups(
        None, "column of `group_csv` that names the group; if omitted: group", metavar="NAME"
    )
    group_rows: str | None = _groups(
        None, "read only these rows of `group_csv`, such as split=train", metavar="COLUMN=VALUE"
    )

    def problems(self):
        yield from contradictions(self, "group_level", "group_regex", "group_csv")
        for name in ("group_column", "group_rows"):
            if getattr(self, name) is not None and self.group_csv is None:
                yield name, "belongs to `group_csv`; give that too, or leave it out"


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """A timm network that makes features, where no checkpoint of eval.py does."""

    pretrained_weights: File | None = _features(
        None,
        "local weights of the timm network; if omitted, those in the cache of timm (nothing is "
        "downloaded)",
    )
    input_size: Pixels | None = _features(
        None, "pixels that the timm network sees; if omitted, its own size"
    )


@dataclass(frozen=True, kw_only=True)
class NetworkChoice(ModelOptions):
    """The network that makes features: a run of eval.py, or one of timm."""

    features: str | None = _features(
        None, "network that makes the features", metavar="NAME|RUN|FILE"
    )
    weights: Ckpt | None = _features(None, "the same as `features` CKPT")
    model: str | None = _features(None, "the same as `features` timm:NAME", metavar="NAME")

    @property
    def network(self) -> str | None:
        """What `ldm.features.source.parse_features` takes; None where no network was named."""
        return self.features or self.weights if self.model is None else f"{TIMM}{self.model}"

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from contradictions(self, "features", "weights", "model")
        of_timm = (self.network or "").startswith(TIMM)
        for name in ("pretrained_weights", "input_size"):
            if getattr(self, name) is not None and not of_timm:
                yield name, "belongs to `model` (`features` timm:NAME); a checkpoint has its own"


@dataclass(frozen=True, kw_only=True)
class FeatureOptions(ModelOptions):
    """How features are computed; None where features may exist already and nothing was said."""

    batch_size: Count | None = _features(None, "images per pass of the network; if omitted 64")
    workers: Workers | None = _features(
        None, "threads that decode images; if omitted 2", published=("--num_workers",)
    )
    device: str | None = _features(None, f"{DEVICE_HELP}; if omitted auto")

    @property
    def loading(self) -> dict[str, int]:
        """Those arguments of `ldm.features.sets.cached_features` that were given."""
        both = {"batch_size": self.batch_size, "num_workers": self.workers}
        return {name: value for name, value in both.items() if value is not None}
