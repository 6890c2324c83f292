// The page: shows the view that its address names, asks for it as HTML, and follows links and forms without loading
// the page anew. The server makes every view; what lies here is which runs were chosen to be compared.

const CHOSEN = "align.registry.chosen", TITLE = "align registry";
const chosen = new Set(JSON.parse(sessionStorage.getItem(CHOSEN) ?? "[]"));
let asked = 0;  // of several views that were asked for, the last one is shown
let timers = [];
const shown = new WeakMap();  // place → the HTML that was put into it last

const root = document.getElementById("align-registry");
root.innerHTML = `<header class="top"><strong>align</strong><nav aria-label="Views">
  <a href="?view=runs">Runs</a><a href="?view=aliases">Aliases</a></nav></header>
  <p class="said" role="status"></p><div class="view"></div><div class="chosen" role="region" aria-label="Chosen runs" hidden></div>`;
const [view, said, bar] = [".view", ".said", ".chosen"].map((name) => root.querySelector(name));

root.addEventListener("click", (event) => {
  if (event.target.closest("[data-clear]")) return choose(() => chosen.clear());
  const link = event.target.closest("a[href]"), href = link?.getAttribute("href");
  if (!href?.startsWith("?") || event.defaultPrevented || event.button || event.metaKey || event.ctrlKey || event.shiftKey) return;
  event.preventDefault();
  go(href);
});
root.addEventListener("submit", (event) => {
  event.preventDefault();
  const given = [...new FormData(event.target)].filter(([, value]) => value !== "");
  go(`?${new URLSearchParams(given)}`);
});
root.addEventListener("change", ({ target }) => {
  if (target.name === "chosen") choose(() => chosen[target.checked ? "add" : "delete"](target.value));
  if (target.matches(".filters select")) target.form.requestSubmit();
});
history.scrollRestoration = "manual";
window.addEventListener("popstate", ({ state }) => show(fetched(location.search), state?.y ?? 0));
choose(() => undefined);
await show(fetched(location.search));

function go(search) {
  history.replaceState({ y: window.scrollY }, "");  // where Back leads to
  history.pushState(null, "", search);
  return show(fetched(search));
}

function address(search) {
  const given = new URLSearchParams(search), name = given.get("view") ?? "runs";
  given.delete("view");
  return `view/${encodeURIComponent(name)}?${given}`;
}

function fetched(search) {
  return answered(address(search));
}

function answered(path) {
  return ask(path).catch((error) => ({ error }));
}

// The HTML of a view; an error with what the server says of it.
async function ask(path) {
  const answer = await fetch(path, { headers: { accept: "application/json" } }).catch(() => {
    throw new Error("The server does not answer.");
  });
  const text = await answer.text();
  if (answer.ok) return { html: text };
  let told = {};
  try { told = JSON.parse(text); } catch { /* a proxy's own words */ }
  const detail = typeof told.detail === "string" ? told.detail : answer.status === 404 ? "There is no such view." : "";
  throw new Error(told.problem || detail || `The server says ${answer.status}.`);
}

// A view in place of the one before, at a place of the page; the reader is told by its heading.
async function show(coming, y = 0) {
  const mine = ++asked;
  timers.forEach(clearTimeout);
  timers = [];
  const slow = setTimeout(() => { said.textContent = "Loading …"; }, 300);
  const { html, error } = await coming;
  clearTimeout(slow);
  if (mine !== asked) return;
  said.textContent = error ? error.message : "";
  if (error) {
    if (view.firstChild) return;
    view.innerHTML = `<section><h1>Not found</h1><p><a href="?view=runs">All runs</a></p></section>`;
    view.querySelector("h1").after(paragraph(error.message));
    said.textContent = "";
    return;
  }
  view.replaceChildren();
  shown.delete(view);
  put(view, html);
  choose(() => undefined);
  const heading = view.querySelector("h1");
  document.title = `${heading?.textContent.trim() ?? ""} · ${TITLE}`;
  mark();
  window.scrollTo(0, y);
  tell(heading);
  again(view.firstElementChild?.dataset.every, async () => {
    const newer = await fetched(location.search);
    if (mine !== asked || !newer.html || isUsed(view)) return;
    const told = document.activeElement?.tagName === "H1";
    put(view, newer.html);
    if (told) tell(view.querySelector("h1"));
  }, mine);
}

function tell(heading) {
  heading?.setAttribute("tabindex", "-1");
  heading?.focus({ preventScroll: true });
}

// Whether somebody types, has chosen a link or a table by keys, or has marked text in a place.
function isUsed(place) {
  const active = document.activeElement, marked = getSelection();
  const inside = place.contains(active) && active.tagName !== "H1";
  return inside || Boolean(marked && !marked.isCollapsed && place.contains(marked.anchorNode));
}

// HTML into a place, and into the places in it what they name.
function put(place, content) {
  if (shown.get(place) === content) return;
  shown.set(place, content);
  const before = new Map([...place.querySelectorAll("[data-src]")].map((inner) => [inner.dataset.src, inner]));
  const open = [...place.querySelectorAll("details")].map((details) => details.open);
  place.innerHTML = content;
  [...place.querySelectorAll("details")].forEach((details, i) => { details.open = open[i] ?? details.open; });
  for (const box of place.querySelectorAll("[name=chosen]")) box.checked = chosen.has(box.value);
  place.querySelector(".box.focus")?.scrollIntoView({ block: "nearest", inline: "center" });
  const mine = asked;
  for (const inner of place.querySelectorAll("[data-src]")) {
    const known = before.get(inner.dataset.src);
    if (known && shown.has(known)) {  // it goes on by itself
      inner.replaceWith(known);
      continue;
    }
    const path = address(inner.dataset.src);
    inner.innerHTML = '<p class="told">Drawing …</p>';
    const fill = async () => {
      const { html, error } = await answered(path);
      if (mine !== asked || (shown.has(inner) && isUsed(inner))) return;
      if (html !== undefined) put(inner, html);
      else if (!shown.has(inner)) inner.replaceChildren(paragraph(error.message));
    };
    fill();
    again(inner.dataset.every, fill, mine);
  }
}

// Does it every so many seconds, as long as the view is shown and somebody can see it.
function again(seconds, act, mine) {
  if (!seconds) return;
  timers.push(setTimeout(async () => {
    if (mine !== asked) return;
    if (!document.hidden) await act();
    again(seconds, act, mine);
  }, 1000 * seconds));
}

function paragraph(text) {
  const made = document.createElement("p");
  made.className = "alert";
  made.textContent = text;
  return made;
}

function mark() {
  const here = new URLSearchParams(location.search).get("view") ?? "runs";
  for (const link of root.querySelectorAll(".top nav a")) {
    const current = link.getAttribute("href") === `?view=${here}`;
    link.toggleAttribute("aria-current", current);
    if (current) link.setAttribute("aria-current", "page");
  }
}

function choose(change) {
  change();
  sessionStorage.setItem(CHOSEN, JSON.stringify([...chosen]));
  for (const box of view.querySelectorAll("[name=chosen]")) box.checked = chosen.has(box.value);
  bar.hidden = chosen.size === 0 || new URLSearchParams(location.search).get("view") === "compare";
  const query = new URLSearchParams([["view", "compare"], ...[...chosen].map((run) => ["runs", run])]);
  const compare = chosen.size > 1 ? `<a class="button" href="?${query}">Compare</a>` : "<span>choose another to compare</span>";
  bar.innerHTML = `<span>${chosen.size} chosen</span> ${compare} <button type="button" data-clear>Clear</button>`;
}
