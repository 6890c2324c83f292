// Votes and drafts that the server has not acknowledged yet: kept in the browser's storage, and sent until it has.

import { RETRY_MS, isConnectionLost, waitForRetry } from "./server.js";

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
    remove(storage, name) {
      fallback.delete(prefix + name);
      tryStorage(storage, (area) => area.removeItem(prefix + name));
    },
  };
}

// Creates the outbox of a person in a project of a store, identified by `id`, so that votes are never sent for another
// person or project. Tabs share it, except for the numbers of the votes that each tab can undo.
export function createOutbox(browser, id) {
  const { read, write, remove } = createStorage(browser, `align-outbox/${id}`);
  const readWaiting = () => read("localStorage", "", []);
  const readRefused = () => read("localStorage", "/refused", []);
  return {
    readWaiting,
    addVote: (vote) => write("localStorage", "", [...readWaiting(), vote]),
    removeVote: (key) => write("localStorage", "", readWaiting().filter((vote) => vote.key !== key)),
    readRefused,
    addRefused: (vote, at) => write("localStorage", "/refused", [...readRefused(), { ...vote, at }].slice(-MAX_REFUSED)),
    removeRefused: () => remove("localStorage", "/refused"),
    readDraft: () => read("localStorage", "/draft", null),
    saveDraft: (draft) => write("localStorage", "/draft", draft),
    removeDraft: () => remove("localStorage", "/draft"),
    readVotes: (defaultVotes) => read("sessionStorage", "/votes", defaultVotes),
    saveVotes: (votes) => write("sessionStorage", "/votes", votes),
  };
}

// Sends the waiting votes, oldest first, until the server has all of them. Returns the last response, which includes
// the next item; null if nothing was waiting, or the last vote was refused.
export async function deliverVotes(outbox, request, { onSending, onAccepted, onRefused, onLost }) {
  let response = null;
  for (let vote; (vote = outbox.readWaiting()[0]); ) {
    onSending();
    try {
      response = await request("vote", vote);
      if (!Number.isInteger(response.seq)) throw new Error("that was not the server's answer");
      onAccepted(response.seq);
    } catch (error) {
      if (isConnectionLost(error)) {
        onLost(error);
        await waitForRetry();
        continue;
      }
      response = null;
      outbox.addRefused(vote, new Date().toISOString());
      onRefused(error);
    }
    outbox.removeVote(vote.key);  // by key, because another tab may have added or sent others in between
  }
  return response;
}

// Sends drafts one after the other, the newest last. After a lost connection, the draft is sent again.
export function createDraftSaver(outbox, request, { onSaved, onLost }) {
  let timer = 0;
  let sending = Promise.resolve();
  const cancel = () => clearTimeout(timer);
  function saveLater() {
    cancel();
    timer = setTimeout(save, DRAFT_MS);
  }
  function save() {
    const draft = outbox.readDraft();
    cancel();
    if (draft) sending = sending.then(() => request("draft", draft)).then(
      (lease) => onSaved(draft.token, lease),
      (error) => { if (isConnectionLost(error)) { onLost(error); timer = setTimeout(save, RETRY_MS); } });
    return sending;
  }
  return { save, saveLater, cancel };
}
