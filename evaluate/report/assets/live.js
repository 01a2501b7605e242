"use strict";
// With a server behind the pages: it searches for them, and a text of your own goes through the model.
Report.search = (query, where) => ask(`api/search?${new URLSearchParams({ q: query, in: where })}`);
Report.change = (asked) => ask("api/change", asked);
Report.readNotes = async () => (await ask("api/notes")).notes;
Report.keepNote = (note) => ask("api/note", note);

async function ask(address, content) {
  const options = content === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(content) };
  let answer;
  try { answer = await fetch(address, options); } catch { throw new Error("the server does not answer; is evaluate serve still running?"); }
  const found = await answer.json();
  if (!answer.ok) throw Object.assign(new Error(found.error ?? answer.statusText), { note: found.note });
  return found;
}

const Trial = { text: "", tokens: null, at: -1, latent: -1 };

Report.pages.try = async (main) => {
  const o = await load("overview"), table = await load("latents"), groups = allGroups(o.prefix_ends[o.prefix_ends.length - 1]);
  const text = el("textarea", { id: "text", rows: "4", placeholder: "Any text, at most 1,024 tokens", "aria-label": "Text", dir: "auto" });
  text.value = Trial.text;
  const button = el("button", { type: "button", id: "go" }, "Show its latents"), state = el("span", { class: "soft", id: "state", role: "status" });
  const shown = el("div", { class: "text open typed", id: "typed" }), lists = el("div", { class: "columns2 wide" });
  main.append(el("h1", {}, "Try a text"), el("p", { class: "note" }, `Runs ${o.report.shard_set.model} and the transcoder on this machine. The first text waits for the model to load.`),
    text, el("div", { class: "controls" }, button, state), shown, lists);
  let gone = false;

  async function run() {
    if (button.disabled) return;
    button.disabled = true;
    state.textContent = "working\u2026";
    try {
      const found = await ask("api/try", { text: text.value });
      Object.assign(Trial, { tokens: found.tokens, at: -1, latent: -1 });
      state.textContent = `${whole(found.tokens.length)} tokens`;
    } catch (error) { state.textContent = error.message; Trial.tokens = null; }
    button.disabled = false;
    if (!gone) draw();
  }
  button.addEventListener("click", run);
  text.addEventListener("input", () => { Trial.text = text.value; });
  text.addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run(); });

  // Shaded by the chosen latent, or by the strongest latent of each token.
  function draw() {
    if (!Trial.tokens) { shown.replaceChildren(); lists.replaceChildren(); return; }
    const acts = Trial.tokens.map((token) => Trial.latent < 0 ? token.latents[0]?.[1] ?? 0 : token.latents.find(([latent]) => latent === Trial.latent)?.[1] ?? 0);
    const largest = Math.max(...acts, 1e-9);
    shown.replaceChildren(...Trial.tokens.map((token, i) => {
      const span = el("span", { class: "token", role: "button", tabindex: "0", "aria-pressed": String(i === Trial.at), "data-key": `token-${i}`, onclick: () => { Trial.at = Trial.at === i ? -1 : i; keepFocus(draw); },
        onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); event.target.click(); } } }, token.text);
      if (acts[i] > 0) { span.classList.add("on"); span.style.setProperty("--share", (acts[i] / largest).toFixed(3)); if (acts[i] > 0.72 * largest) span.classList.add("strong"); }
      if (i === Trial.at) span.classList.add("peak");
      span.dataset.tip = Trial.latent < 0 ? token.latents.slice(0, 4).map(([latent, act]) => `${latent}: ${number(act, 2)}  ${table.words[latent]}`).join("\n") || "no latent fires" : String(acts[i]);
      return span;
    }));
    const sums = new Map();
    for (const token of Trial.tokens) for (const [latent, act] of token.latents) {
      const own = sums.get(latent) ?? { most: 0, times: 0 };
      sums.set(latent, { most: Math.max(own.most, act), times: own.times + 1 });
    }
    const all = [...sums].sort((a, b) => b[1].most - a[1].most);
    const row = (part, latent, act, most, more) => el("li", { class: latent === Trial.latent ? "chosen" : null },
      el("span", { class: "who" }, el("a", { href: `#/latent/${latent}` }, String(latent)), groupBadge(groups[latent]), el("span", { class: "words", title: table.words[latent] }, table.words[latent])),
      bar(act / most, number(act, 2), more), el("button", { type: "button", class: "more", title: "Shade the text by this latent", "aria-pressed": String(latent === Trial.latent), "data-key": `${part}-${latent}`, onclick: () => { Trial.latent = Trial.latent === latent ? -1 : latent; keepFocus(draw); } }, "shade"));
    const list = (id, title, note, rows) => el("div", { id, class: "besides fires" }, el("h2", {}, title), el("p", { class: "note" }, note), el("ul", {}, ...rows));
    const own = Trial.at < 0 ? null : Trial.tokens[Trial.at];
    lists.replaceChildren(...[
      list("of-text", "In the whole text", `${whole(all.length)} latents fire; by their largest activation.`, all.slice(0, 40).map(([latent, { most, times }]) => row("text", latent, most, all[0][1].most, `on ${times} tokens`))),
      own ? list("of-token", el("span", {}, "On \u201c", el("bdi", {}, own.text), "\u201d"), `Token ${Trial.at + 1}; ${own.latents.length} latents fire.`, own.latents.map(([latent, act]) => row("token", latent, act, own.latents[0][1], "activation")))
        : el("div", { class: "besides" }, el("h2", {}, "On one token"), el("p", { class: "note" }, "Click a token."))]);
  }
  draw();
  if (Trial.tokens) state.textContent = `${whole(Trial.tokens.length)} tokens`;
  return () => { gone = true; };
};
