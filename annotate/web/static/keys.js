// Maps keys to actions: the name of an action and its arguments. This module does not touch the page.

import { readChoice, saveChoice } from "./choices.js";
import { PROMPT } from "./judgement.js";

// Keys in the help, each with the name of the text that explains it.
export const HELP = [
  ["← →", "help_move"], ["1 – 9", "help_digits"], ["Enter", "send"], ["u", "undo"], ["g", "good"], ["b", "bad"],
  ["f", "flag"], ["p", "flag_prompt"], ["s", "skip"], ["d", "difference_key"], ["r", "rationale"],
  ["w", "demonstration"],
  ["Escape, Ctrl+Enter", "help_field"], ["h", "guidelines"], ["v", "as_written"], ["x", "show"], ["?", "help"],
];
const EVERYWHERE = new Map([["u", ["undo"]], ["h", ["showGuidelines"]], ["?", ["showHelp"]]]);
const ON_AN_ITEM = new Map([
  ["g", ["judgeAll", "good"]], ["b", ["judgeAll", "bad"]], ["p", ["toggleFlag", PROMPT]], ["d", ["showDifference"]],
  ["s", ["askSkipReason"]], ["v", ["toggleAsWritten"]], ["x", ["unblur"]],
  ["r", ["focusField", "rationale"]], ["w", ["focusField", "demonstration"]],
]);

// Args:
//   press: a KeyboardEvent, of which the key, the modifiers, `repeat` and `isComposing` are used.
//   target: the focused element: a "field" (text area or select), an "input", a "button" or "" for anything else.
//   page: `busy`, whether it waits for the server; `dialog`, whether one is open; `letters`, whether keys of one letter
//     are on; `count`, the number of answers, 0 without an item; `focused`, the answer that keys judge.
// Returns `{ action, args, prevent }`: an action, its arguments, and whether to prevent the browser's default. Returns
// null to leave the key to the browser.
export function findCommand(press, target, page) {
  const { key } = press;
  const isTyping = target === "field";
  if (press.isComposing || press.altKey || press.metaKey || page.busy) return null;
  if (press.repeat && !isTyping && !key.startsWith("Arrow") && key !== "Tab") return createCommand("doNothing");
  if (press.ctrlKey) return key === "Enter" && !page.dialog && page.count ? createCommand("send") : null;
  if (isTyping) return key === "Escape" ? { ...createCommand("focus", page.focused), prevent: false } : null;
  if (key.length === 1 && !page.letters) return null;
  const digit = parseDigit(key);
  if (page.dialog) return digit ? { ...createCommand("pressDialogButton", digit), prevent: false } : null;
  const action = EVERYWHERE.get(key) ?? (page.count ? findItemAction(key, target, page) : undefined);
  return action ? createCommand(...action) : null;
}
const createCommand = (action, ...args) => ({ action, args, prevent: true });
const parseDigit = (key) => (/^[1-9]$/.test(key) ? Number(key) : 0);

function findItemAction(key, target, { count, focused }) {
  const digit = parseDigit(key);
  if (digit && count === 2) return digit <= 7 ? ["prefer", digit - 4] : undefined;
  if (digit) return digit <= count ? ["rankNext", focused, digit] : undefined;
  switch (key) {
    case "f": return ["toggleFlag", focused];
    case "Enter": return target ? undefined : ["send"];  // the focused element is pressed
    case "ArrowLeft": return target === "input" ? undefined : ["focus", focused - 1];  // inputs use arrow keys
    case "ArrowRight": return target === "input" ? undefined : ["focus", focused + 1];
    default: return ON_AN_ITEM.get(key);
  }
}

// Keys of one letter can be turned off, because dictation and accidental presses trigger them (WCAG 2.1.4).
export const areLettersKeys = (browser) => readChoice(browser, "letters") !== "off";
export const setLettersAreKeys = (browser, on) => saveChoice(browser, "letters", on ? "on" : "off");
