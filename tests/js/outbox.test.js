// What waits in the browser: in storages that throw, are full or forbidden, in two tabs; and how it is sent.
import assert from "node:assert/strict";
import test from "node:test";
import { createDraftSaver, createOutbox, deliverVotes } from "../../annotate/web/static/outbox.js";

// A storage as browsers have it, with room for so many characters.
class FakeStorage {
  constructor(room = Infinity) { this.room = room; this.values = new Map(); }
  getItem(name) { return this.values.get(name) ?? null; }
  setItem(name, value) {
    const others = [...this.values].filter(([other]) => other !== name).flat().join("").length;
    if (others + name.length + value.length > this.room) throw new Error("QuotaExceededError");
    this.values.set(name, value);
  }
  removeItem(name) { this.values.delete(name); }
}
const broken = (method) => Object.assign(new FakeStorage(), { [method]() { throw new Error("no"); } });
const browserOf = (localStorage = new FakeStorage(), sessionStorage = new FakeStorage()) =>
  ({ localStorage, sessionStorage });
const FORBIDDEN = {
  get localStorage() { throw new Error("SecurityError"); }, get sessionStorage() { throw new Error("SecurityError"); },
};
const letter = (key) => ({ token: "t", key, terms: null, said: { tiers: [[0], [1]] } });
const keys = (letters) => letters.map(({ key }) => key);

const BROWSERS = {
  whole: () => browserOf(), forbidden: () => FORBIDDEN, full: () => browserOf(new FakeStorage(0), new FakeStorage(0)),
  "without getItem": () => browserOf(broken("getItem"), broken("getItem")),
  "without setItem": () => browserOf(broken("setItem"), broken("setItem")),
  "without removeItem": () => browserOf(broken("removeItem"), broken("removeItem")),
  "that forgets": () => browserOf(Object.assign(new FakeStorage(), { setItem() {} })),
};
for (const [name, browser] of Object.entries(BROWSERS))
  test(`as long as the page is open nothing is lost, in a browser ${name}`, () => {
    const outbox = createOutbox(browser(), "id");
    const contents = [outbox.readWaiting(), outbox.readRefused(), outbox.readDraft(), outbox.readVotes([7])];
    assert.deepEqual(contents, [[], [], null, [7]]);
    outbox.addVote(letter("a"));
    outbox.addVote(letter("b"));
    outbox.addRefused(letter("c"), "noon");
    outbox.saveVotes([7, 8]);
    assert.equal(outbox.saveDraft({ token: "t", draft: {} }), ["whole", "without removeItem"].includes(name));
    outbox.removeVote("a");
    assert.deepEqual(outbox.readWaiting(), [letter("b")]);
    assert.deepEqual(outbox.readRefused(), [{ ...letter("c"), at: "noon" }]);
    assert.deepEqual([outbox.readDraft(), outbox.readVotes([])], [{ token: "t", draft: {} }, [7, 8]]);
    if (name === "without removeItem") return;
    outbox.removeDraft();
    outbox.removeRefused();
    assert.deepEqual([outbox.readDraft(), outbox.readRefused(), keys(outbox.readWaiting())], [null, [], ["b"]]);
  });

test("names in the storage are those that pages of before and after know", () => {
  const browser = browserOf(), outbox = createOutbox(browser, "id");
  outbox.addVote(letter("a"));
  outbox.addRefused(letter("b"), "noon");
  outbox.saveDraft({ token: "t" });
  outbox.saveVotes([1]);
  assert.deepEqual(Object.fromEntries(browser.localStorage.values), {
    "align-outbox/id": JSON.stringify([letter("a")]), "align-outbox/id/draft": '{"token":"t"}',
    "align-outbox/id/refused": JSON.stringify([{ ...letter("b"), at: "noon" }]),
  });
  assert.deepEqual([...browser.sessionStorage.values], [["align-outbox/id/votes", "[1]"]]);
});

test("another person's or project's outbox is neither seen nor sent", () => {
  const browser = browserOf(), mine = createOutbox(browser, "mine"), theirs = createOutbox(browser, "theirs");
  theirs.addVote(letter("a"));
  theirs.saveDraft({ token: "t" });
  assert.deepEqual([mine.readWaiting(), mine.readDraft()], [[], null]);
  mine.removeVote("a");
  mine.removeDraft();
  assert.deepEqual([keys(theirs.readWaiting()), theirs.readDraft()], [["a"], { token: "t" }]);
});

