"use strict";
// Own notes and stars. Pages from the disk show those that there were; the live pages keep them (Report.keepNote).
const readNotes = () => Report.readNotes ? Report.readNotes() : load("notes");
// Texts that the server does not have yet: they outlive a refusal, another theme and another page.
const Drafts = new Map();
const NO_NOTE = { star: false, text: "", changes: 0 }, MAX_NOTE = 4000;

// The star goes into `bar`, the note into `box`.
async function ownNote(latent, bar, box) {
  let note;
  try { note = (await readNotes())[latent] ?? NO_NOTE; } catch (error) { box.append(el("p", { class: "note", id: "note-state" }, error.message)); return; }
  if (!Report.keepNote) {
    if (note.star) bar.append(el("span", { class: "star", id: "star" }, "\u2605 starred"));
    if (note.text) box.append(el("p", { class: "own-note", id: "note", dir: "auto" }, note.text));
    return;
  }
  const star = el("button", { type: "button", id: "star", onclick: () => keep(() => [!note.star, note.text]) });
  const text = el("textarea", { id: "note", rows: "2", maxlength: MAX_NOTE, placeholder: "Your own note on this latent", "aria-label": "Your own note", dir: "auto" });
  const state = el("span", { class: "soft", id: "note-state", role: "status" }), theirs = el("p", { class: "own-note", id: "other-note" });
  const save = el("button", { type: "button", id: "save-note", onclick: () => keep(() => [note.star, text.value]) }, "Save note");
  text.value = Drafts.get(latent) ?? note.text;
  if (text.value !== note.text) state.textContent = "not saved yet";
  text.addEventListener("input", () => Drafts.set(latent, text.value));
  // Whoever goes to another page leaves the field first.
  text.addEventListener("change", () => keep(() => [note.star, text.value]));
  bar.append(star);
  box.append(text, el("div", { class: "bar" }, save, state), theirs);
  paint();

  function paint() {
    star.textContent = note.star ? "\u2605 starred" : "\u2606 star";
    star.setAttribute("aria-pressed", String(note.star));
  }
  // One after another, each on what the one before left; but what was asked for before a conflict was seen is dropped:
  // a click on the button leaves the field too, and may not replace what nobody has read yet.
  let last = Promise.resolve(), conflicts = 0;
  // What is wanted is asked when its turn comes: it builds on what the one before left, too.
  function keep(wanted) {
    const seen = conflicts;
    last = last.then(() => seen === conflicts ? send(...wanted()) : null);
  }
  async function send(wantedStar, wantedText) {
    if (wantedStar === note.star && wantedText === note.text) return;
    try {
      note = await Report.keepNote({ latent, star: wantedStar, text: wantedText, changes: note.changes });
      if (text.value === note.text) Drafts.delete(latent);
      state.textContent = text.value === note.text ? "saved" : "not saved yet";
      theirs.textContent = "";
    } catch (error) {
      state.textContent = error.message;
      if (error.note) {
        conflicts += 1;
        note = error.note;
        state.textContent = `Not saved: ${error.message}. What is there now is below; save again to replace it.`;
        theirs.textContent = `${note.star ? "\u2605 " : ""}${note.text || "(no text)"}`;
      }
    }
    paint();
  }
}
