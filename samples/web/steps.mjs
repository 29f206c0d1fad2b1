// A training step on onnxruntime-web: the whole step in one graph, or block by block.

import { Fault } from "./files.mjs";
import { STEP_FILES } from "./bundle.mjs";
import { TensorFile } from "./safetensors.mjs";

const STATE = ["entry", "entry_text"];
const HEAD = "head.onnx";
const OPTIMIZER = "optimizer.onnx";
const DIST = new URL("./node_modules/onnxruntime-web/dist/", import.meta.url).href;
/** An ONNX model: y = MatMulInteger(x, w); x uint8 [1, 4], w int8 [4, 1], y int32 [1, 1]. */
const PROBE = "CAoSADpcChgKAXgKAXcSAXkiDU1hdE11bEludGVnZXISAWdaEwoBeBIOCgwIAhIICgIIAQoCCARaEwoBdxIOCgwIAx"
  + "IICgIIBAoCCAFiEwoBeRIOCgwIBhIICgIIAQoCCAFCBAoAEBI=";
const OPTIONS = {
  enableMemPattern: false,
  logSeverityLevel: 3,
  extra: {
    session: { disable_prepacking: "1" },
    // As the Python session: the first would keep a turned copy of every int8 weight, the second a
    // value that is computed twice.
    optimization: { disable_specified_optimizers: "ConstantFolding;CommonSubexpressionElimination" },
  },
};

/** onnxruntime-web with a backend: "wasm", or "webgpu" for steps and the loop's parts. */
export class Engine {
  /**
   * @param backend "wasm" or "webgpu".
   * @param threads of wasm; default half of the processor's, at most 4.
   * @throws Fault: WebGPU was asked for and is not there.
   */
  static async start({ backend = "wasm", threads = 0 } = {}) {
    const engine = new Engine();
    if (backend === "webgpu" && !(await navigator.gpu?.requestAdapter())) {
      throw new Fault("WebGPU", {
        found: "this browser has none, or no adapter for it", remedy: "choose the processor (wasm)",
      });
    }
    engine.backend = backend;
    engine.ort = await import(`${DIST}ort.${backend}.min.mjs`).catch(() => {
      throw new Fault(DIST, { found: "onnxruntime-web is not there", remedy: "npm ci in samples/web" });
    });
    const { wasm } = engine.ort.env;
    wasm.wasmPaths = DIST;
    wasm.numThreads = self.crossOriginIsolated
      ? threads || Math.min(4, Math.ceil(navigator.hardwareConcurrency / 2)) : 1;
    engine.ort.env.logLevel = "error";
    return engine;
  }

  /**
   * A graph of a bundle.
   * @param names {inputs, outputs} in the manifest.
   * @param frozen files of frozen weights that the graph itself refers to.
   */
  async program(bundle, file, names, { frozen = [], backend = this.backend } = {}) {
    const beside = [...frozen, `${file}.data`].filter((name) => bundle.has(name));
    const externalData = await Promise.all(beside.map(
      async (path) => ({ path, data: new Uint8Array(await (await bundle.file(path)).arrayBuffer()) })));
    const model = new Uint8Array(await (await bundle.file(file)).arrayBuffer());
    try {
      const options = { ...OPTIONS, executionProviders: [backend], externalData };
      const session = await this.ort.InferenceSession.create(model, options);
      return new Program(this.ort, session, names);
    } catch (error) {
      throw new Fault(`${bundle.name}/onnx/${file}`, {
        found: `onnxruntime-web cannot load it: ${error.message ?? error}`,
        remedy: "if memory ran out, take the streamed layout or weights in int8; or export it again",
      });
    }
  }

  /** Whether sums of int8 products are exact; 16-bit sums of some processors are not. */
  async exactProducts() {
    const model = Uint8Array.from(atob(PROBE), (c) => c.charCodeAt(0));
    const session = await this.ort.InferenceSession.create(model, { executionProviders: ["wasm"] });
    const { y } = await session.run({
      x: new this.ort.Tensor("uint8", new Uint8Array(4).fill(255), [1, 4]),
      w: new this.ort.Tensor("int8", new Int8Array(4).fill(127), [4, 1]),
    });
    await session.release();
    return y.data[0] === 4 * 255 * 127;
  }
}

class Program {
  constructor(ort, session, { inputs, outputs }) {
    Object.assign(this, { ort, session, inputs, outputs });
  }

  /** Results by name, of those of `named` that the graph reads. */
  async run(named) {
    const feeds = {};
    for (const name of this.inputs) {
      const { type, data, dims } = named[name];
      feeds[name] = new this.ort.Tensor(type, data, dims);
    }
    const results = await this.session.run(feeds, this.outputs);
    return Object.fromEntries(
      this.outputs.map((n) => [n, { type: results[n].type, dims: results[n].dims, data: results[n].data }]));
  }

  release() {
    return this.session.release();
  }
}

/** The files of frozen weights. A request for the next tensors starts their read at once. */
export class Weights {
  static async open(bundle) {
    const weights = new Weights();
    weights.files = await Promise.all(bundle.frozen.map(async (name) =>
      TensorFile.open(await bundle.file(name), `${bundle.name}/onnx/${name}`)));
    return weights;
  }

