"""Processes that train one model together: each has a part of every batch, and all make the same update.

``torchrun`` or Ray Train start them. Rank r of n has the r-th of n equal parts of each batch; chance is drawn for the
whole batch and cut the same way, gradients and statistics are averaged, so that n processes do what one would. Alone,
each function here gives back what it was given.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


class Ranks(NamedTuple):
    """This process among those that train together."""

    rank: int = 0
    ranks: int = 1


def ranks() -> Ranks:
    """Which of how many this process is."""
    return Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Ranks()


def of_several() -> Ranks:
    """Which of how many ``torchrun`` says this process is, joined or not."""
    return Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


@contextmanager
def joined(device: torch.device | str) -> Iterator[torch.device]:
    """Join the processes that ``torchrun`` started beside this one, if it did; the device that is this one's."""
    device = torch.device(device)
    if of_several().ranks == 1:
        yield device
        return
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)  # streams and graphs that name no device are there too
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def own_part(draw: Callable[[tuple[int, ...]], Tensor], shape: Iterable[int], batch_at: int = 0) -> Tensor:
    """Draw for the whole batch, keep what is this process's.

    Args:
        draw: makes a tensor of a shape.
        shape: of this process's part.
        batch_at: which axis the batch is, or is the outermost part of.
    """
    rank, count = ranks()
    whole = [side * (count if axis == batch_at else 1) for axis, side in enumerate(shape)]
    return draw(tuple(whole)).chunk(count, batch_at)[rank]


def averaged(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes."""
    count = ranks().ranks
    if count > 1:
        value = value.detach().clone()
        dist.all_reduce(value)
        value /= count
    return value


def gathered(values: Tensor) -> Tensor:
    """A tensor of the whole batch from each process's part (n, ...)."""
    count = ranks().ranks
    if count == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(count)]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def average_gradients(model: nn.Module) -> None:
    """Every process's gradients become the mean over all."""
    if ranks().ranks == 1:
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    mean = averaged(torch.cat([grad.flatten() for grad in grads]))
    for grad, part in zip(grads, mean.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def told_by_first(value: T) -> T:
    """What the first process has, in all of them."""
    if ranks().ranks == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]