test("a storage that fills up holds what it held, and the page the rest, until there is room again", () => {
  const storage = new FakeStorage(250), outbox = createOutbox(browserOf(storage), "id");
  for (const key of ["a", "b", "c", "d"]) outbox.addVote(letter(key));
  const held = keys(JSON.parse(storage.getItem("align-outbox/id")));
  assert.ok(held.length > 0 && held.length < 4);
  assert.deepEqual(keys(outbox.readWaiting()), ["a", "b", "c", "d"]);
  storage.room = 1000;
  outbox.removeVote("a");
  assert.deepEqual(keys(JSON.parse(storage.getItem("align-outbox/id"))), ["b", "c", "d"]);
  const reopened = createOutbox(browserOf(storage), "id");
  assert.deepEqual(keys(reopened.readWaiting()), ["b", "c", "d"]);
});

test("of votes that were refused the last twenty are kept", () => {
  const outbox = createOutbox(browserOf(), "id");
  for (let n = 0; n < 25; n += 1) outbox.addRefused(letter(n), String(n));
  assert.deepEqual(keys(outbox.readRefused()), Array.from({ length: 20 }, (_, i) => i + 5));
});

test("two tabs share what waits, and not the votes that each can take back", () => {
  const shared = new FakeStorage();
  const [one, two] = [createOutbox(browserOf(shared), "id"), createOutbox(browserOf(shared), "id")];
  one.addVote(letter("a"));
  two.addVote(letter("b"));
  one.addVote(letter("c"));
  assert.deepEqual(keys(two.readWaiting()), ["a", "b", "c"]);
  two.removeVote("a");
  one.removeVote("a");  // the other was faster
  assert.deepEqual(keys(one.readWaiting()), ["b", "c"]);
  one.saveVotes([1]);
  assert.deepEqual([one.readVotes([]), two.readVotes([])], [[1], []]);
});

// Delivery

const lost = () => new TypeError("Failed to fetch");
const refusal = (status) => Object.assign(new Error("no"), { status, refused: true });
const settled = () => new Promise((resolve) => { setImmediate(resolve); });

// Delivers to a server that answers each vote by the next of `answers`, or throws it; notes what happened.
function delivering(outbox, ...answers) {
  const events = [];
  const ask = async (path, body) => {
    events.push([path, body.key]);
    const answer = answers.shift();
    const found = typeof answer === "function" ? answer() : answer;
    if (found instanceof Error) throw found;
    return found;
  };
  const done = deliverVotes(outbox, ask, {
    onSending: () => events.push(["sending"]), onAccepted: (seq) => events.push(["accepted", seq]),
    onRefused: (error) => events.push(["refused", error.status]), onLost: () => events.push(["lost"]),
  });
  return { events, done };
}

test("what waits is sent oldest first, and the last answer is the next item's", async () => {
  const outbox = createOutbox(browserOf(), "id");
  for (const key of ["a", "b"]) outbox.addVote(letter(key));
  const { events, done } = delivering(outbox, { seq: 1 }, { seq: 2, task: "next" });
  assert.deepEqual(await done, { seq: 2, task: "next" });
  assert.deepEqual(events, [["sending"], ["vote", "a"], ["accepted", 1], ["sending"], ["vote", "b"], ["accepted", 2]]);
  assert.deepEqual(outbox.readWaiting(), []);
  assert.equal(await delivering(outbox).done, null);
});

test("what is lost is sent again, the same letter, until the server answers", async (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const outbox = createOutbox(browserOf(), "id");
  outbox.addVote(letter("a"));
  // No connection; an answer of something else at the port; the server that cannot write; nobody logged in.
  const { events, done } = delivering(outbox, lost(), { hello: 1 }, refusal(503), refusal(401), { seq: 4 });
  for (let tries = 1; tries <= 4; tries += 1) {
    await settled();
    assert.equal(events.filter(([what]) => what === "lost").length, tries);
    assert.deepEqual(keys(outbox.readWaiting()), ["a"]);
    t.mock.timers.tick(1499);
    await settled();
    assert.equal(events.filter(([what]) => what === "vote").length, tries);
    t.mock.timers.tick(1);
  }
  assert.equal((await done).seq, 4);
  assert.ok(events.filter(([what]) => what === "vote").every(([, key]) => key === "a"));
  assert.deepEqual([outbox.readWaiting(), outbox.readRefused()], [[], []]);
});

