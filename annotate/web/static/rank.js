// The ranking page: shows an item, sends its judgement, and shows the next item. The server has the authoritative
// state; the page keeps votes and drafts that the server has not acknowledged yet, and sends them until it has.

import * as dialogs from "./dialogs.js";
import { createButtonMaker, createElement, createStatus, createTextLookup } from "./elements.js";
import * as judgements from "./judgement.js";
import { areLettersKeys, findCommand } from "./keys.js";
import { createDraftSaver, createOutbox, deliverVotes } from "./outbox.js";
import { readChoice, saveChoice } from "./choices.js";
import { createServer, describeTrouble, isConnectionLost, waitForRetry } from "./server.js";
import * as view from "./view.js";

const RENEW_MS = 30000;
const AWAY_MS = 600000;  // time without activity after which the page stops renewing its lease

const page = {
  reviewing: new URLSearchParams(location.search).has("review"),  // deciding contested items
  home: null,  // the visitor and their projects
  project: null,
  guidelines: null,  // those of the item on the screen; null if there are none
  knownGuidelines: null,  // the version that the annotator saw last
  step: null,  // the item on the screen, or the reason why there is none
  judgement: null,
  votes: [],  // seqs of the votes that can be undone
  outbox: null, drafts: null,
  asWritten: false,  // whether texts are shown as written, not as Markdown
  focused: 0, displayedAt: 0, activeAt: 0,
  busy: false,
};

const root = await waitForElement("align-app");
const body = createElement("div");
const status = createStatus();
const texts = {};
const getText = createTextLookup(texts);
const server = createServer({
  projectId: () => page.project?.id ?? "",
  onSlow: () => { if (page.home) reportTrouble(new Error("slow")); },
  onRecovered: status.clearTrouble,
});
const actions = {
  prefer: (strength) => changeJudgement(judgements.prefer(page.judgement, strength)),
  rank: (answer, place) => changeJudgement(judgements.rank(page.judgement, answer, place)),
  // Ranking by digit keys moves the focus on; ranking by mouse or by the arrow keys of a radio group does not.
  rankNext(answer, place) {
    actions.rank(answer, place);
    focusAnswer(judgements.findNextAnswer(page.judgement, answer));
  },
  judgeAll: (quality) => changeJudgement(judgements.judgeAll(page.judgement, quality)),
  toggleFlag: (answer) => changeJudgement(judgements.toggleFlag(page.judgement, answer)),
  rate: (answer, attribute, mark) => changeJudgement(judgements.rate(page.judgement, answer, attribute, mark), false),
  setText: (field, text) => changeJudgement(judgements.setText(page.judgement, field, text), false),
  send, skip: (reason) => submitJudgement(judgements.toSkip(page.judgement, reason, measureSeconds())), undo,
  focus: focusAnswer, noteFocus: (answer) => { page.focused = answer; },
  focusField: (field) => root.querySelector(`#align-${field}`).focus(),
  unblur: () => view.unblur(ui),
  toggleAsWritten() {
    page.asWritten = !page.asWritten;
    saveChoice(window, "texts", page.asWritten ? "written" : "markdown");
    view.fillTexts(ui, page.asWritten);
  },
  pressDialogButton: (digit) => dialogs.findOpenDialog(root)?.querySelector(`[data-digit="${digit}"]`)?.click(),
  doNothing: () => undefined,
  showGuidelines: () => dialogs.showGuidelines(ui, page.guidelines),
  showHelp: () => dialogs.showHelp(ui),
  showRefused: () => dialogs.showRefused(ui, page.outbox.readRefused()),
  showDifference, askSkipReason: () => dialogs.askSkipReason(ui),
  forgetRefused() { page.outbox.removeRefused(); dialogs.findOpenDialog(root).close(); showStep(page.step); },
  // At logout the draft is removed from the browser, which others may use. The server has it; unsent votes stay.
  forgetDraft: () => page.outbox?.removeDraft(),
};
// After a click by mouse, an answer gets the focus, so that Enter sends the vote instead of pressing the button again.
const ui = { root, getText, actions, button: createButtonMaker((answer) => {
  if (page.step?.task && !page.busy && !dialogs.findOpenDialog(root)) focusAnswer(Number(answer ?? page.focused), false);
}) };

async function waitForElement(id) {
  for (;;) {
    const element = document.getElementById(id);
    if (element) return element;
    await new Promise((resolve) => requestAnimationFrame(resolve));
  }
}

