"""Any registered Gymnasium environment that renders ``rgb_array``: ``gym:CartPole-v1``, ``gym:Ant-v5?width=128``.

What follows the ``?`` goes to the environment as keywords. Actions must be a box (A numbers) or one of A; a vector
that is observed becomes ``state``, pictures that are observed are not kept. Frames are rendered, and fitted into
the square whole. The simulator is not set to states: a replay takes the actions again.
"""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from importlib.metadata import version
from typing import Any
from urllib.parse import parse_qsl

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from pvrpipe.rollouts.environments import pick_camera
from pvrpipe.rollouts.pixels import IMAGE_FACTORS, seen, squared
from pvrpipe.rollouts.variation import PLAIN, Look
from pvrpipe.schemas.errors import (
    InvalidValueError,
    PvrpipeError,
    SimulationError,
    UnknownNameError,
    one_line,
)
from pvrpipe.schemas.records import Step

UNLIMITED = 1e9  # bounds beyond are none: some environments write the largest float for infinity
UNENDING = 1000  # transitions of an episode where the environment has no limit of its own
WIDEST = 4096  # numbers of an observation that are kept as state
CAMERA = "rendered"
STEP_SECONDS = 0.05  # where an environment does not say


def names() -> tuple[str, ...]:
    """Every registered environment that is not one of another family here, as ``gym:<id>``."""
    skipped = ("ALE/", "MiniWorld-", "GymV", "phys2d/", "tabular/")
    return tuple(sorted(f"gym:{id_}" for id_ in gymnasium.registry if not id_.startswith(skipped)))


def make(
    name: str, *, size: int, camera: int | str | None, action_repeat: int | None, max_steps: int | None
) -> GymEnvironment:
    """Build an environment by its id."""
    id_, options = options_of(name.removeprefix("gym:"))
    if id_ not in gymnasium.registry and not (":" in id_ or "/" in id_):
        raise UnknownNameError.among("environment", name, names(), hint="see `pvrpipe envs`")
    env = made(id_, name, {"render_mode": "rgb_array", **options})
    return GymEnvironment(name, env, size, camera, action_repeat or 1, max_steps)


def options_of(text: str) -> tuple[str, dict[str, Any]]:
    """An id and its keywords: ``CartPole-v1?sutton_barto_reward=true`` → the id, and what JSON makes of the values."""
    id_, _, query = text.partition("?")
    options: dict[str, Any] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return id_, options


