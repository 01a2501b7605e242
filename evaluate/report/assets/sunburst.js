"use strict";
// One latent in the middle, around it what fires inside it: a ring a group, an arc as wide as its share of the rows.
const BURST = { size: 440, core: 62, edge: 214, least: 0.006 };

function sunburst(nest, focus, groups, words, onPick) {
  const { size, core, edge, least } = BURST, nGroups = Report.data.get("overview").group_sizes.length;
  const rings = Math.max(1, nGroups - groups[focus]), step = (edge - core) / rings, middle = size / 2;
  const drawing = svg("svg", { viewBox: `0 0 ${size} ${size}`, role: "img", "aria-label": `What fires inside latent ${focus}` });
  let hidden = 0;
  const place = (angle, radius) => `${(middle + radius * Math.sin(angle)).toFixed(2)} ${(middle - radius * Math.cos(angle)).toFixed(2)}`;

  // parent: the group of the ring that it is drawn on; rings between are crossed by a faint wedge.
  function arc(i, from, to, parent) {
    const inner = core + (groups[i] - groups[focus] - 1) * step + 1.5, below = core + (parent - groups[focus]) * step, outer = inner + step - 1.5, wide = to - from > Math.PI ? 1 : 0;
    const end = Math.min(to, from + 2 * Math.PI - 1e-4);
    if (inner - below > 3) drawing.append(svg("path", { class: "wedge", d: `M${place(from, below)}L${place(from, inner - 3)}A${inner - 3} ${inner - 3} 0 ${wide} 1 ${place(end, inner - 3)}L${place(end, below)}A${below} ${below} 0 ${wide} 0 ${place(from, below)}Z` }));
    const path = svg("path", { d: `M${place(from, inner)}L${place(from, outer)}A${outer} ${outer} 0 ${wide} 1 ${place(end, outer)}L${place(end, inner)}A${inner} ${inner} 0 ${wide} 0 ${place(from, inner)}Z`,
      class: "arc", fill: hue(groups[i] - 1), "fill-opacity": (0.35 + 0.6 * nest.inside[i] / 1000).toFixed(2), "data-latent": i, onclick: () => onPick(i),
      "data-tip": `${i}, group ${groups[i]}: ${words[i]}\n${nest.inside[i] / 10}% of its rows are inside, ${nest.share[i] / 10}% of its parent\u2019s` });
    drawing.append(path);
    const radius = (inner + outer) / 2, along = (from + to) / 2, label = words[i].split("  ")[0];
    if ((to - from) * inner > 13 && step > 34 && label) {
      const turn = along * 180 / Math.PI - 90, flip = along > Math.PI ? 180 : 0;
      drawing.append(svg("text", { class: "arc-label", transform: `translate(${place(along, radius).replace(" ", ",")}) rotate(${(turn + flip).toFixed(1)})` },
        label.length > step / 6.5 ? `${label.slice(0, Math.floor(step / 6.5) - 1)}\u2026` : label));
    }
  }
  function inside(i, from, to) {
    const own = nest.children(i), total = own.reduce((sum, c) => sum + nest.share[c], 0) / 1000;
    // Children overlap, so that their shares may come to more than the whole; then all are narrowed alike.
    // Those of the one in the middle fill the circle.
    const scale = (to - from) / (i === focus ? total || 1 : Math.max(1, total)) / 1000;
    let at = from;
    for (const c of own) {
      const width = nest.share[c] * scale;
      if (width < least) { hidden += 1 + nest.below[c]; continue; }
      arc(c, at, at + width, groups[i]);
      inside(c, at, at + width);
      at += width;
    }
  }
  inside(focus, 0, 2 * Math.PI);
  drawing.append(svg("circle", { cx: middle, cy: middle, r: core - 3, class: "arc core", fill: hue(groups[focus] - 1), "data-latent": focus, onclick: () => onPick(nest.parent[focus] >= 0 ? nest.parent[focus] : focus),
    "data-tip": `${focus}, group ${groups[focus]}: ${words[focus]}${nest.parent[focus] >= 0 ? "\nup to its parent" : ""}` }),
  svg("text", { x: middle, y: middle + 1, class: "core-label" }, String(focus)), svg("text", { x: middle, y: middle + 19, class: "core-label small" }, words[focus].split("  ")[0].slice(0, 12)));
  return { drawing, hidden };
}
