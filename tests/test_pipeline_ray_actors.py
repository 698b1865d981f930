"""Workers that die at a shard, as Ray would begin them again: real processes, without a cluster."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pvrpipe.pipeline.drafting import EmbedConfig, draft, made_by
from pvrpipe.pipeline.embed import embed
from pvrpipe.pipeline.embedding import Target
from pvrpipe.pipeline.encoders import EncoderRequest
from pvrpipe.pipeline.ray_engine import _Actor
from pvrpipe.schemas.errors import EncodingError
from pvrpipe.store.building import PendingStore
from pvrpipe.store.reading import Store
from pvrpipe.store.verifying import verify

from .brittle import brittle, number_of
from .conftest import WriteStore

# Workers, one after another: each is given all missing shards in a row. Nothing is computed before they are forked.
ACTORS = """
import json, os, pickle, sys
from tests import brittle
from pvrpipe.pipeline.ray_engine import _Actor

rollouts, targets, shards = pickle.load(sys.stdin.buffer)
for _ in range(int(sys.argv[1])):
    if os.fork() == 0:
        done = [pickle.loads(outcome) for outcome in _Actor(rollouts, targets)({"shards": [shards]})["outcome"]]
        told = [(o.shard, o.rows, [f"{type(f).__name__}: {f}" for f in o.failures]) for o in done]
        print(json.dumps(told), flush=True)
        os._exit(0)
    if os.wait()[1] != 0:
        print("null", flush=True)
"""


@pytest.fixture
def rollouts(write_rollouts: WriteStore) -> Path:
    return write_rollouts(size=24)


def what_becomes_of(rollouts: Path, request: EncoderRequest, out: Path, workers: int) -> list[Any]:
    """Of each worker, its outcomes as shard, rows and failures; None of one that died."""
    made = draft(Store.open(rollouts), request, out, EmbedConfig())
    with PendingStore.begin(out, made.manifest) as pending:
        shards = [plan.shard for plan in pending.todo]
        target = Target(made.request, out, made.manifest, made_by(made.manifest), frozenset(shards))
        told = subprocess.run(
            [sys.executable, "-c", ACTORS, str(workers)],
            input=pickle.dumps((str(rollouts), [target], shards)),
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            check=True,
            timeout=300,
        )
    return [json.loads(line) for line in told.stdout.splitlines()]


def test_a_shard_at_which_workers_die_is_found_and_given_up_alone(rollouts: Path, tmp_path: Path) -> None:
    store = Store.open(rollouts)
    shards = [plan.shard for plan in store.manifest.plan]
    deadly = shards[len(shards) // 2]
    plan = store.manifest.plan[deadly]
    frame = number_of(store.read_episode(plan.first_episode)["frame"][1])
    request = brittle(tmp_path / "pvr", die_at=frame, lives=4)
    out = tmp_path / "e"

    first, second, third, fourth = what_becomes_of(rollouts, request, out, 4)

    assert [first, second, third] == [None] * 3
    reason = {shard: failures for shard, _, failures in fourth}
    assert list(reason) == shards
    (said,) = reason.pop(deadly)
    assert said.startswith(
        f"EncodingError: 3 workers died at shard {deadly} (episodes {plan.first_episode} to "
    )
    assert not any(reason.values())
    rows = {shard: rows for shard, rows, _ in fourth if shard != deadly}
    assert rows == {s: store.manifest.shards[s].rows for s in shards if s != deadly}

    # the command again: shards that are there are not made again, and the others' chances are new
    died, last = what_becomes_of(rollouts, request, out, 2)
    assert died is None
    assert last == [[deadly, store.manifest.shards[deadly].rows, []]]
    (made,) = embed(rollouts, [(request, out)], EmbedConfig(engine="inline"))
    (alone,) = embed(rollouts, [(request, tmp_path / "alone")], EmbedConfig(engine="inline"))
    assert made.id == alone.id
    assert made.resumed_shards == len(shards)
    assert verify(out) == []
    assert not list(out.rglob("*.tmp-*"))


def test_what_stops_a_worker_from_beginning_is_told_of_every_shard(rollouts: Path, tmp_path: Path) -> None:
    """And not left to Ray, which would begin the worker again without end."""
    request = brittle(tmp_path / "pvr")
    made = draft(Store.open(rollouts), request, tmp_path / "e", EmbedConfig())
    other = dataclasses.replace(made.request, weights="random:1")
    target = Target(other, tmp_path / "e", made.manifest, made_by(made.manifest), frozenset({0, 1}))
    with PendingStore.begin(tmp_path / "e", made.manifest):
        told = _Actor(str(rollouts), [target])({"shards": np.array([[0, 1]])})["outcome"]
    outcomes = [pickle.loads(outcome) for outcome in told]
    assert [(o.shard, o.rows, [type(f) for f in o.failures]) for o in outcomes] == [
        (0, 0, [EncodingError]),
        (1, 0, [EncodingError]),
    ]
    assert "let workers be alike" in str(outcomes[0].failures[0])
    assert not list((tmp_path / "e").rglob("*.tmp-*"))
