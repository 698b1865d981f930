"""What a planner is told to aim at besides the reward, where the suite's reward says nothing on the way there.

Returns that are recorded are the suite's own; only the look-ahead sees these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

SPIN = 15.0  # rad/s of the spinner at which finger-spin begins to pay


def spinning(physics: Any) -> float:
    """How near the spinner is to the speed that pays, in [-1, 1]; a little faster is worth having in hand."""
    return float(np.clip(-physics.hinge_velocity() / (1.2 * SPIN), -1, 1))


AIMS: dict[str, Callable[[Any], float]] = {"dmc:finger-spin": spinning}
