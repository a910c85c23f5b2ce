"""Checkpoints: written completely or not at all, loaded strictly and without executing code.

A checkpoint is what Lightning saves plus the entry `histodiffusion`, from which `load_model`
rebuilds the model without any other file:

    format    version of this layout
    kind      autoencoder, diffusion, classifier or vit
    model     target and params of the class to build (plain containers, no paths)
    classes   class names in label order, or None
    training_only   prefixes of weights that `load_model` leaves out (a discriminator, say)
    seed, versions, revision
"""

import math
import os
import pickle
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import UserError
from ldm.files import atomic_file, require_class_names

if TYPE_CHECKING:
    import torch

KEY = "histodiffusion"
FORMAT = 1
# What torch raises for a damaged file. Any text is a pickle too, of nonsense: instructions on an
# empty stack, numbers cut short, tensors made of something else.
DAMAGED = (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, LookupError)
DAMAGED += (AttributeError, TypeError, AssertionError, OverflowError, struct.error)
# Classes that have moved since checkpoints that name them were written.
MOVED = {"ldm.evaluation.vit.TileClassifier": "ldm.models.vit.TileClassifier"}
KINDS = ("autoencoder", "diffusion", "classifier", "vit")


def make_record(
    kind: str,
    model: dict,
    classes: list[str] | None,
    seed: int | None,
    training_only: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The `histodiffusion` entry of a checkpoint.

    Args:
        training_only: Prefixes of weights that only training needs; `load_model` leaves them out.
    """
    from ldm.run import git_revision, versions

    assert kind in KINDS
    return {
        "format": FORMAT,
        "kind": kind,
        "model": model,
        "classes": classes,
        "training_only": list(training_only),
        "seed": seed,
        "versions": versions(),
        "revision": git_revision(),
    }


def write_checkpoint(path: str | os.PathLike, payload: dict[str, Any]) -> None:
    """Save a checkpoint with torch, atomically.

    Raises:
        UserError: The disk, or the quota on it, is full. What was at `path` is still there.
    """
    import torch

    with atomic_file(path) as file:
        torch.save(payload, file)


def training_step_of(path: Path) -> int | None:
    """The optimiser step that a checkpoint was written after, without reading its weights."""
    import torch

    try:
        payload = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except DAMAGED:
        return None
    return payload.get("global_step") if isinstance(payload, dict) else None


def checkpoint_path(path: str | os.PathLike, what: str = "checkpoint") -> Path:
    """The checkpoint file that `path` means: itself, or the last one of a run folder."""
    found = Path(path).expanduser()
    if found.is_dir():
        found = found / "checkpoints" / "last.ckpt"
    if not found.is_file():
        raise UserError(
            f"{what}: no file {found}; give a .ckpt file or a run folder that holds "
            "checkpoints/last.ckpt"
        )
    return found


def require_given(path: str | None, key: str, variable: str) -> None:
    """UserError where the setting `key` of a checkpoint has no value, nor the variable has one."""
    if not path:
        raise UserError(f"{key} is not set: export {variable}=CKPT or give {key}=CKPT")


def load_tensors(path: Path, what: str) -> Any:
    """Content of a file that torch or safetensors saved, on the CPU: tensors and plain data only.

    Raises:
        UserError: The file holds anything else, or was saved by something else.
    """
    import torch

    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(
                f"{what}: {path} is not a safetensors file ({error}); give another"
            ) from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # torch's own message advises to switch the protection off.
        raise UserError(
            f"{what}: {path} cannot be read: it is no checkpoint, or holds more than tensors and "
            "plain data; give another file (checkpoints of other code: import_checkpoint.py)"
        ) from None
    except DAMAGED as error:
        said = "" if isinstance(error, LookupError) else str(error)  # a bare key says nothing
        reason = said.splitlines()[0][:120] if said else "it is something else, or cut short"
        raise UserError(
            f"{what}: {path} cannot be read as a checkpoint ({reason}); give one that torch saved"
        ) from None


def read_checkpoint(
    path: str | os.PathLike, kinds: tuple[str, ...] | None = None, what: str = "checkpoint"
) -> dict[str, Any]:
    """Read a checkpoint onto the CPU with `weights_only=True` and check its kind.

    Args:
        path: A checkpoint file, or a run folder (its last checkpoint).
        kinds: Accepted kinds; None for any.
        what: How errors call the checkpoint.

    Raises:
        UserError: The file does not exist, is no checkpoint of this toolkit, or holds a model of
            another kind.
    """
    found = checkpoint_path(path, what)
    payload = load_tensors(found, what)
    check_record(payload, found, kinds, what)
    return payload


def check_record(payload: Any, found: Path, kinds: tuple[str, ...] | None, what: str) -> None:
    """Check that `payload`, read from `found`, is a checkpoint of ours and of one of `kinds`.

    Raises:
        UserError: It is something else, damaged, of a later format, or of another kind.
    """
    if not isinstance(payload, dict) or KEY not in payload:
        raise UserError(
            f"{what}: {found} was not written by this toolkit (it has no {KEY!r} entry); "
            "scripts/import_checkpoint.py turns a checkpoint of other code into one of ours"
        )
    record, state = payload[KEY], payload.get("state_dict")
    types = {"format": int, "kind": str, "model": dict, "training_only": list}
    if (
        not isinstance(record, dict)
        or not all(isinstance(record.get(name), kind) for name, kind in types.items())
        or not isinstance(record["model"].get("target"), str)
        or not isinstance(record.get("classes"), list | None)
        or not isinstance(record.get("seed"), int | None)
        or not isinstance(record.get("revision"), str | None)
        or not isinstance(state, dict)
        or not all(isinstance(name, str) for name in (*state, *record["training_only"]))
    ):
        raise UserError(
            f"{what}: {found} is damaged: its state_dict, or the entry {KEY!r} that says what it "
            "holds, is not what this toolkit writes; give another checkpoint"
        )
    if record["format"] > FORMAT:
        raise UserError(
            f"{what}: {found} has format {record['format']}, this version reads up to {FORMAT}; "
            "update the toolkit"
        )
    if kinds is not None and record["kind"] not in kinds:
        raise UserError(
            f"{what}: {found} holds a model of kind {record['kind']}; needed is "
            f"{' or '.join(kinds)}"
        )
    if record.get("classes") is not None:
        require_class_names(record["classes"], f"{what}: {found}")


def load_model(
    path: str | os.PathLike,
    kinds: tuple[str, ...] | str,
    device: "torch.device | str" = "cpu",
    what: str = "checkpoint",
):
    """Rebuild a model from its checkpoint alone, in evaluation mode, without gradients.

    Returns:
        The LightningModule of the recorded class, weights loaded strictly; its `record` is the
        checkpoint's.
    """
    from ldm.config import instantiate_from_config, require_own_targets

    kinds = (kinds,) if isinstance(kinds, str) else kinds
    payload = read_checkpoint(path, kinds, what)
    record = payload[KEY]
    # weights_only keeps code out of the tensors; this keeps it out of the classes to build.
    require_own_targets(record["model"], path)
    target = record["model"]["target"]
    try:
        model = instantiate_from_config({**record["model"], "target": MOVED.get(target, target)})
    except UserError as error:
        raise UserError(f"{what}: {path}: {error}") from None
    training_only = tuple(record["training_only"])
    # Somebody's script may have saved it compiled.
    state = {k.replace("_orig_mod.", ""): v for k, v in payload["state_dict"].items()}
    state = {k: v for k, v in state.items() if not k.startswith(training_only)}
    load_strictly(model, state, f"{what}: {path}")
    names, outputs = record["classes"] or [], getattr(model, "outputs", None)
    if names and outputs and len(names) != outputs:
        raise UserError(
            f"{what}: {path} is damaged: its network knows {outputs} classes, and it names "
            f"{len(names)}, {names}; give another checkpoint"
        )
    heat = getattr(model, "temperature", None)
    if heat is not None and not 0 < float(heat) < math.inf:
        raise UserError(
            f"{what}: {path} has the temperature {float(heat):g}, which must be finite and above 0;"
            " give another checkpoint"
        )
    model.classes = record["classes"]
    model.record = record
    return model.to(device).eval().requires_grad_(False)


def load_strictly(model, state: dict, where: str) -> None:
    """Load weights by `load_state_dict`.

    Raises:
        UserError: The weights have other names or shapes than the model's, or one is not finite.
    """
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise UserError(
            f"{where}: the weights do not fit the model: {' '.join(lines)[:400]}"
        ) from None
    require_finite(model.named_parameters(), where)


def require_finite(weights: "Iterable[tuple[str, torch.Tensor]]", where: str) -> None:
    """Check that weights are numbers; a UserError names the first that is not."""
    for name, value in weights:
        if not value.isfinite().all():
            raise UserError(
                f"{where}: {name} has values that are not finite (NaN or infinite); give another "
                "checkpoint, one of before they became so"
            )