def made(id_: str, name: str, keywords: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    """Make an environment; its own complaints become one line."""
    try:
        with redirect_stdout(sys.stderr):  # some print while they are built
            return gymnasium.make(id_, disable_env_checker=True, **keywords)
    except Exception as error:  # environments raise whatever they like; the message is theirs
        raise SimulationError(
            f"{name} cannot be made ({one_line(error)[:200]}); check its id and the keywords behind '?'"
        ) from error


class GymEnvironment:
    """One environment; see :class:`pvrpipe.rollouts.environments.Environment`."""

    renders = True  # the frame is what the environment renders

    def __init__(
        self,
        name: str,
        env: gymnasium.Env[Any, Any],
        size: int,
        camera: int | str | None,
        action_repeat: int,
        max_steps: int | None,
    ) -> None:
        self.name, self.size, self.action_repeat, self._env = name, size, action_repeat, env
        if self.renders and env.render_mode != "rgb_array":
            raise InvalidValueError(
                f"{name} does not render rgb_array; without pictures there is nothing to embed"
            )
        self.action_low, self.action_high, self.discrete = _bounds(name, env.action_space)
        self.state_names = _state_names(env.observation_space)
        limit = env.spec.max_episode_steps if env.spec is not None else None
        self.max_steps = max_steps or max(1, round((limit or UNENDING) / action_repeat))
        self.physics_width, self.has_success, self.factors = 0, False, IMAGE_FACTORS
        self.control_timestep = _seconds(env) * action_repeat
        self.cameras = (CAMERA,)
        self.camera = pick_camera(camera, self.cameras, CAMERA, name)
        self.versions = {package: version(package) for package in self.packages()}
        self._rows, self._look = 0, PLAIN
        self._try_to_see()

    def _try_to_see(self) -> None:
        """Render once, for here is where libraries find that something is not installed."""
        try:
            observation, _ = self._env.reset(seed=0)
            self.picture(observation)
        except PvrpipeError:
            raise
        except Exception as error:  # environments raise whatever they like; the message is theirs
            raise SimulationError(f"{self.name} cannot be rendered ({one_line(error)[:200]})") from error

    def packages(self) -> tuple[str, ...]:
        """Whose versions decide what happens and how it looks."""
        return ("gymnasium", "numpy", "pillow")

    def renderer(self) -> str:
        """What draws: the environment itself."""
        return f"{type(self._env.unwrapped).__module__}.{type(self._env.unwrapped).__qualname__}"

    def reset(self, seed: int, look: Look = PLAIN) -> Step:
        """Begin the episode of that seed in a look; its first row."""
        self._look, self._rows = look, 0
        observation, _ = self._env.reset(seed=seed & 0xFFFFFFFF)
        return self._row(self.dressed(observation), 0.0, last=False, terminal=False)

    def step(self, action: NDArray[np.float32]) -> Step:
        """Take an action (A,), repeated ``action_repeat`` times; the row it arrives at."""
        given = self._native(np.asarray(action, np.float32))
        reward, terminal, cut = 0.0, False, False
        for _ in range(self.action_repeat):
            observation, received, terminal, cut, _ = self._env.step(given)
            reward += float(received)
            if terminal or cut:
                break
        self._rows += 1
        last = terminal or cut or self._rows >= self.max_steps
        return self._row(observation, reward, last, bool(terminal))

    def close(self) -> None:
        """Free the renderer."""
        self._env.close()

    def dressed(self, observation: Any) -> Any:
        """The first observation, once the look is put on; what a rendered picture shows is noise only."""
        return observation

    def picture(self, _: Any) -> NDArray[np.uint8]:
        """What is seen with an observation (H, W, 3)."""
        rendered: Any = self._env.render()
        picture = np.asarray(rendered)
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise SimulationError(
                f"{self.name} renders {picture.dtype} {list(picture.shape)}, not a picture of (H, W, 3) bytes; "
                "it cannot be collected"
            )
        return picture

    def state(self, observation: Any) -> NDArray[np.float32]:
        """The numbers that are observed (S,)."""
        space = self._env.observation_space
        return _state_of(space, observation) if self.state_names else np.empty(0, np.float32)

    def _native(self, action: NDArray[np.float32]) -> Any:
        """An action as the environment takes it."""
        space = self._env.action_space
        if isinstance(space, spaces.Discrete):
            return int(space.start) + int(np.argmax(action))
        assert isinstance(space, spaces.Box)
        clipped = np.clip(action, self.action_low, self.action_high)
        return clipped.reshape(space.shape).astype(space.dtype)

    def _row(self, observation: Any, reward: float, last: bool, terminal: bool) -> Step:
        return Step(
            frame=seen(squared(self.picture(observation), self.size), self._look, self._rows),
            state=self.state(observation),
            physics=np.empty(0),
            reward=reward,
            is_last=last,
            is_terminal=terminal,
        )


def _bounds(name: str, space: spaces.Space[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32], bool]:
    """Lowest and highest actions (A,), and whether they are one of A."""
    if isinstance(space, spaces.Discrete):
        count = int(space.n)
        return np.zeros(count, np.float32), np.ones(count, np.float32), True
    if not isinstance(space, spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        raise InvalidValueError(
            f"{name} takes actions of {type(space).__name__}; pvrpipe collects boxes of numbers and one of A: "
            "wrap it into one of these, see docs/environments.md"
        )
    low, high = (np.ravel(bound).astype(np.float32) for bound in (space.low, space.high))
    if not max(-low.min(initial=0), high.max(initial=0)) < UNLIMITED:
        raise InvalidValueError(
            f"{name} has actions without bounds; wrap it with gymnasium.wrappers.TransformAction, "
            "see docs/environments.md"
        )
    return low, high, False


def _state_names(space: spaces.Space[Any]) -> tuple[str, ...]:
    """Names of the numbers that are observed, if they are a vector or a dictionary of vectors."""
    parts = space.spaces.items() if isinstance(space, spaces.Dict) else [("observation", space)]
    found = []
    for key, part in parts:
        if not isinstance(part, spaces.Box) or len(part.shape) > 1:
            continue
        found += [f"{key}[{i}]" for i in range(int(np.prod(part.shape)))]
    return tuple(found) if len(found) <= WIDEST else ()


def _state_of(space: spaces.Space[Any], observation: Any) -> NDArray[np.float32]:
    parts = space.spaces.items() if isinstance(space, spaces.Dict) else [("observation", space)]
    kept = [
        np.ravel(observation[key] if isinstance(space, spaces.Dict) else observation)
        for key, part in parts
        if isinstance(part, spaces.Box) and len(part.shape) <= 1
    ]
    return np.concatenate(kept).astype(np.float32)


def _seconds(env: gymnasium.Env[Any, Any]) -> float:
    """Seconds of a step: what the environment says, or its pictures per second."""
    told = getattr(env.unwrapped, "dt", None)
    rate = env.metadata.get("render_fps")
    return float(told) if isinstance(told, float | int) and told > 0 else 1 / rate if rate else STEP_SECONDS
