"""Previews: what a person looks at, opened again and looked at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from pvrpipe.schemas.errors import InvalidValueError, PvrpipeError
from pvrpipe.store.previewing import preview
from pvrpipe.store.reading import Store

from .conftest import WriteStore

Written = Callable[..., Store]


@pytest.fixture
def written(write_rollouts: WriteStore) -> Written:
    return lambda **options: Store.open(write_rollouts((30, 12, 45), **options))


def frames_of(film: Path) -> list[Image.Image]:
    with av.open(str(film)) as opened:
        return [frame.to_image() for frame in opened.decode(video=0)]


def test_a_sheet_and_a_film_of_chosen_episodes(written: Written, tmp_path: Path) -> None:
    store = written()
    result = preview(store, tmp_path / "p.png", tmp_path / "p.mp4", episodes=[1, 2])
    assert (result.episodes, result.frames) == ([1, 2], 46)
    frames = frames_of(tmp_path / "p.mp4")
    assert len(frames) == 46
    first, later = np.asarray(frames[0], int), np.asarray(frames[40], int)
    assert np.abs(first - later).mean() > 3
    sheet = np.asarray(Image.open(tmp_path / "p.png"))
    assert sheet.shape[1] > 8 * 192


def test_the_film_shows_the_stored_frames_in_their_order(written: Written, tmp_path: Path) -> None:
    """Each tile of the film is nearest to the row it ought to show."""
    store = written()
    preview(store, tmp_path / "p.png", tmp_path / "p.mp4", episodes=[0])
    shown = [np.asarray(f.crop((0, 46, 192, 238)).resize((8, 8), Image.Resampling.BOX), int)
             for f in frames_of(tmp_path / "p.mp4")]  # fmt: skip
    stored = store.read_episode(0)["frame"].astype(int)
    for row in range(0, 31, 5):
        distances = [np.abs(shown[row] - frame).mean() for frame in stored]
        assert int(np.argmin(distances)) == row


def test_pairs_side_by_side(written: Written, tmp_path: Path) -> None:
    store, twin = written(), written(name="twin")
    alone = preview(store, tmp_path / "a.png", tmp_path / "a.gif", episodes=[1])
    pair = preview(store, tmp_path / "b.png", tmp_path / "b.gif", episodes=[1], beside=twin)
    assert alone.frames == pair.frames == 13
    assert Image.open(tmp_path / "b.gif").width > Image.open(tmp_path / "a.gif").width
    assert Image.open(tmp_path / "b.gif").n_frames == 13
    with pytest.raises(InvalidValueError, match="--replay"):
        preview(store, tmp_path / "c.png", tmp_path / "c.gif", beside=written(name="other", seed=7))
    assert not (tmp_path / "c.png").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"episodes": [3]}, "it has 0 to 2"),
        ({"film": "x.avi"}, "an .mp4 or a .gif"),
        ({"sheet": "x.jpg"}, ".png"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    written: Written, tmp_path: Path, options: dict, words: str
) -> None:
    folder = tmp_path / "out"
    given = {"sheet": "p.png", "film": "p.mp4", **options}
    with pytest.raises(PvrpipeError, match=words) as caught:
        preview(written(), folder / given.pop("sheet"), folder / given.pop("film"), **given)
    assert "\n" not in str(caught.value)
    assert not folder.exists()
