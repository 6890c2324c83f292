// Draws the ranking page. What is shown comes as `page`, the state of `rank.js`, and is only read; what people do is
// handed to `ui.act`.

import { LETTERS, key, make } from "./elements.js";
import { PROMPT, answersAt, isPair } from "./judgement.js";

// The page of an item, or of what there is without one.
export function drawPage(ui, page) {
  const { say } = ui, { step } = page;
  return [header(ui, page), step.task ? form(ui, page)
    : make("p", { text: say(`idle_${page.reviewing ? "reviewed" : step.idle}`) })];
}

function header(ui, page) {
  const { say, button, act } = ui, { step } = page, { mine, quota, done, wanted } = step.progress;
  const progress = say("progress", { mine, quota: quota ? `/${quota}` : "", done, wanted });
  const count = page.outbox.refused().length;
  return make("header", {},
    make("h1", { text: page.project.title }),
    make("span", { class: "row" }, make("progress", { max: Math.max(wanted, 1), value: done, "aria-label": progress }),
      make("span", { class: "soft", text: progress })),
    make("span", { class: "row" }, button(say("undo"), "u", act.undo, { disabled: !page.votes.length }),
      step.task ? button(say("as_written"), "v", act.readAsWritten, { "data-written": "" }) : null,
      button(say("guidelines"), "h", act.showGuidelines), button(say("help"), "?", act.showHelp),
      count ? make("button", { type: "button", text: say("not_sent", { count }), onclick: act.showRefused }) : null),
    person(ui, page));
}

// Who is logged in, and the ways out; nothing where the link alone lets in.
function person({ say, act }, { home, project, reviewing }) {
  const link = (href, word) => make("a", { href, text: say(word) });
  const name = encodeURIComponent(project?.name ?? "");
  return make("span", { class: "row" }, home.manages ? link("/manage/", "manage") : null,
    project?.reviews && !reviewing ? link(`/?project=${name}&review`, "review") : null,
    reviewing ? link(`/?project=${name}`, "to_items") : null,
    home.projects.length > 1 ? link("/?project=", "projects") : null,
    home.accounts ? make("span", { class: "soft", text: home.person }) : null,
    home.accounts ? link("/password", "change_password") : null,
    home.accounts ? make("form", { method: "post", action: "/logout", onsubmit: act.forgetDraft },
      make("button", { type: "submit", text: say("log_out") })) : null);
}

// The projects to choose from, where the address names none, or one (`asked`) that is not among them.
export function drawChoice(ui, page, asked) {
  const { say } = ui, { projects } = page.home;
  return [
    make("header", {}, make("h1", { text: say("projects") }), person(ui, page)),
    asked ? make("p", { class: "warn", role: "alert", text: say("no_such_project", { project: asked }) }) : null,
    projects.length ? make("ul", {}, ...projects.map(({ name, title }) =>
      make("li", {}, make("a", { href: `/?project=${encodeURIComponent(name)}`, text: title }))))
      : make("p", { text: say("no_projects") }),
  ].filter(Boolean);
}

function form(ui, page) {
  const { say, button, act } = ui, { prompt, answers, others } = page.step.task, pair = isPair(page.judgement);
  return make("form", { onsubmit: (event) => { event.preventDefault(); act.send(); } },
    make("section", { class: "prompt", "aria-label": say("prompt") }, ...prompt.map((turn) =>
      make("div", {}, make("strong", { text: say(`role_${turn.role}`) }), textOf(turn)))),
    others ? opinions(ui, others) : null,
    make("section", { class: "answers", "data-count": answers.length, "aria-label": say("answers") },
      ...answers.map((answer, i) => card(ui, page, answer, i))),
    pair ? strengthChoice(ui) : strip(ui, answers),
    make("div", { class: "row" },
      button(say(pair ? "both_good" : "good"), "g", () => act.judgeAll("good"), { "data-quality": "good" }),
      button(say(pair ? "both_bad" : "bad"), "b", () => act.judgeAll("bad"), { "data-quality": "bad" }),
      button(say("flag_prompt"), "p", () => act.flag(PROMPT), { "data-flag": PROMPT }),
      button(say("difference_key"), "d", act.showDifference), button(say("skip"), "s", act.askWhy)),
    field(ui, "rationale", "r", 20000), field(ui, "demonstration", "w", 100000),
    make("p", {}, make("button", { type: "submit", class: "main" }, say("send"), key("Enter"))));
}

