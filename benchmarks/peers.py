"""The usual ways to keep embeddings, each as a user of it would write and read them.

A peer writes rows (N, *shape) of float16 into a folder, gives windows of them by their first rows, and reads all
of them in order. What is not installed is skipped; ``make bench-peers`` installs it. LeRobot's requirements do not
fit beside ours, so it lives in a venv of its own and is spoken to through a pipe and files (``lerobot_peer.py``).
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from noise import Embeddings, write_store
from numpy.typing import NDArray

from pvrpipe.store.converting import convert
from pvrpipe.store.gathering import Pieces, RowReader

SCANNED = 1024  # rows that a sequential reader is asked for at once
GROUP_BYTES = 3 << 19  # of a row group of lists: kind to it, by default a file has a single one
LEROBOT = Path(__file__).parents[1] / ".venv-lerobot" / "bin" / "python"
Starts = NDArray[np.int64]


class Peer:
    """One way to keep rows; a subclass writes them when it is made."""

    name: str
    module = "numpy"  # what has to be installed
    has_windows = True

    def __init__(self, folder: Path, rows: Embeddings, steps: int) -> None:
        self.folder, self.rows, self.steps = folder, rows, steps
        self.shape, self.width = rows.shape[1:], int(np.prod(rows.shape[1:]))
        folder.mkdir(parents=True)
        self.prepare()
        started = time.perf_counter()
        self.write()
        self.write_seconds = time.perf_counter() - started
        self.open()

    @classmethod
    def installed(cls) -> bool:
        """Whether it can be measured here."""
        return find_spec(cls.module) is not None

    def prepare(self) -> None:
        """What comes before writing and is not timed."""

    def write(self) -> None:
        """Write the rows."""
        raise NotImplementedError

    def open(self) -> None:
        """Get ready to read."""

    def windows(self, starts: Starts, length: int) -> Embeddings:
        """Windows (B, T, *shape), an array of its own."""
        raise NotImplementedError

    def scan(self) -> Iterator[Embeddings]:
        """All rows in order."""
        raise NotImplementedError

    def timed(self, starts: Starts, length: int) -> tuple[float, Embeddings]:
        """Windows, and the seconds they took."""
        started = time.perf_counter()
        found = self.windows(starts, length)
        return time.perf_counter() - started, found

    def timed_scan(self) -> float:
        """The seconds it takes to read everything in order into one buffer."""
        buffer = np.empty((SCANNED, *self.shape), np.float16)
        started, done = time.perf_counter(), 0
        for rows in self.scan():
            buffer[: len(rows)] = rows
            done += len(rows)
        seconds = time.perf_counter() - started
        assert done == len(self.rows), self.name
        return seconds

    def close(self) -> None:
        """Let go of what is no file."""

    def bytes(self) -> int:
        """What it takes on disk."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


class Ram(Peer):
    """An array in memory, gathered by NumPy: what the others are measured against."""

    name = "array in RAM, gathered"

    def write(self) -> None:
        """Nothing to write."""

    def windows(self, starts: Starts, length: int) -> Embeddings:
        return self.rows[starts[:, None] + np.arange(length)]

    def scan(self) -> Iterator[Embeddings]:
        yield from (self.rows[first : first + SCANNED] for first in range(0, len(self.rows), SCANNED))


class Own(Peer):
    """A store of ours: fsynced, hashed, with moments and commit records.

    Its reader in order maps: what it gives is copied once, into the caller's buffer, as for the other maps.
    """

    name, shard_format = "pvrpipe, Parquet", "parquet"

    def write(self) -> None:
        self.store = write_store(self.folder / "store", self.rows, self.steps, self.shard_format)

    def open(self) -> None:
        self.reader = RowReader(self.store, ("embedding",), "mapped")

    def windows(self, starts: Starts, length: int) -> Embeddings:
        return self.reader.windows("embedding", Pieces.unbroken(starts, length))

    def scan(self) -> Iterator[Embeddings]:
        for index in range(len(self.store.manifest.shards)):
            for group in self.store.shard(index).mapped("embedding") or ():
                yield from (group[first : first + SCANNED] for first in range(0, len(group), SCANNED))


