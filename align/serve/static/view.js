// Draws the chat page.
import { describeSettings, formatFigures } from "./conversation.js";

export const getElement = (id) => document.getElementById(id);

function createElement(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "text") element.textContent = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export function showStatus(text, isWarning = false) {
  getElement("said").textContent = text;
  getElement("said").className = isWarning ? "warn" : "";
}

const formatDigest = (hex) => (hex ? `sha256:${hex}` : "none: the base without an adapter");

// Shows the digests of a model's base and adapters.
export function showIdentity(model) {
  const rows = model ? [["base", formatDigest(model.base)]] : [];
  if (model?.arms) rows.push(...model.arms.map((arm) => [arm.arm, `${formatDigest(arm.adapter)} (weight ${arm.weight})`]));
  else if (model) rows.push(["adapter", formatDigest(model.adapter)]);
  getElement("identity").replaceChildren(...rows.flatMap(([name, value]) =>
    [createElement("dt", { text: name }), createElement("dd", { text: value })]));
}

export function showModels(models, selectedId) {
  getElement("model").replaceChildren(...models.map(({ id }) => createElement("option", { value: id, text: id })));
  if (models.some(({ id }) => id === selectedId)) getElement("model").value = selectedId;
}

export function showSettings(settings) {
  getElement("settings-said").textContent = describeSettings(settings);
}

// Shows all turns of a chat. Returns a function that updates the last answer while it grows.
export function showTurns(turns) {
  const views = turns.map(createTurn);
  getElement("chat").replaceChildren(...views.map(({ element }) => element));
  scrollToEnd();
  return (answer) => {
    const wasAtEnd = isAtEnd();
    views.at(-1).fill(answer);
    if (wasAtEnd) scrollToEnd();  // a reader who has scrolled up stays there
  };
}

function createTurn(turn) {
  const content = createElement("div", { class: "text", text: turn.content });
  const thought = createElement("div", { class: "thought" });
  const reasoning = createElement("details", { hidden: "" }, createElement("summary", { text: "Reasoning" }), thought);
  const footer = createElement("footer");
  const heading = createElement("h2", { text: turn.role === "user" ? "You" : turn.model });
  const element = createElement("article", { class: `turn ${turn.role}` }, heading, reasoning, content, footer);
  const fill = (answer) => {
    content.textContent = answer.content;
    thought.textContent = answer.reasoning;
    reasoning.hidden = !answer.reasoning;
    footer.textContent = formatFigures(answer);
  };
  if (turn.role === "assistant") fill(turn);
  return { element, fill };
}

const isAtEnd = () => window.innerHeight + window.scrollY >= document.documentElement.scrollHeight - 40;
const scrollToEnd = () => window.scrollTo(0, document.documentElement.scrollHeight);

// Shows the button that stops the answer while one comes, and else the button that sends a question.
export function showStopButton(isAnswering) {
  getElement("stop").hidden = !isAnswering;
  getElement("send").hidden = isAnswering;
}

export function showKeyForm(isOpen) {
  getElement("door").hidden = !isOpen;
  if (isOpen) getElement("key").focus();
}
