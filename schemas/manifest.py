"""``store.json``: what a store is, how it was made, and the sha256 of every file in it.

The models are pydantic: a stranger's manifest is checked field by field. Their JSON Schema lies beside this file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import FailFast, Field, ValidationError, model_validator

from pvrpipe.schemas.errors import CorruptStoreError
from pvrpipe.schemas.records import ArraySpec
from pvrpipe.schemas.specifications import (
    EmbeddingSpecification,
    Frozen,
    RolloutSpecification,
    Sha256,
    Specification,
)

FORMAT_VERSION = 1

ShardFile = Annotated[str, Field(pattern=r"^shards/[0-9]{5,9}\.(parquet|tar)$")]
Dtype = Literal["uint8", "int32", "float16", "float32", "float64", "bool"]
Axis = Annotated[int, Field(ge=1, le=1 << 24)]
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Squared = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Batch = Annotated[int | None, Field(ge=1, lt=1 << 31, exclude_if=lambda batch: batch is None)]
ValueName = Annotated[str, Field(pattern=r"^(success|factor_[a-z][a-z0-9_]{0,55})$")]
First = (
    FailFast()
)  # of a list that is wrong everywhere one error is enough: a million take hundreds of megabytes


class Column(Frozen):
    """One column of the shards.

    ``mapped`` columns are PLAIN, uncompressed, one page per row group, so that a reader can map them;
    ``packed`` columns are zstd pages. A column of shape () is an ordinary Parquet FLOAT, DOUBLE, INT32
    or BOOLEAN column; any other is FIXED_LEN_BYTE_ARRAY.
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
    dtype: Dtype
    shape: Annotated[tuple[Axis, ...], Field(max_length=4)]
    layout: Literal["mapped", "packed"]

    @model_validator(mode="after")
    def _is_of_a_size(self) -> Column:
        """A row of more than 2 GiB is nobody's."""
        if math.prod(self.shape) * np.dtype(self.dtype).itemsize >= 1 << 31:
            raise ValueError(f"a row of column '{self.name}' takes 2 GiB or more")
        return self

    @model_validator(mode="after")
    def _has_elements(self) -> Column:
        """What has statistics, has them of each element."""
        if not self.shape and self.name in ("action", "embedding"):
            raise ValueError(f"column '{self.name}' is no vector")
        return self

    @property
    def spec(self) -> ArraySpec:
        """The column as name, dtype and shape."""
        return ArraySpec(self.name, self.dtype, self.shape)

    @property
    def width(self) -> int:
        """Bytes of one row."""
        return self.spec.width


class ShardPlan(Frozen):
    """Which episodes go to which shard; decided before anything runs."""

    shard: Count
    first_episode: Count
    episodes: Annotated[int, Field(ge=1, lt=1 << 31)]


class Part(Frozen):
    """Episodes that joined a store after its first, by appending or merging, and how they were made."""

    first_episode: Count
    episodes: Annotated[int, Field(ge=1, lt=1 << 31)]
    specification: Specification


class Taken(Frozen):
    """Consecutive episodes that were taken over from another store."""

    store: Sha256
    first_episode: Count  # there
    episodes: Annotated[int, Field(ge=1, lt=1 << 31)]


class EarlierRevision(Frozen):
    """What the store was before episodes were appended: its first ``shards`` shards, then called ``id``."""

    id: Sha256
    shards: Count
    episodes: Count
    rows: Count


