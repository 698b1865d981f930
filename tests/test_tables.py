"""Tables for analysis hold the arrays themselves, and only the rows asked for."""

from __future__ import annotations

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from pvrpipe.store.reading import Store
from pvrpipe.store.tables import to_arrow, to_polars

from .conftest import WriteStore


@pytest.fixture(params=["parquet", "webdataset"])
def shard_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_arrow_holds_tensors(write_rollouts: WriteStore) -> None:
    store = Store.open(write_rollouts())
    table = to_arrow(store, where="episode in (1, 4)")
    assert table.column_names == list(store.columns)
    assert isinstance(table.schema.field("frame").type, pa.FixedShapeTensorType)
    for name in store.columns:
        expected = np.concatenate([store.read_episode(e, [name])[name] for e in (1, 4)])
        column = table.column(name).combine_chunks()
        found = column.to_numpy_ndarray() if expected.ndim > 1 else column.to_numpy(zero_copy_only=False)
        np.testing.assert_array_equal(found, expected, err_msg=name)


def test_polars_holds_arrays(write_rollouts: WriteStore) -> None:
    store = Store.open(write_rollouts())
    frame = to_polars(store, ["action", "frame", "reward", "is_last"], split="val")
    assert frame.schema["frame"] == pl.Array(pl.UInt8, (8, 8, 3))
    held_out = store.episodes.filter(store.episodes["split"] == "val")["episode"]
    for name in frame.columns:
        expected = np.concatenate([store.read_episode(e, [name])[name] for e in held_out])
        np.testing.assert_array_equal(frame[name].to_numpy(), expected, err_msg=name)
