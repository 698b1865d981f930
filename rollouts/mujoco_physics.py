"""MuJoCo where dm_control is not between: states set and read, and frames drawn in any look."""

from __future__ import annotations

from importlib import import_module

import mujoco
import numpy as np
from numpy.typing import NDArray

from pvrpipe.rollouts.pixels import seen
from pvrpipe.rollouts.scene import Dresser
from pvrpipe.rollouts.variation import PLAIN, Look
from pvrpipe.schemas.errors import SimulationError, one_line

EVERYTHING = (
    mujoco.mjtState.mjSTATE_INTEGRATION
)  # all that a step depends on, the solver's warm start included
UPRIGHT = 1e-3  # a camera that looks straight down has no up of the world
MEND_GL = (
    "install a renderer with `apt-get install libegl1 libgl1-mesa-dri` and check it with `pvrpipe doctor`"
)


def get_state(model: mujoco.MjModel, data: mujoco.MjData) -> NDArray[np.float64]:
    """The full physics state (P,)."""
    state = np.empty(mujoco.mj_stateSize(model, EVERYTHING), np.float64)
    mujoco.mj_getState(model, data, state, EVERYTHING)
    return state


def set_state(model: mujoco.MjModel, data: mujoco.MjData, physics: NDArray[np.float64]) -> None:
    """Go to a physics state (P,); what follows from positions and velocities is not computed yet."""
    mujoco.mj_setState(model, data, physics, EVERYTHING)


class Drawing:
    """Frames of one model from one of its cameras; the OpenGL context is opened with the first.

    Args:
        model: that is drawn.
        size: pixels of a side.
        camera: its name.
    """

    def __init__(self, model: mujoco.MjModel, size: int, camera: str) -> None:
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        self._model, self._size, self._camera = model, size, camera
        self._look = PLAIN
        self._opened: mujoco.Renderer | None = None
        self._dresser = Dresser(model, self._upload)
        self.factors = self._dresser.factors

    def put_on(self, look: Look) -> None:
        """Begin an episode in a look; before the simulation is reset."""
        if look or self._look:
            self._look = look
            self._dresser.put_on(look)

    def frame(self, data: mujoco.MjData, row: int) -> NDArray[np.uint8]:
        """The frame (size, size, 3) of a state, at a row of its episode."""
        renderer = self._open()
        self._dresser.at_row(row)
        renderer.update_scene(data, self._camera)
        for camera in renderer.scene.camera:
            if camera.up[2] < -UPRIGHT:  # some of Meta-World's hang head down
                camera.up[:] = -np.asarray(camera.up)
        self._dresser.dress(data, renderer.scene)
        return seen(np.ascontiguousarray(renderer.render()), self._look, row)

    def renderer(self) -> str:
        """Backend, vendor and version of the OpenGL that draws, e.g. ``egl: llvmpipe (LLVM 15) Mesa 22.3``."""
        gl = import_module("OpenGL.GL")  # chosen by MUJOCO_GL, which is set by now
        backend = import_module("dm_control._render").BACKEND
        self._open()._gl_context.make_current()
        return f"{backend}: " + " ".join(
            gl.glGetString(name).decode() for name in (gl.GL_RENDERER, gl.GL_VERSION)
        )

    def close(self) -> None:
        """Free the OpenGL context."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _open(self) -> mujoco.Renderer:
        if self._opened is None:
            try:
                self._opened = mujoco.Renderer(self._model, self._size, self._size)
            except Exception as error:  # PyOpenGL, EGL and MuJoCo each raise types of their own
                raise SimulationError(
                    f"the renderer does not start ({one_line(error)}); {MEND_GL}"
                ) from error
        return self._opened

    def _upload(self, texture: int) -> None:
        """Hand a texture of the model to the renderer."""
        renderer = self._open()
        renderer._gl_context.make_current()
        mujoco.mjr_uploadTexture(self._model, renderer._mjr_context, texture)
