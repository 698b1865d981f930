"""Numbers that can be stored: what is not finite, or does not fit a precision, is refused, never in silence."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pvrpipe.schemas.errors import EncodingError
from pvrpipe.store.shards import Rows


def is_finite(array: Rows) -> bool:
    """Whether no element is NaN or infinite; of float16, where NumPy is slow, by the bits.

    All bits of an exponent are the largest there are: above zero as signed integers, below it as unsigned ones.
    """
    if array.dtype == np.float16:
        above, below = array.view(np.int16), array.view(np.uint16)
        return bool(above.max(initial=0) < 0x7C00 and below.max(initial=0) < 0xFC00)
    return bool(np.isfinite(array).all())


def cast_embedding(embedding: Rows, dtype: str, rows: Mapping[str, Rows], source: str, cure: str) -> Rows:
    """Embeddings (n, D) in another dtype; arguments and errors as of :func:`storable`."""
    with np.errstate(over="ignore"):
        return storable(embedding.astype(dtype), embedding, rows, source, cure)


def storable(stored: Rows, embedding: Rows, rows: Mapping[str, Rows], source: str, cure: str) -> Rows:
    """Embeddings (n, D) that were cast, if all of them are numbers.

    Args:
        stored: what they became.
        embedding: as they are.
        rows: ``episode`` and ``step`` of each, for the message.
        source: what gave them, for the message.
        cure: the next step of someone whose embeddings do not fit.

    Raises:
        EncodingError: one is not finite, or beyond the dtype; names episode and step.
    """
    if is_finite(stored):
        return stored
    bad = ~np.isfinite(stored).reshape(len(stored), -1).all(axis=1)
    row = int(np.argmax(bad))
    where = f"episode {rows['episode'][row]}, step {rows['step'][row]}"
    if not np.isfinite(embedding[row]).all():
        raise EncodingError(
            f"{source} gives an embedding that is not finite at {where}; check its weights and that frame"
        )
    largest = float(np.abs(embedding[row]).max())
    raise EncodingError(f"{source} gives {largest:.0f} at {where}, beyond {stored.dtype}; {cure}")
