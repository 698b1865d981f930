"""The command line, as a person or a script meets it: real processes, real exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from pvrpipe.cli import app
from pvrpipe.commands.terminal import plain
from pvrpipe.store.verifying import verify

from .commands import run
from .conftest import WriteStore

PVRPIPE = str(Path(sys.executable).parent / "pvrpipe")


def test_what_is_no_number_is_nothing_in_json() -> None:
    """R² of a state that never changes, for one: JSON has no NaN, and what reads it strictly stops there."""
    found = {"linear": {"r2": float("nan"), "mae": 0.5}, "most": [float("inf"), 2]}
    assert plain(found) == {"linear": {"r2": None, "mae": 0.5}, "most": [None, 2]}


def commands() -> list[str]:
    return list(get_command(app).commands)


def last_json(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("command", commands())
def test_every_command_has_help_with_an_example_json_and_debug(command: str) -> None:
    found = CliRunner().invoke(app, [*command.split(), "--help"])
    assert found.exit_code == 0
    for text in (f"Example: pvrpipe {command}", "--json", "--debug"):
        assert text in found.stdout


@pytest.mark.parametrize("command", commands())
def test_every_command_is_in_the_docs(command: str) -> None:
    assert f"pvrpipe {command}" in (Path(__file__).parent.parent / "docs" / "commands.md").read_text()


SMALL = (
    "--size",
    "32",
    "--episodes",
    "3",
    "--max-steps",
    "24",
    "--policy",
    "random",
    "--engine",
    "inline",
)


def test_the_daily_way_with_no_path_typed(tmp_path: Path) -> None:
    """collect, pretrain, embed, train-model, probe, inspect, verify, each taking what the last one made."""
    collected = last_json(run("collect", *SMALL, "--json", cwd=tmp_path))
    assert set(collected) >= {
        "store", "id", "episodes", "rows", "shards", "resumed_shards", "bytes", "seconds", "frames_per_second",
    }  # fmt: skip
    assert (collected["episodes"], collected["rows"]) == (3, 75)
    trained = last_json(
        run("pretrain", "autoencoder", "--size", "16", "--updates", "3", "--json", cwd=tmp_path)
    )
    embedded = run("embed", "--pvr", trained["pvr"], "--engine", "inline", "--json", cwd=tmp_path)
    (store,) = last_json(embedded)["stores"]
    assert set(store) >= {
        "store", "id", "pvr", "shape", "rows", "resumed_shards", "seconds", "frames_per_second",
        "model_seconds", "read_seconds", "write_seconds",
    }  # fmt: skip
    assert "taking the newest rollouts" in embedded.stderr
    assert store["rows"] == 75
    result = last_json(
        run("train-model", "--updates", "3", "--batch", "2", "--length", "8", "--json", cwd=tmp_path)
    )
    assert set(result) >= {"run", "updates", "updates_per_second", "data_wait_fraction", "train", "val"}
    metrics = last_json(run("probe", "--horizon", "5", "--json", cwd=tmp_path))
    assert set(metrics["dynamics_error"]["5"]["accumulated"]) == {"mean", "sem"}
    assert (Path(tmp_path / result["run"]) / "metrics.json").is_file()
    for option in ("--horizon=5", "--split=val", f"--beside={store['store']}", store["store"]):
        refused = run("probe", store["store"], option, cwd=tmp_path)
        assert (
            f"does not go with {store['store']}, an embedding store that is read out; leave it out, or give a run"
            in refused.stderr
        )
    for path in (collected["store"], store["store"]):
        assert last_json(run("verify", path, "--json", cwd=tmp_path)) == {"ok": True, "failures": []}
        assert last_json(run("inspect", path, "--json", cwd=tmp_path))["rows"] == 75
    again = last_json(run("collect", *SMALL, "--json", cwd=tmp_path))
    assert (again["resumed_shards"], again["id"]) == (3, collected["id"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("collect", "dmc:pendulum-swingp"), "nearest: dmc:pendulum-swingup"),
        (("collect", "atari:pong"), "atari"),
        (("collect", "--policy", "randm"), "random"),
        (("collect", "dmc:walker-walk", "--policy", "scripted"), "no policy 'scripted'"),
        (("collect", "--variation", "camera=2"), "up to 1"),
        (("collect", "gym:HalfCheetah-v5", "--variation", "fov=1"), "it can vary: sensor_noise"),
        (("collect", "--replay", "nowhere"), "holds no store"),
        (("collect", "--replay", "nowhere", "--policy", "random"), "--policy does not go with --replay"),
        (("collect", "--replay", "nowhere", "--seed", "5"), "--seed does not go with --replay"),
        (("collect", "--replay", "nowhere", "--format", "webdataset"), "--format does not go with --replay"),
        (("collect", "foo:bar"), "unknown family of environments 'foo'"),
        (("preview", "nowhere"), "holds no store"),
        (("envs", "dmcc"), "dmc"),
        (("collect", "--episodes", "0"), "--episodes"),
        (("collect", "--episodes", "99999999999"), "1 to 10,000,000"),
        (("collect", "dmc:"), "nearest: dmc:dog-"),
        (("collect", "ale:Pong?noop=-3"), "noop is 0 or more"),
        (("collect", "--camera", "nowhere", "--engine", "inline"), "camera"),
        *(
            ((command, *given, "--engine", "inline", *option), "are of --engine ray, and this is one process")
            for command, *given in (
                ("collect",),
                ("embed",),
                ("pretrain", "mae"),
                ("sweep", "s"),
                ("study", "f"),
            )
            for option in (
                (("--address", "x"),) if command == "pretrain" else (("--workers", "2"), ("--address", "x"))
            )
        ),
        *(
            ((*command, "--engine", "ray", "--device", "cuda:1"), "--device cuda:1 names one GPU")
            for command in (("embed",), ("pretrain", "mae"), ("train-model",), ("sweep", "s"), ("study", "f"))
        ),
        (("sweep", "s", "--horizon", "5"), "--horizon is of the probe of each run"),
        (("probe", "r", "--beside", "b", "--split", "val", "--split", "train"), "episodes of one --split"),
        (
            ("train-model", "r", "--pvr", "vc1", "--backbone-learning-rate", "1e-5"),
            "with --unfreeze 0 nothing does",
        ),
        (("embed",), "pvrpipe collect"),
        (("train-model",), "pvrpipe embed --pvr NAME"),
        (("probe",), "pvrpipe train-model"),
        (("inspect", "."), "holds no store"),
        (("verify", "nowhere"), "holds no store"),
        (
            ("embed", "--pvr", "a", "--pvr", "b", "--weights", "x", "--weights", "y", "--weights", "z"),
            "3 --weights",
        ),
    ],
)
def test_a_mistake_is_one_line_with_the_next_step(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("pvrpipe: ")]
    assert message in line
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_mistakes_on_a_store_that_is_there(write_rollouts: WriteStore, tmp_path: Path) -> None:
    store = str(write_rollouts(size=16))
    for arguments, message in (
        (("embed", store, "--pvr", "vc2"), "nearest: vc1"),
        (("embed", store, "--pvr", "vc1", "--weights", "missing.bin"), "there is no file missing.bin"),
        (("embed", store, "--pvr", "vc1", "--weights", "random"), "random:SEED"),
        (("embed", store, "out", "--pvr", "vc1", "--pvr", "resnet18"), "leave OUT out"),
        (("embed", store, "--pvr", "vc1", "--weights", "random:0", "--device", "cuda"), "--device cpu"),
        (("train-model", store, "--model", "dinowm"), "pvrpipe embed"),
    ):
        if "cuda" in arguments:
            import torch

            if torch.cuda.is_available():
                continue
        done = run(*arguments, cwd=tmp_path)
        assert done.returncode == 1, (arguments, done.stderr)
        assert message in done.stderr.splitlines()[-1], arguments
    assert not (tmp_path / "out").exists()
    traceback = run("embed", store, "--pvr", "vc2", "--debug", cwd=tmp_path)
    assert traceback.returncode == 1
    assert "Traceback" in traceback.stderr


def test_wrong_usage_is_status_2(tmp_path: Path) -> None:
    for arguments in (("embed", "--bogus"), ("collect", "--episodes", "many"), ("nonsense",)):
        assert run(*arguments, cwd=tmp_path).returncode == 2


def test_ctrl_c_leaves_a_resumable_store_and_says_how(tmp_path: Path) -> None:
    arguments = [
        "collect",
        "--size",
        "32",
        "--episodes",
        "12",
        "--max-steps",
        "60",
        "--policy",
        "random",
        "--engine",
        "inline",
    ]
    process = subprocess.Popen([PVRPIPE, *arguments], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    store = tmp_path / "data" / "rollouts" / "dmc-pendulum-swingup"
    while not (store / "shards" / "00001.json").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert re.search(r"Run the same command again", process.stderr.read())
    finished = last_json(run(*arguments, "--json", cwd=tmp_path))
    assert finished["resumed_shards"] >= 2
    assert verify(store) == []
    fresh = last_json(run(*arguments, "--root", "other", "--json", cwd=tmp_path))
    assert fresh["id"] == finished["id"]


def test_verify_exits_1_and_names_the_shard(write_rollouts: WriteStore, tmp_path: Path) -> None:
    folder = write_rollouts()
    shard = folder / "shards" / "00003.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    done = run("verify", str(folder), "--json", cwd=tmp_path)
    assert done.returncode == 1
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["ok"], found["failures"][0]["where"]) == (False, "shards/00003.parquet")


def test_lists(tmp_path: Path) -> None:
    assert "dmc:ball_in_cup-catch" in last_json(run("envs", "--json", cwd=tmp_path))["envs"]
    listed = {row["pvr"]: row for row in last_json(run("pvrs", "--json", cwd=tmp_path))["pvrs"]}
    assert listed["vc1"]["width"] == 768
    assert listed["dinov2-b"]["licence"] == "Apache-2.0"
    shown = run("pvrs", cwd=tmp_path)
    assert {"vit,", "diverse", "facebook/vc1-base", "413569a"} <= set(shown.stdout.split())
    assert "facebook/dinov3-vits16-pretrain-lvd1689m, and Meta's .pth, are behind a form" in shown.stderr


def test_root_comes_from_the_environment(tmp_path: Path) -> None:
    environ = {**os.environ, "PVRPIPE_ROOT": str(tmp_path / "elsewhere")}
    done = subprocess.run([PVRPIPE, "embed"], env=environ, capture_output=True, text=True, check=False)
    assert str(tmp_path / "elsewhere") in done.stderr


@pytest.mark.slow
def test_doctor_tries_everything_for_real(tmp_path: Path) -> None:
    found = last_json(run("doctor", "--json", cwd=tmp_path))
    assert found["ok"]
    assert {c["check"] for c in found["checks"] if c["ok"]} >= {"python", "torch", "renderer", "ray", "disk"}


@pytest.mark.slow
def test_demo_ends_in_a_table_of_every_model_on_both_encoders_and_from_scratch(tmp_path: Path) -> None:
    small = ("--episodes", "5", "--max-steps", "40", "--updates", "5")
    table = last_json(run("demo", *small, "--json", cwd=tmp_path, timeout=900))["table"]
    assert {(row["pvr"], row["model"]) for row in table} >= {
        *(("from scratch", model) for model in ("dreamerv3", "tdmpc2")),
        *(("autoencoder", model) for model in ("dreamerv3", "tdmpc2", "dinowm")),
        *(("resnet18 (random weights)", model) for model in ("dreamerv3", "tdmpc2", "dinowm")),
    }
    assert {row["horizon"] for row in table} == {"33", "500 (end at 40)"}
