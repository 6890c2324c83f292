// The registry's page: loads the view that the address names as HTML from the server, and follows links and forms
// without loading the whole page again. The server renders every view; the page itself keeps only which runs are chosen
// to be compared.

const CHOSEN = "align.registry.chosen", TITLE = "align registry";
const chosenRuns = new Set(JSON.parse(sessionStorage.getItem(CHOSEN) ?? "[]"));
let viewNumber = 0;  // counts the views that were requested; a response to any but the last is dropped
let timers = [];
const shownHtml = new WeakMap();  // element → the HTML that was put into it last

const root = document.getElementById("align-registry");
root.innerHTML = `<header class="top"><strong>align</strong><nav aria-label="Views">
  <a href="?view=runs">Runs</a><a href="?view=aliases">Aliases</a></nav></header>
  <p class="said" role="status"></p><div class="view"></div><div class="chosen" role="region" aria-label="Chosen runs" hidden></div>`;
const [view, status, chosenBar] = [".view", ".said", ".chosen"].map((name) => root.querySelector(name));

root.addEventListener("click", (event) => {
  if (event.target.closest("[data-clear]")) return changeChoice(() => chosenRuns.clear());
  const link = event.target.closest("a[href]"), href = link?.getAttribute("href");
  if (!href?.startsWith("?") || event.defaultPrevented || event.button || event.metaKey || event.ctrlKey || event.shiftKey) return;
  event.preventDefault();
  openView(href);
});
root.addEventListener("submit", (event) => {
  event.preventDefault();
  const filledFields = [...new FormData(event.target)].filter(([, value]) => value !== "");
  openView(`?${new URLSearchParams(filledFields)}`);
});
root.addEventListener("change", ({ target }) => {
  if (target.name === "chosen") changeChoice(() => chosenRuns[target.checked ? "add" : "delete"](target.value));
  if (target.matches(".filters select")) target.form.requestSubmit();
});
history.scrollRestoration = "manual";
window.addEventListener("popstate", ({ state }) => showView(fetchView(location.search), state?.y ?? 0));
changeChoice(() => undefined);
await showView(fetchView(location.search));

function openView(search) {
  history.replaceState({ y: window.scrollY }, "");  // the position to which Back returns
  history.pushState(null, "", search);
  return showView(fetchView(search));
}

function toViewPath(search) {
  const parameters = new URLSearchParams(search), name = parameters.get("view") ?? "runs";
  parameters.delete("view");
  return `view/${encodeURIComponent(name)}?${parameters}`;
}

// Returns `{ html }` of the view that an address names, or `{ error }`.
function fetchView(search) {
  return fetchHtml(toViewPath(search));
}

function fetchHtml(path) {
  return requestHtml(path).catch((error) => ({ error }));
}

// Returns `{ html }`. Throws an error with the server's message.
async function requestHtml(path) {
  const response = await fetch(path, { headers: { accept: "application/json" } }).catch(() => {
    throw new Error("The server does not answer.");
  });
  const text = await response.text();
  if (response.ok) return { html: text };
  let content = {};
  try { content = JSON.parse(text); } catch { /* a proxy's own page */ }
  const detail = typeof content.detail === "string" ? content.detail : response.status === 404 ? "There is no such view." : "";
  throw new Error(content.problem || detail || `The server answered with status ${response.status}.`);
}

// Shows a view instead of the one before, scrolled to `y`. The focus moves to its heading, which a screen reader reads.
async function showView(responsePromise, y = 0) {
  const ownNumber = ++viewNumber;
  timers.forEach(clearTimeout);
  timers = [];
  const slowTimer = setTimeout(() => { status.textContent = "Loading …"; }, 300);
  const { html, error } = await responsePromise;
  clearTimeout(slowTimer);
  if (ownNumber !== viewNumber) return;
  status.textContent = error ? error.message : "";
  if (error) {
    if (view.firstChild) return;
    view.innerHTML = `<section><h1>Not found</h1><p><a href="?view=runs">All runs</a></p></section>`;
    view.querySelector("h1").after(createAlert(error.message));
    status.textContent = "";
    return;
  }
  view.replaceChildren();
  shownHtml.delete(view);
  fillElement(view, html);
  changeChoice(() => undefined);
  const heading = view.querySelector("h1");
  document.title = `${heading?.textContent.trim() ?? ""} · ${TITLE}`;
  markCurrentLink();
  window.scrollTo(0, y);
  focusHeading(heading);
  repeatWhileShown(view.firstElementChild?.dataset.every, async () => {
    const newer = await fetchView(location.search);
    if (ownNumber !== viewNumber || !newer.html || isInUse(view)) return;
    const wasHeadingFocused = document.activeElement?.tagName === "H1";
    fillElement(view, newer.html);
    if (wasHeadingFocused) focusHeading(view.querySelector("h1"));
  }, ownNumber);
}

