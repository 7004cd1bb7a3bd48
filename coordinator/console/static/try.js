// One request to a deployment, made of an image, a sound or numbers: see /v1/deployments/{name}/infer, which is the Open Inference Protocol's.

import { make, timing } from "./made.js";
import { t } from "./words.js";

const IMAGE_CHANNELS = [1, 3, 4];
const FREE_SIDE = 224;
const FREE_LINE_PX = 320;
const SOUND_HZ = 16_000;
const LEAST_SOUND = 128;
const MOST_SHOWN = 12;
const MOST_NUMBERS = 4_000_000;
const SCALES = { [t("0 to 1")]: (v) => v / 255, [t("−1 to 1")]: (v) => v / 127.5 - 1, [t("0 to 255")]: (v) => v, "ImageNet": (v, c) => (v / 255 - [0.485, 0.456, 0.406][c % 3]) / [0.229, 0.224, 0.225][c % 3] };

const [IMAGE, SOUND, NUMBERS] = [t("an image"), t("a sound"), t("numbers")];

const form = document.getElementById("try");
const status = document.getElementById("try-status");
const place = document.getElementById("try-answer");
let labels = [];

const labelled = (text, control) => make("label", {}, `${text} `, control);
const choice = (options, chosen) => {
  const select = make("select");
  for (const option of options) select.add(new Option(option, option, false, option === chosen));
  return select;
};

// -- inputs

/** Where an image's axes are, for shapes that can be one; null for others. */
function imageAxes(shape) {
  if (shape.length !== 4 && shape.length !== 3) return null;
  const [first, last] = [shape.at(-3), shape.at(-1)];
  if (IMAGE_CHANNELS.includes(first)) return { channels: first, height: shape.at(-2), width: shape.at(-1), isFirst: true };
  if (IMAGE_CHANNELS.includes(last)) return { channels: last, height: shape.at(-3), width: shape.at(-2), isFirst: false };
  return null;
}

const canBeSound = (shape, datatype) => datatype.startsWith("FP") && shape.length >= 1 && shape.length <= 2 && (typeof shape.at(-1) === "string" || shape.at(-1) >= LEAST_SOUND);
const sizesOf = (shape) => shape.map((size) => (typeof size === "number" ? size : 1));

/** One input's controls; `read` gives `{shape, data}`. */
class Input {
  constructor(fieldset) {
    this.name = fieldset.dataset.name;
    this.datatype = fieldset.dataset.datatype;
    this.shape = JSON.parse(fieldset.dataset.shape);
    fieldset.append(make("legend", { textContent: `${this.name} (${this.datatype} ${this.shape.join(" × ") || t("scalar")})` }));
    this.axes = this.datatype === "BYTES" ? null : imageAxes(this.shape);
    const kinds = [...(this.axes ? [IMAGE] : []), ...(canBeSound(this.shape, this.datatype) ? [SOUND] : []), NUMBERS];
    this.kind = choice(kinds, kinds[0]);
    this.kind.setAttribute("aria-label", t("What %(name)s is made of", { name: this.name }));
    this.body = make("div", { className: "try-body" });
    fieldset.append(...(kinds.length > 1 ? [this.kind] : []), this.body);
    this.kind.addEventListener("change", () => this.show());
    this.show();
  }

  show() {
    this.body.replaceChildren();
    ({ [IMAGE]: () => this.askImage(), [SOUND]: () => this.askSound(), [NUMBERS]: () => this.askNumbers() })[this.kind.value]();
  }

  askImage() {
    this.file = make("input", { type: "file", accept: "image/*" });
    this.file.setAttribute("aria-label", t("Image for %(name)s", { name: this.name }));
    this.scaleBy = choice(Object.keys(SCALES), typeof this.axes.width === "number" || typeof this.axes.height === "number" ? t("0 to 1") : t("−1 to 1"));
    this.preview = make("canvas", { className: "preview", hidden: true });
    this.file.addEventListener("change", () => this.drawImage());
    this.body.append(this.file, labelled(t("values"), this.scaleBy), this.preview);
  }

  async drawImage() {
    const [picked] = this.file.files;
    if (!picked) return;
    const image = await createImageBitmap(picked);
    const isLine = this.labelled && this.axes.isFirst; // a line of text keeps its proportions
    const height = typeof this.axes.height === "number" ? this.axes.height : isLine ? 48 : FREE_SIDE;
    const width = typeof this.axes.width === "number" ? this.axes.width : isLine ? Math.max(FREE_LINE_PX, Math.ceil((image.width * height) / image.height)) : FREE_SIDE;
    Object.assign(this.preview, { width, height, hidden: false });
    const pen = this.preview.getContext("2d", { willReadFrequently: true });
    const drawn = isLine ? Math.min(width, Math.round((image.width * height) / image.height)) : width;
    pen.drawImage(image, 0, 0, drawn, height);
    this.drawn = drawn;
  }

