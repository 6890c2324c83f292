// What a key does, as a value: the name of an act and its arguments. Nothing here touches the page.

import { choiceOf, keepChoice } from "./choices.js";
import { PROMPT } from "./judgement.js";

// Keys as the help shows them, each with the word that explains it.
export const HELP = [
  ["← →", "help_move"], ["1 – 9", "help_digits"], ["Enter", "send"], ["u", "undo"], ["g", "good"], ["b", "bad"],
  ["f", "flag"], ["p", "flag_prompt"], ["s", "skip"], ["d", "difference_key"], ["r", "rationale"],
  ["w", "demonstration"],
  ["Escape, Ctrl+Enter", "help_field"], ["h", "guidelines"], ["v", "as_written"], ["x", "show"], ["?", "help"],
];
const EVERYWHERE = new Map([["u", ["undo"]], ["h", ["showGuidelines"]], ["?", ["showHelp"]]]);
const ON_AN_ITEM = new Map([
  ["g", ["judgeAll", "good"]], ["b", ["judgeAll", "bad"]], ["p", ["flag", PROMPT]], ["d", ["showDifference"]],
  ["s", ["askWhy"]], ["v", ["readAsWritten"]], ["x", ["unblur"]], ["r", ["edit", "rationale"]], ["w", ["edit", "demonstration"]],
]);

// Args:
//   press: a KeyboardEvent, of which the key, the modifiers, `repeat` and `isComposing` count.
//   target: what it is pressed on: a "field" (for text, or to choose from), an "input", a "button" or "".
//   page: `busy`, it waits for the server; `dialog`, one is open; `letters`, keys of one letter are on; `count` of the
//     answers, 0 without an item; `focused`, the answer that keys judge.
// Returns null where the key is the browser's alone; else an act, its arguments, and whether to prevent the browser's.
export function command(press, target, page) {
  const { key } = press, typing = target === "field";
  if (press.isComposing || press.altKey || press.metaKey || page.busy) return null;
  if (press.repeat && !typing && !key.startsWith("Arrow") && key !== "Tab") return does("nothing");
  if (press.ctrlKey) return key === "Enter" && !page.dialog && page.count ? does("send") : null;
  if (typing) return key === "Escape" ? { ...does("focus", page.focused), prevent: false } : null;
  if (key.length === 1 && !page.letters) return null;
  if (page.dialog) return digitOf(key) ? { ...does("choose", digitOf(key)), prevent: false } : null;
  const found = EVERYWHERE.get(key) ?? (page.count ? onItem(key, target, page) : undefined);
  return found ? does(...found) : null;
}
const does = (act, ...args) => ({ act, args, prevent: true });
const digitOf = (key) => (/^[1-9]$/.test(key) ? Number(key) : 0);

function onItem(key, target, { count, focused }) {
  const digit = digitOf(key);
  if (digit && count === 2) return digit <= 7 ? ["prefer", digit - 4] : undefined;
  if (digit) return digit <= count ? ["rankNext", focused, digit] : undefined;
  switch (key) {
    case "f": return ["flag", focused];
    case "Enter": return target ? undefined : ["send"];  // what has the focus is pressed
    case "ArrowLeft": return target === "input" ? undefined : ["focus", focused - 1];  // which has arrows of its own
    case "ArrowRight": return target === "input" ? undefined : ["focus", focused + 1];
    default: return ON_AN_ITEM.get(key);
  }
}

// Who dictates, or leans on keys, can do without those of one letter (WCAG 2.1.4).
export const lettersAreKeys = (browser) => choiceOf(browser, "letters") !== "off";
export const makeLettersKeys = (browser, on) => keepChoice(browser, "letters", on ? "on" : "off");
