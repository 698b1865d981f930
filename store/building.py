"""A store while it is being written: begun from a configuration, filled shard by shard, sealed last."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
from numpy.typing import NDArray

from pvrpipe.schemas.differences import differences
from pvrpipe.schemas.errors import (
    CorruptStoreError,
    OutputExistsError,
    PvrpipeError,
    UnfinishedStoreError,
)
from pvrpipe.schemas.manifest import Column, Manifest, ShardCommit, ShardEntry, ShardPlan, store_id
from pvrpipe.store.card import card
from pvrpipe.store.episodes import episode_rows
from pvrpipe.store.files import (
    TEMPORARY,
    disk_errors,
    locked,
    make_folder,
    remove_temporaries,
    sha256_of,
    write_whole,
)
from pvrpipe.store.layout import (
    APPENDING,
    CARD,
    CROISSANT,
    EPISODES,
    GOLDEN,
    MANIFEST,
    REVISIONS,
    SHARDS,
    SUFFIXES,
    commit_file,
    read_commit,
    read_manifest,
    read_manifest_file,
    refuse_inside_store,
    revision_file,
    shard_file,
)
from pvrpipe.store.moments import merged, statistics_of
from pvrpipe.store.writing import COUNTED, ShardWriter

__all__ = ["PendingStore", "ShardWriter"]


class PendingStore:
    """The store in ``folder``, held against other writers while this object is open."""

    def __init__(self, folder: Path, manifest: Manifest, lock: contextlib.ExitStack) -> None:
        self.folder, self.manifest, self._lock = folder, manifest, lock
        done = self.commits()
        self.todo = tuple(p for p in manifest.plan if p.shard not in done)
        if manifest.state == "sealed" and self.todo:  # someone removed a shard: it is made again
            self.manifest = manifest.model_copy(update={"state": "writing", "id": None, "shards": ()})
        self._refuse_lost()
        self.resumed = len(manifest.plan) - len(self.todo)

    @classmethod
    def begin(cls, folder: Path, draft: Manifest, overwrite: bool = False) -> PendingStore:
        """Begin a store, or go on with one that was begun with the same configuration.

        A draft made by :func:`pvrpipe.store.growing.grown` is written beside the sealed store, which can be
        read as it is until the new revision is sealed.

        Raises:
            OutputExistsError: the folder holds something else, or lies in a store; it is left as it is.
            StoreBusyError: another process is writing there.
        """
        refuse_inside_store(folder)
        make_folder(folder)
        with disk_errors(folder), contextlib.ExitStack() as stack:
            stack.enter_context(locked(folder))
            existing = _existing(folder, draft, overwrite)
            _refuse_other_kind(folder, existing, draft)
            if existing is not None and not overwrite:
                _refuse_other(folder, existing, draft)
            if existing is None or overwrite:
                _clear(folder, draft)
                write_whole(folder / _draft_file(draft), draft.to_json().encode())
                existing = draft
            remove_temporaries(folder)
            remove_temporaries(folder / SHARDS)
            if read_draft(folder) is None:
                (folder / APPENDING).unlink(missing_ok=True)  # killed right after sealing
            return cls(folder, existing, stack.pop_all())

    def _refuse_lost(self) -> None:
        """A shard of an earlier revision was made by an earlier command; this one cannot make it again."""
        earlier = self.manifest.earlier[-1].shards if self.manifest.earlier else 0
        if self.todo and self.todo[0].shard < earlier:
            raise CorruptStoreError(
                f"{self.folder} has lost shard {self.todo[0].shard} of an earlier revision; get it again"
            )

    @classmethod
    def peek(cls, folder: Path, draft: Manifest, overwrite: bool = False) -> tuple[ShardPlan, ...]:
        """The shards that are missing; nothing is written or held.

        Raises:
            OutputExistsError: as :meth:`begin`.
        """
        refuse_inside_store(folder)
        existing = _existing(folder, draft, overwrite) if folder.is_dir() else None
        _refuse_other_kind(folder, existing, draft)
        if existing is None or overwrite:
            return draft.plan[draft.earlier[-1].shards if draft.earlier else 0 :]
        _refuse_other(folder, existing, draft)
        return cls(folder, existing, contextlib.ExitStack()).todo

    def abandon(self) -> None:
        """Leave nothing of a store that was never sealed, nor of its folder if there is nothing else in it."""
        _clear(self.folder, self.manifest)
        (self.folder / MANIFEST).unlink(missing_ok=True)
        remove_temporaries(self.folder / SHARDS)
        for folder in (self.folder / SHARDS, self.folder):
            with contextlib.suppress(OSError):  # something else lies in it
                folder.rmdir()

    def commits(self) -> dict[int, ShardCommit]:
        """The shards that exist: those whose commit record and bytes are both there."""
        found = {}
        for plan in self.manifest.plan:
            commit = read_commit(self.folder, plan.shard)
            path = self.folder / shard_file(plan.shard, self.manifest.shard_format)
            if commit is not None and path.is_file() and path.stat().st_size == commit.bytes:
                found[plan.shard] = commit
        return found

    @property
    def is_whole(self) -> bool:
        """Whether all its shards are there by now."""
        return len(self.commits()) == len(self.manifest.plan)

    def seal(self, golden: Mapping[str, NDArray[np.generic]] | None = None) -> Manifest:
        """Write the episode table, the golden frames and the card, and the manifest last.

        The bytes follow from the commit records alone, so they are the same whoever wrote the shards.
        Of a store that has grown, the manifest as it was is kept first; nothing else of it is changed.
        """
        if self.manifest.state == "sealed":
            return self.manifest
        ordered = self._all_commits()
        remove_temporaries(self.folder / SHARDS)  # of workers that died, and whose shards others made
        files = {self.manifest.episodes_file: _episodes_file(ordered)}
        if golden is not None:
            files[GOLDEN] = safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in golden.items()})
        for name, data in files.items():
            write_whole(self.folder / name, data)
        kept = self._keep_revision() if self.manifest.revision > 1 else {}
        hashes = {name: sha256_of(self.folder / name) for name in files}
        self.manifest = self._sealed(ordered, kept | hashes)
        write_whole(self.folder / CARD, card(self.manifest).encode())
        (self.folder / CROISSANT).unlink(missing_ok=True)  # of an earlier revision
        write_whole(self.folder / MANIFEST, self.manifest.to_json().encode())
        (self.folder / APPENDING).unlink(missing_ok=True)
        return self.manifest

    def _keep_revision(self) -> dict[str, str]:
        """Keep the manifest as it was under ``revisions/``; the hashes of all files that stay."""
        before = read_manifest(self.folder)
        kept = revision_file(before.revision)
        (self.folder / kept).parent.mkdir(exist_ok=True)
        write_whole(self.folder / kept, before.to_json().encode())
        return {**before.files, kept: sha256_of(self.folder / kept)}

    def as_sealed(self) -> Manifest:
        """The manifest with all shards in it, before the files beside them are written."""
        return self.manifest if self.manifest.state == "sealed" else self._sealed(self._all_commits(), {})

    def _all_commits(self) -> list[ShardCommit]:
        commits = self.commits()
        if len(commits) < len(self.manifest.plan):
            raise UnfinishedStoreError(
                f"{self.folder}: {len(commits)} of {len(self.manifest.plan)} shards are there; run it again"
            )
        counted = {c.name: c.shape[-1] for c in self.manifest.columns if c.name in COUNTED and c.shape}
        for shard, commit in commits.items():
            if {name: len(moments.mean) for name, moments in commit.moments.items()} != counted:
                raise CorruptStoreError(
                    f"{self.folder / commit_file(shard)} has statistics of other columns; get the store again"
                )
        return [commits[plan.shard] for plan in self.manifest.plan]

    def _sealed(self, commits: list[ShardCommit], files: dict[str, str]) -> Manifest:
        """The manifest of the finished store."""
        return self.manifest.model_copy(
            update={
                "state": "sealed",
                "id": store_id(self.manifest.specification, [c.sha256 for c in commits], self.manifest.parts),
                "rows": sum(c.rows for c in commits),
                "episodes": sum(len(c.episodes) for c in commits),
                "bytes": sum(c.bytes for c in commits),
                "shards": tuple(
                    ShardEntry(
                        file=c.file,
                        rows=c.rows,
                        episodes=len(c.episodes),
                        bytes=c.bytes,
                        sha256=c.sha256,
                        row_groups=c.row_groups,
                        batch=c.batch,
                    )
                    for c in commits
                ),
                "files": files,
                "statistics": {
                    name: statistics_of(merged(c.moments[name] for c in commits))
                    for name in sorted(commits[0].moments)
                },
                "failed": tuple(failure for c in commits for failure in c.failed),
            }
        )

    def __enter__(self) -> Self:
        """Hold the folder."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the folder go."""
        self._lock.close()


