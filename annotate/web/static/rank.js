// The ranking page: shows one item, takes one judgement, sends it, shows the next. The server holds the truth; this
// page holds what was said and not yet acknowledged, and sends it until it is.

import * as dialogs from "./dialogs.js";
import { buttonMaker, createStatus, make, speaker } from "./elements.js";
import * as judgements from "./judgement.js";
import { command, lettersAreKeys } from "./keys.js";
import { createDraftSaver, createOutbox, deliver } from "./outbox.js";
import { choiceOf, keepChoice } from "./choices.js";
import { createServer, isLost, pause, troubleOf } from "./server.js";
import * as view from "./view.js";

const RENEW_MS = 30000, AWAY_MS = 600000;

const page = {
  reviewing: new URLSearchParams(location.search).has("review"),  // settling what others disagree on
  home: null,  // who is here, and their projects
  project: null,
  guidelines: null,  // those that hold for what is shown; null: there are none
  knownGuidelines: null,  // the version that the annotator was shown last
  step: null,  // the item on the screen, or why there is none
  judgement: null,
  votes: [],  // their numbers, for undo
  outbox: null, drafts: null,
  asWritten: false,  // texts, and not as Markdown
  focused: 0, displayedAt: 0, activeAt: 0,
  busy: false,
};

const root = await appearing("align-app"), body = make("div"), status = createStatus();
const words = {}, say = speaker(words);
const server = createServer({
  projectId: () => page.project?.id ?? "",
  onSlow: () => { if (page.home) reportTrouble(new Error("slow")); },
  onRecovered: status.recovered,
});
const act = {
  prefer: (strength) => change(judgements.prefer(page.judgement, strength)),
  rank: (answer, place) => change(judgements.rank(page.judgement, answer, place)),
  // By keys: a hand on the mouse, or on the arrows of a radio group, stays where it is.
  rankNext(answer, place) { act.rank(answer, place); focus(judgements.following(page.judgement, answer)); },
  judgeAll: (quality) => change(judgements.judgeAll(page.judgement, quality)),
  flag: (answer) => change(judgements.flag(page.judgement, answer)),
  rate: (answer, attribute, mark) => change(judgements.rate(page.judgement, answer, attribute, mark), false),
  write: (field, text) => change(judgements.write(page.judgement, field, text), false),
  send, skip: (reason) => post(judgements.asSkip(page.judgement, reason, seconds())), undo,
  focus, noteFocus: (answer) => { page.focused = answer; },
  edit: (field) => root.querySelector(`#align-${field}`).focus(),
  unblur: () => view.unblur(ui),
  readAsWritten() {
    page.asWritten = !page.asWritten;
    keepChoice(window, "texts", page.asWritten ? "written" : "markdown");
    view.fillTexts(ui, page.asWritten);
  },
  choose: (digit) => dialogs.opened(root)?.querySelector(`[data-digit="${digit}"]`)?.click(),
  nothing: () => undefined,
  showGuidelines: () => dialogs.guidelines(ui, page.guidelines),
  showHelp: () => dialogs.help(ui),
  showRefused: () => dialogs.refused(ui, page.outbox.refused()),
  showDifference, askWhy: () => dialogs.reasons(ui),
  forgetRefused() { page.outbox.forgetRefused(); dialogs.opened(root).close(); show(page.step); },
  // What the server has of a draft need not stay in a browser that others use; what it has not is in the outbox.
  forgetDraft: () => page.outbox?.dropDraft(),
};
// A click by mouse leaves the focus with the answers: Enter sends then, and does not press the button again.
const ui = { root, say, act, button: buttonMaker((answer) => {
  if (page.step?.task && !page.busy && !dialogs.opened(root)) focus(Number(answer ?? page.focused), false);
}) };

async function appearing(id) {
  for (;;) {
    const element = document.getElementById(id);
    if (element) return element;
    await new Promise((resolve) => requestAnimationFrame(resolve));
  }
}

// What is said in the status line

