// Makes a claim for a new box, shows what to paste there, and watches it join.

import { t } from "./words.js";

const LOOK_EVERY_MS = 2000;
const form = document.getElementById("claim");
const made = document.getElementById("claim-made");
const state = document.getElementById("claim-state");
const problem = document.getElementById("claim-problem");
const code = made.querySelector("code");
let watching = 0;

const say = (words) => { state.textContent = words; };

function labelsOf(text) {
  const pairs = text.trim().split(/\s+/).filter(Boolean).map((word) => [word, ...word.split(/=(.*)/s)]);
  const wrong = pairs.find(([, key, value]) => !key || !value);
  if (wrong) throw new Error(t("labels: %(word)s is not KEY=VALUE", { word: wrong[0] }));
  return Object.fromEntries(pairs.map(([, key, value]) => [key, value]));
}

function commandOf({ claim, fingerprint }, node) {
  return [
    t('# on the box, with node = "%(node)s" and coordinator.url = "%(url)s" in /etc/skerry/agent.toml', { node: node || "NAME", url: location.origin }),
    `sudo skerry-agent enroll --config /etc/skerry/agent.toml --fingerprint ${fingerprint} --trusted-keys /etc/skerry/coordinator.pub <<'CLAIM'`,
    claim,
    "CLAIM",
    "sudo systemctl restart skerry-agent",
  ].join("\n");
}

async function read(path) {
  const response = await fetch(path, { cache: "no-store" });
  return response.ok ? response.json() : null;
}

/** The claim is redeemed, then the box is heard. */
async function watch(id) {
  const claims = (await read("/v1/claims")) ?? [];
  const claim = claims.find((one) => one.id === id);
  if (!claim) say(t("The claim was withdrawn, or has ended."));
  else if (!claim.used_by) say(t("Waiting for the box …"));
  else {
    const node = await read(`/v1/nodes/${encodeURIComponent(claim.used_by)}`);
    const link = Object.assign(document.createElement("a"), { href: `/nodes/${encodeURIComponent(claim.used_by)}`, textContent: claim.used_by });
    if (node?.state === "online") {
      state.replaceChildren("● ", link, t(" is online."));
      return;
    }
    state.replaceChildren("◐ ", link, t(" joined; waiting until it is heard …"));
  }
  if (claim) watching = setTimeout(() => watch(id).catch(() => {}), LOOK_EVERY_MS);
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  clearTimeout(watching);
  problem.hidden = true;
  const data = new FormData(form);
  try {
    const body = { labels: labelsOf(data.get("labels")), tier: data.get("tier"), expires_s: Number(data.get("expires_s")) };
    if (data.get("node").trim()) body.node = data.get("node").trim();
    const response = await fetch("/v1/claims", {
      method: "POST", headers: { "Content-Type": "application/json", "X-CSRF-Token": form.dataset.csrf }, body: JSON.stringify(body),
    });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error.message);
    code.textContent = commandOf(answer, body.node);
    made.hidden = false;
    watch(answer.id).catch(() => {});
  } catch (error) {
    [problem.textContent, problem.hidden] = [error.message, false];
  }
});

document.getElementById("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(code.textContent);
    say(t("Copied. Waiting for the box …"));
  } catch {
    getSelection().selectAllChildren(code);
  }
});
