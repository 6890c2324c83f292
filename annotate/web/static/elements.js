// DOM elements and the texts of the interface.

export const LETTERS = "ABCDEFGHI";  // of the answers, in the order of the screen

// Creates an element. Properties that start with "on" are event handlers; `text` is plain text, `html` is HTML that the
// server made safe.
export function createElement(tag, properties = {}, ...children) {
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
// Creates the hint on a button that shows its key.
export const createKeyHint = (name) => createElement("kbd", { text: name, "aria-hidden": "true" });

// Returns a function that creates buttons. After a click by mouse, `onClicked` is called with the number of the answer
// that contains the button.
export const createButtonMaker = (onClicked) => (label, shortcut, onPress, attributes = {}) =>
  createElement("button", { type: "button", "aria-keyshortcuts": shortcut, ...attributes, onclick: (event) => {
    const answer = event.currentTarget.closest("[data-answer]")?.dataset.answer;
    onPress();
    if (event.detail) onClicked(answer);
  } }, label, createKeyHint(shortcut));

// Returns a function that looks up a text by its name and fills its `{…}` placeholders.
export const createTextLookup = (texts) => (name, values = {}) =>
  (texts[name] ?? name).replace(/\{(\w+)\}/g, (_, value) => values[value] ?? "");

// Creates the status line. A message of trouble stays until `clearTrouble` is called or another message is shown.
export function createStatus() {
  const element = createElement("p", { id: "said", role: "status", class: "soft" });
  let hasTrouble = false;
  function show(text, isWarning = false, ...children) {
    element.replaceChildren(text, ...children);
    element.className = isWarning ? "warn" : "soft";
    hasTrouble = false;
  }
  return {
    element, show,
    showTrouble(text, ...children) { show(text, true, ...children); hasTrouble = true; },
    clearTrouble() { if (hasTrouble) show(""); },
  };
}
