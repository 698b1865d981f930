"""Growing a sealed store: episodes join it as a new revision, and nothing of the earlier ones changes."""

from __future__ import annotations

from typing import Any

from pvrpipe.schemas.differences import differences
from pvrpipe.schemas.errors import OutputExistsError
from pvrpipe.schemas.manifest import EarlierRevision, Manifest, Part, ShardPlan
from pvrpipe.store.building import new_manifest

#: What may differ between episodes of one store. The rest decides what a row means.
FREE: dict[str, Any] = {
    "rollouts": dict.fromkeys(
        ("episodes", "max_steps", "policy", "seed", "variation", "replay_of", "renderer", "versions"), True
    ),
    "embeddings": {
        "rollouts_id": True,
        "rollouts": True,
        "versions": True,
        "computation": {"device", "threads", "batch", "compiled"},  # not the precision
    },
}


def grown(sealed: Manifest, specification: Any, plan: tuple[ShardPlan, ...]) -> Manifest:
    """The draft of the next revision of a sealed store.

    Args:
        sealed: the store as it is.
        specification: how the episodes that join it are made.
        plan: the shards that hold them, behind those there are.

    Raises:
        OutputExistsError: these episodes are not of the same kind; the message says which fields differ.
    """
    refuse_unlike(sealed, specification)
    part = Part(
        first_episode=sealed.episodes, episodes=sum(p.episodes for p in plan), specification=specification
    )
    before = EarlierRevision(
        id=str(sealed.id), shards=len(sealed.shards), episodes=sealed.episodes, rows=sealed.rows
    )
    fresh = new_manifest(sealed.specification, sealed.columns, (*sealed.plan, *plan), sealed.shard_format)
    return fresh.model_copy(
        update={
            "revision": sealed.revision + 1,
            "parts": (*sealed.parts, part),
            "earlier": (*sealed.earlier, before),
            "splits": sealed.splits,
            "taken": sealed.taken,
        }
    )


def refuse_unlike(sealed: Manifest, specification: Any) -> None:
    """Refuse episodes that are not of the kind of those that a store holds.

    Raises:
        OutputExistsError: the message says which fields differ.
    """
    if differ := unlike(sealed.specification, specification):
        raise OutputExistsError(
            f"these episodes cannot join the store: {differ}; choose another output for them"
        )


def unlike(first: Any, other: Any) -> str:
    """The fields in which two specifications say that rows mean something else; empty if none."""
    old, new = (s.model_dump(mode="json", exclude=FREE[s.kind]) for s in (first, other))
    return differences(old, new, "there")
