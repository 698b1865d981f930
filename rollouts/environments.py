"""What an environment is here, and how one is made by name.

Importing this module loads no simulator: the choice of an OpenGL backend must come first, and most
commands never need one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pvrpipe.rollouts.patience import not_for_ever
from pvrpipe.rollouts.variation import PLAIN, Look
from pvrpipe.schemas.errors import (
    InvalidValueError,
    MissingExtraError,
    PvrpipeError,
    SimulationError,
    UnknownNameError,
    one_line,
)
from pvrpipe.schemas.records import Step

DEFAULT_ENVIRONMENT = "dmc:pendulum-swingup"
ENTRY_POINTS = "pvrpipe.envs"
MOST_REPEATS, MOST_STEPS = 1_000, 1_000_000  # what more would ask for is a mistake
SIZES = (16, 2048)  # pixels


class Forecast(NamedTuple):
    """What N sequences of actions would lead to, had they been taken from here."""

    returns: NDArray[np.float64]  # (N,) sum of rewards, and of what else the planner is to aim at
    energies: NDArray[np.float64]  # (N,) mechanical energy in joule where each sequence ends


class Environment(Protocol):
    """A simulated task, observed as frames; one row of an episode per call.

    Actions are float32 (A,), in the environment's own units and clipped to the bounds; where they are
    ``discrete``, one-hot.
    """

    name: str
    size: int
    camera: str | int
    action_repeat: int
    max_steps: int  # transitions after which time runs out
    cameras: tuple[str, ...]
    action_low: NDArray[np.float32]  # (A,)
    action_high: NDArray[np.float32]  # (A,)
    discrete: bool
    state_names: tuple[str, ...]  # (S,); empty where the environment shows no state
    physics_width: int  # P; 0 where the simulator cannot be set to a state
    has_success: bool  # its rows say whether the task is solved
    factors: frozenset[str]  # of pvrpipe.rollouts.variation that it can vary
    control_timestep: float  # seconds between two rows
    versions: dict[str, str]  # of the libraries that decide the physics and the picture

    def renderer(self) -> str:
        """What draws the frames, e.g. the OpenGL implementation."""

    def reset(self, seed: int, look: Look = PLAIN) -> Step:
        """Begin the episode of that seed in a look; its first row."""

    def step(self, action: NDArray[np.float32]) -> Step:
        """Take an action (A,), repeated ``action_repeat`` times; the row it arrives at."""

    def close(self) -> None:
        """Free the renderer."""


@runtime_checkable
class Restorable(Protocol):
    """An environment whose simulator can be set to a state."""

    def snapshot(self) -> NDArray[np.float64]:
        """The full physics state (P,), for :meth:`restore`."""

    def restore(self, physics: NDArray[np.float64], row: int = 0) -> None:
        """Go back to a row of the episode last reset; what follows is the same, bit for bit."""

    def redress(self, look: Look) -> None:
        """Go on with the episode in another look; :meth:`restore` a row before it is observed."""

    def observe(self) -> Step:
        """The row as it is now; its reward is 0, for nothing has arrived."""


@runtime_checkable
class Foreseeing(Protocol):
    """An environment that can look ahead."""

    def evaluate(
        self, actions: NDArray[np.float32], reward_interval: int = 1, coarseness: int = 1
    ) -> Forecast:
        """Look ahead along ``actions`` (N, H, A) without rendering and without moving the episode.

        Args:
            actions: N plans of H actions.
            reward_interval: actions from one reading of the reward to the next, which stands for all of them.
            coarseness: how many times fewer, and longer, the steps of the physics may be.
        """


@runtime_checkable
class Scripted(Protocol):
    """An environment whose library knows how its task is done."""

    def scripted_action(self) -> NDArray[np.float32]:
        """What the library's own policy does now (A,)."""


class Family(Protocol):
    """Environments that share a prefix: what an entry point of the group ``pvrpipe.envs`` names."""

    def names(self) -> tuple[str, ...]:
        """All of them, prefix included."""

    def make(
        self,
        name: str,
        *,
        size: int,
        camera: int | str | None,
        action_repeat: int | None,
        max_steps: int | None,
    ) -> Environment:
        """Build one; None stands for what is usual there."""


@dataclass(frozen=True)
class Origin:
    """Where a family comes from."""

    module: str  # imported when one of its names is first asked for
    extra: str | None = None  # of pvrpipe, that installs what it needs

    def load(self, prefix: str) -> Family:
        """Import the family.

        Raises:
            MissingExtraError: what it needs is not installed.
        """
        choose_backend()
        try:
            family: Any = import_module(self.module)
        except ModuleNotFoundError as error:
            if self.extra is None:
                raise
            raise MissingExtraError(
                f"{prefix}:* needs {error.name}, which is not installed; pip install 'pvrpipe[{self.extra}]'"
            ) from error
        return family


FAMILIES: dict[str, Origin] = {
    "dmc": Origin("pvrpipe.rollouts.dmc"),
    "metaworld": Origin("pvrpipe.rollouts.metaworld", "metaworld"),
    "miniworld": Origin("pvrpipe.rollouts.miniworld", "miniworld"),
    "maniskill": Origin("pvrpipe.rollouts.maniskill", "maniskill"),
    "ale": Origin("pvrpipe.rollouts.ale", "atari"),
    "gym": Origin("pvrpipe.rollouts.gym"),
}


