"""A Ray cluster to work on: one that runs already, or one of this machine's own for as long as it is needed."""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pvrpipe.schemas.errors import ClusterError, PvrpipeError, one_line


@contextmanager
def ray_cluster(address: str | None, workers: int | None = None) -> Iterator[None]:
    """Ray, left as it is where it is initialised already.

    Args:
        address: of a running cluster; None: ``RAY_ADDRESS``, or a cluster on this machine.
        workers: processors that the latter is given; None: all.

    Raises:
        ClusterError: nobody answers at the address, or Ray does not start.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    arguments = _arguments(address)
    if arguments["address"] == "local":
        arguments["num_cpus"] = workers
    try:
        with _quiet():
            ray.init(**arguments)
    except PvrpipeError:
        raise
    except Exception as error:  # Ray raises bare ones, too, e.g. where a busy machine starts it too slowly
        raise ClusterError(
            f"Ray does not start ({one_line(error)[:200]}); "
            "check --address and `pvrpipe doctor`, or use --engine inline"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _arguments(address: str | None) -> dict[str, Any]:
    """How ``ray.init`` is called everywhere here: at an address, at ``RAY_ADDRESS``, or on this machine.

    Raises:
        ClusterError: nobody answers at the address.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        _check_answers(address)
    return {
        "address": address or "local",  # None would join whatever cluster somebody runs on this machine
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }


def _check_answers(address: str) -> None:
    """Refuse an address of a Ray cluster that nobody answers at; Ray itself goes on trying for minutes.

    Raises:
        ClusterError: nobody answers.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return  # "auto" and the like are Ray's to resolve
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({one_line(error)}); check --address, or leave it out"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Around ``ray.init``: its native code writes to the terminal. Held back, and shown after all if it fails."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(kept, held.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
