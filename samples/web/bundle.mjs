// Bundles and banks: opened, checked, and a bundle's files kept in OPFS.

import { Fault, checkRoom, readDocument, sha256, storedFolder } from "./files.mjs";
import { drawOrder } from "./noise.mjs";
import { TensorFile, widened } from "./safetensors.mjs";

const MANIFEST = "manifest.json";
const ADAPTER = "adapter.safetensors";
const NEWEST = 2;
const NEWEST_BANK = 2;
const EXPORT = "export it again: edge-dit export JOB --plan plan.json -o bundle/";
const PRECOMPUTE = "precompute it again: edge-dit precompute JOB --plan plan.json -o bank/";
const COPY = "copy the bundle again, or export it again";
/** Layout -> file of its graph of a whole step. */
export const STEP_FILES = { fused: "train_step.onnx", recompute: "train_step.recompute.onnx" };
/** Bytes of frozen weights above which the streamed layout is the default. */
const LARGE = 200e6;
const PLAIN = /^[^./\\:\x00-\x1f][^/\\:\x00-\x1f]{0,254}$/;

/** A bundle whose manifest was checked. `folder`: of its files. */
export class Bundle {
  constructor(folder, manifest, identity) {
    Object.assign(this, { folder, manifest, identity, name: folder.name });
    this.plan = manifest.plan;
    this.facts = manifest.targets.onnx;
    this.loop = this.facts.loop ?? null;
    this.frozen = [this.facts.frozen].flat();  // bundles of schema 1 name one file
    this.files = manifest.files.filter(({ path }) => path === ADAPTER || path.startsWith("onnx/"));
    this.bytes = this.files.reduce((sum, file) => sum + file.bytes, 0);
  }

  /**
   * @param folder see files.mjs.
   * @throws Fault: no manifest, damaged, of a newer schema, or without the onnx target.
   */
  static async open(folder) {
    const { value, identity } = await readDocument(folder, MANIFEST, NEWEST, EXPORT);
    const odd = value.files?.find(({ path }) => !path.split("/").every((part) => PLAIN.test(part)));
    if (!value.targets?.onnx || !value.tensors || odd) {
      throw new Fault(folder.name, {
        found: odd ? `a file named ${odd.path}` : "no target onnx",
        expected: "a bundle with the onnx target", remedy: EXPORT,
      });
    }
    if (!Number.isSafeInteger(value.plan.seed)) {
      throw new Fault(folder.name, {
        found: "a seed beyond 2 ** 53, which JavaScript's numbers do not hold",
        remedy: "plan with a smaller [train] seed",
      });
    }
    return new Bundle(folder, value, identity);
  }

  /** Names of tensors of a role ("batch", "lora"), in the order of arguments. */
  names(role) {
    return this.tensors(role).map((tensor) => tensor.name);
  }

  tensors(role) {
    return this.manifest.tensors.filter((tensor) => tensor.role === role);
  }

  get layouts() {
    const whole = Object.keys(STEP_FILES).filter((layout) => STEP_FILES[layout] in this.facts.graphs);
    return this.facts.streamed ? [...whole, "streamed"] : whole;
  }

  /** The layout that a device takes when none is asked for. */
  get layout() {
    const frozen = this.files.filter(({ path }) => this.frozen.some((name) => path === `onnx/${name}`));
    const large = frozen.reduce((sum, file) => sum + file.bytes, 0) > LARGE;
    return large && this.facts.streamed ? "streamed" : this.layouts[0];
  }

  has(file) {
    return this.files.some(({ path }) => path === `onnx/${file}`);
  }

  /** A file of the onnx target as a Blob. */
  async file(name) {
    return (await this.folder.blob(`onnx/${name}`)) ?? this.#missing(`onnx/${name}`);
  }

  /** The LoRA that training starts from, an open `TensorFile`. */
  async adapter() {
    const blob = (await this.folder.blob(ADAPTER)) ?? this.#missing(ADAPTER);
    return TensorFile.open(blob, `${this.name}/${ADAPTER}`, COPY);
  }

  #missing(path) {
    throw new Fault(`${this.name}/${path}`, { found: "missing", remedy: COPY });
  }

  /**
   * Copy the files that training reads into OPFS, each checked against the manifest. Those that are
   * there already are not read again.
   * @param report called with bytes done and bytes to do.
   * @returns the bundle in OPFS.
   * @throws Fault: files are missing or damaged, or there is too little room.
   */
  async keep(report = () => {}) {
    const kept = await storedFolder("edge-dit", "bundles", this.identity);
    const wanted = [];
    for (const file of this.files) {
      if ((await kept.blob(file.path))?.size !== file.bytes) wanted.push(file);
    }
    const blobs = await Promise.all(wanted.map(({ path }) => this.folder.blob(path)));
    this.#checkSizes(wanted, blobs);
    const all = wanted.reduce((sum, file) => sum + file.bytes, 0);
    await checkRoom(this.name, all);
    let done = 0;
    for (const [number, file] of wanted.entries()) {
      report(done, all);
      const bytes = await blobs[number].arrayBuffer();
      if ((await sha256(bytes)) !== file.sha256) {
        throw new Fault(`${this.name}/${file.path}`, { found: "damaged or replaced", remedy: COPY });
      }
      await kept.write(file.path, bytes);
      done += file.bytes;
    }
    report(all, all);
    if (!(await kept.blob(MANIFEST))) {  // last: a bundle with a manifest is whole
      const manifest = await (await this.folder.blob(MANIFEST)).arrayBuffer();
      await kept.write("name", this.name);
      await kept.write(MANIFEST, manifest);
    }
    const bundle = new Bundle(kept, this.manifest, this.identity);
    bundle.name = this.name;
    return bundle;
  }

  #checkSizes(files, blobs) {
    const faults = files.flatMap(({ path, bytes }, number) => {
      if (!blobs[number]) return `${path} is missing`;
      return blobs[number].size === bytes ? [] : `${path} has ${blobs[number].size} bytes, not ${bytes}`;
    });
    if (faults.length) {
      const more = faults.length > 3 ? `; and ${faults.length - 3} more` : "";
      throw new Fault(this.name, {
        found: `not whole: ${faults.slice(0, 3).join("; ")}${more}`, remedy: COPY,
      });
    }
  }
}

