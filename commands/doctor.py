"""``pvrpipe doctor``: what pvrpipe needs of a machine, tried for real."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pvrpipe.commands.shared_ray import shared_ray
from pvrpipe.schemas.errors import one_line

GIB = 2**30
DISK_WANTED = 5 * GIB


@dataclass(frozen=True)
class Check:
    """One thing that was tried."""

    check: str
    ok: bool
    found: str
    mend: str  # the command that mends it
    needed: bool  # false: pvrpipe is useful without


def examine(root: Path) -> list[Check]:
    """Try everything; a check that fails says what mends it."""
    return [
        _check("python", lambda: platform.python_version(), "install Python 3.11 or newer"),
        _check("torch", _torch, "run `make setup`"),
        _check(
            "renderer",
            _renderer,
            "run `apt-get install libegl1 libopengl0 libgl1 libgl1-mesa-dri`, or set MUJOCO_GL",
        ),
        _check("ray", _ray, "use --engine inline, or free some memory"),
        _check("disk", lambda: _disk(root), "free some space, or choose another --root"),
        _check(
            "weights",
            _weights,
            "give them with --weights FILE_OR_FOLDER; --weights random:0 needs none",
            False,
        ),
    ]


def _check(name: str, attempt: Callable[[], str], mend: str, needed: bool = True) -> Check:
    try:
        return Check(name, True, attempt(), "", needed)
    except Exception as error:  # whatever is wrong with a machine is this command's subject
        return Check(name, False, one_line(error)[:200], mend, needed)


def _torch() -> str:
    import torch

    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"cpu, {torch.get_num_threads()} threads"
    )
    torch.linalg.inv(torch.eye(4))
    return f"{torch.__version__} on {device}"


def _renderer() -> str:
    from pvrpipe.rollouts.environments import make_environment

    environment = make_environment(size=64)
    frame = environment.reset(0)["frame"]
    if frame.std() == 0:
        raise RuntimeError("the rendered frame is empty")
    return f"{environment.renderer()}, a frame of {frame.shape[0]} × {frame.shape[1]}"


def _ray() -> str:
    import ray

    with shared_ray("ray", "local"):
        ray.get(ray.remote(lambda: 0).remote())
        return f"{ray.__version__} with {ray.cluster_resources()['CPU']:.0f} processors"


def _disk(root: Path) -> str:
    folder = next(p for p in (root.absolute(), *root.absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if free < DISK_WANTED:
        raise RuntimeError(f"{free / GIB:.1f} GiB free at {folder}")
    return f"{free / GIB:.0f} GiB free at {folder}"


def _weights() -> str:
    from pvrpipe.pipeline.cached import cached_weights
    from pvrpipe.pipeline.zoo import PVRS

    cached = [name for name, pvr in PVRS.items() if cached_weights(pvr) is not None]
    if not cached:
        raise RuntimeError("no published weights are cached")
    return "cached: " + ", ".join(cached)
