// Puts every <time> into the viewer's zone and manner. Without scripts the UTC text stays.

const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
const day = new Intl.DateTimeFormat(undefined, { day: "numeric", month: "short" });
const whole = new Intl.DateTimeFormat(undefined, { dateStyle: "full", timeStyle: "long" });

export const hours = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });

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
  element.textContent = `Times are ${Intl.DateTimeFormat().resolvedOptions().timeZone || "local"}`;
}
