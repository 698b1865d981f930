"""What a probe measures, against the formulas in NumPy and float64, and against truths that are planted."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from scipy import stats

from pvrpipe.schemas.errors import InvalidValueError, RunError, UnknownNameError
from pvrpipe.store.reading import Store
from pvrpipe.worldmodel import probe_episodes, runs
from pvrpipe.worldmodel.batches import chance
from pvrpipe.worldmodel.distributions import TwoHot
from pvrpipe.worldmodel.predictions import Imagined, one_step
from pvrpipe.worldmodel.probe import check_finite, probe
from pvrpipe.worldmodel.probe_dynamics import Judged
from pvrpipe.worldmodel.probe_episodes import shuffled_actions
from pvrpipe.worldmodel.probe_networks import effective_rank
from pvrpipe.worldmodel.probe_reference import beliefs_of, reference_of
from pvrpipe.worldmodel.probe_subject import Subject, subject_of
from pvrpipe.worldmodel.training import TrainConfig, train

from .planted import write_planted

LENGTHS = (14, 19, 17, 12, 18) * 4
WIDTH, CONTEXT, HORIZONS, SEED = 5, 2, (4, 9, 40), 3
CONFIGS = {
    "dreamerv3": TrainConfig("dreamerv3", "1m", 20, 8, 8, learning_rate=3e-3, warmup=5),
    "tdmpc2": TrainConfig("tdmpc2", "1m", 20, 16, 4, learning_rate=2e-3),
    "dinowm": TrainConfig("dinowm", "1m", 20, 16, 6, learning_rate=1e-3),
}
MODELS = tuple(CONFIGS)


def noisy_episode(number: int, length: int) -> dict[str, np.ndarray]:
    """Embeddings that drift by the action, sparse rewards, a state with a number that never changes."""
    random = np.random.default_rng(number)
    action = random.uniform(-1, 1, (length + 1, 2)).astype(np.float32)
    moved = np.concatenate([np.zeros((1, 2)), action[:-1]]).cumsum(0)
    embedding = np.concatenate([moved, random.normal(size=(length + 1, WIDTH - 2))], 1)
    return {
        "embedding": embedding.astype(np.float32),
        "action": action,
        "reward": (random.uniform(size=length + 1) < 0.25).astype(np.float32),
        "state": np.concatenate([moved, np.full((length + 1, 1), 3.0)], 1).astype(np.float32),
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, and a run of each model on it."""
    folder = tmp_path_factory.mktemp("probe")
    write_planted(folder / "store", [noisy_episode(i, length) for i, length in enumerate(LENGTHS)])
    for name, config in CONFIGS.items():
        train(config, folder / "store", folder / name)
    return folder


@pytest.fixture(scope="module")
def probed(home: Path) -> dict[str, tuple[dict[str, Any], pl.DataFrame]]:
    """Report and table of each run."""
    found = {}
    for name in MODELS:
        report = probe(home / name, horizons=HORIZONS, context=CONTEXT, split=("val", "train"), seed=SEED)
        found[name] = report, pl.read_parquet(home / name / runs.PROBE_TABLE)
    return found


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def divergences(model: str, predicted: np.ndarray, true: np.ndarray) -> dict[str, np.ndarray]:
    """By the formulas."""
    if model != "dreamerv3":
        axes = tuple(range(2, predicted.ndim))
        return {"dynamics_mse": ((predicted - true) ** 2).mean(axes)}
    q, p = (0.99 * softmax(x) + 0.01 / x.shape[-1] for x in (predicted, true))
    forward, backward = (p * np.log(p / q)).sum((-2, -1)), (q * np.log(q / p)).sum((-2, -1))
    return {
        "dynamics_kl_forward": forward,
        "dynamics_kl_backward": backward,
        "dynamics_kl_mean": (forward + backward) / 2,
        "dynamics_mse": ((p - q) ** 2).mean((-2, -1)),
    }


