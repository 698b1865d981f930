"""A whole environment for pvrpipe: a number is shown, and actions above zero count it up."""

import numpy as np
from PIL import Image, ImageDraw

from pvrpipe.schemas.errors import UnknownNameError
from pvrpipe.schemas.records import Step

NAMES = ("counter:to-nine",)


def names():
    """All environments of this package, prefix included; `pvrpipe envs` lists them."""
    return NAMES


def make(name, *, size, camera, action_repeat, max_steps):
    """Build one; None stands for what is usual here."""
    if name not in NAMES:
        raise UnknownNameError.among("environment", name, NAMES)
    return Counter(name, size, action_repeat or 1, max_steps or 9)


class Counter:
    """Everything that pvrpipe asks of an environment (pvrpipe.rollouts.environments.Environment)."""

    camera, cameras = "front", ("front",)
    discrete = False  # actions are numbers within bounds, not one of A
    has_success = False  # rows do not say whether a task is solved
    factors = frozenset()  # nothing of its look can be varied
    state_names = ("count",)
    physics_width = 0  # it cannot be set to a state; with snapshot, restore and observe it could
    control_timestep = 0.1  # seconds

    def __init__(self, name, size, action_repeat, max_steps):
        self.name, self.size, self.action_repeat, self.max_steps = name, size, action_repeat, max_steps
        self.action_low, self.action_high = -np.ones(1, np.float32), np.ones(1, np.float32)
        self.versions = {"pvrpipe-counter": "1.0"}  # of all that decides what happens and how it looks

    def renderer(self):
        """What draws."""
        return "pillow"

    def reset(self, seed, look=None):
        """Begin the episode of that seed; the same seed, the same episode, bit for bit."""
        self._count, self._row = int(np.random.default_rng(seed).integers(10)), 0
        return self._show(reward=0.0)  # nothing has been received on arriving at the first row

    def step(self, action):
        """Take an action; the row that is arrived at, with the reward for arriving there."""
        before = self._count
        for _ in range(self.action_repeat):
            self._count += int(action[0] > 0)
        self._row += 1
        return self._show(reward=float(self._count - before))

    def close(self):
        """Nothing is open."""

    def _show(self, reward):
        picture = Image.new("RGB", (self.size, self.size), "navy")
        ImageDraw.Draw(picture).text((self.size // 3, self.size // 4), str(self._count), "white")
        return Step(
            frame=np.asarray(picture),
            state=np.array([self._count], np.float32),
            physics=np.empty(0),
            reward=reward,
            is_last=self._row >= self.max_steps,
            is_terminal=False,
        )
