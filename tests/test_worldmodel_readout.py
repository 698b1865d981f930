"""Read-outs on embeddings whose content is planted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.spatial import cKDTree

from pvrpipe.schemas.errors import InvalidValueError
from pvrpipe.store.reading import Store
from pvrpipe.worldmodel.readout import PENALTIES, judged, penalty_for, read_out, ridge_weights

from .planted import write_planted

WIDTH = 6


def state_and_embedding(random: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
    """A state whose first two numbers lie in the embedding, the first as it is, the second only as a product."""
    state = random.normal(size=(rows, 3)).astype(np.float32)
    factor = random.normal(size=rows)
    embedding = np.stack(
        [state[:, 0], factor, state[:, 1] * np.sign(factor), *random.normal(size=(3, rows))], 1
    )
    return {
        "embedding": (embedding @ MIX).astype(np.float32),
        "action": random.uniform(-1, 1, (rows, 2)).astype(np.float32),
        "reward": (2 * state[:, 0]).astype(np.float32),
        "state": state,
    }


MIX = np.linalg.qr(np.random.default_rng(5).normal(size=(WIDTH, WIDTH)))[0]


def test_what_is_in_an_embedding_is_found_and_what_is_not_is_not(tmp_path: Path) -> None:
    store = write_planted(
        tmp_path / "store", [state_and_embedding(np.random.default_rng(e), 60) for e in range(60)]
    )
    report = read_out(store, updates=700)
    assert report["reward"]["linear"]["r2"] > 0.999
    assert report["reward"]["linear"]["mae"] < 0.05 * report["reward"]["mean"]["mae"]
    assert report["reward"]["mean"]["r2"] == pytest.approx(0, abs=1e-9)
    linear, mlp = (report["state"][reader]["r2"] for reader in ("linear", "mlp"))
    assert linear == pytest.approx(1 / 3, abs=0.05)  # one number of three; the third is nowhere
    assert 0.5 < mlp < 0.72
    assert report["reward"]["neighbours"]["r2"] > 0.7
    assert 0.1 < report["state"]["neighbours"]["r2"] < mlp
    assert report["rows"]["train"] + report["rows"]["val"] == 60 * 59
    seen, told = (rows_of(store, split) for split in ("train", "val"))
    _, five = cKDTree(scaled(seen[0], seen[0])).query(scaled(told[0], seen[0]), 5)
    apart = np.abs(seen[1][five].mean(1) - told[1]).mean()
    assert report["reward"]["neighbours"]["mae"] == pytest.approx(apart, rel=1e-4)


def rows_of(store: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings and rewards of a split but for the first rows."""
    opened = Store.open(store)
    episodes = opened.episodes.filter(opened.episodes["split"] == split)["episode"]
    parts = [opened.read_episode(number, ("embedding", "reward")) for number in episodes]
    embedding, reward = (np.concatenate([p[name][1:] for p in parts]) for name in ("embedding", "reward"))
    return embedding.astype(np.float64), reward.astype(np.float64)


def scaled(rows: np.ndarray, by: np.ndarray) -> np.ndarray:
    return (rows - by.mean(0)) / by.std(0)


def test_ridge_equals_its_closed_form_solved_otherwise() -> None:
    random = np.random.default_rng(0)
    x, y, at = random.normal(size=(50, 4)), random.normal(size=(50, 2)), random.normal(size=(7, 4))
    augmented = np.concatenate([x, np.sqrt(1e-4 * 50) * np.eye(4)])
    weights = np.linalg.lstsq(augmented, np.concatenate([y, np.zeros((4, 2))]), rcond=None)[0]
    np.testing.assert_allclose(at @ ridge_weights(x, y, 1e-4), at @ weights, rtol=1e-9)


def test_few_rows_of_a_wide_embedding_are_read_with_a_penalty_that_suits_them(tmp_path: Path) -> None:
    """Of 200 numbers that are mostly noise, the least penalty reads a reward that there is worse than its mean does."""
    random, episodes = np.random.default_rng(2), []
    for _ in range(30):
        embedding = random.normal(size=(11, 200)).astype(np.float32)
        reward = embedding[:, :40].mean(1) * 40**0.5 + random.normal(size=11)
        action = np.zeros((11, 2), np.float32)
        episodes.append({"embedding": embedding, "action": action, "reward": reward.astype(np.float32)})
    store = write_planted(tmp_path / "store", episodes)
    (x, y), (at, told) = (rows_of(store, split) for split in ("train", "val"))
    seen, held_out, centre = scaled(x, x), scaled(at, x), y.mean()
    found = {
        penalty: judged(
            held_out @ ridge_weights(seen, y[:, None] - centre, penalty) + centre, told[:, None], y.mean(0)
        )
        for penalty in PENALTIES
    }
    chosen = penalty_for(seen, y[:, None] - centre, np.repeat(np.arange(len(y) // 10), 10))
    assert found[chosen]["r2"] > found[PENALTIES[0]]["r2"] + 0.05
    assert read_out(store, updates=2)["reward"]["linear"] == pytest.approx(found[chosen], rel=1e-9)


def test_numbers_that_never_change_do_not_count() -> None:
    true = np.array([[1.0, 5.0], [3.0, 5.0]])
    assert judged(true + 1, true, np.array([2.0, 5.0])) == {"r2": 0.0, "mae": 1.0}
    assert judged(true + 3, true, np.array([2.0, 5.0])) == {"r2": -8.0, "mae": 3.0}
    large = np.array([[1.0, 100.0], [3.0, 300.0]])  # a number in other units counts as much as any
    assert judged(large + np.array([1, 0]), large, large.mean(0))["r2"] == 0.5


def test_a_store_without_held_out_episodes_is_one_line(tmp_path: Path) -> None:
    store = write_planted(tmp_path / "store", [state_and_embedding(np.random.default_rng(0), 20)])
    with pytest.raises(InvalidValueError, match=r"no (val|train) episodes"):
        read_out(store)
