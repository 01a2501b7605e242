"use strict";
// The browser: all latents in one table, of which only the visible rows exist.
const Browser = { sort: "density", falling: true, group: 0, low: "", high: "", weak: "", strong: "", dead: false, query: "", token: "", side: "raised", top: 0 };
const ROW = 34, SPARE = 8;

Report.pages.latents = async (main) => {
  const o = await load("overview"), table = await load("latents"), n = table.density.length;
  const groups = allGroups(n);
  let matches = null, promoted = null, shown = [], run = 0, gone = false;
  const columns = [["latent", "latent"], ["group", "group"], ["density", "density"], ["max", "max act"], ["mean", "mean act"], ["cosine", "near cosine"], ["words", "strongest on"]];
  const value = { latent: (i) => i, group: (i) => groups[i], density: (i) => table.density[i], max: (i) => table.max[i], mean: (i) => table.mean[i], cosine: (i) => table.cosine[i] };
  const count = el("span", { class: "soft", id: "count", role: "status" });
  const search = el("input", { type: "search", id: "search", placeholder: "Search in the contexts, or a latent\u2019s number", "aria-label": "Search in the contexts" });
  search.value = Browser.query;
  const group = el("select", { id: "group", "aria-label": "Group" }, el("option", { value: "0" }, "all groups"),
    ...o.group_sizes.map((size, i) => el("option", { value: String(i + 1) }, `group ${i + 1} (${whole(size)})`)));
  group.value = String(Browser.group);
  const field = (id, key, hint) => { const f = el("input", { type: "number", id, step: "any", min: "0", placeholder: hint, "aria-label": { low: "Density from, percent", high: "Density to, percent", weak: "Max activation from", strong: "Max activation to" }[id] }); f.value = Browser[key];
    f.addEventListener("input", () => { Browser[key] = f.value; update(); }); return f; };
  const dead = el("input", { type: "checkbox", id: "dead" });
  dead.checked = Browser.dead;
  main.append(el("h1", {}, "Latents"), el("div", { class: "controls" }, search, group,
    el("label", {}, "density", field("low", "low", "from %"), field("high", "high", "to %")),
    el("label", {}, "max act", field("weak", "weak", "from"), field("strong", "strong", "to")), el("label", {}, dead, "dead too"), ...tokenFilter(), count));
  const heads = columns.map(([key, label]) => el("button", { type: "button", "data-key": key, disabled: key === "words" ? "" : null, onclick: () => {
    if (Browser.sort === key) Browser.falling = !Browser.falling; else { Browser.sort = key; Browser.falling = key !== "latent" && key !== "group"; }
    update();
  } }, label));
  const space = el("div", { class: "space" }), view = el("div", { class: "view", id: "view", tabindex: "0" }, space);
  main.append(el("div", { class: "list" }, el("div", { class: "columns" }, ...heads), view));

  function draw() {
    const from = Math.max(0, Math.floor(view.scrollTop / ROW) - SPARE), to = Math.min(shown.length, Math.ceil((view.scrollTop + view.clientHeight) / ROW) + SPARE);
    const rows = [];
    for (let at = from; at < to; at++) {
      const i = shown[at];
      const row = el("a", { class: "row", href: `#/latent/${i}` }, el("span", {}, String(i)), el("span", {}, String(groups[i])), el("span", {}, percent(table.density[i])),
        el("span", {}, number(table.max[i])), el("span", {}, number(table.mean[i])), el("span", {}, number(table.cosine[i])), el("span", { class: "words" }, table.words[i]));
      row.style.top = `${at * ROW}px`;
      rows.push(row);
    }
    space.replaceChildren(...rows);
  }

  function update(scroll = 0) {
    const low = Browser.low === "" ? 0 : Browser.low / 100, high = Browser.high === "" ? 1 : Browser.high / 100;
    const weak = Browser.weak === "" ? 0 : +Browser.weak, strong = Browser.strong === "" ? Infinity : +Browser.strong;
    shown = [];
    for (let i = 0; i < n; i++) {
      if (Browser.group && groups[i] !== Browser.group) continue;
      if (!Browser.dead && table.density[i] === 0) continue;
      if (table.density[i] < low || table.density[i] > high) continue;
      if ((table.max[i] ?? 0) < weak || (table.max[i] ?? 0) > strong) continue;
      if (matches && !matches.has(i)) continue;
      if (promoted && !promoted.has(i)) continue;
      shown.push(i);
    }
    const of = value[Browser.sort], sign = Browser.falling ? -1 : 1;
    shown.sort((a, b) => sign * ((of(a) ?? -1) - (of(b) ?? -1)) || a - b);
    Report.order = shown;
    for (const head of heads) {
      const own = head.dataset.key === Browser.sort;
      head.setAttribute("aria-sort", own ? (Browser.falling ? "descending" : "ascending") : "none");
      head.textContent = columns.find(([key]) => key === head.dataset.key)[1] + (own ? (Browser.falling ? " \u2193" : " \u2191") : "");
    }
    space.style.height = `${shown.length * ROW}px`;
    view.scrollTop = scroll;
    count.textContent = `${whole(shown.length)} of ${whole(n)}`;
    draw();
  }

  // The text lies in files of its own, read one after another when something is looked for.
  async function find() {
    const own = ++run, query = Browser.query.trim().toLowerCase();
    if (query === "") { matches = null; update(); return; }
    matches = new Set();
    if (Report.search) {
      const found = await Report.search(query);
      if (own !== run || gone) return;
      matches = new Set(found);
    }
    if (/^\d+$/.test(query) && +query < n) matches.add(+query);
    for (let part = 0; part < o.n_text_files && !Report.search; part++) {
      const texts = await load(`text-${part}`);
      if (own !== run || gone) return;
      texts.forEach((text, i) => { if (text.includes(query)) matches.add(part * o.text_file_latents + i); });
      if (part % 8 === 7) { update(view.scrollTop); count.textContent += ", looking\u2026"; }
    }
    update();
  }
  // Latents that raise (or lower) the logit of a token most; its text may be given in part.
  function tokenFilter() {
    const token = el("input", { type: "search", id: "token", placeholder: o.missing.logits ? "needs evaluate logits" : "token", "aria-label": "Logit token" });
    const side = el("select", { id: "side", "aria-label": "Raises or lowers" }, el("option", { value: "raised" }, "raises"), el("option", { value: "lowered" }, "lowers"));
    if (o.missing.logits) { token.disabled = side.disabled = true; token.title = o.missing.logits; }
    token.value = Browser.token;
    side.value = Browser.side;
    const changed = () => { Browser.token = token.value; Browser.side = side.value; promote().then(() => { if (!gone) update(); }).catch(fail); };
    token.addEventListener("input", changed);
    side.addEventListener("change", changed);
    return [el("label", {}, side, token)];
  }

  async function promote() {
    const query = Browser.token.toLowerCase();
    if (query.trim() === "" || o.missing.logits) { promoted = null; return; }
    const logits = await load("logits");
    if (query !== Browser.token.toLowerCase()) return;
    const wanted = new Set();
    logits.texts.forEach((text, i) => { if (text.toLowerCase().includes(query)) wanted.add(i); });
    promoted = new Set();
    logits[Browser.side].forEach((tokens, i) => { if (tokens.some((token) => wanted.has(token))) promoted.add(i); });
  }

  let timer = 0;
  search.addEventListener("input", () => { Browser.query = search.value; clearTimeout(timer); timer = setTimeout(() => find().catch(fail), 150); });
  group.addEventListener("change", () => { Browser.group = +group.value; update(); });
  dead.addEventListener("change", () => { Browser.dead = dead.checked; update(); });
  let frame = 0;
  view.addEventListener("scroll", () => { Browser.top = view.scrollTop; if (!frame) frame = requestAnimationFrame(() => { frame = 0; draw(); }); });
  const resize = new ResizeObserver(draw);
  resize.observe(view);
  await promote();
  if (Browser.query) await find(); else update(Browser.top);
  return () => { gone = true; resize.disconnect(); clearTimeout(timer); };
};
