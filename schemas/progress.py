"""How long work tells that it moves on, without knowing who watches."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with work done and to do, in units of the stage (rows, updates), and what is being done."""

    def __call__(self, done: float, total: float, note: str = "") -> None:
        """Take note of the progress."""


def silent(done: float, total: float, note: str = "") -> None:
    """Watch nothing."""


def counted(count: int, what: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{count} {what}{'s' * (count != 1)}"
