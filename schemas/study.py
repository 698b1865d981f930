"""A study: what is compared with what, as a YAML file that a person writes and reads."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pvrpipe.schemas.errors import NotAStudyError

SCRATCH, AUTOENCODER, RANDOM = "scratch", "autoencoder", "random"
ALL = "all"  # blocks of a transformer
CONTROL = "resnet18"  # what `random` is short for, with weights random:0
#: In place of what a study must have, where that is wrong, so that the rest can be read.
STAND_IN = {
    "name": "study",
    "environments": ["dmc:pendulum-swingup"],
    "pvrs": [SCRATCH],
    "models": [{"model": "dreamerv3"}],
}
DEPTH = 6  # of a study's fields; nothing that is wrong takes more steps to take out
Name = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Part(BaseModel):
    """Nothing is silently ignored, and nothing changes once it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Collecting(Part):
    """How the rollouts of every environment are made, as by ``pvrpipe collect``."""

    size: Positive = 256
    episodes: Positive = 200
    max_steps: Positive | None = None
    policy: Name | None = None
    """None: the best mixture that is known for each environment, as `pvrpipe collect` takes it"""
    seed: Seed = 0


class Representation(Part):
    """One representation, in as many readouts as it has ``blocks``."""

    pvr: Name
    """``scratch``, ``autoencoder``, ``random``, a name that ``pvrpipe pvrs`` lists, or a path"""
    weights: Name = "auto"
    pool: Name | None = None
    layer: Name | None = None
    blocks: tuple[Name, ...] = (ALL,)
    """the transformer blocks that are kept, each an encoder of its own: ``all``, ``0-11``"""

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        """A name alone is that representation as its authors read it out."""
        return {"pvr": value} if isinstance(value, str) else value


class Pretraining(Part):
    """Of the autoencoder, on the frames of each environment."""

    updates: Positive = 1000
    size: Positive = 64


class Embedding(Part):
    """How embeddings are computed and kept."""

    dtype: Literal["float16", "float32"] = "float16"
    precision: Literal["fp32", "bf16"] = "fp32"


class Windows(Part):
    """Windows in a batch, and their rows; None: the paper's."""

    batch: Positive | None = None
    length: Annotated[int, Field(ge=2)] | None = None


class Trained(Windows):
    """One world model in some sizes, trained as by ``pvrpipe train-model``."""

    model: Name
    sizes: Annotated[tuple[Name, ...], Field(min_length=1)] = ("1m",)
    updates: Positive = 1000
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    warmup: Annotated[int, Field(ge=0)] = 1000
    precision: Literal["fp32", "bf16"] = "fp32"
    symlog: bool = True
    save_every: Positive = 500
    scratch: Windows | None = None
    """other batches for learning from frames, whose convolutions cost ten times a linear map"""


class Probing(Part):
    """What ``pvrpipe probe`` is asked of every run."""

    horizons: Annotated[tuple[Annotated[Positive, Field(lt=2**31)], ...], Field(min_length=1)] = (33, 500)
    context: Positive = 1
    splits: Annotated[tuple[Literal["val", "train"], ...], Field(min_length=1)] = ("val",)


