"""Policies, mixtures of them, and the short text that names a mixture.

::

    mixture = member {"," member}                              random:0.5,mpc@0.5+0.3:0.5
    member  = name ["=" argument] ["@" quality] ["+" noise] ["~" epsilon] [":" weight]

``random`` draws uniformly within the bounds; ``ou`` is an Ornstein-Uhlenbeck process, smooth over about a
third of a second; ``pink`` and ``brown`` are noise whose power falls with the frequency and with its square
(Eberhard et al. 2023, *Pink Noise Is All You Need*); ``mpc`` plans in the simulator
(:mod:`pvrpipe.rollouts.planning`), the harder the nearer its quality is to 1, which it is if not given;
``scripted`` is what an environment's own library does. ``+0.5`` adds Gaussian noise to each action, its standard
deviation half of half the action range; ``~0.1`` takes a random action in one of ten rows. Where actions
are one of A, the largest of the A numbers of a policy is the one that is taken.

Other packages add policies by entry points of the group ``pvrpipe.policies``; where an argument is given, what the
entry point names is called with it first (``run=data/runs/NAME``: the policy of a trained run; ``run="a+b"`` where
it has one of ``,:@+~`` in it). A policy that
``watches`` is also given a function that returns the row the environment is at.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvrpipe.rollouts.environments import Environment, Foreseeing, Scripted
from pvrpipe.rollouts.mixtures import Mixture, number_above_zero, parse_mixture, parts_of
from pvrpipe.rollouts.planning import planned_actions
from pvrpipe.schemas.errors import InvalidValueError, UnknownNameError
from pvrpipe.schemas.records import Step

OU_SECONDS = 0.3  # in which the process forgets 63 % of what it was
OU_DEVIATION = 0.6  # of the processes, as a fraction of half the action range
EXAMPLE = 'e.g. random:0.5,mpc:0.5, mpc@0.5+0.3~0.1 or run="my+run"'
ENTRY_POINTS = "pvrpipe.policies"
MARKS = {"@": "quality", "+": "noise", "~": "epsilon"}
LOUDEST = 1000  # times the bounds of actions: beyond any use, and written without an exponent
QUOTED = re.compile(r"[,:@+~]")  # an argument with one of these stands in quotes

Actions = Iterator[NDArray[np.float32]]
Policy = Callable[[Environment, np.random.Generator], Actions]


@dataclass(frozen=True)
class Member:
    """One policy of a mixture."""

    name: str
    argument: str = ""  # of a policy of another package
    quality: float = 1.0  # of mpc
    noise: float = 0.0  # standard deviation, as a fraction of half the action range
    epsilon: float = 0.0  # share of rows in which the action is random

    @property
    def label(self) -> str:
        """Name and what is done to it, as recorded with each episode, e.g. ``mpc@0.5+0.3~0.1``."""
        parts = (("@", self.quality if self.quality != 1 else 0), ("+", self.noise), ("~", self.epsilon))
        argument = f'"{self.argument}"' if QUOTED.search(self.argument) else self.argument
        name = f"{self.name}={argument}" if argument else self.name
        return name + "".join(f"{mark}{value:g}" for mark, value in parts if value)

    @property
    def versions(self) -> dict[str, str]:
        """What else decides the policy's actions, e.g. the hash of what was trained."""
        return dict(getattr(self._policy(), "versions", {}))

    def actions(
        self, environment: Environment, rng: np.random.Generator, seen: Callable[[], Step] | None = None
    ) -> Actions:
        """Actions (A,) within the bounds, without end; each is asked for once the last was taken.

        Args:
            environment: that is acted in.
            rng: decides all that is drawn.
            seen: returns the row that the environment is at, for policies that watch.

        Raises:
            InvalidValueError: the policy returned something that is no action of the environment.
        """
        low, high = environment.action_low, environment.action_high
        policy: Any = self._policy()
        watches = getattr(policy, "watches", False)
        for found in policy(environment, rng, seen) if watches else policy(environment, rng):
            action = np.asarray(found, np.float64)
            if action.shape != low.shape or not np.isfinite(action).all():
                raise InvalidValueError(
                    f"policy '{self.label}' returned {_short(action)}; an action of {environment.name} is "
                    f"{len(low)} finite numbers: mend the policy, or choose another --policy"
                )
            if self.noise:
                action = action + self.noise * (high - low) / 2 * rng.standard_normal(len(low))
            if self.epsilon and rng.random() < self.epsilon:
                action = rng.uniform(low, high)
            yield one_hot(action) if environment.discrete else np.clip(action, low, high).astype(np.float32)

    def _policy(self) -> Policy:
        if self.name == "mpc":
            return partial(planned_actions, quality=self.quality)
        if self.name in POLICIES:
            return POLICIES[self.name]
        loaded: Any = _others()[self.name]()
        policy: Policy = loaded(self.argument) if self.argument else loaded
        return policy


