"""Weights that lie at an address: fetched whole or not at all."""

from __future__ import annotations

import urllib.request
from pathlib import Path

from huggingface_hub.utils.tqdm import tqdm  # as files of the Hub show theirs

from pvrpipe.schemas.errors import WeightsError
from pvrpipe.store.cache import cache_errors
from pvrpipe.store.files import locked, remove_temporaries, replacing

PIECE = 1 << 20  # bytes
SILENCE = 60  # seconds in which nothing comes, until an address is given up


def fetch(url: str, target: Path) -> None:
    """Bring a file into the cache, one process at a time; another may have done it meanwhile.

    Raises:
        WeightsError: it ended before its end.
        OSError: it cannot be reached.
        DiskError: it cannot be kept.
    """
    with cache_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.parent, wait=True):
            if target.is_file():
                return
            remove_temporaries(target.parent)
            with replacing(target) as beside:
                _download(url, beside)


def _download(url: str, beside: Path) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "pvrpipe"})
    with urllib.request.urlopen(request, timeout=SILENCE) as answer, beside.open("wb") as file:
        length = answer.headers.get("Content-Length")
        promised = int(length) if length else None
        with tqdm(total=promised, desc=url[-40:], unit="B", unit_scale=True) as bar:
            while piece := answer.read(PIECE):
                bar.update(file.write(piece))
        came = file.tell()
    if promised not in (None, came):  # the library takes a closed connection for the end
        raise WeightsError(
            f"{url} ended after {came} of {promised} bytes; run the same command again, or give the file with "
            "--weights FILE_OR_FOLDER"
        )
