"use strict";
// The map: every latent that fires, near to those with a like decoder direction.
const MAP = { reach: 14, cells: 100, side: 10_000, usual: { q: "", in: FIRES, off: "" } };

Report.pages.map = async (main, _, query) => {
  const o = await load("overview"), n = o.prefix_ends[o.prefix_ends.length - 1];
  main.append(el("h1", {}, "Map"));
  if (o.missing.hierarchy) { main.append(missing(o, "hierarchy", "The map is")); return; }
  if (!o.has_map) { main.append(el("p", { class: "note" }, "evaluate hierarchy was run without clusters, and so without a map, and so no map.")); return; }
  const table = await load("latents"), map = await load("clusters"), groups = allGroups(n), words = table.words;
  const asked = askedFor(MAP.usual, query), off = new Set(asked.off.split(",").map(Number)), clusters = new Map();
  const shownGroups = new Set(o.group_sizes.map((_, i) => i + 1).filter((group) => !off.has(group)));
  map.cluster.forEach((c, i) => { if (c >= 0) { if (!clusters.has(c)) clusters.set(c, []); clusters.get(c).push(i); } });
  const view = { x: -500, y: -500, scale: 0 };
  let hover = -1, chosen = -1, found = null, shares = null, frame = 0, run = 0, gone = false;
  const { field: search, where } = searchControls(asked, find), note = el("p", { class: "note", id: "search-note" });
  const legend = o.group_sizes.map((_, i) => {
    const box = el("input", { type: "checkbox" });
    box.checked = shownGroups.has(i + 1);
    box.addEventListener("change", () => { if (box.checked) shownGroups.add(i + 1); else shownGroups.delete(i + 1); remember(); draw(); });
    return el("label", {}, box, groupBadge(i + 1), `group ${i + 1}`);
  });
  const whole_ = el("button", { type: "button", id: "whole", onclick: () => { fit(); draw(); } }, "all of it");
  const count = el("span", { class: "soft", id: "count", role: "status" }, `${whole(map.latent.length)} latents, ${whole(clusters.size)} clusters`);
  const canvas = el("canvas", { id: "map", tabindex: "0", role: "img", "aria-label": "Map of the latents; what was found and the largest clusters are listed beside it" }), card = el("div", { class: "map-card", id: "map-card" });
  main.append(el("p", { class: "note" }, "Places are a two-dimensional layout of the decoder directions: near means alike, distances far apart mean little. Wheel or pinch to zoom, drag to move, click a point to read it. Keys: arrows move, + and - zoom, 0 shows all of it, Esc lets go of a point."),
    el("div", { class: "controls" }, where, search, ...legend, whole_, count), note, el("div", { class: "map-grid" }, el("div", { class: "map-box" }, canvas), card));

  const pen = canvas.getContext("2d"), grid = new Map();
  map.latent.forEach((_, i) => {
    const key = Math.floor(map.x[i] / MAP.cells) * 1000 + Math.floor(map.y[i] / MAP.cells);
    if (!grid.has(key)) grid.set(key, []);
    grid.get(key).push(i);
  });
  const width = () => canvas.clientWidth, height = () => canvas.clientHeight;
  // Not Math.max(...): a hundred thousand arguments are too many for a call.
  const most = (values) => values.reduce((a, b) => Math.max(a, b), 0), right = most(map.x), bottom = most(map.y);
  function fit() {
    view.scale = Math.min(width() / (MAP.side + 1000), height() / (bottom + 1000));
    view.x = -(width() / view.scale - right) / 2;
    view.y = -(height() / view.scale - bottom) / 2;
  }
  function draw() { if (!frame) frame = requestAnimationFrame(() => { frame = 0; paint(); }); }
  function paint() {
    const ratio = devicePixelRatio || 1, style = getComputedStyle(document.documentElement);
    if (canvas.width !== Math.round(width() * ratio) || canvas.height !== Math.round(height() * ratio)) { canvas.width = Math.round(width() * ratio); canvas.height = Math.round(height() * ratio); }
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width(), height());
    const near = Math.min(2.5, Math.max(1, Math.sqrt(view.scale / (width() / 11_000))));
    const lit = chosen >= 0 ? map.cluster[chosen] : -1;
    for (let group = o.group_sizes.length; group >= 1; group--) {
      if (!shownGroups.has(group)) continue;
      pen.fillStyle = hue(group - 1);
      const size = Math.max(1.6, 4.6 - group) * near;
      for (const dim of [true, false]) {
        pen.globalAlpha = dim ? 0.13 : found ? 1 : 0.8;
        for (let i = 0; i < map.latent.length; i++) {
          if (groups[map.latent[i]] !== group || (found ? !found.has(i) : lit >= 0 && map.cluster[i] !== lit) !== dim) continue;
          const x = (map.x[i] - view.x) * view.scale, y = (map.y[i] - view.y) * view.scale;
          const side = found && !dim ? Math.max(5, size) : size;
          if (x > -5 && y > -5 && x < width() + 5 && y < height() + 5) pen.fillRect(x - side / 2, y - side / 2, side, side);
        }
      }
    }
    pen.globalAlpha = 1;
    pen.strokeStyle = style.getPropertyValue("--text");
    pen.lineWidth = 1.5;
    for (const i of [hover, chosen]) {
      if (i < 0) continue;
      pen.beginPath();
      pen.arc((map.x[i] - view.x) * view.scale, (map.y[i] - view.y) * view.scale, 6 * near, 0, 2 * Math.PI);
      pen.stroke();
    }
  }
  function nearest(x, y) {
    const at = { x: x / view.scale + view.x, y: y / view.scale + view.y }, reach = MAP.reach / view.scale, cells = Math.min(MAP.cells, Math.ceil(reach / MAP.cells));
    let best = -1, least = reach * reach;
    const cx = Math.floor(at.x / MAP.cells), cy = Math.floor(at.y / MAP.cells);
    for (let a = cx - cells; a <= cx + cells; a++) for (let b = cy - cells; b <= cy + cells; b++) for (const i of grid.get(a * 1000 + b) ?? []) {
      const far = (map.x[i] - at.x) ** 2 + (map.y[i] - at.y) ** 2;
      if (far < least && shownGroups.has(groups[map.latent[i]])) { least = far; best = i; }
    }
    return best;
  }
  function zoom(x, y, by) {
    const scale = Math.max(0.3 * width() / 11_000, Math.min(view.scale * by, 2));
    view.x += x / view.scale - x / scale;
    view.y += y / view.scale - y / scale;
    view.scale = scale;
    draw();
  }
  // Before a point is chosen: what was found, or the clusters with most latents, each by its member that fires most.
  function largest() {
    if (found) {
      if (!shares.size) return [nothingFound(search, where, find)];
      const hits = [...shares].filter(([latent]) => at.has(latent)).slice(0, 25), missing = shares.size - found.size;
      return [el("h3", {}, "Found"), el("ul", { class: "members" }, ...hits.map(([latent, share]) => name(latent, share === null ? null : el("span", { class: "soft" }, percent(share))))),
        missing ? el("p", { class: "note" }, `${whole(missing)} more are not on the map.`) : null].filter((part) => part);
    }
    const rows = [...clusters].sort((a, b) => b[1].length - a[1].length).slice(0, 22).map(([cluster, members]) => {
      const busiest = members.reduce((a, b) => table.density[map.latent[b]] > table.density[map.latent[a]] ? b : a);
      return el("li", {}, el("button", { type: "button", class: "more", onclick: () => pick(busiest).catch(fail) }, whole(members.length)), el("span", { class: "words", title: `cluster ${cluster}` }, words[map.latent[busiest]]));
    });
    return rows.length ? [el("h3", {}, "Largest clusters"), el("ul", { class: "members" }, ...rows)] : [];
  }
  const at = new Map(map.latent.map((latent, i) => [latent, i]));
  const name = (l, more = null) => el("li", {}, el("a", { href: `#/latent/${l}` }, String(l)), groupBadge(groups[l]), el("span", { class: "words", title: words[l] }, words[l]), more);
  async function pick(i) {
    chosen = i;
    draw();
    if (i < 0) { card.replaceChildren(...largest()); return; }
    const latent = map.latent[i], cluster = map.cluster[i], members = cluster < 0 ? [] : clusters.get(cluster);
    const contexts = el("div", {});
    const closest = members.filter((m) => m !== i).sort((a, b) => (map.x[a] - map.x[i]) ** 2 + (map.y[a] - map.y[i]) ** 2 - (map.x[b] - map.x[i]) ** 2 - (map.y[b] - map.y[i]) ** 2);
    card.replaceChildren(el("ul", { class: "members" }, name(latent)), contexts, el("h3", {}, cluster < 0 ? "in no cluster" : `cluster ${cluster}: ${whole(members.length)} latents`),
      el("ul", { class: "members" }, ...closest.slice(0, 25).map((m) => name(map.latent[m]))));
    contexts.append(...await strongest(latent, 2));
  }
  const pointers = new Map();
  let moved = 0;
  canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); pointers.set(event.pointerId, [event.offsetX, event.offsetY]); moved = 0; });
  canvas.addEventListener("pointermove", (event) => {
    const now = [event.offsetX, event.offsetY], last = pointers.get(event.pointerId);
    if (last) {
      const others = [...pointers].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
      if (others.length) zoom(others[0][0], others[0][1], Math.hypot(now[0] - others[0][0], now[1] - others[0][1]) / Math.max(1, Math.hypot(last[0] - others[0][0], last[1] - others[0][1])));
      else { view.x -= (now[0] - last[0]) / view.scale; view.y -= (now[1] - last[1]) / view.scale; }
      moved += Math.hypot(now[0] - last[0], now[1] - last[1]);
      pointers.set(event.pointerId, now);
      draw();
      return;
    }
    const i = nearest(...now);
    if (i !== hover) { hover = i; draw(); }
    tip.hidden = i < 0;
    canvas.style.cursor = i < 0 ? "grab" : "pointer";
    if (i >= 0) { tip.textContent = `${map.latent[i]}, group ${groups[map.latent[i]]}: ${words[map.latent[i]]}`; placeTip({ left: event.clientX + 10, top: event.clientY, bottom: event.clientY + 12 }); }
  });
  canvas.addEventListener("pointerup", (event) => { if (pointers.delete(event.pointerId) && moved < 4) pick(nearest(event.offsetX, event.offsetY)).catch(fail); });
  canvas.addEventListener("pointercancel", (event) => pointers.delete(event.pointerId));
  canvas.addEventListener("pointerleave", () => { hover = -1; tip.hidden = true; draw(); });
  canvas.addEventListener("wheel", (event) => { event.preventDefault(); zoom(event.offsetX, event.offsetY, Math.exp(-event.deltaY / 400)); }, { passive: false });
  const STEP = 60, KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const way = KEYS[event.key];
    if (way) { view.x += way[0] * STEP / view.scale; view.y += way[1] * STEP / view.scale; draw(); }
    else if (event.key === "+" || event.key === "-") zoom(width() / 2, height() / 2, event.key === "+" ? 1.5 : 1 / 1.5);
    else if (event.key === "0") { fit(); draw(); }
    else if (event.key === "Escape") pick(-1).catch(fail);
    else return;
    event.preventDefault();
  });
  function remember() {
    const hidden = o.group_sizes.map((_, i) => i + 1).filter((group) => !shownGroups.has(group));
    writeAddress(addressOf("map", MAP.usual, { q: search.value.trim(), in: where.value, off: hidden.join(",") }));
  }
  async function find() {
    if (gone) return;
    const own = ++run;
    remember();
    try {
      const answer = await findLatents(o, search.value, where.value);
      if (own !== run || gone) return;
      shares = answer;
    } catch (error) { if (own === run && !gone) fail(error); return; }
    found = shares && new Set([...shares.keys()].filter((latent) => at.has(latent)).map((latent) => at.get(latent)));
    note.textContent = searchNote(shares, where.value);
    note.hidden = !shares;
    count.textContent = found ? `${whole(found.size)} of ${whole(map.latent.length)}` : `${whole(map.latent.length)} latents, ${whole(clusters.size)} clusters`;
    chosen = -1;
    card.replaceChildren(...largest());
    draw();
  }
  let fitted = false;
  const resize = new ResizeObserver(() => { if (width() > 0 && !fitted) { fit(); fitted = true; } draw(); });
  resize.observe(canvas);
  fit();
  fitted = width() > 0;
  await find();
  return () => { gone = true; resize.disconnect(); cancelAnimationFrame(frame); };
};
