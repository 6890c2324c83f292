// Draws the ranking page. `page`, the state of `rank.js`, is only read here; user actions are passed to `ui.actions`.

import { LETTERS, createElement, createKeyHint } from "./elements.js";
import { PROMPT, findAnswersAt, isPair } from "./judgement.js";

// Draws the page with an item, or with the reason why there is none.
export function drawPage(ui, page) {
  const { getText } = ui, { step } = page;
  return [drawHeader(ui, page), step.task ? drawForm(ui, page)
    : createElement("p", { text: getText(`idle_${page.reviewing ? "reviewed" : step.idle}`) })];
}

function drawHeader(ui, page) {
  const { getText, button, actions } = ui, { step } = page, { own_votes, quota, votes, votes_wanted } = step.progress;
  const progress = getText("progress", { own_votes, quota: quota ? `/${quota}` : "", votes, votes_wanted });
  const count = page.outbox.readRefused().length;
  return createElement("header", {},
    createElement("h1", { text: page.project.title }),
    createElement("span", { class: "row" },
      createElement("progress", { max: Math.max(votes_wanted, 1), value: votes, "aria-label": progress }),
      createElement("span", { class: "soft", text: progress })),
    createElement("span", { class: "row" }, button(getText("undo"), "u", actions.undo, { disabled: !page.votes.length }),
      step.task ? button(getText("as_written"), "v", actions.toggleAsWritten, { "data-written": "" }) : null,
      button(getText("guidelines"), "h", actions.showGuidelines), button(getText("help"), "?", actions.showHelp),
      count
        ? createElement("button", { type: "button", text: getText("not_sent", { count }), onclick: actions.showRefused })
        : null),
    drawPerson(ui, page));
}

// Draws the visitor's name and links; without accounts, only links between pages.
function drawPerson({ getText, actions }, { home, project, reviewing }) {
  const link = (href, textName) => createElement("a", { href, text: getText(textName) });
  const name = encodeURIComponent(project?.name ?? "");
  return createElement("span", { class: "row" }, home.manages ? link("/manage/", "manage") : null,
    project?.reviews && !reviewing ? link(`/?project=${name}&review`, "review") : null,
    reviewing ? link(`/?project=${name}`, "to_items") : null,
    home.projects.length > 1 ? link("/?project=", "projects") : null,
    home.accounts ? createElement("span", { class: "soft", text: home.person }) : null,
    home.accounts ? link("/password", "change_password") : null,
    home.accounts ? createElement("form", { method: "post", action: "/logout", onsubmit: actions.forgetDraft },
      createElement("button", { type: "submit", text: getText("log_out") })) : null);
}

// Draws the choice of projects, if the address names none or an unknown one (`requestedName`).
export function drawChoice(ui, page, requestedName) {
  const { getText } = ui, { projects } = page.home;
  return [
    createElement("header", {}, createElement("h1", { text: getText("projects") }), drawPerson(ui, page)),
    requestedName ? createElement("p", { class: "warn", role: "alert",
      text: getText("no_such_project", { project: requestedName }) }) : null,
    projects.length ? createElement("ul", {}, ...projects.map(({ name, title }) =>
      createElement("li", {}, createElement("a", { href: `/?project=${encodeURIComponent(name)}`, text: title }))))
      : createElement("p", { text: getText("no_projects") }),
  ].filter(Boolean);
}

function drawForm(ui, page) {
  const { getText, button, actions } = ui, { prompt, answers, others } = page.step.task, pair = isPair(page.judgement);
  return createElement("form", { onsubmit: (event) => { event.preventDefault(); actions.send(); } },
    createElement("section", { class: "prompt", "aria-label": getText("prompt") }, ...prompt.map((turn) =>
      createElement("div", {}, createElement("strong", { text: getText(`role_${turn.role}`) }), createText(turn)))),
    others ? drawOpinions(ui, others) : null,
    createElement("section", { class: "answers", "data-count": answers.length, "aria-label": getText("answers") },
      ...answers.map((answer, i) => drawCard(ui, page, answer, i))),
    pair ? drawStrengthChoice(ui) : drawPlaces(ui, answers),
    createElement("div", { class: "row" },
      button(getText(pair ? "both_good" : "good"), "g", () => actions.judgeAll("good"), { "data-quality": "good" }),
      button(getText(pair ? "both_bad" : "bad"), "b", () => actions.judgeAll("bad"), { "data-quality": "bad" }),
      button(getText("flag_prompt"), "p", () => actions.toggleFlag(PROMPT), { "data-flag": PROMPT }),
      button(getText("difference_key"), "d", actions.showDifference),
      button(getText("skip"), "s", actions.askSkipReason)),
    drawField(ui, "rationale", "r", 20000), drawField(ui, "demonstration", "w", 100000),
    createElement("p", {},
      createElement("button", { type: "submit", class: "main" }, getText("send"), createKeyHint("Enter"))));
}

