"""samples/web in real Chromium, against the Python session."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from chromium import WEB, browse, decoded, encoded, in_page, serving
from PIL import Image

import edge_dit_runtime as er
import pipelines
from edge_dit.app import api
from edge_dit.contract.adamw import AdamW, learning_rate
from edge_dit.contract.bank import Bank
from edge_dit.contract.bundle import Bundle
from edge_dit.models.pipeline import load_pipeline
from edge_dit.pictures.tiles import tiled
from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan
from edge_dit.store.documents import read_document, write_document
from edge_dit.store.tensors import TensorFile, write_tensors
from edge_dit_runtime.session import open_session
from loops import EXPORT, write_world

pytestmark = pytest.mark.devices

STEPS = 10
LOSS, GRADIENT, ADAPTER = 1e-5, 1e-4, 1e-3
"""Largest differences: of a loss, relative; of tensors, relative to their largest value."""
STATE = "state.safetensors"


@dataclass(frozen=True)
class World:
    """A job's folder with what the host made."""

    folder: Path
    bundle: Bundle
    bank: Bank

    @property
    def seed(self) -> int:
        return self.bundle.manifest.plan["seed"]

    def losses(self, layout: str, steps: int = STEPS) -> tuple[list[float], Any]:
        """Losses of the Python session, and the session after them."""
        session = open_session(self.bundle, "onnx", layout)
        losses = []
        for step in range(steps):
            session.lr = learning_rate(step, steps, self.bundle.manifest.optimizer.lr)
            losses.append(session.step(self.bank[self.bank.number(step, self.seed)]))
        return losses, session


def make_world(folder: Path, name: str, keys: str, **plan: object) -> World:
    job = read_job(write_world(folder, name, keys, draws=6, steps=STEPS, lr=0.01))
    larger = np.random.default_rng(7).integers(0, 255, (97, 130, 3), np.uint8)
    Image.fromarray(larger).save(folder / "images" / "1.png")
    planned = make_plan(job).model_copy(update=plan)
    api.precompute(planned, api.read_pictures(job, planned), folder / "bank")
    bundle = api.export(planned, folder / "bundle", ["onnx"], job=job)
    return World(folder, bundle, Bank(folder / "bank", planned.identity()))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("web"), "sana", EXPORT)


def difference(wanted: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> float:
    """The largest difference of any tensor, relative to its largest value."""
    assert wanted.keys() == found.keys()
    return max(
        float(np.abs(value - found[name].reshape(value.shape)).max() / np.abs(value).max())
        for name, value in wanted.items()
    )


def loss_difference(wanted: list[float], found: list[float]) -> float:
    assert len(wanted) == len(found)
    return float(np.max(np.abs(np.subtract(wanted, found)) / np.abs(wanted)))


def tensors_of(text: str, folder: Path) -> dict[str, np.ndarray]:
    """Tensors of a safetensors file that a page returned."""
    path = folder / "returned.safetensors"
    path.write_bytes(decoded(text))
    return TensorFile(path).read()


# ---------------------------------------------------------------- steps


@dataclass(frozen=True)
class Trained:
    """What a page did in one layout."""

    losses: list[float]
    gradients: dict[str, np.ndarray]
    of_another_draw: dict[str, np.ndarray]
    adapter: dict[str, np.ndarray]
    at_lr_0: list[float]
    state: bytes


TRAIN = in_page("""
  await open();
  await device.startAgain();
  await device.train({ layout: given.layout });
  const found = { losses: [...losses], state: await bytesOf(await device.state()) };
  found.adapter = await bytesOf((await device.adapter())["adapter.safetensors"]);
  found.gradients = (await device.gradients(0)).gradients;
  found.other = (await device.gradients(1)).gradients;
  await device.startAgain();
  losses.length = 0;
  await device.train({ layout: given.layout, lr: 0 });
  return { ...found, atLr0: losses };
""")


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory) -> Callable[[str], Trained]:
    @functools.cache
    def train(layout: str) -> Trained:
        with serving(world.bundle.folder, world.bank.folder) as url:
            found = browse(url, TRAIN, {"layout": layout})
        gradients, other = (
            {name: np.array(value, np.float32) for name, value in found[key].items()}
            for key in ("gradients", "other")
        )
        adapter = tensors_of(found["adapter"], tmp_path_factory.mktemp(layout))
        state = decoded(found["state"])
        return Trained(found["losses"], gradients, other, adapter, found["atLr0"], state)

    return train


