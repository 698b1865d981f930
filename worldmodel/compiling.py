"""The loss of an update and its gradient as one compiled function, which a GPU replays as CUDA graphs.

Chance is drawn before (``draw``), and DreamerV3's recurrence is an operator of its own
(:mod:`pvrpipe.worldmodel.scan`), so that nothing breaks the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pvrpipe.schemas.errors import InvalidValueError

Losses = Callable[[Mapping[str, Tensor], Any], tuple[Tensor, dict[str, Tensor]]]


def losses_of(model: Any, device: torch.device, *, compiled: bool) -> Losses:
    """``model.losses``, compiled if so wished.

    Raises:
        InvalidValueError: there is nothing to compile with, or the model has a backbone.
    """
    if not compiled:
        return model.losses
    if model.seen.backbone is not None:
        raise InvalidValueError("--compile is not for an encoder inside the model; leave it or --pvr out")
    check_compiler(device)
    import torch._inductor.config

    torch._inductor.config.deterministic = True  # kernels chosen by timing would change bits from run to run
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    return torch.compile(model.losses, mode=mode, dynamic=False, fullgraph=True)


def check_compiler(device: torch.device) -> None:
    """Refuse to compile for a CPU without a C++ compiler, or for a GPU without Triton."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise InvalidValueError("--compile needs Triton on a GPU: pip install triton; or leave it out")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError, OSError):
        raise InvalidValueError(
            "--compile needs a C++ compiler on a CPU: apt-get install g++; or leave it out"
        ) from None
