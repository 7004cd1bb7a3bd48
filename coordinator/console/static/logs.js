// What a sandbox writes, asked of its box every second while somebody looks.

import { nameZone } from "./times.js";
import { t } from "./words.js";

const EVERY_MS = 1000;
const WAIT_AT_MOST_MS = 30_000;
const FIRST_LINES = 200;
const NEXT_LINES = 2000;
const MOST_LINES = 5000;
const NEAR_PX = 40;

const log = document.getElementById("log");
const state = document.getElementById("log-state");
const follow = document.getElementById("follow");

let position = "";
let waits = EVERY_MS;
let timer = 0;

function say(level, words) {
  if (state.textContent === words) return;
  state.className = level;
  state.textContent = words;
}

/** Adds lines below; who reads further up is not moved. */
function add(lines) {
  const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_PX;
  for (const line of lines) {
    const row = document.createElement("span");
    row.textContent = `${line}\n`;
    log.append(row);
  }
  while (log.childElementCount > MOST_LINES) log.firstElementChild.remove();
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}

async function look() {
  const query = new URLSearchParams({ lines: position ? NEXT_LINES : FIRST_LINES, after: position });
  try {
    const answer = await fetch(`${log.dataset.path}?${query}`);
    const body = await answer.json();
    if (answer.ok) {
      add(body.lines);
      position = body.position || position;
      waits = EVERY_MS;
      say("muted", log.childElementCount ? "" : t("It has written nothing yet."));
    } else {
      waits = Math.min(2 * waits, WAIT_AT_MOST_MS);
      say("bad-ink", t("%(reason)s; asking on.", { reason: body.error?.message ?? t("The answer was %(status)s", { status: answer.status }) }));
    }
  } catch {
    waits = Math.min(2 * waits, WAIT_AT_MOST_MS);
    say("bad-ink", t("The coordinator does not answer; asking on."));
  }
  plan();
}

function plan() {
  clearTimeout(timer);
  if (follow.checked && !document.hidden) timer = setTimeout(look, waits * (0.9 + 0.2 * Math.random()));
}

follow.addEventListener("change", plan);
document.addEventListener("visibilitychange", plan);
nameZone(document.getElementById("zone"));
look();
