"""Whether every byte and number of a store holds: the content of ``pvrpipe verify``."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from pvrpipe.schemas.errors import CorruptStoreError, PvrpipeError, one_line
from pvrpipe.schemas.manifest import EpisodeRecord, Manifest, ShardCommit, store_id
from pvrpipe.schemas.progress import Progress, silent
from pvrpipe.store.cache import Cache
from pvrpipe.store.casting import is_finite
from pvrpipe.store.episodes import episode_rows
from pvrpipe.store.files import sha256_of
from pvrpipe.store.golden import read_golden
from pvrpipe.store.layout import COMMITTED, GOLDEN, MANIFEST, files_of, read_commit, read_manifest, shard_file
from pvrpipe.store.moments import RunningMoments, statistics_of
from pvrpipe.store.places import Place, place_of
from pvrpipe.store.planning import split_in
from pvrpipe.store.reading import Store
from pvrpipe.store.shards import Rows, Shard
from pvrpipe.store.webdataset import PLACE, WebDatasetShard

RETURN_TOLERANCE = 1e-3  # relative; rewards are float32, and an environment sums them in float64


@dataclass(frozen=True)
class Failure:
    """What does not hold, and where."""

    where: str
    what: str


def verify(path: Place | str, progress: Progress = silent, sample: int | None = None) -> list[Failure]:
    """Every failure found; an empty list is a store that holds. A store behind a URL is fetched anew.

    Args:
        path: of a store, or its URL.
        progress: told shards.
        sample: check the bytes and rows of so many shards only, evenly spaced, for a store too big to read
            whole; all that the manifest, the episode table and the commit records say is checked all the same.

    Checked: the manifest against its schema and its id, the sha256 of every file, commit records
    against the manifest, footers and columns, episode bounds and alignment, finite values, returns,
    splits, statistics, and golden frames against the rows that they are of.

    Raises:
        PvrpipeError: there is no sealed store to check.
    """
    place = place_of(path)
    if isinstance(place, Path):
        manifest = read_manifest(place)
        chosen = _chosen(manifest, sample)
        failures = list(_links(place, manifest)) or list(_files(place, manifest, chosen))
        # the rows of a damaged file prove nothing
        return failures or _rows(Store.open(place), place, progress, chosen)
    with Cache.from_environment().empty() as cache:
        store = Store.open(place, cache=cache)
        chosen = _chosen(store.manifest, sample)
        failures = list(_fetched(store, progress, chosen))
        with store.file(MANIFEST) as file:
            return failures or _rows(store, file.parent, progress, chosen)


def _chosen(manifest: Manifest, sample: int | None) -> frozenset[int]:
    """The shards whose bytes and rows are checked."""
    shards = len(manifest.shards)
    if sample is None or sample >= shards:
        return frozenset(range(shards))
    return frozenset(np.linspace(0, shards - 1, sample).astype(int).tolist())


def _fetched(store: Store, progress: Progress, chosen: Container[int]) -> Iterator[Failure]:
    """Names, sizes and hashes of what is behind a URL."""
    skipped = {entry.file for index, entry in enumerate(store.manifest.shards) if index not in chosen}
    files = [file for file in files_of(store.manifest) if file.name not in skipped]
    for done, file in enumerate(files):
        progress(done, len(files), f"fetch {file.name}")
        try:
            with store.file(file.name):
                pass
        except CorruptStoreError as error:
            yield Failure(file.name, one_line(error))


def _rows(store: Store, path: Path, progress: Progress, chosen: Container[int]) -> list[Failure]:
    """What the rows say, of a store whose files are what its manifest promises; commit records in ``path``."""
    manifest, commits = store.manifest, {}
    failures: list[Failure] = []
    for index, entry in enumerate(manifest.shards):
        progress(index, len(manifest.shards), entry.file)
        commit = read_commit(path, index)
        if commit is None:
            failures.append(Failure(f"shards/{index:05d}.json", "the commit record is missing or invalid"))
            continue
        commits[index] = commit
        try:
            wrong = list(_commit(manifest, index, commit))
            # by a commit record that lies, no row is to be found
            failures += wrong or (_shard(store, manifest, index, commit) if index in chosen else ())
        except PvrpipeError as error:
            failures.append(Failure(entry.file, one_line(error)))
    progress(len(manifest.shards), len(manifest.shards))
    if len(commits) < len(manifest.shards):
        return failures
    whole = not failures and all(i in chosen for i in commits)
    if not failures:
        failures += _golden(store, chosen)
    return [*failures, *_whole(store, manifest, commits), *(_statistics(store, commits) if whole else ())]


def _links(path: Path, manifest: Manifest) -> Iterator[Failure]:
    """Names that lead out of the store, or would if they were followed: nothing behind them is the store's."""
    try:
        files = {file.name for file in files_of(manifest)}
    except CorruptStoreError as error:
        yield Failure(MANIFEST, one_line(error))
        return
    folders = {str(folder) for name in files for folder in PurePosixPath(name).parents} - {"."}
    for name in sorted(files | folders):
        if (path / name).is_symlink():
            yield Failure(name, "is a link, which may lead anywhere; copy the store with `cp -rL`")


