"""What stays in float32 under ``--precision bf16`` because it is little: all that is done once a frame.

bfloat16 rounds at 2^-9 of a value, which is coarser than float16 stores. Between the frames of one episode embeddings
differ by little, and of that about half was lost in the last step (docs/LOG.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Where autocast casts nothing; tensors without data have none that could."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def in_full(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A layer of ``x`` in float32."""
    with full_precision(x):
        return layer(x.float())
