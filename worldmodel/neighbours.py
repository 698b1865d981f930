"""Nearest rows by Euclidean distance, exactly, and what they say of a number."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

NEIGHBOURS = 5
BLOCK = 1 << 24  # distances at once
Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]


def nearest(
    queries: ArrayLike,
    bank: ArrayLike,
    count: int = NEIGHBOURS,
    *,
    of_query: Numbers | None = None,
    of_bank: Numbers | None = None,
) -> tuple[Numbers, Floats]:
    """The nearest rows of a bank.

    Args:
        queries: (Q, n).
        bank: (M, n).
        count: k, at most M.
        of_query: (Q,), the episode of each query; rows of its own episode are passed over.
        of_bank: (M,), the episode of each row of the bank.

    Returns:
        Their indices (Q, k), nearest first, and their distances (Q, k); infinite where there are no more.
    """
    centre = np.asarray(bank, np.float32).mean(0)  # the products below cancel less
    asked, held = (torch.from_numpy(np.asarray(rows, np.float32) - centre) for rows in (queries, bank))
    lengths = held.square().sum(1)
    indices, distances = [], []
    size = max(1, BLOCK // len(held))
    for start in range(0, len(asked), size):
        part = asked[start : start + size]
        squared = part.square().sum(1, keepdim=True) + lengths - 2 * part @ held.T
        if of_query is not None and of_bank is not None:
            own = torch.from_numpy(of_query[start : start + size])[:, None] == torch.from_numpy(of_bank)
            squared.masked_fill_(own, torch.inf)
        found = squared.clamp_min_(0).topk(min(count, len(held)), dim=1, largest=False)
        indices.append(found.indices.numpy())
        distances.append(found.values.sqrt().double().numpy())
    return np.concatenate(indices), np.concatenate(distances)


def neighbours_say(queries: ArrayLike, bank: ArrayLike, values: Floats, count: int = NEIGHBOURS) -> Floats:
    """Mean of values (M, ...) over the nearest rows of the bank: (Q, n), (M, n) -> (Q, ...)."""
    indices, _ = nearest(queries, bank, count)
    return values[indices].mean(1)