/** Bundles in OPFS: [{identity, name, model, bytes}]. */
export async function keptBundles() {
  const found = [];
  for await (const identity of (await stored("bundles")).keys()) {
    const folder = await storedFolder("edge-dit", "bundles", identity);
    const [name, manifest] = [await folder.blob("name"), await folder.blob(MANIFEST)];
    if (!name || !manifest) continue;  // a copy that was not finished
    const { plan, files } = JSON.parse(await manifest.text());
    const bytes = files.reduce((sum, file) => sum + file.bytes, 0);
    found.push({ identity, name: await name.text(), model: plan.model_name, bytes });
  }
  return found;
}

async function stored(...path) {
  let folder = await navigator.storage.getDirectory();
  for (const part of ["edge-dit", ...path]) {
    folder = await folder.getDirectoryHandle(part, { create: true });
  }
  return folder;
}

/** Remove a bundle, its runs and the banks made of pictures for it. */
export async function forget(identity) {
  for (const kind of ["bundles", "runs", "banks"]) {
    await (await stored(kind)).removeEntry(identity, { recursive: true }).catch(() => {});
  }
}

/** Complete banks made of pictures for a bundle: [{identity, names, draws}]. */
export async function pictureBanks(bundle) {
  const found = [];
  for await (const identity of (await stored("banks", bundle.identity)).keys()) {
    const folder = await storedFolder("edge-dit", "banks", bundle.identity, identity);
    const bank = await Bank.open(folder, bundle.manifest.plan_hash).catch(() => null);
    if (!bank) continue;
    const names = bank.index.images.map(({ name }) => name);
    found.push({ identity, names, draws: bank.index.draws.length });
  }
  return found;
}

/** A complete bank. */
export class Bank {
  constructor(folder, index, identity) {
    Object.assign(this, { folder, index, identity, name: folder.name });
    this.files = new Map();
  }

  /** @throws Fault: not a bank, damaged, incomplete, or of another plan. */
  static async open(folder, planHash) {
    const { value: index, identity } = await readDocument(folder, "index.json", NEWEST_BANK, PRECOMPUTE);
    if (index.plan_hash !== planHash) {
      throw new Fault(folder.name, {
        found: "a bank that belongs to another plan",
        expected: `plan ${planHash.slice(0, 12)}, found ${String(index.plan_hash).slice(0, 12)}`,
        remedy: "precompute a bank with the bundle's plan",
      });
    }
    const bank = new Bank(folder, index, identity);
    for (let shard = 0; shard * index.shard < index.draws.length; shard++) {
      if (!(await folder.blob(shardName(shard)))) {
        throw new Fault(folder.name, { found: `incomplete: no ${shardName(shard)}`, remedy: PRECOMPUTE });
      }
    }
    await bank.#file(shardName(0));  // a server without ranges is found now, not in the first step
    return bank;
  }

  /** Number of the draw that a step trains on. */
  number(step, seed) {
    return drawOrder(step, this.index.draws.length, seed);
  }

  /** The batch tensors of a draw, float32, by name. */
  async draw(number) {
    const { prompt } = this.index.draws[number];
    const shard = await this.#read(shardName(Math.floor(number / this.index.shard)), number);
    return { ...(await this.#read("prompts.safetensors", prompt)), ...shard };
  }

  async #read(name, number) {
    const file = await this.#file(name);
    const prefix = `${number}.`;
    const keys = [...file.places.keys()].filter((key) => key.startsWith(prefix));
    const read = await file.read(keys);
    return Object.fromEntries(keys.map((key) => [key.slice(prefix.length), widened(read[key])]));
  }

  async #file(name) {
    if (!this.files.has(name)) {
      const where = `${this.name}/${name}`;
      const blob = await this.folder.blob(name);
      if (!blob) throw new Fault(where, { found: "missing", remedy: PRECOMPUTE });
      const file = await TensorFile.open(blob, where, PRECOMPUTE);
      if (!file.hashed || file.metadata.index !== this.identity) {
        throw new Fault(where, { found: "a file of another bank", remedy: PRECOMPUTE });
      }
      this.files.set(name, file);
    }
    return this.files.get(name);
  }
}

export const shardName = (shard) => `shard-${String(shard).padStart(5, "0")}.safetensors`;
