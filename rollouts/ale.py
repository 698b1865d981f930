"""Atari (Bellemare et al. 2013; Machado et al. 2018): ``ale:Pong``, ``ale:Breakout?noop=30&life_loss=true``.

The standard preprocessing, as options behind ``?``:

===============  =======  =====================================================================
``sticky``       0.25     probability that the last action is repeated instead (Machado et al.)
``noop``         0        at most so many actions of doing nothing at the start, drawn by the seed
``pool``         true     the brighter of the last two frames at each pixel, against flicker
``gray``         false    frames without colour, three times the same
``clip``         false    rewards become their sign
``life_loss``    false    losing a life ends the episode
``full``         false    all 18 actions, also those without effect
===============  =======  =====================================================================

An action is repeated for 4 frames unless ``--action-repeat`` says otherwise. ``state`` is the console's 128 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import ale_py
import gymnasium
import numpy as np
from numpy.typing import NDArray

from pvrpipe.rollouts.gym import GymEnvironment, made, options_of
from pvrpipe.rollouts.variation import PLAIN, Look
from pvrpipe.schemas.errors import InvalidValueError, UnknownNameError
from pvrpipe.schemas.records import Step

gymnasium.register_envs(ale_py)
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)

ACTION_REPEAT = 4
FRAMES = 108_000  # of an episode at most: half an hour of play
GREY = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class Preprocessing:
    """What is done to the console; see the table above."""

    sticky: float = 0.25
    noop: int = 0
    pool: bool = True
    gray: bool = False
    clip: bool = False
    life_loss: bool = False
    full: bool = False


def names() -> tuple[str, ...]:
    """All games, as ``ale:<Game>``."""
    games = (id_ for id_ in gymnasium.registry if id_.startswith("ALE/") and id_.endswith("-v5"))
    return tuple(sorted("ale:" + id_.removeprefix("ALE/").removesuffix("-v5") for id_ in games))


def make(
    name: str, *, size: int, camera: int | str | None, action_repeat: int | None, max_steps: int | None
) -> AtariEnvironment:
    """Build a game by its name."""
    game, options = options_of(name.removeprefix("ale:"))
    if f"ale:{game}" not in names():
        raise UnknownNameError.among("environment", f"ale:{game}", names(), hint="see `pvrpipe envs`")
    known = {field.name: type(field.default) for field in fields(Preprocessing)}
    for option, value in options.items():
        if option not in known:
            raise UnknownNameError.among("option", option, known, hint=f"of {name}")
        if not isinstance(value, known[option] if known[option] is not float else (int, float)):
            raise InvalidValueError(
                f"{name}: {option} must be of type {known[option].__name__}, not {value!r}"
            )
    chosen = Preprocessing(**options)
    if chosen.noop < 0 or not 0 <= chosen.sticky <= 1:
        raise InvalidValueError(f"{name}: noop is 0 or more, and sticky a probability from 0 to 1")
    env = made(
        f"ALE/{game}-v5",
        name,
        {
            "frameskip": 1,
            "repeat_action_probability": chosen.sticky,
            "full_action_space": chosen.full,
            "render_mode": "rgb_array",
        },
    )
    return AtariEnvironment(name, env, chosen, size, camera, action_repeat or ACTION_REPEAT, max_steps)


class AtariEnvironment(GymEnvironment):
    """One game; see :class:`pvrpipe.rollouts.environments.Environment`."""

    def __init__(
        self,
        name: str,
        env: gymnasium.Env[Any, Any],
        preprocessing: Preprocessing,
        size: int,
        camera: int | str | None,
        action_repeat: int,
        max_steps: int | None,
    ) -> None:
        steps = max_steps or FRAMES // action_repeat
        self._chosen, self._shown = preprocessing, np.zeros((210, 160, 3), np.uint8)
        super().__init__(name, env, size, camera, action_repeat, steps)
        inner: Any = env.unwrapped
        self._console = inner.ale
        self.state_names = tuple(f"ram[{i}]" for i in range(128))
        self.control_timestep = action_repeat / 60

    def packages(self) -> tuple[str, ...]:
        """Whose versions decide what happens and how it looks."""
        return ("ale-py", *super().packages())

    def reset(self, seed: int, look: Look = PLAIN) -> Step:
        """Begin the episode of that seed in a look, after doing nothing for a while; its first row."""
        self._look, self._rows = look, 0
        self._env.reset(seed=seed & 0xFFFFFFFF)
        waits = (
            int(np.random.default_rng(seed).integers(1, self._chosen.noop + 1)) if self._chosen.noop else 0
        )
        for _ in range(waits):
            self._env.step(0)
        self._shown = self._console.getScreenRGB()
        return self._row(None, 0.0, last=False, terminal=False)

    def step(self, action: NDArray[np.float32]) -> Step:
        """Take an action (A,), repeated ``action_repeat`` times; the row it arrives at."""
        given, lives = self._native(np.asarray(action, np.float32)), self._console.lives()
        reward, terminal, before = 0.0, False, self._shown
        for repeat in range(self.action_repeat):
            if repeat == self.action_repeat - 1:
                before = self._console.getScreenRGB()
            _, received, terminal, _, _ = self._env.step(given)
            reward += float(received)
            if terminal:
                break
        now = self._console.getScreenRGB()
        self._shown = np.maximum(before, now) if self._chosen.pool and self.action_repeat > 1 else now
        terminal = terminal or (self._chosen.life_loss and self._console.lives() < lives)
        self._rows += 1
        reward = float(np.sign(reward)) if self._chosen.clip else reward
        return self._row(None, reward, terminal or self._rows >= self.max_steps, terminal)

    def picture(self, _: Any) -> NDArray[np.uint8]:
        """The screen as the preprocessing has it (210, 160, 3)."""
        if not self._chosen.gray:
            return self._shown
        grey = (self._shown @ GREY).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)

    def state(self, _: Any) -> NDArray[np.float32]:
        """The console's memory (128,)."""
        memory: NDArray[np.uint8] = self._console.getRAM()
        return memory.astype(np.float32)
