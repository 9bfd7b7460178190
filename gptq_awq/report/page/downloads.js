// Pictures and tables to take away: SVG with its colours written in, PNG at twice the size, CSV of what is shown.
function save(name, url) {
  const link = element("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
}

const PAINTED = ["fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "font-size", "font-family", "font-weight"];

function standalone(plot) {
  const copy = plot.cloneNode(true), [, , width, height] = plot.getAttribute("viewBox").split(" ").map(Number);
  const from = [plot, ...plot.querySelectorAll("*")], to = [copy, ...copy.querySelectorAll("*")];
  from.forEach((node, i) => {
    const style = getComputedStyle(node);
    to[i].setAttribute("style", PAINTED.map((key) => `${key}:${style.getPropertyValue(key).replaceAll('"', "'")}`).join(";"));
    for (const key of [...PAINTED, "class", "tabindex"]) to[i].removeAttribute(key);
  });
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.setAttribute("width", width);
  copy.setAttribute("height", height);
  const paper = svg("rect", { width, height, fill: getComputedStyle(document.body).backgroundColor });
  copy.prepend(paper);
  return { text: new XMLSerializer().serializeToString(copy), width, height };
}

const encoded = (text, type) => `data:${type};charset=utf-8,${encodeURIComponent(text)}`;

function savePng(name, plot) {
  const { text, width, height } = standalone(plot), picture = new Image(), canvas = element("canvas", { width: 2 * width, height: 2 * height });
  picture.onload = () => {
    const pen = canvas.getContext("2d");
    pen.scale(2, 2);
    pen.drawImage(picture, 0, 0, width, height);
    save(`${name}.png`, canvas.toDataURL("image/png"));
  };
  picture.src = encoded(text, "image/svg+xml");
}

// A figure with buttons that save its plot.
function framed(name, figure) {
  const plot = [...figure.children].find((child) => child.tagName.toLowerCase() === "svg");
  const button = (kind, act) => {
    const made = element("button", { type: "button", "aria-label": `save ${name} as ${kind}` }, kind);
    made.addEventListener("click", act);
    return made;
  };
  figure.append(element("p", { class: "save" },
    button("SVG", () => save(`${name}.svg`, encoded(standalone(plot).text, "image/svg+xml"))),
    button("PNG", () => savePng(name, plot))));
  return figure;
}

// A cell that a spreadsheet would compute gets an apostrophe.
function csvCell(text) {
  const safe = /^[\s]*[=+@-]/.test(text) && isNaN(text) ? `'${text}` : text;
  return /[",\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

function saveCsv(table, order) {
  const lines = [table.columns.map(([name]) => name), ...order.map((i) => table.rows[i].map((cell) => cell[0]))];
  save(`${table.model}.csv`, encoded(lines.map((line) => line.map(csvCell).join(",")).join("\n") + "\n", "text/csv"));
}
