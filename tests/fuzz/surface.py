"""Everything that a stranger's store goes through, and what must hold of it whatever the bytes are.

Only a :class:`PvrpipeError` of one line may be raised; nothing is written outside the work folder; nothing of the
store is executed; memory stays bounded.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec

from pvrpipe.schemas.errors import PvrpipeError
from pvrpipe.store.converting import convert
from pvrpipe.store.describing import describe
from pvrpipe.store.golden import read_golden
from pvrpipe.store.growing import grown
from pvrpipe.store.merging import split
from pvrpipe.store.picturing import draw
from pvrpipe.store.planning import plan_shards
from pvrpipe.store.publishing import write_cards
from pvrpipe.store.reading import Store
from pvrpipe.store.sharing import pull, push
from pvrpipe.store.tables import to_arrow, to_polars
from pvrpipe.store.verifying import verify
from pvrpipe.store.windows import WindowSampler

from ..test_store_growing import grow
from .mutation import Damaged, damage
from .stores import Files, make_stores

MEMORY_LIMIT = 768 << 20  # bytes that one input may add to what the process holds
CODE = tuple(str(Path(p).resolve()) for p in {sys.prefix, sys.base_prefix, Path(__file__).parents[2]})
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
#: Audit events that change the file system: event → which of its arguments are paths.
CHANGES = {
    "os.mkdir": (0,), "os.remove": (0,), "os.rename": (0, 1), "os.rmdir": (0,), "os.link": (0, 1), "os.symlink": (0, 1),
    "os.truncate": (0,), "os.chmod": (0,), "os.chown": (0,), "os.utime": (0,), "shutil.rmtree": (0,),
}  # fmt: skip
EXECUTES = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "pickle.find_class",
    "ctypes.dlopen",
)


class BrokenPromiseError(AssertionError):
    """A store did what no store may."""


class Surface:
    """The stores to damage and a folder of their own; calls are inputs."""

    def __init__(self, work: Path) -> None:
        self.work = work
        work.mkdir(parents=True)
        self.stores = make_stores(work / "made")
        shutil.rmtree(work / "made")
        self._laid: dict[int, Files] = {}
        self._watching = False
        os.environ["PVRPIPE_CACHE"] = str(work / "cache")
        os.environ["TMPDIR"] = str(work / "tmp")
        (work / "tmp").mkdir()
        sys.addaudithook(self._watch)

    def __call__(self, data: bytes) -> str:
        """Run one input; what came of it: ``held``, or the type of the error.

        Raises:
            BrokenPromiseError: something was written outside or executed, or too much memory was taken.
            Exception: any other is a finding as well.
        """
        return self.run(damage(data, self.stores, len(ACTIONS)))

    def run(self, damaged: Damaged) -> str:
        """Do to the damaged store what the input asks for."""
        folder = self._lay(damaged)
        before = _held_memory()
        self._watching = True
        try:
            ACTIONS[damaged.action](folder, self.work / "out")
            told = "held"
        except PvrpipeError as error:
            if len(str(error).splitlines()) != 1:
                raise BrokenPromiseError(f"more than one line: {error}") from error
            told = type(error).__name__
        finally:
            self._watching = False
            self._clear()
        if (grew := _most_memory() - before) > MEMORY_LIMIT:
            raise BrokenPromiseError(f"{grew >> 20} MiB were taken")
        return told

    def _lay(self, damaged: Damaged) -> Path:
        """The store on disk, with its files damaged; only what differs from the last time is written."""
        folder, files = self.work / f"store-{damaged.store}", self.stores[damaged.store]
        wanted = {**files, **damaged.changed}
        laid = self._laid.setdefault(damaged.store, {})
        for name in files.keys() | damaged.changed.keys():
            data, path = wanted[name], folder / name
            if data is None:
                path.unlink(missing_ok=True)
                laid.pop(name, None)
            elif laid.get(name) is not data:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)  # it may still be mapped
                path.write_bytes(data)
                laid[name] = data
        return folder

    def _clear(self) -> None:
        for name in ("out", "cache"):
            shutil.rmtree(self.work / name, ignore_errors=True)
        fsspec.filesystem("memory").store.clear()
        for number, files in enumerate(self.stores):  # what an action wrote into the store itself
            folder = self.work / f"store-{number}"
            if any(str(p.relative_to(folder)) not in files for p in folder.rglob("*") if p.is_file()):
                shutil.rmtree(folder)
                self._laid.pop(number, None)

    def _watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook: raises out of whatever is about to write outside, or to execute."""
        if not self._watching:
            return
        if event in EXECUTES:
            raise BrokenPromiseError(f"{event} {arguments[:2]}")
        if event == "exec" and not _is_ours(arguments[0].co_filename):
            raise BrokenPromiseError(f"executes {arguments[0]}")
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
            self._refuse_outside(event, arguments[0])
        for at in CHANGES.get(event, ()):
            if arguments[-1] == -1 or not isinstance(arguments[-1], int):  # not below an open folder
                self._refuse_outside(event, arguments[at])

    def _refuse_outside(self, event: str, path: Any) -> None:
        if isinstance(path, int):
            return
        text = os.path.abspath(os.fsdecode(path))  # noqa: PTH100
        made_again = event == "os.mkdir" and Path(text).is_dir()
        if not text.startswith(f"{self.work}/") and text != "/dev/null" and not made_again:
            raise BrokenPromiseError(f"{event} {text}")


