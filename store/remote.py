"""Stores behind a URL: small files and shards are fetched into the cache, each checked before it has a name.

What is behind stays a local folder, mapping included. Nothing is trusted: reading stops at the size that
the manifest promises, and bytes of another sha256 never reach their final name.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pvrpipe.schemas.errors import CorruptStoreError, NotAStoreError, UnfinishedStoreError
from pvrpipe.schemas.manifest import Manifest, store_id
from pvrpipe.store.cache import Cache, cache_errors
from pvrpipe.store.files import (
    disk_errors,
    remove_temporaries,
    settle,
    sha256_of,
    temporary_beside,
    write_whole,
)
from pvrpipe.store.hub import ask_anew
from pvrpipe.store.layout import (
    COMMITTED,
    MANIFEST,
    MANIFEST_LIMIT,
    StoreFile,
    files_of,
    parse_commit,
    parse_manifest,
    read_manifest,
    revision_file,
)
from pvrpipe.store.places import Place, filesystem, patiently, reaching

PIECE = 4 << 20  # bytes asked for at a time
UNSIZED_LIMIT = 1 << 30  # of a file whose size the manifest does not say

Arrived = Callable[[int], None]


class Source:
    """A store to fetch from: a URL, or a folder."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def manifest(self) -> tuple[bytes, Manifest]:
        """The manifest of a finished store, checked against its own id, and its bytes.

        Raises:
            NotAStoreError, UnfinishedStoreError, NewerFormatError, CorruptStoreError: there is none.
            UnreachableError: the place does not answer.
        """
        where = f"{self.place}/{MANIFEST}"
        ask_anew(self.place)
        try:
            text = b"".join(self.pieces(MANIFEST, MANIFEST_LIMIT))
        except FileNotFoundError:
            raise NotAStoreError(f"{self.place} holds no store (no {MANIFEST}); check the address") from None
        if len(text) > MANIFEST_LIMIT:
            raise CorruptStoreError(f"{where} is larger than {MANIFEST_LIMIT >> 20} MiB; it is not read")
        manifest = parse_manifest(text, where)
        if manifest.state != "sealed":
            raise UnfinishedStoreError(
                f"{self.place} was begun and not finished; push the finished store there"
            )
        hashes = [entry.sha256 for entry in manifest.shards]
        if manifest.id != store_id(manifest.specification, hashes, manifest.parts):
            raise CorruptStoreError(
                f"{where}: the id does not follow from what it lists; get the store again"
            )
        return text, manifest

    def pieces(self, name: str, limit: int) -> Iterator[bytes]:
        """The bytes of a file, at most ``limit`` + 1 of them, so that too many are noticed.

        Raises:
            FileNotFoundError: there is no such file.
            UnreachableError: the place does not answer.
        """
        left = limit + 1
        with reaching(self.place):
            file = self._open(name)
        try:
            while left:
                with reaching(self.place):
                    piece = file.read(min(PIECE, left))
                if not piece:
                    return
                left -= len(piece)
                yield piece
        finally:
            with reaching(self.place):
                file.close()

    def proves(self, file: StoreFile) -> bool:
        """Whether all bytes of a file are those that the manifest promises; they are read and not kept.

        Raises:
            UnreachableError: the place does not answer.
        """
        digest = hashlib.sha256()
        for piece in self.pieces(file.name, UNSIZED_LIMIT if file.size is None else file.size):
            digest.update(piece)
        return digest.hexdigest() == file.sha256

    def fetch(self, file: StoreFile, target: Path, arrived: Arrived = lambda _: None) -> bool:
        """Fetch one file; it takes its name once its size and sha256 are right. False: there is none.

        Args:
            file: which, and what its manifest promises.
            target: where to.
            arrived: told the bytes of each piece; taken back where an attempt fails.

        Raises:
            CorruptStoreError: it is missing, or not what the manifest promises.
            UnreachableError: the place does not answer.
        """
        return patiently(lambda: self._fetch(file, target, arrived))

    def _fetch(self, file: StoreFile, target: Path, arrived: Arrived) -> bool:
        if file.optional and isinstance(self.place, Path) and (self.place / file.name).is_symlink():
            return False  # it has no hash: whatever it leads to would pass for a card
        done, limit = 0, UNSIZED_LIMIT if file.size is None else file.size
        temporary = temporary_beside(target)
        try:
            pieces = self.pieces(file.name, limit)
            first = next(pieces, b"")  # a missing source is no trouble of the disk to write to
            with disk_errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                with temporary.open("wb") as out:
                    for piece in itertools.chain((first,), pieces):
                        out.write(piece)
                        done += len(piece)
                        arrived(len(piece))
            if problem := problem_of(file, temporary):
                raise self.corrupt(file, problem)
            with disk_errors(target):
                settle(temporary, target)
        except FileNotFoundError:
            if file.optional:
                return False
            raise self.corrupt(file, "is missing") from None
        except BaseException:
            arrived(-done)
            raise
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def corrupt(self, file: StoreFile, problem: str) -> CorruptStoreError:
        """The one line that names store and file."""
        return CorruptStoreError(
            f"{self.place}: {file.name} {problem}; it is not used, "
            "ask whoever published it to push it again with --overwrite"
        )

    def _open(self, name: str) -> Any:
        driver, root = filesystem(str(self.place))
        # Whole files in order: one streamed request over HTTP (0), else requests of one piece, none ahead.
        protocol = (driver.protocol,) if isinstance(driver.protocol, str) else driver.protocol
        return driver.open(
            f"{root}/{name}", "rb", block_size=0 if "http" in protocol else PIECE, cache_type="none"
        )


