import assert from "node:assert/strict";
import test from "node:test";
import { buildMessages, describeSettings, formatFigures, settleTurns } from "../../align/serve/static/conversation.js";

const asks = (content) => ({ role: "user", content });
const says = (content, more = {}) => ({ role: "assistant", content, reasoning: "", model: "one", finish: "stop", ended: null, ...more });

test("the server is asked the system prompt, what was answered in words, and the last question", () => {
  const turns = [asks("a"), says("b"), asks("c"), says("", { reasoning: "hm", finish: "length" }), asks("d")];
  assert.deepEqual(buildMessages("Be brief.", turns), [
    { role: "system", content: "Be brief." }, { role: "user", content: "a" }, { role: "assistant", content: "b" }, { role: "user", content: "d" },
  ]);
  assert.deepEqual(buildMessages(" \n", [asks("d")]), [{ role: "user", content: "d" }]);
});

test("a question that nothing was answered to goes back; a thought is an answer", () => {
  const before = [asks("a"), says("b")];
  assert.deepEqual(settleTurns([...before, asks("c"), says("", { finish: null })]), { turns: before, question: "c" });
  const thought = [asks("c"), says("", { reasoning: "hm" })];
  assert.deepEqual(settleTurns(thought), { turns: thought, question: "" });
  assert.deepEqual(settleTurns([]), { turns: [], question: "" });
});

test("an answer that nobody ended was stopped", () => {
  const [, left] = settleTurns([asks("a"), says("b", { finish: null })]).turns;
  assert.equal(left.ended, "stopped");
  for (const done of [says("b"), says("b", { finish: null, ended: "ended by an error: x" })])
    assert.deepEqual(settleTurns([asks("a"), done]).turns[1], done);
});

test("figures: which weights, how many tokens, how long, and why no more", () => {
  const answer = { adapter: "a".repeat(64), base: "b".repeat(64), usage: { completion_tokens: 24 }, seconds: 1.26, firstSeconds: 0.21 };
  assert.equal(formatFigures({ ...answer, arm: "two" }), "arm two · adapter aaaaaaaaaaaa · 24 tokens · 1.3 s · first after 0.21 s");
  assert.equal(formatFigures({ base: answer.base, usage: { completion_tokens: 1 }, ended: "stopped" }), "base bbbbbbbbbbbb · 1 token · stopped");
  assert.match(formatFigures({ ...answer, finish: "length", most: 24 }), /· cut at 24 tokens$/);
  assert.match(formatFigures({ ...answer, finish: "length", most: 99 }), /· cut: the context is full, or your key has no tokens left$/);
  assert.equal(formatFigures(says("")), "");
});

test("what is set is said where it is folded away", () => {
  assert.equal(describeSettings({ system: " ", temperature: "", most: "" }), "Settings");
  assert.equal(describeSettings({ system: "Be brief.", temperature: "0", most: "50" }), "Settings: system prompt, temperature 0, at most 50 tokens");
});
