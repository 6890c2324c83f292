// A chat as a value: turns of a question and its answer. What the server is asked, what becomes of an answer that ends,
// and what its figures are. Pure.
//
// A question is { role: "user", content }. An answer is { role: "assistant", content, reasoning, model, base, adapter,
// arm, finish, usage, most, seconds, firstSeconds, ended }; `ended` says how it ended before its time, or is null.

// The messages of a request: the system prompt, what was asked and answered, and the last question. A question without
// an answer in words is left out.
export function messagesOf(system, turns) {
  const counts = (turn, next) => (turn.role === "assistant" ? turn.content : !next || next.content);
  const said = turns.filter((turn, i) => counts(turn, turns[i + 1])).map(({ role, content }) => ({ role, content }));
  return system.trim() ? [{ role: "system", content: system }, ...said] : said;
}

// The turns once nothing more comes, and the question that goes back to where it was typed: one that nothing was
// answered to.
export function settled(turns) {
  const last = turns.at(-1);
  if (last?.role !== "assistant") return { turns, question: "" };
  if (!last.content && !last.reasoning) return { turns: turns.slice(0, -2), question: turns.at(-2).content };
  const ended = last.finish || last.ended ? last.ended : "stopped";
  return { turns: [...turns.slice(0, -1), { ...last, ended }], question: "" };
}

// An answer's figures, in a line.
export function figures({ arm, adapter, base, usage, seconds, firstSeconds, finish, most, ended }) {
  const tokens = usage?.completion_tokens;
  const full = most && tokens === most ? `cut at ${most} tokens` : "cut: the context is full, or your key has no tokens left";
  return [
    arm && `arm ${arm}`,
    adapter ? `adapter ${adapter.slice(0, 12)}` : base && `base ${base.slice(0, 12)}`,
    tokens && `${tokens} token${tokens === 1 ? "" : "s"}`,
    seconds && `${seconds.toFixed(1)} s`,
    firstSeconds && `first after ${firstSeconds.toFixed(2)} s`,
    finish === "length" && full,
    ended,
  ].filter(Boolean).join(" · ");
}

// What is set, in a line: it may be folded away.
export function settingsInWords({ system, temperature, most }) {
  const set = [system.trim() && "system prompt", temperature && `temperature ${temperature}`, most && `at most ${most} tokens`];
  return ["Settings", set.filter(Boolean).join(", ")].filter(Boolean).join(": ");
}
