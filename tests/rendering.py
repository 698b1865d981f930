"""Imported for its effect: MuJoCo with the renderer that pvrpipe chooses, before anything else can choose."""

from pvrpipe.rollouts.environments import choose_backend

choose_backend()

import pvrpipe.rollouts.dmc  # noqa: E402, F401
