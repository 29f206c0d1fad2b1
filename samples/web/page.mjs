// The page for people around edge-dit.mjs.

import { drawChart } from "./chart.mjs";
import { Device, inWords } from "./edge-dit.mjs";

const at = (id) => document.getElementById(id);
const device = new Device();
let bundle = null;       // what device.open gave
let run = null;          // {losses, steps, times, saved} of the run that is shown
let pictures = [];       // [[name, File]]
let busy = false;
let starting = true;     // until what the server was given is open

/** Time left of a task by its pace since it began. */
class Clock {
  left(task, done, all) {
    const now = performance.now();
    if (this.task !== task || done < this.from) Object.assign(this, { task, since: now, from: done });
    if (done <= this.from) return "";
    return `, ${duration(((now - this.since) / (done - this.from)) * (all - done))} left`;
  }

  reset() {
    this.task = null;
  }
}

const clock = new Clock();

const number = (id) => Number(at(id).value);

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** Do something; a fault of it is said in a section. Nothing else can be begun meanwhile. */
async function attempt(section, work) {
  if (busy) return;
  const place = at(section).querySelector(".fault");
  place.textContent = "";
  setBusy(true);
  try {
    await work();
  } catch (error) {
    place.textContent = error.message;
    if (section === "train") say("Stopped.");
  } finally {
    setBusy(false);
  }
}

function setBusy(value) {
  busy = value;
  const off = value || starting;
  for (const control of document.querySelectorAll("button, input, select")) control.disabled = off;
  at("pause").disabled = true;
  at("pictures-read").disabled = off || !pictures.length;
  document.body.setAttribute("aria-busy", String(off));
}

/** Say how far it is; `quiet` if it is one of many times, which nobody wants to hear each. */
function say(text, quiet = false) {
  at("status").setAttribute("aria-live", quiet ? "off" : "polite");
  at("status").textContent = text;
}

const sayOfBundle = (text) => { at("bundle-facts").textContent = text; };

// ---------------------------------------------------------------- what this browser lacks

function notice(text) {
  at("notices").append(element("p", { textContent: text }));
}

function lookAround() {
  if (!globalThis.crossOriginIsolated) {
    notice("This page was served without the headers Cross-Origin-Opener-Policy: same-origin and "
      + "Cross-Origin-Embedder-Policy: require-corp. Training then has one thread and takes longer. "
      + "Serve it with edge-dit serve, or send these headers.");
  }
  if (!navigator.storage?.getDirectory || !crypto.subtle) {
    notice("This browser gives the page no storage of its own (OPFS) or no digests. Open the page from "
      + "localhost or by https, in a browser of 2023 or later.");
  }
  if (!navigator.gpu) {
    const option = at("backend").querySelector("[value=webgpu]");
    option.textContent += ": not in this browser";
  }
}

// ---------------------------------------------------------------- 1. bundle

/** The folder that was picked, as a source of the worker. */
function picked(input) {
  const files = Array.from(input.files, (file) => {
    const [name, ...path] = file.webkitRelativePath.split("/");
    return { name, path: path.join("/"), file };
  });
  return { name: files[0].name, files: files.map(({ path, file }) => [path, file]) };
}

async function openBundle(source) {
  sayOfBundle("Opening ...");
  for (const id of ["draws", "train", "adapter", "losses", "previews", "paint"]) at(id).hidden = true;
  bundle = null;
  try {
    bundle = await device.open(source, { backend: at("backend").value });
  } catch (error) {
    sayOfBundle("The model part that trains, made by edge-dit export.");
    throw error;
  }
  const { plan, name, family, bytes, layouts, layout, loop, threads } = bundle;
  sayOfBundle(`${name}: ${family} (${plan.model_name}), ${plan.layers} blocks, LoRA of rank ${plan.rank}, `
    + `${inWords(bytes)}, kept in this browser. ${threads} thread${threads > 1 ? "s" : ""}.`);
  at("layout").replaceChildren(...layouts.map((each) => new Option(each, each, false, each === layout)));
  at("steps").value = plan.steps;
  at("draws").hidden = false;
  at("pictures").hidden = !loop;
  at("bank").open = !loop;
  at("paint").hidden = !loop?.painting;
  at("every-label").hidden = !loop?.painting || !loop.previews.length;
  at("draws-facts").textContent = loop
    ? "Pictures of one subject: three to ten are enough." : "This bundle reads no pictures: it needs a bank.";
  if (loop) fillPrompts(loop, plan);
  await showKept();
  await showBanks();
}

