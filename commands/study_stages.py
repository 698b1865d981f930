"""A study from its first store to its last run: what is there is taken, what fails is noted and the rest goes on.

Whenever something was done ``study.json`` is replaced, so that a study that is killed says how far it had come; the
work itself resumes where its own files say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pvrpipe.commands.shared_ray import shared_ray
from pvrpipe.commands.study_checks import sealed
from pvrpipe.commands.study_plan import Encoded, Look, Plan, digest
from pvrpipe.commands.study_state import Studying
from pvrpipe.commands.terminal import note, watching
from pvrpipe.pipeline.embed import EmbedConfig, EmbedResult, embed
from pvrpipe.pipeline.pretraining import pretrain
from pvrpipe.pipeline.pvrs import SPEC_FILE
from pvrpipe.pipeline.zoo import find_pvr
from pvrpipe.rollouts.collect import Engine, collect, replay
from pvrpipe.schemas.errors import PvrpipeError, one_line
from pvrpipe.schemas.progress import counted
from pvrpipe.schemas.study_record import StudyRecord
from pvrpipe.store.reading import Store
from pvrpipe.store.verifying import verify
from pvrpipe.worldmodel.sweep import Job, Outcome, finished, sweep


@dataclass(frozen=True)
class How:
    """What runs a study; nothing in it changes a number, but the device its last bits."""

    engine: Engine
    device: str


def conduct(plan: Plan, out: Path, how: How, command: str) -> StudyRecord:
    """Make all of a study that is not there yet.

    Args:
        plan: of a study without mistakes.
        out: folder of its record.
        how: what runs it.
        command: that was typed, for the record.
    """
    studying = Studying(plan, out, command)
    _take_what_is_there(studying)
    if not studying.done:
        with shared_ray(how.engine.name, how.engine.address):
            _collect_all(studying, how)
            _embed_all(studying, how)
            _train_all(studying, how)
    return studying.save("finished" if studying.done else "unfinished")


def _take_what_is_there(studying: Studying) -> None:
    """Whatever lies under the name of its own configuration and verifies needs no engine."""
    plan = studying.plan
    for look in plan.looks:
        _take(studying, look.folder)
    for each in plan.embeddings:
        if each.pretrained is not None and (each.pretrained[0] / SPEC_FILE).is_file():
            studying.update(each.pretrained[0], state="finished", failure="", weights_sha256=_sha256(each))
        if studying.holds(each.look.folder) and _is_of(each, sealed(each.look.folder)):
            _take(studying, each.folder)
    for job, record in plan.jobs:
        if _ready(studying, job.store, job.shifts) and finished(job) is not None:
            studying.jobs[record.run] = record.model_copy(update={"state": "finished"})
    studying.save()


def _take(studying: Studying, folder: Path) -> None:
    """A sealed store as it is, checked in full if its files have changed since they were."""
    manifest = sealed(folder)
    if manifest is None:
        return None
    record, stamp = studying.of(folder), stamp_of(folder)
    failures = [] if record.checked == stamp else _failures(folder)
    if failures:
        told = "; ".join(failures[:3])
        note(f"{folder} does not verify: {told}; remove it, and the study makes it anew")
        return studying.update(folder, state="damaged", failure=told, checked=None)
    changes: dict[str, Any] = {"id": manifest.id, "rows": manifest.rows, "bytes": manifest.bytes}
    changes |= studying.took_elsewhere(folder, manifest.id)
    if manifest.embeddings is not None:
        weights = manifest.embeddings.encoder.weights
        changes |= {
            "weights_sha256": weights.tensors_sha256,
            "random_weights": weights.random_seed is not None,
        }
    return studying.update(folder, state="finished", failure="", checked=stamp, **changes)


def _failures(folder: Path) -> list[str]:
    try:
        return [f"{failure.where}: {failure.what}" for failure in verify(folder)]
    except PvrpipeError as error:
        return [one_line(error)]


def stamp_of(folder: Path) -> str:
    """Name, size and last change of each of a folder's files; while it stays, what was verified holds."""
    files = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*") if path.is_file()}
    return digest({name: [stat.st_size, stat.st_mtime_ns] for name, stat in files.items()})


def _is_of(each: Encoded, rollouts: Any) -> bool:
    """Whether embeddings, if there are any, are of these rollouts by this encoder, as far as names can say."""
    manifest = sealed(each.folder)
    if manifest is None or manifest.embeddings is None or rollouts is None:
        return False
    same = manifest.embeddings.rollouts_id == rollouts.id
    return same and (
        each.pretrained is None or manifest.embeddings.encoder.weights.file_sha256 == _sha256(each)
    )


def _sha256(each: Encoded) -> str | None:
    assert each.pretrained is not None
    folder = each.pretrained[0]
    return find_pvr(str(folder)).source.sha256 if (folder / SPEC_FILE).is_file() else None


def _collect_all(studying: Studying, how: How) -> None:
    for look in studying.plan.looks:
        if studying.of(look.folder).state != "waiting":
            continue
        if look.source is not None and not studying.holds(look.source.folder):
            studying.update(look.folder, **_for_want_of(studying, look.source.folder))
            continue
        studying.attempt(look.folder, lambda look=look: _collect(look, how))  # type: ignore[misc]
        if studying.holds(look.folder):
            _take(studying, look.folder)


