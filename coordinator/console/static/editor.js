// Asks the coordinator what a deployment would change while it is typed, and applies it when told to.

import { nameZone } from "./times.js";
import { N_, t } from "./words.js";

N_("starts"); N_("stops"); N_("changes"); N_("keeps");

const PAUSE_MS = 350;
const MOST_ROWS = 40;

const form = document.getElementById("editor");
const text = document.getElementById("text");
const verdict = document.getElementById("verdict");
const jump = document.getElementById("jump");
const counts = document.getElementById("counts");
const steps = document.getElementById("steps");
const apply = document.getElementById("apply");
const again = document.getElementById("again");
const againLabel = document.getElementById("again-label");

let asked = 0;
let timer = 0;
let plan = null;

async function call(path, body) {
  const answer = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/yaml", "X-CSRF-Token": form.dataset.csrf },
    body,
  });
  return { status: answer.status, body: await answer.json().catch(() => null) };
}

function say(level, words) {
  verdict.className = level;
  verdict.textContent = words;
}

function row(cells) {
  const line = document.createElement("tr");
  for (const cell of cells) {
    const data = document.createElement("td");
    data.textContent = cell;
    line.append(data);
  }
  return line;
}

function table(title, heads, rows, more) {
  const part = document.createElement("details");
  part.open = rows.length <= 8;
  const summary = document.createElement("summary");
  summary.textContent = title;
  const made = document.createElement("table");
  const head = made.createTHead().insertRow();
  for (const word of heads) {
    const cell = document.createElement("th");
    cell.textContent = word;
    head.append(cell);
  }
  made.createTBody().append(...rows.slice(0, MOST_ROWS).map(row));
  part.append(summary, made);
  if (more > MOST_ROWS) {
    const rest = document.createElement("p");
    rest.className = "muted";
    rest.textContent = t("and %(n)s more", { n: more - MOST_ROWS });
    part.append(rest);
  }
  return part;
}

/** How many, and what they do. */
const inWords = (count, one, many) => t(count === 1 ? one : many, { n: count.toLocaleString() });

function wordsOf(found) {
  const parts = [];
  if (found.starts) parts.push(inWords(found.starts, N_("%(n)s replica starts"), N_("%(n)s replicas start")));
  if (found.changes) parts.push(inWords(found.changes, N_("%(n)s replica changes"), N_("%(n)s replicas change")));
  if (found.stops) parts.push(inWords(found.stops, N_("%(n)s replica stops"), N_("%(n)s replicas stop")));
  if (found.keeps) parts.push(inWords(found.keeps, N_("%(n)s goes on as it is"), N_("%(n)s go on as they are")));
  if (found.refuses) parts.push(inWords(found.refuses, N_("%(n)s box refuses"), N_("%(n)s boxes refuse")));
  return parts.join(", ") || t("no box is concerned");
}

function show(found) {
  plan = found;
  const words = found.is_same ? t("This is what it is already") : wordsOf(found);
  const level = found.problem ? "warn-ink" : "";
  say(level, `${words}${found.spreads && !found.is_same ? t("; in waves") : ""}.${found.problem ? ` ${found.problem}.` : ""}`);
  counts.replaceChildren(
    ...found.warnings.map((warning) => {
      const item = document.createElement("li");
      item.textContent = warning;
      return item;
    }),
  );
  const tables = [];
  if (found.steps.length)
    tables.push(
      table(t("On each box"), [t("Box"), t("Replica"), t("What"), t("Why")],
        found.steps.map((step) => [step.node, step.replica, t(step.kind), step.text]), found.starts + found.changes + found.stops),
    );
  if (found.refusals.length)
    tables.push(table(t("Who refuses, and why"), [t("Box"), t("Reason")], found.refusals.map((one) => [one.node, one.reason]), found.refuses));
  if (found.others.length)
    tables.push(
      table(t("Other deployments that this moves"), [t("Box"), t("Replica"), t("What"), t("Why")],
        found.others.map((step) => [step.node, step.replica, t(step.kind), step.text]), found.others.length),
    );
  steps.replaceChildren(...tables);
  againLabel.hidden = !found.failed_before;
  againLabel.querySelector("span").textContent = t("Although this very text was taken back: %(reason)s", { reason: found.failed_before });
  apply.disabled = found.is_same || (Boolean(found.failed_before) && !again.checked);
}

function refuse(problem) {
  plan = null;
  apply.disabled = true;
  againLabel.hidden = true;
  counts.replaceChildren();
  steps.replaceChildren();
  const where = [problem.line ? t("line %(n)s", { n: problem.line }) : "", problem.field].filter(Boolean).join(", ");
  const names = problem.field && problem.message.startsWith(problem.field);
  say("bad-ink", `${where && !names ? `${where}: ` : ""}${problem.message}${problem.hint ? ` (${problem.hint})` : ""}`);
  jump.hidden = !problem.line;
  jump.textContent = t("Go to line %(n)s", { n: problem.line });
  jump.dataset.line = problem.line || "";
}

async function look() {
  const number = ++asked;
  let answer;
  try {
    answer = await call("/v1/deployments/plan?gently=true", text.value);
  } catch {
    if (number === asked) refuse({ message: t("The coordinator does not answer.") });
    return;
  }
  if (number !== asked) return; // something was typed since
  jump.hidden = true;
  if (answer.status === 200 && !answer.body.error) show(answer.body);
  else refuse(answer.body?.error ?? { message: t("The answer was %(status)s", { status: answer.status }) });
}

text.addEventListener("input", () => {
  apply.disabled = true;
  clearTimeout(timer);
  timer = setTimeout(look, PAUSE_MS);
});

again.addEventListener("change", () => plan && show(plan));

jump.addEventListener("click", () => {
  const lines = text.value.split("\n");
  const line = Math.min(Number(jump.dataset.line), lines.length);
  const start = lines.slice(0, line - 1).reduce((sum, one) => sum + one.length + 1, 0);
  text.focus();
  text.setSelectionRange(start, start + lines[line - 1].length);
});

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (apply.disabled) return;
  apply.disabled = true;
  const answer = await call(`/v1/deployments${again.checked ? "?again=true" : ""}`, text.value).catch(() => ({ status: 0 }));
  if (answer.status === 202) location.assign(`/deployments/${encodeURIComponent(answer.body.name)}`);
  else refuse(answer.body?.error ?? { message: t("The coordinator does not answer; nothing was changed that is known of.") });
});

window.addEventListener("beforeunload", (event) => {
  if (text.value !== text.defaultValue && !apply.disabled) event.preventDefault();
});

nameZone(document.getElementById("zone"));
if (text.value.trim()) look();
text.focus();
