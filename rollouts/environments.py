"""What an environment is here, and how one is made by name.

Importing this module loads no simulator: the choice of an OpenGL backend must come first, and most
commands never need one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from types import ModuleType
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pvrpipe.schemas.errors import UnknownNameError
from pvrpipe.schemas.records import Step

DEFAULT_ENVIRONMENT = "dmc:pendulum-swingup"
FAMILIES = {"dmc": "pvrpipe.rollouts.dmc"}  # prefix of a name -> the one module that loads its simulator


class Forecast(NamedTuple):
    """What N sequences of actions would lead to, had they been taken from here."""

    returns: NDArray[np.float64]  # (N,) sum of rewards, one per action
    energies: NDArray[np.float64]  # (N,) mechanical energy in joule where each sequence ends


class Environment(Protocol):
    """A simulated task, observed as frames; one row of an episode per call.

    Actions are in the environment's own units, float32 (A,), and are clipped to the bounds.
    """

    name: str
    size: int
    camera: str | int
    action_repeat: int
    max_steps: int  # transitions after which time runs out
    cameras: tuple[str, ...]
    action_low: NDArray[np.float32]  # (A,)
    action_high: NDArray[np.float32]  # (A,)
    state_names: tuple[str, ...]  # (S,)
    physics_width: int  # P
    control_timestep: float  # seconds between two rows
    versions: dict[str, str]  # of the libraries that decide the physics and the picture

    def renderer(self) -> str:
        """The OpenGL implementation that draws the frames."""

    def reset(self, seed: int) -> Step:
        """Begin the episode of that seed; its first row."""

    def step(self, action: NDArray[np.float32]) -> Step:
        """Take an action (A,), repeated ``action_repeat`` times; the row it arrives at."""

    def snapshot(self) -> NDArray[np.float64]:
        """The full physics state (P,), for :meth:`restore`."""

    def restore(self, physics: NDArray[np.float64], row: int = 0) -> None:
        """Go back to a row of the episode last reset; what follows is the same, bit for bit."""

    def evaluate(self, actions: NDArray[np.float32]) -> Forecast:
        """Look ahead along ``actions`` (N, H, A) without rendering and without moving the episode."""

    def close(self) -> None:
        """Free the renderer."""


def list_environments() -> tuple[str, ...]:
    """The names of all environments, e.g. ``dmc:pendulum-swingup``."""
    return tuple(name for prefix in FAMILIES for name in _family(prefix).names())


def make_environment(
    name: str = DEFAULT_ENVIRONMENT,
    size: int = 256,
    camera: int | str = 0,
    action_repeat: int = 2,
    max_steps: int | None = None,
) -> Environment:
    """Build an environment by name.

    Args:
        name: as listed by :func:`list_environments`.
        size: pixels of a side of the square frames.
        camera: number or name of a camera of the model.
        action_repeat: how often each action is applied; rewards are summed.
        max_steps: transitions per episode; None takes the task's own time limit.

    Raises:
        UnknownNameError: no such environment or camera; the message names the nearest.
        InvalidValueError: a number outside what it may be.
        SimulationError: the simulator or its renderer cannot be loaded.
    """
    prefix, _, task = name.partition(":")
    if prefix not in FAMILIES or not task:
        raise UnknownNameError.among("environment", name, list_environments(), hint="see `pvrpipe envs`")
    make: Callable[..., Environment] = _family(prefix).make
    return make(name, size=size, camera=camera, action_repeat=action_repeat, max_steps=max_steps)


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


def _family(prefix: str) -> ModuleType:
    """The module that knows the environments of a prefix."""
    choose_backend()
    return import_module(FAMILIES[prefix])
