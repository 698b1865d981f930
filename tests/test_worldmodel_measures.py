"""Measures of a probe that take arrays: sums, groups, reward events, calibration, readers, ranks, neighbours."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

from pvrpipe.worldmodel.distributions import TwoHot
from pvrpipe.worldmodel.inputs import Observation
from pvrpipe.worldmodel.layers import ConvLayer
from pvrpipe.worldmodel.neighbours import nearest, neighbours_say
from pvrpipe.worldmodel.observations import STAGES, ConvEncoder
from pvrpipe.worldmodel.probe_dynamics import Judged
from pvrpipe.worldmodel.probe_networks import dormant_units, effective_rank, watched
from pvrpipe.worldmodel.probe_reference import evenly
from pvrpipe.worldmodel.probe_reward import Event, calibration, event_of, precision_recall
from pvrpipe.worldmodel.probe_state import fit_state_reader
from pvrpipe.worldmodel.probe_table import accumulate, groups, horizons_of, table_of
from pvrpipe.worldmodel.readout import PENALTIES


def test_accumulate_and_horizons() -> None:
    values = np.array([[1.0, 2.0, 4.0], [5.0, np.nan, np.nan]])
    assert accumulate(values, np.array([3, 1]), (1, 2, 9)).tolist() == [[1, 3, 7], [5, 5, 5]]
    assert horizons_of((33, 500), 100) == [1, 2, 4, 8, 16, 32, 33, 64, 500]


def test_groups_cut_a_factor_into_strata_that_hold_every_episode_once() -> None:
    episodes = pl.DataFrame(
        {
            "episode": range(9),
            "split": "val",
            "distribution": ["id"] * 6 + ["ood"] * 3,
            "variation": [f"camera={i % 3 / 10}" for i in range(9)],
            "policy": "random",
            "episode_return": 0.0,
            "factor_camera": np.arange(9.0) * np.array([1, -1] * 4 + [1]),
            "factor_still": 0.0,
        }
    )
    names = ("dynamics_mse", "reward_error")
    values = {("open_loop", "model", name): np.arange(9.0)[:, None] for name in names}
    found = groups(table_of(Judged(values, np.ones(9, int)), episodes, [1]), [1], "mse")
    by = {name: [g for g in found if g["by"] == name] for name in {g["by"] for g in found}}
    assert set(by) == {"split", "distribution", "variation", "factor_camera"}
    assert [g["episodes"] for g in by["factor_camera"]] == [3, 3, 3]
    means = [g["reward_error"]["1"]["per_step"]["mean"] for g in by["factor_camera"]]
    assert means == [1.0, 4.0, 7.0]
    assert [(g["value"], g["episodes"]) for g in by["distribution"]] == [("id", 6), ("ood", 3)]
    assert [g["reward_error"]["1"]["per_step"]["mean"] for g in by["distribution"]] == [2.5, 7.0]
    seen = episodes[:4].with_columns(split=pl.lit("train"), episode=pl.int_range(9, 13))
    values = {key: np.concatenate([rows, 100 + rows[:4]]) for key, rows in values.items()}
    both = groups(table_of(Judged(values, np.ones(13, int)), pl.concat([episodes, seen]), [1]), [1], "mse")
    assert [g for g in both if g["by"] != "split"] == [g for g in found if g["by"] != "split"]
    assert [(g["value"], g["episodes"]) for g in both if g["by"] == "split"] == [("val", 9), ("train", 4)]


def test_the_floor_of_a_two_hot_target_is_its_entropy() -> None:
    """Values of worldmodels.md, section 5.2, computed from the published bins."""
    for hot, known in (
        (TwoHot.dreamerv3(), {0.1: 0.678, 0.5: 0.687, 1.0: 0.665, 0.0: 0.0}),
        (TwoHot.tdmpc2(), {0.1: 0.692, 0.5: 0.125, 1.0: 0.691}),
    ):
        rewards_ = torch.tensor(list(known), dtype=torch.float32)
        assert hot.floor(rewards_).tolist() == pytest.approx(list(known.values()), abs=1e-3)
        best = hot.encode(rewards_).clamp_min(1e-30).log()
        assert hot.loss(best, rewards_).tolist() == pytest.approx(hot.floor(rewards_).tolist(), abs=1e-5)


def test_events_are_rewards_halfway_from_the_usual_one() -> None:
    assert event_of(np.array([0.0] * 8 + [1.0, 1.0])) == Event(0.5, below=False)
    assert event_of(np.array([1.0] * 8 + [0.0])) == Event(
        0.5, below=False
    )  # of an expert, nearly always rewarded
    assert event_of(np.array([0.0] * 8 + [-4.0])) == Event(-2.0, below=True)
    assert event_of(np.array([-0.5] * 8 + [-10.5])) == Event(-5.5, below=True)
    assert event_of(np.linspace(0, 1, 10)) is None
    assert event_of(np.zeros(10)) is None
    assert precision_recall(4, 8, 2) == {"precision": 0.5, "recall": 0.25, "predicted": 4, "received": 8}
    assert precision_recall(0, 3, 0)["precision"] is None


def test_of_a_cost_of_every_step_the_goal_is_the_event() -> None:
    """As of Fetch or Acrobot: -1 until the goal, 0 there; -1 was the event, and nearly every row one."""
    event = event_of(np.array([-1.0] * 9 + [0.0]))
    assert event == Event(-0.5, below=False)
    assert event(torch.tensor([-1.0, -0.9, -0.2, 0.0])).tolist() == [False, False, True, True]


def test_calibration_is_zero_where_predictions_are_means_and_the_bias_where_not() -> None:
    random = np.random.default_rng(0)
    predicted = random.uniform(size=20_000)
    received = (random.uniform(size=20_000) < predicted).astype(float)
    assert calibration(predicted, received)["expected_calibration_error"] < 0.02
    biased = calibration(predicted + 0.3, received)
    assert biased["expected_calibration_error"] == pytest.approx(0.3, abs=0.02)
    assert sum(entry["rows"] for entry in biased["bins"]) == 20_000
    assert calibration(np.array([1.0]), np.array([3.0]))["expected_calibration_error"] == 2.0


def test_bins_of_calibration_are_of_equally_many_rows_by_prediction() -> None:
    predicted = np.array([9.0, 1.0, 3.0, 2.0, 4.0, 100.0, 8.0])
    received = np.array([9.0, 0.0, 3.0, 0.0, 1.0, 50.0, 7.0])
    found = calibration(predicted, received, bins=3)
    assert found["bins"] == [
        {"rows": 3, "predicted": 2.0, "received": 1.0},
        {"rows": 2, "predicted": 6.0, "received": 4.0},
        {"rows": 2, "predicted": 54.5, "received": 29.5},
    ]
    assert found["expected_calibration_error"] == pytest.approx((3 * 1 + 2 * 2 + 2 * 25) / 7)
    assert len(calibration(np.arange(40.0), np.arange(40.0))["bins"]) == 10


def test_a_state_that_lies_in_the_features_is_read_exactly_and_one_that_does_not_costs_its_variance() -> None:
    random = np.random.default_rng(1)
    features = random.normal(2, 3, size=(600, 6))
    state = np.stack([features @ random.normal(size=6), random.normal(size=600), np.full(600, 7.0)], 1)
    episode = np.repeat(np.arange(30), 20)
    reader = fit_state_reader(features[:500], state[:500], episode[:500], torch.device("cpu"))
    assert reader is not None
    assert reader.penalty in PENALTIES
    held = torch.from_numpy(features[500:]).float(), torch.from_numpy(state[500:]).float()
    apart = (reader(held[0]) - held[1][:, reader.moving]).square().mean(0) / reader.spread
    assert apart[0] < 1e-3
    assert apart[1] == pytest.approx(1, abs=0.3)
    assert reader.error(*held).mean() == pytest.approx(float(apart.mean()), rel=1e-5)
    x = (features[:500] - features[:500].mean(0)) / features[:500].std(0)
    centred = state[:500, :2] - state[:500, :2].mean(0)
    augmented = np.concatenate([x, np.sqrt(reader.penalty * 500) * np.eye(6)])
    weights = np.linalg.lstsq(augmented, np.concatenate([centred, np.zeros((6, 2))]), rcond=None)[0]
    ours = reader.weight.numpy() * features[:500].std(0)[:, None]
    np.testing.assert_allclose(ours, weights, rtol=1e-4, atol=1e-5)
    for far in (1e9, -1e9):  # features that no training row has say no more than the rows' extremes
        read = reader(far * held[0])
        assert bool((read >= reader.low).all())
        assert bool((read <= reader.high).all())
    np.testing.assert_allclose(reader.high.numpy(), state[:500, :2].max(0), rtol=1e-6)
    assert fit_state_reader(features, np.ones((600, 2)), episode, torch.device("cpu")) is None


def test_training_rows_that_are_looked_at_are_of_episodes_spread_over_all() -> None:
    assert evenly(list(range(10, 20)), np.full(20, 10), 30) == [10, 14, 19]
    assert evenly([3, 5], np.full(6, 10), 1000) == [3, 5]
    assert evenly([3, 5], np.full(6, 10), 1) == [3]


def test_the_penalty_is_the_one_that_episodes_held_out_of_the_fit_ask_for() -> None:
    """Of noise, what fits the rows best, the least penalty, says the most that is wrong of others."""
    random = np.random.default_rng(4)
    features, state = random.normal(size=(60, 40)), random.normal(size=(60, 2))
    reader = fit_state_reader(features, state, np.repeat(np.arange(20), 3), torch.device("cpu"))
    assert reader is not None
    assert reader.penalty == PENALTIES[-1]


def test_effective_rank_counts_directions() -> None:
    random = np.random.default_rng(2)
    assert effective_rank(np.full((50, 4), 3.0)) == 0.0
    line = np.outer(random.normal(size=200), random.normal(size=8))
    assert effective_rank(line + 5) == pytest.approx(1, abs=1e-4)
    cloud = random.normal(size=(300, 5)) @ random.normal(size=(5, 12))
    values = np.linalg.svd(cloud - cloud.mean(0), compute_uv=False)
    shares = values[values > 1e-9] / values.sum()
    assert effective_rank(cloud) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
    assert effective_rank(cloud[:9]) == pytest.approx(
        effective_rank(cloud[:9] @ np.eye(12)[:, ::-1]), rel=1e-6
    )


def test_units_that_never_fire_are_dormant() -> None:
    assert dormant_units(np.array([1.0, 1.0, 0.0, 0.04])) == 1
    assert dormant_units(np.array([1.0, 1.0, 0.0, 0.01])) == 2
    network = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 1))
    with torch.no_grad():
        network[0].weight.copy_(torch.eye(3).repeat(3, 1)[:8])
        network[0].bias.zero_()
        network[0].bias[:2] = -100
    with watched(network) as activity:
        for part in torch.randn(100, 3).split(30):
            network(part)
    report = activity.report()
    assert report["layers"]["1"] == 2 / 8
    assert report["units"] == 12
    assert report["ratio"] >= 2 / 12
    assert not network[1]._forward_hooks


def test_a_channel_of_a_convolution_is_a_unit() -> None:
    """DreamerV3's were not counted: they were called past their module."""
    encoder = ConvEncoder(Observation("pixels", (64, 64, 3)), 4)
    stage = encoder.stages[1]
    assert isinstance(stage, ConvLayer)
    with torch.no_grad(), watched(encoder) as activity:
        stage.norm.weight[:3] = 0
        encoder(torch.rand(1, 2, 64, 64, 3))
    widths = [4 * each for each in STAGES]
    report = activity.report()
    assert report["units"] == sum(widths)
    assert report["layers"] == {f"stages.{i}": 3 / widths[1] if i == 1 else 0 for i in range(len(STAGES))}


