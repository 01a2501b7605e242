"use strict";
// Shared by the pages: elements, data loaded by script tags (fetch is blocked on file://), numbers.
const Report = { pages: {}, data: new Map(), waiting: new Map() };

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
      script.onload = () => { Report.waiting.delete(name); script.remove(); resolve(Report.data.get(name)); };
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

const number = (value, digits = 3) => value === null || value === undefined || Number.isNaN(value) ? "-" : value.toFixed(digits);
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
