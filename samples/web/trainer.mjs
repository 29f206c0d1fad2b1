// The training loop over a bank: a draw, a step, AdamW; its state in OPFS; the adapter's files.

import { Fault, canonical, float, storedFolder } from "./files.mjs";
import { TensorFile, tensorPieces } from "./safetensors.mjs";
import { openOptimizer, openStep } from "./steps.mjs";

const STATE = "state.safetensors";
const MOMENTS = ["exp_avg.", "exp_avg_sq."];
/** Those of `MOMENTS` that are kept: without beta1 the first one is the gradient itself. */
const momentsOf = ({ beta1 }) => (beta1 ? MOMENTS : MOMENTS.slice(1));
const DECAY_SHARE = 0.4;
/** Of a run that is smoothed: the adapter's average, sums of gradients, number of their draws. */
const AVERAGE = "ema.";
const SUM = "sum.";
const SUMMED = "summed";
const MOST_SKIPPED = 10;
const METADATA = "lora_adapter_metadata";
/** Steps between two states. A tab can be closed at any moment. */
const SAVE_EVERY = 10;

const COURSES = {
  decay: (step, steps) => Math.min(1, (steps - step) / (DECAY_SHARE * steps)),
  constant: () => 1,
  linear: (step, steps) => (steps - step) / steps,
  cosine: (step, steps) => (1 + Math.cos((Math.PI * step) / steps)) / 2,
};

/** Learning rate of a step, by the plan's schedule and warm-up. */
export const learningRate = (step, steps, lr, { schedule = "decay", warmup = 0 } = {}) =>
  lr * COURSES[schedule](step, steps) * Math.min(1, (step + 1) / (warmup + 1));

const finite = (tensors) => Object.values(tensors).every(({ data }) => data.every(Number.isFinite));

/** A bundle that trains over draws. */
export class Training {
  /**
   * Open a run, and restore its state if there is one. Graphs are loaded by the first step.
   * @param draws a `Bank`.
   * @param options {layout, steps, lr, saveEvery}; the defaults are the plan's.
   * @throws Fault: bundle and state do not fit together, or are damaged.
   */
  static async open(engine, bundle, draws, options = {}) {
    const training = new Training();
    const folder = await storedFolder("edge-dit", "runs", bundle.identity, draws.identity);
    const layout = options.layout || (await savedRun(folder))?.layout || bundle.layout;
    if (!bundle.layouts.includes(layout)) {
      throw new Fault(bundle.name, {
        found: `no layout ${layout}`, expected: bundle.layouts.join(" or "),
      });
    }
    Object.assign(training, {
      engine, bundle, draws, folder, layout, batch: bundle.tensors("batch"),
      kinds: momentsOf(bundle.manifest.optimizer),
      lr: options.lr ?? bundle.manifest.optimizer.lr, saveEvery: options.saveEvery ?? SAVE_EVERY,
      run: runOf(bundle, draws, layout, options.steps ?? bundle.plan.steps),
    });
    const { accumulate = 1 } = bundle.plan;
    if (training.run.steps % accumulate) {
      throw new Fault("steps", {
        found: `${training.run.steps}`, expected: `a multiple of ${accumulate}, the draws of an update`,
      });
    }
    await training.#restore();
    return training;
  }

  /** What a run gives: the adapter's average if the plan wants one, else the adapter. */
  get trained() {
    return this.average ?? this.adapter;
  }

  get done() {
    return this.drawn.length;
  }

  /** Loss of a draw, which becomes that of the gradients in `gradients`. */
  async backward(number) {
    const draw = await this.draws.draw(number);
    for (const { name, shape } of this.batch) {
      if (draw[name]?.dims.join() !== shape.join()) {
        throw new Fault(`draw ${number}, ${name}`, {
          found: draw[name] ? `shape ${draw[name].dims}` : "missing", expected: `shape ${shape}`,
          remedy: "precompute the bank again with the bundle's plan",
        });
      }
    }
    this.step ??= await openStep(this.engine, this.bundle, this.layout);
    const [loss, gradients] = await this.step({ ...draw, ...this.adapter });
    this.gradients = gradients;
    return loss.data[0];
  }

