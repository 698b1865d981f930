"""Training and probing on real stores: planted truth, resumption to the bit, and refusals.

The toy environment: the action alone decides the next observation and the reward on arriving there.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pvrpipe.schemas.errors import (
    CorruptStoreError,
    DivergedError,
    InvalidValueError,
    NotAStoreError,
    OutputExistsError,
    RunError,
    StoreBusyError,
    UnknownNameError,
)
from pvrpipe.store.files import locked
from pvrpipe.store.layout import MANIFEST
from pvrpipe.store.reading import Store
from pvrpipe.worldmodel import checkpoints, probe_episodes, runs, training
from pvrpipe.worldmodel.batches import Batches
from pvrpipe.worldmodel.compiling import Losses
from pvrpipe.worldmodel.models import build_model
from pvrpipe.worldmodel.optimizer import Updater
from pvrpipe.worldmodel.probe import probe
from pvrpipe.worldmodel.probe_episodes import shuffled_actions
from pvrpipe.worldmodel.probe_table import accumulate
from pvrpipe.worldmodel.sharing import verify_run
from pvrpipe.worldmodel.training import TrainConfig, train

from .planted import write_planted
from .settings import setting

LENGTHS = (40, 30, 36, 44) * 5
WIDTH = 8
CORNERS = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]], np.float32)
CODES = np.random.default_rng(99).normal(size=(5, WIDTH)).astype(np.float16)
QUICK = {
    "dreamerv3": TrainConfig("dreamerv3", "1m", 60, 24, 8, learning_rate=3e-3, warmup=10),
    "tdmpc2": TrainConfig("tdmpc2", "1m", 100, 64, 4, learning_rate=2e-3),
    "dinowm": TrainConfig("dinowm", "1m", 150, 32, 8, learning_rate=1e-3),
}
MODELS = tuple(QUICK)
WriteEmbeddings = Callable[..., Path]


def toy_episode(number: int, length: int, shift: int) -> dict[str, np.ndarray]:
    """``embedding[t + 1]`` is the code of ``action[t]``, ``reward[t + 1]`` its first number.

    With ``shift`` 1 the actions are stored one row late, as a loader with an off-by-one would give them.
    """
    corner = np.random.default_rng(number).integers(4, size=length + 1)
    action = CORNERS[corner]
    reward = np.concatenate([[0], action[:-1, 0]]).astype(np.float32)
    return {
        "embedding": np.concatenate([CODES[4:], CODES[corner[:-1]]]),
        "action": np.roll(action, shift, 0),
        "reward": reward,
    }


@pytest.fixture
def write_embeddings(tmp_path: Path) -> WriteEmbeddings:
    """Write an embedding store of the toy environment; returns its folder."""

    def write(name: str = "toy", lengths: Sequence[int] = LENGTHS, *, shift: int = 0, encoder: str = "toy",
              tokens: int = 1) -> Path:  # fmt: skip
        episodes = [toy_episode(i, length, shift) for i, length in enumerate(lengths)]
        if tokens > 1:
            episodes = [
                {**e, "embedding": e["embedding"].reshape(len(e["reward"]), tokens, -1)} for e in episodes
            ]
        return write_planted(tmp_path / name, episodes, encoder=encoder)

    return write


def short(model: str = "dreamerv3", **changes: Any) -> TrainConfig:
    """A few updates of a small model."""
    lengths = {"dreamerv3": 6, "tdmpc2": 4, "dinowm": 5}
    usual = {"updates": 6, "batch": 4, "length": lengths[model], "log_every": 2, "save_every": 2}
    return TrainConfig(model, "1m", **{**usual, **changes})


def actions_matter(report: dict[str, Any]) -> bool:
    """The model's open-loop errors are less than a third of what they are along shuffled actions."""
    return all(
        entry["per_step"]["mean"] < entry["shuffled_actions"]["per_step"]["mean"] / 3
        for entry in (report["dynamics_error"]["33"], report["reward_error"]["33"])
    )


