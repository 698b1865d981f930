"""A folder to publish into, on this machine or behind a URL: what it holds, and how files get there."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pvrpipe.schemas.errors import InvalidValueError, OutputExistsError, PvrpipeError
from pvrpipe.schemas.manifest import Manifest
from pvrpipe.store.files import TEMPORARY, disk_errors, make_folder, replacing
from pvrpipe.store.hub import address_of, ask_anew, is_hub
from pvrpipe.store.layout import (
    CARD,
    MANIFEST,
    MANIFEST_LIMIT,
    REVISIONS,
    SHARDS,
    StoreFile,
    parse_commit,
    parse_manifest,
)
from pvrpipe.store.places import Place, Url, filesystem, patiently, reaching
from pvrpipe.store.remote import Source

READ_ONLY = ("http", "https")
CURE = "choose another, or replace it with --overwrite"


@dataclass(frozen=True)
class Destination:
    """Where a store is published."""

    place: Place

    def __post_init__(self) -> None:
        if str(self.place).split(":", 1)[0].lower() in READ_ONLY and isinstance(self.place, Url):
            raise InvalidValueError(
                f"{self.place}: nothing can be pushed over HTTP; push to s3://, hf:// or a folder "
                "that the web server serves"
            )
        if is_hub(self.place):
            address_of(self.place)

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Name → bytes of every file beside those of ``names``, from one listing per folder."""
        driver, root = filesystem(str(self.place))
        found: dict[str, int] = {}
        for folder in sorted({"", *(str(PurePosixPath(name).parent) for name in names)} - {"."}):
            try:
                with reaching(self.place):
                    entries = driver.ls(f"{root}/{folder}".rstrip("/"), detail=True)
            except (FileNotFoundError, NotADirectoryError):
                continue
            for entry in entries:
                name = str(PurePosixPath(folder) / PurePosixPath(entry["name"]).name)
                if entry["type"] == "file":
                    found[name] = int(entry["size"] or 0)
        return found

    def refuse_nesting(self) -> None:
        """A folder of stores is not one of them, and none lies in another.

        Raises:
            OutputExistsError: it would; the message names the other.
        """
        ask_anew(self.place)
        driver, root = filesystem(str(self.place))
        around = [p for p in PurePosixPath(root).parents if p.name and len(p.parts) >= self._outermost]
        with reaching(self.place):
            if outer := next((p for p in around if driver.isfile(f"{p}/{MANIFEST}")), None):
                raise OutputExistsError(
                    f"{self.place} lies in another store ({outer}); push to a place beside it"
                )
            try:
                entries = driver.ls(root, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return
            below = [e["name"].rstrip("/") for e in entries if e["type"] == "directory"]
            others = (path for path in below if PurePosixPath(path).name not in (SHARDS, REVISIONS))
            if within := next((path for path in others if driver.isfile(f"{path}/{MANIFEST}")), None):
                raise OutputExistsError(
                    f"{self.place} holds other stores ({PurePosixPath(within).name}, …); push to a folder of "
                    f"its own, e.g. {self.place}/NAME"
                )

    @property
    def _outermost(self) -> int:
        """Parts of the shortest path that may be a store: of the Hub a repository is, datasets/OWNER/NAME."""
        return 3 if is_hub(self.place) else 1

    def read(self, name: str) -> bytes:
        """A small file, as far as a manifest may be long; empty where there is none."""
        try:
            return b"".join(Source(self.place).pieces(name, MANIFEST_LIMIT))
        except FileNotFoundError:
            return b""

    def put(self, file: Path, name: str) -> None:
        """Upload a file, over what is there."""
        if isinstance(self.place, Path):
            _copy(file, self.place / name)
        else:
            patiently(lambda: self._put(file, name))

    def remove(self, names: Iterable[str]) -> None:
        """Remove files."""
        if isinstance(self.place, Path):
            for name in names:
                with disk_errors(self.place / name):
                    (self.place / name).unlink(missing_ok=True)
            return
        driver, root = filesystem(str(self.place))
        for name in names:
            with reaching(self.place):
                driver.rm_file(f"{root}/{name}")

    def _put(self, file: Path, name: str) -> None:
        driver, root = filesystem(str(self.place))
        try:
            with reaching(self.place):
                driver.put_file(str(file), f"{root}/{name}")
        except FileNotFoundError:
            raise InvalidValueError(
                f"{self.place} cannot be written: its bucket or folder does not exist; make it first"
            ) from None


def what_is_there(
    destination: Destination,
    folder: Path,
    manifest: Manifest,
    files: Sequence[StoreFile],
    overwrite: bool,
) -> dict[str, int]:
    """Sizes of what the destination holds, once it is clear that it may be written.

    Raises:
        OutputExistsError: it may not; it is left as it is.
    """
    held = destination.sizes(file.name for file in files)
    if not overwrite:
        _refuse_others(destination, manifest, {file.name for file in files}, held)
    elif MANIFEST in held and destination.read(MANIFEST) != (folder / MANIFEST).read_bytes():
        destination.remove([MANIFEST])  # first: nobody is to read half of one store and half of another
        del held[MANIFEST]
    return held


def _refuse_others(destination: Destination, manifest: Manifest, own: set[str], held: dict[str, int]) -> None:
    """Refuse a place that holds another store, or files of which ours would take the names.

    An earlier state of the same store, whose shards are the first of these, is no other store.

    Raises:
        OutputExistsError: it is left as it is.
    """
    if MANIFEST in held:
        other = _manifest_at(destination)
        if other is None or not other.shards or manifest.shards[: len(other.shards)] != other.shards:
            identity = f"store {other.id}" if other is not None else f"a {MANIFEST} that is none of pvrpipe's"
            raise OutputExistsError(f"{destination.place} holds {identity}; {CURE}")
        return
    held = {name: size for name, size in held.items() if TEMPORARY not in name}
    begun = any(name.startswith(f"{SHARDS}/") for name in held)
    others = sorted(n for n in held if not n.startswith(".") and (n not in own or (n == CARD and not begun)))
    if others:
        raise OutputExistsError(
            f"{destination.place} is not empty and holds no store ({', '.join(others[:3])}); {CURE}"
        )


def published(
    destination: Destination, file: StoreFile, local: Path, held: dict[str, int], overwrite: bool
) -> bool:
    """Whether a small file is there: byte for byte, or of a commit record, which has no hash, what it says.

    Raises:
        OutputExistsError: the commit record of another store is.
    """
    if file.name not in held:
        return False
    own = local.read_bytes()
    if file.entry is None:
        return held[file.name] == len(own) and destination.read(file.name) == own
    there = destination.read(file.name)
    record = parse_commit(there)
    if there == own or (record is not None and record == parse_commit(own)):  # they were indented once
        return True
    if not overwrite:
        raise OutputExistsError(f"{destination.place} holds {file.name} of another store; {CURE}")
    return False


def _manifest_at(destination: Destination) -> Manifest | None:
    try:
        return parse_manifest(destination.read(MANIFEST), f"{destination.place}/{MANIFEST}")
    except PvrpipeError:
        return None


def _copy(file: Path, target: Path) -> None:
    make_folder(target.parent)
    with replacing(target) as temporary:
        shutil.copyfile(file, temporary)
