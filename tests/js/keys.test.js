// Every key, with every modifier, on everything that can have the focus, in every state of the page.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";
import { isDeepStrictEqual } from "node:util";
import { HELP, areLettersKeys, findCommand, setLettersAreKeys } from "../../annotate/web/static/keys.js";

const PRINTABLE = Array.from({ length: 95 }, (_, i) => String.fromCharCode(32 + i));
const NAMED = ["Enter", "Escape", "Tab", "Backspace", "Delete", "ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown",
  "Home", "End", "PageUp", "PageDown", "F1", "F5", "Shift", "Control", "Alt", "Meta", "Dead", "Process", "Unidentified",
  "constructor", "__proto__"];
const KEYS = [...PRINTABLE, ...NAMED, "é", "я", "あ"];
const TARGETS = ["", "button", "input", "field"];
const PAGE = { busy: false, dialog: false, letters: true, count: 4, focused: 1 };

function* combinations(choices) {
  const names = Object.keys(choices);
  const total = names.reduce((product, name) => product * choices[name].length, 1);
  for (let n = 0; n < total; n += 1) {
    let rest = n;
    yield Object.fromEntries(names.map((name) => {
      const { length } = choices[name], value = choices[name][rest % length];
      rest = Math.floor(rest / length);
      return [name, value];
    }));
  }
}
const BOTH = [false, true];
const PRESSES = [...combinations({
  key: KEYS, target: TARGETS, repeat: BOTH, isComposing: BOTH, ctrlKey: BOTH, altKey: BOTH, metaKey: BOTH,
})];
const PAGES = [...combinations({ busy: BOTH, dialog: BOTH, letters: BOTH, count: [0, 2, 9], focused: [0] })];
const acts = (found) => found && [found.action, ...found.args];
const press = (key, page = {}, more = {}, target = "") => acts(findCommand({ key, ...more }, target, { ...PAGE, ...page }));

function expectedOn(count, focused) {
  const table = {
    u: ["undo"], h: ["showGuidelines"], "?": ["showHelp"], g: ["judgeAll", "good"], b: ["judgeAll", "bad"],
    f: ["toggleFlag", focused], p: ["toggleFlag", -1], d: ["showDifference"], s: ["askSkipReason"], x: ["unblur"],
    v: ["toggleAsWritten"],
    r: ["focusField", "rationale"], w: ["focusField", "demonstration"], Enter: ["send"],
    ArrowLeft: ["focus", focused - 1], ArrowRight: ["focus", focused + 1],
  };
  if (count === 2) for (let digit = 1; digit <= 7; digit += 1) table[digit] = ["prefer", digit - 4];
  else for (let digit = 1; digit <= count; digit += 1) table[digit] = ["rankNext", focused, digit];
  return table;
}

test("on an item each key does what the table says, and every other key nothing", () => {
  for (let count = 2; count <= 9; count += 1)
    for (let focused = 0; focused < count; focused += 1) {
      const expected = new Map(Object.entries(expectedOn(count, focused)));
      for (const key of KEYS) assert.deepEqual(press(key, { count, focused }), expected.get(key) ?? null, key);
    }
});

test("without an item only undo, the guidelines and the help are left", () => {
  const found = KEYS.filter((key) => press(key, { count: 0 }));
  assert.deepEqual(found.sort(), ["?", "h", "u"]);
});

test("what has the focus keeps its own keys", () => {
  const lost = (target) => Object.keys(expectedOn(4, 1)).filter((key) => !press(key, {}, {}, target)).sort();
  assert.deepEqual(lost("button"), ["Enter"]);
  assert.deepEqual(lost("input"), ["ArrowLeft", "ArrowRight", "Enter"]);
});

test("in every other state", () => {
  for (const { target, ...event } of PRESSES)
    for (const page of PAGES) {
      const found = findCommand(event, target, page);
      const check = (right) => { if (!right) assert.fail(JSON.stringify({ found, target, ...event, ...page })); };
      const expected = (list) => check(isDeepStrictEqual(acts(found), list));
      const { key, repeat, ctrlKey } = event;
      if (event.isComposing || event.altKey || event.metaKey || page.busy) expected(null);
      else if (repeat && target !== "field" && !key.startsWith("Arrow") && key !== "Tab") expected(["doNothing"]);
      else if (ctrlKey) expected(key === "Enter" && page.count && !page.dialog ? ["send"] : null);
      else if (target === "field") expected(key === "Escape" ? ["focus", 0] : null);
      else if (key.length === 1 && !page.letters) expected(null);
      else if (page.dialog) expected(/^[1-9]$/.test(key) ? ["pressDialogButton", Number(key)] : null);
      const also = found?.action === "pressDialogButton" || (target === "field" && key === "Escape");  // the browser's own too
      check(!found || found.prevent === !also);
    }
});

test("a key that is held says nothing twice", () => {
  const spoken = ["send", "undo", "prefer", "rankNext", "judgeAll", "toggleFlag", "pressDialogButton"];
  for (const { target, ...event } of PRESSES.filter(({ repeat, ctrlKey }) => repeat && !ctrlKey))
    for (const page of PAGES) assert.ok(!spoken.includes(findCommand(event, target, page)?.action));
});

test("the help names every key that does something, and no other", () => {
  const named = HELP.map(([key]) => key).filter((key) => key.length === 1);
  const letters = PRINTABLE.filter((key) => !/\d/.test(key) && press(key));
  assert.deepEqual(named.sort(), letters.sort());
});

test("every act is one of the page's", () => {
  const page = readFileSync(new URL("../../annotate/web/static/rank.js", import.meta.url), "utf8");
  const found = PRESSES.flatMap(({ target, ...event }) => PAGES.map((state) => findCommand(event, target, state)?.action));
  const named = new Set(found.filter(Boolean));
  assert.equal(named.size, 16);
  const table = page.slice(page.indexOf("const actions = {"), page.indexOf("\n};", page.indexOf("const actions = {")));
  for (const act of named) assert.match(table, new RegExp(`\\b${act}\\b`));
});

test("letters are keys unless they were turned off, also where the browser keeps nothing", () => {
  const kept = new Map();
  const storage = { getItem: (name) => kept.get(name) ?? null, setItem: (name, value) => kept.set(name, value) };
  const browser = { localStorage: storage };
  assert.equal(areLettersKeys(browser), true);
  setLettersAreKeys(browser, false);
  assert.equal(areLettersKeys(browser), false);
  setLettersAreKeys(browser, true);
  assert.equal(areLettersKeys(browser), true);
  const forbidden = { get localStorage() { throw new Error("SecurityError"); } };
  setLettersAreKeys(forbidden, false);
  assert.equal(areLettersKeys(forbidden), true);
});
