// The style sheet's colours, for what is drawn and not styled: as they are now, light or dark.

const probe = document.createElement("span");
probe.hidden = true;
document.body.append(probe);

/** A colour by its name there, as a canvas takes it. */
export function ink(name) {
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}
