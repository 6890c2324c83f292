// Parsing of server-sent events, as a chat completion streams them.

// Creates a function that takes the text of a stream piece by piece, cut anywhere.
//
// Args:
//   onEvent: called with the parsed JSON of each event, except the final `[DONE]`.
export function createEventReader(onEvent) {
  let incomplete = "";
  return (text) => {
    incomplete += text;
    const events = incomplete.split("\n\n");
    incomplete = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data && data !== "[DONE]") onEvent(JSON.parse(data));
    }
  };
}

// Returns an answer with the tokens, finish reason and usage of one more event. Throws the server's error if the event
// is one.
export function addEvent(answer, event) {
  if (event.error) throw new Error(event.error.message);
  const extended = { ...answer, usage: event.usage ?? answer.usage };
  const choice = event.choices[0];
  if (!choice) return extended;
  extended.content += choice.delta.content ?? "";
  extended.reasoning += choice.delta.reasoning_content ?? "";
  extended.finish = choice.finish_reason ?? extended.finish;
  return extended;
}

export const EMPTY_ANSWER = { content: "", reasoning: "", finish: null, usage: null };