function fillPrompts({ prompts, negatives, caption, previews }, plan) {
  const positive = prompts.filter((_, n) => !negatives.includes(n));
  at("caption").replaceChildren(...positive.map((text) => new Option(text, text, false, text === caption)));
  at("prompt").replaceChildren(...positive.map((text) => new Option(text, text)));
  at("every").value = plan.preview_every || Math.max(1, Math.ceil(plan.steps / 4));
  at("preview-rows").replaceChildren(...previews.map((n) => element("figure", {},
    element("figcaption", { textContent: prompts[n] }), element("div", { className: "strip", tabIndex: 0 }))));
}

async function showKept() {
  const items = (await device.kept()).map(({ identity, name, model, bytes }) => element("li", {},
    element("span", { textContent: `${name} (${model}), ${inWords(bytes)}` }),
    ...(identity === bundle?.identity ? ["open"]
      : [element("button", { textContent: "Open", onclick: () => begin({ kept: identity }) })]),
    element("button", {
      className: "quiet", textContent: "Remove", ariaLabel: `Remove ${name}, its runs and banks`,
      onclick: () => attempt("bundle", async () => {
        await device.forget(identity);
        await showKept();
        if (bundle?.identity === identity) location.reload();
      }),
    })));
  at("kept").replaceChildren(...items);
}

const begin = (source) => attempt("bundle", () => openBundle(source));

device.addEventListener("copy", ({ detail: { done, all } }) => {
  if (all) sayOfBundle(`Copying into this browser: ${inWords(done)} of ${inWords(all)} ...`);
});

// ---------------------------------------------------------------- 2. bank or pictures

async function showBanks() {
  const items = (await device.banks()).map(({ identity, names, draws }) => element("li", {},
    element("span", { textContent: `${names.length} pictures (${names.slice(0, 3).join(", ")}), ${draws} draws` }),
    element("button", { textContent: "Use", onclick: () => attempt("draws", () => openBank({ pictures: identity })) })));
  at("banks").replaceChildren(...items);
}

const openBank = async (source) => showBank(await device.bank(source));

function showBank({ name, draws, run: saved }) {
  at("draws-facts").textContent = `${name}: ${draws} draws.`;
  for (const id of ["train", "adapter", "losses"]) at(id).hidden = false;
  at("again").hidden = !saved;
  at("start").textContent = saved ? "Continue" : "Train";
  if (saved) {
    at("steps").value = saved.steps;
    at("layout").value = saved.layout;
  }
  run = { losses: [], steps: saved?.steps ?? bundle.plan.steps, times: [] };
  drawChart(at("chart"), [], run.steps);
  say(saved ? `${saved.done} of ${saved.steps} steps are done and saved.` : "Ready.");
  at("progress").value = saved ? saved.done / saved.steps : 0;
  showDownloads();
}

function choose(files) {
  pictures = Array.from(files, (file) => [file.name, file]);
  const shown = pictures.filter(([name]) => !/\.txt$/i.test(name));
  for (const image of at("thumbs").querySelectorAll("img")) URL.revokeObjectURL(image.src);
  at("thumbs").replaceChildren(...shown.map(([name, file]) => element("li", {},
    element("img", { src: URL.createObjectURL(file), alt: name }))));
  at("pictures-read").disabled = busy || !pictures.length;
}

async function readPictures() {
  at("pause").disabled = false;
  at("train").hidden = false;
  say("Reading pictures ...");
  const made = await device.collect(pictures, at("caption").value);
  if (!made) return say("Paused. Read the pictures again to go on.");
  showBank(made);
  await showBanks();
}

device.addEventListener("collect", ({ detail: { done, all } }) => {
  at("progress").value = done / all;
  say(`Reading pictures: ${done.toFixed(1)} of ${all} draws${clock.left("collect", done, all)}`, true);
});

// ---------------------------------------------------------------- 3. train

