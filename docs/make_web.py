"""Make docs/web-1600.png and docs/web-400.png: samples/web while it trains samples/sana.toml.

    python docs/make_web.py [BUNDLE]

Needs Chromium and ``npm ci --prefix samples/web``. BUNDLE: an exported loop bundle of the job; by
default one is exported, which takes minutes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT / "tests" / "devices"))
COLOURS = 128
STEPS, EVERY, UNTIL = 120, 20, 64
"""Steps of the run, steps between previews, and steps done when the pictures are taken."""
SCENARIO = """
const idle = () => document.body.getAttribute("aria-busy") === "false";
await page.setViewportSize({ width: 1600, height: 1180 });
await page.goto(url);
await page.waitForFunction(idle);
await page.setInputFiles("#pictures-files", given.pictures);
await page.click("#pictures-read");
await page.waitForSelector("#start:enabled");
await page.fill("#steps", String(given.steps));
await page.fill("#every", String(given.every));
await page.click("#start");
const far = (until) => Number(document.getElementById("status").textContent.split(" ")[0]) >= until;
await page.waitForFunction(far, given.until);
await page.evaluate(() => scrollTo(0, 0));
await page.screenshot({ path: given.wide });
await page.setViewportSize({ width: 400, height: 1600 });
await page.evaluate(() => document.getElementById("train").scrollIntoView());
await page.screenshot({ path: given.narrow });
"""


def export(folder: Path) -> Path:
    """A loop bundle of samples/sana.toml with a small bank, in ``folder``."""
    from edge_dit.app import api
    from edge_dit.planning.job import read_job
    from edge_dit.planning.make import make_plan

    job = read_job(ROOT / "samples" / "sana.toml")
    plan = make_plan(job).model_copy(update={"draws": 24})
    api.export(plan, folder / "bundle", ["onnx"], job=job)
    return folder / "bundle"


def main() -> None:
    """Write both pictures."""
    from chromium import browse, serving  # pyright: ignore[reportMissingImports]

    wide, narrow = DOCS / "web-1600.png", DOCS / "web-400.png"
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(sys.argv[1]) if sys.argv[1:] else export(Path(folder))
        files = (ROOT / "samples" / "subject" / "train").iterdir()
        given = {"pictures": sorted(map(str, files)), "wide": str(wide), "narrow": str(narrow)}
        with serving(bundle) as url:
            browse(url, SCENARIO, {**given, "steps": STEPS, "every": EVERY, "until": UNTIL})
    for path in (wide, narrow):
        with Image.open(path) as shot:
            shot.convert("RGB").quantize(COLOURS).save(path, optimize=True)


if __name__ == "__main__":
    main()
