"""Whether a page is of what its study says now: a digest in it of the records, and of the code that drew it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import pvrpipe
from pvrpipe.schemas.study_record import StudyRecord

HEAD = 4096  # bytes of a page that have its stamp
STAMP = re.compile(r'<meta name="pvrpipe-made-of" content="([0-9a-f]*)">')
#: Of a record, what changes without the page: how it was called, and when files that are the same were written.
BESIDE: Any = {"command": True, "versions": True, "others": True, "stores": {"__all__": {"checked"}}}


def stamp_of(records: Sequence[StudyRecord]) -> str:
    """Of the records of studies, this version, and all files that decide what a page looks like and says."""
    package = files("pvrpipe.worldmodel")
    drawn = sorted(
        (part for part in package.iterdir() if part.name.startswith(("report", "statistics.py"))),
        key=lambda part: part.name,
    )
    digest = hashlib.sha256(pvrpipe.__version__.encode())
    for record in records:
        digest.update(record.model_dump_json(exclude=BESIDE).encode())
    for part in drawn:
        digest.update(part.read_bytes())
    return digest.hexdigest()[:16]


def is_current(page: Path, record: StudyRecord, tables: Iterable[Path]) -> bool:
    """Whether a page is there, of this record and this version, and written after all tables of its runs."""
    if not page.is_file():
        return False
    with page.open("rb") as file:
        found = STAMP.search(file.read(HEAD).decode(errors="replace"))
    written = [table.stat().st_mtime_ns for table in tables if table.is_file()]
    return (
        found is not None
        and found[1] == stamp_of([record])
        and max(written, default=0) <= page.stat().st_mtime_ns
    )
