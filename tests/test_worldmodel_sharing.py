"""Runs that are verified, published and fetched like stores."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pvrpipe.cli import app
from pvrpipe.schemas.errors import CorruptStoreError, OutputExistsError, RunError
from pvrpipe.store.destination import Destination
from pvrpipe.store.files import temporary_beside
from pvrpipe.store.places import place_of, without_password
from pvrpipe.store.remote import Source
from pvrpipe.store.sharing import push
from pvrpipe.worldmodel.checkpoints import CHECKPOINT
from pvrpipe.worldmodel.probe import probe
from pvrpipe.worldmodel.runs import METRICS, PROBE, PROBE_TABLE, RECORD
from pvrpipe.worldmodel.sharing import pull_run, push_run, verify_run
from pvrpipe.worldmodel.training import TrainConfig, train

from .conftest import write_store
from .hub import Hub
from .planted import write_planted
from .serving import serving

CONFIG = TrainConfig("dinowm", "1m", updates=4, batch=4, log_every=2, save_every=2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("shared")
    episodes = [
        {
            "embedding": random.normal(size=(12, 4)).astype(np.float16),
            "action": random.uniform(-1, 1, (12, 2)).astype(np.float32),
            "reward": random.normal(size=12).astype(np.float32),
        }
        for _ in range(20)
    ]
    store = write_planted(folder / "store", episodes)
    train(CONFIG, store, folder / "run")
    probe(folder / "run", horizons=(5,))
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil, published and fetched again on its way."""
    push_run(finished, tmp_path / "lab")
    pull_run(tmp_path / "lab", tmp_path / "run")
    return tmp_path / "run"


def test_a_run_arrives_as_it_was(finished: Path, run: Path, tmp_path: Path) -> None:
    names = {RECORD, CHECKPOINT, METRICS, PROBE, PROBE_TABLE}
    assert {p.name for p in run.iterdir()} - {".lock"} == names
    assert all((run / name).read_bytes() == (finished / name).read_bytes() for name in names)
    assert verify_run(run) == []
    assert pull_run(tmp_path / "lab", run).files == len(names)  # again, into what is there
    (run / CHECKPOINT).unlink()
    pull_run(tmp_path / "lab", run)
    assert verify_run(run) == []


def test_a_run_goes_over_a_bucket(finished: Path, tmp_path: Path, bucket: str) -> None:
    url, taken = f"{bucket}/runs/one", tmp_path / "taken"
    sent = push_run(finished, url)
    assert pull_run(url, taken) == replace(sent, run=taken)
    assert verify_run(taken) == []
    assert all((taken / p.name).read_bytes() == p.read_bytes() for p in finished.glob("*.*") if p.is_file())
    Destination(place_of(url)).put(finished / RECORD, CHECKPOINT)  # a stranger's file in its place
    (taken / CHECKPOINT).unlink()
    with pytest.raises(CorruptStoreError, match=CHECKPOINT):
        pull_run(url, taken)


def test_a_run_goes_over_the_hub(finished: Path, tmp_path: Path, hub: Hub) -> None:
    push_run(finished, "hf://datasets/lab/runs/one")
    pull_run("hf://datasets/lab/runs/one", tmp_path / "taken")
    assert verify_run(tmp_path / "taken") == []
    with pytest.raises(RunError, match="holds no run"):
        pull_run("hf://datasets/lab/runs/two", tmp_path / "other")


def test_no_published_run_lies_in_a_store(finished: Path, tmp_path: Path, bucket: str) -> None:
    store = write_store(tmp_path / "one", (4, 5))
    for home in (bucket, str(tmp_path / "lab")):
        push(store, f"{home}/walk")
        with pytest.raises(OutputExistsError, match=r"lies in another store \(.*/walk\)"):
            push_run(finished, f"{home}/walk/run")
        with pytest.raises(OutputExistsError, match="no run but other files"):
            push_run(finished, f"{home}/walk")


def test_every_damage_is_found_and_named(run: Path, tmp_path: Path) -> None:
    for name, at in ((CHECKPOINT, -5), (METRICS, 20)):
        whole = (run / name).read_bytes()
        spoiled = bytearray(whole)
        spoiled[at] ^= 1
        (run / name).write_bytes(spoiled)
        (failure,) = verify_run(run)
        assert failure.where == name
        assert "has sha256" in failure.what
        with pytest.raises(CorruptStoreError, match=f"does not verify: {name} .*nothing was published"):
            push_run(run, tmp_path / "other")
        (run / name).write_bytes(whole)
    found = json.loads((run / PROBE).read_text())
    (run / PROBE).write_text(json.dumps({**found, "model": "tdmpc2"}))
    (failure,) = verify_run(run)
    assert (failure.where, failure.what) == (PROBE, "is of another run: its model differs")
    record = json.loads((run / RECORD).read_text())
    (run / RECORD).write_text(json.dumps({**record, "state": "training"}))
    assert "not ended" in verify_run(run)[0].what


