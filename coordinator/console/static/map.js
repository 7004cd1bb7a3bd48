// The map of the fleet: every box a cell, put together by a label, drawn on a canvas from /v1/map. A hundred thousand cells are drawn in
// some milliseconds; afterwards only those that changed are.

import { ink } from "./ink.js";
import { N_, t } from "./words.js";

const AGAIN_MS = 2000;
const SIZES = [[60, 22, 4], [400, 16, 3], [2500, 11, 2], [15_000, 8, 1], [Infinity, 5, 1]]; // boxes at most, a cell's side, the gap
const TITLE_PX = 18;
const TITLED_GROUPS = 60;
const BLOCK_GAP = 10;
// What a letter means: as the box's own page says it, its colour and pattern, and the state by which such boxes are found.
const STATES = {
  l: [N_("lost"), "bad", "cross", "lost"],
  f: [N_("failed"), "bad", "bang"],
  s: [N_("silent"), "warn", "slash", "unknown"],
  t: [N_("backing off"), "warn", "dot"],
  g: [N_("signed off"), "idle", "ring", "offline"],
  d: [N_("drained"), "idle", "bar"],
  n: [N_("not seen yet"), "idle", "ring", "new"],
  x: [N_("thrown out"), "idle", "cross", "revoked"],
  o: [N_("online"), "good", "", "online"],
};
const FIRST = Object.keys(STATES);

