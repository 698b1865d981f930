"""The scripts of ``benchmarks/`` at their smallest: what no longer runs measures nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
