"""How a command uses the machine: devices, precision, memory layout, threads and ranks.

Nothing here decides a result, except by the rounding of floating-point numbers. Importing this
module imports no torch.
"""

import contextlib
import ctypes
import logging
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger(__name__)

BACKEND = "inductor"  # of torch.compile
MALLOC = "HISTO_MALLOC"  # "system" leaves the allocator as it is
MALLOC_VARIABLES = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD"}
M_TRIM, M_MMAP = -1, -3  # parameters of mallopt(3): M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
BF16_FLAGS = {"avx512_bf16", "amx_bf16"}  # in /proc/cpuinfo
# Ranks have equal shares, but one may wait for the others on a slower machine.
TIMEOUT = timedelta(days=1)
# Hints for people who tune, and a deprecation inside Lightning: not for every run's log.
IGNORED_WARNINGS = (
    "The `srun` command is available",  # said on a login node, where commands may run, too
    ".*does not have many workers.*",
    ".*is smaller than the logging interval.*",
    ".*LeafSpec.*",
    "Using ModelCheckpoint with manual optimization.*",  # it saves after a step, as wanted
    ".*module.* in eval mode at the start.*",  # the frozen first stage, on purpose
    "Checkpoint directory .* exists and is not empty.*",  # a resumed run
    "You're resuming from a checkpoint that ended before",  # our samplers find their place
)


