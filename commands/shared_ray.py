"""One Ray for several stages, each of which would otherwise start its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pvrpipe.schemas.clusters import ray_cluster


@contextmanager
def shared_ray(engine: str, address: str | None = None) -> Iterator[None]:
    """Start or join Ray for as long as it is needed, where it is the engine at all."""
    if engine != "ray":
        yield
        return
    with ray_cluster(address):
        yield
