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

function heading(name, kind) {
  const [, delta, text, metric, tail] = name.match(/^(Δ )?(?:(.*)\/)?([^/]*?)( \[95%\])?$/);
  if (kind !== "metric" && kind !== "difference") return [name];
  const breakable = `${delta || ""}${metric}`.replaceAll("_", "_\u200b");
  return [element("small", {}, text || "\u00a0"), breakable, tail ? element("small", {}, "95% interval") : ""];
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
  let before = null;
  for (const i of order) {
    const run = data.runs[table.first + i];
    const apart = column == null && before != null && before !== run.bits;
    before = run.bits;
    made[i] ??= element("tr", { title: run.path }, ...table.rows[i].map((cell, c) => element("td", { class: left[c] ? "left" : table.columns[c][1] }, ...cellText(cell))));
    made[i].classList.toggle("apart", apart);
    body.append(made[i]);
  }
  if (!order.length) body.append(element("tr", {}, element("td", { class: "empty", colspan: table.columns.length }, "no run matches")));
  section.querySelector(".scroll").replaceChildren(element("table", {}, element("thead", {}, head), body));
}

function drawTables(shown) {
  data.tables.forEach((table, t) => {
    const id = `table-${t}`;
    if (!document.getElementById(id)) {
      const notes = table.notes.map((note) => element("p", { class: "muted note" }, note));
      const made = element("section", { id }, element("h2", {}, table.model), element("div", { class: table.rows.length > 40 ? "scroll long" : "scroll" }), ...notes);
      $("#tables").append(made);
    }
    drawTable(table, document.getElementById(id), shown);
  });
}
