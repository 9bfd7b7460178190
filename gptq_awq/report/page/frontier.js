// Size against quality, one plot per model.
function frontierChoices() {
  const sizes = [["bpw", "bits per weight"], ["mb", "MB"]];
  $("#frontier-x").append(...sizes.map(([key, text]) => element("option", { value: key }, text)));
  data.metrics.forEach((metric, m) => {
    const points = data.runs.map((run) => run.metrics[m]).filter(Boolean);
    const delta = !metric.higher && points.some((point) => point[1] != null);
    $("#frontier-y").append(element("option", { value: m }, delta ? `Δ ${metric.name}` : metric.name));
  });
  for (const id of ["#frontier-x", "#frontier-y"]) $(id).addEventListener("change", draw);
}

// Runs as points: what is lost where that is known, else the value; nothing for full precision, which is what is lost from.
function frontierPoints(runs, size, m) {
  const higher = data.metrics[m].higher;
  return runs.flatMap((run) => {
    const point = run.metrics[m];
    if (!point || run.full || run[size] == null || Number.isNaN(point[0])) return [];
    const [value, delta, low, high, same] = point;
    if (higher && delta != null) return [{ run, x: run[size], y: value, low: value - delta + low, high: value - delta + high, same }];
    return [{ run, x: run[size], y: delta ?? value, low, high, same }];
  });
}

function paretoOptimal(points, higher) {
  const better = (a, b) => (higher ? a.y >= b.y : a.y <= b.y);
  return points
    .filter((p) => Number.isFinite(p.y) && !points.some((q) => q !== p && q.x <= p.x && better(q, p) && (q.x < p.x || q.y !== p.y)))
    .sort((a, b) => a.x - b.x);
}

// Of runs that are equally large and equally good none is the best.
const alone = (p, points) => !points.some((q) => q !== p && q.x === p.x && q.y === p.y);

// Weights of as many bits compete only where activations and cache are rounded alike: a front for each.
function paretoFronts(points, higher) {
  return [...Map.groupBy(points, (p) => JSON.stringify(p.run.rounded)).values()].map((group) => paretoOptimal(group, higher));
}

function frontierPlot(model, points, size, metric, width) {
  const box = { left: 56, right: width - 12, top: 28, bottom: 372 };
  const plot = svg("svg", { viewBox: `0 0 ${width} 412`, role: "img", "aria-label": `${metric.name} over size, ${model}` });
  const finite = points.filter((p) => Number.isFinite(p.y));
  const positive = finite.map((p) => p.y).filter((v) => v > 0);
  const log = !metric.higher && positive.length > 0;
  const floor = log ? Math.min(...positive) / 2 : 0;
  const place = (v) => (log ? Math.max(v, floor) : v);
  const ends = finite.flatMap((p) => [p.y, p.low, p.high]).filter(Number.isFinite).map(place);
  if (!ends.length) return element("p", { class: "muted" }, `${model}: nothing to draw`);
  const xs = finite.map((p) => p.x), pad = (Math.max(...xs) - Math.min(...xs)) * 0.04 || Math.max(...xs) * 0.05;
  const x = linear(Math.min(...xs) - pad, Math.max(...xs) + pad, box.left, box.right);
  const [low, high] = [Math.min(...ends), Math.max(...ends)];
  const y = log ? logarithmic(low / 1.15, high * 1.15, box.bottom, box.top + 8) : linear(low - (high - low) * 0.06, high + (high - low) * 0.06, box.bottom, box.top + 8);
  const delta = points.some((p) => p.run.metrics[data.metrics.indexOf(metric)][1] != null) && !metric.higher;
  const what = (delta ? "Δ " : "") + metric.name;
  axes(plot, x, y, box, { x: size === "mb" ? "size, MB" : "bits per weight, scales and zeros included", y: `${what}, ${metric.higher ? "higher" : "lower"} is better${log ? " (log)" : ""}` });
  const fronts = paretoFronts(points, metric.higher), best = fronts.flat().filter((p) => alone(p, points));
  for (const front of fronts)
    plot.append(svg("path", { class: "front", d: front.map((p, i) => `${i ? "L" : "M"}${x(p.x)},${y(place(p.y))}`).join("") }));
  for (const p of finite) if (Number.isFinite(p.low) && Number.isFinite(p.high))
    plot.append(svg("line", { x1: x(p.x), x2: x(p.x), y1: y(place(p.low)), y2: y(place(p.high)), stroke: colour(p.run.method), opacity: 0.6 }));
  for (const p of finite) {
    const move = `translate(${x(p.x)},${y(place(p.y))})`;
    if (best.includes(p)) plot.append(svg("circle", { class: "ring", r: 8.5, transform: move }));
    const fill = p.same ? "var(--paper)" : colour(p.run.method);
    const mark = svg("path", { class: "mark", d: shape(p.run.method), transform: move, fill, stroke: colour(p.run.method), tabindex: 0 });
    const bounds = Number.isFinite(p.low) ? ` [${figures(p.low)}, ${figures(p.high)}]` : "";
    tip(mark, `${p.run.label}\n${what}: ${figures(p.y)}${bounds}\n${figures(p.run.bpw)} bits per weight, ${figures(p.run.mb)} MB${best.includes(p) ? "\nPareto-optimal" : ""}`);
    plot.append(mark);
    if (log && p.y <= 0) plot.append(svg("text", { x: x(p.x) + 12, y: y(floor) + 4 }, "≤ 0"));
  }
  const keys = unique(finite.map((p) => p.run.method)).sort();
  const key = legend(keys.map((m) => [data.looks[m][0], svg("path", { d: shape(m), fill: colour(m), stroke: colour(m) })]));
  return framed(`frontier_${model}`, element("figure", {}, ...(data.tables.length > 1 ? [element("h3", {}, model)] : []), key, plot));
}

function drawFrontier(runs) {
  const size = $("#frontier-x").value, m = +$("#frontier-y").value;
  const section = $("#frontier");
  section.hidden = !data.metrics.length;
  if (section.hidden) return;
  const plots = unique(runs.map((run) => run.model)).map((model) => {
    const points = frontierPoints(runs.filter((run) => run.model === model), size, m);
    return frontierPlot(model, points, size, data.metrics[m], room(section));
  });
  section.querySelector(".plots").replaceChildren(...plots);
}