function reportTrouble(error) {
  const [word, values] = troubleOf(error);
  const logIn = word === "locked_out" && page.home?.accounts
    ? [" ", make("a", { href: "/login", target: "_blank", text: say("log_in") })] : [];
  status.trouble(say(word, values), ...logIn);
}
// What became of the item on the screen: ours still, judged by us in another window, or with somebody else.
function reportStanding({ kept, judged }, otherwise = "") {
  if (judged) status.show(say("judged_elsewhere"), true);
  else if (!kept) status.show(say("late"), true);
  else if (otherwise) status.show(otherwise);
}
const reportRefused = (error) => status.show(say("refused", { problem: error.message }), true);

// From item to item

// The next item, however long the server takes to come back.
async function advance() {
  occupy(true);
  for (;;) {
    try {
      let next = await deliver(page.outbox, server.ask, {
        onSending: () => status.show(say("saving")),
        onAccepted: (seq) => { noteVotes([...page.votes, seq]); status.show(say("saved")); },
        onRefused: (error) => (error.status === 409 ? status.show(say("elsewhere"), true) : reportRefused(error)),
        onLost: reportTrouble,
      });
      // What waited here may have been said on a page of the other mode, and brings the next item of that.
      if (next?.terms?.mode !== (page.reviewing ? "review" : "work"))
        next = await server.ask(page.reviewing ? "review" : "task");
      await learnGuidelines(next);
      show(next);
      announceGuidelines();
      break;
    } catch (error) {
      if (!isLost(error)) { reportRefused(error); break; }
      reportTrouble(error);
      await pause();
    }
  }
  occupy(false);
}
// The guidelines that a step names are here before it is shown: a vote names those that its author had before them.
async function learnGuidelines({ progress, terms }) {
  if (!progress || !terms) throw new Error("that was not the server's answer");
  if ((page.guidelines?.version ?? null) !== (terms.guidelines ?? null))
    page.guidelines = terms.guidelines === null ? null : await server.ask(`guidelines?version=${terms.guidelines}`);
}
// Whoever was not shown them yet reads them first, and is not timed meanwhile.
function announceGuidelines() {
  const { guidelines, knownGuidelines } = page;
  if (!page.step.task || !guidelines || guidelines.version === knownGuidelines) return;
  dialogs.guidelines(ui, guidelines, say(knownGuidelines === null ? "guidelines" : "new_guidelines"));
  dialogs.opened(root).addEventListener("close", () => {
    page.displayedAt = performance.now();
    focus(page.focused, false);
  });
  page.knownGuidelines = guidelines.version;
}

function show(next) {
  page.step = next;
  page.project = { ...page.project, ...next.asked };
  status.recovered();
  const { task } = next, kept = page.outbox.draft();  // newer than the server's, where it was said while that was away
  page.judgement = task && judgements.fromDraft(
    kept?.token === task.token ? kept.draft : task.draft, task.answers.length, page.project);
  for (const dialog of root.querySelectorAll("dialog")) dialog.remove();
  page.focused = 0;
  page.displayedAt = performance.now();
  body.replaceChildren(...view.drawPage(ui, page));
  if (!task) return;
  view.reflect(ui, page.judgement);
  view.fillTexts(ui, page.asWritten);
  focus(0, false);
}

function occupy(on) {
  page.busy = body.inert = on;
  if (!on && page.step?.task) focus(page.focused, false);
}
function focus(answer, scroll = true) {
  const { length } = page.judgement.places;
  page.focused = (answer + length) % length;
  root.querySelector(`[data-answer="${page.focused}"]`)?.focus({ preventScroll: !scroll });
}

// What people do

function change(judgement, redraw = true) {
  page.judgement = judgement;
  if (redraw) view.reflect(ui, judgement);
  const draft = { token: page.step.task.token, draft: judgements.asDraft(judgement) };
  if (!page.outbox.keepDraft(draft)) status.show(say("no_room"), true);
  page.drafts.later();
}
const seconds = () => judgements.secondsOf(performance.now() - page.displayedAt);
function noteVotes(votes) {
  page.votes = votes;
  page.outbox.keepVotes(votes);
}

