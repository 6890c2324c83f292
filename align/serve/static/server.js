// Requests to the server.
import { EMPTY_ANSWER, addEvent, createEventReader } from "./events.js";

const createHeaders = (key) =>
  ({ "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) });

// Returns the models that an API key may use. An error has the `status` of the response.
export async function fetchModels(key) {
  const response = await fetch("/v1/models", { headers: createHeaders(key) });
  if (!response.ok) throw await createError(response);
  return (await response.json()).data;
}

// Requests a chat completion, and passes the answer so far to `onAnswer` whenever it grows.
//
// Args:
//   request: model, messages and further parameters of the request; undefined ones are left out.
//   signal: of an AbortController, which stops the answer.
export async function streamAnswer({ key, request, signal, onAnswer }) {
  const startedAt = performance.now();
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const response = await fetch("/v1/chat/completions", { method: "POST", headers: createHeaders(key), body, signal });
  if (!response.ok) throw await createError(response);
  const [base, adapter, arm] = ["base", "adapter", "arm"].map((name) => response.headers.get(`x-align-${name}`));
  let answer = { ...EMPTY_ANSWER, base, adapter, arm, firstSeconds: 0 };
  const readEvents = createEventReader((event) => {
    answer = { ...addEvent(answer, event), seconds: (performance.now() - startedAt) / 1000 };
    answer.firstSeconds ||= answer.content || answer.reasoning ? answer.seconds : 0;
    onAnswer(answer);
  });
  const text = response.body.pipeThrough(new TextDecoderStream());
  for (const reader = text.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) return;
    readEvents(value);
  }
}

async function createError(response) {
  const content = await response.json().catch(() => ({}));
  const message = content.error?.message ?? `The server answered ${response.status}.`;
  return Object.assign(new Error(message), { status: response.status });
}
