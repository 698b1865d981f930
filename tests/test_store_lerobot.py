"""The ``lerobot`` package reads what ``pvrpipe convert --to lerobot`` wrote, in a venv of its own.

Its requirements (torch below 2.11, an older huggingface-hub) do not fit beside ours.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pvrpipe.store.converting import convert
from pvrpipe.store.reading import Store

from .conftest import WriteStore
from .embedded import write_embeddings

ROOT = Path(__file__).parents[1]
REQUIREMENTS = ROOT / "benchmarks" / "lerobot.txt"
OFFLINE = ("dns error", "Failed to fetch", "error sending request", "Connection refused", "timed out")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # 3 GB are downloaded where no cache holds them


@pytest.fixture(scope="module")
def lerobot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a venv with LeRobot; the one of `make bench-peers` where it is there."""
    made = ROOT / ".venv-lerobot" / "bin" / "python"
    if made.exists():
        return made
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if uv is None:
        pytest.skip("no uv, which makes the venv that lerobot needs; `make setup` installs it")
    venv = tmp_path_factory.mktemp("lerobot") / "venv"
    subprocess.run([uv, "venv", "-q", "--python", sys.executable, venv], check=True)
    python = venv / "bin" / "python"
    install = [uv, "pip", "install", "-q", "--python", python, "-r", REQUIREMENTS]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode and any(sign in done.stderr for sign in OFFLINE):
        pytest.skip(f"lerobot cannot be installed without a network: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return python


def read_there(python: Path, folder: Path, *keys: str) -> dict[str, np.ndarray]:
    """What LeRobot gives for every frame."""
    out = folder.with_suffix(".npz")
    own = {"HF_HOME": str(folder.with_suffix(".cache")), "HF_HUB_OFFLINE": "1"}
    command = [python, ROOT / "tests" / "lerobot_reader.py", folder, out, *keys]
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(out) as found:
        return dict(found)


def rows_of(store: Store, name: str, part: slice) -> np.ndarray:
    """A column of all episodes; LeRobot has no row after the last action."""
    return np.concatenate([store.read_episode(e)[name][part] for e in range(store.manifest.episodes)])


def test_lerobot_reads_rollouts(tmp_path: Path, write_rollouts: WriteStore, lerobot: Path) -> None:
    store = Store.open(write_rollouts(size=32))
    convert(store.path, tmp_path / "l", "lerobot")
    names = {"observation.state": "state", "observation.physics": "physics", "action": "action"}
    found = read_there(
        lerobot, tmp_path / "l", *names, "observation.image", "next.reward", "next.done", "timestamp"
    )
    for key, name in names.items():
        np.testing.assert_array_equal(found[key], rows_of(store, name, slice(None, -1)).astype(np.float32))
    frames = (found["observation.image"] * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(frames, rows_of(store, "frame", slice(None, -1)))
    np.testing.assert_array_equal(found["next.reward"], rows_of(store, "reward", slice(1, None)))
    np.testing.assert_array_equal(found["next.done"], rows_of(store, "is_last", slice(1, None)))
    assert found["image_mean"].shape == (3, 1, 1)
    assert (int(found["episodes"]), found["task"].tolist()) == (6, ["test:walk"])
    for episode in range(6):
        rows = store.read_episode(episode)["action"][:-1]
        first = sum(store.episodes["rows"][:episode]) - episode
        at = np.minimum(np.arange(len(rows))[:, None] + np.arange(3), len(rows) - 1)
        np.testing.assert_array_equal(found["windows"][first : first + len(rows)], rows[at])
        assert found["padded"][first : first + len(rows)].sum() == 3


@pytest.mark.parametrize(("dtype", "actions"), [("float32", 2), ("float16", 1)])
def test_lerobot_reads_embeddings(tmp_path: Path, lerobot: Path, dtype: str, actions: int) -> None:
    store = Store.open(write_embeddings(tmp_path / "a", dtype=dtype, actions=actions))
    convert(store.path, tmp_path / "l", "lerobot")
    found = read_there(lerobot, tmp_path / "l", "observation.embedding", "action")
    np.testing.assert_array_equal(
        found["observation.embedding"], rows_of(store, "embedding", slice(None, -1)).astype(np.float32)
    )
    action = rows_of(store, "action", slice(None, -1))
    np.testing.assert_array_equal(found["action"].reshape(action.shape), action)
