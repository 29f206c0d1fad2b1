// Runs a scenario in Chromium: node browser.mjs < {"url", "profile", "webgpu", "scenario", "given"}.
// The scenario is the body of an async function of (page, context, url, given); its result is
// printed as JSON, with all faults of pages and every address that they asked for.

import { createRequire } from "node:module";
import { text } from "node:stream/consumers";

const require = createRequire(new URL("../../samples/web/package.json", import.meta.url));
const { chromium } = require("playwright-core");

const QUIET = ["--no-first-run", "--disable-background-networking", "--disable-component-update",
  "--disable-sync", "--disable-quic"];
const PLAIN = ["--disable-gpu"];
const SOFTWARE_GPU = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"];
const AsyncFunction = (async () => {}).constructor;

const { url, profile, webgpu, scenario, given } = JSON.parse(await text(process.stdin));
const context = await chromium.launchPersistentContext(profile, {
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  headless: true,
  chromiumSandbox: false,
  args: [...QUIET, ...(webgpu ? SOFTWARE_GPU : PLAIN)],
});
const faults = [];
const asked = new Set();
context.on("request", (request) => asked.add(request.url()));
context.on("console", (message) => message.type() === "error" && faults.push(message.text()));
context.on("weberror", (error) => faults.push(String(error.error().stack)));
context.setDefaultTimeout(200_000); // a machine may be busy with other work
const page = context.pages()[0] ?? (await context.newPage());
let result, error;
try {
  result = await new AsyncFunction("page", "context", "url", "given", scenario)(page, context, url, given);
} catch (caught) {
  error = caught.stack;
}
await context.close();
process.stdout.write(JSON.stringify({ result, error, faults, asked: [...asked] }));
