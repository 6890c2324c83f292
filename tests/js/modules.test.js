// Every module can be loaded: what it imports is exported where it says, by names that a browser can resolve.
import assert from "node:assert/strict";
import { readFileSync, readdirSync } from "node:fs";
import test from "node:test";

const STATIC = new URL("../../annotate/web/static/", import.meta.url);
const MODULES = readdirSync(STATIC).filter((name) => name.endsWith(".js"));

for (const name of MODULES)
  test(`${name} loads, and imports its neighbours alone`, async () => {
    // `rank.js` waits, frame by frame, for a page that never comes: by then all that it imports is there.
    const waits = new Promise((resolve) => { globalThis.requestAnimationFrame = resolve; });
    globalThis.document = { getElementById: () => null };
    globalThis.location = { search: "" };
    await Promise.race([import(new URL(name, STATIC)), waits]);
    const text = readFileSync(new URL(name, STATIC), "utf8");
    const imported = [...text.matchAll(/^(?:import|export)\b.*?\bfrom "(.*?)";/gms)].map(([, from]) => from);
    for (const from of imported) assert.ok(from.startsWith("./") && MODULES.includes(from.slice(2)), from);
    assert.doesNotMatch(text, /\bimport\(/);
  });
