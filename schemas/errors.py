"""Errors that a user can act on: each message is one line that names the next step.

The command line prints the message and exits with 1; nothing else is caught there, so that a bug in
pvrpipe still shows its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

FEW = 6  # names that are all said, instead of the nearest


class PvrpipeError(Exception):
    """Something the user can mend; the message says what is wrong and what to do.

    It may quote names of a stranger's store: whatever is no printable character becomes a space, so that the
    message stays one line and tells a terminal nothing else.
    """

    def __str__(self) -> str:
        return "".join(c if c.isprintable() else " " for c in super().__str__())


class UnknownNameError(PvrpipeError):
    """A name that is not in a list of valid names."""

    @classmethod
    def among(cls, what: str, name: str, valid: Iterable[str], *, hint: str = "") -> UnknownNameError:
        """Name the nearest valid names, e.g. ``unknown PVR 'vc2'; nearest: vc1, vc1-l``."""
        names = list(valid)
        near = difflib.get_close_matches(name, names, n=4, cutoff=0.4) or names[:FEW]
        near += [other for other in names if other not in near] if len(names) <= FEW else []
        return cls(f"unknown {what} '{name}'; nearest: {', '.join(near)}" + (f" ({hint})" if hint else ""))


class InvalidValueError(PvrpipeError):
    """An option or an array outside what it may be."""


class StoreError(PvrpipeError):
    """A store that cannot be used as asked."""


class DiskError(StoreError):
    """The operating system refuses to write: no room, no permission, something in the way."""


class NotAStoreError(StoreError):
    """The folder holds no store, or one of another kind than is needed here."""


class UnfinishedStoreError(StoreError):
    """The store was begun and never sealed."""


class NewerFormatError(StoreError):
    """The store was written by a newer pvrpipe."""


class OutputExistsError(StoreError):
    """The output was begun with another configuration; it is left as it is."""


class StoreBusyError(StoreError):
    """Another process is writing to this store."""


class CorruptStoreError(StoreError):
    """The bytes of a store are not what its manifest promises."""


class UnreachableError(StoreError):
    """A place behind a URL that does not answer, or refuses."""


class MissingDriverError(StoreError):
    """A URL whose driver is not installed."""


class WeightsError(PvrpipeError):
    """Weights that cannot be found, or that do not fit their architecture exactly."""


class EncodingError(PvrpipeError):
    """A frame that cannot be encoded, or an embedding that cannot be stored."""


class SimulationError(PvrpipeError):
    """An environment that cannot be built, rendered or stepped."""


class MissingExtraError(PvrpipeError):
    """An optional dependency that is not installed."""


class SourceError(PvrpipeError):
    """Data to be imported that is not what its format promises."""


class ClusterError(PvrpipeError):
    """A Ray cluster that cannot be reached."""


class RunError(PvrpipeError):
    """A training run that cannot be begun, resumed or probed."""


class DivergedError(RunError):
    """Losses or predictions of a run that are not finite: a result, but not one to average."""


class NotAStudyError(PvrpipeError):
    """A study's file or folder that holds none, or one with mistakes."""


def one_line(error: BaseException) -> str:
    """The message of any exception, folded into one line; of a failed look-up, which is but a key, with its kind."""
    told = " ".join(str(error).split())
    return f"{type(error).__name__}: {told}" if isinstance(error, KeyError) else told or type(error).__name__
