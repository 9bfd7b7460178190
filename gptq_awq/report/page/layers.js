// Error by block, a plot per site, for the runs that are chosen.
const DASHES = [null, "6 3", "2 3", "8 3 2 3"];
const MOST_LINES = 8;
const chosen = new Set();

function chooseFirst(runs) {
  // One run per method, at the bits that most methods have.
  const known = runs.filter((run) => run.layers);
  const byBits = Map.groupBy(known, (run) => `${run.model} ${run.bits}`);
  let best = [];
  for (const group of byBits.values()) {
    const firsts = [...Map.groupBy(group, (run) => run.method).values()].map((all) => all[0]);
    if (firsts.length > best.length) best = firsts;
  }
  best.slice(0, MOST_LINES).forEach((run) => chosen.add(run));
}

function layersChoices() {
  if (!data.runs.some((run) => run.layers)) return;
  chooseFirst(data.runs);
  const several = data.tables.length > 1;
  for (const run of data.runs) {
    if (!run.layers) continue;
    const box = element("input", { type: "checkbox" });
    box.checked = chosen.has(run);
    box.addEventListener("change", () => {
      if (box.checked) chosen.add(run);
      else chosen.delete(run);
      draw();
    });
    const label = element("label", {}, box, (several ? `${run.model}: ` : "") + run.label);
    run.choice = label;
    $("#layers-runs").append(label);
  }
}

function lineStyles(runs) {
  const seen = new Map();
  return new Map(runs.map((run) => {
    const before = seen.get(run.method) ?? 0;
    seen.set(run.method, before + 1);
    return [run, { stroke: colour(run.method), "stroke-dasharray": DASHES[before % DASHES.length] }];
  }));
}

function sitePlot(site, runs, styles, y0, y1, blocks) {
  const box = { left: 58, right: 410, top: 26, bottom: 200 };
  const plot = svg("svg", { viewBox: "0 0 420 238", role: "img", "aria-label": `error of ${site} by block` });
  const x = linear(0, Math.max(1, blocks - 1), box.left, box.right);
  x.ticks = x.ticks.filter(Number.isInteger);
  const y = logarithmic(y0, y1, box.bottom, box.top + 6);
  axes(plot, x, y, box, { x: "block", y: site });
  for (const run of runs) {
    const values = run.layers.sites[site];
    if (!values) continue;
    let pen = "M";
    const path = values.map((v, b) => {
      if (!(v > 0)) return (pen = "M"), "";
      const step = `${pen}${x(b).toFixed(1)},${y(v).toFixed(1)}`;
      pen = "L";
      return step;
    });
    plot.append(svg("path", { class: "line", d: path.join(""), ...styles.get(run) }));
    values.forEach((v, b) => {
      if (!(v > 0)) return;
      const dot = svg("circle", { class: "mark", cx: x(b), cy: y(v), r: blocks > 40 ? 1.6 : 2.6, fill: styles.get(run).stroke });
      tip(dot, `${run.label}\n${site}, block ${b}: ${figures(v)}`);
      plot.append(dot);
    });
  }
  return element("figure", {}, plot);
}

function drawLayers(runs) {
  const section = $("#layers");
  section.hidden = !data.runs.some((run) => run.layers);
  if (section.hidden) return;
  const visible = new Set(runs);
  for (const run of data.runs) if (run.choice) run.choice.hidden = !visible.has(run);
  const lines = runs.filter((run) => chosen.has(run)).slice(0, MOST_LINES);
  const styles = lineStyles(lines);
  const sites = unique(lines.flatMap((run) => Object.keys(run.layers.sites)));
  const values = lines.flatMap((run) => Object.values(run.layers.sites).flat()).filter((v) => v > 0);
  const blocks = Math.max(1, ...lines.flatMap((run) => Object.values(run.layers.sites).map((all) => all.length)));
  const keys = lines.map((run) => [
    (data.tables.length > 1 ? `${run.model}: ` : "") + run.label + (run.layers.output ? "" : " (weights)"),
    svg("path", { class: "line", d: "M-11,0H11", "stroke-width": 2, ...styles.get(run) }),
  ]);
  const plots = values.length ? sites.map((site) => sitePlot(site, lines, styles, Math.min(...values) / 1.2, Math.max(...values) * 1.2, blocks)) : [];
  section.querySelector(".plots").replaceChildren(...plots);
  section.querySelector(".legend")?.remove();
  section.querySelector(".plots").before(legend(keys));
  const output = "Relative output error after quantization, ‖error‖² / ‖signal‖² of a linear's output, mean over the linears of a site.";
  const weights = lines.some((run) => !run.layers.output) ? " “(weights)”: methods without calibration know the relative error of the weights only." : "";
  const left = data.runs.filter((run) => !run.layers).length;
  const without = left ? ` ${left} run(s) have no profile here.` : "";
  section.querySelector(".note").textContent = lines.length ? output + weights + without : "No run is chosen.";
}
