// Files: faults, digests, JSON as Python writes it, folders by URL, by picked files and in OPFS.

/** Bad input, for people: where, what was found, what was expected, what to do. */
export class Fault extends Error {
  constructor(where, { found, expected = "", remedy = "" }) {
    super([`${where}: ${found}`, expected && `expected: ${expected}`, remedy && `remedy: ${remedy}`]
      .filter(Boolean).join("\n"));
    Object.assign(this, { name: "Fault", where, found, expected, remedy });
  }
}

/** SHA-256 in hexadecimal of an ArrayBuffer or a view. */
export async function sha256(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

const NUMBER = "\0number ";

/** JSON whose numbers stay as they were written, for `canonical`. */
function parseRaw(text) {
  const token = /"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?/g;
  return JSON.parse(text.replace(token, (t) => (t[0] === '"' ? t : `"\\u0000number ${t}"`)));
}

/** A value as Python's json.dumps(value, sort_keys=True) writes it; digests are of this text. */
export function canonical(value) {
  if (Array.isArray(value)) return `[${value.map(canonical).join(", ")}]`;
  if (value !== null && typeof value === "object") {
    const keys = Object.keys(value).sort();
    return `{${keys.map((key) => `${canonical(key)}: ${canonical(value[key])}`).join(", ")}}`;
  }
  if (typeof value === "string" && value.startsWith(NUMBER)) return value.slice(NUMBER.length);
  return ascii(JSON.stringify(value));
}

/** A number as Python writes a float in JSON, for `canonical` and `pythonJson`. */
export function float(value) {
  const [digits, power] = value.toExponential().split("e").map((part, n) => (n ? Number(part) : part));
  const plain = power >= -4 && power < 16;
  const text = plain ? String(value) : `${digits}e${power < 0 ? "-" : "+"}${String(Math.abs(power)).padStart(2, "0")}`;
  return NUMBER + (plain && Number.isInteger(value) ? `${text}.0` : text);
}

/** A value as Python's json.dumps(value, indent=2) writes it, and a line feed. */
export const pythonJson = (value) => `${ascii(JSON.stringify(value, null, 2))}\n`
  .replace(/"\\u0000number ([^"]*)"/g, "$1");

/** JSON with all but ASCII escaped. */
export const ascii = (text) =>
  text.replace(/[^ -~\n]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);

const encoder = new TextEncoder();

export const digestOf = (value) => sha256(encoder.encode(canonical(value)));

/**
 * The object in a JSON document of ours and the SHA-256 of its file.
 * @throws Fault: missing, damaged, edited, or of a newer schema.
 */
export async function readDocument(folder, name, newest, remedy) {
  const where = `${folder.name}/${name}`;
  const blob = await folder.blob(name);
  if (!blob) throw new Fault(folder.name, { found: `no ${name} in it`, remedy });
  const bytes = await blob.arrayBuffer();
  let raw, value;
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
    [raw, value] = [parseRaw(text), JSON.parse(text)];
  } catch (error) {
    throw new Fault(where, { found: `damaged (${error.message})`, remedy });
  }
  const version = value?.schema_version;
  if (!Number.isInteger(version) || version < 1 || version > newest) {
    throw new Fault(where, {
      found: `schema version ${version}`, expected: `at most ${newest}`,
      remedy: version > newest ? "take a newer page of edge-dit" : remedy,
    });
  }
  const { sha256: claimed, ...rest } = raw;
  if (claimed !== (await digestOf(rest))) {
    throw new Fault(where, { found: "damaged or edited: not what it was written with", remedy });
  }
  return { value, identity: await sha256(bytes), bytes: new Uint8Array(bytes) };
}

// ---------------------------------------------------------------- folders
// A folder has a name and `blob(path)`: something with `size`, `slice(begin, end)` and
// `arrayBuffer()`, or null. A Blob is one; a file behind a URL becomes one here.

class RemoteBlob {
  constructor(url, size, begin = 0, whole = true) {
    Object.assign(this, { url, size, begin, whole });
  }

