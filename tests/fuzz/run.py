"""A coverage-guided fuzz run over everything that a stranger's store goes through: ``make fuzz``.

libFuzzer, by way of ``atheris``, with the coverage of pvrpipe, of tarfile and of NumPy's header reader. It goes on
after a finding: each kind is kept once, input and traceback, in ``OUT/findings``. What kills the process (a crash of
native code, 20 s for one input, too much memory) is kept by libFuzzer as ``OUT/fatal-*``, and the run is started again.
Exits 1 where anything was found. An input is replayed with ``python -m tests.fuzz.run --replay FILE``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np

SECONDS_AN_INPUT = 20
INPUT_LIMIT = 160  # bytes
FIRST_INPUTS = 300  # random ones, for a start in every store, file and kind of edit
STRANGERS = ("pvrpipe", "tarfile", "numpy.lib._format_impl")


def main() -> int:
    """Parse, then supervise, fuzz or replay."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--replay", type=Path)
    parser.add_argument("--for-seconds", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.replay is not None:
        return replay(asked.replay)
    if asked.for_seconds is not None:
        fuzz(asked.out, asked.for_seconds, asked.seed)
    return supervise(asked.out, asked.minutes, asked.seed)


def supervise(out: Path, minutes: float, seed: int) -> int:
    """Fuzz in processes of its own until the time is over, then tell what came of it."""
    for name in ("corpus", "findings"):
        (out / name).mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for number in range(FIRST_INPUTS):
        (out / "corpus" / f"first-{number:03d}").write_bytes(random.bytes(int(random.integers(8, 60))))
    began, starts, log = time.monotonic(), 0, out / "log.txt"
    while (left := int(60 * minutes - (time.monotonic() - began))) > 5:
        command = [
            sys.executable,
            "-m",
            "tests.fuzz.run",
            "--out",
            out,
            "--for-seconds",
            left,
            "--seed",
            seed + starts,
        ]
        with log.open("ab") as file:
            subprocess.run([str(part) for part in command], stdout=file, stderr=file, check=False)
        starts += 1
    done, told = _executions(log.read_text(errors="replace")), json.loads((out / "told.json").read_text())
    findings = sorted(p.name for p in (*(out / "findings").glob("*.txt"), *out.glob("fatal-*")))
    print(f"{(time.monotonic() - began) / 60:.1f} minutes, {done} executions, {starts} processes")
    print(f"what came of them (of the last process): {told}")
    print(f"findings: {findings or 'none'}")
    return int(bool(findings))


def fuzz(out: Path, seconds: int, seed: int) -> None:
    """One process of libFuzzer; does not return."""
    import atheris

    with atheris.instrument_imports(include=list(STRANGERS)):
        from .surface import surface

    told: Counter[str] = Counter()
    with (
        tempfile.TemporaryDirectory(prefix="fuzz-", dir=_fast_folder()) as folder,
        surface(Path(folder) / "w") as run,
    ):

        def one(data: bytes) -> None:
            try:
                told[run(data)] += 1
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # a panic of Rust is no Exception
                told[keep(out / "findings", data, error)] += 1
            if sum(told.values()) % 500 == 0:
                (out / "told.json").write_text(json.dumps(told.most_common()))

        options = [
            f"-max_total_time={seconds}",
            f"-timeout={SECONDS_AN_INPUT}", f"-max_len={INPUT_LIMIT}", "-rss_limit_mb=4096",
            f"-artifact_prefix={out}/fatal-", f"-seed={seed}", "-print_final_stats=1", "-len_control=0",
            f"-report_slow_units={SECONDS_AN_INPUT}", str(out / "corpus"),
        ]  # fmt: skip
        atheris.Setup([sys.argv[0], *options], one)
        atheris.Fuzz()


def keep(folder: Path, data: bytes, error: BaseException) -> str:
    """Keep one input of each kind of finding: the error's type and where in our code, or in what we call, it arose."""
    raised = error.__cause__ or error  # of a broken promise, what broke it
    frames = [f for f in traceback.extract_tb(raised.__traceback__) if "/fuzz/" not in f.filename]
    where = frames[-1] if frames else None
    ours = next(
        (
            f
            for f in reversed(frames)
            if "/site-packages/" not in f.filename and "/lib/python" not in f.filename
        ),
        where,
    )
    places = " ".join(f"{Path(f.filename).stem}:{f.lineno}" for f in (ours, where) if f is not None)
    kind = (
        f"{type(error).__name__} {places} {re.sub(r'[0-9]+', '', str(error))[:60] if where is None else ''}"
    )
    name = (
        re.sub(r"[^A-Za-z0-9.]+", "-", kind).strip("-") + "-" + hashlib.sha256(kind.encode()).hexdigest()[:6]
    )
    if not (folder / f"{name}.txt").exists():
        (folder / f"{name}.bin").write_bytes(data)
        (folder / f"{name}.txt").write_text(
            "".join(traceback.format_exception(error)), errors="backslashreplace"
        )
    return f"finding {name}"


def replay(file: Path) -> int:
    """Run one input and say what comes of it."""
    from .surface import ACTIONS, surface

    with tempfile.TemporaryDirectory(dir=_fast_folder()) as folder, surface(Path(folder) / "w") as run:
        from .mutation import damage

        damaged = damage(file.read_bytes(), run.stores, len(ACTIONS))
        print(f"store {damaged.store}, {ACTIONS[damaged.action].__name__}: {sorted(damaged.changed)}")
        print(run.run(damaged))
    return 0


def _executions(log: str) -> int:
    """Executions of all processes: the final count of each, or the last that it printed."""
    parts = log.split("INFO: Running with entropic")
    counts = [re.findall(r"^#(\d+)\s", part, re.M) for part in parts]
    return sum(int(found[-1]) for found in counts if found)


def _fast_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


if __name__ == "__main__":
    sys.exit(main())
