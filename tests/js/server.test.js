// How the server is asked, and how its answers and the lack of them are told apart.
import assert from "node:assert/strict";
import test from "node:test";
import { createServer, describeTrouble, isConnectionLost } from "../../annotate/web/static/server.js";

const settled = () => new Promise((resolve) => { setImmediate(resolve); });

// A server that answers by `answer(url, options)`, and what was asked of it.
function serverOf(t, answer) {
  const asked = [], events = [];
  t.mock.method(globalThis, "fetch", (url, options) => { asked.push([url, options]); return answer(url, options); });
  const server = createServer({
    projectId: () => "mine", onSlow: () => events.push("slow"), onRecovered: () => events.push("recovered"),
  });
  return { ...server, asked, events };
}
const json = (found, status = 200) => async () => new Response(JSON.stringify(found), { status });
// Answers when told to, or never: until the request is given up.
function waiting() {
  const pending = {};
  const answer = (_, { signal }) => new Promise((resolve, reject) => {
    pending.resolve = () => resolve(new Response("{}"));
    signal.addEventListener("abort", () => reject(signal.reason));
  });
  return [answer, pending];
}

test("every request names the project, and what is sent is JSON", async (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const { request, asked, events } = serverOf(t, json({ seq: 1 }));
  assert.deepEqual(await request("task"), { seq: 1 });
  await request("vote", { key: "é" });
  const [[first, get], [second, post]] = asked;
  assert.deepEqual([first, second], ["/api/task", "/api/vote"]);
  assert.deepEqual([get.method, get.headers], [undefined, { "X-Align": "mine" }]);
  assert.deepEqual([post.method, JSON.parse(post.body)], ["POST", { key: "é" }]);
  assert.deepEqual(post.headers, { "X-Align": "mine", "Content-Type": "application/json" });
  t.mock.timers.tick(100000);
  assert.deepEqual(events, []);  // nobody waits any more
});

test("only this server's own no to these very words is no loss", async (t) => {
  const ours = { field: "said", problem: "it is wrong", remedy: "Change it." };
  const words = "it is wrong. Change it.";
  const cases = [
    [json(ours, 422), false, words, "not_kept"], [json(ours, 409), false, words, "not_kept"],
    [json(ours, 503), true, words, "not_kept"], [json(ours, 403), true, words, "locked_out"],
    [json({ ...ours, remedy: undefined }, 503), true, "it is wrong", "not_kept"],
    [json({ problem: "Log in." }, 401), true, "Log in.", "locked_out"],
    [json({ problem: "elsewhere" }, 422), true, "elsewhere", "connection"],  // it names no field: not our server
    [json({}, 404), true, "", "connection"], [async () => new Response("<h1>hello</h1>"), true, /JSON/, "connection"],
    [async () => new Response("<h1>no</h1>", { status: 422 }), true, /JSON/, "connection"],
    [async () => { throw new TypeError("Failed to fetch"); }, true, "Failed to fetch", "connection"],
  ];
  for (const [answer, expected, message, word] of cases) {
    const { request } = serverOf(t, answer);
    const error = await request("vote", {}).then(() => assert.fail("it was taken"), (found) => found);
    if (message instanceof RegExp) assert.match(error.message, message); else assert.equal(error.message, message);
    assert.equal(isConnectionLost(error), expected);
    assert.deepEqual(describeTrouble(error), [word, word === "not_kept" ? { problem: error.message } : {}]);
    t.mock.restoreAll();
  }
});

test("who waits for five seconds is told, and told when it is over", async (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const [answer, pending] = waiting(), { request, events } = serverOf(t, answer), found = request("task");
  t.mock.timers.tick(4999);
  assert.deepEqual(events, []);
  t.mock.timers.tick(1);
  assert.deepEqual(events, ["slow"]);
  pending.resolve();
  assert.deepEqual(await found, {});
  assert.deepEqual(events, ["slow", "recovered"]);
  t.mock.timers.tick(100000);
  assert.deepEqual(events, ["slow", "recovered"]);
});

test("a request is given up after forty seconds, and counts as lost", async (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const { request } = serverOf(t, waiting()[0]);
  let error;
  const over = request("vote", {}).catch((found) => { error = found; });
  t.mock.timers.tick(39999);
  await settled();
  assert.equal(error, undefined);
  t.mock.timers.tick(1);
  await over;
  assert.equal(isConnectionLost(error), true);
});

test("what the page cannot be without is asked for until it is there", async (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const answers = [async () => { throw new TypeError("Failed to fetch"); }, json({}, 503), json({ there: true })];
  const { requestUntilSuccess, asked } = serverOf(t, () => answers.shift()());
  const found = requestUntilSuccess("projects");
  for (let tries = 1; tries <= 2; tries += 1) {
    await settled();
    assert.equal(asked.length, tries);
    t.mock.timers.tick(1500);
  }
  assert.deepEqual(await found, { there: true });
});
