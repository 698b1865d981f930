"""An encoder inside a model: frozen it is the precomputed store, unfrozen nothing but its last parts learns."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pvrpipe.pipeline.embed import EmbedConfig, embed
from pvrpipe.pipeline.encoders import EncoderRequest
from pvrpipe.pipeline.pvrs import HALF, SPEC_FILE, Pvr, WeightsSource, recipe
from pvrpipe.pipeline.readout import Readout
from pvrpipe.pipeline.tuning import TunedEncoder, tuning_of
from pvrpipe.schemas.errors import EncodingError, InvalidValueError, OutputExistsError, RunError
from pvrpipe.worldmodel.batches import chance
from pvrpipe.worldmodel.checkpoints import CHECKPOINT
from pvrpipe.worldmodel.inputs import BACKBONE, Observation, Seen
from pvrpipe.worldmodel.memory import training_bytes
from pvrpipe.worldmodel.models import build_model
from pvrpipe.worldmodel.probe import probe
from pvrpipe.worldmodel.runs import METRICS, read_run
from pvrpipe.worldmodel.sharing import verify_run
from pvrpipe.worldmodel.sweep import Job, sweep
from pvrpipe.worldmodel.training import TrainConfig, load_model, train

from .commands import run
from .conftest import write_store
from .settings import setting

SIDE = 16  # pixels of a frame
ROWS = {"dreamerv3": 6, "tdmpc2": 4, "dinowm": 5}
FRAMES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, SIDE, SIDE, 3), np.uint8))
REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision transformer of three blocks, as one's own specification."""
    folder = tmp_path_factory.mktemp("pvrs") / "tiny"
    folder.mkdir()
    sizes: dict[str, int | float | str | bool] = {"img_size": SIDE, "patch_size": 8, "embed_dim": 32}
    pvr = Pvr(
        name="tiny",
        title="A tiny ViT",
        source=WeightsSource(file="encoder.safetensors"),
        architecture="vit_tiny_patch16_224",
        overrides={**sizes, "depth": 3, "num_heads": 2},
        recipe=recipe(None, "bilinear", HALF, crop=SIDE),
        pooling="cls",
        width=32,
        licence="MIT",
    )
    (folder / SPEC_FILE).write_text(pvr.model_dump_json())
    return folder


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("rollouts") / "store", (12, 15, 11, 14, 12, 13), size=SIDE)


def looking(pvr: Path | str, unfreeze: str, **readout: Any) -> TunedEncoder:
    tuning = tuning_of(str(pvr), "random:0", unfreeze)
    return TunedEncoder(tuning, (SIDE, SIDE), Readout(**readout), "cpu")


def config(model: str = "dreamerv3", **changes: Any) -> TrainConfig:
    usual = {"updates": 4, "batch": 4, "length": ROWS[model], "log_every": 2, "save_every": 2}
    fast = {"learning_rate": 1e-3, "backbone_learning_rate": 1e-3}
    return TrainConfig(model, "1m", **{**usual, **fast, **changes})


@pytest.mark.parametrize("pool", [None, "patches"])
@pytest.mark.parametrize("model", list(ROWS))
def test_frozen_in_the_loop_is_training_from_the_store(
    model: str, pool: str | None, tiny: Path, rollouts: Path, tmp_path: Path
) -> None:
    """The same windows, seeds and moments, of one embedding and of tokens."""
    request = EncoderRequest(str(tiny), "random:0", device="cpu", readout=Readout(pooling=pool))
    embed(rollouts, [(request, tmp_path / "store")], EmbedConfig(engine="inline", dtype="float32"))
    before = train(config(model), tmp_path / "store", tmp_path / "before")
    inside = train(config(model), rollouts, tmp_path / "inside", backbone=looking(tiny, "0", pooling=pool))
    for part in ("train", "val"):
        assert getattr(inside, part) == pytest.approx(getattr(before, part), rel=1e-4, abs=1e-5)
    ours, theirs = (load_file(tmp_path / name / CHECKPOINT) for name in ("inside", "before"))
    assert ours.keys() == theirs.keys()
    reports = [
        probe(tmp_path / "inside", horizons=(5,), backbone=looking(tiny, "0", pooling=pool)),
        probe(tmp_path / "before", horizons=(5,)),
    ]
    errors = [report["reward_error"]["5"]["per_step"]["mean"] for report in reports]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
    ranks = [report["networks"]["effective_rank"]["embedding"]["rank"] for report in reports]
    assert ranks[0] == pytest.approx(ranks[1], rel=1e-3)


