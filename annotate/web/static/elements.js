// Elements, and the words on them.

export const LETTERS = "ABCDEFGHI";  // of the answers, in the order of the screen

// An element: properties that start with "on" are handlers, `text` its text, `html` what the server made safe.
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "text") element.textContent = value;
    else if (name === "html") element.innerHTML = value;
    else if (value != null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter(Boolean));
  return element;
}
export const key = (name) => make("kbd", { text: name, "aria-hidden": "true" });

// Makes buttons. After a click by mouse, and what it does, `onClicked` is told the answer on which the button stood.
export const buttonMaker = (onClicked) => (label, shortcut, act, more = {}) =>
  make("button", { type: "button", "aria-keyshortcuts": shortcut, ...more, onclick: (event) => {
    const at = event.currentTarget.closest("[data-answer]")?.dataset.answer;
    act();
    if (event.detail) onClicked(at);
  } }, label, key(shortcut));

// The words by their names, `{…}` in them filled.
export const speaker = (words) => (name, values = {}) =>
  (words[name] ?? name).replace(/\{(\w+)\}/g, (_, value) => values[value] ?? "");

// The line that says what goes on. Trouble stays in it until it is over, or something else is said.
export function createStatus() {
  const element = make("p", { id: "said", role: "status", class: "soft" });
  let troubled = false;
  function show(text, warn = false, ...more) {
    element.replaceChildren(text, ...more);
    element.className = warn ? "warn" : "soft";
    troubled = false;
  }
  return {
    element, show,
    trouble(text, ...more) { show(text, true, ...more); troubled = true; },
    recovered() { if (troubled) show(""); },
  };
}
