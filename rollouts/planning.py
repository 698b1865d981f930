"""``mpc``: an expert that needs no training, for it plans inside the simulator.

Predictive sampling (Howell et al. 2022, arXiv 2212.00541, §3): perturb the current plan with Gaussian
noise on a few knots, look ahead along each candidate, keep the best, the unperturbed plan among them.
Three things are added. The candidates' noise ranges over several sizes and knot spacings. Where no candidate
sees any difference in reward (a pendulum hanging under a sparse one), the candidate that ends with the most
mechanical energy is kept: that swings things up. And where a task has several ``elites``, the plan goes on from
their mean, weighted as MPPI does (Williams et al. 2017), with the best of them carried along.
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
    elites: int = 1
    """Candidates that the next plan is the weighted mean of."""
    reward_interval: int = 1
    """Actions from one reading of the reward to the next, in the look-ahead."""
    coarseness: int = 1
    """How many times longer the steps of the physics are in the look-ahead."""


#: Of tasks that do better with another planner than the usual one; chosen on seeds 0 and 1 (docs/LOG.md).
PLANNERS = {
    "dmc:cartpole-swingup": PlannerConfig(horizon=50, spacings=(5, 10, 20), reward_interval=4),
    "dmc:cheetah-run": PlannerConfig(
        horizon=24, candidates=100, spacings=(4, 6), noise=(0.3, 3.0), elites=4, reward_interval=2
    ),
    "dmc:finger-spin": PlannerConfig(
        horizon=10, candidates=80, interval=1, spacings=(1, 2), noise=(0.3, 3.0), reward_interval=2
    ),
}


def planner_of_quality(quality: float, environment: str = "") -> PlannerConfig:
    """The planner of an environment, with fewer candidates and a nearer horizon the lower its quality in (0, 1]."""
    best = PLANNERS.get(environment, PlannerConfig())
    return replace(
        best,
        horizon=max(best.interval, round(best.horizon * quality**0.5)),
        candidates=max(best.elites + 1, round(best.candidates * quality)),
    )


def planned_actions(
    environment: Environment, rng: np.random.Generator, quality: float = 1.0
) -> Iterator[Actions]:
    """The actions (A,) of the environment's planner, which plans again from its state every few of them."""
    config = planner_of_quality(quality, environment.name)
    middle = (environment.action_low + environment.action_high) / 2
    plan: Actions = np.tile(middle, (config.horizon, 1)).astype(np.float32)
    best = plan
    while True:
        plan, best = improved(plan, best, environment, rng, config)
        yield from plan[: config.interval]
        plan, best = _shifted(plan, config.interval), _shifted(best, config.interval)


def improved(
    plan: Actions, best: Actions, environment: Environment, rng: np.random.Generator, config: PlannerConfig
) -> tuple[Actions, Actions]:
    """The next plan (H, A), and the best candidate; on equal returns the plan itself, unless energies differ.

    Args:
        plan: as it is (H, A).
        best: candidate of the last planning, tried again where the plan is a mean of several.
        environment: looks ahead.
        rng: that the candidates are drawn by.
        config: of the planner.
    """
    low, high = environment.action_low, environment.action_high
    kept = np.stack([plan, best] if config.elites > 1 else [plan])
    noise = perturbations(rng, config, config.candidates - len(kept), plan.shape[1]) * (high - low) / 2
    candidates = np.clip(np.concatenate([kept, plan + noise]), low, high).astype(np.float32)
    assert isinstance(environment, Foreseeing)
    returns, energies = environment.evaluate(candidates, config.reward_interval, config.coarseness)
    if np.ptp(returns) == 0:
        chosen: Actions = candidates[np.argmax(energies)]
        return chosen, chosen
    order = np.argsort(-returns, kind="stable")[: config.elites]
    mean: Actions = np.tensordot(_weights(returns[order]), candidates[order], 1).astype(np.float32)
    return mean, candidates[order[0]]


def perturbations(
    rng: np.random.Generator, config: PlannerConfig, count: int, width: int
) -> NDArray[np.float64]:
    """Noise (count, H, A) in units of half the action range, linear between its knots."""
    times = np.arange(config.horizon)
    noise = np.empty((count, config.horizon, width))
    for n, scale in enumerate(np.geomspace(*config.noise, count)):
        spacing = config.spacings[n % len(config.spacings)]
        knots = np.arange(0, config.horizon + spacing, spacing)
        values = rng.standard_normal((len(knots), width))
        for a in range(width):
            noise[n, :, a] = scale * np.interp(times, knots, values[:, a])
    return noise


def _shifted(plan: Actions, count: int) -> Actions:
    """A plan after its first actions were taken; the last one goes on."""
    return np.concatenate([plan[count:], np.repeat(plan[-1:], count, axis=0)])


def _weights(returns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights of the elites, best first: exponential in the return, in units of its deviation among them."""
    weights = np.exp((returns - returns[0]) / (returns.std() + 1e-9))
    normalised: NDArray[np.float64] = weights / weights.sum()
    return normalised