function duration(ms) {
  const seconds = Math.ceil(ms / 1000);
  if (seconds < 60) return `${seconds} s`;
  const minutes = Math.ceil(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

async function train() {
  clock.reset();
  at("pause").disabled = false;
  say("Opening the graphs ...");
  const previewEvery = at("every-label").hidden ? 0 : number("every");
  const awake = await navigator.wakeLock?.request("screen").catch(() => null);
  const options = { steps: number("steps"), layout: at("layout").value, previewEvery };
  const { done, steps } = await device.train(options).finally(() => awake?.release());
  at("start").textContent = "Continue";
  at("again").hidden = false;
  say(done < steps ? `Paused after ${done} of ${steps} steps; saved.` : `Done: ${steps} steps; saved.`);
  showDownloads();
}

device.addEventListener("begin", ({ detail: { steps, losses } }) => {
  run = { losses, steps };
  drawChart(at("chart"), losses, steps);
  say(`${losses.length} of ${steps} steps.`);
});

device.addEventListener("step", ({ detail: { loss } }) => {
  run.losses.push(loss);
  const done = run.losses.length;
  at("progress").value = done / run.steps;
  say(`${done} of ${run.steps} steps, loss ${loss.toFixed(4)}${clock.left("train", done, run.steps)}`, true);
  drawChart(at("chart"), run.losses, run.steps);
});

function pictureOf({ side, pixels }) {
  const canvas = element("canvas", { width: side, height: side });
  canvas.getContext("2d").putImageData(new ImageData(pixels, side, side), 0, 0);
  return canvas;
}

device.addEventListener("preview", ({ detail }) => {
  at("previews").hidden = false;
  const row = at("preview-rows").children[detail.row];
  const canvas = pictureOf(detail);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${detail.prompt}, after ${detail.step} steps`);
  const figure = element("figure", {}, canvas, element("figcaption", { textContent: `${detail.step} steps` }));
  row.querySelector(".strip").append(figure);
  row.querySelector(".strip").scrollLeft = 1e6;
});

// ---------------------------------------------------------------- 4. adapter, and painting

function save(name, blob) {
  const link = element("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

function showDownloads() {
  const options = () => ({ steps: number("steps"), layout: at("layout").value });
  const files = [["pytorch_lora_weights.safetensors", "LoRA for diffusers"], ["adapter.safetensors", "LoRA as trained"]];
  const buttons = files.filter(([name]) => bundle.family !== "pixart" || name === "adapter.safetensors")
    .map(([name, words]) => element("button", {
      textContent: words, title: name,
      onclick: () => attempt("adapter", async () => save(name, (await device.adapter(options()))[name])),
    }));
  const state = element("button", {
    textContent: "State", title: "state.safetensors",
    onclick: () => attempt("adapter", async () => save("state.safetensors", await device.state())),
  });
  at("downloads").replaceChildren(...buttons, ...(at("again").hidden ? [] : [state]));
}

async function paint() {
  at("pause").disabled = false;
  at("paintings").replaceChildren();
  clock.reset();
  for (const [adapted, words] of [[false, "without the adapter"], [true, "with the adapter"]]) {
    const found = await device.paint({ prompt: at("prompt").value, seed: number("seed"), adapted });
    if (!found) return;
    const canvas = pictureOf(found);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${at("prompt").value}, ${words}`);
    const keep = element("button", {
      className: "quiet", textContent: "Save", ariaLabel: `Save the picture ${words}`,
      onclick: () => canvas.toBlob((blob) => save(`${words.replaceAll(" ", "-")}.png`, blob)),
    });
    at("paintings").append(element("figure", {}, canvas, element("figcaption", {}, words, keep)));
  }
  at("paint-status").textContent = "Without and with the adapter, from the same noise.";
}

device.addEventListener("paint", ({ detail: { done, all } }) => {
  at("paint-status").textContent = `Painting: ${done} of ${all} steps`;
});

// ---------------------------------------------------------------- controls

at("bundle-open").onclick = () => begin({ url: at("bundle-url").value });
at("bundle-folder").onchange = ({ target }) => target.files.length && begin(picked(target));
at("bank-open").onclick = () => attempt("draws", () => openBank({ url: at("bank-url").value }));
at("bank-folder").onchange = ({ target }) =>
  target.files.length && attempt("draws", () => openBank(picked(target)));
at("pictures-files").onchange = ({ target }) => choose(target.files);
at("pictures-read").onclick = () => attempt("draws", readPictures);
at("start").onclick = () => attempt("train", train);
at("pause").onclick = () => {
  at("pause").disabled = true;
  say("Pausing after this step ...");
  device.pause();
};
at("again").onclick = () => attempt("train", async () => {
  await device.startAgain();
  showBank(await device.reopened());
  for (const strip of document.querySelectorAll(".strip")) strip.replaceChildren();
});
at("state-file").onchange = ({ target }) => target.files.length && attempt("adapter", async () => {
  await device.importState(target.files[0]);
  showBank(await device.reopened());
});
at("paint-go").onclick = () => attempt("paint", paint);
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  at("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    at("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop") choose(event.dataTransfer.files);
  });
}
new ResizeObserver(() => run && drawChart(at("chart"), run.losses, run.steps)).observe(at("chart"));

/** What edge-dit serve was given is opened at once. */
async function start() {
  lookAround();
  await attempt("bundle", showKept);
  const there = async (path) => (await fetch(path, { method: "HEAD" }).catch(() => ({}))).ok;
  if (await there("bundle/manifest.json")) await begin({ url: "bundle/" });
  if (bundle && (await there("bank/index.json"))) await attempt("draws", () => openBank({ url: "bank/" }));
  starting = false;
  setBusy(false);
}

start();
