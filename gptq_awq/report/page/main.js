// The controls; everything is drawn again when they change.
const state = { text: "", model: "", method: "", bits: "" };

function matches(run, words) {
  if (state.model && run.model !== state.model) return false;
  if (state.method && run.method !== state.method) return false;
  if (state.bits && String(run.bits) !== state.bits) return false;
  return words.every((word) => run.haystack.includes(word));
}

function draw() {
  const words = state.text.toLowerCase().split(/\s+/).filter(Boolean);
  const shown = new Set(data.runs.flatMap((run, i) => (matches(run, words) ? [i] : [])));
  const runs = data.runs.filter((_, i) => shown.has(i));
  $("#count").textContent = `${runs.length} of ${data.runs.length} runs`;
  drawTables(shown);
  drawFrontier(runs);
  drawLayers(runs);
  drawCosts(runs);
  drawDistributions(runs);
  drawSamples(runs);
  remember();
}

// Filters and choices are in the page's address, so that a view can be sent to others.
const CHOICES = ["frontier-x", "frontier-y", "layers-of", "distribution-of"];

function remember() {
  const said = new URLSearchParams(Object.entries(state).filter(([, value]) => value));
  for (const id of CHOICES) if ($(`#${id}`).selectedIndex > 0) said.set(id, $(`#${id}`).value);
  const hash = said.toString();
  if (hash !== location.hash.slice(1)) history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
}

function recall() {
  for (const [key, value] of new URLSearchParams(location.hash.slice(1))) {
    const control = key in state || CHOICES.includes(key) ? $(`#${key}`) : null;
    if (!control || (control.tagName === "SELECT" && ![...control.options].some((option) => option.value === value))) continue;
    control.value = value;
    if (key in state) state[key] = value;
  }
}

function fillSelect(id, all, values, text = String) {
  $(id).append(element("option", { value: "" }, all), ...values.map((value) => element("option", { value }, text(value))));
  $(id).hidden = values.length < 2;
  $(id).addEventListener("change", () => {
    state[id.slice(1)] = $(id).value;
    draw();
  });
}

function drawProvenance() {
  const rows = data.provenance.map(([what, which, count], i) => {
    const first = i === 0 || data.provenance[i - 1][0] !== what;
    return element("tr", {}, element("td", {}, first ? what : ""), element("td", {}, which), element("td", {}, `${count} run${count > 1 ? "s" : ""}`));
  });
  $("#provenance").hidden = !rows.length;
  $("#provenance .scroll").append(element("table", {}, element("tbody", {}, ...rows)));
}

data.tables.forEach((table) => table.rows.forEach((row, i) => {
  const run = data.runs[table.first + i];
  run.haystack = [run.path, run.model, run.label, ...row.map((cell) => cell[0])].join(" ").toLowerCase();
}));
const models = data.tables.map((table) => table.model);
const code = data.provenance.filter(([what]) => what === "code").length;
const versions = code > 1 ? ` · ${code} versions of the code` : "";
$("#summary").textContent = `${data.runs.length} runs · ${models.join(", ")}${versions}`;
$("#warnings").append(...data.warnings.map((text) => element("p", { class: "warning" }, text)));
fillSelect("#model", "all models", models);
fillSelect("#method", "all methods", methods);
fillSelect("#bits", "all bits", unique(data.runs.map((run) => run.bits)).filter((b) => b != null).sort((a, b) => b - a), (b) => `${b} bits`);
$("#text").addEventListener("input", () => {
  state.text = $("#text").value;
  draw();
});
$("#reset").addEventListener("click", () => {
  for (const key of Object.keys(state)) state[key] = $(`#${key}`).value = "";
  draw();
});
let width = innerWidth;
addEventListener("resize", () => {
  if (width !== innerWidth) draw();
  width = innerWidth;
});
frontierChoices();
layersChoices();
distributionChoices();
drawProvenance();
recall();
draw();
addEventListener("hashchange", () => {
  for (const key of Object.keys(state)) state[key] = $(`#${key}`).value = "";
  recall();
  draw();
});
