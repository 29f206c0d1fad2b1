// The graphs of the loop: docs/bundle.md, "The loop's parts".

import { Fault } from "./files.mjs";
import { levelsOf, rawLatents, scaledLatents, tensor } from "./levels.mjs";
import { POSTERIOR, normal } from "./noise.mjs";
import { tiled } from "./pictures.mjs";
import { TensorFile } from "./safetensors.mjs";
import { Weights, mapped, picked, withoutPrefix } from "./steps.mjs";

const STATE = ["entry", "entry_text"];
const f32 = Math.fround;

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
      const cond = { ...conds[n], ...mapped(block.cond ?? {}, conds[n]) };
      const made = await program.run({ ...cond, ...state, ...weights, ...lora });
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
export const clean = (text) => text.replace(/\r\n?/g, "\n").normalize("NFC").trim();
