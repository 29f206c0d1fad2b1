// The loop's parts: pictures -> bank, prompt and adapter -> picture. docs/bundle.md, "The loop's
// parts", docs/noise.md.

import { Bank, shardName } from "./bundle.mjs";
import { Fault, digestOf, float, pythonJson, sha256, storedFolder } from "./files.mjs";
import { CROP, NOISE, POSTERIOR, normal, seedOf, uniform } from "./noise.mjs";
import { asTensor, cropOf, readPicture, roundEven, tiled } from "./pictures.mjs";
import { TensorFile, tensorPieces } from "./safetensors.mjs";
import { Weights, mapped, picked, withoutPrefix } from "./steps.mjs";

const GOLDEN = (5 ** 0.5 - 1) / 2;
const SHARD = 64;
const SHARD_BYTES = 128 * 2 ** 20;
const HALVED = ["entry", "entry_text", "tail_residual", "target", "residual", "residual_text"];
const STATE = ["entry", "entry_text"];
const f32 = Math.fround;

const tensor = (dims, data) => ({ type: "float32", dims, data });
const count = (dims) => dims.reduce((a, b) => a * b, 1);
const difference = (a, b) => tensor(a.dims, a.data.map((value, n) => value - b.data[n]));

/** The graphs of the loop, opened when they are first used. */
export class Parts {
  /** @throws Fault: the bundle lacks them. */
  static async open(engine, bundle) {
    if (!bundle.loop) {
      throw new Fault(bundle.name, {
        found: "no parts of the loop", expected: "a bundle that reads pictures and paints by itself",
        remedy: "put loop = true under [export] in the job and export it again, or open a bank",
      });
    }
    const parts = Object.assign(new Parts(), { engine, bundle, facts: bundle.loop, programs: new Map() });
    parts.weights = await Weights.open(bundle);
    parts.tables = await TensorFile.open(await bundle.file("loop.safetensors"), "loop.safetensors");
    parts.levels = levelsOf(bundle.loop.levels, (await parts.tables.read(["levels"])).levels.data);
    return parts;
  }

  /** Number of a prompt that is not a negative one. */
  prompt(text) {
    const number = this.facts.prompts.findIndex(
      (known, n) => known === clean(text) && !this.facts.negatives.includes(n));
    if (number >= 0) return number;
    const known = this.facts.prompts.filter((_, n) => !this.facts.negatives.includes(n));
    throw new Fault(this.bundle.name, {
      found: `no prompt "${text}"`, expected: `one encoded at export: ${known.slice(0, 5).join("; ")}`,
      remedy: "add it to [export] prompts and export again",
    });
  }

