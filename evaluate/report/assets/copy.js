"use strict";
// A latent as JSON, for use elsewhere.
function latentAsJson(o, own, chunk, table, note) {
  const { latent } = own, set = o.report.shard_set, of = o.report.transcoder, group = groupOf(latent), logits = o.logits ?? {};
  const effects = (pairs) => pairs.map(([place, effect]) => ({ token: chunk.texts[place], direction: effect, logit: logits.scale ? effect * logits.scale : null }));
  const windows = windowsOf(chunk, own).map((w) => ({ kind: w.kind, tenth: w.decile, rank: w.rank, context: w.context, position: w.position, document: w.doc, peak: w.peak, activation: w.act,
    quantile: w.kind === "random" ? null : quantileOf(own, w.act), tokens: w.tokens.map((token) => chunk.texts[token]), activations: [...w.tokens.keys()].map((i) => w.acts.get(i) ?? 0) }));
  return {
    run: { name: of.run, step: of.step, sha256: of.sha256, model: set.model, source_hook: set.source_hook, target_hook: set.target_hook, shard_set: set.name },
    latent, prefix: { group, n_groups: o.group_sizes.length, prefix_end: o.prefix_ends[group - 1] },
    stats: { density: table.density[latent], n_rows: own.n, max_act: table.max[latent], mean_act: table.mean[latent], near_cosine: table.cosine[latent] },
    windows, logits: own.raised ? { scale: logits.scale, scale_rows: logits.scale_rows, soft_cap: logits.soft_cap, raised: effects(own.raised), lowered: effects(own.lowered) } : null,
    note: note ? { star: note.star, text: note.text } : null,
  };
}

// Some browsers give pages from the disk no clipboard; a selection can be copied everywhere.
async function copyText(text) {
  try { await navigator.clipboard.writeText(text); return; } catch { /* as below */ }
  const field = el("textarea", { class: "copied", "aria-hidden": "true" });
  field.value = text;
  document.body.append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  if (!copied) throw new Error("this browser does not let the page copy");
}

function copyButton(o, own, chunk, table) {
  const button = el("button", { type: "button", id: "copy", title: "Run, latent, numbers, windows and logits", onclick: async () => {
    try {
      const note = (await readNotes().catch(() => ({})))[own.latent];
      await copyText(JSON.stringify(latentAsJson(o, own, chunk, table, note), null, 1));
      button.textContent = "copied";
    } catch (error) { button.textContent = error.message; }
  } }, "copy as JSON");
  return button;
}
