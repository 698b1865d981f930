"""Runs handed from lab to lab as stores are: checked in full, published, fetched.

``run.json`` of a finished run names the sha256 of its checkpoint and of its losses; it is moved last.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from pvrpipe.schemas.errors import CorruptStoreError, OutputExistsError, RunError
from pvrpipe.schemas.progress import Progress, silent
from pvrpipe.store.destination import Destination
from pvrpipe.store.files import TEMPORARY, locked, make_folder, remove_temporaries, sha256_of, write_whole
from pvrpipe.store.hub import is_hub, push_to_hub
from pvrpipe.store.layout import MANIFEST_LIMIT, StoreFile
from pvrpipe.store.places import Place, Url, place_of
from pvrpipe.store.remote import Source, problem_of
from pvrpipe.store.verifying import Failure
from pvrpipe.worldmodel import checkpoints, runs
from pvrpipe.worldmodel.checkpoints import CHECKPOINT
from pvrpipe.worldmodel.metrics_log import METRICS, MetricsLog
from pvrpipe.worldmodel.training import config_of, model_of

PROBED = (runs.PROBE, runs.PROBE_TABLE)  # what a probe found, where there was one


@dataclass(frozen=True)
class SharedRun:
    """What was pushed or pulled."""

    run: Path
    url: str
    store_id: str
    files: int
    bytes: int


def verify_run(folder: Path) -> list[Failure]:
    """Every failure found; an empty list is a run of which each byte and number holds.

    Raises:
        RunError: there is no run at all.
    """
    record = runs.read_run(folder)
    if record.state != "finished":
        return [Failure(runs.RECORD, "is of a training that has not ended; the same command goes on with it")]
    missing = [Failure(name, "is not there") for name in record.files if not (folder / name).is_file()]
    if missing or not record.files:
        return missing or [
            Failure(runs.RECORD, "names no files; it was written before runs could be verified")
        ]
    damaged = [
        Failure(name, problem)
        for name, file in record.files.items()
        if (problem := problem_of(StoreFile(name, file.size, file.sha256), folder / name))
    ]
    return damaged or [*_of_weights(folder, record), *_of_losses(folder, record), *_of_probe(folder, record)]


def _of_weights(folder: Path, record: runs.RunRecord) -> list[Failure]:
    """What was trained, as far as it can be loaded without the backbone; of one, its tensors by themselves."""
    model = model_of(config_of(record), record.setting, torch.device("cpu"))
    try:
        checkpoints.load(folder, model, backbone=False)
    except RunError as error:
        return [Failure(CHECKPOINT, str(error))]
    learned = {**dict(model.named_parameters()), **checkpoints.tuned(folder)}
    count = sum(tensor.numel() for tensor in learned.values())
    wrong = [name for name, tensor in learned.items() if not bool(tensor.isfinite().all())]
    return [Failure(CHECKPOINT, f"{name} is not finite") for name in wrong[:1]] + (
        [Failure(CHECKPOINT, f"has {count} parameters, not {record.parameters}")]
        if count != record.parameters
        else []
    )


def _of_losses(folder: Path, record: runs.RunRecord) -> list[Failure]:
    """The losses that the log ends with, and those of validation that the kept checkpoint had."""
    result = record.result or {}
    log = MetricsLog(folder, result.get("updates", 0), writes=False)
    kept = result.get("kept")
    logged = {
        "train": log.last["train"],
        "val": log.last["val"] if kept is None else log.validation.get(kept),
    }
    return [
        Failure(METRICS, f"has other {part} losses than {runs.RECORD}")
        for part, losses in logged.items()
        if losses != result.get(part)
    ]


def _of_probe(folder: Path, record: runs.RunRecord) -> list[Failure]:
    """What a probe found, if anything did, must be of this run."""
    if not (folder / runs.PROBE).is_file():
        return []
    try:
        found: dict[str, Any] = json.loads((folder / runs.PROBE).read_bytes())
        own = {"model": record.config["model"], "size": record.config["size"], "pvr": record.pvr}
        differ = [name for name, value in own.items() if found[name] != value]
    except (ValueError, KeyError, TypeError):
        return [Failure(runs.PROBE, "is not what `pvrpipe probe` writes")]
    return [Failure(runs.PROBE, f"is of another run: its {name} differs") for name in differ]


def push_run(
    folder: Path, url: Place | str, *, overwrite: bool = False, progress: Progress = silent
) -> SharedRun:
    """Publish a run that verifies; after a stop it goes on.

    Args:
        folder: of the run.
        url: where to.
        overwrite: replace another run that is there.
        progress: told files.

    Raises:
        CorruptStoreError: the run does not verify; nothing is published.
        OutputExistsError: something else is there, or a store lies around it.
    """
    if failures := verify_run(folder):
        raise CorruptStoreError(
            f"{folder} does not verify: {failures[0].where} {failures[0].what}; nothing was published"
        )
    place = place_of(url)
    destination = Destination(place)
    destination.refuse_nesting()
    if not isinstance(place, Url):
        make_folder(place)
    probed = [name for name in PROBED if (folder / name).is_file()]
    names = [*runs.read_run(folder).files, *probed, runs.RECORD]
    there, present = destination.read(runs.RECORD), set[str]()
    strangers: list[str] = []
    if not there:  # an earlier push may have been stopped
        held = [name for name in destination.sizes(names) if TEMPORARY not in name]
        present = {name for name in held if name in names and _same(Source(place), name, folder / name)}
        strangers = sorted(set(held) - present)
    other = bool(there) and there != (folder / runs.RECORD).read_bytes()
    if strangers or (other and not overwrite):
        holds = "another run" if other else f"no run but other files ({', '.join(strangers[:3])})"
        raise OutputExistsError(f"{url} holds {holds}; choose another, or replace a run with --overwrite")
    todo, done = [name for name in names if name not in present], itertools.count(len(present) + 1)

    def sent(name: str) -> None:
        progress(next(done), len(names), name)

    if is_hub(place):
        push_to_hub(place, folder, todo, [], sent)
    else:
        for name in todo:
            destination.put(folder / name, name)
            sent(name)
    return _shared(folder, url, names)


def _same(source: Source, name: str, file: Path) -> bool:
    """Whether what lies there is this very file."""
    return source.proves(StoreFile(name, file.stat().st_size, sha256_of(file)))


def holds_run(url: Place | str) -> bool:
    """Whether there is a run."""
    try:
        return any(Source(place_of(url)).pieces(runs.RECORD, MANIFEST_LIMIT))
    except FileNotFoundError:
        return False


def pull_run(url: Place | str, folder: Path, *, progress: Progress = silent) -> SharedRun:
    """Fetch a run into an empty folder; each file takes its name once its sha256 is right. After a stop it goes on.

    Raises:
        RunError: there is none.
        CorruptStoreError: it is not what its ``run.json`` promises.
        OutputExistsError: the folder holds anything else.
    """
    source = Source(place_of(url))
    try:
        text = b"".join(source.pieces(runs.RECORD, MANIFEST_LIMIT))
        record = runs.RunRecord.model_validate_json(text)
    except FileNotFoundError:
        raise RunError(f"{url} holds no run (no {runs.RECORD}); check the address") from None
    except ValidationError:
        raise RunError(
            f"{url}: its {runs.RECORD} cannot be read; ask whoever published it to push it again"
        ) from None
    names = [*record.files, *PROBED, runs.RECORD]
    make_folder(folder)
    with locked(folder):
        remove_temporaries(folder)
        held = [p.name for p in folder.iterdir() if p.name not in names]
        if held or ((folder / runs.RECORD).is_file() and (folder / runs.RECORD).read_bytes() != text):
            raise OutputExistsError(f"{folder} holds something else; pull into an empty folder")
        for done, (name, file) in enumerate(record.files.items(), start=1):
            wanted = StoreFile(name, file.size, file.sha256)
            if not (folder / name).is_file() or problem_of(wanted, folder / name):
                source.fetch(wanted, folder / name)
            progress(done, len(record.files), name)
        lacking = [n for n in PROBED if not source.fetch(StoreFile(n, optional=True), folder / n)]
        write_whole(folder / runs.RECORD, text)
    return _shared(folder, url, [name for name in names if name not in lacking])


def _shared(folder: Path, url: Place | str, names: list[str]) -> SharedRun:
    total = sum((folder / name).stat().st_size for name in names)
    return SharedRun(folder, str(url), runs.read_run(folder).store_id, len(names), total)
