"""Actions as models take them: within [-1, 1], whatever the environment's own bounds are.

DreamerV3 scales what lies beyond back to its edge, and TD-MPC2's policy ends there: so their authors' environments map
the bounds onto -1 and 1 (danijar/dreamerv3 ``NormalizeAction``, dm_control's ``action_scale``), and so do we.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from pvrpipe.schemas.specifications import IMPORTED, RolloutSpecification

Bounds = tuple[tuple[float, float], ...]
USUAL = (-1.0, 1.0)


def bounds_of(made: RolloutSpecification) -> Bounds | None:
    """Lowest and highest of each action; None where a model takes them as they are stored: one of several, or ±1.

    An action that has no bounds, or one value alone, is among others left as it is; so is one of an imported store
    that stays within ±1, for its bounds may be no more than what happened to occur.
    """
    pairs = zip(made.action_low, made.action_high, strict=True)
    bounds = tuple(USUAL if _is_left(low, high, made) else (low, high) for low, high in pairs)
    return None if made.discrete or all(pair == USUAL for pair in bounds) else bounds


def _is_left(low: float, high: float, made: RolloutSpecification) -> bool:
    within = USUAL[0] <= low and high <= USUAL[1]
    return not 0 < high - low < math.inf or (within and made.policy == IMPORTED)


def scaled(action: Tensor, bounds: Bounds | None) -> Tensor:
    """Actions (..., A) of an environment as a model takes them."""
    if bounds is None:
        return action
    middle, half = _middle_and_half(bounds, action.device)
    return (action - middle) / half


def unscaled(action: Tensor, bounds: Bounds | None) -> Tensor:
    """What a model does (..., A), as the environment takes it."""
    if bounds is None:
        return action
    middle, half = _middle_and_half(bounds, action.device)
    return action * half + middle


@lru_cache(maxsize=16)
def _middle_and_half(bounds: Bounds, device: torch.device) -> tuple[Tensor, Tensor]:
    """(A,) each; kept, because bringing them to a GPU for each batch would wait for all that was launched before."""
    low, high = torch.tensor(bounds, dtype=torch.float64).unbind(-1)
    return ((low + high) / 2).float().to(device), ((high - low) / 2).float().to(device)
