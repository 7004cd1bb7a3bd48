// What scripts say, in the page's language. English stands in the scripts; `make words` makes a module for each other language.

const { lang } = document.documentElement;
const words = lang === "en" ? {} : await import(`./words/${lang.split("-")[0]}.js`).then((module) => module.default, () => ({}));

/** Marks a text that is translated where it is said. */
export const N_ = (text) => text;

/** A text; `%(name)s` in it stands for `values.name`. */
export function t(text, values = {}) {
  return (Object.hasOwn(words, text) ? words[text] : text).replace(/%\((\w+)\)s/g, (_, name) => values[name]);
}
