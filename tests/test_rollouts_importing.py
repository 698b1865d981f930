"""What labs already have, imported: the alignment of each format on data where being off by one shows."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image
from typer.testing import CliRunner

from pvrpipe.cli import app
from pvrpipe.rollouts.collect import Engine, replay
from pvrpipe.schemas.errors import (
    InvalidValueError,
    OutputExistsError,
    SourceError,
    UnknownNameError,
)
from pvrpipe.store.converting import convert
from pvrpipe.store.reading import Store
from pvrpipe.store.verifying import verify

from .conftest import WriteStore
from .importable import (
    LENGTHS,
    imported,
    truth,
    write_dqn_replay,
    write_frames,
    write_minari,
    write_robomimic,
    write_vd4rl_hdf5,
    write_vd4rl_npz,
    write_video,
)
from .killing import run_killed


def check(out: Path, lengths: dict[int, int], *, tolerance: int = 0, state: bool = False) -> Store:
    """Every episode against the world it comes from: {episode of the world: transitions kept}, in order."""
    assert verify(out) == []
    store = Store.open(out)
    assert store.manifest.episodes == len(lengths)
    for number, (episode, length) in enumerate(lengths.items()):
        rows, real = (
            store.read_episode(number),
            truth(episode, LENGTHS[episode], store.manifest.rollouts.size),
        )
        assert len(rows["reward"]) == length + 1
        difference = rows["frame"].astype(int) - real["frame"][: length + 1]
        assert np.abs(difference).max() <= tolerance
        np.testing.assert_array_equal(rows["action"][:-1], real["action"][:length])
        np.testing.assert_array_equal(rows["reward"][1:], real["reward"][:length])
        assert rows["reward"][0] == 0
        assert not rows["action"][-1].any()
        if state:
            np.testing.assert_array_equal(rows["state"], real["state"][: length + 1])
    return store


WHOLE = dict(enumerate(LENGTHS))
CUT = {0: LENGTHS[0] - 1, 2: LENGTHS[2] - 1}  # without the last observation; one transition less one is none


@pytest.mark.parametrize("jpeg", [False, True])
def test_minari(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jpeg: bool) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    id_ = write_minari(tmp_path, jpeg=jpeg)
    result = imported("minari", id_, tmp_path / "out")
    store = check(tmp_path / "out", WHOLE, tolerance=2 if jpeg else 0, state=True)
    made = store.manifest.rollouts
    assert (made.environment, made.camera) == ("import:minari:test/world-v0", "camera")
    assert (made.action_low, made.action_high) == ((-2, -2), (2, 2))
    assert store.episodes["terminated"].to_list() == [True, False, True]
    assert store.episodes["seed"].to_list() == [100, 101, 102]
    assert store.read_episode(2)["success"].tolist() == [False] * 7 + [True]
    assert (result.skipped, result.cut) == (0, 0)
    assert imported("minari", tmp_path / id_, tmp_path / "same").id == result.id


def test_minari_of_one_of_several_actions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    imported("minari", write_minari(tmp_path, jpeg=False, discrete=True), tmp_path / "out")
    store = Store.open(tmp_path / "out")
    assert store.manifest.rollouts.discrete
    assert verify(tmp_path / "out") == []
    action = store.read_episode(2)["action"]
    assert action.shape == (8, 4)
    assert action[:-1].argmax(axis=1).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert store.episodes["seed"].to_list() == [0, 0, 0]  # 64 bits are none that JSON holds
    assert store.read_episode(2)["success"].tolist() == [False] * 7 + [True]


def test_minari_of_data_sets_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where some episodes do not tell success, none does."""
    import h5py

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    id_ = write_minari(tmp_path, jpeg=False)
    with h5py.File(tmp_path / id_ / "data" / "main_data.hdf5", "a") as file:
        del file["episode_1/infos"]
    imported("minari", id_, tmp_path / "out")
    assert Store.open(tmp_path / "out").manifest.column("success") is None
    check(tmp_path / "out", WHOLE, state=True)


@pytest.mark.parametrize("format_", ["minari", "lerobot"])
def test_what_we_exported_comes_back(tmp_path: Path, write_rollouts: WriteStore, format_: str) -> None:
    source = Store.open(write_rollouts((6, 9), size=32))
    convert(source.path, tmp_path / "there", format_)
    imported(format_, tmp_path / "there", tmp_path / "back")
    assert verify(tmp_path / "back") == []
    back = Store.open(tmp_path / "back")
    less = 1 if format_ == "lerobot" else 0
    for number in range(2):
        old, new = source.read_episode(number), back.read_episode(number)
        end = len(old["reward"]) - less
        assert len(new["reward"]) == end
        for name in ("frame", "reward"):
            np.testing.assert_array_equal(new[name], old[name][:end])
        np.testing.assert_array_equal(new["action"][:-1], old["action"][: end - 1])
        np.testing.assert_array_equal(new["state"], old["state"][:end])  # and none of the physics


