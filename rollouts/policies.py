"""Policies, mixtures of them, and the short text that names a mixture.

::

    mixture = member {"," member}            random:0.5,mpc:0.3,mpc+0.5:0.2
    member  = name ["+" noise] [":" weight]  noise for mpc alone; weight 1 if not given

``random`` draws uniformly within the bounds; ``ou`` is an Ornstein-Uhlenbeck process, smooth over about a
third of a second; ``mpc`` plans in the simulator (:mod:`pvrpipe.rollouts.planning`). The noise of
``mpc+0.5`` is Gaussian, added to each action taken, its standard deviation half of half the action range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pvrpipe.rollouts.environments import Environment
from pvrpipe.rollouts.planning import planned_actions
from pvrpipe.schemas.errors import InvalidValueError, UnknownNameError

OU_SECONDS = 0.3  # in which the process forgets 63 % of what it was
OU_DEVIATION = 0.6  # of the process, as a fraction of half the action range
EXAMPLE = "e.g. random:0.5,mpc:0.5 or mpc+0.3"

Policy = Callable[[Environment, np.random.Generator], Iterator[NDArray[np.float32]]]


@dataclass(frozen=True)
class Member:
    """One policy of a mixture."""

    name: str
    noise: float = 0.0  # standard deviation, as a fraction of half the action range
    weight: float = 1.0  # of all episodes, once the mixture is parsed

    @property
    def label(self) -> str:
        """Name and noise, as recorded with each episode, e.g. ``mpc+0.3``."""
        return f"{self.name}+{self.noise:g}" if self.noise else self.name

    def actions(self, environment: Environment, rng: np.random.Generator) -> Iterator[NDArray[np.float32]]:
        """Actions (A,) within the bounds, without end; each is asked for once the last was taken."""
        low, high = environment.action_low, environment.action_high
        for action in POLICIES[self.name](environment, rng):
            noise = self.noise * (high - low) / 2 * rng.standard_normal(len(low)) if self.noise else 0
            yield np.clip(action + noise, low, high).astype(np.float32)


@dataclass(frozen=True)
class Mixture:
    """Which policies a store's episodes are shared among; the weights sum to 1."""

    members: tuple[Member, ...]

    def __str__(self) -> str:
        """The canonical text: equal mixtures have equal texts."""
        if len(self.members) == 1:
            return self.members[0].label
        return ",".join(f"{m.label}:{m.weight:.6g}" for m in self.members)

    def assign(self, episodes: int, seed: int) -> tuple[Member, ...]:
        """The member that each episode takes: shares by largest remainder, in an order shuffled by the seed."""
        exact = [member.weight * episodes for member in self.members]
        counts = [math.floor(share) for share in exact]
        remainders = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
        for i in remainders[: episodes - sum(counts)]:
            counts[i] += 1
        dealt = [member for member, count in zip(self.members, counts, strict=True) for _ in range(count)]
        order = np.random.default_rng([seed, episodes]).permutation(episodes)
        return tuple(dealt[i] for i in order)


def parse_policy(text: str) -> Mixture:
    """Read the text of a mixture (grammar above).

    Raises:
        UnknownNameError: no such policy; the message names the nearest.
        InvalidValueError: a weight or a noise that is no number, or outside what it may be.
    """
    members = [_parse_member(part.strip(), text) for part in text.split(",")]
    if len({member.label for member in members}) < len(members):
        raise InvalidValueError(f"policy '{text}' names a member twice; add up its weights")
    total = sum(member.weight for member in members)
    return Mixture(tuple(Member(m.name, m.noise, m.weight / total) for m in members))


def _parse_member(part: str, text: str) -> Member:
    """One member: ``name[+noise][:weight]``."""
    label, colon, weight = part.partition(":")
    name, plus, noise = label.partition("+")
    if name not in POLICIES:
        raise UnknownNameError.among("policy", name, POLICIES, hint=EXAMPLE)
    if plus and name != "mpc":
        raise InvalidValueError(f"policy '{text}': {name} takes no noise, only mpc does; {EXAMPLE}")
    return Member(
        name,
        _number(noise, "noise", text) if plus else 0.0,
        _number(weight, "weight", text) if colon else 1.0,
    )


def _number(value: str, what: str, text: str) -> float:
    """A finite number above 0."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise InvalidValueError(f"policy '{text}': {what} '{value}' must be a number above 0; {EXAMPLE}")
    return number


def random_actions(environment: Environment, rng: np.random.Generator) -> Iterator[NDArray[np.float32]]:
    """Uniform within the bounds."""
    while True:
        yield rng.uniform(environment.action_low, environment.action_high).astype(np.float32)


def ou_actions(environment: Environment, rng: np.random.Generator) -> Iterator[NDArray[np.float32]]:
    """Ornstein-Uhlenbeck around the middle of the bounds, discretised exactly, stationary from the start."""
    middle = (environment.action_low + environment.action_high) / 2
    deviation = OU_DEVIATION * (environment.action_high - environment.action_low) / 2
    keep = math.exp(-environment.control_timestep / OU_SECONDS)
    value = rng.standard_normal(len(middle))
    while True:
        yield (middle + deviation * value).astype(np.float32)
        value = keep * value + math.sqrt(1 - keep**2) * rng.standard_normal(len(middle))


POLICIES: dict[str, Policy] = {"random": random_actions, "ou": ou_actions, "mpc": planned_actions}
