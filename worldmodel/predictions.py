"""What a world model says of whole episodes: what it believes once it sees, and what it imagines without seeing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

AT_ONCE = 2048  # rows that go through a network together; of more, what its layers make leaves the cache
NUMBERS = 1 << 24  # in them, at most


class Filtered(NamedTuple):
    """N episodes of T rows, each row from the observations up to it."""

    state: Callable[[int], Tensor]
    """row t's state (N, F), to predict from, by t"""
    latents: Tensor
    """(N, T, ...), what predictions are compared with"""
    features: Tensor
    """(N, T, n), what is read off the latents, by the model's own heads or by a probe"""


class Imagined(NamedTuple):
    """The T rows after a row, along actions, without another observation."""

    latents: Tensor
    """(N, T, ...)"""
    reward: Tensor
    """(N, T), expected"""
    features: Tensor
    """(N, T, n)"""
    reward_logits: Tensor
    """(N, T, bins) of the model's two-hot distribution"""


def one_step(
    model: Any, filtered: Filtered, action: Tensor, context: int, random: torch.Generator
) -> Imagined:
    """One row ahead of every row from the last of the context on, all rows of all episodes side by side.

    Args:
        model: any world model.
        filtered: N episodes of T rows.
        action: (N, T, A), taken from each row.
        context: rows before the first that is predicted.
        random: decides the samples.

    Returns:
        What is said of rows ``context`` to ``T - 1``.
    """
    N, parts = len(action), []
    for first, states in _side_by_side(filtered.state, range(context - 1, action.shape[1] - 1)):
        count = len(states) // N
        along = action[:, first : first + count].transpose(0, 1).flatten(0, 1).unsqueeze(1)
        said = model.predict(states, along, random)
        parts.append([part.unflatten(0, (count, N)).squeeze(2).transpose(0, 1) for part in said])
    return Imagined(*(torch.cat(rows, 1) for rows in zip(*parts, strict=True)))


def _side_by_side(state: Callable[[int], Tensor], rows: range) -> Iterator[tuple[int, Tensor]]:
    """States of consecutive rows under one another, (rows · N, F), as long as they are of one width."""
    held: list[Tensor] = []
    first, one = rows.start, state(rows.start)
    most = max(1, min(AT_ONCE // len(one), NUMBERS // one.numel()))
    for t in rows:
        row = state(t)
        if held and (row.shape != held[0].shape or len(held) >= most):
            yield first, torch.cat(held)
            first, held = t, []
        held.append(row)
    yield first, torch.cat(held)
