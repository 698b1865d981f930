"""What a training is judged by: mean losses of updates and of held-out windows, and whether they are numbers at all."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from pvrpipe.schemas.errors import DivergedError
from pvrpipe.worldmodel.batches import Batches, chance
from pvrpipe.worldmodel.models import WorldModel
from pvrpipe.worldmodel.ranks import averaged

VALIDATION = 1  # sets validation's chance apart from training's
#: What a run that diverged wants next. In a study another rate is another run, and there is no such option.
LESS = "try a smaller --learning-rate (of `train-model` and `sweep` with --overwrite)"


@torch.no_grad()
def validate(model: WorldModel, batches: Iterable[dict[str, Tensor]], seed: int) -> dict[str, float]:
    """Mean losses over batches, with the same chance every time."""
    losses = [
        {name: float(averaged(t)) for name, t in model.loss(batch, chance(seed, k, VALIDATION))[1].items()}
        for k, batch in enumerate(batches)
    ]
    return {name: sum(entry[name] for entry in losses) / len(losses) for name in losses[0]}


def check_finite(what: str, value: float, update: int, windows: str) -> None:
    """Raise DivergedError, naming the update and its windows, unless what came of it is a number."""
    if not math.isfinite(value):
        raise DivergedError(
            f"the {what} update {update} is {value}, on {windows}; the last checkpoint, if any, "
            f"is kept: {LESS}, or look at the store with `pvrpipe verify`"
        )


def means_of(unlogged: list[dict[str, Tensor]], k: int, data: Batches) -> dict[str, float]:
    """Mean of each term over the updates up to k.

    Raises:
        DivergedError: a loss or a gradient is not finite; names its update and windows.
    """
    judged = ("loss", "gradient_norm")
    values = averaged(torch.stack([torch.stack([terms[name] for name in judged]) for terms in unlogged]))
    for update, (loss, norm) in enumerate(values.tolist(), start=k - len(unlogged) + 1):
        if not math.isfinite(loss + norm):
            windows = f"windows of {data.origin(update)}"
            check_finite("loss of", loss, update, windows)
            check_finite("gradient's norm of", norm, update, windows)
    return {name: float(averaged(torch.stack([t[name] for t in unlogged]).mean())) for name in unlogged[0]}