// All that annotators said, for whoever settles it: "A = C > B", what they rated and flagged, why, and their own
// answer.
const opinions = (ui, votes) => make("section", { class: "prompt", "aria-label": ui.say("others") },
  make("h2", { text: ui.say("others") }), ...votes.map((vote) => opinion(ui, vote)));
function opinion({ say }, vote) {
  const order = vote.tiers.map((tier) => tier.map((answer) => LETTERS[answer]).sort().join(" = ")).join(" > ");
  const rated = Object.entries(vote.ratings).sort().map(([answer, marks]) =>
    `${LETTERS[answer]}: ${Object.entries(marks).map(([name, mark]) => `${name} ${mark}`).join(", ")}`);
  const flags = vote.flagged.map((answer) =>
    (answer === PROMPT ? say("flag_prompt") : `${LETTERS[answer]}: ${say("flag")}`));
  const first = vote.skipped ? `${say("skip")}: ${say(`skip_${vote.skipped}`)}`
    : `${order}${vote.strength ? ` (${vote.strength})` : ""}`;
  const more = [vote.quality && say(vote.quality), ...rated, ...flags].filter(Boolean).join("; ");
  return make("div", {}, make("strong", { text: `${first} ` }), make("span", { class: "soft", text: vote.who }),
    more && make("p", { text: more }), vote.rationale && textOf(vote.rationale),
    vote.demonstration && make("strong", { text: say("own_answer") }),
    vote.demonstration && textOf(vote.demonstration));
}

function card(ui, { project, judgement }, said, answer) {
  const { say, button, act } = ui, { empty, cut } = said, name = say("answer", { letter: LETTERS[answer] });
  return make("section", {
    class: `answer${project.blurred ? " blurred" : ""}`, tabindex: "-1", "data-answer": answer, "aria-label": name,
    onfocusin: () => act.noteFocus(answer),
  },
    make("div", { class: "row" }, make("h2", { text: name }),
      button(say("flag"), "f", () => act.flag(answer), { "data-flag": answer })),
    project.blurred ? button(say("show"), "x", act.unblur, { class: "unblur" }) : null,
    empty ? make("p", { class: "soft", text: say("empty_answer") })
      : textOf(said, "foldable fold"),
    cut ? make("p", { class: "soft", text: say("cut") }) : null,
    isPair(judgement) ? null : placeChoice(ui, judgement, answer), ratingChoices(ui, project, answer));
}

const radio = (name, value, label, shortcut, act) =>
  make("label", { class: "choice" }, make("input", { type: "radio", name, value, onchange: act }),
    make("span", {}, label, shortcut ? key(shortcut) : null));
const strengthChoice = ({ say, act }) =>
  make("fieldset", {}, make("legend", { text: say("preference") }), make("div", { class: "row strengths" },
    ...[-3, -2, -1, 0, 1, 2, 3].map((value) =>
      radio("strength", value, say(`strength_${value}`), String(value + 4), () => act.prefer(value)))));
const placeChoice = ({ say, act }, judgement, answer) =>
  make("fieldset", {}, make("legend", { text: say("place") }), make("div", { class: "row" },
    ...judgement.places.map((_, i) =>
      radio(`place-${answer}`, i + 1, String(i + 1), "", () => act.rank(answer, i + 1)))));
const ratingChoices = ({ say, act }, { attributes, scale }, answer) =>
  attributes.length === 0 ? null : make("fieldset", {}, make("legend", { text: say("attributes") }),
    make("div", { class: "row" }, ...attributes.map((name) => make("label", {}, `${name} `,
      make("select", { "data-rating": `${answer} ${name}`,
        onchange: (event) => act.rate(answer, name, Number(event.target.value)) },
        make("option", { value: "", text: "–" }),
        ...Array.from({ length: scale }, (_, i) => make("option", { value: i + 1, text: i + 1 })))))));
