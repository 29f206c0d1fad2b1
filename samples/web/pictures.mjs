// Pictures: decoded and resized as Pillow does, cut as Eq. 1 of docs/method.md says, and through the
// autoencoder in tiles.

import { Fault } from "./files.mjs";

const MOST_ASPECT = 8;
const SUPPORT = 3;
/** Bits behind the point in a weight of `resample`. */
const PRECISION = 22;
const f32 = Math.fround;

/**
 * A picture, upright, sRGB, transparent pixels on white, its shorter side `resolution` pixels.
 * @returns {height, width, pixels: Uint8Array of rows of RGB}.
 * @throws Fault: not a picture that this browser reads, or far longer than wide.
 */
export async function readPicture(name, blob, resolution) {
  const bitmap = await createImageBitmap(blob).catch(() => {
    throw new Fault(name, { found: "not a readable image", remedy: "leave it out, or save it as PNG or JPEG" });
  });
  let { width, height } = bitmap;
  if (Math.max(width, height) > MOST_ASPECT * Math.min(width, height)) {
    throw new Fault(name, {
      found: `${width} x ${height} pixels`, expected: `at most ${MOST_ASPECT} times as long as wide`,
      remedy: "crop it",
    });
  }
  const canvas = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  canvas.fillStyle = "white";
  canvas.fillRect(0, 0, width, height);
  canvas.drawImage(bitmap, 0, 0);
  bitmap.close();
  const { data } = canvas.getImageData(0, 0, width, height);
  let pixels = new Uint8Array(width * height * 3);
  for (let n = 0; n < width * height; n++) {
    for (let c = 0; c < 3; c++) pixels[3 * n + c] = data[4 * n + c];
  }
  const short = Math.min(width, height);
  const longer = (side) => Math.max(resolution, roundEven((side * resolution) / short));
  if (short !== resolution) {
    const [newWidth, newHeight] = [longer(width), longer(height)];
    if (newWidth !== width) pixels = resample(pixels, height, width, newWidth, false);
    if (newHeight !== height) pixels = resample(pixels, newWidth, height, newHeight, true);
    [width, height] = [newWidth, newHeight];
  }
  return { height, width, pixels };
}

/** Lanczos' window along rows or columns, with the whole-number weights of Pillow. */
function resample(pixels, lines, from, to, columns) {
  const scale = from / to;
  const wide = Math.max(1, scale);
  const reach = SUPPORT * wide;
  const found = new Uint8Array(lines * to * 3);
  const [step, line] = columns ? [lines * 3, 3] : [3, from * 3];
  const [newStep, newLine] = columns ? [lines * 3, 3] : [3, to * 3];
  for (let place = 0; place < to; place++) {
    const center = (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - reach + 0.5));
    const end = Math.min(from, Math.trunc(center + reach + 0.5));
    const weights = Array.from({ length: end - first },
      (_, n) => lanczos((n + first - center + 0.5) * (1 / wide)));
    const total = weights.reduce((a, b) => a + b, 0);
    const whole = weights.map((w) => {
      const share = (w / total) * 2 ** PRECISION;
      return Math.trunc(share < 0 ? share - 0.5 : share + 0.5);
    });
    for (let n = 0; n < lines; n++) {
      for (let c = 0; c < 3; c++) {
        let sum = 2 ** (PRECISION - 1);
        const start = n * line + c + first * step;
        for (let k = 0; k < whole.length; k++) sum += whole[k] * pixels[start + k * step];
        found[n * newLine + place * newStep + c] = Math.min(255, Math.max(0, sum >> PRECISION));
      }
    }
  }
  return found;
}

const sinc = (x) => (x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI));
const lanczos = (x) => (x >= -SUPPORT && x < SUPPORT ? sinc(x) * sinc(x / SUPPORT) : 0);

/** Rounded, halves to the even neighbour. */
export function roundEven(x) {
  const low = Math.floor(x);
  if (x - low !== 0.5) return Math.round(x);
  return low % 2 ? low + 1 : low;
}