test("what is refused is laid by with its time, and what waits behind it is sent", async () => {
  const outbox = createOutbox(browserOf(), "id");
  for (const key of ["a", "b", "c"]) outbox.addVote(letter(key));
  const { events, done } = delivering(outbox, { seq: 1 }, refusal(409), refusal(422));
  assert.equal(await done, null);  // the last answer brought no item
  assert.deepEqual(events.filter(([what]) => what === "refused"), [["refused", 409], ["refused", 422]]);
  assert.deepEqual([keys(outbox.readRefused()), outbox.readWaiting()], [["b", "c"], []]);
  assert.ok(outbox.readRefused().every(({ at }) => !Number.isNaN(Date.parse(at))));
});

test("a letter is dropped by its key, whatever another tab did while it was under way", async () => {
  const shared = new FakeStorage();
  const [one, two] = [createOutbox(browserOf(shared), "id"), createOutbox(browserOf(shared), "id")];
  one.addVote(letter("a"));
  const meanwhile = () => { two.removeVote("a"); two.addVote(letter("b")); two.addVote(letter("c")); return { seq: 1 }; };
  const { events, done } = delivering(one, meanwhile, { seq: 2 }, { seq: 3 });
  await done;
  assert.deepEqual(events.filter(([what]) => what === "vote"), [["vote", "a"], ["vote", "b"], ["vote", "c"]]);
  assert.deepEqual(two.readWaiting(), []);
});

// Drafts

function saving(t, outbox, answer = async () => ({ kept: true, judged: false })) {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const events = [];
  const ask = (path, draft) => { events.push([path, draft.draft]); return answer(draft); };
  const saver = createDraftSaver(outbox, ask, {
    onSaved: (token, { kept }) => events.push(["saved", token, kept]), onLost: () => events.push(["lost"]),
  });
  const typed = (text) => { outbox.saveDraft({ token: "t", draft: text }); saver.saveLater(); };
  return { events, saver, typed, tick: async (ms) => { t.mock.timers.tick(ms); await settled(); } };
}

test("a draft is saved when the hands rest, once and as it is then", async (t) => {
  const { events, typed, tick } = saving(t, createOutbox(browserOf(), "id"));
  for (const text of ["b", "be", "because"]) { typed(text); await tick(399); }
  assert.deepEqual(events, []);
  await tick(1);
  assert.deepEqual(events, [["draft", "because"], ["saved", "t", true]]);
});

test("drafts arrive in the order in which they were written, one at a time", async (t) => {
  const under = [];
  const { events, typed, tick } = saving(t, createOutbox(browserOf(), "id"),
    () => new Promise((resolve) => { under.push(resolve); }));
  typed("one");
  await tick(400);
  typed("two");
  await tick(400);
  assert.deepEqual(events, [["draft", "one"]]);
  under.shift()({ kept: true });
  await settled();
  assert.deepEqual(events, [["draft", "one"], ["saved", "t", true], ["draft", "two"]]);
});

test("a draft that a lost connection kept back is sent again, one that was refused is not", async (t) => {
  const errors = [lost(), refusal(503), refusal(422)];
  const { events, typed, tick } = saving(t, createOutbox(browserOf(), "id"), async () => { throw errors.shift(); });
  typed("words");
  await tick(400);
  await tick(1499);
  assert.deepEqual(events, [["draft", "words"], ["lost"]]);
  await tick(1);
  await tick(1500);
  await tick(10000);
  assert.deepEqual(events, [["draft", "words"], ["lost"], ["draft", "words"], ["lost"], ["draft", "words"]]);
});

test("a draft of what was sent meanwhile is not saved, and without one there is nothing to wait for", async (t) => {
  const outbox = createOutbox(browserOf(), "id"), { events, saver, typed, tick } = saving(t, outbox);
  typed("words");
  saver.cancel();
  await tick(400);
  typed("more");
  outbox.removeDraft();
  await tick(400);
  await saver.save();
  assert.deepEqual(events, []);
});
