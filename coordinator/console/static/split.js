// Asks a box what it would do with a request that came now: /v1/deployments/{name}/decision. Nothing is done by it.

import { asked, make, ms, problem } from "./made.js";
import { N_, t } from "./words.js";

const form = document.getElementById("whatif");
const place = document.getElementById("whatif-answer");
const WORDS = { here: N_("would answer itself"), forward: N_("would pass it on to %(node)s"), refuse: N_("would refuse it") };

function row(cells) {
  const line = document.createElement("tr");
  cells.forEach((cell) => line.append(make("td", { textContent: cell })));
  return line;
}

function shown(decision, box) {
  const { numbers } = decision;
  const title = make("p", {}, make("b", { textContent: `${box}: ${t(WORDS[decision.decision], { node: decision.node })}` }), `; ${decision.reason}`);
  const table = document.createElement("table");
  const head = table.createTHead().insertRow();
  for (const word of [t("Who"), t("Would take"), t("Of that"), t("Why not")]) head.append(make("th", { textContent: word }));
  const body = table.createTBody();
  body.append(row([t("the box itself"), ms(numbers.here_ms), t("queue %(queue)s, run %(run)s", { queue: ms(numbers.queue_ms), run: ms(numbers.service_ms) }), ""]));
  for (const other of numbers.upstreams)
    body.append(row([other.node, ms(other.estimate_ms), t("link %(link)s, there %(there)s", { link: ms(other.link_ms), there: ms(other.remote_ms) }), other.why_not]));
  return [title, make("p", { textContent: t("The request has %(time)s left.", { time: ms(numbers.remaining_ms) }) }), table];
}

form?.addEventListener("submit", async (event) => {
  event.preventDefault();
  const data = new FormData(form);
  const query = new URLSearchParams();
  if (data.get("node").trim()) query.set("node", data.get("node").trim());
  if (data.get("deadline_ms")) query.set("deadline_ms", data.get("deadline_ms"));
  if (data.get("size_kb")) query.set("size_bytes", String(1000 * Number(data.get("size_kb"))));
  try {
    const { answer, headers } = await asked(`/v1/deployments/${encodeURIComponent(data.get("deployment"))}/decision?${query}`);
    place.replaceChildren(...shown(answer, headers.get("Skerry-Asked") ?? ""));
  } catch (error) {
    place.replaceChildren(problem(error));
  }
});