// Status line

function reportTrouble(error) {
  const [textName, values] = describeTrouble(error);
  const logIn = textName === "locked_out" && page.home?.accounts
    ? [" ", createElement("a", { href: "/login", target: "_blank", text: getText("log_in") })] : [];
  status.showTrouble(getText(textName, values), ...logIn);
}
// Shows whether the annotator still has the item on the screen, has judged it in another window, or has lost the lease.
function reportLease({ kept, judged }, defaultText = "") {
  if (judged) status.show(getText("judged_elsewhere"), true);
  else if (!kept) status.show(getText("late"), true);
  else if (defaultText) status.show(defaultText);
}
const reportRefused = (error) => status.show(getText("refused", { problem: error.message }), true);

// From item to item

// Sends waiting votes and shows the next item. Retries until the server responds.
async function deliverAndShowNext() {
  setBusy(true);
  for (;;) {
    try {
      let next = await deliverVotes(page.outbox, server.request, {
        onSending: () => status.show(getText("saving")),
        onAccepted: (seq) => { saveUndoableVotes([...page.votes, seq]); status.show(getText("saved")); },
        onRefused: (error) => (error.status === 409 ? status.show(getText("elsewhere"), true) : reportRefused(error)),
        onLost: reportTrouble,
      });
      // A waiting vote may come from a page of the other mode; its response then includes the next item of that mode.
      if (next?.terms?.mode !== (page.reviewing ? "review" : "work"))
        next = await server.request(page.reviewing ? "review" : "task");
      await loadGuidelines(next);
      showStep(next);
      announceGuidelines();
      break;
    } catch (error) {
      if (!isConnectionLost(error)) { reportRefused(error); break; }
      reportTrouble(error);
      await waitForRetry();
    }
  }
  setBusy(false);
}
// Loads the guidelines of a step before it is shown, because a vote names the guidelines that its author saw.
async function loadGuidelines({ progress, terms }) {
  if (!progress || !terms) throw new Error("that was not the server's answer");
  if ((page.guidelines?.version ?? null) !== (terms.guidelines ?? null))
    page.guidelines = terms.guidelines === null ? null : await server.request(`guidelines?version=${terms.guidelines}`);
}
// Shows guidelines that the annotator has not seen yet. The time for the item starts when the dialog is closed.
function announceGuidelines() {
  const { guidelines, knownGuidelines } = page;
  if (!page.step.task || !guidelines || guidelines.version === knownGuidelines) return;
  dialogs.showGuidelines(ui, guidelines, getText(knownGuidelines === null ? "guidelines" : "new_guidelines"));
  dialogs.findOpenDialog(root).addEventListener("close", () => {
    page.displayedAt = performance.now();
    focusAnswer(page.focused, false);
  });
  page.knownGuidelines = guidelines.version;
}

function showStep(next) {
  page.step = next;
  page.project = { ...page.project, ...next.asked };
  status.clearTrouble();
  const { task } = next;
  const localDraft = page.outbox.readDraft();  // newer than the server's if the connection was lost
  page.judgement = task && judgements.fromDraft(
    localDraft?.token === task.token ? localDraft.draft : task.draft, task.answers.length, page.project);
  for (const dialog of root.querySelectorAll("dialog")) dialog.remove();
  page.focused = 0;
  page.displayedAt = performance.now();
  body.replaceChildren(...view.drawPage(ui, page));
  if (!task) return;
  view.updateForm(ui, page.judgement);
  view.fillTexts(ui, page.asWritten);
  focusAnswer(0, false);
}

function setBusy(isBusy) {
  page.busy = body.inert = isBusy;
  if (!isBusy && page.step?.task) focusAnswer(page.focused, false);
}
function focusAnswer(answer, isScrolled = true) {
  const { length } = page.judgement.places;
  page.focused = (answer + length) % length;
  root.querySelector(`[data-answer="${page.focused}"]`)?.focus({ preventScroll: !isScrolled });
}

// Actions

function changeJudgement(judgement, isRedrawn = true) {
  page.judgement = judgement;
  if (isRedrawn) view.updateForm(ui, judgement);
  const draft = { token: page.step.task.token, draft: judgements.toDraft(judgement) };
  if (!page.outbox.saveDraft(draft)) status.show(getText("no_room"), true);
  page.drafts.saveLater();
}
const measureSeconds = () => judgements.toSeconds(performance.now() - page.displayedAt);
function saveUndoableVotes(votes) {
  page.votes = votes;
  page.outbox.saveVotes(votes);
}

