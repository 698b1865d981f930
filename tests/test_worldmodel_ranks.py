"""Several processes that train one model do what one process does."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from pvrpipe.schemas.errors import InvalidValueError, UnreachableError
from pvrpipe.worldmodel import ranks, ray_engine
from pvrpipe.worldmodel.checkpoints import CHECKPOINT
from pvrpipe.worldmodel.ray_engine import train_together
from pvrpipe.worldmodel.runs import METRICS, read_run
from pvrpipe.worldmodel.training import TrainConfig, train

from .planted import write_planted

CONFIGS = {
    "dreamerv3": TrainConfig(
        "dreamerv3", "1m", updates=6, batch=4, length=8, warmup=2, burn_in=2, log_every=2, save_every=4
    ),
    "tdmpc2": TrainConfig("tdmpc2", "1m", updates=6, batch=8, log_every=2, save_every=4),
    "dinowm": TrainConfig("dinowm", "1m", updates=6, batch=4, log_every=2, save_every=4),
}
PART = """
import sys
from pvrpipe.worldmodel.ranks import joined
from pvrpipe.worldmodel.training import train
from tests.test_worldmodel_ranks import CONFIGS
with joined("cpu") as device:
    for model, config in CONFIGS.items():
        train(config, sys.argv[1], f"{sys.argv[2]}/{model}", device=device)
"""
REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    episodes = [
        {
            "embedding": random.normal(size=(31, 8)).astype(np.float16),
            "action": random.uniform(-1, 1, (31, 2)).astype(np.float32),
            "reward": random.normal(size=31).astype(np.float32),
        }
        for _ in range(20)
    ]
    return write_planted(tmp_path_factory.mktemp("planted") / "store", episodes)


@pytest.fixture(scope="module")
def together(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All models, each trained by two processes that torchrun starts."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "part.py").write_text(PART)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(folder / "part.py"), str(store), str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def assert_same_training(together: Path, alone: Path) -> None:
    assert (read_run(together).processes, read_run(alone).processes) == (2, 1)
    there, here = (safetensors.numpy.load_file(run / CHECKPOINT) for run in (together, alone))
    for name in here:
        np.testing.assert_allclose(there[name], here[name], rtol=1e-3, atol=1e-5, err_msg=name)
    logs = [[json.loads(line) for line in (r / METRICS).read_text().splitlines()] for r in (together, alone)]
    for there, here in zip(*logs, strict=True):
        for part in ("train", "val"):
            assert there.get(part, {}) == pytest.approx(here.get(part, {}), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("model", CONFIGS)
def test_two_processes_do_what_one_does(store: Path, together: Path, tmp_path: Path, model: str) -> None:
    """With burn-in, dropout, noise and a running scale: whatever is drawn or measured over a batch."""
    train(CONFIGS[model], store, tmp_path / "alone")
    assert_same_training(together / model, tmp_path / "alone")


def test_what_a_process_draws_is_its_part_of_what_one_would(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.rand(shape, generator=torch.Generator().manual_seed(0))

    for axis in (0, 1):
        parts = []
        for rank in range(2):
            monkeypatch.setattr(ranks, "ranks", lambda rank=rank: ranks.Ranks(rank, 2))
            parts.append(ranks.own_part(draw, (2, 2, 3), axis))
        whole = [2, 2, 3]
        whole[axis] = 4
        assert torch.equal(torch.cat(parts, axis), draw(tuple(whole)))


@pytest.mark.slow
def test_ray_train_does_what_one_process_does_and_raises_what_it_raises(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIGS["dinowm"]
    monkeypatch.chdir(store.parent)  # a relative path, as in the default workspace
    result = train_together(config, store.name, tmp_path / "together", workers=2)
    assert result.updates == config.updates
    train(config, store, tmp_path / "alone")
    assert_same_training(tmp_path / "together", tmp_path / "alone")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "together"]
    with pytest.raises(InvalidValueError, match="give a batch that the number of ranks divides"):
        train_together(replace(config, batch=5), str(store), tmp_path / "five", workers=2)
    with pytest.raises(InvalidValueError, match="--workers is 999, but the cluster has"):
        train_together(config, str(store), tmp_path / "many", workers=999)


def test_paths_reach_the_workers_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train gives its workers a working folder of their own, where ``data/…`` is nothing."""
    import ray.train.torch

    given: dict[str, Any] = {}

    class Trainer:
        def __init__(self, *_: Any, train_loop_config: dict[str, Any], **__: Any) -> None:
            given.update(train_loop_config)
            raise InterruptedError

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", Trainer)
    monkeypatch.chdir(tmp_path)
    for store, whole in (("data/store", str(tmp_path / "data/store")), ("s3://lab/store", "s3://lab/store")):
        with pytest.raises(InterruptedError):
            train_together(CONFIGS["dinowm"], store, Path("data/run"), workers=2)
        assert given["arguments"][1:] == (whole, tmp_path / "data/run")


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ray Train as it is to a mistake: it starts the worker anew whatever the failure was. How each time ended."""
    import ray.train.torch

    ended: list[str] = []

    class Trainer:
        def __init__(self, part: Any, *, train_loop_config: dict[str, Any], **_: Any) -> None:
            self.part, self.asked = part, train_loop_config

        def fit(self) -> None:
            for _ in range(2):
                try:
                    self.part(self.asked)
                except (InvalidValueError, UnreachableError) as error:
                    ended.append(type(error).__name__)
                else:
                    ended.append("returned")
                    break

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", Trainer)
    monkeypatch.setattr(ray_engine, "_ray", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(ray_engine, "_refuse_too_many", lambda *_: None)
    return ended


def test_a_mistake_is_not_made_again_by_workers_that_begin_again(
    store: Path, tmp_path: Path, in_this_process: list[str]
) -> None:
    """Those find the mistake and end; a run that was to be replaced is still there."""
    config, run = replace(CONFIGS["dinowm"], updates=2, log_every=1, save_every=1), tmp_path / "run"
    for there in (False, True):
        in_this_process.clear()
        with pytest.raises(InvalidValueError, match="has 999 rows"):
            train_together(replace(config, length=999), str(store), run, workers=1, overwrite=True)
        assert in_this_process == ["InvalidValueError", "returned"]
        assert run.exists() == there
        assert not there or read_run(run).state == "finished"
        if not there:
            train(config, store, run)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_workers_that_begin_again_replace_a_run_no_second_time(
    store: Path, tmp_path: Path, in_this_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = replace(CONFIGS["dinowm"], updates=4, log_every=1, save_every=1), tmp_path / "run"
    train(config, store, run)
    began: list[int] = []

    def broken_off(*arguments: Any, **options: Any) -> Any:
        def stop(done: float, total: float, note: str = "") -> None:
            began.append(int(done))
            if len(in_this_process) == 0 and done == 2:
                raise UnreachableError("the store's server does not answer")

        return train(*arguments, **{**options, "progress": stop})

    monkeypatch.setattr(ray_engine, "train", broken_off)
    train_together(replace(config, seed=7), str(store), run, workers=1, overwrite=True)
    assert in_this_process == ["UnreachableError", "returned"]
    assert began[-3:] == [2, 3, 4]
    assert read_run(run).config["seed"] == 7