@dataclass(frozen=True)
class Devices:
    """The devices of a command, and how networks are computed on them."""

    accelerator: str = "cpu"  # kind of device, in Lightning's words: "cpu", "gpu" or "mps"
    devices: int | Sequence[int] = 1  # their number on each machine, or their indices
    num_nodes: int = 1  # number of machines
    precision: str = "32"  # also "64", "bf16-true", or autocast: "bf16-mixed", "16-mixed"
    channels_last: bool = False  # memory layout of convolutions that suits tensor cores
    compile: bool = False  # whether networks are compiled with torch.compile
    tf32: bool | None = None  # whether float32 products use tensor cores; None: as PyTorch does
    fused: str = "auto"  # whether optimisers step in one kernel: auto, true or false
    strategy: str = "auto"  # how devices share a training: auto, ddp, fsdp or deepspeed

    @property
    def count(self) -> int:
        """Number of devices of each machine."""
        return self.devices if isinstance(self.devices, int) else len(self.devices)

    @property
    def ranks(self) -> int:
        """Number of processes, one per device of all machines."""
        return self.count * self.num_nodes

    @property
    def device(self) -> "torch.device":
        """The torch device of a command that runs in one process."""
        import torch

        kind = "cuda" if self.accelerator == "gpu" else self.accelerator
        return torch.device(kind if isinstance(self.devices, int) else f"{kind}:{self.devices[0]}")

    def with_precision(self, name: str | None, **others: Any) -> "Devices":
        """The same devices with a precision by name, and other attributes.

        "bf16" stands for "bf16-mixed", and "auto" for it where the device is fast in bfloat16 and
        for "32" elsewhere. None is "auto" on GPUs and "32" on CPUs, where a seed then gives the
        same numbers whatever the processor can do.
        """
        on_gpu = self.accelerator == "gpu"
        if name is None:
            name = "auto" if on_gpu else "32"
        if name == "auto":
            name = "bf16" if self._computes_bf16() else "32"
        elif name.startswith("bf16") and self.accelerator == "cpu" and not cpu_computes_bf16():
            log.warning(
                "precision %s: this processor has no instructions for it (AVX-512 bf16 or AMX); "
                "expect it to be many times slower than float32 (27 times where it was measured); "
                "`precision` auto chooses",
                name,
            )
        return replace(self, precision="bf16-mixed" if name == "bf16" else name, **others)

    def _computes_bf16(self) -> bool:
        if self.accelerator == "gpu":
            import torch

            return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return self.accelerator == "cpu" and cpu_computes_bf16()

    def autocast(self, device: "torch.device") -> "torch.autocast":
        """Context in which networks compute in the chosen precision on `device`."""
        import torch

        dtype = torch.float16 if self.precision == "16-mixed" else torch.bfloat16
        return torch.autocast(device.type, dtype, enabled=self.precision.endswith("-mixed"))

    def describe(self, fused: bool | None = None) -> str:
        """One line for the start of a run: all that decides how fast it is."""
        choices = {"channels_last": self.channels_last, "compile": self.compile, "tf32": self.tf32}
        if fused is not None:
            choices["fused"] = fused
        words = {True: "on", False: "off", None: "as PyTorch does"}
        return (
            f"devices      {self.count} x {self.accelerator} x {self.num_nodes} machines, "
            f"precision {self.precision}, "
            + ", ".join(f"{name} {words[value]}" for name, value in choices.items())
        )

    def record(self) -> dict[str, Any]:
        """What may change an image or a latent by rounding, as made folders record it."""
        return {
            "precision": self.precision.removesuffix("-mixed"),
            "channels_last": self.channels_last,
            "compile": self.compile,
        }

    def keep_memory(self) -> None:
        """On CPUs, let glibc use freed memory again instead of giving it back to the system.

        By default it maps each tensor above some megabytes anew, and the system clears its pages at
        first touch, at every step. Set HISTO_MALLOC=system, or glibc's own variables, against it.
        """
        chosen = MALLOC_VARIABLES.intersection(os.environ)
        if self.accelerator != "cpu" or os.environ.get(MALLOC) == "system" or chosen:
            return
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
        # Older versions of glibc take half of a heap at most.
        if mallopt is None or not (mallopt(M_MMAP, 2**30) or mallopt(M_MMAP, 2**25)):
            return
        mallopt(M_TRIM, 2**30)
        log.info("memory       freed blocks are kept for the next step (%s=system: not)", MALLOC)

    def fuses(self, clips: bool = False) -> bool:
        """Whether optimisers step in one kernel; a UserError if `fused` is true but cannot be."""
        # Lightning refuses to clip in mixed precision before an optimiser that could unscale the
        # gradients by itself, as fused ones can.
        why = "float16 with its gradient scaling" if self.precision == "16-mixed" else None
        if clips and self.precision.endswith("-mixed"):
            why = f"gradient clipping in {self.precision}"
        if self.fused == "true" and why:
            raise UserError(f"`fused` true does not go with {why}; leave it out")
        on_gpu = self.accelerator == "gpu" and why is None
        return self.fused == "true" or (self.fused == "auto" and on_gpu)

    def prepare(self, model: "nn.Module", networks: "Sequence[nn.Module]") -> None:
        """Lay out a model, compile its networks (the parts that training calls), set float32 mode.

        Names of parameters stay as they are: modules are compiled in place, so that checkpoints
        are the same with and without.
        """
        import torch

        self.keep_memory()
        if self.tf32 is not None:
            torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = self.tf32
        if self.channels_last:
            for module in (model, *networks):
                module.to(memory_format=torch.channels_last)
        if self.compile:
            # The autoencoder's adaptive weight goes through the decoder's graph twice, which
            # buffers that the first pass may overwrite would forbid.
            from torch._functorch import config as functorch_config

            functorch_config.donated_buffer = False
            for network in networks:
                network.compile(backend=BACKEND)

    @contextlib.contextmanager
    def launch(self, backend: str | None = "gloo") -> "Iterator[tuple[Ranks, torch.device]]":
        """Start the other processes, or join them; gives this one's place and device.

        Tensors travel by `backend`: gloo where nothing goes between GPUs, which spares NCCL
        and its timeouts; None for what suits the devices. A cluster that does not fit the
        devices is a UserError.
        """
        self.keep_memory()
        if self.ranks == 1:
            yield Ranks(), self.device
            return
        ranks = self._join(backend)
        try:
            yield ranks, ranks.fabric.device
        except BaseException:
            # They would wait for this process forever.
            for process in getattr(ranks.fabric.strategy.launcher, "procs", ()):
                process.terminate()
            raise
        finally:
            leave_group()

    def _join(self, backend: str | None) -> "Ranks":
        from lightning_fabric import Fabric
        from lightning_fabric.strategies import DDPStrategy

        quieten_lightning()
        try:
            fabric = Fabric(
                accelerator=self.accelerator,
                devices=self.devices,
                num_nodes=self.num_nodes,
                strategy=DDPStrategy(process_group_backend=backend, timeout=TIMEOUT),
            )
            fabric.launch()
        except (ValueError, RuntimeError) as error:
            raise UserError(f"`devices` {self.count}: {error}") from None
        return Ranks(fabric.global_rank, fabric.world_size, fabric)