def two_hot(reward: np.ndarray, two_hot: TwoHot) -> np.ndarray:
    """Targets by interpolation between bins."""
    bins = two_hot.bins.double().numpy()
    value = np.sign(reward) * np.log1p(np.abs(reward)) if two_hot.squash else reward
    target = np.zeros((*reward.shape, len(bins)))
    for at in np.ndindex(reward.shape):
        upper = int(np.searchsorted(bins, value[at], side="right"))
        share = (value[at] - bins[upper - 1]) / (bins[upper] - bins[upper - 1])
        target[at][upper - 1], target[at][upper] = 1 - share, share
    return target


def rewards(model: Any, said: Imagined, received: np.ndarray, threshold: float) -> dict[str, np.ndarray]:
    """By the formulas; that a distribution's mean is right is tested beside the distributions."""
    predicted = said.reward.double().numpy()
    target, logp = two_hot(received, model.two_hot), np.log(softmax(said.reward_logits.double().numpy()))
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(target > 0, target * np.log(target), 0).sum(-1)
    return {
        "reward_error": np.abs(predicted - received),
        "reward_excess_nats": -(target * logp).sum(-1) - entropy,
        "reward_predicted": predicted,
        "reward_received": received,
        "events_predicted": predicted > threshold,
        "events_received": received > threshold,
        "events_hit": (predicted > threshold) & (received > threshold),
    }


@pytest.fixture(params=MODELS)
def subject(request: pytest.FixtureRequest, home: Path) -> Iterator[tuple[str, Subject]]:
    with subject_of(home / request.param) as opened:
        yield request.param, opened


@torch.no_grad()
def test_every_measure_is_its_formula_in_float64(subject: Any, probed: Any) -> None:
    name, opened = subject
    model, numbers = opened.model, opened.episodes("val", CONTEXT)
    report, table = probed[name]
    ((_, episodes),) = opened.reader.batches(numbers)
    key, batch = (SEED, numbers[0]), episodes.batch
    filtered = model.filter(batch, chance(*key, 0))
    shuffled = shuffled_actions(batch["action"], episodes.rows, CONTEXT, np.random.default_rng((*key, 1)))
    received = batch["reward"][:, CONTEXT:].double().numpy()
    true = filtered.latents[:, CONTEXT:].double().numpy()
    for control, action in (("model", batch["action"]), ("shuffled_actions", shuffled)):
        begin = filtered.state(CONTEXT - 1)
        for prediction, said in (
            ("open_loop", model.predict(begin, action[:, CONTEXT - 1 : -1], chance(*key, 2))),
            ("one_step", one_step(model, filtered, action, CONTEXT, chance(*key, 2))),
        ):
            expected = {
                **divergences(name, said.latents.double().numpy(), true),
                **rewards(model, said, received, report["reward_event"]["threshold"]),
            }
            rows = table.filter(split="val", prediction=prediction, control=control)
            assert set(rows["measure"]) == {*expected, "state_error"}
            for measure, values in expected.items():
                check_totals(rows.filter(measure=measure), values, episodes.rows - CONTEXT)
    held = np.broadcast_to(filtered.latents[:, CONTEXT - 1 : CONTEXT].double().numpy(), true.shape)
    before = filtered.latents[:, CONTEXT - 1 : -1].double().numpy()
    for prediction, latents in (("open_loop", held), ("one_step", before)):
        rows = table.filter(split="val", prediction=prediction, control="no_change")
        for measure, values in divergences(name, latents, true).items():
            check_totals(rows.filter(measure=measure), values, episodes.rows - CONTEXT)


