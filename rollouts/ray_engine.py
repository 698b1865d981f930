"""A pool of Ray actors, one environment each, fed shard by shard; the only file here that knows Ray."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from pvrpipe.rollouts.environments import choose_backend
from pvrpipe.rollouts.episodes import CollectShard
from pvrpipe.schemas.errors import PvrpipeError, SimulationError, one_line
from pvrpipe.schemas.manifest import Manifest, ShardCommit, ShardPlan

ATTEMPTS = 3  # of a shard whose worker dies
RENDERING = ("MUJOCO_GL", "MUJOCO_EGL_DEVICE_ID", "LP_NUM_THREADS")  # what workers must see as the user set it