def _collect(look: Look, how: How) -> dict[str, Any]:
    with watching(
        "collect", "frames", f"{look.environment}, {look.variation}, into {look.folder}"
    ) as progress:
        if look.source is None:
            result = collect(look.config, look.folder, how.engine, progress=progress)
        else:
            source = Store.open(look.source.folder, kind="rollouts")
            result = replay(source, look.folder, how.engine, variation=look.variation, progress=progress)
    return {"frames_per_second": result.frames_per_second or None, "seconds": result.seconds}


def _embed_all(studying: Studying, how: How) -> None:
    for look in studying.plan.looks:
        if studying.holds(look.folder):
            _embed_look(studying, look, how)
        else:
            _leave_out(studying, look)


def _leave_out(studying: Studying, look: Look) -> None:
    """What would be made of a look that is not there says what it lacks."""
    of_look = [each for each in studying.plan.embeddings if each.look == look]
    trained_on_it = [
        e.pretrained[0] for e in of_look if e.pretrained is not None and e.pretrained[2] == look.folder
    ]
    for folder in (*trained_on_it, *(each.folder for each in of_look)):
        if studying.of(folder).state == "waiting":
            studying.update(folder, **_for_want_of(studying, look.folder))


def _embed_look(studying: Studying, look: Look, how: How) -> None:
    of_look = [each for each in studying.plan.embeddings if each.look == look]
    todo = [each for each in of_look if studying.of(each.folder).state == "waiting"]
    todo = [each for each in todo if each.pretrained is None or _pretrained(studying, each, how)]
    made = _embedded_together(studying, look, todo, how)
    for each in todo:
        if each.folder not in made:
            studying.attempt(each.folder, lambda each=each: _cost(_embed(look, [each], how)[0]))  # type: ignore[misc]
        if studying.holds(each.folder):
            _take(studying, each.folder)


def _pretrained(studying: Studying, each: Encoded, how: How) -> bool:
    """Train the encoder of a representation if it is not there."""
    assert each.pretrained is not None
    folder, config, rollouts = each.pretrained

    def make() -> dict[str, Any]:
        with watching("pretrain", "updates", f"training an autoencoder into {folder}") as progress:
            result = pretrain(
                rollouts.absolute(), folder.absolute(), config, device=how.device, progress=progress
            )
        return {"seconds": result.seconds, "weights_sha256": _sha256(each)}

    if not studying.holds(folder):
        studying.attempt(folder, make)
    if not studying.holds(folder):
        studying.update(each.folder, **_for_want_of(studying, folder))
    return studying.holds(folder)


def _embedded_together(studying: Studying, look: Look, todo: Sequence[Encoded], how: How) -> set[Path]:
    """Decode every frame once for all encoders; if that fails, nothing is made and each is tried alone."""
    if len(todo) < 2:
        return set()
    try:
        results = _embed(look, todo, how)
    except PvrpipeError as error:
        note(f"{look.folder}: {one_line(error)}; each representation is now embedded alone")
        return set()
    for result in results:
        studying.update(result.store, state="finished", failure="", **_cost(result))
    return {each.folder for each in todo}


def _embed(look: Look, todo: Sequence[Encoded], how: How) -> list[EmbedResult]:
    config = EmbedConfig(
        dtype=todo[0].dtype,
        engine=how.engine.name,
        address=how.engine.address,
        workers=how.engine.workers,
    )
    outputs = [
        (replace(each.request, device=how.device), each.folder) for each in todo if each.request is not None
    ]
    with watching(
        "embed", "frames", f"embedding {look.folder} with {counted(len(outputs), 'encoder')}"
    ) as progress:
        return embed(str(look.folder), outputs, config, progress)


def _cost(result: EmbedResult) -> dict[str, Any]:
    """Seconds that this encoder computed on one worker, and its memory; reading and writing are shared."""
    rate = result.rows / result.model_seconds if result.model_seconds else None
    return {
        "seconds": result.model_seconds or None,
        "frames_per_second": rate,
        "memory_bytes": result.memory_bytes,
    }


def _ready(studying: Studying, store: str, shifts: Sequence[tuple[str, str]]) -> bool:
    return all(studying.holds(Path(folder)) for folder in (store, *(s for _, s in shifts)))


def _for_want_of(studying: Studying, folder: Path | str) -> dict[str, str]:
    """State and reason of what cannot be made, since this is damaged or could not be made itself."""
    lacking = studying.of(folder)
    state = "damaged" if lacking.state == "damaged" else "failed"
    return {"state": state, "failure": f"it needs {lacking.folder} ({lacking.state}: {lacking.failure})"}


def _train_all(studying: Studying, how: How) -> None:
    """Train and probe what has its stores; what lacks one says which."""
    todo = []
    for job, record in studying.plan.jobs:
        if studying.jobs[record.run].state == "finished":
            continue
        lacking = [f for f in (job.store, *(s for _, s in job.shifts)) if not studying.holds(Path(f))]
        if lacking:
            studying.jobs[record.run] = record.model_copy(update=_for_want_of(studying, lacking[0]))
        else:
            todo.append((job, record))
    studying.save()
    if not todo:
        return
    records = {job.run: record for job, record in todo}

    def noted(job: Job, outcome: Outcome) -> None:
        record = records[job.run]
        if outcome.state != "finished":
            note(f"{record.run}: {outcome.failure}")
        became = {"state": outcome.state, "failure": outcome.failure}
        studying.jobs[record.run] = record.model_copy(update=became)
        studying.save()

    with watching(
        "models", "updates", f"{counted(len(todo), 'run')} in {studying.plan.root / 'runs'}"
    ) as progress:
        sweep(
            [job for job, _ in todo],
            engine=how.engine.name,
            address=how.engine.address,
            workers=how.engine.workers,
            progress=progress,
            told=noted,
        )
