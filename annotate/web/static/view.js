// Draws the ranking page. `page`, the state of `rank.js`, is only read here; user actions are passed to `ui.act`.

import { LETTERS, key, make } from "./elements.js";
import { PROMPT, answersAt, isPair } from "./judgement.js";

// Draws the page with an item, or with the reason why there is none.
export function drawPage(ui, page) {
  const { getText } = ui, { step } = page;
  return [drawHeader(ui, page), step.task ? drawForm(ui, page)
    : make("p", { text: getText(`idle_${page.reviewing ? "reviewed" : step.idle}`) })];
}

function drawHeader(ui, page) {
  const { getText, button, act } = ui, { step } = page, { own_votes, quota, votes, votes_wanted } = step.progress;
  const progress = getText("progress", { own_votes, quota: quota ? `/${quota}` : "", votes, votes_wanted });
  const count = page.outbox.refused().length;
  return make("header", {},
    make("h1", { text: page.project.title }),
    make("span", { class: "row" }, make("progress", { max: Math.max(votes_wanted, 1), value: votes, "aria-label": progress }),
      make("span", { class: "soft", text: progress })),
    make("span", { class: "row" }, button(getText("undo"), "u", act.undo, { disabled: !page.votes.length }),
      step.task ? button(getText("as_written"), "v", act.readAsWritten, { "data-written": "" }) : null,
      button(getText("guidelines"), "h", act.showGuidelines), button(getText("help"), "?", act.showHelp),
      count ? make("button", { type: "button", text: getText("not_sent", { count }), onclick: act.showRefused })
        : null),
    drawPerson(ui, page));
}

// Draws the visitor's name and links; without accounts, only links between pages.
function drawPerson({ getText, act }, { home, project, reviewing }) {
  const link = (href, textName) => make("a", { href, text: getText(textName) });
  const name = encodeURIComponent(project?.name ?? "");
  return make("span", { class: "row" }, home.manages ? link("/manage/", "manage") : null,
    project?.reviews && !reviewing ? link(`/?project=${name}&review`, "review") : null,
    reviewing ? link(`/?project=${name}`, "to_items") : null,
    home.projects.length > 1 ? link("/?project=", "projects") : null,
    home.accounts ? make("span", { class: "soft", text: home.person }) : null,
    home.accounts ? link("/password", "change_password") : null,
    home.accounts ? make("form", { method: "post", action: "/logout", onsubmit: act.forgetDraft },
      make("button", { type: "submit", text: getText("log_out") })) : null);
}

// Draws the choice of projects, if the address names none or an unknown one (`requestedName`).
export function drawChoice(ui, page, requestedName) {
  const { getText } = ui, { projects } = page.home;
  return [
    make("header", {}, make("h1", { text: getText("projects") }), drawPerson(ui, page)),
    requestedName ? make("p", { class: "warn", role: "alert",
      text: getText("no_such_project", { project: requestedName }) }) : null,
    projects.length ? make("ul", {}, ...projects.map(({ name, title }) =>
      make("li", {}, make("a", { href: `/?project=${encodeURIComponent(name)}`, text: title }))))
      : make("p", { text: getText("no_projects") }),
  ].filter(Boolean);
}

function drawForm(ui, page) {
  const { getText, button, act } = ui, { prompt, answers, others } = page.step.task, pair = isPair(page.judgement);
  return make("form", { onsubmit: (event) => { event.preventDefault(); act.send(); } },
    make("section", { class: "prompt", "aria-label": getText("prompt") }, ...prompt.map((turn) =>
      make("div", {}, make("strong", { text: getText(`role_${turn.role}`) }), makeText(turn)))),
    others ? drawOpinions(ui, others) : null,
    make("section", { class: "answers", "data-count": answers.length, "aria-label": getText("answers") },
      ...answers.map((answer, i) => drawCard(ui, page, answer, i))),
    pair ? drawStrengthChoice(ui) : drawPlaces(ui, answers),
    make("div", { class: "row" },
      button(getText(pair ? "both_good" : "good"), "g", () => act.judgeAll("good"), { "data-quality": "good" }),
      button(getText(pair ? "both_bad" : "bad"), "b", () => act.judgeAll("bad"), { "data-quality": "bad" }),
      button(getText("flag_prompt"), "p", () => act.flag(PROMPT), { "data-flag": PROMPT }),
      button(getText("difference_key"), "d", act.showDifference), button(getText("skip"), "s", act.askWhy)),
    drawField(ui, "rationale", "r", 20000), drawField(ui, "demonstration", "w", 100000),
    make("p", {}, make("button", { type: "submit", class: "main" }, getText("send"), key("Enter"))));
}

