"""What is converted is the same, bit for bit; exports are read by the libraries that they are written for."""

from __future__ import annotations

import io
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from pvrpipe.schemas.errors import EncodingError, InvalidValueError, OutputExistsError, StoreBusyError
from pvrpipe.store.converting import convert
from pvrpipe.store.exporting import WRITERS
from pvrpipe.store.files import locked
from pvrpipe.store.reading import Store
from pvrpipe.store.verifying import verify
from pvrpipe.store.windows import WindowSampler

from .conftest import WriteStore
from .embedded import D, write_embeddings
from .killing import run_killed

OTHER = {"parquet": "webdataset", "webdataset": "parquet"}


@pytest.fixture(params=["parquet", "webdataset"])
def shard_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def windows(folder: Path, columns: list[str]) -> list[dict[str, np.ndarray]]:
    sampler = WindowSampler(Store.open(folder), columns, batch=4, length=9, seed=1)
    return [sampler.batch(k) for k in range(5)]


def assert_same_windows(a: Path, b: Path, columns: list[str]) -> None:
    for one, other in zip(windows(a, columns), windows(b, columns), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].tobytes() == other[name].tobytes(), name


def test_there_and_back_gives_the_same_windows_and_the_same_id(
    tmp_path: Path, write_rollouts: WriteStore, shard_format: str
) -> None:
    source = write_rollouts()
    there = convert(source, tmp_path / "there", OTHER[shard_format])
    back = convert(tmp_path / "there", tmp_path / "back", shard_format)
    assert Store.open(tmp_path / "there").manifest.shard_format == OTHER[shard_format]
    for folder in ("there", "back"):
        assert verify(tmp_path / folder) == []
        assert_same_windows(source, tmp_path / folder, ["frame", "action", "physics", "is_first"])
    assert back.id == Store.open(source).manifest.id
    assert there.id != back.id


def test_precision_changes_and_statistics_follow(tmp_path: Path, shard_format: str) -> None:
    source = Store.open(write_embeddings(tmp_path / "a", shard_format=shard_format))
    convert(source.path, tmp_path / "half", dtype="float16")
    half = Store.open(tmp_path / "half")
    assert verify(half.path) == []
    assert half.manifest.shard_format == shard_format
    assert half.manifest.embeddings is not None
    assert (half.manifest.embeddings.dtype, half.column("embedding").dtype) == ("float16", "float16")
    for episode in range(6):
        expected = source.read_episode(episode)
        np.testing.assert_array_equal(
            half.read_episode(episode)["embedding"], expected["embedding"].astype(np.float16)
        )
        np.testing.assert_array_equal(half.read_episode(episode)["action"], expected["action"])
    assert half.manifest.statistics["embedding"] != source.manifest.statistics["embedding"]
    assert half.manifest.statistics["action"] == source.manifest.statistics["action"]


def test_what_does_not_fit_a_precision_is_refused(tmp_path: Path, write_rollouts: WriteStore) -> None:
    big = write_embeddings(tmp_path / "big", scale=1e5)
    with pytest.raises(EncodingError, match=r"at episode 0, step 0, beyond float16; keep them in float32"):
        convert(big, tmp_path / "half", dtype="float16")
    with pytest.raises(EncodingError, match="beyond float16"):
        convert(big, tmp_path / "npy", "npy", dtype="float16")
    assert not (tmp_path / "npy").exists()
    with pytest.raises(InvalidValueError, match="leave --dtype out"):
        convert(write_rollouts(), tmp_path / "r", dtype="float16")


def test_lists_are_read_by_polars_and_frames_are_png(tmp_path: Path, write_rollouts: WriteStore) -> None:
    store = Store.open(write_rollouts())
    convert(store.path, tmp_path / "lists", "parquet-lists")
    table = pl.concat([pl.read_parquet(p) for p in sorted((tmp_path / "lists" / "data").glob("*.parquet"))])
    assert len(table) == store.manifest.rows
    for episode in range(6):
        rows, expected = table.filter(pl.col("episode") == episode).sort("step"), store.read_episode(episode)
        for name in ("action", "state", "physics"):
            found = np.array(rows[name].to_list(), expected[name].dtype)
            assert found.tobytes() == expected[name].tobytes(), name
        frame = Image.open(io.BytesIO(rows["frame"][3]["bytes"]))
        np.testing.assert_array_equal(np.asarray(frame), expected["frame"][3])
    metadata = json.loads(
        pq.read_schema(tmp_path / "lists/data/train-00000.parquet").metadata[b"huggingface"]
    )
    assert metadata["info"]["features"]["frame"] == {"_type": "Image"}
    readme = (tmp_path / "lists" / "README.md").read_text()
    (config,) = yaml.safe_load(readme.split("---")[1])["configs"]
    for files in config["data_files"]:
        assert list((tmp_path / "lists").glob(files["path"]))
    splits = {f["split"]: f["path"] for f in config["data_files"]}
    held_out = pl.read_parquet(tmp_path / "lists" / splits["validation"])
    assert set(held_out["episode"]) == set(store.episodes.filter(pl.col("split") == "val")["episode"])


