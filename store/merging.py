"""``pvrpipe merge`` and ``pvrpipe split``: stores put together, and taken apart by episode."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pvrpipe.schemas.differences import differences
from pvrpipe.schemas.errors import InvalidValueError, OutputExistsError
from pvrpipe.schemas.manifest import Manifest, ShardPlan
from pvrpipe.schemas.progress import Progress, silent
from pvrpipe.schemas.specifications import EmbeddingSpecification
from pvrpipe.store.growing import unlike
from pvrpipe.store.licences import strictest
from pvrpipe.store.places import Place
from pvrpipe.store.planning import plan_shards
from pvrpipe.store.reading import Store
from pvrpipe.store.rewriting import Rewritten, rewrite
from pvrpipe.store.selecting import Condition, select_episodes
from pvrpipe.store.selection import Selection
from pvrpipe.store.webdataset import PLACE

#: What of an episode may differ between the stores that it is in.
LOOSE = {"episode", "split", "distribution", *PLACE}
SEEN = {"frame", "embedding"}  # these are large, and follow from what was done


def merge(
    stores: Sequence[Place | str],
    out: Path,
    *,
    shard_rows: int | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Rewritten:
    """One new store with all episodes of several, in order; each keeps its split and how it was made.

    Licences of the same weights may be told differently; the strictest counts for all.

    Raises:
        InvalidValueError: fewer than two stores, one of them twice, or an episode that two of them have.
        OutputExistsError: they are not the same thing; the message says which field differs.
        PvrpipeError: as :func:`pvrpipe.store.rewriting.rewrite`.
    """
    opened = [Store.open(place) for place in stores]
    if len(opened) < 2:
        raise InvalidValueError("there is nothing to merge; give two stores or more")
    for number, store in enumerate(opened):
        if store.manifest.id in [other.manifest.id for other in opened[:number]]:
            raise InvalidValueError(
                f"{store.path} is given twice (id {str(store.manifest.id)[:12]}); give it once"
            )
        if differ := not_the_same(opened[0].manifest, store.manifest):
            raise OutputExistsError(
                f"{store.path} cannot be merged with {opened[0].path}: {differ}; merge only what is alike"
            )
    chosen = tuple((store, episode) for store in opened for episode in range(store.manifest.episodes))
    selection = Selection(chosen, licence=_licence(opened))
    _refuse_shared(selection)
    return rewrite(selection, out, _plan(selection, shard_rows), overwrite=overwrite, progress=progress)


def split(
    store: Place | str,
    out: Path,
    *,
    where: Condition = None,
    of: str | None = None,
    rest: Path | None = None,
    shard_rows: int | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> list[Rewritten]:
    """A new store with the episodes that fulfil a condition, and one with the rest if that is asked for.

    Args:
        store: what to take them from; it stays as it is.
        out: the new store.
        where: a polars expression over the episode table, or its text in SQL.
        of: only those of a split, ``train`` or ``val``.
        rest: another new store, with the episodes that ``out`` does not get.
        shard_rows: rows wanted in a shard.
        overwrite: replace other stores that are there.
        progress: told rows.

    Raises:
        InvalidValueError: no condition, one that does not fit, or one that leaves a store without episodes.
        PvrpipeError: as :func:`pvrpipe.store.rewriting.rewrite`.
    """
    if where is None and of is None:
        raise InvalidValueError(
            "which episodes? give --where, e.g. --where 'episode_return > 100', or --split"
        )
    if rest is not None and rest.resolve() == out.resolve():
        raise InvalidValueError(f"{out} cannot hold both halves; choose another folder for --rest")
    source = Store.open(store)
    chosen = select_episodes(source.episodes, of, where)["episode"].to_list()
    others = sorted(set(range(source.manifest.episodes)) - set(chosen))
    asked = [(out, chosen), *([(rest, others)] if rest is not None else [])]
    for folder, episodes in asked:
        if not episodes:
            raise InvalidValueError(
                f"no episode would be left for {folder}; `pvrpipe inspect {source.path}` shows their returns"
            )
    made = []
    for folder, episodes in asked:
        selection = Selection.of(source, episodes)
        plan = _plan(selection, shard_rows)
        made.append(rewrite(selection, folder, plan, overwrite=overwrite, progress=progress))
    return made


def not_the_same(first: Manifest, other: Manifest) -> str:
    """The fields in which two stores do not hold the same thing; empty if they do."""
    if differ := differences({"kind": first.kind}, {"kind": other.kind}, "there"):
        return differ
    if differ := unlike(_unlicensed(first.specification), _unlicensed(other.specification)):
        return differ
    if differ := unlike(first.rollouts, other.rollouts):
        return f"rollouts.{differ}" if first.kind == "embeddings" else differ
    return differences(_columns(first), _columns(other), "there")


def _refuse_shared(selection: Selection) -> None:
    """No episode is to count twice, nor to be in both splits.

    Raises:
        InvalidValueError: two stores share episodes; the message names both.
    """
    for (owner, store), episodes in _shared(selection).items():
        few = ", ".join(map(str, sorted(episodes)[:3])) + (", …" if len(episodes) > 3 else "")
        all_of_it = len(episodes) == store.manifest.episodes
        cure = "leave it out" if all_of_it else "take those out of it first with `pvrpipe split`"
        raise InvalidValueError(
            f"{store.path} shares {len(episodes)} of its {store.manifest.episodes} episodes ({few}) with "
            f"{owner.path}; {cure}"
        )


def _shared(selection: Selection) -> dict[tuple[Store, Store], list[int]]:
    """What two stores both have, by its numbers in the later one: splits, copies, earlier revisions of one another.

    Where seed, policy, look, length and return are the same, the rows decide: ids would tell of the store that
    episodes were taken from, but not of the one that they had been taken from before.
    """
    alike: dict[str, list[int]] = {}
    for number, record in enumerate(selection.records):
        alike.setdefault(record.model_dump_json(exclude=LOOSE), []).append(number)
    owners: dict[str, Store] = {}
    shared: dict[tuple[Store, Store], list[int]] = {}
    for numbers in alike.values():
        if len({selection.chosen[number][0] for number in numbers}) < 2:
            continue
        for number in numbers:
            store, episode = selection.chosen[number]
            owner = owners.setdefault(_digest(selection, number), store)
            if owner is not store:
                shared.setdefault((owner, store), []).append(episode)
    return shared


def _digest(selection: Selection, number: int) -> str:
    """Of what was done in an episode and what came of it, whatever saw it."""
    columns = [c.name for c in selection.columns if c.name not in SEEN and c.name != "episode"]
    digest = hashlib.sha256()
    for name, rows in selection.rows(number, columns).items():
        digest.update(name.encode())
        digest.update(rows.tobytes())
    return digest.hexdigest()


def _columns(manifest: Manifest) -> dict[str, Any]:
    return {"column": {c.name: f"{c.dtype} {list(c.shape)}" for c in manifest.columns}}


def _unlicensed(made: Any) -> Any:
    """A specification without the licence of its weights, of which the strictest is kept."""
    if not isinstance(made, EmbeddingSpecification):
        return made
    weights = made.encoder.weights.model_copy(update={"licence": ""})
    return made.model_copy(update={"encoder": made.encoder.model_copy(update={"weights": weights})})


def _licence(stores: Sequence[Store]) -> str | None:
    """The strictest licence that any part of any store tells, where these are embeddings."""
    made = [part.specification for store in stores for part in store.manifest.all_parts]
    told = [s.encoder.weights.licence for s in made if isinstance(s, EmbeddingSpecification)]
    return strictest(told) if told else None


def _plan(selection: Selection, shard_rows: int | None) -> tuple[ShardPlan, ...]:
    """Shards of the usual size."""
    return plan_shards(len(selection), -(-selection.total_rows // len(selection)), shard_rows)