function send() {
  if (judgements.isComplete(page.judgement)) submitJudgement(judgements.toVote(page.judgement, measureSeconds()));
  else status.show(getText("send_hint"), true);
}
function submitJudgement(judgement) {
  const { task, terms } = page.step;
  if (page.busy || !task) return;
  page.drafts.cancel();
  page.outbox.addVote({ token: task.token, key: createRandomKey(), terms, said: judgement });
  page.outbox.removeDraft();
  dialogs.findOpenDialog(root)?.close();
  deliverAndShowNext();
}
const createRandomKey = () =>
  Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");

async function undo() {
  if (page.busy || !page.votes.length) return;
  setBusy(true);
  await page.drafts.save();
  const earlierVotes = page.votes.slice(0, -1);
  try {
    const previous = await server.request("undo", { seq: page.votes.at(-1) });
    await loadGuidelines(previous);
    saveUndoableVotes(earlierVotes);
    page.outbox.removeDraft();
    showStep(previous);
    status.show(getText("undone"));
    announceGuidelines();
  } catch (error) {
    if (isConnectionLost(error)) reportTrouble(error);
    else {
      saveUndoableVotes(earlierVotes);  // it can no longer be undone
      reportRefused(error);
    }
  }
  setBusy(false);
}

async function showDifference() {
  const { token, answers } = page.step.task;
  const [a, b] = [page.focused, (page.focused + 1) % answers.length].sort((x, y) => x - y);
  const path = `difference?token=${encodeURIComponent(token)}&a=${a}&b=${b}`;
  const difference = await server.request(path).catch(reportTrouble);
  if (difference && !page.busy && page.step.task?.token === token) dialogs.showDifference(ui, a, b, difference.html);
}

const KINDS = { field: "textarea, select", input: "input", button: "button" };
function handleKey(event) {
  const kind = Object.keys(KINDS).find((name) => event.target.matches?.(KINDS[name])) ?? "";
  const command = findCommand(event, kind, {
    busy: page.busy, dialog: dialogs.findOpenDialog(root) !== null, letters: areLettersKeys(window),
    count: page.step?.task?.answers.length ?? 0, focused: page.focused,
  });
  if (!command) return;
  if (command.prevent) event.preventDefault();
  actions[command.action](...command.args);
}

// Start

async function start() {
  root.append(body, status.element);
  for (const eventName of ["keydown", "pointermove", "scroll"])
    document.addEventListener(eventName, () => { page.activeAt = performance.now(); }, true);
  page.home = await server.requestUntilSuccess("projects");
  Object.assign(texts, page.home.words);
  document.documentElement.lang ||= "en";
  page.asWritten = readChoice(window, "texts") === "written";
  document.addEventListener("keydown", handleKey);
  addEventListener("resize", () => view.fitTexts(ui));
  const requestedName = new URLSearchParams(location.search).get("project");
  const { projects } = page.home;
  const onlyProject = requestedName === null && projects.length === 1 ? projects[0] : null;
  const project = projects.find(({ name }) => name === requestedName) ?? onlyProject;
  if (!project) return body.replaceChildren(...view.drawChoice(ui, page, requestedName));
  page.project = project;  // the next request sends its id
  page.project = { ...project, ...(await server.requestUntilSuccess("project")) };
  page.knownGuidelines = page.project.known_guidelines;
  page.outbox = createOutbox(window, page.project.id);
  page.drafts = createDraftSaver(page.outbox, server.request, {
    onSaved(token, lease) { if (page.step?.task?.token === token) reportLease(lease, getText("draft_saved")); },
    onLost: reportTrouble,
  });
  page.votes = page.outbox.readVotes(page.project.votes);
  setInterval(renewLease, RENEW_MS);
  return deliverAndShowNext();
}
// Renews the lease of an item, unless the annotator is away, or asks for an item if there was none.
function renewLease() {
  if (page.busy || document.hidden || !page.step) return;
  if (!page.step.task) deliverAndShowNext();
  else if (performance.now() - page.activeAt < AWAY_MS)
    server.request("renew", { token: page.step.task.token }).then(reportLease, () => undefined);
}
start();