  get labelled() { return labels.length > 0; }

  readImage() {
    if (this.preview.hidden) throw new Error(t("%(name)s: choose an image first", { name: this.name }));
    const { width, height } = this.preview;
    const pixels = this.preview.getContext("2d").getImageData(0, 0, width, height).data;
    const { channels, isFirst } = this.axes;
    const scale = SCALES[this.scaleBy.value];
    const isFloat = this.datatype.startsWith("FP");
    const data = new Array(width * height * channels);
    for (let y = 0; y < height; y += 1) {
      for (let x = 0; x < width; x += 1) {
        const from = 4 * (y * width + x);
        for (let c = 0; c < channels; c += 1) {
          const raw = channels === 1 ? 0.299 * pixels[from] + 0.587 * pixels[from + 1] + 0.114 * pixels[from + 2] : pixels[from + c];
          const value = this.labelled && x >= this.drawn ? 0 : scale(raw, c); // padding is nought, as it is in training
          data[isFirst ? (c * height + y) * width + x : (y * width + x) * channels + c] = isFloat ? value : Math.round(value);
        }
      }
    }
    const shape = isFirst ? [channels, height, width] : [height, width, channels];
    return { shape: this.shape.length === 4 ? [1, ...shape] : shape, data };
  }

  askSound() {
    this.file = make("input", { type: "file", accept: "audio/*" });
    this.file.setAttribute("aria-label", t("Sound for %(name)s", { name: this.name }));
    this.at = make("input", { type: "number", min: 0, step: 0.1, value: 0 });
    this.body.append(this.file, labelled(t("from second"), this.at), make("span", { className: "muted", textContent: t("mono, %(n)s kHz", { n: SOUND_HZ / 1000 }) }));
  }

  async readSound() {
    const [picked] = this.file.files;
    if (!picked) throw new Error(t("%(name)s: choose a sound first", { name: this.name }));
    const context = new OfflineAudioContext(1, 1, SOUND_HZ);
    const sound = await context.decodeAudioData(await picked.arrayBuffer());
    const whole = sound.getChannelData(0);
    const most = typeof this.shape.at(-1) === "number" ? this.shape.at(-1) : Number(this.length?.value) || 576;
    const from = Math.min(whole.length, Math.round(Number(this.at.value) * SOUND_HZ));
    const data = new Array(most).fill(0).map((_, index) => whole[from + index] ?? 0);
    return { shape: [...sizesOf(this.shape).slice(0, -1), most], data };
  }

  askNumbers() {
    const sizes = sizesOf(this.shape);
    this.sizes = make("input", { value: sizes.join(" "), size: 16 });
    const isText = this.datatype === "BYTES";
    this.numbers = make("textarea", { rows: 2, value: isText ? "" : "0" });
    this.numbers.setAttribute("aria-label", t("Values of %(name)s", { name: this.name }));
    this.body.append(...(this.shape.length ? [labelled(t("shape"), this.sizes)] : []), labelled(isText ? t("text, a line each") : t("values; one alone fills it"), this.numbers));
  }

  readNumbers() {
    const shape = this.shape.length ? this.sizes.value.trim().split(/[\s,×x]+/).filter(Boolean).map(Number) : [];
    if (shape.some((size) => !Number.isInteger(size) || size < 1)) throw new Error(t("%(name)s: the shape is whole numbers from 1", { name: this.name }));
    const count = shape.reduce((product, size) => product * size, 1);
    if (count > MOST_NUMBERS) throw new Error(t("%(name)s: %(n)s values are too many to be sent from here", { name: this.name, n: count }));
    if (this.datatype === "BYTES") {
      const lines = this.numbers.value.split("\n");
      if (lines.length !== count) throw new Error(t("%(name)s: %(n)s lines are needed, there are %(found)s", { name: this.name, n: count, found: lines.length }));
      return { shape, data: lines };
    }
    const words = this.numbers.value.replace(/[[\],;]/g, " ").trim().split(/\s+/).filter(Boolean);
    const values = words.map((word) => (this.datatype === "BOOL" ? ["true", "1"].includes(word.toLowerCase()) : Number(word)));
    if (values.some((value) => Number.isNaN(value))) throw new Error(t("%(name)s: not all of it is numbers", { name: this.name }));
    if (values.length !== 1 && values.length !== count) throw new Error(t("%(name)s: %(n)s values are needed, there are %(found)s", { name: this.name, n: count, found: values.length }));
    return { shape, data: values.length === count ? values : new Array(count).fill(values[0]) };
  }

