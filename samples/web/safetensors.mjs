// Safetensors files with the digests of docs/bundle.md. A tensor here is {type, dims, data}, which
// are the arguments of onnxruntime's Tensor.

import { Fault, ascii, digestOf, sha256 } from "./files.mjs";

const KINDS = {
  F64: { type: "float64", code: "<f8", array: Float64Array },
  F32: { type: "float32", code: "<f4", array: Float32Array },
  F16: { type: "float16", code: "<f2", array: globalThis.Float16Array ?? Uint16Array },
  I64: { type: "int64", code: "<i8", array: BigInt64Array },
  I32: { type: "int32", code: "<i4", array: Int32Array },
  I8: { type: "int8", code: "|i1", array: Int8Array },
  U8: { type: "uint8", code: "|u1", array: Uint8Array },
};
const NAME_OF = Object.fromEntries(Object.entries(KINDS).map(([name, k]) => [k.type, name]));
const HEADER_LIMIT = 2 * 2 ** 20;
const MOST_DIMENSIONS = 8;
/** Tensors at most so many bytes apart are read at once. */
const GAP = 2 ** 16;

const product = (dims) => dims.reduce((a, b) => a * b, 1);
const natural = (value) => Number.isInteger(value) && value >= 0 && value < 2 ** 48;

/** Digest of a header: of its metadata but this digest, and of each tensor's kind and shape. */
function seal(metadata, places) {
  const { sha256: _, ...rest } = metadata;
  const kinds = Object.fromEntries([...places].map(([n, p]) => [n, [KINDS[p.kind].code, p.dims]]));
  return digestOf([rest, kinds]);
}

function placeOf(name, entry, start) {
  const { dtype, shape, data_offsets: offsets } = entry ?? {};
  const whole = KINDS[dtype] && Array.isArray(shape) && shape.every(natural)
    && shape.length <= MOST_DIMENSIONS && Array.isArray(offsets) && offsets.length === 2
    && offsets.every(natural)
    && offsets[1] - offsets[0] === product(shape) * KINDS[dtype].array.BYTES_PER_ELEMENT;
  if (!whole) throw new Error(`tensor ${name} does not fit its description`);
  return { kind: dtype, dims: shape, begin: start + offsets[0], end: start + offsets[1] };
}

/** A safetensors file whose header was checked; `places`: name -> its bytes. */
export class TensorFile {
  constructor(blob, where, metadata, places) {
    Object.assign(this, { blob, where, metadata, places });
  }

  get hashed() {
    return "sha256" in this.metadata;
  }

  /** @throws Fault: not a whole safetensors file, or a header that was changed. */
  static async open(blob, where, remedy = "make it again") {
    try {
      const length = Number(
        new DataView(await blob.slice(0, 8).arrayBuffer()).getBigUint64(0, true));
      if (length > Math.min(HEADER_LIMIT, blob.size - 8)) throw new Error(`a header of ${length}`);
      const text = new TextDecoder().decode(await blob.slice(8, 8 + length).arrayBuffer());
      const { __metadata__: metadata = {}, ...entries } = JSON.parse(text);
      const places = new Map(
        Object.entries(entries).map(([name, e]) => [name, placeOf(name, e, 8 + length)]));
      let end = 8 + length;
      for (const place of [...places.values()].sort((a, b) => a.begin - b.begin || a.end - b.end)) {
        if (place.begin !== end) throw new Error("tensors with gaps");
        end = place.end;
      }
      if (end !== blob.size) throw new Error(`${blob.size} bytes, its header accounts for ${end}`);
      const sealed = "sha256" in metadata;
      if (sealed && metadata.sha256 !== (await seal(metadata, places))) {
        throw new Error("the header is not the one that was written");
      }
      if (sealed && [...places.keys()].some((name) => !(`sha256.${name}` in metadata))) {
        throw new Error("a tensor without digest");
      }
      return new TensorFile(blob, where, metadata, places);
    } catch (error) {
      if (error instanceof Fault) throw error;
      throw new Fault(where, { found: `not a whole safetensors file (${error.message})`, remedy });
    }
  }

  /**
   * Tensors by name, neighbours in one read.
   * @param names of tensors; default all.
   * @param check whether to compare each with its digest, where the file has digests.
   */
  async read(names = this.places.keys(), check = true) {
    const wanted = Array.from(names, (name) => {
      const place = this.places.get(name);
      if (!place) throw new Fault(this.where, { found: `no tensor ${name}` });
      return { name, ...place };
    }).sort((a, b) => a.begin - b.begin);
    const groups = [];
    for (const place of wanted) {
      const last = groups.at(-1);
      if (last && place.begin <= last.end + GAP) {
        last.places.push(place);
        last.end = Math.max(last.end, place.end);
      } else groups.push({ begin: place.begin - (place.begin % 8), end: place.end, places: [place] });
    }
    const found = {};
    await Promise.all(groups.map(async ({ begin, end, places }) => {
      const bytes = await this.blob.slice(begin, end).arrayBuffer();
      for (const { name, kind, dims, begin: from, end: to } of places) {
        if (check && this.hashed) await this.#check(name, new Uint8Array(bytes, from - begin, to - from));
        const data = new KINDS[kind].array(bytes, from - begin, product(dims));
        found[name] = { type: KINDS[kind].type, dims, data };
      }
    }));
    return found;
  }

  async #check(name, bytes) {
    if ((await sha256(bytes)) !== this.metadata[`sha256.${name}`]) {
      throw new Fault(this.where, { found: `damaged: ${name} is not what was written` });
    }
  }
}

const bytesOf = ({ data }) => new Uint8Array(data.buffer, data.byteOffset, data.byteLength);

/** A safetensors file with digests as pieces of a Blob; the same bytes as Python writes. */
export async function tensorPieces(tensors, metadata = {}) {
  const size = (name) => tensors[name].data.BYTES_PER_ELEMENT;
  const names = Object.keys(tensors).sort((a, b) => size(b) - size(a) || (a < b ? -1 : 1));
  const sealed = { ...metadata };
  const entries = {};
  const places = new Map();
  let end = 0;
  for (const name of names) {
    const { type, dims, data } = tensors[name];
    const begin = end;
    end += data.byteLength;
    entries[name] = { dtype: NAME_OF[type], shape: dims, data_offsets: [begin, end] };
    places.set(name, { kind: NAME_OF[type], dims });
    sealed[`sha256.${name}`] = await sha256(bytesOf(tensors[name]));
  }
  sealed.sha256 = await seal(sealed, places);
  const text = ascii(JSON.stringify({ __metadata__: sealed, ...entries }));
  const header = new TextEncoder().encode(text.padEnd(Math.ceil(text.length / 8) * 8));
  const length = new BigUint64Array([BigInt(header.length)]);
  return [length, header, ...names.map((name) => bytesOf(tensors[name]))];
}

/** A tensor as float32, float16 widened. */
export function widened({ type, dims, data }) {
  if (type === "float32") return { type, dims, data };
  const wide = data instanceof Uint16Array ? Float32Array.from(data, half) : new Float32Array(data);
  return { type: "float32", dims, data: wide };
}

function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1024 + fraction) * 2 ** (exponent - 25);
}
