// Every module can be loaded: what it imports is exported where it says, by names that a browser can resolve.
import assert from "node:assert/strict";
import { readFileSync, readdirSync } from "node:fs";
import test from "node:test";

for (const room of ["annotate/web", "align/serve"]) {
  const folder = new URL(`../../${room}/static/`, import.meta.url);
  const modules = readdirSync(folder).filter((name) => name.endsWith(".js"));
  for (const name of modules) test(`${room}: ${name} loads, and imports its neighbours alone`, () => loads(folder, modules, name));
}

async function loads(folder, modules, name) {
  // `rank.js` waits, frame by frame, for a page that never comes: by then all that it imports is there.
  const waits = new Promise((resolve) => { globalThis.requestAnimationFrame = resolve; });
  globalThis.document = { getElementById: () => null };
  globalThis.location = { search: "" };
  // `chat.js` looks for its page once all that it imports is there.
  const noPage = (error) => assert.match(error.message, /null/);
  await Promise.race([import(new URL(name, folder)).catch(noPage), waits]);
  const text = readFileSync(new URL(name, folder), "utf8");
  const imported = [...text.matchAll(/^(?:import|export)\b.*?\bfrom "(.*?)";/gms)].map(([, from]) => from);
  for (const from of imported) assert.ok(from.startsWith("./") && modules.includes(from.slice(2)), from);
  assert.doesNotMatch(text, /\bimport\(/);
}
