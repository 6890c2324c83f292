// JSON requests to the server, with a deadline, and the distinction of refusals from lost connections.

// Time after which the annotator is told that the server is slow.
const SLOW_MS = 5000;
// Time after which a request is abandoned and sent again. It is longer than the server waits for a locked database
// (30 s), because the server's error says more.
const DEADLINE_MS = 40000;
export const RETRY_MS = 1500;

export const waitForRetry = () => new Promise((resolve) => setTimeout(resolve, RETRY_MS));

// Args:
//   projectId: returns the page's id of person and project, which is not known at the start.
//   onSlow, onRecovered: called when a response takes long, and when it has arrived after all.
export function createServer({ projectId, onSlow, onRecovered }) {
  async function request(path, body) {
    const headers = { "X-Align": projectId() };
    const options = body === undefined ? { headers } : {
      method: "POST", body: JSON.stringify(body), headers: { ...headers, "Content-Type": "application/json" },
    };
    const deadline = new AbortController();
    let isSlow = false;
    const timers = [
      setTimeout(() => { isSlow = true; onSlow(); }, SLOW_MS),
      setTimeout(() => deadline.abort(), DEADLINE_MS),
    ];
    try {
      const response = await fetch(`/api/${path}`, { ...options, signal: deadline.signal });
      const content = await response.json();
      if (!response.ok) throw createRefusal(response.status, content);
      if (isSlow) onRecovered();
      return content;
    } finally { timers.forEach(clearTimeout); }
  }
  // Repeats a request that the page needs to start until it succeeds.
  async function requestUntilSuccess(path) {
    for (;;) {
      try { return await request(path); } catch { await waitForRetry(); }
    }
  }
  return { request, requestUntilSuccess };
}

function createRefusal(status, { problem, remedy, field }) {
  const error = new Error([problem, remedy].filter(Boolean).join(". "));
  return Object.assign(error, { status, refused: field !== undefined });
}

// Returns whether a request should be sent again. True for every error (a restart, a proxy, another program at the port)
// except this server's refusal of the content.
export const isConnectionLost = (error) => !(error.refused && (error.status === 409 || error.status === 422));

// Returns the name of the text that describes a lost connection, and its values.
export function describeTrouble(error) {
  if ([401, 403].includes(error.status)) return ["locked_out", {}];
  return error.refused ? ["not_kept", { problem: error.message }] : ["connection", {}];
}