class FleetMap {
  constructor(root) {
    this.root = root;
    this.canvas = root.querySelector("canvas");
    this.tip = root.querySelector(".tip");
    this.by = document.querySelector(".map-by select");
    this.layout = "";
    this.cells = "";
    this.names = [];
    this.blocks = [];
    this.at = -1;
    this.tiles = new Map();
    this.wanted = false;
    this.isBusy = false;
    new ResizeObserver(() => this.arrange()).observe(root);
    this.canvas.addEventListener("pointermove", (event) => this.point(this.find(event.offsetX, event.offsetY)));
    this.canvas.addEventListener("pointerleave", () => this.point(-1));
    this.canvas.addEventListener("click", (event) => this.open(this.find(event.offsetX, event.offsetY)));
    this.canvas.addEventListener("keydown", (event) => this.press(event));
    this.canvas.addEventListener("blur", () => this.point(-1));
    this.by.addEventListener("change", () => { this.layout = ""; this.look(); });
    document.addEventListener("skerry:news", (event) => { if (event.detail.has("nodes")) this.lookSoon(); });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { this.tiles.clear(); this.draw(); });
    this.look();
  }

  // -- asking

  lookSoon() {
    if (this.wanted) return;
    this.wanted = true;
    setTimeout(() => { this.wanted = false; this.look(); }, AGAIN_MS);
  }

  async look() {
    if (this.isBusy || document.hidden) return;
    this.isBusy = true;
    const asked = new URLSearchParams({ by: this.by.value, layout: this.layout, q: new URLSearchParams(location.search).get("q") ?? "" });
    try {
      const response = await fetch(`/v1/map?${asked}`, { cache: "no-store" });
      if (response.ok) this.take(await response.json());
    } catch {
      // The banner says that the coordinator is away.
    } finally {
      this.isBusy = false;
    }
  }

  take({ layout, cells, groups, keys }) {
    const before = this.cells;
    this.cells = cells;
    if (layout !== this.layout) {
      this.layout = layout;
      this.groups = groups;
      this.names = groups.flatMap((group) => group.names);
      this.offer(keys);
      this.arrange();
    } else {
      for (let index = 0; index < cells.length; index += 1) if (cells[index] !== before[index]) this.drawCell(index);
    }
    this.count();
    this.point(this.at);
  }

  offer(keys) {
    const held = new Set([...this.by.options].map((option) => option.value));
    for (const key of keys) if (!held.has(key)) this.by.add(new Option(key, key));
  }

  /** The legend: how many of each, the worst first. */
  count() {
    const counts = {};
    for (const cell of this.cells) counts[cell] = (counts[cell] ?? 0) + 1;
    const legend = this.root.querySelector(".map-legend");
    legend.replaceChildren(...FIRST.filter((cell) => counts[cell]).map((cell) => {
      const item = document.createElement("li");
      const swatch = document.createElement("canvas");
      const scale = devicePixelRatio || 1;
      [swatch.width, swatch.height] = [12 * scale, 12 * scale];
      swatch.getContext("2d").drawImage(this.tile(cell, 12), 0, 0);
      const state = STATES[cell][3];
      const word = state ? Object.assign(document.createElement("a"), { href: `/nodes?q=state:${state}`, textContent: t(STATES[cell][0]) }) : t(STATES[cell][0]);
      item.append(swatch, word, " ", Object.assign(document.createElement("b"), { textContent: counts[cell].toLocaleString() }));
      return item;
    }));
    this.canvas.setAttribute("aria-label", t("Map of %(n)s boxes: %(counts)s. Arrow keys move from box to box, Enter opens one.", { n: this.cells.length, counts: FIRST.filter((cell) => counts[cell]).map((cell) => `${counts[cell]} ${t(STATES[cell][0])}`).join(", ") }));
  }

  // -- where cells are

  arrange() {
    const width = Math.max(200, this.root.clientWidth);
    if (!this.groups || !this.cells.length) return;
    const [, side, gap] = SIZES.find(([most]) => this.cells.length <= most);
    const step = side + gap;
    const isTitled = this.groups.length <= TITLED_GROUPS && side > 5;
    const top = isTitled ? TITLE_PX : 0;
    let [x, y, rowHeight, first] = [0, 0, 0, 0];
    this.blocks = this.groups.map((group) => {
      const count = group.names.length;
      const most = Math.max(1, Math.floor(width / step));
      const columns = this.groups.length === 1 ? Math.min(count, most) : Math.min(most, Math.max(1, Math.ceil(Math.sqrt(count * 2.2))));
      const named = isTitled ? Math.min(110, 8 * (group.value || t("none")).length) : 0;
      const blockWidth = Math.max(columns * step, named);
      const blockHeight = top + Math.ceil(count / columns) * step;
      if (x > 0 && x + blockWidth > width) [x, y, rowHeight] = [0, y + rowHeight + BLOCK_GAP, 0];
      const block = { x, y: y + top, columns, first, count, value: group.value };
      x += blockWidth + BLOCK_GAP;
      rowHeight = Math.max(rowHeight, blockHeight);
      first += count;
      return block;
    });
    Object.assign(this, { side, step, isTitled, width, height: y + rowHeight });
    this.draw();
  }

  blockOf(index) {
    let [low, high] = [0, this.blocks.length - 1];
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.blocks[middle].first <= index) low = middle;
      else high = middle - 1;
    }
    return this.blocks[low];
  }

  place(index) {
    const block = this.blockOf(index);
    const inside = index - block.first;
    return [block.x + (inside % block.columns) * this.step, block.y + Math.floor(inside / block.columns) * this.step];
  }

  find(x, y) {
    for (const block of this.blocks) {
      const [column, row] = [Math.floor((x - block.x) / this.step), Math.floor((y - block.y) / this.step)];
      const index = row * block.columns + column;
      if (column >= 0 && column < block.columns && row >= 0 && index < block.count) return block.first + index;
    }
    return -1;
  }

  // -- drawing

  /** A cell's picture, made once for each letter and size: colour, and a pattern that says the same. */
  tile(cell, side) {
    const key = `${cell}${side}`;
    const held = this.tiles.get(key);
    if (held) return held;
    const scale = devicePixelRatio || 1;
    const tile = document.createElement("canvas");
    [tile.width, tile.height] = [Math.ceil(side * scale), Math.ceil(side * scale)];
    const pen = tile.getContext("2d");
    pen.scale(scale, scale);
    const [, level, pattern] = STATES[cell] ?? STATES.n;
    pen.fillStyle = ink(pattern === "ring" ? `${level}-soft` : level);
    pen.beginPath();
    pen.roundRect(0, 0, side, side, side > 7 ? 2 : 0);
    pen.fill();
    pen.strokeStyle = pattern === "ring" ? ink(level) : ink("panel");
    pen.fillStyle = ink("panel");
    pen.lineWidth = Math.max(1, side / 9);
    pen.beginPath();
    const [near, far] = [side * 0.25, side * 0.75];
    if (pattern === "cross") [[near, near, far, far], [near, far, far, near]].forEach(([a, b, c, d]) => { pen.moveTo(a, b); pen.lineTo(c, d); });
    if (pattern === "slash") { pen.moveTo(near, far); pen.lineTo(far, near); }
    if (pattern === "bar") { pen.moveTo(near, side / 2); pen.lineTo(far, side / 2); }
    if (pattern === "bang") { pen.moveTo(side / 2, near * 0.8); pen.lineTo(side / 2, side * 0.58); pen.moveTo(side / 2, side * 0.7); pen.lineTo(side / 2, side * 0.82); }
    if (pattern === "ring") pen.rect(0.5, 0.5, side - 1, side - 1);
    pen.stroke();
    if (pattern === "dot") { pen.beginPath(); pen.arc(side / 2, side / 2, side * 0.18, 0, 7); pen.fill(); }
    this.tiles.set(key, tile);
    return tile;
  }

  draw() {
    const scale = devicePixelRatio || 1;
    [this.canvas.width, this.canvas.height] = [Math.round(this.width * scale), Math.round(this.height * scale)];
    this.canvas.style.height = `${this.height}px`;
    this.pen = this.canvas.getContext("2d");
    this.pen.setTransform(scale, 0, 0, scale, 0, 0);
    if (this.isTitled) this.title();
    for (let index = 0; index < this.cells.length; index += 1) this.drawCell(index);
  }

  title() {
    this.pen.font = "11px system-ui, sans-serif";
    this.pen.fillStyle = ink("muted");
    this.pen.textBaseline = "top";
    for (const { x, y, value } of this.blocks) this.pen.fillText(value.length > 16 ? `${value.slice(0, 15)}…` : value || t("none"), x, y - TITLE_PX + 3);
  }

  drawCell(index) {
    const [x, y] = this.place(index);
    this.pen?.clearRect(x - 1, y - 1, this.side + 2, this.side + 2);
    this.pen?.drawImage(this.tile(this.cells[index], this.side), x, y, this.side, this.side);
    if (index === this.at && this.pen) {
      this.pen.strokeStyle = ink("ink");
      this.pen.lineWidth = 1;
      this.pen.strokeRect(x - 0.5, y - 0.5, this.side + 1, this.side + 1);
    }
  }

  // -- pointing

  point(index) {
    const before = this.at;
    this.at = index >= 0 && index < this.cells.length ? index : -1;
    if (before !== this.at && before >= 0 && before < this.cells.length) this.drawCell(before);
    this.canvas.style.cursor = this.at < 0 ? "default" : "pointer";
    this.tip.hidden = this.at < 0;
    if (this.at < 0) return;
    this.drawCell(this.at);
    const value = this.blockOf(this.at).value;
    this.tip.textContent = `${this.names[this.at]}${value ? `, ${value}` : ""}: ${t((STATES[this.cells[this.at]] ?? STATES.n)[0])}`;
    const [x, y] = this.place(this.at);
    const left = Math.max(0, Math.min(x, this.width - this.tip.offsetWidth));
    this.tip.style.transform = `translate(${left}px, ${y + this.side + 6}px)`;
  }

  press(event) {
    const columns = this.at < 0 ? 1 : this.blockOf(this.at).columns;
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns };
    if (event.key === "Enter") this.open(this.at);
    else if (event.key === "Home") this.point(0);
    else if (event.key === "End") this.point(this.cells.length - 1);
    else if (event.key in steps) this.point(Math.max(0, Math.min(this.cells.length - 1, this.at + steps[event.key])));
    else return;
    event.preventDefault();
  }

  open(index) {
    if (index >= 0) location.assign(`/nodes/${encodeURIComponent(this.names[index])}`);
  }
}

const root = document.getElementById("map");
if (root) new FleetMap(root);
