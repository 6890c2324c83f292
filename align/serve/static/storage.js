// Storage of this browser tab for the key, the settings and the chat. It survives a reload, and ends with the tab.

// Returns a saved value; `fallback` if there is none, or the browser forbids storage.
export function readSaved(name, fallback) {
  try { return JSON.parse(sessionStorage.getItem(`align-${name}`)) ?? fallback; } catch { return fallback; }
}

// Saves a value. Returns whether the browser had room for it.
export function save(name, value) {
  try { sessionStorage.setItem(`align-${name}`, JSON.stringify(value)); return true; } catch { return false; }
}
