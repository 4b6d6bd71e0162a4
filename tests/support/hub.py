"""A stand-in for the Hugging Face Hub on loopback: as much of its HTTP as huggingface_hub needs, and its refusals.

GET  /api/models/REPO[/revision/REV]     the commit of a revision        POST /api/repos/create
GET  /api/models/REPO/tree/REV           its files                       POST /api/validate-yaml
GET  /REPO/resolve/REV/PATH              a file, or a part of it         POST /api/models/REPO/preupload/REV
POST /REPO.git/info/lfs/objects/batch    which blobs are missing         PUT  /blob/SHA256
POST /api/models/REPO/commit/REV         a commit
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

TOKEN = "hf_secretOfTheStandIn"
LARGE = (".safetensors", ".gguf", ".bin", ".parquet")
ROUTE = re.compile(
    r"/(?P<api>api/)?(?P<kind>models/|datasets/)?(?P<repo>[\w.-]+/[\w.-]+?)"
    r"(?:/(?P<verb>revision|tree|resolve|preupload|commit|auth-check)(?:/(?P<revision>[^/?]+)(?:/(?P<path>[^?]+))?)?)?(?:\?.*)?"
)


@dataclass
class Repo:
    """Files by commit, and the commit of each branch."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        files = self.commits.get(self.branches.get(branch, ""), {}) | files
        listed = [(name, hashlib.sha256(content).hexdigest()) for name, content in sorted(files.items())]
        commit = hashlib.sha1(repr(listed).encode()).hexdigest()
        self.commits[commit], self.branches[branch] = files, commit
        return commit


@dataclass
class Hub:
    """Repositories by kind and name. requests: method, path and range of each. cut: bytes after which the next larger
    file breaks off, once. broken: end of the paths that never come through."""

    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    cut: int | None = None
    broken: str = "nothing"

    def add(self, name: str, files: dict[str, bytes] | Path, kind: str = "models", **how: bool) -> Repo:
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        repo = self.repos[f"{kind}/{name}"] = Repo(**how)
        repo.commit(files)
        return repo

    def count(self, method: str, part: str) -> int:
        return sum(line.startswith(method) and part in line for line in self.requests)


