"""Places that a user gives: those to write to are refused at once where they cannot work."""

from __future__ import annotations

import re
from pathlib import Path

from pvrpipe.schemas.errors import InvalidValueError

SCHEME = re.compile(r"^([a-z][a-z0-9+.-]*):/+")  # pathlib makes one slash of two


def refuse_url(output: Path) -> None:
    """Refuse a URL where something is to be written: writers need a file system that can rename.

    Raises:
        InvalidValueError: it is one.
    """
    if SCHEME.match(str(output)):
        url = SCHEME.sub(r"\1://", str(output))
        raise InvalidValueError(f"{url} is a URL; write to a local folder, then `pvrpipe push` it there")


def there_is(path: Path) -> bool:
    """Whether something lies at a path that may be any string; nothing does at one that no file can have."""
    try:
        return path.exists()
    except OSError:  # too long a name, a folder that may not be looked into
        return False
