"""Whether embeddings that were computed here are those of a store, made on whatever other machine."""

from __future__ import annotations

import math
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

    Each of either is compared with the nearest of its frame, and :data:`FOUND` of them must be near. The zeros that
    stand where a frame has fewer are no keypoints: they would be found by any encoder that finds as few.
    """
    agree = bool(np.isfinite(a).all()) and _found(a, b) >= FOUND and _found(b, a) >= FOUND
    return agreement(_nearest(a, b), b)[0], agree


def _nearest(a: Vectors, b: Vectors) -> Vectors:
    """For each descriptor of ``b`` the nearest of ``a`` in its frame, all (N, K, D)."""
    distances = (a**2).sum(axis=2)[:, None, :] - 2 * b @ a.transpose(0, 2, 1)
    return np.take_along_axis(a, distances.argmin(axis=2)[..., None], axis=1)


def _found(a: Vectors, b: Vectors) -> float:
    """The share of the keypoints of ``b`` that are near to one of ``a``; all, where it has none."""
    there = b.any(axis=2)
    near = _near(_flat(_nearest(a, b)[there]), _flat(b[there]), distance(COSINE_OF_BF16))
    return float(near.mean()) if len(near) else 1.0


def _flat(vectors: Vectors) -> Flat:
    """(N, …) as (N, D), in double precision."""
    return vectors.reshape(len(vectors), math.prod(vectors.shape[1:])).astype(np.float64)


def _near(a: Flat, b: Flat, apart: float) -> NDArray[np.bool_]:
    longer = np.maximum(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
    return np.asarray(np.linalg.norm(a - b, axis=1) <= apart * longer)


def _cosine(a: Flat, b: Flat) -> Flat:
    """Of vectors (N, D); 1 where both are zeros, 0 where one is."""
    product = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both = ~(a.any(axis=1) | b.any(axis=1))
    return np.where(both, 1.0, (a * b).sum(axis=1) / np.where(product == 0, 1.0, product))
