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
  main.append(el("div", { class: "bar" }, el("h1", {}, `Latent ${latent}`), el("button", { type: "button", id: "previous", title: "Left key", onclick: () => step(-1) }, "\u2190"),
    el("button", { type: "button", id: "next", title: "Right key", onclick: () => step(1) }, "\u2192"), el("a", { href: Report.list }, "all latents"), el("a", { href: `#/latent/${latent}` }, "link")));
  const at = table.density[latent];
  main.append(el("div", { class: "tiles" }, tile("group", `${groupOf(latent)} of ${o.group_sizes.length}`), tile("of the rows", percent(at)), tile("largest activation", number(table.max[latent])),
    tile("mean when active", number(table.mean[latent])), tile("rows it fires on", whole(own.n))));
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
  latentAblation(aside, o, own);
  const all = windowsOf(chunk, own);
  const titles = { top: ["Largest activations", "At most one of a context; equal windows are shown once."], decile: ["By tenth of the activations", "A uniform sample of the rows it fires on, cut into ten equal parts; 10 is the strongest."],
    random: ["Where it does not fire", "Random windows."] };
  const largest = table.max[latent] || 1;
  for (const kind of ["top", "decile", "random"]) {
    const windows = all.filter((w) => w.kind === kind);
    if (!windows.length) continue;
    const head = el("div", { class: "bar" }, el("h2", {}, titles[kind][0]));
    const section = el("section", { id: `${kind}-windows` }, head, el("p", { class: "note" }, titles[kind][1]), ...windows.map((w) => contextWindow(w, chunk.texts, largest)));
    head.append(el("button", { type: "button", onclick: () => { const texts = [...section.querySelectorAll(".text")], open = texts.some((t) => !t.classList.contains("open")); texts.forEach((t) => t.classList.toggle("open", open)); } }, "expand all"));
    contexts.append(section);
  }
};

// Left and right follow the order of the browser, when the latent is in it.
function neighbour(latent, by, n) {
  const order = Report.order, at = order ? order.indexOf(latent) : -1;
  return at < 0 ? (latent + by + n) % n : order[(at + by + order.length) % order.length];
}
