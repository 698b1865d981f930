"""Training on a GPU: the numbers of the CPU, whether launched, replayed, compiled or in half precision."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pvrpipe.worldmodel import training
from pvrpipe.worldmodel.batches import chance
from pvrpipe.worldmodel.compiling import EAGER, Replayed, computing, losses_of, update_of
from pvrpipe.worldmodel.inputs import Observation
from pvrpipe.worldmodel.memory import empty_window, training_bytes
from pvrpipe.worldmodel.models import Setting, build_model
from pvrpipe.worldmodel.optimizer import Updater
from pvrpipe.worldmodel.probe import probe
from pvrpipe.worldmodel.training import train

from .settings import setting
from .test_worldmodel_compiling import ROWS, batch_of
from .toy import MODELS, QUICK, short, write_toy

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


def to_gpu(tree: Any) -> Any:
    return tree_map(lambda x: x.to(GPU) if isinstance(x, Tensor) else x, tree)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_cpu(name: str) -> None:
    model, batch = build_model(name, "1m", setting(8, 2), seed=0), batch_of(ROWS[name])
    drawn, found = model.draw(batch, chance(0)), []
    there = copy.deepcopy(model).to(GPU)
    for each, (rows, random) in ((model, (batch, drawn)), (there, to_gpu((batch, drawn)))):
        parameters = [p for p in each.parameters() if p.requires_grad]
        with computing("fp32", rows["reward"].device):
            loss, terms = each.losses(rows, random)
        found.append((terms, torch.autograd.grad(loss, parameters, allow_unused=True)))
    (expected, theirs), (terms, ours) = found
    for term, value in terms.items():
        torch.testing.assert_close(value.cpu(), expected[term], rtol=1e-4, atol=1e-5)
    for got, wanted in zip(ours, theirs, strict=True):
        if wanted is not None:
            assert (got.cpu() - wanted).norm() <= 1e-3 * wanted.norm() + 1e-6


@pytest.mark.parametrize("how", ["replayed", "compiled", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_replayed_update_learns_what_an_eager_one_does(name: str, how: str) -> None:
    trained = []
    for replayed in (False, True):
        model = build_model(name, "1m", setting(8, 2), seed=0).to(GPU)
        updater = Updater.of(name, model, learning_rate=1e-3, warmup=2)
        losses = losses_of(model, GPU, compiled=replayed and how == "compiled")
        update = update_of(model, updater, losses, GPU, "bf16" if how == "bf16" else "fp32")
        assert isinstance(update, Replayed)
        said = []
        for k in range(EAGER + 3):
            batch = to_gpu(batch_of(ROWS[name]))
            drawn = model.draw(batch, chance(1, k))
            terms = update(batch, drawn) if replayed else update.eager(batch, drawn)
            said.append({term: float(value) for term, value in terms.items()})
        trained.append((said, [p.detach().clone() for p in model.parameters()]))
    (eager, weights), (replays, ours) = trained
    loose = 1e-4 if how == "replayed" else 3e-2
    for expected, found in zip(eager, replays, strict=True):
        assert found == pytest.approx(expected, rel=loose, abs=loose / 10)
    apart = torch.cat([(a - b).flatten() for a, b in zip(ours, weights, strict=True)]).norm()
    assert apart <= loose * torch.cat([w.flatten() for w in weights]).norm()


@pytest.mark.parametrize("name", MODELS)
def test_a_run_trains_resumes_and_is_probed_there(name: str, tmp_path: Path) -> None:
    store = write_toy(tmp_path)
    config = dataclasses.replace(QUICK[name], log_every=10, save_every=20, precision="bf16")

    def stop(done: float, total: float, note: str = "") -> None:
        if done == 25:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, store, tmp_path / "run", device="cuda", progress=stop)
    result = train(config, store, tmp_path / "run", device="cuda")
    assert result.backing.startswith("resident on cuda")
    on_cpu = train(config, store, tmp_path / "cpu", device="cpu")
    assert result.val["loss"] == pytest.approx(on_cpu.val["loss"], rel=0.2, abs=0.05)
    errors = [
        probe(tmp_path / "run", store, horizons=(8,), device=device)["reward_error"]["8"]["accumulated"][
            "mean"
        ]
        for device in ("cuda", "cpu")
    ]
    assert errors[0] == pytest.approx(errors[1], rel=0.05, abs=1e-3)


def test_windows_read_ahead_train_while_an_update_is_recorded(tmp_path: Path) -> None:
    """The thread that reads ahead uses the device while the graph is recorded."""
    store = write_toy(tmp_path)
    results = [
        train(short(updates=20), store, tmp_path / backing, device="cuda", backing=backing)
        for backing in ("ram", "device")
    ]
    assert results[0].val == pytest.approx(results[1].val, rel=1e-4)


@pytest.mark.parametrize("name", ["dreamerv3", "tdmpc2"])
def test_a_model_from_frames_is_replayed_too(name: str) -> None:
    frames = Setting(Observation("pixels", (64, 64, 3)), 2, state=0, steps=500, episodic=True)
    model = build_model(name, "1m", frames, seed=0).to(GPU)
    updater = Updater.of(name, model, learning_rate=None, warmup=2)
    update = update_of(model, updater, losses_of(model, GPU, compiled=False), GPU, "bf16")
    batch = batch_of(6, 2)
    batch["observation"] = torch.randint(0, 256, (2, 6, 64, 64, 3), dtype=torch.uint8)
    batch = to_gpu(batch)
    said = [float(update(batch, model.draw(batch, chance(0, k)))["loss"]) for k in range(30)]
    assert said[-1] < said[0]


@pytest.mark.parametrize(
    ("name", "size", "windows", "rows"),
    [("dreamerv3", "12m", 32, 64), ("tdmpc2", "19m", 512, 6), ("dinowm", "19m", 256, 8)],
)
def test_the_estimate_is_what_training_takes(name: str, size: str, windows: int, rows: int) -> None:
    torch.cuda.empty_cache()
    made = setting(768, 6)
    model = build_model(name, size, made, seed=0).to(GPU)
    fixed, each = training_bytes(model, made, rows, GPU)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    updater = Updater.of(name, model, learning_rate=None, warmup=1)
    one = empty_window(made, rows, GPU)
    batch = {key: value.expand(windows, *value.shape[1:]).contiguous() for key, value in one.items()}
    update = update_of(model, updater, training.losses_of(model, GPU, compiled=False), GPU, "fp32")
    for k in range(EAGER + 2):
        update(batch, model.draw(batch, chance(0, k)))
    taken = torch.cuda.max_memory_reserved() - before
    print(f"{name} {size}: estimated {fixed + windows * each:.3g}, taken {taken:.3g} bytes")
    assert 0.5 < (fixed + windows * each) / taken < 2
