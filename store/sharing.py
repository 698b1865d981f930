"""Stores handed from lab to lab: ``push`` publishes what verifies, ``pull`` takes what is as promised.

Both go on where they were stopped. A published shard counts if and only if its size and its identical commit
record are there, and a store if and only if its ``store.json`` is, which both write last.
"""

from __future__ import annotations

import re
import time
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pvrpipe.schemas.errors import CorruptStoreError, InvalidValueError, OutputExistsError
from pvrpipe.schemas.manifest import Manifest
from pvrpipe.schemas.progress import Progress, silent
from pvrpipe.store.destination import Destination, published, what_is_there
from pvrpipe.store.episodes import episode_rows, read_episodes
from pvrpipe.store.files import disk_errors, locked, remove_temporaries, write_whole
from pvrpipe.store.hub import is_hub, push_to_hub
from pvrpipe.store.layout import (
    MANIFEST,
    PULLING,
    SHARDS,
    StoreFile,
    files_of,
    parse_manifest,
    read_commit,
    read_manifest,
)
from pvrpipe.store.parallel import Tally, each
from pvrpipe.store.places import Place, Url, place_of, refuse_source
from pvrpipe.store.reading import Store
from pvrpipe.store.remote import Source, problem_of
from pvrpipe.store.verifying import verify

WORKERS = 8


@dataclass(frozen=True)
class Shared:
    """What was pushed or pulled."""

    store: Path
    url: str
    id: str
    kind: str
    files: int
    """of the store"""
    resumed: int
    """files that were there already"""
    bytes: int
    """moved now"""
    seconds: float
    licence: str | None
    """of the weights that made the embeddings"""


