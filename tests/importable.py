"""Data sets in other formats, of a world in which being off by one shows.

At t of episode e all pixels are 40 e + 4 t, the state is (t, e), the action is (t + 1, e) / 100, and the reward for it
is 1000 times its first number plus 10 e: another at every step, and known from the action alone.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image

from pvrpipe.rollouts.importing import ImportConfig, ImportResult, import_store, open_source

LENGTHS = (5, 1, 7)
SIDE = 32

Arrays = dict[str, np.ndarray]


def truth(episode: int, length: int, side: int = SIDE) -> Arrays:
    """One episode: L + 1 frames and states, L actions and rewards for them."""
    t = np.arange(length + 1)
    frame = np.broadcast_to((40 * episode + 4 * t)[:, None, None, None], (length + 1, side, side, 3))
    action = np.stack([t[:-1] + 1, np.full(length, episode)], axis=1) / 100
    return {
        "frame": frame.astype(np.uint8),
        "state": np.stack([t, np.full(length + 1, episode)], axis=1).astype(np.float32),
        "action": action.astype(np.float32),
        "reward": (1000 * action[:, 0] + 10 * episode).astype(np.float32),
    }


def imported(format_: str, source: Path | str, out: Path, **options: Any) -> ImportResult:
    config = ImportConfig(format_, str(source), **options)
    return import_store(config, open_source(config), out)


def write_minari(home: Path, *, jpeg: bool, discrete: bool = False) -> str:
    """By Minari itself, into ``MINARI_DATASETS_PATH``; its id.

    Where actions are discrete, seeds are as Minari draws them where it is given none, and successes lists of one.
    """
    import minari  # takes seconds, and processes that are killed have no use for it
    from gymnasium import spaces
    from minari.data_collector import EpisodeBuffer

    buffers = []
    for number, length in enumerate(LENGTHS):
        real = truth(number, length)
        last = np.arange(length) == length - 1
        action = np.arange(length) % 3 + 2 if discrete else real["action"]
        buffers.append(
            EpisodeBuffer(
                id=number,
                seed=(1 << 63) + number if discrete else 100 + number,
                observations={"camera": real["frame"], "state": real["state"]},
                actions=action,
                rewards=list(real["reward"]),
                terminations=list(last & (number != 1)),
                truncations=list(last & (number == 1)),
                infos={"success": (np.arange(length + 1) == length).reshape((-1, 1) if discrete else -1)},
            )
        )
    picture = spaces.Box(0, 255, (SIDE, SIDE, 3), np.uint8)
    minari.create_dataset_from_buffers(
        "test/world-v0",
        buffers,
        observation_space=spaces.Dict({"camera": picture, "state": spaces.Box(-99, 99, (2,), np.float32)}),
        action_space=spaces.Discrete(4, start=2) if discrete else spaces.Box(-2, 2, (2,), np.float32),
        jpeg_encoding=jpeg,
        data_format="hdf5",
        **dict.fromkeys(
            ("algorithm_name", "author", "author_email", "code_permalink", "description"), "test"
        ),  # type: ignore[arg-type]
    )
    assert (home / "test" / "world-v0" / "data" / "main_data.hdf5").is_file()
    return "test/world-v0"


def arriving(real: Arrays) -> Arrays:
    """V-D4RL's rows: the action that led here, and the reward on arriving."""
    action = np.concatenate([np.zeros_like(real["action"][:1]), real["action"]])
    reward = np.concatenate([np.zeros(1, np.float32), real["reward"]])
    return {"action": action, "reward": reward, "discount": np.ones(len(reward), np.float32)}


def write_vd4rl_npz(folder: Path) -> Path:
    """As DreamerV2 writes episodes; the last of them truly ends."""
    folder.mkdir(parents=True)
    for number, length in enumerate(LENGTHS):
        real = truth(number, length)
        rows = arriving(real)
        bounds = {
            "is_first": np.arange(length + 1) == 0,
            "is_last": np.arange(length + 1) == length,
            "is_terminal": (np.arange(length + 1) == length) & (number == 2),
        }
        path = folder / f"20220101T00000{number}-{number:032x}-{length + 1}.npz"
        np.savez_compressed(path, image=real["frame"], **rows, **bounds)
    return folder


