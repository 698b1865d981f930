"""How well rewards are predicted: row by row, as events where they are sparse, and as calibration.

Everything here takes arrays. ``N`` episodes of ``T`` predicted rows each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pvrpipe.worldmodel.distributions import TwoHot

SPARSE = 0.5  # share of the training rewards that are one and the same value; from there on there are events
BINS = 10  # of calibration
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Event:
    """Which rewards are events."""

    threshold: float
    below: bool
    """whether they lie below it"""

    def __call__(self, reward: Tensor) -> Tensor:
        """(...) -> (...), of truths."""
        return reward < self.threshold if self.below else reward > self.threshold


def reward_rows(
    predicted: Tensor, logits: Tensor, received: Tensor, two_hot: TwoHot, event: Event | None
) -> dict[str, Tensor]:
    """What each row's prediction is worth, by measure: (N, T) each.

    Args:
        predicted: (N, T), expected rewards.
        logits: (N, T, bins), the distributions they are the means of.
        received: (N, T).
        two_hot: the bins.
        event: which rewards are events, None where rewards are not sparse.
    """
    rows = {
        "reward_error": (predicted.double() - received.double()).abs(),
        "reward_excess_nats": two_hot.loss(logits, received) - two_hot.floor(received),
        "reward_predicted": predicted,
        "reward_received": received,
    }
    if event is not None:
        expected, happened = event(predicted), event(received)
        rows |= {
            "events_predicted": expected.float(),
            "events_received": happened.float(),
            "events_hit": (expected & happened).float(),
        }
    return rows


def event_of(rewards: Floats) -> Event | None:
    """What is an event where one value makes up half of all rewards: what lies beyond halfway to the others' mean.

    Above it, also where the usual reward is the higher one (an expert is nearly always rewarded) or is a cost of every
    step (the goal is the event); below it only where a penalty stands out.

    Args:
        rewards: (M,), of training rows.

    Returns:
        None where rewards are not sparse, or all the same.
    """
    values, counts = np.unique(rewards, return_counts=True)
    usual, share = values[counts.argmax()], counts.max() / len(rewards)
    if share < SPARSE or len(values) < 2:
        return None
    threshold = float((usual + rewards[rewards != usual].mean()) / 2)
    return Event(threshold, below=bool(threshold < 0 and threshold < usual))


def precision_recall(predicted: float, received: float, hit: float) -> dict[str, float | None]:
    """Of counts of events; None where there is nothing to divide by."""
    return {
        "precision": hit / predicted if predicted else None,
        "recall": hit / received if received else None,
        "predicted": predicted,
        "received": received,
    }


def calibration(predicted: Floats, received: Floats, bins: int = BINS) -> dict[str, Any]:
    """Predicted beside received rewards, in bins of equally many rows by prediction.

    Args:
        predicted: (M,).
        received: (M,).
        bins: at most.

    Returns:
        ``bins``, each with ``rows``, ``predicted`` and ``received`` means; ``expected_calibration_error``, the mean
        over rows of how far these two are apart in a row's bin, in units of reward (Guo et al. 2017, for a regression).
    """
    order = np.argsort(predicted, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    found = [
        {
            "rows": len(part),
            "predicted": float(predicted[part].mean()),
            "received": float(received[part].mean()),
        }
        for part in parts
    ]
    gaps = [entry["rows"] * abs(entry["predicted"] - entry["received"]) for entry in found]
    return {"expected_calibration_error": sum(gaps) / len(order), "bins": found}