class OwnTar(Own):
    """The same as tars."""

    name, shard_format = "pvrpipe, WebDataset", "webdataset"


class Npy(Peer):
    """One .npy file, mapped."""

    name = ".npy, memory-mapped"

    def write(self) -> None:
        np.save(self.folder / "rows.npy", self.rows)

    def open(self) -> None:
        self.mapped = np.load(self.folder / "rows.npy", mmap_mode="r")

    def windows(self, starts: Starts, length: int) -> Embeddings:
        return np.asarray(self.mapped[starts[:, None] + np.arange(length)])

    def scan(self) -> Iterator[Embeddings]:
        yield from (self.mapped[first : first + SCANNED] for first in range(0, len(self.rows), SCANNED))


class Hdf5(Peer):
    """One dataset of an HDF5 file, in one run of bytes."""

    name, module, chunks = "HDF5, contiguous", "h5py", None

    def write(self) -> None:
        import h5py

        with h5py.File(self.folder / "rows.h5", "w") as file:
            file.create_dataset("rows", data=self.rows, chunks=self.chunks)

    def open(self) -> None:
        import h5py

        self.data = h5py.File(self.folder / "rows.h5")["rows"]

    def windows(self, starts: Starts, length: int) -> Embeddings:
        return np.stack([self.data[start : start + length] for start in starts.tolist()])

    def scan(self) -> Iterator[Embeddings]:
        yield from (self.data[first : first + SCANNED] for first in range(0, len(self.rows), SCANNED))


class Hdf5Chunked(Hdf5):
    """In chunks as h5py chooses them, which a dataset that grows must have."""

    name, chunks = "HDF5, h5py's chunks", True


class Zarr(Peer):
    """A zarr array with its defaults: chunks of its choice, zstd."""

    name, module = "zarr, defaults", "zarr"

    def write(self) -> None:
        import zarr

        zarr.create_array(store=self.folder / "rows.zarr", data=self.rows)

    def open(self) -> None:
        import zarr

        self.data = zarr.open_array(self.folder / "rows.zarr", mode="r")

    windows, scan = Hdf5.windows, Hdf5.scan


class Lance(Peer):
    """A Lance data set of fixed-size lists."""

    name, module = "Lance, take", "lance"

    def write(self) -> None:
        import lance

        lance.write_dataset(pa.table({"embedding": as_list(self.rows)}), self.folder / "rows.lance")

    def open(self) -> None:
        import lance

        self.data = lance.dataset(self.folder / "rows.lance")

    def windows(self, starts: Starts, length: int) -> Embeddings:
        taken = self.data.take((starts[:, None] + np.arange(length)).ravel().tolist(), columns=["embedding"])
        return as_rows(taken.column("embedding"), self.shape).reshape(len(starts), length, *self.shape)

    def scan(self) -> Iterator[Embeddings]:
        for batch in self.data.to_batches(batch_size=SCANNED):
            yield as_rows(batch.column("embedding"), self.shape)