def test_what_a_stranger_changed_is_not_taken(run: Path, tmp_path: Path) -> None:
    lab = tmp_path / "lab"
    spoiled = bytearray((lab / CHECKPOINT).read_bytes())
    spoiled[-5] ^= 1
    (lab / CHECKPOINT).write_bytes(spoiled)
    with pytest.raises(CorruptStoreError, match=CHECKPOINT):
        pull_run(lab, tmp_path / "taken")
    assert not (tmp_path / "taken" / RECORD).exists()
    record = json.loads((lab / RECORD).read_text())
    files = {**record["files"], "../outside": record["files"][METRICS]}
    (lab / RECORD).write_text(json.dumps({**record, "files": files}))
    with pytest.raises(RunError, match="cannot be read"):
        pull_run(lab, tmp_path / "escaped")


def test_nothing_is_overwritten_unasked(finished: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / METRICS).write_text("mine")
    with pytest.raises(OutputExistsError, match="no run but other files"):
        push_run(finished, tmp_path / "full")
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "thesis.tex").touch()
    with pytest.raises(OutputExistsError, match="pull into an empty folder"):
        pull_run(tmp_path / "lab", tmp_path / "busy")
    record = json.loads((run / RECORD).read_text())
    (run / RECORD).write_text(json.dumps({**record, "device": "cuda"}))
    with pytest.raises(OutputExistsError, match="another run"):
        push_run(run, tmp_path / "lab")
    push_run(run, tmp_path / "lab", overwrite=True)


def test_what_was_stopped_goes_on(
    finished: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the record, which is moved last; what is there already is not moved again."""
    lab, moved = tmp_path / "lab", []
    put, fetch = Destination.put, Source.fetch
    monkeypatch.setattr(Destination, "put", lambda s, f, n: (moved.append(n), put(s, f, n)))
    monkeypatch.setattr(Source, "fetch", lambda s, f, *rest: (moved.append(f.name), fetch(s, f, *rest))[1])
    for name in (RECORD, METRICS):
        (lab / name).unlink()
    push_run(finished, lab)
    assert moved == [METRICS, RECORD]
    moved.clear()
    for name in (RECORD, METRICS):
        (run / name).unlink()
    temporary_beside(run / METRICS).write_bytes(b"half")
    pull_run(lab, run)
    assert moved == [METRICS, PROBE, PROBE_TABLE]
    assert verify_run(run) == []
    (lab / RECORD).unlink()
    (lab / METRICS).write_bytes(bytes(len((lab / METRICS).read_bytes())))
    with pytest.raises(OutputExistsError, match=f"other files \\({METRICS}\\)"):
        push_run(finished, lab)


def test_the_commands(finished: Path, tmp_path: Path) -> None:
    def call(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, list(arguments))
        return result.exit_code, result.output or str(result.exception)

    assert call("verify", str(finished)) == (0, f"{finished}: every byte and number holds\n")
    code, said = call("verify", str(finished), "--golden")
    assert code == 1
    assert "without them" in said
    assert call("push", str(finished), str(tmp_path / "lab"))[0] == 0
    assert call("pull", str(tmp_path / "lab"), "--root", str(tmp_path / "data"))[0] == 0
    assert verify_run(tmp_path / "data" / "runs" / "lab") == []
    (tmp_path / "data" / "runs" / "lab" / METRICS).write_text("")
    assert call("verify", str(tmp_path / "data" / "runs" / "lab"))[0] == 1
    code, said = call("pull", str(tmp_path / "nothing"), "--root", str(tmp_path))
    assert code == 1
    assert "holds no store" in said


def test_a_run_without_its_store_says_how_to_probe_it(finished: Path, run: Path, tmp_path: Path) -> None:
    """Fetched from another lab, it still names the place that its store had there."""
    told = json.loads((run / RECORD).read_text())
    (run / RECORD).write_text(json.dumps({**told, "store": "/another/lab/store"}))
    with pytest.raises(
        RunError, match=r"trained on /another/lab/store, .* of planted: pvrpipe probe RUN STORE"
    ):
        probe(run, horizons=(5,))
    assert probe(run, finished.parent / "store", horizons=(5,))["episodes"] > 0


def test_a_password_in_a_stores_address_is_written_nowhere(
    finished: Path, tmp_path: Path, cache: Path
) -> None:
    """A server takes no notice of it, and what a run writes is there to be shared."""
    with serving(finished.parent) as served:
        address = served.url.replace("://", "://alice:pa@ssw0rd@") + "/store"
        train(CONFIG, address, tmp_path / "run")
        probe(tmp_path / "run", address, horizons=(5,))
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert json.loads((tmp_path / "run" / RECORD).read_bytes())["store"] == f"{served.url}/store".replace(
        "://", "://alice@"
    )
    assert [str(path) for path in written if b"ssw0rd" in path.read_bytes()] == []
    assert without_password("s3://a/b@c and https://u:p@h:80/x") == "s3://a/b@c and https://u@h:80/x"
