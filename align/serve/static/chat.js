// The chat page: its state, and what happens when people use it.
import { buildMessages, settleTurns } from "./conversation.js";
import { fetchModels, streamAnswer } from "./server.js";
import { readSaved, save } from "./storage.js";
import {
  getElement, showIdentity, showKeyForm, showModels, showSettings, showStatus, showStopButton, showTurns,
} from "./view.js";

const SETTINGS = ["system", "temperature", "most"];  // ids of the fields
// `request` is the AbortController of the answer that is coming; null while none is.
const state = { key: readSaved("key", ""), models: [], turns: [], request: null };
const readSettings = () => Object.fromEntries(SETTINGS.map((name) => [name, getElement(name).value]));
const parseNumber = (text) => (text === "" ? undefined : Number(text));

function setTurns(turns) {
  state.turns = turns;
  if (!save("chat", turns)) showStatus("This chat is too long for the browser's storage: a reload loses its end.", true);
}

async function sendQuestion() {
  const question = getElement("question").value.trim();
  if (!question || state.request || !validateSettings()) return;
  getElement("question").value = "";
  const { system, temperature, most } = readSettings();
  const model = getElement("model").value;
  const earlierTurns = [...state.turns, { role: "user", content: question }];
  const request = {
    model, messages: buildMessages(system, earlierTurns), temperature: parseNumber(temperature),
    max_completion_tokens: parseNumber(most),
  };
  const emptyAnswer = {
    role: "assistant", content: "", reasoning: "", model, most: parseNumber(most), finish: null, ended: null,
  };
  const controller = new AbortController();
  state.request = controller;
  setTurns([...earlierTurns, emptyAnswer]);
  const updateAnswer = showTurns(state.turns);
  const onAnswer = (answer) => {
    if (state.request !== controller) return;  // the chat was cleared in between
    state.turns = [...earlierTurns, { ...emptyAnswer, ...answer }];
    updateAnswer(state.turns.at(-1));
  };
  showStopButton(true);
  showStatus("The model is answering …");
  try {
    await streamAnswer({ key: state.key, request, signal: controller.signal, onAnswer });
    if (state.request !== controller) return;
    showStatus(state.turns.at(-1)?.content || state.turns.at(-1)?.reasoning ? "" : "The answer is empty.");
  } catch (error) {
    if (state.request !== controller) return;
    const isStopped = controller.signal.aborted;
    showStatus(isStopped ? "Stopped." : error.message, !isStopped);
    if (!isStopped) onAnswer({ ...state.turns.at(-1), ended: `ended by an error: ${error.message}` });  // see `settleTurns`
    if (error.status === 401) showKeyForm(true);
  }
  finishAnswer();
}

// Keeps the answer so far in the chat, once no more of it comes.
function finishAnswer() {
  state.request = null;
  const { turns, question } = settleTurns(state.turns);
  setTurns(turns);
  showTurns(turns);
  getElement("question").value ||= question;
  showStopButton(false);
  getElement("question").focus();
}

// Returns whether all settings are in their ranges. If not, the browser tells the user which one is not.
function validateSettings() {
  if (getElement("settings").checkValidity()) return true;
  getElement("settings-fold").open = true;
  return getElement("settings").reportValidity();
}

// Loads the models with an API key, and saves the key if the server accepts it.
async function openChat(key) {
  try {
    state.models = (await fetchModels(key)).filter(({ scores }) => !scores);  // without reward models
  } catch (error) {
    showStatus(error.status === 401 && !key ? "This server needs an API key. Enter yours." : error.message, Boolean(key));
    if (error.status === 401) showKeyForm(true);
    return;
  }
  if (state.key && key !== state.key) clearChat();  // the chat of one person is not sent with the key of another
  state.key = key;
  save("key", key);
  state.models.sort((a, b) => Number(a.parent === null) - Number(b.parent === null));  // the base last
  showModels(state.models, getElement("model").value || readSaved("model", ""));
  showSelectedModel();
  showKeyForm(false);
  getElement("rekey").hidden = !key;
  showStatus("");
  getElement("question").focus();
}

function showSelectedModel() {
  showIdentity(state.models.find((model) => model.id === getElement("model").value));
}

function restoreChat() {
  const settings = readSaved("settings", {});
  for (const name of SETTINGS) getElement(name).value = settings[name] ?? "";
  showSettings(readSettings());
  const { turns, question } = settleTurns(readSaved("chat", []));
  setTurns(turns);
  showTurns(turns);
  getElement("question").value ||= question;
}

function clearChat() {
  state.request?.abort();
  state.request = null;
  showStopButton(false);
  setTurns([]);
  showTurns([]);
  showStatus("");
}

getElement("model").addEventListener("change", () => { save("model", getElement("model").value); showSelectedModel(); });
getElement("settings").addEventListener("input", () => { save("settings", readSettings()); showSettings(readSettings()); });
getElement("settings").addEventListener("submit", (event) => event.preventDefault());
getElement("clear").addEventListener("click", clearChat);
getElement("rekey").addEventListener("click", () => showKeyForm(getElement("door").hidden));
getElement("stop").addEventListener("click", () => state.request?.abort());
getElement("ask").addEventListener("submit", (event) => { event.preventDefault(); sendQuestion(); });
getElement("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); sendQuestion(); }
});
getElement("door").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = getElement("key").value.trim();
  getElement("key").value = "";
  openChat(key);
});
window.addEventListener("beforeunload", () => state.request?.abort());  // else the browser reports a network error
window.addEventListener("pagehide", () => save("chat", state.turns));
restoreChat();
openChat(state.key);