// Draws the annotators' votes for a reviewer: rankings such as "A = C > B", ratings, flags, rationales, own answers.
const drawOpinions = (ui, votes) => createElement("section", { class: "prompt", "aria-label": ui.getText("others") },
  createElement("h2", { text: ui.getText("others") }), ...votes.map((vote) => drawOpinion(ui, vote)));
function drawOpinion({ getText }, vote) {
  const order = vote.tiers.map((tier) => tier.map((answer) => LETTERS[answer]).sort().join(" = ")).join(" > ");
  const ratings = Object.entries(vote.ratings).sort().map(([answer, marks]) =>
    `${LETTERS[answer]}: ${Object.entries(marks).map(([name, mark]) => `${name} ${mark}`).join(", ")}`);
  const flags = vote.flagged.map((answer) =>
    (answer === PROMPT ? getText("flag_prompt") : `${LETTERS[answer]}: ${getText("flag")}`));
  const ranking = vote.skipped ? `${getText("skip")}: ${getText(`skip_${vote.skipped}`)}`
    : `${order}${vote.strength ? ` (${vote.strength})` : ""}`;
  const details = [vote.quality && getText(vote.quality), ...ratings, ...flags].filter(Boolean).join("; ");
  return createElement("div", {},
    createElement("strong", { text: `${ranking} ` }), createElement("span", { class: "soft", text: vote.who }),
    details && createElement("p", { text: details }), vote.rationale && createText(vote.rationale),
    vote.demonstration && createElement("strong", { text: getText("own_answer") }),
    vote.demonstration && createText(vote.demonstration));
}

function drawCard(ui, { project, judgement }, content, answer) {
  const { getText, button, actions } = ui, { empty, cut } = content;
  const name = getText("answer", { letter: LETTERS[answer] });
  return createElement("section", {
    class: `answer${project.blurred ? " blurred" : ""}`, tabindex: "-1", "data-answer": answer, "aria-label": name,
    onfocusin: () => actions.noteFocus(answer),
  },
    createElement("div", { class: "row" }, createElement("h2", { text: name }),
      button(getText("flag"), "f", () => actions.toggleFlag(answer), { "data-flag": answer })),
    project.blurred ? button(getText("show"), "x", actions.unblur, { class: "unblur" }) : null,
    empty ? createElement("p", { class: "soft", text: getText("empty_answer") })
      : createText(content, "foldable fold"),
    cut ? createElement("p", { class: "soft", text: getText("cut") }) : null,
    isPair(judgement) ? null : drawPlaceChoice(ui, judgement, answer), drawRatingChoices(ui, project, answer));
}

const createRadio = (name, value, label, shortcut, onSelect) =>
  createElement("label", { class: "choice" }, createElement("input", { type: "radio", name, value, onchange: onSelect }),
    createElement("span", {}, label, shortcut ? createKeyHint(shortcut) : null));
const drawStrengthChoice = ({ getText, actions }) =>
  createElement("fieldset", {}, createElement("legend", { text: getText("preference") }),
    createElement("div", { class: "row strengths" },
    ...[-3, -2, -1, 0, 1, 2, 3].map((value) =>
      createRadio("strength", value, getText(`strength_${value}`), String(value + 4), () => actions.prefer(value)))));
const drawPlaceChoice = ({ getText, actions }, judgement, answer) =>
  createElement("fieldset", {}, createElement("legend", { text: getText("place") }),
    createElement("div", { class: "row" },
    ...judgement.places.map((_, i) =>
      createRadio(`place-${answer}`, i + 1, String(i + 1), "", () => actions.rank(answer, i + 1)))));
const drawRatingChoices = ({ getText, actions }, { attributes, scale }, answer) =>
  attributes.length === 0 ? null : createElement("fieldset", {},
    createElement("legend", { text: getText("attributes") }),
    createElement("div", { class: "row" }, ...attributes.map((name) => createElement("label", {}, `${name} `,
      createElement("select", { "data-rating": `${answer} ${name}`,
        onchange: (event) => actions.rate(answer, name, Number(event.target.value)) },
        createElement("option", { value: "", text: "–" }),
        ...Array.from({ length: scale }, (_, i) => createElement("option", { value: i + 1, text: i + 1 })))))));
