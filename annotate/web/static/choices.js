// How somebody wants the page to be, kept in their browser.

// What was chosen; null where nothing was, or the browser keeps nothing.
export function choiceOf(browser, name) {
  try { return browser.localStorage.getItem(`align-${name}`); } catch { return null; }
}
export function keepChoice(browser, name, choice) {
  try { browser.localStorage.setItem(`align-${name}`, choice); } catch { /* then it is as it was after a reload */ }
}
