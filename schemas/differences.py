"""Which fields of two specifications differ: said wherever two things ought to be the same and are not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

SHOWN = 4
LONGEST = 40


def differences(old: Any, new: Any, joined: str = "now", where: str = "") -> str:
    """The first fields that differ between two JSON values, as ``recipe.crop: 224, now 196; …``."""
    found = [f"{field}: {_short(a)}, {joined} {_short(b)}" for field, a, b in _walk(old, new, where)]
    more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return "; ".join(found[:SHOWN] + more)


def _walk(old: Any, new: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _walk(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))
    elif old != new:
        yield where, old, new


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < LONGEST else f"{text[: LONGEST - 3]}…"
