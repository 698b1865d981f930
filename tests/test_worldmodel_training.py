"""Training and probing on real stores: planted truth, what a report says, early stops, precision, tokens.

The toy environment: the action alone decides the next observation and the reward on arriving there.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from pvrpipe.cli import app
from pvrpipe.schemas.errors import OutputExistsError, RunError
from pvrpipe.store.loading import WindowLoader
from pvrpipe.store.planning import split_of
from pvrpipe.store.reading import Store
from pvrpipe.worldmodel import checkpoints, probe_episodes, runs, training
from pvrpipe.worldmodel.batches import chance
from pvrpipe.worldmodel.metrics_log import METRICS
from pvrpipe.worldmodel.probe import probe
from pvrpipe.worldmodel.probe_episodes import shuffled_actions
from pvrpipe.worldmodel.probe_table import accumulate
from pvrpipe.worldmodel.sharing import verify_run
from pvrpipe.worldmodel.training import train

from .planted import write_planted
from .toy import MODELS, QUICK, WriteEmbeddings, short


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


def test_training_stops_once_validation_no_longer_falls(
    write_embeddings: WriteEmbeddings, tmp_path: Path
) -> None:
    store = write_embeddings()
    config = short(
        "dreamerv3", updates=400, learning_rate=0.3, patience=2
    )  # too fast to get any better for long
    result = train(config, store, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    losses = [line["val"]["loss"] for line in lines if "val" in line]
    assert result.updates == 2 * len(losses) < 400
    assert min(losses) == losses[-3]
    assert result.val["loss"] == losses[-3]
    assert result.kept == result.updates - 4
    assert train(config, store, tmp_path / "run") == result
    assert verify_run(tmp_path / "run") == []
    (row,) = runs.listed(tmp_path)
    assert (row["state"], row["updates"]) == ("finished", result.updates)
    assert (row["wanted"], row["val_loss"]) == (400, losses[-3])


def test_an_early_stop_keeps_the_best_weights_wherever_it_was_killed(
    write_embeddings: WriteEmbeddings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, config = write_embeddings(), short("dreamerv3", updates=400, learning_rate=0.3, patience=2)
    kept = train(config, store, tmp_path / "run").kept
    assert kept is not None
    known = {file.name: file.read_bytes() for file in (tmp_path / "run").glob("*.*")}
    train(short("dreamerv3", updates=kept, learning_rate=0.3), store, tmp_path / "best")
    assert known[checkpoints.CHECKPOINT] == (tmp_path / "best" / checkpoints.CHECKPOINT).read_bytes()
    assert checkpoints.BEST not in known

    def killed_after(place: Any, name: str, count: int) -> None:
        """Train until that was done so often, as if killed right after; then to the end."""
        calls, act = iter(range(1, count + 1)), getattr(place, name)

        def acting(*arguments: Any) -> None:
            if name != "finish":
                act(*arguments)
            if next(calls) == count:
                raise KeyboardInterrupt

        run = tmp_path / f"{name}-{count}"
        with monkeypatch.context() as patched:
            patched.setattr(place, name, acting)
            with pytest.raises(KeyboardInterrupt):
                train(config, store, run)
        train(config, store, run)
        found = {file.name: file.read_bytes() for file in run.glob("*.*")}
        assert found.keys() == known.keys()
        for file in (checkpoints.CHECKPOINT, METRICS):
            assert found[file] == known[file], (name, count, file)

    killed_after(checkpoints, "save", kept // 2)  # before it was noted that this one is the best
    killed_after(checkpoints, "mark_best", 1)
    killed_after(checkpoints, "keep_best", 1)
    killed_after(runs, "finish", 1)


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


def test_states_are_standardised_by_the_training_rows_alone(tmp_path: Path) -> None:
    """Held-out states lie far from all others: a moment of theirs would show."""
    random = np.random.default_rng(0)
    episodes = [
        {
            "embedding": random.normal(size=(9, 4)).astype(np.float16),
            "action": random.uniform(-1, 1, (9, 2)).astype(np.float32),
            "reward": random.normal(size=9).astype(np.float32),
            "state": (random.normal(size=(9, 3)) + 1000 * (split_of(number, 10) == "val")).astype(np.float32),
        }
        for number in range(10)
    ]
    store = write_planted(tmp_path / "store", episodes)
    train(short("dinowm", proprioception=True), store, tmp_path / "run")
    moments = load_file(tmp_path / "run" / checkpoints.CHECKPOINT)
    states = np.concatenate([e["state"] for n, e in enumerate(episodes) if split_of(n, 10) == "train"])
    assert moments["model.seen_state.mean"].numpy() == pytest.approx(states.mean(0), abs=1e-5)
    assert moments["model.seen_state.scale"].numpy() == pytest.approx(1 / states.std(0), rel=1e-5)


def test_a_run_finds_its_store_from_any_folder(
    write_embeddings: WriteEmbeddings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write_embeddings()
    monkeypatch.chdir(store.parent)
    train(short(), store.name, "run")
    monkeypatch.chdir("/")
    assert runs.read_run(tmp_path / "run").store == str(store)
    assert probe(tmp_path / "run", horizons=(5,))["store"] == str(store)


def test_another_configuration_is_refused_before_a_model_is_built(
    write_embeddings: WriteEmbeddings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest would take minutes and gigabytes; what is finished is returned as soon."""
    store = write_embeddings()
    first = train(short(), store, tmp_path / "run")
    monkeypatch.setattr(training, "model_of", None)
    with pytest.raises(OutputExistsError, match="size: 1m, now 400m"):
        train(replace(short(), size="400m"), store, tmp_path / "run")
    assert train(short(), store, tmp_path / "run") == first