def new_manifest(
    specification: Any,
    columns: tuple[Column, ...],
    plan: tuple[ShardPlan, ...],
    shard_format: Literal["parquet", "webdataset"] = "parquet",
) -> Manifest:
    """The draft that a store is begun with."""
    if shard_format == "webdataset":  # members of a tar are not compressed
        columns = tuple(c.model_copy(update={"layout": "mapped"}) for c in columns)
    return Manifest(
        kind=specification.kind,
        shard_format=shard_format,
        state="writing",
        specification=specification,
        columns=columns,
        plan=plan,
    )


def _draft_file(draft: Manifest) -> str:
    return MANIFEST if draft.revision == 1 else APPENDING


def _existing(folder: Path, draft: Manifest, overwrite: bool) -> Manifest | None:
    """What of the draft's revision the folder already holds; a folder of strangers' files is never touched."""
    if (folder / MANIFEST).is_file():
        try:
            existing = read_manifest(folder)
        except PvrpipeError:
            if overwrite and draft.revision == 1:
                return None
            raise
        if existing.revision + 1 != draft.revision:
            return existing
        _refuse_another_past(folder, existing, draft)
        return read_draft(folder)
    others = sorted(p.name for p in folder.iterdir() if p.name != SHARDS and TEMPORARY not in p.name)
    if others or any((folder / SHARDS).glob("*.json")):
        raise OutputExistsError(
            f"{folder} is not empty and holds no store ({', '.join(others[:3])}); choose another output"
        )
    return None


