// Pictures -> bank: docs/bundle.md, "A draw, step by step"; docs/noise.md.

import { Bank, shardName } from "./bundle.mjs";
import { Fault, digestOf, float, pythonJson, sha256, storedFolder } from "./files.mjs";
import { count, shapeOf, tensor } from "./levels.mjs";
import { clean } from "./loop.mjs";
import { CROP, NOISE, normal, seedOf, uniform } from "./noise.mjs";
import { asTensor, cropOf, passing, readPicture } from "./pictures.mjs";
import { tensorPieces } from "./safetensors.mjs";
import { picked } from "./steps.mjs";

const GOLDEN = (5 ** 0.5 - 1) / 2;
const SHARD = 64;
const SHARD_BYTES = 128 * 2 ** 20;
const HALVED = ["entry", "entry_text", "tail_residual", "target", "residual", "residual_text"];
const difference = (a, b) => tensor(a.dims, a.data.map((value, n) => value - b.data[n]));

/**
 * Make the bank of pictures in OPFS, or finish one that was stopped: the same index as Python's,
 * byte for byte.
 * @param files [[name, File]]: pictures, and captions in .txt files of the same stem.
 * @param caption of pictures without one; default the job's.
 * @param report called with draws done, a fraction, and all; true from it stops after a block.
 * @returns the bank, or null if it was stopped.
 */
export async function collect(parts, files, caption, report) {
  refuseChoices(parts);
  const pictures = await readPictures(parts, files, caption ?? parts.facts.caption);
  const { index, text } = await indexOf(parts, pictures);
  const bytes = new TextEncoder().encode(text);
  const identity = await sha256(bytes);
  const folder = await storedFolder("edge-dit", "banks", parts.bundle.identity, identity);
  const metadata = { index: identity };
  if (!(await folder.blob("index.json"))) await folder.write("index.json", bytes);
  const numbers = index.prompts.map((prompt) => parts.prompt(prompt));
  if (!(await folder.blob("prompts.safetensors"))) {
    await folder.write("prompts.safetensors", ...(await tensorPieces(await perPrompt(parts, numbers), metadata)));
  }
  for (let shard = 0; shard * index.shard < index.draws.length; shard++) {
    if (await folder.blob(shardName(shard))) continue;
    const first = shard * index.shard;
    const drawn = index.draws.slice(first, first + index.shard);
    const say = (share) => report(first + share * drawn.length, index.draws.length);
    const made = await makeDraws(parts, pictures, drawn, numbers, say);
    if (!made) return null;
    const named = made.flatMap((draw, n) => Object.entries(draw).map(
      ([name, value]) => [`${first + n}.${name}`, narrowed(name, value, index.dtype)]));
    await folder.write(shardName(shard), ...(await tensorPieces(Object.fromEntries(named), metadata)));
  }
  const bank = await Bank.open(folder, parts.bundle.manifest.plan_hash);
  bank.name = "pictures";
  return bank;
}

/** This page makes draws of one caption a picture, all weighing the same. */
function refuseChoices({ bundle, facts }) {
  const { weighted, masked, prior_share: prior } = bundle.plan;
  const asked = facts.draws ? Object.keys(facts.draws)[0] : prior ? "prior" : masked ? "masks" : weighted ? "weights" : "";
  if (asked) {
    throw new Fault(bundle.name, {
      found: `a job with ${asked}, which this page does not apply to pictures`,
      expected: "a bank", remedy: "make it with edge-dit precompute or edge-dit collect, and choose it here",
    });
  }
}

async function readPictures(parts, files, caption) {
  const texts = new Map(files.filter(([name]) => /\.txt$/i.test(name)).map(([name, file]) => [stem(name), file]));
  const found = [];
  for (const [name, file] of files.filter(([name]) => !/\.txt$/i.test(name)).sort(byName)) {
    const text = (await texts.get(stem(name))?.text()) ?? caption;
    if (!text) throw new Fault(name, { found: "no caption", remedy: "choose a prompt for the pictures" });
    parts.prompt(text);
    const picture = await readPicture(name, file, parts.bundle.plan.s_max);
    found.push({ ...picture, name, caption: clean(text), sha256: await sha256(await file.arrayBuffer()) });
  }
  if (!found.length) throw new Fault("pictures", { found: "none", expected: "at least one picture" });
  return found;
}

