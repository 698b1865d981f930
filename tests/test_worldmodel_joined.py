"""Windows that run on into the next episode, as DreamerV3's authors' replay gives them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from pvrpipe.schemas.errors import InvalidValueError
from pvrpipe.store.reading import Store
from pvrpipe.worldmodel.batches import Backing, Batches, chance, setting_of
from pvrpipe.worldmodel.checkpoints import CHECKPOINT
from pvrpipe.worldmodel.models import build_model
from pvrpipe.worldmodel.training import train

from .toy import WriteEmbeddings, short

SHORT = (5, 7, 4, 6) * 5  # transitions; no window of 16 rows fits


def test_episodes_shorter_than_a_window_are_learned_from_where_they_are_joined(
    write_embeddings: WriteEmbeddings, tmp_path: Path
) -> None:
    store = write_embeddings("short", lengths=SHORT)
    asked = {"length": 16, "updates": 60, "save_every": 60, "learning_rate": 3e-3, "warmup": 5}
    with pytest.raises(InvalidValueError, match=r"the longest has 8\); give a smaller --length .*--joined"):
        train(short(**asked), store, tmp_path / "apart")
    backings: tuple[Backing, ...] = ("ram", "mapped", "device")
    found = [train(short(joined=True, **asked), store, tmp_path / b, backing=b) for b in backings]
    assert len({(tmp_path / b / CHECKPOINT).read_bytes() for b in backings}) == 1
    assert found[0].too_short == 0
    assert (
        train(short(joined=True, **{**asked, "updates": 2}), store, tmp_path / "two").val["loss"]
        > found[0].val["loss"]
    )


def test_an_episode_in_a_joined_window_is_what_it_is_alone(write_embeddings: WriteEmbeddings) -> None:
    """The losses of a window are the mean of those of its episodes' parts: nothing is carried over a boundary."""
    store = Store.open(write_embeddings("short", lengths=SHORT))
    setting = setting_of(store, pixels=64, encoder="auto")
    model = build_model("dreamerv3", "1m", setting, seed=0)
    data = Batches(
        store,
        "train",
        batch=3,
        length=16,
        seed=0,
        device=torch.device("cpu"),
        setting=setting,
        columns=model.columns,
        joined=True,
    )
    batch = data(0)
    drawn = model.draw(batch, chance(0, 0))
    begins = batch["is_first"].clone()
    assert begins[:, 1:].any(1).all(), "every window holds a boundary"
    begins[:, 0] = True
    parts = []
    for lane in range(3):
        edges = [*begins[lane].nonzero().flatten().tolist(), 16]
        for start, end in itertools.pairwise(edges):
            rows = (slice(lane, lane + 1), slice(start, end))
            alone = {name: column[rows] for name, column in batch.items()}
            parts.append((end - start, model.losses(alone, drawn[rows])[1]))
    whole = model.losses(batch, drawn)[1]
    for name, value in whole.items():
        mean = sum(rows * terms[name] for rows, terms in parts) / (3 * 16)
        torch.testing.assert_close(value, mean, rtol=1e-5, atol=1e-6, msg=name)


def test_only_dreamerv3_is_trained_on_joined_windows() -> None:
    for model in ("tdmpc2", "dinowm"):
        with pytest.raises(
            InvalidValueError, match=f"joined is True, but {model} has none; only dreamerv3 does"
        ):
            short(model, joined=True)
