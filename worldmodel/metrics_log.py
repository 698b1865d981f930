"""A run's losses by update: ``metrics.jsonl``, and the same curves for TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pvrpipe.schemas.errors import RunError
from pvrpipe.store.files import disk_errors, write_whole

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"


class MetricsLog:
    """Losses by update, to ``metrics.jsonl`` and to TensorBoard.

    The file holds nothing that a rerun would not repeat. ``last`` holds the newest losses of each part, ``validation``
    all of validation by update.

    Args:
        folder: of the run.
        done: updates of the checkpoint that training goes on from; what was logged after it is dropped.
        writes: whether it does; of several processes that train together, one.

    Raises:
        RunError: the file ends before that checkpoint.
    """

    def __init__(self, folder: Path, done: int, *, writes: bool = True) -> None:
        self.path, self._board = folder / METRICS, None
        logged = [(line, _entry(line)) for line in _lines(self.path)]
        kept = [(line, entry) for line, entry in logged if entry["update"] <= done]
        entries = [entry for _, entry in kept]
        if done and (not entries or entries[-1]["update"] < done):
            raise RunError(
                f"{self.path} ends before update {done}, which the checkpoint is of; put it back, or train again with "
                "--overwrite"
            )
        self.last = _last_of(entries)
        self.validation = {e["update"]: e["val"] for e in entries if "val" in e}
        if writes:
            from torch.utils.tensorboard import SummaryWriter  # a second, which reading a run does not need

            write_whole(self.path, "".join(line + "\n" for line, _ in kept).encode())
            self._board = SummaryWriter(str(folder / TENSORBOARD), purge_step=done + 1)

    def write(self, update: int, part: Literal["train", "val"], values: Mapping[str, float]) -> None:
        """Append one line, and one point to each curve."""
        self.last[part] = dict(values)
        if part == "val":
            self.validation[update] = self.last[part]
        if self._board is None:
            return
        with disk_errors(self.path), self.path.open("a") as file:
            file.write(json.dumps({"update": update, part: self.last[part]}) + "\n")
            if part == "val":  # a checkpoint comes next, which must not outlive its losses in a power cut
                file.flush()
                os.fsync(file.fileno())
        for name, value in values.items():
            self._board.add_scalar(f"{part}/{name}", value, update)

    @property
    def best(self) -> int:
        """The update after which the validation loss was least, the first of several; 0 before any."""
        return min(self.validation, key=lambda update: self.validation[update]["loss"], default=0)

    def stale(self, patience: int) -> bool:
        """Whether the best of the validation losses is ``patience`` checkpoints old or more; 0: never."""
        losses = [values["loss"] for values in self.validation.values()]
        return bool(losses) and 0 < patience <= len(losses) - 1 - losses.index(min(losses))

    @property
    def note(self) -> str:
        """The newest training loss, in words."""
        loss = self.last["train"].get("loss")
        return "" if loss is None else f"loss {loss:.4g}"

    def close(self) -> None:
        """Let TensorBoard write what it holds back."""
        if self._board is not None:
            self._board.close()


def updates_done(folder: Path) -> int:
    """How far a run has come, as far as it has logged; 0 where there is none."""
    lines = _lines(folder / METRICS)
    return _entry(lines[-1])["update"] if lines else 0


def newest(folder: Path) -> dict[str, dict[str, float]]:
    """The newest losses of each part that a run has logged."""
    return _last_of(map(_entry, _lines(folder / METRICS)))


def _last_of(entries: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    last: dict[str, dict[str, float]] = {"train": {}, "val": {}}
    for entry in entries:
        last |= {part: values for part, values in entry.items() if part != "update"}
    return last


def _entry(line: str) -> dict[str, Any]:
    """What a line of the log says.

    Raises:
        RunError: it is none.
    """
    try:
        entry = json.loads(line)
        parts = {name: dict(values) for name, values in entry.items() if name != "update"}
        if all("loss" in values for values in parts.values()):
            return {"update": int(entry["update"]), **parts}
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise RunError(
        f"{METRICS} holds a line that no training wrote ({line[:40]}); train again with --overwrite"
    )


def _lines(path: Path) -> list[str]:
    """The whole lines that are there; a killed writer may have left half of one, another may be writing."""
    text = path.read_text(errors="replace") if path.exists() else ""
    return text.split("\n")[:-1]
