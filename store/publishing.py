"""``pvrpipe card``: the files by which others find and understand a store, written beside it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

from pvrpipe.schemas.addresses import refuse_url
from pvrpipe.schemas.errors import InvalidValueError
from pvrpipe.schemas.manifest import canonical_json
from pvrpipe.store.card import card
from pvrpipe.store.croissant import croissant
from pvrpipe.store.files import locked, write_whole
from pvrpipe.store.layout import CARD, CROISSANT
from pvrpipe.store.reading import Store

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s/][^\s]*")


@dataclass(frozen=True)
class Cards:
    """What was written."""

    store: Path
    id: str
    card: Path
    croissant: Path
    licence: str | None


def write_cards(
    folder: Path, *, url: str | None = None, creator: str = "unknown", published: date | None = None
) -> Cards:
    """Write ``README.md`` for people and the Hub, ``croissant.json`` for machines; neither is hashed.

    Args:
        folder: of a sealed store on this machine.
        url: where it is or will be published.
        creator: who made it.
        published: default: today.

    Raises:
        NotAStoreError, UnfinishedStoreError: there is no sealed store.
        InvalidValueError: it is behind a URL; or ``url`` is none, or ``creator`` no line of text.
    """
    refuse_url(folder)
    if url is not None and not ADDRESS.fullmatch(url):
        raise InvalidValueError(
            f"--url {url!r} is no URL; write e.g. https://lab.org/walk or hf://datasets/OWNER/NAME"
        )
    if not creator.strip() or not creator.isprintable():
        raise InvalidValueError(f"--creator {creator!r} is no name; give one line, e.g. 'Our Lab'")
    manifest = Store.open(folder).manifest
    told = croissant(folder, manifest, url, creator, published or datetime.now(UTC).date())
    with locked(folder):
        write_whole(folder / CARD, card(manifest).encode())
        write_whole(folder / CROISSANT, canonical_json(told).encode())
    embeddings = manifest.embeddings
    licence = embeddings.encoder.weights.licence if embeddings is not None else None
    return Cards(folder, str(manifest.id), folder / CARD, folder / CROISSANT, licence)
