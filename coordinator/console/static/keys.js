// Keys for who has no hand free for the mouse: "/" searches, "g" and a letter goes somewhere, "?" says which. They can be turned off.

import { t } from "./words.js";

const OFF = "skerry.keys.off";
const PAUSE_MS = 1500;
const SEARCH = "/nodes";

const pages = new Map();
for (const link of document.querySelectorAll(".top nav a[data-key]")) pages.set(link.dataset.key, link);

let leading = 0;

function isTyping(target) {
  return target instanceof HTMLElement && (target.isContentEditable || ["INPUT", "TEXTAREA", "SELECT"].includes(target.tagName));
}

function key(word) {
  const made = document.createElement("kbd");
  made.textContent = word;
  return made;
}

function listed() {
  const list = document.createElement("dl");
  const rows = [[["/"], t("Look for boxes")], [["?"], t("These keys")]];
  for (const [letter, link] of pages) rows.push([["g", letter], link.textContent]);
  for (const [keys, what] of rows) {
    const [term, said] = [document.createElement("dt"), document.createElement("dd")];
    term.append(...keys.map(key));
    said.textContent = what;
    list.append(term, said);
  }
  return list;
}

function explain() {
  const dialog = document.createElement("dialog");
  dialog.className = "ask";
  dialog.setAttribute("aria-labelledby", "keys-title");
  dialog.innerHTML = `<h2 id="keys-title">${t("Keys")}</h2>
<form method="dialog"><label class="check"><input type="checkbox"> ${t("Listen to these keys")}</label><p class="apply"><button>${t("Close")}</button></p></form>`;
  dialog.querySelector("h2").after(listed());
  const box = dialog.querySelector("input");
  box.checked = !localStorage.getItem(OFF);
  box.addEventListener("change", () => (box.checked ? localStorage.removeItem(OFF) : localStorage.setItem(OFF, "1")));
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}

function search() {
  const box = document.querySelector('input[type="search"]');
  if (!box) return location.assign(`${SEARCH}#search`);
  box.focus();
  box.select();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || isTyping(event.target) || document.querySelector("dialog[open]")) return;
  if (localStorage.getItem(OFF)) return;
  const follows = performance.now() - leading < PAUSE_MS;
  leading = 0;
  const link = follows && pages.get(event.key);
  if (link) link.click();
  else if (event.key === "g") leading = performance.now();
  else if (event.key === "/") search();
  else if (event.key === "?") explain();
  else return;
  event.preventDefault();
});

document.getElementById("keys")?.addEventListener("click", explain);
if (location.hash === "#search") search();
