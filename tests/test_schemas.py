"""The contract: records hold their alignment, the manifest its schema."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

import pvrpipe.schemas
from pvrpipe.schemas.errors import InvalidValueError, UnknownNameError, one_line
from pvrpipe.schemas.manifest import Column, Manifest, canonical_json
from pvrpipe.schemas.records import Episode, EpisodeInfo

SCHEMA = Path(pvrpipe.schemas.__file__).parent / "manifest-v1.schema.json"


def test_schema_in_the_repository_is_that_of_the_models() -> None:
    assert json.loads(SCHEMA.read_text()) == json.loads(canonical_json(Manifest.model_json_schema()))


def episode(**changes: np.ndarray) -> Episode:
    arrays = {
        "reward": np.array([0, 1, 2], np.float32),
        "action": np.array([[1.0], [1.0], [0.0]], np.float32),
    }
    return Episode(EpisodeInfo(7, 2, 3.0, 0, "random"), {**arrays, **changes})


def test_episode_shows_shapes_instead_of_arrays() -> None:
    assert repr(episode()) == "Episode(7, return=3.000, reward[3] float32, action[3, 1] float32)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": np.array([1, 1, 1], np.float32)}, "its reward must be 0"),
        ({"action": np.ones((3, 1), np.float32)}, "its action must be 0"),
        ({"state": np.ones((2, 1), np.float32)}, "has 3 rows, but these columns differ"),
    ],
)
def test_episode_refuses_a_shifted_or_short_column(changes: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        episode(**changes)


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "../up", "dtype": "float32", "shape": (1,), "layout": "mapped"},
        {"name": "x", "dtype": "object", "shape": (1,), "layout": "mapped"},
        {"name": "x", "dtype": "float32", "shape": (1 << 40,), "layout": "mapped"},
        {"name": "x", "dtype": "float32", "shape": (0,), "layout": "mapped"},
        {"name": "x", "dtype": "float32", "shape": (1,), "layout": "mapped", "extra": 1},
    ],
)
def test_column_of_a_stranger_is_checked_before_anything_is_read_by_it(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Column.model_validate(fields)


def test_unknown_name_offers_the_nearest() -> None:
    error = UnknownNameError.among("PVR", "dinov-b", ["vc1", "dinov2-b", "clip-l14"])
    assert "unknown PVR 'dinov-b'; nearest: dinov2-b" in str(error)


def test_one_line_folds_a_message() -> None:
    assert one_line(ValueError("a\n  b\tc")) == "a b c"
    assert one_line(ValueError()) == "ValueError"
    assert one_line(KeyError("open_loop")) == "KeyError: 'open_loop'"
