"use strict";
function compare(a, b) {  // numbers before text; empty cells last in both directions
  const x = Number(a), y = Number(b);
  if (!isNaN(x) && !isNaN(y)) return x - y;
  return isNaN(x) - isNaN(y) || a.localeCompare(b);
}
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
    const rows = [...body.rows].map(row => [row.cells[i].dataset.v, row]);
    rows.sort(([a], [b]) => (a === "") - (b === "") || sign * compare(a, b));
    body.append(...rows.map(([, row]) => row));
  }));
}
for (const box of document.querySelectorAll("input[data-column]")) {
  const rows = document.getElementById(box.dataset.table).rows;
  const show = () => { for (const row of rows) row.cells[box.dataset.column].hidden = !box.checked; };
  box.addEventListener("change", show);
  show();
}
const form = document.getElementById("filter");
const runs = [...document.querySelectorAll("[data-run]")].map(element => ({
  element, ...element.dataset, tags: JSON.parse(element.dataset.tags),
  text: ((element.dataset.error || "") + " " + element.textContent).toLowerCase(),
}));
const dependents = [...document.querySelectorAll("[data-runs]")].map(
  element => [element, element.dataset.runs.split(" ")]);
function filter() {
  const given = Object.fromEntries(new FormData(form)), shown = new Set();
  const words = given.text.toLowerCase().split(/\s+/);
  for (const run of runs) {
    const matches = (!given.data || run.data === given.data) && (!given.status || run.status === given.status)
      && (!given.tag || run.tags.includes(given.tag))
      && (!given.from || run.date >= given.from) && (!given.to || run.date !== "" && run.date <= given.to)
      && words.every(word => run.text.includes(word));
    run.element.hidden = !matches;
    if (matches) shown.add(run.run);
  }
  for (const [element, members] of dependents) element.hidden = !members.some(run => shown.has(run));
  document.getElementById("count").textContent = `${shown.size} of ${runs.length} runs`;
}
form.addEventListener("input", filter);
form.addEventListener("reset", () => setTimeout(filter));
form.addEventListener("submit", event => event.preventDefault());
filter();
