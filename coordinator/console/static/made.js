// Pieces of a page that several scripts make: elements, tables, times, and what Server-Timing tells.

import { localise } from "./times.js";
import { N_, t } from "./words.js";

const SPANS = { queue: N_("queue"), compute: N_("compute"), remote: N_("there"), forward: N_("there and way"), total: N_("in all") };

/** An element with these properties and children. */
export const make = (name, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
};

/** A number of milliseconds with its unit. */
export const ms = (value) => (value === null || value === undefined ? "–" : `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`);

/** A time as the page's other times are shown. */
export function when(atMs) {
  const place = make("span", {}, make("time", { dateTime: new Date(atMs).toISOString() }));
  localise(place);
  return place.firstChild;
}

/** Where a box is looked at. */
export const boxLink = (name) => make("a", { href: `/nodes/${encodeURIComponent(name)}` }, make("bdi", { textContent: name }));

/** A table; `heads` are [text, class] pairs, each row has as many texts or elements. On narrow screens each row is a card, where it has many. */
export function table(heads, rows, kind = "cards") {
  const head = make("tr", {}, ...heads.map(([text, kind]) => make("th", { textContent: text, className: kind === "num" ? "num" : "" })));
  const lines = rows.map((cells) =>
    make("tr", {}, ...cells.map((cell, index) => {
      const data = make("td", { className: heads[index][1] ?? "" }, cell);
      data.dataset.label = heads[index][0];
      return data;
    })),
  );
  return make("table", { className: kind }, make("thead", {}, head), make("tbody", {}, ...lines));
}

/** The parts of a header Server-Timing, as bars. */
export function timing(header) {
  const list = make("ul", { className: "timing" });
  const parts = [...header.matchAll(/([\w-]+)(?:;desc="([^"]*)")?;dur=([\d.]+)/g)].map(([, name, , took]) => [name, Number(took)]);
  const most = Math.max(0.001, ...parts.map(([, took]) => took));
  for (const [name, took] of parts) {
    const meter = make("meter", { min: 0, max: most, value: took });
    const word = Object.hasOwn(SPANS, name) ? t(SPANS[name]) : name;
    meter.setAttribute("aria-label", `${word} ${took} ms`);
    list.append(make("li", {}, make("span", { textContent: word }), meter, make("b", { textContent: `${took.toFixed(2)} ms` })));
  }
  return list;
}

/** What the API answers to a GET; throws its own words where it refuses. */
export async function asked(path) {
  const response = await fetch(path, { cache: "no-store" });
  const answer = await response.json();
  if (!response.ok) throw new Error(`${answer.error.message}${answer.error.hint ? ` (${answer.error.hint})` : ""}`);
  return { answer, headers: response.headers };
}

/** Which boxes told, and why others did not. */
export function told(answer, words) {
  const parts = [make("p", { className: "muted", textContent: words })];
  if (answer.silent.length) parts.push(make("ul", { className: "plan" }, ...answer.silent.map((reason) => make("li", { textContent: reason }))));
  return parts;
}

/** In the place of an answer. */
export const problem = (error) => make("p", { className: "bad-ink", textContent: error.message });
