"use strict";
// Draws the figures that Python made, one per choice of a drop-down, and sorts the summary table.
const views = JSON.parse(document.getElementById("views").textContent);
const OPTIONS = { responsive: true, displaylogo: false };

function draw(name) {
  const chosen = document.querySelector(`select[data-chart="${name}"]`);
  const view = views[name][chosen ? chosen.selectedIndex : 0];
  Plotly.react(name, view.figure.data, view.figure.layout, OPTIONS);
  const note = document.getElementById(`${name}-note`);
  if (note) note.textContent = view.note;
}

for (const name of Object.keys(views)) {
  const chosen = document.querySelector(`select[data-chart="${name}"]`);
  if (chosen) chosen.addEventListener("change", () => draw(name));
  draw(name);
}

const table = document.getElementById("summary");
const body = table.tBodies[0];

// A number sorts as a number, text as text; a missing value always comes last.
function compare(a, b, column, sign) {
  const [x, y] = [a, b].map((row) => row.cells[column].dataset.value);
  if (x === "" || y === "") return (x === "") - (y === "");
  const isNumber = table.tHead.rows[0].cells[column].classList.contains("number");
  return sign * (isNumber ? Number(x) - Number(y) : x.localeCompare(y));
}

function sortBy(header) {
  const sign = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
  const rows = [...body.rows].sort((a, b) => compare(a, b, header.cellIndex, sign));
  body.append(...rows);
}

for (const header of table.tHead.rows[0].cells) {
  header.querySelector("button").addEventListener("click", () => sortBy(header));
}

const search = document.getElementById("search");
const pairs = document.getElementById("pairs");

function filter() {
  const words = search.value.toLowerCase().split(/\s+/);
  for (const row of body.rows) {
    const isOff = row.classList.contains("pair") && pairs && !pairs.checked;
    row.hidden = isOff || !words.every((word) => row.textContent.toLowerCase().includes(word));
  }
}

search.addEventListener("input", filter);
if (pairs) pairs.addEventListener("change", filter);
filter();
