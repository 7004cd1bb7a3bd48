// Buttons that change something: what will happen is said first, then the API is asked to do it.

import { t } from "./words.js";

const dialog = document.createElement("dialog");
dialog.className = "ask";
dialog.setAttribute("aria-labelledby", "ask-title");
dialog.innerHTML = `<form method="dialog">
  <h2 id="ask-title"></h2><p class="what"></p>
  <label hidden>${t("Why, for whoever wonders")} <input maxlength="200" autocomplete="off"></label>
  <p class="problem" role="alert" hidden></p>
  <p class="apply"><button class="do" value="do"></button> <button class="plain" value="cancel" formnovalidate>${t("Cancel")}</button></p>
</form>`;
document.body.append(dialog);

const title = dialog.querySelector("h2");
const what = dialog.querySelector(".what");
const reason = dialog.querySelector("label");
const problem = dialog.querySelector(".problem");
const act = dialog.querySelector("button.do");
let asked = null;

function complain(words) {
  problem.textContent = words;
  problem.hidden = false;
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-path]");
  if (!button) return;
  asked = { ...button.dataset };
  title.textContent = asked.title || button.textContent;
  what.textContent = asked.what;
  act.textContent = button.textContent;
  reason.hidden = !("reason" in asked);
  reason.querySelector("input").value = "";
  problem.hidden = true;
  dialog.showModal();
});

dialog.querySelector("form").addEventListener("submit", async (event) => {
  if (event.submitter?.value !== "do") return;
  event.preventDefault();
  act.disabled = true;
  problem.hidden = true;
  try {
    const answer = await fetch(asked.path, {
      method: asked.method || "POST",
      headers: { "Content-Type": "application/json", "X-CSRF-Token": document.querySelector('meta[name="csrf"]').content },
      body: reason.hidden ? undefined : JSON.stringify({ reason: reason.querySelector("input").value }),
    });
    if (answer.ok) {
      dialog.close();
      if (asked.then) location.assign(asked.then);
    } else {
      const said = await answer.json().catch(() => null);
      complain(said?.error?.message ?? t("The answer was %(status)s.", { status: answer.status }));
    }
  } catch {
    complain(t("The coordinator does not answer; nothing was changed that is known of."));
  } finally {
    act.disabled = false;
  }
});