def test_nearest_rows_are_those_of_all_distances_and_never_of_the_own_episode() -> None:
    random = np.random.default_rng(4)
    queries, bank = random.normal(100, 1, size=(40, 6)), random.normal(100, 1, size=(70, 6))
    indices, distances = nearest(queries, bank, 3)
    apart = np.linalg.norm(queries[:, None] - bank, axis=-1)
    assert (indices == np.argsort(apart, 1)[:, :3]).all()
    np.testing.assert_allclose(distances, np.sort(apart, 1)[:, :3], rtol=1e-3)
    episode = np.arange(70) // 10
    indices, distances = nearest(bank, bank, 60, of_query=episode, of_bank=episode)
    assert np.isfinite(distances).all()
    assert (episode[indices] != episode[:, None]).all()
    assert np.isinf(nearest(bank, bank, 61, of_query=episode, of_bank=episode)[1][:, -1]).all()
    assert neighbours_say(bank, bank, np.arange(70.0), 1).tolist() == list(range(70))


def test_two_episodes_of_different_looks_are_two_strata_and_not_an_empty_third() -> None:
    about = {
        "split": "val",
        "distribution": "ood",
        "variation": "ood",
        "policy": "random",
        "episode_return": 0.0,
    }
    episodes = pl.DataFrame({"episode": [0, 1], "factor_camera": [0.1, -0.7]}).with_columns(
        **{name: pl.lit(value) for name, value in about.items()}
    )
    names = ("dynamics_mse", "reward_error")
    values = {("open_loop", "model", name): np.array([[1.0], [3.0]]) for name in names}
    found = groups(table_of(Judged(values, np.ones(2, int)), episodes, [1]), [1], "mse")
    strata = [g for g in found if g["by"] == "factor_camera"]
    assert [g["reward_error"]["1"]["per_step"]["mean"] for g in strata] == [1.0, 3.0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0] * 9 + [-0.2, 0.3, 0.4, -0.5], [("0", 9), ("0.2 to 0.5", 4)]),  # a mixture of looks
        ([0.0] * 3 + [1.0] * 7, [("0", 3), ("1", 7)]),
        ([0.0] * 4 + [0.1] * 4 + [-0.8] * 4, [("0", 4), ("0.1", 4), ("0.8", 4)]),
        ([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [("0 to 0.2", 3), ("0.3 to 0.4", 2), ("0.5 to 0.6", 2)]),
        ([0.5] * 6, []),
    ],
)
def test_episodes_without_a_factor_are_no_stratum_with_those_that_have_it(
    values: list[float], expected: list[tuple[str, int]]
) -> None:
    about = dict.fromkeys(("split", "distribution", "variation", "policy"), "one") | {"episode_return": 0.0}
    episodes = pl.DataFrame({"episode": range(len(values)), "factor_camera": values}).with_columns(
        **{name: pl.lit(value) for name, value in about.items()}
    )
    errors = {("open_loop", "model", n): np.ones((len(values), 1)) for n in ("dynamics_mse", "reward_error")}
    found = groups(table_of(Judged(errors, np.ones(len(values), int)), episodes, [1]), [1], "mse")
    assert [(g["value"], g["episodes"]) for g in found if g["by"] == "factor_camera"] == expected
