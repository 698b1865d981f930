"""Options and places that cannot be meant: one line that names the next step, and nothing is written."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from pvrpipe import cli
from pvrpipe.cli import app
from pvrpipe.commands.terminal import watching
from pvrpipe.pipeline.encoders import Encoder, EncoderRequest
from pvrpipe.pipeline.readout import Readout, read_out
from pvrpipe.pipeline.weights import find_weights
from pvrpipe.pipeline.zoo import PVRS, find_pvr
from pvrpipe.rollouts.environments import make_environment
from pvrpipe.schemas.errors import (
    InvalidValueError,
    OutputExistsError,
    PvrpipeError,
    UnfinishedStoreError,
    UnknownNameError,
    WeightsError,
)
from pvrpipe.store.building import PendingStore
from pvrpipe.store.destination import Destination
from pvrpipe.store.places import place_of
from pvrpipe.store.sharing import push
from pvrpipe.worldmodel.training import TrainConfig

from .conftest import draft, random_episode, write_store

VC1 = PVRS["vc1"]


@pytest.mark.parametrize(
    ("work", "kind", "says"),
    [
        (lambda: TrainConfig("tdmpc2", burn_in=3), InvalidValueError, "burn_in is 3, but tdmpc2 has none"),
        (lambda: TrainConfig("dreamerv3", proprioception=True), InvalidValueError, "only dinowm does"),
        (lambda: TrainConfig("dinowm", symlog_inputs=False), InvalidValueError, "only dreamerv3 does"),
        (lambda: TrainConfig("tdmpc2", warmup=5), InvalidValueError, "warmup is 5"),
        (lambda: TrainConfig(learning_rate=float("inf")), InvalidValueError, "--learning-rate is inf"),
        (lambda: TrainConfig(learning_rate=0.0), InvalidValueError, "--learning-rate is 0.0; give a positive"),
        (lambda: TrainConfig("tdmpc"), UnknownNameError, "nearest: tdmpc2, dreamerv3, dinowm"),
        (lambda: make_environment(action_repeat=99999999999), InvalidValueError, "give 1 to 1,000"),
        (lambda: make_environment(max_steps=10**9), InvalidValueError, "give 1 to 1,000,000"),
        (lambda: make_environment(""), UnknownNameError, "unknown environment ''"),
        (lambda: read_out(VC1, Readout(size=100_000)), InvalidValueError, "--input-size 100000: .*16 to 2048"),
        (lambda: read_out(VC1, Readout(blocks="0-")), InvalidValueError, "write a range"),
        (lambda: find_pvr(""), UnknownNameError, "unknown PVR ''"),
        (lambda: find_weights(VC1, "", "vc1"), WeightsError, "--weights is empty"),
    ],
)  # fmt: skip
def test_values(work: Callable[[], Any], kind: type[PvrpipeError], says: str) -> None:
    with pytest.raises(kind, match=says) as caught:
        work()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pvr", "weights", "refusal"),
    [
        ("a" * 300, "auto", "unknown PVR"),
        ("resnet18", "a" * 300, "there is no file a.* --weights FILE_OR_FOLDER"),
        (f"hf:{'a' * 300}", "auto", f"hf:{'a' * 300}"),
        ("", "auto", "unknown PVR ''"),
        ("hf:", "auto", "unknown PVR 'hf:'"),
        ("resnet18", "", "--weights is empty"),
    ],
)
def test_a_name_that_no_file_can_have_is_one_line(pvr: str, weights: str, refusal: str) -> None:
    """Nor is nothing the name of the folder that one is in."""
    with pytest.raises(PvrpipeError, match=refusal):
        Encoder(EncoderRequest(pvr, weights, device="cpu").anywhere())


def test_places_to_push_to(tmp_path: Path) -> None:
    home = tmp_path / "home"
    store = write_store(home / "one", (4, 5))
    with pytest.raises(
        OutputExistsError, match=r"holds other stores \(one, …\); push to a folder of its own"
    ):
        push(store, str(home), overwrite=True)
    with pytest.raises(InvalidValueError, match="lies in the store to read"):
        push(store, str(store / "sub"), overwrite=True)
    assert [p.name for p in home.iterdir()] == ["one"]
    assert not (store / "sub").exists()


def test_no_published_store_lies_in_another(tmp_path: Path, bucket: str) -> None:
    store = write_store(tmp_path / "one", (4, 5))
    for home in (f"{bucket}/lab", "memory://nested/lab", str(tmp_path / "lab")):
        push(store, f"{home}/walk")
        push(store, f"{home}/walk")  # beside its own shards
        push(store, f"{home}/walker")
        for url, says in (
            (home, r"holds other stores \(walk, …\); push to a folder of its own, e.g. .*lab/NAME"),
            (f"{home}/walk/sub", r"lies in another store \(.*lab/walk\)"),
            (f"{home}/walk/shards/deep/er", r"lies in another store \(.*lab/walk\)"),
        ):
            with pytest.raises(OutputExistsError, match=says):
                push(store, url, overwrite=True)
            assert not Destination(place_of(url)).read("store.json")
    push(store, f"{bucket}/lab2")
    with pytest.raises(OutputExistsError, match="holds other stores"):
        push(store, bucket)


def test_a_store_that_is_not_finished_is_not_pushed(tmp_path: Path) -> None:
    with PendingStore.begin(tmp_path / "begun", draft([random_episode(0, 4)])):
        pass
    with pytest.raises(UnfinishedStoreError, match="begun"):
        push(tmp_path / "begun", str(tmp_path / "there"))
    assert not (tmp_path / "there" / "store.json").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--golden"], "has no golden frames; only embedding stores have"),
        (["--weights", "random:0"], "give --golden too"),
        (["--pvr", "vc1"], "give --golden too"),
    ],
)
def test_what_golden_cannot_check_is_said_before_the_store_is_read(
    arguments: list[str], says: str, tmp_path: Path
) -> None:
    store = write_store(tmp_path / "rollouts", (4, 5))
    (store / "shards" / "00000.parquet").unlink()
    result = CliRunner().invoke(app, ["verify", str(store), *arguments])
    assert says in str(result.exception)
    assert isinstance(result.exception, PvrpipeError)


@pytest.mark.parametrize(("sample", "extent"), [("99", ""), ("3", ""), ("2", " of a sample of 2 shards")])
def test_a_sample_of_more_shards_than_there_are_is_all_of_them(
    sample: str, extent: str, tmp_path: Path
) -> None:
    store = write_store(tmp_path / "rollouts", (4, 5, 6))
    result = CliRunner().invoke(app, ["verify", str(store), "--sample", sample])
    assert result.output.endswith(f"rollouts: every byte and number{extent} holds\n")


def test_a_licence_that_is_not_known_is_not_told_as_none(tmp_path: Path) -> None:
    store = write_store(tmp_path / "rollouts", (4, 5))
    for command in (["card", str(store)], ["push", str(store), str(tmp_path / "there")]):
        result = CliRunner().invoke(app, command)
        assert (result.exit_code, "None" in result.output, " licence " in result.output) == (0, False, False)


def test_a_bar_whose_total_changes_keeps_its_rate(capsys: pytest.CaptureFixture[str]) -> None:
    """Episodes end early, and small files come on top: the last word is not a rate of nothing."""
    with watching("pull", "MiB") as progress:
        for done, total in ((0.0, 4.0), (3.0, 4.0), (5.0, 5.0)):
            time.sleep(0.01)
            progress(done, total)
    (rate,) = re.findall(r"([0-9.,]+) MiB/s", capsys.readouterr().err)
    assert 5 < float(rate) < 500


def test_a_bar_that_is_interrupted_as_it_begins_ends_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C where rich has hidden the cursor, and not yet begun all that it ends."""

    def interrupted(console: Console, hook: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Console, "push_render_hook", interrupted)
    with pytest.raises(KeyboardInterrupt), watching("pull", "MiB") as progress:
        progress(0.0, 4.0)


