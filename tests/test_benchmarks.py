"""The scripts of ``benchmarks/`` at their smallest: what no longer runs measures nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pvrpipe.store.reading import Store
from pvrpipe.store.verifying import verify

from .conftest import WriteStore

ROOT = Path(__file__).parent.parent
SMALL = {
    "collect.py": ("--frames", "20", "--repeats", "1", "--size", "32"),
    "embed.py": (
        "--network",
        "resnet50",
        "--size",
        "64",
        "--frames",
        "16",
        "--repeats",
        "1",
        "--device",
        "cpu",
    ),
    "probe.py": ("--episodes", "3", "--steps", "9", "--width", "8", "--repeats", "1"),
    "curves.py": ("dmc:pendulum-swingup", "--updates", "2", "--episodes", "4", "--steps", "70"),
    "precision.py": ("--pvr", "resnet18", "--frames", "2"),
    "reader.py": ("--gib", "0.1", "--batches", "60"),
    "storage.py": ("--mib", "2", "--rounds", "1", "--shards", "20", "--size", "32"),
    "train.py": ("--sizes", "1m", "--shapes", "2x4", "--plain", "--width", "8", "--repeats", "2"),
    "windows.py": ("--mib", "64", "--repeats", "3"),
}


def test_an_episode_is_dealt_out_to_a_store_that_holds(write_rollouts: WriteStore, tmp_path: Path) -> None:
    few, many = write_rollouts([30]), tmp_path / "many"
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "grow.py"),
        few,
        many,
        "--episodes",
        "3",
        "--rows",
        "50",
    ]
    subprocess.run(command, timeout=300, check=True)
    assert verify(many) == []
    seen = Store.open(few).read_episode(0)
    for number in range(3):
        rows = Store.open(many).read_episode(number)
        turn = np.arange(50 * number, 50 * number + 50) % 31
        np.testing.assert_array_equal(rows["frame"], seen["frame"][turn])
        np.testing.assert_array_equal(rows["reward"][1:], seen["reward"][turn][1:])


@pytest.mark.slow
@pytest.mark.parametrize("script", SMALL)
def test_a_benchmark_runs_and_writes_its_numbers(script: str, tmp_path: Path) -> None:
    written = () if script in ("collect.py", "curves.py") else ("--json", str(tmp_path / "numbers.json"))
    command = [sys.executable, str(ROOT / "benchmarks" / script), *SMALL[script], *written]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    if written:
        assert json.loads((tmp_path / "numbers.json").read_text())