def test_npy(tmp_path: Path, shard_format: str) -> None:
    store = Store.open(write_embeddings(tmp_path / "a", shard_format=shard_format))
    convert(store.path, tmp_path / "npy", "npy", dtype="float16")
    episodes = pl.read_parquet(tmp_path / "npy" / "episodes.parquet")
    for episode in range(6):
        row = episodes.row(episode, named=True)
        for name, expected in store.read_episode(episode).items():
            found = np.load(tmp_path / "npy" / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            part = found[row["row_first"] : row["row_first"] + row["rows"]]
            np.testing.assert_array_equal(part, expected.astype(part.dtype))
    provenance = json.loads((tmp_path / "npy" / "provenance.json").read_text())
    assert provenance["id"] == store.manifest.id


def test_hdf5_is_read_by_h5py(tmp_path: Path, write_rollouts: WriteStore) -> None:
    import h5py

    store = Store.open(write_rollouts())
    done = convert(store.path, tmp_path / "walk.h5", "hdf5")
    assert done.bytes == (tmp_path / "walk.h5").stat().st_size
    with h5py.File(tmp_path / "walk.h5") as file:
        assert json.loads(file["provenance"][()])["id"] == store.manifest.id
        for episode in range(6):
            group = file[f"episodes/{episode:09d}"]
            assert group.attrs["episode_return"] == store.episodes["episode_return"][episode]
            for name, expected in store.read_episode(episode).items():
                assert group[name].dtype == expected.dtype
                np.testing.assert_array_equal(group[name][()], expected)


@pytest.mark.parametrize("size", [8, 40])  # Minari takes frames from 32 pixels up for images
def test_minari_reads_its_own_layout(tmp_path: Path, write_rollouts: WriteStore, size: int) -> None:
    import minari

    store = Store.open(write_rollouts(size=size))
    convert(store.path, tmp_path / "m", "minari")
    found = minari.MinariDataset(tmp_path / "m" / "data")
    assert (found.total_episodes, found.total_steps) == (6, store.manifest.rows - 6)
    assert found.action_space.shape == (2,)
    for episode in found.iterate_episodes():
        rows = store.read_episode(episode.id)
        assert found.observation_space["frame"].contains(episode.observations["frame"][0])
        for name in ("frame", "state", "physics"):
            np.testing.assert_array_equal(episode.observations[name], rows[name])
        np.testing.assert_array_equal(episode.actions, rows["action"][:-1])
        np.testing.assert_array_equal(episode.rewards, rows["reward"][1:])
        assert episode.terminations[-1] == rows["is_terminal"][-1]
        assert episode.truncations[-1] != rows["is_terminal"][-1]
        assert not episode.terminations[:-1].any()
        assert not episode.truncations[:-1].any()


def test_minari_takes_embeddings_too(tmp_path: Path) -> None:
    import minari

    store = Store.open(write_embeddings(tmp_path / "a"))
    convert(store.path, tmp_path / "m", "minari")
    (episode,) = minari.MinariDataset(tmp_path / "m" / "data").sample_episodes(1)
    np.testing.assert_array_equal(
        episode.observations["embedding"], store.read_episode(episode.id)["embedding"]
    )


def test_lerobot_has_the_documented_layout(tmp_path: Path, write_rollouts: WriteStore) -> None:
    store, folder = Store.open(write_rollouts()), tmp_path / "l"
    convert(store.path, folder, "lerobot")
    info = json.loads((folder / "meta" / "info.json").read_text())
    frames = store.manifest.rows - 6
    assert (info["codebase_version"], info["total_episodes"], info["total_frames"]) == ("v3.0", 6, frames)
    assert info["fps"] == 10
    episodes = pq.read_table(folder / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    for place in episodes:
        chunk, file = place["data/chunk_index"], place["data/file_index"]
        table = pq.read_table(folder / info["data_path"].format(chunk_index=chunk, file_index=file))
        assert set(table.column_names) == set(info["features"])
        first, last = place["dataset_from_index"], place["dataset_to_index"]
        index = np.asarray(table["index"])
        part = table.filter((index >= first) & (index < last))
        expected = store.read_episode(place["episode_index"])
        assert len(part) == place["length"] == len(expected["step"]) - 1
        action = np.array(part["action"].to_pylist(), np.float32)
        np.testing.assert_array_equal(action, expected["action"][:-1])
        np.testing.assert_array_equal(np.asarray(part["next.reward"]), expected["reward"][1:])
        assert part["next.done"].to_pylist() == expected["is_last"][1:].tolist()
        png = part["observation.image"][0].as_py()["bytes"]
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), expected["frame"][0])
        np.testing.assert_allclose(np.asarray(part["timestamp"]), np.arange(len(part)) * 0.1, rtol=1e-6)
    tasks = pd.read_parquet(folder / "meta" / "tasks.parquet")
    assert tasks.loc["test:walk"]["task_index"] == 0
    stats = json.loads((folder / "meta" / "stats.json").read_text())
    state = np.concatenate([store.read_episode(e)["state"][:-1] for e in range(6)])
    np.testing.assert_allclose(stats["observation.state"]["mean"], state.mean(axis=0, dtype=np.float64))
    np.testing.assert_allclose(stats["observation.state"]["max"], state.max(axis=0))
    assert np.shape(stats["observation.image"]["mean"]) == (3, 1, 1)
    assert set(stats) == set(info["features"]) - {"frame_index", "episode_index", "index", "task_index"}


