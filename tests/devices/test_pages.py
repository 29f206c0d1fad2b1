"""run.html and the page of `edge-dit compare` in real Chromium, of runs with previews."""

from __future__ import annotations

import functools
import http.server
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from chromium import browse

from edge_dit.app.api import export
from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan
from edge_dit_runtime.page.compare import page, read_runs
from loops import on_device, write_world

pytestmark = pytest.mark.devices

WIDTHS = (400, 1600)
SMALLEST = 12
"""Pixels of the smallest text."""
TRAIN = """
draws = er.live("bundle", "images")
er.train("bundle", draws, "run", target="onnx:streamed")
er.train("bundle", draws, "stopped", target="onnx", on_step=lambda done, _: done == 5)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run/, which is done, and stopped/, each with a page, and compare.html."""
    folder = tmp_path_factory.mktemp("pages")
    sizes = {"draws": 4, "steps": 12, "lr": 0.01, "preview_every": 4}
    job = read_job(write_world(folder, "sana", **sizes))
    export(make_plan(job), folder / "bundle", ["onnx"], job=job)
    on_device(folder, TRAIN)
    read = read_runs([folder / "run", folder / "stopped"])
    (folder / "compare.html").write_text(page(read))
    return folder


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()


LOOK = """
await page.setViewportSize({ width: given.width, height: 900 });
await page.emulateMedia({ colorScheme: given.scheme });
await page.goto(url + given.path);
await page.screenshot({ path: given.picture, fullPage: true });
return await page.evaluate(() => {
  const within = (element) => {
    const { left, right, width, height } = element.getBoundingClientRect();
    return left >= 0 && right <= innerWidth && width > 0 && height > 0;
  };
  const texts = [...document.querySelectorAll("body *")].filter((element) =>
    [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
  const plots = [...document.querySelectorAll(".plot svg")];
  return {
    title: document.title,
    overflow: document.documentElement.scrollWidth - innerWidth,
    plots: plots.map((plot) => ({
      within: within(plot),
      lines: [...plot.querySelectorAll(".line")].map((line) => ({
        points: line.getAttribute("d").split("L").length,
        length: line.getTotalLength(),
        colour: getComputedStyle(line).stroke,
      })),
      dots: plot.querySelectorAll(".dots").length,
    })),
    ticks: [...document.querySelectorAll(".ticks span")].map(within),
    pictures: [...document.images].map((image) => within(image) && image.naturalWidth),
    smallest: Math.min(...texts.map((text) => parseFloat(getComputedStyle(text).fontSize))),
    colours: ["backgroundColor", "color"].map((key) => getComputedStyle(document.body)[key]),
  };
});
"""


def look(world: Path, path: str, width: int, scheme: str = "light") -> Any:
    """What a browser of that width makes of a page."""
    kept = Path(os.environ.get("EDGE_DIT_SCREENSHOTS", world))
    name = f"{path.replace('/', '-').removesuffix('.html')}-{width}-{scheme}.png"
    given = {"path": path, "width": width, "scheme": scheme, "picture": str(kept / name)}
    with served(world) as url:
        return browse(url, LOOK, given)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("path", "plots", "pictures"),
    [("run/run.html", 3, 4), ("stopped/run.html", 3, 2), ("compare.html", 3, 2)],
)
def test_a_page_fits_and_shows_its_curves_and_previews(world, path, plots, pictures, width):
    seen = look(world, path, width)
    assert seen["overflow"] <= 0
    assert len(seen["plots"]) == plots
    for plot in seen["plots"]:
        assert plot["within"]
        assert plot["lines"]
        for line in plot["lines"]:
            assert line["points"] >= 2
            assert line["length"] > 0
            assert line["colour"] not in ("none", "")
    assert all(seen["ticks"])
    assert len(seen["pictures"]) == pictures
    assert all(seen["pictures"])
    assert seen["smallest"] >= SMALLEST


def test_every_run_has_its_own_colour(world):
    for plot in look(world, "compare.html", 1600)["plots"]:
        assert len({line["colour"] for line in plot["lines"]}) == 2


def test_dark_and_light(world):
    light, dark = (look(world, "run/run.html", 1600, scheme) for scheme in ("light", "dark"))
    assert light["colours"][0] == "rgb(255, 255, 255)"
    assert dark["colours"][0] != light["colours"][0]
    assert dark["colours"][1] != light["colours"][1]
    line = [seen["plots"][0]["lines"][0]["colour"] for seen in (light, dark)]
    assert line[0] != line[1]
