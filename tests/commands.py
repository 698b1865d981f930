"""``pvrpipe`` run as a person would, in a process of its own, forked from one that has imported everything."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .killing import PROCESSES


def run(*arguments: str, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Exit status, stdout and stderr of a command."""
    with tempfile.TemporaryDirectory() as folder:
        told = [Path(folder) / name for name in ("stdout", "stderr")]
        process = PROCESSES.Process(target=_main, args=(arguments, cwd, told, dict(os.environ)))
        process.start()
        process.join(timeout)
        assert process.exitcode is not None, f"{arguments} did not end"
        out, err = (path.read_text() for path in told)
    return subprocess.CompletedProcess(["pvrpipe", *arguments], process.exitcode, out, err)


def _main(arguments: tuple[str, ...], cwd: Path, told: list[Path], environ: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    for descriptor, path in zip((1, 2), told, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(descriptor), "w", buffering=1) for descriptor in (1, 2))
    sys.argv = ["pvrpipe", *arguments]
    from pvrpipe.cli import main

    try:
        main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
