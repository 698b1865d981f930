"""Pushing to the Hugging Face Hub, where every upload is a git commit: files go in batches, not one by one.

Not run against the Hub so far: where this was written, it could not be reached. Reading and pulling
``hf://`` go through the Hub's own fsspec driver, as any other URL does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from pvrpipe.schemas.errors import InvalidValueError
from pvrpipe.store.places import Place, Url, patiently, reaching

BATCH = 100  # files in one commit: 50 shards and their commit records
_ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.+))?")


def is_hub(place: Place) -> bool:
    """Whether a place is on the Hub."""
    return isinstance(place, Url) and str(place).startswith("hf://")


def push_to_hub(place: Place, folder: Path, names: Sequence[str], sent: Callable[[str], None]) -> None:
    """Upload files of a store in their order, ``store.json`` in the last commit.

    Args:
        place: ``hf://datasets/owner/name``, with ``@revision`` and ``/folder`` if wanted; made if it is not there.
        folder: the store.
        names: what to upload.
        sent: told each name that has arrived.

    Raises:
        InvalidValueError: the address is none of a dataset.
        UnreachableError: the Hub does not answer, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    address = _ADDRESS.fullmatch(str(place))
    if address is None:
        raise InvalidValueError(f"{place} is no dataset of the Hub; write hf://datasets/OWNER/NAME")
    repo, revision, inside = address.groups()
    api, prefix = HfApi(), f"{inside}/" if inside else ""
    with reaching(place):
        api.create_repo(repo, repo_type="dataset", exist_ok=True)
    for start in range(0, len(names), BATCH):
        batch = names[start : start + BATCH]
        added = [CommitOperationAdd(prefix + name, folder / name) for name in batch]

        def commit(added: list[CommitOperationAdd] = added) -> None:
            with reaching(place):
                api.create_commit(
                    repo, added, commit_message="pvrpipe push", repo_type="dataset", revision=revision
                )

        patiently(commit)
        for name in batch:
            sent(name)
