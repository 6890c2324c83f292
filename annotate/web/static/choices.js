// Preferences of a visitor for the page, kept in their browser.

// Returns a saved preference; null if there is none, or the browser forbids storage.
export function readChoice(browser, name) {
  try { return browser.localStorage.getItem(`align-${name}`); } catch { return null; }
}
export function saveChoice(browser, name, choice) {
  try { browser.localStorage.setItem(`align-${name}`, choice); } catch { /* lost at a reload */ }
}
