"""Names of the files in a store.

::

    data/embeddings/dmc-pendulum-swingup/vc1/
    ├── store.json          the manifest, sealed last
    ├── episodes.parquet    one row per episode
    ├── golden.safetensors  embeddings only: a few frames with their embeddings
    ├── README.md           a dataset card that a person can read
    ├── croissant.json      the same for machines, once `pvrpipe card` was run
    ├── shards/
    │   ├── 00000.parquet   rows of whole episodes; or 00000.tar
    │   └── 00000.json      commit record, written last
    └── revisions/          once episodes were appended
        └── 00001.json      the manifest as it was; its shards and its episode table are still there
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pydantic_core
from pydantic import ValidationError

from pvrpipe.schemas.errors import (
    CorruptStoreError,
    InvalidValueError,
    NewerFormatError,
    NotAStoreError,
    OutputExistsError,
)
from pvrpipe.schemas.manifest import FORMAT_VERSION, Manifest, ShardCommit, ShardEntry
from pvrpipe.store.files import read_errors

MANIFEST = "store.json"
EPISODES = "episodes.parquet"
GOLDEN = "golden.safetensors"
CARD = "README.md"
CROISSANT = "croissant.json"
SHARDS = "shards"
REVISIONS = "revisions"
APPENDING = "appending.json"  # the manifest of a revision that is being written
PULLING = "pull.json"  # the manifest of the store that a folder is being filled with
SUFFIXES = {"parquet": ".parquet", "webdataset": ".tar"}
MANIFEST_LIMIT = 256 << 20  # bytes; a larger manifest is not read
VALUES_LIMIT = (
    8 << 20
)  # values in a manifest, a shard has about a dozen: what is parsed takes far more than its text
COMMITTED = (
    "file",
    "rows",
    "bytes",
    "sha256",
    "row_groups",
    "batch",
)  # what commit record and manifest both say
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,127}){0,3}")


@dataclass(frozen=True)
class StoreFile:
    """One file of a store, and what its manifest promises of it."""

    name: str
    """path within the store, of plain names only"""
    size: int | None = None
    sha256: str | None = None
    entry: ShardEntry | None = None
    """of a shard's commit record: what the manifest says of that shard"""
    optional: bool = False
    """the store holds without it"""


def files_of(manifest: Manifest) -> tuple[StoreFile, ...]:
    """Every file of a sealed store in the order in which it is published.

    A shard comes before its commit record, the manifest comes last.

    Raises:
        CorruptStoreError: a name leads out of the store, or two files share one.
    """
    files = tuple(_files_of(manifest))
    seen = {PULLING}
    folders = {str(parent).lower() for file in files for parent in PurePosixPath(file.name).parents}
    for file in files:
        name = file.name.lower()  # some file systems know no case
        if not _PLAIN.fullmatch(file.name) or name in seen or name in folders:
            raise CorruptStoreError(
                f"{MANIFEST} lists a file called {file.name[:80]!r}, which is no plain name of its own; "
                "this store is not to be trusted, get it from another source"
            )
        seen.add(name)
    return files


def _files_of(manifest: Manifest) -> Iterator[StoreFile]:
    for entry in manifest.shards:
        yield StoreFile(entry.file, entry.bytes, entry.sha256)
        yield StoreFile(str(PurePosixPath(entry.file).with_suffix(".json")), entry=entry)
    for name, digest in sorted(manifest.files.items()):
        yield StoreFile(name, sha256=digest)
    yield StoreFile(CARD, optional=True)
    yield StoreFile(CROISSANT, optional=True)
    yield StoreFile(MANIFEST)


def shard_file(shard: int, shard_format: str) -> str:
    """Path of a shard within its store."""
    return f"{SHARDS}/{shard:05d}{SUFFIXES[shard_format]}"


def commit_file(shard: int) -> str:
    """Path of a shard's commit record within its store."""
    return f"{SHARDS}/{shard:05d}.json"


def revision_file(revision: int) -> str:
    """Path, within its store, of the manifest of a revision that is no longer the newest."""
    return f"{REVISIONS}/{revision:05d}.json"


def refuse_inside_store(folder: Path) -> None:
    """What a store holds is the store: nothing else is put into its folder.

    Raises:
        OutputExistsError: the folder lies in a store's; names that.
    """
    if outer := next((p for p in folder.absolute().parents if (p / MANIFEST).is_file()), None):
        raise OutputExistsError(f"{folder} lies in another store ({outer}); choose an output beside it")


def read_manifest(folder: Path, revision: int | None = None) -> Manifest:
    """The manifest of a store, sealed or not: the newest, or that of an earlier revision.

    Raises:
        NotAStoreError: the folder holds no ``store.json``.
        NewerFormatError: it was written by a newer pvrpipe.
        CorruptStoreError: it is not a valid manifest.
    """
    if not (folder / MANIFEST).is_file():
        raise NotAStoreError(
            f"{folder} holds no store (no {MANIFEST}); make one with `pvrpipe collect` or `pvrpipe embed`"
        )
    newest = read_manifest_file(folder / MANIFEST)
    if revision is None or revision == newest.revision:
        return newest
    path = folder / revision_file(revision)
    if not 1 <= revision < newest.revision or not path.is_file():
        raise InvalidValueError(f"{folder} has no revision {revision}; it has 1 to {newest.revision}")
    return read_manifest_file(path)


def read_manifest_file(path: Path) -> Manifest:
    """A manifest by the path of its own file.

    Raises:
        NewerFormatError, CorruptStoreError: as :func:`parse_manifest`.
    """
    if path.stat().st_size > MANIFEST_LIMIT:
        raise CorruptStoreError(f"{path} is larger than {MANIFEST_LIMIT >> 20} MiB; it is not read")
    with read_errors(path):
        text = path.read_bytes()
    return parse_manifest(text, path)


def parse_manifest(text: bytes, path: object) -> Manifest:
    """The manifest in the bytes of ``store.json``; ``path`` is for messages.

    Raises:
        NewerFormatError: it was written by a newer pvrpipe.
        CorruptStoreError: it is not a valid manifest.
    """
    raw = _parsed(path, text)
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:  # a newer manifest need not fit our models
        raise NewerFormatError(
            f"{path} has format version {version}, this pvrpipe reads up to {FORMAT_VERSION}; upgrade pvrpipe"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        # not model_validate_json: each of its errors brings a copy of the whole document
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise CorruptStoreError(
            f"{path} is not a valid manifest: {where[:200]}: {first['msg']}; get the store again"
        ) from None


def read_commit(folder: Path, shard: int) -> ShardCommit | None:
    """The commit record of a shard, or None if the shard was never finished."""
    path = folder / commit_file(shard)
    if not path.is_file() or path.stat().st_size > MANIFEST_LIMIT:
        return None
    with read_errors(path):
        return parse_commit(path.read_bytes())


def parse_commit(text: bytes) -> ShardCommit | None:
    """The commit record in the bytes of its file, or None if it is not a valid one."""
    try:
        return ShardCommit.model_validate(_parsed("commit record", text))
    except (ValidationError, CorruptStoreError):
        return None


def _parsed(path: object, text: bytes) -> object:
    """The JSON of a manifest that is not too much of it."""
    values = text.count(b",") + text.count(b"[") + text.count(b"{")
    if values > VALUES_LIMIT:
        raise CorruptStoreError(f"{path} has more than {VALUES_LIMIT} values; it is not read")
    try:
        return pydantic_core.from_json(text)
    except ValueError as error:
        raise CorruptStoreError(f"{path} is not JSON ({error}); get the store again") from None
