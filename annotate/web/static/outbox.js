// Votes and drafts that the server has not acknowledged yet: kept in the browser's storage, and sent until it has.

import { RETRY_MS, isLost, pause } from "./server.js";

const MAX_REFUSED = 20;
const DRAFT_MS = 400;

// Stores values under names with a prefix, in the two storages of `browser` (a window). If the browser forbids storage
// or has no room, values are kept in memory while the page is open.
function createStorage(browser, prefix) {
  const fallback = new Map();
  function tryStorage(storage, use) {
    try { return use(browser[storage]); } catch { return undefined; }  // even reading `browser[storage]` may throw
  }
  return {
    read(storage, name, fallbackValue) {
      const path = prefix + name;
      const text = fallback.get(path) ?? tryStorage(storage, (area) => area.getItem(path)) ?? null;
      return text === null ? fallbackValue : JSON.parse(text);
    },
    // Returns whether the browser stored it.
    write(storage, name, value) {
      const path = prefix + name;
      const text = JSON.stringify(value);
      const isStored = tryStorage(storage, (area) => { area.setItem(path, text); return area.getItem(path) === text; });
      if (isStored) fallback.delete(path); else fallback.set(path, text);
      return Boolean(isStored);
    },
    drop(storage, name) {
      fallback.delete(prefix + name);
      tryStorage(storage, (area) => area.removeItem(prefix + name));
    },
  };
}

// Creates the outbox of a person in a project of a store, identified by `id`, so that votes are never sent for another
// person or project. Tabs share it, except for the numbers of the votes that each tab can undo.
export function createOutbox(browser, id) {
  const { read, write, drop } = createStorage(browser, `align-outbox/${id}`);
  const waiting = () => read("localStorage", "", []);
  const refused = () => read("localStorage", "/refused", []);
  return {
    waiting,
    add: (vote) => write("localStorage", "", [...waiting(), vote]),
    remove: (key) => write("localStorage", "", waiting().filter((vote) => vote.key !== key)),
    refused,
    refuse: (vote, at) => write("localStorage", "/refused", [...refused(), { ...vote, at }].slice(-MAX_REFUSED)),
    forgetRefused: () => drop("localStorage", "/refused"),
    draft: () => read("localStorage", "/draft", null),
    keepDraft: (draft) => write("localStorage", "/draft", draft),
    dropDraft: () => drop("localStorage", "/draft"),
    votes: (defaultVotes) => read("sessionStorage", "/votes", defaultVotes),
    keepVotes: (votes) => write("sessionStorage", "/votes", votes),
  };
}

// Sends the waiting votes, oldest first, until the server has all of them. Returns the last response, which includes
// the next item; null if nothing was waiting, or the last vote was refused.
export async function deliver(outbox, ask, { onSending, onAccepted, onRefused, onLost }) {
  let response = null;
  for (let vote; (vote = outbox.waiting()[0]); ) {
    onSending();
    try {
      response = await ask("vote", vote);
      if (!Number.isInteger(response.seq)) throw new Error("that was not the server's answer");
      onAccepted(response.seq);
    } catch (error) {
      if (isLost(error)) {
        onLost(error);
        await pause();
        continue;
      }
      response = null;
      outbox.refuse(vote, new Date().toISOString());
      onRefused(error);
    }
    outbox.remove(vote.key);  // by key, because another tab may have added or sent others in between
  }
  return response;
}

// Sends drafts one after the other, the newest last. After a lost connection, the draft is sent again.
export function createDraftSaver(outbox, ask, { onSaved, onLost }) {
  let timer = 0;
  let sending = Promise.resolve();
  const cancel = () => clearTimeout(timer);
  function later() {
    cancel();
    timer = setTimeout(save, DRAFT_MS);
  }
  function save() {
    const draft = outbox.draft();
    cancel();
    if (draft) sending = sending.then(() => ask("draft", draft)).then(
      (lease) => onSaved(draft.token, lease),
      (error) => { if (isLost(error)) { onLost(error); timer = setTimeout(save, RETRY_MS); } });
    return sending;
  }
  return { save, later, cancel };
}
