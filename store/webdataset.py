"""A shard as WebDataset: a tar with one sample per episode, an ``.npy`` member per column and a ``.json``.

::

    000000012.json           what is known of episode 12
    000000012.action.npy     (L+1, A) float32
    000000012.embedding.npy  (L+1, D) float16
    …

The tar is not compressed and neither are its members, so every column is mapped, as in Parquet. It is
deterministic: members in the order of the columns, no times, owners or modes of the machine that wrote it.
Nothing is ever extracted or unpickled: a member is a name, an offset and a size, all three checked.
"""

from __future__ import annotations

import io
import json
import tarfile
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from pvrpipe.schemas.manifest import Column, EpisodeRecord, Manifest
from pvrpipe.store.mapping import Span
from pvrpipe.store.shards import Decoded, Rows, Shard

PLACE = {"shard", "row_start"}  # where an episode lies is not part of what is known of it
NPY_HEADER_LIMIT = 4096  # bytes; ours have 128
RECORD_LIMIT = 1 << 20


class WebDatasetShard(Shard):
    """A tar of episodes; its groups are the episodes."""

    def __init__(self, folder: Path, manifest: Manifest, index: int, decoded: Decoded | None = None) -> None:
        super().__init__(folder, manifest, index, decoded)
        plan = manifest.plan[index]
        self._episodes = range(plan.first_episode, plan.first_episode + plan.episodes)
        if len(self._episodes) != len(self.groups):
            raise self.corrupt("has another number of episodes than the manifest plans")
        self._members = self._index()

    def check_layout(self) -> Iterator[tuple[str, str]]:
        """Exactly the members that the columns ask for, and each an array of the promised kind."""
        expected = {member(e, f"{c.name}.npy") for e in self._episodes for c in self.manifest.columns}
        expected |= {member(e, "json") for e in self._episodes}
        differing = sorted(self._members.keys() ^ expected)
        if differing:
            yield "", f"has other members than the manifest: {', '.join(differing[:3])}"
            return
        for column in self.manifest.columns:
            self.mapped(column.name)

    def records(self) -> Iterator[dict[str, object]]:
        """What the tar itself says of its episodes."""
        for episode in self._episodes:
            offset, size = self._member(member(episode, "json"))
            if size > RECORD_LIMIT:
                raise self.corrupt(f"has a record of {size} bytes")
            try:
                yield json.loads(self.data[offset : offset + size].tobytes())
            except (ValueError, RecursionError) as error:
                raise self.corrupt(f"episode {episode} has a record that is not JSON ({error})") from None

    def _spans(self, column: Column) -> tuple[Span, ...]:
        return tuple(
            Span(self._array_at(episode, rows, column), rows)
            for episode, rows in zip(self._episodes, self.groups, strict=True)
        )

    def _array_at(self, episode: int, rows: int, column: Column) -> int:
        """Offset of the values of an array, once its header says what the manifest does."""
        name = member(episode, f"{column.name}.npy")
        offset, size = self._member(name)
        head = io.BytesIO(self.data[offset : offset + min(size, NPY_HEADER_LIMIT)].tobytes())
        try:
            major, _ = npy.read_magic(head)
            reader = npy.read_array_header_1_0 if major == 1 else npy.read_array_header_2_0
            shape, fortran, dtype = reader(head, max_header_size=NPY_HEADER_LIMIT)
        except (
            ValueError,
            SyntaxError,
            TypeError,
            RecursionError,
            MemoryError,
            tokenize.TokenError,
        ) as error:
            raise self.corrupt(f"member {name} is no .npy file ({error})") from None
        promised = ((rows, *column.shape), np.dtype(column.dtype), head.tell() + rows * column.width)
        if (shape, dtype, size) != promised or (fortran and len(shape) > 1):
            raise self.corrupt(
                f"member {name} is {dtype} {list(shape)}, not {promised[1]} {list(promised[0])}"
            )
        return offset + head.tell()

    def _member(self, name: str) -> tuple[int, int]:
        found = self._members.get(name)
        if found is None:
            raise self.corrupt(f"has no member {name}")
        return found

    def _index(self) -> dict[str, tuple[int, int]]:
        """Offset and size of every member; anything but plain files of other names is refused."""
        members: dict[str, tuple[int, int]] = {}
        most = len(self._episodes) * (len(self.manifest.columns) + 1)
        total = self.path.stat().st_size
        try:
            with tarfile.open(self.path, "r:") as tar:
                for info in tar:
                    if info.type != tarfile.REGTYPE or info.sparse is not None or info.pax_headers:
                        raise self.corrupt(f"member {info.name!r} is not a plain file")
                    if info.name in members:
                        raise self.corrupt(f"has two members {info.name!r}")
                    if len(members) == most:
                        raise self.corrupt(f"has more than {most} members")
                    if info.offset_data + info.size > total:
                        raise self.corrupt(f"member {info.name!r} ends behind the file")
                    members[info.name] = info.offset_data, info.size
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
            raise self.corrupt(f"cannot be read ({error})") from None
        return members


class WebDatasetShardWriter:
    """Gathers rows into whole episodes; memory holds one episode."""

    def __init__(self, path: Path, columns: Sequence[Column], record: Callable[[int], EpisodeRecord]) -> None:
        self._path, self._columns, self._record = path, columns, record
        self._tar: tarfile.TarFile | None = None
        self._parts: list[Mapping[str, Rows]] = []
        self._groups: list[int] = []

    def append(self, arrays: Mapping[str, Rows]) -> None:
        """Consecutive rows, all columns at once."""
        first = 0
        for last in np.flatnonzero(arrays["is_last"]).tolist():
            self._parts.append({name: array[first : last + 1] for name, array in arrays.items()})
            self._write_episode()
            first = last + 1
        if first < len(arrays["is_last"]):  # copied: the caller may use its buffers again
            self._parts.append({name: array[first:].copy() for name, array in arrays.items()})

    def finish(self) -> tuple[int, ...]:
        """Write the end of the tar; the rows of each episode."""
        self.close()
        return tuple(self._groups)

    def close(self) -> None:
        """Let the file go, finished or not."""
        if self._tar is not None:
            tar, self._tar = self._tar, None
            tar.close()

    def _write_episode(self) -> None:
        arrays = {c.name: np.concatenate([part[c.name] for part in self._parts]) for c in self._columns}
        episode, rows = int(arrays["episode"][0]), len(arrays["step"])
        record = self._record(episode).model_dump(mode="json", exclude=PLACE)
        if self._tar is None:
            self._tar = tarfile.open(self._path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._add(member(episode, "json"), json.dumps(record, sort_keys=True).encode())
        for column in self._columns:
            buffer = io.BytesIO()
            npy.write_array(buffer, arrays[column.name], version=(1, 0), allow_pickle=False)
            self._add(member(episode, f"{column.name}.npy"), buffer.getvalue())
        self._groups.append(rows)
        self._parts = []

    def _add(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)  # times and owners are zero unless one sets them
        info.size = len(data)
        assert self._tar is not None
        self._tar.addfile(info, io.BytesIO(data))


def member(episode: int, kind: str) -> str:
    """Name of a member; WebDataset groups what has the same name up to the first dot."""
    return f"{episode:09d}.{kind}"
