// What runs write beside what full precision writes; where a text parts is marked.
function drawSamples(runs) {
  const section = $("#samples"), labels = new Set(runs.map((run) => run.label));
  section.hidden = !data.samples.length;
  const parts = data.samples.map((texts) => {
    const list = element("dl", {}, element("dt", {}, "full precision"), element("dd", {}, texts.full));
    const shown = texts.runs.filter(([label]) => !data.runs.some((run) => run.label === label) || labels.has(label));
    const same = shown.filter(([, , part]) => !part).map(([label]) => label);
    if (same.length) list.append(element("dt", {}, "the same"), element("dd", {}, same.join(" · ")));
    for (const [label, text, part, words] of shown) {
      if (!part) continue;
      const [at, length] = part, end = at + length, made = element("dd");
      made.append(text.slice(0, at), element("mark", {}, text.slice(at, end) || "∎"), element("b", {}, text.slice(end)));
      made.append(element("small", {}, words));
      list.append(element("dt", {}, label), made);
    }
    return element("article", {}, element("h3", {}, texts.prompt), list);
  });
  section.querySelector(".texts").replaceChildren(...parts);
}
