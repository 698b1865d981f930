"""Windows as tensors: for a DataLoader, or read ahead onto the device by a thread."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from threading import Event, Thread, current_thread
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from pvrpipe.schemas.errors import InvalidValueError
from pvrpipe.store.reading import Store
from pvrpipe.store.windows import WindowSampler

READ_AHEAD = 3  # batches, so that a thread that is not scheduled for a while is not waited for
LAST_READ = 10.0  # seconds that whoever ends waits for the read under way; from a dead URL it takes longer
READ_AHEAD_BYTES = 256 << 20  # of them; one batch is always read ahead
DEVICE_SHARE = 0.5  # of the device's free memory, which a store may take
Tensors = dict[str, Tensor]


class WindowBatches(IterableDataset[Tensors]):
    """Batch after batch of a sampler, without end, for a ``DataLoader`` with ``batch_size=None``.

    Workers take turns, so the loader gives the batches in order, however many workers it has. To resume,
    set ``sampler.taken`` (or ``sampler.restore``) to the number of batches that were used.
    """

    def __init__(self, sampler: WindowSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[Tensors]:
        """Batches (B, T, *shape)."""
        worker = get_worker_info()
        k, stride = (
            (self.sampler.taken + worker.id, worker.num_workers) if worker else (self.sampler.taken, 1)
        )
        while True:
            yield as_tensors(self.sampler.batch(k))
            k += stride


class EveryWindow(Dataset[Tensors]):
    """All windows of a sampler by number, for a ``DataLoader`` that batches and shuffles them itself."""

    def __init__(self, sampler: WindowSampler) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        """How many different windows there are."""
        return self.sampler.windows

    def __getitem__(self, number: int) -> Tensors:
        """One window: column → (T, *shape)."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        window = self.sampler.read(np.array([number]))
        return {name: rows[0] for name, rows in as_tensors(window).items()}