const stem = (name) => name.replace(/\.[^.]*$/, "").normalize("NFC");
const byName = ([a], [b]) => (a < b ? -1 : a > b ? 1 : 0);

/** index.json of the bank: its value, and its text with floats as Python writes them. */
async function indexOf(parts, pictures) {
  const { plan, manifest } = parts.bundle;
  const prompts = [...new Set(pictures.map((picture) => picture.caption))];
  const [offset] = uniform(plan.seed, CROP, 1);
  const draws = Array.from({ length: plan.draws }, (_, number) => {
    const image = number % pictures.length;
    const turn = Math.floor(number / pictures.length);
    const sigma = parts.levels.level((offset + turn * GOLDEN + image / pictures.length) % 1);
    const seed = seedOf(plan.seed, number);
    const [u, v] = uniform(seed, CROP, 2);
    const { caption, height, width } = pictures[image];
    return { seed, image, prompt: prompts.indexOf(caption), sigma, u, v, crop: cropOf(plan, sigma, u, v, height, width) };
  });
  const each = parts.bundle.tensors("batch").reduce((sum, { shape }) => sum + 4 * count(shape), 0);
  const bytes = each * Math.ceil(passing(plan) ** 2 / plan.s_min ** 2);
  const index = {
    plan_hash: manifest.plan_hash,
    images: pictures.map(({ name, sha256: digest }) => ({ name, sha256: digest })),
    prompts, draws,
    shard: Math.max(1, Math.min(SHARD, Math.floor(SHARD_BYTES / bytes))),
    dtype: plan.bank_dtype ?? "float32", schema_version: 2,
  };
  const floats = draws.map((d) => ({ ...d, sigma: float(d.sigma), u: float(d.u), v: float(d.v) }));
  const written = { ...index, draws: floats };
  return { index, text: pythonJson({ ...written, sha256: await digestOf(written) }) };
}

function narrowed(name, value, dtype) {
  if (dtype !== "float16" || !HALVED.includes(name.split(".")[0])) return value;
  if (!globalThis.Float16Array) {
    throw new Fault("this browser", { found: "no Float16Array", remedy: "plan with [train] bank_dtype = \"float32\"" });
  }
  if (value.data.some((v) => Math.abs(v) > 65504)) return value;
  return { ...value, type: "float16", data: Float16Array.from(value.data) };
}

async function perPrompt(parts, numbers) {
  const { latents, per_prompt: names } = parts.facts;
  const dims = shapeOf(latents, passing(parts.bundle.plan) / latents.factor);
  const found = {};
  for (const [n, number] of numbers.entries()) {
    const { cond } = await parts.begin(tensor(dims, new Float32Array(count(dims))), 0, number);
    for (const name of names) found[`${n}.cond.${name}`] = cond[`cond.${name}`];
  }
  return found;
}

