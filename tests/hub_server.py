"""A small Hugging Face hub on this machine: the HTTP that huggingface_hub speaks, nothing mocked.

Model info, file trees, files with ETag, ranges and redirects, private and gated repositories.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 20_000
"""Files of more bytes are "LFS": answered with a redirect to another host, as the hub does."""
TOKEN = "hf_ofatest"


@dataclass
class Repo:
    """A repository: commits are folders, refs name commits."""

    commits: dict[str, Path]
    refs: dict[str, str]
    private: bool = False
    gated: bool = False

    def commit(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


@dataclass
class Hub:
    """The running server, what it has and what it was asked.

    Attributes:
        served: GET requests of files, by name.
        ranges: Range headers of such requests.
        breaks: name -> bytes after which the connection is cut; once for each entry of the list.
        status: answered to everything, if not 0.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    served: Counter[str] = field(default_factory=Counter)
    ranges: list[str] = field(default_factory=list)
    breaks: dict[str, list[int]] = field(default_factory=dict)
    status: int = 0
    port: int = 0
    _server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen; again on the same port after `stop`."""
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def add(self, name: str, folder: Path, **rights: bool) -> str:
        """A repository with one commit, its main; the commit."""
        commit = hashlib.sha1(name.encode()).hexdigest()
        self.repos[name] = Repo({commit: folder}, {"main": commit}, **rights)
        return commit


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        if self.hub.status:
            return self._fail(self.hub.status, "", "the server says so")
        path = urlsplit(self.path).path
        if path.startswith("/lfs/"):
            return self._send(Path(unquote(path.removeprefix("/lfs"))), {})
        api = path.startswith("/api/models/")
        owner, name, *rest = path.removeprefix("/api/models/" if api else "/").split("/")
        repo = self.hub.repos.get(f"{owner}/{name}")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", TOKEN):
            return self._fail(401, "", "Invalid credentials in Authorization header")
        if repo is None or (repo.private and not token):
            return self._fail(404 if token else 401, "RepoNotFound", "Repository not found")
        if not api and repo.gated and not token:
            return self._fail(401, "GatedRepo", "Access to this model is restricted")
        kind, revision, *file = rest or ["revision", "main"]
        revision, file = unquote(revision), [unquote(one) for one in file]
        if (commit := repo.commit(revision)) is None:
            return self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        folder = repo.commits[commit]
        if api:
            return self._describe(f"{owner}/{name}", kind, commit, folder, repo)
        target = folder.joinpath(*file)
        if not target.is_file():
            return self._fail(404, "EntryNotFound", "Entry not found")
        return self._resolve(target, commit)

    def _describe(self, name: str, kind: str, commit: str, folder: Path, repo: Repo) -> None:
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        names = [p.relative_to(folder).as_posix() for p in files]
        if kind == "tree":
            answer: Any = [
                {"type": "file", "path": n, "size": p.stat().st_size, "oid": _etag(p), **_lfs(p)}
                for n, p in zip(names, files, strict=True)
            ]
        else:
            answer = {"id": name, "sha": commit, "private": repo.private, "tags": []}
            answer["siblings"] = [{"rfilename": n} for n in names]
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _resolve(self, file: Path, commit: str) -> None:
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_etag(file)}"'}
        if file.stat().st_size <= LARGE:
            return self._send(file, headers)
        self.send_response(302)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("X-Linked-Etag", f'"{_etag(file)}"')
        self.send_header("X-Linked-Size", str(file.stat().st_size))
        self.send_header("Location", f"http://localhost:{self.hub.port}/lfs{file}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, file: Path, headers: dict[str, str]) -> None:
        content = file.read_bytes()
        start = 0
        if wanted := self.headers.get("Range"):
            self.hub.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if wanted else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "HEAD":
            return
        self.hub.served[f"{file.parent.name}/{file.name}"] += 1
        cuts = self.hub.breaks.get(file.name)
        if cuts:
            self.wfile.write(content[start : start + cuts.pop(0)])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(content[start:])

    def _fail(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _etag(file: Path) -> str:
    content = file.read_bytes()
    if file.stat().st_size > LARGE:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _lfs(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    return {"lfs": {"oid": _etag(file), "size": size, "pointerSize": 134}} if size > LARGE else {}
