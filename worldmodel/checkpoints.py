"""Parameters and optimizer state in one safetensors file that is replaced whole, and loaded strictly."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from pvrpipe.schemas.errors import RunError
from pvrpipe.store.files import replacing, settle, tensors_to
from pvrpipe.worldmodel.inputs import BACKBONE
from pvrpipe.worldmodel.models import own_tensors
from pvrpipe.worldmodel.optimizer import Updater

CHECKPOINT, BEST = "checkpoint.safetensors", "best.safetensors"
MODEL, OPTIMIZER = "model.", "optimizer."


def save(folder: Path, update: int, model: nn.Module, updater: Updater) -> None:
    """Replace the checkpoint of a run; equal numbers give equal bytes.

    Chance needs no state here: every update derives its own from the seed and its number.
    """
    tensors = {
        **{MODEL + name: value for name, value in own_tensors(model).items()},
        **{OPTIMIZER + name: value for name, value in updater.tensors().items()},
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    sums = {name: _sum(value, update) for name, value in sorted(tensors.items())}
    # One metadata entry only: safetensors writes several in an order of its own.
    metadata = {"pvrpipe": json.dumps({"update": update, "crc32": sums})}
    with replacing(folder / CHECKPOINT) as temporary, tensors_to(temporary):
        safetensors.torch.save_file(tensors, temporary, metadata)


def load(folder: Path, model: nn.Module, updater: Updater | None = None, *, backbone: bool = True) -> int:
    """Load a run's checkpoint into a model, and into its optimizer if it is to go on.

    Args:
        folder: of the run.
        model: as it was when training began.
        updater: what updates it.
        backbone: also what learned of a backbone; otherwise that is left in the file.

    Returns:
        The number of updates done.

    Raises:
        RunError: the file is no checkpoint, or a tensor is missing, extra, of another shape or dtype, or not as it
            was written.
    """
    path = folder / CHECKPOINT
    wanted = {MODEL + name: value for name, value in own_tensors(model).items()}
    if updater is not None:
        wanted |= {OPTIMIZER + name: value for name, value in updater.tensors().items()}
    try:
        with safetensors.safe_open(path, "pt") as file:
            told = json.loads((file.metadata() or {})["pvrpipe"])
            update, sums = int(told["update"]), dict(told.get("crc32", {}))  # none in older runs
            names = [name for name in file.keys() if updater is not None or name.startswith(MODEL)]  # noqa: SIM118
            names = [name for name in names if backbone or not name.startswith(MODEL + BACKBONE)]
            found = {name: file.get_tensor(name) for name in names}
    except FileNotFoundError:
        raise RunError(
            f"{folder} has no checkpoint yet; the `pvrpipe train-model` command that began it goes on with it"
        ) from None
    except (OSError, KeyError, ValueError, TypeError, safetensors.SafetensorError) as error:
        raise RunError(
            f"{path} is no checkpoint of pvrpipe ({error}); train again with --overwrite"
        ) from None
    _check(path, wanted, found)
    for name in found.keys() & sums.keys():
        if _sum(found[name], update) != sums[name]:
            raise RunError(f"{path}: tensor {name} is not as it was written; train again with --overwrite")
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(found[name])
    return update


def mark_best(folder: Path) -> None:
    """Note that the checkpoint is the best so far."""
    with replacing(folder / BEST) as temporary:
        shutil.copyfile(folder / CHECKPOINT, temporary)


def keep_best(folder: Path) -> None:
    """Make the best checkpoint the run's only one."""
    settle(folder / BEST, folder / CHECKPOINT)


def tuned(folder: Path) -> dict[str, Tensor]:
    """What learned of a backbone, by name, from the checkpoint of a run; nothing where the model has none."""
    with safetensors.safe_open(folder / CHECKPOINT, "pt") as file:
        names = [name for name in file.keys() if name.startswith(MODEL + BACKBONE)]  # noqa: SIM118
        return {name.removeprefix(MODEL): file.get_tensor(name) for name in names}


def _sum(tensor: Tensor, update: int) -> int:
    """CRC-32 of a tensor's bytes, and of the update that it is of: what a disk may do to the file is seen."""
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, update)


def _check(path: Path, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Name the first tensor that does not fit."""
    cure = "it belongs to another model; train again with --overwrite"
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise RunError(f"{path}: tensor {name} is missing; {cure}")
        if name not in wanted:
            raise RunError(f"{path}: tensor {name} is not one of this model's; {cure}")
        ours, theirs = wanted[name], found[name]
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise RunError(
                f"{path}: tensor {name} is {theirs.dtype} {list(theirs.shape)} where {ours.dtype} "
                f"{list(ours.shape)} is needed; {cure}"
            )
