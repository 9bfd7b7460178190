// Distribution of the KL from full precision over blocks of tokens: a box per run.
const MOST_BOXES = 40;

function distributionChoices() {
  const texts = unique(data.runs.flatMap((run) => Object.keys(run.kl)));
  $("#distribution-of").append(...texts.map((text) => element("option", { value: text }, text)));
  $("#distribution-of").addEventListener("change", draw);
  $("#distributions .choices").hidden = texts.length < 2;
}

function distributionPlot(runs, text, width) {
  const line = 24, top = 26, left = Math.round(Math.min(270, width * 0.36)), bottom = top + line * runs.length;
  const plot = svg("svg", { viewBox: `0 0 ${width} ${bottom + 40}`, role: "img", "aria-label": `distribution of ${text}/kl` });
  const all = runs.flatMap((run) => run.kl[text]).filter((v) => v > 0);
  const x = logarithmic(Math.min(...all) / 1.1, Math.max(...all) * 1.1, left, width - 16);
  for (const tick of x.ticks) {
    plot.append(svg("line", { class: "grid", x1: x(tick), x2: x(tick), y1: top - 4, y2: bottom }));
    plot.append(svg("text", { x: x(tick), y: bottom + 16, "text-anchor": "middle" }, figures(tick)));
  }
  plot.append(svg("text", { x: width - 16, y: bottom + 33, "text-anchor": "end" }, `${text}/kl of a block of tokens, nats (log)`));
  runs.forEach((run, i) => {
    const y = top + line * i + line / 2, name = clipped(named(run), left / 6.4);
    const [low, q1, mid, q3, high, most] = run.kl[text].map((v) => x(Math.max(v, Math.min(...all))));
    plot.append(svg("text", { class: "label", x: left - 10, y: y + 4, "text-anchor": "end" }, name));
    const box = svg("g", { class: "mark", stroke: colour(run.method), fill: colour(run.method), tabindex: 0, role: "img" });
    box.append(
      svg("line", { x1: low, x2: high, y1: y, y2: y }),
      svg("rect", { x: q1, y: y - 6, width: Math.max(1, q3 - q1), height: 12, "fill-opacity": 0.3 }),
      svg("line", { x1: mid, x2: mid, y1: y - 7, y2: y + 7, "stroke-width": 2.4 }),
      svg("circle", { cx: most, cy: y, r: 2.4, "fill-opacity": 0 }),
    );
    const [v5, v25, v50, v75, v95, v100] = run.kl[text].map(figures);
    tip(box, `${named(run)}\nmedian ${v50}, half of the blocks ${v25} to ${v75}\n5% below ${v5}, 5% above ${v95}, the worst ${v100}`);
    plot.append(box);
  });
  return framed("kl_distribution", element("figure", {}, plot));
}

function drawDistributions(runs) {
  const section = $("#distributions"), text = $("#distribution-of").value;
  section.hidden = !text;
  if (section.hidden) return;
  const shown = runs.filter((run) => run.kl[text]).slice(0, MOST_BOXES);
  section.querySelector(".plots").replaceChildren(...(shown.length ? [distributionPlot(shown, text, room(section))] : []));
}
