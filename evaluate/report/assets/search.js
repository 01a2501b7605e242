"use strict";
// What is looked for: latents that fire on words, or that have them anywhere in a saved window. The same answers as
// window_search.py gives, from files of which a search for firing reads those of its words alone.
const FIRES = "fires", CONTEXTS = "contexts", MAX_QUERY = 200;

// The last answer: another order or filter asks the same again.
const Found = { asked: null, latents: null };

// Case, and spaces at the ends, do not count.
const normal = (text) => text.trim().normalize("NFC").toLowerCase();

// Latent -> the share of its activation on the words (null where firing was not asked for), in order: a latent whose
// number was typed, then the largest share. null where nothing is looked for.
async function findLatents(o, query, where) {
  const wanted = normal(query), found = new Map(), asked = `${where} ${wanted}`;
  if (wanted === "") return null;
  if (Found.asked === asked) return Found.latents;
  if (/^\d+$/.test(wanted) && +wanted < o.prefix_ends.at(-1)) found.set(+wanted, null);
  const parts = o.search.share_parts, { latents, shares } = await (Report.search ?? search)(query, where, o.search);
  latents.forEach((latent, i) => found.set(latent, shares ? shares[i] / parts : null));
  Object.assign(Found, { asked, latents: found });
  return found;
}

function search(query, where, files) {
  return where === FIRES ? firing(query, files.n_fires_files) : inContexts(query, files.n_text_files);
}

async function firing(query, n) {
  const sums = new Map();
  for (const word of new Set(normal(query).split(/\s+/))) {
    const file = await load(`fires-${bucket(word, n)}`), at = file.keys.indexOf(word);
    if (at >= 0) file.latents[at].forEach((latent, i) => sums.set(latent, (sums.get(latent) ?? 0) + file.shares[at][i]));
  }
  const rows = [...sums].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
  return { latents: rows.map(([latent]) => latent), shares: rows.map(([, share]) => share) };
}

// FNV-1a; search_files.py asks the same way.
function bucket(key, n) {
  let value = 0x811c9dc5;
  for (let i = 0; i < key.length; i++) value = Math.imul(value ^ key.charCodeAt(i), 0x01000193);
  return (value >>> 0) % n;
}

async function inContexts(query, n) {
  const wanted = normal(query), latents = new Set();
  for (let part = 0; wanted && part < n; part++) {
    for (const [text, windows] of await load(`text-${part}`)) {
      // Windows come by their first character, so one walk over the text does for all of them.
      let at = text.indexOf(wanted), first = 0;
      for (let i = 0; i < windows.length && at >= 0; i += 3) {
        first += windows[i + 1];
        if (at < first) at = text.indexOf(wanted, first);
        if (at >= 0 && at + wanted.length <= first + windows[i + 2]) latents.add(windows[i]);
      }
    }
  }
  return { latents: [...latents].sort((a, b) => a - b), shares: null };
}

// The field for the words and the choice where they are looked for; `changed` is called when a person has stopped typing.
function searchControls(asked, changed) {
  const field = el("input", { type: "search", id: "search", maxlength: MAX_QUERY, placeholder: "A word, or a latent\u2019s number", "aria-label": "Search", dir: "auto" });
  const where = el("select", { id: "where", "aria-label": "Where the words are" }, el("option", { value: FIRES }, "fires on"), el("option", { value: CONTEXTS }, "in its contexts"));
  field.value = asked.q.slice(0, MAX_QUERY);
  choose(where, asked.in);
  field.addEventListener("input", later(changed));
  where.addEventListener("change", changed);
  return { field, where };
}

// What an answer means, where there is one.
function searchNote(found, where) {
  if (!found) return "";
  return where === FIRES ? "Latents that fire on a token that is one of these words, whatever its case or leading space, by the share of their activation that falls on it. Counted on the saved windows of each latent (its largest activations, and a sample of each tenth), not on all rows."
    : "Latents with these exact words anywhere in a saved window, whether or not they fire there.";
}

// Why a search gave nothing, and the way on.
function nothingFound(field, where, changed) {
  const words = ["\u201c", el("bdi", {}, field.value.trim()), "\u201d"];
  if (where.value === CONTEXTS) return el("p", { class: "note nothing" }, "No saved window has ", ...words, ".");
  return el("p", { class: "note nothing" }, "No latent fires on ", ...words, " as a token in its saved windows. ",
    el("button", { type: "button", class: "more", onclick: () => { where.value = CONTEXTS; changed(); } }, "look in the contexts"));
}
