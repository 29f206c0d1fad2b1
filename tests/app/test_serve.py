"""What edge-dit serve answers, and what it refuses."""

from __future__ import annotations

import http.client
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from edge_dit.app.serve import HEADERS, HOST, ORT, Handler, Served, byte_range

SECRET = b"nobody's business"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A page, a bundle, and files beside them that nobody may read."""
    for path, content in {
        "page/index.html": b"<p>page",
        "page/worker.mjs": b"1",
        "page/package.json": SECRET,
        "page/.hidden.html": SECRET,
        f"page/{ORT}/ort.wasm": b"wasm",
        "page/node_modules/other/secret.mjs": SECRET,
        "bundle/manifest.json": b"{}",
        "bundle/onnx/a b%.bin": bytes(range(256)),
        "bundle/.hidden": SECRET,
        "secret.html": SECRET,
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    (tmp_path / "bundle" / "out").symlink_to(tmp_path / "secret.html")
    (tmp_path / "bundle" / "up").symlink_to(tmp_path)
    (tmp_path / "page" / "out.html").symlink_to(tmp_path / "secret.html")
    (tmp_path / "bundle" / "in").symlink_to(tmp_path / "bundle" / "manifest.json")
    return tmp_path


@pytest.fixture
def port(folder: Path) -> Iterator[int]:
    served = Served({"": folder / "page", "bundle": folder / "bundle"}, HEADERS)
    with ThreadingHTTPServer((HOST, 0), partial(Handler, served)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, dict]:
    connection = http.client.HTTPConnection(HOST, port, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body, dict(answer.getheaders())


@pytest.mark.parametrize(
    ("path", "content", "kind"),
    [
        ("/", b"<p>page", "text/html; charset=utf-8"),
        ("/index.html?x=1", b"<p>page", "text/html; charset=utf-8"),
        ("/worker.mjs", b"1", "text/javascript"),
        (f"/{ORT}/ort.wasm", b"wasm", "application/wasm"),
        ("/bundle/manifest.json", b"{}", "application/json"),
        ("/bundle/onnx/a%20b%25.bin", bytes(range(256)), "application/octet-stream"),
        ("/bundle/in", b"{}", "application/octet-stream"),
    ],
)
def test_files_of_the_folders_with_the_headers(port, path, content, kind):
    status, body, headers = ask(port, path)
    assert (status, body) == (200, content)
    assert headers["Content-Type"] == kind
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert ask(port, path, "HEAD")[:2] == (200, b"")
    assert ask(port, path, "HEAD")[2]["Content-Length"] == str(len(content))


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.html",
        "/%2e%2e/secret.html",
        "/bundle/../../secret.html",
        "/bundle/..%2f..%2fsecret.html",
        "/bundle//etc/passwd",
        "//etc/passwd",
        "/bundle/out",
        "/bundle/up/secret.html",
        "/bundle/.hidden",
        "/bundle/onnx",
        "/bundle",
        "/bank/index.json",
        "/out.html",
        "/package.json",
        "/.hidden.html",
        "/node_modules/other/secret.mjs",
        f"/{ORT}/../../other/secret.mjs",
        "/bundle/%00",
    ],
)
def test_nothing_else(port, path):
    status, body, _ = ask(port, path)
    assert (status, body) == (404, b"")


@pytest.mark.parametrize(
    ("asked", "place"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=10-19", (10, 20)),
        ("bytes=250-999", (250, 256)),
        ("bytes=200-", (200, 256)),
        ("bytes=-6", (250, 256)),
        ("bytes=-999", (0, 256)),
    ],
)
def test_ranges(port, asked, place):
    begin, end = place
    status, body, headers = ask(port, "/bundle/onnx/a%20b%25.bin", Range=asked)
    assert (status, body) == (206, bytes(range(begin, end)))
    assert headers["Content-Range"] == f"bytes {begin}-{end - 1}/256"


@pytest.mark.parametrize("asked", ["bytes=256-", "bytes=9-3", "bytes=-", "bytes=1-2,4-5", "rows=1"])
def test_ranges_that_cannot_be_had(port, asked):
    status, body, headers = ask(port, "/bundle/onnx/a%20b%25.bin", Range=asked)
    assert (status, body) == (416, b"")
    assert headers["Content-Range"] == "bytes */256"
    begin, end = byte_range(asked, 256)
    assert begin >= end


def test_another_name_for_this_machine_is_refused(port):
    """A site's own name that leads to 127.0.0.1 would let its pages read the answers."""
    assert ask(port, "/bundle/manifest.json", Host=f"evil.example:{port}")[0] == 421
    assert ask(port, "/bundle/manifest.json", Host=f"localhost:{port}")[0] == 200


def test_other_methods_are_refused(port):
    assert ask(port, "/bundle/manifest.json", "PUT")[0] == 501


def test_a_bundle_that_is_not_whole_is_refused(road, run, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(road.bundle, copy)
    (copy / "onnx" / "head.onnx").unlink()
    code, out, err = run("serve", copy, "--bank", road.bank)
    assert (code, out) == (2, "")
    assert "head.onnx" in err
    assert "missing" in err
    code, out, err = run("serve", tmp_path)
    assert (code, out) == (2, "")
    assert "no manifest.json" in err
