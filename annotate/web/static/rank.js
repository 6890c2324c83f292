// The ranking page: shows one item, takes one judgement, sends it, shows the next. The server holds the truth; this page
// holds what was said and not yet acknowledged (the outbox, in localStorage), and sends it until it is.
"use strict";
(() => {
  const LETTERS = "ABCDEFGHI", DRAFT_MS = 400, RENEW_MS = 30000, RETRY_MS = 1500, AWAY_MS = 600000;
  // When the annotator is told that the server keeps them waiting, and when a request is given up, to be sent again: later
  // than the server itself gives up waiting for a locked database (30 s), whose answer says more.
  const SLOW_MS = 5000, DEADLINE_MS = 40000;
  const PROMPT = -1;
  const reviewing = new URLSearchParams(location.search).has("review");  // settling what others disagree on
  const MODE = reviewing ? "review" : "work";
  let root, view, home, project, words, rules, step = null, said = null, focused = 0, since = 0, seen = 0, votes = [], draftTimer = 0, busy = false, drafting = Promise.resolve();

  // Words and elements

  const say = (name, values = {}) =>
    (words[name] ?? name).replace(/\{(\w+)\}/g, (_, key) => values[key] ?? "");

  // An element: properties that start with "on" are handlers, `text` its text, `html` what the server made safe.
  function make(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (name === "text") element.textContent = value;
      else if (name === "html") element.innerHTML = value;
      else if (value != null && value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.filter(Boolean));
    return element;
  }
  const key = (name) => make("kbd", { text: name, "aria-hidden": "true" });
  // A click by mouse leaves the focus with the answers: Enter sends then, and does not press the button again.
  const button = (label, shortcut, act, more = {}) =>
    make("button", { type: "button", "aria-keyshortcuts": shortcut, ...more, onclick: (event) => {
      const at = event.currentTarget.closest("[data-answer]")?.dataset.answer;
      act(event);
      if (event.detail && step?.task && !busy && !root.querySelector("dialog[open]")) focus(Number(at ?? focused), false);
    } }, label, key(shortcut));
  let troubled = false;
  const tell = (text, warn = false, ...more) => {
    const line = root.querySelector("#said");
    line.replaceChildren(text, ...more);
    line.className = warn ? "warn" : "soft";
    troubled = false;
  };
  const tellTrouble = (error) => { tell(...trouble(error)); troubled = true; };

  // The server

  async function ask(path, body) {
    const headers = { "X-Align": project?.id ?? "" };
    const options = body === undefined ? { headers } : {
      method: "POST", body: JSON.stringify(body), headers: { ...headers, "Content-Type": "application/json" },
    };
    const over = new AbortController();
    let slow = false;
    const timers = [
      setTimeout(() => { slow = true; if (words) tellTrouble(new Error("slow")); }, SLOW_MS),
      setTimeout(() => over.abort(), DEADLINE_MS),
    ];
    try {
      const answer = await fetch(`/api/${path}`, { ...options, signal: over.signal });
      const found = await answer.json();
      const { status } = answer;
      if (!answer.ok) throw Object.assign(new Error([found.problem, found.remedy].filter(Boolean).join(". ")), { status, refused: found.field !== undefined });
      if (slow && troubled) tell("");  // it is over
      return found;
    } finally { timers.forEach(clearTimeout); }
  }
  // Whatever is not this project's server saying no to these very words: a restart, a proxy, another program at the port.
  // What was said is kept, and sent again.
  const lost = (error) => !(error.refused && (error.status === 409 || error.status === 422));
  const trouble = (error) => [401, 403].includes(error.status) ? [say("locked_out"), true, " ", logIn()]
    : [error.refused ? say("not_kept", { problem: error.message }) : say("connection"), true];
  const logIn = () => (home?.accounts ? make("a", { href: "/login", target: "_blank", text: say("log_in") }) : "");

  // One for each person in each project of each store: another's would be refused, or taken for somebody else's.
  const shelf = () => `align-outbox/${project.id}`;
  // A browser may keep nothing, or have no room: then this page does, as long as it is open.
  const spare = new Map();
  function shelved(storage, name, act) {
    try { return act(window[storage], `${shelf()}${name}`); } catch { return undefined; }
  }
  const read = (storage, name, otherwise) =>
    JSON.parse(spare.get(`${shelf()}${name}`) ?? shelved(storage, name, (there, at) => there.getItem(at)) ?? otherwise);
  function write(storage, name, value) {
    const text = JSON.stringify(value);
    const kept = shelved(storage, name, (there, at) => { there.setItem(at, text); return there.getItem(at) === text; });
    if (kept) spare.delete(`${shelf()}${name}`); else spare.set(`${shelf()}${name}`, text);
    return kept;
  }
  function drop(name) {
    spare.delete(`${shelf()}${name}`);
    shelved("localStorage", name, (there, at) => there.removeItem(at));
  }
  const outbox = () => read("localStorage", "", "[]");
  const keep = (letters) => write("localStorage", "", letters);
  const noteVotes = () => write("sessionStorage", "/votes", votes);
  const refused = () => read("localStorage", "/refused", "[]");
  const randomKey = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");

  // Sends what is waiting, oldest first, until the server has it all; the last answer brings the next item.
  async function deliver() {
    let answer = null;
    for (let letter; (letter = outbox()[0]); ) {
      tell(say("saving"));
      try {
        answer = await ask("vote", letter);
        if (!Number.isInteger(answer.seq)) throw new Error("that was not the server's answer");
        votes.push(answer.seq);
        noteVotes();
        tell(say("saved"));
      } catch (error) {
        if (lost(error)) {
          tellTrouble(error);
          await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
          continue;
        }
        answer = null;
        write("localStorage", "/refused", [...refused(), { ...letter, at: new Date().toISOString() }].slice(-20));
        tell(error.status === 409 ? say("elsewhere") : say("refused", { problem: error.message }), true);
      }
      keep(outbox().filter((other) => other.key !== letter.key));
    }
    return answer;
  }

  // The next item, however long the server takes to come back.
  async function advance(first) {
    occupied(true);
    for (;;) {
      try {
        let next = first ?? (await deliver());
        // What waited here may have been said on a page of the other mode, and brings the next item of that.
        if (next?.terms?.mode !== MODE) next = await ask(reviewing ? "review" : "task");
        const changed = await informed(next);
        show(next);
        if (changed) guidelines(say("new_guidelines"));
        break;
      } catch (error) {
        if (!lost(error)) { tell(say("refused", { problem: error.message }), true); break; }
        tellTrouble(error);
        await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
      }
    }
    occupied(false);
  }
  // The guidelines that a step names are here before it is shown: a vote names those that its author had before them.
  // Whether they changed since the page was opened.
  async function informed({ progress, terms }) {
    if (!progress || !terms) throw new Error("that was not the server's answer");
    const before = rules;
    if (before?.version === (terms.guidelines ?? undefined)) return false;
    rules = terms.guidelines === null ? null : await ask(`guidelines?version=${terms.guidelines}`);
    return step !== null && rules !== null;
  }
  function occupied(on) {
    busy = view.inert = on;
    if (!on && step?.task) focus(focused, false);
  }

  // What was said

  const count = () => step.task.answers.length;
  const isPair = () => count() === 2;
  const blank = () => ({ places: Array(count()).fill(null), strength: null, quality: "", ratings: {}, flagged: [], rationale: "", demonstration: "" });

  function remembered(draft) {
    const found = blank();
    (draft.tiers ?? []).forEach((tier, rank) => tier.forEach((answer) => { found.places[answer] = rank + 1; }));
    for (const name of ["strength", "quality", "ratings", "flagged", "rationale", "demonstration"])
      if (draft[name]) found[name] = structuredClone(draft[name]);
    for (const [answer, marks] of Object.entries(found.ratings)) {  // what is asked no more can be neither seen nor sent
      const asked = Object.entries(marks).filter(([name, mark]) => project.attributes.includes(name) && mark <= project.scale);
      if (asked.length) found.ratings[answer] = Object.fromEntries(asked); else delete found.ratings[answer];
    }
    if (isPair() && found.places.every(Boolean)) {
      const [a, b] = found.places;
      found.strength = a === b ? 0 : (draft.strength ?? 1) * (a < b ? -1 : 1);
    } else found.strength = null;
    return found;
  }
  const complete = () => said.places.every((place) => place !== null);

  // Half a character, as a browser may cut one, is nothing that JSON can carry.
  const whole = (text) => text.trim().replace(/[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g, "\ufffd");

  function judgement() {
    const ranks = [...new Set(said.places)].filter((place) => place !== null).sort((a, b) => a - b);
    const tiers = ranks.map((rank) => said.places.flatMap((place, answer) => (place === rank ? [answer] : [])));
    return {
      tiers, strength: isPair() && said.strength !== null ? Math.abs(said.strength) : null, quality: said.quality,
      ratings: said.ratings, flagged: said.flagged, rationale: whole(said.rationale), demonstration: whole(said.demonstration),
      seconds: Math.min(Math.round((performance.now() - since) / 100) / 10, 1e6),
    };
  }

  function changed(redraw = true) {
    if (redraw) reflect();
    clearTimeout(draftTimer);
    if (!write("localStorage", "/draft", { token: step.task.token, draft: draft() })) tell(say("no_room"), true);
    draftTimer = setTimeout(saveDraft, DRAFT_MS);
  }
  function draft() {
    // Of a draft the places as they were given: a ranking closes the gaps.
    const most = Math.max(0, ...said.places);
    const at = (place) => said.places.flatMap((its, answer) => (its === place ? [answer] : []));
    return { ...judgement(), tiers: Array.from({ length: most }, (_, i) => at(i + 1)), seconds: null };
  }
  // One after the other, the newest last; what a lost connection kept back is sent again.
  function saveDraft() {
    const kept = read("localStorage", "/draft", "null");
    clearTimeout(draftTimer);
    if (!kept) return drafting;
    drafting = drafting.then(() => ask("draft", kept)).then(
      ({ kept: ours, judged }) => { if (step?.task?.token === kept.token) standing(ours, judged, say("draft_saved")); },
      (error) => {
        if (!lost(error)) return;
        tellTrouble(error);
        draftTimer = setTimeout(saveDraft, RETRY_MS);
      });
    return drafting;
  }

  // What became of the item on the screen: ours still, judged by us in another window, or with somebody else.
  function standing(ours, judged, otherwise) {
    if (judged) tell(say("judged_elsewhere"), true); else if (!ours) tell(say("late"), true); else if (otherwise) tell(otherwise);
  }

  // Acts

  function prefer(strength) {
    said.strength = strength;
    said.quality = "";
    said.places = strength === 0 ? [1, 1] : strength < 0 ? [1, 2] : [2, 1];
    changed();
  }
  function rank(answer, place, byKey = false) {
    if (said.quality) said.places.fill(null); // "all good" says nothing of which is better
    said.places[answer] = place;
    said.quality = "";
    changed();
    if (!byKey) return; // a hand on the mouse, or on the arrows of a radio group, stays where it is
    const next = said.places.indexOf(null);
    focus(next >= 0 ? next : answer + 1);
  }
  function all(quality) {
    const off = said.quality === quality;
    said.quality = off ? "" : quality;
    said.places = Array(count()).fill(off ? null : 1);
    said.strength = off || !isPair() ? null : 0;
    changed();
  }
  function flag(answer) {
    said.flagged = said.flagged.includes(answer) ? said.flagged.filter((other) => other !== answer) : [...said.flagged, answer];
    changed();
  }
  function send() {
    if (!complete()) return tell(say("send_hint"), true);
    return post(judgement());
  }
  function skip(reason) {
    const { rationale, demonstration, flagged, seconds } = judgement();
    return post({ skipped: reason, rationale, demonstration, flagged, seconds });
  }
  function post(what) {
    if (busy || !step.task) return undefined;
    clearTimeout(draftTimer);
    keep([...outbox(), { token: step.task.token, key: randomKey(), terms: step.terms, said: what }]);
    drop("/draft");
    root.querySelector("dialog[open]")?.close();
    return advance();
  }
  async function undo() {
    if (busy || !votes.length) return;
    occupied(true);
    await saveDraft();
    try {
      const back = await ask("undo", { seq: votes.at(-1) });
      const changed = await informed(back);
      votes.pop();
      drop("/draft");
      show(back);
      tell(say("undone"));
      if (changed) guidelines(say("new_guidelines"));
    } catch (error) {
      if (!lost(error)) votes.pop();
      if (lost(error)) tellTrouble(error); else tell(say("refused", { problem: error.message }), true);
    }
    noteVotes();
    occupied(false);
  }

  // Dialogs

  function dialog(title, ...content) {
    const box = make("dialog", { "aria-label": title, onclose: () => box.remove() },
      make("h2", { text: title, tabindex: "-1", autofocus: true }), ...content, button(say("close"), "Escape", () => box.close()));
    root.append(box);
    box.showModal();
  }
  const guidelines = (title = say("guidelines")) =>
    dialog(title, rules ? make("div", { class: "text", html: rules.html }) : make("p", { text: say("no_guidelines") }));
  // Who dictates, or leans on keys, can do without those of one letter (WCAG 2.1.4).
  const letters = () => { try { return localStorage.getItem("align-letters") !== "off"; } catch { return true; } };
  const KEYS = [["← →", "help_move"], ["1 – 9", "help_digits"], ["Enter", "send"], ["u", "undo"], ["g", "good"], ["b", "bad"],
    ["f", "flag"], ["p", "flag_prompt"], ["s", "skip"], ["d", "difference_key"], ["r", "rationale"], ["w", "demonstration"],
    ["Escape, Ctrl+Enter", "help_field"], ["h", "guidelines"], ["x", "show"], ["?", "help"]];
  const help = () => dialog(say("help"),
    make("dl", { class: "keys" }, ...KEYS.flatMap(([name, word]) => [make("dt", {}, make("kbd", { text: name })), make("dd", { text: say(word) })])),
    make("p", {}, make("label", {}, make("input", { type: "checkbox", id: "align-letters", checked: letters(),
      onchange: (event) => { try { localStorage.setItem("align-letters", event.target.checked ? "on" : "off"); } catch { /* for now */ } } }),
      ` ${say("letters")}`)));
  // What the server would not take, in the words that were said: nothing is thrown away unseen.
  const showRefused = () => dialog(say("not_sent", { count: refused().length }),
    ...refused().map(({ at, said: what }) => make("pre", { class: "text", style: "white-space: pre-wrap",
      text: [at, what.rationale, what.demonstration, JSON.stringify(what)].filter(Boolean).join("\n") })),
    make("p", {}, button(say("forget"), "", () => { drop("/refused"); root.querySelector("dialog[open]").close(); show(step); })));
  const SKIPS = ["unsure", "language", "broken", "harmful", "other"];
  const askWhy = () =>
    dialog(say("skip_why"), make("div", { class: "row" },
      ...SKIPS.map((why, i) => button(say(`skip_${why}`), String(i + 1), () => skip(why), { "data-digit": i + 1 }))));
  async function difference() {
    const [a, b] = [focused, (focused + 1) % count()].sort((x, y) => x - y);
    const { token } = step.task;
    const found = await ask(`difference?token=${encodeURIComponent(token)}&a=${a}&b=${b}`).catch(tellTrouble);
    if (!found || busy || step.task?.token !== token) return;
    const { html } = found;
    dialog(say("difference", { a: LETTERS[a], b: LETTERS[b] }), make("div", { class: "text", style: "white-space: pre-wrap", html }));
  }

  // Drawing

  function show(next) {
    step = next;
    project = { ...project, ...next.asked };
    if (troubled) tell("");  // it is over
    const kept = read("localStorage", "/draft", "null"); // newer than the server's, where it was said while that was away
    said = step.task && remembered(kept?.token === step.task.token ? kept.draft : step.task.draft);
    for (const open of root.querySelectorAll("dialog")) open.remove();
    focused = 0;
    since = performance.now();
    const { mine, quota, done, wanted } = step.progress;
    const progress = say("progress", { mine, quota: quota ? `/${quota}` : "", done, wanted });
    view.replaceChildren(
      make("header", {},
        make("h1", { text: project.title }),
        make("span", { class: "row" }, make("progress", { max: Math.max(wanted, 1), value: done, "aria-label": progress }),
          make("span", { class: "soft", text: progress })),
        make("span", { class: "row" }, button(say("undo"), "u", undo, { disabled: !votes.length }),
          button(say("guidelines"), "h", () => guidelines()), button(say("help"), "?", help),
          refused().length ? make("button", { type: "button", text: say("not_sent", { count: refused().length }), onclick: showRefused }) : null), person()),
      step.task ? item() : make("p", { text: say(`idle_${reviewing ? "reviewed" : step.idle}`) }));
    if (!step.task) return;
    reflect();
    for (const text of root.querySelectorAll(".fold")) fold(text);
    focus(0, false);
  }

  function item() {
    const { prompt, answers } = step.task;
    const form = make("form", { onsubmit: (event) => { event.preventDefault(); send(); } });
    form.append(...[
      make("section", { class: "prompt", "aria-label": say("prompt") }, ...prompt.map(({ role, html }) =>
        make("div", {}, make("strong", { text: say(`role_${role}`) }), make("div", { class: "text", html, dir: "auto" })))),
      step.task.others ? opinions() : null,
      make("section", { class: "answers", "data-count": count(), "aria-label": say("answers") }, ...answers.map(card)),
      isPair() ? strengths() : strip(),
      make("div", { class: "row" }, button(say(isPair() ? "both_good" : "good"), "g", () => all("good"), { "data-quality": "good" }),
        button(say(isPair() ? "both_bad" : "bad"), "b", () => all("bad"), { "data-quality": "bad" }),
        button(say("flag_prompt"), "p", () => flag(PROMPT), { "data-flag": PROMPT }),
        button(say("difference_key"), "d", difference), button(say("skip"), "s", askWhy)),
      field("rationale", "r", 20000), field("demonstration", "w", 100000),
      make("p", {}, make("button", { type: "submit", class: "main" }, say("send"), key("Enter"))),
    ].filter(Boolean));
    return form;
  }

  // All that annotators said, for whoever settles it: "A = C > B", what they rated and flagged, why, and their own answer.
  const opinions = () =>
    make("section", { class: "prompt", "aria-label": say("others") }, make("h2", { text: say("others") }),
      ...step.task.others.map((vote) => {
        const order = vote.tiers.map((tier) => tier.map((place) => LETTERS[place]).sort().join(" = ")).join(" > ");
        const rated = Object.entries(vote.ratings).sort().map(([place, marks]) =>
          `${LETTERS[place]}: ${Object.entries(marks).map(([name, mark]) => `${name} ${mark}`).join(", ")}`);
        const flags = vote.flagged.map((place) => (place === PROMPT ? say("flag_prompt") : `${LETTERS[place]}: ${say("flag")}`));
        const first = vote.skipped ? `${say("skip")}: ${say(`skip_${vote.skipped}`)}` : `${order}${vote.strength ? ` (${vote.strength})` : ""}`;
        const more = [vote.quality && say(vote.quality), ...rated, ...flags].filter(Boolean).join("; ");
        const text = (html) => html && make("div", { class: "text", html, dir: "auto" });
        return make("div", {}, make("strong", { text: `${first} ` }), make("span", { class: "soft", text: vote.who }),
          more && make("p", { text: more }), text(vote.html),
          vote.demonstration && make("strong", { text: say("own_answer") }), text(vote.demonstration));
      }));
  function card(answer, place) {
    const letter = LETTERS[place];
    const text = make("div", { class: "text fold", dir: "auto", html: answer.html });
    return make("section", { class: `answer${project.blurred ? " blurred" : ""}`, tabindex: "-1", "data-answer": place, "aria-label": say("answer", { letter }), onfocusin: () => { focused = place; } },
      make("div", { class: "row" }, make("h2", { text: say("answer", { letter }) }),
        button(say("flag"), "f", () => flag(place), { "data-flag": place })),
      project.blurred ? button(say("show"), "x", unblur, { class: "unblur" }) : null,
      answer.empty ? make("p", { class: "soft", text: say("empty_answer") }) : text,
      answer.cut ? make("p", { class: "soft", text: say("cut") }) : null,
      isPair() ? null : places(place), ratings(place));
  }
  const radio = (name, value, label, shortcut, act, checked) =>
    make("label", { class: "choice" }, make("input", { type: "radio", name, value, onchange: act, checked }),
      make("span", {}, label, shortcut ? key(shortcut) : null));
  const strengths = () =>
    make("fieldset", {}, make("legend", { text: say("preference") }), make("div", { class: "row strengths" },
      ...[-3, -2, -1, 0, 1, 2, 3].map((value) =>
        radio("strength", value, say(`strength_${value}`), String(value + 4), () => prefer(value)))));
  const places = (answer) =>
    make("fieldset", {}, make("legend", { text: say("place") }), make("div", { class: "row" },
      ...step.task.answers.map((_, place) =>
        radio(`place-${answer}`, place + 1, String(place + 1), "", () => rank(answer, place + 1)))));
  // Answers as chips that are dragged, by mouse or finger, onto places; two on one place are a tie.
  const strip = () =>
    make("div", { class: "strip", "aria-hidden": "true" }, ...[null, ...step.task.answers.keys()].map((place) =>
      make("div", { class: "place", "data-place": place === null ? "" : place + 1 },
        make("span", { class: "soft", text: place === null ? say("drag") : place + 1 }))));
  function chip(answer) {
    const it = make("span", { class: "chip", "data-chip": answer, text: LETTERS[answer] });
    it.addEventListener("pointerdown", (down) => {
      it.setPointerCapture(down.pointerId);
      it.onpointermove = (move) => {
        it.style.translate = `${move.clientX - down.clientX}px ${move.clientY - down.clientY}px`;
      };
      it.onpointerup = it.onpointercancel = (up) => {
        it.onpointermove = it.onpointerup = it.onpointercancel = null;
        it.style.translate = "";
        const there = document.elementsFromPoint(up.clientX, up.clientY).find((e) => e.matches(".place"));
        if (there && up.type === "pointerup") rank(answer, Number(there.dataset.place) || null);
      };
    });
    return it;
  }
  const ratings = (answer) =>
    project.attributes.length === 0 ? null : make("fieldset", {}, make("legend", { text: say("attributes") }),
      make("div", { class: "row" }, ...project.attributes.map((name) => make("label", {}, `${name} `,
        make("select", { "data-rating": `${answer} ${name}`, onchange: (event) => rate(answer, name, event.target.value) },
          make("option", { value: "", text: "–" }),
          ...Array.from({ length: project.scale }, (_, i) => make("option", { value: i + 1, text: i + 1 })))))));
  function rate(answer, name, value) {
    const mine = { ...said.ratings[answer] };
    if (value) mine[name] = Number(value); else delete mine[name];
    said.ratings[answer] = mine;
    if (!Object.keys(mine).length) delete said.ratings[answer];
    changed(false);
  }
  const field = (name, shortcut, most) =>
    make("p", {}, make("label", { for: `align-${name}` }, say(name), " ", key(shortcut)),
      make("textarea", { id: `align-${name}`, rows: 2, maxlength: most, dir: "auto",
        oninput: (event) => { said[name] = event.target.value; changed(false); } }));

  function fold(text) {
    if (text.scrollHeight <= text.clientHeight + 8) return;
    const toggle = make("button", { type: "button", text: say("unfold"), onclick: () => {
      const open = text.classList.toggle("fold");
      toggle.textContent = open ? say("unfold") : say("fold");
    } });
    text.after(toggle);
  }
  function unblur() {
    for (const answer of root.querySelectorAll(".blurred")) answer.classList.remove("blurred");
    for (const shown of root.querySelectorAll(".unblur")) shown.remove();
  }

  // Brings the form in line with what was said.
  function reflect() {
    const press = (element, on) => element.setAttribute("aria-pressed", String(on));
    for (const input of root.querySelectorAll("input[name=strength]")) input.checked = said.strength === Number(input.value) && !said.quality;
    said.places.forEach((place, answer) => {
      for (const input of root.querySelectorAll(`input[name=place-${answer}]`)) input.checked = place === Number(input.value);
    });
    for (const place of root.querySelectorAll(".place")) {
      const here = said.places.flatMap((its, answer) => (String(its ?? "") === place.dataset.place ? [chip(answer)] : []));
      place.replaceChildren(place.firstElementChild, ...here);
    }
    for (const element of root.querySelectorAll("[data-quality]")) press(element, said.quality === element.dataset.quality);
    for (const element of root.querySelectorAll("[data-flag]")) press(element, said.flagged.includes(Number(element.dataset.flag)));
    for (const name of ["rationale", "demonstration"]) root.querySelector(`#align-${name}`).value = said[name];
    for (const select of root.querySelectorAll("[data-rating]")) {
      const [answer, ...name] = select.dataset.rating.split(" ");
      select.value = said.ratings[answer]?.[name.join(" ")] ?? "";
    }
  }
  function focus(place, scroll = true) {
    focused = (place + count()) % count();
    root.querySelector(`[data-answer="${focused}"]`)?.focus({ preventScroll: !scroll });
  }

  // Keys

  function pressed(event) {
    const typing = event.target.matches?.("textarea, select"), box = root.querySelector("dialog[open]");
    if (event.isComposing || event.altKey || event.metaKey || busy) return;
    if (event.repeat && !typing && !event.key.startsWith("Arrow") && event.key !== "Tab") return event.preventDefault();
    if (event.ctrlKey) { if (event.key === "Enter" && !box && step?.task) { event.preventDefault(); send(); } return; }
    if (typing) { if (event.key === "Escape") focus(focused); return; }
    if (event.key.length === 1 && !letters()) return;
    if (box) { box.querySelector(`[data-digit="${event.key}"]`)?.click(); return; }
    const act = { u: undo, h: () => guidelines(), "?": help }[event.key] ?? (step?.task && itemKey(event));
    if (act) { event.preventDefault(); act(); }
  }
  function itemKey(event) {
    const digit = /^[1-9]$/.test(event.key) ? Number(event.key) : 0;
    if (digit && isPair()) return digit <= 7 ? () => prefer(digit - 4) : null;
    if (digit) return digit <= count() ? () => rank(focused, digit, true) : null;
    const button = event.target.matches?.("button, input"), typed = event.target.matches?.("input");  // its own arrows
    return {
      ArrowLeft: typed ? null : () => focus(focused - 1), ArrowRight: typed ? null : () => focus(focused + 1), Enter: button ? null : send,
      g: () => all("good"), b: () => all("bad"), f: () => flag(focused), p: () => flag(PROMPT), d: difference, s: askWhy,
      x: unblur, r: () => root.querySelector("#align-rationale").focus(), w: () => root.querySelector("#align-demonstration").focus(),
    }[event.key];
  }

  // Who is logged in, and the ways out; nothing where the link alone lets in.
  const person = () =>
    make("span", { class: "row" }, home.manages ? make("a", { href: "/manage/", text: say("manage") }) : null,
      project?.reviews && !reviewing ? make("a", { href: `/?project=${encodeURIComponent(project.name)}&review`, text: say("review") }) : null,
      reviewing ? make("a", { href: `/?project=${encodeURIComponent(project?.name ?? "")}`, text: say("to_items") }) : null,
      home.projects.length > 1 ? make("a", { href: "/?project=", text: say("projects") }) : null,
      home.accounts ? make("span", { class: "soft", text: home.person }) : null,
      home.accounts ? make("a", { href: "/password", text: say("change_password") }) : null,
      home.accounts ? make("form", { method: "post", action: "/logout", onsubmit: forget }, make("button", { type: "submit", text: say("log_out") })) : null);
  const choice = (asked, all) => [
    make("header", {}, make("h1", { text: say("projects") }), person()),
    asked ? make("p", { class: "warn", role: "alert", text: say("no_such_project", { project: asked }) }) : null,
    all.length ? make("ul", {}, ...all.map(({ name, title }) =>
      make("li", {}, make("a", { href: `/?project=${encodeURIComponent(name)}`, text: title })))) : make("p", { text: say("no_projects") }),
  ].filter(Boolean);

  // What the server has of a draft need not stay in a browser that others use; what it has not is in the outbox.
  const forget = () => project && drop("/draft");

  async function patiently(path) {
    for (;;) {
      try { return await ask(path); } catch { await new Promise((resolve) => setTimeout(resolve, RETRY_MS)); }
    }
  }
  async function start() {
    root.append(view = make("div"), make("p", { id: "said", role: "status", class: "soft" }));
    document.addEventListener("keydown", pressed);
    for (const sign of ["keydown", "pointermove", "scroll"]) document.addEventListener(sign, () => { seen = performance.now(); }, true);
    // Nobody keeps an item by a tab that was left open; and whoever waits for one need not ask.
    setInterval(() => {
      if (busy || document.hidden || !step) return;
      if (!step.task) advance();
      else if (performance.now() - seen < AWAY_MS)
        ask("renew", { token: step.task.token }).then(({ kept, judged }) => standing(kept, judged, ""), () => undefined);
    }, RENEW_MS);
    home = await patiently("projects");
    words = home.words;
    document.documentElement.lang = document.documentElement.lang || "en";
    const asked = new URLSearchParams(location.search).get("project"), all = home.projects;
    const chosen = all.find(({ name }) => name === asked) ?? (asked === null && all.length === 1 ? all[0] : null);
    if (!chosen) return view.replaceChildren(...choice(asked, all));
    project = chosen;
    project = { ...chosen, ...(await patiently("project")) };
    votes = read("sessionStorage", "/votes", JSON.stringify(project.votes));
    await advance();
  }
  (function wait() {
    root = document.getElementById("align-app");
    if (root) start(); else requestAnimationFrame(wait);
  })();
})();
