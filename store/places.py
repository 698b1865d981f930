"""Where a store lies: a local folder, or a URL that an fsspec driver reads."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pvrpipe.schemas.errors import (
    InvalidValueError,
    MissingDriverError,
    PvrpipeError,
    StoreError,
    UnknownNameError,
    UnreachableError,
    one_line,
)
from pvrpipe.store.files import FILES_OPEN

_LOCAL = ("file://", "local://")
#: Schemes whose driver is an extra of this package; fsspec's own message names the others.
EXTRAS = {"http": "http", "https": "http", "s3": "s3", "s3a": "s3"}


@dataclass(frozen=True)
class Url:
    """A folder behind a URL; ``str`` is the URL without its last slash."""

    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def name(self) -> str:
        """The last part, as of a path."""
        return self.text.rsplit("/", 1)[-1]

    def resolve(self) -> Url:
        """Itself: a URL is the same from every folder."""
        return self


Place = Path | Url
Result = TypeVar("Result")


def place_of(place: Path | str | Url) -> Place:
    """A local folder (also as ``file://``), or a URL."""
    if isinstance(place, Path | Url):
        return place
    for prefix in _LOCAL:
        if place.lower().startswith(prefix):
            return Path(place[len(prefix) :])
    if not is_url(place):
        return Path(place)
    return Url(re.sub(r"(?<![:/])/+$", "", place))


def refuse_source(source: Place, out: Path) -> None:
    """Nothing is written over what it is made from, nor into it.

    Raises:
        InvalidValueError: ``out`` is the store to read, or lies in it.
    """
    if isinstance(source, Path) and out.resolve().is_relative_to(source.resolve()):
        where = "is" if source.resolve() == out.resolve() else "lies in"
        raise InvalidValueError(f"{out} {where} the store to read; choose another output")


def is_url(text: str) -> bool:
    """Whether a driver is needed: ``scheme://…``, or drivers chained by ``::``."""
    return "://" in text or bool(re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*::", text))


def without_password(text: object) -> str:
    """A place, or a text in which one is named, as others may read it: of ``https://alice:secret@host`` no secret."""
    return re.sub(r"(://[^/\s:@]*):[^/\s]*@", r"\1@", str(text))


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec driver for a URL or a local path, and the path within it; listings are never cached.

    Asked for again at every use: fsspec keeps the driver, and notices when the process has forked.

    Raises:
        MissingDriverError, UnknownNameError: nothing here reads such a URL.
    """
    import fsspec  # a tenth of a second that a local store need not pay

    scheme = url.split(":", 1)[0].lower()
    try:
        with reaching(url):
            driver, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        cure = f"pip install 'pvrpipe[{extra}]'" if extra else one_line(error)
        raise MissingDriverError(f"{url} needs a driver that is not installed; {cure}") from None
    except ValueError:
        raise UnknownNameError.among(
            "kind of URL", scheme, sorted({*EXTRAS, "hf", "file", "memory"})
        ) from None
    return driver, str(root).rstrip("/")


@contextmanager
def reaching(url: object) -> Iterator[None]:
    """Turn whatever a driver raises into one line; a missing file stays ``FileNotFoundError``.

    Wrap calls of the driver only: every driver has exceptions of its own (botocore's, aiohttp's), so
    all of them are caught.

    Raises:
        UnreachableError: the place cannot be reached, or refuses.
    """
    try:
        yield
    except FileNotFoundError as error:
        cause = error.__cause__  # fsspec's HTTP driver says so of every failure
        if type(cause).__module__.startswith("aiohttp") and getattr(cause, "status", 0) not in (404, 410):
            raise UnreachableError(
                f"{url} cannot be reached ({one_line(cause or error)[:200]}); check the address"
            ) from error
        raise
    except (ImportError, PvrpipeError):
        raise
    except PermissionError as error:
        raise UnreachableError(
            f"{url}: permission denied ({one_line(error)}); give the credentials that its driver looks for"
        ) from error
    except ValueError as error:
        if "Protocol not known" in str(error):
            raise
        raise UnreachableError(f"{url} cannot be used ({one_line(error)}); check the address") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise StoreError(f"{url} cannot be reached: {FILES_OPEN}, then run it again") from error
        raise UnreachableError(
            f"{url} cannot be reached ({one_line(error)[:200]}); check the address and the credentials, "
            "then run it again"
        ) from error


def patiently(work: Callable[[], Result]) -> Result:
    """Do work that may meet a network's moods: three times at most, with a pause between.

    Raises:
        UnreachableError: the third time too.
    """
    for pause in (0.5, 2.0):
        try:
            return work()
        except UnreachableError:
            time.sleep(pause)
    return work()
