"""An encoder's work on one batch, recorded as a CUDA graph: hundreds of small kernels, launched as one.

The kernels are those that run one by one, so that the bits are too (tests/test_pipeline_gpu.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

EAGER = 2  # batches before one is recorded, thrown away: libraries take their workspaces
ROOM = 1.2  # of what they took that must be free, or none is recorded


class Replayed:
    """A function of frames (B, H, W, 3) on a GPU, recorded once for each shape in turn, and replayed.

    What cannot be recorded, such as a network that looks at numbers on its way, is computed as it would be without;
    and so is what there is no room to record, which has memory of its own: PyTorch 2.11 keeps the memory of a
    recording that ran out of it for as long as the process lives (pytorch/pytorch#190348).
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
            if self._taken() * ROOM > _free():
                return False
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

    def _taken(self) -> int:
        """Bytes of the device that the batches before the recorded one took, and gave back."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(EAGER):
                self.eager(self._given)
        torch.cuda.synchronize()
        taken = torch.cuda.max_memory_reserved() - before
        torch.cuda.empty_cache()
        return taken


def _free() -> int:
    """Bytes of the device that this process may still take."""
    free, total = torch.cuda.mem_get_info()
    allowed = int(torch.cuda.get_per_process_memory_fraction() * total)
    return min(free, allowed - torch.cuda.memory_reserved())
