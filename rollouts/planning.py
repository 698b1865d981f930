"""``mpc``: an expert that needs no training, for it plans inside the simulator."""

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
    elites: int = 1
    temperature: float = 1.0
    reward_interval: int = 1
    coarseness: int = 1


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
    best = plan
    while True:
        plan, best = improved(plan, best, environment, rng, config)
        yield from plan[: config.interval]
        plan, best = shifted(plan, config.interval), shifted(best, config.interval)


def shifted(plan: Actions, count: int) -> Actions:
    return np.concatenate([plan[count:], np.repeat(plan[-1:], count, axis=0)])


def improved(
    plan: Actions, best: Actions, environment: Environment, rng: np.random.Generator, config: PlannerConfig
) -> tuple[Actions, Actions]:
    low, high = environment.action_low, environment.action_high
    first = np.stack([plan, best]) if config.elites > 1 else plan[None]
    noise = perturbations(rng, config, config.candidates - len(first), plan.shape[1]) * (high - low) / 2
    candidates = np.clip(np.concatenate([first, plan + noise]), low, high).astype(np.float32)
    assert isinstance(environment, Foreseeing)
    returns, energies = environment.evaluate(candidates, config.reward_interval, config.coarseness)
    worth = returns if np.ptp(returns) > 0 else energies
    order = np.argsort(-worth, kind="stable")
    chosen = candidates[order[0]]
    if config.elites == 1 or np.ptp(returns) == 0:
        return chosen, chosen
    elite = worth[order[: config.elites]]
    weights = np.exp((elite - elite[0]) / (config.temperature * (elite.std() + 1e-9)))
    mean = np.tensordot(weights / weights.sum(), candidates[order[: config.elites]], 1)
    return mean.astype(np.float32), chosen


def perturbations(
    rng: np.random.Generator, config: PlannerConfig, count: int, width: int
) -> NDArray[np.float64]:
    """Noise (N, H, A) in units of half the action range, linear between its knots."""
    times = np.arange(config.horizon)
    noise = np.empty((count, config.horizon, width))
    for n, scale in enumerate(np.geomspace(*config.noise, count)):
        spacing = config.spacings[n % len(config.spacings)]
        knots = np.arange(0, config.horizon + config.spacings[-1], spacing)
        values = rng.standard_normal((len(knots), width))
        for a in range(width):
            noise[n, :, a] = scale * np.interp(times, knots, values[:, a])
    return noise
