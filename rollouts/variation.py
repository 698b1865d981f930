"""Variation: how the look of an environment changes from episode to episode, in and out of distribution.

::

    variation = member {"," member}            id:0.8,ood:0.2
    member    = look [":" weight]              weight 1 if not given
    look      = "none" | "id" | "ood"          as it is; the study's protocol
              | factor "=" severity {"+" factor "=" severity}      camera=0.3+lighting=0.5

``id`` and ``ood`` are the protocol of Schneider et al. (NeurIPS 2024, appendix A.4): colours of background
and objects, and the sizes of what moves, uniform in 0.7 to 1.3 of the original. A fifth of all values is held
out; ``id`` draws from the others, ``ood`` from these. Which they are follows from a constant: the
split is the same for everyone, in every environment.

A factor with a severity in (0, 1] changes one thing at a time, always by that much: only its direction, sign
or pattern is drawn. All values are deviations, 0 where nothing is changed; they are columns ``factor_…`` of
the episode table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import numpy as np

from pvrpipe.rollouts.mixtures import Mixture, number_above_zero, parse_mixture
from pvrpipe.schemas.errors import InvalidValueError, UnknownNameError

EXAMPLE = "e.g. id:0.8,ood:0.2 or camera=0.3+lighting=0.5"
SPLIT = 20241106  # decides which values are held out; never changed
BINS, HELD_OUT = 20, 4  # of each value's range
STREAM = 0x100C  # of an episode's random numbers; the environment and the policy have theirs

#: Factor → its values at severity 1: (name, deviation, unit).
FACTORS: dict[str, tuple[tuple[str, float, str], ...]] = {
    "background": (
        ("background_hue", 1.0, "of the circle"),
        ("background_tint", 1.0, "share of the new colour"),
    ),
    "colour": (("object_hue", 1.0, "of the circle"), ("object_tint", 1.0, "share of the new colour")),
    "size": (("size", 0.3, "of the original, of what moves"),),
    "camera": (("camera_azimuth", 40.0, "degrees"), ("camera_elevation", 25.0, "degrees")),
    "fov": (("fov", 0.4, "of the original width of view"),),
    "lighting": (("light_intensity", 0.7, "of the original"), ("light_tilt", 60.0, "degrees")),
    "texture": (("texture", 1.0, "share of the pattern"),),
    "noise": (("background_noise", 1.0, "share of the noise"),),
    "video": (("background_video", 1.0, "share of the moving pattern"),),
    "distractors": (("distractors", 6.0, "bodies"),),
    "sensor_noise": (("sensor_noise", 50.0, "grey levels, standard deviation"),),
}
PROTOCOL = ("background", "colour", "size")


@dataclass(frozen=True)
class Look:
    """What an episode looks like: its values, and the seed of whatever is drawn in pictures."""

    values: Mapping[str, float] = field(default_factory=dict)  # without the neutral ones
    seed: int = 0

    def __getitem__(self, name: str) -> float:
        """A value; 0 where it is not varied."""
        return self.values.get(name, 0.0)

    def __bool__(self) -> bool:
        """Whether anything is changed at all."""
        return any(self.values.values())

    def sized(self, size: float) -> Look:
        """The same look with another size of what moves."""
        return Look({**self.values, "size": size}, self.seed)

    def rng(self, *stream: int) -> np.random.Generator:
        """Random numbers of its own for each purpose, or row."""
        return np.random.default_rng([self.seed, STREAM, *stream])


PLAIN = Look()


@dataclass(frozen=True)
class Variation:
    """One way to draw looks."""

    protocol: Literal["id", "ood"] | None = None
    severities: tuple[tuple[str, float], ...] = ()

    @property
    def label(self) -> str:
        """The canonical text, as recorded with each episode."""
        return self.protocol or "+".join(f"{name}={value:g}" for name, value in self.severities) or "none"

    @property
    def distribution(self) -> Literal["id", "ood"]:
        """Out of distribution is what training without it would not show."""
        return "ood" if self.protocol == "ood" or self.severities else "id"

    @property
    def factors(self) -> tuple[str, ...]:
        """What it varies."""
        return PROTOCOL if self.protocol else tuple(name for name, _ in self.severities)

    def draw(self, seed: int, can: Iterable[str]) -> Look:
        """The look of the episode of a seed, in an environment that can vary some factors.

        The protocol leaves out what an environment cannot vary; a factor that was named is never left out.
        """
        rng = np.random.default_rng([seed, STREAM])
        values: dict[str, float] = {}
        for name in PROTOCOL if self.protocol else ():
            drawn = _protocol_value(name, self.protocol == "ood", rng)
            values |= drawn if name in can else {}
        for name, severity in self.severities:
            values |= _graded(name, severity, rng)
        return Look(values, seed)


AS_IT_IS = Variation()


def parse_variation(text: str) -> Mixture[Variation]:
    """Read the text of a variation (grammar above).

    Raises:
        UnknownNameError: no such factor; the message names the nearest.
        InvalidValueError: a severity or a weight outside what it may be.
    """
    return parse_mixture("variation", text, _parse_look, EXAMPLE)


def columns_of(mixture: Mixture[Variation], can: Iterable[str]) -> tuple[str, ...]:
    """The names of all values that any member draws, without their ``factor_``."""
    can = set(can)
    factors = dict.fromkeys(f for v in mixture.members for f in v.factors if f in can)
    return tuple(name for factor in FACTORS if factor in factors for name, _, _ in FACTORS[factor])


def check_possible(mixture: Mixture[Variation], environment: str, can: Iterable[str]) -> None:
    """Refuse what an environment cannot do.

    Raises:
        InvalidValueError: a factor that was named, or all of the protocol's.
    """
    can = set(can)
    listed = ", ".join(f for f in FACTORS if f in can) or "nothing"
    for variation in mixture.members:
        missing = [factor for factor in variation.factors if factor not in can]
        if missing and (not variation.protocol or set(missing) == set(PROTOCOL)):
            raise InvalidValueError(
                f"{environment} cannot vary {', '.join(missing)} (variation '{variation.label}'); it can vary: {listed}"
            )


@cache
def held_out(value: str) -> frozenset[int]:
    """Which of a value's bins are held out, the same for everyone."""
    order = np.random.default_rng([SPLIT, *value.encode()]).permutation(BINS)
    return frozenset(order[:HELD_OUT].tolist())


