"use strict";
// How a text continues with one latent changed: a box where a server is behind the pages, else the commands to type.
const Changing = { text: "", how: "steer", strength: "2" };
const HOWS = { steer: ["steer", "Added to every token: strength times its largest activation times its decoder row."],
  ablate: ["scale where it fires", "Where it fires, its activation times the strength: 0 takes it out, 1 changes nothing."] };

function changeBox(aside, latent, n) {
  if (!Report.change) {
    const command = (text) => el("p", { class: "note" }, el("code", {}, text));
    aside.append(besides("change", "Steer or ablate", el("p", { class: "note" }, "evaluate serve RUN has a box for it here. In a terminal:"),
      command(`evaluate steer RUN ${latent} --text "The" --scale 2`), command(`evaluate ablate RUN ${latent}`)));
    return;
  }
  const text = el("textarea", { id: "change-text", rows: "2", placeholder: "A text to continue", "aria-label": "Text to continue", dir: "auto" });
  const how = el("select", { id: "how", "aria-label": "How the latent is changed" }, ...Object.entries(HOWS).map(([value, [name]]) => el("option", { value }, name)));
  const strength = el("input", { type: "number", id: "strength", step: "any", min: "-1000", max: "1000", "aria-label": "Strength" });
  const go = el("button", { type: "button", id: "change-go" }, "Continue"), state = el("span", { class: "soft", id: "change-state", role: "status" });
  const note = el("p", { class: "note" }), shown = el("div", { id: "continuations" });
  text.value = Changing.text;
  how.value = Changing.how;
  strength.value = Changing.strength;
  const say = () => { note.textContent = HOWS[how.value][1]; };
  // What is typed stays for the next latent.
  const remember = () => Object.assign(Changing, { text: text.value, how: how.value, strength: strength.value });
  for (const field of [text, strength]) field.addEventListener("input", remember);
  how.addEventListener("change", () => { strength.value = how.value === "steer" ? "2" : "0"; remember(); say(); });
  say();
  const continuation = (id, title, prompt, more) => [el("h3", {}, title), el("p", { class: "own-note", id }, el("span", { class: "soft" }, prompt), more)];

  async function run() {
    if (go.disabled) return;
    const asked = { latent, text: text.value, how: how.value, strength: strength.value === "" ? null : Number(strength.value) };
    go.disabled = true;
    state.textContent = "working\u2026";
    try {
      const found = await Report.change(asked);
      const changed = asked.how === "steer" ? `with ${asked.strength} x ${found.max_act} of it` : `with its activation times ${asked.strength}`;
      shown.replaceChildren(...continuation("plain", "as it is", found.prompt, found.plain), ...continuation("changed", changed, found.prompt, found.changed));
      state.textContent = found.plain === found.changed ? "nothing changes" : "";
    } catch (error) { shown.replaceChildren(); state.textContent = error.message; }
    go.disabled = false;
  }
  go.addEventListener("click", run);
  text.addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run(); });
  aside.append(besides("change", "Steer or ablate", text, el("div", { class: "controls" }, how, strength, go), state, note, shown));
}