const drawField = ({ getText, actions }, name, shortcut, maxLength) =>
  createElement("p", {}, createElement("label", { for: `align-${name}` }, getText(name), " ", createKeyHint(shortcut)),
    createElement("textarea", { id: `align-${name}`, rows: 2, maxlength: maxLength, dir: "auto",
      oninput: (event) => actions.setText(name, event.target.value) }));

// Draws the places onto which answers are dragged as chips, by mouse or finger; two on one place are a tie.
const drawPlaces = ({ getText }, answers) =>
  createElement("div", { class: "strip", "aria-hidden": "true" }, ...[null, ...answers.keys()].map((i) =>
    createElement("div", { class: "place", "data-place": i === null ? "" : i + 1 },
      createElement("span", { class: "soft", text: i === null ? getText("drag") : i + 1 }))));
function createChip({ actions }, answer) {
  const element = createElement("span", { class: "chip", "data-chip": answer, text: LETTERS[answer] });
  element.addEventListener("pointerdown", (down) => {
    element.setPointerCapture(down.pointerId);
    element.onpointermove = (move) => {
      element.style.translate = `${move.clientX - down.clientX}px ${move.clientY - down.clientY}px`;
    };
    element.onpointerup = element.onpointercancel = (up) => {
      element.onpointermove = element.onpointerup = element.onpointercancel = null;
      element.style.translate = "";
      const place = document.elementsFromPoint(up.clientX, up.clientY).find((e) => e.matches(".place"));
      if (place && up.type === "pointerup") actions.rank(answer, Number(place.dataset.place) || null);
    };
  });
  return element;
}

// Updates the form to show the judgement.
export function updateForm(ui, judgement) {
  const { root } = ui, { places, strength, quality, flagged, ratings } = judgement;
  const findAll = (selector) => root.querySelectorAll(selector);
  const setPressed = (element, isPressed) => element.setAttribute("aria-pressed", String(isPressed));
  for (const input of findAll("input[name=strength]")) input.checked = strength === Number(input.value) && !quality;
  places.forEach((place, answer) => {
    for (const input of findAll(`input[name=place-${answer}]`)) input.checked = place === Number(input.value);
  });
  for (const place of findAll(".place")) {
    const chips = findAnswersAt(judgement, Number(place.dataset.place) || null).map((answer) => createChip(ui, answer));
    place.replaceChildren(place.firstElementChild, ...chips);
  }
  for (const element of findAll("[data-quality]")) setPressed(element, quality === element.dataset.quality);
  for (const element of findAll("[data-flag]")) setPressed(element, flagged.includes(Number(element.dataset.flag)));
  for (const name of ["rationale", "demonstration"]) root.querySelector(`#align-${name}`).value = judgement[name];
  for (const select of findAll("[data-rating]")) {
    const [answer, ...name] = select.dataset.rating.split(" ");
    select.value = ratings[answer]?.[name.join(" ")] ?? "";
  }
}

// Creates an element for a text, which `fillTexts` fills with one of its two readings.
const createText = ({ html, written }, extraClass = "") =>
  Object.assign(createElement("div", { class: `text ${extraClass}`, dir: "auto" }), { readings: { html, written } });

// Shows all texts as rendered Markdown or as written.
export function fillTexts(ui, asWritten) {
  ui.root.querySelector("[data-written]").setAttribute("aria-pressed", String(asWritten));
  for (const text of findTexts(ui)) text.innerHTML = text.readings[asWritten ? "written" : "html"];
  fitTexts(ui);
}
const findTexts = ({ root }) => [...root.querySelectorAll(".text")].filter(({ readings }) => readings);

// Adapts texts to their size on the page. A text wider than its place would be cut off, and is shown as written
// instead, which wraps everywhere. Long answers get a button that unfolds them.
export function fitTexts(ui) {
  for (const text of findTexts(ui)) if (text.scrollWidth > text.clientWidth) text.innerHTML = text.readings.written;
  for (const text of ui.root.querySelectorAll(".foldable.fold")) {
    const toggle = text.parentElement.querySelector(".unfold"), isLong = text.scrollHeight > text.clientHeight + 8;
    if (isLong && !toggle) text.after(createUnfoldButton(ui, text));
    if (!isLong) toggle?.remove();
  }
}
const createUnfoldButton = ({ getText }, text) => createElement("button", {
  type: "button", class: "unfold", text: getText("unfold"),
  onclick: ({ currentTarget }) => {
    currentTarget.textContent = getText(text.classList.toggle("fold") ? "unfold" : "fold");
  } });
export function unblur({ root }) {
  for (const answer of root.querySelectorAll(".blurred")) answer.classList.remove("blurred");
  for (const button of root.querySelectorAll(".unblur")) button.remove();
}
