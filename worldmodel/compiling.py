"""One update as a function of a batch and the chance in it: eager, compiled, and on a GPU one CUDA graph.

Chance is drawn before (``draw``), DreamerV3's recurrence is an operator of its own (:mod:`pvrpipe.worldmodel.scan`),
and the optimizers count in tensors, so that nothing in an update waits for the device.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pvrpipe.schemas.errors import InvalidValueError
from pvrpipe.worldmodel.optimizer import Updater
from pvrpipe.worldmodel.ranks import ranks

Precision = Literal["fp32", "bf16"]
Losses = Callable[[Mapping[str, Tensor], Any], tuple[Tensor, dict[str, Tensor]]]
Update = Callable[[Mapping[str, Tensor], Any], dict[str, Tensor]]

COMPILED = 1 << 12  # runs that one process may compile, of whatever shapes; torch gives up at the ninth
EAGER = 3  # updates before one is recorded: libraries take their workspaces, compilers compile


def update_of(
    model: Any, updater: Updater, losses: Losses, device: torch.device, precision: Precision
) -> Update:
    """What one update does with a batch and the chance drawn for it; gives the loss's terms and the gradient's norm.

    On a GPU it is recorded once and replayed, and gives the numbers it gave eagerly; but not among several processes,
    nor with an encoder inside the model.
    """

    def update(batch: Mapping[str, Tensor], drawn: Any) -> dict[str, Tensor]:
        with tensor_cores(precision):
            with computing(precision, device):
                loss, terms = losses(batch, drawn)
            norm = updater.update(loss)
        return {name: term.detach() for name, term in terms.items()} | {"gradient_norm": norm}

    alone = ranks().ranks == 1 and model.seen.backbone is None
    return Replayed(update) if device.type == "cuda" and alone else update


class Replayed:
    """An update recorded as a CUDA graph: thousands of small kernels, launched as one.

    The first calls are eager; shapes must not change. After "CUDA semantics", whole-network capture, of PyTorch's
    documentation.
    """

    def __init__(self, update: Update) -> None:
        self.eager, self._calls = update, 0
        self._graph, self._stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        self._given: list[Tensor] = []
        self._terms: dict[str, Tensor] = {}

    def __call__(self, batch: Mapping[str, Tensor], drawn: Any) -> dict[str, Tensor]:
        """The terms, of this batch until the next is given."""
        self._calls += 1
        if self._calls == 1:
            gc.collect()  # a gradient's sum is kept on the stream of the first graph that is still there
        if self._calls <= EAGER:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                terms = self.eager(batch, drawn)
            torch.cuda.current_stream().wait_stream(self._stream)
            return terms
        given = [leaf for leaf in tree_leaves((batch, drawn)) if isinstance(leaf, Tensor)]
        if not self._given:
            self._given = given
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # of the eager updates: the graph has memory of its own
            # Other threads, such as the one that reads ahead, may use the device meanwhile.
            with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
                self._terms = self.eager(batch, drawn)
        else:
            torch._foreach_copy_(self._given, given)
        self._graph.replay()
        return self._terms


@contextlib.contextmanager
def computing(precision: Precision, device: torch.device) -> Iterator[None]:
    """Products in bfloat16 where that is asked for."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        yield


@contextlib.contextmanager
def tensor_cores(precision: Precision) -> Iterator[None]:
    """On a GPU, products that stay in float32 beside bfloat16 go over TF32, which is the more exact of the two."""
    matmul, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolutions.allow_tf32
    matmul.allow_tf32 = convolutions.allow_tf32 = precision == "bf16"
    try:
        yield
    finally:
        matmul.allow_tf32, convolutions.allow_tf32 = before


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
    import torch._dynamo.config
    import torch._inductor.config

    torch._inductor.config.deterministic = True  # kernels chosen by timing would change bits from run to run
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = COMPILED
    return torch.compile(model.losses, dynamic=False, fullgraph=True)


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