  async #program(file) {
    if (!this.programs.has(file)) {
      const names = this.facts.graphs[file] ?? this.facts.block_graphs[file];
      this.programs.set(file, await this.engine.program(this.bundle, file, names));
    }
    return this.programs.get(file);
  }

  async #part(file, given) {
    const weights = await this.weights.read(this.facts.graphs[file].weights);
    return (await this.#program(file)).run({ ...given, ...weights });
  }

  /** {state, cond} before the first block; `whole`: of a picture, not of a patch. */
  async begin(latents, timestep, prompt, whole = false) {
    const prefix = `prompt.${prompt}.`;
    const keys = [...this.tables.places.keys()].filter((key) => key.startsWith(prefix));
    const encoded = Object.entries(await this.tables.read(keys))
      .map(([key, value]) => [`prompt.${key.slice(prefix.length)}`, value]);
    const scaled = tensor([1], Float32Array.of(timestep * this.facts.timestep_factor));
    const made = await this.#part(whole ? "paint.begin.onnx" : "begin.onnx",
      { latents, timestep: scaled, ...Object.fromEntries(encoded) });
    const conds = Object.entries(made).filter(([name]) => name.startsWith("cond."));
    return { state: picked(made, STATE), cond: Object.fromEntries(conds) };
  }

  /** States after a block; its weights are read once, those of the next one meanwhile. */
  async through(kind, blocks, number, states, conds, adapter = {}) {
    const block = blocks[number];
    const weights = await this.weights.inTurn(block.weights, blocks[number + 1]?.weights);
    const program = await this.#program(`${kind}.${block.kind}.forward.onnx`);
    const lora = mapped(block.lora, adapter);
    const after = [];
    for (const [n, state] of states.entries()) {
      const made = await program.run({ ...conds[n], ...state, ...weights, ...lora });
      after.push(withoutPrefix(made, "new."));
    }
    return after;
  }

  /** Clean latents of a patch, as the transformer takes them. */
  async encode(image, sigma, uv, seed) {
    this.sampler ??= await this.engine.program(this.bundle, "patch_sampler.onnx",
      this.bundle.facts.graphs["patch_sampler.onnx"]);
    const { patch } = await this.sampler.run({
      image, sigma: tensor([1], Float32Array.of(sigma)), uv: tensor([2], Float32Array.from(uv)),
    });
    const { factor, samples } = this.facts.latents;
    const names = samples ? ["mean", "deviation"] : ["mean"];
    const run = async (pixels) => {
      const made = await this.#part("vae_encoder.onnx", { pixels });
      return names.map((name) => made[name]);
    };
    const [mean, deviation] = await tiled(patch, run, this.facts.tile, factor, [1, factor]);
    const noise = deviation && normal(seed, POSTERIOR, mean.data.length);
    const raw = noise ? mean.data.map((v, n) => v + f32(deviation.data[n] * noise[n])) : mean.data;
    return scaledLatents(this.facts.latents, tensor(mean.dims, raw));
  }

  /** Pixels [1, 3, side, side] of clean latents. */
  async decode(latents, side) {
    const { factor } = this.facts.latents;
    const run = async (part) => [(await this.#part("vae_decoder.onnx", { latents: part })).pixels];
    const raw = rawLatents(this.facts.latents, latents, side / factor);
    return (await tiled(raw, run, this.facts.tile / factor, 1, [factor, 1]))[0];
  }

  async predict(state, cond) {
    return (await this.#part("predict.onnx", { entry: state.entry, ...cond })).prediction;
  }
}

/** A caption as it is compared: lines kept, letters composed, blanks cut off both ends. */
const clean = (text) => text.replace(/\r\n?/g, "\n").normalize("NFC").trim();

// ---------------------------------------------------------------- latents and noise levels

function shapeOf({ scale, packed }, side) {
  return packed ? [1, (side * side) / 4, scale.length * 4] : [1, scale.length, side, side];
}

/** Call visit(place in [1, C, h, w], place in tokens of 2 x 2, channel). */
function eachLatent(channels, height, width, packed, visit) {
  let place = 0;
  for (let c = 0; c < channels; c++) {
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++, place++) {
        const token = (y >> 1) * (width >> 1) + (x >> 1);
        visit(place, packed ? (token * channels + c) * 4 + (y & 1) * 2 + (x & 1) : place, c);
      }
    }
  }
}

function scaledLatents(facts, { dims: [, channels, height, width], data }) {
  const found = new Float32Array(data.length);
  eachLatent(channels, height, width, facts.packed, (raw, place, c) => {
    found[place] = f32(data[raw] - f32(facts.shift[c])) * f32(facts.scale[c]);
  });
  return tensor(facts.packed ? [1, (height * width) / 4, channels * 4] : [1, channels, height, width], found);
}

function rawLatents(facts, { data }, side) {
  const found = new Float32Array(data.length);
  eachLatent(facts.scale.length, side, side, facts.packed, (raw, place, c) => {
    found[raw] = f32(data[place] / f32(facts.scale[c])) + f32(facts.shift[c]);
  });
  return tensor([1, facts.scale.length, side, side], found);
}

const mixed = (a, x, b, y) => x.map((value, n) => f32(f32(a) * value) + f32(f32(b) * y[n]));

