"use strict";
// The nest: from a coarse latent to those of later groups that fire inside it, with their contexts.
const Nest = { least: 500, order: "below", query: "", alone: false };
const ROOTS = 40, SHOWN_CHILDREN = 30;

Report.pages.hierarchy = async (main, argument) => {
  const o = await load("overview"), n = o.prefix_ends[o.prefix_ends.length - 1];
  main.append(el("h1", {}, "Hierarchy"));
  if (o.missing.hierarchy) { main.append(missing(o, "hierarchy", "The nest is")); return; }
  const table = await load("latents"), edges = await load("hierarchy"), groups = allGroups(n), words = table.words;
  let nest = buildNest(edges, groups, Nest.least), focus = /^\d+$/.test(argument ?? "") && +argument < n ? +argument : -1;
  const pick = (id, label, options, value, changed) => {
    const box = el("select", { id, "aria-label": label }, ...options.map(([v, text]) => el("option", { value: String(v) }, text)));
    box.value = String(value);
    box.addEventListener("change", () => { changed(box.value); redraw(); });
    return el("label", {}, label, box);
  };
  const search = el("input", { type: "search", id: "search", placeholder: "Words, or a latent\u2019s number", "aria-label": "Search" });
  search.value = Nest.query;
  search.addEventListener("input", () => { Nest.query = search.value; redraw(); });
  const count = el("span", { class: "soft", id: "count", role: "status" });
  const alone = el("input", { type: "checkbox", id: "alone" });
  alone.checked = Nest.alone;
  alone.addEventListener("change", () => { Nest.alone = alone.checked; redraw(); });
  main.append(el("p", { class: "note" }, "Each latent stands under the tightest earlier latent that fires where it does. Bar: how much of its own rows lie inside that parent; click a line for contexts and for what fires inside it."),
    el("div", { class: "controls" }, search, pick("least", "inside at least", [[250, "25%"], [500, "50%"], [750, "75%"], [900, "90%"]], Nest.least, (v) => { Nest.least = +v; nest = buildNest(edges, groups, Nest.least); }),
      pick("order", "by", [["below", "latents inside"], ["density", "density"], ["number", "number"]], Nest.order, (v) => { Nest.order = v; }),
      el("label", {}, alone, "without a parent in later groups too"), count));
  const list = el("ul", { class: "nest", id: "nest" }), burst = el("div", { class: "burst", id: "burst" });
  main.append(el("div", { class: "nest-grid" }, burst, list));

  function line(i, open = false) {
    const body = el("div", { class: "nest-body" }), button = el("button", { type: "button", class: "fold", "aria-expanded": "false", "aria-label": `Open latent ${i}` }, "\u25b8");
    const head = el("div", { class: "nest-line", onclick: (event) => { if (!event.target.closest("a")) unfold(button.getAttribute("aria-expanded") !== "true"); } },
      button, el("a", { href: `#/latent/${i}` }, String(i)), groupBadge(groups[i]), el("span", { class: "words", title: words[i] }, words[i]), el("span", { class: "soft below" }, nest.below[i] ? `${whole(nest.below[i])} inside` : ""),
      nest.parent[i] >= 0 ? bar(nest.inside[i] / 1000, `${nest.inside[i] / 10}%`, `${nest.inside[i] / 10}% of its rows are inside ${nest.parent[i]}, ${nest.share[i] / 10}% of that one\u2019s`) : bar(0, percent(table.density[i]), "share of all rows"));
    const item = el("li", { "data-latent": i }, head, body);
    async function unfold(to, quiet = false) {
      button.setAttribute("aria-expanded", String(to));
      button.textContent = to ? "\u25be" : "\u25b8";
      if (!to) { body.replaceChildren(); return; }
      if (!quiet) show(i);
      const contexts = el("div", { class: "nest-contexts" }), own = nest.children(i);
      body.replaceChildren(contexts, lines(own, SHOWN_CHILDREN));
      contexts.append(...await strongest(i, 2));
    }
    if (open) unfold(true, true).catch(fail);
    return item;
  }
  function lines(latents, most, open = -1) {
    const box = el("ul", { class: "nest" });
    const more = (from) => {
      box.append(...latents.slice(from, from + most).map((i) => line(i, i === open)));
      const rest = latents.length - from - most;
      if (rest > 0) { const button = el("button", { type: "button", class: "more", onclick: () => { button.parentNode.remove(); more(from + most); } }, `${whole(rest)} more`); box.append(el("li", {}, button)); }
    };
    more(0);
    return box;
  }

  function show(i) {
    focus = i;
    history.replaceState(null, "", `#/hierarchy/${i}`);
    const { drawing, hidden } = sunburst(nest, i, groups, words, show);
    const way = nest.path(i).flatMap((up, at) => [at ? " \u203a " : null, el("a", { href: `#/latent/${up}` }, String(up)), " ", groupBadge(groups[up])]);
    const contexts = el("div", {});
    tip.hidden = true;
    burst.replaceChildren(el("div", { class: "way" }, ...way.filter((part) => part !== null)), drawing,
      el("p", { class: "note" }, `${whole(nest.below[i])} inside${hidden ? `, ${whole(hidden)} too small to draw` : ""}. Rings are groups; click an arc to go in, the middle to go out.`), contexts);
    strongest(i, 1).then((found) => contexts.replaceChildren(...found)).catch(fail);
  }

  function redraw() {
    const query = Nest.query.trim().toLowerCase(), first = o.prefix_ends[0];
    let roots = [];
    if (query === "") for (let i = 0; i < n; i++) { if (i < first ? true : Nest.alone && nest.parent[i] < 0 && table.density[i] > 0) roots.push(i); }
    else for (let i = 0; i < n; i++) if (String(i) === query || words[i].toLowerCase().includes(query)) roots.push(i);
    const key = { below: (i) => nest.below[i], density: (i) => table.density[i], number: (i) => -i }[Nest.order];
    roots.sort((a, b) => key(b) - key(a) || a - b);
    let nested = 0;
    for (let i = first; i < n; i++) if (nest.parent[i] >= 0) nested++;
    count.textContent = `${whole(roots.length)} shown; ${whole(nested)} of ${whole(n - first)} later latents have a parent`;
    if (focus < 0 && roots.length) focus = roots[0];
    // The one of the address comes first, open, where nothing is looked for.
    const named = argument !== undefined && query === "" && focus >= 0 ? nest.path(focus)[0] : -1;
    if (named >= 0) roots = [named, ...roots.filter((i) => i !== named)];
    list.replaceChildren(...lines(roots, ROOTS, named).childNodes);
    if (focus >= 0) show(focus);
  }
  redraw();
  groupGains(main, await load("groups"));
};

