// Tables: sorted by a click on a header, filtered by the controls.
const [BEST, TIES, SAME] = [1, 2, 4];
const sorts = new Map(); // table → [column, direction]

function cellText(cell) {
  const [text, , flags] = cell;
  const made = [];
  const interval = text.indexOf(" [");
  const main = interval < 0 ? text : text.slice(0, interval);
  made.push(flags & BEST ? element("b", {}, main) : main);
  if (flags & TIES) made.push(element("i", {}, "≈"));
  if (interval >= 0) made.push(element("small", {}, text.slice(interval + 1)));
  if (flags & SAME) made.push(element("small", {}, "not distinguishable"));
  return made;
}

const sortKey = (cell) => number(cell[1] ?? (cell[0] === "" ? null : isNaN(cell[0]) ? cell[0] : +cell[0]));

// Missing values stand last, whichever way the rest is sorted.
function compare(a, b, direction) {
  const missing = (v) => v == null || Number.isNaN(v);
  if (missing(a) || missing(b)) return missing(a) - missing(b);
  if (typeof a === typeof b) return direction * (a < b ? -1 : a > b ? 1 : 0);
  return direction * (typeof a === "number" ? -1 : 1);
}

// An arrow says which way is better.
function arrow(name) {
  const metric = data.metrics.find((each) => each.name === name.replace(/^Δ /, "").replace(/ \[95%\]$/, ""));
  return metric ? (metric.higher ? "\u00a0↑" : "\u00a0↓") : "";
}

function heading(name, kind) {
  const [, delta, text, metric, tail] = name.match(/^(Δ )?(?:(.*)\/)?([^/]*?)( \[95%\])?$/);
  if (kind !== "metric" && kind !== "difference") return [name];
  const breakable = `${delta || ""}${metric}`.replaceAll("_", "_\u200b");
  return [element("small", {}, text || "\u00a0"), breakable + arrow(name), tail ? element("small", {}, "95% interval") : ""];
}

// The first cell heads its row, and leads to the run's folder.
function cellOf(table, run, cell, c, left) {
  const kind = left[c] ? "left" : table.columns[c][1];
  if (c > 0) return element("td", { class: kind }, ...cellText(cell));
  const link = run?.href ? element("a", { href: run.href, title: run.path }, ...cellText(cell)) : element("span", {}, ...cellText(cell));
  return element("th", { class: kind, scope: "row" }, link);
}

function drawTable(table, section, shown) {
  const [column, direction] = sorts.get(table) ?? [];
  const order = table.rows.map((_, i) => i).filter((i) => shown.has(table.first + i));
  if (column != null) {
    const keys = table.rows.map((row) => sortKey(row[column]));
    order.sort((a, b) => compare(keys[a], keys[b], direction) || a - b);
  }
  const left = table.columns.map(([, kind], c) => kind === "setting" && table.rows.every((row) => !row[c][0] || isNaN(row[c][0])));
  const head = element("tr");
  table.columns.forEach(([name, kind], c) => {
    const button = element("button", { type: "button", title: name }, ...heading(name, kind));
    button.addEventListener("click", () => {
      sorts.set(table, [c, column === c ? -direction : 1]);
      drawTable(table, section, shown);
      section.querySelectorAll("thead button")[c].focus();
    });
    const sorted = column === c ? (direction > 0 ? "ascending" : "descending") : null;
    head.append(element("th", { scope: "col", class: left[c] ? "left" : kind, "aria-sort": sorted }, button));
  });
  const body = element("tbody"), made = (table.elements ??= []);
  if (table.full && order.length) body.append(element("tr", { class: "full" }, ...table.full.map((text, c) => cellOf(table, null, [text], c, left))));
  let before = null;
  for (const i of order) {
    const run = data.runs[table.first + i];
    const apart = column == null && before != null && before !== run.bits;
    before = run.bits;
    made[i] ??= element("tr", {}, ...table.rows[i].map((cell, c) => cellOf(table, run, cell, c, left)));
    made[i].classList.toggle("apart", apart);
    body.append(made[i]);
  }
  if (!order.length) body.append(element("tr", {}, element("td", { class: "empty", colspan: table.columns.length }, "no run matches")));
  const caption = element("caption", { class: "hidden" }, `Runs of ${table.model}`);
  section.querySelector(".scroll").replaceChildren(element("table", {}, caption, element("thead", {}, head), body));
  table.order = order;
}

function drawTables(shown) {
  data.tables.forEach((table, t) => {
    const id = `table-${t}`;
    if (!document.getElementById(id)) {
      const notes = table.notes.map((note) => element("p", { class: "muted note" }, note));
      const button = element("button", { type: "button", "aria-label": `save the table of ${table.model} as CSV` }, "CSV");
      button.addEventListener("click", () => saveCsv(table, table.order));
      const csv = element("p", { class: "save" }, button);
      const made = element("section", { id }, element("h2", {}, table.model), element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `runs of ${table.model}` }), csv, ...notes);
      $("#tables").append(made);
    }
    drawTable(table, document.getElementById(id), shown);
  });
}
