// The requests of a deployment that took longest, and where the time went: /v1/deployments/{name}/slowest, asked once.

import { asked, boxLink, make, ms, problem, table, timing, told, when } from "./made.js";
import { N_, t } from "./words.js";

const MOST = 8;
const ENDS = { edge: N_("edge"), peer: N_("peer"), cloud: N_("cloud"), refused: N_("refused"), failed: N_("failed"), cancelled: N_("given up by its caller") };
const HEADS = [[N_("Time"), "name"], [N_("Asked"), "nowrap"], [N_("Took"), "num"], [N_("Answered by"), ""], [N_("Where the time went"), "wide"], [N_("Why there"), "wide"]];
const place = document.getElementById("slowest");

function took(one) {
  const isBad = one.took_ms > one.deadline_ms || ["refused", "failed", "cancelled"].includes(one.who);
  return make("span", { className: isBad ? "bad-ink" : "", textContent: t("%(took)s of %(deadline)s", { took: ms(one.took_ms), deadline: ms(one.deadline_ms) }) });
}

function by(one) {
  return one.node ? make("span", {}, `${t(ENDS[one.who])}, `, boxLink(one.node)) : make("span", { textContent: t(ENDS[one.who]) });
}

async function show() {
  const { answer } = await asked(`/v1/deployments/${encodeURIComponent(place.dataset.deployment)}/slowest`);
  const words = t("%(n)s of %(all)s boxes that had requests told.", { n: answer.asked.length, all: answer.boxes });
  const rows = answer.requests.slice(0, MOST).map((one) => [
    when(one.at_ms), boxLink(one.asked), took(one), by(one), one.timing ? timing(one.timing) : "–", make("bdi", { textContent: one.reason }),
  ]);
  const list = rows.length ? table(HEADS.map(([text, kind]) => [t(text), kind]), rows) : make("p", { className: "empty", textContent: t("No request was told of.") });
  place.replaceChildren(list, ...told(answer, words));
}

show().catch((error) => place.replaceChildren(problem(error)));
