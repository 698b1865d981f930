"""A Hub on loopback: the endpoints of huggingface.co that its own client calls for data sets, over git-like commits.

After what ``huggingface_hub`` 2.4 sends and reads (``hf_api.py``, ``_commit_api.py``, ``lfs.py``,
``hf_file_system.py``): files of some size go by Git LFS, the others within the commit. Xet is not spoken.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import yaml
from flask import Flask, Response, jsonify, request
from werkzeug.serving import make_server

SMALL = 4096  # bytes; smaller files are part of the commit

Tree = dict[str, bytes]


@dataclass
class Hub:
    """Its data sets, each a list of commits.

    ``uploads``: objects in the order in which they came; ``last_commit``: how many commits a data set may have
    before the server fails.
    """

    url: str = ""
    repos: dict[str, list[tuple[str, Tree]]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    uploads: list[str] = field(default_factory=list)
    last_commit: int = sys.maxsize
    lock: threading.Lock = field(default_factory=threading.Lock)

    def tree(self, repo: str, revision: str = "main") -> tuple[str, Tree]:
        """The commit that a revision is of, and its files.

        Raises:
            LookupError: no such data set or revision.
        """
        commits = self.repos[repo]
        if revision == "main":
            return commits[-1]
        return next(commit for commit in commits if commit[0] == revision)

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> str:
        """Apply what the client asks for; the new commit's name."""
        tree = dict(self.repos[repo][-1][1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                tree[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del tree[value["path"]]
        commits = self.repos[repo]
        name = hashlib.sha1(f"{len(commits)}{sorted(tree)}".encode()).hexdigest()
        commits.append((name, tree))
        return name


@contextmanager
def serving_hub() -> Iterator[Hub]:
    """A Hub in this process for as long as it is needed."""
    hub = Hub()
    server = make_server("127.0.0.1", 0, _application(hub), threaded=True)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield hub
    server.shutdown()
    thread.join()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    """How the Hub lists a file."""
    oid = hashlib.sha1(data).hexdigest()
    large = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    more = {} if len(data) < SMALL else {"lfs": large}
    return {"type": "file", "path": path, "size": len(data), "oid": oid, **more}


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}


def _missing(what: str) -> Response:
    return Response(what, 404, {"X-Error-Code": what, "X-Error-Message": what})


def _application(hub: Hub) -> Flask:
    app = Flask("hub")

    @app.errorhandler(LookupError)
    def no_such_repository(error: LookupError) -> Response:
        return _missing("RepoNotFound")

    @app.errorhandler(StopIteration)
    def no_such_revision(error: StopIteration) -> Response:
        return _missing("RevisionNotFound")

    @app.before_request
    def refuse_strangers() -> Response | None:
        writes = request.method != "GET" and not request.path.endswith("paths-info/main")
        if writes and not request.path.startswith("/lfs") and "Authorization" not in request.headers:
            return Response("no token", 401)
        return None

    @app.post("/api/validate-yaml")
    def validate_card() -> Response:
        head = request.get_json()["content"].split("---\n")[1]
        errors = [] if isinstance(yaml.safe_load(head), dict) else [{"message": "no metadata"}]
        return jsonify(errors=errors, warnings=[])

    @app.post("/api/repos/create")
    def create() -> Response:
        asked = request.get_json()
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = f"{hub.url}/datasets/{repo}"
        if repo in hub.repos:
            return Response(json.dumps({"url": url, "error": "exists"}), 409)
        hub.repos[repo] = [(hashlib.sha1(repo.encode()).hexdigest(), {})]
        return jsonify(url=url)

    @app.get("/api/datasets/<owner>/<name>")
    @app.get("/api/datasets/<owner>/<name>/revision/<revision>")
    def repository(owner: str, name: str, revision: str = "main") -> Response:
        repo = f"{owner}/{name}"
        commit, tree = hub.tree(repo, revision)
        return jsonify(id=repo, sha=commit, private=False, siblings=[{"rfilename": path} for path in tree])

    @app.get("/api/datasets/<owner>/<name>/tree/<revision>")
    @app.get("/api/datasets/<owner>/<name>/tree/<revision>/<path:inside>")
    def tree(owner: str, name: str, revision: str, inside: str = "") -> Response:
        _, tree = hub.tree(f"{owner}/{name}", revision)
        below = f"{inside}/" if inside else ""
        within = {path: data for path, data in tree.items() if path.startswith(below)}
        if inside and not within:
            return _missing("EntryNotFound")
        if request.args.get("recursive") == "true":
            return jsonify([_entry(path, data) for path, data in within.items()])
        files = [_entry(path, data) for path, data in within.items() if "/" not in path[len(below) :]]
        folders = {below + path[len(below) :].split("/")[0] for path in within if "/" in path[len(below) :]}
        return jsonify([*map(_folder, sorted(folders)), *files])

    @app.post("/api/datasets/<owner>/<name>/paths-info/<revision>")
    def paths(owner: str, name: str, revision: str) -> Response:
        _, tree = hub.tree(f"{owner}/{name}", revision)
        asked = request.get_json(silent=True) or request.form
        paths = (
            asked["paths"] if isinstance(asked, dict) and request.is_json else request.form.getlist("paths")
        )
        found = [_entry(path, tree[path]) for path in paths if path in tree]
        folders = [p for p in paths if p not in tree and any(f.startswith(f"{p}/") for f in tree)]
        return jsonify([*found, *map(_folder, folders)])

    @app.post("/api/datasets/<owner>/<name>/preupload/<revision>")
    def preupload(owner: str, name: str, revision: str) -> Response:
        hub.tree(f"{owner}/{name}", revision)
        files = [
            {
                "path": file["path"],
                "uploadMode": "regular" if file["size"] < SMALL else "lfs",
                "shouldIgnore": False,
            }
            for file in request.get_json()["files"]
        ]
        return jsonify(files=files)

    @app.post("/datasets/<owner>/<name>.git/info/lfs/objects/batch")
    def objects(owner: str, name: str) -> Response:
        objects = [
            {
                "oid": asked["oid"],
                "size": asked["size"],
                **(
                    {}
                    if asked["oid"] in hub.objects
                    else {"actions": {"upload": {"href": f"{hub.url}/lfs/{asked['oid']}"}}}
                ),
            }
            for asked in request.get_json()["objects"]
        ]
        return jsonify(transfer="basic", objects=objects)

    @app.put("/lfs/<oid>")
    def upload(oid: str) -> Response:
        data = request.get_data()
        if hashlib.sha256(data).hexdigest() != oid:
            return Response("other bytes", 422)
        hub.objects[oid] = data
        hub.uploads.append(oid)
        return Response(status=200)

    @app.post("/api/datasets/<owner>/<name>/commit/<revision>")
    def commit(owner: str, name: str, revision: str) -> Response:
        repo = f"{owner}/{name}"
        lines = [json.loads(line) for line in request.get_data().splitlines() if line]
        with hub.lock:
            if len(hub.repos[repo]) > hub.last_commit:
                return Response("out of order", 500)
            commit = hub.commit(repo, lines)
        return jsonify(commitOid=commit, commitUrl=f"{hub.url}/datasets/{repo}/commit/{commit}", success=True)

    @app.get("/datasets/<owner>/<name>/resolve/<revision>/<path:path>")
    def resolve(owner: str, name: str, revision: str, path: str) -> Response:
        commit, tree = hub.tree(f"{owner}/{name}", revision)
        if path not in tree:
            return _missing("EntryNotFound")
        data = tree[path]
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        answer = Response(data, 200, {"ETag": etag, "X-Repo-Commit": commit, "X-Linked-Size": str(len(data))})
        return answer.make_conditional(request, accept_ranges=True, complete_length=len(data))

    return app
