"""Real Chromium on a page that edge-dit serve, or another server, gives it."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WEB = ROOT / "samples" / "web"
BROWSER = Path(__file__).with_name("browser.mjs")
LIMIT = 400
"""Seconds that a scenario may take."""
SERVE = "import sys; from edge_dit.cli import main; main()"


@contextmanager
def serving(bundle: Path, bank: Path | None = None) -> Iterator[str]:
    """The address of `edge-dit serve`."""
    options = ["--port", "0", *(["--bank", str(bank)] if bank else [])]
    command = [sys.executable, "-c", SERVE, "serve", str(bundle), *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip()
            assert address.startswith("http://127.0.0.1:")
            yield address
        finally:
            server.terminate()


def browse(
    url: str, scenario: str, given: Any = None, profile: Path | None = None, webgpu: bool = False
) -> Any:
    """What a scenario of browser.mjs returns. Nothing but its own server may be asked for anything,
    and no page may have a fault that it does not show.

    Args:
        url: of the page.
        scenario: body of an async function of (page, context, url, given).
        given: JSON for it.
        profile: folder of the browser's profile; default a fresh one.
        webgpu: with a WebGPU that computes on the processor.
    """
    with tempfile.TemporaryDirectory() as fresh:
        asked = {"url": url, "profile": str(profile or fresh), "webgpu": webgpu}
        done = subprocess.run(
            ["node", BROWSER],
            input=json.dumps({**asked, "scenario": scenario, "given": given}),
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert "error" not in answer, answer["error"]
    # A page asks whether there is a bank; a browser reports that there is none.
    assert [fault for fault in answer["faults"] if "404" not in fault] == []
    own = (url, f"blob:{url}")
    assert [address for address in answer["asked"] if not address.startswith(own)] == []
    return answer.get("result")


IN_PAGE = """
await page.goto(url);
return await page.evaluate(async (given) => {
  const { Device } = await import("./edge-dit.mjs");
  const bytesOf = async (blob) => new Promise((resolve) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.split(",")[1]);
    reader.readAsDataURL(blob);
  });
  const fileOf = (text, name) =>
    new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], name);
  const device = new Device();
  const losses = [];
  device.addEventListener("step", ({ detail }) => losses.push(detail.loss));
  const open = async (options = {}) => {
    await device.open({ url: "bundle/" }, { threads: 2, ...options });
    await device.bank({ url: "bank/" });
    losses.length = 0;
  };
  BODY
}, given);
"""


def in_page(body: str) -> str:
    """A scenario that runs within the page, on the module edge-dit.mjs. It has `device`, `losses`,
    `open()`, `bytesOf(blob)`, which gives base64, and `fileOf(base64, name)`.
    """
    return IN_PAGE.replace("BODY", body)


def encoded(data: bytes) -> str:
    """Bytes for `given`."""
    return base64.b64encode(data).decode()


def decoded(text: str) -> bytes:
    """Bytes of a result."""
    return base64.b64decode(text)
