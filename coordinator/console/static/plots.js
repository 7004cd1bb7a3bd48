// Draws the plots from /v1/split and /v1/nodes/{id}/load with uPlot (vendor/uplot, a classic script: window.uPlot).

import { ink } from "./ink.js";
import { hours } from "./times.js";
import { N_, t } from "./words.js";

const EVERY_MS = 2500;
const WHOLE_EVERY_MS = 60_000;
const MARKS_EVERY_MS = 10_000;
const BINS = 180;
const LAG_S = 4; // boxes and the coordinator gather before they write
const WHO = [N_("edge"), N_("peer"), N_("cloud"), N_("refused")];
const GIB = 2 ** 30;

// -- data

/** One address's points by time. After the first, only the last minutes are asked for; all again now and then, for what came late. */
class Source {
  constructor(path, minutes) {
    this.path = path;
    this.minutes = minutes;
    this.points = new Map();
    this.bucketS = 1;
    this.skewMs = 0;
    this.wholeAt = -Infinity;
  }

  async refresh() {
    const isWhole = performance.now() - this.wholeAt > WHOLE_EVERY_MS;
    const address = new URL(this.path, location.origin);
    address.searchParams.set("minutes", isWhole ? this.minutes : Math.min(2, this.minutes));
    const response = await fetch(address, { cache: "no-store" });
    if (!response.ok) throw new Error(`${response.status}`);
    const answer = await response.json();
    const date = Date.parse(response.headers.get("Date"));
    if (!Number.isNaN(date)) this.skewMs = date - Date.now();
    if (isWhole) {
      this.points.clear();
      this.wholeAt = performance.now();
    }
    this.bucketS = answer.bucket_s;
    for (const point of answer.points) this.points.set(point.at_s, point);
  }

  /** Bins that are complete: their width, their beginnings, and the points in each. */
  bins() {
    const spanS = this.minutes * 60;
    const width = Math.max(1, Math.round(spanS / BINS / this.bucketS)) * this.bucketS;
    const end = Math.floor(((Date.now() + this.skewMs) / 1000 - LAG_S) / width) * width;
    const first = end - Math.floor(spanS / width) * width;
    const at = [];
    const held = [];
    for (let s = first; s < end; s += width) {
      at.push(s);
      held.push([]);
    }
    for (const [s, point] of this.points) {
      const index = Math.floor((s - first) / width);
      if (index >= 0 && index < held.length) held[index].push(point);
    }
    return { width, at, held };
  }
}

const sum = (points, key) => points.reduce((total, point) => total + point[key], 0);
const mean = (points, key) => (points.length ? sum(points, key) / points.length : null);

/**
 * Requests per second by who answered: each by itself, and piled up for drawing. Nothing is drawn before the first that was measured,
 * nor, of one box, where the box was not heard at all: no requests is not the same as no word.
 */
function splitData({ width, at, held }, heard) {
  const begun = held.findIndex((points) => points.length);
  const isKnown = (points, index) => begun >= 0 && index >= begun && (points.length > 0 || !heard || heard.held[index]?.length > 0);
  const own = WHO.map((who) => held.map((points, index) => (isKnown(points, index) ? sum(points, who) / width : null)));
  const piled = own.map((_, top) => at.map((_, index) => (own[0][index] === null ? null : own.slice(0, top + 1).reduce((t, row) => t + row[index], 0))));
  return { own, data: [at, ...piled.reverse()] };
}

/** Quantiles can't be added up: p50 is weighed by answers, p99 is the worst bucket's. */
function latencyData({ at, held }, deadlineMs) {
  const answered = (point) => point.edge + point.peer + point.cloud;
  const p50 = held.map((points) => {
    const counted = points.filter((point) => point.p50_ms > 0);
    const total = counted.reduce((all, point) => all + answered(point), 0);
    return total ? counted.reduce((all, point) => all + point.p50_ms * answered(point), 0) / total : null;
  });
  const p99 = held.map((points) => Math.max(0, ...points.map((point) => point.p99_ms)) || null);
  return { own: [p50, p99], data: [at, p50, p99, at.map(() => deadlineMs)] };
}

