"use strict";
// Shared by the pages: elements, data loaded by script tags (fetch is blocked on file://), numbers.
// home: the page of an address without a name. search, change, readNotes, keepNote: set by the live pages, which ask
// their server. order, list: the latents that were listed last, and the address of that list.
const Report = { pages: {}, data: new Map(), waiting: new Map(), home: "overview", search: null, order: null, list: "#/latents" };

// Every text goes through here: textContent, so that no token is ever read as HTML.
function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") node.className = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// Data files call this.
function give(name, content) {
  Report.data.set(name, content);
}

function load(name) {
  if (Report.data.has(name)) return Promise.resolve(Report.data.get(name));
  if (!Report.waiting.has(name)) {
    Report.waiting.set(name, new Promise((resolve, reject) => {
      const script = el("script", { src: `data/${name}.js` });
      script.onload = () => {
        Report.waiting.delete(name);
        script.remove();
        // A file that was cut off is loaded without having given anything.
        if (Report.data.has(name)) resolve(Report.data.get(name));
        else reject(new Error(`data/${name}.js is damaged; make the pages again with evaluate report`));
      };
      script.onerror = () => { Report.waiting.delete(name); script.remove(); reject(new Error(`data/${name}.js cannot be read`)); };
      document.head.append(script);
    }));
  }
  return Report.waiting.get(name);
}

// Chunks of contexts are kept only while near; the overview and the table stay.
function forget(prefix, keep) {
  const names = [...Report.data.keys()].filter((name) => name.startsWith(prefix));
  for (const name of names.slice(0, Math.max(0, names.length - keep))) Report.data.delete(name);
}

// What an address asks for behind its ?, as texts; what it does not say is as usual.
function askedFor(usual, query) {
  const given = new URLSearchParams(query);
  return Object.fromEntries(Object.entries(usual).map(([key, value]) => [key, given.get(key) ?? value]));
}

// The address of a page with these settings, of which only the unusual ones are said.
function addressOf(path, usual, settings) {
  const said = new URLSearchParams(Object.entries(settings).filter(([key, value]) => value !== usual[key])).toString();
  return `#/${path}${said && `?${said}`}`;
}

// Replaced, not added: going back leads out of a page and not through each of its filters.
function writeAddress(address) {
  if (location.hash !== address) history.replaceState(null, "", address);
}

// An option, if there is one of this value; an address may say anything.
function choose(box, value) {
  if ([...box.options].some((option) => option.value === value)) box.value = value;
}

// Draws anew; what had the focus has it again, known by its data-key.
function keepFocus(draw) {
  const key = document.activeElement?.dataset.key;
  draw();
  if (key) document.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus();
}

// Calls once a person has stopped typing.
function later(action) {
  let timer = 0;
  return () => { clearTimeout(timer); timer = setTimeout(action, 150); };
}

const number = (value, digits = 3) => value === null || value === undefined || Number.isNaN(value) ? "-" : value.toFixed(digits);
// A number of val says less where val is not made of whole documents; results of before there was a choice do not say it.
const heldOutBlocks = (set) => set.val_unit === "document" ? "" : " (held-out blocks: train has other parts of the same documents)";
const whole = (value) => value.toLocaleString("en-US");
const percent = (share) => share === 0 ? "0" : share < 0.0001 ? `${(share * 100).toExponential(1)}%` : `${(share * 100).toPrecision(3)}%`;

function groupOf(latent) {
  const ends = Report.data.get("overview").prefix_ends;
  return ends.findIndex((end) => latent < end) + 1;
}

function tile(label, value) {
  return el("div", { class: "tile" }, el("b", {}, value), el("span", {}, label));
}

function facts(rows) {
  return el("div", { class: "scroll" }, el("table", { class: "facts" }, el("tbody", {},
    ...rows.map(([name, value]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, String(value)))))));
}

// A part that was not measured, and the command that measures it.
function missing(o, part, what) {
  const stale = o.stale.includes(part) ? " What is there is of other weights." : "";
  return el("p", { class: "note missing", "data-part": part }, `${what} not measured yet.${stale} `, el("code", {}, o.missing[part]));
}

function dataTable(heads, rows, attributes = {}) {
  return el("div", { class: "scroll" }, el("table", attributes,
    el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head)))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((cell) => el("td", {}, cell)))))));
}

function svg(name, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value); else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

// The groups of all latents, 1 for the first.
function allGroups(n) {
  const ends = Report.data.get("overview").prefix_ends, groups = new Uint8Array(n);
  for (let i = 0, g = 0; i < n; i++) { while (i >= ends[g]) g++; groups[i] = g + 1; }
  return groups;
}

// Colours after Okabe and Ito (2008): of lines and of groups.
const HUES = { light: ["#0072b2", "#d55e00", "#009e73", "#b05f94", "#8a6d00", "#2b8cbe", "#333333"],
  dark: ["#56b4e9", "#ff8c42", "#3ecf9f", "#e39ac6", "#f0e442", "#a6d5f5", "#cccccc"] };
function hue(i) {
  const hues = HUES[document.documentElement.dataset.theme === "dark" ? "dark" : "light"];
  return hues[i % hues.length];
}

function groupBadge(group) {
  const badge = el("span", { class: "badge", title: `group ${group}` }, String(group));
  badge.style.setProperty("--hue", hue(group - 1));
  return badge;
}

// A bar as long as `share` of its box, with its text over it.
function bar(share, text, title) {
  const box = el("span", { class: "share", title }, text);
  box.style.setProperty("--share", Math.max(0, Math.min(1, share)).toFixed(3));
  return box;
}