def tree(files: dict[str, bytes], folder: str, recursive: bool) -> Iterator[dict[str, Any]]:
    """Entries of a folder; folders are entries where it is not recursive."""
    prefix, folders = f"{folder}/" if folder else "", set()
    for name, content in files.items():
        if not name.startswith(prefix):
            continue
        inner, separator, _ = name.removeprefix(prefix).partition("/")
        if recursive or not separator:
            yield {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        elif inner not in folders:
            folders.add(inner)
            yield {"type": "directory", "path": prefix + inner, "oid": "0" * 40}


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if self.command != "PUT" else b""
        said = self.headers.get("Authorization")
        if said not in (None, f"Bearer {TOKEN}"):
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if self.path.startswith("/blob/"):
            return self.blob()
        if self.path == "/api/validate-yaml":
            head = json.loads(body)["content"].split("---\n")[1]
            errors = [] if isinstance(yaml.safe_load(head), dict) else [{"message": "no mapping"}]
            return self.send({"errors": errors, "warnings": []})
        if self.path == "/api/repos/create":
            return self.create(json.loads(body), said)
        if self.path.endswith("/objects/batch"):
            return self.batch(json.loads(body))
        found = ROUTE.fullmatch(self.path)
        repo = self.hub.repos.get((found["kind"] or "models/") + found["repo"]) if found else None
        if found is None or repo is None or (repo.private and said is None):
            return self.refuse(404 if said else 401, "RepoNotFound", "Repository not found")
        revision = (found["revision"] or "main").replace("%2F", "/")
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if found["verb"] == "resolve":
            if repo.gated and said is None:
                return self.refuse(403, "GatedRepo", "Access is restricted")
            return self.file(repo.commits[commit].get(found["path"] or ""), commit)
        if found["verb"] == "auth-check":
            return self.refuse(403, "GatedRepo", "Access is restricted") if repo.gated and not said else self.send({})
        if found["verb"] in ("preupload", "commit") and said is None:
            return self.refuse(403, "", "You need the role of a contributor")
        if found["verb"] == "commit":
            return self.commit(repo, f"http://{self.headers['Host']}/{found['repo']}", revision, body)
        return self.send(self.told(found, repo, commit, body))

    def told(self, found: re.Match[str], repo: Repo, commit: str, body: bytes) -> Any:
        files = repo.commits[commit]
        if found["verb"] == "preupload":
            asked = [item["path"] for item in json.loads(body)["files"]]
            return {
                "files": [
                    {"path": p, "uploadMode": "lfs" if p.endswith(LARGE) else "regular", "shouldIgnore": False}
                    for p in asked
                ]
            }
        if found["verb"] == "tree":
            return list(tree(files, found["path"] or "", "recursive=true" in self.path))
        return {
            "id": found["repo"],
            "sha": commit,
            "private": repo.private,
            "siblings": [{"rfilename": name} for name in files],
        }

    def file(self, content: bytes | None, commit: str) -> None:
        if content is None:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        part = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "GET":
            cut = 0 if self.path.endswith(self.hub.broken) else self.taken(len(part))
            self.wfile.write(part[:cut])
            self.close_connection = cut is not None

    def taken(self, size: int) -> int | None:
        """Bytes after which a file of this size breaks off; None where it does not."""
        cut = self.hub.cut
        if cut is None or size <= cut:
            return None
        self.hub.cut = None
        return cut

    def create(self, asked: dict[str, Any], said: str | None) -> None:
        if said is None:
            return self.refuse(401, "", "Invalid username or password.")
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        if f"models/{name}" in self.hub.repos:
            return self.refuse(409, "", "You already created this model repo", {"url": f"/{name}"})
        self.hub.add(name, {".gitattributes": b""}, private=asked.get("visibility") == "private")
        self.send({"url": f"http://{self.headers['Host']}/{name}", "name": name})

    def batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for item in asked["objects"]:
            missing = item["oid"] not in self.hub.blobs
            href = f"http://{self.headers['Host']}/blob/{item['oid']}"
            objects.append(item | ({"actions": {"upload": {"href": href}}} if missing else {}))
        self.send({"transfer": "basic", "objects": objects})

    def blob(self) -> None:
        size = int(self.headers["Content-Length"])
        if (cut := self.taken(size)) is not None:
            self.rfile.read(cut)
            return self.refuse(400, "", "the connection was cut")
        content = self.rfile.read(size)
        assert hashlib.sha256(content).hexdigest() == self.path.removeprefix("/blob/")
        self.hub.blobs[hashlib.sha256(content).hexdigest()] = content
        self.send({})

    def commit(self, repo: Repo, address: str, revision: str, body: bytes) -> None:
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        commit = repo.commit(files, revision)
        self.send({"commitUrl": f"{address}/commit/{commit}", "commitOid": commit})

    def send(self, value: Any, status: int = 200, **headers: str) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status: int, code: str, message: str, value: dict[str, Any] | None = None) -> None:
        headers = {"X_Error_Message": message, "Connection": "close"} | ({"X_Error_Code": code} if code else {})
        self.send(value or {"error": message}, status, **headers)


@contextmanager
def serve_hub(cache: Path) -> Iterator[Hub]:
    """A Hub without repositories, and huggingface_hub that speaks to it, without a token, with this empty cache."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Of", (Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    settings = {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "DOWNLOAD_CHUNK_SIZE": 1 << 12,
    }
    try:
        with (
            patch.multiple("huggingface_hub.constants", **settings),
            patch.multiple("datasets.config", HF_ENDPOINT=address, HF_HUB_OFFLINE=False),
        ):
            yield hub
    finally:
        server.shutdown()
        server.server_close()