function loadData({ at, held }, hasGpu) {
  const rows = [held.map((points) => scaled(mean(points, "cpu_ratio"), 100))];
  if (hasGpu) rows.push(held.map((points) => scaled(mean(points, "gpu_ratio"), 100)));
  return { own: rows, data: [at, ...rows] };
}

function memoryData({ at, held }) {
  const row = held.map((points) => scaled(mean(points, "memory_used_bytes"), 1 / GIB));
  return { own: [row], data: [at, row] };
}

/** One row of what was read, in another unit; a 0 that stands for "not known" is left out. */
function levelData({ at, held }, key, factor = 1, isKnown = () => true) {
  const row = held.map((points) => scaled(mean(points.filter((point) => isKnown(point[key])), key), factor));
  return { own: [row], data: [at, row] };
}

function networkData({ at, held }) {
  const rows = ["network_received_bytes_per_s", "network_sent_bytes_per_s"].map((key) => held.map((points) => scaled(mean(points, key), 1 / 1000)));
  return { own: rows, data: [at, ...rows] };
}

const scaled = (value, factor) => (value === null ? null : value * factor);

// -- drawing

const short = (value) => (value === null || value === undefined ? "–" : value < 10 ? value.toFixed(1) : Math.round(value).toLocaleString());
const area = (name) => ({ stroke: ink(name), fill: ink(name), width: 0, points: { show: false } });
const line = (name, extra = {}) => ({ stroke: ink(name), width: 1.75, points: { show: false }, ...extra });
const upTo = (most) => (_, __, max) => [0, most(max ?? 0)];

const KINDS = {
  split: {
    path: ({ deployment, node }) => `/v1/split?${new URLSearchParams({ deployment, node })}`,
    data: (bins, _, heard) => splitData(bins, heard),
    series: () => [...WHO].reverse().map(area),
    range: () => upTo((max) => Math.max(1, max * 1.12)),
    words: (own, i) => t("%(counts)s per second", { counts: WHO.map((who, row) => `${t(who)} ${short(own[row][i])}`).join(", ") }),
    empty: t("No requests were measured in this time."),
  },
  latency: {
    path: ({ deployment, node }) => `/v1/split?${new URLSearchParams({ deployment, node })}`,
    data: (bins, figure) => latencyData(bins, Number(figure.deadline)),
    series: () => [line("p50"), line("p99"), line("deadline", { dash: [5, 4], width: 1 })],
    range: ({ deadline }) => (u) => {
      const worst = Math.max(1, ...u.data[2].filter((value) => value !== null)) * 1.15;
      return [0, Number(deadline) <= worst * 4 ? Math.max(worst, Number(deadline) * 1.12) : worst];
    },
    words: (own, i) => `p50 ${short(own[0][i])} ms, p99 ${short(own[1][i])} ms`,
    empty: t("No answers were measured in this time."),
  },
  load: {
    path: ({ node }) => `/v1/nodes/${encodeURIComponent(node)}/load`,
    data: (bins, figure) => loadData(bins, figure.gpu === "1"),
    series: ({ gpu }) => (gpu === "1" ? [line("edge"), line("cloud")] : [line("edge", { fill: ink("edge-soft") })]),
    range: () => upTo(() => 100),
    words: (own, i) => `CPU ${short(own[0][i])} %` + (own[1] ? `, GPU ${short(own[1][i])} %` : ""),
    empty: t("Nothing was measured in this time."),
  },
  memory: {
    path: ({ node }) => `/v1/nodes/${encodeURIComponent(node)}/load`,
    data: (bins) => memoryData(bins),
    series: () => [line("edge", { fill: ink("edge-soft") })],
    range: ({ total }) => upTo((max) => (Number(total) ? Number(total) / GIB : max * 1.12)),
    words: (own, i) => `${own[0][i]?.toFixed(2) ?? "–"} GiB`,
    empty: t("Nothing was measured in this time."),
  },
};

