// Where the time went, and what memory it took.
const MOST_BARS = 40;

const clipped = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);

function costPlot(runs, phases, width) {
  const line = 22, top = 24, left = Math.round(Math.min(270, width * 0.36)), memory = width - (width > 700 ? 170 : 90);
  const right = memory - 36, end = width - 60;
  const bottom = top + line * runs.length;
  const plot = svg("svg", { viewBox: `0 0 ${width} ${bottom + 30}`, role: "img", "aria-label": "time by phase and peak memory" });
  const total = (run) => phases.reduce((sum, phase) => sum + (run.seconds[phase] ?? 0), 0);
  const x = linear(0, Math.max(...runs.map(total)) || 1, left, right);
  const m = linear(0, Math.max(...runs.map((run) => run.memory ?? 0)) || 1, memory, end);
  plot.append(svg("text", { x: left, y: 12 }, "seconds, without compiling"), svg("text", { x: memory, y: 12 }, "peak memory"));
  for (const tick of x.ticks) {
    plot.append(svg("line", { class: "grid", x1: x(tick), x2: x(tick), y1: top - 4, y2: bottom }));
    plot.append(svg("text", { x: x(tick), y: bottom + 16, "text-anchor": "middle" }, figures(tick)));
  }
  runs.forEach((run, i) => {
    const y = top + line * i;
    const name = clipped(named(run), left / 6.4);
    plot.append(svg("text", { class: "label", x: left - 10, y: y + 14, "text-anchor": "end" }, name));
    let at = 0;
    phases.forEach((phase, p) => {
      const spent = run.seconds[phase] ?? 0;
      if (!spent) return;
      const bar = svg("rect", { class: "bar", x: x(at), y: y + 3, width: Math.max(0.5, x(at + spent) - x(at) - 0.8), height: line - 8, fill: `var(--p${p % 6})` });
      tip(bar, `${named(run)}\n${phase}: ${figures(spent)} s of ${figures(total(run))} s`);
      plot.append(bar);
      at += spent;
    });
    if (run.memory == null) return;
    plot.append(svg("rect", { class: "bar", x: memory, y: y + 3, width: m(run.memory) - memory, height: line - 8, fill: "var(--muted)", opacity: 0.55 }));
    const text = run.memory >= 1000 ? `${(run.memory / 1000).toFixed(2)} GB` : `${run.memory.toFixed(0)} MB`;
    plot.append(svg("text", { x: m(run.memory) + 6, y: y + 14 }, text));
  });
  const key = legend(phases.map((phase, p) => [phase, svg("rect", { x: -8, y: -5, width: 16, height: 10, fill: `var(--p${p % 6})` })]));
  return framed("time_and_memory", element("figure", {}, key, plot));
}

function drawCosts(runs) {
  const section = $("#costs"), shown = runs.slice(0, MOST_BARS);
  const phases = unique(data.runs.flatMap((run) => Object.keys(run.seconds))).filter((phase) => phase !== "compile");
  section.hidden = !phases.length;
  section.querySelector(".plots").replaceChildren(...(shown.length ? [costPlot(shown, phases, room(section))] : []));
  const compiled = data.runs.some((run) => run.seconds.compile > 0.05) ? "The first run on a machine compiles kernels, which is not shown. " : "";
  const cut = runs.length > MOST_BARS ? `The first ${MOST_BARS} of ${runs.length} runs; filter to see others.` : "";
  section.querySelector(".note").textContent = compiled + cut;
}
