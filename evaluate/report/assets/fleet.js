"use strict";
// All runs of a fleet: one chart, what each cost, and a table to filter and sort.
Report.home = "fleet";
const FLEET = { colour: "", sort: "fvu", order: "up" };

Report.pages.fleet = async (main, _, query) => {
  const f = await load("fleet"), all = f.members, last = (values) => values[values.length - 1];
  const text = (value) => value === null || value === undefined ? "-" : Array.isArray(value) ? value.join(" + ") : typeof value === "object" ? JSON.stringify(value) : String(value);
  const values = (key) => [...new Set(all.map((m) => text(m.config[key])))];
  // A setting that varies is filtered by its value; config. keeps its name apart from ours.
  const usual = { ...FLEET, ...Object.fromEntries(f.keys.map((key) => [`config.${key}`, ""])) }, asked = askedFor(usual, query);
  if (!f.keys.includes(asked.colour)) asked.colour = "";
  for (const key of f.keys) if (!values(key).includes(asked[`config.${key}`])) asked[`config.${key}`] = "";
  const changed = (id, choices, value, on) => { const box = el("select", { id }, ...choices.map(([v, name]) => el("option", { value: v }, name))); box.value = value; box.addEventListener("change", () => on(box.value)); return box; };
  const filters = f.keys.map((key) => el("label", {}, key, changed(`filter-${key}`, [["", "all"], ...values(key).map((v) => [v, v])], asked[`config.${key}`], (v) => { asked[`config.${key}`] = v; redraw(); })));
  const colour = el("label", {}, "colour by", changed("colour", [["", "run"], ...f.keys.map((key) => [key, key])], asked.colour, (v) => { asked.colour = v; redraw(); }));
  const count = el("span", { class: "soft", id: "count", role: "status" });
  const charts = el("div", { class: "charts wide" }), rows = el("div", { class: "scroll" });
  main.append(el("h1", {}, f.name), el("p", { class: "soft" }, `${f.shard_set.source_hook} \u2192 ${f.shard_set.target_hook} of ${f.shard_set.model}; held-out rows of ${f.shard_set.name}${heldOutBlocks(f.shard_set)}`),
    el("div", { class: "controls" }, ...filters, colour, count), charts, rows,
    el("p", { class: "note" }, "FVU and L0 of all latents at the stored threshold. dead: of all latents, on the held-out rows. time: of training, from the rates that the run logged; members trained at once share it. " +
      "A run\u2019s name leads to its own pages when they are made: ", el("code", {}, "evaluate report FLEET/RUN")));

  function redraw() {
    const shown = all.filter((m) => f.keys.every((key) => !asked[`config.${key}`] || text(m.config[key]) === asked[`config.${key}`]));
    const place = (m) => asked.colour ? values(asked.colour).indexOf(text(m.config[asked.colour])) : all.indexOf(m);
    count.textContent = `${whole(shown.length)} of ${whole(all.length)} runs`;
    clearCharts();
    charts.replaceChildren();
    table(shown, place);
    if (!shown.length) return;
    const box = el("div", { class: "chart big" });
    charts.append(box);
    const pointed = el("p", { class: "note", id: "pointed" }, "\u00a0");
    const points = shown.map((m) => m.l0.map((l0, i) => [l0, m.fvu[i]]).filter((p) => p[1] !== null).sort((a, b) => a[0] - b[0]).filter((p, i, own) => i === 0 || p[0] > own[i - 1][0]));
    const joined = uPlot.join(points.map((own) => [own.map((p) => p[0]), own.map((p) => p[1])]));
    chart(box, { title: "FVU against L0", note: "A line a run, a point a nested prefix.", xLabel: "L0", x: joined[0], height: 320, marks: true, legend: shown.length <= 12,
      onFocus: (i) => { pointed.textContent = i < 0 ? "\u00a0" : `${shown[i].name}: FVU ${number(last(shown[i].fvu), 4)} at L0 ${number(last(shown[i].l0), 1)}`; },
      series: shown.map((m, i) => ({ label: m.name, values: joined[i + 1], place: place(m) })) });
    box.append(pointed);
    charts.append(bars("dead", "Dead share", "Of all latents.", shown, place, (m) => m.dead_share, (v) => percent(v)),
      bars("time", "Training time", "Seconds; from the logged rates.", shown, place, (m) => m.seconds, duration));
  }
  function bars(id, title, note, shown, place, value, format) {
    const largest = Math.max(...shown.map((m) => value(m) ?? 0), 1e-12);
    return el("div", { class: "chart", id }, el("h2", {}, title), el("p", { class: "note" }, note), el("ul", { class: "bars" }, ...shown.map((m) => {
      const own = bar((value(m) ?? 0) / largest, value(m) === null ? "-" : format(value(m)), m.name);
      own.style.setProperty("--act", hue(place(m)));
      return el("li", {}, el("span", { class: "words", title: m.name }, m.name), own);
    })));
  }
  const columns = [["name", "run", (m) => m.name], ...f.keys.map((key) => [`config.${key}`, key, (m) => text(m.config[key])]), ["fvu", "FVU", (m) => last(m.fvu)], ["l0", "L0", (m) => last(m.l0)],
    ["dead", "dead", (m) => m.dead_share], ...(all.some((m) => m.ce_recovered) ? [["ce", "CE recovered (mean)", (m) => m.ce_recovered ? last(m.ce_recovered) : null]] : []), ["first", "FVU of the first prefix", (m) => m.fvu[0]],
    ["time", "time", (m) => m.seconds], ["step", "step", (m) => m.step]];
  const shape = { fvu: (v) => number(v, 4), first: (v) => number(v, 4), l0: (v) => number(v, 1), dead: percent, ce: (v) => number(v, 4), time: duration, step: whole };
  function table(shown, place) {
    if (!columns.some(([id]) => id === asked.sort)) asked.sort = usual.sort;
    writeAddress(addressOf("", usual, asked));
    const falling = asked.order === "down", of = columns.find(([id]) => id === asked.sort)[2], order = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
    const sorted = [...shown].sort((a, b) => of(a) === null ? 1 : of(b) === null ? -1 : (falling ? -1 : 1) * order(of(a), of(b)));
    const head = ([id, name]) => el("th", { scope: "col", "aria-sort": id === asked.sort ? (falling ? "descending" : "ascending") : "none" }, el("button", { type: "button", "data-key": id, onclick: () => {
      asked.order = asked.sort === id && !falling ? "down" : "up";
      asked.sort = id;
      keepFocus(() => table(shown, place));
    } }, name + (id === asked.sort ? (falling ? " \u2193" : " \u2191") : "")));
    const cell = (m, [id, , value]) => {
      if (id === "name") { const dot = el("i", { class: "dot" }); dot.style.setProperty("--hue", hue(place(m))); return el("td", {}, dot, m.pages ? el("a", { href: m.pages }, m.name) : m.name, m.finished ? null : el("span", { class: "soft" }, " (not finished)")); }
      return el("td", {}, value(m) === null ? "-" : shape[id] ? shape[id](value(m)) : value(m));
    };
    rows.replaceChildren(el("table", { id: "runs" }, el("thead", {}, el("tr", {}, ...columns.map(head))), el("tbody", {}, ...sorted.map((m) => el("tr", {}, ...columns.map((column) => cell(m, column)))))));
  }
  redraw();
};

function duration(seconds) {
  if (seconds < 120) return `${+seconds.toPrecision(3)} s`;
  return seconds < 7200 ? `${(seconds / 60).toFixed(1)} min` : `${(seconds / 3600).toFixed(1)} h`;
}
