// Keeps the page fresh: the coordinator's stream says what changed, the page asks for itself again and swaps only what differs.

import { startPlots } from "./plots.js";
import { localise, nameZone } from "./times.js";
import { t } from "./words.js";

const LOOK_EVERY_MS = 1000;
const STALE_MS = 20_000;
const AGAIN_MS = 2000;
const RELOAD_AFTER_MS = 5000;

const main = document.getElementById("main");
const banner = document.getElementById("stale");
const pulse = document.getElementById("pulse");
const topics = new Set(main.dataset.topics.split(" "));

// What the server said last, as it said it: the page itself differs by what scripts put in.
let shown = main.cloneNode(true);

// -- swapping

/** The live blocks below `root` that lie in no other block, by name. */
function blocksOf(root) {
  const found = new Map();
  const walk = (element) => {
    for (const child of element.children) {
      if (child.dataset?.live) found.set(child.dataset.live, child);
      else walk(child);
    }
  };
  walk(root);
  return found;
}

/** A block's own HTML, with a hole for each block inside. */
function frameOf(block) {
  const copy = block.cloneNode(true);
  for (const [name, inner] of blocksOf(copy)) {
    const hole = document.createElement("slot");
    hole.dataset.live = name;
    inner.replaceWith(hole);
  }
  return copy.outerHTML;
}

function replace(live, fresh) {
  const focused = live.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
  const next = document.importNode(fresh, true);
  localise(next);
  live.replaceWith(next);
  if (focused) next.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
}

function update(live, before, fresh) {
  if (before.isEqualNode(fresh)) return;
  if (frameOf(before) !== frameOf(fresh)) {
    replace(live, fresh);
    return;
  }
  updateBlocks(live, before, fresh);
}

function updateBlocks(live, before, fresh) {
  const [lives, befores] = [blocksOf(live), blocksOf(before)];
  for (const [name, block] of blocksOf(fresh)) {
    if (lives.has(name) && befores.has(name)) update(lives.get(name), befores.get(name), block);
  }
}

function hasSameBlocks(fresh) {
  const [old, now] = [[...blocksOf(shown).keys()], [...blocksOf(fresh).keys()]];
  return old.length === now.length && old.every((name, index) => name === now[index]);
}

// -- looking

/** The whole page again, but never in a tight circle. */
function reload() {
  setTimeout(() => location.reload(), Math.max(0, RELOAD_AFTER_MS - performance.now()));
}

let timer = 0;
let isLooking = false;
let isPressed = false;
let lookedAt = 0;

/** Somebody selects text or presses a button: nothing may move now. */
function isBusy() {
  const selection = document.getSelection();
  return isPressed || (selection && !selection.isCollapsed && main.contains(selection.anchorNode));
}

function lookSoon() {
  if (timer || document.hidden) return;
  timer = setTimeout(look, Math.max(0, lookedAt + LOOK_EVERY_MS - performance.now()));
}

async function look() {
  timer = 0;
  if (isLooking || isBusy()) {
    timer = setTimeout(look, LOOK_EVERY_MS);
    return;
  }
  isLooking = true;
  let isSeen = false;
  try {
    const address = new URL(location.href);
    address.searchParams.set("fragment", "1");
    const response = await fetch(address, { redirect: "manual", cache: "no-store" });
    if (response.type === "opaqueredirect" || response.status === 404) {
      reload(); // logged out, or what was shown is gone: the server says it better
      return;
    }
    if (response.ok) show(await response.text());
    isSeen = response.ok;
  } catch {
    // The stream notices as well, and the banner says it.
  } finally {
    isLooking = false;
    lookedAt = performance.now();
    if (!isSeen && !timer) timer = setTimeout(look, AGAIN_MS); // what changed is not told again
  }
}

function show(html) {
  const fresh = new DOMParser().parseFromString(`<main>${html}</main>`, "text/html").querySelector("main");
  if (!hasSameBlocks(fresh)) {
    reload();
    return;
  }
  updateBlocks(main, shown, fresh);
  shown = fresh;
}

// -- the stream. Read by hand, not by EventSource: that one hides the comments, which say that the link is alive.

let heardAt = performance.now();
let stopping = null;
let place = ""; // of the last event: what changed since is told by a stream that begins there

function setPulse(isLive) {
  pulse.hidden = false;
  pulse.classList.toggle("off", !isLive);
  pulse.querySelector(".pulse-word").textContent = isLive ? t("live") : t("no word");
}

function heard() {
  heardAt = performance.now();
  banner.hidden = true;
  setPulse(true);
}

async function readStream(signal) {
  const headers = { Accept: "text/event-stream", ...(place ? { "Last-Event-ID": place } : {}) };
  const response = await fetch("/v1/stream", { signal, cache: "no-store", headers });
  if (response.status === 401) reload();
  if (!response.ok) return;
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let [rest, coming] = ["", ""];
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    heard();
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    const told = new Set(lines.filter((line) => line.startsWith("event: ")).map((line) => line.slice(7).trim()));
    for (const line of lines) {
      if (line.startsWith("id: ")) coming = line.slice(4).trim();
      else if (line === "" && coming) [place, coming] = [coming, ""]; // the event is whole
    }
    if (told.delete("hello") && !lines.some((line) => line.includes('"resumed": true'))) {
      lookSoon(); // what changed meanwhile is not known
      for (const topic of ["nodes", "deployments", "events", "metrics"]) told.add(topic);
    }
    if (told.size) document.dispatchEvent(new CustomEvent("skerry:news", { detail: told }));
    if ([...told].some((topic) => topics.has(topic))) lookSoon();
  }
}

async function follow() {
  const controller = new AbortController();
  stopping = controller;
  heardAt = performance.now();
  while (!controller.signal.aborted) {
    try {
      await readStream(controller.signal);
    } catch {
      // The coordinator is away, or the page is.
    }
    await new Promise((done) => setTimeout(done, AGAIN_MS));
  }
}

function stop() {
  stopping?.abort();
  stopping = null;
}

function watch() {
  const silentMs = performance.now() - heardAt;
  if (!stopping || silentMs <= STALE_MS) return;
  banner.textContent = t("No word from the coordinator for %(s)s s. What you see may be old; trying again.", { s: Math.floor(silentMs / 1000) });
  banner.hidden = false;
  setPulse(false);
}

addEventListener("pointerdown", () => { isPressed = true; });
for (const kind of ["pointerup", "pointercancel", "blur"]) addEventListener(kind, () => { isPressed = false; });
addEventListener("pagehide", stop);
addEventListener("pageshow", (event) => { if (event.persisted && !stopping) follow(); });
document.addEventListener("visibilitychange", () => {
  if (document.hidden) stop();
  else if (!stopping) follow();
});
setInterval(watch, 1000);
setInterval(() => localise(main), 60_000);

localise(document);
nameZone(document.getElementById("zone"));
startPlots();
if (!document.hidden) follow();
