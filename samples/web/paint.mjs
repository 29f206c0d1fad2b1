// Prompt and adapter -> picture: docs/bundle.md, "A picture, step by step".

import { Fault } from "./files.mjs";
import { count, shapeOf, tensor } from "./levels.mjs";
import { NOISE, normal } from "./noise.mjs";
import { roundEven } from "./pictures.mjs";

const f32 = Math.fround;

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
