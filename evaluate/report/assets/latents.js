"use strict";
// The browser: all latents in one table, of which only the visible rows exist. The address says what is looked for.
const Browser = { address: "", top: 0 };
const USUAL = { q: "", in: FIRES, group: "0", low: "", high: "", weak: "", strong: "", dead: "", starred: "", token: "", side: "raised", sort: "", order: "" };
const ROW = 34, SPARE = 8;
const NUMBERS = { low: ["from %", "Density from, percent"], high: ["to %", "Density to, percent"], weak: ["from", "Max activation from"], strong: ["to", "Max activation to"] };

Report.pages.latents = async (main, _, query) => {
  const o = await load("overview"), table = await load("latents"), n = table.density.length, groups = allGroups(n);
  let asked = askedFor(USUAL, query), found = null, promoted = null, shown = null, run = 0, gone = false;
  // [key, its head, value, text of a cell]; the share is there while words are looked for that a latent fires on.
  const columns = [
    ["latent", "latent", (i) => i, String], ["group", "group", (i) => groups[i], String], ["share", "share", (i) => found?.get(i) ?? null, (v) => v === null ? "its number" : percent(v)],
    ["density", "density", (i) => table.density[i], percent], ["max", "max act", (i) => table.max[i], number], ["mean", "mean act", (i) => table.mean[i], number],
    ["cosine", "near cosine", (i) => table.cosine[i], number], ["words", "strongest on", (i) => table.words[i], String],
  ];
  // Pages whose notes cannot be read have no starred latents; the page of a latent says why.
  const notes = await readNotes().catch(() => ({})), isStarred = (i) => notes[i]?.star === true;
  const { field: search, where } = searchControls(asked, apply);
  const group = el("select", { id: "group", "aria-label": "Group" }, el("option", { value: "0" }, "all groups"),
    ...o.group_sizes.map((size, i) => el("option", { value: String(i + 1) }, `group ${i + 1} (${whole(size)})`)));
  const numbers = Object.fromEntries(Object.entries(NUMBERS).map(([id, [hint, label]]) => [id, el("input", { type: "number", id, step: "any", min: "0", placeholder: hint, "aria-label": label })]));
  const dead = el("input", { type: "checkbox", id: "dead" });
  const starred = el("input", { type: "checkbox", id: "starred" });
  const token = el("input", { type: "search", id: "token", placeholder: o.missing.logits ? "needs evaluate logits" : "token", title: o.missing.logits, "aria-label": "Logit token", maxlength: MAX_QUERY });
  const side = el("select", { id: "side", "aria-label": "Raises or lowers" }, el("option", { value: "raised" }, "raises"), el("option", { value: "lowered" }, "lowers"));
  token.disabled = side.disabled = Boolean(o.missing.logits);
  for (const box of [group, side]) { choose(box, asked[box.id]); box.addEventListener("change", apply); }
  for (const field of [...Object.values(numbers), token]) { field.value = asked[field.id]; field.addEventListener("input", later(apply)); }
  for (const box of [dead, starred]) { box.checked = asked[box.id] !== ""; box.addEventListener("change", apply); }
  const count = el("span", { class: "soft", id: "count", role: "status" }), note = el("p", { class: "note", id: "search-note" });
  const heads = columns.map(([key, label]) => el("button", { type: "button", "data-key": key, class: `col-${key}`, disabled: key === "words" ? "" : null, onclick: () => sortBy(key) }, label));
  const space = el("div", { class: "space" }), view = el("div", { class: "view", id: "view", tabindex: "0", role: "region", "aria-label": "Latents" }, space);
  const list = el("div", { class: "list" }, el("div", { class: "columns" }, ...heads), view);
  main.append(el("h1", {}, "Latents"), el("div", { class: "controls" }, where, search, group, el("label", {}, "density", numbers.low, numbers.high),
    el("label", {}, "max act", numbers.weak, numbers.strong), el("label", {}, dead, "dead too"), el("label", {}, starred, "starred"), el("label", {}, side, token), count), note, list);

  // The share while there is one, else the density; largest first, but for what only counts.
  const sorting = () => {
    const byShare = found && where.value === FIRES, wanted = columns.some(([key]) => key === asked.sort && key !== "words") ? asked.sort : "";
    const key = wanted === "" || (wanted === "share" && !byShare) ? (byShare ? "share" : "density") : wanted;
    return { key, falling: asked.order === "" ? key !== "latent" && key !== "group" : asked.order === "down" };
  };
  function sortBy(key) {
    const now = sorting(), usual = key !== "latent" && key !== "group", falling = now.key === key ? !now.falling : usual;
    asked = { ...asked, sort: key, order: falling === usual ? "" : falling ? "down" : "up" };
    apply();
  }

  // Rows that stay in sight stay: one that is replaced would lose the focus.
  function draw(anew = false) {
    if (!shown) return;
    const from = Math.max(0, Math.floor(view.scrollTop / ROW) - SPARE), to = Math.min(shown.length, Math.ceil((view.scrollTop + view.clientHeight) / ROW) + SPARE);
    if (anew) space.replaceChildren();
    if (!shown.length) { space.replaceChildren(nothing()); return; }
    for (const row of [...space.children]) if (row.dataset.at < from || row.dataset.at >= to) row.remove();
    const first = space.firstElementChild ? +space.firstElementChild.dataset.at : to, last = space.lastElementChild ? +space.lastElementChild.dataset.at : to - 1;
    const rows = (start, end) => shown.slice(start, Math.max(start, end)).map((i, k) => rowOf(i, start + k));
    space.prepend(...rows(from, first));
    space.append(...rows(last + 1, to));
  }
  function rowOf(i, at) {
    const cells = columns.map(([key, , value, text]) => el("span", { class: key === "words" ? key : `col-${key}` }, text(value(i))));
    const row = el("a", { class: isStarred(i) ? "row starred" : "row", href: `#/latent/${i}`, "data-at": at }, ...cells);
    row.style.top = `${at * ROW}px`;
    return row;
  }

  // Why the list is empty, and the way out.
  const nothing = () => found && !found.size ? nothingFound(search, where, apply)
    : el("p", { class: "note nothing" }, "No latent passes these filters. ", el("button", { type: "button", class: "more", onclick: () => { location.hash = "#/latents"; } }, "show all"));

  function update(scroll) {
    const at = (field, usual, by = 1) => field.value === "" ? usual : field.value / by;
    const low = at(numbers.low, 0, 100), high = at(numbers.high, 1, 100), weak = at(numbers.weak, 0), strong = at(numbers.strong, Infinity);
    shown = [];
    for (let i = 0; i < n; i++) {
      if (group.value !== "0" && groups[i] !== +group.value) continue;
      if (!dead.checked && table.density[i] === 0) continue;
      if (table.density[i] < low || table.density[i] > high) continue;
      if ((table.max[i] ?? 0) < weak || (table.max[i] ?? 0) > strong) continue;
      if (starred.checked && !isStarred(i)) continue;
      if (found && !found.has(i)) continue;
      if (promoted && !promoted.has(i)) continue;
      shown.push(i);
    }
    const { key, falling } = sorting(), of = columns.find(([name]) => name === key)[2], sign = falling ? -1 : 1;
    // A latent whose number was typed has no share: it comes first.
    const none = key === "share" ? Infinity : -1, rank = (i) => of(i) ?? none;
    shown.sort((a, b) => (rank(a) === rank(b) ? 0 : sign * (rank(a) - rank(b))) || a - b);
    Report.order = shown;
    const withShare = found !== null && where.value === FIRES;
    list.classList.toggle("with-share", withShare);
    heads.forEach((head, i) => {
      const own = columns[i][0] === key;
      head.setAttribute("aria-sort", own ? (falling ? "descending" : "ascending") : "none");
      head.textContent = columns[i][1] + (own ? (falling ? " \u2193" : " \u2191") : "");
    });
    note.textContent = searchNote(found, where.value);
    note.hidden = !found;
    space.style.height = `${shown.length * ROW}px`;
    view.scrollTop = scroll;
    count.textContent = `${whole(shown.length)} of ${whole(n)}`;
    draw(true);
  }

  // From what the controls say to the address and the rows; an answer that comes after the next question is dropped.
  async function apply() {
    if (gone) return;
    const own = ++run, values = { q: search.value.trim(), in: where.value, group: group.value, dead: dead.checked ? "1" : "", starred: starred.checked ? "1" : "", token: token.value, side: side.value };
    asked = { ...asked, ...values, ...Object.fromEntries(Object.entries(numbers).map(([id, field]) => [id, field.value])) };
    const address = addressOf("latents", USUAL, asked), same = Browser.address === address;
    Report.list = Browser.address = address;
    writeAddress(address);
    count.textContent = "looking\u2026";
    main.parentNode.querySelector(".error")?.remove();
    try {
      const answers = [await findLatents(o, search.value, where.value), await promotedBy(token.value, side.value)];
      if (own !== run || gone) return;
      [found, promoted] = answers;
      update(same ? Browser.top : 0);
    } catch (error) { if (own === run && !gone) { count.textContent = ""; fail(error); } }
  }

  // Latents that raise (or lower) the logit of a token most; its text may be given in part.
  async function promotedBy(text, side) {
    if (text.trim() === "" || o.missing.logits) return null;
    const logits = await load("logits"), wanted = new Set();
    logits.texts.forEach((token, i) => { if (token.toLowerCase().includes(text.toLowerCase())) wanted.add(i); });
    return new Set(logits[side].flatMap((tokens, i) => tokens.some((token) => wanted.has(token)) ? [i] : []));
  }

  let frame = 0;
  view.addEventListener("scroll", () => { Browser.top = view.scrollTop; if (!frame) frame = requestAnimationFrame(() => { frame = 0; draw(); }); });
  const resize = new ResizeObserver(() => draw());
  resize.observe(view);
  await apply();
  return () => { gone = true; resize.disconnect(); };
};
