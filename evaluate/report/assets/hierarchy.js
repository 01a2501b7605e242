"use strict";
// The nest: from a coarse latent to those of later groups that fire inside it, with their contexts.
const NEST = { q: "", in: FIRES, least: "500", order: "", alone: "" };
const ROOTS = 40, SHOWN_CHILDREN = 30;

Report.pages.hierarchy = async (main, argument, query) => {
  const o = await load("overview"), n = o.prefix_ends[o.prefix_ends.length - 1];
  main.append(el("h1", {}, "Hierarchy"));
  if (o.missing.hierarchy) { main.append(missing(o, "hierarchy", "The nest is")); return; }
  const table = await load("latents"), edges = await load("hierarchy"), groups = allGroups(n), words = table.words;
  const asked = askedFor(NEST, query);
  let nest = null, focus = /^\d+$/.test(argument ?? "") && +argument < n ? +argument : -1;
  let found = null, run = 0, gone = false;
  const pick = (id, options) => {
    const box = el("select", { id }, ...options.map(([value, text]) => el("option", { value }, text)));
    choose(box, asked[id]);
    box.addEventListener("change", apply);
    return box;
  };
  const { field: search, where } = searchControls(asked, apply), note = el("p", { class: "note", id: "search-note" });
  const least = pick("least", [["250", "25%"], ["500", "50%"], ["750", "75%"], ["900", "90%"]]);
  const order = pick("order", [["", "share on the words"], ["below", "latents inside"], ["density", "density"], ["number", "number"]]);
  const count = el("span", { class: "soft", id: "count", role: "status" }), alone = el("input", { type: "checkbox", id: "alone" });
  alone.checked = asked.alone !== "";
  alone.addEventListener("change", apply);
  main.append(el("p", { class: "note" }, "Each latent is drawn under the tightest earlier latent that fires where it does. Bar: the share of its rows on which that parent fires too; click a line for contexts and for what fires inside it."),
    el("div", { class: "controls" }, where, search, el("label", {}, "inside at least", least), el("label", {}, "by", order),
      el("label", {}, alone, "without a parent in later groups too"), count), note);
  const list = el("ul", { class: "nest", id: "nest" }), burst = el("div", { class: "burst", id: "burst" });
  const grid = el("div", { class: "nest-grid" }, burst, list);
  main.append(grid);

  const aside = (i) => typeof found?.get(i) === "number" ? `${percent(found.get(i))} on it` : nest.below[i] ? `${whole(nest.below[i])} inside` : "";
  function line(i, open = false) {
    const body = el("div", { class: "nest-body" }), button = el("button", { type: "button", class: "fold", "aria-expanded": "false", "aria-label": `Open latent ${i}` }, "\u25b8");
    const head = el("div", { class: "nest-line", onclick: (event) => { if (!event.target.closest("a")) unfold(button.getAttribute("aria-expanded") !== "true").catch(fail); } },
      button, el("a", { href: `#/latent/${i}` }, String(i)), groupBadge(groups[i]), el("span", { class: "words", title: words[i] }, words[i]), el("span", { class: "soft below" }, aside(i)),
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
      if (rest > 0) { const button = el("button", { type: "button", class: "more", onclick: () => { button.parentNode.remove(); more(from + most); box.children[from + most].querySelector(".fold").focus(); } }, `${whole(rest)} more`); box.append(el("li", {}, button)); }
    };
    more(0);
    return box;
  }

  function show(i) {
    focus = i;
    remember();
    const { drawing, hidden } = sunburst(nest, i, groups, words, show);
    const way = nest.path(i).flatMap((up, at) => [at ? " \u203a " : null, el("a", { href: `#/latent/${up}` }, String(up)), " ", groupBadge(groups[up])]);
    const contexts = el("div", {});
    tip.hidden = true;
    burst.replaceChildren(el("div", { class: "way" }, ...way.filter((part) => part !== null)), drawing,
      el("p", { class: "note" }, `${whole(nest.below[i])} inside${hidden ? `, ${whole(hidden)} too small to draw` : ""}. Rings are groups; click an arc to go in, the middle to go out.`), contexts);
    strongest(i, 1).then((found) => contexts.replaceChildren(...found)).catch(fail);
  }

  const remember = () => writeAddress(addressOf(focus < 0 ? "hierarchy" : `hierarchy/${focus}`, NEST,
    { q: search.value.trim(), in: where.value, least: least.value, order: order.value, alone: alone.checked ? "1" : "" }));

  function redraw() {
    const first = o.prefix_ends[0], byShare = found && where.value === FIRES;
    let roots = [];
    if (found) roots = [...found.keys()];
    else for (let i = 0; i < n; i++) { if (i < first ? true : alone.checked && nest.parent[i] < 0 && table.density[i] > 0) roots.push(i); }
    order.options[0].text = byShare ? "share on the words" : "latents inside";
    order.options[1].hidden = !byShare;
    const below = (i) => nest.below[i], key = { "": byShare ? null : below, below, density: (i) => table.density[i], number: (i) => -i }[order.value];
    if (key) roots.sort((a, b) => key(b) - key(a) || a - b);
    let nested = 0;
    for (let i = first; i < n; i++) if (nest.parent[i] >= 0) nested++;
    count.textContent = `${whole(roots.length)} shown; ${whole(nested)} of ${whole(n - first)} later latents have a parent`;
    note.textContent = searchNote(found, where.value);
    note.hidden = !found;
    grid.classList.toggle("searched", Boolean(found));
    if (roots.length && (focus < 0 || (found && !found.has(focus)))) focus = roots[0];
    // The one of the address comes first, open, where nothing is looked for.
    const named = argument !== undefined && !found && focus >= 0 ? nest.path(focus)[0] : -1;
    if (named >= 0) roots = [named, ...roots.filter((i) => i !== named)];
    list.replaceChildren(...lines(roots, ROOTS, named).childNodes);
    if (!roots.length) list.replaceChildren(el("li", {}, nothingFound(search, where, apply)));
    if (focus >= 0) show(focus);
  }
  async function apply() {
    if (gone) return;
    const own = ++run;
    nest = buildNest(edges, groups, +least.value);
    remember();
    try {
      const answer = await findLatents(o, search.value, where.value);
      if (own !== run || gone) return;
      found = answer;
    } catch (error) { if (own === run && !gone) fail(error); return; }
    redraw();
  }
  await apply();
  groupGains(main, await load("groups"));
  return () => { gone = true; };
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
