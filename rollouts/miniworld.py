"""Miniworld (Chevalier-Boisvert et al. 2023, arXiv 2306.13831): rooms seen by an agent that walks in them.

``miniworld:PickupObjects`` is the study's. Actions are one of A. Off-screen by EGL, no display is needed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pyglet
from numpy.typing import NDArray

pyglet.options["headless"] = True  # before Miniworld opens its window, which it does when it is imported

import miniworld  # noqa: E402, F401 (registers its environments)
from miniworld.entity import Agent, Box, Entity, MeshEnt  # noqa: E402
from miniworld.objmesh import ObjMesh  # noqa: E402
from pyglet.libs.egl import egl  # noqa: E402

from pvrpipe.rollouts.colours import paint_of  # noqa: E402
from pvrpipe.rollouts.gym import UNENDING, GymEnvironment, made, options_of  # noqa: E402
from pvrpipe.rollouts.pixels import IMAGE_FACTORS  # noqa: E402
from pvrpipe.rollouts.variation import PLAIN, Look  # noqa: E402
from pvrpipe.schemas.errors import SimulationError, UnknownNameError, one_line  # noqa: E402
from pvrpipe.schemas.records import Step  # noqa: E402

PREFIX, SUFFIX = "MiniWorld-", "-v0"
FACTORS = IMAGE_FACTORS | {"background", "colour", "size", "camera", "fov", "lighting"}


def names() -> tuple[str, ...]:
    """All worlds, as ``miniworld:<World>``, the study's first."""
    ids = [
        id_.removeprefix(PREFIX).removesuffix(SUFFIX) for id_ in gymnasium.registry if id_.startswith(PREFIX)
    ]
    return tuple(f"miniworld:{name}" for name in dict.fromkeys(["PickupObjects", *sorted(ids)]))


def make(
    name: str, *, size: int, camera: int | str | None, action_repeat: int | None, max_steps: int | None
) -> RoomEnvironment:
    """Build a world by its name."""
    world, options = options_of(name.removeprefix("miniworld:"))
    if f"miniworld:{world}" not in names():
        raise UnknownNameError.among("environment", f"miniworld:{world}", names(), hint="see `pvrpipe envs`")
    with others_context_kept():
        env = made(f"{PREFIX}{world}{SUFFIX}", name, {"obs_width": size, "obs_height": size, **options})
        return RoomEnvironment(name, env, size, camera, action_repeat or 1, max_steps)


class LookingAside(Agent):
    """An agent whose camera is turned from where it walks, by ``cam_yaw`` radians."""

    cam_yaw: float

    @property
    def cam_dir(self) -> NDArray[np.float64]:
        """Where the camera looks (3,)."""
        x, y, z = super().cam_dir
        cos, sin = math.cos(self.cam_yaw), math.sin(self.cam_yaw)
        return np.array([cos * x + sin * z, y, cos * z - sin * x])


@contextlib.contextmanager
def others_context_kept() -> Iterator[None]:
    """Make the OpenGL context current again that was: MuJoCo's renderers do not ask whether theirs still is."""
    display, context = egl.eglGetCurrentDisplay(), egl.eglGetCurrentContext()
    drawn, read = (egl.eglGetCurrentSurface(which) for which in (egl.EGL_DRAW, egl.EGL_READ))
    try:
        yield
    finally:
        if context:
            egl.eglMakeCurrent(display, drawn, read, context)


