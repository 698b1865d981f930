"""An encoder's work on one batch, recorded as a CUDA graph: hundreds of small kernels, launched as one.

The kernels are those that run one by one, so that the bits are too (tests/test_pipeline_gpu.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

EAGER = 2  # batches before one is recorded, thrown away: libraries take their workspaces


class Replayed:
    """A function of frames (B, H, W, 3) on a GPU, recorded once for each shape in turn, and replayed.

    What cannot be recorded, such as a network that looks at numbers on its way, is computed as it would be without.
    After "CUDA semantics", whole-network capture, of PyTorch's documentation.
    """

    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        self.eager, self.recorded = compute, False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = torch.cuda.Stream()
        self._given, self._found = torch.empty(0), torch.empty(0)

    def __call__(self, frames: Tensor) -> Tensor:
        """Their embeddings, until the next batch is given."""
        if self._given.shape != frames.shape:
            self.recorded = self._record(frames)
        if self._graph is None:
            return self.eager(frames)
        self._given.copy_(frames)
        self._graph.replay()
        return self._found

    def _record(self, frames: Tensor) -> bool:
        """Record frames of this shape; whether that went."""
        self._graph, self._given, self._found = None, frames.clone(), torch.empty(0)
        graph = torch.cuda.CUDAGraph()
        try:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(EAGER):
                    self.eager(self._given)
            torch.cuda.synchronize()
            # Other threads, such as those that read ahead, may use the device meanwhile.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._found = self.eager(self._given)
        except torch.OutOfMemoryError:
            self._given = torch.empty(0)
            raise
        except RuntimeError:  # an operation that waits for the device; nothing of it is left
            return False
        self._graph = graph
        return True
