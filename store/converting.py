"""``pvrpipe convert``: a store in another format or precision, or exported to a layout that others read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pvrpipe.schemas.errors import InvalidValueError
from pvrpipe.schemas.progress import Progress, silent
from pvrpipe.store.exporting import Exported, Layout, export
from pvrpipe.store.places import Place
from pvrpipe.store.reading import Store
from pvrpipe.store.rewriting import Rewritten, rewrite
from pvrpipe.store.selection import Dtype, Selection

Target = Literal["parquet", "webdataset"] | Layout


def convert(
    store: Place | str,
    out: Path,
    to: Target | None = None,
    *,
    dtype: Dtype | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Rewritten | Exported:
    """Write a store anew; the same episodes in the same shards, or an export.

    A store keeps its id when it comes back to the format and precision that it came from.

    Args:
        store: what to convert; it stays as it is.
        out: the new store; or the folder, for HDF5 the file, of an export.
        to: default: the format that the store has.
        dtype: of embeddings; default: as they are.
        overwrite: replace another store that is there; an export never replaces anything.
        progress: told rows.

    Raises:
        EncodingError: an embedding does not fit the precision.
        InvalidValueError: a precision is asked of rollouts, or ``overwrite`` of an export.
        PvrpipeError: as :func:`pvrpipe.store.rewriting.rewrite`, :func:`pvrpipe.store.exporting.export`.
    """
    source = Store.open(store)
    selection = Selection.of(source, dtype=dtype)
    if to is None or to == "parquet" or to == "webdataset":
        manifest = source.manifest
        return rewrite(
            selection,
            out,
            manifest.plan,
            splits=manifest.splits,
            shard_format=to,
            overwrite=overwrite,
            progress=progress,
        )
    if overwrite:
        raise InvalidValueError(f"an export to {to} replaces nothing; remove {out} and leave --overwrite out")
    return export(selection, out, to, progress)
