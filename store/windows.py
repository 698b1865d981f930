"""Random windows of consecutive rows, cut straight out of the mapped shards.

The k-th batch is a pure function of the seed and k. So a sampler's whole state is the number of batches
taken, two readers of one store see the same windows, and ranks and loader workers share the batches among
them without talking to each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pvrpipe.schemas.errors import InvalidValueError
from pvrpipe.store.gathering import Backing, Pieces, RowReader
from pvrpipe.store.reading import Store
from pvrpipe.store.selecting import Condition, select_episodes, weights_of
from pvrpipe.store.shards import Rows

DRAWN_TOGETHER = 64  # batches whose windows are drawn in one call


@dataclass(frozen=True)
class WindowPlan:
    """Which windows are drawn; equal plans on equal stores give equal batches."""

    columns: tuple[str, ...]
    """what each batch holds; a column that is not named is never read"""
    batch: int
    """B, windows in a batch, over all ranks"""
    length: int
    """T, rows in a window"""
    seed: int
    split: str | None = "train"
    """``train``, ``val``, or None for both"""
    where: Condition = None
    """which episodes, e.g. ``"episode_return > 100"`` or a polars expression over the episode table"""
    weight: Condition = None
    """how much more often windows of an episode are drawn, e.g. ``"exp(episode_return / 50)"``"""
    joined: bool = False
    """windows may run on into the next episode of the selection, as DreamerV3 trains; ``is_first`` says where"""

    def __post_init__(self) -> None:
        """Refuse what no store could serve."""
        if self.batch < 1 or self.length < 1:
            raise InvalidValueError(
                f"--batch is {self.batch} and --length {self.length}; both must be at least 1"
            )
        if self.seed < 0:
            raise InvalidValueError(f"--seed is {self.seed}; it must be 0 or more")

    def __str__(self) -> str:
        """The same in every process, where the repr of an expression has its address."""
        return repr(replace(self, where=_told(self.where), weight=_told(self.weight)))


class WindowSampler:
    """Batches of B windows of T rows, drawn with equal chance from all windows of the chosen episodes.

    Args:
        store: a sealed store.
        columns: and the other fields of :class:`WindowPlan`, by keyword.
        backing: where rows are read from: ``mapped`` files, ``ram``, or ``auto``.
        rank: of this process among ``ranks``: it gets one of ``ranks`` equal parts of each batch.
        ranks: processes that share each batch.
        batch, length, seed, split, where, weight, joined: see :class:`WindowPlan`.

    Raises:
        InvalidValueError: no chosen episode has T rows, or an expression does not fit the episode table.
    """

    def __init__(
        self,
        store: Store,
        columns: Sequence[str],
        *,
        backing: Backing = "auto",
        rank: int = 0,
        ranks: int = 1,
        **plan: Any,
    ) -> None:
        self.plan = WindowPlan(tuple(columns), **plan)
        if not 0 <= rank < ranks:
            raise InvalidValueError(f"there is no rank {rank} of {ranks}; give 0 to {max(ranks, 1) - 1}")
        if self.plan.batch % ranks:
            raise InvalidValueError(
                f"rank {rank} of {ranks} cannot share batches of {self.plan.batch}; "
                "give a batch that the number of ranks divides"
            )
        self.store, self.rank, self.ranks, self.taken = store, rank, ranks, 0
        self._asked = {"backing": backing, "rank": rank, "ranks": ranks, **plan}
        self._choose(store)
        self._rows = RowReader(store, self.plan.columns, backing)
        self.backing = self._rows.backing
        self._drawn: tuple[int, NDArray[np.int64]] | None = None

    def _choose(self, store: Store) -> None:
        """The stream of chosen episodes, and how many windows begin in each."""
        plan = self.plan
        chosen = select_episodes(store.episodes, plan.split, plan.where)
        rows = chosen["rows"].to_numpy().astype(np.int64)
        if not plan.joined:
            chosen, rows = chosen.filter(chosen["rows"] >= plan.length), rows[rows >= plan.length]
        if rows.sum() < plan.length:
            among = select_episodes(store.episodes, plan.split, plan.where)["rows"].to_list()
            cure = (
                "give a smaller --length (or --burn-in, if you gave one), or join them (--joined)"
                if among
                else "choose other episodes, or collect more"
            )
            raise InvalidValueError(
                f"no {plan.split or ''} episode of {store.path} has {plan.length} rows "
                f"(the longest has {max(among, default=0)}); {cure}".replace("  ", " ")
            )
        self._store_first = chosen["row_first"].to_numpy().astype(np.int64)
        self._stream_first = np.concatenate([[0], np.cumsum(rows)])
        begin = rows.copy() if plan.joined else rows - plan.length + 1
        if plan.joined:  # the last rows of the stream begin no whole window
            end = self._stream_first[-1] - plan.length + 1
            begin = np.clip(end - self._stream_first[:-1], 0, rows)
        self._windows_until = np.cumsum(begin)
        self._chance: NDArray[np.float64] | None = None
        if plan.weight is not None:
            self._chance = np.cumsum(weights_of(chosen, plan.weight) * begin)
            if not self._chance[-1] > 0:
                raise InvalidValueError(f"the weight '{plan.weight}' is 0 for every episode; give another")

    @property
    def windows(self) -> int:
        """How many different windows there are."""
        return int(self._windows_until[-1])

    def numbers(self, k: int) -> NDArray[np.int64]:
        """Which of all windows this rank's part of batch k holds, (B / ranks,)."""
        block, within = divmod(k, DRAWN_TOGETHER)
        if self._drawn is None or self._drawn[0] != block:
            self._drawn = block, self._draw(np.random.default_rng((self.plan.seed, block)))
        return self._drawn[1][within].reshape(self.ranks, -1)[self.rank]

    def starts(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """First rows of windows, in the stream of chosen episodes."""
        episode = np.searchsorted(self._windows_until, numbers, "right")
        before = np.where(episode > 0, self._windows_until[episode - 1], 0)
        return self._stream_first[episode] + numbers - before

    def _draw(self, random: np.random.Generator) -> NDArray[np.int64]:
        """Windows of a block of batches, by number."""
        shape = DRAWN_TOGETHER, self.plan.batch
        if self._chance is None:
            return random.integers(self.windows, size=shape)
        episode = np.searchsorted(self._chance, random.random(shape) * self._chance[-1], "right")
        episode = np.minimum(episode, len(self._chance) - 1)
        begin = np.diff(self._windows_until, prepend=0)
        return self._windows_until[episode] - 1 - (random.random(shape) * begin[episode]).astype(np.int64)

    def pieces(self, numbers: NDArray[np.int64]) -> Pieces:
        """Where the rows of windows lie in the store."""
        starts = self.starts(numbers)
        episode = np.searchsorted(self._stream_first, starts, "right") - 1
        first = self._store_first[episode] + starts - self._stream_first[episode]
        if not self.plan.joined:
            return Pieces.unbroken(first, self.plan.length)
        parts = []
        for window, (start, at) in enumerate(zip(starts.tolist(), episode.tolist(), strict=True)):
            done = 0
            while done < self.plan.length:
                count = min(self.plan.length - done, int(self._stream_first[at + 1]) - start - done)
                row = int(self._store_first[at]) + start + done - int(self._stream_first[at])
                parts.append((window, done, row, count))
                done, at = done + count, at + 1
        return Pieces(len(starts), self.plan.length, *np.array(parts, np.int64).T)

    def batch(self, k: int) -> dict[str, Rows]:
        """Batch k: column → array (B, T, *shape), of this rank's windows."""
        return self.read(self.numbers(k))

    def read(self, numbers: NDArray[np.int64]) -> dict[str, Rows]:
        """Windows by number, 0 … ``windows`` - 1: column → array (len(numbers), T, *shape)."""
        pieces = self.pieces(numbers)
        return {name: self._rows.windows(name, pieces) for name in self.plan.columns}

    def __iter__(self) -> Iterator[dict[str, Rows]]:
        """Batch after batch, without end, from :meth:`state` on."""
        while True:
            self.taken += 1
            yield self.batch(self.taken - 1)

    def __reduce__(self) -> tuple[Any, ...]:
        """For a process of its own: it opens the files itself."""
        return _reopened, (self.store, self.plan.columns, self._asked, self.taken)

    def state(self) -> dict[str, Any]:
        """What to keep so that :meth:`restore` goes on with the very next batch."""
        return {"store": self.store.manifest.id, "plan": str(self.plan), "taken": self.taken}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where a sampler of the same plan on the same store was, whatever its ranks and workers.

        Raises:
            InvalidValueError: it was another store's, or another plan's, or is none.
        """
        own = self.state()
        differ = [field for field in ("store", "plan") if state.get(field) != own[field]]
        if differ:
            raise InvalidValueError(
                f"this state is of another {' and '.join(differ)}; restore it with the same store and windows"
            )
        taken = state.get("taken")
        if not isinstance(taken, int) or taken < 0:
            raise InvalidValueError(f"this state has taken {taken} batches; restore what state() gave")
        self.taken = taken


def _told(condition: Condition) -> str | None:
    return str(condition) if isinstance(condition, pl.Expr) else condition


def _reopened(store: Store, columns: tuple[str, ...], asked: dict[str, Any], taken: int) -> WindowSampler:
    sampler = WindowSampler(store, columns, **asked)
    sampler.taken = taken
    return sampler
