// The dialogs of the ranking page.

import { LETTERS, make } from "./elements.js";
import { HELP, lettersAreKeys, makeLettersKeys } from "./keys.js";

const SKIPS = ["unsure", "language", "broken", "harmful", "other"];
const AS_WRITTEN = { class: "text", style: "white-space: pre-wrap" };

function openDialog({ root, say, button }, title, ...content) {
  const box = make("dialog", { "aria-label": title, onclose: () => box.remove() },
    make("h2", { text: title, tabindex: "-1", autofocus: true }), ...content,
    button(say("close"), "Escape", () => box.close()));
  root.append(box);
  box.showModal();
}
export const opened = (root) => root.querySelector("dialog[open]");

export const guidelines = (ui, found, title = ui.say("guidelines")) => openDialog(ui, title,
  found ? make("div", { class: "text", html: found.html }) : make("p", { text: ui.say("no_guidelines") }));

export const help = (ui) => openDialog(ui, ui.say("help"),
  make("dl", { class: "keys" }, ...HELP.flatMap(([name, word]) =>
    [make("dt", {}, make("kbd", { text: name })), make("dd", { text: ui.say(word) })])),
  make("p", {}, make("label", {},
    make("input", { type: "checkbox", id: "align-letters", checked: lettersAreKeys(window),
      onchange: (event) => makeLettersKeys(window, event.target.checked) }), ` ${ui.say("letters")}`)));

// What the server would not take, in the words that were said: nothing is thrown away unseen.
export const refused = (ui, letters) => openDialog(ui, ui.say("not_sent", { count: letters.length }),
  ...letters.map(({ at, said }) => make("pre", { ...AS_WRITTEN,
    text: [at, said.rationale, said.demonstration, JSON.stringify(said)].filter(Boolean).join("\n") })),
  make("p", {}, ui.button(ui.say("forget"), "", ui.act.forgetRefused)));

export const reasons = (ui) => openDialog(ui, ui.say("skip_why"), make("div", { class: "row" },
  ...SKIPS.map((reason, i) =>
    ui.button(ui.say(`skip_${reason}`), String(i + 1), () => ui.act.skip(reason), { "data-digit": i + 1 }))));

export const difference = (ui, a, b, html) =>
  openDialog(ui, ui.say("difference", { a: LETTERS[a], b: LETTERS[b] }), make("div", { ...AS_WRITTEN, html }));