def write_vd4rl_hdf5(folder: Path) -> Path:
    """As DrQ-v2's shards: episodes behind each other, channels first; cut so that the last is in two files."""
    folder.mkdir(parents=True)
    parts: dict[str, list[np.ndarray]] = {}
    for number, length in enumerate(LENGTHS):
        real = truth(number, length)
        kind = np.ones(length + 1)
        kind[0], kind[-1] = 0, 2
        rows = {**arriving(real), "observation": real["frame"].transpose(0, 3, 1, 2), "step_type": kind}
        for name, values in rows.items():
            parts.setdefault(name, []).append(values)
    whole = {name: np.concatenate(values) for name, values in parts.items()}
    for name, held in (("0", slice(0, 11)), ("1", slice(11, None))):
        with h5py.File(folder / f"{name}.hdf5", "w") as file:
            for key, values in whole.items():
                file.create_dataset(key, data=values[held], compression="gzip")
    return folder


def write_robomimic(path: Path, *, next_obs: bool) -> Path:
    """The layout of robomimic, with two cameras; the demonstrations are numbered past nine."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "env_kwargs": {"control_freq": 20}})
        data.attrs["total"] = sum(LENGTHS)
        for number, length in zip((0, 2, 10), LENGTHS, strict=True):
            real = truth((0, 2, 10).index(number), length)
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = length
            demo["actions"], demo["rewards"] = (
                real["action"].astype(np.float64),
                real["reward"].astype(np.float64),
            )
            demo["dones"] = (np.arange(length) == length - 1).astype(np.int64)
            for group, held in (("obs", slice(None, -1)), ("next_obs", slice(1, None))):
                if group == "obs" or next_obs:
                    demo[f"{group}/agentview_image"] = real["frame"][held]
                    demo[f"{group}/robot0_eye_in_hand_image"] = 255 - real["frame"][held]
                    demo[f"{group}/robot0_eef_pos"] = real["state"][held].astype(np.float64)
    return path


def write_dqn_replay(folder: Path, number: int = 3) -> Path:
    """Dopamine's files: three rows of zeros before an episode; the last episode goes on elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[np.ndarray]] = {"observation": [], "action": [], "reward": [], "terminal": []}
    for episode, length in enumerate(LENGTHS):
        real, gray = truth(episode, length, 84), episode < len(LENGTHS) - 1
        rows = {
            "observation": np.maximum(real["frame"][:-1, :, :, 0], 1),  # only padding is all black
            "action": np.arange(length, dtype=np.int32) % 3,
            "reward": real["reward"],
            "terminal": ((np.arange(length) == length - 1) & gray).astype(np.uint8),
        }
        for name, values in rows.items():
            parts[name] += [np.zeros((3, *values.shape[1:]), values.dtype), values]
    for name, values in parts.items():
        with gzip.open(folder / f"$store$_{name}_ckpt.{number}.gz", "wb") as file:
            np.save(file, np.concatenate(values), allow_pickle=False)
    return folder


def write_video(path: Path, frames: np.ndarray, rate: int = 10) -> None:
    """A lossy video of frames (n, H, W, 3)."""
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=rate, options={"crf": "1", "g": "4"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_frames(folder: Path, kind: str, *, rows_less: int = 0) -> Path:
    """A folder of videos or of folders of images, with a table; ``rows_less`` than frames."""
    folder.mkdir(parents=True)
    lines = ["episode,step,action_0,action_1,reward,terminated"]
    for number, length in enumerate(LENGTHS):
        real = truth(number, length)
        seen = real["frame"] if rows_less else real["frame"][:-1]
        if kind == "video":
            write_video(folder / f"e{number}.mp4", seen)
        else:
            (folder / f"e{number}").mkdir()
            for t, frame in enumerate(seen):
                Image.fromarray(frame).save(folder / f"e{number}" / f"frame_{t}.png")
        for t in range(length):
            a, b = real["action"][t]
            lines.append(
                f"e{number},{t},{a},{b},{real['reward'][t]},{t == length - 1 and number == 2}".lower()
            )
    (folder / "table.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    return folder