def gradients_at(session: Any, adapter: Mapping[str, np.ndarray], draw: Mapping[str, np.ndarray]):
    session.load_adapter(adapter)
    session.backward(draw)
    return session.gradients()


@pytest.mark.parametrize("layout", ["fused", "streamed"])
def test_ten_steps_are_those_of_python(world, trained, layout):
    found = trained(layout)
    losses, session = world.losses(layout)
    assert loss_difference(losses, found.losses) < LOSS
    assert difference(session.adapter(), found.adapter) < ADAPTER
    wanted = gradients_at(session, found.adapter, world.bank[0])
    assert all(np.abs(value).max() > 0 for value in wanted.values())
    assert difference(wanted, found.gradients) < GRADIENT
    # The comparisons notice what is wrong: no learning rate, another draw.
    assert loss_difference(losses, found.at_lr_0) > 100 * LOSS
    assert difference(wanted, found.of_another_draw) > 100 * GRADIENT


def test_both_layouts_agree(trained):
    fused, streamed = trained("fused"), trained("streamed")
    assert loss_difference(fused.losses, streamed.losses) < LOSS
    assert difference(fused.adapter, streamed.adapter) < ADAPTER


STEP = in_page("""
  await open({ backend: given.backend });
  await device.importState(fileOf(given.state, "state.safetensors"));
  return await device.gradients(0);
""")


def test_a_step_on_webgpu(world, trained):
    """Chromium's WebGPU on the processor; the adapter's B is not zero."""
    before = trained("fused")
    with serving(world.bundle.folder, world.bank.folder) as url:
        given = {"backend": "webgpu", "state": encoded(before.state)}
        found = browse(url, STEP, given, webgpu=True)
    session = open_session(world.bundle, "onnx", "fused")
    wanted = gradients_at(session, before.adapter, world.bank[0])
    loss = session.backward(world.bank[0])
    assert loss_difference([loss], [found["loss"]]) < LOSS
    gradients = {k: np.array(v, np.float32) for k, v in found["gradients"].items()}
    assert difference(wanted, gradients) < GRADIENT


CASES: dict[str, tuple[str, dict[str, object]]] = {
    "float16, through": ("float16", {"tail": "through"}),
    "int8, fresh": ("int8", {"tail": "fresh"}),
    "int4, stored": ("int4", {"tail": "stored"}),
    "surroundings": ("float32", {"window": True, "surroundings": True}),
}
FEW = in_page("""
  await open();
  await device.train({ layout: given.layout });
  return losses;
""")


@pytest.mark.parametrize("case", CASES)
def test_other_weights_tails_and_windows(tmp_path, case):
    weights, plan = CASES[case]
    keys = f'targets = ["onnx"]\nweights = "{weights}"\n'
    world = make_world(tmp_path, "sana", keys, **plan)
    with serving(world.bundle.folder, world.bank.folder) as url:
        found = browse(url, FEW, {"layout": "streamed"})
    assert loss_difference(world.losses("streamed")[0], found) < LOSS


SMOOTHED = in_page("""
  await open();
  await device.train({ layout: "fused" });
  const found = { losses: [...losses] };
  found.whole = await bytesOf((await device.adapter())["adapter.safetensors"]);
  await device.startAgain();
  await device.importState(fileOf(given.state, "state.safetensors"));
  await device.train({ layout: "fused" });
  found.resumed = await bytesOf((await device.adapter())["adapter.safetensors"]);
  return found;
""")


