"""Run a function in a process of its own that is killed at its n-th write, fsync or rename."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Forked from a server that has imported everything once: a fresh interpreter takes seconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pandas", "tests.test_store", "tests.test_store_growing"])


def run_killed(work: Callable[..., None], *arguments: Any, stop: int = 0) -> bool:
    """Whether it was killed; with ``stop`` 0 it is not. Any other failure fails the test."""
    process = PROCESSES.Process(target=_run, args=(work, arguments, stop))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def _run(work: Callable[..., None], arguments: tuple[Any, ...], stop: int) -> None:
    calls = 0

    def dying(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == stop:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    os.fsync = dying(os.fsync)
    Path.replace = dying(Path.replace)  # type: ignore[method-assign]
    Path.write_bytes = dying(Path.write_bytes)  # type: ignore[method-assign]
    work(*arguments)