@pytest.mark.parametrize("model", MODELS)
def test_planted_truth_is_found_and_a_shifted_loader_is_caught(
    model: str, write_embeddings: WriteEmbeddings, tmp_path: Path
) -> None:
    """Where the action alone decides what comes next, the probe sees it; one row late, it must not."""
    reports = []
    for shift in (0, 1):
        store = write_embeddings(f"shift{shift}", shift=shift)
        train(QUICK[model], store, tmp_path / f"run{shift}")
        reports.append(probe(tmp_path / f"run{shift}", horizons=(10, 33)))
    aligned, late = reports
    assert actions_matter(aligned)
    for error in ("dynamics_error", "reward_error"):
        entry = aligned[error]["33"]
        assert entry["per_step"]["mean"] < entry["no_change"]["per_step"]["mean"] / 3
    assert not actions_matter(late)
    reward = late["reward_error"]["33"]
    assert reward["per_step"]["mean"] > 0.8 * reward["shuffled_actions"]["per_step"]["mean"]
    if (
        model == "dreamerv3"
    ):  # without reconstruction, TD-MPC2 may drop what it cannot predict from its latent
        dynamics = late["dynamics_error"]["33"]
        assert dynamics["per_step"]["mean"] > 0.8 * dynamics["shuffled_actions"]["per_step"]["mean"]


def test_the_report_is_written_and_its_numbers_fit_together(
    write_embeddings: WriteEmbeddings, tmp_path: Path
) -> None:
    store = write_embeddings()
    train(short(), store, tmp_path / "run")
    report = probe(tmp_path / "run", horizons=(5, 33, 500))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == report
    held_out = Store.open(store).episodes.filter(Store.open(store).episodes["split"] == "val")
    lengths = held_out["length"].to_numpy()
    assert report["episodes"] == len(lengths)
    for error in ("dynamics_error", "reward_error"):
        for horizon in (5, 33, 500):
            entry = report[error][str(horizon)]
            assert entry["complete"] == (lengths >= horizon).sum()
            assert entry["steps"]["mean"] == pytest.approx(np.minimum(lengths, horizon).mean())
            for numbers in (entry, entry["shuffled_actions"], entry["no_change"]):
                assert numbers["accumulated"]["mean"] > numbers["per_step"]["mean"] > 0
                assert numbers["accumulated"]["sem"] > 0
        five = report[error]["5"]
        assert five["accumulated"]["mean"] == pytest.approx(5 * five["per_step"]["mean"])


