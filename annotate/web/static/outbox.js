// What was said and not yet acknowledged: kept in the browser's storage, and sent until it is.

import { RETRY_MS, isLost, pause } from "./server.js";

const MOST_REFUSED = 20, DRAFT_MS = 400;

// Values under names that begin with `prefix`, in the two storages of `browser` (a window). A browser may keep nothing,
// or have no room: then this page does, as long as it is open.
function createShelf(browser, prefix) {
  const spare = new Map();
  function attempt(storage, act) {
    try { return act(browser[storage]); } catch { return undefined; }  // even to name a storage may be forbidden
  }
  return {
    read(storage, name, otherwise) {
      const at = prefix + name;
      const text = spare.get(at) ?? attempt(storage, (there) => there.getItem(at)) ?? null;
      return text === null ? otherwise : JSON.parse(text);
    },
    // Whether the browser has it.
    write(storage, name, value) {
      const at = prefix + name, text = JSON.stringify(value);
      const kept = attempt(storage, (there) => { there.setItem(at, text); return there.getItem(at) === text; });
      if (kept) spare.delete(at); else spare.set(at, text);
      return Boolean(kept);
    },
    drop(storage, name) {
      spare.delete(prefix + name);
      attempt(storage, (there) => there.removeItem(prefix + name));
    },
  };
}

// The outbox of one person in one project of one store, which `id` names: another's would be refused, or taken for
// somebody else's. Tabs share it, but for the numbers of the votes that each can take back.
export function createOutbox(browser, id) {
  const { read, write, drop } = createShelf(browser, `align-outbox/${id}`);
  const waiting = () => read("localStorage", "", []);
  const refused = () => read("localStorage", "/refused", []);
  return {
    waiting,
    add: (letter) => write("localStorage", "", [...waiting(), letter]),
    remove: (key) => write("localStorage", "", waiting().filter((letter) => letter.key !== key)),
    refused,
    refuse: (letter, at) => write("localStorage", "/refused", [...refused(), { ...letter, at }].slice(-MOST_REFUSED)),
    forgetRefused: () => drop("localStorage", "/refused"),
    draft: () => read("localStorage", "/draft", null),
    keepDraft: (draft) => write("localStorage", "/draft", draft),
    dropDraft: () => drop("localStorage", "/draft"),
    votes: (otherwise) => read("sessionStorage", "/votes", otherwise),
    keepVotes: (votes) => write("sessionStorage", "/votes", votes),
  };
}

// Sends what is waiting, oldest first, until the server has it all. Returns the last answer, which brings the next
// item; null where nothing was waiting, or the last of it was refused.
export async function deliver(outbox, ask, { onSending, onAccepted, onRefused, onLost }) {
  let answer = null;
  for (let letter; (letter = outbox.waiting()[0]); ) {
    onSending();
    try {
      answer = await ask("vote", letter);
      if (!Number.isInteger(answer.seq)) throw new Error("that was not the server's answer");
      onAccepted(answer.seq);
    } catch (error) {
      if (isLost(error)) {
        onLost(error);
        await pause();
        continue;
      }
      answer = null;
      outbox.refuse(letter, new Date().toISOString());
      onRefused(error);
    }
    outbox.remove(letter.key);  // by its key: another tab may have added, or sent, others meanwhile
  }
  return answer;
}

// Sends drafts one after the other, the newest last; what a lost connection kept back is sent again.
export function createDraftSaver(outbox, ask, { onSaved, onLost }) {
  let timer = 0, sending = Promise.resolve();
  const cancel = () => clearTimeout(timer);
  function later() {
    cancel();
    timer = setTimeout(save, DRAFT_MS);
  }
  function save() {
    const draft = outbox.draft();
    cancel();
    if (draft) sending = sending.then(() => ask("draft", draft)).then(
      (standing) => onSaved(draft.token, standing),
      (error) => { if (isLost(error)) { onLost(error); timer = setTimeout(save, RETRY_MS); } });
    return sending;
  }
  return { save, later, cancel };
}