class RoomEnvironment(GymEnvironment):
    """One world; see :class:`pvrpipe.rollouts.environments.Environment`.

    A look is put on once the world is made: what stands where does not depend on it.
    """

    renders = False  # an observation is the picture

    def __init__(
        self,
        name: str,
        env: gymnasium.Env[Any, Any],
        size: int,
        camera: int | str | None,
        action_repeat: int,
        max_steps: int | None,
    ) -> None:
        world: Any = env.unwrapped
        self._world = world
        usual = world.max_episode_steps if math.isfinite(world.max_episode_steps) else UNENDING
        steps = max_steps or max(1, round(usual / action_repeat))
        super().__init__(name, env, size, camera, action_repeat, steps)
        self.factors = FACTORS
        self.state_names = ("agent_x", "agent_z", "agent_cos", "agent_sin", "things_left", "carrying")
        self._meshes: dict[int, NDArray[np.float32]] = {}  # colours of the library's own meshes, as they were

    def packages(self) -> tuple[str, ...]:
        """Whose versions decide what happens and how it looks."""
        return ("miniworld", "pyglet", *super().packages())

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        """This world's OpenGL context is current."""
        with others_context_kept():
            self._world.shadow_window.switch_to()
            yield

    def reset(self, seed: int, look: Look = PLAIN) -> Step:
        """Begin the episode of that seed in a look; its first row."""
        with self._drawing():
            return super().reset(seed, look)

    def step(self, action: NDArray[np.float32]) -> Step:
        """Take an action (A,), repeated ``action_repeat`` times; the row it arrives at."""
        with self._drawing():
            return super().step(action)

    def close(self) -> None:
        """Free the renderer."""
        with self._drawing():
            super().close()

    def renderer(self) -> str:
        """Vendor and version of the OpenGL that draws."""
        try:
            with self._drawing():
                about = self._world.shadow_window.context.get_info()
        except Exception as error:  # pyglet's own types
            raise SimulationError(
                f"the renderer does not start ({one_line(error)}); check it with `pvrpipe doctor`"
            ) from error
        return f"egl: {about.get_renderer()} {about.get_version()}"

    def state(self, _: Any) -> NDArray[np.float32]:
        """Where the agent is and looks, and how many things are left to find (S,)."""
        agent = self._world.agent
        left = sum(1 for _ in self._things())
        place = [agent.pos[0], agent.pos[2], np.cos(agent.dir), np.sin(agent.dir)]
        return np.array([*place, left, agent.carrying is not None], np.float32)

    def picture(self, observation: Any) -> NDArray[np.uint8]:
        """What the agent sees."""
        picture: NDArray[np.uint8] = observation["obs"] if isinstance(observation, dict) else observation
        return picture

    def dressed(self, observation: Any) -> Any:
        """Put the look on the world that was made, and see it again."""
        look, world = self._look, self._world
        self._recolour_meshes(0.0, 0.0)
        if not look:
            return observation
        world.agent.__class__, world.agent.cam_yaw = LookingAside, math.radians(look["camera_azimuth"])
        world.agent.cam_pitch -= look["camera_elevation"]
        world.agent.cam_height *= 1 + look["camera_elevation"] / 90
        world.agent.cam_fov_y *= 1 + look["fov"]
        self._light()
        sky = look["background_tint"]
        world.sky_color = (1 - sky) * np.asarray(world.sky_color) + sky * paint_of(look["background_hue"])
        self._recolour_meshes(look["object_hue"], look["object_tint"])
        for thing in self._things():
            self._dress_thing(thing)
        world._render_static()
        return world.render_obs()

    def _light(self) -> None:
        """Brightness, and where the light comes from.

        Miniworld adds a 1 to each number of ``light_pos`` where it means to append one, so that OpenGL takes it for
        the direction of a light that is far away; that direction is turned here.
        """
        look, world = self._look, self._world
        brighter, tilt = 1 + look["light_intensity"], math.radians(look["light_tilt"])
        x, y, z = np.asarray(world.light_pos) + 1
        cos, sin = math.cos(tilt), math.sin(tilt)
        world.light_pos = np.array([x, cos * y - sin * z, sin * y + cos * z]) - 1
        world.light_color = np.clip(np.asarray(world.light_color) * brighter, 0, 1)
        world.light_ambient = np.clip(np.asarray(world.light_ambient) * brighter, 0, 1)

    def _things(self) -> Iterator[Entity]:
        return (entity for entity in self._world.entities if not isinstance(entity, Agent))

    def _dress_thing(self, thing: Entity) -> None:
        """Size and colour; meshes share their colours, see :meth:`_recolour_meshes`."""
        larger, tint = 1 + self._look["size"], self._look["object_tint"]
        thing.radius, thing.height = thing.radius * larger, thing.height * larger
        if isinstance(thing, MeshEnt):
            thing.scale *= larger
        elif isinstance(thing, Box):
            thing.size = thing.size * larger
            thing.color_vec = (1 - tint) * thing.color_vec + tint * paint_of(self._look["object_hue"])

    def _recolour_meshes(self, hue: float, tint: float) -> None:
        """The colours of all meshes that are loaded; the library keeps one of each for all worlds."""
        for part in (vertices for mesh in ObjMesh.cache.values() for vertices in mesh.vlists):
            original = self._meshes.setdefault(id(part), np.array(part.colors, np.float32))
            painted = (1 - tint) * original.reshape(-1, 3) + tint * paint_of(hue)
            part.colors = painted.ravel().tolist() if tint else original.tolist()
