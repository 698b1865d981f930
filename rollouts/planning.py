"""``mpc``: an expert that needs no training, for it plans inside the simulator.

Predictive sampling (Howell et al. 2022, arXiv 2212.00541, §3): perturb the current plan with Gaussian
noise on a few knots, look ahead along each candidate, keep the best, the unperturbed plan among them.
Two things are added. The candidates' noise ranges over several sizes and knot spacings, so that one
setting serves every task. And where no candidate sees any difference in reward (a pendulum hanging under
a sparse one), the candidate that ends with the most mechanical energy is kept: that swings things up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pvrpipe.rollouts.environments import Environment, Foreseeing

Actions = NDArray[np.float32]


@dataclass(frozen=True)
class PlannerConfig:
    """How far, how widely and how often the planner looks ahead."""

    horizon: int = 25
    """Actions that a plan looks ahead, H."""
    candidates: int = 24
    """Plans compared each time, N, the current one included."""
    interval: int = 3
    """Actions taken between two plannings."""
    spacings: tuple[int, ...] = (3, 6, 12)
    """Actions between the knots of the noise, in turn from candidate to candidate."""
    noise: tuple[float, float] = (0.05, 2.0)
    """Smallest and largest standard deviation of the noise, as fractions of half the action range; the
    largest is clipped to bang-bang control more often than not, which a weak motor needs."""


def planner_of_quality(quality: float) -> PlannerConfig:
    """A planner that takes fewer candidates and looks less far ahead, the lower its quality in (0, 1]."""
    best = PlannerConfig()
    return replace(
        best,
        horizon=max(best.interval, round(best.horizon * quality**0.5)),
        candidates=max(2, round(best.candidates * quality)),
    )


def planned_actions(
    environment: Environment, rng: np.random.Generator, config: PlannerConfig | None = None
) -> Iterator[Actions]:
    """The actions (A,) of a planner that plans again from the environment's state every few of them."""
    config = config or PlannerConfig()
    middle = (environment.action_low + environment.action_high) / 2
    plan: Actions = np.tile(middle, (config.horizon, 1)).astype(np.float32)
    while True:
        plan = improved(plan, environment, rng, config)
        yield from plan[: config.interval]
        plan = np.concatenate([plan[config.interval :], np.repeat(plan[-1:], config.interval, axis=0)])


def improved(
    plan: Actions, environment: Environment, rng: np.random.Generator, config: PlannerConfig
) -> Actions:
    """The best of the plan (H, A) and its perturbations; on equal returns, the plan itself."""
    low, high = environment.action_low, environment.action_high
    noise = perturbations(rng, config, plan.shape[1]) * (high - low) / 2
    candidates = np.clip(np.concatenate([plan[None], plan + noise]), low, high).astype(np.float32)
    assert isinstance(environment, Foreseeing)
    returns, energies = environment.evaluate(candidates)
    best = int(np.argmax(returns if np.ptp(returns) > 0 else energies))
    chosen: Actions = candidates[best]
    return chosen


def perturbations(rng: np.random.Generator, config: PlannerConfig, width: int) -> NDArray[np.float64]:
    """Noise (N - 1, H, A) in units of half the action range, linear between its knots."""
    count, times = config.candidates - 1, np.arange(config.horizon)
    noise = np.empty((count, config.horizon, width))
    for n, scale in enumerate(np.geomspace(*config.noise, count)):
        knots = np.arange(0, config.horizon + config.spacings[-1], config.spacings[n % len(config.spacings)])
        values = rng.standard_normal((len(knots), width))
        for a in range(width):
            noise[n, :, a] = scale * np.interp(times, knots, values[:, a])
    return noise
