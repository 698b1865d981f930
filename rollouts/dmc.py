"""The DeepMind Control Suite (Tassa et al. 2018, arXiv 1801.00690); the one file that loads MuJoCo.

Physics and task are driven through dm_control's own objects, so that rewards, observations and pictures
are the suite's. Its time limit is not used: how long an episode lasts is the collector's to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
from absl import logging
from numpy.typing import NDArray

from pvrpipe.rollouts.aims import AIMS
from pvrpipe.rollouts.environments import Forecast, pick_camera
from pvrpipe.rollouts.pixels import seen
from pvrpipe.rollouts.variation import PLAIN, Look
from pvrpipe.schemas.errors import SimulationError, UnknownNameError, one_line
from pvrpipe.schemas.records import Step

MEND_GL = (
    "install a renderer with `apt-get install libegl1 libgl1-mesa-dri` and check it with `pvrpipe doctor`"
)

try:
    import mujoco
    from dm_control import suite
    from dm_control.mujoco.engine import Camera
    from mujoco import rollout

    from pvrpipe.rollouts.scene import Dresser
except (ImportError, AttributeError, RuntimeError) as error:  # what a broken EGL raises while it is imported
    raise SimulationError(f"dm_control cannot be loaded ({one_line(error)}); {MEND_GL}") from error

EVERYTHING = (
    mujoco.mjtState.mjSTATE_INTEGRATION
)  # all that a step depends on, the solver's warm start included
MOVING = mujoco.mjtState.mjSTATE_FULLPHYSICS  # what a step changes, its warm start aside
UNENDING = 1000  # control steps of an episode where the task has no time limit of its own (lqr)
UNLIMITED = 1e9  # MuJoCo's bounds for an actuator without a range are ±1e10
ACTION_REPEAT = 2  # as the study and most work on pixels have it


@cache
def names() -> tuple[str, ...]:
    """All tasks of the suite, as ``dmc:<domain>-<task>``."""
    return tuple(f"dmc:{domain}-{task}" for domain, task in suite.ALL_TASKS)


def make(
    name: str, *, size: int, camera: int | str | None, action_repeat: int | None, max_steps: int | None
) -> SuiteEnvironment:
    """Build a task by its name."""
    if name not in names():
        raise UnknownNameError.among("environment", name, names(), hint="see `pvrpipe envs`")
    return SuiteEnvironment(name, size, camera, action_repeat or ACTION_REPEAT, max_steps)


class SuiteEnvironment:
    """One task of the suite; see :class:`pvrpipe.rollouts.environments.Environment`."""

    def __init__(
        self, name: str, size: int, camera: int | str | None, action_repeat: int, max_steps: int | None
    ) -> None:
        domain, _, task = name.removeprefix("dmc:").partition("-")
        # Seeded, for lqr draws its model when it is loaded; episodes seed the task again.
        env = _load(domain, task)
        self.name, self.size, self.action_repeat = name, size, action_repeat
        self._env, self._task, self._physics = env, env.task, env.physics
        self._aim = AIMS.get(name)
        self._substeps = round(env.control_timestep() / self._physics.timestep())
        self._scratch = self._physics.copy(
            share_model=True
        )  # where forecasts run, so that they touch nothing
        self._scratch.legacy_step = self._physics.legacy_step

        limit = env._step_limit if np.isfinite(env._step_limit) else UNENDING
        self.max_steps = max_steps or max(1, round(limit / action_repeat))
        self.control_timestep = env.control_timestep() * action_repeat
        spec = env.action_spec()
        unlimited = (np.abs(spec.minimum) > UNLIMITED) | (np.abs(spec.maximum) > UNLIMITED)
        self.action_low = np.where(unlimited, -1.0, spec.minimum).astype(np.float32)
        self.action_high = np.where(unlimited, 1.0, spec.maximum).astype(np.float32)
        self.state_names = _flat_names(env.reset().observation)
        self.physics_width = int(mujoco.mj_stateSize(self._model, EVERYTHING))
        self.discrete = self.has_success = False
        self.versions = {package: version(package) for package in ("dm_control", "mujoco", "numpy")}

        model = self._physics.model
        self.cameras = tuple(model.id2name(i, "camera") or str(i) for i in range(model.ncam))
        self.camera = pick_camera(camera, self.cameras, self.cameras[0], name)
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        self._camera: Camera | None = None
        self._rows, self._look = 0, PLAIN
        self._dresser = Dresser(self._model, self._upload)
        self.factors = self._dresser.factors

    def renderer(self) -> str:
        """Backend, vendor and version of the OpenGL that draws, e.g. ``egl: llvmpipe (LLVM 15) Mesa 22.3``."""
        from dm_control import _render
        from OpenGL import GL

        self._open_camera()
        with self._physics.contexts.gl.make_current() as context:
            parts = [context.call(GL.glGetString, name) for name in (GL.GL_RENDERER, GL.GL_VERSION)]
        return f"{_render.BACKEND}: " + " ".join(part.decode() for part in parts)

    def reset(self, seed: int, look: Look = PLAIN) -> Step:
        """Begin the episode of that seed in a look; its first row."""
        self.redress(look)
        self._task.random.seed([seed & 0xFFFFFFFF, seed >> 32])  # it takes words of 32 bits
        observation = self._env.reset().observation
        self._rows = 0
        return self._row(observation, reward=0.0, terminal=False)

    def step(self, action: NDArray[np.float32]) -> Step:
        """Take an action (A,), repeated ``action_repeat`` times; the row it arrives at."""
        action = np.clip(np.asarray(action, np.float32), self.action_low, self.action_high)
        reward, terminal = 0.0, False
        for _ in range(self.action_repeat):
            self._task.before_step(action, self._physics)
            self._physics.step(self._substeps)
            self._task.after_step(self._physics)
            reward += float(self._task.get_reward(self._physics))
            discount = self._task.get_termination(self._physics)
            if discount is not None:
                terminal = discount == 0
                break
        self._rows += 1
        return self._row(self._task.get_observation(self._physics), reward, terminal)

    def snapshot(self) -> NDArray[np.float64]:
        """MuJoCo's ``mjSTATE_INTEGRATION`` (P,)."""
        state = np.empty(self.physics_width, np.float64)
        mujoco.mj_getState(self._model, self._physics.data.ptr, state, EVERYTHING)
        return state

    def restore(self, physics: NDArray[np.float64], row: int = 0) -> None:
        """Go back to a row of the episode last reset; what follows is the same, bit for bit.

        What an episode draws into the model itself (where a target lies, say) comes with its ``reset``.
        """
        self._settle(self._physics, np.asarray(physics, np.float64))
        self._rows = row

    def redress(self, look: Look) -> None:
        """Go on in another look."""
        if look or self._look:
            self._open_camera()  # textures are handed to a renderer
            self._look = look
            self._dresser.put_on(look)

    def observe(self) -> Step:
        """The row as it is now; its reward is 0."""
        return self._row(self._task.get_observation(self._physics), reward=0.0, terminal=False)

    def evaluate(
        self, actions: NDArray[np.float32], reward_interval: int = 1, coarseness: int = 1
    ) -> Forecast:
        """Look ahead along ``actions`` (N, H, A); see :class:`pvrpipe.rollouts.environments.Foreseeing`.

        The physics of all plans are one call of MuJoCo's; only where a reward is read is Python in the loop.
        """
        actions = np.clip(actions, self.action_low, self.action_high)
        steps = max(1, self._substeps * self.action_repeat // coarseness)
        states = self._foreseen(actions, steps)
        read = [*range(reward_interval, actions.shape[1], reward_interval), actions.shape[1]]
        weights = self.action_repeat * np.diff([0, *read])
        returns, energies = np.zeros(len(actions)), np.zeros(len(actions))
        for n, trajectory in enumerate(states):
            for h, weight in zip(read, weights, strict=True):
                self._go_to(trajectory[h * steps - 1], actions[n, h - 1])
                returns[n] += weight * self._worth()
            energies[n] = self._energy()
        return Forecast(returns, energies)

    def close(self) -> None:
        """Free the OpenGL context."""
        self._camera = None
        self._physics.free()

    @property
    def _model(self) -> mujoco.MjModel:
        return self._physics.model.ptr

    def _settle(self, physics: Any, state: NDArray[np.float64]) -> None:
        """Set a state, and what dm_control keeps in step with it (``mj_step1``, as after its own steps)."""
        mujoco.mj_setState(self._model, physics.data.ptr, state, EVERYTHING)
        mujoco.mj_step1(self._model, physics.data.ptr)

    def _foreseen(self, actions: NDArray[np.float32], steps: int) -> NDArray[np.float64]:
        """States (N, H × steps, P') along actions (N, H, A), each taken for so many steps of the physics."""
        model, physics, scratch = self._model, self._physics.data.ptr, self._scratch.data.ptr
        mujoco.mj_setState(model, scratch, self.snapshot(), EVERYTHING)
        start = np.empty(mujoco.mj_stateSize(model, MOVING), np.float64)
        mujoco.mj_getState(model, physics, start, MOVING)
        timestep = model.opt.timestep
        model.opt.timestep = timestep * self._substeps * self.action_repeat / steps
        try:
            states: NDArray[np.float64] = rollout.rollout(
                model,
                scratch,
                np.repeat(start[None], len(actions), 0),
                np.repeat(actions.astype(np.float64), steps, 1),
                initial_warmstart=np.repeat(physics.qacc_warmstart[None], len(actions), 0),
            )[0]
        finally:
            model.opt.timestep = timestep
        return states

    def _go_to(self, state: NDArray[np.float64], action: NDArray[np.float32]) -> None:
        """Where the scratch simulation would be, had it come by itself."""
        data = self._scratch.data.ptr
        mujoco.mj_setState(self._model, data, state, MOVING)
        data.ctrl[:] = action
        mujoco.mj_step1(self._model, data)

    def _worth(self) -> float:
        """What a planner is told that the scratch simulation's state is worth."""
        reward = float(self._task.get_reward(self._scratch))
        return reward + self._aim(self._scratch) if self._aim else reward

    def _energy(self) -> float:
        """Potential plus kinetic energy of the scratch simulation, in joule."""
        data = self._scratch.data.ptr
        mujoco.mj_energyPos(self._model, data)
        mujoco.mj_energyVel(self._model, data)
        return float(data.energy.sum())

    def _row(self, observation: Mapping[str, NDArray[np.float64]], reward: float, terminal: bool) -> Step:
        """What is seen now."""
        state = np.concatenate([np.ravel(value) for value in observation.values()]).astype(np.float32)
        return Step(
            frame=self._render(),
            state=state,
            physics=self.snapshot(),
            reward=reward,
            is_last=terminal or self._rows >= self.max_steps,
            is_terminal=terminal,
        )

    def _render(self) -> NDArray[np.uint8]:
        """The frame (H, W, 3) of the current state."""
        camera = self._open_camera()
        self._dresser.at_row(self._rows)
        return seen(np.ascontiguousarray(camera.render()), self._look, self._rows)

    def _upload(self, texture: int) -> None:
        """Hand a texture of the model to the renderer."""
        contexts = self._physics.contexts
        with contexts.gl.make_current() as context:
            context.call(mujoco.mjr_uploadTexture, self._model, contexts.mujoco.ptr, texture)

    def _dress(self, _: Any, scene: Any) -> None:
        """Called by the camera, once its scene is ready to be drawn."""
        self._dresser.dress(self._physics.data.ptr, scene.ptr)

    def _open_camera(self) -> Camera:
        """Create the OpenGL context and draw a first frame, once; that is where renderers fail, and compile.

        A camera kept open also saves the allocation of its scene at every frame.
        """
        if self._camera is not None:
            return self._camera
        try:
            number = self.cameras.index(self.camera)
            camera = Camera(self._physics, self.size, self.size, number, scene_callback=self._dress)
            camera.render()
        except Exception as error:  # PyOpenGL, EGL and MuJoCo each raise types of their own
            raise SimulationError(f"the renderer does not start ({one_line(error)}); {MEND_GL}") from error
        self._camera = camera
        return camera


def _load(domain: str, task: str) -> Any:
    """Load a task, without the parser's notes on deprecated attributes in the suite's own models."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        return suite.load(domain, task, task_kwargs={"random": 0})
    finally:
        logging.set_verbosity(verbosity)


def _flat_names(observation: Mapping[str, NDArray[np.float64]]) -> tuple[str, ...]:
    """Names of the flattened observation, e.g. ``orientation[0]``."""
    return tuple(
        f"{key}[{i}]" if np.size(value) > 1 else key
        for key, value in observation.items()
        for i in range(np.size(value))
    )
