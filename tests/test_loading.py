"""Windows as tensors: every way of loading gives the same numbers."""

from __future__ import annotations

import gc
import itertools
import threading

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pvrpipe.schemas.errors import InvalidValueError
from pvrpipe.store import loading
from pvrpipe.store.loading import EveryWindow, ReadAhead, WindowBatches, WindowLoader
from pvrpipe.store.reading import Store
from pvrpipe.store.windows import WindowSampler

from .conftest import WriteStore

COLUMNS = ("frame", "action", "reward", "is_first")
CPU = torch.device("cpu")


def sampler_of(store: Store) -> WindowSampler:
    return WindowSampler(store, COLUMNS, batch=4, length=10, seed=1)


def assert_equal(tensors: dict[str, torch.Tensor], arrays: dict[str, np.ndarray]) -> None:
    assert tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(tensors[name].numpy(), array, err_msg=name)


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("workers", [0, 3])
def test_a_dataloader_gives_the_batches_in_order_whatever_its_workers(
    write_rollouts: WriteStore, workers: int, start: str
) -> None:
    if workers == 0 and start == "spawn":
        pytest.skip("no process is started")
    sampler, wanted = (sampler_of(Store.open(write_rollouts(name=n))) for n in ("one", "two"))
    sampler.taken = 5
    context = start if workers else None
    loader = DataLoader(
        WindowBatches(sampler), batch_size=None, num_workers=workers, multiprocessing_context=context
    )
    for k, batch in enumerate(itertools.islice(loader, 8), 5):
        assert_equal(batch, wanted.batch(k))


def test_every_window_by_number(write_rollouts: WriteStore) -> None:
    sampler = sampler_of(Store.open(write_rollouts()))
    windows = EveryWindow(sampler)
    assert len(windows) == sampler.windows == len(list(windows))
    batch = next(iter(DataLoader(windows, batch_size=7)))
    assert_equal(batch, sampler.read(np.arange(7)))


@pytest.mark.parametrize("resident", [True, False, "auto"])
def test_a_loader_gives_any_batch_and_says_where_from(write_rollouts: WriteStore, resident: bool) -> None:
    sampler = sampler_of(Store.open(write_rollouts()))
    load = WindowLoader(sampler, CPU, resident=resident)
    for k in (0, 1, 2, 9, 3):
        assert_equal(load(k), sampler.batch(k))
    assert ("resident on cpu" in load.backing) == (resident is True)
    assert load.waited > 0


def test_a_store_that_does_not_fit_is_refused(
    write_rollouts: WriteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = sampler_of(Store.open(write_rollouts()))
    monkeypatch.setattr(loading, "room_on", lambda _: 1000.0)
    with pytest.raises(InvalidValueError, match="leave the choice to auto"):
        WindowLoader(sampler, CPU, resident=True)
    assert "read ahead" in WindowLoader(sampler, CPU).backing


@pytest.mark.gpu
def test_a_gpu_holds_the_store(write_rollouts: WriteStore) -> None:
    sampler = sampler_of(Store.open(write_rollouts()))
    for resident in (True, False):
        load = WindowLoader(sampler, torch.device("cuda"), resident=resident)
        for k in (0, 3):
            assert_equal({name: t.cpu() for name, t in load(k).items()}, sampler.batch(k))


def test_reading_ahead_goes_anywhere_raises_where_asked_and_ends_its_thread() -> None:
    read = []

    def batch(k: int) -> dict[str, torch.Tensor]:
        read.append(k)
        if k == 5:
            raise ValueError("batch 5 cannot be read")
        return {"k": torch.tensor(k)}

    others = set(threading.enumerate())
    ahead = ReadAhead(batch, depth=3)
    (thread,) = set(threading.enumerate()) - others
    assert [int(ahead(k)["k"]) for k in (0, 1, 2, 4)] == [0, 1, 2, 4]
    with pytest.raises(ValueError, match="batch 5"):
        ahead(5)
    assert [int(ahead(k)["k"]) for k in (6, 7, 1)] == [6, 7, 1]
    assert max(read) <= 10
    del ahead
    gc.collect()
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_it_ends_with_the_read_that_is_under_way_and_begins_no_other() -> None:
    """A thread that still reads in native code while the interpreter ends takes the process down with a segfault."""
    read, going_on = [], threading.Event()

    def batch(k: int) -> dict[str, torch.Tensor]:
        read.append(k)
        if k:
            going_on.wait(60)
        return {}

    others = set(threading.enumerate())
    ahead = ReadAhead(batch, depth=3)
    (thread,) = set(threading.enumerate()) - others
    ahead(0)
    threading.Timer(0.2, going_on.set).start()
    del ahead
    gc.collect()
    assert not thread.is_alive()
    assert read in ([0], [0, 1])