/** What the model predicts, and at which noise levels. */
function levelsOf({ kind, logit_normal: logit, precondition }, table) {
  if (kind === "noise") {
    const timestep = (sigma) => Math.max(0, roundEven(sigma * table.length) - 1);
    return {
      level: (share) => f32((Math.floor(share * table.length) + 1) / table.length),
      timestep,
      noised(clean, noise, sigma) {
        const alpha = table[timestep(sigma)];
        return mixed(alpha ** 0.5, clean, (1 - alpha) ** 0.5, noise);
      },
      target: (clean, noise) => noise,
      weight: () => null,
    };
  }
  const sigmas = Float32Array.from(table);
  return {
    level(share) {
      const s = logit ? 1 / (1 + Math.exp(-normalQuantile(Math.min(Math.max(share, 1e-6), 1 - 1e-6)))) : share;
      return sigmas[Math.floor(s * sigmas.length)];
    },
    timestep: (sigma) => sigma * sigmas.length,
    noised: (clean, noise, sigma) => mixed(1 - sigma, clean, sigma, noise),
    target: (clean, noise) => noise.map((value, n) => value - clean[n]),
    weight: (sigma) => (precondition ? sigma ** 2 : null),
  };
}

const polynomial = (coefficients, x) => coefficients.reduceRight((sum, c) => sum * x + c, 0);

/** The standard normal quantile: Wichura, algorithm AS 241, PPND16 (Applied Statistics 37, 1988). */
function normalQuantile(p) {
  const q = p - 0.5;
  if (Math.abs(q) <= 0.425) {
    const r = 0.180625 - q * q;
    return q * polynomial([3.3871328727963666080, 1.3314166789178437745e2, 1.9715909503065514427e3,
      1.3731693765509461125e4, 4.5921953931549871457e4, 6.7265770927008700853e4,
      3.3430575583588128105e4, 2.5090809287301226727e3], r)
      / polynomial([1, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
        2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4,
        5.2264952788528545610e3], r);
  }
  const r = Math.sqrt(-Math.log(Math.min(p, 1 - p)));
  const x = r <= 5
    ? polynomial([1.42343711074968357734, 4.63033784615654529590, 5.76949722146069140550,
      3.64784832476320460504, 1.27045825245236838258, 2.41780725177450611770e-1,
      2.27238449892691845833e-2, 7.74545014278341407640e-4], r - 1.6)
      / polynomial([1, 2.05319162663775882187, 1.67638483018380384940, 6.89767334985100004550e-1,
        1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4,
        1.05075007164441684324e-9], r - 1.6)
    : polynomial([6.65790464350110377720, 5.46378491116411436990, 1.78482653991729133580,
      2.96560571828504891230e-1, 2.65321895265761230930e-2, 1.24266094738807843860e-3,
      2.71155556874348757815e-5, 2.01033439929228813265e-7], r - 5)
      / polynomial([1, 5.99832206555887937690e-1, 1.36929880922735805310e-1,
        1.48753612908506148525e-2, 7.86869131145613259100e-4, 1.84631831751005468180e-5,
        1.42151175831644588870e-7, 2.04426310338993978564e-15], r - 5);
  return q < 0 ? -x : x;
}

// ---------------------------------------------------------------- pictures -> bank

/**
 * Make the bank of pictures in OPFS, or finish one that was stopped: the same index as Python's,
 * byte for byte.
 * @param files [[name, File]]: pictures, and captions in .txt files of the same stem.
 * @param caption of pictures without one; default the job's.
 * @param report called with draws done, a fraction, and all; true from it stops after a block.
 * @returns the bank, or null if it was stopped.
 */
export async function collect(parts, files, caption, report) {
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
  const bytes = parts.bundle.tensors("batch").reduce((sum, { shape }) => sum + 4 * count(shape), 0);
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
  const dims = shapeOf(latents, parts.bundle.plan.s_min / latents.factor);
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
  const kept = [starts.map(({ state }) => state)];
  const wanted = new Set([trained[0], end, plan.layers, ...runs.flatMap(({ first, after }) => [first, after])]);
  const blocks = parts.facts.blocks.slice(0, last);
  for (let n = 0; n < last; n++) {
    kept[n + 1] = await parts.through("base", blocks, n, kept[n], conds);
    if (!wanted.has(n)) delete kept[n];
    if (say(0.5 + (n + 1) / last / 2)) return null;
  }
  return starts.map(({ cond, target, weight }, d) => {
    const batch = { ...kept[trained[0]][d], ...cond, target };
    for (const { first, after } of runs) {
      for (const [name, residual] of [["entry", "residual"], ["entry_text", "residual_text"]]) {
        if (kept[after][d][name]) batch[`${residual}.${first}`] = difference(kept[after][d][name], kept[first][d][name]);
      }
    }
    if (stored) batch.tail_residual = difference(kept[plan.layers][d].entry, kept[end][d].entry);
    if (weight !== null) batch.weight = tensor([1], Float32Array.of(weight));
    for (const name of parts.facts.per_prompt) delete batch[`cond.${name}`];
    return batch;
  });
}