@dataclass(frozen=True)
class Ranks:
    """The processes that share a run, one per device; by default this one is alone."""

    rank: int = 0  # number of this process, in [0, size)
    size: int = 1
    fabric: Any = None  # connects the processes; None for one that is alone

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """The first process's value."""
        return value if self.fabric is None else self.fabric.broadcast(value)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes in the order of the ranks; anything that can be pickled."""
        if self.size == 1:
            return [value]
        from torch import distributed

        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        """Wait until all processes are here; a UserError says that one of them has stopped."""
        if self.fabric is None:
            return
        try:
            self.fabric.barrier()
        except RuntimeError as error:
            log.debug("barrier: %s", error)
            raise UserError(
                "another process of this run has stopped, see its message; the same command goes "
                "on with what is missing"
            ) from None


def quieten_lightning() -> None:
    """Keep Lightning's remarks (no TPU, a tip for another product) out of a run's log."""
    for name in ("lightning_fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", pattern)


def leave_group() -> None:
    """Close the connection to the other processes, where there is one."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def cpu_computes_bf16() -> bool:
    """Whether this processor has fast instructions for bfloat16, as Linux says it."""
    information = Path("/proc/cpuinfo")
    words = information.read_text().split() if information.exists() else []
    return not BF16_FLAGS.isdisjoint(words)


def usable_cores() -> int:
    """Number of CPU cores that this process may use, which may be a share of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Arrivals:
    """Single numbers that a device computes, each handed to a function once it is there.

    Asking a GPU for a number stops the program until all work before it is done. So the number
    is copied beside that work and is looked at later. On a CPU it is there at once.
    """

    def __init__(self):
        self._waiting: deque[tuple[Any, torch.Tensor, Callable[[float], None]]] = deque()

    def add(self, number: "torch.Tensor", use: Callable[[float], None]) -> None:
        """Have `use` called with the number, and use what has arrived before it."""
        import torch

        self.settle(wait=False)
        number = number.detach()
        if number.device.type != "cuda":
            use(float(number))
            return
        copy = number.to("cpu", non_blocking=True)  # into pinned memory
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(number.device))
        self._waiting.append((event, copy, use))

    def settle(self, wait: bool = True) -> None:
        """Use the numbers that have arrived, or wait for all of them."""
        while self._waiting and (wait or self._waiting[0][0].query()):
            event, copy, use = self._waiting.popleft()
            event.synchronize()
            use(float(copy))


@contextlib.contextmanager
def within_memory(batch_size: int) -> Iterator[None]:
    """Raise a UserError that says which batch size to try where the GPU's memory is too small."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        remedy = f"try {batch_size // 2}"
        if batch_size < 2:
            remedy = "take a smaller network or a GPU with more memory"
        said = ". ".join(" ".join(str(error).split()).split(". ")[:2])
        message = f"{batch_size} does not fit into the memory of the GPU ({said}); {remedy}"
        raise UserError(message, "batch_size") from None


@contextlib.contextmanager
def one_thread(device: "torch.device") -> Iterator[None]:
    """Compute on a CPU in one thread: the split among threads decides how sums are rounded."""
    import torch

    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def resolve_device(name: str | None) -> "torch.device":
    """The torch device for `auto`, `cpu`, `cuda`, `cuda:1` or `mps`, if this machine has it."""
    import torch

    if name in (None, "", "auto"):
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"`device` {name}: use auto, cpu, cuda, cuda:INDEX or mps")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"`device` {name}: this machine has {count} CUDA devices; use auto or cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"`device` {name}: this machine has no MPS device; use auto or cpu")
    return device


def one_device(name: str | None) -> Devices:
    """The devices of a command that runs in one process, for its option `device`."""
    device = resolve_device(name)
    kind = "gpu" if device.type == "cuda" else device.type
    return Devices(kind, 1 if device.index is None else [device.index])