function send() {
  if (judgements.isComplete(page.judgement)) post(judgements.asVote(page.judgement, seconds()));
  else status.show(say("send_hint"), true);
}
function post(judged) {
  const { task, terms } = page.step;
  if (page.busy || !task) return;
  page.drafts.cancel();
  page.outbox.add({ token: task.token, key: randomKey(), terms, said: judged });
  page.outbox.dropDraft();
  dialogs.opened(root)?.close();
  advance();
}
const randomKey = () =>
  Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");

async function undo() {
  if (page.busy || !page.votes.length) return;
  occupy(true);
  await page.drafts.save();
  const earlier = page.votes.slice(0, -1);
  try {
    const back = await server.ask("undo", { seq: page.votes.at(-1) });
    await learnGuidelines(back);
    noteVotes(earlier);
    page.outbox.dropDraft();
    show(back);
    status.show(say("undone"));
    announceGuidelines();
  } catch (error) {
    if (isLost(error)) reportTrouble(error);
    else {
      noteVotes(earlier);  // it can be taken back no more
      reportRefused(error);
    }
  }
  occupy(false);
}

async function showDifference() {
  const { token, answers } = page.step.task;
  const [a, b] = [page.focused, (page.focused + 1) % answers.length].sort((x, y) => x - y);
  const path = `difference?token=${encodeURIComponent(token)}&a=${a}&b=${b}`;
  const found = await server.ask(path).catch(reportTrouble);
  if (found && !page.busy && page.step.task?.token === token) dialogs.difference(ui, a, b, found.html);
}

const KINDS = { field: "textarea, select", input: "input", button: "button" };
function onKey(event) {
  const kind = Object.keys(KINDS).find((name) => event.target.matches?.(KINDS[name])) ?? "";
  const found = command(event, kind, {
    busy: page.busy, dialog: dialogs.opened(root) !== null, letters: lettersAreKeys(window),
    count: page.step?.task?.answers.length ?? 0, focused: page.focused,
  });
  if (!found) return;
  if (found.prevent) event.preventDefault();
  act[found.act](...found.args);
}

// The beginning

async function start() {
  root.append(body, status.element);
  for (const sign of ["keydown", "pointermove", "scroll"])
    document.addEventListener(sign, () => { page.activeAt = performance.now(); }, true);
  page.home = await server.askPatiently("projects");
  Object.assign(words, page.home.words);
  document.documentElement.lang ||= "en";
  page.asWritten = choiceOf(window, "texts") === "written";
  document.addEventListener("keydown", onKey);
  addEventListener("resize", () => view.fitTexts(ui));
  const asked = new URLSearchParams(location.search).get("project"), { projects } = page.home;
  const only = asked === null && projects.length === 1 ? projects[0] : null;
  const chosen = projects.find(({ name }) => name === asked) ?? only;
  if (!chosen) return body.replaceChildren(...view.drawChoice(ui, page, asked));
  page.project = chosen;  // whose id the next request names
  page.project = { ...chosen, ...(await server.askPatiently("project")) };
  page.knownGuidelines = page.project.known_guidelines;
  page.outbox = createOutbox(window, page.project.id);
  page.drafts = createDraftSaver(page.outbox, server.ask, {
    onSaved(token, standing) { if (page.step?.task?.token === token) reportStanding(standing, say("draft_saved")); },
    onLost: reportTrouble,
  });
  page.votes = page.outbox.votes(page.project.votes);
  setInterval(renew, RENEW_MS);
  return advance();
}
// Nobody keeps an item by a tab that was left open; and whoever waits for one need not ask.
function renew() {
  if (page.busy || document.hidden || !page.step) return;
  if (!page.step.task) advance();
  else if (performance.now() - page.activeAt < AWAY_MS)
    server.ask("renew", { token: page.step.task.token }).then(reportStanding, () => undefined);
}
start();
