// What would have become of the requests of the last hour: /v1/deployments/{name}/decisions. Boxes decide; nothing is done by it.

import { asked, boxLink, make, problem, table, told, when } from "./made.js";
import { N_, t } from "./words.js";

const WHO = [N_("edge"), N_("peer"), N_("cloud"), N_("refused")];
const MOVED = [[N_("Time"), "name"], [N_("Box"), "nowrap"], [N_("Requests"), "num"], [N_("As it was"), ""], [N_("As it would have been"), ""], [N_("Why, and by which numbers"), "wide"]];
const form = document.getElementById("replay");
const place = document.getElementById("replay-answer");

function bar(tally, label) {
  const total = WHO.reduce((sum, who) => sum + tally[who], 0);
  const drawn = (name, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  const picture = drawn("svg", { class: "share", viewBox: "0 0 100 8", preserveAspectRatio: "none", role: "img", "aria-label": `${label}: ${WHO.map((who) => `${t(who)} ${tally[who]}`).join(", ")}` });
  let start = 0;
  for (const who of WHO) {
    const width = (100 * tally[who]) / total;
    picture.append(drawn("rect", { class: who, x: start, width, height: 8 }));
    start += width;
  }
  return picture;
}

function shown(answer) {
  const total = WHO.reduce((sum, who) => sum + answer.before[who], 0);
  const parts = told(answer, t("%(n)s of %(all)s boxes that had requests told: %(requests)s requests, %(cases)s of them decided anew for all.", { n: answer.asked.length, all: answer.boxes, requests: total.toLocaleString(), cases: answer.cases }));
  if (!total) return [make("p", { className: "empty", textContent: t("Nobody asked in this time.") }), ...parts];
  const change = (who) => {
    const by = answer.after[who] - answer.before[who];
    const text = `${answer.after[who].toLocaleString()}${by ? ` (${by > 0 ? "+" : "−"}${Math.abs(by).toLocaleString()})` : ""}`;
    return make(by ? "b" : "span", { className: who === "refused" && by > 0 ? "bad-ink" : "", textContent: text });
  };
  const rows = WHO.map((who) => [t(who), answer.before[who].toLocaleString(), change(who)]);
  const counts = table([["", "name"], [t("As it was"), "num"], [t("As it would have been"), "num"]], rows, "");
  const moved = answer.moved.map((one) => [when(one.at_ms), boxLink(one.node), one.count.toLocaleString(), t(one.before), t(one.after), make("bdi", { textContent: one.text })]);
  return [
    make("p", { textContent: t("As it was") }), bar(answer.before, t("As it was")),
    make("p", { textContent: t("As it would have been") }), bar(answer.after, t("As it would have been")),
    counts,
    moved.length ? table(MOVED.map(([text, kind]) => [t(text), kind]), moved) : make("p", { className: "empty", textContent: t("No request would have gone elsewhere.") }),
    ...parts,
  ];
}

form?.addEventListener("submit", async (event) => {
  event.preventDefault();
  const data = new FormData(form);
  const query = new URLSearchParams([...data].filter(([name, value]) => name !== "deployment" && value.trim()).map(([name, value]) => [name, value.trim()]));
  place.replaceChildren(make("p", { className: "muted", textContent: t("Asking …") }));
  try {
    place.replaceChildren(...shown((await asked(`/v1/deployments/${encodeURIComponent(data.get("deployment"))}/decisions?${query}`)).answer));
  } catch (error) {
    place.replaceChildren(problem(error));
  }
});
