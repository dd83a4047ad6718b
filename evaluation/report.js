"use strict";
// Rows are written by html_report.py; here they are only chosen, ordered and shown, a page at a time.
const PAGE = 50; // rows with texts to lay out within a tenth of a second
const table = document.getElementById("table");
const body = table.tBodies[0];
const headers = Array.from(table.tHead.rows[0].cells);
const search = document.getElementById("search");
const buttons = Array.from(document.querySelectorAll("[data-filter]"));
const clips = Array.from(body.rows, (row) => ({
  row,
  tags: row.getAttribute("data-tags").split(" "),
  keys: Array.from(row.cells, (cell, column) =>
    column === 0 ? cell.firstChild.textContent : parseFloat(cell.getAttribute("data-value"))),
  text: null,
}));
const byRow = new Map(clips.map((clip) => [clip.row.id, clip]));
let order = clips.slice();
let filter = "";
let shown = PAGE;
let sorted = { column: -1, descending: false };

function normalise(text) {
  return text.normalize("NFC").toLowerCase().replace(/\s+/g, " ").trim();
}

// What can be searched: id, speaker, reference and transcripts, without what they lack.
function textOf(clip) {
  if (clip.text === null) {
    const parts = Array.from(clip.row.querySelectorAll("th bdi, .text"), (part) =>
      Array.from(part.childNodes, (node) => node.nodeName === "DEL" ? "" : node.textContent).join(""));
    clip.text = normalise(parts.join(" "));
  }
  return clip.text;
}

function show() {
  const words = normalise(search.value).split(" ").filter(Boolean);
  // Clips without speech are not scored: they are shown where they are asked for.
  const pool = order.filter((clip) => clip.tags.includes("invented") === (filter === "invented"));
  const chosen = pool.filter((clip) =>
    (!filter || clip.tags.includes(filter)) && words.every((word) => textOf(clip).includes(word)));
  body.replaceChildren(...chosen.slice(0, shown).map((clip) => clip.row));
  document.getElementById("status").textContent =
    `${chosen.length} of ${pool.length} clips` + (chosen.length > shown ? `, ${shown} shown` : "");
  document.getElementById("more").hidden = chosen.length <= shown;
}

function setFilter(name) {
  filter = name;
  buttons.forEach((button) =>
    button.setAttribute("aria-pressed", String(button.dataset.filter === name)));
}

function sortBy(column) {
  const numeric = column > 0;
  const again = sorted.column === column;
  const descending = again ? !sorted.descending : numeric; // numbers: the largest first
  sorted = { column, descending };
  const sign = descending ? -1 : 1;
  const compare = (a, b) => {
    const first = a.keys[column], second = b.keys[column];
    if (!numeric) return first < second ? -sign : first > second ? sign : 0;
    if (Number.isNaN(first) || Number.isNaN(second)) // clips without a value come last
      return Number.isNaN(first) - Number.isNaN(second);
    return sign * (first - second);
  };
  order = clips.slice().sort(compare);
  headers.forEach((header, index) => {
    if (index === column) header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    else header.removeAttribute("aria-sort");
  });
  shown = PAGE;
  show();
}

// Show the clips that a mark, a confusion or a kind leads to.
function findClips(query, name = "") {
  setFilter(name);
  search.value = query;
  shown = PAGE;
  show();
}

function openClip(id) {
  const clip = byRow.get(id);
  if (!clip) return;
  findClips(clip.keys[0], clip.tags.includes("invented") ? "invented" : "");
  if (!clip.row.isConnected) body.prepend(clip.row);
  clip.row.scrollIntoView({ block: "center" });
  clip.row.focus();
}

headers.forEach((header, column) => {
  const button = header.querySelector("button");
  if (button) button.addEventListener("click", () => sortBy(column));
});
buttons.forEach((button) => button.addEventListener("click", () => {
  setFilter(button.dataset.filter);
  shown = PAGE;
  show();
}));
search.addEventListener("input", () => { shown = PAGE; show(); });
document.getElementById("more-button").addEventListener("click", () => { shown += PAGE; show(); });
document.addEventListener("click", (event) => {
  const link = event.target.closest("a");
  if (!link) return;
  const target = link.getAttribute("href");
  if (link.dataset.search) findClips(link.dataset.search);
  if (link.dataset.kind) findClips(link.dataset.kind, "invented"); // then the first row is there
  if (target.startsWith("#clip-")) {
    event.preventDefault();
    openClip(target.slice(1));
  }
});
document.addEventListener("play", (event) => {
  document.querySelectorAll("audio").forEach((audio) => {
    if (audio !== event.target) audio.pause();
  });
}, true);

body.classList.add("ready");
show();
if (/^#(clip|nonspeech)-/.test(location.hash)) openClip(location.hash.slice(1));
