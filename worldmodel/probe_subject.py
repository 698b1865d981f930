"""What a probe asks about: the model of a run, and a store whose encoder is the run's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pvrpipe.schemas.differences import differences
from pvrpipe.schemas.errors import InvalidValueError, NotAStoreError, PvrpipeError, RunError, UnknownNameError
from pvrpipe.schemas.specifications import EmbeddingSpecification
from pvrpipe.store.reading import Store
from pvrpipe.store.selecting import SPLITS
from pvrpipe.worldmodel import runs
from pvrpipe.worldmodel.batches import open_observations
from pvrpipe.worldmodel.models import suitable_threads
from pvrpipe.worldmodel.probe_episodes import Reader
from pvrpipe.worldmodel.training import load_model


@dataclass(frozen=True)
class Subject:
    """A trained model, its run's record, and a reader of what it is probed on."""

    model: Any
    record: runs.RunRecord
    reader: Reader

    @property
    def store(self) -> Store:
        """What it is probed on."""
        return self.reader.store

    @property
    def longest(self) -> int:
        """Rows of the longest episode."""
        return int(self.store.episodes["rows"].to_numpy().max())

    def episodes(self, split: str, context: int = 1) -> list[int]:
        """The episodes of a split that go on behind the context.

        Raises:
            UnknownNameError: there is no such split.
            InvalidValueError: there are no such episodes.
        """
        if split not in SPLITS:
            raise UnknownNameError.among("split", split, SPLITS)
        of_split = self.store.episodes.filter(self.store.episodes["split"] == split)
        numbers = of_split.filter(of_split["rows"] > context)["episode"].to_list()
        if not numbers:
            raise InvalidValueError(
                f"{self.store.path} has no {split} episode longer than {context} rows; give another --split or "
                "--context, or collect more with `pvrpipe collect --append`"
            )
        return [int(number) for number in numbers]


@contextlib.contextmanager
def subject_of(
    run: Path | str,
    store: Path | str | None = None,
    device: str | torch.device = "cpu",
    backbone: torch.nn.Module | None = None,
    *,
    elsewhere: bool = False,
) -> Iterator[Subject]:
    """Load a run's model and open what it is to be probed on, on as many threads as suit it.

    Args:
        run: the run's folder.
        store: of the same encoder; the run's own if None.
        device: where to compute.
        backbone: on the device, what the run was trained through, if it was.
        elsewhere: whether the store may be of another environment than the run was trained in.

    Raises:
        RunError: no run, another backbone, or a store of another encoder or environment; the message says which
            fields differ.
    """
    device = torch.device(device)
    model, record = load_model(Path(run), device, backbone)
    held_out = open_observations(store) if store is not None else _own_store(record)
    check_encoder(record, held_out)
    check_environment(record, held_out, elsewhere=elsewhere)
    with suitable_threads(model, device):
        setting, columns = record.setting, ("state", *model.columns)
        yield Subject(model, record, Reader(held_out, setting.shown, columns, device, setting.bounds))


def _own_store(record: runs.RunRecord) -> Store:
    """What a run was trained on, where it lay then."""
    try:
        return open_observations(record.store)
    except NotAStoreError:
        raise RunError(
            f"the run was trained on {record.store}, where there is no such store now; give its place, or another "
            f"store of {record.pvr}: pvrpipe probe RUN STORE"
        ) from None


def check_environment(record: runs.RunRecord, store: Store, *, elsewhere: bool) -> None:
    """Refuse other actions; and another environment, whose errors would stand where those of the run's own belong."""
    taken, there = record.setting.action, store.column("action").shape[0]
    if taken != there:
        raise RunError(
            f"the run takes {taken} actions, {store.path} has {there}; give a store of its environment"
        )
    if elsewhere:
        return
    here, own = store.manifest.rollouts.environment, record.environment
    if not own:
        with contextlib.suppress(PvrpipeError):
            own = _own_store(record).manifest.rollouts.environment
    if own and own != here:
        raise RunError(
            f"the run was trained in {own}, and {store.path} is of {here}; give a store of {own}, or --label NAME to "
            "probe it there all the same, apart from what its own store said"
        )


def check_encoder(record: runs.RunRecord, store: Store) -> None:
    """Refuse observations that are not comparable with those the run was trained on."""
    specification = store.manifest.specification
    own = specification.encoder if isinstance(specification, EmbeddingSpecification) else None
    frames = record.encoder is None or record.setting.frames is not None
    if frames != (own is None):
        learned = "frames" if frames else f"embeddings of {record.pvr}"
        raise RunError(
            f"the run was trained on {learned}, which {store.path} does not hold; give a store that does"
        )
    if record.encoder is None or own is None:
        return
    if differ := differences(record.encoder.model_dump(), own.model_dump(), "there"):
        raise RunError(
            f"the run was trained on another encoder than that of {store.path} ({differ}); "
            "give a store that was embedded as the run's own was"
        )
