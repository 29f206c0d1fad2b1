// The worker: one bundle, its draws and its run. Messages {id, method, values} are answered with
// {id, value} or {id, fault}; {event, ...} tells of progress.

import { Bank, Bundle, forget, keptBundles, pictureBanks } from "./bundle.mjs";
import { collect } from "./collect.mjs";
import { Fault, filesFolder, storedFolder, urlFolder } from "./files.mjs";
import { Parts } from "./loop.mjs";
import { paint } from "./paint.mjs";
import { Engine } from "./steps.mjs";
import { Training, importState, progressOf, startAgain } from "./trainer.mjs";

let engine, bundle, draws, training, parts, release;
let stopped = false;

const tell = (event, facts) => postMessage({ event, ...facts });

/** A folder of a source: {url}, {name, files: [[path, File]]}, {kept: identity of a bundle} or
 * {pictures: identity of a bank made of pictures}. */
async function folderOf(source) {
  if (source.url) return urlFolder(source.url);
  if (source.files) return filesFolder(source.name, source.files);
  if (source.pictures) {
    const folder = await storedFolder("edge-dit", "banks", bundle.identity, source.pictures);
    return Object.assign(folder, { name: "pictures" });
  }
  return storedFolder("edge-dit", "bundles", source.kept);
}

const methods = {
  kept: keptBundles,
  forget,

  /** Open a bundle and keep its files in OPFS. */
  async open(source, options) {
    engine = await Engine.start(options);
    [bundle, draws, training, parts] = [null, null, null, null];
    const given = await Bundle.open(await folderOf(source));
    bundle = await given.keep((done, all) => tell("copy", { done, all }));
    const { plan, manifest, layouts, layout, bytes, name, identity } = bundle;
    const threads = engine.ort.env.wasm.numThreads;
    return {
      name, identity, plan, family: manifest.family, layouts, layout, bytes, threads,
      loop: bundle.loop && { ...bundle.loop, graphs: null, block_graphs: null, blocks: null, paint_blocks: null },
    };
  },

  /** Open the bank to train over; how far its run is. */
  async bank(source) {
    return trainOver(await Bank.open(await folderOf(source), bundle.manifest.plan_hash));
  },

  /** Make the bank of pictures, [[name, File]], and open it; null if it was stopped. */
  async collect(files, caption) {
    stopped = false;
    const made = await collect(await looped(), files, caption, (done, all) => {
      tell("collect", { done, all });
      return stopped;
    });
    return made && trainOver(made);
  },

  /** Paint {prompt: text, seed} with the run's adapter, or with none; null if it was stopped. */
  async paint({ prompt, seed, adapted = true }) {
    stopped = false;
    await looped();
    const adapter = adapted && draws ? (await opened()).trained : await untrained();
    return paint(parts, { prompt: parts.prompt(prompt), seed }, adapter, (done, all) => {
      tell("paint", { done, all });
      return stopped;
    });
  },

  /** The draws that are open, and how far their run is now. */
  reopened: () => trainOver(draws),

  /** Complete banks made of pictures for this bundle: [{identity, names, draws}]. */
  banks: () => pictureBanks(bundle),

  startAgain() {
    training = null;
    return startAgain(bundle, draws);
  },

  importState(file) {
    training = null;
    return importState(bundle, draws, file);
  },

  /** Train until all steps are done or `pause`; goes on where the run stopped. */
  async train(options) {
    stopped = false;
    await occupy();
    try {
      training = await Training.open(engine, bundle, draws, options);
      const { run, losses, layout } = training;
      tell("begin", { steps: run.steps, losses, layout });
      const every = options?.previewEvery ?? 0;
      if (every && !training.done) await preview();
      await training.go(() => stopped, async (facts) => {
        tell("step", facts);
        if (every && (training.done % every === 0 || training.done === run.steps)) await preview();
      });
      return { done: training.done, steps: run.steps };
    } finally {
      release();
    }
  },

  pause() {
    stopped = true;
  },

  /** Loss and gradients of a draw with the run's adapter, without an update. */
  async gradients(number, options) {
    await opened(options);
    const loss = await training.backward(number);
    const pairs = Object.entries(training.gradients).map(([name, { data }]) => [name, Array.from(data)]);
    return { loss, gradients: Object.fromEntries(pairs) };
  },

  /** The files of the adapter as it is, {name: Blob}. */
  async adapter(options) {
    return (await opened(options)).files();
  },

  /** The saved state, a file that edge-dit train continues. */
  async state() {
    const folder = await storedFolder("edge-dit", "runs", bundle.identity, draws.identity);
    return folder.blob("state.safetensors");
  },
};

/** Take a bank; its name, its number of draws, and how far its run is. */
async function trainOver(bank) {
  [draws, training] = [bank, null];
  return { name: draws.name, draws: draws.index.draws.length, run: await progressOf(bundle, draws) };
}

/** The run, as it was saved if it is not open. */
const opened = async (options) => (training ??= await Training.open(engine, bundle, draws, options));

const looped = async () => (parts ??= await Parts.open(engine, bundle));

/** The bundle's adapter with B = 0: the model as it was. */
async function untrained() {
  const adapter = await (await bundle.adapter()).read();
  for (const [name, { data }] of Object.entries(adapter)) if (name.includes(".lora_B.")) data.fill(0);
  return adapter;
}

/** Paint the bundle's preview prompts, always from the same noise. */
async function preview() {
  await looped();
  for (const [seed, prompt] of parts.facts.previews.entries()) {
    const picture = await paint(parts, { prompt, seed }, training.adapter, () => stopped);
    if (picture) tell("preview", { ...picture, row: seed, step: training.done, prompt: parts.facts.prompts[prompt] });
  }
}

/** Keep other tabs out of this run until `release`. */
async function occupy() {
  const name = `edge-dit ${bundle.identity} ${draws.identity}`;
  const free = await new Promise((resolve) => {
    navigator.locks.request(name, { ifAvailable: true }, (lock) => {
      resolve(Boolean(lock));
      return lock && new Promise((end) => { release = end; });
    });
  });
  if (!free) throw new Fault("this run", { found: "another tab trains it", remedy: "close that tab" });
}

onmessage = async ({ data: { id, method, values } }) => {
  try {
    postMessage({ id, value: await methods[method](...values) });
  } catch (error) {
    const { where = method, found = error.message ?? String(error), expected, remedy } = error;
    postMessage({ id, fault: { where, found, expected, remedy, stack: error.stack } });
  }
};
