"""Reads a LeRobot dataset for ``peers.py``; runs in LeRobot's own venv and imports nothing of ours.

    .venv-lerobot/bin/python benchmarks/lerobot_peer.py DATASET

Each line of stdin asks for windows of ``length`` frames by their first ``frames``, or, where these are null, for all
frames in order. The answer is a line with the seconds it took; windows (B, T, ...) float16 lie in ``answer.npy``.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset

KEY = "observation.embedding"


def main() -> None:
    """Answer until nobody asks."""
    folder = Path(sys.argv[1])
    plain = LeRobotDataset("local/noise", root=folder)
    opened: dict[int, LeRobotDataset] = {}
    for line in sys.stdin:
        question = json.loads(line)
        frames, length = question["frames"], question["length"]
        if frames is None:
            seconds = scanned(plain, length)
        else:
            if length not in opened:
                deltas = {KEY: [step / plain.fps for step in range(length)]}
                opened[length] = LeRobotDataset("local/noise", root=folder, delta_timestamps=deltas)
            started = time.perf_counter()
            batch = torch.stack([opened[length][frame][KEY] for frame in frames])
            seconds = time.perf_counter() - started
            np.save(folder / "answer.npy", batch.numpy().astype(np.float16))
        print(json.dumps({"seconds": seconds}), flush=True)


def scanned(dataset: LeRobotDataset, length: int) -> float:
    """Seconds that it takes to read everything in order, ``length`` frames at a time."""
    started = time.perf_counter()
    for first in range(0, len(dataset), length):
        torch.stack(list(dataset.hf_dataset[first : first + length][KEY]))
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
