// Draws the plots from /v1/split and /v1/nodes/{id}/load with uPlot (vendor/uplot, a classic script: window.uPlot).

import { hours } from "./times.js";

const EVERY_MS = 2500;
const WHOLE_EVERY_MS = 60_000;
const BINS = 180;
const LAG_S = 4; // boxes and the coordinator gather before they write
const WHO = ["edge", "peer", "cloud", "refused"];
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

const scaled = (value, factor) => (value === null ? null : value * factor);

// -- drawing

const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
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
    words: (own, i) => WHO.map((who, row) => `${who} ${short(own[row][i])}`).join(", ") + " per second",
    empty: "No requests were measured in this time.",
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
    empty: "No answers were measured in this time.",
  },
  load: {
    path: ({ node }) => `/v1/nodes/${encodeURIComponent(node)}/load`,
    data: (bins, figure) => loadData(bins, figure.gpu === "1"),
    series: ({ gpu }) => (gpu === "1" ? [line("edge"), line("cloud")] : [line("edge", { fill: ink("edge-soft") })]),
    range: () => upTo(() => 100),
    words: (own, i) => `CPU ${short(own[0][i])} %` + (own[1] ? `, GPU ${short(own[1][i])} %` : ""),
    empty: "Nothing was measured in this time.",
  },
  memory: {
    path: ({ node }) => `/v1/nodes/${encodeURIComponent(node)}/load`,
    data: (bins) => memoryData(bins),
    series: () => [line("edge", { fill: ink("edge-soft") })],
    range: ({ total }) => upTo((max) => (Number(total) ? Number(total) / GIB : max * 1.12)),
    words: (own, i) => `${own[0][i]?.toFixed(2) ?? "–"} GiB`,
    empty: "Nothing was measured in this time.",
  },
};

class Plot {
  constructor(figure, source) {
    this.figure = figure;
    this.source = source;
    this.kind = KINDS[figure.dataset.plot];
    this.canvas = figure.querySelector(".canvas");
    this.readout = figure.querySelector(".readout");
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
      hooks: { setCursor: [(u) => this.say(u.cursor.idx)] },
    };
    this.uplot = new window.uPlot(options, data, this.canvas);
  }

  say(index) {
    const at = this.uplot?.data[0][index];
    this.readout.textContent = at === undefined ? "" : `${hours.format(new Date(at * 1000))}: ${this.kind.words(this.own, index)}`;
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
  const plots = figures.map((figure) => {
    const plot = new Plot(figure, sourceOf(figure.dataset.plot, figure));
    if (figure.dataset.node) plot.heardBy = sourceOf("load", figure);
    return plot;
  });
  let isBusy = false;
  const refresh = async () => {
    if (isBusy || document.hidden) return;
    isBusy = true;
    try {
      await Promise.all([...sources.values()].map((source) => source.refresh()));
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
