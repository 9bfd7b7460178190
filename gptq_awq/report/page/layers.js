// Error by block, a plot per site, for the runs that are chosen.
const DASHES = [null, "6 3", "2 3", "8 3 2 3"];
const MOST_LINES = 8;
const chosen = new Set();

function chooseFirst(runs) {
  // One run per method at the fewest bits that two methods have: there the differences are.
  const known = runs.filter((run) => run.layers && run.bits != null);
  const groups = [...Map.groupBy(known, (run) => `${run.model} ${run.bits}`).values()];
  const firsts = groups.map((group) => [...Map.groupBy(group, (run) => run.method).values()].map((all) => all[0]));
  firsts.sort((a, b) => (b.length > 1) - (a.length > 1) || a[0].bits - b[0].bits);
  (firsts[0] ?? []).slice(0, MOST_LINES).forEach((run) => chosen.add(run));
}

const profile = (run) => run.layers[$("#layers-of").value] ?? {};

function layersChoices() {
  if (!data.runs.some((run) => run.layers)) return;
  const kinds = ["output", "weights"].filter((kind) => data.runs.some((run) => run.layers?.[kind]));
  $("#layers-of").append(...kinds.map((kind) => element("option", { value: kind }, kind)));
  $("#layers-of").addEventListener("change", draw);
  chooseFirst(data.runs);
  for (const run of data.runs) {
    if (!run.layers) continue;
    const box = element("input", { type: "checkbox" });
    box.checked = chosen.has(run);
    box.addEventListener("change", () => {
      if (box.checked) chosen.add(run);
      else chosen.delete(run);
      draw();
    });
    const label = element("label", {}, box, named(run));
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

function sitePlot(site, runs, styles, y0, y1, blocks, width) {
  const box = { left: 52, right: width - 8, top: 26, bottom: 200 };
  const plot = svg("svg", { viewBox: `0 0 ${width} 238`, role: "img", "aria-label": `error of ${site} by block` });
  const x = linear(0, Math.max(1, blocks - 1), box.left, box.right);
  x.ticks = x.ticks.filter(Number.isInteger);
  const y = logarithmic(y0, y1, box.bottom, box.top + 6);
  axes(plot, x, y, box, { x: "block", y: `${site} (log)` });
  for (const run of runs) {
    const values = profile(run)[site] ?? [];
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
      tip(dot, `${named(run)}\n${site}, block ${b}: ${figures(v)}`);
      plot.append(dot);
    });
  }
  const made = framed(`error_${site}`, element("figure", {}, plot));
  made.style.width = `${width}px`;
  return made;
}

function drawLayers(runs) {
  const section = $("#layers");
  section.hidden = !data.runs.some((run) => run.layers);
  if (section.hidden) return;
  const visible = new Set(runs);
  for (const run of data.runs) if (run.choice) run.choice.hidden = !visible.has(run);
  const picked = runs.filter((run) => chosen.has(run));
  const lines = picked.filter((run) => Object.keys(profile(run)).length).slice(0, MOST_LINES);
  const styles = lineStyles(lines);
  const sites = unique(lines.flatMap((run) => Object.keys(profile(run))));
  const values = lines.flatMap((run) => Object.values(profile(run)).flat()).filter((v) => v > 0);
  const blocks = Math.max(1, ...lines.flatMap((run) => Object.values(profile(run)).map((all) => all.length)));
  const keys = lines.map((run) => [named(run), svg("path", { class: "line", d: "M-11,0H11", ...styles.get(run) })]);
  const all = room(section), columns = Math.max(1, Math.min(sites.length, Math.floor(all / 270)));
  const width = Math.floor((all - 28 * (columns - 1)) / columns);
  const ends = [Math.min(...values) / 1.2, Math.max(...values) * 1.2];
  const plots = values.length ? sites.map((site) => sitePlot(site, lines, styles, ...ends, blocks, width)) : [];
  section.querySelector(".plots").replaceChildren(...plots);
  section.querySelector(".plots").classList.add("many");
  section.querySelector(".legend")?.remove();
  section.querySelector(".plots").before(legend(keys));
  section.querySelector(".note").textContent = layersNote(picked, lines);
}

function layersNote(picked, lines) {
  const what = {
    output: "‖error‖² / ‖signal‖² of a linear's output on calibration data, mean over the linears of a site.",
    weights: "‖error‖² / ‖weight‖² of a linear's weight, mean over the linears of a site.",
  };
  const short = picked.length - lines.length;
  const unknown = short ? ` ${short} of the chosen runs are not drawn: methods without calibration know errors of weights only, and ${MOST_LINES} lines are the most.` : "";
  const left = data.runs.filter((run) => !run.layers).length;
  return what[$("#layers-of").value] + unknown + (left ? ` ${left} run(s) have no profile here.` : "");
}
