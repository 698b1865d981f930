"""What tests on a cluster wait for."""

from __future__ import annotations

import time
from pathlib import Path


def committed(folder: Path, count: int) -> None:
    """Wait until so many shards are committed."""
    deadline = time.monotonic() + 240
    while len(list(folder.glob("shards/*.json"))) < count:
        assert time.monotonic() < deadline, "too few shards were committed"
        time.sleep(0.05)
