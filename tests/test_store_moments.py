"""Statistics of rows that come in parts, against NumPy on all of them at once."""

from __future__ import annotations

import numpy as np
import pytest

from pvrpipe.store.moments import RunningMoments, merged, statistics_of


@pytest.mark.parametrize("shape", [(5,), (4, 5)], ids=["vectors", "tokens"])
def test_rows_in_parts_have_the_moments_of_all_rows(shape: tuple[int, ...]) -> None:
    rows = np.random.default_rng(0).normal(1e4, 1e-1, (97, *shape)).astype(np.float32)
    whole, halves = RunningMoments(5), [RunningMoments(5), RunningMoments(5)]
    for number, part in enumerate(np.split(rows, [0, 1, 40, 41, 96])):
        whole.add(part)
        halves[number > 2].add(part)
    flat = rows.reshape(-1, 5).astype(np.float64)
    for told in (whole.told(), merged(half.told() for half in halves)):
        found = statistics_of(told)
        assert found.count == len(flat)
        np.testing.assert_allclose(found.mean, flat.mean(0), rtol=1e-14)
        np.testing.assert_allclose(found.std, flat.std(0), rtol=1e-9)


def test_no_rows_have_no_moments() -> None:
    running = RunningMoments(2)
    running.add(np.empty((0, 2), np.float32))
    assert statistics_of(running.told()).model_dump() == {"count": 0, "mean": (0, 0), "std": (0, 0)}
    assert merged([running.told(), running.told()]) == running.told()
