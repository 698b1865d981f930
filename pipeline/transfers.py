"""Between memory and the device, so that the device never waits; on a CPU there is nothing to copy."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DECODERS = 16  # threads at most
READ_AHEAD = 2  # batches that wait, decoded and on the device
T = TypeVar("T")


class Upload:
    """Frames to the device on a stream of its own, from pinned memory, which they are decoded into.

    The caching allocator of pinned memory gives a block out again only after the copies that read it
    (PyTorch, "CUDA semantics", use of pinned memory buffers), so nothing is kept here.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def room(self, shape: tuple[int, ...]) -> Tensor:
        """Memory for frames, which can be copied from while the host goes on."""
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self._stream is not None)

    def __call__(self, frames: Tensor) -> Callable[[], Tensor]:
        """Begin to copy frames; calling the result, in the thread that computes, gives them."""
        if self._stream is None:
            return lambda: frames
        with torch.cuda.stream(self._stream):
            there = frames.to(self._device, non_blocking=True)
            copied = self._stream.record_event()

        def arrived() -> Tensor:
            now = torch.cuda.current_stream(self._device)
            now.wait_event(copied)
            there.record_stream(now)
            return there

        return arrived


def decoding_threads(device: torch.device) -> ThreadPoolExecutor | None:
    """What decodes frames for a GPU, which encodes them faster than one thread decodes: its share of the processors."""
    if device.type != "cuda":
        return None
    share = len(os.sched_getaffinity(0)) // torch.cuda.device_count()
    return ThreadPoolExecutor(max(1, min(DECODERS, share)), thread_name_prefix="decode")


def download(values: Tensor) -> Callable[[], NDArray[np.float32]]:
    """Begin to copy float values from the device; calling the result waits for them and gives them."""
    values = values.float()
    if values.device.type != "cuda":
        array: NDArray[np.float32] = values.numpy()
        return lambda: array
    host = values.to("cpu", non_blocking=True)  # allocates pinned memory
    copied = torch.cuda.current_stream(values.device).record_event()

    def arrived() -> NDArray[np.float32]:
        copied.synchronize()
        found: NDArray[np.float32] = host.numpy()
        return found

    return arrived


def one_behind(items: Iterator[T]) -> Generator[T, None, None]:
    """Each item once the next has been begun: the device computes that while this one is waited for."""
    last: list[T] = []
    for item in items:
        if last:
            yield last.pop()
        last.append(item)
    yield from last


class ReadAhead(Generic[T]):
    """An iterator that a thread runs, a few items ahead, from now on; its errors are raised to who iterates."""

    def __init__(self, items: Iterator[T]) -> None:
        self._ready: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(READ_AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(items,), name="read-ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        """The items; the thread ends with the iteration."""
        try:
            while (item := self._ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item[0]
        finally:
            self.close()

    def close(self) -> None:
        """End the thread, once it has made the item that it is at."""
        self._stopped.set()
        self._thread.join()

    def _run(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                self._put((item,))
                if self._stopped.is_set():
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: tuple[T] | BaseException | None) -> None:
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return
