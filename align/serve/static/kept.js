// What this tab keeps over a reload, and no longer: the key, the settings, the chat.

export function kept(name, otherwise) {
  try { return JSON.parse(sessionStorage.getItem(`align-${name}`)) ?? otherwise; } catch { return otherwise; }
}

// Whether there was room for it.
export function keep(name, value) {
  try { sessionStorage.setItem(`align-${name}`, JSON.stringify(value)); return true; } catch { return false; }
}
