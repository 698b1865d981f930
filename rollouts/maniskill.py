"""ManiSkill 3 (Tao et al. 2024, arXiv 2410.00425): the study's four tasks, seen by the camera on the robot's wrist.

SAPIEN draws with Vulkan; that needs a GPU, which software drivers do not replace: without one, building an
environment fails with one line that says so. Not yet run by us on such a machine.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import gymnasium
import mani_skill.envs  # noqa: F401 (registers its environments)
import numpy as np
from numpy.typing import NDArray

from pvrpipe.rollouts.environments import pick_camera
from pvrpipe.rollouts.pixels import IMAGE_FACTORS, seen, squared
from pvrpipe.rollouts.variation import PLAIN, Look
from pvrpipe.schemas.errors import SimulationError, UnknownNameError, one_line
from pvrpipe.schemas.records import Step

TASKS = ("StackCube", "PlugCharger", "PickClutterYCB", "AssemblingKits")
CAMERA = "hand_camera"
ACTION_REPEAT = 1
UNENDING = 200  # transitions of an episode where a task has no limit of its own


def names() -> tuple[str, ...]:
    """The study's tasks, as ``maniskill:<Task>``."""
    return tuple(f"maniskill:{task}" for task in TASKS)


def make(
    name: str, *, size: int, camera: int | str | None, action_repeat: int | None, max_steps: int | None
) -> WristEnvironment:
    """Build a task by its name."""
    if name not in names():
        raise UnknownNameError.among("environment", name, names(), hint="see `pvrpipe envs`")
    return WristEnvironment(name, size, camera, action_repeat or ACTION_REPEAT, max_steps)


class WristEnvironment:
    """One task; see :class:`pvrpipe.rollouts.environments.Environment`."""

    def __init__(
        self, name: str, size: int, camera: int | str | None, action_repeat: int, max_steps: int | None
    ) -> None:
        self.name, self.size, self.action_repeat = name, size, action_repeat
        try:
            self._env: gymnasium.Env[Any, Any] = gymnasium.make(
                name.removeprefix("maniskill:") + "-v1",
                num_envs=1,
                obs_mode="rgb+state",
                control_mode="pd_ee_delta_pose",
                robot_uids="panda_wristcam",
                sensor_configs={"width": size, "height": size},
                sim_backend="physx_cpu",
                reconfiguration_freq=1,  # objects and their looks are drawn anew with each episode
            )
            observation, _ = self._env.reset(seed=0)
        except Exception as error:  # SAPIEN raises RuntimeError for a missing device, asset or driver alike
            raise SimulationError(
                f"{name} cannot be built ({one_line(error)[:200]}); ManiSkill needs a GPU with Vulkan, and its assets "
                "(`python -m mani_skill.utils.download_asset TASK`)"
            ) from error
        self.cameras = tuple(observation["sensor_data"])
        self.camera = pick_camera(camera, self.cameras, CAMERA, name)
        space: Any = self._world.single_action_space
        self.action_low, self.action_high = (np.asarray(b, np.float32) for b in (space.low, space.high))
        self.discrete, self.has_success = False, True
        self.state_names = tuple(f"state[{i}]" for i in range(observation["state"].shape[-1]))
        self.physics_width = int(self._world.get_state().shape[-1])
        self.factors = IMAGE_FACTORS
        self.control_timestep = float(self._world.control_timestep) * action_repeat
        limit = self._env.spec.max_episode_steps if self._env.spec is not None else None
        self.max_steps = max_steps or max(1, (limit or UNENDING) // action_repeat)
        self.versions = {package: version(package) for package in ("mani-skill", "sapien", "numpy")}
        self._observation, self._rows, self._look = observation, 0, PLAIN

    @property
    def _world(self) -> Any:
        return self._env.unwrapped

    def renderer(self) -> str:
        """What draws."""
        return f"sapien {version('sapien')}, Vulkan"

    def reset(self, seed: int, look: Look = PLAIN) -> Step:
        """Begin the episode of that seed in a look; its first row."""
        self._look, self._rows = look, 0
        self._observation, _ = self._env.reset(seed=seed & 0x7FFFFFFF)
        return self._row(0.0, terminal=False, success=False)

    def step(self, action: NDArray[np.float32]) -> Step:
        """Take an action (A,), repeated ``action_repeat`` times; the row it arrives at."""
        action = np.clip(np.asarray(action, np.float32), self.action_low, self.action_high)
        reward, success = 0.0, False
        for _ in range(self.action_repeat):
            self._observation, received, _, _, told = self._env.step(action)
            reward += float(received)
            success = success or bool(told["success"])
        self._rows += 1
        return self._row(reward, terminal=False, success=success)

    def snapshot(self) -> NDArray[np.float64]:
        """Poses and velocities of all bodies and joints (P,)."""
        state: NDArray[np.float32] = self._world.get_state().cpu().numpy()
        return state.reshape(-1).astype(np.float64)

    def restore(self, physics: NDArray[np.float64], row: int = 0) -> None:
        """Go back to a row of the episode last reset."""
        self._world.set_state(np.asarray(physics, np.float32)[None])
        self._observation, self._rows = self._world.get_obs(), row

    def redress(self, look: Look) -> None:
        """Go on in another look."""
        self._look = look

    def observe(self) -> Step:
        """The row as it is now; its reward is 0."""
        return self._row(0.0, terminal=False, success=False)

    def close(self) -> None:
        """Free the renderer."""
        self._env.close()

    def _row(self, reward: float, terminal: bool, success: bool) -> Step:
        """What is seen now."""
        picture = self._observation["sensor_data"][self.camera]["rgb"][0].cpu().numpy()
        state = self._observation["state"][0].cpu().numpy()
        return Step(
            frame=seen(squared(picture, self.size), self._look, self._rows),
            state=state.astype(np.float32),
            physics=self.snapshot(),
            reward=reward,
            is_last=terminal or self._rows >= self.max_steps,
            is_terminal=terminal,
            success=success,
        )