  /** Count the gradients of a draw; if they are the last of a group, update. See docs/bundle.md. */
  async #learn(step) {
    const { accumulate = 1, ema = 0 } = this.bundle.plan;
    if (accumulate > 1) {
      if (this.sum) this.gradients = combined(this.gradients, this.sum, (one, other) => one + other);
      this.summed += 1;
      this.sum = this.summed < accumulate ? this.gradients : null;
      if (this.sum) return;
      this.summed = 0;
      this.gradients = combined(this.gradients, this.gradients, (total) => total / accumulate);
    }
    await this.#update(step);
    if (!ema) return;
    const rest = Math.fround(1 - Math.min(ema, (1 + this.updates) / (10 + this.updates)));
    this.average = combined(this.average, this.adapter, (mean, now) =>
      mean + Math.fround(rest * Math.fround(now - mean)));
  }

  async #update(step) {
    const lr = learningRate(step, this.run.steps, this.lr, this.bundle.plan);
    const named = {
      lr: { type: "float32", dims: [1], data: Float32Array.of(lr) },
      step: { type: "float32", dims: [1], data: Float32Array.of(this.updates) },
      ...this.adapter, ...prefixed("grad.", this.gradients),
      ...this.#namedMoments(),
    };
    this.optimize ??= await openOptimizer(this.engine, this.bundle);
    const found = await this.optimize(named);
    this.adapter = this.#taken(found, "");
    this.moments = this.kinds.map((prefix) => this.#taken(found, prefix));
    this.updates += 1;
  }

  /**
   * Train until all steps are done or `stopped()` is true; the state is saved on the way and last.
   * @param onStep called with {step, draw, loss} after each step; loss is NaN where it was skipped.
   */
  async go(stopped = () => false, onStep = async () => {}) {
    while (this.done < this.run.steps && !stopped()) {
      const step = this.done;
      const number = this.draws.number(step, this.bundle.plan.seed);
      let loss = await this.backward(number);
      if (Number.isFinite(loss) && finite(this.gradients)) await this.#learn(step);
      else loss = NaN;
      this.drawn.push(number);
      this.losses.push(loss);
      this.#checkSkipped(number);
      await onStep({ step, draw: number, loss });
      if (this.done % this.saveEvery === 0) await this.save();
    }
    await this.save();
  }

  #checkSkipped(number) {
    const last = this.losses.slice(-MOST_SKIPPED);
    if (last.length === MOST_SKIPPED && last.every(Number.isNaN)) {
      throw new Fault("training", {
        found: `${MOST_SKIPPED} steps in a row without finite loss and gradients, the last on draw ${number}`,
        expected: "numbers; the last saved state is kept",
        remedy: "plan with a lower lr; if it is always the same draws, precompute again",
      });
    }
  }

  // -------------------------------------------------------------- state

  /** Write adapter, moments, losses and what they belong to; as edge-dit train's state.safetensors. */
  async save() {
    const tensors = {
      ...prefixed("adapter.", this.adapter), ...this.#namedMoments(),
      ...prefixed(AVERAGE, this.average ?? {}),
      ...prefixed(SUM, this.sum ?? {}),
    };
    if (!finite(tensors)) {
      throw new Fault("training", {
        found: `diverged before step ${this.done}: the adapter is not finite`,
        expected: "numbers; the last saved state is kept", remedy: "plan with a lower lr",
      });
    }
    const n = this.done;
    tensors.step = { type: "int64", dims: [1], data: BigInt64Array.of(BigInt(this.updates)) };
    if (this.summed) {
      tensors[SUMMED] = { type: "int64", dims: [1], data: BigInt64Array.of(BigInt(this.summed)) };
    }
    tensors["run.draw"] = { type: "int64", dims: [n], data: BigInt64Array.from(this.drawn, BigInt) };
    tensors["run.loss"] = { type: "float64", dims: [n], data: Float64Array.from(this.losses) };
    const run = canonical({ ...this.run, done: n });
    await this.folder.write(STATE, ...(await tensorPieces(tensors, { run })));
  }

  async #restore() {
    const blob = await this.folder.blob(STATE);
    if (blob) return this.#take(await TensorFile.open(blob, STATE, "start a new run"));
    const initial = await (await this.bundle.adapter()).read();
    this.adapter = this.#taken(initial, "");
    const zeros = () => Object.fromEntries(Object.entries(this.adapter).map(
      ([name, { type, dims, data }]) => [name, { type, dims, data: new Float32Array(data.length) }]));
    this.moments = this.kinds.map(zeros);
    this.average = this.bundle.plan.ema ? this.adapter : null;
    Object.assign(this, { updates: 0, drawn: [], losses: [], sum: null, summed: 0 });
  }

  async #take(file) {
    const saved = readRun(file);
    const keys = ["manifest_sha256", "bank_sha256", "target", "layout"];
    if (keys.some((key) => saved[key] !== this.run[key])) {
      throw new Fault(STATE, {
        found: `a run of ${saved.target}, ${saved.layout}, of ${saved.bundle} and ${saved.bank}`,
        expected: `one of ${this.run.layout}, of ${this.run.bundle} and ${this.run.bank}`,
        remedy: "open the bundle and bank it was started with, or start a new run",
      });
    }
    const read = await file.read();
    this.adapter = this.#taken(read, "adapter.");
    this.moments = this.kinds.map((prefix) => this.#taken(read, prefix));
    this.average = this.bundle.plan.ema ? this.#taken(read, AVERAGE) : null;
    this.summed = SUMMED in read ? Number(read[SUMMED].data[0]) : 0;
    this.sum = this.summed ? this.#taken(read, SUM) : null;
    this.updates = Number(read.step.data[0]);
    this.drawn = Array.from(read["run.draw"].data, Number);
    this.losses = Array.from(read["run.loss"].data);
  }

  #namedMoments() {
    return Object.assign({}, ...this.kinds.map((kind, n) => prefixed(kind, this.moments[n])));
  }

  /** LoRA tensors by name, those of `tensors` after a prefix, checked. */
  #taken(tensors, prefix) {
    return Object.fromEntries(this.bundle.tensors("lora").map(({ name, shape }) => {
      const found = tensors[prefix + name];
      if (found?.dims.join() !== shape.join() || found.type !== "float32") {
        throw new Fault(prefix + name, {
          found: found ? `${found.type} ${found.dims}` : "missing", expected: `float32 ${shape}`,
          remedy: "use the files of a run with this bundle",
        });
      }
      return [name, found];
    }));
  }

  // -------------------------------------------------------------- files to take away

  /** {name: Blob}: adapter.safetensors, and what diffusers' load_lora_weights reads. */
  async files() {
    const { metadata } = await this.bundle.adapter();
    const entries = Object.entries(metadata).filter(([key]) => !key.startsWith("sha256"));
    const own = Object.fromEntries(entries);
    const files = { "adapter.safetensors": await tensorPieces(this.trained, own) };
    if (this.bundle.manifest.family !== "pixart") {  // its pipeline loads no LoRA
      const { rank, alpha } = this.bundle.plan;
      files["pytorch_lora_weights.safetensors"] = await tensorPieces(
        alpha === rank ? this.trained : this.#scaled(alpha / rank), exportedHeader(own, rank, alpha));
    }
    return Object.fromEntries(Object.entries(files).map(([name, pieces]) => [name, new Blob(pieces)]));
  }

  #scaled(scale) {
    return Object.fromEntries(Object.entries(this.trained).map(([name, tensor]) => [name,
      name.includes(".lora_B.") ? { ...tensor, data: tensor.data.map((v) => v * scale) } : tensor]));
  }
}

