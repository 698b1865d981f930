"""Between memory and the device, so that the device never waits; on a CPU there is nothing to copy."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DECODERS = 8  # threads at most; each holds a batch
READ_AHEAD = 2  # batches that wait, on the device or embedded
S = TypeVar("S")
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


def decoding_threads(device: torch.device) -> int:
    """How many threads decode frames, each a batch: for a GPU, its share of the processors.

    None for a CPU, which encodes more slowly than the thread that reads ahead decodes.
    """
    if device.type != "cuda":
        return 0
    return max(1, min(DECODERS, len(os.sched_getaffinity(0)) // torch.cuda.device_count()))


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


def in_order(work: Callable[[S], T], items: Iterable[S], threads: int) -> Generator[T, None, None]:
    """``work`` of each item, in order; with threads, each of them is one item ahead."""
    if not threads:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        begun: deque[Future[T]] = deque()
        try:
            for item in items:
                begun.append(pool.submit(work, item))
                if len(begun) > threads:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


class ReadAhead(Generic[T]):
    """An iterator that a thread runs, a few items ahead, from now on; its errors are raised to who iterates."""

    def __init__(self, items: Generator[T, None, None]) -> None:
        self._ready: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(READ_AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(items,), name="read-ahead", daemon=True)
        try:
            self._thread.start()
        except BaseException:  # Ctrl-C while it waits for the thread's first sign: nobody else can end it
            self._stopped.set()
            raise

    def __iter__(self) -> Generator[T, None, None]:
        """The items; the thread ends with the iteration."""
        try:
            while (item := self._ready.get()) is not None:
                if isinstance(item, BaseException):
                    try:
                        raise item
                    finally:
                        del item  # or it would hold the frames that it came through, and what they hold
                yield item[0]
        finally:
            self.close()

    def close(self) -> None:
        """End the thread, once it has made the item that it is at."""
        self._stopped.set()
        self._thread.join()

    def _run(self, items: Generator[T, None, None]) -> None:
        try:
            with contextlib.closing(items):
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