function focusHeading(heading) {
  heading?.setAttribute("tabindex", "-1");
  heading?.focus({ preventScroll: true });
}

// Returns whether the visitor types in an element, has focused something in it by keys, or has selected text in it.
function isInUse(element) {
  const active = document.activeElement, selection = getSelection();
  const hasFocus = element.contains(active) && active.tagName !== "H1";
  return hasFocus || Boolean(selection && !selection.isCollapsed && element.contains(selection.anchorNode));
}

// Puts HTML into an element, and then loads the parts that the HTML names by `data-src`.
function fillElement(element, html) {
  if (shownHtml.get(element) === html) return;
  shownHtml.set(element, html);
  const earlierParts = new Map([...element.querySelectorAll("[data-src]")].map((part) => [part.dataset.src, part]));
  const openStates = [...element.querySelectorAll("details")].map((details) => details.open);
  element.innerHTML = html;
  [...element.querySelectorAll("details")].forEach((details, i) => { details.open = openStates[i] ?? details.open; });
  for (const box of element.querySelectorAll("[name=chosen]")) box.checked = chosenRuns.has(box.value);
  element.querySelector(".box.focus")?.scrollIntoView({ block: "nearest", inline: "center" });
  const ownNumber = viewNumber;
  for (const part of element.querySelectorAll("[data-src]")) {
    const earlierPart = earlierParts.get(part.dataset.src);
    if (earlierPart && shownHtml.has(earlierPart)) {  // it is kept, and its own timer updates it
      part.replaceWith(earlierPart);
      continue;
    }
    const path = toViewPath(part.dataset.src);
    part.innerHTML = '<p class="told">Drawing …</p>';
    const loadPart = async () => {
      const { html: partHtml, error } = await fetchHtml(path);
      if (ownNumber !== viewNumber || (shownHtml.has(part) && isInUse(part))) return;
      if (partHtml !== undefined) fillElement(part, partHtml);
      else if (!shownHtml.has(part)) part.replaceChildren(createAlert(error.message));
    };
    loadPart();
    repeatWhileShown(part.dataset.every, loadPart, ownNumber);
  }
}

// Calls a function every so many seconds as long as the view is shown, except while the page is hidden.
function repeatWhileShown(seconds, update, ownNumber) {
  if (!seconds) return;
  timers.push(setTimeout(async () => {
    if (ownNumber !== viewNumber) return;
    if (!document.hidden) await update();
    repeatWhileShown(seconds, update, ownNumber);
  }, 1000 * seconds));
}

function createAlert(text) {
  const paragraph = document.createElement("p");
  paragraph.className = "alert";
  paragraph.textContent = text;
  return paragraph;
}

function markCurrentLink() {
  const name = new URLSearchParams(location.search).get("view") ?? "runs";
  for (const link of root.querySelectorAll(".top nav a")) {
    const isCurrent = link.getAttribute("href") === `?view=${name}`;
    link.toggleAttribute("aria-current", isCurrent);
    if (isCurrent) link.setAttribute("aria-current", "page");
  }
}

// Changes which runs are chosen, saves them for this tab, and updates the check boxes and the bar.
function changeChoice(change) {
  change();
  sessionStorage.setItem(CHOSEN, JSON.stringify([...chosenRuns]));
  for (const box of view.querySelectorAll("[name=chosen]")) box.checked = chosenRuns.has(box.value);
  chosenBar.hidden = chosenRuns.size === 0 || new URLSearchParams(location.search).get("view") === "compare";
  const query = new URLSearchParams([["view", "compare"], ...[...chosenRuns].map((run) => ["runs", run])]);
  const compareLink = chosenRuns.size > 1
    ? `<a class="button" href="?${query}">Compare</a>` : "<span>choose another to compare</span>";
  chosenBar.innerHTML = `<span>${chosenRuns.size} chosen</span> ${compareLink} <button type="button" data-clear>Clear</button>`;
}
