"""A source looked through before anything of it is written: every trajectory, all but its frames."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from pvrpipe.rollouts.import_source import Array, Source, Trajectory, all_of, as_rgb, reading
from pvrpipe.schemas.errors import SourceError

MOST_ACTIONS = 4096  # of which one is taken; each is a number of every row


@dataclass
class Survey:
    """What all trajectories of a source have in common, found without reading their frames."""

    side: int = 0  # pixels of the longer side of the first frame
    lengths: list[int] = field(default_factory=list)
    discrete: bool = False
    width: int = 0
    low: Array | None = None
    high: Array | None = None
    skipped: int = 0
    cut: int = 0
    digest: str = ""


def look_through(source: Source) -> Survey:
    """Check every trajectory, all but its frames.

    Raises:
        SourceError: naming the episode that does not hold what it must, and where.
    """
    survey, digest = Survey(), hashlib.sha256()
    for found in all_of(source):
        if len(found.reward) == 0 and len(found.action) == 0:
            survey.skipped += 1
            continue
        with reading(f"{found.name} of {source.name}"):
            _check(found, source)
        _add(survey, found, source)
        survey.cut += found.cut
        for values in (found.action, found.reward, found.state):
            digest.update(b"" if values is None else np.ascontiguousarray(values).tobytes())
    if not survey.lengths:
        raise SourceError(
            f"{source.name} has no episode with a transition of which both ends were seen; choose another source"
        )
    survey.digest = digest.hexdigest()
    return survey


def _check(found: Trajectory, source: Source) -> None:
    """One trajectory by itself: lengths and values."""
    length = len(found.action)
    if found.action.ndim != (1 if found.action.dtype.kind in "iu" and found.action.ndim == 1 else 2):
        raise SourceError(
            f"{found.name} of {source.name} has actions of {found.action.dtype} {list(found.action.shape[1:])}; "
            "they must be vectors of numbers, or integers"
        )
    if found.action.dtype.kind not in "biuf":
        raise SourceError(
            f"{found.name} of {source.name} has actions of {found.action.dtype}; they must be numbers"
        )
    lengths = {"rewards": (found.reward, length), "states": (found.state, length + 1)}
    lengths["successes"] = (found.success, length + 1)
    for what, (values, wanted) in lengths.items():
        if values is not None and len(values) != wanted:
            raise SourceError(
                f"{found.name} of {source.name} has {length} actions, but {len(values)} {what}; "
                "mend it, or leave it out"
            )
    for what, values in {"reward": found.reward, "success": found.success}.items():
        if values is not None and values.ndim != 1:
            raise SourceError(
                f"{found.name} of {source.name} has a {what} of shape {list(values.shape[1:])}; it must be one number"
            )
    for what, values in {"action": found.action, "reward": found.reward, "state": found.state}.items():
        if values is None:
            continue
        with np.errstate(over="ignore"):
            finite = np.isfinite(np.asarray(values).astype(np.float32)).reshape(len(values), -1).all(axis=1)
        if not finite.all():
            raise SourceError(
                f"{found.name} of {source.name} has a {what} that is not finite at step {int(np.argmin(finite))}; "
                "mend it, or leave the episode out"
            )


def _add(survey: Survey, found: Trajectory, source: Source) -> None:
    """One trajectory beside those before it."""
    discrete = found.action.ndim == 1
    width = 0 if discrete else found.action.shape[1]
    if not survey.lengths:
        survey.discrete, survey.width = discrete, width
        with reading(found.name):
            survey.side = max(as_rgb(found.frames(), found.name).shape[1:3])
    if discrete != survey.discrete or (not discrete and width != survey.width):
        raise SourceError(
            f"{found.name} of {source.name} has {_kind(discrete, width)}, those before it have "
            f"{_kind(survey.discrete, survey.width)}; import them apart"
        )
    if found.state is not None and found.state.shape[1] != len(source.state_names):
        raise SourceError(
            f"{found.name} of {source.name} has {found.state.shape[1]} numbers of state, not "
            f"{len(source.state_names)}; import it apart"
        )
    survey.lengths.append(len(found.action))
    low, high = found.action.min(axis=0), found.action.max(axis=0)
    survey.low = low if survey.low is None else np.minimum(low, survey.low)
    survey.high = high if survey.high is None else np.maximum(high, survey.high)


def _kind(discrete: bool, width: int) -> str:
    return "actions that are one of several" if discrete else f"actions of {width} numbers"


def bounds_of(source: Source, survey: Survey) -> tuple[Array, Array]:
    """Lowest and highest actions (A,): as the source says, or as they are."""
    assert survey.low is not None
    assert survey.high is not None
    if survey.discrete:
        count = source.actions or int(survey.high) + 1
        if int(survey.low) < 0 or int(survey.high) >= count or count > MOST_ACTIONS:
            most = min(count, MOST_ACTIONS) - 1
            raise SourceError(
                f"{source.name} has actions from {survey.low} to {survey.high}; one of several is 0 to {most}"
            )
        return np.zeros(count), np.ones(count)
    if source.bounds is not None and np.isfinite(source.bounds).all():
        return source.bounds
    return survey.low, survey.high
