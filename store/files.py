"""Files that exist whole or not at all: write beside, fsync, rename, fsync the folder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from pvrpipe.schemas.addresses import refuse_url
from pvrpipe.schemas.errors import DiskError, StoreBusyError, StoreError

FILES_OPEN = "too many files are open; raise the limit with `ulimit -n 4096`"
HASHED_AT_ONCE = 4 << 20  # bytes
TEMPORARY = ".tmp-"  # marks files that a crash may leave behind; the next writer removes them
TENSORS = ".tmp" + "[0-9A-Za-z]" * 6  # what safetensors writes to, before the name that it was given


def temporary_beside(path: Path) -> Path:
    """A name in the same folder that no other process chooses."""
    return path.with_name(f"{path.name}{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}")


def settle(temporary: Path, path: Path) -> None:
    """Make a finished temporary file durable under its final name."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write within; a reader of ``path`` sees it in full afterwards, or not at all.

    Raises:
        DiskError: the operating system refuses to write it.
    """
    temporary = temporary_beside(path)
    try:
        with disk_errors(path):
            yield temporary
            settle(temporary, path)
    finally:
        with suppress(OSError):  # a read-only file system; the first failure is the one to report
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file that a reader sees in full or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def sha256_of(path: Path) -> str:
    """Sha256 of a file, read in pieces; hashlib's own are of 256 KiB, for each of which a thread waits its turn."""
    digest = hashlib.sha256()
    with read_errors(path), path.open("rb", buffering=0) as file:
        piece = memoryview(bytearray(min(HASHED_AT_ONCE, os.fstat(file.fileno()).st_size) or 1))
        while count := file.readinto(piece):
            digest.update(piece[:count])
    return digest.hexdigest()


def left_behind(path: Path) -> list[Path]:
    """What writers of a file that were killed have left, and who is writing it now has begun."""
    return list(path.parent.glob(f"{path.name}{TEMPORARY}[0-9]*-????????"))


@contextmanager
def marked(path: Path) -> Iterator[None]:
    """A mark beside ``path`` that stays, for :func:`left_behind` to find, if this process dies within."""
    mark = temporary_beside(path)
    with disk_errors(path):
        mark.touch()
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)


def remove_temporaries(folder: Path, name: str = "*") -> None:
    """Remove what a killed writer left (of one file); call only while holding the folder's (or its) lock."""
    unnamed = folder.glob(TENSORS) if name == "*" else []
    for path in [*left_behind(folder / name), *unnamed]:
        path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold the folder against other writers; the lock dies with the process and leaves no file.

    Args:
        folder: that is there.
        wait: for another process to end, where it is refused otherwise.

    Raises:
        StoreBusyError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        raise StoreBusyError(
            f"{folder} is being written by another process; wait for it, or choose another output"
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make the folder of an output.

    Raises:
        InvalidValueError: it is a URL.
        StoreError: it cannot be made there.
    """
    refuse_url(folder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one line that names the next step."""
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "the disk is full; free some space",
            errno.EDQUOT: "the disk quota is used up; free some space",
            errno.EFBIG: "files may not be that large here; raise the limit with `ulimit -f unlimited`",
            errno.EACCES: "permission denied; make the folder writable",
            errno.EPERM: "permission denied; make the folder writable",
            errno.EIO: "the disk fails; choose another output",
            errno.ENAMETOOLONG: "its name is too long; choose another output",
            errno.ELOOP: "its links lead in a circle; choose another output",
            errno.EROFS: "the file system is read-only; choose another output",
            errno.EEXIST: "a file of that name is in the way; choose another output",
            errno.ENOTDIR: "a file is in the way of its folder; choose another output",
            errno.ENOENT: "its folder cannot be made there; choose another output",
            errno.EMFILE: FILES_OPEN,
            errno.ENFILE: FILES_OPEN,
        }.get(error.errno or 0)
        if advice is None:
            raise
        raise DiskError(f"cannot write {path}: {advice}, then run the same command again to go on") from error


@contextmanager
def tensors_to(path: Path) -> Iterator[None]:
    """Around ``save_file`` to ``path``, as if any other file were written there.

    Safetensors lets nobody but its user read the file, and hides what the operating system says in a text.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        yield
    except SafetensorError as error:
        if code := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(code[1]), str(error)) from None
        raise
    path.chmod(mode)


@contextmanager
def read_errors(path: object) -> Iterator[None]:
    """The same for a file that is there and cannot be read; nothing is said of its content."""
    try:
        yield
    except OSError as error:
        advice = {
            errno.EACCES: "permission denied; make it readable",
            errno.EPERM: "permission denied; make it readable",
            errno.EMFILE: FILES_OPEN,
            errno.ENFILE: FILES_OPEN,
            errno.EIO: "the disk fails to read it; get it again from another",
        }.get(error.errno or 0)
        if advice is None:
            raise
        raise StoreError(f"cannot read {path}: {advice}, then run the same command again") from error