class EpisodeRecord(Frozen):
    """One episode as its shard's commit record knows it; one row of ``episodes.parquet``.

    ``values`` are columns of their own there: ``success``, and ``factor_…`` for each way in which the look of
    the environment was varied, 0 where it was not.
    """

    episode: Count
    shard: Count
    row_start: Count  # first row within the shard
    rows: Annotated[int, Field(ge=2, lt=1 << 31)]  # L + 1
    length: Annotated[int, Field(ge=1, lt=1 << 31)]  # L
    episode_return: Finite
    seed: Count
    policy: str
    variation: str
    terminated: bool
    split: Literal["train", "val"]
    distribution: Literal["id", "ood"]
    values: dict[ValueName, Finite] = Field(default_factory=dict, max_length=64)

    def row(self) -> dict[str, Any]:
        """The episode as a row of the table."""
        return {**self.model_dump(exclude={"values"}), **self.values}

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> EpisodeRecord:
        """The episode that a row of the table is about.

        Raises:
            CorruptStoreError: no episode can be so.
        """
        fields = {name: value for name, value in row.items() if name in cls.model_fields}
        values = {name: value for name, value in row.items() if is_value(name)}
        try:
            return cls.model_validate({**fields, "values": values})
        except ValidationError as error:
            wrong = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(map(str, wrong["loc"]))
            raise CorruptStoreError(
                f"the episode table says of episode {row.get('episode')} what cannot be: {where}: {wrong['msg']}; "
                "run `pvrpipe verify`, then get the store again"
            ) from None


class Failed(Frozen):
    """An episode that the environment failed in, twice; another seed took its place."""

    episode: Count
    seed: Count
    policy: str
    reason: str


class Moments(Frozen):
    """Count, mean and sum of squared deviations of the training rows, per element, in float64."""

    count: Count
    mean: tuple[Finite, ...]
    m2: tuple[Squared, ...]

    @model_validator(mode="after")
    def _is_of_one_width(self) -> Self:
        if len(self.mean) != len(self.m2):
            raise ValueError("its means and deviations are not of the same elements")
        return self


class Written(Frozen):
    """The file of a shard, as commit record and manifest both list it."""

    file: ShardFile
    rows: Count
    bytes: Count
    sha256: Sha256
    row_groups: Annotated[tuple[Count, ...], First]  # rows of each; in a tar, of each episode
    batch: Batch = None  # frames, where the device's memory forced fewer than Computation.batch

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        """Readers find a row by its group, and a row group without rows is nobody's."""
        if sum(self.row_groups) != self.rows or 0 in self.row_groups:
            raise ValueError(f"the row groups of {self.file} do not hold its {self.rows} rows")
        return self


class ShardCommit(Written):
    """``shards/NNNNN.json``: written last; the shard exists if and only if this does."""

    shard: Count
    episodes: Annotated[tuple[EpisodeRecord, ...], First]
    moments: dict[str, Moments]
    failed: tuple[Failed, ...] = ()


class ShardEntry(Written):
    """A sealed shard, as the manifest lists it."""

    episodes: Count


