"""What a training will take of memory, against what it does take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pvrpipe.schemas.errors import InvalidValueError
from pvrpipe.worldmodel import memory
from pvrpipe.worldmodel.memory import check_room, training_bytes
from pvrpipe.worldmodel.models import build_model

from .settings import setting

CPU = torch.device("cpu")
PEAK = """
import resource, sys
import torch
from pvrpipe.worldmodel.batches import chance
from pvrpipe.worldmodel.memory import empty_window, training_bytes
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
print((fixed + windows * each) / (peak() - before))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "size", "windows", "rows"),
    [("dreamerv3", "12m", 32, 64), ("tdmpc2", "19m", 512, 6), ("dinowm", "19m", 256, 8)],
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
    monkeypatch.setattr(memory, "room", lambda _: int(fixed + 10.5 * each))
    check_room(model, made, 6, 10, CPU)
    with pytest.raises(
        InvalidValueError, match=r"training needs about .* GiB of cpu's memory .*give --batch 10 or"
    ):
        check_room(model, made, 6, 11, CPU)
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