def write_lerobot_video(tmp_path: Path, write_rollouts: WriteStore) -> tuple[Path, Store]:
    """Our export, its images put into one video, as LeRobot's recorder leaves them."""
    source = Store.open(write_rollouts((6, 9), size=32))
    convert(source.path, tmp_path / "there", "lerobot")
    folder = tmp_path / "there"
    key, info = "observation.image", json.loads((folder / "meta/info.json").read_text())
    info["features"][key]["dtype"] = "video"
    info["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    (folder / "meta/info.json").write_text(json.dumps(info))
    (data,) = (folder / "data").rglob("*.parquet")
    pl.read_parquet(data).drop(key).write_parquet(data)
    (meta,) = (folder / "meta/episodes").rglob("*.parquet")
    rate = info["fps"]
    place = {
        "chunk_index": [0, 0],
        "file_index": [0, 0],
        "from_timestamp": [0.0, 6 / rate],
        "to_timestamp": [6 / rate, 1.5],
    }
    table = pl.read_parquet(meta)
    table.with_columns(
        pl.Series(f"videos/{key}/{name}", values) for name, values in place.items()
    ).write_parquet(meta)
    video = folder / info["video_path"].format(video_key=key, chunk_index=0, file_index=0)
    video.parent.mkdir(parents=True)
    shown = np.concatenate([truth(0, 5)["frame"], truth(2, 8)["frame"]])
    write_video(video, shown, rate)
    return folder, source


def test_lerobot_with_video(tmp_path: Path, write_rollouts: WriteStore) -> None:
    folder, source = write_lerobot_video(tmp_path, write_rollouts)
    result = imported("lerobot", folder, tmp_path / "out")
    assert verify(tmp_path / "out") == []
    store = Store.open(tmp_path / "out")
    assert (result.cut, store.episodes["length"].to_list()) == (2, [5, 8])
    assert store.manifest.rollouts.control_timestep == pytest.approx(0.1)
    for number, shown in enumerate((truth(0, 5), truth(2, 8))):
        rows = store.read_episode(number)
        assert np.abs(rows["frame"].astype(int) - shown["frame"]).max() <= 2
        np.testing.assert_array_equal(rows["reward"], source.read_episode(number)["reward"][:-1])


def test_vd4rl_npz(tmp_path: Path) -> None:
    folder = write_vd4rl_npz(tmp_path / "walker_walk" / "expert" / "64px")
    imported("vd4rl", folder, tmp_path / "out")
    store = check(tmp_path / "out", WHOLE)
    assert store.manifest.rollouts.environment == "import:vd4rl:walker_walk-expert-64px"
    assert store.episodes["terminated"].to_list() == [False, False, True]


def test_vd4rl_hdf5(tmp_path: Path) -> None:
    imported("vd4rl", write_vd4rl_hdf5(tmp_path / "84px"), tmp_path / "out")
    assert verify(tmp_path / "out") == []
    store = Store.open(tmp_path / "out")
    assert store.episodes["length"].to_list() == [5, 1, 2, 4]  # the last is cut in two by its shards
    real = truth(2, 7)
    for number, part in ((2, slice(0, 3)), (3, slice(3, 8))):
        rows = store.read_episode(number)
        np.testing.assert_array_equal(rows["frame"], real["frame"][part])
        np.testing.assert_array_equal(rows["action"][:-1], real["action"][part][: len(rows["action"]) - 1])
        np.testing.assert_array_equal(rows["reward"][1:], real["reward"][part][: len(rows["action"]) - 1])


@pytest.mark.parametrize("next_obs", [False, True])
def test_robomimic(tmp_path: Path, next_obs: bool) -> None:
    path = write_robomimic(tmp_path / "image.hdf5", next_obs=next_obs)
    with pytest.raises(SourceError, match="2 cameras: agentview, robot0_eye_in_hand; choose one by --camera"):
        imported("robomimic", path, tmp_path / "out")
    with pytest.raises(UnknownNameError, match="agentview"):
        imported("robomimic", path, tmp_path / "out", camera="agentvew")
    result = imported("robomimic", path, tmp_path / "out", camera="agentview")
    store = check(tmp_path / "out", WHOLE if next_obs else CUT, state=True)
    assert (result.skipped, result.cut) == ((0, 0) if next_obs else (1, 2))
    assert store.episodes["terminated"].to_list() == [next_obs] * store.manifest.episodes
    assert store.manifest.rollouts.control_timestep == 0.05


def test_dqn_replay(tmp_path: Path) -> None:
    folder = write_dqn_replay(tmp_path / "Pong" / "1" / "replay_logs")
    write_dqn_replay(folder, 12)
    result = imported("dqn-replay", folder, tmp_path / "out")
    assert verify(tmp_path / "out") == []
    store = Store.open(tmp_path / "out")
    made = store.manifest.rollouts
    assert (made.environment, made.discrete, made.size) == ("import:dqn-replay:Pong-1", True, 84)
    assert (result.skipped, result.cut) == (2, 4)
    assert store.episodes["length"].to_list() == [4, 6, 4, 6]
    assert not store.episodes["terminated"].any()
    for number in range(4):
        rows, real = store.read_episode(number), truth(2 * (number % 2), (5, 7)[number % 2], 84)
        np.testing.assert_array_equal(rows["frame"], np.maximum(real["frame"][:-1], 1))
        np.testing.assert_array_equal(rows["reward"][1:], real["reward"][:-1])
        assert rows["action"][:-1].argmax(axis=1).tolist() == [t % 3 for t in range(len(rows["action"]) - 1)]


@pytest.mark.parametrize("rows_less", [0, 1])
@pytest.mark.parametrize("kind", ["images", "video"])
def test_frames(tmp_path: Path, kind: str, rows_less: int) -> None:
    result = imported("frames", write_frames(tmp_path / "mine", kind, rows_less=rows_less), tmp_path / "out")
    store = Store.open(tmp_path / "out")
    lengths = WHOLE if rows_less else CUT
    by_name = dict(reversed(lengths.items()))  # the table is upside down
    check(tmp_path / "out", by_name, tolerance=2 if kind == "video" else 0)
    assert store.episodes["terminated"].to_list() == [bool(rows_less), *[False] * (len(lengths) - 1)]
    assert store.manifest.rollouts.control_timestep == pytest.approx(0.1 if kind == "video" else 0.05)
    assert result.cut == (0 if rows_less else 2)


def test_frames_named_row_by_row(tmp_path: Path) -> None:
    write_frames(tmp_path / "mine", "images", rows_less=1)
    table = pl.DataFrame(
        {
            "frame": [f"e2/frame_{t}.png" for t in (0, 1, 2)],
            "action": [2, 0, None],
            "reward": [0.5, 0.25, None],
            "state_0": [1.0, 2.0, 3.0],
            "success": [False, True, False],
        }
    )
    (tmp_path / "mine" / "table.csv").unlink()
    table.write_parquet(tmp_path / "mine" / "table.parquet")
    imported("frames", tmp_path / "mine", tmp_path / "out")
    assert verify(tmp_path / "out") == []
    rows = Store.open(tmp_path / "out").read_episode(0)
    np.testing.assert_array_equal(rows["frame"], truth(2, 2)["frame"])
    assert rows["action"].tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 0]]
    assert rows["reward"].tolist() == [0, 0.5, 0.25]
    assert rows["state"].ravel().tolist() == [1, 2, 3]
    assert rows["success"].tolist() == [False, False, True]


