"""A training that is real, and small enough for a test."""

from __future__ import annotations

from pvrpipe.pipeline.pretraining import PretrainConfig

SMALL = PretrainConfig(size=16, channels=4, width=8, updates=4, batch=8)
