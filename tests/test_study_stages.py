"""What a study takes as it is, what it makes anew, and what it leaves out: its stages without their work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pvrpipe.commands import study_stages
from pvrpipe.commands.study_plan import Encoded, Look, Plan
from pvrpipe.commands.study_stages import How
from pvrpipe.commands.study_state import Studying
from pvrpipe.rollouts.collect import Engine
from pvrpipe.schemas.errors import PvrpipeError
from pvrpipe.worldmodel.sweep import Job, Outcome

from .test_study_plan import planned

HOW = How(Engine("ray", "somewhere:1", 3), "cpu")


@pytest.fixture
def studying(tmp_path: Path) -> Studying:
    (tmp_path / "out").mkdir()
    return Studying(planned(tmp_path / "data", variations=["none"]), tmp_path / "out", "pvrpipe study")


def manifest(rollouts: str = "a", weights: str = "w", seed: int | None = 5) -> Any:
    of_weights = SimpleNamespace(file_sha256=weights, tensors_sha256="t", random_seed=seed)
    made = SimpleNamespace(rollouts_id=rollouts, encoder=SimpleNamespace(weights=of_weights))
    return SimpleNamespace(id="i", rows=7, bytes=9, embeddings=made)


def encoded(studying: Studying, name: str) -> Encoded:
    """Of the look that models are trained on."""
    return next(e for e in studying.plan.embeddings if e.label.startswith(name) and e.look.source is None)


def test_embeddings_of_other_rollouts_or_of_another_encoder_are_not_taken(
    studying: Studying, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_stages, "_sha256", lambda _: "w")
    rollouts = SimpleNamespace(id="a")
    own, published = encoded(studying, "autoencoder"), encoded(studying, "random")
    for each, found, wanted in (
        (own, manifest(), True),
        (own, manifest(rollouts="b"), False),
        (own, manifest(weights="v"), False),
        (published, manifest(weights="v"), True),  # its weights are in its folder's name
        (published, manifest(rollouts="b"), False),
        (published, None, False),
    ):
        monkeypatch.setattr(study_stages, "sealed", lambda _, found=found: found)
        assert study_stages._is_of(each, rollouts) is wanted
        assert not study_stages._is_of(each, None)


def test_a_store_is_verified_again_when_its_files_have_changed(
    studying: Studying, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found, read = encoded(studying, "random").folder, list[str](), list[Path]()
    folder.mkdir(parents=True)
    (folder / "shard").write_bytes(b"12")

    def failures(of: Path) -> list[str]:
        read.append(of)
        return found

    monkeypatch.setattr(study_stages, "sealed", lambda _: manifest())
    monkeypatch.setattr(study_stages, "_failures", failures)
    for _ in range(2):
        study_stages._take(studying, folder)
        record = studying.of(folder)
        assert (record.state, record.id, record.rows, record.bytes) == ("finished", "i", 7, 9)
        assert (record.weights_sha256, record.random_weights) == ("t", True)
    assert read == [folder], "what is as it was verified was read again"
    (folder / "shard").write_bytes(b"34")  # as long as before
    os.utime(folder / "shard", ns=(0, 0))
    found.append("shard: has another sha256")
    study_stages._take(studying, folder)
    assert len(read) == 2
    assert (studying.of(folder).state, studying.of(folder).checked) == ("damaged", None)


def test_what_cannot_be_made_costs_what_needs_it_and_says_so(
    studying: Studying, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> dict[str, Any]:
        raise PvrpipeError("the disk is full")

    def nothing(*_: Any) -> Any:
        raise AssertionError("there is nothing to make it of")

    own, shifted = studying.plan.looks
    monkeypatch.setattr(study_stages, "_collect", refuse)
    monkeypatch.setattr(study_stages, "_embed_look", nothing)
    study_stages._collect_all(studying, HOW)
    study_stages._embed_all(studying, HOW)
    assert studying.of(own.folder).failure == "the disk is full"
    assert {store.state for store in studying.stores.values()} == {"failed"}
    for store in studying.stores.values():
        assert store.folder == studying.of(own.folder).folder or store.failure.startswith("it needs ")
        assert "the disk is full" in store.failure
    assert (
        studying.of(shifted.folder).failure
        == f"it needs {studying.of(own.folder).folder} (failed: the disk is full)"
    )


def test_an_encoder_that_cannot_be_trained_costs_its_own_embeddings(
    studying: Studying, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PvrpipeError("no memory is left")

    made: list[str] = []

    def embed(_: Look, todo: Sequence[Encoded], __: How) -> list[Any]:
        made.extend(each.label for each in todo)
        raise PvrpipeError("the disk is full")

    monkeypatch.setattr(study_stages, "pretrain", refuse)
    monkeypatch.setattr(study_stages, "_embed", embed)
    look = studying.plan.looks[0]
    study_stages._embed_look(studying, look, HOW)
    assert made == ["random random:5"]
    assert "no memory is left" in studying.of(encoded(studying, "autoencoder").folder).failure
    assert studying.of(encoded(studying, "random").folder).failure == "the disk is full"


def test_a_run_waits_for_the_looks_that_it_is_probed_on_too(
    studying: Studying, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def swept(jobs: Sequence[Job], **named: Any) -> None:
        asked.update(named, jobs=[job.run.name for job in jobs])
        for job in jobs:
            named["told"](job, Outcome.of(job, "diverged", failure="the loss is nan"))

    monkeypatch.setattr(study_stages, "sweep", swept)
    for folder in studying.stores:
        studying.update(studying.plan.root / folder, state="finished")
    lost = next(e for e in studying.plan.embeddings if e.look.source is not None and e.pretrained is not None)
    studying.update(lost.folder, state="failed", failure="the disk is full")
    for job, record in studying.plan.jobs:
        wanted = record.pvr != "autoencoder"
        assert study_stages._ready(studying, job.store, job.shifts) is wanted
    study_stages._train_all(studying, HOW)
    runs = {record.run: job.run.name for job, record in studying.plan.jobs if record.pvr != "autoencoder"}
    assert asked["jobs"] == list(runs.values())
    assert (asked["engine"], asked["address"], asked["workers"]) == ("ray", "somewhere:1", 3)
    for record in studying.jobs.values():
        told = ("diverged", "the loss is nan") if record.run in runs else ("failed", "the disk is full")
        assert (record.state, told[1] in record.failure) == (told[0], True)


def test_what_an_encoder_costs_is_of_one_worker_that_only_computes() -> None:
    result: Any = SimpleNamespace(rows=300, model_seconds=6.0, memory_bytes=11)
    assert study_stages._cost(result) == {"seconds": 6.0, "frames_per_second": 50.0, "memory_bytes": 11}
    result.model_seconds = 0.0  # nothing was left to be computed
    assert study_stages._cost(result) == {"seconds": None, "frames_per_second": None, "memory_bytes": 11}


def test_what_a_store_cost_is_known_where_another_study_or_call_made_it(
    studying: Studying, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing in a store says how long it took, and the page of a study that took it as it was had no cost of it."""
    monkeypatch.setattr(study_stages, "sealed", lambda _: manifest())
    monkeypatch.setattr(study_stages, "_failures", lambda _: [])
    plan, cost = studying.plan, {"frames_per_second": 9.0, "memory_bytes": 5}
    folder = encoded(studying, "random").folder
    folder.mkdir(parents=True)

    def taken(home: Path, plan: Plan = plan, **known: Any) -> list[float | int | None]:
        home.mkdir(parents=True, exist_ok=True)
        study = Studying(plan, home, "pvrpipe study")
        if known:
            study.update(folder, **known)
        study_stages._take(study, folder)
        return [getattr(study.of(folder), name) for name in cost]

    assert taken(plan.root / "studies" / "other", id="i", **cost) == [9.0, 5]
    assert taken(plan.root / "studies" / "third") == [9.0, 5]
    monkeypatch.setattr(study_stages, "sealed", lambda _: SimpleNamespace(**{**vars(manifest()), "id": "j"}))
    assert taken(plan.root / "studies" / "fourth") == [None, None]
    part = planned(plan.root, variations=["none"], pvrs=["scratch"])  # of the same study, by an option
    assert taken(studying.out, **cost) == [9.0, 5]
    for once in (part, part, plan):
        Studying(once, studying.out, "pvrpipe study").save()
    assert studying.out.joinpath("study.json").read_text().count('"frames_per_second": 9.0') == 1
    assert taken(studying.out) == [9.0, 5]