// Under the nest: what the groups are for.
function groupGains(main, { groups, pairs }) {
  const tokens = (texts) => el("span", { class: "words" }, texts.map((text) => text.trim() || "\u2423").join("  "));
  if (groups.length) {
    main.append(el("h2", {}, "What each group adds"), dataTable(["group", "latents", "FVU before", "after", "of the variance", "fires on", "L0", "most of it on the tokens", "most a row on"],
      groups.map((g) => [groupBadge(g.group), whole(g.n_latents), number(g.fvu_before, 4), number(g.fvu_after, 4), g.share_of_variance === null ? "-" : percent(g.share_of_variance), percent(g.share_of_rows), number(g.l0, 1), tokens(g.tokens), tokens(g.tokens_per_row)]), { id: "gains" }));
  }
  const across = pairs.filter((p) => p.parent_group < p.child_group);
  if (across.length) {
    main.append(el("h2", {}, "Groups in groups"), dataTable(["inside", "latents of", "that fired", "with a parent there", "half inside one", "mean best share"],
      across.map((p) => [groupBadge(p.parent_group), groupBadge(p.child_group), whole(p.n_children), whole(p.n_with_parent), p.share_implied === null ? "-" : percent(p.share_implied), number(p.mean_best_parent, 3)]), { id: "pairs" }));
  }
}