def _files(path: Path, manifest: Manifest, chosen: Container[int]) -> Iterator[Failure]:
    """Names, sizes and hashes; of a shard that is not chosen, no hash."""
    unread = {entry.file for index, entry in enumerate(manifest.shards) if index not in chosen}
    expected: dict[str, tuple[int | None, str]] = {n: (None, digest) for n, digest in manifest.files.items()}
    expected |= {entry.file: (entry.bytes, entry.sha256) for entry in manifest.shards}
    for name, (size, digest) in expected.items():
        file = path / name
        if not file.is_file():
            yield Failure(name, "is missing")
        elif size is not None and file.stat().st_size != size:
            yield Failure(name, f"has {file.stat().st_size} bytes, not {size}")
        elif name not in unread and (found := sha256_of(file)) != digest:
            yield Failure(name, f"has sha256 {found[:12]}…, not {digest[:12]}…")
    hashes = [entry.sha256 for entry in manifest.shards]
    if manifest.id != store_id(manifest.specification, hashes, manifest.parts):
        yield Failure("store.json", "the id does not follow from the specification and the shards")
    for index, entry in enumerate(manifest.shards):
        if entry.file != shard_file(index, manifest.shard_format):
            yield Failure("store.json", f"shard {index} is called {entry.file}")
    for revision, before in enumerate(manifest.earlier, 1):
        parts = [part for part in manifest.parts if part.first_episode < before.episodes]
        if store_id(manifest.specification, hashes[: before.shards], parts) != before.id:
            yield Failure("store.json", f"the shards of revision {revision} are not those it was sealed with")


def _commit(manifest: Manifest, index: int, commit: ShardCommit) -> Iterator[Failure]:
    """What a commit record says, against the manifest."""
    entry, where = manifest.shards[index], f"shards/{index:05d}.json"
    for field in COMMITTED:
        if getattr(commit, field) != getattr(entry, field):
            yield Failure(where, f"'{field}' is not what the manifest says")
    plan = manifest.plan[index]
    numbers = [record.episode for record in commit.episodes]
    if numbers != list(range(plan.first_episode, plan.first_episode + plan.episodes)):
        yield Failure(where, "does not list the episodes that were planned")
    row = 0
    for record in commit.episodes:
        if record.row_start != row:
            yield Failure(where, f"episode {record.episode} does not begin at row {row}")
        if record.shard != index:
            yield Failure(where, f"says that episode {record.episode} is in shard {record.shard}")
        row += record.rows
    if row != entry.rows:
        yield Failure(where, f"lists episodes of {row} rows, but the shard has {entry.rows}")


def _shard(store: Store, manifest: Manifest, index: int, commit: ShardCommit) -> Iterator[Failure]:
    """One shard: footer, columns, then its episodes one by one."""
    entry = manifest.shards[index]
    shard = store.shard(index)
    wrong = list(shard.check_layout())
    yield from (Failure(f"{entry.file}:{name}".rstrip(":"), what) for name, what in wrong)
    if any(not name for name, _ in wrong):
        return
    if isinstance(shard, WebDatasetShard):
        for told, record in zip(shard.records(), commit.episodes, strict=False):
            if told != record.model_dump(mode="json", exclude=PLACE):
                yield Failure(
                    entry.file, f"says other things of episode {record.episode} than the commit record"
                )
    for record in commit.episodes:
        for name, what in _episode(shard, manifest, record):
            yield Failure(f"{entry.file}:{name}", f"episode {record.episode}: {what}")


