"use strict";
// The first page: how good each nested prefix is.
Report.pages.overview = async (main) => {
  const o = await load("overview"), r = o.report, sizes = o.group_sizes;
  const step = r.transcoder.step === null ? "" : `, step ${whole(r.transcoder.step)}`;
  main.append(el("h1", {}, r.transcoder.run), el("p", { class: "soft" },
    `${r.shard_set.source_hook} \u2192 ${r.shard_set.target_hook} of ${r.shard_set.model}${step}; ${whole(r.n_rows)} held-out rows${r.n_documents ? ` from ${whole(r.n_documents)} documents` : ""} of ${r.shard_set.name}${heldOutBlocks(r.shard_set)}`));
  const full = r.threshold[r.threshold.length - 1];
  main.append(el("div", { class: "tiles" }, tile("FVU, all latents", number(full.fvu, 4)), tile("L0", number(full.l0, 1)),
    tile("latents", whole(r.total.n_latents)), tile("dead", percent(r.total.dead_share)), tile("nested groups", String(sizes.length))));
  const heads = ["group", "latents", "prefix", "FVU", "95% interval", "FVU top-k", "L0", "cosine", "norm", "dead", "dense", "redundant"];
  const interval = (i) => r.spread.fvu_interval ? r.spread.fvu_interval[i].map((v) => number(v, 4)).join(" \u2013 ") : "-";
  main.append(el("h2", {}, "Nested prefixes"), el("div", { class: "scroll" }, el("table", { id: "prefixes" },
    el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head)))),
    el("tbody", {}, ...r.threshold.map((p, i) => el("tr", {}, ...[String(i + 1), whole(sizes[i]), whole(p.prefix_end), number(p.fvu, 4), interval(i),
      r.batch_topk ? number(r.batch_topk[i].fvu, 4) : "-", number(p.l0, 1), number(p.cosine, 4), number(p.norm_ratio, 3),
      percent(r.groups[i].dead_share), percent(r.groups[i].dense_share), percent(r.groups[i].redundant_share ?? 0)].map((cell) => el("td", {}, cell))))))));
  main.append(el("p", { class: "note" }, "FVU: fraction of variance unexplained by all latents up to the prefix, at the stored threshold; top-k: with BatchTopK" +
    (r.batch_topk_rows ? ` in batches of ${whole(r.batch_topk_rows)} rows, ${r.batch_topk_as_trained ? "as in training" : "those of training are not known"}. ` : ". ") +
    `95% intervals are ${overDocuments(r.n_documents)}. ` +
    "dead: never fires on these rows; dense: fires on more than a tenth; redundant: another decoder row has a cosine above 0.9; all three of the group\u2019s own latents."));
  faithfulnessOf(main, o);
  const charts = el("div", { class: "charts" });
  main.append(charts);
  const box = () => { const b = el("div", { class: "chart" }); charts.append(b); return b; };
  const prefix = (i) => `first ${whole(r.threshold[i].prefix_end)}`;
  if (r.curve.length > 1) {
    const joined = uPlot.join(sizes.map((_, i) => {
      const points = r.curve.map((p) => [p.l0[i], p.fvu[i]]).sort((a, b) => a[0] - b[0]).filter((p, n, all) => n === 0 || p[0] > all[n - 1][0]);
      return [points.map((p) => p[0]), points.map((p) => p[1])];
    }));
    chart(box(), { title: "FVU against L0", note: "All thresholds moved together; one line a nested prefix.", xLabel: "L0", x: joined[0],
      series: sizes.map((_, i) => ({ label: prefix(i), values: joined[i + 1] })) });
  }
  const edges = r.log10_density_edges;
  const first = Math.max(0, Math.min(...r.groups.map((g) => g.log10_density_counts.findIndex((c) => c > 0)).filter((i) => i >= 0)));
  chart(box(), { title: "Firing density", note: "Latents by the share of rows they fire on, log scale; those that never fire are left out.", kind: "steps", xLabel: "share of rows",
    x: edges.slice(first), series: r.groups.map((g, i) => ({ label: `group ${i + 1}`, values: [...g.log10_density_counts.slice(first), 0] })),
    xFormat: (v) => Number.isInteger(v) ? `1e${v}` : "" });
  const m = o.metrics;
  if (m.step.length > 1) {
    chart(box(), { title: "FVU while training", note: "Each nested prefix, on training batches.", xLabel: "step", x: m.step,
      series: m.fvu.map((values, i) => ({ label: prefix(i), values })) });
    chart(box(), { title: "Dead share while training", note: "Of all latents; dead by the run\u2019s own dead_after_tokens.", xLabel: "step", x: m.step,
      series: [{ label: "dead share", values: m.dead_share }], format: (v) => `${+(v * 100).toPrecision(3)}%`, legend: false });
  }
  const strata = r.by_position;
  main.append(el("h2", {}, "By place in the context"), el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {},
    ...["positions", "rows", "share of variance", "FVU", "L0"].map((head) => el("th", { scope: "col" }, head)))),
    el("tbody", {}, ...strata.map((s) => el("tr", {}, ...[s.name, whole(s.n_rows), percent(s.share_of_variance ?? 0), number(s.fvu[s.fvu.length - 1], 4), number(s.l0[s.l0.length - 1], 1)].map((cell) => el("td", {}, cell))))))));
  comparisonOf(main, o);
  scoresOf(main, o);
  notMeasured(main, o);
};

// The run card: what was trained, on what, by which versions.
Report.pages.run = async (main) => {
  const o = await load("overview"), r = o.report;
  const flat = (content, prefix = "") => Object.entries(content).flatMap(([key, value]) =>
    value !== null && typeof value === "object" && !Array.isArray(value) ? flat(value, `${prefix}${key}.`) : [[prefix + key, Array.isArray(value) ? value.join(", ") : value ?? "-"]]);
  main.append(el("h1", {}, "Run card"));
  const card = (title, content) => main.append(el("h2", {}, title), facts(flat(content)));
  card("Transcoder", { run: r.transcoder.run, step: r.transcoder.step, sha256: r.transcoder.sha256, ...r.transcoder.config });
  card("Shard set", r.shard_set);
  if (o.used) card("What the training used", Object.fromEntries(o.used));
  if (o.run) { if (o.run.config) card("What was asked for", o.run.config); if (o.run.provenance) card("Provenance", o.run.provenance); }
  card("Evaluation", r.settings);
  card("Samples", { rows: o.samples.n_rows, split: o.samples.split, windows: o.samples.n_windows, tokenizer: o.samples.tokenizer, ...o.samples.settings });
};
