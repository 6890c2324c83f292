// The server, as the page asks it.
import { createReader, nothing, withEvent } from "./events.js";

const headers = (key) => ({ "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) });

// The models that this key may ask for. An error has the `status` of the answer.
export async function modelsFor(key) {
  const answer = await fetch("/v1/models", { headers: headers(key) });
  if (!answer.ok) throw await refusal(answer);
  return (await answer.json()).data;
}

// Asks for an answer, and hands on each state of it while it comes.
//
// Args:
//   asked: model, messages and further parameters of the request; what is undefined is left out.
export async function ask({ key, asked, signal, onAnswer }) {
  const began = performance.now();
  const since = () => (performance.now() - began) / 1000;
  const body = JSON.stringify({ ...asked, stream: true, stream_options: { include_usage: true } });
  const response = await fetch("/v1/chat/completions", { method: "POST", headers: headers(key), body, signal });
  if (!response.ok) throw await refusal(response);
  const [base, adapter, arm] = ["base", "adapter", "arm"].map((name) => response.headers.get(`x-align-${name}`));
  let answer = { ...nothing, base, adapter, arm, firstSeconds: 0 };
  const read = createReader((event) => {
    answer = { ...withEvent(answer, event), seconds: since() };
    answer.firstSeconds ||= answer.content || answer.reasoning ? answer.seconds : 0;
    onAnswer(answer);
  });
  const text = response.body.pipeThrough(new TextDecoderStream());
  for (const reader = text.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) return;
    read(value);
  }
}

async function refusal(answer) {
  const said = await answer.json().catch(() => ({}));
  return Object.assign(new Error(said.error?.message ?? `The server answered ${answer.status}.`), { status: answer.status });
}
