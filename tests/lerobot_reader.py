"""Runs in LeRobot's own venv, which `test_store_lerobot.py` makes; imports nothing of ours.

    python lerobot_reader.py DATASET OUT.npz KEY ...

Every frame's features KEY as LeRobot gives them, and windows of three frames of ``action``, padded at episode ends.
"""

import sys
from pathlib import Path

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

folder, out, *keys = sys.argv[1:]
dataset = LeRobotDataset("local/exported", root=Path(folder))
frames = [dataset[index] for index in range(len(dataset))]
found = {key: np.stack([frame[key].numpy() for frame in frames]) for key in keys}
deltas = {"action": [0.0, 1 / dataset.fps, 2 / dataset.fps]}
windows = LeRobotDataset("local/exported", root=Path(folder), delta_timestamps=deltas)
found["windows"] = np.stack([windows[index]["action"].numpy() for index in range(len(windows))])
found["padded"] = np.stack([windows[index]["action_is_pad"].numpy() for index in range(len(windows))])
found["episodes"] = np.array(dataset.num_episodes)
found["task"] = np.array(sorted({frame["task"] for frame in frames}))
found["image_mean"] = np.asarray(dataset.meta.stats.get("observation.image", {}).get("mean", 0.0))
np.savez(out, **found)