// Draws the annotators' votes for a reviewer: rankings such as "A = C > B", ratings, flags, rationales, own answers.
const drawOpinions = (ui, votes) => make("section", { class: "prompt", "aria-label": ui.getText("others") },
  make("h2", { text: ui.getText("others") }), ...votes.map((vote) => drawOpinion(ui, vote)));
function drawOpinion({ getText }, vote) {
  const order = vote.tiers.map((tier) => tier.map((answer) => LETTERS[answer]).sort().join(" = ")).join(" > ");
  const ratings = Object.entries(vote.ratings).sort().map(([answer, marks]) =>
    `${LETTERS[answer]}: ${Object.entries(marks).map(([name, mark]) => `${name} ${mark}`).join(", ")}`);
  const flags = vote.flagged.map((answer) =>
    (answer === PROMPT ? getText("flag_prompt") : `${LETTERS[answer]}: ${getText("flag")}`));
  const ranking = vote.skipped ? `${getText("skip")}: ${getText(`skip_${vote.skipped}`)}`
    : `${order}${vote.strength ? ` (${vote.strength})` : ""}`;
  const details = [vote.quality && getText(vote.quality), ...ratings, ...flags].filter(Boolean).join("; ");
  return make("div", {}, make("strong", { text: `${ranking} ` }), make("span", { class: "soft", text: vote.who }),
    details && make("p", { text: details }), vote.rationale && makeText(vote.rationale),
    vote.demonstration && make("strong", { text: getText("own_answer") }),
    vote.demonstration && makeText(vote.demonstration));
}

function drawCard(ui, { project, judgement }, content, answer) {
  const { getText, button, act } = ui, { empty, cut } = content, name = getText("answer", { letter: LETTERS[answer] });
  return make("section", {
    class: `answer${project.blurred ? " blurred" : ""}`, tabindex: "-1", "data-answer": answer, "aria-label": name,
    onfocusin: () => act.noteFocus(answer),
  },
    make("div", { class: "row" }, make("h2", { text: name }),
      button(getText("flag"), "f", () => act.flag(answer), { "data-flag": answer })),
    project.blurred ? button(getText("show"), "x", act.unblur, { class: "unblur" }) : null,
    empty ? make("p", { class: "soft", text: getText("empty_answer") })
      : makeText(content, "foldable fold"),
    cut ? make("p", { class: "soft", text: getText("cut") }) : null,
    isPair(judgement) ? null : drawPlaceChoice(ui, judgement, answer), drawRatingChoices(ui, project, answer));
}

const makeRadio = (name, value, label, shortcut, act) =>
  make("label", { class: "choice" }, make("input", { type: "radio", name, value, onchange: act }),
    make("span", {}, label, shortcut ? key(shortcut) : null));
const drawStrengthChoice = ({ getText, act }) =>
  make("fieldset", {}, make("legend", { text: getText("preference") }), make("div", { class: "row strengths" },
    ...[-3, -2, -1, 0, 1, 2, 3].map((value) =>
      makeRadio("strength", value, getText(`strength_${value}`), String(value + 4), () => act.prefer(value)))));
const drawPlaceChoice = ({ getText, act }, judgement, answer) =>
  make("fieldset", {}, make("legend", { text: getText("place") }), make("div", { class: "row" },
    ...judgement.places.map((_, i) =>
      makeRadio(`place-${answer}`, i + 1, String(i + 1), "", () => act.rank(answer, i + 1)))));
