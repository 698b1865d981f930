"""A real HTTP server on loopback, and what tests do to stores behind URLs."""

from __future__ import annotations

import functools
import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np

from pvrpipe.store.reading import Store
from pvrpipe.store.windows import WindowSampler

COLUMNS = ("frame", "action", "reward", "is_first")


@dataclass(frozen=True)
class Served:
    url: str
    requests: list[str]
    fails: dict[str, str]  # path → how its next request fails


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files with range requests, as nginx serves them."""

    def __init__(self, *args: object, seen: list[str], fails: dict[str, str], **kwargs: object) -> None:
        self.seen, self.fails = seen, fails
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        self.seen.append(self.path)
        how = self.fails.pop(self.path, "")
        if how == "busy":
            return self.send_error(503)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if not path.is_file() or not (asked or how):
            return super().do_GET()
        data = path.read_bytes()
        if how == "cut":
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return None
        assert asked
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        self.wfile.write(data[first : last + 1])
        return None

    def end_headers(self) -> None:
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[Served]:
    """A real HTTP server over a folder."""
    seen: list[str] = []
    fails: dict[str, str] = {}
    handler = functools.partial(Handler, directory=str(folder), seen=seen, fails=fails)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Served(f"http://127.0.0.1:{server.server_port}", seen, fails)
        server.shutdown()


def forge(driver: fsspec.AbstractFileSystem, path: str) -> None:
    data = bytearray(driver.cat_file(path))
    data[len(data) // 2] ^= 1
    driver.pipe_file(path, bytes(data))


def copy_to(source: Path, url: str) -> None:
    driver, root = fsspec.core.url_to_fs(url)
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        driver.pipe_file(f"{root}/{path.relative_to(source)}", path.read_bytes())


def drawn(store: Store) -> list[dict[str, np.ndarray]]:
    sampler = WindowSampler(store, COLUMNS, batch=6, length=8, seed=3, split="train")
    return [sampler.batch(k) for k in range(4)]
