// Puts every <time> into the viewer's zone and manner. Without scripts the UTC text stays.

import { t } from "./words.js";

const clock = new Intl.DateTimeFormat(document.documentElement.lang === "en" ? undefined : document.documentElement.lang, { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
const day = new Intl.DateTimeFormat(document.documentElement.lang === "en" ? undefined : document.documentElement.lang, { day: "numeric", month: "short" });
const whole = new Intl.DateTimeFormat(document.documentElement.lang === "en" ? undefined : document.documentElement.lang, { dateStyle: "full", timeStyle: "long" });

export const hours = new Intl.DateTimeFormat(document.documentElement.lang === "en" ? undefined : document.documentElement.lang, { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });

/** Rewrites the times below `root`; harmless to repeat. */
export function localise(root) {
  const today = new Date().toDateString();
  for (const element of root.querySelectorAll("time[datetime]")) {
    const at = new Date(element.dateTime);
    if (Number.isNaN(at.valueOf())) continue;
    const isToday = at.toDateString() === today;
    const { form } = element.dataset; // clock, minute or full
    const time = (form === "minute" ? hours : clock).format(at);
    const text = isToday && form !== "full" ? time : `${day.format(at)} ${time}`;
    if (element.textContent !== text) element.textContent = text;
    element.title = whole.format(at);
  }
}

/** Says which zone that is. */
export function nameZone(element) {
  element.textContent = t("Times are %(zone)s", { zone: Intl.DateTimeFormat().resolvedOptions().timeZone || t("local") });
}
