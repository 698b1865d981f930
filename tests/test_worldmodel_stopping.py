"""Trainings that are killed, diverge, or are refused: what is kept, what is named, and that a rerun ends the same."""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pvrpipe.schemas.errors import (
    CorruptStoreError,
    DiskError,
    DivergedError,
    InvalidValueError,
    NotAStoreError,
    OutputExistsError,
    RunError,
    StoreBusyError,
    UnknownNameError,
)
from pvrpipe.store.files import locked, remove_temporaries
from pvrpipe.store.layout import MANIFEST
from pvrpipe.worldmodel import checkpoints, runs, training
from pvrpipe.worldmodel.batches import Batches
from pvrpipe.worldmodel.compiling import Losses
from pvrpipe.worldmodel.metrics_log import METRICS, updates_done
from pvrpipe.worldmodel.models import build_model
from pvrpipe.worldmodel.optimizer import Updater
from pvrpipe.worldmodel.probe import probe
from pvrpipe.worldmodel.sharing import verify_run
from pvrpipe.worldmodel.training import TrainConfig, train

from .settings import setting
from .toy import MODELS, QUICK, WriteEmbeddings, short


@pytest.mark.parametrize("model", MODELS)
def test_a_killed_run_ends_with_the_same_bytes(
    model: str, write_embeddings: WriteEmbeddings, tmp_path: Path
) -> None:
    """SIGKILL a real process in the middle of training, run the same again: the same checkpoint and log."""
    store = write_embeddings()
    config = short(model, updates=24, save_every=4)
    train(config, store, tmp_path / "undisturbed")
    program = (
        "import sys; from pvrpipe.worldmodel.training import TrainConfig, train\n"
        f"train(TrainConfig(**{config.__dict__!r}), sys.argv[1], sys.argv[2])"
    )
    run = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", program, str(store), str(run)])
    log = run / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 5):
        time.sleep(0.01)
    assert process.poll() is None, "the run ended before it was killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert runs.read_run(run).state == "training"
    log.write_text(log.read_text() + '{"update": 23, "tra')  # a line cut short by the kill
    train(config, store, run)
    for name in (checkpoints.CHECKPOINT, METRICS):
        assert (run / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name


def test_training_refuses_a_shard_that_is_not_the_stores(
    write_embeddings: WriteEmbeddings, tmp_path: Path
) -> None:
    """One bit of a value, which no footer shows."""
    store = write_embeddings()
    shards = sorted((store / "shards").glob("*.parquet"))
    for shard in shards:
        data = bytearray(shard.read_bytes())
        data[len(data) // 3] ^= 1
        shard.write_bytes(data)
    with pytest.raises(CorruptStoreError, match=r"has sha256 .*pvrpipe verify"):
        train(QUICK["tdmpc2"], store, tmp_path / "run")
    assert [row["state"] for row in runs.listed(tmp_path)] == ["failed"]
    assert "has sha256" in runs.read_run(tmp_path / "run").failure


def test_a_finished_run_is_returned_at_once_and_another_configuration_refused(
    write_embeddings: WriteEmbeddings, tmp_path: Path
) -> None:
    store, run = write_embeddings(), tmp_path / "run"
    first = train(short(), store, run)
    assert first.updates == 6
    assert first.updates_per_second > 0
    assert 0 <= first.data_wait_fraction < 1
    assert (
        set(first.train) - {"gradient_norm"} == set(first.val) >= {"loss", "reconstruction", "reward", "kl"}
    )
    stamp = (run / checkpoints.CHECKPOINT).stat().st_mtime_ns
    assert train(short(), store, run) == first
    with pytest.raises(OutputExistsError, match=r"seed: 0, now 1.*--overwrite"):
        train(short(seed=1), store, run)
    with pytest.raises(OutputExistsError, match="store_id"):
        train(short(), write_embeddings("other", shift=1), run)
    assert (run / checkpoints.CHECKPOINT).stat().st_mtime_ns == stamp
    assert train(short(seed=1), store, run, overwrite=True).train != first.train


def test_nothing_is_put_into_a_stores_folder(write_embeddings: WriteEmbeddings, tmp_path: Path) -> None:
    store = write_embeddings()
    for run in (store / "run", store / "shards" / "run"):
        with pytest.raises(
            OutputExistsError, match=r"lies in another store \(.*\); choose an output beside it"
        ):
            train(short(), store, run)
        assert not run.exists()


def test_a_strangers_folder_and_a_busy_run_are_left_alone(
    write_embeddings: WriteEmbeddings, tmp_path: Path
) -> None:
    store, run = write_embeddings(), tmp_path / "thesis"
    run.mkdir()
    (run / "chapter1.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError, match=r"chapter1\.txt"):
            train(short(), store, run, overwrite=overwrite)
    assert (run / "chapter1.txt").read_text() == "precious"
    (tmp_path / "busy").mkdir()
    with locked(tmp_path / "busy"), pytest.raises(StoreBusyError):
        train(short(), store, tmp_path / "busy")


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(
    write_embeddings: WriteEmbeddings, tmp_path: Path
) -> None:
    store, run = write_embeddings(), tmp_path / "run"
    config = short("tdmpc2", updates=40, learning_rate=1e-3)
    seen = {}

    def poison(done: float, total: float, note: str = "") -> None:
        """After the checkpoint of update 4, let the model's next losses be NaN."""
        if done == 4:
            seen["bytes"] = (run / checkpoints.CHECKPOINT).read_bytes()
            monkey.setattr(Batches, "__call__", lambda self, k: _nan(original(self, k)))

    original = Batches.__call__
    with (
        pytest.MonkeyPatch.context() as monkey,
        pytest.raises(RunError, match=r"loss of update 5 is nan, on windows of episodes \d+ from \d+, "),
    ):
        train(config, store, run, progress=poison)
    assert (run / checkpoints.CHECKPOINT).read_bytes() == seen["bytes"]
    assert [row["state"] for row in runs.listed(tmp_path) if row["run"] == str(run)] == ["diverged"]
    assert train(config, store, run).updates == 40
    assert (runs.read_run(run).state, runs.read_run(run).failure) == ("finished", "")


@pytest.mark.parametrize("model", MODELS)
def test_a_gradient_that_is_not_finite_names_the_batch_that_had_it(
    model: str, write_embeddings: WriteEmbeddings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of update 5 is a number, its gradient is none: the batch to look at is that of 5, not of 6."""
    store, run = write_embeddings(), tmp_path / "run"
    updates = itertools.count(1)

    def losses_of(model: Any, device: torch.device, *, compiled: bool) -> Losses:
        def losses(batch: Any, drawn: Any) -> Any:
            loss, terms = model.losses(batch, drawn)
            nothing = 0 * next(p for p in model.parameters() if p.requires_grad).sum()
            return (loss + nothing.sqrt() if next(updates) == 5 else loss), terms

        return losses

    with monkeypatch.context() as patched:
        patched.setattr(training, "losses_of", losses_of)
        with pytest.raises(
            DivergedError, match=r"gradient's norm of update 5 is nan, on windows of episodes \d"
        ):
            train(short(model), store, run)
    assert updates_done(run) == 4
    tensors = load_file(run / checkpoints.CHECKPOINT)
    assert all(bool(t.isfinite().all()) for t in tensors.values())
    assert train(short(model), store, run).train["gradient_norm"] > 0


def test_held_out_rows_that_give_no_number_are_said_to_be_held_out(
    write_embeddings: WriteEmbeddings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Batches.first
    monkeypatch.setattr(Batches, "first", lambda self, count: map(_nan, first(self, count)))
    with pytest.raises(
        DivergedError,
        match=r"validation loss after update 2 is nan, on held-out windows.*`sweep` with --overwrite",
    ):
        train(short(), write_embeddings(), tmp_path / "run")
    assert not (tmp_path / "run" / checkpoints.CHECKPOINT).exists()
    with pytest.raises(
        RunError, match="has no checkpoint yet; the `pvrpipe train-model` command that began it"
    ):
        probe(tmp_path / "run")


def _nan(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**batch, "observation": batch["observation"] * torch.nan}


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "garbage"])
def test_a_checkpoint_that_does_not_fit_names_the_tensor(
    damage: str, write_embeddings: WriteEmbeddings, tmp_path: Path
) -> None:
    store, run = write_embeddings(), tmp_path / "run"
    train(short(), store, run)
    path = run / checkpoints.CHECKPOINT
    tensors, name = load_file(path), "model.encoder.map.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "extra":
        name = "model.encoder.map.wait"
        tensors[name] = torch.zeros(1)
    elif damage == "shape":
        tensors[name] = tensors[name].t().contiguous()
    save_file(tensors, path, {"pvrpipe": '{"update": 6}'})
    if damage == "garbage":
        name = "is no checkpoint"
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RunError, match="is not the one that training wrote"):
        probe(run)
    runs.write_run(run, runs.read_run(run).model_copy(update={"files": {}}))  # a run that tells no hashes
    with pytest.raises(RunError, match=name):
        probe(run)


def test_an_optimizer_state_that_does_not_fit_is_refused_on_resume(tmp_path: Path) -> None:
    model = build_model("tdmpc2", "1m", setting(4, 2), seed=0)
    updater = Updater.of("tdmpc2", model, learning_rate=None, warmup=1)
    checkpoints.save(tmp_path, 3, model, updater)
    assert checkpoints.load(tmp_path, model, updater) == 3
    path = tmp_path / checkpoints.CHECKPOINT
    tensors = load_file(path)
    del tensors["optimizer.exp_avg.encoder.0.weight"]
    save_file(tensors, path, {"pvrpipe": '{"update": 3}'})
    with pytest.raises(RunError, match=r"optimizer\.exp_avg\.encoder\.0\.weight is missing"):
        checkpoints.load(tmp_path, model, updater)


def test_a_checkpoint_is_read_by_whom_its_folder_lets_and_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """Safetensors makes files for their user alone, and calls a full disk an error of its own."""
    model = build_model("tdmpc2", "1m", setting(4, 2), seed=0)
    updater = Updater.of("tdmpc2", model, learning_rate=None, warmup=1)
    checkpoints.save(tmp_path, 3, model, updater)
    path = tmp_path / checkpoints.CHECKPOINT
    (tmp_path / "beside").touch()
    assert path.stat().st_mode == (tmp_path / "beside").stat().st_mode
    before, most = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, most[1]))  # as the quota that some clusters give
    try:
        with pytest.raises(DiskError, match=r"files may not be that large here.*run the same command again"):
            checkpoints.save(tmp_path, 4, model, updater)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert path.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {path.name, "beside"}


def test_what_a_kill_within_safetensors_leaves_is_removed(tmp_path: Path) -> None:
    """It writes to a hidden file of a name of its own, as large as the checkpoint."""
    program = (
        "import resource, signal, sys, numpy, safetensors.numpy\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # a kill at the first byte beyond the limit\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "safetensors.numpy.save_file({'a': numpy.ones(9999)}, sys.argv[1] + '/checkpoint.safetensors')"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGXFSZ
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp")]
    remove_temporaries(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["a tensor", "the update"])
def test_one_bit_that_a_disk_turned_is_seen_on_resume(where: str, tmp_path: Path) -> None:
    model = build_model("tdmpc2", "1m", setting(4, 2), seed=0)
    updater = Updater.of("tdmpc2", model, learning_rate=None, warmup=1)
    checkpoints.save(tmp_path, 3, model, updater)
    path = tmp_path / checkpoints.CHECKPOINT
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if where == "a tensor" else data.index(b'"update\\": 3') + 11] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunError, match=r"tensor \S+ is not as it was written; train again with --overwrite"):
        checkpoints.load(tmp_path, model, updater)


def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    write_embeddings: WriteEmbeddings, tmp_path: Path
) -> None:
    with pytest.raises(UnknownNameError, match="nearest: dreamerv3"):
        TrainConfig("dreamerv2")
    with pytest.raises(UnknownNameError, match=r"unknown dreamerv3 size '13m'; nearest: .*12m"):
        TrainConfig("dreamerv3", "13m")
    with pytest.raises(InvalidValueError, match="multiple"):
        TrainConfig(log_every=30, save_every=100)
    with pytest.raises(InvalidValueError, match="updates"):
        TrainConfig(updates=0)
    for model, least in (("dreamerv3", 2), ("tdmpc2", 2), ("dinowm", 4)):
        TrainConfig(model, length=least)
        with pytest.raises(InvalidValueError, match=f"a window of {model} needs at least {least} rows"):
            TrainConfig(model, length=least - 1)
    with pytest.raises(InvalidValueError, match="--length"):
        train(short(length=100), write_embeddings(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(RunError, match="pvrpipe train-model"):
        probe(tmp_path / "nothing")


@pytest.mark.parametrize("lacking", [("reward",), ("action", "reward")])
def test_a_store_without_what_a_model_learns_from_names_it(
    lacking: tuple[str, ...], write_embeddings: WriteEmbeddings, tmp_path: Path
) -> None:
    store = write_embeddings()
    manifest = json.loads((store / MANIFEST).read_text())
    manifest["columns"] = [c for c in manifest["columns"] if c["name"] not in lacking]
    for name in lacking:
        manifest["statistics"].pop(name, None)
    (store / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(
        NotAStoreError, match=f"has no column {' and no '.join(lacking)}, which a world model"
    ):
        train(short(), store, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_training_that_does_not_fit_leaves_the_folder_to_one_that_does(
    write_embeddings: WriteEmbeddings, tmp_path: Path
) -> None:
    store, run = write_embeddings(), tmp_path / "run"
    with pytest.raises(InvalidValueError, match=r"GiB of cpu's memory .*give --batch \d+ or less"):
        train(short(batch=10**9), store, run)
    assert train(short(), store, run).updates == 6
    with pytest.raises(InvalidValueError, match="memory"):
        train(short(batch=10**9), store, run, overwrite=True)
    assert runs.read_run(run).state == "finished"


def test_a_run_of_another_version_is_one_line(write_embeddings: WriteEmbeddings, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(short(), write_embeddings(), run)
    record = json.loads((run / runs.RECORD).read_text())
    for change, says in (
        ({"format_version": 9}, r"is of format 9, which another pvrpipe wrote: take that, or train again"),
        (
            {"state": "asleep"},
            r"cannot be read \(state: .*\): fetch it again, or train again with --overwrite",
        ),
        ({"config": {**record["config"], "mood": "good"}}, r"another pvrpipe, .*'mood'.*train again"),
        ({"config": {**record["config"], "updates": "many"}}, "another pvrpipe, .*train again"),
        ({"config": {**record["config"], "size": "13m"}}, "another pvrpipe, .*unknown dreamerv3 size"),
    ):
        (run / runs.RECORD).write_text(json.dumps(record | change))
        for work in (probe, verify_run):
            with pytest.raises(RunError, match=says) as caught:
                work(run)
            assert "\n" not in str(caught.value)
