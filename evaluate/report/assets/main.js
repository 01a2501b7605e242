"use strict";
// Routes by the part of the address after #, the theme, the keys, and the tip under the pointer.
const main = document.getElementById("main"), tip = document.getElementById("tip"), title = document.title;
let leave = null, visit = 0;

function fail(error) {
  main.querySelector(".error")?.remove();
  main.append(el("p", { class: "error", role: "alert" }, `This page cannot be shown: ${error.message}`));
}

async function go(keepScroll = false) {
  const own = ++visit, [path, query] = location.hash.replace(/^#\/?/, "").split(/\?(.*)/s), [page, argument] = path.split("/");
  const name = Object.hasOwn(Report.pages, page) ? page : Report.home;
  if (leave) leave();
  leave = null;
  clearCharts();
  tip.hidden = true;
  for (const link of document.querySelectorAll("nav a")) {
    const here = link.dataset.page === name || (link.dataset.page === "latents" && name === "latent");
    if (here) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
  }
  const fresh = el("div", { class: `page-${name}` });
  main.replaceChildren(fresh);
  main.dataset.ready = "";
  try {
    const undo = await Report.pages[name](fresh, argument, query);
    if (own !== visit) { if (undo) undo(); return; }
    leave = undo ?? null;
  } catch (error) {
    if (own === visit) fail(error);
  }
  // By its own name in the tabs and in the history of the browser.
  const head = name === Report.home ? null : fresh.querySelector("h1");
  document.title = head ? `${head.textContent} \u00b7 ${title}` : title;
  if (!keepScroll) scrollTo(0, 0);
  main.dataset.ready = name + (argument ? `/${argument}` : "");
}

const THEMES = ["auto", "light", "dark"], systemDark = matchMedia("(prefers-color-scheme: dark)");
function stored(value) {
  try {
    if (value !== undefined) localStorage.setItem("matryoshka-theme", value);
    return localStorage.getItem("matryoshka-theme");
  } catch { return null; }
}
let theme = THEMES.includes(stored()) ? stored() : "auto";
function paint() {
  document.documentElement.dataset.theme = theme === "auto" ? (systemDark.matches ? "dark" : "light") : theme;
  document.getElementById("theme").textContent = `\u25d0 ${theme}`;
}
document.getElementById("theme").addEventListener("click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  stored(theme);
  paint();
  go(true);
});
systemDark.addEventListener("change", () => { paint(); go(true); });

addEventListener("keydown", (event) => {
  if (event.target.matches("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") { const search = document.getElementById("search"); if (search) { event.preventDefault(); search.focus(); } }
  const button = document.getElementById({ ArrowLeft: "previous", ArrowRight: "next" }[event.key] ?? "");
  if (button) { event.preventDefault(); button.click(); }
});

function placeTip(box) {
  const size = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - size.width - 8))}px`;
  tip.style.top = `${box.bottom + size.height + 8 > innerHeight ? box.top - size.height - 4 : box.bottom + 4}px`;
}
main.addEventListener("pointerover", (event) => {
  const token = event.target.closest?.("[data-tip]");
  tip.hidden = !token;
  if (!token) return;
  tip.textContent = token.dataset.tip;
  // Of an arc, the place of the pointer; its box may be most of the chart.
  const at = { left: event.clientX + 8, top: event.clientY, bottom: event.clientY + 12 };
  placeTip(token instanceof SVGElement ? at : token.getBoundingClientRect());
});
main.addEventListener("pointerleave", () => { tip.hidden = true; });
addEventListener("hashchange", () => go());
paint();
go();