def parse_policy(text: str) -> Mixture[Member]:
    """Read the text of a mixture (grammar above).

    Raises:
        UnknownNameError: no such policy; the message names the nearest.
        InvalidValueError: a number that is none, or outside what it may be.
    """
    return parse_mixture("policy", text, partial(_parse_member, text), EXAMPLE)


def check_playable(mixture: Mixture[Member], environment: Environment) -> None:
    """Refuse a policy that an environment has no use for.

    Raises:
        InvalidValueError: it cannot look ahead, or its library has no script.
    """
    for member in mixture.members:
        lacks = {
            "mpc": not isinstance(environment, Foreseeing) and "cannot look ahead in its simulator",
            "scripted": not isinstance(environment, Scripted) and "has no scripted policy",
        }.get(member.name)
        if lacks:
            raise InvalidValueError(
                f"{environment.name} {lacks}, so there is no policy '{member.name}' for it; take another, e.g. random"
            )


def one_hot(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """The largest of A values as an action: 1 there, 0 elsewhere."""
    action = np.zeros(len(values), np.float32)
    action[np.argmax(values)] = 1
    return action


def _parse_member(text: str, part: str) -> Member:
    """One member, without its weight."""
    named, marked = marks_of(part)
    name, equals, argument = named.partition("=")
    if argument.startswith('"') and argument.endswith('"'):
        argument = argument[1:-1]
    if name not in POLICIES and name not in _others():
        raise UnknownNameError.among("policy", name, [*POLICIES, *_others()], hint=EXAMPLE)
    if name == "run" and not argument:
        raise InvalidValueError(f"policy '{text}': run takes the folder of a run, run=FOLDER; {EXAMPLE}")
    if bool(equals) != bool(argument) or (argument and name in POLICIES):
        raise InvalidValueError(f"policy '{text}': {name} takes no argument; {EXAMPLE}")
    if Path(argument).exists():  # workers run in other folders
        argument = str(Path(argument).absolute()) if argument else ""
    if '"' in argument:
        raise InvalidValueError(f"policy '{text}': a quote is too many in '{argument}'; {EXAMPLE}")
    return Member(name, argument, **parse_marks(text, name, marked))


def marks_of(part: str) -> tuple[str, list[str]]:
    """A member's name and argument, and its marks, each followed by its number: ``["+", "0.3", "~", "0.1"]``."""
    named, *numbers = parts_of(part, "@+~")
    places = itertools.accumulate((len(piece) + 1 for piece in (named, *numbers)), initial=-1)
    marks = [part[place] for place in list(places)[1:-1]]
    return named, [each for pair in zip(marks, numbers, strict=True) for each in pair]


def parse_marks(text: str, name: str, marked: Sequence[str]) -> dict[str, float]:
    """What the marks behind a name say, given as ``["+", "0.3", "~", "0.1"]``.

    Raises:
        InvalidValueError: one is given twice, is no number, or outside what it may be.
    """
    numbers: dict[str, float] = {}
    for mark, value in zip(marked[::2], marked[1::2], strict=True):
        what = MARKS[mark]
        if what in numbers or (what == "quality" and name != "mpc"):
            reason = "twice" if what in numbers else f"for {name}, only mpc has one"
            raise InvalidValueError(f"policy '{text}' gives a {what} {reason}; {EXAMPLE}")
        numbers[what] = number_above_zero(value, f"policy '{text}': {what}", EXAMPLE)
        most = LOUDEST if what == "noise" else 1
        if numbers[what] > most:
            raise InvalidValueError(f"policy '{text}': {what} is at most {most}; {EXAMPLE}")
    return numbers


def _others() -> dict[str, Callable[[], Policy]]:
    """Policies of other packages."""
    return {point.name: point.load for point in entry_points(group=ENTRY_POINTS)}


def _short(action: NDArray[np.float64]) -> str:
    return (
        f"an array of shape {list(action.shape)}"
        if np.isfinite(action).all()
        else "a number that is not finite"
    )


def random_actions(environment: Environment, rng: np.random.Generator) -> Actions:
    """Uniform within the bounds."""
    while True:
        yield rng.uniform(environment.action_low, environment.action_high).astype(np.float32)


def ou_actions(environment: Environment, rng: np.random.Generator) -> Actions:
    """Ornstein-Uhlenbeck around the middle of the bounds, discretised exactly, stationary from the start."""
    middle = (environment.action_low + environment.action_high) / 2
    deviation = OU_DEVIATION * (environment.action_high - environment.action_low) / 2
    keep = math.exp(-environment.control_timestep / OU_SECONDS)
    value = rng.standard_normal(len(middle))
    while True:
        yield (middle + deviation * value).astype(np.float32)
        value = keep * value + math.sqrt(1 - keep**2) * rng.standard_normal(len(middle))


def coloured_actions(environment: Environment, rng: np.random.Generator, exponent: float) -> Actions:
    """Noise whose power spectrum is 1/f^exponent, around the middle of the bounds, an episode's length at a time."""
    middle = (environment.action_low + environment.action_high) / 2
    deviation = OU_DEVIATION * (environment.action_high - environment.action_low) / 2
    while True:
        for value in coloured_noise(rng, exponent, environment.max_steps, len(middle)):
            yield (middle + deviation * value).astype(np.float32)


def coloured_noise(rng: np.random.Generator, exponent: float, length: int, width: int) -> NDArray[np.float64]:
    """Noise (length, width) of variance 1 with power spectrum 1/f^exponent (Timmer & König 1995)."""
    length = max(length, 2)
    scale = np.maximum(np.fft.rfftfreq(length), 1 / length) ** (-exponent / 2)
    real, imaginary = rng.standard_normal((2, len(scale), width))
    spectrum = scale[:, None] * (real + 1j * imaginary)
    spectrum[0] = spectrum[0].real * math.sqrt(2)
    if length % 2 == 0:
        spectrum[-1] = spectrum[-1].real * math.sqrt(2)
    weights = np.concatenate([scale[1:-1], scale[-1:] * (1 + length % 2) / 2])
    deviation = 2 * math.sqrt(float(np.sum(weights**2))) / length
    noise: NDArray[np.float64] = np.fft.irfft(spectrum, n=length, axis=0) / deviation
    return noise


def scripted_actions(environment: Environment, _: np.random.Generator) -> Actions:
    """What the environment's own library does."""
    assert isinstance(environment, Scripted)
    while True:
        yield environment.scripted_action()


POLICIES: dict[str, Policy] = {
    "random": random_actions,
    "ou": ou_actions,
    "pink": partial(coloured_actions, exponent=1.0),
    "brown": partial(coloured_actions, exponent=2.0),
    "mpc": planned_actions,
    "scripted": scripted_actions,
}