/** Tensors of draws, which go through the blocks together; null if `say` asks to stop. */
async function makeDraws(parts, pictures, drawn, numbers, say) {
  const { plan } = parts.bundle;
  const starts = [];
  for (const draw of drawn) {
    const { seed, sigma, u, v } = draw;
    const clean = await parts.encode(asTensor(pictures[draw.image]), sigma, [u, v], seed);
    const noise = normal(seed, NOISE, clean.data.length);
    const noised = tensor(clean.dims, parts.levels.noised(clean.data, noise, sigma));
    const begun = await parts.begin(noised, parts.levels.timestep(sigma), numbers[draw.prompt]);
    const target = tensor(clean.dims, parts.levels.target(clean.data, noise));
    starts.push({ ...begun, target, weight: parts.levels.weight(sigma) });
    if (say(starts.length / drawn.length / 2)) return null;
  }
  const trained = trainedBlocks(plan);
  const runs = trained.slice(1).map((after, n) => ({ first: trained[n] + 1, after }))
    .filter(({ first, after }) => after > first);
  const stored = (plan.tail ?? "stored") === "stored";
  const end = trained.at(-1) + 1;
  const last = stored ? plan.layers : Math.max(trained[0], ...runs.map(({ after }) => after));
  const conds = starts.map(({ cond }) => cond);
  const read = parts.bundle.tensors("batch").map(({ name }) => name);
  const kept = [starts.map(({ state }) => state)];
  const wanted = new Set([trained[0], end, plan.layers, ...runs.flatMap(({ first, after }) => [first, after])]);
  const blocks = parts.facts.blocks.slice(0, last);
  for (let n = 0; n < last; n++) {
    kept[n + 1] = await parts.through("base", blocks, n, kept[n], conds);
    if (!wanted.has(n)) delete kept[n];
    if (say(0.5 + (n + 1) / last / 2)) return null;
  }
  return starts.map(({ cond, target, weight }, d) => {
    const batch = { ...kept[trained[0]][d], ...picked(cond, read), target };
    for (const { first, after } of runs) {
      for (const [name, residual] of [["entry", "residual"], ["entry_text", "residual_text"]]) {
        if (kept[after][d][name]) batch[`${residual}.${first}`] = difference(kept[after][d][name], kept[first][d][name]);
      }
    }
    if (stored) batch.tail_residual = difference(kept[plan.layers][d].entry, kept[end][d].entry);
    if (weight !== null) batch.weight = tensor([1], Float32Array.of(weight));
    for (const name of parts.facts.per_prompt) delete batch[`cond.${name}`];
    return plan.window ? windowed(plan, parts.facts.placed ?? [], drawn[d], batch) : batch;
  });
}

/** What a window holds of a whole picture's batch: edge_dit/pictures/window.py. */
function windowed(plan, placed, { u, v }, batch) {
  const [patch, side] = [plan.s_min / plan.multiple, plan.s_max / plan.multiple];
  const place = cropOf({ s_min: patch, s_max: side, multiple: 1 }, 0, u, v, side, side);
  const rows = Array.from({ length: patch }, (_, n) => n);
  const inside = rows.flatMap((row) => rows.map((column) => (place.top + row) * side + place.left + column));
  /** Rows of ``width`` values, those of text before the picture's. */
  const tokens = ({ type, dims, data }, axis) => {
    const width = count(dims.slice(axis + 1));
    const text = dims[axis] - side ** 2;
    const kept = [...Array.from({ length: text }, (_, n) => n), ...inside.map((n) => text + n)];
    const out = new data.constructor(kept.length * width);
    kept.forEach((from, n) => out.set(data.subarray(from * width, (from + 1) * width), n * width));
    return { type, dims: dims.with(axis, kept.length), data: out };
  };
  const latents = ({ type, dims: [one, channels, height, width], data }) => {
    const each = height / side;
    const [high, wide] = [patch * each, patch * each];
    const out = new data.constructor(channels * high * wide);
    for (let row = 0; row < channels * high; row++) {
      const [channel, y] = [Math.floor(row / high), row % high];
      const from = (channel * height + place.top * each + y) * width + place.left * each;
      out.set(data.subarray(from, from + wide), row * wide);
    }
    return { type, dims: [one, channels, high, wide], data: out };
  };
  const named = new Set(placed.map((name) => `cond.${name}`));
  return Object.fromEntries(Object.entries(batch).map(([name, value]) => {
    if (name === "target") return [name, value.dims.length === 4 ? latents(value) : tokens(value, 1)];
    if (["entry", "tail_residual"].includes(name) || name.startsWith("residual.")) return [name, tokens(value, 1)];
    return [name, named.has(name) ? tokens(value, 0) : value];
  }));
}

function trainedBlocks({ layers, head_skip: head, tail_skip: tail, inner_skips: inner = [] }) {
  return Array.from({ length: layers - tail - head }, (_, n) => head + n)
    .filter((n) => !inner.some(([first, end]) => n >= first && n < end));
}
