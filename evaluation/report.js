"use strict";
// Rows are written by html_report.py; here they are only chosen, ordered and shown, a page at a time.
// Where scripts run, what <noscript> holds is text: a row becomes elements when it is shown.
const PAGE = 50; // rows
const source = document.getElementById("source");
const [head, rows, foot] = source.textContent.split(/<\/?tbody>/); // "<" in texts is escaped
source.insertAdjacentHTML("afterend", `${head}<tbody></tbody>${foot}`);
source.remove();
const parser = document.createElement("template");
const table = document.getElementById("table");
const body = table.tBodies[0];
const headers = Array.from(table.tHead.rows[0].cells);
const search = document.getElementById("search");
const buttons = Array.from(document.querySelectorAll("[data-filter]"));
const clips = rows.split("<tr ").slice(1).map((row) => {
  const [start, ...cells] = row.slice(0, row.indexOf("<div>")).split("<td>");
  const [, id, tags, name] = /^id="(.*?)"(?: class="(.*?)")?><th><bdi>(.*?)<\/bdi>/s.exec(start);
  const values = cells.map((cell) => parseFloat(cell.replace("−", "-")));
  return { html: `<tr ${row}`, id, tags: tags ? tags.split(" ") : [], keys: [plain(name), ...values], row: null, text: null };
});
const byId = new Map(clips.map((clip) => [clip.id, clip]));
let order = clips.slice();
let filter = "";
let shown = PAGE;
let sorted = { column: -1, descending: false };

// The text of some HTML.
function plain(html) {
  const text = html.replace(/<[^>]*>/g, "");
  if (!text.includes("&")) return text;
  parser.innerHTML = text;
  return parser.content.textContent;
}

function rowOf(clip) {
  if (clip.row === null) {
    parser.innerHTML = clip.html;
    clip.row = parser.content.firstChild;
    clip.row.tabIndex = -1; // takes the focus when it is opened
  }
  return clip.row;
}

function normalise(text) {
  return text.normalize("NFC").toLowerCase().replace(/\s+/g, " ").trim();
}

// What can be searched: id, speaker, reference and transcripts, without what they lack.
function textOf(clip) {
  if (clip.text === null) {
    const parts = clip.html.replace(/<del.*?<\/del>/gs, "").match(/<bdi.*?<\/bdi>/gs);
    clip.text = normalise(plain(parts.join(" ")));
  }
  return clip.text;
}

function show() {
  const words = normalise(search.value).split(" ").filter(Boolean);
  // Clips without speech are not scored: they are shown where they are asked for.
  const pool = order.filter((clip) => clip.tags.includes("invented") === (filter === "invented"));
  const chosen = pool.filter((clip) =>
    (!filter || clip.tags.includes(filter)) && words.every((word) => textOf(clip).includes(word)));
  body.replaceChildren(...chosen.slice(0, shown).map(rowOf));
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
  const clip = byId.get(id);
  if (!clip) return;
  findClips(clip.keys[0], clip.tags.includes("invented") ? "invented" : "");
  const row = rowOf(clip);
  if (!row.isConnected) body.prepend(row);
  row.scrollIntoView({ block: "center" });
  row.focus();
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

// A link lies on the dot below the pointer: dots are the points of a line, in the order of the rows.
const line = document.getElementById("dots");
if (line) {
  const link = document.getElementById("pointed");
  const dots = line.getAttribute("d").slice(1).split(" ").map((point) => point.split(",").map(Number));
  dots.pop(); // the last one again
  const last = table.querySelector("[data-key='change']").closest("th").cellIndex - 1;
  line.ownerSVGElement.addEventListener("mousemove", (event) => {
    const pointer = new DOMPoint(event.clientX, event.clientY).matrixTransform(line.getScreenCTM().inverse());
    const index = dots.findLastIndex(([x, y]) => Math.hypot(x - pointer.x, y - pointer.y) <= 5);
    if (index < 0) return link.removeAttribute("href");
    const { id, keys } = clips[index];
    const rates = [2, last].map((column) => `${headers[column].textContent} ${keys[column]} %`);
    link.setAttribute("href", `#${id}`);
    link.firstChild.setAttribute("cx", dots[index][0]);
    link.firstChild.setAttribute("cy", dots[index][1]);
    link.firstChild.firstChild.textContent = `${keys[0]}: ${rates.join(", ")}`;
  });
}

show();
if (/^#(clip|nonspeech)-/.test(location.hash)) openClip(location.hash.slice(1));
