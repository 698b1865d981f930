"""Between memory and the device, so that the device never waits; on a CPU there is nothing to copy."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

READ_AHEAD = 2  # batches that wait, decoded and on the device
T = TypeVar("T")


class Upload:
    """Frames to the device on a stream of its own, from pinned memory.

    The caching allocator of pinned memory gives a block out again only after the copies that read it
    (PyTorch, "CUDA semantics", use of pinned memory buffers), so nothing is kept here.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, frames: NDArray[np.uint8]) -> Callable[[], Tensor]:
        """Begin to copy frames; calling the result, in the thread that computes, gives them."""
        pixels = torch.from_numpy(frames)
        if self._stream is None:
            return lambda: pixels
        with torch.cuda.stream(self._stream):
            there = pixels.pin_memory().to(self._device, non_blocking=True)
            copied = self._stream.record_event()

        def arrived() -> Tensor:
            now = torch.cuda.current_stream(self._device)
            now.wait_event(copied)
            there.record_stream(now)
            return there

        return arrived


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


def read_ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """Run an iterator in a thread, a few items ahead; its errors are raised here."""
    ready: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(READ_AHEAD)
    stopped = threading.Event()

    def put(item: tuple[T] | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def run() -> None:
        try:
            for item in items:
                put((item,))
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=run, name="read-ahead", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item[0]
    finally:
        stopped.set()
        thread.join()
