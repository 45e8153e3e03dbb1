# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""A Hugging Face Hub on 127.0.0.1, so that tests push and load models with the real client and no internet.

Model repositories kept in memory. `huggingface_hub` reads its endpoint when it is imported, so the
client runs in a subprocess (`run_python`) under `HubServer.environment`.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit


LFS_THRESHOLD = 10 * 2**20
DROPPED_VARIABLES = ("HF_", "HUGGING", "TRANSFORMERS_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")

REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
REVISION = r"(?P<revision>[^/]+)"
ROUTES = (
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("POST", "/api/repos/create", "create"),
    ("POST", f"/api/models/{REPO}/preupload/{REVISION}", "preupload"),
    ("POST", f"/{REPO}\\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    ("POST", f"/api/models/{REPO}/commit/{REVISION}", "commit"),
    ("POST", f"/api/models/{REPO}/branch/{REVISION}", "branch"),
    ("POST", f"/api/models/{REPO}/paths-info/{REVISION}", "paths_info"),
    ("GET", f"/api/models/{REPO}/tree/{REVISION}(?:/(?P<path>.+))?", "tree"),
    ("GET", f"/api/models/{REPO}(?:/revision/{REVISION})?", "info"),
    ("GET", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
)

Files = dict[str, bytes]


class Reply(NamedTuple):
    """What goes back to the client."""

    body: bytes
    headers: dict[str, str]
    status: int = 200


class HubError(Exception):
    """An HTTP error; the client picks its exception class by `X-Error-Code`."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None, **fields: str):
        super().__init__(message)
        headers = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}
        self.reply = Reply(json.dumps({"error": message, **fields}).encode(), headers, status)


class HubServer:
    """A Hub in this process: `with HubServer() as server`, then `run_python(code, server.environment(tmp_path))`."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self._commits: dict[str, dict[str, Files]] = {}
        self._heads: dict[tuple[str, str], str] = {}
        self._lfs: Files = {}
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._http.hub = self  # type: ignore[attr-defined]
        self.endpoint = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def repos(self) -> dict[str, Files]:
        """The files on `main` of every repository."""
        return {repo: self.branch(repo, "main") for repo in self._commits}

    def branch(self, repo: str, name: str) -> Files:
        """The files on a branch of a repository."""
        return self._commits[repo][self._heads[repo, name]]

    def history(self, repo: str) -> list[str]:
        """The hashes of a repository's commits, oldest first; the first one is the creation."""
        return list(self._commits[repo])

    def put(self, repo: str, files: Files, branch: str = "main") -> str:
        """Make `files` the content of a branch without a client, and return the hash of that commit."""
        commits = self._commits.setdefault(repo, {})
        sha = hashlib.sha1(f"{repo}:{len(commits)}".encode()).hexdigest()
        commits[sha] = dict(files)
        self._heads[repo, branch] = sha
        return sha

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of a client of this server that keeps its cache under `home`."""
        kept = {key: value for key, value in os.environ.items() if not key.upper().startswith(DROPPED_VARIABLES)}
        return kept | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": "x",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "DISABLE_SAFETENSORS_CONVERSION": "true",  # else transformers asks huggingface.co to convert a .bin
        }

    def answer(self, method: str, target: str, body: bytes) -> Reply:
        """Find the route of a request and run it."""
        url = urlsplit(target)
        self.requests.append((method, url.path))
        for verb, pattern, name in ROUTES:
            match = re.fullmatch(pattern, url.path)
            if match and verb == method.replace("HEAD", "GET"):
                groups = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                with self._lock:
                    result = getattr(self, f"_{name}")(body, **groups)
                return result if isinstance(result, Reply) else Reply(json.dumps(result).encode(), {})
        raise HubError(404, "NoRoute", f"tests/hub_server.py does not know {method} {url.path}")

    def _at(self, repo: str, revision: str) -> tuple[str, Files]:
        """The commit and the files that a revision (a branch or a commit hash) stands for."""
        if repo not in self._commits:
            raise HubError(404, "RepoNotFound", "Repository not found")
        sha = self._heads.get((repo, revision), revision)
        if sha not in self._commits[repo]:
            raise HubError(404, "RevisionNotFound", "Invalid rev id")
        return sha, self._commits[repo][sha]

    def _whoami(self, body: bytes) -> dict[str, Any]:
        return {"type": "user", "name": "tester", "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def _validate_yaml(self, body: bytes) -> dict[str, Any]:
        return {"errors": [], "warnings": []}

    def _create(self, body: bytes) -> dict[str, str]:
        fields = json.loads(body)
        repo = f"{fields.get('organization') or 'tester'}/{fields['name']}"
        url = f"{self.endpoint}/{repo}"
        if repo in self._commits:
            raise HubError(409, "", "You already created this model repo", url=url)
        self.put(repo, {})
        return {"url": url}

    def _preupload(self, body: bytes, repo: str, revision: str) -> dict[str, Any]:
        """Tell which files go through LFS, and the hash of what is there: the client leaves unchanged files out."""
        _, files = self._at(repo, revision)
        wanted = json.loads(body)["files"]
        for item in wanted:
            lfs = _is_lfs(item["size"], base64.b64decode(item.pop("sample")))
            oid = _entry("", files[item["path"]])["oid"] if item["path"] in files else None
            item |= {"uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}
        return {"files": wanted}

    def _branch(self, body: bytes, repo: str, revision: str) -> dict[str, str]:
        if (repo, revision) in self._heads:
            raise HubError(409, "", "Reference already exists")
        self._heads[repo, revision] = self._at(repo, "main")[0]
        return {}

    def _lfs_batch(self, body: bytes, repo: str) -> dict[str, Any]:
        """Give an address for each object that is not there yet."""
        self._at(repo, "main")
        objects = json.loads(body)["objects"]
        for item in objects:
            if item["oid"] not in self._lfs:
                item["actions"] = {"upload": {"href": f"{self.endpoint}/lfs/{item['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def _lfs_put(self, body: bytes, oid: str) -> dict[str, str]:
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, "", "the content does not have the announced sha256")
        self._lfs[oid] = body
        return {}

    def _commit(self, body: bytes, repo: str, revision: str) -> dict[str, Any]:
        """Apply a commit, one JSON object per line."""
        files = dict(self._at(repo, revision)[1])
        for line in body.splitlines():
            operation = json.loads(line)
            self._apply(files, operation["key"], operation["value"])
        sha = self.put(repo, files, revision)
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.endpoint}/{repo}/commit/{sha}"}

    def _apply(self, files: Files, key: str, value: dict[str, Any]) -> None:
        """One operation of a commit, in place."""
        path = value.get("path", "")
        if key == "file":
            files[path] = base64.b64decode(value["content"])
        elif key == "lfsFile" and value["oid"] in self._lfs:
            files[path] = self._lfs[value["oid"]]
        elif key in ("deletedFile", "deletedFolder"):
            doomed = [name for name in files if name == path or name.startswith(path.rstrip("/") + "/")]
            if not doomed:
                raise HubError(404, "EntryNotFound", "A file with this name doesn't exist")
            for name in doomed:
                del files[name]
        elif key != "header":
            raise HubError(400, "", f"cannot apply {key}: unknown, or its LFS object was not uploaded")

    def _info(self, body: bytes, repo: str, revision: str = "main") -> dict[str, Any]:
        sha, files = self._at(repo, revision)
        return {"id": repo, "sha": sha, "private": False, "tags": [], "siblings": [{"rfilename": f} for f in files]}

    def _tree(self, body: bytes, repo: str, revision: str, path: str = "") -> list[dict[str, Any]]:
        """All files below a folder; folders themselves are not listed, with `recursive` or without."""
        sha, files = self._at(repo, revision)
        found = [_entry(name, data) for name, data in files.items() if not path or name.startswith(f"{path}/")]
        if path and not found:
            raise HubError(404, "EntryNotFound", "Path does not exist", {"X-Repo-Commit": sha})
        return found

    def _paths_info(self, body: bytes, repo: str, revision: str) -> list[dict[str, Any]]:
        _, files = self._at(repo, revision)
        return [_entry(path, files[path]) for path in parse_qs(body.decode()).get("paths", []) if path in files]

    def _resolve(self, body: bytes, repo: str, revision: str, path: str) -> Reply:
        """The content of a file."""
        sha, files = self._at(repo, revision)
        if path not in files:
            raise HubError(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
        etag = f'"{_entry(path, files[path])["oid"]}"'
        return Reply(files[path], {"ETag": etag, "X-Repo-Commit": sha, "X-Linked-Size": str(len(files[path]))})


class _Handler(BaseHTTPRequestHandler):
    """HTTP around `HubServer.answer`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            reply = self.server.hub.answer(self.command, self.path, body)  # type: ignore[attr-defined]
            reply = _cut(reply, self.headers.get("Range", ""))
        except HubError as error:
            reply = error.reply
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_: object) -> None:
        """Keep the tests' output quiet."""


def _cut(reply: Reply, wanted: str) -> Reply:
    """The byte range that the client asked for, if any."""
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
    if not match:
        return reply
    size, start = len(reply.body), int(match[1])
    if start >= size:
        raise HubError(416, "", f"only {size} bytes")
    part = reply.body[start : int(match[2] or size) + 1]
    return Reply(part, reply.headers | {"Content-Range": f"bytes {start}-{start + len(part) - 1}/{size}"}, 206)


def _is_lfs(size: int, sample: bytes) -> bool:
    """Large files and binary files go through LFS."""
    return size > LFS_THRESHOLD or b"\0" in sample[:512]


def _entry(path: str, data: bytes) -> dict[str, Any]:
    """What the tree tells about a file. Its `oid` is the sha256 in LFS, else git's blob hash, as the client counts."""
    entry = {"type": "file", "path": path, "size": len(data)}
    if _is_lfs(len(data), data):
        oid = hashlib.sha256(data).hexdigest()
        return entry | {"oid": oid, "lfs": {"oid": oid, "size": len(data), "pointerSize": 134}}
    return entry | {"oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}


def run_python(code: str, env: dict[str, str], *, check: bool = True) -> "subprocess.CompletedProcess[str]":
    """Run Python source in a new interpreter; with `check`, a failure raises with what it printed."""
    done = subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True, timeout=300)
    if check and done.returncode:
        raise AssertionError(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done
