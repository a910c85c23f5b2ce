"""The processes that share a run, one per device, through Lightning Fabric.

Fabric starts them on one machine, or joins those that torchrun or srun started. Those that sample
share no tensors: one list goes out at the start, and they wait for one another at the end. Those
that train (eval.py) share gradients and predictions.
"""

import logging
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ldm.cli import resolve_device
from ldm.errors import UserError
from ldm.trainer import Devices, choose_devices

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# Ranks have equal shares, but one may wait for the others on a slower machine.
TIMEOUT = timedelta(days=1)


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a run; by default it is alone.

    Attributes:
        rank: In [0, size).
        fabric: Connects them.
    """

    rank: int = 0
    size: int = 1
    fabric: Any = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """The first process's value."""
        return value if self.fabric is None else self.fabric.broadcast(value)

    def mean(self, value: "torch.Tensor") -> "torch.Tensor":
        """The mean of a tensor over all processes, in each of them."""
        if self.size == 1:
            return value
        from torch import distributed

        total = value.detach().clone()
        distributed.all_reduce(total)
        return total / self.size

    def gather(self, value: Any) -> list[Any]:
        """What each process has, in the order of the ranks; anything that can be pickled."""
        if self.size == 1:
            return [value]
        from torch import distributed

        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        """Wait until all processes are here.

        Raises:
            UserError: One of them has stopped.
        """
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

    def close(self) -> None:
        """Leave the group; the processes that this one started end with it, whatever they do."""
        if self.fabric is None:
            return
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def stop_others(self) -> None:
        """End the processes that this one started: without it they would wait in vain."""
        launcher = getattr(self.fabric, "strategy", None) and self.fabric.strategy.launcher
        for process in getattr(launcher, "procs", ()):
            process.terminate()


@dataclass(frozen=True)
class Layout:
    """Where a run will take place; `launch` begins it.

    Attributes:
        device: Its device, for a process that is alone; else one of their kind.
        devices: Of each machine, where there are several processes; else None.
    """

    device: "torch.device"
    devices: Devices | None = None
    num_nodes: int = 1

    def launch(self, backend: str | None = "gloo") -> tuple[Ranks, "torch.device"]:
        """Start the other processes, or join them; returns this one's place and device.

        Args:
            backend: How tensors travel: gloo where nothing goes between GPUs, which spares NCCL and
                its timeouts; None for what suits the devices.

        Raises:
            UserError: The cluster's environment does not fit.
        """
        if self.devices is None:
            return Ranks(), self.device
        from lightning_fabric import Fabric
        from lightning_fabric.strategies import DDPStrategy

        for name in ("lightning_fabric", "pytorch_lightning"):
            logging.getLogger(name).setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", "The `srun` command is available")
        try:
            fabric = Fabric(
                accelerator=self.devices.accelerator,
                devices=self.devices.devices,
                num_nodes=self.num_nodes,
                strategy=DDPStrategy(process_group_backend=backend, timeout=TIMEOUT),
            )
            fabric.launch()
        except (ValueError, RuntimeError) as error:
            raise UserError(f"--devices {self.devices.count}: {error}") from None
        return Ranks(fabric.global_rank, fabric.world_size, fabric), fabric.device


def choose_layout(device: str, devices: int | None, num_nodes: int | None) -> Layout:
    """Processes and devices for the options --device, --devices and --num_nodes.

    What torchrun or srun started is taken from their variables, where the options say nothing.

    Raises:
        UserError: There are too few devices, or the options contradict one another.
    """
    started, nodes = _started_outside()
    if started is not None and devices not in (None, started):
        raise UserError(
            f"--devices {devices}: {started} processes were started on this machine; leave "
            "--devices out, or start as many"
        )
    count, num_nodes = devices or started or 1, num_nodes or nodes
    if count * num_nodes == 1:
        return Layout(resolve_device(device))
    kind, _, index = device.partition(":")
    if index:
        raise UserError(f"--device {device}: one device; leave its number out with --devices")
    if kind not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: several processes need auto, cpu or cuda")
    chosen = Devices("cpu", count) if kind == "cpu" else choose_devices(None, count)
    if chosen.accelerator != "gpu":
        if kind == "cuda":
            resolve_device("cuda")  # says that there is none
        cores = os.cpu_count() or 1
        if count > cores:
            raise UserError(
                f"--devices {count}: there is no GPU to use here, and {cores} CPU cores; give at "
                f"most {cores}"
            )
    return Layout(
        resolve_device("cuda" if chosen.accelerator == "gpu" else "cpu"), chosen, num_nodes
    )


def _started_outside() -> tuple[int | None, int]:
    """Processes per machine that torchrun or srun started (None: neither did), and machines."""
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        local, world = (int(environment[key]) for key in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
        return local, max(1, world // local)
    interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if "SLURM_STEP_ID" in environment and not interactive:
        nodes = int(environment.get("SLURM_NNODES", 1))
        tasks = int(environment.get("SLURM_NTASKS", 1))
        return max(1, tasks // nodes), nodes
    return None, 1
