// The state of the page, and what follows what.
import { ask, keepKey, keptKey, modelsFor } from "./server.js";

const the = (id) => document.getElementById(id);
const state = { key: keptKey(), models: [], messages: [], asking: null };

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "text") element.textContent = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function say(text, warn = false) {
  the("said").textContent = text;
  the("said").className = warn ? "warn" : "";
}

const digest = (hex) => (hex ? `sha256:${hex}` : "none: the base by itself");

// Which weights stand behind the model that is chosen.
function showIdentity() {
  const model = state.models.find((each) => each.id === the("model").value);
  const rows = model ? [["base", digest(model.base)]] : [];
  if (model?.arms) rows.push(...model.arms.map((arm) => [arm.arm, `${digest(arm.adapter)} (weight ${arm.weight})`]));
  else if (model) rows.push(["adapter", digest(model.adapter)]);
  the("identity").replaceChildren(...rows.flatMap(([name, value]) => [make("dt", { text: name }), make("dd", { text: value })]));
}

// One turn of the chat, and how an answer is put into it while it comes.
function showTurn(role, text) {
  const said = make("div", { class: "text", text });
  const thought = make("div", { class: "thought" });
  const reasoning = make("details", { hidden: "" }, make("summary", { text: "Reasoning" }), thought);
  const about = make("footer");
  the("chat").append(make("article", { class: `turn ${role}` }, make("h2", { text: role === "user" ? "You" : the("model").value }), reasoning, said, about));
  follow(true);
  return (answer) => {
    const atEnd = isAtEnd();
    said.textContent = answer.content;
    thought.textContent = answer.reasoning;
    reasoning.hidden = !answer.reasoning;
    about.textContent = aboutAnswer(answer);
    follow(atEnd);
  };
}

// An answer that grows is followed, unless somebody reads further up.
const isAtEnd = () => window.innerHeight + window.scrollY >= document.documentElement.scrollHeight - 40;
function follow(wanted) {
  if (wanted) window.scrollTo(0, document.documentElement.scrollHeight);
}

function aboutAnswer({ usage, finish, arm, adapter }) {
  const parts = [arm && `arm ${arm}`, adapter && `adapter ${adapter.slice(0, 12)}`];
  parts.push(usage && `${usage.completion_tokens} tokens`, finish === "length" && "cut: the context is full");
  return parts.filter(Boolean).join(" · ");
}

function showAsking(asking) {
  state.asking = asking;
  the("stop").hidden = !asking;
  the("send").hidden = Boolean(asking);
}

async function send() {
  const question = the("question").value.trim();
  if (!question || state.asking) return;
  the("question").value = "";
  showTurn("user", question);
  state.messages.push({ role: "user", content: question });
  const chat = state.messages;
  const show = showTurn("assistant", "");
  const asking = new AbortController();
  let last = { content: "" };
  showAsking(asking);
  say("It answers …");
  try {
    await ask({
      key: state.key, model: the("model").value, messages: chat, signal: asking.signal,
      onAnswer: (answer) => { last = answer; show(answer); },
    });
    say("");
  } catch (error) {
    say(asking.signal.aborted ? "Stopped." : error.message, !asking.signal.aborted);
    if (error.status === 401) showDoor();
  } finally {
    // What was said so far is part of the chat; a question that got no answer goes back to where it was typed.
    if (last.content) chat.push({ role: "assistant", content: last.content });
    else takeBack(chat, question);
    showAsking(null);
    the("question").focus();
  }
}

function takeBack(chat, question) {
  chat.pop();
  if (chat !== state.messages) return; // the page was cleared meanwhile
  for (const turn of [...the("chat").children].slice(-2)) turn.remove();
  the("question").value ||= question;
}

function showDoor() {
  the("door").hidden = false;
  the("key").focus();
}

async function open() {
  try {
    state.models = (await modelsFor(state.key)).filter(({ scores }) => !scores);
    state.models.sort((one, other) => Number(one.parent === null) - Number(other.parent === null)); // the base last
  } catch (error) {
    say(error.status === 401 && !state.key ? "This server asks for a key." : error.message, Boolean(state.key));
    if (error.status === 401) showDoor();
    return;
  }
  the("door").hidden = true;
  the("model").replaceChildren(...state.models.map(({ id }) => make("option", { value: id, text: id })));
  showIdentity();
  say("");
  the("question").focus();
}

function clear() {
  state.asking?.abort();
  state.messages = [];
  the("chat").replaceChildren();
  say("");
}

the("model").addEventListener("change", showIdentity);
the("clear").addEventListener("click", clear);
the("stop").addEventListener("click", () => state.asking?.abort());
the("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
the("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
the("door").addEventListener("submit", (event) => {
  event.preventDefault();
  state.key = the("key").value.trim();
  the("key").value = "";
  keepKey(state.key);
  open();
});
open();
