"""Sources that are damaged, or of another format than was said: one line, and nothing is left behind."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from tokenize import TokenError

import h5py
import numpy as np
import polars as pl
import pytest

from pvrpipe.rollouts.import_source import reading
from pvrpipe.schemas.errors import MissingExtraError, PvrpipeError, SourceError
from pvrpipe.store.converting import convert
from pvrpipe.store.reading import Store

from .conftest import WriteStore
from .importable import (
    imported,
    truth,
    write_dqn_replay,
    write_frames,
    write_robomimic,
    write_vd4rl_hdf5,
    write_vd4rl_npz,
    write_video,
)


def cut_short(path: Path, share: float = 0.7) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def damaged(kind: str, folder: Path) -> tuple[str, Path, str]:
    """Format, source and what must be said of it."""
    if kind == "npz cut short":
        file = sorted(write_vd4rl_npz(folder).glob("*.npz"))[1]
        cut_short(file)
        return "vd4rl", folder, f"{file.name} cannot be read"
    if kind == "pickle":
        folder.mkdir()
        rows = {"action": np.array([None, {}], object), "reward": np.zeros(2), "discount": np.ones(2)}
        np.savez(folder / "a.npz", image=np.zeros((2, 4, 4, 3), np.uint8), **rows)  # type: ignore[arg-type]
        return "vd4rl", folder, "allow_pickle"
    if kind == "other alignment":
        folder.mkdir()
        real = truth(0, 3)
        rows = {"action": real["action"], "reward": real["reward"], "discount": np.ones(3)}
        np.savez(folder / "a.npz", image=real["frame"][1:], **rows)  # type: ignore[arg-type]
        return "vd4rl", folder, "not aligned as V-D4RL"
    if kind in ("nan", "rows missing", "wider actions", "hdf5 cut short"):
        path = write_robomimic(folder.with_suffix(".hdf5"), next_obs=True)
        if kind == "hdf5 cut short":
            cut_short(path)
            return "robomimic", path, "cannot be read"
        with h5py.File(path, "r+") as file:
            demo = file["data/demo_2"]
            if kind == "nan":
                demo["rewards"][0] = np.nan
                return "robomimic", path, "demo_2 of Lift has a reward that is not finite at step 0"
            real = demo["actions"][:]
            del demo["actions"]
            demo["actions"] = real[:0] if kind == "rows missing" else np.ones((1, 3))
        return "robomimic", path, "demo_2 has 0 actions" if kind == "rows missing" else "actions of 3 numbers"
    if kind in ("gzip cut short", "terminal missing"):
        write_dqn_replay(folder)
        if kind == "gzip cut short":
            cut_short(folder / "$store$_observation_ckpt.3.gz")
            return "dqn-replay", folder, "cannot be read"
        (folder / "$store$_terminal_ckpt.3.gz").unlink()
        return "dqn-replay", folder, r"has no \$store\$_terminal_ckpt.3.gz; get it too"
    write_frames(folder, "video", rows_less=1)
    if kind == "video cut short":
        write_video(folder / "e2.mp4", truth(2, 4)["frame"])
        return "frames", folder, "episode e2 has 5 observations and 7 actions"
    if kind == "no frames":
        (folder / "e2.mp4").unlink()
        return "frames", folder, "there are no frames in"
    if kind == "outside":
        (folder / "table.csv").write_text("episode,action,reward\n../e2,1,1\n")
        return "frames", folder, "which is not in"
    (folder / "table.csv").write_text("episode,action,reward\n" + "e2,1.5,bad\n" * 7)
    return "frames", folder, "column 'reward' of episode e2 cannot be read"


@pytest.mark.parametrize(
    "kind",
    [
        "npz cut short",
        "pickle",
        "other alignment",
        "nan",
        "rows missing",
        "wider actions",
        "hdf5 cut short",
        "gzip cut short",
        "terminal missing",
        "video cut short",
        "no frames",
        "outside",
        "words",
    ],
)
def test_damage_is_one_line_before_anything_is_written(tmp_path: Path, kind: str) -> None:
    format_, source, said = damaged(kind, tmp_path / "data")
    options = {"camera": "agentview"} if format_ == "robomimic" else {}
    with pytest.raises(SourceError, match=said) as caught:
        imported(format_, source, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_pixels_that_cannot_be_decoded_leave_nothing_behind(tmp_path: Path) -> None:
    """Such damage is only met while writing, behind shards that are committed."""
    folder = write_frames(tmp_path / "mine", "images", rows_less=1)
    (folder / "e0" / "frame_3.png").write_bytes(b"no picture")
    with pytest.raises(SourceError, match=r"frame_3\.png cannot be read"):
        imported("frames", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format_", ["minari", "lerobot", "vd4rl", "robomimic", "dqn-replay", "frames"])
def test_the_wrong_format_is_one_line(tmp_path: Path, format_: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("nothing")
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["x"] = np.arange(3)
    for source in (tmp_path / "folder", tmp_path / "other.hdf5", tmp_path / "nowhere"):
        with pytest.raises(PvrpipeError) as caught:
            imported(format_, source, tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400
        assert "descriptor" not in str(caught.value)  # what a C library says of a folder
    assert not (tmp_path / "out").exists()


def test_a_missing_library_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_robomimic(tmp_path / "image.hdf5", next_obs=False)
    folder = write_frames(tmp_path / "mine", "video")
    monkeypatch.setitem(sys.modules, "h5py", None)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pvrpipe\[convert\]'"):
        imported("robomimic", path, tmp_path / "out")
    with pytest.raises(MissingExtraError, match=r"pip install 'pvrpipe\[video\]'"):
        imported("frames", folder, tmp_path / "out")


def test_robomimic_that_does_not_say_where_it_was_recorded(tmp_path: Path) -> None:
    path = write_robomimic(tmp_path / "mine.hdf5", next_obs=True)
    with h5py.File(path, "a") as file:
        file["data"].attrs["env_args"] = "null"
    imported("robomimic", path, tmp_path / "out", camera="agentview")
    assert Store.open(tmp_path / "out").manifest.rollouts.environment == "import:robomimic:mine"


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("PIL", SyntaxError("broken PNG file")),
        ("h5py", RuntimeError("bad heap free list")),
        ("numpy", TokenError("EOF")),
    ],
)
def test_whatever_a_library_raises_of_damage_is_one_line(name: str, error: Exception) -> None:
    with pytest.raises(SourceError, match=f"{name} cannot be read"), reading(name):
        raise error


def test_a_png_of_broken_chunks_is_one_line(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "mine", "images", rows_less=1)
    picture = folder / "e0" / "frame_3.png"
    picture.write_bytes(
        picture.read_bytes().replace(b"IEND", b"\0\0\0\0").replace(b"IDAT", b"\xff\xff\xff\xff")
    )
    with pytest.raises(SourceError, match=r"frame_3\.png cannot be read"):
        imported("frames", folder, tmp_path / "out")


def write_lerobot(tmp_path: Path, write_rollouts: WriteStore) -> Path:
    convert(write_rollouts((6, 9), size=32), tmp_path / "there", "lerobot")
    return tmp_path / "there"


@pytest.mark.parametrize("kind", ["fewer", "one missing", "twice", "no rate"])
def test_a_lerobot_data_set_that_is_not_whole_is_refused(
    tmp_path: Path, write_rollouts: WriteStore, kind: str
) -> None:
    """One whose episodes are listed in several files, of which not all were fetched, would be a smaller one."""
    folder = write_lerobot(tmp_path, write_rollouts)
    (listed,) = (folder / "meta/episodes").rglob("*.parquet")
    table, info = pl.read_parquet(listed), json.loads((folder / "meta/info.json").read_text())
    told = {
        "fewer": (table.head(1), "has 1 episodes, meta/info.json says 2; get it again"),
        "one missing": (table.tail(1), "has episode 1 where 0 is to come"),
        "twice": (pl.concat([table, table]), "has episode 0 where 1 is to come"),
        "no rate": (table, "fps is -3"),
    }
    table, words = told[kind]
    table.write_parquet(listed)
    (folder / "meta/info.json").write_text(json.dumps(info | ({"fps": -3} if kind == "no rate" else {})))
    with pytest.raises(SourceError, match=words):
        imported("lerobot", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_replay_logs_without_their_frames_are_not_passed_over(tmp_path: Path) -> None:
    """The observations are the largest files, and the ones whose download fails."""
    folder = write_dqn_replay(tmp_path / "logs")
    write_dqn_replay(folder, 12)
    (folder / "$store$_observation_ckpt.12.gz").unlink()
    with pytest.raises(SourceError, match=r"has no \$store\$_observation_ckpt.12.gz; get it too"):
        imported("dqn-replay", folder, tmp_path / "out")


def test_an_action_of_billions_is_one_line(tmp_path: Path) -> None:
    folder = write_dqn_replay(tmp_path / "logs")
    path = next(folder.glob("*action*"))
    with gzip.open(path) as file:
        actions = np.load(file)
    with gzip.open(path, "wb") as file:
        np.save(file, actions.astype(np.int64) * 10**9)
    with pytest.raises(SourceError, match="one of several is 0 to 4095"):
        imported("dqn-replay", folder, tmp_path / "out")


@pytest.mark.parametrize("kind", ["linked", "raw", "virtual"])
def test_hdf5_does_not_reach_into_other_files(tmp_path: Path, kind: str) -> None:
    folder = write_vd4rl_hdf5(tmp_path / "84px")
    (folder / "1.hdf5").unlink()
    with h5py.File(folder / "0.hdf5", "r+") as file:
        shape = file["observation"].shape
        (tmp_path / "secret").write_bytes(bytes(np.prod(shape)))
        with h5py.File(tmp_path / "secret.hdf5", "w") as secret:
            secret["x"] = np.zeros(shape, np.uint8)
        del file["observation"]
        if kind == "linked":
            file["observation"] = h5py.ExternalLink(str(tmp_path / "secret.hdf5"), "x")
        elif kind == "raw":
            raw = [(str(tmp_path / "secret"), 0, int(np.prod(shape)))]
            file.create_dataset("observation", shape, "u1", external=raw)
        else:
            layout = h5py.VirtualLayout(shape, "u1")
            layout[:] = h5py.VirtualSource(str(tmp_path / "secret.hdf5"), "x", shape)
            file.create_virtual_dataset("observation", layout)
    with pytest.raises(SourceError, match="has no observation" if kind == "linked" else "in other files"):
        imported("vd4rl", folder, tmp_path / "out")


def test_a_shard_without_rows_is_passed_over(tmp_path: Path) -> None:
    folder = write_vd4rl_hdf5(tmp_path / "84px")
    with h5py.File(folder / "0.hdf5") as file, h5py.File(folder / "2.hdf5", "w") as empty:
        for name in file:
            empty[name] = file[name][:0]
    assert imported("vd4rl", folder, tmp_path / "out").episodes == 4