def shared_devices(device: str, devices: int | None, num_nodes: int | None) -> Devices:
    """The devices of a command with these options.

    Where they say nothing, what torchrun or srun started is taken from their variables.
    """
    started, nodes = _started_outside()
    if started is not None and devices not in (None, started):
        raise UserError(
            f"`devices` {devices}: {started} processes were started on this machine; leave "
            "`devices` out, or start as many"
        )
    count, num_nodes = devices or started or 1, num_nodes or nodes
    if count * num_nodes == 1:
        return one_device(device)
    kind, _, index = device.partition(":")
    if index:
        raise UserError(f"`device` {device}: one device; leave its number out with `devices`")
    if kind not in ("auto", "cpu", "cuda"):
        raise UserError(f"`device` {device}: several processes need auto, cpu or cuda")
    if kind == "cpu":
        return _cores(count, num_nodes)
    resolve_device(kind)  # refuses cuda where there is none
    return training_devices(None, count, num_nodes)


def _cores(count: int, num_nodes: int, check: bool = True) -> Devices:
    """So many processes on the CPUs of each machine, if this one has as many cores."""
    cores = os.cpu_count() or 1
    if check and count > cores:
        raise UserError(
            f"`devices` {count}: there is no GPU to use here, and {cores} CPU cores; give at most "
            f"{cores}"
        )
    return Devices("cpu", count, num_nodes)


def _started_outside() -> tuple[int | None, int]:
    """Processes per machine that torchrun or srun started (None: neither did), and machines."""
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        local, world = (int(environment[key]) for key in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
        return local, max(1, world // local)
    if "SLURM_STEP_ID" in environment and not in_shell_of_slurm():
        # Of the step; where Slurm does not say, of the job.
        nodes, tasks = (
            int(environment.get(f"SLURM_STEP_NUM_{what}", environment.get(f"SLURM_{job}", 1)))
            for what, job in (("NODES", "NNODES"), ("TASKS", "NTASKS"))
        )
        return max(1, tasks // nodes), nodes
    return None, 1


def in_shell_of_slurm() -> bool:
    """Whether a user types into a shell of srun, where a command is one process.

    The variables of the job may name more. Tasks that srun starts by themselves have no
    terminal.
    """
    if os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return True
    return "SLURM_STEP_ID" in os.environ and has_terminal()


def has_terminal() -> bool:
    """Whether a terminal controls this process, wherever input and output go (nohup, a pipe)."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
        return True
    except OSError:
        return False


def parse_gpus(text: str) -> list[int] | int:
    """`0,1` is a list of indices, `2` a count, `0,` one index, `-1` all (Lightning 1)."""
    try:
        if "," in text:
            indices = [int(part) for part in text.split(",") if part.strip()]
            if not indices or min(indices) < 0 or len(set(indices)) != len(indices):
                raise ValueError
            return indices
        count = int(text)
        if count < -1:
            raise ValueError
        return count
    except ValueError:
        raise UserError(
            f"`gpus` {text}: give a list of distinct GPUs ('0,1' or '0,') or a count ('2')"
        ) from None


def training_devices(
    gpus: str | None, devices: int | None, num_nodes: int = 1, dry_run: bool = False
) -> Devices:
    """The devices of a training with these options; without any, one of the best kind.

    In a dry run, as on a login node, they need not be there.
    """
    import torch

    if gpus is not None and devices is not None:
        raise UserError("`gpus` and `devices` both say where to train; give one of them")
    found = torch.cuda.device_count()
    if gpus is not None and gpus.strip() not in ("0", ""):  # `--gpus 0` is a count of none
        wanted = parse_gpus(gpus)
        wanted = found if wanted == -1 else wanted
        needed = max(wanted) + 1 if isinstance(wanted, list) else wanted
        if (needed > found or wanted == 0) and not dry_run:
            raise UserError(
                f"`gpus` {gpus}: this machine has {found} CUDA GPUs; leave `gpus` out to train on "
                "the best available device, or name fewer"
            )
        return Devices("gpu", wanted, num_nodes)
    count = devices or 1
    if found and gpus is None:
        if count > found and not dry_run:
            raise UserError(f"`devices` {count}: this machine has {found} CUDA GPUs; name fewer")
        return Devices("gpu", count, num_nodes)
    if torch.backends.mps.is_available() and count == 1 and gpus is None:
        return Devices("mps", 1, num_nodes)
    return _cores(count, num_nodes, check=not dry_run)


def follow_layout(optimizer: Any) -> None:
    """Give the states of an optimiser the strides of the parameters that they belong to.

    Fused kernels walk through both in the order of memory, and would silently mix up the
    weights of a run that began in another layout.
    """
    import torch

    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter).copy_(value)
