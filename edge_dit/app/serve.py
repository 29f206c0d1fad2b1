"""Serves the browser sample with a bundle and a bank, to this machine alone.

/                 the page, samples/web
/node_modules/    onnxruntime-web's files, nothing else of that folder
/bundle/, /bank/  the folders given
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from edge_dit.contract.bank import Bank
from edge_dit.contract.bundle import open_bundle
from edge_dit.contract.integrity import check_bundle
from edge_dit.contract.names import is_plain_name
from edge_dit.errors import BadInput
from edge_dit.store.files import open_regular

HOST = "127.0.0.1"
PORT = 8765
"""Default port. A browser keeps what the page stores by address and port, so it should not change
between two visits."""
ORT = "node_modules/onnxruntime-web/dist"
PAGE = "index.html"
PAGE_FILES = (".html", ".css", ".mjs", ".svg")
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".mjs": "text/javascript",
    ".wasm": "application/wasm",
    ".json": "application/json",
}
HEADERS = {
    # Without these two a page has no shared memory, and onnxruntime-web one thread.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    # The page can load from and send to this server only.
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; "
        "img-src 'self' blob:; style-src 'self'; connect-src 'self'; form-action 'none'; "
        "frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
    "Accept-Ranges": "bytes",
}
CHUNK = 2**20


@dataclass(frozen=True)
class Served:
    """What is served.

    Attributes:
        folders: first part of a path -> folder; "" is the page's.
        headers: of every answer.
    """

    folders: Mapping[str, Path]
    headers: Mapping[str, str]

    def find(self, url: str) -> Path | None:
        """The file of a request's path; None if it is not one that is served."""
        path = unquote(urlsplit(url).path).removeprefix("/") or PAGE
        if not all(map(is_plain_name, path.split("/"))):
            return None
        top, _, inside = path.partition("/")
        if not inside:
            root = self.folders[""]
            file = root / path if path.endswith(PAGE_FILES) else None
        elif top in self.folders:
            root = self.folders[top]
            file = root / inside
        else:
            root = self.folders[""] / ORT
            file = self.folders[""] / path if path.startswith(f"{ORT}/") else None
        if file is None or not file.resolve().is_relative_to(root.resolve()):
            return None
        return file if file.is_file() else None


def server(bundle: Path, bank: Path | None = None, port: int = PORT) -> ThreadingHTTPServer:
    """A server of the page, a bundle and a bank, bound to `HOST` and not yet running.

    Args:
        bundle: an exported bundle with the onnx target.
        bank: precomputed with the same plan; None for a page that makes it of pictures.
        port: to listen on; 0 for any free one.

    Raises:
        BadInput: bundle or bank are not whole, or do not fit together; the page or onnxruntime-web
            are not here; the port is taken.
    """
    opened = open_bundle(bundle)
    opened.facts("onnx")
    check_bundle(opened, "onnx")
    folders = {"": page_folder(), "bundle": bundle}
    if bank is not None:
        Bank(bank, opened.manifest.plan_hash)
        folders["bank"] = bank
    try:
        return ThreadingHTTPServer((HOST, port), partial(Handler, Served(folders, HEADERS)))
    except (OSError, OverflowError) as error:
        raise BadInput(
            f"{HOST}:{port}", found=f"cannot listen there ({error})", remedy="choose another --port"
        ) from None


def page_folder() -> Path:
    """The folder samples/web of a checkout, with onnxruntime-web installed in it.

    Raises:
        BadInput: one of them is missing.
    """
    above = Path(__file__).resolve().parents
    folder = next((p / "samples" / "web" for p in above if (p / "pyproject.toml").is_file()), None)
    if folder is None or not (folder / PAGE).is_file():
        raise BadInput(
            "serve",
            found="the page, samples/web, is not here",
            expected="an editable install from a checkout of the repository",
            remedy='clone the repository, then: pip install -e ".[all]"',
        )
    if not (folder / ORT).is_dir():
        raise BadInput(
            folder / ORT,
            found="onnxruntime-web is not installed",
            expected="its files, from npm",
            remedy=f"npm ci --prefix {folder}",
        )
    return folder


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD of files, whole or one range of bytes."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "edge-dit", ""

    def __init__(self, served: Served, *arguments: object) -> None:
        self._served = served
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        """Answer with headers only."""
        self._answer(with_body=False)

    def do_GET(self) -> None:
        """Answer with a file."""
        self._answer(with_body=True)

    def log_message(self, format: str, *args: object) -> None:
        """Write nothing: what a user trains on is nobody's business."""

    def end_headers(self) -> None:
        """Every answer has the headers of `Served`."""
        for name, value in self._served.headers.items():
            self.send_header(name, value)
        super().end_headers()

    def _answer(self, with_body: bool) -> None:
        host = self.headers.get("Host", "").rsplit(":", 1)[0]
        if host not in (HOST, "localhost"):  # another site's name that leads here
            return self._refuse(HTTPStatus.MISDIRECTED_REQUEST)
        path = self._served.find(self.path)
        if path is None:
            return self._refuse(HTTPStatus.NOT_FOUND)
        with open_regular(path) as file:
            size = file.seek(0, 2)
            asked = self.headers.get("Range")
            begin, end = (0, size) if asked is None else byte_range(asked, size)
            if begin >= end and asked is not None:
                return self._refuse(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, f"bytes */{size}")
            self.send_response(HTTPStatus.OK if asked is None else HTTPStatus.PARTIAL_CONTENT)
            if asked is not None:
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
            self.send_header("Content-Type", TYPES.get(path.suffix, "application/octet-stream"))
            self.send_header("Content-Length", str(end - begin))
            self.end_headers()
            if with_body:
                self._send(file, begin, end)

    def _send(self, file: BinaryIO, begin: int, end: int) -> None:
        file.seek(begin)
        while begin < end:
            piece = file.read(min(CHUNK, end - begin))
            if not piece:  # it shrank; the reader sees fewer bytes than were announced
                self.close_connection = True
                return
            begin += len(piece)
            try:
                self.wfile.write(piece)
            except OSError:  # the browser wants no more
                self.close_connection = True
                return

    def _refuse(self, status: HTTPStatus, content_range: str = "") -> None:
        self.send_response(status)
        if content_range:
            self.send_header("Content-Range", content_range)
        self.send_header("Content-Length", "0")
        self.end_headers()


def byte_range(asked: str, size: int) -> tuple[int, int]:
    """The bytes [begin, end) of a Range header; begin >= end if it cannot be satisfied.

    Args:
        asked: "bytes=0-99", "bytes=100-" or "bytes=-50".
        size: of the file.
    """
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", asked.strip())
    if match is None or not any(match.groups()):
        return size, size
    first, last = match.groups()
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(size, int(last) + 1) if last else size
