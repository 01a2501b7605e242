"use strict";
// On the first page: what was measured with the language model, and against other transcoders.

function faithfulnessOf(main, o) {
  const f = o.faithfulness;
  if (!f) return;
  main.append(el("h2", {}, "In the model\u2019s place"), dataTable(["prefix", "L0", "CE recovered (zero)", "95% interval", "CE recovered (mean)", "95% interval", "CE spliced", "KL", "top-1 agreement"], f.prefixes.map((p) =>
    [whole(p.prefix_end), number(p.l0, 1), share(p.ce_recovered_zero), sharesOf(p.ce_recovered_zero_interval), share(p.ce_recovered_mean), sharesOf(p.ce_recovered_mean_interval), number(p.ce_loss_spliced, 4), number(p.kl, 4), share(p.top1_agreement)]), { id: "faithfulness" }),
  el("p", { class: "note" }, `The reconstruction spliced in over ${whole(f.n_tokens)} held-out tokens. Cross-entropy: clean ${number(f.ce_loss_clean, 4)}, layer zeroed ${number(f.ce_loss_ablated_zero, 4)}, ` +
    `set to its mean ${number(f.ce_loss_ablated_mean, 4)}. Recovered: 100% is as good as the layer itself, 0 no better than without it. Intervals are ${overDocuments(f.n_documents)}.`));
}

// What 95% intervals are over; results that drew contexts have no number of documents.
const overDocuments = (n) => n === null || n === undefined ? "over contexts, so too narrow (made by an older version)" : `over ${whole(n)} documents${n < 20 ? " (few documents)" : ""}`;

const latentLinks = (latents) => el("span", {}, ...latents.flatMap((latent, i) => [i ? " " : "", el("a", { href: `#/latent/${latent}` }, String(latent))]));

// Single letters or classes, closed at first.
const details = (title, ...content) => el("details", { class: "besides" }, el("summary", {}, title), ...content);

function absorptionOf(main, a) {
  const range = (value, interval) => value === null ? "-" : interval ? `${share(value)} (${share(interval[0])} \u2013 ${share(interval[1])})` : share(value);
  main.append(el("h2", {}, "Absorption"), dataTable(["prefix", "letters", "absorption fraction (95%)", "full absorption (95%)", "missed", "main latents a letter", "their F1"], a.prefixes.map((p) =>
    [whole(p.prefix_end), String(p.n_letters), range(p.absorption_fraction, p.absorption_fraction_interval), range(p.full_absorption, p.full_absorption_interval), share(p.missed), number(p.n_main_latents, 2), number(p.main_f1, 3)]), { id: "absorption" }),
  el("p", { class: "note" }, "How often the latents of a first letter stay silent on a word of that letter because another latent fires instead; after SAEBench. Lower is better; intervals are over words; where the F1 of the main latents is low, there is little to be absorbed and the scores say little."));
  const letters = a.prefixes.length ? a.prefixes[a.prefixes.length - 1].letters : [];
  if (letters.length) main.append(details("Letters, with all latents", dataTable(["letter", "words", "main latents", "absorption", "absorbed by"], letters.map((l) => [l.letter, whole(l.n_true_positives), latentLinks(l.main_latents), share(l.absorption_fraction),
    el("span", {}, ...l.absorbers.flatMap((absorber) => [el("a", { href: `#/latent/${absorber.latent}` }, String(absorber.latent)), ` ${absorber.words.join(", ")} \u00a0`]))]))));
}

function probingOf(main, p) {
  main.append(el("h2", {}, "Probing"));
  for (const set of p.sets) {
    const ks = [...new Set(set.prefixes.flatMap((prefix) => prefix.scores.map((s) => s.k)))], by = (scores, k) => { const found = scores.find((s) => s.k === k); return found ? share(found.accuracy) : "-"; };
    const rows = set.prefixes.map((prefix) => [`first ${whole(prefix.prefix_end)}`, ...ks.map((k) => by(prefix.scores, k))]);
    rows.push(["the input\u2019s own dimensions", ...ks.map((k) => k === null ? share(set.source.accuracy) : by(set.source_top_k, k))]);
    main.append(el("h3", {}, `${set.name.replaceAll("_", " ")}: ${set.classes.length} classes`), dataTable(["accuracy with", ...ks.map((k) => k === null ? "all" : k === 1 ? "1 latent" : `${k} latents`)], rows, { class: "probing" }));
    const classes = set.prefixes.length ? set.prefixes[set.prefixes.length - 1].scores.flatMap((s) => s.classes.map((c) => [c.label, String(s.k), latentLinks(c.latents), share(c.accuracy), number(c.f1, 3)])) : [];
    if (classes.length) main.append(details(`Classes of ${set.name.replaceAll("_", " ")}, with all latents`, dataTable(["class", "k", "latents", "accuracy", "F1"], classes)));
  }
  main.append(el("p", { class: "note" }, `Balanced examples: guessing gives 50%. On all dimensions of the input a probe reaches ${p.sets.map((set) => `${share(set.source.accuracy)} (${set.name.replaceAll("_", " ")})`).join(", ") || "-"}.`));
  for (const [name, why] of Object.entries(p.skipped)) main.append(el("p", { class: "note" }, `${name.replaceAll("_", " ")} was left out: ${why}`));
}

function scoresOf(main, o) {
  if (o.absorption) absorptionOf(main, o.absorption);
  if (o.probing) probingOf(main, o.probing);
}

// What the first page would show too, had it been measured.
function notMeasured(main, o) {
  const parts = { faithfulness: "How well the model does with the reconstruction in place of the layer is", hierarchy: "What fires inside what is", logits: "Which tokens a latent raises is",
    absorption: "Absorption is", probing: "Probing is", comparison: "Other transcoders on the same rows are" };
  const notes = Object.keys(parts).filter((part) => o.missing[part]).map((part) => missing(o, part, parts[part]));
  if (notes.length) main.append(el("h2", {}, "Not here yet"), ...notes, el("p", { class: "note" }, "Then make these pages again."));
}

const sharesOf = (pair) => pair ? `${share(pair[0])} \u2013 ${share(pair[1])}` : "-";
const share = (value) => value === null || value === undefined ? "-" : `${(value * 100).toFixed(1)}%`;

function comparisonOf(main, o) {
  if (!o.comparison) return;
  main.append(el("h2", {}, "Against others"));
  const entries = o.comparison.entries, interval = (pair) => pair ? `${number(pair[0], 4)} \u2013 ${number(pair[1], 4)}` : "-";
  const rows = entries.flatMap((e) => e.matched.map((m) => [e.name, whole(e.d_sae), number(e.l0, 1), number(e.fvu, 4), number(m.l0, 1), number(m.fvu, 4), interval(m.fvu_interval), number(m.difference, 4), interval(m.difference_interval)]));
  main.append(dataTable(["transcoder", "latents", "own L0", "own FVU", "at L0", "FVU", "95%", "difference", "95%"], rows, { id: "comparison" }),
    el("p", { class: "note" }, `On ${whole(o.comparison.n_rows)} identical rows; differences are against the first, in the same draws. Intervals are ${overDocuments(o.comparison.n_documents)}.`));
}
