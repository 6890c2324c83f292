// A chat as a value: the user's questions and the models' answers, the messages of a request, and an answer's figures.
// This module uses neither page nor server.
//
// A question is { role: "user", content }. An answer is { role: "assistant", content, reasoning, model, base, adapter,
// arm, finish, usage, most, seconds, firstSeconds, ended }; `ended` is why it ended early, or null.

// Returns the messages of a request: the system prompt, the earlier questions and answers, and the last question. A
// question without a text as its answer is left out.
export function buildMessages(system, turns) {
  const isSent = (turn, next) => (turn.role === "assistant" ? turn.content : !next || next.content);
  const messages = turns.filter((turn, i) => isSent(turn, turns[i + 1])).map(({ role, content }) => ({ role, content }));
  return system.trim() ? [{ role: "system", content: system }, ...messages] : messages;
}

// Returns the turns once no more of an answer comes. A question without any answer is removed from them, and returned as
// `question` to be edited and sent again.
export function settleTurns(turns) {
  const last = turns.at(-1);
  if (last?.role !== "assistant") return { turns, question: "" };
  if (!last.content && !last.reasoning) return { turns: turns.slice(0, -2), question: turns.at(-2).content };
  const ended = last.finish || last.ended ? last.ended : "stopped";
  return { turns: [...turns.slice(0, -1), { ...last, ended }], question: "" };
}

// Formats an answer's figures as one line: its weights, tokens, seconds, and why it was cut or ended early.
export function formatFigures({ arm, adapter, base, usage, seconds, firstSeconds, finish, most, ended }) {
  const tokens = usage?.completion_tokens;
  const cutReason = most && tokens === most
    ? `cut at ${most} tokens` : "cut: the context is full, or your key has no tokens left";
  return [
    arm && `arm ${arm}`,
    adapter ? `adapter ${adapter.slice(0, 12)}` : base && `base ${base.slice(0, 12)}`,
    tokens && `${tokens} token${tokens === 1 ? "" : "s"}`,
    seconds && `${seconds.toFixed(1)} s`,
    firstSeconds && `first after ${firstSeconds.toFixed(2)} s`,
    finish === "length" && cutReason,
    ended,
  ].filter(Boolean).join(" · ");
}

// Describes the settings in one line, which stays visible when they are folded away.
export function describeSettings({ system, temperature, most }) {
  const changed = [system.trim() && "system prompt", temperature && `temperature ${temperature}`, most && `at most ${most} tokens`];
  return ["Settings", changed.filter(Boolean).join(", ")].filter(Boolean).join(": ");
}