def test_no_change_says_the_training_mean_for_every_reward(
    write_embeddings: WriteEmbeddings, tmp_path: Path
) -> None:
    store = write_embeddings()
    train(short("tdmpc2"), store, tmp_path / "run")
    entry = probe(tmp_path / "run", horizons=(500,))["reward_error"]["500"]["no_change"]
    opened = Store.open(store)
    rewards = {
        split: [
            opened.read_episode(e, ("reward",))["reward"][1:]
            for e in opened.episodes.filter(opened.episodes["split"] == split)["episode"]
        ]
        for split in ("train", "val")
    }
    mean = np.concatenate(rewards["train"]).mean()
    expected = np.mean([np.abs(r - mean).sum() for r in rewards["val"]])
    assert entry["accumulated"]["mean"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_padding_never_shows_in_an_error(
    model: str, write_embeddings: WriteEmbeddings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Episodes probed one by one, hence unpadded, give the same TD-MPC2 numbers, and as many steps."""
    store = write_embeddings(lengths=(9, 14, 11, 8, 13, 10, 12, 15, 9, 11))
    train(short(model), store, tmp_path / "run")
    together = probe(tmp_path / "run", horizons=(33,))
    monkeypatch.setattr(probe_episodes, "TOGETHER", 1)
    alone = probe(tmp_path / "run", horizons=(33,))
    for error in ("dynamics_error", "reward_error"):
        a, b = together[error]["33"], alone[error]["33"]
        assert a["steps"] == b["steps"]
        if model == "tdmpc2":
            for key in ("mean", "sem"):
                assert a["accumulated"][key] == pytest.approx(b["accumulated"][key], rel=1e-4)


def test_accumulate_stops_at_the_horizon_or_the_end() -> None:
    errors = np.array([[1.0, 2.0, 4.0, 8.0], [1.0, 1.0, 9.0, np.nan]])
    total = accumulate(errors, np.array([4, 2]), [1, 3, 9])
    assert total.tolist() == [[1, 7, 15], [1, 2, 2]]


def test_shuffled_actions_stay_within_their_episode_and_leave_the_context() -> None:
    action = torch.arange(20.0).view(2, 10, 1)
    rows = np.array([10, 6])
    shuffled = shuffled_actions(action, rows, 3, np.random.default_rng(0))[..., 0]
    assert shuffled[:, :2].tolist() == action[:, :2, 0].tolist()
    assert sorted(shuffled[0, 2:9].tolist()) == list(range(2, 9))
    assert shuffled[0, 2:9].tolist() != list(range(2, 9))
    assert sorted(shuffled[1, 2:5].tolist()) == [12, 13, 14]
    assert shuffled[1, 5:].tolist() == action[1, 5:, 0].tolist()


def test_probing_another_encoders_store_names_the_field(
    write_embeddings: WriteEmbeddings, tmp_path: Path
) -> None:
    train(short(), write_embeddings(), tmp_path / "run")
    same = write_embeddings("longer", lengths=(20,) * 5)
    assert probe(tmp_path / "run", same, horizons=(5,))["store"] == str(same)
    with pytest.raises(RunError, match=r"another encoder .*name: toy, there other"):
        probe(tmp_path / "run", write_embeddings("other", encoder="other"))


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
    for name in (checkpoints.CHECKPOINT, runs.METRICS):
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
    assert train(config, store, run).updates == 40


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
    assert runs.updates_done(run) == 4
    tensors = load_file(run / checkpoints.CHECKPOINT)
    assert all(bool(t.isfinite().all()) for t in tensors.values())
    assert train(short(model), store, run).train["gradient_norm"] > 0


def test_held_out_rows_that_give_no_number_are_said_to_be_held_out(
    write_embeddings: WriteEmbeddings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Batches.first
    monkeypatch.setattr(Batches, "first", lambda self, count: map(_nan, first(self, count)))
    with pytest.raises(DivergedError, match="validation loss after update 2 is nan, on held-out windows"):
        train(short(), write_embeddings(), tmp_path / "run")
    assert not (tmp_path / "run" / checkpoints.CHECKPOINT).exists()
    with pytest.raises(
        RunError, match="has no checkpoint yet; the `pvrpipe train-model` command that began it"
    ):
        probe(tmp_path / "run")


def test_training_stops_once_validation_no_longer_falls(
    write_embeddings: WriteEmbeddings, tmp_path: Path
) -> None:
    store = write_embeddings()
    config = short(
        "dreamerv3", updates=400, learning_rate=0.3, patience=2
    )  # too fast to get any better for long
    result = train(config, store, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / runs.METRICS).read_text().splitlines()]
    losses = [line["val"]["loss"] for line in lines if "val" in line]
    assert result.updates == 2 * len(losses) < 400
    assert min(losses) == losses[-3]
    assert train(config, store, tmp_path / "run") == result
    (row,) = runs.listed(tmp_path)
    assert (row["state"], row["updates"]) == ("finished", f"{result.updates} of 400")
    assert row["val_loss"] == losses[-1]


@pytest.mark.parametrize("model", MODELS)
def test_half_precision_trains_as_full_precision_does(
    model: str, write_embeddings: WriteEmbeddings, tmp_path: Path
) -> None:
    store = write_embeddings()
    losses = [
        train(short(model, precision=precision), store, tmp_path / precision).val["loss"]
        for precision in ("fp32", "bf16")
    ]
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.02)


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


@pytest.mark.parametrize("model", ["dreamerv3", "tdmpc2"])
def test_tokens_are_taken_side_by_side_by_an_mlp(
    model: str, write_embeddings: WriteEmbeddings, tmp_path: Path
) -> None:
    """The same numbers stored as two tokens, with normalisation off, train to the same model."""
    for name, tokens in (("flat", 1), ("tokens", 2)):
        store = write_embeddings(name, tokens=tokens)
        train(short(model, normalize=False, encoder="mlp"), store, tmp_path / f"run-{name}")
    flat, tokens = ((tmp_path / f"run-{n}" / "metrics.jsonl").read_text() for n in ("flat", "tokens"))
    assert flat == tokens
    train(short(model), tmp_path / "tokens", tmp_path / "normalised")
    assert probe(tmp_path / "normalised", horizons=(5,))["episodes"] > 0


def test_normalised_embeddings_have_the_moments_of_the_training_rows(
    write_embeddings: WriteEmbeddings, tmp_path: Path
) -> None:
    store = Store.open(write_embeddings())
    train(short(), store.path, tmp_path / "run")
    buffers = load_file(tmp_path / "run" / checkpoints.CHECKPOINT)
    of_train = store.episodes.filter(store.episodes["split"] == "train")["episode"]
    rows = np.concatenate([store.read_episode(e, ("embedding",))["embedding"] for e in of_train]).astype(
        float
    )
    standard = (rows - buffers["model.seen.standardise.mean"].numpy()) * buffers[
        "model.seen.standardise.scale"
    ].numpy()
    assert np.allclose(standard.mean(0), 0, atol=1e-4)
    assert np.allclose(standard.std(0), 1, atol=1e-3)
