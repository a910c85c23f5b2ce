"""How Lightning's checkpoints reach the disk."""

from pathlib import Path
from typing import Any

from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import nn

from ldm.checkpoint import write_checkpoint
from ldm.files import require_space

MARGIN = 1.1  # room that is asked for, in sizes of the last checkpoint
MOMENTS = 2  # numbers that Adam keeps for each trained weight


class CheckpointFiles(TorchCheckpointIO):
    """Writes checkpoints completely or not at all, if the disk has room for them.

    Lightning itself writes to the system's temporary folder and moves the file. Between two file
    systems that is a copy, and a run that is killed meanwhile leaves half a checkpoint.

    Raises:
        UserError: The disk is full while a checkpoint is saved; the one before it stays.
    """

    def __init__(self) -> None:
        super().__init__()
        self._size: int | None = None  # bytes of the last checkpoint that was written

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        path = Path(path)
        size = path.stat().st_size if self._size is None and path.is_file() else self._size
        if size is not None:
            require_space(path, int(MARGIN * size))
        write_checkpoint(path, checkpoint)
        self._size = path.stat().st_size


def expected_size(model: nn.Module) -> int:
    """Bytes of a training checkpoint of `model`: its weights, and what Adam keeps for each."""
    weights = sum(value.nbytes for value in model.state_dict().values())
    return weights + MOMENTS * sum(p.nbytes for p in model.parameters() if p.requires_grad)
