"""What pvrpipe keeps outside of its outputs, and in it the shards of remote stores: bounded, shared by all processes.

::

    ~/.cache/pvrpipe/                PVRPIPE_CACHE; beside stores/, the pipeline's weights/ and converted/
    stores/
    ├── locks/                       empty files; a lock dies with its process
    ├── verify-…/                    a cache of its own, as long as the process that fetches everything anew
    └── <id>-<manifest's sha256>/    one store, laid out as any other
        ├── store.json, episodes.parquet, …
        └── shards/00000.parquet     fetched when first opened; its time says when it was last
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pvrpipe.schemas.errors import DiskError, InvalidValueError, StoreBusyError, StoreError
from pvrpipe.store.files import TEMPORARY, disk_errors, locked
from pvrpipe.store.layout import SHARDS

FOLDER, LIMIT = "PVRPIPE_CACHE", "PVRPIPE_CACHE_GB"
DEFAULT_GB = 50.0


def cache_folder() -> Path:
    """The folder that ``PVRPIPE_CACHE`` names; nothing is made.

    Raises:
        InvalidValueError: it is of a user that does not exist.
    """
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    named = os.environ.get(FOLDER) or f"{home}/pvrpipe"
    try:
        return Path(named).expanduser().absolute()
    except RuntimeError:
        raise InvalidValueError(f"{named} is in no home folder known here; set {FOLDER}") from None


@dataclass(frozen=True)
class Cache:
    """A folder and the bytes that it may hold."""

    folder: Path
    limit: int

    @classmethod
    def from_environment(cls) -> Cache:
        """What ``PVRPIPE_CACHE`` and ``PVRPIPE_CACHE_GB`` say.

        Raises:
            InvalidValueError: the size is not a positive number, or the folder is of a user that does not exist.
        """
        text = os.environ.get(LIMIT) or str(DEFAULT_GB)
        try:
            gigabytes = float(text)
        except ValueError:
            gigabytes = 0
        if not 0 < gigabytes < float("inf"):
            raise InvalidValueError(f"{LIMIT} is '{text}'; give a number of gigabytes above 0")
        return cls(cache_folder() / "stores", int(gigabytes * 1e9))

    def folder_of(self, name: str) -> Path:
        """The folder of a store, which is made if it is not there."""
        folder = self.folder / name
        with cache_errors(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder

    @contextmanager
    def empty(self) -> Iterator[Cache]:
        """A cache within this one that goes afterwards; what killed processes left of theirs goes before."""
        own = self.folder / "verify"
        with ExitStack() as stack:
            with self.holding(own), cache_errors(own):  # a folder that nobody holds yet is not taken for left
                for left in self.folder.glob("verify-*"):
                    with suppress(StoreBusyError, FileNotFoundError), locked(left):
                        shutil.rmtree(left, ignore_errors=True)
                folder = Path(tempfile.mkdtemp(prefix="verify-", dir=self.folder))
                stack.enter_context(locked(folder))
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
            yield Cache(folder, self.limit)

    @contextmanager
    def holding(self, file: Path) -> Iterator[None]:
        """Hold one file of the cache: nobody else fetches or removes it meanwhile. Waits its turn."""
        with self._locked(file, wait=True):
            yield

    def make_room(self, wanted: int) -> None:
        """Remove the shards used longest ago until ``wanted`` bytes more fit.

        Shards that someone holds stay. One that is mapped may go: its pages live until its last reader ends.

        Raises:
            StoreError: they would not fit into an empty cache.
        """
        if wanted > self.limit:
            raise StoreError(
                f"a file of {wanted} bytes does not fit into the cache of {self.limit} bytes; set {LIMIT} higher"
            )
        with self._locked(self.folder / "room", wait=True):
            found = [(path, stat) for path in self._files() if (stat := _stat(path)) is not None]
            total = sum(stat.st_size for _, stat in found)
            for path, stat in sorted(found, key=lambda item: item[1].st_mtime_ns):
                if total + wanted <= self.limit:
                    return
                if path.parent.name == SHARDS and path.suffix != ".json" and self._removed(path):
                    total -= stat.st_size

    def _files(self) -> Iterator[Path]:
        return (path for pattern in ("*/*", f"*/{SHARDS}/*") for path in self.folder.glob(pattern))

    def _removed(self, path: Path) -> bool:
        """Remove a shard, or what a killed process left of one, unless someone holds it."""
        try:
            with self._locked(path.with_name(path.name.split(TEMPORARY)[0]), wait=False):
                path.unlink(missing_ok=True)
        except BlockingIOError:
            return False
        return True

    @contextmanager
    def _locked(self, file: Path, wait: bool) -> Iterator[None]:
        """An advisory lock named after a file; it excludes threads as well as processes."""
        lock = self.folder / "locks" / "-".join(file.relative_to(self.folder).parts)
        with cache_errors(lock):
            lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child forked meanwhile has the descriptor too
        finally:
            os.close(descriptor)


@contextmanager
def cache_errors(path: Path) -> Iterator[None]:
    """Refusals of the operating system within the cache, which may lie elsewhere.

    Raises:
        DiskError: one line that names the variable.
    """
    try:
        with disk_errors(path):
            yield
    except DiskError as error:
        raise DiskError(f"{error}; {FOLDER} says where such files are kept") from error


def _stat(path: Path) -> os.stat_result | None:
    """None for a folder, and for a file that another process has just removed."""
    with suppress(FileNotFoundError):
        return path.stat() if path.is_file() else None
    return None
