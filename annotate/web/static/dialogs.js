// The dialogs of the ranking page.

import { LETTERS, createElement } from "./elements.js";
import { HELP, areLettersKeys, setLettersAreKeys } from "./keys.js";

const SKIPS = ["unsure", "language", "broken", "harmful", "other"];
const AS_WRITTEN = { class: "text", style: "white-space: pre-wrap" };

function openDialog({ root, getText, button }, title, ...content) {
  const box = createElement("dialog", { "aria-label": title, onclose: () => box.remove() },
    createElement("h2", { text: title, tabindex: "-1", autofocus: true }), ...content,
    button(getText("close"), "Escape", () => box.close()));
  root.append(box);
  box.showModal();
}
export const findOpenDialog = (root) => root.querySelector("dialog[open]");

export const showGuidelines = (ui, guidelines, title = ui.getText("guidelines")) => openDialog(ui, title,
  guidelines ? createElement("div", { class: "text", html: guidelines.html })
    : createElement("p", { text: ui.getText("no_guidelines") }));

export const showHelp = (ui) => openDialog(ui, ui.getText("help"),
  createElement("dl", { class: "keys" }, ...HELP.flatMap(([name, word]) =>
    [createElement("dt", {}, createElement("kbd", { text: name })), createElement("dd", { text: ui.getText(word) })])),
  createElement("p", {}, createElement("label", {},
    createElement("input", { type: "checkbox", id: "align-letters", checked: areLettersKeys(window),
      onchange: (event) => setLettersAreKeys(window, event.target.checked) }), ` ${ui.getText("letters")}`)));

// Shows the votes that the server refused, with their texts, so that none is discarded unseen.
export const showRefused = (ui, votes) => openDialog(ui, ui.getText("not_sent", { count: votes.length }),
  ...votes.map(({ at, said }) => createElement("pre", { ...AS_WRITTEN,
    text: [at, said.rationale, said.demonstration, JSON.stringify(said)].filter(Boolean).join("\n") })),
  createElement("p", {}, ui.button(ui.getText("forget"), "", ui.actions.forgetRefused)));

export const askSkipReason = (ui) => openDialog(ui, ui.getText("skip_why"), createElement("div", { class: "row" },
  ...SKIPS.map((reason, i) =>
    ui.button(ui.getText(`skip_${reason}`), String(i + 1), () => ui.actions.skip(reason), { "data-digit": i + 1 }))));

export const showDifference = (ui, a, b, html) =>
  openDialog(ui, ui.getText("difference", { a: LETTERS[a], b: LETTERS[b] }),
    createElement("div", { ...AS_WRITTEN, html }));
