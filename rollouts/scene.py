"""A look put on a MuJoCo scene: camera, light, colours, distractors, patterns.

All but the sizes is changed in the scene that is about to be drawn (``mjvScene``) or in the renderer's textures, never
in the model that is simulated: so a stored trajectory can be seen in any look, its physics the same bit for bit.
Background is what cannot move (floor, walls, sky, tables); objects are all else.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable

import mujoco
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pvrpipe.rollouts.colours import paint_of
from pvrpipe.rollouts.variation import FACTORS, PLAIN, Look

COARSE = 8  # pixels of a texture that share one of a pattern, before it is smoothed
LEVEL = 0.1  # shorter than that, what is left of a direction once it is held level is none
SPEED = 0.15  # radians that a moving pattern drifts between two rows
SHAPES = (mujoco.mjtGeom.mjGEOM_SPHERE, mujoco.mjtGeom.mjGEOM_BOX, mujoco.mjtGeom.mjGEOM_CYLINDER)
SCALED = (
    mujoco.mjtGeom.mjGEOM_SPHERE,
    mujoco.mjtGeom.mjGEOM_CAPSULE,
    mujoco.mjtGeom.mjGEOM_ELLIPSOID,
    mujoco.mjtGeom.mjGEOM_CYLINDER,
    mujoco.mjtGeom.mjGEOM_BOX,
)  # a mesh has its size in its vertices
SKY = mujoco.mjtTexture.mjTEXTURE_SKYBOX

Vector = NDArray[np.float64]
Picture = NDArray[np.uint8]


class Dresser:
    """Puts looks on one model and the scenes drawn of it.

    Args:
        model: that is simulated; nothing of it changes but the sizes of what moves, and what its textures hold.
        upload: hands a texture of the model to the renderer, by its number.
    """

    def __init__(self, model: mujoco.MjModel, upload: Callable[[int], None]) -> None:
        self._model, self._upload = model, upload
        self._look, self._row, self._painted = PLAIN, 0, False
        self._away: float | None = None  # from the camera to what it looks at, fixed for an episode
        self._sizes = {
            name: getattr(model, name).copy() for name in ("geom_size", "geom_rbound", "geom_aabb")
        }
        self._textures = model.tex_data.copy()
        fixed = model.body_weldid[model.geom_bodyid] == 0
        self._fixed = fixed
        self._scaled = ~fixed & np.isin(model.geom_type, [int(kind) for kind in SCALED])
        floors = {
            int(t) for t in np.ravel(model.mat_texid[model.geom_matid[fixed & (model.geom_matid >= 0)]])
        }
        self._sky = [t for t in range(model.ntex) if model.tex_type[t] == SKY]
        self._behind = [*self._sky, *sorted(t for t in floors if t >= 0 and t not in self._sky)]

    @property
    def factors(self) -> frozenset[str]:
        """What this model can be varied in."""
        lacking = set()
        if not self._behind:
            lacking |= {"noise", "video"}
        if not self._model.ntex:
            lacking.add("texture")
        if not self._scaled.any():
            lacking.add("size")
        return frozenset(FACTORS) - lacking

    def put_on(self, look: Look) -> None:
        """Begin an episode in a look; before the simulation is reset, since the sizes are part of it."""
        self._look, self._row, self._away = look, 0, None
        for name, original in self._sizes.items():
            array = getattr(self._model, name)
            array[:] = original
            array[self._scaled] *= 1 + look["size"]
        self._paint(texture=True)

    def at_row(self, row: int) -> None:
        """The row that is drawn next; patterns move from row to row."""
        self._row = row
        if self._look["background_noise"] or self._look["background_video"]:
            self._paint(texture=False)

    def dress(self, data: mujoco.MjData, scene: mujoco.MjvScene) -> None:
        """Change a scene that is ready to be drawn."""
        if not self._look:
            return
        camera = scene.camera[0]
        if self._away is None:
            self._away = _distance_to_what_moves(self._model, data, camera)
        # Along the camera's axis, so that what follows a body goes on following it once it is turned.
        pivot = np.asarray(camera.pos, np.float64) + self._away * np.asarray(camera.forward, np.float64)
        self._colour(scene)
        self._light(scene, pivot)
        self._distract(scene, self._away)
        self._aim(scene, pivot)

    def _colour(self, scene: mujoco.MjvScene) -> None:
        look = self._look
        background = paint_of(look["background_hue"]), look["background_tint"]
        objects = paint_of(look["object_hue"]), look["object_tint"]
        for geom in scene.geoms[: scene.ngeom]:
            if geom.objtype != mujoco.mjtObj.mjOBJ_GEOM:
                continue
            paint, tint = background if self._fixed[geom.objid] else objects
            if tint:
                geom.rgba[:3] = (1 - tint) * geom.rgba[:3] + tint * paint

    def _light(self, scene: mujoco.MjvScene, pivot: Vector) -> None:
        """Brightness, and where the lights are: they go to the left or right around what is looked at."""
        brighter, tilt = 1 + self._look["light_intensity"], math.radians(self._look["light_tilt"])
        if brighter == 1 and not tilt:
            return
        turn = _rotation(_level(scene.camera[0]), tilt)
        for light in scene.lights[: scene.nlight]:
            for part in (light.ambient, light.diffuse, light.specular):
                part[:] = np.clip(part * brighter, 0, 1)
            if not light.headlight:
                light.dir[:] = turn @ light.dir
                light.pos[:] = pivot + turn @ (light.pos - pivot)

    def _distract(self, scene: mujoco.MjvScene, distance: float) -> None:
        """Bodies that nothing touches, around what the camera looks at; it sees them in the same place all episode."""
        camera, rng = scene.camera[0], self._look.rng(2)
        right, up = np.cross(camera.forward, camera.up), np.asarray(camera.up)
        for number in range(min(int(self._look["distractors"]), scene.maxgeom - scene.ngeom)):
            across, height, near = rng.uniform([-0.45, -0.3, 0.65], [0.45, 0.4, 1.2])
            size = distance * rng.uniform(0.02, 0.06, 3)
            paint = np.array([*colorsys.hsv_to_rgb(rng.random(), 0.8, 0.9), 1.0], np.float32)
            turn = _rotation(np.array([0.0, 0.0, 1.0]), rng.uniform(0, math.pi))
            place = camera.pos + near * distance * camera.forward + distance * (across * right + height * up)
            scene.ngeom += 1
            geom = scene.geoms[scene.ngeom - 1]
            mujoco.mjv_initGeom(geom, SHAPES[number % len(SHAPES)], size, place, turn.ravel(), paint)

    def _aim(self, scene: mujoco.MjvScene, pivot: Vector) -> None:
        look, wider = self._look, 1 + self._look["fov"]
        around, above = math.radians(look["camera_azimuth"]), math.radians(look["camera_elevation"])
        for camera in scene.camera:
            if around or above:
                right = np.cross(camera.forward, camera.up)
                turn = _rotation(np.array([0.0, 0.0, 1.0]), around) @ _rotation(right, -above)
                camera.pos[:] = pivot + turn @ (camera.pos - pivot)
                camera.forward[:] = turn @ camera.forward
                camera.up[:] = turn @ camera.up
            if wider != 1:
                camera.frustum_bottom *= wider
                camera.frustum_top *= wider
                camera.frustum_center *= wider
                camera.frustum_width *= wider

    def _paint(self, texture: bool) -> None:
        """Draw the textures of this look at this row, and hand on those that differ from what is there."""
        look, model = self._look, self._model
        shares = (
            look["texture"],
            look["background_noise"],
            look["background_video"],
            look["background_tint"],
        )
        if not any(shares) and not self._painted:
            return
        self._painted = any(shares)
        for number in range(model.ntex) if texture else self._behind:
            first, shape = model.tex_adr[number], _texture_shape(model, number)
            held = slice(first, first + math.prod(shape))
            picture = self._repainted(number, self._textures[held].reshape(shape))
            model.tex_data[held] = picture.ravel()
            self._upload(number)

    def _repainted(self, number: int, original: Picture) -> Picture:
        """A texture (H, W, channels) as the look has it at this row."""
        look, channels, size = self._look, original.shape[2], original.shape[1::-1]
        if channels < 3:  # a height or a mask: no picture
            return original
        picture = Image.fromarray(original[..., :3])
        if number in self._sky and look["background_tint"]:
            grey = np.asarray(picture.convert("L"), np.float32)[..., None]
            painted = np.clip(2 * grey * paint_of(look["background_hue"]), 0, 255).astype(np.uint8)
            picture = Image.blend(picture, Image.fromarray(painted), look["background_tint"])
        if number not in self._sky and look["texture"]:
            picture = Image.blend(picture, pattern(look.rng(3, number), size, 0.0), look["texture"])
        if number in self._behind and look["background_noise"]:
            noise = grain(look.rng(4, number, self._row), size)
            picture = Image.blend(picture, noise, look["background_noise"])
        if number in self._behind and look["background_video"]:
            moving = pattern(look.rng(5, number), size, SPEED * self._row)
            picture = Image.blend(picture, moving, look["background_video"])
        return np.concatenate([np.asarray(picture), original[..., 3:]], axis=2)


def pattern(rng: np.random.Generator, size: tuple[int, int], time: float) -> Image.Image:
    """A smooth pattern of colours of (W, H) pixels that drifts with time; waves of random lengths."""
    columns, rows = (max(2, pixels // COARSE) for pixels in size)
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32) * (2 * math.pi / columns)
    waves = np.zeros((rows, columns, 3), np.float32)
    for _ in range(4):
        fx, fy, drift = rng.uniform([-4, -4, 0.5], [4, 4, 2])
        for channel, phase in enumerate(rng.uniform(0, 2 * math.pi, 3)):
            waves[..., channel] += np.sin(fx * x + fy * y + phase + drift * time)
    coarse = (127.5 * (1 + waves / 4)).astype(np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR)


def grain(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Noise of (W, H) pixels, in blocks of a few."""
    columns, rows = (max(2, pixels // COARSE) for pixels in size)
    coarse = rng.integers(0, 256, (rows, columns, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST)


def _texture_shape(model: mujoco.MjModel, number: int) -> tuple[int, int, int]:
    return int(model.tex_height[number]), int(model.tex_width[number]), int(model.tex_nchannel[number])


def _distance_to_what_moves(model: mujoco.MjModel, data: mujoco.MjData, camera: mujoco.MjvGLCamera) -> float:
    """To the point on the camera's axis that is nearest to it; at least half the scene."""
    moving = np.flatnonzero(model.body_weldid > 0)
    middle = data.xipos[moving].mean(axis=0) if len(moving) else np.asarray(model.stat.center)
    forward = np.asarray(camera.forward, np.float64)
    return max(float((middle - camera.pos) @ forward), 0.5 * float(model.stat.extent))


def _level(camera: mujoco.MjvGLCamera) -> Vector:
    """Where a camera looks, held level; of one that looks straight down, where its up is."""
    for direction in (camera.forward, camera.up):
        level = np.array([direction[0], direction[1], 0.0])
        if np.linalg.norm(level) > LEVEL:
            return level
    return np.array([0.0, 1.0, 0.0])


def _rotation(axis: Vector, angle: float) -> Vector:
    """The matrix (3, 3) that turns about an axis; Rodrigues' formula."""
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    matrix: Vector = np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross
    return matrix
