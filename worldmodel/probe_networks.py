"""How much of its width a representation or a network uses.

* Effective rank: the exponential of the entropy of the singular values, as shares of their sum (Roy and Vetterli,
  EUSIPCO 2007), of rows less their mean.
* Dormant ratio: the share of hidden units whose mean absolute activation is at most 0.025 of their layer's mean (Sokar
  et al., ICML 2023; the score that Williams and Polydoros report for policies).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pvrpipe.worldmodel.layers import ConvLayer, Layer

TAU = 0.025
AT_ONCE = 1 << 16  # activations of a layer that are looked at in float64
ACTIVATED = (Layer, ConvLayer, nn.Mish, nn.GELU, nn.ReLU)  # modules whose output is an activation
Floats = NDArray[np.float64]


def effective_rank(rows: Floats) -> float:
    """Of rows (M, n), between 1 and n; 0 where all rows are the same."""
    centred = rows - rows.mean(0)
    gram = centred @ centred.T if len(rows) < rows.shape[1] else centred.T @ centred
    singular = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0, None))
    total = singular.sum()
    if not total:
        return 0.0
    shares = singular[singular > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def dormant_units(mean_activations: Floats, tau: float = TAU) -> int:
    """How many of a layer's units, by the mean of their absolute activations (n,), are dormant."""
    return int((mean_activations <= tau * mean_activations.mean()).sum())


@dataclass
class Activity:
    """Mean absolute activation of every hidden unit, by layer."""

    total: dict[str, Tensor] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, activation: Tensor) -> None:
        """Count activations (..., n), or (N, n, H, W) of a convolution."""
        units = activation.movedim(1, -1) if activation.ndim == 4 else activation
        flat = units.detach().flatten(0, -2)
        total = torch.stack([part.double().abs().sum(0) for part in flat.split(AT_ONCE)]).sum(0)
        self.total[name] = self.total.get(name, torch.zeros_like(total)) + total
        self.count[name] = self.count.get(name, 0) + len(flat)

    def report(self) -> dict[str, Any]:
        """``ratio`` over all layers, ``units`` in all, and the ratio of each of the ``layers``."""
        means = {name: (total / self.count[name]).cpu().numpy() for name, total in self.total.items()}
        dormant = {name: dormant_units(mean) for name, mean in means.items()}
        units = sum(len(mean) for mean in means.values())
        return {
            "ratio": sum(dormant.values()) / units if units else None,
            "units": units,
            "tau": TAU,
            "layers": {name: dormant[name] / len(mean) for name, mean in means.items()},
        }


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[Activity]:
    """Count the activations of every hidden layer that computes meanwhile."""
    activity = Activity()

    def count(name: str) -> Any:
        return lambda _module, _inputs, output: activity.add(name, output)

    hooks = [
        module.register_forward_hook(count(name))
        for name, module in model.named_modules()
        if isinstance(module, ACTIVATED)
    ]
    try:
        yield activity
    finally:
        for hook in hooks:
            hook.remove()