/** [1, 3, height, width] in [-1, 1]. */
export function asTensor({ height, width, pixels }) {
  const area = height * width;
  const data = new Float32Array(3 * area);
  for (let c = 0; c < 3; c++) {
    for (let n = 0; n < area; n++) data[c * area + n] = f32(f32(pixels[3 * n + c] / f32(127.5)) - 1);
  }
  return { type: "float32", dims: [1, 3, height, width], data };
}

/** Side in pixels of what passes the frozen blocks: a patch, or the whole picture of a window. */
export const passing = (plan) => (plan.window ? plan.s_max : plan.s_min);

/** The square that a draw cuts of a picture, in pixels: Eq. 1, in float32. */
export function cropOf(plan, sigma, u, v, height, width) {
  const [least, most, multiple] = [passing(plan), plan.s_max, plan.multiple];
  const wanted = f32(least + f32(f32(sigma) * (most - least)));
  const side = roundEven(f32(wanted / multiple)) * multiple;
  const start = (share, size) => Math.min(Math.floor(f32(f32(share) * (size - side + 1))), size - side);
  return { top: start(v, height), left: start(u, width), side };
}

/**
 * What `run` makes of a picture [1, C, H, W] in overlapping tiles, blended.
 * @param run a tile -> list of tensors [1, D, h u / d, w u / d].
 * @param step tiles begin at multiples of it.
 * @param scale [u, d].
 */
export async function tiled(image, run, tile, step, [up, down]) {
  const [, channels, height, width] = image.dims;
  const [rows, columns] = [tileStarts(height, tile, step), tileStarts(width, tile, step)];
  if (rows.length === 1 && columns.length === 1) return run(image);
  const [h, w] = [Math.min(height, tile), Math.min(width, tile)];
  const out = (size) => (size * up) / down;
  const [rampRows, rampColumns] = [ramp(out(h), rows), ramp(out(w), columns)];
  const weights = new Float32Array(out(height) * out(width));
  let sums;
  for (const top of rows) {
    for (const left of columns) {
      const made = await run(cut(image, channels, top, left, h, w));
      sums ??= made.map(({ dims }) => new Float32Array(dims[1] * weights.length));
      for (let y = 0; y < out(h); y++) {
        for (let x = 0; x < out(w); x++) {
          const weight = f32(rampRows[y] * rampColumns[x]);
          const place = (out(top) + y) * out(width) + out(left) + x;
          weights[place] += weight;
          made.forEach(({ dims, data }, part) => {
            for (let c = 0; c < dims[1]; c++) {
              sums[part][c * weights.length + place] += f32(data[(c * out(h) + y) * out(w) + x] * weight);
            }
          });
        }
      }
    }
  }
  return sums.map((data) => ({
    type: "float32", dims: [1, data.length / weights.length, out(height), out(width)],
    data: data.map((value, n) => value / weights[n % weights.length]),
  }));
}

function cut({ dims, data }, channels, top, left, h, w) {
  const part = new Float32Array(channels * h * w);
  for (let c = 0; c < channels; c++) {
    for (let y = 0; y < h; y++) {
      const start = (c * dims[2] + top + y) * dims[3] + left;
      part.set(data.subarray(start, start + w), (c * h + y) * w);
    }
  }
  return { type: "float32", dims: [1, channels, h, w], data: part };
}

function tileStarts(size, tile, step) {
  if (size <= tile) return [0];
  const stride = Math.max(step, Math.floor((tile - Math.floor(tile / 4)) / step) * step);
  const count = Math.ceil((size - tile) / stride) + 1;
  const even = Array.from({ length: count },
    (_, n) => roundEven((n * (size - tile)) / (count - 1) / step) * step);
  return [...new Set(even)];
}

/** Weights along a side: from the ends they rise over a quarter of it to 1. */
function ramp(size, starts) {
  return Float32Array.from({ length: size }, (_, n) => starts.length === 1 ? 1
    : Math.min(f32(f32(Math.min(n, size - 1 - n) + 0.5) / Math.max(1, Math.floor(size / 4))), 1));
}