def test_groups_of_draws_and_an_average(tmp_path):
    """A whole run, and one that Python began and stopped within a group; no first moment."""
    lean = AdamW(lr=0.01, beta1=0.0)
    world = make_world(
        tmp_path, "sana", 'targets = ["onnx"]\n', accumulate=5, ema=0.2, optimizer=lean
    )
    given = (world.bundle.folder, world.bank.folder)
    er.train(*given, tmp_path / "whole", target="onnx:fused")
    er.train(*given, tmp_path / "run", target="onnx:fused", on_step=lambda done, _: done == 7)
    state = (tmp_path / "run" / STATE).read_bytes()
    assert "summed" in TensorFile(tmp_path / "run" / STATE).read()
    with serving(*given) as url:
        found = browse(url, SMOOTHED, {"state": encoded(state)})
    whole = TensorFile(tmp_path / "whole" / STATE).read()
    assert loss_difference(list(whole["run.loss"]), found["losses"]) < LOSS
    wanted = TensorFile(tmp_path / "whole" / "adapter.safetensors").read()
    for run in ("whole", "resumed"):
        assert difference(wanted, tensors_of(found[run], tmp_path)) < ADAPTER
    plain = {name: whole[f"adapter.{name}"] for name in wanted}
    assert difference(wanted, plain) > 10 * ADAPTER


COLLECTED = in_page("""
  await device.open({ url: "bundle/" }, { threads: 2 });
  const files = given.pictures.map(([name, text]) => [name, fileOf(text, name)]);
  await device.collect(files);
  await device.train({ layout: "streamed" });
  const found = { losses };
  let folder = await navigator.storage.getDirectory();
  const [{ identity }] = await device.banks();
  for (const part of ["edge-dit", "banks", given.bundle, identity]) {
    folder = await folder.getDirectoryHandle(part);
  }
  found.files = {};
  for await (const [name, handle] of folder) {
    found.files[name] = await bytesOf(await handle.getFile());
  }
  return found;
""")


INNER = {"head_skip": 0, "inner_skips": [(1, 2)]}


@pytest.mark.parametrize(
    ("name", "plan"),
    [("flux-dev", INNER), ("flux-dev", {**INNER, "window": True}), ("sana", {"window": True})],
)
def test_a_bank_of_the_page(tmp_path, name, plan):
    """FLUX: packed latents, the autoencoder's samples, text tokens; a run is skipped in between.
    Windows have positions of their own in FLUX.
    """
    world = make_world(tmp_path, name, EXPORT, **plan)
    given = {
        "bundle": world.bundle.manifest_sha256,
        "pictures": [
            (path.name, encoded(path.read_bytes()))
            for path in sorted((world.folder / "images").iterdir())
        ],
    }
    with serving(world.bundle.folder) as url:
        found = browse(url, COLLECTED, given)
    assert loss_difference(world.losses("streamed")[0], found["losses"]) < LOSS
    (tmp_path / "made").mkdir()
    for file, text in found["files"].items():
        (tmp_path / "made" / file).write_bytes(decoded(text))
    made = Bank(tmp_path / "made", world.bundle.manifest.plan_hash)
    assert made.identity == world.bank.identity
    assert ("residual_text.1" in made[0]) == (name == "flux-dev")
    for wanted, draw in zip(world.bank, made, strict=True):
        assert difference(wanted, draw) < LOSS


TILED = """
import { tiled } from %s;
const { dims, data, tile, step, scale: [up, down] } = JSON.parse(%s);
const run = async ({ dims: [, channels, h, w], data }) => {
  const [height, width] = [(h * up) / down, (w * up) / down];
  const made = new Float32Array(channels * height * width);
  for (let n = 0; n < made.length; n++) {
    const [x, y] = [n %% width, Math.floor(n / width) %% height];
    const c = Math.floor(n / width / height);
    const from = (c * h + Math.floor((y * down) / up)) * w + Math.floor((x * down) / up);
    made[n] = data[from] + x - 2 * y;  // a tile's own place shows how tiles are blended
  }
  return [{ type: "float32", dims: [1, channels, height, width], data: made }];
};
const [found] = await tiled({ dims, data: Float32Array.from(data) }, run, tile, step, [up, down]);
console.log(JSON.stringify({ dims: found.dims, data: Array.from(found.data) }));
"""