const LOAD = { path: ({ node }) => `/v1/nodes/${encodeURIComponent(node)}/load`, empty: t("Nothing was measured in this time.") };
Object.assign(KINDS, {
  temperature: {
    ...LOAD,
    data: (bins) => levelData(bins, "temperature_c", 1, (value) => value > 0),
    series: () => [line("p99")],
    range: () => upTo((max) => Math.max(60, max * 1.12)),
    words: (own, i) => `${short(own[0][i])} °C`,
  },
  power: {
    ...LOAD,
    data: (bins) => levelData(bins, "power_w"),
    series: () => [line("edge", { fill: ink("edge-soft") })],
    range: () => upTo((max) => Math.max(10, max * 1.12)),
    words: (own, i) => `${short(own[0][i])} W`,
  },
  network: {
    ...LOAD,
    data: (bins) => networkData(bins),
    series: () => [line("p50"), line("p99")],
    range: () => upTo((max) => Math.max(1, max * 1.12)),
    words: (own, i) => t("received %(received)s kB/s, sent %(sent)s kB/s", { received: short(own[0][i]), sent: short(own[1][i]) }),
  },
  rtt: {
    ...LOAD,
    data: (bins) => levelData(bins, "link_rtt_ms", 1, (value) => value > 0),
    series: () => [line("edge")],
    range: () => upTo((max) => Math.max(0.2, max * 1.2)),
    words: (own, i) => `${own[0][i] === null ? "–" : own[0][i].toFixed(2)} ms`,
    empty: t("The kernel did not say how long it takes."),
  },
});

// -- what happened, marked in the plots of a box or a deployment

const MARKED = /\.(silent|online|offline|lost|failed|ended|ready|restart|drained|undrained|back|up|down|updated|taken_back)$/;

/** The latest events of what a page is about. */
class Marks {
  constructor({ node, deployment }) {
    this.query = new URLSearchParams({ limit: 200, except_kind: "request.routed", ...(node ? { node } : { subject: deployment }) });
    this.events = [];
    this.lookedAt = -Infinity;
  }

  async refresh() {
    if (performance.now() - this.lookedAt < MARKS_EVERY_MS) return;
    this.lookedAt = performance.now();
    const response = await fetch(`/v1/events?${this.query}`, { cache: "no-store" });
    if (!response.ok) throw new Error(`${response.status}`);
    this.events = (await response.json()).filter((event) => MARKED.test(event.kind));
  }

  /** Those between two moments, the oldest first. */
  within(fromS, toS) {
    return this.events.filter((event) => event.at_ms / 1000 >= fromS && event.at_ms / 1000 < toS).reverse();
  }

  draw(u) {
    const pen = u.ctx;
    pen.save();
    for (const event of this.within(u.scales.x.min, u.scales.x.max)) {
      const x = Math.round(u.valToPos(event.at_ms / 1000, "x", true)) + 0.5;
      pen.strokeStyle = pen.fillStyle = ink(/(silent|lost|failed|ended|taken_back)$/.test(event.kind) ? "bad" : "muted");
      pen.globalAlpha = 0.7;
      pen.setLineDash([3, 3]);
      pen.beginPath();
      pen.moveTo(x, u.bbox.top);
      pen.lineTo(x, u.bbox.top + u.bbox.height);
      pen.stroke();
      pen.beginPath();
      pen.moveTo(x - 4, u.bbox.top);
      pen.lineTo(x + 4, u.bbox.top);
      pen.lineTo(x, u.bbox.top + 6);
      pen.fill();
    }
    pen.restore();
  }
}

class Plot {
  constructor(figure, source) {
    this.figure = figure;
    this.source = source;
    this.kind = KINDS[figure.dataset.plot];
    this.canvas = figure.querySelector(".canvas");
    this.readout = figure.querySelector(".readout");
    this.marks = null;
    this.heardBy = null; // the source that says when the box was heard, for plots of one box
    this.uplot = null;
    this.own = [];
    new ResizeObserver(() => this.uplot?.setSize(this.size())).observe(this.canvas);
  }

  size() {
    return { width: Math.max(200, this.canvas.clientWidth), height: this.canvas.clientHeight };
  }

  draw() {
    const bins = this.source.bins();
    const { own, data } = this.kind.data(bins, this.figure.dataset, this.heardBy?.bins());
    this.own = own;
    if (this.figure.dataset.plot === "split") this.addUp(bins);
    if (!own.some((row) => row.some((value) => value !== null))) {
      this.clear(this.kind.empty);
      return;
    }
    if (!this.uplot) this.begin(data);
    else this.uplot.setData(data);
  }

