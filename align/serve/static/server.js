// The server, as the page asks it: with the key that somebody typed, which this tab alone keeps.
import { createReader, nothing, withEvent } from "./events.js";

const KEY = "align-key";

export function keptKey() {
  try { return sessionStorage.getItem(KEY) ?? ""; } catch { return ""; }
}
export function keepKey(key) {
  try { sessionStorage.setItem(KEY, key); } catch { /* then it is asked for again after a reload */ }
}

const headers = (key) => ({ "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) });

// The models that this key may ask for. An error has the `status` of the answer.
export async function modelsFor(key) {
  const answer = await fetch("/v1/models", { headers: headers(key) });
  if (!answer.ok) throw await refusal(answer);
  return (await answer.json()).data;
}

// Asks for an answer, and hands on each state of it while it comes.
export async function ask({ key, model, messages, signal, onAnswer }) {
  const body = JSON.stringify({ model, messages, stream: true, stream_options: { include_usage: true } });
  const response = await fetch("/v1/chat/completions", { method: "POST", headers: headers(key), body, signal });
  if (!response.ok) throw await refusal(response);
  const identity = { adapter: response.headers.get("x-align-adapter"), arm: response.headers.get("x-align-arm") };
  let answer = { ...nothing, ...identity };
  const read = createReader((event) => { answer = withEvent(answer, event); onAnswer(answer); });
  const text = response.body.pipeThrough(new TextDecoderStream());
  for (const reader = text.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) return answer;
    read(value);
  }
}

async function refusal(answer) {
  const said = await answer.json().catch(() => ({}));
  return Object.assign(new Error(said.error?.message ?? `The server answered ${answer.status}.`), { status: answer.status });
}
