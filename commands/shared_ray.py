"""One Ray for several stages, each of which would otherwise start its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pvrpipe.schemas.addresses import ray_arguments
from pvrpipe.schemas.quiet import quiet_start


@contextmanager
def shared_ray(engine: str, address: str | None = None) -> Iterator[None]:
    """Start or join Ray for as long as it is needed, where it is the engine at all."""
    if engine != "ray":
        yield
        return
    import ray

    with quiet_start():
        ray.init(**ray_arguments(address))
    try:
        yield
    finally:
        ray.shutdown()
