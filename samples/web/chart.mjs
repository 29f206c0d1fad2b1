// The curve of losses: a dot a step, and the mean of the last steps as a line.

const SVG = "http://www.w3.org/2000/svg";
const [LEFT, RIGHT, TOP, BOTTOM] = [44, 12, 10, 26];
const MOST_DOTS = 400;

/** Round numbers between two, about so many. */
function ticks(low, high, about) {
  const rough = (high - low) / about || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high; n++) found.push(Number((n * step).toPrecision(12)));
  return found;
}

/** Mean of each loss and those before it, up to `width` of them; NaN counts for nothing. */
function means(losses, width) {
  return losses.map((_, end) => {
    const near = losses.slice(Math.max(0, end + 1 - width), end + 1).filter(Number.isFinite);
    return near.reduce((a, b) => a + b, 0) / near.length;
  });
}

function add(svg, name, attributes, text = "") {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  svg.append(element);
}

/** Draw losses into an <svg>, on an axis of all steps of the run. */
export function drawChart(svg, losses, steps) {
  const { width, height } = svg.getBoundingClientRect();
  if (!width) return;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  const finite = losses.filter(Number.isFinite);
  const low = finite.length ? Math.min(...finite) : 0;
  const high = finite.length ? Math.max(...finite) : 1;
  const room = (high - low) * 0.08 || 0.1;
  const [floor, roof] = [Math.max(0, low - room), high + room];
  const x = (step) => LEFT + ((width - LEFT - RIGHT) * step) / Math.max(steps, 1);
  const y = (loss) => TOP + ((height - TOP - BOTTOM) * (roof - loss)) / (roof - floor);
  for (const value of ticks(floor, roof, 4)) {
    add(svg, "line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) });
    add(svg, "text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, String(value));
  }
  for (const step of ticks(0, steps, width / 110).filter(Number.isInteger)) {
    add(svg, "text", { x: x(step), y: height - 6, "text-anchor": "middle" }, String(step));
  }
  const every = Math.ceil(losses.length / MOST_DOTS);
  losses.forEach((loss, n) => {
    if (Number.isFinite(loss) && n % every === 0) add(svg, "circle", { class: "dot", cx: x(n + 1), cy: y(loss), r: 2.5 });
  });
  const mean = means(losses, Math.max(3, Math.ceil(steps / 12)));
  const points = mean.map((loss, n) => `${x(n + 1).toFixed(1)},${y(loss).toFixed(1)}`);
  add(svg, "polyline", { class: "mean", points: points.filter((p) => !p.includes("NaN")).join(" ") });
  const words = losses.length ? `${mean.at(-1).toFixed(3)}, the mean of the last, after ${losses.length} of ${steps}` : "no step yet";
  svg.setAttribute("aria-label", `Loss by step: ${words}`);
}