@torch.no_grad()
def test_controls_are_what_the_training_rows_say_and_states_are_read_off_each(
    subject: Any, probed: Any
) -> None:
    name, opened = subject
    model, numbers, trained = opened.model, opened.episodes("val", CONTEXT), opened.episodes("train")
    report, table = probed[name]
    ((_, learned),) = opened.reader.batches(trained)
    believed = model.filter(learned.batch, chance(SEED, trained[0], 0))
    exists = np.arange(1, learned.rows.max()) < learned.rows[:, None]  # but each episode's first row
    latents, features = (
        part[:, 1:].double().numpy()[exists] for part in (believed.latents, believed.features)
    )
    usual = learned.batch["reward"][:, 1:].double().numpy()[exists].mean()
    mean = np.log(softmax(latents).mean(0)) if name == "dreamerv3" else latents.mean(0)
    reader = reference_of(model, opened.reader, beliefs_of(model, opened.reader, trained, SEED)).state
    assert reader is not None
    shown = learned.batch["observation"][:, 1:].double().numpy()[exists]
    for part, rows_ in (("latent", features), ("embedding", shown)):
        known = {"rank": effective_rank(rows_), "of": min(len(rows_) - 1, rows_.shape[1])}
        assert report["networks"]["effective_rank"][part] == pytest.approx(known, rel=1e-3), part
    states = learned.batch["state"][:, 1:, :2].double().numpy()[exists]  # the third number never changes
    np.testing.assert_allclose(reader.spread.numpy(), states.var(0), rtol=1e-4)

    ((_, episodes),) = opened.reader.batches(numbers)
    key, batch, steps = (SEED, numbers[0]), episodes.batch, episodes.rows - CONTEXT
    filtered = model.filter(batch, chance(*key, 0))
    true, seen = (part[:, CONTEXT:].double().numpy() for part in (filtered.latents, filtered.features))
    state, reward = (
        batch["state"][:, CONTEXT:, :2].double().numpy(),
        batch["reward"][:, CONTEXT:].double().numpy(),
    )

    def state_error(rows: Any) -> np.ndarray:
        read = np.asarray(rows, np.float64) @ reader.weight.double().numpy() + reader.offset.double().numpy()
        kept = np.clip(read, reader.low.double().numpy(), reader.high.double().numpy())
        return ((kept - state) ** 2 / states.var(0)).mean(-1) + np.zeros(reward.shape)

    begin = filtered.state(CONTEXT - 1)
    held = {"open_loop": slice(CONTEXT - 1, CONTEXT), "one_step": slice(CONTEXT - 1, -1)}
    for prediction, said in (
        ("open_loop", model.predict(begin, batch["action"][:, CONTEXT - 1 : -1], chance(*key, 2))),
        ("one_step", one_step(model, filtered, batch["action"], CONTEXT, chance(*key, 2))),
    ):
        rows = table.filter(split="val", prediction=prediction)
        still = filtered.features[:, held[prediction]].double().numpy()
        read = {"model": said.features, "no_change": still, "mean": features.mean(0), "filtered": seen}
        for control, features_ in read.items():
            check_totals(rows.filter(control=control, measure="state_error"), state_error(features_), steps)
        flat = rows.filter(control="no_change", measure="reward_error")
        check_totals(flat, np.abs(usual - reward), steps)
        for measure, values in divergences(name, np.broadcast_to(mean, true.shape), true).items():
            check_totals(rows.filter(control="mean", measure=measure), values, steps)


def check_totals(rows: pl.DataFrame, values: np.ndarray, steps: np.ndarray) -> None:
    """Sums over the first rows of each episode, one by one."""
    for horizon in HORIZONS:
        found = rows.filter(horizon=horizon).sort("episode")
        totals = [row[: min(horizon, n)].sum() for row, n in zip(values, steps, strict=True)]
        np.testing.assert_allclose(found["accumulated"], totals, rtol=1e-4, atol=1e-5)
        assert found["steps"].to_list() == np.minimum(steps, horizon).tolist()
        np.testing.assert_allclose(found["per_step"], found["accumulated"] / found["steps"], rtol=1e-12)