class ParquetList(Peer):
    """A Parquet file of fixed-size lists as pyarrow writes it, but for smaller row groups."""

    name = "Parquet list, pyarrow"

    def write(self) -> None:
        self.group = max(1, GROUP_BYTES // (2 * self.width))
        table = pa.table({"embedding": as_list(self.rows)})
        pq.write_table(table, self.folder / "rows.parquet", row_group_size=self.group)

    def open(self) -> None:
        self.file = pq.ParquetFile(self.folder / "rows.parquet")

    def windows(self, starts: Starts, length: int) -> Embeddings:
        out = np.empty((len(starts), length, *self.shape), np.float16)
        for target, start in zip(out, starts.tolist(), strict=True):
            groups = range(start // self.group, (start + length - 1) // self.group + 1)
            column = self.file.read_row_groups(list(groups)).column("embedding")
            target[:] = as_rows(column, self.shape)[start - groups[0] * self.group :][:length]
        return out

    def scan(self) -> Iterator[Embeddings]:
        for batch in self.file.iter_batches(SCANNED):
            yield as_rows(batch.column("embedding"), self.shape)


class LitData(Peer):
    """Chunks of litdata, an item a row, read by index."""

    name, module = "litdata, by index", "litdata"

    def write(self) -> None:
        from litdata.streaming.cache import Cache

        cache = Cache(str(self.folder), chunk_bytes=64 << 20)
        for number, row in enumerate(self.rows):
            cache[number] = {"embedding": row}
        cache.done()
        cache.merge()

    def open(self) -> None:
        from litdata import StreamingDataset

        self.data = StreamingDataset(str(self.folder))

    def windows(self, starts: Starts, length: int) -> Embeddings:
        rows = [
            self.data[row]["embedding"] for start in starts.tolist() for row in range(start, start + length)
        ]
        return np.stack(rows).reshape(len(starts), length, *self.shape)

    def scan(self) -> Iterator[Embeddings]:
        part = []
        for item in self.data:
            part.append(item["embedding"])
            if len(part) == SCANNED:
                yield np.stack(part)
                part = []
        if part:
            yield np.stack(part)


class WebDataset(Peer):
    """Our tars through the ``webdataset`` library's own reader, which only streams."""

    name, module, has_windows = "webdataset library, stream", "webdataset", False

    def write(self) -> None:
        write_store(self.folder, self.rows, self.steps, "webdataset")

    def scan(self) -> Iterator[Embeddings]:
        import webdataset

        urls = sorted(str(path) for path in self.folder.glob("shards/*.tar"))
        for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
            yield sample["embedding.npy"]


class LeRobot(Peer):
    """A LeRobot v3 dataset by ``pvrpipe convert --to lerobot``, windows by its ``delta_timestamps``.

    It has no row after the last action of an episode, so windows must end before that row.
    """

    name = "LeRobot v3"

    @classmethod
    def installed(cls) -> bool:
        return LEROBOT.exists()

    def prepare(self) -> None:
        self.store = write_store(self.folder / "store", self.rows, self.steps)
        self.folder = self.folder / "lerobot"

    def write(self) -> None:
        convert(self.store.path, self.folder, "lerobot")

    def open(self) -> None:
        command = [LEROBOT, Path(__file__).with_name("lerobot_peer.py"), self.folder]
        own = {"HF_HOME": str(self.folder.with_name("cache")), "HF_HUB_OFFLINE": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env={**os.environ, **own}, **pipes)

    def ask(self, **question: object) -> float:
        """The seconds that an answer took over there; its array lies in ``answer.npy``."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return float(json.loads(self.process.stdout.readline())["seconds"])

    def timed(self, starts: Starts, length: int) -> tuple[float, Embeddings]:
        frames = starts - starts // (self.steps + 1)
        seconds = self.ask(frames=frames.tolist(), length=length)
        return seconds, np.load(self.folder / "answer.npy").reshape(len(starts), length, *self.shape)

    def timed_scan(self) -> float:
        return self.ask(frames=None, length=SCANNED)

    def close(self) -> None:
        self.process.communicate()  # it ends with its stdin


PEERS: tuple[type[Peer], ...] = (
    Ram, Own, OwnTar, Npy, Hdf5, Hdf5Chunked, Zarr, Lance, ParquetList, LitData, WebDataset, LeRobot,
)  # fmt: skip


def written(folder: Path, rows: Embeddings, steps: int) -> Iterator[Peer]:
    """Every peer that is installed, with the rows written; the others are said to be left out."""
    for number, kind in enumerate(PEERS):
        if kind.installed():
            yield kind(folder / str(number), rows, steps)
        else:
            print(f"{kind.name}: not installed, left out; `make bench-peers` installs it")


def as_list(rows: Embeddings) -> pa.Array:
    """Rows as a fixed-size list of numbers."""
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), int(np.prod(rows.shape[1:])))


def as_rows(column: pa.ChunkedArray | pa.Array, shape: tuple[int, ...]) -> Embeddings:
    """And back, (N, *shape)."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return column.flatten().to_numpy().reshape(-1, *shape)
