"""Training over several devices with the diffusion UNet in shards (FSDP2, Zhao et al. 2023)."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ldm.errors import UserError


class ShardedStrategy(ModelParallelStrategy):
    """Data parallel over all ranks, with what the model shards in `configure_model` in shards.

    Checkpoints are whole: one file, as of one device.
    """

    def __init__(self, world_size: int, **kwargs: Any):
        super().__init__(
            data_parallel_size=world_size,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            **kwargs,
        )

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As of the class above.

        Raises:
            UserError: The run began without shards, where optimisers number weights differently.
        """
        try:
            return super().load_checkpoint(checkpoint_path, *args, **kwargs)
        except RuntimeError as error:
            if "optimizer state" not in str(error):
                raise
            raise UserError(
                f"--strategy fsdp: {checkpoint_path} was written without it, and its optimiser "
                "does not fit; go on without, or start another run from it with "
                f"model.params.ckpt_path={checkpoint_path}"
            ) from None


def is_sharded(model: pl.LightningModule) -> bool:
    """Whether calling the model's networks takes all ranks."""
    return getattr(model, "device_mesh", None) is not None


def shard(net: nn.Module, mesh: DeviceMesh) -> None:
    """Divide the weights of a UNet among the ranks of a mesh of one dimension, block by block.

    A block's weights are together on a device only while it computes. Names and sizes stay: a
    parameter becomes a DTensor.
    """
    from torch.distributed.fsdp import fully_shard

    blocks = [*net.input_blocks, net.middle_block, *net.output_blocks]
    for part in (*blocks, net):
        # Also after the forward pass of the outermost module, which would otherwise go on to hold
        # whole weights: an average updated then would be thrown away with them.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


def whole(value: Tensor) -> Tensor:
    """The same on every rank, of a tensor that may be a DTensor."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
