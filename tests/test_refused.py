"""What the operating system refuses: permission, read-only folders, open files. One line, and nothing is lost."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import shutil
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pvrpipe.schemas.errors import PvrpipeError, StoreError
from pvrpipe.store.building import PendingStore, ShardWriter
from pvrpipe.store.files import write_whole
from pvrpipe.store.reading import Store
from pvrpipe.store.sharing import pull, push
from pvrpipe.store.verifying import verify

from .conftest import draft, random_episode, write_store
from .killing import PROCESSES
from .test_store import same_bytes, write_three

NOBODY = 65534
HEADROOM = 14  # descriptors; every number of them up to this is tried
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user, or mount")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that nobody owns and can reach; pytest's own are closed to others."""
    path = Path(tempfile.mkdtemp(prefix="pvrpipe-"))
    path.chmod(0o755)
    if os.geteuid() == 0:
        os.chown(path, NOBODY, NOBODY)
    yield path
    subprocess.run(["chmod", "-R", "u+w", path], check=True)
    shutil.rmtree(path)


def told(work: Callable[..., Any], *arguments: Any, user: int | None = None, files: int | None = None) -> str:
    """What a process of its own says: its error in one line, or ``done``.

    It has become another user, or may open only so many more files.
    """
    here, there = PROCESSES.Pipe()
    process = PROCESSES.Process(target=_tell, args=(there, work, arguments, user, files))
    process.start()
    there.close()
    said = str(here.recv())
    process.join()
    assert "\n" not in said, said
    return said


def _tell(
    pipe: Any, work: Callable[..., Any], arguments: tuple[Any, ...], user: int | None, files: int | None
) -> None:
    try:
        if user is not None:
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        if files is not None:
            _leave_descriptors(files)
        work(*arguments)
        said = "done"
    except PvrpipeError as error:
        said = f"{type(error).__name__}: {error}"
    except BaseException:
        said = "\n" + traceback.format_exc()
    pipe.send(said)


def _leave_descriptors(count: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    taken = []
    with contextlib.suppress(OSError):
        while True:
            taken.append(os.dup(0))
    for descriptor in taken[len(taken) - count :]:
        os.close(descriptor)


def read(folder: Path) -> None:
    store = Store.open(folder)
    for episode in range(len(store.episodes)):
        store.read_episode(episode)


def check(folder: Path) -> None:
    if failures := verify(folder):
        raise StoreError(f"{failures[0].where} {failures[0].what}")


def push_to(store: Path, place: Path) -> None:
    push(store, str(place), workers=2)


def pull_to(store: Path, place: Path) -> None:
    pull(str(store), place, workers=2)


def lose_permission(folder: Path, shard_format: Any) -> None:
    """The second shard's folder may no longer be written when it is to be committed."""
    episodes = [random_episode(i, 20) for i in range(3)]
    manifest = draft(episodes, shard_format=shard_format)
    with PendingStore.begin(folder, manifest) as pending:
        for plan in pending.todo:
            with ShardWriter(folder, manifest, plan) as writer:
                writer.write_episode(episodes[plan.first_episode])
                if plan.shard == 1:
                    (folder / "shards").chmod(0o555)
                writer.commit()


@root_only
def test_permission_that_was_never_there(folder: Path) -> None:
    store = write_store(folder / "store", (5, 6))
    closed = folder / "closed"
    closed.mkdir(mode=0o555)
    for work in (
        (write_three, closed / "new", "parquet"),
        (write_three, closed, "parquet"),
        (pull, str(store), closed / "pulled"),
        (pull, str(store), closed),
        (push, store, str(closed / "pushed")),
        (push, store, str(closed)),
    ):
        assert "permission denied; make the folder writable" in told(*work, user=NOBODY)
    assert list(closed.iterdir()) == []


@root_only
@pytest.mark.parametrize(
    "name", ["store.json", "episodes.parquet", "shards/00000.parquet", "shards/00000.json"]
)
def test_a_file_that_may_not_be_read(name: str, folder: Path) -> None:
    store = write_store(folder / "store", (5, 6))
    (store / name).chmod(0)
    works: list[Any] = [
        (check, store),
        (pull, str(store), folder / "pulled"),
        (push, store, str(folder / "pushed")),
    ]
    for work in works if name == "shards/00000.json" else [*works, (read, store)]:
        said = told(*work, user=NOBODY)
        assert Path(name).name in said
        assert "ermission denied" in said
    (store / name).chmod(0o644)
    assert [told(*work, user=NOBODY) for work in works] == ["done"] * 3
    assert same_bytes(store, folder / "pushed")
    assert same_bytes(store, folder / "pulled")


@root_only
@pytest.mark.parametrize("shard_format", ["parquet", "webdataset"])
def test_permission_lost_while_writing_costs_the_shard_in_hand(folder: Path, shard_format: Any) -> None:
    assert "permission denied; make the folder writable" in told(
        lose_permission, folder / "s", shard_format, user=NOBODY
    )
    (folder / "s" / "shards").chmod(0o755)
    committed = (folder / "s" / "shards" / "00000.json").read_bytes()
    assert told(write_three, folder / "s", shard_format, user=NOBODY) == "done"
    write_three(folder / "whole", shard_format)
    assert same_bytes(folder / "s", folder / "whole")
    assert (folder / "s" / "shards" / "00000.json").read_bytes() == committed


@root_only
def test_a_read_only_file_system_is_read_and_not_written(folder: Path) -> None:
    store, mounted = write_store(folder / "home" / "store", (5, 6)), folder / "mounted"
    other = write_store(folder / "other", (5, 6), seed=4)
    mounted.mkdir()
    if subprocess.run(
        ["mount", "--bind", store.parent, mounted], capture_output=True, check=False
    ).returncode:
        pytest.skip("nothing can be mounted in this sandbox")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", mounted], check=True)
        for work in ((check,), (read,), (push_to, folder / "pushed"), (pull_to, folder / "pulled")):
            assert told(work[0], mounted / "store", *work[1:]) == "done"
        for work in (
            (write_three, mounted / "new", "parquet"),
            (write_whole, mounted / "new", b"metrics of a run"),
            (push, store, str(mounted / "new")),
            (pull, str(other), mounted / "pulled"),
            (functools.partial(push, overwrite=True), other, str(mounted / "store")),
        ):
            assert "the file system is read-only" in told(*work)
    finally:
        subprocess.run(["umount", mounted], check=True)
    assert same_bytes(store, folder / "pulled")
    assert same_bytes(store, folder / "pushed")


@pytest.mark.parametrize("what", ["write", "read", "verify", "push", "pull"])
def test_no_descriptor_left_is_one_line_and_nothing_is_lost(what: str, folder: Path) -> None:
    """Tried with 0, 1, 2 … descriptors left, until it goes through; what was begun is then finished."""
    store, ended = write_store(folder / "store", (5, 6)), []
    write_three(folder / "whole", "parquet")
    for count in range(HEADROOM):
        out = folder / f"{what}-{count}"
        work: Any = {
            "write": (write_three, out, "parquet"),
            "read": (read, store),
            "verify": (check, store),
            "push": (push_to, store, out),
            "pull": (pull_to, store, out),
        }[what]
        ended.append(told(*work, files=count))
        assert ended[-1] == "done" or "too many files are open" in ended[-1], ended
        if what in ("write", "push", "pull"):
            assert told(*work) == "done"
            assert same_bytes(out, folder / "whole" if what == "write" else store)
        if ended[-2:] == ["done", "done"]:
            break
    assert ended[0] != "done"
    assert ended[-1] == "done", ended