def test_an_empty_policy_is_not_the_usual_one(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["collect", "dmc:pendulum-swingup", str(tmp_path / "out"), "--policy", ""]
    )
    assert "unknown policy ''" in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [("--workers", "2"), ("--address", "auto")])
def test_workers_are_not_ignored_where_one_process_trains(option: tuple[str, str]) -> None:
    result = CliRunner().invoke(app, ["train-model", "nowhere", *option])
    assert isinstance(result.exception, InvalidValueError)
    assert "give --engine ray too" in str(result.exception)


def test_a_place_where_an_environment_belongs() -> None:
    result = CliRunner().invoke(app, ["collect", "data/mine"])
    assert result.exit_code == 1
    assert "name the environment first: pvrpipe collect dmc:pendulum-swingup data/mine" in str(
        result.exception
    )


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError("Unable to allocate 72.8 TiB"), "memory does not suffice .* smaller --batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "memory does not suffice"),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "o" * 300),
            "o{80}… is longer .* give a shorter one",
        ),
    ],
)
def test_what_the_machine_cannot_do_is_one_line(
    error: Exception, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(**_: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fails)
    monkeypatch.setattr("sys.argv", ["pvrpipe", "embed"])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert re.fullmatch(rf"pvrpipe: {says}.*\n", capsys.readouterr().err)
    monkeypatch.setattr("sys.argv", ["pvrpipe", "embed", "--debug"])
    with pytest.raises(type(error)):
        cli.main()


def test_ctrl_c_before_a_command_has_begun_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(**_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", stopped)
    monkeypatch.setattr("sys.argv", ["pvrpipe", "embed"])
    with pytest.raises(SystemExit, match="130"):
        cli.main()
    assert re.fullmatch(r"pvrpipe: stopped; .* to go on from there\.\n", capsys.readouterr().err)
