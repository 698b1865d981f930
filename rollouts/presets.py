"""Named policies per environment: ``random``, ``medium``, ``expert`` and ``mixed``; returns in docs/environments.md."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from pvrpipe.rollouts.mixtures import number_above_zero, parts_of, weighed
from pvrpipe.rollouts.policies import EXAMPLE, Member, marks_of, parse_marks, parse_policy
from pvrpipe.schemas.errors import InvalidValueError

NAMES = ("medium", "expert", "mixed")  # beside random, which is a policy

#: Of families whose environments can look ahead, or whose library has scripts.
FAMILIES = {
    "dmc": {
        "medium": "mpc@0.3+0.3",
        "expert": "mpc",
        "mixed": "random:0.2,ou:0.1,mpc@0.3+0.3:0.3,mpc+0.2:0.2,mpc:0.2",
    },
    "metaworld": {
        "medium": "scripted+0.3~0.3",
        "expert": "scripted",
        "mixed": "random:0.2,pink:0.1,scripted+0.3~0.3:0.3,scripted+0.2:0.2,scripted:0.2",
    },
}


def expanded(policy: str, environment: str) -> str:
    """The text of a mixture in which presets are replaced by what they stand for there.

    Noise and epsilon of a preset come on top of those its members have.

    Raises:
        InvalidValueError: nothing better than random is known for the environment.
    """
    parts = [part.strip() for part in parts_of(policy, ",")]
    if not any(_split(part)[0] in NAMES for part in parts):
        return policy
    known = FAMILIES.get(environment.partition(":")[0])
    if known is None:
        raise InvalidValueError(
            f"{environment} has no preset in '{policy}': it can neither plan nor follow a script; "
            "take random, ou or pink"
        )
    shares: dict[str, float] = {}
    for part in parts:
        for member, share in _members(policy, part, known):
            shares[member.label] = shares.get(member.label, 0) + share
    return ",".join(f"{label}:{share:g}" for label, share in shares.items())


def _split(part: str) -> tuple[str, list[str], str]:
    """Name, marks with their numbers, and weight."""
    labelled, colon, weight = weighed(part)
    name, marked = marks_of(labelled)
    return name, marked, weight if colon else "1"


def _members(policy: str, part: str, known: dict[str, str]) -> Iterator[tuple[Member, float]]:
    """A part's members, with its weight shared among them."""
    name, marked, weight = _split(part)
    whole = number_above_zero(weight, f"policy '{policy}': weight", EXAMPLE)
    marks = parse_marks(policy, name, marked) if name in known else {}
    more, often = marks.get("noise", 0.0), marks.get("epsilon", 0.0)
    mixture = parse_policy(known.get(name, weighed(part)[0]))
    for member, share in zip(mixture.members, mixture.weights, strict=True):
        noise = math.hypot(member.noise, more) if more else member.noise
        epsilon = 1 - (1 - member.epsilon) * (1 - often) if often else member.epsilon
        yield replace(member, noise=noise, epsilon=epsilon), whole * share