def test_lerobot_has_numbers_where_an_array_has_one_element(tmp_path: Path) -> None:
    """LeRobot reads shape (1,) as a number and refuses lists of one; pendulum has a single action."""
    store = write_embeddings(tmp_path / "a", (9, 7), actions=1)
    convert(store, tmp_path / "l", "lerobot")
    info = json.loads((tmp_path / "l" / "meta" / "info.json").read_text())
    assert info["features"]["action"]["shape"] == [1]
    (path,) = (tmp_path / "l" / "data").rglob("*.parquet")
    table = pq.read_table(path)
    assert table.schema.field("action").type == pa.float32()
    expected = [Store.open(store).read_episode(e)["action"][:-1, 0] for e in range(2)]
    np.testing.assert_array_equal(np.asarray(table["action"]), np.concatenate(expected))


@pytest.mark.parametrize("layout", sorted(WRITERS))
def test_an_export_replaces_nothing(tmp_path: Path, layout: Any) -> None:
    store = write_embeddings(tmp_path / "a", (9, 7))
    (tmp_path / "mine").mkdir()
    with pytest.raises(OutputExistsError, match="mine exists"):
        convert(store, tmp_path / "mine", layout)
    with pytest.raises(InvalidValueError, match="leave --overwrite out"):
        convert(store, tmp_path / "mine", layout, overwrite=True)
    work = tmp_path / "busy.tmp-export"
    work.mkdir()
    with locked(work), pytest.raises(StoreBusyError):
        convert(store, tmp_path / "busy", layout)
    assert not (tmp_path / "busy").exists()
    assert work.is_dir()  # another process is in there


def export(store: Path, out: Path, layout: Any) -> None:
    convert(store, out, layout)


@pytest.mark.parametrize("layout", sorted(WRITERS))
def test_an_export_killed_half_way_is_not_there_and_begins_anew(tmp_path: Path, layout: Any) -> None:
    store = write_embeddings(tmp_path / "a", (9, 7))
    export(store, tmp_path / "whole", layout)
    expected = sorted(str(p.relative_to(tmp_path / "whole")) for p in (tmp_path / "whole").rglob("*"))
    for stop in itertools.count(1):
        out = tmp_path / f"out-{stop}"
        killed = run_killed(export, store, out, layout, stop=stop)
        if not killed:
            break
        assert (tmp_path / f"out-{stop}.tmp-export").exists() or out.exists()
        if out.exists():
            shutil.rmtree(out) if out.is_dir() else out.unlink()
        export(store, out, layout)
        assert sorted(str(p.relative_to(out)) for p in out.rglob("*")) == expected
    assert stop > 2
    left = list(tmp_path.glob("*.tmp-export"))
    assert left == []


def convert_once(store: Path, out: Path, to: Any) -> None:
    convert(store, out, to)


def test_a_conversion_killed_at_every_write_ends_with_the_same_store(
    tmp_path: Path, shard_format: str
) -> None:
    store = write_embeddings(tmp_path / "a", (9, 7), shard_format=shard_format)
    wanted = convert(store, tmp_path / "whole", OTHER[shard_format]).id
    for stop in itertools.count(1):
        out = tmp_path / f"out-{stop}"
        killed = run_killed(convert_once, store, out, OTHER[shard_format], stop=stop)
        convert_once(store, out, OTHER[shard_format])
        assert Store.open(out).manifest.id == wanted
        if not killed:
            break
    assert verify(out) == []
    assert Store.open(out).column("embedding").shape == (D,)