@pytest.mark.parametrize(
    "line", ["[1, 2]", '"x"', '{"update": 3, "train": 5}', '{"train": {"loss": 1.0}}', "\udcff"]
)
def test_a_damaged_log_is_one_line_and_the_list_of_runs_goes_on(
    line: str, write_embeddings: WriteEmbeddings, tmp_path: Path
) -> None:
    store = write_embeddings()
    train(short(), store, tmp_path / "run")
    record = json.loads((tmp_path / "run" / runs.RECORD).read_text())
    (tmp_path / "run" / METRICS).write_text(line + "\n", errors="surrogateescape")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / runs.RECORD).write_text(json.dumps({**record, "config": {}}))
    assert [row["state"] for row in runs.listed(tmp_path)] == ["unreadable"] * 2
    with pytest.raises(RunError, match="config: Value error, no model"):
        runs.read_run(tmp_path / "other")
    (tmp_path / "run" / runs.RECORD).write_text(json.dumps({**record, "state": "training", "result": None}))
    with pytest.raises(RunError, match=r"a line that no training wrote .*--overwrite"):
        train(short(), store, tmp_path / "run")


def test_validation_reads_held_out_episodes_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each episode's embeddings are its number."""
    episodes = [
        {
            "embedding": np.full((9, 2), number, np.float16),
            "action": np.zeros((9, 1), np.float32),
            "reward": np.zeros(9, np.float32),
        }
        for number in range(20)
    ]
    seen: set[int] = set()
    right = training.validate

    def watched(model: Any, batches: Any, seed: int) -> dict[str, float]:
        judged = list(batches)
        seen.update(int(n) for batch in judged for n in batch["observation"].unique())
        return right(model, judged, seed)

    monkeypatch.setattr(training, "validate", watched)
    train(short("dinowm"), write_planted(tmp_path / "store", episodes), tmp_path / "run")
    assert seen == {number for number in range(20) if split_of(number, 20) == "val"}


def test_losses_are_logged_as_means_over_the_updates_since_the_last_line(
    write_embeddings: WriteEmbeddings, tmp_path: Path
) -> None:
    store, logs = write_embeddings(), {}
    for every in (1, 3):
        train(short(log_every=every, save_every=6), store, tmp_path / str(every))
        lines = (tmp_path / str(every) / METRICS).read_text().splitlines()
        logs[every] = [entry["train"] for entry in map(json.loads, lines) if "train" in entry]
    assert (len(logs[1]), len(logs[3])) == (6, 2)
    for name in logs[1][0]:
        each = [entry[name] for entry in logs[1]]
        assert [entry[name] for entry in logs[3]] == pytest.approx(
            [np.mean(each[:3]), np.mean(each[3:])], rel=1e-5
        )


def test_the_share_of_time_that_was_waited_is_that_of_the_loader(
    write_embeddings: WriteEmbeddings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = WindowLoader.__call__

    def waiting(self: WindowLoader, k: int) -> Any:
        batch = load(self, k)
        self.waited = 3.0
        return batch

    monkeypatch.setattr(WindowLoader, "__call__", waiting)
    result = train(short(), write_embeddings(), tmp_path / "run")
    assert result.data_wait_fraction == pytest.approx(3.0 / (6 / result.updates_per_second))


def test_validation_is_a_mean_over_batches_by_chance_of_its_own() -> None:
    """The same every time, another for each batch, and none that an update learned by."""

    class Rolled:
        def loss(self, _: Any, random: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            rolled = torch.rand((), generator=random)
            return rolled, {"loss": rolled}

    first, again = (training.validate(Rolled(), [{}] * 4, seed=3)["loss"] for _ in range(2))  # type: ignore[arg-type]
    rolls = [[float(torch.rand((), generator=chance(3, k, *own))) for k in range(4)] for own in ((), (1,))]
    assert first == again == pytest.approx(np.mean(rolls[1]))
    assert not set(rolls[0]) & set(rolls[1])


def test_episodes_that_no_window_fits_into_are_told(
    write_embeddings: WriteEmbeddings, tmp_path: Path
) -> None:
    store = write_embeddings(lengths=(40, 9, 30, 8) * 5)
    few = ("--updates", "2", "--batch", "2", "--length", "10")
    episodes = Store.open(store).episodes.select("split", "rows").rows()
    count = sum(split == "train" and rows < 10 for split, rows in episodes)
    told = CliRunner().invoke(app, ["train-model", str(store), str(tmp_path / "run"), *few]).stderr
    assert f"{count} training episodes shorter than a window had no part in it" in told
