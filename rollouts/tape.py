"""The rows of an episode while it is played: memory stays bounded however long it gets."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from pvrpipe.schemas.manifest import Column
from pvrpipe.schemas.records import Step

HELD = 64 << 20  # bytes of frames in memory; what comes before goes to a file without a name


class Tape:
    """Records rows; frames beyond a limit are kept in a file in ``folder``, which no crash leaves behind."""

    def __init__(self, columns: tuple[Column, ...], folder: Path) -> None:
        self._columns, self._folder = {c.name: c for c in columns}, folder
        self._rows: dict[str, list[NDArray[np.generic]]] = {
            name: [] for name in self._columns if name != "frame"
        }
        shape = self._columns["frame"].shape
        self._block = np.empty((max(1, HELD // int(np.prod(shape))), *shape), np.uint8)
        self._length = 0
        self._file: IO[bytes] | None = None

    def arrived(self, step: Step) -> None:
        """The row that was arrived at, copied; its action comes with :meth:`acted`."""
        at = self._length % len(self._block)
        if self._length and at == 0:
            self._spill(self._block)
        self._block[at] = step["frame"]
        self._length += 1
        for name, rows in self._rows.items():
            if name != "action":
                column = self._columns[name]
                rows.append(np.array(step[name], column.dtype).reshape(column.shape))  # type: ignore[literal-required]

    def acted(self, action: NDArray[np.float32]) -> None:
        """The action that was taken from the last row."""
        self._rows["action"].append(action)

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Column → rows (L+1, ...); the last row's action is zero. Frames may lie in a mapped file."""
        last = np.zeros(self._columns["action"].shape, np.float32)
        small = {**self._rows, "action": [*self._rows["action"], last]}
        return {"frame": self._frames(), **{name: np.stack(rows) for name, rows in small.items()}}

    def _frames(self) -> NDArray[np.uint8]:
        held = self._block[: (self._length - 1) % len(self._block) + 1]
        if self._file is None:
            return held
        self._spill(held)
        self._file.flush()
        return np.memmap(self._file, np.uint8, "r", shape=(self._length, *self._block.shape[1:]))

    def _spill(self, frames: NDArray[np.uint8]) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (it lives as long as the map)
        np.ascontiguousarray(frames).tofile(self._file)
