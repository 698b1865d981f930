"""An environment that fails as it is told to; the tests install it as another package would install its own."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np

NAMES = (
    "failing:raise",
    "failing:nan",
    "failing:exit",
    "failing:hang",
    "failing:never",
    "failing:once",
    "failing:die",
    "failing:crash",
    "failing:long",
    "failing:floats",
    "failing:endless",
    "failing:unclosable",
    "failing:reused",
    "failing:unbounded",
    "failing:unmade",
    "failing:unbuilt",
)


def names() -> tuple[str, ...]:
    return NAMES


def make(name, *, size, camera, action_repeat, max_steps):
    from pvrpipe.schemas.errors import UnknownNameError

    if name not in NAMES:
        raise UnknownNameError.among("environment", name, NAMES)
    if name == "failing:unmade":
        raise ValueError("the licence\nhas expired")
    if name == "failing:unbuilt":
        while True:  # as libraries do that wait for a server
            try:
                time.sleep(3600)
            except Exception:
                continue
    return Failing(name, size, action_repeat or 1, max_steps or 5)


class Failing:
    """Fails in every third episode, in the third row; how, its name says."""

    camera, cameras = "only", ("only",)
    discrete = has_success = False
    state_names, physics_width, control_timestep = ("x",), 0, 0.1
    factors: frozenset[str] = frozenset()

    def __init__(self, name: str, size: int, action_repeat: int, max_steps: int) -> None:
        self.name, self.size, self.action_repeat, self.max_steps = name, size, action_repeat, max_steps
        self.action_low, self.action_high = -np.ones(2, np.float32), np.ones(2, np.float32)
        self.versions = {"failing": "1"}
        self._how, self._broken = name.partition(":")[2], False
        self._frame, self._state = np.zeros((size, size, 3), np.uint8), np.zeros(1, np.float32)
        if self._how == "unbounded":
            self.action_high = self.action_high * np.inf

    def renderer(self) -> str:
        return "none"

    def reset(self, seed: int, look: object = None) -> dict:
        self._seed, self._row, self._x = seed, 0, 0.0
        return self._now()

    def step(self, action: np.ndarray) -> dict:
        self._row += 1
        self._x += float(action.sum())
        if self._row == 3 and (self._seed % 3 == 0 or self._how == "never"):
            self._fail()
        return self._now()

    def close(self) -> None:
        if self._broken:
            raise RuntimeError("the gripper does not let go")

    def _fail(self) -> None:
        self._broken = self._how == "unclosable"
        if self._how in ("raise", "never", "unclosable"):
            raise ValueError("the gripper came off")
        if self._how == "nan":
            self._x = float("nan")
        if self._how == "exit":
            sys.exit("as if it were a program")
        if self._how == "crash":
            os._exit(1)
        if self._how == "hang":
            time.sleep(3600)
        marker = Path(os.environ.get("FAILING_MARKS", "/nonexistent")) / str(self._seed)
        if self._how in ("once", "die") and not marker.exists():
            marker.touch()
            if self._how == "die":
                os._exit(1)
            raise ValueError("a hiccup")

    def _now(self) -> dict:
        if self._how != "reused":
            self._frame, self._state = np.zeros_like(self._frame), np.zeros_like(self._state)
        self._frame[:], self._state[:] = (self._seed + self._row) % 256, self._x
        return {
            "frame": self._frame / 255 if self._how == "floats" else self._frame,
            "state": self._state,
            "physics": np.empty(0),
            "reward": self._x if self._row else 0.0,
            "is_last": self._row >= self.max_steps and self._how != "endless",
            "is_terminal": False,
        }
