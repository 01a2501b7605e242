"use strict";
// One context, its tokens shaded by activation; a click shows all of it.
const NEAR_BEFORE = 14, NEAR_AFTER = 8;

function contextWindow(w, texts, largest) {
  const acts = new Map();
  for (let i = 0; i < w.acts.length; i += 2) acts.set(w.acts[i], w.acts[i + 1]);
  const text = el("div", { class: "text", onclick: () => text.classList.toggle("open") });
  const first = Math.max(0, w.peak - NEAR_BEFORE), last = Math.min(w.tokens.length - 1, w.peak + NEAR_AFTER);
  if (first > 0) text.append(el("span", { class: "gap" }, "\u2026"));
  w.tokens.forEach((token, i) => {
    const act = acts.get(i) ?? 0, span = el("span", { class: "token" }, texts[token]);
    if (act > 0) {
      const share = Math.min(1, act / largest);
      span.classList.add("on");
      if (share > 0.72) span.classList.add("strong");
      span.style.setProperty("--share", share.toFixed(3));
    }
    if (i === w.peak && w.kind !== "random") span.classList.add("peak");
    if (i < first || i > last) span.classList.add("far");
    span.dataset.tip = `${act > 0 ? act : 0}  \u201c${texts[token]}\u201d`;
    text.append(span);
  });
  if (last < w.tokens.length - 1) text.append(el("span", { class: "gap" }, "\u2026"));
  const label = w.kind === "random" ? "0" : number(w.act);
  const where = `context ${w.context}, position ${w.position}, document ${w.doc}`;
  return el("div", { class: "window" }, el("div", { class: "label", title: where }, el("b", {}, label), w.kind === "decile" ? `tenth ${w.decile}` : w.kind === "top" ? `no. ${w.rank}` : `ctx ${w.context}`), text);
}

// The strongest windows of a latent, as elements; empty where it never fires.
async function strongest(latent, count) {
  const o = await load("overview"), table = await load("latents"), part = Math.floor(latent / o.chunk_latents);
  const chunk = await load(`chunk-${part}`);
  forget("chunk-", 6);
  return windowsOf(chunk, chunk.latents[latent - part * o.chunk_latents]).filter((w) => w.kind === "top").slice(0, count)
    .map((w) => contextWindow(w, chunk.texts, table.max[latent] || 1));
}

function windowsOf(chunk, own) {
  return own.windows.map((w) => Object.fromEntries(chunk.fields.map((field, i) => [field, w[i]])));
}