class Study(Part):
    """Environments × variations × representations × encoder maps × models × sizes × seeds.

    Every run is probed on held-out episodes of the look it was trained on and, for each of ``shifts``, on the same
    trajectories seen anew in that look.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
    title: str = ""
    environments: Annotated[tuple[Name, ...], Field(min_length=1)]
    variations: Annotated[tuple[Name, ...], Field(min_length=1)] = ("none",)
    shifts: tuple[Name, ...] = ()
    collect: Collecting = Collecting()
    pvrs: Annotated[tuple[Representation, ...], Field(min_length=1)]
    pretrain: Pretraining = Pretraining()
    embed: Embedding = Embedding()
    encoders: Annotated[tuple[Literal["auto", "linear", "mlp"], ...], Field(min_length=1)] = ("auto",)
    """maps from an embedding to the model, where a model has a choice"""
    models: Annotated[tuple[Trained, ...], Field(min_length=1)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    probe: Probing = Probing()
    maps: bool = True
    """also lay out the latents of the first seed of everything, and film strips"""

    def repeated(self) -> list[str]:
        """What is named twice, a line each; it would be done once and counted twice."""
        lists: dict[str, list[Any]] = {
            "environments": list(self.environments),
            "variations": [*self.variations, *self.shifts],
            "pvrs": [(p.pvr, p.weights, p.pool, p.layer, b) for p in self.pvrs for b in p.blocks],
            "models": [(m.model, size) for m in self.models for size in m.sizes],
            "encoders": list(self.encoders),
            "seeds": list(self.seeds),
            "probe.horizons": list(self.probe.horizons),
            "probe.splits": list(self.probe.splits),
        }
        named = [
            f"{name}: {_told(value)} is named {count} times; name it once"
            for name, values in lists.items()
            for value, count in Counter(values).items()
            if count > 1
        ]
        if len({"auto", *self.encoders}) == len(self.encoders) > 1:
            named.append("encoders: auto is one of the others, whichever a model has first; leave it out")
        return named


def read_content(path: Path) -> dict[str, Any]:
    """What a study's file says, right or wrong.

    Raises:
        NotAStudyError: there is no such file, or it is not YAML.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise NotAStudyError(f"{path} cannot be read ({error}); give the YAML file of a study") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise NotAStudyError(
            f"{path} is not YAML ({error}); studies/quick.yaml shows how a study is written"
        ) from None
    if not isinstance(content, dict):
        raise NotAStudyError(
            f"{path} holds no study but a {type(content).__name__}; studies/quick.yaml shows how one is written"
        )
    return content


def study_of(content: dict[str, Any]) -> tuple[Study | None, list[str]]:
    """A study and every mistake in its form, a line each; with mistakes, what is right in it, if anything is."""
    try:
        study = Study.model_validate(content)
    except ValidationError as error:
        rest, mistakes = _right_in(content), [_mistake(each) for each in _own(error)]
        return rest, mistakes + (rest.repeated() if rest else [])
    return study, study.repeated()


def _own(error: ValidationError) -> list[dict[str, Any]]:
    """Errors without those that follow from others: a list is not too short where what stands in it is wrong."""
    found = error.errors()
    inside = {other["loc"][:depth] for other in found for depth in range(len(other["loc"]))}
    return [dict(each) for each in found if each["type"] != "too_short" or each["loc"] not in inside]


def _right_in(content: dict[str, Any]) -> Study | None:
    """A study without its mistakes, so that the names in the rest of it can be looked at too."""
    rest = copy.deepcopy(content)
    for _ in range(DEPTH):
        try:
            return Study.model_validate({**STAND_IN, **rest})
        except ValidationError as error:
            places = sorted((each["loc"] for each in _own(error)), key=_order, reverse=True)
            for where in filter(None, places):  # the last of a list first
                _drop(rest, where)
    return None


def _order(where: Sequence[int | str]) -> list[tuple[int, str]]:
    return [(part, "") if isinstance(part, int) else (0, part) for part in where]


def _drop(content: Any, where: Sequence[int | str]) -> None:
    """Take out what lies there; of what does not, or cannot be walked into, what it would be part of."""
    holder, key = content, where[0]
    for part in where[1:]:
        inner = holder[key] if _has(holder, key) else None
        if not _has(inner, part):
            break
        holder, key = inner, part
    if _has(holder, key):
        del holder[key]


def _has(holder: Any, key: int | str) -> bool:
    if isinstance(holder, list):
        return isinstance(key, int) and key < len(holder)
    return isinstance(holder, dict) and key in holder


def _mistake(error: dict[str, Any]) -> str:
    """One line for a field: where, what, and what stood there."""
    where = re.sub(r"\.(\d+)", r"[\1]", ".".join(str(part) for part in error["loc"])) or "the study"
    if error["type"] == "missing":
        return f"{where} is missing"
    if error["type"] == "extra_forbidden":
        return f"{where}: a study has no such field"
    return f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}, not {error['input']!r}"


def _told(value: Any) -> str:
    return (
        " ".join(str(part) for part in value if part is not None) if isinstance(value, tuple) else str(value)
    )