const field = ({ say, act }, name, shortcut, most) =>
  make("p", {}, make("label", { for: `align-${name}` }, say(name), " ", key(shortcut)),
    make("textarea", { id: `align-${name}`, rows: 2, maxlength: most, dir: "auto",
      oninput: (event) => act.write(name, event.target.value) }));

// Answers as chips that are dragged, by mouse or finger, onto places; two on one place are a tie.
const strip = ({ say }, answers) =>
  make("div", { class: "strip", "aria-hidden": "true" }, ...[null, ...answers.keys()].map((i) =>
    make("div", { class: "place", "data-place": i === null ? "" : i + 1 },
      make("span", { class: "soft", text: i === null ? say("drag") : i + 1 }))));
function chip({ act }, answer) {
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
      if (there && up.type === "pointerup") act.rank(answer, Number(there.dataset.place) || null);
    };
  });
  return it;
}

// Brings the form in line with the judgement.
export function reflect(ui, judgement) {
  const { root } = ui, { places, strength, quality, flagged, ratings } = judgement;
  const all = (selector) => root.querySelectorAll(selector);
  const press = (element, on) => element.setAttribute("aria-pressed", String(on));
  for (const input of all("input[name=strength]")) input.checked = strength === Number(input.value) && !quality;
  places.forEach((place, answer) => {
    for (const input of all(`input[name=place-${answer}]`)) input.checked = place === Number(input.value);
  });
  for (const place of all(".place")) {
    const here = answersAt(judgement, Number(place.dataset.place) || null).map((answer) => chip(ui, answer));
    place.replaceChildren(place.firstElementChild, ...here);
  }
  for (const element of all("[data-quality]")) press(element, quality === element.dataset.quality);
  for (const element of all("[data-flag]")) press(element, flagged.includes(Number(element.dataset.flag)));
  for (const name of ["rationale", "demonstration"]) root.querySelector(`#align-${name}`).value = judgement[name];
  for (const select of all("[data-rating]")) {
    const [answer, ...name] = select.dataset.rating.split(" ");
    select.value = ratings[answer]?.[name.join(" ")] ?? "";
  }
}

// What somebody wrote: an element that `fillTexts` fills by one of its two readings.
const textOf = ({ html, written }, more = "") =>
  Object.assign(make("div", { class: `text ${more}`, dir: "auto" }), { readings: { html, written } });

// Fills the texts, as Markdown or as they were written.
export function fillTexts(ui, asWritten) {
  ui.root.querySelector("[data-written]").setAttribute("aria-pressed", String(asWritten));
  for (const text of textsIn(ui)) text.innerHTML = text.readings[asWritten ? "written" : "html"];
  fitTexts(ui);
}
const textsIn = ({ root }) => [...root.querySelectorAll(".text")].filter(({ readings }) => readings);

// Only in the page is it known how much room a text takes. What is wider than its place would be cut off, and is shown
// as it was written, which wraps everywhere; long answers get a button that shows all of them.
export function fitTexts(ui) {
  for (const text of textsIn(ui)) if (text.scrollWidth > text.clientWidth) text.innerHTML = text.readings.written;
  for (const text of ui.root.querySelectorAll(".foldable.fold")) {
    const toggle = text.parentElement.querySelector(".unfold"), long = text.scrollHeight > text.clientHeight + 8;
    if (long && !toggle) text.after(unfoldButton(ui, text));
    if (!long) toggle?.remove();
  }
}
const unfoldButton = ({ say }, text) => make("button", { type: "button", class: "unfold", text: say("unfold"),
  onclick: ({ currentTarget }) => {
    currentTarget.textContent = say(text.classList.toggle("fold") ? "unfold" : "fold");
  } });
export function unblur({ root }) {
  for (const answer of root.querySelectorAll(".blurred")) answer.classList.remove("blurred");
  for (const button of root.querySelectorAll(".unblur")) button.remove();
}