def _is_ours(filename: str) -> bool:
    return filename.startswith(("<frozen ", *CODE)) or filename == "<__array_function__ internals>"


def _held_memory() -> int:
    """Resident bytes now; from here on the highest is counted anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS:")


def _most_memory() -> int:
    return _status("VmHWM:")


def _status(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:  # noqa: PTH123
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))


def _read(store: Store) -> None:
    """What a training run reads."""
    sampler = WindowSampler(store, store.columns, batch=3, length=3, seed=0, split=None)
    for k in range(2):
        sampler.batch(k)
    joined = WindowSampler(
        store, store.columns, batch=2, length=7, seed=0, split=None, joined=True, backing="ram"
    )
    joined.batch(0)
    for episode in store.episodes["episode"]:
        store.read_episode(episode)


def _behind_a_url(folder: Path) -> str:
    driver = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            driver.pipe_file(f"/lab/{path.relative_to(folder)}", path.read_bytes())
    return "memory://lab"


def read(folder: Path, out: Path) -> None:
    _read(Store.open(folder))


def read_a_url(folder: Path, out: Path) -> None:
    url = _behind_a_url(folder)
    _read(Store.open(url))


def verify_a_url(folder: Path, out: Path) -> None:
    verify(_behind_a_url(folder))


def tell(folder: Path, out: Path) -> None:
    store = Store.open(folder)
    describe(store)
    to_polars(store)
    to_arrow(store)


def picture(folder: Path, out: Path) -> None:
    draw(Store.open(folder), out / "p.png")


def golden(folder: Path, out: Path) -> None:
    read_golden(Store.open(folder))


def fetch(folder: Path, out: Path) -> None:
    pull(str(folder), out)
    _read(Store.open(out))


def fetch_a_url(folder: Path, out: Path) -> None:
    pull(_behind_a_url(folder), out, workers=2)


def publish(folder: Path, out: Path) -> None:
    push(folder, str(out))


def earlier(folder: Path, out: Path) -> None:
    for store in (Store.open(folder, revision=1), Store.open(_behind_a_url(folder), revision=1)):
        _read(store)


def rewrite(folder: Path, out: Path) -> None:
    convert(folder, out, "webdataset" if (folder / "shards" / "00000.parquet").exists() else "parquet")


def export(folder: Path, out: Path) -> None:
    convert(folder, out, "npy")


def cut(folder: Path, out: Path) -> None:
    split(folder, out, where="episode = 0")


def append(folder: Path, out: Path) -> None:
    """Pulled from a stranger, then grown by one's own episodes."""
    shutil.copytree(folder, out)
    made = Store.open(out).manifest
    if made.kind == "rollouts":
        grow(out, (4,))
    else:
        grown(made, made.specification, plan_shards(1, 5, behind=made.plan))


def describe_for_others(folder: Path, out: Path) -> None:
    shutil.copytree(folder, out)
    write_cards(out, url="s3://bucket/x")


ACTIONS: tuple[Callable[[Path, Path], Any], ...] = (
    lambda folder, out: verify(folder), read, read_a_url, verify_a_url, tell, picture, golden, fetch, fetch_a_url,
    publish, earlier, rewrite, export, cut, append, describe_for_others,
)  # fmt: skip


@contextlib.contextmanager
def surface(work: Path) -> Iterator[Surface]:
    """A surface whose stores have all been used once, so that nothing is imported late."""
    made = Surface(work)
    try:
        for number in range(len(made.stores)):
            for action in range(len(ACTIONS)):
                with contextlib.suppress(PvrpipeError):
                    ACTIONS[action](made._lay(Damaged(number, action, {})), work / "out")
                made._clear()
        yield made
    finally:
        shutil.rmtree(work, ignore_errors=True)