@pytest.mark.parametrize("model", list(ROWS))
def test_only_the_last_block_and_the_norm_behind_it_learn(
    model: str, tiny: Path, rollouts: Path, tmp_path: Path
) -> None:
    backbone = looking(tiny, "1")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    train(config(model), rollouts, tmp_path / "run", backbone=backbone)
    moved = {name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])}
    last = {name for name in before if ".blocks.2." in name or ".trunk.norm." in name}
    assert moved == last == {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert all(p.grad is None for name, p in backbone.named_parameters() if name not in last)
    kept = {name for name in load_file(tmp_path / "run" / CHECKPOINT) if BACKBONE in name}
    parts = ("momentum", "square", "step") if model == "dreamerv3" else ("exp_avg", "exp_avg_sq", "step")
    assert kept == {
        f"{part}.{BACKBONE}{name}"
        for name in last
        for part in ("model", *(f"optimizer.{part}" for part in parts))
    }


def test_all_learns_but_what_the_embedding_does_not_depend_on() -> None:
    backbone = looking("resnet18", "all")
    learned = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert "network.trunk.conv1.weight" in learned
    unread = looking("timm:test_vit3", "all", pooling="mean")
    silent = {name.split(".")[2] for name, p in unread.named_parameters() if not p.requires_grad}
    assert silent == {"attn_pool"}
    last_two = {name for name, p in looking("resnet18", "2").named_parameters() if p.requires_grad}
    assert {name.split(".")[2] for name in last_two} == {"layer3", "layer4"}
    with_its_map = {name for name, p in looking("vip", "1").named_parameters() if p.requires_grad}
    assert {name.split(".")[2] for name in with_its_map} == {"layer4", "fc"}


def test_a_number_of_blocks_is_the_same_run_however_it_is_written() -> None:
    assert tuning_of("resnet18", "random:0", "02") == tuning_of("resnet18", "random:0", "2")


def test_batch_norms_keep_their_statistics(rollouts: Path, tmp_path: Path) -> None:
    backbone = looking("resnet18", "1")
    before = {name: value.clone() for name, value in backbone.named_buffers()}
    train(config(updates=2, batch=2), rollouts, tmp_path / "run", backbone=backbone)
    assert all(torch.equal(value, before[name]) for name, value in backbone.named_buffers())
    assert not any(module.training for module in backbone.modules())


def test_what_is_to_be_predicted_stays_what_it_was(tiny: Path) -> None:
    backbone, seen = looking(tiny, "1"), Seen(Observation("vector", (32,)))
    seen.look_through(backbone)
    frames = FRAMES[None]
    first = seen(frames)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    now = seen(frames)
    assert not torch.allclose(now, first, atol=1e-2)
    target = seen.target(frames, now)
    assert torch.equal(target, first)
    assert now.requires_grad
    assert not target.requires_grad


@pytest.mark.parametrize("model", ["tdmpc2", "dinowm"])
def test_no_gradient_flows_into_what_is_to_be_predicted(model: str) -> None:
    """The last row of a window is a target alone."""
    made = setting(8, 2)
    window: dict[str, Tensor] = {
        "observation": torch.randn(3, ROWS[model] + 2, 8, requires_grad=True),
        "action": torch.zeros(3, ROWS[model] + 2, 2),
        "reward": torch.randn(3, ROWS[model] + 2),
        "is_first": torch.zeros(3, ROWS[model] + 2, dtype=torch.bool),
        "is_terminal": torch.zeros(3, ROWS[model] + 2, dtype=torch.bool),
    }
    loss, _ = build_model(model, "1m", made, seed=0).loss(window, chance(0))
    (gradient,) = torch.autograd.grad(loss, [window["observation"]])
    assert gradient[:, 0].abs().max() > 0
    assert gradient[:, -1].abs().max() == 0


def test_an_encoder_that_gives_no_numbers_is_one_line(rollouts: Path, tmp_path: Path) -> None:
    class Broken(nn.Module):
        def forward(self, frames: Tensor) -> Tensor:
            return torch.full((len(frames), 4), torch.nan)

    with pytest.raises(
        EncodingError, match=r"embedding that is not finite in episode \d+; check its weights"
    ):
        train(config("tdmpc2"), rollouts, tmp_path / "run", device="cpu", backbone=Broken())


def test_any_module_will_do(rollouts: Path, tmp_path: Path) -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.map = nn.BatchNorm1d(3), nn.Linear(3, 4)

        def forward(self, frames: Tensor) -> Tensor:
            return self.map(self.norm(frames.float().mean((1, 2)) / 255))

    backbone = Mean()
    before = backbone.map.weight.detach().clone()
    train(config(), rollouts, tmp_path / "run", backbone=backbone)
    assert not torch.equal(backbone.map.weight, before)
    assert (
        backbone.norm.num_batches_tracked == 0
    )  # as torch makes a module, it would learn whatever it is shown
    assert read_run(tmp_path / "run").pvr == "a module of one's own"
    model, _ = load_model(tmp_path / "run", torch.device("cpu"), Mean())
    assert torch.equal(model.seen.backbone.map.weight, backbone.map.weight)
    with pytest.raises(RunError, match="load it with that backbone"):
        probe(tmp_path / "run", horizons=(5,))


def test_a_killed_run_ends_with_the_same_bytes(tiny: Path, rollouts: Path, tmp_path: Path) -> None:
    many = config(updates=24, save_every=4)
    train(many, rollouts, tmp_path / "undisturbed", backbone=looking(tiny, "1"))
    program = (
        "import sys; from pvrpipe.worldmodel.training import TrainConfig, train\n"
        "from tests.test_finetuning import looking\n"
        f"train(TrainConfig(**{many.__dict__!r}), *sys.argv[1:3], backbone=looking(sys.argv[3], '1'))"
    )
    killed = tmp_path / "killed"
    arguments = [sys.executable, "-c", program, str(rollouts), str(killed), str(tiny)]
    process = subprocess.Popen(arguments, cwd=REPOSITORY)
    log = killed / METRICS
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 5):
        time.sleep(0.01)
    assert process.poll() is None, "the run ended before it was killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(OutputExistsError, match="last 1 unfrozen, now tiny, all unfrozen"):
        train(many, rollouts, killed, backbone=looking(tiny, "all"))
    train(many, rollouts, killed, backbone=looking(tiny, "1"))
    for name in (CHECKPOINT, METRICS):
        assert (killed / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name


def test_memory_is_counted_for_what_learns(tiny: Path) -> None:
    made = setting(32, 2).__class__(
        Observation("vector", (32,)), 2, state=0, steps=9, episodic=False,
        frames=Observation("frames", (SIDE, SIDE, 3)),
    )  # fmt: skip

    def needed(unfreeze: str) -> tuple[int, float]:
        model = build_model("dreamerv3", "1m", made, seed=0)
        model.seen.look_through(looking(tiny, unfreeze))
        return training_bytes(model, made, 8, torch.device("cpu"))

    frozen, one, whole = (needed(unfreeze) for unfreeze in ("0", "1", "all"))
    assert frozen[0] < one[0] < whole[0]
    assert frozen[1] < one[1] < whole[1]


def test_the_commands(tiny: Path, rollouts: Path, tmp_path: Path) -> None:
    """Trained, listed, verified, probed; the encoder is found where it was, or where one says that it is."""
    pvr = shutil.copytree(tiny, tmp_path / "pvr")
    asked = ("--pvr", "pvr", "--weights", "random:0", "--unfreeze", "1", "--device", "cpu")
    short = ("--updates", "2", "--batch", "2", "--length", "6", "--json")
    done = run("train-model", str(rollouts), *asked, *short, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = Path(json.loads(done.stdout.splitlines()[-1])["run"])
    assert folder.name == "test-walk-store-tiny-random:0-unfreeze-1-dreamerv3-1m-s0".replace(":", "-")
    record = read_run(tmp_path / folder)
    assert record.encoder is not None
    assert (record.encoder.name, record.pvr) == ("tiny", "tiny, last 1 unfrozen")
    assert record.tuning == tuning_of(str(pvr), "random:0", "1")
    assert verify_run(tmp_path / folder) == []
    listed = run("runs", "--json", cwd=tmp_path)
    assert json.loads(listed.stdout)["runs"][0]["pvr"] == "tiny, last 1 unfrozen (random weights)"
    done = run("probe", str(folder), "--horizon", "5", "--device", "cpu", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["pvr"] == "tiny, last 1 unfrozen"
    other = run("probe", str(folder), "--weights", "random:1", "--device", "cpu", cwd=tmp_path)
    assert other.returncode == 1
    assert "another encoder here (weights." in other.stderr
    shutil.rmtree(pvr)
    gone = run("probe", str(folder), "--device", "cpu", cwd=tmp_path)
    assert gone.returncode == 1
    assert len(gone.stderr.splitlines()) == 1


def test_a_sweep_tunes_as_train_model_does(tiny: Path, rollouts: Path, tmp_path: Path) -> None:
    makes = partial(TunedEncoder, tuning_of(str(tiny), "random:0", "1"), (SIDE, SIDE), Readout())
    jobs = [
        Job(str(rollouts), tmp_path / f"seed{seed}", config(seed=seed), horizons=(5,), looking=makes)
        for seed in (0, 1)
    ]
    found = sweep(jobs, engine="inline")
    assert [outcome.state for outcome in found] == ["finished", "finished"]
    assert found[0].probe is not None
    alone = train(config(seed=1), rollouts, tmp_path / "alone", backbone=makes("cpu"))
    assert found[1].val_loss == alone.val["loss"]
    ours, theirs = ((tmp_path / name / CHECKPOINT).read_bytes() for name in ("seed1", "alone"))
    assert ours == theirs
    assert sweep(jobs, engine="inline") == found


def test_what_cannot_be_is_one_line(tiny: Path, rollouts: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match="tiny has 3 blocks; give 0 to 3 or all"):
        looking(tiny, "4")
    with pytest.raises(InvalidValueError, match="tiny has 3 blocks"):
        looking(tiny, "two")
    with pytest.raises(InvalidValueError, match="--compile is not for an encoder inside"):
        train(config(compiled=True), rollouts, tmp_path / "run", backbone=looking(tiny, "0"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(InvalidValueError, match="r2d2 chooses its keypoints"):
        TunedEncoder(tuning_of("r2d2", "random:0", "all"), (64, 64), Readout(), "cpu")
    embedded = tmp_path / "embedded"
    request = EncoderRequest(str(tiny), "random:0", device="cpu")
    embed(rollouts, [(request, embedded)], EmbedConfig(engine="inline"))
    asked = ("--pvr", str(tiny), "--weights", "random:0", "--device", "cpu")
    for arguments, says in {
        (str(embedded), *asked): "holds embeddings, but an encoder inside the model reads frames",
        (str(rollouts), "--unfreeze", "1"): "name one with --pvr",
        (str(rollouts), *asked, "--pixels", "128"): "--pixels is 128, but the model reads embeddings",
    }.items():
        done = run("train-model", *arguments, cwd=tmp_path)
        assert done.returncode == 1
        assert says in done.stderr.splitlines()[-1]
    assert not (tmp_path / "data" / "runs").exists()
