"""A picture of a store: it shows the frames that are there, and is a whole PNG or none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pvrpipe.schemas.errors import InvalidValueError
from pvrpipe.store.drawing import PAPER, Panel, Range, colour_of
from pvrpipe.store.picturing import HEAD, MARGIN, PANEL, TILE, WIDTH, draw
from pvrpipe.store.reading import Store

from .conftest import WriteStore
from .embedded import write_embeddings


@pytest.fixture(params=["parquet", "webdataset"])
def shard_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB"))


def test_rollouts_show_frames_of_the_best_episode_first(tmp_path: Path, write_rollouts: WriteStore) -> None:
    store = Store.open(write_rollouts())
    draw(store, tmp_path / "new" / "r.png")
    found = pixels(tmp_path / "new" / "r.png")
    assert found.shape == (HEAD + 3 * (TILE + 30) + 30 + PANEL + MARGIN, WIDTH, 3)
    best = int(store.episodes.sort("episode_return")["episode"][-1])
    first = store.read_episode(best, ["frame"])["frame"][0]
    cell = (TILE - 2) / len(first)
    middles = ((np.arange(len(first)) + 0.5) * cell).astype(int)
    shown = found[HEAD + 22 + middles][:, MARGIN + middles]
    np.testing.assert_array_equal(shown, first)


def test_embeddings_show_golden_frames_and_statistics(tmp_path: Path, shard_format: str) -> None:
    store = Store.open(write_embeddings(tmp_path / "e", shard_format=shard_format))
    draw(store, tmp_path / "e.png")
    found = pixels(tmp_path / "e.png")
    assert found.shape == (HEAD + TILE + 60 + 2 * PANEL + MARGIN, WIDTH, 3)
    for row in range(2):
        for column in range(2):
            top, left = HEAD + TILE + 60 + row * PANEL, MARGIN + column * WIDTH // 2
            panel = found[top : top + PANEL, left : left + WIDTH // 2 - MARGIN]
            assert (panel == (0, 114, 178)).all(axis=2).sum() > 500, (row, column)


def test_a_picture_is_a_png(tmp_path: Path, write_rollouts: WriteStore) -> None:
    with pytest.raises(InvalidValueError, match=r"ends with \.png"):
        draw(Store.open(write_rollouts()), tmp_path / "r.jpg")


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (-130, 890, [0, 500]), (0, 5.5, [0, 2, 4]), (3, 3.001, None)],
)
def test_ticks_are_round_and_inside(low: float, high: float, ticks: list[float] | None) -> None:
    found = Range("", low, high).ticks()
    if ticks is not None:
        np.testing.assert_allclose(found, ticks, atol=1e-9)
    assert 2 <= len(found) <= 7
    assert low - 1e-9 <= found[0]
    assert found[-1] <= high + 1e-9


def test_a_range_of_equal_values_has_room() -> None:
    around = Range.around("", np.zeros(4))
    assert around.low < 0 < around.high


def test_names_hide_nothing_that_is_drawn() -> None:
    picture = Image.new("RGB", (700, 330), PAPER)
    panel = Panel(picture, (0, 0, 700, 330), "rising")
    x = np.arange(10.0)
    panel.axes(Range.around("updates", x), Range.around("loss", x), ["one", "a much longer name", "three"])
    panel.line(x, x, colour_of(3))
    columns = (np.asarray(picture) == colour_of(3)).all(-1).any(0)
    first, last = np.flatnonzero(columns)[[0, -1]]
    assert columns[first : last + 1].all()
    assert first == pytest.approx(106, abs=5)
    assert last == pytest.approx(656, abs=5)
