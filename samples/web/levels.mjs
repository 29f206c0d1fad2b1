// Latents as the transformer takes them, and noise levels: docs/bundle.md, "A draw, step by step".

import { roundEven } from "./pictures.mjs";

const f32 = Math.fround;

export const tensor = (dims, data) => ({ type: "float32", dims, data });
export const count = (dims) => dims.reduce((a, b) => a * b, 1);

/** Dimensions of the transformer's latents of a square of `side` latents. */
export function shapeOf(facts, side) {
  const channels = channelsOf(facts);
  return facts.packed ? [1, (side * side) / 4, channels * 4] : [1, channels, side, side];
}

/** Channels of the autoencoder's latents. */
const channelsOf = ({ scale, of_tokens: ofTokens }) => (ofTokens ? scale.length / 4 : scale.length);

/** Call visit(place in [1, C, h, w], place among the transformer's, channel that is scaled). */
function eachLatent(channels, height, width, { packed, of_tokens: ofTokens }, visit) {
  let place = 0;
  for (let c = 0; c < channels; c++) {
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++, place++) {
        const token = (y >> 1) * (width >> 1) + (x >> 1);
        const inToken = c * 4 + (y & 1) * 2 + (x & 1);
        visit(place, packed ? token * channels * 4 + inToken : place, ofTokens ? inToken : c);
      }
    }
  }
}

/** The transformer's latents of the autoencoder's [1, C, h, w]. */
export function scaledLatents(facts, { dims: [, channels, height, width], data }) {
  const found = new Float32Array(data.length);
  eachLatent(channels, height, width, facts, (raw, place, c) => {
    found[place] = f32(data[raw] - f32(facts.shift[c])) * f32(facts.scale[c]);
  });
  return tensor(facts.packed ? [1, (height * width) / 4, channels * 4] : [1, channels, height, width], found);
}

/** The autoencoder's latents [1, C, side, side] of the transformer's. */
export function rawLatents(facts, { data }, side) {
  const found = new Float32Array(data.length);
  const channels = channelsOf(facts);
  eachLatent(channels, side, side, facts, (raw, place, c) => {
    found[raw] = f32(data[place] / f32(facts.scale[c])) + f32(facts.shift[c]);
  });
  return tensor([1, channels, side, side], found);
}

const mixed = (a, x, b, y) => x.map((value, n) => f32(f32(a) * value) + f32(f32(b) * y[n]));

/** What the model predicts, and at which noise levels. */
export function levelsOf({ kind, logit_normal: logit, precondition }, table) {
  if (kind === "noise") {
    const timestep = (sigma) => Math.max(0, roundEven(sigma * table.length) - 1);
    return {
      level: (share) => f32((Math.floor(share * table.length) + 1) / table.length),
      timestep,
      noised(clean, noise, sigma) {
        const alpha = table[timestep(sigma)];
        return mixed(alpha ** 0.5, clean, (1 - alpha) ** 0.5, noise);
      },
      target: (clean, noise) => noise,
      weight: () => null,
    };
  }
  const sigmas = Float32Array.from(table);
  return {
    level(share) {
      const s = logit ? 1 / (1 + Math.exp(-normalQuantile(Math.min(Math.max(share, 1e-6), 1 - 1e-6)))) : share;
      return sigmas[Math.floor(s * sigmas.length)];
    },
    timestep: (sigma) => sigma * sigmas.length,
    noised: (clean, noise, sigma) => mixed(1 - sigma, clean, sigma, noise),
    target: (clean, noise) => noise.map((value, n) => value - clean[n]),
    weight: (sigma) => (precondition ? sigma ** 2 : null),
  };
}

const polynomial = (coefficients, x) => coefficients.reduceRight((sum, c) => sum * x + c, 0);

/** The standard normal quantile: Wichura, algorithm AS 241, PPND16 (Applied Statistics 37, 1988). */
function normalQuantile(p) {
  const q = p - 0.5;
  if (Math.abs(q) <= 0.425) {
    const r = 0.180625 - q * q;
    return q * polynomial([3.3871328727963666080, 1.3314166789178437745e2, 1.9715909503065514427e3,
      1.3731693765509461125e4, 4.5921953931549871457e4, 6.7265770927008700853e4,
      3.3430575583588128105e4, 2.5090809287301226727e3], r)
      / polynomial([1, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
        2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4,
        5.2264952788528545610e3], r);
  }
  const r = Math.sqrt(-Math.log(Math.min(p, 1 - p)));
  const x = r <= 5
    ? polynomial([1.42343711074968357734, 4.63033784615654529590, 5.76949722146069140550,
      3.64784832476320460504, 1.27045825245236838258, 2.41780725177450611770e-1,
      2.27238449892691845833e-2, 7.74545014278341407640e-4], r - 1.6)
      / polynomial([1, 2.05319162663775882187, 1.67638483018380384940, 6.89767334985100004550e-1,
        1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4,
        1.05075007164441684324e-9], r - 1.6)
    : polynomial([6.65790464350110377720, 5.46378491116411436990, 1.78482653991729133580,
      2.96560571828504891230e-1, 2.65321895265761230930e-2, 1.24266094738807843860e-3,
      2.71155556874348757815e-5, 2.01033439929228813265e-7], r - 5)
      / polynomial([1, 5.99832206555887937690e-1, 1.36929880922735805310e-1,
        1.48753612908506148525e-2, 7.86869131145613259100e-4, 1.84631831751005468180e-5,
        1.42151175831644588870e-7, 2.04426310338993978564e-15], r - 5);
  return q < 0 ? -x : x;
}