class Mirror:
    """The local folder of a store behind a URL; what is not there yet is fetched when it is asked for."""

    def __init__(self, place: Place, cache: Cache | None = None) -> None:
        self._source, self._cache = Source(place), cache or Cache.from_environment()
        text, self.manifest = self._source.manifest()
        self._files = {file.name: file for file in files_of(self.manifest)}
        # Named after the manifest's own bytes too: a forged one with a true store's id gets its own folder.
        name = f"{str(self.manifest.id)[:16]}-{hashlib.sha256(text).hexdigest()[:32]}"
        self.folder = self._cache.folder_of(name)
        with cache_errors(self.folder):
            if not (self.folder / MANIFEST).is_file():
                write_whole(self.folder / MANIFEST, text)

    def revision(self, revision: int | None) -> Manifest:
        """The manifest of a revision; None is the newest."""
        if revision is not None and (name := revision_file(revision)) in self._files:
            self.fetch(name)
        return read_manifest(self.folder, revision)

    @contextmanager
    def holding(self, name: str) -> Iterator[Path]:
        """A file of the store, there and whole as long as this lasts; afterwards it may be evicted.

        Raises:
            CorruptStoreError: what lies there is not what the manifest promises.
            UnreachableError: the place does not answer.
        """
        if name not in self._files:
            raise self._source.corrupt(StoreFile(name), "is not in its manifest")
        file, path = self._files[name], self.folder / name
        with self._cache.holding(path):
            if path.is_file() and file.size in (None, path.stat().st_size):
                os.utime(path)  # the time of its last use
            else:
                with cache_errors(path):
                    path.parent.mkdir(exist_ok=True)
                    remove_temporaries(path.parent, path.name)
                self._cache.make_room(file.size or 0)
                with cache_errors(path):
                    self._source.fetch(file, path)
            yield path
        self._cache.make_room(0)  # others may have fetched at the same time

    def fetch(self, name: str) -> Path:
        """A small file of the store, on this machine; small files are not evicted."""
        with self.holding(name) as path:
            return path


def problem_of(file: StoreFile, path: Path) -> str | None:
    """What is wrong with the bytes of a file, or None if they are what the manifest promises."""
    size = path.stat().st_size
    if size > (UNSIZED_LIMIT if file.size is None else file.size):
        return f"is larger than {UNSIZED_LIMIT if file.size is None else file.size} bytes"
    if file.size is not None and size != file.size:
        return f"has {size} bytes, not {file.size}"
    if file.sha256 is not None and (found := sha256_of(path)) != file.sha256:
        return f"has sha256 {found[:12]}…, not {file.sha256[:12]}…"
    return _problem_of_commit(file, path) if file.entry is not None else None


def _problem_of_commit(file: StoreFile, path: Path) -> str | None:
    """A commit record has no hash of its own: it must be valid, and say what the manifest says."""
    if path.stat().st_size > MANIFEST_LIMIT:
        return f"is larger than {MANIFEST_LIMIT} bytes"
    commit = parse_commit(path.read_bytes())
    if commit is None:
        return "is no valid commit record"
    differ = [field for field in COMMITTED if getattr(commit, field) != getattr(file.entry, field)]
    return f"does not say what the manifest says ({', '.join(differ)})" if differ else None
