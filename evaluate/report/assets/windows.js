"use strict";
// One context, its tokens shaded by activation; a click shows all of it. With `numbers`, they are in a table too.
const NEAR_BEFORE = 14, NEAR_AFTER = 8;

function contextWindow(w, texts, largest, { numbers = false, quantile = null } = {}) {
  const text = el("div", { class: "text", onclick: () => text.classList.toggle("open") });
  const first = Math.max(0, w.peak - NEAR_BEFORE), last = Math.min(w.tokens.length - 1, w.peak + NEAR_AFTER);
  if (first > 0) text.append(el("span", { class: "gap" }, "\u2026"));
  w.tokens.forEach((token, i) => {
    const act = w.acts.get(i) ?? 0, span = el("span", { class: "token" }, texts[token]);
    if (act > 0) {
      const share = Math.min(1, act / largest);
      span.classList.add("on");
      if (share > 0.72) span.classList.add("strong");
      span.style.setProperty("--share", share.toFixed(3));
    }
    if (i === w.peak && w.kind !== "random") span.classList.add("peak");
    if (i < first || i > last) span.classList.add("far");
    span.dataset.tip = `${act}  \u201c${texts[token]}\u201d`;
    text.append(span);
  });
  if (last < w.tokens.length - 1) text.append(el("span", { class: "gap" }, "\u2026"));
  const label = w.kind === "random" ? "0" : number(w.act);
  const where = `context ${w.context}, position ${w.position}, document ${w.doc}`;
  const kind = w.kind === "decile" ? `tenth ${w.decile}` : w.kind === "top" ? `no. ${w.rank}` : `ctx ${w.context}`;
  return el("div", { class: "window" }, el("div", { class: "label", title: where }, el("b", {}, label), quantile === null ? kind : `q ${number(quantile)}`),
    numbers ? el("div", {}, text, numbersTable(w, texts)) : text);
}

// Made when it is opened: hundreds of rows that most people never look at.
function numbersTable(w, texts) {
  const box = el("details", { class: "numbers" }, el("summary", {}, "numbers"));
  box.addEventListener("toggle", () => {
    if (!box.open || box.children.length > 1) return;
    const rows = w.tokens.map((token, i) => [String(w.position - w.peak + i), texts[token], String(w.acts.get(i) ?? 0)]);
    box.append(dataTable(["position", "token", "activation"], rows));
  });
  return box;
}

// The share of the rows that a latent fires on whose activation is not above `act`, from its histogram.
function quantileOf(own, act) {
  const bin = act / own.width;
  return own.counts.reduce((below, count, i) => below + count * Math.max(0, Math.min(1, bin - i)), 0) / own.n;
}

// The strongest windows of a latent, as elements; empty where it never fires.
async function strongest(latent, count) {
  const o = await load("overview"), table = await load("latents"), part = Math.floor(latent / o.chunk_latents);
  const chunk = await load(`chunk-${part}`);
  forget("chunk-", 6);
  return windowsOf(chunk, chunk.latents[latent - part * o.chunk_latents]).filter((w) => w.kind === "top").slice(0, count)
    .map((w) => contextWindow(w, chunk.texts, table.max[latent] || 1));
}

// `acts`: index of a token -> activation, where it fires.
function windowsOf(chunk, own) {
  return own.windows.map((values) => {
    const w = Object.fromEntries(chunk.fields.map((field, i) => [field, values[i]])), acts = new Map();
    for (let i = 0; i < w.acts.length; i += 2) acts.set(w.acts[i], w.acts[i + 1]);
    return { ...w, acts };
  });
}