def list_environments(prefix: str | None = None) -> tuple[str, ...]:
    """The names of all environments that are installed, e.g. ``dmc:pendulum-swingup``; or of one prefix."""
    found: list[str] = []
    for known in [prefix] if prefix else prefixes():
        with suppress(MissingExtraError):
            found += _family(known).names()
    return tuple(found)


def missing_families() -> dict[str, str]:
    """Prefix → what to do, for families whose libraries are not installed, or do not load."""
    missing = {}
    for prefix in prefixes():
        try:
            _family(prefix)
        except PvrpipeError as error:
            missing[prefix] = one_line(error)
    return missing


def prefixes() -> tuple[str, ...]:
    """What a name may begin with: ours, and those of other packages by entry point."""
    others = (point.name for point in entry_points(group=ENTRY_POINTS))
    return tuple(dict.fromkeys([*FAMILIES, *others]))


def make_environment(
    name: str = DEFAULT_ENVIRONMENT,
    size: int = 256,
    camera: int | str | None = None,
    action_repeat: int | None = None,
    max_steps: int | None = None,
) -> Environment:
    """Build an environment by name.

    Args:
        name: as listed by :func:`list_environments`.
        size: pixels of a side of the square frames.
        camera: number or name of a camera of the model; None takes what is usual there.
        action_repeat: how often each action is applied; rewards are summed. None takes what is usual there.
        max_steps: transitions per episode; None takes the task's own time limit.

    Raises:
        UnknownNameError: no such environment or camera; the message names the nearest.
        InvalidValueError: a number outside what it may be.
        MissingExtraError: the environment's library is not installed.
        SimulationError: the simulator or its renderer cannot be loaded.
    """
    prefix, _, task = name.partition(":")
    if ":" in name and prefix not in prefixes():
        raise UnknownNameError.among(
            "family of environments", prefix, prefixes(), hint=f"of '{name}'; see `pvrpipe envs`"
        )
    if prefix not in prefixes() or not task:
        others = (f"{known}:" for known in prefixes() if known != prefix)
        valid = [*list_environments(prefix if prefix in prefixes() else "dmc"), *others]
        raise UnknownNameError.among("environment", name, valid, hint="see `pvrpipe envs`")
    if not SIZES[0] <= size <= SIZES[1]:
        raise InvalidValueError(
            f"--size is {size}; a frame has {SIZES[0]} to {SIZES[1]} pixels a side, e.g. 256"
        )
    for option, value, most in (
        ("--action-repeat", action_repeat, MOST_REPEATS),
        ("--max-steps", max_steps, MOST_STEPS),
    ):
        if value is not None and not 1 <= value <= most:
            raise InvalidValueError(f"{option} is {value}; give 1 to {most:,}")
    make: Callable[..., Environment] = _family(prefix).make
    try:
        with not_for_ever(name):
            made = make(name, size=size, camera=camera, action_repeat=action_repeat, max_steps=max_steps)
    except Exception as error:
        if prefix in FAMILIES or isinstance(error, PvrpipeError):
            raise
        raise SimulationError(f"{name} cannot be made ({one_line(error)[:200]}); ask who made it") from error
    _check_bounds(made)
    return made


def _check_bounds(environment: Environment) -> None:
    """Refuse actions that nothing could be drawn from."""
    low, high = np.asarray(environment.action_low), np.asarray(environment.action_high)
    if low.shape != high.shape or low.ndim != 1 or not len(low) or not np.isfinite([low, high]).all():
        raise InvalidValueError(
            f"{environment.name} has actions between {low.tolist()} and {high.tolist()}; they must be as many finite "
            "bounds of each kind, at least one: wrap it"
        )


def pick_camera(camera: int | str | None, cameras: tuple[str, ...], usual: str, environment: str) -> str:
    """The name of a camera given by number or name, so that both mean the same store.

    Raises:
        UnknownNameError: there is no such camera; the message lists those there are.
    """
    if camera is None:
        return usual
    if isinstance(camera, int) or camera.isdecimal():
        if 0 <= int(camera) < len(cameras):
            return cameras[int(camera)]
    elif camera in cameras:
        return camera
    listed = ", ".join(f"{i} ({name})" for i, name in enumerate(cameras))
    raise UnknownNameError(f"{environment} has no camera '{camera}'; it has {listed}")


def choose_backend() -> None:
    """Choose how MuJoCo renders, unless the user has; must come before MuJoCo is imported.

    One llvmpipe thread per process renders as many frames as two, so workers scale by processes.
    """
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("LP_NUM_THREADS", "1")
    # Mesa's software renderer and triton, which torch imports when it likes, each bring an LLVM. Triton's
    # loaded first, both work; Mesa's first, the process dies of a segmentation fault (docs/LOG.md).
    with suppress(ImportError):
        import_module("triton")


def _family(prefix: str) -> Family:
    """What knows the environments of a prefix."""
    if prefix in FAMILIES:
        return FAMILIES[prefix].load(prefix)
    (point,) = list(entry_points(group=ENTRY_POINTS, name=prefix))[:1]
    choose_backend()
    try:
        family: Family = point.load()
    except Exception as error:  # somebody else's package: all that can be said is that it does not load
        raise SimulationError(
            f"{prefix}:* ({point.value}) cannot be loaded ({one_line(error)}); install its package again"
        ) from error
    return family