class ColumnStatistics(Frozen):
    """Mean and standard deviation per element of the ``train`` rows; of ``action`` without each episode's last."""

    count: Count
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Manifest(Frozen):
    """The whole of ``store.json``. ``state`` is ``writing`` until every shard is committed.

    ``parts`` are the episodes that joined later; ``specification`` made those before the first part.
    ``earlier`` are the revisions before this one, whose manifests are kept in ``revisions/``.
    ``splits`` are by the hash of the episode, or as ``recorded`` in the stores this one was made from.
    ``taken`` says, in order, where the episodes of a merged, split or converted store come from.
    """

    format: Literal["pvrpipe"] = "pvrpipe"
    format_version: Literal[1] = 1
    kind: Literal["rollouts", "embeddings"]
    shard_format: Literal["parquet", "webdataset"] = "parquet"
    revision: Annotated[int, Field(ge=1, lt=100_000)] = 1
    state: Literal["writing", "sealed"]
    id: Sha256 | None = None
    specification: Specification
    columns: Annotated[tuple[Column, ...], First]
    plan: Annotated[tuple[ShardPlan, ...], First]
    parts: Annotated[tuple[Part, ...], First] = ()
    earlier: Annotated[tuple[EarlierRevision, ...], First] = ()
    splits: Literal["hash", "recorded"] = "hash"
    taken: Annotated[tuple[Taken, ...], First] = ()
    rows: Count = 0
    episodes: Count = 0
    bytes: Count = 0
    shards: Annotated[tuple[ShardEntry, ...], First] = ()
    files: dict[str, Sha256] = Field(default_factory=dict)
    statistics: dict[str, ColumnStatistics] = Field(default_factory=dict)
    failed: tuple[Failed, ...] = ()

    @model_validator(mode="after")
    def _is_consistent(self) -> Manifest:
        """The plan deals every episode once and in order; a sealed store has the shards that were planned."""
        episode = 0
        for number, plan in enumerate(self.plan):
            if (plan.shard, plan.first_episode) != (number, episode):
                raise ValueError(f"the plan of shard {number} does not follow the one before it")
            episode += plan.episodes
        ends = [*(part.first_episode for part in self.parts[1:]), episode]
        if any(
            not p.first_episode or p.first_episode + p.episodes != end
            for p, end in zip(self.parts, ends, strict=False)
        ):
            raise ValueError("its parts do not follow each other up to its last episode")
        if self.state == "sealed":
            if self.id is None:
                raise ValueError("it is sealed and has no id")
            if [p.episodes for p in self.plan] != [entry.episodes for entry in self.shards]:
                raise ValueError("its shards are not those that were planned")
            if self.episodes_file not in self.files:
                raise ValueError(f"{self.episodes_file} is not among its files")
            for field in ("rows", "episodes"):
                if getattr(self, field) != sum(getattr(entry, field) for entry in self.shards):
                    raise ValueError(f"'{field}' is not what its shards have together")
        if len({column.name for column in self.columns}) != len(self.columns):
            raise ValueError("two columns have one name")
        return self

    @property
    def rollouts(self) -> RolloutSpecification:
        """How the rollouts were made: these, or those that were embedded."""
        made = self.specification
        return made.rollouts if isinstance(made, EmbeddingSpecification) else made

    @property
    def embeddings(self) -> EmbeddingSpecification | None:
        """How the embeddings were made, if these are any."""
        return self.specification if isinstance(self.specification, EmbeddingSpecification) else None

    @property
    def all_parts(self) -> tuple[Part, ...]:
        """Every part of the store, the first one too."""
        total = sum(plan.episodes for plan in self.plan)
        first = self.parts[0].first_episode if self.parts else total
        return (Part(first_episode=0, episodes=first, specification=self.specification), *self.parts)

    def part_of(self, episode: int) -> Part:
        """The part that an episode belongs to."""
        return next(part for part in reversed(self.all_parts) if part.first_episode <= episode)

    @property
    def episodes_file(self) -> str:
        """Name of the episode table; an earlier revision's is never changed."""
        return "episodes.parquet" if self.revision == 1 else f"episodes-{self.revision:05d}.parquet"

    def column(self, name: str) -> Column | None:
        """The column of that name, if the store has it."""
        return next((c for c in self.columns if c.name == name), None)

    def to_json(self) -> str:
        """The bytes of ``store.json``: sorted keys, so that equal manifests are equal files."""
        return canonical_json(self.model_dump(mode="json")) + "\n"


def is_value(name: str) -> bool:
    """Whether a column of the episode table is one of :attr:`EpisodeRecord.values`."""
    return name == "success" or name.startswith("factor_")


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no NaN: one value, one text."""
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False)


def store_id(
    specification: RolloutSpecification | EmbeddingSpecification,
    shard_hashes: list[str],
    parts: Iterable[Part] = (),
) -> str:
    """Id of a store: sha256 of how it was made, part by part, and of its shards' sha256, in order."""
    made: dict[str, Any] = {"specification": specification.model_dump(mode="json"), "shards": shard_hashes}
    if later := [part.model_dump(mode="json") for part in parts]:
        made["parts"] = later
    return hashlib.sha256(canonical_json(made).encode()).hexdigest()