@pytest.mark.parametrize(
    ("size", "tile", "step", "scale"),
    [((40, 56), 16, 4, (1, 4)), ((9, 6), 4, 1, (3, 1)), ((12, 44), 16, 4, (1, 4))],
)
def test_tiles_are_those_of_python(size, tile, step, scale):
    up, down = scale

    def run(part: np.ndarray) -> list[np.ndarray]:
        height, width = (side * up // down for side in part.shape[2:])
        rows, columns = np.mgrid[:height, :width]
        return [part[:, :, rows * down // up, columns * down // up] + (columns - 2 * rows)]

    image = np.random.default_rng(0).normal(size=(1, 2, *size)).astype(np.float32)
    (wanted,) = tiled(image, run, tile, step, scale)
    given = {"dims": image.shape, "data": image.reshape(-1).tolist(), "tile": tile}
    given |= {"step": step, "scale": scale}
    place = json.dumps(str(WEB / "pictures.mjs"))
    found = in_node(TILED % (place, json.dumps(json.dumps(given))))
    assert tuple(found["dims"]) == wanted.shape
    assert difference({"": wanted}, {"": np.array(found["data"], np.float32)}) < 1e-6


def test_products_in_int8(tmp_path):
    """One step: a value that is rounded to the other integer makes later ones differ by more."""
    keys = 'targets = ["onnx"]\nweights = "int8"\ncompute = "int8"\n'
    world = make_world(tmp_path, "sana", keys)
    with serving(world.bundle.folder, world.bank.folder) as url:
        layouts = [browse(url, FEW, {"layout": layout}) for layout in ("fused", "streamed")]
    for layout, found in zip(("fused", "streamed"), layouts, strict=True):
        wanted = world.losses(layout)[0]
        assert loss_difference(wanted[:1], found[:1]) < LOSS
        assert loss_difference(wanted, found) < 1e-3


def in_node(code: str) -> Any:
    """The JSON that a module prints."""
    command = ["node", "--input-type=module", "-e", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_random_numbers_are_those_of_the_contract():
    document = (WEB.parents[1] / "docs" / "noise.md").read_text()
    vectors = json.loads(document.split("```json\n")[1].split("```")[0])
    code = f"""
        import * as noise from {json.dumps(str(WEB / "noise.mjs"))};
        const given = {json.dumps(vectors)};
        const hex = (word) => word.toString(16).padStart(8, "0");
        console.log(JSON.stringify({{
          words: given.words.map((v) => Array.from(noise.words(v.seed, v.stream, 5), hex)),
          uniform: given.uniform.map((v) => Array.from(noise.uniform(v.seed, v.stream, 3))),
          normal: given.normal.map((v) => Array.from(noise.normal(v.seed, v.stream, 5))),
          seed_of: given.seed_of.map((v) => noise.seedOf(v.seed, v.number)),
          permutation: given.permutation.map(
            (v) => noise.permutation(v.result.length, v.seed, v.epoch)),
        }}))"""
    found = in_node(code)
    for key, answer in {"words": "words", "uniform": "numbers", "seed_of": "result"}.items():
        assert found[key] == [vector[answer] for vector in vectors[key]]
    assert found["permutation"] == [vector["result"] for vector in vectors["permutation"]]
    for numbers, vector in zip(found["normal"], vectors["normal"], strict=True):
        assert np.array_equal(np.float32(numbers), np.float32(vector["numbers"]))


# ---------------------------------------------------------------- state

CLOSED = """
const step = (page, saveEvery) => page.evaluate(async ({ saveEvery, steps }) => {
  const { Device } = await import("./edge-dit.mjs");
  const device = new Device();
  globalThis.losses = [];
  device.addEventListener("step", ({ detail }) => globalThis.losses.push(detail.step));
  await device.open({ url: "bundle/" }, { threads: 2 });
  const { run } = await device.bank({ url: "bank/" });
  globalThis.done = device.train({ layout: "streamed", steps, saveEvery })
    .then(() => device.state()).then((blob) => blob.arrayBuffer())
    .then((bytes) => Array.from(new Uint8Array(bytes)));
  return run?.done ?? 0;
}, { saveEvery, steps: given.steps });
await page.goto(url);
if (!given.whole) {
  await step(page, 3);
  await page.waitForFunction(() => globalThis.losses.length >= 8);
  await page.close();
  page = await context.newPage();
  await page.goto(url);
}
const from = await step(page, 3);
const bytes = await page.evaluate(() => globalThis.done);
return { from, bytes, steps: await page.evaluate(() => globalThis.losses) };
"""


def test_a_closed_tab_goes_on_to_the_same_bits(world):
    steps = 24
    with serving(world.bundle.folder, world.bank.folder) as url:
        whole, closed = (browse(url, CLOSED, {"steps": steps, "whole": w}) for w in (True, False))
    assert whole["from"] == 0
    assert whole["steps"] == list(range(steps))
    assert 3 <= closed["from"] < steps
    assert closed["steps"] == list(range(closed["from"], steps))
    assert closed["bytes"] == whole["bytes"]


def run_folder(folder: Path, state: bytes) -> Path:
    """A run folder of a state."""
    folder.mkdir()
    (folder / STATE).write_bytes(state)
    metadata = TensorFile(folder / STATE).header.metadata
    write_document(folder / "run.json", json.loads(metadata["run"]))
    return folder


def test_python_continues_a_run_of_the_page_and_the_page_one_of_python(world, trained, tmp_path):
    longer = STEPS + 2
    ours = run_folder(tmp_path / "run", trained("fused").state)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        er.train(world.bundle.folder, world.bank.folder, tmp_path / "half", steps=longer)
        run = er.train(world.bundle.folder, world.bank.folder, ours, steps=longer, resume=True)
    assert run.done == longer
    body = """
      await open();
      const { done } = await device.importState(fileOf(given.state, "state.safetensors"));
      const begun = new Promise((resolve) =>
        device.addEventListener("begin", ({ detail }) => resolve(detail.losses)));
      await device.train({ steps: done + 1 });
      return { before: await begun, losses };
    """
    state = (tmp_path / "half" / STATE).read_bytes()
    with serving(world.bundle.folder, world.bank.folder) as url:
        found = browse(url, in_page(body), {"state": encoded(state)})
    stored = TensorFile(tmp_path / "half" / STATE).read()
    assert found["before"] == stored["run.loss"].tolist()
    assert len(found["losses"]) == 1


def test_the_adapter_loads_in_diffusers(world, trained, tmp_path):
    """The page's file is that of edge-dit adapter, byte for byte."""
    body = """
      await open();
      await device.importState(fileOf(given.state, "state.safetensors"));
      return await bytesOf((await device.adapter())["pytorch_lora_weights.safetensors"]);
    """
    state = trained("fused").state
    with serving(world.bundle.folder, world.bank.folder) as url:
        found = browse(url, in_page(body), {"state": encoded(state)})
    written = er.save_lora(run_folder(tmp_path / "run", state), tmp_path / "lora")
    assert written.read_bytes() == decoded(found)
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / written.name).write_bytes(decoded(found))
    pipeline = load_pipeline(world.folder / "model")
    pipeline.load_lora_weights(tmp_path / "web")
    loaded = {
        "transformer." + name.replace(".default_0", ""): value.detach().numpy()
        for name, value in pipeline.transformer.named_parameters()
        if "lora_" in name
    }
    assert difference(TensorFile(written).read(), loaded) == 0
    for adapter in pipeline.transformer.peft_config.values():
        assert adapter.lora_alpha == adapter.r


# ---------------------------------------------------------------- the page

DROPPED = """
const { readFileSync } = await import("node:fs");
const pictures = given.pictures.map(
  (path) => [path.split("/").at(-1), readFileSync(path, "base64")]);
await page.goto(url);
await page.waitForFunction(() => document.body.getAttribute("aria-busy") === "false");
await page.evaluate((pictures) => {
  const transfer = new DataTransfer();
  for (const [name, text] of pictures) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    transfer.items.add(new File([bytes], name, { type: "image/png" }));
  }
  const drop = { dataTransfer: transfer, bubbles: true, cancelable: true };
  document.getElementById("drop").dispatchEvent(new DragEvent("drop", drop));
}, pictures);
await page.click("#pictures-read");
await page.waitForSelector("#start:enabled");
await page.fill("#every", "5");
await page.click("#start");
const done = () => document.getElementById("status").textContent.startsWith("Done");
await page.waitForFunction(done);
await page.selectOption("#prompt", given.prompt);
await page.fill("#seed", "5");
await page.click("#paint-go");
await page.waitForSelector("#paint-go:enabled");
const taken = {};
for (const name of ["pytorch_lora_weights.safetensors", "state.safetensors"]) {
  const [download] = await Promise.all(
    [page.waitForEvent("download"), page.click(`#downloads button[title="${name}"]`)]);
  taken[name] = readFileSync(await download.path(), "base64");
}
return {
  taken,
  faults: (await page.$$eval(".fault", (all) => all.map((each) => each.textContent))).join(""),
  previews: await page.$$eval("#preview-rows figcaption", (all) => all.map((e) => e.textContent)),
  painted: await page.$$eval("#paintings canvas", (all) => all.map((canvas) => Array.from(
    canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data))),
};
"""


def test_from_dropped_pictures_to_a_painted_one(world, tmp_path):
    """The page's bank is the host's, so Python trains and paints the same from the host's."""
    pictures = sorted(map(str, (world.folder / "images").iterdir()))
    with serving(world.bundle.folder) as url:
        prompt = pipelines.LONG.strip()
        found = browse(url, DROPPED, {"pictures": pictures, "prompt": prompt})
    assert found["faults"] == ""
    assert found["previews"] == [prompt, "0 steps", "5 steps", "10 steps"]
    run = run_folder(tmp_path / "run", decoded(found["taken"][STATE]))
    assert er.save_lora(run, tmp_path / "lora").read_bytes() == decoded(
        found["taken"]["pytorch_lora_weights.safetensors"]
    )
    state = TensorFile(run / STATE)
    assert json.loads(state.header.metadata["run"])["bank_sha256"] == world.bank.identity
    losses, session = world.losses("fused")
    tensors = state.read()
    assert loss_difference(losses, tensors["run.loss"].tolist()) < LOSS
    adapter = {k.removeprefix("adapter."): v for k, v in tensors.items() if k[:8] == "adapter."}
    assert difference(session.adapter(), adapter) < ADAPTER
    for painted, of in zip(found["painted"], (None, run), strict=True):
        out = er.paint(world.bundle.folder, prompt, tmp_path / "p.png", run=of, seeds=5)
        with Image.open(out) as picture:
            wanted = np.asarray(picture).astype(int)
        pixels = np.array(painted).reshape(*wanted.shape[:2], 4)[..., :3]
        assert wanted.std() > 5
        assert np.abs(pixels - wanted).max() <= 1
    assert found["painted"][0] != found["painted"][1]


@contextmanager
def plain_server(folder: Path) -> Iterator[str]:
    """Another server: no isolation headers, no ranges."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        extensions_map: ClassVar = {".mjs": "text/javascript", ".html": "text/html"}

        def log_message(self, format: str, *args: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


def with_manifest(world: World, folder: Path, **changes: object) -> None:
    """A copy of the bundle with another manifest."""
    shutil.copytree(world.bundle.folder, folder)
    manifest = read_document(folder / "manifest.json", "", "")
    write_document(folder / "manifest.json", {**manifest, **changes})


OPEN = """
const openBundle = async (address) => {
  await page.fill("#bundle-url", address);
  await page.click("#bundle-open");
  await page.waitForFunction(() => document.body.getAttribute("aria-busy") === "false");
  return page.textContent("#bundle .fault");
};
await page.goto(url);
await page.waitForFunction(() => document.body.getAttribute("aria-busy") === "false");
"""


def test_bundles_that_are_not_whole_newer_or_served_without_headers(world, tmp_path):
    for file in WEB.iterdir():
        (tmp_path / file.name).symlink_to(file)
    for name in ("missing", "damaged", "edited", "ranges"):
        shutil.copytree(world.bundle.folder, tmp_path / name)
    (tmp_path / "missing" / "onnx" / "head.onnx").unlink()
    damaged = tmp_path / "damaged" / "onnx" / "frozen.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    edited = tmp_path / "edited" / "manifest.json"
    edited.write_text(edited.read_text().replace('"rank": 2', '"rank": 3'))
    with_manifest(world, tmp_path / "newer", schema_version=3)
    (tmp_path / "bank").symlink_to(world.bank.folder)
    names = ["missing", "damaged", "edited", "newer", "nowhere"]
    scenario = (
        OPEN
        + """
      const faults = {};
      for (const name of given) faults[name] = await openBundle(`${name}/`);
      faults.notices = await page.textContent("#notices");
      faults.ranges = await openBundle("ranges/");
      await page.click("#bank summary");
      await page.click("#bank-open");
      await page.waitForFunction(() => document.body.getAttribute("aria-busy") === "false");
      faults.bank = await page.textContent("#draws .fault");
      return faults;
    """
    )
    with plain_server(tmp_path) as url:
        found = browse(url, scenario, names)
    assert "onnx/head.onnx is missing" in found["missing"]
    assert "frozen.safetensors: damaged or replaced" in found["damaged"]
    assert "damaged or edited" in found["edited"]
    assert "schema version 3" in found["newer"]
    assert "take a newer page" in found["newer"]
    assert "no manifest.json" in found["nowhere"]
    assert all("remedy:" in found[name] for name in names)
    assert "Cross-Origin-Opener-Policy" in found["notices"]
    assert found["ranges"] == ""  # whole files need no ranges
    assert "Range" in found["bank"]


def test_an_older_bundle_trains(world, tmp_path):
    """Schema 1: the name of one file of weights, not a list; no word of weights and compute."""
    onnx = dict(world.bundle.manifest.targets["onnx"])
    onnx |= {"frozen": onnx["frozen"][0]}
    for key in ("weights", "compute", "loop"):
        del onnx[key]
    with_manifest(world, tmp_path / "bundle", schema_version=1, targets={"onnx": onnx})
    with serving(tmp_path / "bundle", world.bank.folder) as url:
        found = browse(url, FEW, {"layout": "streamed"})
    assert loss_difference(world.losses("streamed")[0], found) < LOSS


def test_no_webgpu_too_little_room_and_a_state_of_another_bundle(world, trained, tmp_path):
    (tmp_path / STATE).write_bytes(trained("fused").state)
    file = TensorFile(tmp_path / STATE)
    run = {
        **json.loads(file.header.metadata["run"]),
        "manifest_sha256": "0" * 64,
        "bundle": "other",
    }
    write_tensors(tmp_path / "other.safetensors", file.read(), {"run": json.dumps(run)})
    scenario = (
        OPEN
        + """
      const found = {};
      await page.setInputFiles("#state-file", given.other);
      await page.waitForFunction(() => document.querySelector("#adapter .fault").textContent);
      found.state = await page.textContent("#adapter .fault");
      await page.setInputFiles("#state-file", given.own);
      const saved = () => document.getElementById("status").textContent.includes("saved");
      await page.waitForFunction(saved);
      found.own = await page.textContent("#status");
      await page.selectOption("#backend", "webgpu");
      found.webgpu = await openBundle("bundle/");
      await page.selectOption("#backend", "wasm");
      await page.click("#kept button[aria-label^=Remove]");
      await page.waitForFunction(() => document.body.getAttribute("aria-busy") === "false");
      const session = await context.newCDPSession(page);
      const origin = new URL(url).origin;
      await session.send("Storage.overrideQuotaForOrigin", { origin, quotaSize: 200_000 });
      found.quota = await openBundle("bundle/");
      await page.reload();
      await page.waitForFunction(() => document.body.getAttribute("aria-busy") === "false");
      found.kept = await page.$$eval("#kept li", (all) => all.map((each) => each.textContent));
      return found;
    """
    )
    given = {"other": str(tmp_path / "other.safetensors"), "own": str(tmp_path / STATE)}
    with serving(world.bundle.folder, world.bank.folder) as url:
        found = browse(url, scenario, given)
    assert "a run of another bundle or bank (other, " in found["state"]
    assert found["own"] == f"{STEPS} of {STEPS} steps are done and saved."
    assert "WebGPU: this browser has none" in found["webgpu"]
    assert "too little room" in found["quota"]
    assert "remedy: remove other bundles" in found["quota"]
    assert found["kept"] == []
