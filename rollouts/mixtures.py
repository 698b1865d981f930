"""``NAME:WEIGHT,NAME:WEIGHT``: which share of a store's episodes is played by, or looks like, what."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

from pvrpipe.schemas.errors import InvalidValueError


class Labelled(Protocol):
    """Anything with a canonical text of its own."""

    @property
    def label(self) -> str:
        """What is recorded with each episode."""


Member = TypeVar("Member", bound=Labelled)


@dataclass(frozen=True)
class Mixture(Generic[Member]):
    """What a store's episodes are shared among; the weights sum to 1."""

    members: tuple[Member, ...]
    weights: tuple[float, ...]

    def __str__(self) -> str:
        """The canonical text: equal mixtures have equal texts."""
        if len(self.members) == 1:
            return self.members[0].label
        return ",".join(f"{m.label}:{w:.6g}" for m, w in zip(self.members, self.weights, strict=True))

    def assign(self, episodes: int, seed: Sequence[int]) -> tuple[Member, ...]:
        """The member of each episode: shares by largest remainder, in an order shuffled by the seed."""
        exact = [weight * episodes for weight in self.weights]
        counts = [math.floor(share) for share in exact]
        remainders = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
        for i in remainders[: episodes - sum(counts)]:
            counts[i] += 1
        dealt = [member for member, count in zip(self.members, counts, strict=True) for _ in range(count)]
        order = np.random.default_rng([*seed, episodes]).permutation(episodes)
        return tuple(dealt[i] for i in order)


def parse_mixture(what: str, text: str, parse: Callable[[str], Member], example: str) -> Mixture[Member]:
    """Read the text of a mixture.

    Args:
        what: it is of, for messages.
        text: ``MEMBER[:WEIGHT]`` by commas; a weight is 1 where none is given.
        parse: reads one member, without its weight.
        example: shown where the text is wrong.

    Raises:
        InvalidValueError: a weight that is no number above 0, or a member named twice.
    """
    members, weights = [], []
    for part in parts_of(text, ","):
        name, colon, weight = weighed(part.strip())
        members.append(parse(name))
        weights.append(number_above_zero(weight, f"{what} '{text}': weight", example) if colon else 1.0)
    if len({member.label for member in members}) < len(members):
        raise InvalidValueError(f"{what} '{text}' names a member twice; add up its weights")
    return Mixture(tuple(members), tuple(weight / sum(weights) for weight in weights))


def parts_of(text: str, marks: str) -> list[str]:
    """The text, parted at any of some characters; what stands between double quotes is not."""
    return re.split(rf'[{marks}](?=(?:[^"]*"[^"]*")*[^"]*$)', text)


def weighed(part: str) -> tuple[str, str, str]:
    """A member, a colon where there is one, and the weight behind it."""
    name, *weight = parts_of(part, ":")
    return name, ":" if weight else "", ":".join(weight)


def number_above_zero(value: str, what: str, example: str) -> float:
    """A finite number above 0, written by a person."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise InvalidValueError(f"{what} '{value}' must be a number above 0; {example}")
    return number
