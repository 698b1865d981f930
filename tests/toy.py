"""The toy environment of trainings: the action alone decides the next observation and the reward on arriving there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pvrpipe.worldmodel.training import TrainConfig

from .planted import write_planted

LENGTHS = (40, 30, 36, 44) * 5
WIDTH = 8
CORNERS = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]], np.float32)
CODES = np.random.default_rng(99).normal(size=(5, WIDTH)).astype(np.float16)
QUICK = {
    "dreamerv3": TrainConfig("dreamerv3", "1m", 60, 24, 8, learning_rate=3e-3, warmup=10),
    "tdmpc2": TrainConfig("tdmpc2", "1m", 100, 64, 4, learning_rate=2e-3),
    "dinowm": TrainConfig("dinowm", "1m", 150, 32, 8, learning_rate=1e-3),
}
MODELS = tuple(QUICK)
WriteEmbeddings = Callable[..., Path]


def toy_episode(number: int, length: int, shift: int) -> dict[str, np.ndarray]:
    """``embedding[t + 1]`` is the code of ``action[t]``, ``reward[t + 1]`` its first number.

    With ``shift`` 1 the actions are stored one row late, as a loader with an off-by-one would give them.
    """
    corner = np.random.default_rng(number).integers(4, size=length + 1)
    action = CORNERS[corner]
    reward = np.concatenate([[0], action[:-1, 0]]).astype(np.float32)
    return {
        "embedding": np.concatenate([CODES[4:], CODES[corner[:-1]]]),
        "action": np.roll(action, shift, 0),
        "reward": reward,
    }


def write_toy(
    folder: Path,
    name: str = "toy",
    lengths: Sequence[int] = LENGTHS,
    *,
    shift: int = 0,
    encoder: str = "toy",
    tokens: int = 1,
) -> Path:
    """Write an embedding store of the toy environment into a folder; returns its own."""
    episodes = [toy_episode(i, length, shift) for i, length in enumerate(lengths)]
    if tokens > 1:
        episodes = [
            {**e, "embedding": e["embedding"].reshape(len(e["reward"]), tokens, -1)} for e in episodes
        ]
    return write_planted(folder / name, episodes, encoder=encoder)


def short(model: str = "dreamerv3", **changes: Any) -> TrainConfig:
    """A few updates of a small model."""
    lengths = {"dreamerv3": 6, "tdmpc2": 4, "dinowm": 5}
    usual = {"updates": 6, "batch": 4, "length": lengths[model], "log_every": 2, "save_every": 2}
    return TrainConfig(model, "1m", **{**usual, **changes})
