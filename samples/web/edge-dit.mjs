// Trains an edge-dit bundle in a browser tab.
//
//     const device = new Device();
//     await device.open({ url: "bundle/" });
//     await device.bank({ url: "bank/" });
//     device.addEventListener("step", ({ detail }) => console.log(detail.step, detail.loss));
//     await device.train();                    // or device.pause(); a closed tab goes on later
//     const files = await device.adapter();    // {"pytorch_lora_weights.safetensors": Blob, ...}
//
// A bundle with the loop's parts needs no bank, and paints:
//
//     await device.collect([["toy.png", file], ...]);
//     const { side, pixels } = await device.paint({ prompt: "a sks toy", seed: 0 });
//
// All work is done by a worker (worker.mjs); this is its handle.

import { Fault } from "./files.mjs";

export { Fault, inWords } from "./files.mjs";

const METHODS = [
  "open", "bank", "collect", "paint", "train", "pause", "gradients", "adapter", "state", "startAgain", "importState",
  "kept", "forget", "banks", "reopened",
];

/** A worker with one bundle, its draws and its run; worker.mjs has its methods. */
export class Device extends EventTarget {
  #worker = new Worker(new URL("./worker.mjs", import.meta.url), { type: "module" });
  #waiting = new Map();
  #last = 0;

  constructor() {
    super();
    this.#worker.onmessage = ({ data }) => this.#receive(data);
    this.#worker.onerror = (event) => {
      const fault = new Fault("worker", { found: event.message ?? "it stopped", remedy: "reload the page" });
      for (const { reject } of this.#waiting.values()) reject(fault);
      this.#waiting.clear();
    };
    for (const method of METHODS) this[method] = (...values) => this.#ask(method, values);
  }

  #receive({ id, event, value, fault, ...detail }) {
    if (event) return this.dispatchEvent(new CustomEvent(event, { detail }));
    const { resolve, reject } = this.#waiting.get(id);
    this.#waiting.delete(id);
    if (fault) reject(Object.assign(new Fault(fault.where, fault), { inWorker: fault.stack }));
    else resolve(value);
  }

  #ask(method, values) {
    return new Promise((resolve, reject) => {
      this.#waiting.set(++this.#last, { resolve, reject });
      this.#worker.postMessage({ id: this.#last, method, values });
    });
  }

  /** End the worker at once, in the middle of whatever it does. */
  close() {
    this.#worker.terminate();
  }
}
