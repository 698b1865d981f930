"""What the fuzz run found, kept; and a few random inputs, so that the run itself keeps working."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from .fuzz.surface import surface
from .killing import run_killed

CASES = sorted((Path(__file__).parent / "fuzz" / "cases").glob("*.bin"))
RANDOM_INPUTS = 60


def run_all(work: Path, inputs: list[bytes]) -> None:
    """Any finding ends the process with an error."""
    with surface(work) as run:
        for data in inputs:
            run(data)


@pytest.mark.parametrize("what", ["cases", "random"])
def test_only_one_typed_error_whatever_the_bytes(what: str, tmp_path: Path) -> None:
    """In a process of its own: its audit hook stays as long as the process."""
    random = np.random.default_rng(0)
    inputs = [path.read_bytes() for path in CASES]
    if what == "random":
        inputs = [random.bytes(int(random.integers(8, 60))) for _ in range(RANDOM_INPUTS)]
    assert len(inputs) >= 19
    assert not run_killed(run_all, tmp_path / "work", inputs)