  slice(begin, end = this.size) {
    return new RemoteBlob(this.url, end - begin, this.begin + begin, false);
  }

  async arrayBuffer() {
    if (!this.size) return new ArrayBuffer(0);
    const range = `bytes=${this.begin}-${this.begin + this.size - 1}`;
    const answer = await fetch(this.url, this.whole ? {} : { headers: { Range: range } });
    const bytes = answer.status === (this.whole ? 200 : 206) ? await answer.arrayBuffer() : null;
    if (bytes?.byteLength === this.size) return bytes;
    throw new Fault(this.url, {
      found: bytes ? `${bytes.byteLength} bytes` : `status ${answer.status}`,
      expected: this.whole ? `${this.size} bytes` : `${this.size} bytes of a Range request`,
      remedy: "serve the folder with edge-dit serve, or with a server that answers Range requests",
    });
  }
}

/** A folder behind a URL, on the page's own server. */
export function urlFolder(url) {
  const base = new URL(url.endsWith("/") ? url : `${url}/`, self.location.href);
  return {
    name: decodeURIComponent(base.pathname.split("/").at(-2) || base.host),
    async blob(path) {
      const file = new URL(path.split("/").map(encodeURIComponent).join("/"), base).href;
      let answer;
      try {
        answer = await fetch(file, { method: "HEAD" });
      } catch {
        throw new Fault(base.href, {
          found: "cannot be reached from this page",
          expected: "a folder on this page's own server",
          remedy: "pass it to edge-dit serve, or pick the folder on this device",
        });
      }
      return answer.ok ? new RemoteBlob(file, Number(answer.headers.get("Content-Length"))) : null;
    },
  };
}

/** A folder of picked files: [path, File] pairs. */
export function filesFolder(name, files) {
  const map = new Map(files);
  return { name, blob: async (path) => map.get(path) ?? null };
}

/** A folder in OPFS, the browser's own storage of this origin; made if it is not there. */
export async function storedFolder(...path) {
  let handle = await navigator.storage.getDirectory();
  for (const part of path) handle = await handle.getDirectoryHandle(part, { create: true });
  const inside = async (file, create) => {
    const parts = file.split("/");
    let folder = handle;
    for (const part of parts.slice(0, -1)) {
      folder = await folder.getDirectoryHandle(part, { create });
    }
    return [folder, parts.at(-1)];
  };
  return {
    name: path.at(-1),
    async blob(file) {
      try {
        const [folder, name] = await inside(file, false);
        return await (await folder.getFileHandle(name)).getFile();
      } catch (error) {
        if (error.name === "NotFoundError") return null;
        throw error;
      }
    },
    /** Write a file whole or not at all: the old one is replaced when all bytes are written. */
    async write(file, ...pieces) {
      const [folder, name] = await inside(file, true);
      const stream = await (await folder.getFileHandle(name, { create: true })).createWritable();
      try {
        for (const piece of pieces) await stream.write(piece);
        await stream.close();
      } catch (error) {
        await stream.abort().catch(() => {});
        throw error.name === "QuotaExceededError" ? noRoom(file) : error;
      }
    },
    async remove(file) {
      const [folder, name] = await inside(file, false);
      await folder.removeEntry(name);
    },
  };
}

const noRoom = (where, needed = 0, left = 0) => new Fault(where, {
  found: "the browser has too little room for it",
  expected: needed ? `${inWords(needed)}, of which it has ${inWords(left)}` : "",
  remedy: "remove other bundles below, free space on the device, or leave a private window",
});

/** Throw a Fault unless the browser grants this page so many more bytes. */
export async function checkRoom(where, needed) {
  const { quota, usage } = await navigator.storage.estimate();
  if (needed > quota - usage) throw noRoom(where, needed, quota - usage);
}

export function inWords(bytes) {
  const [unit, size] = bytes < 1e6 ? ["kB", 1e3] : bytes < 1e9 ? ["MB", 1e6] : ["GB", 1e9];
  return `${(bytes / size).toFixed(bytes < 10 * size ? 1 : 0)} ${unit}`;
}