/** The header of a file whose B holds alpha / rank: alpha is the rank there. */
function exportedHeader(own, rank, alpha) {
  const plain = (value) => canonical(float(value));
  const config = own[METADATA].replace(/("transformer\.lora_alpha": )[^,\s]+/, `$1${plain(rank)}`);
  const note = `{"alpha": ${plain(alpha)}, "format": "diffusers", "rank": ${rank}}`;
  return { ...own, [METADATA]: config, edge_dit: note };
}

/** Tensors of the same names, value by value. */
const combined = (one, other, how) => Object.fromEntries(Object.entries(one).map(
  ([name, { type, dims, data }]) => [name, {
    type, dims, data: Float32Array.from(data, (value, n) => how(value, other[name].data[n])),
  }]));

const prefixed = (prefix, named) =>
  Object.fromEntries(Object.entries(named).map(([name, value]) => [prefix + name, value]));

function runOf(bundle, draws, layout, steps) {
  const { plan, manifest } = bundle;
  return {
    bundle: bundle.name, bank: draws.name, target: "onnx", layout,
    manifest_sha256: bundle.identity, bank_sha256: draws.identity, family: manifest.family,
    base_model: plan.model_name, rank: plan.rank, alpha: plan.alpha, steps, done: 0,
  };
}

function readRun(file) {
  try {
    return JSON.parse(file.metadata.run);
  } catch {
    throw new Fault(file.where, { found: "not a state of edge-dit", remedy: "start a new run" });
  }
}

async function savedRun(folder) {
  const blob = await folder.blob(STATE);
  return blob && readRun(await TensorFile.open(blob, STATE, "start a new run"));
}

/** How far a run of bundle and bank is: the entry in its state, or null. */
export const progressOf = async (bundle, draws) =>
  savedRun(await storedFolder("edge-dit", "runs", bundle.identity, draws.identity));

/** Start again: remove the state of a run. */
export async function startAgain(bundle, draws) {
  const folder = await storedFolder("edge-dit", "runs", bundle.identity, draws.identity);
  if (await folder.blob(STATE)) await folder.remove(STATE);
}

/** Continue from a state.safetensors of edge-dit train or of another browser. */
export async function importState(bundle, draws, blob) {
  const run = readRun(await TensorFile.open(blob, "state file", "pick another file"));
  if (run.manifest_sha256 !== bundle.identity || run.bank_sha256 !== draws.identity) {
    throw new Fault("state file", {
      found: `a run of another bundle or bank (${run.bundle}, ${run.bank})`,
      expected: `one of ${bundle.name} and ${draws.name}`,
      remedy: "open the bundle and bank it was started with, or start a new run",
    });
  }
  const folder = await storedFolder("edge-dit", "runs", bundle.identity, draws.identity);
  await folder.write(STATE, blob);
  return run;
}
