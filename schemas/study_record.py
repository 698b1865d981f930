"""``study.json``: what became of a study; the numbers themselves stay in its runs' folders."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from pvrpipe.schemas.errors import NotAStudyError
from pvrpipe.schemas.study import Part, Study

RECORD = "study.json"
STUDIES = "studies"  # folder of a workspace that theirs are in
PAGE = "index.html"  # of its report
State = Literal["waiting", "finished", "failed", "diverged", "damaged"]
#: What a page says of each state that is no result.
STATES = {
    "waiting": "not done yet",
    "failed": "failed",
    "diverged": "diverged (a loss or a prediction that is not finite)",
    "damaged": "damaged (what does not verify)",
    "repeated": "repeated (the same training as another run)",
}


class StoreRecord(Part):
    """A rollout or embedding store, or the folder of an encoder trained for the study."""

    folder: str
    kind: Literal["rollouts", "replay", "encoder", "embeddings"]
    environment: str
    variation: str
    pvr: str | None = None
    """how the report calls the representation"""
    state: State = "waiting"
    failure: str = ""
    id: str | None = None
    weights_sha256: str | None = None
    random_weights: bool = False
    vit: bool = False
    language: bool = False
    sequential: bool = False
    diverse: bool = False
    rows: int = 0
    bytes: int = 0
    seconds: float | None = None
    """that making it took, where this study made it"""
    frames_per_second: float | None = None
    memory_bytes: int | None = None
    """of the device, while it was embedded"""
    checked: str | None = None
    """digest of the sizes and times of change of its files when it was last verified"""
    command: str = ""


class JobRecord(Part):
    """A run: trained and probed."""

    run: str
    store: str
    environment: str
    variation: str
    pvr: str
    encoder: str
    """the map from an embedding to the model"""
    blocks: str
    model: str
    size: str
    seed: int
    state: State = "waiting"
    failure: str = ""
    probes: tuple[str, ...] = ()
    """tables in the run's folder: its own look's first, then one for each shift"""
    commands: tuple[str, ...] = ()


class StudyRecord(Part):
    """The file; it is replaced whole whenever something was done."""

    format: Literal["pvrpipe study"] = "pvrpipe study"
    format_version: Literal[1] = 1
    study: Study
    root: str
    state: Literal["unfinished", "finished"] = "unfinished"
    stores: tuple[StoreRecord, ...] = ()
    jobs: tuple[JobRecord, ...] = ()
    others: tuple[StoreRecord, ...] = ()
    """stores that an earlier call asked for and this one does not; what making them took is known from nowhere else"""
    command: str = ""
    versions: dict[str, str] = Field(default_factory=dict)

    @property
    def unfinished(self) -> list[StoreRecord | JobRecord]:
        """What has no result, and why is in it."""
        parts: list[StoreRecord | JobRecord] = [*self.stores, *self.jobs]
        return [part for part in parts if part.state != "finished"]


def read_record(folder: Path) -> StudyRecord:
    """The record of a study.

    Raises:
        NotAStudyError: there is none, or it cannot be read.
    """
    path = folder if folder.name == RECORD else folder / RECORD
    try:
        return StudyRecord.model_validate_json(path.read_bytes())
    except OSError:
        raise NotAStudyError(f"{folder} holds no study; make one with `pvrpipe study FILE`") from None
    except ValidationError as error:
        reason = str(error).splitlines()[0]
        raise NotAStudyError(f"{path} cannot be read ({reason}); run `pvrpipe study` again") from None
