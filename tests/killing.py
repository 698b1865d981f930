"""Functions in processes of their own that are killed: at the n-th write, fsync or rename, or at random moments."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pvrpipe.store.reading import Store
from pvrpipe.store.verifying import verify

# Forked from a server that has imported everything once: a fresh interpreter takes seconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "pandas",
        "tests.test_store",
        "tests.test_store_growing",
        "tests.fuzz.surface",
        "pvrpipe.cli",
        "pvrpipe.pipeline.embed",
        "pvrpipe.worldmodel.probe",
    ]
)


def run_killed(work: Callable[..., Any], *arguments: Any, stop: int = 0) -> bool:
    """Whether it was killed; with ``stop`` 0 it is not. Any other failure fails the test."""
    process = PROCESSES.Process(target=_run, args=(dict(os.environ), work, arguments, stop))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def run_killed_at_random(
    work: Callable[[str], Any], where: str, kills: int, imports: Sequence[str] = (), seed: int = 0
) -> None:
    """Let ``work(where-N)`` be killed at so many random moments, two and then a whole run for each N.

    What the whole run leaves must verify, and have the id that an undisturbed run gives. ``imports`` are modules
    that the work would otherwise spend its time importing.
    """
    process = PROCESSES.Process(
        target=_kill_at_random, args=(dict(os.environ), work, where, kills, imports, seed)
    )
    process.start()
    process.join()
    assert process.exitcode == 0


def _run(environ: dict[str, str], work: Callable[..., None], arguments: tuple[Any, ...], stop: int) -> None:
    os.environ.update(environ)  # the server's own is that of the test that needed it first
    calls = 0

    def dies() -> bool:
        nonlocal calls
        calls += 1
        return calls == stop

    def dying(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if dies():
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    class HalfWritten:
        """A file open for writing; the write it dies in has written half."""

        def __init__(self, file: Any) -> None:
            self._file = file

        def write(self, data: Any) -> int:
            if dies():
                self._file.write(memoryview(data).cast("B")[: len(data) // 2])
                self._file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return int(self._file.write(data))

        def __enter__(self) -> HalfWritten:
            return self

        def __exit__(self, *error: object) -> None:
            self._file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    opened = Path.open

    def opening(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = opened(self, mode, *args, **kwargs)
        return HalfWritten(file) if mode == "wb" else file

    os.fsync, os.sendfile = dying(os.fsync), dying(os.sendfile)  # type: ignore[assignment]
    Path.replace = dying(Path.replace)  # type: ignore[method-assign]
    Path.open = opening  # type: ignore[method-assign, assignment]
    socket.socket.send = dying(socket.socket.send)  # type: ignore[method-assign]
    work(*arguments)


def _kill_at_random(
    environ: dict[str, str],
    work: Callable[[str], Any],
    where: str,
    kills: int,
    imports: Sequence[str],
    seed: int,
) -> None:
    """In a process that only forks, one for each attempt: a fork of one with threads may wait for them for ever."""
    os.environ.update(environ)
    for name in imports:
        importlib.import_module(name)
    moments, whole = random.Random(seed), f"{where}-0"
    began = time.monotonic()
    assert _ended(_forked(work, whole)) == 0
    span, killed, number = time.monotonic() - began, 0, 0
    while killed < kills:
        number += 1
        for _ in range(2):
            child = _forked(work, f"{where}-{number}")
            time.sleep(moments.uniform(0, span))
            os.kill(child, signal.SIGKILL)
            killed += _ended(child) == -signal.SIGKILL
        assert _ended(_forked(_work_and_compare, work, f"{where}-{number}", whole)) == 0
    print(f"{killed} kills in {number} places; undisturbed {span:.2f} s", file=sys.stderr)


def _work_and_compare(work: Callable[[str], Any], where: str, whole: str) -> None:
    work(where)
    assert verify(where) == []
    assert Store.open(where).manifest.id == Store.open(whole).manifest.id


def _ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _forked(work: Callable[..., Any], *arguments: Any) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