  clear(words) {
    this.uplot?.destroy();
    this.uplot = null;
    const hush = document.createElement("p");
    hush.className = "hush";
    hush.textContent = words;
    this.canvas.replaceChildren(hush);
  }

  begin(data) {
    this.canvas.replaceChildren();
    const text = { stroke: ink("muted"), font: "11px system-ui, sans-serif", ticks: { show: false } };
    const options = {
      ...this.size(),
      legend: { show: false },
      padding: [8, 8, 0, 0],
      cursor: { y: false, drag: { x: false, y: false }, points: { show: false } },
      scales: { x: { time: true }, y: { range: this.kind.range(this.figure.dataset) } },
      axes: [
        {
          ...text, space: 70, size: 20, gap: 2, grid: { show: false },
          incrs: [60, 120, 180, 300, 600, 900, 1800, 3600, 7200],
          values: (_, splits) => splits.map((s) => hours.format(new Date(s * 1000))),
        },
        { ...text, space: 28, size: 46, gap: 6, grid: { stroke: ink("line"), width: 1 }, values: (_, splits) => splits.map((v) => String(+v.toFixed(2))) },
      ],
      series: [{}, ...this.kind.series(this.figure.dataset)],
      hooks: { setCursor: [(u) => this.say(u.cursor.idx)], draw: [(u) => this.marks?.draw(u)] },
    };
    this.uplot = new window.uPlot(options, data, this.canvas);
  }

  say(index) {
    const at = this.uplot?.data[0][index];
    const next = this.uplot?.data[0][index + 1] ?? at + 60;
    const events = at === undefined || !this.marks ? [] : this.marks.within(at, next).map((event) => event.kind);
    const words = at === undefined ? "" : this.kind.words(this.own, index);
    this.readout.textContent = at === undefined ? "" : `${hours.format(new Date(at * 1000))}: ${words}${events.length ? `; ${[...new Set(events)].join(", ")}` : ""}`;
  }

  /** The legend's sums, over the same bins. */
  addUp({ held }) {
    const counts = WHO.map((who) => held.reduce((total, points) => total + sum(points, who), 0));
    const total = counts.reduce((a, b) => a + b, 0);
    WHO.forEach((who, row) => {
      this.put(`[data-total-of="${who}"]`, counts[row].toLocaleString());
      this.put(`[data-share-of="${who}"]`, total ? `${percent(counts[row] / total)}\u202f%` : "");
    });
  }

  put(selector, text) {
    const element = this.figure.querySelector(selector);
    if (element && element.textContent !== text) element.textContent = text;
  }
}

const percent = (ratio) => {
  const value = 100 * ratio;
  return (value > 0 && value < 1) || (value > 99 && value < 100) ? value.toFixed(1) : value.toFixed(0);
};

/** Draws every plot of the page, now and again while somebody looks. */
export function startPlots() {
  const figures = [...document.querySelectorAll("figure[data-plot]")];
  if (!figures.length || !window.uPlot) return;
  const sources = new Map();
  const sourceOf = (kind, figure) => {
    const path = KINDS[kind].path(figure.dataset);
    if (!sources.has(path)) sources.set(path, new Source(path, Number(figure.dataset.minutes)));
    return sources.get(path);
  };
  const marked = new Map();
  const marksOf = ({ dataset }) => {
    const key = `${dataset.node} ${dataset.deployment}`;
    if (!marked.has(key)) marked.set(key, new Marks(dataset));
    return marked.get(key);
  };
  const plots = figures.map((figure) => {
    const plot = new Plot(figure, sourceOf(figure.dataset.plot, figure));
    if (figure.dataset.node) plot.heardBy = sourceOf("load", figure);
    if (figure.dataset.node || figure.dataset.deployment) plot.marks = marksOf(figure);
    return plot;
  });
  let isBusy = false;
  const refresh = async () => {
    if (isBusy || document.hidden) return;
    isBusy = true;
    try {
      await Promise.all([...sources.values(), ...marked.values()].map((source) => source.refresh()));
      plots.forEach((plot) => plot.draw());
    } catch {
      // The banner says that the coordinator is away; what was drawn stays.
    } finally {
      isBusy = false;
    }
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    plots.forEach((plot) => plot.clear(""));
    refresh();
  });
  setInterval(refresh, EVERY_MS);
  refresh();
}
