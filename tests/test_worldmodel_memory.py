"""What a training will take of memory, against what it does take."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pvrpipe.schemas.errors import InvalidValueError
from pvrpipe.worldmodel import memory
from pvrpipe.worldmodel.inputs import Observation
from pvrpipe.worldmodel.memory import PASSING, TORCH, check_room, empty_window, training_bytes
from pvrpipe.worldmodel.models import build_model
from pvrpipe.worldmodel.ranks import Ranks

from .settings import setting

CPU = torch.device("cpu")
PEAK = """
import resource, sys
import torch
from pvrpipe.worldmodel.batches import chance
from pvrpipe.worldmodel.memory import STEP, empty_window, learned_bytes, training_bytes
from pvrpipe.worldmodel.models import build_model
from pvrpipe.worldmodel.optimizer import Updater
from tests.settings import setting
name, size, windows, rows = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
made = setting(768, 6)
model = build_model(name, size, made, seed=0)
fixed, each = training_bytes(model, made, rows, torch.device("cpu"))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
before = peak()
updater = Updater.of(name, model, learning_rate=None, warmup=1)
one = empty_window(made, rows, torch.device("cpu"))
batch = {key: value.expand(windows, *value.shape[1:]).contiguous() for key, value in one.items()}
for k in range(2):
    updater.update(model.loss(batch, chance(0, k))[0])
print(max(fixed + STEP * learned_bytes(model), fixed + windows * each) / (peak() - before))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "size", "windows", "rows"),
    [
        ("dreamerv3", "12m", 32, 64),
        ("dreamerv3", "100m", 16, 8),  # weights that take more than what is kept
        ("tdmpc2", "19m", 512, 6),
        ("dinowm", "19m", 256, 8),
    ],
)
def test_the_estimate_is_what_training_takes(model: str, size: str, windows: int, rows: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PEAK, model, size, str(windows), str(rows)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert 0.7 < float(done.stdout) < 1.5


class Plain(nn.Module):
    """One linear map that learns and one that does not, and a loss that keeps two tensors of each row, one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.target = nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(8, 8))

    def loss(self, batch: Mapping[str, Tensor], _: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        # The buffer, as a matrix, is kept as weights are: it is the model's own. A matrix of ones is made anew.
        seen = torch.tanh(self.map(batch["observation"] + 0))
        return (seen @ torch.ones(8, 8) + seen @ self.mean + seen * seen).sum(), {}


def test_what_is_counted_is_what_a_model_of_one_map_keeps() -> None:
    made, rows = setting(8, 2), 5
    fixed, each = training_bytes(Plain(), made, rows, CPU)
    assert each == pytest.approx(PASSING * 2 * rows * 8 * 4)  # what the map is given, and what tanh gave
    weights = (8 * 8 + 8) * 4
    assert fixed == TORCH + 3 * weights + 8 * 8 * 4  # its gradient and the optimizer's two; the ones


@pytest.mark.parametrize("kind", ["pixels", "frames"])
def test_frames_are_bytes_and_states_have_their_width(kind: Any) -> None:
    frames = Observation(kind, (16, 16, 3))
    made = replace(setting(8, 2), state=7, frames=frames if kind == "frames" else None)
    made = made if kind == "frames" else replace(made, observation=frames)
    window = empty_window(made, 4, CPU)
    assert window["observation"].dtype == torch.uint8
    assert window["observation"].shape == (1, 4, 16, 16, 3)
    assert window["state"].shape == (1, 4, 7)
    assert window["is_first"].dtype == torch.bool


def test_a_large_model_needs_what_its_step_takes_however_small_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, made, weights = Plain(), setting(8, 2), (8 * 8 + 8) * 4
    fixed, each = training_bytes(model, made, 2, CPU)
    assert each < weights
    monkeypatch.setattr(memory, "room", lambda _: fixed + weights)
    check_room(model, made, 2, 1, CPU)
    monkeypatch.setattr(memory, "room", lambda _: fixed + weights - 1)
    with pytest.raises(InvalidValueError, match="give a smaller --size"):
        check_room(model, made, 2, 1, CPU)


def test_processes_that_train_together_share_a_machine_and_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = Plain(), setting(8, 2)
    fixed, each = training_bytes(model, made, 50, CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(memory, "ranks", lambda: Ranks(0, 2))
    monkeypatch.setattr(memory, "available_memory", lambda: 2 * int(fixed + 10.5 * each))
    check_room(model, made, 50, 10, CPU)
    with pytest.raises(InvalidValueError, match="give --batch 20 or"):
        check_room(model, made, 50, 11, CPU)


@pytest.mark.parametrize("name", ["dreamerv3", "tdmpc2", "dinowm"])
def test_it_is_counted_without_a_trace_and_refused_with_the_batch_that_fits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = setting(8, 2)
    model = build_model(name, "1m", made, seed=0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fixed, each = training_bytes(model, made, 6, CPU)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    monkeypatch.setattr(memory, "room", lambda _: int(fixed + 100.5 * each))
    check_room(model, made, 6, 100, CPU)
    with pytest.raises(
        InvalidValueError, match=r"training needs about .* GiB of cpu's memory .*give --batch 100 or"
    ):
        check_room(model, made, 6, 101, CPU)
    monkeypatch.setattr(memory, "room", lambda _: fixed // 2)
    with pytest.raises(InvalidValueError, match="give a smaller --size"):
        check_room(model, made, 6, 1, CPU)


@pytest.mark.parametrize("name", ["dreamerv3", "tdmpc2", "dinowm"])
def test_counting_leaves_nothing_of_its_graph_behind(name: str) -> None:
    """What sums a parameter's gradient lives as long as any graph that it is part of, and is found again until then."""
    made = setting(8, 2)
    model: Any = build_model(name, "1m", made, seed=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = model.loss

    def marked(*given: Any) -> Any:
        found = loss(*given)
        for p in parameters:
            sum_of(p).metadata["counted"] = True
        return found

    model.loss = marked
    training_bytes(model, made, 8, CPU)
    assert not any(sum_of(p).metadata for p in parameters)


def sum_of(parameter: torch.Tensor) -> Any:
    """The node of autograd's that adds up a parameter's gradient."""
    return parameter.expand_as(parameter).grad_fn.next_functions[0][0]