  has(key) {
    return this.files.some((file) => file.places.has(key));
  }

  /** Tensors by local name; `keys`: local name -> key in the files. */
  async read(keys) {
    const found = {};
    await Promise.all(this.files.map(async (file) => {
      const here = Object.entries(keys).filter(([, key]) => file.places.has(key));
      const read = await file.read(new Set(here.map(([, key]) => key)), false);  // checked when copied
      for (const [local, key] of here) found[local] = read[key];
    }));
    const missing = Object.keys(keys).find((local) => !(local in found));
    if (missing) throw new Fault(keys[missing], { found: "not in the files of frozen weights" });
    return found;
  }

  /** As `read`, and start to read those of `next` for the call after this one. */
  async inTurn(keys, next) {
    const now = this.ahead?.keys === keys ? this.ahead.tensors : this.read(keys);
    this.ahead = next && { keys: next, tensors: next === keys ? now : this.read(next) };
    this.ahead?.tensors.catch(() => {});  // thrown where it is awaited
    return now;
  }
}

/**
 * What computes loss and gradients: (tensors of batch and LoRA by name) -> [loss, gradients by LoRA
 * name], each {type, dims, data}.
 * @throws Fault: graphs cannot be loaded, or int8 products would be wrong here.
 */
export async function openStep(engine, bundle, layout) {
  if (bundle.facts.compute?.startsWith("int8") && !(await engine.exactProducts())) {
    throw new Fault(bundle.name, {
      found: "products in int8, which this browser adds up in 16 bits",
      remedy: 'export with [export] compute = "float32"',
    });
  }
  return layout === "streamed" ? streamedStep(engine, bundle) : wholeStep(engine, bundle, layout);
}

async function wholeStep(engine, bundle, layout) {
  const file = STEP_FILES[layout];
  const names = bundle.facts.graphs[file];
  const program = await engine.program(bundle, file, names, { frozen: bundle.frozen });
  return async (named) => {
    const { loss, ...gradients } = await program.run(named);
    return [loss, withoutPrefix(gradients, "grad.")];
  };
}

async function streamedStep(engine, bundle) {
  const { graphs, blocks, forward_only: only = [] } = bundle.facts.streamed;
  const weights = await Weights.open(bundle);
  const programs = {};
  for (const file of Object.keys(graphs)) {
    programs[file] = await engine.program(bundle, file, graphs[file]);
  }
  const own = graphs[HEAD].inputs.filter((name) => weights.has(name));
  const head = await weights.read(Object.fromEntries(own.map((name) => [name, name])));
  const order = [...blocks, ...only, ...blocks.toReversed()];
  let place = 0;
  const run = async (block, direction, named) => {
    place = (place + 1) % order.length;
    const tensors = await weights.inTurn(block.weights, order[place].weights);
    const lora = mapped(block.lora, named);
    return programs[`block.${block.kind}.${direction}.onnx`].run({
      ...named, ...mapped(block.cond ?? {}, named), ...tensors, ...lora,
    });
  };
  return async (named) => {
    place = 0;
    const borders = [];
    let state = picked(named, STATE);
    for (const block of blocks) {
      for (const [name, residual] of Object.entries(block.residual ?? {})) {
        state = { ...state, [name]: sum(state[name], named[residual]) };
      }
      borders.push(state);
      state = withoutPrefix(await run(block, "forward", { ...named, ...state }), "new.");
    }
    for (const block of only) {
      state = withoutPrefix(await run(block, "forward", { ...named, ...state }), "new.");
    }
    const made = await programs[HEAD].run({ ...named, ...state, ...head });
    let given = { "grad.entry": made["new.grad.entry"] };
    const gradients = {};
    for (const block of blocks.toReversed()) {
      const results = await run(block, "backward", { ...named, ...borders.pop(), ...given });
      given = withoutPrefix(results, "new.");
      for (const [local, value] of Object.entries(withoutPrefix(results, "grad."))) {
        gradients[block.lora[local]] = value;
      }
    }
    return [made.loss, gradients];
  };
}

/** AdamW: (lr, step, parameters, gradients, moments) -> new parameters and moments, by name. */
export async function openOptimizer(engine, bundle) {
  const names = bundle.facts.graphs[OPTIMIZER];
  const program = await engine.program(bundle, OPTIMIZER, names, { backend: "wasm" });
  return async (named) => withoutPrefix(await program.run(named), "new.");
}

export const picked = (named, names) =>
  Object.fromEntries(names.filter((name) => name in named).map((name) => [name, named[name]]));

export const mapped = (map, named) =>
  Object.fromEntries(Object.entries(map).map(([local, name]) => [local, named[name]]));

export const withoutPrefix = (named, prefix) => Object.fromEntries(
  Object.entries(named).filter(([name]) => name.startsWith(prefix))
    .map(([name, value]) => [name.slice(prefix.length), value]));

const sum = (a, b) => ({ ...a, data: a.data.map((value, n) => value + b.data[n]) });
