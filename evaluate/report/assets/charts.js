"use strict";
// Charts by uPlot. Series are told apart by colour and by dashes.
const Charts = { live: [] };
const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3], [4, 2], [12, 4], [1, 4]];

function clearCharts() {
  for (const chart of Charts.live) { chart.observer.disconnect(); chart.plot.destroy(); }
  Charts.live = [];
}

// kind: line, steps or bars. series: [{label, values}], all over the same x; null where there is no point.
function chart(box, { title, note, x, series, xLabel, kind = "line", height = 230, log = false, format = null, xFormat = null, legend = true, marks = false, onFocus = null }) {
  const place = el("div", {});
  box.append(el("h2", {}, title), note ? el("p", { class: "note" }, note) : null, place);
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--soft").trim(), line = style.getPropertyValue("--line").trim();
  const paths = kind === "bars" ? uPlot.paths.bars({ size: [0.95, 60], align: 1 }) : kind === "steps" ? uPlot.paths.stepped({ align: 1 }) : undefined;
  const axis = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 }, font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif" };
  const decades = log ? { filter: (u, ticks) => ticks.map((v) => v >= 1 && Number.isInteger(Math.log10(v)) ? v : null) } : {};
  const options = {
    width: 300, height,
    legend: { show: legend },
    // The line under the pointer stands out where there are many.
    cursor: { drag: { x: true, y: false }, focus: { prox: marks ? 24 : -1 } },
    focus: { alpha: 0.2 },
    scales: { x: { time: false }, y: log ? { distr: 3, range: (u, low, high) => [0.5, Math.max(high * 1.5, 10)] } : { range: (u, low, high) => [Math.min(0, low), high * 1.05 || 1] } },
    axes: [{ ...axis, label: xLabel, labelSize: 20, size: 34, values: xFormat ? (u, ticks) => ticks.map(xFormat) : undefined },
      { ...axis, size: 52, values: format ? (u, ticks) => ticks.map(format) : undefined, ...decades,
        grid: { ...axis.grid, ...decades }, ticks: { ...axis.ticks, ...decades } }],
    hooks: onFocus ? { setSeries: [(u, i) => onFocus(i === null || i === 0 ? -1 : i - 1)] } : {},
    series: [{ label: xLabel, value: (u, v) => v === null ? "-" : xFormat ? xFormat(v) : String(+v.toPrecision(4)) },
      ...series.map((item, i) => ({
        label: item.label, stroke: hue(item.place ?? i), width: 2, dash: kind === "bars" ? [] : DASHES[(item.place ?? i) % DASHES.length],
        fill: kind === "bars" ? hue(0) + "aa" : undefined, spanGaps: true, paths,
        points: { show: marks || (kind === "line" && x.length < 40), size: 6, fill: hue(item.place ?? i) },
        value: (u, v) => v === null || v === undefined ? "-" : String(+v.toPrecision(4)),
      }))],
  };
  const plot = new uPlot(options, [x, ...series.map((item) => item.values)], place);
  const observer = new ResizeObserver(() => {
    const width = Math.floor(place.clientWidth);
    if (width > 0 && width !== plot.width) plot.setSize({ width, height });
  });
  observer.observe(place);
  Charts.live.push({ plot, observer });
}
