"""Named policies per environment: ``random``, ``medium``, ``expert`` and ``mixed``; returns in docs/environments.md."""

from __future__ import annotations

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

    Raises:
        InvalidValueError: nothing better than random is known for the environment.
    """
    if not any(part.partition(":")[0].strip() in NAMES for part in policy.split(",")):
        return policy
    known = FAMILIES.get(environment.partition(":")[0])
    if known is None:
        raise InvalidValueError(
            f"{environment} has no preset in '{policy}': it can neither plan nor follow a script; "
            "take random, ou or pink"
        )
    return ",".join(_member(part.strip(), known) for part in policy.split(","))


def _member(part: str, known: dict[str, str]) -> str:
    """A preset's members, with its weight shared among them."""
    name, _, weight = part.partition(":")
    if name not in known:
        return part
    members = [member.partition(":")[::2] for member in known[name].split(",")]
    total = sum(float(share or 1) for _, share in members)
    return ",".join(f"{label}:{float(weight or 1) * float(share or 1) / total:g}" for label, share in members)
