"""Pushing to the Hugging Face Hub, where every upload is a git commit: files go in batches, not one by one.

Reading and pulling ``hf://`` go through the Hub's own fsspec driver, as any other URL does. Run against a server on
loopback that answers its client as the Hub does (``tests/hub.py``), never against the Hub itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from pvrpipe.schemas.errors import InvalidValueError
from pvrpipe.store.places import Place, Url, filesystem, patiently, reaching

BATCH = 100  # files in one commit: 50 shards and their commit records
_ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.+))?")


def is_hub(place: Place) -> bool:
    """Whether a place is on the Hub."""
    return isinstance(place, Url) and str(place).startswith("hf://")


def address_of(place: Place) -> tuple[str, str | None, str]:
    """The data set, ``owner/name``; its revision; the folder in it, with a slash behind, or nothing.

    Raises:
        InvalidValueError: the address is none of a data set.
    """
    address = _ADDRESS.fullmatch(str(place))
    if address is None:
        raise InvalidValueError(f"{place} is no data set of the Hub; write hf://datasets/OWNER/NAME")
    repo, revision, inside = address.groups()
    return repo, revision, f"{inside}/" if inside else ""


def ask_anew(place: Place) -> None:
    """Let the driver forget what it was told of the Hub: unlike others it keeps listings whatever it is told."""
    if is_hub(place):
        driver, _ = filesystem(str(place))
        type(driver).clear_instance_cache()  # of this thread and of all others


def push_to_hub(
    place: Place, folder: Path, names: Sequence[str], stale: Sequence[str], sent: Callable[[str], None]
) -> None:
    """Upload files of a store in their order, ``store.json`` in the last commit, and remove others with it.

    Args:
        place: ``hf://datasets/owner/name``, with ``@revision`` and ``/folder`` if wanted; made if it is not there.
        folder: the store.
        names: what to upload.
        stale: what to remove.
        sent: told each name that has arrived.

    Raises:
        InvalidValueError: the address is none of a data set.
        UnreachableError: the Hub does not answer, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    repo, revision, prefix = address_of(place)
    if not names and not stale:
        return
    api = HfApi()
    with reaching(place):
        api.create_repo(repo, repo_type="dataset", exist_ok=True)
    starts = range(0, max(len(names), 1), BATCH)
    for start in starts:
        batch, removed = names[start : start + BATCH], stale if start == starts[-1] else []
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(prefix + name, folder / name) for name in batch),
            *(CommitOperationDelete(prefix + name) for name in removed),
        ]

        def commit(operations: list[CommitOperationAdd | CommitOperationDelete] = operations) -> None:
            with reaching(place):
                api.create_commit(
                    repo, operations, commit_message="pvrpipe push", repo_type="dataset", revision=revision
                )

        patiently(commit)
        for name in batch:
            sent(name)
    ask_anew(place)
