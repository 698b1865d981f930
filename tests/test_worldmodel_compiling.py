"""Compiled updates compute what eager ones do, and the recurrence is an operator that compilers may rely on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

from pvrpipe.schemas.errors import InvalidValueError
from pvrpipe.worldmodel import rssm, scan
from pvrpipe.worldmodel.batches import chance
from pvrpipe.worldmodel.checkpoints import CHECKPOINT
from pvrpipe.worldmodel.compiling import Precision, computing, losses_of, update_of
from pvrpipe.worldmodel.inputs import Observation
from pvrpipe.worldmodel.models import Setting, build_model
from pvrpipe.worldmodel.optimizer import Updater
from pvrpipe.worldmodel.training import TrainConfig, train

from .planted import write_planted
from .settings import setting

CPU = torch.device("cpu")
ROWS = {"dreamerv3": 8, "tdmpc2": 6, "dinowm": 5}


def batch_of(rows: int, windows: int = 4, width: int = 8) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    is_first = torch.zeros(windows, rows, dtype=torch.bool)
    is_first[0, 0] = is_first[1, 3] = True
    return {
        "observation": torch.randn(windows, rows, width, generator=random),
        "action": torch.rand(windows, rows, 2, generator=random) * 2 - 1,
        "reward": torch.randn(windows, rows, generator=random),
        "is_first": is_first,
        "is_terminal": torch.zeros(windows, rows, dtype=torch.bool),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ROWS))
def test_loss_and_gradient_are_the_eager_ones(name: str) -> None:
    """To a part in ten thousand of each gradient's length: sums are in another order."""
    model, batch = build_model(name, "1m", setting(8, 2), seed=0), batch_of(ROWS[name])
    parameters = [p for p in model.parameters() if p.requires_grad]
    buffers = [buffer.clone() for buffer in model.buffers()]
    results = []
    for compiled in (False, True):
        for buffer, value in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(value)
        losses = losses_of(model, CPU, compiled=compiled)
        loss, terms = losses(batch, model.draw(batch, chance(0)))
        results.append((terms, torch.autograd.grad(loss, parameters, allow_unused=True)))
    (eager, expected), (terms, gradients) = results
    for term, value in terms.items():
        torch.testing.assert_close(value, eager[term], rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(gradients, expected, strict=True):
        if theirs is not None:
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-7


@pytest.mark.slow
def test_a_compiled_run_that_is_stopped_ends_with_the_same_bytes(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    shapes = {"embedding": (6,), "action": (2,), "reward": ()}
    episodes = [
        {name: random.uniform(-1, 1, (12, *shape)).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(10)
    ]
    store = write_planted(tmp_path / "store", episodes)
    config = TrainConfig("dinowm", updates=6, batch=4, length=5, log_every=2, save_every=2, compiled=True)
    train(config, store, tmp_path / "whole")

    def stop(done: float, total: float, note: str = "") -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, store, tmp_path / "stopped", progress=stop)
    train(config, store, tmp_path / "stopped")
    whole, stopped = ((tmp_path / name / CHECKPOINT).read_bytes() for name in ("whole", "stopped"))
    assert whole == stopped


def test_a_process_compiles_as_many_runs_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch refuses a function in its ninth shape, and a sweep trains any number of runs in one process."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **asked: compiler(f, backend="eager", **asked))
    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1):
        for width in (6, 8, 10):
            model, batch = build_model("dinowm", "1m", setting(width, 2), seed=0), batch_of(5, 2, width)
            compiled, eager = (losses_of(model, CPU, compiled=asked)(batch, ())[0] for asked in (True, False))
            torch.testing.assert_close(compiled, eager)


def test_without_a_compiler_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(InvalidValueError, match=r"--compile needs a C\+\+ compiler"):
        losses_of(build_model("dinowm", "1m", setting(8, 2), seed=0), CPU, compiled=True)


def test_the_recurrence_is_an_operator_as_torch_defines_one() -> None:
    """Schema, shapes without data, and gradients, as ``torch.library.opcheck`` has them."""
    T, B, d, H, S, C, G = 3, 2, 8, 4, 2, 3, 2
    k, random = d // G, torch.Generator().manual_seed(0)
    shapes = {
        "deter_in": (H, d), "deter_in_bias": (H,), "stoch_in": (H, S * C), "stoch_in_bias": (H,), "in_gain": (2, H),
        "core_deter": (G, k, k), "core_features": (2 * H, d), "core_gain": (d,), "gates": (G, k, 3 * k),
        "gates_bias": (G, 1, 3 * k), "post": (H, d), "post_gain": (H,), "logits": (S * C, H), "logits_bias": (S * C,),
    }  # fmt: skip
    assert list(shapes) == list(scan.ScanWeights._fields)
    made = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes.values()]
    parts = [torch.randn(T, B, width, generator=random, dtype=torch.float64) for width in (d, H)]
    keep = torch.ones(T, B, 1, dtype=torch.float64)
    keep[1, 0] = 0
    uniform = torch.rand(T, B, S, generator=random, dtype=torch.float64)
    learned = [tensor.requires_grad_() for tensor in (*parts, *made)]
    torch.library.opcheck(
        torch.ops.pvrpipe.posterior_scan.default, (*learned[:2], keep, uniform, learned[2:], False)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dreamerv3", "tdmpc2"])
def test_models_from_frames_compile_too(name: str) -> None:
    frames = Setting(Observation("pixels", (64, 64, 3)), 2, state=0, steps=500, episodic=True)
    model, batch = build_model(name, "1m", frames, seed=0), batch_of(6, 2)
    batch["observation"] = torch.randint(0, 256, (2, 6, 64, 64, 3), dtype=torch.uint8)
    losses = [
        losses_of(model, CPU, compiled=compiled)(batch, model.draw(batch, chance(0)))[0]
        for compiled in (False, True)
    ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_float32_goes_over_tf32_beside_bfloat16_alone(precision: Precision) -> None:
    """What an update asks of a GPU, whatever was asked before; that is asked again after it."""
    kinds = torch.backends.cuda.matmul, torch.backends.cudnn
    model = build_model("dinowm", "1m", setting(8, 2), seed=0)
    updater = Updater.of("dinowm", model, learning_rate=None, warmup=0)
    asked: list[bool] = []

    def losses(batch: Any, drawn: Any) -> tuple[Tensor, dict[str, Tensor]]:
        asked.extend(kind.allow_tf32 for kind in kinds)
        return model.losses(batch, drawn)

    update = update_of(model, updater, losses, CPU, precision)
    before = [kind.allow_tf32 for kind in kinds]
    try:
        for usual in (True, False):
            for kind in kinds:
                kind.allow_tf32 = usual
            update(batch_of(5), ())
            assert [kind.allow_tf32 for kind in kinds] == [usual] * 2
    finally:
        for kind, usual in zip(kinds, before, strict=True):
            kind.allow_tf32 = usual
    assert asked == [precision == "bf16"] * 4


def test_the_recurrence_stays_in_float32_beside_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    carried: list[tuple[bool, set[torch.dtype]]] = []

    def watched(*parts: Any) -> Any:
        carried.append((torch.is_autocast_enabled("cpu"), {part.dtype for part in parts[:4]}))
        return scan.posterior_scan(*parts)

    monkeypatch.setattr(rssm, "posterior_scan", watched)
    model, batch = build_model("dreamerv3", "1m", setting(8, 2), seed=0), batch_of(6)
    with computing("bf16", CPU):
        loss, _ = model.loss(batch, chance(0))
    assert carried == [(False, {torch.float32})]
    assert loss.dtype == torch.float32