class WindowLoader:
    """Batch k of a sampler as tensors on a device; a pure function of the sampler and k.

    A store that fits into half of a GPU's free memory is kept there, and windows are gathered on it.
    Otherwise a thread cuts the next batches out of the store, into pinned memory, while batch k is used. Either way it
    is a thread that draws which windows come next.

    Args:
        sampler: which windows.
        device: where to.
        prepare: what is done with each batch on its way, in the same thread.
        resident: keep the columns on the device; ``auto`` does so on a GPU where they fit.

    Raises:
        InvalidValueError: they do not fit.
    """

    def __init__(
        self,
        sampler: WindowSampler,
        device: torch.device,
        prepare: Callable[[Tensors], Tensors] = dict,
        resident: Literal["auto"] | bool = "auto",
    ) -> None:
        self.sampler, self.device, self._prepare = sampler, device, prepare
        self.waited = 0.0  # seconds that callers had to wait for batches
        fits = resident_bytes(sampler) <= room_on(device)
        if resident is True and not fits:
            raise InvalidValueError(
                f"{sampler.store.path} takes {resident_bytes(sampler) >> 20} MiB, more than {device} has room for; "
                "leave the choice to auto"
            )
        keep = fits and device.type == "cuda" if resident == "auto" else resident
        self._resident = columns_on(device, sampler.store, sampler.plan.columns) if keep else None
        self.backing = f"resident on {device}" if keep else f"{sampler.backing}, read ahead"
        depth = max(1, min(READ_AHEAD, READ_AHEAD_BYTES // batch_bytes(sampler)))
        self._ahead = ReadAhead(self._drawing() if keep else self._reading(), depth)

    def __call__(self, k: int) -> Tensors:
        """Batch k: column → (B, T, *shape) on the device."""
        began = time.perf_counter()
        batch = self._ahead(k)
        self.waited += time.perf_counter() - began
        if self._resident is None:
            return batch
        rows = without_waiting(batch["rows"], self.device)
        return self._prepare({name: column[rows] for name, column in self._resident.items()})

    def _drawing(self) -> Callable[[int], Tensors]:
        """How the rows of batch k are drawn, by a function that does not keep this loader alive."""
        sampler = self.sampler

        def draw(k: int) -> Tensors:
            return {"rows": torch.from_numpy(sampler.pieces(sampler.numbers(k)).rows)}

        return draw

    def _reading(self) -> Callable[[int], Tensors]:
        """How batch k is read, by a function that does not keep this loader alive."""
        sampler, device, prepare = self.sampler, self.device, self._prepare

        def read(k: int) -> Tensors:
            batch = as_tensors(sampler.batch(k))
            return prepare({name: without_waiting(rows, device) for name, rows in batch.items()})

        return read


class ReadAhead:
    """Batches by number from a thread that is some batches ahead; it ends when this object goes.

    Two C queues and no futures: what a caller pays for a batch that is there is a few microseconds.

    Args:
        read: gives batch k; only ever called in the thread. What it raises is raised to who asks for that batch.
        depth: how many batches behind the one that is asked for are read.
    """

    def __init__(self, read: Callable[[int], Tensors], depth: int) -> None:
        self._depth, self._next, self._asked = depth, 0, 0  # the thread has _next … _asked - 1 to give
        self._wanted: SimpleQueue[int | None] = SimpleQueue()
        self._ready: SimpleQueue[Tensors | BaseException] = SimpleQueue()
        over, queues = Event(), (self._wanted, self._ready)
        thread = Thread(target=_serve, args=(read, over, *queues), name="read-ahead", daemon=True)
        thread.start()
        weakref.finalize(self, _end, over, self._wanted, thread)

    def __call__(self, k: int) -> Tensors:
        """Batch k, and have those behind it read."""
        if k != self._next:
            for _ in range(self._next, self._asked):  # what was read ahead is not wanted any more
                self._ready.get()
            self._next = self._asked = k
        while self._asked <= k + self._depth:
            self._wanted.put(self._asked)
            self._asked += 1
        self._next = k + 1
        batch = self._ready.get()
        if isinstance(batch, BaseException):
            raise batch
        return batch


def _end(over: Event, wanted: SimpleQueue[int | None], thread: Thread) -> None:
    """Let the thread finish what it reads: an interpreter that ends under a thread in native code crashes."""
    over.set()
    wanted.put(None)
    if thread is not current_thread():
        thread.join(LAST_READ)


def _serve(
    read: Callable[[int], Tensors],
    over: Event,
    wanted: SimpleQueue[int | None],
    ready: SimpleQueue[Tensors | BaseException],
) -> None:
    for k in iter(wanted.get, None):
        if over.is_set():
            return
        try:
            ready.put(read(k))
        except BaseException as error:
            ready.put(error)


def without_waiting(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, through pinned memory, so that the host need not wait for a GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def as_tensors(batch: dict[str, Any]) -> Tensors:
    """Arrays as tensors of the same memory."""
    return {name: torch.from_numpy(rows) for name, rows in batch.items()}


def columns_on(device: torch.device, store: Store, columns: tuple[str, ...]) -> Tensors:
    """Whole columns (N, *shape) on a device, copied there shard by shard."""
    out = {}
    for name in columns:
        column = store.column(name)
        out[name] = torch.empty(
            (store.manifest.rows, *column.shape), dtype=getattr(torch, column.dtype), device=device
        )
        done = 0
        for index, entry in enumerate(store.manifest.shards):
            rows = store.shard(index).rows(name, 0, entry.rows)
            out[name][done : done + entry.rows] = torch.from_numpy(rows).to(device)
            done += entry.rows
    return out


def batch_bytes(sampler: WindowSampler) -> int:
    """Bytes of this rank's part of a batch; at least 1."""
    columns = (sampler.store.column(name) for name in sampler.plan.columns)
    rows = sampler.plan.batch // sampler.ranks * sampler.plan.length
    return max(1, rows * sum(column.width for column in columns))


def resident_bytes(sampler: WindowSampler) -> int:
    """Bytes that the columns of a sampler take whole."""
    columns = (sampler.store.column(name) for name in sampler.plan.columns)
    return sum(column.width for column in columns) * sampler.store.manifest.rows


def room_on(device: torch.device) -> float:
    """Bytes that a store may take on a device."""
    if device.type != "cuda":
        return float("inf")
    return DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]
