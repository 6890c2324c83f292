// What the page shows.
import { figures, settingsInWords } from "./conversation.js";

export const the = (id) => document.getElementById(id);

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "text") element.textContent = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export function say(text, warn = false) {
  the("said").textContent = text;
  the("said").className = warn ? "warn" : "";
}

const digest = (hex) => (hex ? `sha256:${hex}` : "none: the base by itself");

// Which weights stand behind a model.
export function showIdentity(model) {
  const rows = model ? [["base", digest(model.base)]] : [];
  if (model?.arms) rows.push(...model.arms.map((arm) => [arm.arm, `${digest(arm.adapter)} (weight ${arm.weight})`]));
  else if (model) rows.push(["adapter", digest(model.adapter)]);
  the("identity").replaceChildren(...rows.flatMap(([name, value]) => [make("dt", { text: name }), make("dd", { text: value })]));
}

export function showModels(models, chosen) {
  the("model").replaceChildren(...models.map(({ id }) => make("option", { value: id, text: id })));
  if (models.some(({ id }) => id === chosen)) the("model").value = chosen;
}

export function showSettings(settings) {
  the("settings-said").textContent = settingsInWords(settings);
}

// All turns of a chat; and a function that puts the last answer's newest state in its place.
export function showTurns(turns) {
  const shown = turns.map(turnOf);
  the("chat").replaceChildren(...shown.map(({ element }) => element));
  follow(true);
  return (answer) => {
    const atEnd = isAtEnd();
    shown.at(-1).fill(answer);
    follow(atEnd);
  };
}

function turnOf(turn) {
  const said = make("div", { class: "text", text: turn.content });
  const thought = make("div", { class: "thought" });
  const reasoning = make("details", { hidden: "" }, make("summary", { text: "Reasoning" }), thought);
  const about = make("footer");
  const element = make("article", { class: `turn ${turn.role}` }, make("h2", { text: turn.role === "user" ? "You" : turn.model }), reasoning, said, about);
  const fill = (answer) => {
    said.textContent = answer.content;
    thought.textContent = answer.reasoning;
    reasoning.hidden = !answer.reasoning;
    about.textContent = figures(answer);
  };
  if (turn.role === "assistant") fill(turn);
  return { element, fill };
}

// An answer that grows is followed, unless somebody reads further up.
const isAtEnd = () => window.innerHeight + window.scrollY >= document.documentElement.scrollHeight - 40;
function follow(wanted) {
  if (wanted) window.scrollTo(0, document.documentElement.scrollHeight);
}

export function showAsking(asking) {
  the("stop").hidden = !asking;
  the("send").hidden = asking;
}

export function showDoor(open) {
  the("door").hidden = !open;
  if (open) the("key").focus();
}