@pytest.mark.parametrize("model", MODELS)
def test_every_number_of_the_report_comes_from_the_table(model: str, probed: Any, home: Path) -> None:
    report, table = probed[model]
    assert json.loads((home / model / runs.PROBE).read_text()) == report
    own = table.filter(split="val")
    assert report["episodes"] == own["episode"].n_unique()
    for prediction, measures in report["measures"].items():
        for measure, by_horizon in measures.items():
            for horizon, entry in by_horizon.items():
                chosen = own.filter(prediction=prediction, measure=measure, horizon=int(horizon))
                for control in set(chosen["control"]):
                    numbers = entry if control == "model" else entry[control]
                    values = chosen.filter(control=control)["accumulated"].to_numpy()
                    assert numbers["accumulated"]["mean"] == pytest.approx(values.mean())
                    sem = values.std(ddof=1) / np.sqrt(len(values))
                    assert numbers["accumulated"]["sem"] == pytest.approx(sem, abs=1e-12)
    assert report["dynamics_error"] == report["measures"]["open_loop"][f"dynamics_{report['divergence']}"]
    returns = report["returns"]["40"]
    open_loop = own.filter(prediction="open_loop", control="model", horizon=40)
    imagined, true = (
        open_loop.filter(measure=f"reward_{name}")["accumulated"].to_numpy()
        for name in ("predicted", "received")
    )
    assert returns["pearson"]["value"] == pytest.approx(np.corrcoef(imagined, true)[0, 1])
    assert returns["spearman"]["value"] == pytest.approx(stats.spearmanr(imagined, true).statistic)
    assert [returns["imagined"], returns["true"]] == pytest.approx([imagined.mean(), true.mean()])
    assert returns["absolute_error"] == pytest.approx(np.abs(imagined - true).mean())
    for prediction, horizon in itertools.product(("open_loop", "one_step"), HORIZONS):
        at = own.filter(prediction=prediction, horizon=horizon)
        check_events(report["reward_events"][prediction][str(horizon)], at.filter(control="model"))
        for measure, by_horizon in report["action_sensitivity"][prediction].items():
            means = at.filter(measure=measure).group_by("control").agg(pl.col("per_step").mean())
            of = dict(means.rows())
            assert by_horizon[str(horizon)] == pytest.approx(of["shuffled_actions"] / of["model"])
        entry = report["measures"][prediction]["reward_error"][str(horizon)]
        assert (
            entry["complete"]
            == (at.filter(control="model", measure="reward_error")["steps"] == horizon).sum()
        )
    for prediction, by_horizon in report["calibration"].items():
        for horizon, found in by_horizon.items():
            model_rows = own.filter(prediction=prediction, control="model", horizon=int(horizon))
            for name in ("predicted", "received"):
                total = model_rows.filter(measure=f"reward_{name}")["accumulated"].sum()
                assert sum(b["rows"] * b[name] for b in found["bins"]) == pytest.approx(total, abs=1e-9)
    train_group = next(group for group in report["groups"] if group["value"] == "train")
    errors = table.filter(
        split="train", prediction="open_loop", control="model", measure="reward_error", horizon=4
    )
    assert train_group["episodes"] == len(errors)
    assert train_group["reward_error"]["4"]["per_step"]["mean"] == pytest.approx(errors["per_step"].mean())


def check_events(found: dict[str, Any], rows: pl.DataFrame) -> None:
    """Counts of events, and what share of those said happened, and of those that happened was said."""
    said, happened, both = (
        rows.filter(measure=f"events_{name}")["accumulated"].sum()
        for name in ("predicted", "received", "hit")
    )
    assert (found["predicted"], found["received"]) == (said, happened)
    assert found["precision"] == (pytest.approx(both / said) if said else None)
    assert found["recall"] == pytest.approx(both / happened)