function trainedBlocks({ layers, head_skip: head, tail_skip: tail, inner_skips: inner = [] }) {
  return Array.from({ length: layers - tail - head }, (_, n) => head + n)
    .filter((n) => !inner.some(([first, end]) => n >= first && n < end));
}

// ---------------------------------------------------------------- prompt -> picture

/**
 * Paint a picture by the scheduler's steps.
 * @param asked {prompt: number, seed, negative: number or undefined}.
 * @param report called after each step with steps done and all; true from it stops.
 * @returns {side, pixels: Uint8ClampedArray of RGBA}, or null if it was stopped.
 * @throws Fault: the bundle cannot paint.
 */
export async function paint(parts, { prompt, seed = 0, negative }, adapter, report = () => false) {
  const { painting, latents: facts, no_painting: reason } = parts.facts;
  if (!painting) {
    throw new Fault(parts.bundle.name, { found: `it cannot paint: ${reason}`, remedy: "paint with diffusers" });
  }
  const dims = shapeOf(facts, painting.side / facts.factor);
  const prompts = painting.guidance === "none" ? [prompt] : [prompt, negative ?? parts.facts.negative];
  const latents = [tensor(dims, normal(seed, NOISE, count(dims)))];
  const predictions = [];
  for (const [n, step] of painting.steps.entries()) {
    const found = await predictionsOf(parts, latents[n], step.timestep, prompts, adapter);
    predictions.push(guided(painting, ...found));
    latents.push(combined(step, latents, predictions));
    if (report(n + 1, painting.steps.length)) return null;
  }
  return asPicture(await parts.decode(latents.at(-1), painting.side));
}

async function predictionsOf(parts, latents, timestep, prompts, adapter) {
  const begun = [];
  for (const prompt of prompts) begun.push(await parts.begin(latents, timestep, prompt, true));
  const conds = begun.map(({ cond }) => cond);
  const blocks = parts.facts.paint_blocks;
  let states = begun.map(({ state }) => state);
  for (let n = 0; n < blocks.length; n++) {
    states = await parts.through("paint", blocks, n, states, conds, adapter);
  }
  const found = [];
  for (const [n, state] of states.entries()) found.push(await parts.predict(state, conds[n]));
  return found;
}

function guided({ guidance, scale }, wanted, against) {
  if (!against) return wanted;
  const data = wanted.data.map((p, n) => against.data[n] + f32(f32(scale) * f32(p - against.data[n])));
  if (guidance === "rescaled") {
    const row = wanted.dims.at(-1);
    const norm = (values, start) => Math.hypot(...values.subarray(start, start + row));
    for (let start = 0; start < data.length; start += row) {
      const factor = norm(wanted.data, start) / norm(data, start);
      for (let n = start; n < start + row; n++) data[n] *= factor;
    }
  }
  return tensor(wanted.dims, data);
}

function combined(step, latents, predictions) {
  const terms = [
    ...Object.entries(step.latents).map(([n, factor]) => [f32(factor), latents[n].data]),
    ...Object.entries(step.predictions).map(([n, factor]) => [f32(factor), predictions[n].data]),
  ];
  const sum = new Float32Array(latents[0].data.length);
  for (const [factor, data] of terms) for (let n = 0; n < sum.length; n++) sum[n] += f32(factor * data[n]);
  return tensor(latents[0].dims, sum);
}

function asPicture({ dims: [, , height, side], data }) {
  const area = height * side;
  const pixels = new Uint8ClampedArray(area * 4).fill(255);
  for (let c = 0; c < 3; c++) {
    for (let n = 0; n < area; n++) {
      const share = Math.min(1, Math.max(0, f32(data[c * area + n] / 2) + 0.5));
      pixels[4 * n + c] = roundEven(f32(f32(share) * 255));
    }
  }
  return { side, pixels };
}
