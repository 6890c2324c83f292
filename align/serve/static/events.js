// Server-sent events out of a stream of text, however it is cut on its way.

// Args:
//   onData: is given what each event says, without the `[DONE]` at the end.
export function createReader(onData) {
  let held = "";
  return (text) => {
    held += text;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data && data !== "[DONE]") onData(JSON.parse(data));
    }
  };
}

// What an event adds to an answer: a new answer, or an error in the server's words.
export function withEvent(answer, event) {
  if (event.error) throw new Error(event.error.message);
  const added = { ...answer, usage: event.usage ?? answer.usage };
  const choice = event.choices[0];
  if (!choice) return added;
  added.content += choice.delta.content ?? "";
  added.reasoning += choice.delta.reasoning_content ?? "";
  added.finish = choice.finish_reason ?? added.finish;
  return added;
}

export const nothing = { content: "", reasoning: "", finish: null, usage: null };