def _episode(shard: Shard, manifest: Manifest, record: EpisodeRecord) -> Iterator[tuple[str, str]]:
    """Bounds, alignment and values of one episode, as (column, what is wrong)."""
    last = record.rows - 1
    arrays = {c.name: shard.rows(c.name, record.row_start, record.rows) for c in manifest.columns}
    step = np.arange(record.rows)
    holds: dict[str, Callable[[Rows], bool]] = {
        "episode": lambda a: bool((a == record.episode).all()),
        "step": lambda a: bool((a == step).all()),
        "is_first": lambda a: bool((a == (step == 0)).all()),
        "is_last": lambda a: bool((a == (step == last)).all()),
        "is_terminal": lambda a: bool((a == ((step == last) & record.terminated)).all()),
        "reward": lambda a: a[0] == 0 and _close(float(a.sum(dtype=np.float64)), record.episode_return),
        "action": lambda a: not a[-1].any(),
    }
    means = {"reward": "the first is not 0, or they do not sum to the return", "action": "the last is not 0"}
    for column, array in arrays.items():
        if array.dtype.kind == "f" and not is_finite(array):
            yield column, "has a value that is not finite"
        elif column in holds and not holds[column](array):
            yield column, means.get(column, "does not follow the episode's bounds")


def _whole(store: Store, manifest: Manifest, commits: dict[int, ShardCommit]) -> Iterator[Failure]:
    """What only the whole store shows: totals, the episode table, splits."""
    records = [r for i in sorted(commits) for r in commits[i].episodes]
    if store.episodes.drop("row_first").to_dicts() != episode_rows(records):
        yield Failure(manifest.episodes_file, "does not list the episodes of the commit records")
    totals = {"rows": sum(r.rows for r in records), "episodes": len(records)}
    totals["bytes"] = sum(e.bytes for e in manifest.shards)
    for field, total in totals.items():
        if getattr(manifest, field) != total:
            yield Failure(
                "store.json", f"'{field}' is {getattr(manifest, field)}, but the shards hold {total}"
            )
    planned = sum(plan.episodes for plan in manifest.plan)
    for record in records if manifest.splits == "hash" else ():
        if record.episode >= planned:
            yield Failure(
                manifest.episodes_file, f"episode {record.episode} is none of the {planned} planned"
            )
        elif record.split != split_in(manifest, record.episode):
            yield Failure(manifest.episodes_file, f"episode {record.episode} is in the wrong split")


def _golden(store: Store, chosen: Container[int]) -> Iterator[Failure]:
    """Golden frames are a sample of the store: where their rows are told, these have the same embeddings."""
    try:
        golden = read_golden(store) or {}
    except CorruptStoreError as error:
        yield Failure(GOLDEN, one_line(error))
        return
    first = np.cumsum([0, *(entry.rows for entry in store.manifest.shards)])
    for row, embedding in zip(golden.get("row", ()), golden.get("embedding", ()), strict=False):
        shard = int(np.searchsorted(first, row, "right")) - 1
        if not 0 <= row < first[-1]:
            yield Failure(GOLDEN, f"is about row {row}, which the store does not have")
        elif shard in chosen and not np.array_equal(
            store.shard(shard).rows("embedding", int(row - first[shard]), 1)[0], embedding
        ):
            yield Failure(GOLDEN, f"does not hold the embedding of row {row}")


def _statistics(store: Store, commits: dict[int, ShardCommit]) -> Iterator[Failure]:
    """Mean and standard deviation, from the rows themselves."""
    records = [r for i in sorted(commits) for r in commits[i].episodes]
    for name, promised in store.manifest.statistics.items():
        if not store.column(name).shape:
            yield Failure("store.json", f"has statistics of '{name}', which is no vector")
            continue
        running = RunningMoments(store.column(name).shape[-1])
        for record in records:
            if record.split == "train":
                rows = store.shard(record.shard).rows(name, record.row_start, record.rows)
                running.add(rows[:-1] if name == "action" else rows)
        found = statistics_of(running.told())
        for field in ("mean", "std"):
            values = getattr(found, field), getattr(promised, field)
            if len(values[0]) != len(values[1]) or not np.allclose(*values, rtol=1e-6, atol=1e-9):
                yield Failure("store.json", f"the {field} of '{name}' is not that of the training rows")


def _close(found: float, promised: float) -> bool:
    return abs(found - promised) <= RETURN_TOLERANCE * max(1.0, abs(promised))
