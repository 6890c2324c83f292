// The server, as the page asks it: JSON, with a deadline; and which errors are its own no, which a lost connection.

// When the annotator is told that the server keeps them waiting, and when a request is given up, to be sent again:
// later than the server itself gives up waiting for a locked database (30 s), whose answer says more.
const SLOW_MS = 5000, DEADLINE_MS = 40000;
export const RETRY_MS = 1500;

export const pause = () => new Promise((resolve) => setTimeout(resolve, RETRY_MS));

// Args:
//   projectId: of whom the page is; a function, for it is not known from the start.
//   onSlow, onRecovered: called when an answer takes long, and when it has come after all.
export function createServer({ projectId, onSlow, onRecovered }) {
  async function ask(path, body) {
    const headers = { "X-Align": projectId() };
    const options = body === undefined ? { headers } : {
      method: "POST", body: JSON.stringify(body), headers: { ...headers, "Content-Type": "application/json" },
    };
    const over = new AbortController();
    let slow = false;
    const timers = [
      setTimeout(() => { slow = true; onSlow(); }, SLOW_MS),
      setTimeout(() => over.abort(), DEADLINE_MS),
    ];
    try {
      const answer = await fetch(`/api/${path}`, { ...options, signal: over.signal });
      const found = await answer.json();
      if (!answer.ok) throw refusal(answer.status, found);
      if (slow) onRecovered();
      return found;
    } finally { timers.forEach(clearTimeout); }
  }
  // Without an answer there is no page: asked for until it is there.
  async function askPatiently(path) {
    for (;;) {
      try { return await ask(path); } catch { await pause(); }
    }
  }
  return { ask, askPatiently };
}

function refusal(status, { problem, remedy, field }) {
  const error = new Error([problem, remedy].filter(Boolean).join(". "));
  return Object.assign(error, { status, refused: field !== undefined });
}

// Whatever is not this project's server saying no to these very words: a restart, a proxy, another program at the port.
// What was said is kept, and sent again.
export const isLost = (error) => !(error.refused && (error.status === 409 || error.status === 422));

// The word for a lost connection, and what it names.
export function troubleOf(error) {
  if ([401, 403].includes(error.status)) return ["locked_out", {}];
  return error.refused ? ["not_kept", { problem: error.message }] : ["connection", {}];
}
