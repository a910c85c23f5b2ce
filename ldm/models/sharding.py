"""Training over several devices with the diffusion UNet in shards (FSDP2, Zhao et al. 2023)."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ldm.errors import UserError


class ShardedStrategy(ModelParallelStrategy):
    """Trains on all ranks, each of which holds a shard of what `configure_model` divides.

    A checkpoint is one file with complete tensors, as if one device had written it.
    """

    def __init__(self, world_size: int, **kwargs: Any):
        super().__init__(
            data_parallel_size=world_size,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            **kwargs,
        )

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint onto all ranks.

        One of a run without shards is refused, since optimisers number weights differently there.
        """
        try:
            return super().load_checkpoint(checkpoint_path, *args, **kwargs)
        except RuntimeError as error:
            if "optimizer state" not in str(error):
                raise
            raise UserError(
                f"`strategy` fsdp: {checkpoint_path} was written without it, and its optimiser "
                "does not fit; go on without, or start another run from it with "
                f"model.params.ckpt_path={checkpoint_path}"
            ) from None


def is_sharded(model: pl.LightningModule) -> bool:
    """Whether the model's networks can only be called on all ranks together."""
    return getattr(model, "device_mesh", None) is not None


def shard(net: nn.Module, mesh: DeviceMesh) -> None:
    """Divide the weights of a UNet among the ranks of a mesh of one dimension, block by block.

    A device holds all weights of a block only while it computes that block. Parameters become
    DTensors with the same names and sizes.
    """
    from torch.distributed.fsdp import fully_shard

    blocks = [*net.input_blocks, net.middle_block, *net.output_blocks]
    for part in (*blocks, net):
        # The outermost module must let go of complete weights after its forward pass, too: an
        # average that is updated while it holds them would be thrown away with them.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


def gather_shards(value: Tensor) -> Tensor:
    """A complete tensor, equal on every rank, from one that may be a DTensor."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
