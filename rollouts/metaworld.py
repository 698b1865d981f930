"""Meta-World (Yu et al. 2019, arXiv 1910.10897; McLean et al. 2025): 50 tasks of a robot arm over a table.

Goals and objects lie elsewhere in every episode, as its seed says. ``metaworld:push`` is the library's
``push-v3``; the ``-v2`` and ``-v3`` names of the literature are accepted. Physics and rewards are the library's
own; frames are drawn here, from one of the model's fixed cameras.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvrpipe.rollouts.environments import pick_camera
from pvrpipe.rollouts.mujoco_physics import EVERYTHING, MEND_GL, Drawing, get_state, set_state
from pvrpipe.rollouts.variation import PLAIN, Look
from pvrpipe.schemas.errors import SimulationError, UnknownNameError, one_line
from pvrpipe.schemas.records import Step

try:
    import mujoco
    from metaworld import sawyer_xyz_env
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    from metaworld.policies import ENV_POLICY_MAP
except ModuleNotFoundError:
    raise
except (ImportError, AttributeError, RuntimeError) as error:  # a broken EGL, or a MuJoCo that it does not fit
    raise SimulationError(f"Meta-World cannot be loaded ({one_line(error)}); {MEND_GL}") from error

ACTION_REPEAT = 2
CAMERA = "corner2"  # the third-person view that work on pixels uses
LIMIT = 500  # simulator steps of an episode, the library's own
VERSIONS = ("-v3", "-v2")
NOW = 18  # numbers of an observation that tell what is now; as many tell what was before, three the goal


def names() -> tuple[str, ...]:
    """All tasks, as ``metaworld:<task>``, those of the study first."""
    tasks = [name.removesuffix("-v3") for name in ALL_V3_ENVIRONMENTS]
    first = [task for task in ("push", "drawer-open") if task in tasks]
    return tuple(f"metaworld:{task}" for task in dict.fromkeys([*first, *sorted(tasks)]))


def make(
    name: str, *, size: int, camera: int | str | None, action_repeat: int | None, max_steps: int | None
) -> TableEnvironment:
    """Build a task by its name."""
    for suffix in VERSIONS:
        name = name.removesuffix(suffix)
    if name not in names():
        raise UnknownNameError.among("environment", name, names(), hint="see `pvrpipe envs`")
    return TableEnvironment(name, size, camera, action_repeat or ACTION_REPEAT, max_steps)


class TableEnvironment:
    """One task; see :class:`pvrpipe.rollouts.environments.Environment`."""

    def __init__(
        self, name: str, size: int, camera: int | str | None, action_repeat: int, max_steps: int | None
    ) -> None:
        task = name.removeprefix("metaworld:") + "-v3"
        _weld_as_this_mujoco_does()
        self.name, self.size, self.action_repeat = name, size, action_repeat
        self._env = env = _with_visible_goal(ALL_V3_ENVIRONMENTS[task])
        scripts: dict[str, Any] = ENV_POLICY_MAP
        self._new_script = scripts[task]
        self._script = self._new_script()
        self.max_steps = max_steps or max(1, LIMIT // action_repeat)
        env.max_path_length = 1 << 62  # how long an episode lasts is the collector's to say
        self.control_timestep = float(env.dt) * action_repeat
        self.action_low, self.action_high = (np.full(4, bound, np.float32) for bound in (-1, 1))
        self.discrete, self.has_success = False, True
        self.state_names = (*(f"observation[{i}]" for i in range(NOW)), *(f"goal[{i}]" for i in range(3)))
        self.physics_width = int(mujoco.mj_stateSize(env.model, EVERYTHING))
        self.versions = {package: version(package) for package in ("metaworld", "mujoco", "numpy")}
        self.cameras = tuple(env.model.camera(i).name for i in range(env.model.ncam))
        self.camera = pick_camera(camera, self.cameras, CAMERA, name)
        self._drawing = Drawing(env.model, size, self.camera)
        self.factors = self._drawing.factors
        self._rows, self._observation = 0, np.zeros(2 * NOW + 3)

    def renderer(self) -> str:
        """Backend, vendor and version of the OpenGL that draws."""
        return self._drawing.renderer()

    def reset(self, seed: int, look: Look = PLAIN) -> Step:
        """Begin the episode of that seed in a look; its first row."""
        self.redress(look)
        self._env.seed(seed & 0xFFFFFFFF)
        self._env.reset_mocap_welds()
        self._env.reset()
        self._settle(self.snapshot())  # what it returns tells of where things stood before it moved them
        self._script = self._new_script()
        self._rows = 0
        return self._row(0.0, success=False)

    def step(self, action: NDArray[np.float32]) -> Step:
        """Take an action (4,), repeated ``action_repeat`` times; the row it arrives at."""
        action = np.clip(np.asarray(action, np.float32), self.action_low, self.action_high)
        reward, success = 0.0, False
        for _ in range(self.action_repeat):
            self._observation, received, _, _, told = self._env.step(action)
            reward += float(received)
            success = success or bool(told["success"])
        self._rows += 1
        return self._row(reward, success)

    def scripted_action(self) -> NDArray[np.float32]:
        """What the library's own policy does now (4,)."""
        with warnings.catch_warnings():  # it says each time that the environment will clip what it returns
            warnings.simplefilter("ignore", UserWarning)
            action = self._script.get_action(self._observation)
        return np.clip(action, self.action_low, self.action_high).astype(np.float32)

    def snapshot(self) -> NDArray[np.float64]:
        """MuJoCo's ``mjSTATE_INTEGRATION`` (P,)."""
        return get_state(self._env.model, self._env.data)

    def restore(self, physics: NDArray[np.float64], row: int = 0) -> None:
        """Go back to a row of the episode last reset."""
        self._settle(np.asarray(physics, np.float64))
        self._rows = row

    def _settle(self, physics: NDArray[np.float64]) -> None:
        """Set a state, and compute what follows from it and from the model; the state itself stays as given."""
        model, data = self._env.model, self._env.data
        set_state(model, data, physics)
        mujoco.mj_forward(model, data)
        set_state(model, data, physics)  # the solver's warm start too
        self._observation = self._env._get_obs()

    def redress(self, look: Look) -> None:
        """Go on in another look."""
        self._drawing.put_on(look)

    def observe(self) -> Step:
        """The row as it is now; its reward is 0."""
        return self._row(0.0, success=False)

    def close(self) -> None:
        """Free the OpenGL context."""
        self._drawing.close()

    def _row(self, reward: float, success: bool) -> Step:
        """What is seen now."""
        now = np.concatenate([self._observation[:NOW], self._observation[-3:]])
        return Step(
            frame=self._drawing.frame(self._env.data, self._rows),
            state=now.astype(np.float32),
            physics=self.snapshot(),
            reward=reward,
            is_last=self._rows >= self.max_steps,
            is_terminal=False,
            success=success,
        )


def _with_visible_goal(kind: Any) -> Any:
    """A task whose observations tell the goal, drawn from the seed at each reset; as ``Meta-World/MT1`` has it."""
    env = kind()
    env._partially_observable = False
    env.__dict__.pop("sawyer_observation_space", None)  # it is kept, with bounds that clip the goal to zero
    env._freeze_rand_vec, env._set_task_called, env.seeded_rand_vec = False, True, True
    return env


@cache
def _weld_as_this_mujoco_does() -> None:
    """Meta-World writes the 11 numbers that a weld had in MuJoCo 3.3; later ones have 12, of which it knew 11."""

    def reset_mocap_welds(self: Any) -> None:
        if self.model.nmocap > 0 and self.model.eq_data is not None:
            welds = self.model.eq_type == mujoco.mjtEq.mjEQ_WELD
            self.model.eq_data[welds, :11] = [0, 0, 0, 0, 0, 0, -1, 0, 0, 0, 5]

    base: Any = sawyer_xyz_env.SawyerMocapBase
    base.reset_mocap_welds = reset_mocap_welds
