"""Actions reach a model within [-1, 1], whatever the bounds of the environment that they were taken in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pvrpipe.schemas.errors import OutputExistsError
from pvrpipe.store.reading import Store
from pvrpipe.worldmodel import runs
from pvrpipe.worldmodel.actions import bounds_of, scaled, unscaled
from pvrpipe.worldmodel.metrics_log import METRICS
from pvrpipe.worldmodel.probe import probe
from pvrpipe.worldmodel.sweep import Job, finished
from pvrpipe.worldmodel.training import train

from .conftest import rollout_specification
from .planted import write_planted
from .toy import LENGTHS, MODELS, short, toy_episode


def made_with(low: tuple[float, ...], high: tuple[float, ...], **more: Any) -> Any:
    return rollout_specification(1, 10).model_copy(update={"action_low": low, "action_high": high, **more})


def test_bounds_go_onto_minus_one_and_one_and_back() -> None:
    bounds = bounds_of(made_with((-2.0, 0.0, -1.0), (2.0, 512.0, 1.0)))
    assert bounds is not None
    taken = torch.tensor([[-2.0, 512.0, 0.5], [1.0, 128.0, -1.0], [0.0, 0.0, 0.0]])
    seen = torch.tensor([[-1.0, 1.0, 0.5], [0.5, -0.5, -1.0], [0.0, -1.0, 0.0]])
    torch.testing.assert_close(scaled(taken, bounds), seen)
    torch.testing.assert_close(unscaled(seen, bounds), taken)


def test_what_is_within_them_or_has_none_is_left_as_it_is() -> None:
    assert bounds_of(made_with((-1.0, -1.0), (1.0, 1.0))) is None
    assert bounds_of(made_with((0.0, 0.0), (1.0, 1.0), discrete=True)) is None
    assert bounds_of(made_with((-np.inf, 0.5), (np.inf, 0.5))) is None
    assert bounds_of(made_with((-np.inf, -2.0), (3.0, 2.0))) == ((-1, 1), (-2, 2))
    assert bounds_of(made_with((-0.4, -1.0), (0.4, 1.0))) == (
        (pytest.approx(-0.4), pytest.approx(0.4)),
        (-1, 1),
    )
    assert bounds_of(made_with((-0.4, -0.9), (0.4, 1.0), policy="imported")) is None
    assert bounds_of(made_with((0.0, -0.9), (512.0, 1.0), policy="imported")) == ((0, 512), (-1, 1))


@pytest.mark.parametrize("model", MODELS)
def test_a_model_learns_the_same_from_actions_in_other_bounds(model: str, tmp_path: Path) -> None:
    """Random actions between -1 and 1, and the same between -2 and 6, to the bit."""
    random, logs, found = np.random.default_rng(0), [], []
    episodes = [toy_episode(number, length, 0) for number, length in enumerate(LENGTHS)]
    for episode in episodes:
        episode["action"] = random.integers(-64, 65, episode["action"].shape).astype(np.float32) / 64
    wider = [{**episode, "action": 4 * episode["action"] + 2} for episode in episodes]
    wide = ((-2.0, -2.0), (6.0, 6.0))
    stores = (
        write_planted(tmp_path / "usual", episodes),
        write_planted(tmp_path / "wide", wider, bounds=wide),
    )
    for store in stores:
        run = tmp_path / f"run-{store.name}"
        train(short(model), store, run)
        report = probe(run, horizons=(5,))
        logs.append((run / METRICS).read_text())
        found.append((report["dynamics_error"], report["reward_error"]))
    assert logs[0] == logs[1]
    assert found[0] == found[1]


def test_a_run_that_saw_actions_as_they_were_stored_is_another(tmp_path: Path) -> None:
    """Before bounds were told of, a run saw other numbers: it is not gone on with by these."""
    episodes = [toy_episode(number, length, 0) for number, length in enumerate(LENGTHS)]
    store = write_planted(tmp_path / "wide", episodes, bounds=((-2.0, -2.0), (2.0, 2.0)))
    train(short(), store, tmp_path / "run")
    job = Job(str(store), tmp_path / "run", short())
    assert finished(job) is not None
    record = runs.read_run(tmp_path / "run")
    assert record.setting.bounds == ((-2, 2), (-2, 2)) == bounds_of(Store.open(store).manifest.rollouts)
    before = record.model_copy(update={"setting": replace(record.setting, bounds=None)})
    runs.write_run(tmp_path / "run", before)
    with pytest.raises(OutputExistsError, match="bounds of actions: None, now"):
        train(short(), store, tmp_path / "run")
    assert finished(job) is None
    assert runs.read_run(tmp_path / "run") == before
