"""The DQN Replay files: ``$store$_observation_ckpt.N.gz`` and beside it ``_action_``, ``_reward_``, ``_terminal_``.

Each is a gzipped ``.npy``: frames (n, 84, 84), the action taken from each, the reward received for it, and whether the
episode ended with it (dopamine, ``circular_replay_buffer.py``). What the last action of an episode led to was never
stored: that transition is left out, and so no row of such a store is terminal. Dopamine begins episodes with up to
three rows of zeros, so that stacks of four frames can be cut anywhere; they are passed over. An episode that goes on in
the next file is two, for nothing says that the files follow each other.

Frames are decompressed as a stream, an episode at a time; a file of a million frames is 7 GB.
"""

from __future__ import annotations

import gzip
import io
import itertools
import math
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pvrpipe.rollouts.import_source import Array, Source, Trajectory, kept_transitions, reading, same_length
from pvrpipe.schemas.errors import SourceError

FILE = "$store$_{what}_ckpt.{number}.gz"
PARTS = ("observation", "action", "reward", "terminal")
PADDING = 3  # rows of zeros that an episode may begin with: stacks of four frames
SECONDS = 4 / 60  # four frames of the console


def open_source(given: str, _: str | None) -> Source:
    """Open a folder, in which ``1/replay_logs`` and the like may be given.

    Raises:
        SourceError: it holds no such files, or not all four of a number.
    """
    folder = Path(given)
    parts = "|".join(PARTS)
    found = [re.fullmatch(rf"\$store\$_(?:{parts})_ckpt\.(\d+)\.gz", p.name) for p in folder.glob("*.gz")]
    numbers = sorted({int(match[1]) for match in found if match})
    if not numbers:
        raise SourceError(
            f"{folder} holds no {FILE.format(what='observation', number='N')}; give the folder with the replay logs"
        )
    for number in numbers:
        for what in PARTS:
            if not (folder / FILE.format(what=what, number=number)).is_file():
                raise SourceError(f"{folder} has no {FILE.format(what=what, number=number)}; get it too")
    return Source(
        name=_name(folder),
        trajectories=lambda: (found for number in numbers for found in _of_file(folder, number)),
        camera="observation",
        seconds=SECONDS,
    )


def _name(folder: Path) -> str:
    """``Pong-1`` of ``…/Pong/1/replay_logs``; otherwise the folder's own name."""
    parts = folder.absolute().parts
    return "-".join(parts[-3:-1]) if parts[-1] == "replay_logs" else parts[-1]


def _of_file(folder: Path, number: int) -> Iterator[Trajectory]:
    path = folder / FILE.format(what="observation", number=number)
    columns = {}
    for what in PARTS[1:]:
        file = folder / FILE.format(what=what, number=number)
        with reading(file), gzip.open(file) as opened:
            columns[what] = np.load(io.BytesIO(opened.read()), allow_pickle=False)
    stream = FrameStream(path)
    same_length(f"file {number}", stream.rows, **columns)
    for first, end in _episodes(columns["terminal"]):
        first += _padding(columns, first, end, stream)
        rows = end - first
        length, cut = kept_transitions(f"file {number} rows {first} to {end - 1}", rows, rows)
        yield Trajectory(
            name=f"file {number} rows {first} to {end - 1}",
            action=columns["action"][first : first + length],
            reward=columns["reward"][first : first + length],
            frames=partial(stream.read, first, end),
            cut=cut,
        )
    stream.finish()


def _episodes(terminal: Array) -> Iterator[tuple[int, int]]:
    """First row and the one behind the last, of every episode of a file; the last may go on elsewhere."""
    ends = (np.flatnonzero(terminal) + 1).tolist()
    return itertools.pairwise(dict.fromkeys([0, *ends, len(terminal)]))


def _padding(columns: dict[str, Array], first: int, end: int, stream: FrameStream) -> int:
    """Rows of zeros at the beginning of an episode."""
    count = min(PADDING, end - first)
    blank = ~stream.peek(first, first + count).reshape(count, -1).any(axis=1)
    for column in columns.values():
        blank &= column[first : first + count] == 0
    return count if blank.all() else int(np.argmin(blank))


class FrameStream:
    """Frames (n, H, W) of a gzipped ``.npy``, read forwards; what lies before is read from the beginning again.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open()

    def _open(self) -> None:
        with reading(self._path):
            self._file: Any = gzip.open(self._path)  # noqa: SIM115 - it stays open with this object
            if np.lib.format.read_magic(self._file) != (1, 0):
                raise ValueError("it is no .npy of version 1.0")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(self._file)
        if dtype != np.uint8 or fortran or len(shape) != 3:
            raise SourceError(f"{self._path} holds {dtype} {list(shape)}, not gray frames (n, H, W) of bytes")
        self.rows, self._shape, self._at = shape[0], shape[1:], 0
        self._peeked: Array = np.empty((0, *self._shape), np.uint8)  # the rows just before _at

    def peek(self, first: int, end: int) -> Array:
        """Rows that will be asked for again."""
        self._peeked = self.read(first, end)
        return self._peeked

    def read(self, first: int, end: int) -> Array:
        """Rows (end - first, H, W)."""
        begins = self._at - len(self._peeked)
        if first < begins:
            self._file.close()
            self._open()
            begins = 0
        known = self._peeked[first - begins : end - begins]
        self._skip_to(first)
        self._peeked = self._peeked[:0]
        return np.concatenate([known, self._next(end - first - len(known))])

    def finish(self) -> None:
        """Read what is left, and find out whether the file is whole."""
        self._skip_to(self.rows)
        with reading(self._path):
            if self._file.read(1):
                raise ValueError("it is longer than it says")
        self._file.close()

    def _skip_to(self, row: int) -> None:
        while self._at < row:
            self._next(min(row - self._at, 1024))

    def _next(self, count: int) -> Array:
        size = count * math.prod(self._shape)
        with reading(self._path):
            data = self._file.read(size)
            if len(data) < size:
                raise EOFError(
                    f"it ends in row {self._at + len(data) * count // max(size, 1)} of {self.rows}"
                )
        self._at += count
        return np.frombuffer(data, np.uint8).reshape(count, *self._shape)