def read_draft(folder: Path) -> Manifest | None:
    """The revision that is being appended to a sealed store, if one was begun."""
    path = folder / APPENDING
    draft = read_manifest_file(path) if path.is_file() else None
    return draft if draft is not None and draft.revision > read_manifest(folder).revision else None


def _refuse_another_past(folder: Path, existing: Manifest, draft: Manifest) -> None:
    """Only what the draft was made from may grow."""
    if existing.state != "sealed" or existing.id != draft.earlier[-1].id:
        raise OutputExistsError(
            f"{folder} is no longer the store that was to grow (id {str(existing.id)[:12]}); run it again"
        )


def _refuse_other_kind(folder: Path, existing: Manifest | None, draft: Manifest) -> None:
    """Embeddings are never another configuration of rollouts: a path mistaken for another is not overwritten."""
    if existing is not None and existing.kind != draft.kind:
        raise OutputExistsError(
            f"{folder} holds {existing.kind}, which {draft.kind} never replace; choose another output"
        )


def _refuse_other(folder: Path, existing: Manifest, draft: Manifest) -> None:
    """Refuse to go on with another configuration, and say which fields differ."""
    if existing.revision > draft.revision:
        raise OutputExistsError(
            f"{folder} has grown to {existing.episodes} episodes (revision {existing.revision}); "
            "let it grow with --append, choose another output, or replace it with --overwrite"
        )
    made = {"kind", "shard_format", "specification", "parts", "earlier", "taken"}
    cut = {"columns", "plan"}  # these mostly follow from the rest, and are named only where they do not
    for fields in (made, cut):
        old, new = (m.model_dump(mode="json", include=fields) for m in (existing, draft))
        if differ := differences(old, new):
            raise OutputExistsError(
                f"{folder} was begun with another configuration ({differ}); "
                "choose another output, or replace it with --overwrite"
            )


def _clear(folder: Path, draft: Manifest) -> None:
    """Remove a store's own files, commit records first, so that a half-cleared store has no shard.

    Of a store that is to grow, only shards that no revision holds are removed.
    """
    shards = folder / SHARDS
    shards.mkdir(exist_ok=True)
    kept = draft.earlier[-1].shards if draft.earlier else 0
    for pattern in ("*.json", *(f"*{suffix}" for suffix in SUFFIXES.values())):
        for path in shards.glob(pattern):
            if path.stem.isdecimal() and int(path.stem) >= kept:
                path.unlink()
    (folder / APPENDING).unlink(missing_ok=True)
    if draft.revision == 1:
        own = [folder / name for name in (EPISODES, GOLDEN, CARD, CROISSANT)]
        own += [*folder.glob("episodes-?????.parquet"), *folder.glob(f"{REVISIONS}/?????.json")]
        for path in own:
            path.unlink(missing_ok=True)


def _episodes_file(commits: list[ShardCommit]) -> bytes:
    """``episodes.parquet``: the episode records of all shards, in order."""
    table = pa.Table.from_pylist(episode_rows([r for c in commits for r in c.episodes]))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()