def _protocol_value(factor: str, ood: bool, rng: np.random.Generator) -> dict[str, float]:
    """A value of the study's protocol, uniform over the bins of its side of the split."""
    (name, most, _), *rest = FACTORS[factor]
    kept = sorted(bin for bin in range(BINS) if (bin in held_out(name)) == ood)
    share = (kept[int(rng.integers(len(kept)))] + float(rng.random())) / BINS
    value = share if name.endswith("_hue") else most * (2 * share - 1)
    return {name: value, **{tint: 1.0 for tint, _, _ in rest}}


def _graded(factor: str, severity: float, rng: np.random.Generator) -> dict[str, float]:
    """The values of one factor at a severity: the size is given, the direction drawn."""
    (name, most, _), *rest = FACTORS[factor]
    if name.endswith("_hue"):
        return {name: float(rng.random()), rest[0][0]: severity}
    if factor == "distractors":
        return {name: float(max(1, round(most * severity)))}
    if rest:  # a direction in the plane of both; the second only upwards
        angle = rng.uniform(0, 2 * math.pi)
        second = abs(math.sin(angle)) if factor == "camera" else math.sin(angle)
        return {name: most * severity * math.cos(angle), rest[0][0]: rest[0][1] * severity * second}
    signed = factor in ("size", "fov")
    return {name: most * severity * (float(rng.choice([-1.0, 1.0])) if signed else 1.0)}


def _parse_look(text: str) -> Variation:
    """One member, without its weight."""
    if text == "none":
        return Variation()
    if text in ("id", "ood"):
        return Variation(protocol="ood" if text == "ood" else "id")
    severities: dict[str, float] = {}
    for part in text.split("+"):
        name, equals, value = part.partition("=")
        if name not in FACTORS:
            raise UnknownNameError.among("variation", name, ["none", "id", "ood", *FACTORS], hint=EXAMPLE)
        severity = number_above_zero(value, f"variation '{text}': severity", EXAMPLE) if equals else 1.0
        if severity > 1 or name in severities:
            raise InvalidValueError(
                f"variation '{text}': name each factor once, with a severity above 0 and up to 1; {EXAMPLE}"
            )
        severities[name] = severity
    return Variation(severities=tuple(sorted(severities.items())))
