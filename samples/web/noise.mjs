// Random numbers by contract: docs/noise.md in code.

export const CROP = 0;
export const POSTERIOR = 1;
export const NOISE = 2;
const ORDER = 3;
const ROUNDS = 10;

/** Upper and lower 32 bits of a product of two 32-bit words. */
function multiply(a, b) {
  const [ah, al, bh, bl] = [a >>> 16, a & 0xffff, b >>> 16, b & 0xffff];
  const middle = ah * bl + ((al * bl) >>> 16);
  const high = ah * bh + Math.floor(middle / 65536) + Math.floor(((middle & 0xffff) + al * bh) / 65536);
  return [high >>> 0, Math.imul(a, b) >>> 0];
}

const split = (number) => [number >>> 0, Math.floor(number / 2 ** 32) >>> 0];

/** Four words of Philox 4x32-10: of a block of a stream of a seed. */
function block(seed, stream, number) {
  let [k0, k1] = split(seed);
  let [c0, c1] = split(number);
  let [c2, c3] = [stream, 0];
  for (let round = 0; round < ROUNDS; round++) {
    const [h0, l0] = multiply(c0, 0xd2511f53);
    const [h1, l1] = multiply(c2, 0xcd9e8d57);
    [c0, c1, c2, c3] = [(h1 ^ c1 ^ k0) >>> 0, l1, (h0 ^ c3 ^ k1) >>> 0, l0];
    [k0, k1] = [(k0 + 0x9e3779b9) >>> 0, (k1 + 0xbb67ae85) >>> 0];
  }
  return [c0, c1, c2, c3];
}

/** The first words of a seed's stream. Seeds are whole numbers below 2 ** 53. */
export function words(seed, stream, count) {
  const found = new Uint32Array(Math.ceil(count / 4) * 4);
  for (let n = 0; n < found.length / 4; n++) found.set(block(seed, stream, n), 4 * n);
  return found.subarray(0, count);
}

/** Numbers in [0, 1), float32. */
export const uniform = (seed, stream, count) =>
  Float32Array.from(words(seed, stream, count), (word) => (word >>> 8) / 2 ** 24);

/** Standard normal numbers, float32. */
export function normal(seed, stream, count) {
  const drawn = words(seed, stream, count + (count % 2));
  const found = new Float32Array(drawn.length);
  for (let n = 0; n < drawn.length; n += 2) {
    const radius = Math.sqrt(-2 * Math.log((drawn[n] + 1) / 2 ** 32));
    const angle = 2 * Math.PI * (drawn[n + 1] / 2 ** 32);
    found[n] = radius * Math.cos(angle);
    found[n + 1] = radius * Math.sin(angle);
  }
  return found.subarray(0, count);
}

/** The seed of draw `number` of a bank. */
export function seedOf(seed, number) {
  const [low, high] = block(seed, ORDER, number);
  return (high & 0x1fffff) * 2 ** 32 + low;
}

/** Numbers 0 .. count - 1 in the order of an epoch. */
export function permutation(count, seed, epoch) {
  const keys = words(seedOf(seed, epoch), ORDER, count);
  return Array.from(keys.keys()).sort((a, b) => keys[a] - keys[b] || a - b);
}

/** Number of the draw that a step trains on. */
export const drawOrder = (step, draws, seed) =>
  permutation(draws, seed, Math.floor(step / draws))[step % draws];
