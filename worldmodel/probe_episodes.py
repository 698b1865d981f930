"""Episodes as a probe takes them: many side by side, and the same with their actions in another order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pvrpipe.store.reading import Store
from pvrpipe.worldmodel.actions import Bounds
from pvrpipe.worldmodel.batches import OBSERVED, tensors_of
from pvrpipe.worldmodel.inputs import Observation

TOGETHER = 128  # episodes predicted in one batch, fewer where
BATCH_NUMBERS = 1 << 26  # the observations, or the features, of a batch would be more numbers than this


@dataclass(frozen=True)
class Padded:
    """Episodes side by side, padded with zeros to the longest: (N, T, ...), and their numbers of rows."""

    batch: dict[str, Tensor]
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class Reader:
    """Reads episodes of a store as a model is shown them.

    Args:
        store: embeddings or rollouts.
        observation: what the model sees of a row.
        columns: that it reads besides observation, action and reward; of these, what is not there is left out.
        device: where the tensors go.
        bounds: of the actions that the model was trained on.
    """

    store: Store
    observation: Observation
    columns: tuple[str, ...]
    device: torch.device
    bounds: Bounds | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that are read."""
        wanted = (OBSERVED[self.store.manifest.kind], "action", "reward", *self.columns)
        return tuple(dict.fromkeys(name for name in wanted if name in self.store.columns))

    def __call__(self, numbers: Sequence[int]) -> Padded:
        """These episodes, side by side."""
        return padded(self.store, numbers, self.names, self.observation, self.device, self.bounds)

    def batches(self, numbers: Sequence[int], features: int = 0) -> Iterator[tuple[list[int], Padded]]:
        """Some episodes after others, and their numbers, as many at once as memory is meant for.

        Args:
            numbers: of the episodes.
            features: n, how many of them the model makes of a row.
        """
        rows = self.store.episodes["rows"].to_numpy()
        longest = int(max(rows[number] for number in numbers))
        count = max(1, min(TOGETHER, BATCH_NUMBERS // (max(self.observation.width, features) * longest)))
        for start in range(0, len(numbers), count):
            chosen = list(numbers[start : start + count])
            yield chosen, self(chosen)


def padded(
    store: Store,
    numbers: Sequence[int],
    columns: Sequence[str],
    observation: Observation,
    device: torch.device,
    bounds: Bounds | None = None,
) -> Padded:
    """Read whole episodes and lay them side by side."""
    episodes = [store.read_episode(n, columns) for n in numbers]
    rows = np.array([len(e["reward"]) for e in episodes])
    arrays = {}
    for name in columns:
        first = episodes[0][name]
        arrays[name] = np.zeros((len(episodes), rows.max(), *first.shape[1:]), first.dtype)
        for lane, episode in enumerate(episodes):
            arrays[name][lane, : rows[lane]] = episode[name]
    return Padded(tensors_of(arrays, device, observation, bounds), rows)


def shuffled_actions(
    action: Tensor, rows: NDArray[np.int64], context: int, random: np.random.Generator
) -> Tensor:
    """Each episode's actions from the last context row on, in another order of time: (N, T, A) -> same."""
    order = np.tile(np.arange(action.shape[1]), (len(rows), 1))
    for lane, count in enumerate(rows):
        random.shuffle(order[lane, context - 1 : count - 1])  # nothing is done from the last row
    lanes = torch.arange(len(rows)).unsqueeze(1)
    return action[lanes, torch.from_numpy(order)]