def test_a_table_means_what_it_says(tmp_path: Path) -> None:
    """Names keep their zeros; a reward that is whole for long may not stay so; what systems hide is no frame."""
    folder, steps = tmp_path / "mine", 150
    for name in ("007", "8"):
        (folder / name).mkdir(parents=True)
        (folder / name / "._0.PNG").write_bytes(b"of a mac")
        for t in range(steps):
            Image.fromarray(np.full((16, 16, 3), t, np.uint8)).save(folder / name / f"{t}.PNG")
    lines = [f"{name},{t // 140},{t / 2 if t >= 140 else 0}" for name in ("007", "8") for t in range(steps)]
    (folder / "TABLE.CSV").write_text("\n".join(["episode,action,reward", *lines]))
    imported("frames", folder, tmp_path / "out")
    rows = Store.open(tmp_path / "out").read_episode(0)
    assert rows["frame"][:, 0, 0, 0].tolist() == list(range(steps))
    assert rows["reward"][1:].tolist() == [t / 2 if t >= 140 else 0 for t in range(steps - 1)]
    assert rows["action"][:-1].argmax(axis=1).tolist() == [t // 140 for t in range(steps - 1)]


def test_a_table_may_hold_vectors(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "mine", "images")
    table = pl.read_csv(folder / "table.csv")
    actions = pl.concat_list("action_0", "action_1").alias("action")
    (folder / "table.csv").unlink()
    table.select("episode", "step", actions, "reward").write_parquet(folder / "table.parquet")
    imported("frames", folder, tmp_path / "out")
    check(tmp_path / "out", dict(reversed(CUT.items())))


def test_frames_are_fitted_into_a_square(tmp_path: Path) -> None:
    folder = tmp_path / "wide"
    folder.mkdir()
    for t in range(3):
        Image.new("L", (40, 20), 100 + t).save(folder / f"{t}.png")
    (folder / "t.csv").write_text("action,reward\n0.5,1\n0.25,2\n")
    imported("frames", folder, tmp_path / "out")
    imported("frames", folder, tmp_path / "small", size=20)
    frame = Store.open(tmp_path / "out").read_episode(0)["frame"]
    assert frame.shape == (3, 40, 40, 3)
    assert (frame[2, 10:30] == 102).all()
    assert not frame[2, :10].any()
    assert Store.open(tmp_path / "small").read_episode(0)["frame"].shape == (3, 20, 20, 3)


def _import_here(folder: Path, out: Path) -> None:
    imported("vd4rl", folder, out)


def test_killed_anywhere_and_run_again_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    folder = write_vd4rl_npz(tmp_path / "data")
    whole = imported("vd4rl", folder, tmp_path / "whole")
    for stop in (5, 13):
        assert run_killed(_import_here, folder, tmp_path / "out", stop=stop)
    again = imported("vd4rl", folder, tmp_path / "out")
    assert again.id == whole.id
    assert again.resumed_shards
    for file in sorted(p for p in (tmp_path / "whole").rglob("*") if p.is_file()):
        assert file.read_bytes() == (tmp_path / "out" / file.relative_to(tmp_path / "whole")).read_bytes()


def test_another_source_is_not_written_into_a_begun_store(tmp_path: Path) -> None:
    folder = write_vd4rl_npz(tmp_path / "data")
    imported("vd4rl", folder, tmp_path / "out")
    (tmp_path / "data" / "0.npz").write_bytes(next(folder.glob("*.npz")).read_bytes())
    with pytest.raises(OutputExistsError, match="another configuration"):
        imported("vd4rl", folder, tmp_path / "out")


def test_memory_holds_the_frames_of_one_episode(tmp_path: Path) -> None:
    """Twelve episodes of 1.9 MB each; what is written at once has 4 MiB more."""
    folder, rows = tmp_path / "data", 40
    folder.mkdir()
    zeros = {"reward": np.zeros(rows, np.float32), "discount": np.ones(rows), "action": np.zeros((rows, 2))}
    for number in range(12):
        np.savez(folder / f"{number:02}.npz", image=np.full((rows, 128, 128, 3), number, np.uint8), **zeros)  # type: ignore[arg-type]
    imported("vd4rl", folder, tmp_path / "first")  # what libraries keep
    tracemalloc.start()
    imported("vd4rl", folder, tmp_path / "out")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * rows * 128 * 128 * 3, peak / (rows * 128 * 128 * 3)


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, (arguments, done.output)
    return done.stdout


def test_an_imported_store_is_a_store_like_any_other(tmp_path: Path) -> None:
    out, tar = tmp_path / "out", tmp_path / "tar"
    told = json.loads(
        run("import", "vd4rl", write_vd4rl_npz(tmp_path / "world"), out, "--json").splitlines()[-1]
    )
    assert (told["environment"], told["episodes"], told["rows"]) == ("import:vd4rl:world", 3, 16)
    assert "every byte and number" in run("verify", out)
    assert "import:vd4rl:world" in run("inspect", out)
    run("convert", out, tar, "--to", "webdataset")
    assert verify(tar) == []
    with pytest.raises(InvalidValueError, match="was imported: nothing here simulates it") as caught:
        replay(Store.open(out), tmp_path / "seen", Engine("inline"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "seen").exists()


@pytest.mark.slow
def test_an_imported_store_is_embedded(tmp_path: Path) -> None:
    run("import", "vd4rl", write_vd4rl_npz(tmp_path / "world"), tmp_path / "out")
    embeddings = tmp_path / "embeddings"
    run(
        "embed",
        tmp_path / "out",
        embeddings,
        "--pvr",
        "resnet18",
        "--weights",
        "random:0",
        "--engine",
        "inline",
    )
    assert verify(embeddings) == []
    assert Store.open(embeddings).manifest.rollouts.environment == "import:vd4rl:world"


def test_a_stream_is_read_again_from_the_beginning_where_it_must(tmp_path: Path) -> None:
    from pvrpipe.rollouts.import_dqn_replay import FrameStream

    frames = np.arange(6 * 4, dtype=np.uint8).reshape(6, 2, 2)
    with gzip.open(tmp_path / "f.gz", "wb") as file:
        np.save(file, frames)
    stream = FrameStream(tmp_path / "f.gz")
    np.testing.assert_array_equal(stream.peek(1, 3), frames[1:3])
    np.testing.assert_array_equal(stream.read(2, 5), frames[2:5])
    np.testing.assert_array_equal(stream.read(0, 6), frames)
    stream.finish()
