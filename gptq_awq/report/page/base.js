// What all parts share: the data, elements, scales, axes.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (selector) => document.querySelector(selector);

function number(value) {
  return { inf: Infinity, "-inf": -Infinity, nan: NaN }[value] ?? value;
}

for (const run of data.runs) for (const point of run.metrics) if (point) point.forEach((v, i) => (point[i] = number(v)));

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value != null) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) if (value != null) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const unique = (values) => [...new Set(values)];
const methods = unique(data.runs.map((run) => run.method)).sort();

const named = (run) => (data.tables.length > 1 ? `${run.model}: ${run.label}` : run.label);

// A method looks the same in every report, plot and notebook: looks.py has the table.
const hue = (method) => data.looks[method][1];
const colour = (method) => `var(--c${hue(method)})`;

// Shapes tell methods apart in print and without colour.
const SHAPES = [
  "M-4.5,0a4.5,4.5 0 1,0 9,0a4.5,4.5 0 1,0 -9,0",
  "M-4,-4h8v8h-8Z",
  "M0,-5.5L5.5,0L0,5.5L-5.5,0Z",
  "M0,-5.2L5.2,4H-5.2Z",
  "M0,5.2L5.2,-4H-5.2Z",
  "M-1.6,-5h3.2v3.4h3.4v3.2h-3.4v3.4h-3.2v-3.4h-3.4v-3.2h3.4Z",
  "M-5,-2.5L0,-5.2L5,-2.5V2.5L0,5.2L-5,2.5Z",
  "M-4.6,-2.2L-2.2,-4.6L0,-2.4L2.2,-4.6L4.6,-2.2L2.4,0L4.6,2.2L2.2,4.6L0,2.4L-2.2,4.6L-4.6,2.2L-2.4,0Z",
];
const shape = (method) => SHAPES[data.looks[method][2]];

function figures(value) {
  if (value == null) return "";
  if (!Number.isFinite(value)) return String(value).replace("Infinity", "inf");
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(+value.toPrecision(4));
}

// A scale from data to pixels, with its ticks. A short logarithmic scale has those of a linear one.
function linear(low, high, from, to) {
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) * 0.05, high + (Math.abs(high) || 1) * 0.05];
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const ticks = [];
  for (let n = Math.ceil(low / step); n * step <= high + step * 1e-9; n++) ticks.push(+(n * step).toPrecision(12));
  return Object.assign((x) => from + ((x - low) / (high - low)) * (to - from), { ticks });
}

function logarithmic(low, high, from, to) {
  if (low === high) [low, high] = [low / 1.5, high * 1.5];
  const position = (x) => from + (Math.log(x / low) / Math.log(high / low)) * (to - from);
  const decades = Math.log10(high / low);
  if (decades < 0.6) return Object.assign(position, { ticks: linear(low, high, from, to).ticks });
  const every = Math.max(1, Math.round(decades / 6));
  const factors = decades < 1.2 ? [1, 1.5, 2, 3, 5, 7] : decades < 2.5 ? [1, 2, 5] : [1];
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += every)
    for (const factor of factors) {
      const tick = +(factor * 10 ** power).toPrecision(3);
      if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
    }
  return Object.assign(position, { ticks });
}

// One unit of a plot is one pixel of the page, so that its text is as large as other text.
const room = (section) => Math.max(320, section.clientWidth);

function axes(plot, x, y, box, labels) {
  for (const tick of y.ticks) {
    plot.append(svg("line", { class: "grid", x1: box.left, x2: box.right, y1: y(tick), y2: y(tick) }));
    plot.append(svg("text", { x: box.left - 8, y: y(tick) + 4, "text-anchor": "end" }, figures(tick)));
  }
  for (const tick of x.ticks) {
    plot.append(svg("line", { class: "axis", x1: x(tick), x2: x(tick), y1: box.bottom, y2: box.bottom + 4 }));
    plot.append(svg("text", { x: x(tick), y: box.bottom + 17, "text-anchor": "middle" }, figures(tick)));
  }
  plot.append(svg("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
  plot.append(svg("text", { x: box.right, y: box.bottom + 33, "text-anchor": "end" }, labels.x));
  plot.append(svg("text", { class: "label", x: 0, y: 12 }, labels.y));
}

// The tooltip: for a pointer, and for the keyboard.
function tip(target, text) {
  const box = $("#tip");
  const show = (x, y) => {
    box.textContent = text;
    box.hidden = false;
    box.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - box.offsetWidth - 8))}px`;
    box.style.top = `${y + 18 + box.offsetHeight > innerHeight ? y - box.offsetHeight - 12 : y + 18}px`;
  };
  target.addEventListener("pointermove", (event) => show(event.clientX, event.clientY));
  target.addEventListener("pointerleave", () => (box.hidden = true));
  target.addEventListener("focus", () => {
    const { left, bottom } = target.getBoundingClientRect();
    show(left, bottom - 14);
  });
  target.addEventListener("blur", () => (box.hidden = true));
  target.setAttribute("aria-label", text);
  target.setAttribute("role", "img");
}

function legend(items) {
  const made = element("div", { class: "legend" });
  for (const [text, picture] of items) made.append(element("span", {}, svg("svg", { viewBox: "-11 -6 22 12" }, picture), text));
  return made;
}