def push(
    store: Path | str,
    url: Place | str,
    *,
    workers: int = WORKERS,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Shared:
    """Publish a store at a URL or in another folder; after a stop it goes on.

    Args:
        store: a store on this machine; it is verified first.
        url: where to; a place that holds what this store has grown from is brought up to date.
        workers: files at once.
        overwrite: replace another store that is there, and shards whose bytes are no longer those of this one:
            whatever is there is read.
        progress: told MiB.

    Raises:
        CorruptStoreError: the store does not verify; nothing is published.
        OutputExistsError: another store is there, below or around it, or files that are none; they are left as
            they are.
        InvalidValueError: nothing can be pushed there, or the store is not on this machine.
        UnreachableError, MissingDriverError: the place does not answer.
    """
    began, folder, place = time.monotonic(), _on_this_machine(store), place_of(url)
    destination = Destination(place)
    if isinstance(place, Path):
        refuse_source(folder, place)
    destination.refuse_nesting()
    manifest = _verified(folder, progress)
    files = [f for f in files_of(manifest) if not f.optional or (folder / f.name).is_file()]
    sizes = {f.name: (folder / f.name).stat().st_size for f in files}
    tally = Tally(sum(sizes.values()), progress)
    with _alone_in(place):
        held = what_is_there(destination, folder, manifest, files, overwrite)
        present = _published(destination, folder, files, held, overwrite, workers)
        todo = [f for f in files if f.name not in present]

        def sent(name: str) -> None:
            tally.add(sizes[name], name)

        def send(group: Sequence[StoreFile]) -> None:
            for file in group:
                destination.put(folder / file.name, file.name)
                sent(file.name)

        tally.skip(sum(sizes[name] for name in present))
        stale = _stale(held, sizes) if overwrite else []
        if is_hub(place):
            push_to_hub(place, folder, [f.name for f in todo], stale, sent)
        else:
            shards, rest = _in_order(todo)
            each(send, shards, workers)
            send(rest)
            destination.remove(stale)
    return _shared(folder, place, manifest, files, present, tally, began)


def pull(url: Place | str, folder: Path, *, workers: int = WORKERS, progress: Progress = silent) -> Shared:
    """Fetch a store into a folder, byte for byte; after a stop it goes on, and damaged files are replaced.

    Args:
        url: a store behind a URL, or in another folder.
        folder: an empty one, or one that holds the same store: whole, an earlier revision of it, or as far as
            an earlier pull came.
        workers: files at once.
        progress: told MiB.

    Raises:
        CorruptStoreError: what is there is not what its manifest promises; the folder holds no store.
        NotAStoreError, UnfinishedStoreError, NewerFormatError: there is none to pull.
        OutputExistsError: the folder holds anything else; it is left as it is.
        StoreBusyError: another process is writing there.
        UnreachableError, MissingDriverError: the place does not answer.
    """
    began, source = time.monotonic(), Source(place_of(url))
    text, manifest = source.manifest()
    files = files_of(manifest)
    tally, present = Tally(manifest.bytes, progress), set[str]()

    with _alone_in(folder):
        sealed = _begun(folder, text)

        def take(group: Sequence[StoreFile]) -> None:
            for file in group:
                target = folder / file.name
                if target.is_file() and (sealed or not file.optional) and problem_of(file, target) is None:
                    present.add(file.name)
                    tally.skip(target.stat().st_size)
                else:
                    source.fetch(file, target, partial(tally.add, note=file.name))

        shards, rest = _in_order(files)
        each(take, shards, workers)
        take([file for file in rest if file.name != MANIFEST])
        _refuse_other_episodes(source, folder, manifest)
        if sealed:
            present.add(MANIFEST)
        else:
            write_whole(folder / MANIFEST, text)
            tally.add(len(text), MANIFEST)
        (folder / PULLING).unlink(missing_ok=True)
    return _shared(folder, source.place, manifest, files, present, tally, began)


def _on_this_machine(store: Path | str) -> Path:
    place = place_of(store)
    if isinstance(place, Url):
        raise InvalidValueError(f"{place} is not on this machine; `pvrpipe pull` it, then push the folder")
    return place


def _verified(folder: Path, progress: Progress) -> Manifest:
    """The manifest of a store of which every byte and number holds."""

    def tell(done: float, total: float, note: str = "") -> None:
        progress(0, 1, f"verify {note} ({done:.0f} of {total:.0f})")

    manifest = Store.open(folder).manifest
    failures = verify(folder, tell)
    if failures:
        more = f" and {len(failures) - 1} more" if len(failures) > 1 else ""
        raise CorruptStoreError(
            f"{folder} does not verify: {failures[0].where} {failures[0].what}{more}; nothing was published, "
            f"`pvrpipe verify {folder}` lists all of it"
        )
    return manifest


@contextmanager
def _alone_in(place: Place) -> Iterator[None]:
    """Hold a folder against other writers; behind a URL there is no such thing."""
    if isinstance(place, Url):
        yield
        return
    if place.exists() and not place.is_dir():
        raise OutputExistsError(f"{place} is a file; give a folder")
    with disk_errors(place):
        place.mkdir(parents=True, exist_ok=True)
        with locked(place):
            for folder in (place, *(p for p in place.iterdir() if p.is_dir() and p.name == SHARDS)):
                remove_temporaries(folder)
            yield


def _published(
    destination: Destination,
    folder: Path,
    files: Sequence[StoreFile],
    held: dict[str, int],
    overwrite: bool,
    workers: int,
) -> set[str]:
    """Names of the files that need not go again: equal small ones, and shards with an equal commit record.

    Where anything may be replaced, shards must be there byte for byte.
    """
    present: set[str] = set()
    shards, rest = _in_order(files)
    source = Source(destination.place)

    def there(shard: StoreFile) -> bool:
        return held.get(shard.name) == shard.size and (not overwrite or source.proves(shard))

    def look(group: Sequence[StoreFile]) -> None:
        *before, last = group
        same = published(destination, last, folder / last.name, held, overwrite)
        if same and all(map(there, before)):
            present.update(file.name for file in group)

    each(look, [*shards, *([file] for file in rest)], workers)
    return present


def _stale(held: dict[str, int], own: Container[str]) -> list[str]:
    """Shards and commit records of a store that was replaced."""
    return [n for n in held if n not in own and re.fullmatch(rf"{SHARDS}/\d+\.(parquet|tar|json)", n)]


def _in_order(files: Sequence[StoreFile]) -> tuple[list[list[StoreFile]], list[StoreFile]]:
    """Each shard with its commit record, to be moved in that order; and what comes after all of them."""
    groups: dict[str, list[StoreFile]] = {}
    rest = []
    for file in files:
        if file.name.startswith(f"{SHARDS}/"):
            groups.setdefault(Path(file.name).stem, []).append(file)
        else:
            rest.append(file)
    return list(groups.values()), rest


def _begun(folder: Path, text: bytes) -> bool:
    """Whether the folder holds this very store sealed; if not, mark it as being filled with it.

    Raises:
        OutputExistsError: it holds anything else.
    """
    if (folder / MANIFEST).is_file() and (folder / MANIFEST).read_bytes() == text:
        return True
    if (folder / PULLING).is_file() and (folder / PULLING).read_bytes() == text:
        return False
    if (folder / MANIFEST).is_file() and _grows_into(folder, text):
        write_whole(folder / PULLING, text)
        return False
    names = sorted(path.name for path in folder.iterdir())
    if names:
        raise OutputExistsError(
            f"{folder} holds something else than this store ({', '.join(names[:3])}); pull into an empty folder"
        )
    write_whole(folder / PULLING, text)
    return False


def _grows_into(folder: Path, text: bytes) -> bool:
    """Whether the folder holds an earlier revision of the store, which stays readable until the newer is whole."""
    held, coming = read_manifest(folder), parse_manifest(text, folder / PULLING)
    return held.state == "sealed" and held.id in [revision.id for revision in coming.earlier]


def _refuse_other_episodes(source: Source, folder: Path, manifest: Manifest) -> None:
    """Commit records have no hash of their own: their episodes must be those of the episode table."""
    commits = [read_commit(folder, shard) for shard in range(len(manifest.shards))]
    records = episode_rows([record for commit in commits if commit for record in commit.episodes])
    path = folder / manifest.episodes_file
    table = read_episodes(path, manifest, f"{source.place}: {path.name}").drop("row_first").to_dicts()
    if table != records:
        raise source.corrupt(
            StoreFile(manifest.episodes_file), "does not list the episodes of the commit records"
        )


def _shared(
    folder: Path,
    place: Place,
    manifest: Manifest,
    files: Sequence[StoreFile],
    present: set[str],
    tally: Tally,
    began: float,
) -> Shared:
    embeddings = manifest.embeddings
    return Shared(
        store=folder,
        url=str(place),
        id=str(manifest.id),
        kind=manifest.kind,
        files=sum((folder / file.name).is_file() for file in files),
        resumed=len(present),
        bytes=tally.moved,
        seconds=time.monotonic() - began,
        licence=embeddings.encoder.weights.licence if embeddings is not None else None,
    )
