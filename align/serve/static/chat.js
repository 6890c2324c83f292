// The state of the page, and what follows what.
import { messagesOf, settled } from "./conversation.js";
import { keep, kept } from "./kept.js";
import { ask, modelsFor } from "./server.js";
import { say, showAsking, showDoor, showIdentity, showModels, showSettings, showTurns, the } from "./view.js";

const SETTINGS = ["system", "temperature", "most"];
const state = { key: kept("key", ""), models: [], turns: [], asking: null };
const settings = () => Object.fromEntries(SETTINGS.map((name) => [name, the(name).value]));
const number = (text) => (text === "" ? undefined : Number(text));

function change(turns) {
  state.turns = turns;
  if (!keep("chat", turns)) say("This chat is too long for the browser to keep: a reload loses the end of it.", true);
}

async function send() {
  const question = the("question").value.trim();
  if (!question || state.asking || !settingsHold()) return;
  the("question").value = "";
  const { system, temperature, most } = settings();
  const model = the("model").value;
  const before = [...state.turns, { role: "user", content: question }];
  const asked = { model, messages: messagesOf(system, before), temperature: number(temperature), max_completion_tokens: number(most) };
  const answer = { role: "assistant", content: "", reasoning: "", model, most: number(most), finish: null, ended: null };
  const asking = new AbortController();
  state.asking = asking;
  change([...before, answer]);
  const show = showTurns(state.turns);
  const hear = (heard) => {
    if (state.asking !== asking) return; // the page was cleared meanwhile
    state.turns = [...before, { ...answer, ...heard }];
    show(state.turns.at(-1));
  };
  showAsking(true);
  say("It answers …");
  try {
    await ask({ key: state.key, asked, signal: asking.signal, onAnswer: hear });
    if (state.asking !== asking) return;
    say(state.turns.at(-1)?.content || state.turns.at(-1)?.reasoning ? "" : "The answer is empty.");
  } catch (error) {
    if (state.asking !== asking) return;
    const stopped = asking.signal.aborted;
    say(stopped ? "Stopped." : error.message, !stopped);
    if (!stopped) hear({ ...state.turns.at(-1), ended: `ended by an error: ${error.message}` }); // see `settled`
    if (error.status === 401) showDoor(true);
  }
  settle();
}

// Nothing more comes: what was said so far is part of the chat.
function settle() {
  state.asking = null;
  const { turns, question } = settled(state.turns);
  change(turns);
  showTurns(turns);
  the("question").value ||= question;
  showAsking(false);
  the("question").focus();
}

// Whether the numbers are ones that the server takes; if not, the browser says which is not.
function settingsHold() {
  if (the("settings").checkValidity()) return true;
  the("settings-fold").open = true;
  return the("settings").reportValidity();
}

// Begins with a key, which is kept once the server knows it.
async function open(key) {
  try {
    state.models = (await modelsFor(key)).filter(({ scores }) => !scores);
  } catch (error) {
    say(error.status === 401 && !key ? "This server asks for a key." : error.message, Boolean(key));
    if (error.status === 401) showDoor(true);
    return;
  }
  if (state.key && key !== state.key) clear(); // what one asked is not sent on in the name of another
  state.key = key;
  keep("key", key);
  state.models.sort((one, other) => Number(one.parent === null) - Number(other.parent === null)); // the base last
  showModels(state.models, the("model").value || kept("model", ""));
  identify();
  showDoor(false);
  the("rekey").hidden = !key;
  say("");
  the("question").focus();
}

function identify() {
  showIdentity(state.models.find((each) => each.id === the("model").value));
}

function restore() {
  const found = kept("settings", {});
  for (const name of SETTINGS) the(name).value = found[name] ?? "";
  showSettings(settings());
  const { turns, question } = settled(kept("chat", []));
  change(turns);
  showTurns(turns);
  the("question").value ||= question;
}

function clear() {
  state.asking?.abort();
  state.asking = null;
  showAsking(false);
  change([]);
  showTurns([]);
  say("");
}

the("model").addEventListener("change", () => { keep("model", the("model").value); identify(); });
the("settings").addEventListener("input", () => { keep("settings", settings()); showSettings(settings()); });
the("settings").addEventListener("submit", (event) => event.preventDefault());
the("clear").addEventListener("click", clear);
the("rekey").addEventListener("click", () => showDoor(the("door").hidden));
the("stop").addEventListener("click", () => state.asking?.abort());
the("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
the("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
the("door").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = the("key").value.trim();
  the("key").value = "";
  open(key);
});
window.addEventListener("beforeunload", () => state.asking?.abort()); // or the browser reports an error of the network
window.addEventListener("pagehide", () => keep("chat", state.turns));
restore();
open(state.key);