const drawRatingChoices = ({ getText, act }, { attributes, scale }, answer) =>
  attributes.length === 0 ? null : make("fieldset", {}, make("legend", { text: getText("attributes") }),
    make("div", { class: "row" }, ...attributes.map((name) => make("label", {}, `${name} `,
      make("select", { "data-rating": `${answer} ${name}`,
        onchange: (event) => act.rate(answer, name, Number(event.target.value)) },
        make("option", { value: "", text: "–" }),
        ...Array.from({ length: scale }, (_, i) => make("option", { value: i + 1, text: i + 1 })))))));
const drawField = ({ getText, act }, name, shortcut, maxLength) =>
  make("p", {}, make("label", { for: `align-${name}` }, getText(name), " ", key(shortcut)),
    make("textarea", { id: `align-${name}`, rows: 2, maxlength: maxLength, dir: "auto",
      oninput: (event) => act.write(name, event.target.value) }));

// Draws the places onto which answers are dragged as chips, by mouse or finger; two on one place are a tie.
const drawPlaces = ({ getText }, answers) =>
  make("div", { class: "strip", "aria-hidden": "true" }, ...[null, ...answers.keys()].map((i) =>
    make("div", { class: "place", "data-place": i === null ? "" : i + 1 },
      make("span", { class: "soft", text: i === null ? getText("drag") : i + 1 }))));
function makeChip({ act }, answer) {
  const element = make("span", { class: "chip", "data-chip": answer, text: LETTERS[answer] });
  element.addEventListener("pointerdown", (down) => {
    element.setPointerCapture(down.pointerId);
    element.onpointermove = (move) => {
      element.style.translate = `${move.clientX - down.clientX}px ${move.clientY - down.clientY}px`;
    };
    element.onpointerup = element.onpointercancel = (up) => {
      element.onpointermove = element.onpointerup = element.onpointercancel = null;
      element.style.translate = "";
      const place = document.elementsFromPoint(up.clientX, up.clientY).find((e) => e.matches(".place"));
      if (place && up.type === "pointerup") act.rank(answer, Number(place.dataset.place) || null);
    };
  });
  return element;
}

// Updates the form to show the judgement.
export function updateForm(ui, judgement) {
  const { root } = ui, { places, strength, quality, flagged, ratings } = judgement;
  const all = (selector) => root.querySelectorAll(selector);
  const press = (element, on) => element.setAttribute("aria-pressed", String(on));
  for (const input of all("input[name=strength]")) input.checked = strength === Number(input.value) && !quality;
  places.forEach((place, answer) => {
    for (const input of all(`input[name=place-${answer}]`)) input.checked = place === Number(input.value);
  });
  for (const place of all(".place")) {
    const chips = answersAt(judgement, Number(place.dataset.place) || null).map((answer) => makeChip(ui, answer));
    place.replaceChildren(place.firstElementChild, ...chips);
  }
  for (const element of all("[data-quality]")) press(element, quality === element.dataset.quality);
  for (const element of all("[data-flag]")) press(element, flagged.includes(Number(element.dataset.flag)));
  for (const name of ["rationale", "demonstration"]) root.querySelector(`#align-${name}`).value = judgement[name];
  for (const select of all("[data-rating]")) {
    const [answer, ...name] = select.dataset.rating.split(" ");
    select.value = ratings[answer]?.[name.join(" ")] ?? "";
  }
}

// Creates an element for a text, which `fillTexts` fills with one of its two readings.
const makeText = ({ html, written }, extraClass = "") =>
  Object.assign(make("div", { class: `text ${extraClass}`, dir: "auto" }), { readings: { html, written } });

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
    const toggle = text.parentElement.querySelector(".unfold"), long = text.scrollHeight > text.clientHeight + 8;
    if (long && !toggle) text.after(makeUnfoldButton(ui, text));
    if (!long) toggle?.remove();
  }
}
const makeUnfoldButton = ({ getText }, text) => make("button", { type: "button", class: "unfold", text: getText("unfold"),
  onclick: ({ currentTarget }) => {
    currentTarget.textContent = getText(text.classList.toggle("fold") ? "unfold" : "fold");
  } });
export function unblur({ root }) {
  for (const answer of root.querySelectorAll(".blurred")) answer.classList.remove("blurred");
  for (const button of root.querySelectorAll(".unblur")) button.remove();
}