def test_probing_again_writes_the_same_bytes_whatever_the_batches(
    home: Path, probed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = {"horizons": HORIZONS, "context": CONTEXT, "split": ("val", "train"), "seed": SEED}
    files = [home / "dreamerv3" / name for name in (runs.PROBE, runs.PROBE_TABLE)]
    before = [file.read_bytes() for file in files]
    probe(home / "dreamerv3", **again)
    assert [file.read_bytes() for file in files] == before
    monkeypatch.setattr(probe_episodes, "TOGETHER", 3)
    report, _ = probed["tdmpc2"]
    split = probe(home / "tdmpc2", **again)
    for error in ("dynamics_error", "reward_error", "state_error"):
        for horizon, entry in report[error].items():
            assert split[error][horizon]["per_step"]["mean"] == pytest.approx(
                entry["per_step"]["mean"], rel=1e-4
            )


def test_what_cannot_be_probed_is_one_line_that_names_the_next_step(home: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match="longer than 30 rows; give another --split or --context"):
        probe(home / "tdmpc2", context=30)
    with pytest.raises(UnknownNameError, match="unknown split 'test'"):
        probe(home / "tdmpc2", split="test")
    with pytest.raises(InvalidValueError, match="--horizon"):
        probe(home / "tdmpc2", horizons=())
    with pytest.raises(
        InvalidValueError, match=r"--label 'x/../y' is no part of a file's name; give 'x-..-y'"
    ):
        probe(home / "tdmpc2", label="x/../y")
    with pytest.raises(RunError, match="pvrpipe train-model"):
        probe(tmp_path)


def test_another_environment_is_probed_where_that_is_asked_for_and_nowhere_else(
    home: Path, tmp_path: Path
) -> None:
    """The encoder and the actions are alike: what it said took the place of what the own store had said."""
    run = tmp_path / "run"
    shutil.copytree(home / "tdmpc2", run)
    rows = [noisy_episode(i, 12) for i in range(12)]
    there = write_planted(tmp_path / "there", rows, environment="test:run")
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    told = rf"trained in test:walk, and {there} is of test:run; give a store of test:walk, or --label NAME"
    for known in ("test:walk", ""):  # of a run that did not note it, what its own store says
        record = runs.read_run(run)
        assert record.environment
        runs.write_run(run, record.model_copy(update={"environment": known}))
        with pytest.raises(RunError, match=told):
            probe(run, there, horizons=(5,))
        runs.write_run(run, record)
    assert {name: (run / name).read_bytes() for name in before} == before
    assert probe(run, there, horizons=(5,), label="there")["environment"] == "test:run"
    assert {name: (run / name).read_bytes() for name in before} == before
    wider = [{**episode, "action": np.repeat(episode["action"], 2, 1)} for episode in rows]
    with pytest.raises(RunError, match=r"takes 2 actions, .* has 4"):
        probe(run, write_planted(tmp_path / "wider", wider), horizons=(5,))


def test_a_checkpoint_with_a_flipped_bit_is_no_model(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(home / "tdmpc2", run)
    checkpoint = run / "checkpoint.safetensors"
    data = bytearray(checkpoint.read_bytes())
    data[len(data) // 2] ^= 1
    checkpoint.write_bytes(data)
    with pytest.raises(RunError, match=r"is not the one that training wrote; fetch the run again, or train"):
        probe(run)


def test_a_model_that_diverged_is_named_and_not_averaged(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pvrpipe.worldmodel.tdmpc2 import TDMPC2

    right = TDMPC2.predict

    def broken(self: TDMPC2, *arguments: Any) -> Any:
        said = right(self, *arguments)
        return said._replace(latents=said.latents / 0)

    before = (home / "tdmpc2" / runs.PROBE).read_bytes()
    monkeypatch.setattr(TDMPC2, "predict", broken)
    with pytest.raises(
        RunError, match=r"dynamics_mse .* is not finite in episode \d+; .* `train-model` and `sweep` with"
    ):
        probe(home / "tdmpc2")
    assert (home / "tdmpc2" / runs.PROBE).read_bytes() == before


def test_what_is_padded_behind_an_episode_need_be_no_number(tmp_path: Path) -> None:
    rows = np.array([[1.0, 2.0, np.nan], [1.0, 2.0, 3.0]])
    check_finite(tmp_path, Judged({("open_loop", "model", "x"): rows}, np.array([2, 3])), [4, 7])
    with pytest.raises(RunError, match="not finite in episode 4"):
        check_finite(tmp_path, Judged({("open_loop", "model", "x"): rows}, np.array([3, 3])), [4, 7])


def test_a_store_without_state_has_no_state_error(tmp_path: Path) -> None:
    episodes = [noisy_episode(i, 12) for i in range(12)]
    for episode in episodes:
        del episode["state"]
    store = write_planted(tmp_path / "store", episodes)
    train(CONFIGS["tdmpc2"], store, tmp_path / "run")
    report = probe(tmp_path / "run", horizons=(5,))
    assert report["state_error"] is None
    assert "state_error" not in report["measures"]["one_step"]
    assert Store.open(store).manifest.id == report["store_id"]