  async read() {
    const reader = { [IMAGE]: () => this.readImage(), [SOUND]: () => this.readSound(), [NUMBERS]: () => this.readNumbers() };
    return { name: this.name, datatype: this.datatype, ...(await reader[this.kind.value]()) };
  }
}

// -- the answer

/** A line of text out of probabilities per step and character (CTC: the first index is none, the last a space). */
function readLine({ shape, data }) {
  const [steps, classes] = shape.slice(-2);
  let [text, before] = ["", 0];
  for (let step = 0; step < steps; step += 1) {
    let best = 0;
    for (let index = 1; index < classes; index += 1) if (data[step * classes + index] > data[step * classes + best]) best = index;
    if (best && best !== before) text += labels[best - 1] ?? " ";
    before = best;
  }
  return text;
}

function shown(output) {
  const { name, datatype, shape, data } = output;
  const parts = [make("h3", { textContent: `${name} (${datatype} ${shape.join(" × ")})` })];
  if (labels.length && shape.length === 3 && Math.abs(shape[2] - labels.length) <= 2) {
    parts.push(make("p", { className: "answer-text", textContent: readLine(output) || t("(no character)") }));
  } else if (shape.length <= 2 && shape.at(-1) > 1 && (shape[0] ?? 1) === 1 && datatype.startsWith("FP")) {
    const best = data.map((value, index) => [value, index]).sort((a, b) => b[0] - a[0]).slice(0, MOST_SHOWN);
    const list = make("ol", { className: "best" });
    for (const [value, index] of best) list.append(make("li", {}, make("b", { textContent: labels[index] ?? String(index) }), ` ${value.toPrecision(4)}`));
    parts.push(list);
  }
  const few = data.slice(0, MOST_SHOWN).map((value) => (typeof value === "number" && !Number.isInteger(value) ? value.toPrecision(4) : String(value)));
  parts.push(make("pre", { className: "file", textContent: few.join(", ") + (data.length > few.length ? t(", … %(n)s values", { n: data.length.toLocaleString() }) : "") }));
  return parts;
}

async function ask(inputs) {
  const tensors = [];
  for (const input of inputs) tensors.push(await input.read());
  const [deployment, node] = ["try-deployment", "try-node"].map((id) => document.getElementById(id).value);
  const address = `/v1/deployments/${encodeURIComponent(deployment)}/infer${node ? `?node=${encodeURIComponent(node)}` : ""}`;
  const headers = { "Content-Type": "application/json", "X-CSRF-Token": form.dataset.csrf };
  const response = await fetch(address, { method: "POST", headers, body: JSON.stringify({ inputs: tensors }) });
  const answer = await response.json();
  if (!response.ok) throw new Error(`${answer.error.message}${answer.error.hint ? ` (${answer.error.hint})` : ""}`);
  return { answer, headers: response.headers };
}

async function go(inputs) {
  const button = document.getElementById("try-go");
  [button.disabled, status.textContent, status.className, place.hidden] = [true, t("Asking …"), "muted", true];
  try {
    const { answer, headers } = await ask(inputs);
    const who = t("%(who)s answered, %(box)s: %(why)s", { who: t(headers.get("Skerry-Served-By") ?? "?"), box: headers.get("Skerry-Node") ?? "?", why: headers.get("Skerry-Reason") ?? t("no reason given") });
    place.replaceChildren(make("p", { className: "served", textContent: who }), timing(headers.get("Server-Timing") ?? ""), ...answer.outputs.flatMap(shown));
    [place.hidden, status.textContent] = [false, ""];
  } catch (error) {
    [status.textContent, status.className] = [error.message, "bad-ink"];
  } finally {
    button.disabled = false;
  }
}

if (form) {
  const inputs = [...form.querySelectorAll("fieldset")].map((fieldset) => new Input(fieldset));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    go(inputs);
  });
  const network = document.getElementById("network");
  if (network) fetch(network.dataset.source).then((response) => (response.ok ? response.json() : {})).then((graph) => { labels = graph.labels ?? []; }, () => {});
}
