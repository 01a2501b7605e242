"use strict";
// What other commands found out about a latent: tokens, parents and children, partners, what zeroing it does.

// A part of the column beside the contexts; closed where there is no room beside them.
function besides(id, title, ...content) {
  const box = el("details", { id, class: "besides" }, el("summary", {}, title), ...content);
  box.open = matchMedia("(min-width: 1000px)").matches || id === "logits";
  return box;
}

const SHOWN = 12;

function latentTokens(aside, o, own, texts) {
  if (!own.raised) { aside.append(besides("logits", "Logits", missing(o, "logits", "Which tokens it raises and lowers is"))); return; }
  const { scale } = o.logits, largest = Math.max(...[...own.raised, ...own.lowered].map(([, effect]) => Math.abs(effect)), 1e-9);
  const heads = el("li", { class: "heads" }, el("span", {}, "token"), ...(scale === null ? [] : [el("span", { class: "soft" }, "logit")]), el("span", { class: "soft" }, "direction"));
  const side = (id, title, pairs) => el("div", { class: scale === null ? "tokens" : "tokens scaled", id }, el("h3", {}, title),
    el("ol", {}, heads.cloneNode(true), ...pairs.map(([place, effect]) => tokenEffect(texts[place], effect, largest, scale))));
  aside.append(besides("logits", "Logits", el("div", { class: "columns2" }, side("raised", "raises", own.raised), side("lowered", "lowers", own.lowered)), el("p", { class: "note" }, logitNote(o.logits))));
}

function logitNote({ scale, scale_rows, soft_cap }) {
  const direction = "direction: its decoder row through the final norm\u2019s gain and the unembedding, less the mean over tokens; the scale of the norm is left out.";
  if (scale === null) return `${direction} What that is in logits was not measured: run evaluate logits again.`;
  const cap = soft_cap === null ? "" : `, before the model\u2019s soft cap at ${soft_cap}`;
  return `logit: added to a token\u2019s logit per unit of activation${cap}, past all later layers: direction times ${scale.toPrecision(3)}, the median scale (1 / rms) of the final norm over ${whole(scale_rows)} held-out rows. ${direction}`;
}

// With `scale` the effect in logits too, before that of the direction.
function tokenEffect(text, effect, largest, scale = null) {
  const logit = scale === null ? null : el("span", {}, (effect * scale).toPrecision(2));
  return el("li", { class: effect < 0 ? "down" : null }, bar(Math.abs(effect) / largest, text, `\u201c${text}\u201d ${effect}`), logit, el("span", { class: "soft" }, number(effect, 2)));
}

function latentRelations(aside, o, own, table) {
  const name = (other) => el("span", { class: "who" }, el("a", { href: `#/latent/${other}` }, String(other)), groupBadge(groupOf(other)), el("span", { class: "words", title: table.words[other] }, table.words[other]));
  const item = (other, share, text, title) => el("li", {}, name(other), bar(share, text, title));
  if (!own.parents) aside.append(besides("nest", "Parents and children", missing(o, "hierarchy", "Which latents are its parents and its children is")));
  else {
    const nested = ([other, inside, share, lift, cosine]) => item(other, inside, share_(inside), `inside the parent ${share_(inside)}, of the parent\u2019s rows ${share_(share)}, lift ${lift}, cosine ${cosine}`);
    const list = (rows) => {
      const box = el("ul", {}, ...rows.slice(0, SHOWN).map(nested));
      if (rows.length > SHOWN) { const more = el("button", { type: "button", class: "more", onclick: () => { more.remove(); box.append(...rows.slice(SHOWN).map(nested)); } }, `${rows.length - SHOWN} more`); return el("div", {}, box, more); }
      return box;
    };
    const rest = own.n_children - own.children.length;
    aside.append(besides("parents", `Parents (${own.parents.length})`, el("p", { class: "note" }, "Earlier latents that fire where this one does; on what share of its rows."), list(own.parents)),
      besides("children", `Children (${whole(own.n_children)})`, el("p", { class: "note" }, "Later latents that fire inside this one, the most frequent first; with what share of their rows. ",
        el("a", { href: `#/hierarchy/${own.latent}`, id: "in-nest" }, "in the nest")), list(own.children), rest > 0 ? el("p", { class: "note" }, `${whole(rest)} more are in the nest`) : null));
  }
  if (own.partners && own.partners.length) aside.append(besides("partners", "Fires together with", el("ul", {}, ...own.partners.map(([other, both, jaccard, phi]) =>
    item(other, phi, number(phi, 2), `phi ${phi}, ${whole(both)} rows together, Jaccard ${jaccard}`)))));
  if (own.near.length) aside.append(besides("near", "Nearest decoder directions", el("ul", { class: "near" }, ...own.near.map(([other, cosine]) => item(other, cosine, number(cosine, 2), `cosine ${cosine}`)))));
}

// The latents of other transcoders that fire most like it, and those that write most like it.
function latentMatches(aside, o, own) {
  if (!own.matches) return;
  aside.append(besides("matches", "Closest in other transcoders", ...own.matches.flatMap(([at, like, correlation, nearest, cosine]) => {
    const { name, layer_hook, n_rows } = o.matches[at];
    const item = (other, value, what) => other === null ? null : el("li", {}, el("span", { class: "who" }, `${other}`, el("span", { class: "soft" }, what)), bar(value, number(value, 2), `${what} ${value}`));
    return [el("h3", {}, name), el("p", { class: "note" }, `Reads ${layer_hook}; ${whole(n_rows)} rows of both.`), el("ul", {}, ...[item(like, correlation, "correlation"), item(nearest, cosine, "decoder cosine")].filter(Boolean))];
  })));
}

const share_ = (value) => `${(value * 100).toFixed(value < 0.1 ? 1 : 0)}%`;

const ABLATION = { kl: "KL here", kl_later: "KL later", loss_change: "loss here, nats", loss_change_later: "loss later, nats", mean_act: "mean activation", n_contexts: "contexts", n_contexts_firing: "contexts it fires in",
  n_later: "positions later", n_positions: "positions", scale: "activation times", top1_changed: "other top token" };

function latentAblation(aside, o, own) {
  if (!own.ablation) {
    if (o.missing.ablations) aside.append(besides("ablation", "Without it", missing(o, "ablations", "What the model says without it is")));
    return;
  }
  const { numbers, raised, lowered } = own.ablation, tokens = [...raised, ...lowered];
  const largest = Math.max(...tokens.map(([, effect]) => Math.abs(effect)), 1e-9);
  const side = (title, pairs) => el("div", { class: "tokens" }, el("h3", {}, title), el("ol", {}, ...pairs.map(([text, effect]) => tokenEffect(text, effect, largest))));
  aside.append(besides("ablation", "Without it", facts(Object.entries(numbers).map(([name, value]) => [ABLATION[name] ?? name.replaceAll("_", " "), value])),
    tokens.length ? el("div", { class: "columns2" }, side("more likely", raised), side("less likely", lowered)) : null,
    el("p", { class: "note" }, "The model with this latent\u2019s part of the layer\u2019s output taken out, in contexts in which it fires: at the positions where it does, and after them.")));
}
