"""What a training will need of the device's memory, said before it begins.

Parameters, their gradients and the optimizer's state follow from the model; what is kept for the backward pass is
counted in forward passes over one window and over two, and grows with their number.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from pvrpipe.schemas.errors import InvalidValueError
from pvrpipe.store.paging import available_memory
from pvrpipe.worldmodel.batches import chance
from pvrpipe.worldmodel.models import Setting
from pvrpipe.worldmodel.ranks import ranks

STATES = 4  # of each parameter: itself, its gradient, and the optimizer's two
STEP = 1  # more of them, when nothing is kept any more: LaProp's step, or two where processes average their gradients
PASSING = 1.3  # gradients of what is kept, while the backward pass goes through it
POOLS = 1.8  # times as much of a GPU: what eager updates leave in the allocator, and the graph's own pool (docs/LOG.md)
TORCH = 200 << 20  # what the libraries take with the first backward pass
GIB = 1 << 30


def check_room(model: Any, setting: Setting, rows: int, windows: int, device: torch.device) -> None:
    """Refuse a training that the device's memory does not suffice for.

    Args:
        model: a world model, on the device.
        setting: what it was built for.
        rows: of a window, with those a model needs in front.
        windows: of a batch, in this process.
        device: where to.

    Raises:
        InvalidValueError: it does not; says what is needed and what is there.
    """
    fixed, each = training_bytes(model, setting, rows, device)
    count = ranks().ranks
    least = fixed + (STEP if count == 1 else STEP + 1) * learned_bytes(model)
    needed, there = max(least, fixed + windows * each), room(device)
    if needed <= there:
        return
    fitting = count * int((there - fixed) // each) if least <= there else 0
    smaller = f"--batch {fitting} or less, or a smaller --length or --size"
    cure = f"give {smaller if fitting > 0 else 'a smaller --size'}"
    raise InvalidValueError(
        f"training needs about {needed / GIB:.1f} GiB of {device}'s memory ({fixed / GIB:.1f} for the weights and "
        f"their optimizer), {there / GIB:.1f} are free; {cure}"
    )


def training_bytes(model: Any, setting: Setting, rows: int, device: torch.device) -> tuple[int, float]:
    """Bytes that training takes beyond the weights, and besides for each window of a batch.

    Args:
        model: a world model; it is left as it was.
        setting: what it was built for.
        rows: of a window, with those a model needs in front.
        device: where the model is.
    """
    one, two = (kept_bytes(model, setting, rows, windows, device) for windows in (1, 2))
    each = two - one  # the rest is kept once: weights laid out anew for a batch
    passing = PASSING * (POOLS if device.type == "cuda" else 1)
    return TORCH + (STATES - 1) * learned_bytes(model) + one - each, passing * each


def learned_bytes(model: Any) -> int:
    """Bytes of the parameters that learn."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def kept_bytes(model: Any, setting: Setting, rows: int, windows: int, device: torch.device) -> int:
    """Bytes that the forward pass of a batch keeps for the backward pass, beyond the model's own."""
    before = [buffer.clone() for buffer in model.buffers()]
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return (
            tensor.detach()
        )  # itself, it would hold what holds it, and nothing of the graph would ever be freed

    batch = {
        name: value.expand(windows, *value.shape[1:])
        for name, value in empty_window(setting, rows, device).items()
    }
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.loss(batch, chance(0))
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)
    return sum(kept.values())


def empty_window(setting: Setting, rows: int, device: torch.device) -> dict[str, Tensor]:
    """A batch of one window (1, T, ...) of zeros."""
    shapes = {
        "observation": setting.shown.shape,
        "action": (setting.action,),
        "state": (setting.state,),
        "reward": (),
        "is_first": (),
        "is_terminal": (),
    }
    dtypes = {"is_first": torch.bool, "is_terminal": torch.bool}
    if setting.shown.kind in ("pixels", "frames"):
        dtypes["observation"] = torch.uint8
    return {
        name: torch.zeros((1, rows, *shape), dtype=dtypes.get(name, torch.float32), device=device)
        for name, shape in shapes.items()
    }


def room(device: torch.device) -> int:
    """Bytes that are free there for this process; those that train together on one machine share its memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
