// What scrolls can be reached by the keyboard, what is a region has a name, and a corner of a table is no header.
document$.subscribe(() => {
  for (const scrolls of document.querySelectorAll("pre > code, .md-typeset__scrollwrap")) scrolls.setAttribute("tabindex", "0");
  document.querySelectorAll(".md-code__nav").forEach((nav, i) => nav.setAttribute("aria-label", `code block ${i + 1}`));
  document.querySelector(".md-search")?.setAttribute("aria-label", "search");
  for (const corner of document.querySelectorAll("th:empty")) corner.replaceWith(document.createElement("td"));
});
