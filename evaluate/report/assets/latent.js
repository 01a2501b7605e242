"use strict";
// One latent: when it fires, where it fires most, and where it does not.

Report.pages.latent = async (main, argument) => {
  const o = await load("overview"), n = o.prefix_ends[o.prefix_ends.length - 1];
  const latent = /^\d+$/.test(argument ?? "") ? Number(argument) : n;
  if (latent >= n) {
    main.append(el("h1", {}, "Latent"), el("p", { class: "error" }, `There is no latent ${argument ?? ""}; they are 0 to ${n - 1}. `, el("a", { href: Report.list }, "all latents")));
    return;
  }
  const part = Math.floor(latent / o.chunk_latents), table = await load("latents");
  const chunk = await load(`chunk-${part}`), own = { ...chunk.latents[latent - part * o.chunk_latents], latent };
  forget("chunk-", 6);
  const step = (by) => { location.hash = `#/latent/${neighbour(latent, by, n)}`; };
  const bar = el("div", { class: "bar" }, el("h1", {}, `Latent ${latent}`), el("button", { type: "button", id: "previous", title: "Left key", onclick: () => step(-1) }, "\u2190"),
    el("button", { type: "button", id: "next", title: "Right key", onclick: () => step(1) }, "\u2192"), el("a", { href: Report.list }, "all latents"), el("a", { href: `#/latent/${latent}` }, "link"), copyButton(o, own, chunk, table));
  main.append(bar);
  const at = table.density[latent];
  main.append(el("div", { class: "tiles" }, tile("group", `${groupOf(latent)} of ${o.group_sizes.length}`), tile("of the rows", percent(at)), tile("largest activation", number(table.max[latent])),
    tile("mean when active", number(table.mean[latent])), tile("rows it fires on", whole(own.n))));
  const note = el("div", { class: "own" });
  main.append(note);
  await ownNote(latent, bar, note);
  const aside = el("aside", {}), contexts = el("div", { class: "contexts" });
  main.append(el("div", { class: "latent-grid" }, aside, contexts));
  if (own.n > 0) {
    const box = el("div", { class: "chart" });
    aside.append(box);
    chart(box, { title: "Activations", note: "Rows by activation, where it fires; log scale.", kind: "bars", height: 150, xLabel: "activation", log: true, legend: false,
      x: own.counts.map((_, i) => i * own.width).concat(own.counts.length * own.width), series: [{ label: "rows", values: own.counts.map((c) => c || null).concat(null) }], format: (v) => v === null ? "" : String(v) });
  } else contexts.append(el("p", { class: "note" }, "It never fires on these rows."));
  latentTokens(aside, o, own, chunk.texts);
  latentRelations(aside, o, own, table);
  latentMatches(aside, o, own);
  latentAblation(aside, o, own);
  changeBox(aside, latent);
  const order = el("select", { id: "order", "aria-label": "Order of the windows" }, ...Object.entries(ORDERS).map(([value, [name]]) => el("option", { value }, name)));
  order.value = Latent.order;
  const sections = el("div", {}), draw = () => sections.replaceChildren(...ORDERS[order.value][1](own, windowsOf(chunk, own)).map((section) => windowSection(section, own, chunk.texts, table.max[latent] || 1)));
  order.addEventListener("change", () => { Latent.order = order.value; draw(); });
  contexts.append(el("div", { class: "bar order" }, el("label", { class: "soft", for: "order" }, "windows"), order), sections);
  draw();
};

const Latent = { order: "activation" };
const TITLES = { top: ["Largest activations", "At most one of a context; equal windows are shown once."], decile: ["By tenth of the activations", "A uniform sample of the rows it fires on, cut into ten equal parts; 10 is the strongest."],
  random: ["Where it does not fire", "Random windows."] };
// Value -> its name, and the sections that it makes of all windows.
const ORDERS = { activation: ["by activation", byActivation], quantile: ["by quantile", byQuantile] };

function byActivation(own, windows) {
  return ["top", "decile", "random"].map((kind) => ({ id: `${kind}-windows`, title: TITLES[kind][0], note: TITLES[kind][1], windows: windows.filter((w) => w.kind === kind) }));
}

// Every window in which it fires, in ten equal parts of the rows that it fires on; the strongest first.
function byQuantile(own, windows) {
  const fires = windows.filter((w) => w.kind !== "random").map((w) => ({ ...w, quantile: quantileOf(own, w.act) })).sort((a, b) => b.act - a.act);
  const tenth = (w) => w.decile ?? Math.min(10, Math.floor(w.quantile * 10) + 1);
  const parts = Array.from({ length: 10 }, (_, i) => 10 - i).map((part) => {
    const inside = fires.filter((w) => tenth(w) === part);
    const note = inside.length ? `Activations from ${number(inside[inside.length - 1].act)} to ${number(inside[0].act)} in these windows. q: the share of the rows it fires on with no larger one.` : "";
    return { id: `tenth-${part}`, title: `Quantile ${(part - 1) / 10} to ${part / 10}`, note, windows: inside };
  });
  return [...parts, byActivation(own, windows)[2]];
}

function windowSection({ id, title, note, windows }, own, texts, largest) {
  if (!windows.length) return "";
  const head = el("div", { class: "bar" }, el("h2", {}, title)), shown = windows.map((w) => contextWindow(w, texts, largest, { numbers: true, quantile: w.quantile }));
  const section = el("section", { id }, head, el("p", { class: "note" }, note), ...shown);
  head.append(el("button", { type: "button", onclick: () => { const texts = [...section.querySelectorAll(".text")], open = texts.some((t) => !t.classList.contains("open")); texts.forEach((t) => t.classList.toggle("open", open)); } }, "expand all"));
  return section;
}

// Left and right follow the order of the browser, when the latent is in it.
function neighbour(latent, by, n) {
  const order = Report.order, at = order ? order.indexOf(latent) : -1;
  return at < 0 ? (latent + by + n) % n : order[(at + by + order.length) % order.length];
}
