"""Work on many files at once, in threads: the network waits, not the processor."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

from pvrpipe.schemas.progress import Progress

Item = TypeVar("Item")
MIB = 1 << 20


class Tally:
    """Bytes of all threads, told as MiB: those moved, and those that need not move."""

    def __init__(self, total: int, progress: Progress) -> None:
        self.moved, self._skipped, self._total, self._progress = 0, 0, total, progress
        self._lock = threading.Lock()

    def add(self, count: int, note: str = "") -> None:
        """So many bytes moved."""
        with self._lock:
            self.moved += count
            self._tell(note)

    def skip(self, count: int) -> None:
        """So many bytes are there already."""
        with self._lock:
            self._skipped += count
            self._tell("")

    def _tell(self, note: str) -> None:
        done = self.moved + self._skipped
        self._progress(done / MIB, max(self._total, done) / MIB, note)


def each(work: Callable[[Item], None], items: Iterable[Item], workers: int) -> None:
    """Do it to every item; the first failure stops what has not begun, and is raised."""
    with ThreadPoolExecutor(workers) as pool:
        try:
            for done in as_completed([pool.submit(work, item) for item in items]):
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
