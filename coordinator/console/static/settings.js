// What somebody wants of the console in this browser: kept here, and colours in a cookie, so that pages come in them.

const KEYS_OFF = "skerry.keys.off";
const YEAR_S = 31_536_000;
const form = document.getElementById("preferences");
const cookie = (name) => document.cookie.split("; ").find((one) => one.startsWith(`${name}=`))?.split("=")[1] ?? "";

form.elements.theme.value = cookie("skerry_theme");
form.elements.keys.value = localStorage.getItem(KEYS_OFF) ? "off" : "";

form.addEventListener("change", () => {
  const theme = form.elements.theme.value;
  document.cookie = `skerry_theme=${theme}; path=/; max-age=${theme ? YEAR_S : 0}; SameSite=Strict`;
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  if (form.elements.keys.value) localStorage.setItem(KEYS_OFF, "1");
  else localStorage.removeItem(KEYS_OFF);
});
