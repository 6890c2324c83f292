import assert from "node:assert/strict";
import test from "node:test";
import { EMPTY_ANSWER, addEvent, createEventReader } from "../../align/serve/static/events.js";

const chunk = (delta, finish_reason = null) => ({ choices: [{ index: 0, delta, finish_reason }], system_fingerprint: "fp" });

test("events are read however the text is cut", () => {
  const said = [chunk({ content: "a\n\nb" }), chunk({ content: "😀" })];
  const text = `${said.map((each) => `data: ${JSON.stringify(each)}\n\n`).join("")}data: [DONE]\n\n`;
  for (let cut = 0; cut <= text.length; cut += 1) {
    const found = [];
    const read = createEventReader((event) => found.push(event));
    read(text.slice(0, cut));
    read(text.slice(cut));
    assert.deepEqual(found, said);
  }
});

test("an answer grows by its chunks", () => {
  const chunks = [
    chunk({ role: "assistant", content: "" }), chunk({ reasoning_content: "hm" }), chunk({ content: "a" }),
    chunk({ content: "b" }), chunk({}, "length"), { choices: [], usage: { completion_tokens: 3 }, system_fingerprint: "fp" },
  ];
  const answer = chunks.reduce(addEvent, EMPTY_ANSWER);
  assert.deepEqual(answer, { content: "ab", reasoning: "hm", finish: "length", usage: { completion_tokens: 3 } });
  assert.deepEqual(EMPTY_ANSWER.content, "");
});

test("an error on the way is one in the server's words", () => {
  assert.throws(() => addEvent(EMPTY_ANSWER, { error: { message: "The server is shutting down." } }), /shutting down/);
});
