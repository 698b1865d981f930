"""Whether embeddings that were computed here are those of a store, made on whatever other machine."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[Any]
Flat = NDArray[np.float64]

#: Another processor sums in another order, and float16 rounds at 2^-11 of a value; a wrong resize filter or
#: layer gives 0.94 to 0.99 (reference: jina-ai/clip-as-service#904).
COSINE = 0.9999
#: Another processor rounds to bfloat16 at other places. What that can do is seen here, by what it does to the same
#: frames; twice that is allowed, and never more than this.
COSINE_OF_BF16 = 0.999
#: Of the keypoints stored, those that must be found again in bfloat16, where neighbours tie and others become peaks.
FOUND = 0.75


def distance(cosine: float) -> float:
    """Of two unit vectors with this cosine."""
    return float(np.sqrt(2 * (1 - cosine)))


def agreement(a: Vectors, b: Vectors, apart: float = distance(COSINE)) -> tuple[float, bool]:
    """The smallest cosine of two sets of vectors (N, …), and whether all are as near as ``apart`` of their length.

    A vector as long again has a cosine of 1, and is another embedding; so what is held to the bound is the
    distance. Two vectors of zeros agree: R2D2 gives them where it finds nothing.
    """
    x, y = _flat(a), _flat(b)
    return float(_cosine(x, y).min()), bool(_near(x, y, apart).all())


def rounding(rounded: Vectors, exact: Vectors) -> float:
    """How far apart two machines may be in bfloat16, by what it does to these vectors (N, …) on this one."""
    a, b = _flat(rounded), _flat(exact)
    longer = np.maximum(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
    here = np.linalg.norm(a - b, axis=1) / np.where(longer == 0, 1.0, longer)
    return min(max(distance(COSINE), 2 * float(here.max())), distance(COSINE_OF_BF16))


def agreement_of_keypoints(a: Vectors, b: Vectors) -> tuple[float, bool]:
    """As :func:`agreement` of two sets of descriptors (N, K, D) in bfloat16, which chooses others and orders them anew.

    Each of ``b`` is compared with the nearest of its frame, and :data:`FOUND` of them must be near.
    """
    distances = (a**2).sum(axis=2)[:, None, :] - 2 * b @ a.transpose(0, 2, 1)
    nearest = np.take_along_axis(a, distances.argmin(axis=2)[..., None], axis=1)
    found = _near(_flat(np.concatenate(nearest)), _flat(np.concatenate(b)), distance(COSINE_OF_BF16))
    return agreement(nearest, b)[0], bool(found.mean() >= FOUND)


def _flat(vectors: Vectors) -> Flat:
    """(N, …) as (N, D), in double precision."""
    return vectors.reshape(len(vectors), -1).astype(np.float64)


def _near(a: Flat, b: Flat, apart: float) -> NDArray[np.bool_]:
    longer = np.maximum(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
    return np.asarray(np.linalg.norm(a - b, axis=1) <= apart * longer)


def _cosine(a: Flat, b: Flat) -> Flat:
    """Of vectors (N, D); 1 where both are zeros, 0 where one is."""
    product = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both = ~(a.any(axis=1) | b.any(axis=1))
    return np.where(both, 1.0, (a * b).sum(axis=1) / np.where(product == 0, 1.0, product))
