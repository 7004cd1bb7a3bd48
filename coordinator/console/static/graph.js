// Draws a model's network from /v1/models/.../graph: operators in layers from the inputs down, as SVG that is moved and scaled by hand.

import { t } from "./words.js";

const [WIDTH, HEIGHT, ACROSS, DOWN] = [150, 34, 26, 30];
const ROUNDS = 6;
const MOST_DRAWN = 1500;
const SVG = "http://www.w3.org/2000/svg";
const FAMILIES = [
  [/Conv|MatMul|Gemm|LSTM|GRU|RNN|Attention|Einsum/, "heavy"],
  [/Relu|Sigmoid|Tanh|Softmax|Gelu|Clip|Elu|HardS|Erf|Swish/, "active"],
  [/Norm/, "norm"],
  [/Pool|Reduce|Resize|Upsample/, "pool"],
  [/If|Loop|Scan/, "branch"],
];

const element = (name, attributes, ...children) => {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
};

/** Operators that are worth a box: constants stand for themselves in what they go into. With the model's inputs and outputs as boxes too. */
function nodesOf(graph) {
  const plain = graph.nodes.filter((node) => !(node.op === "Constant" || (node.op === "Identity" && !node.inputs.length))).slice(0, MOST_DRAWN);
  const ends = (tensors, kind) => tensors.map((tensor) => ({
    op: tensor.name, name: tensor.name, shape: [tensor.datatype, tensor.shape.join("×")].join(" ").trim(), kind,
    inputs: kind === "out" ? [tensor.name] : [], outputs: kind === "in" ? [tensor.name] : [], weights: [], parameters: 0, inner: 0,
  }));
  return [...ends(graph.inputs, "in"), ...plain.map((node) => ({ ...node, kind: FAMILIES.find(([pattern]) => pattern.test(node.op))?.[1] ?? "" })), ...ends(graph.outputs, "out")];
}

function edgesOf(nodes) {
  const madeBy = new Map();
  nodes.forEach((node, index) => node.outputs.forEach((name) => madeBy.set(name, index)));
  const edges = [];
  nodes.forEach((node, to) => {
    for (const name of new Set(node.inputs)) {
      const from = madeBy.get(name);
      if (from !== undefined && from !== to) edges.push([from, to]);
    }
  });
  return edges;
}

/** A layer for each node: one below the lowest of those that feed it. A file whose operators are in no order still ends here. */
function layersOf(nodes, edges) {
  const depth = nodes.map(() => 0);
  const into = nodes.map(() => 0);
  const out = nodes.map(() => []);
  for (const [from, to] of edges) {
    out[from].push(to);
    into[to] += 1;
  }
  const free = nodes.map((_, index) => index).filter((index) => into[index] === 0);
  while (free.length) {
    const index = free.pop();
    for (const to of out[index]) {
      depth[to] = Math.max(depth[to], depth[index] + 1);
      into[to] -= 1;
      if (into[to] === 0) free.push(to);
    }
  }
  nodes.forEach((node, index) => { // what is made of constants alone stands right above what it goes into
    if (node.kind !== "in" && !edges.some(([, to]) => to === index) && out[index].length) depth[index] = Math.max(0, Math.min(...out[index].map((to) => depth[to])) - 1);
  });
  const layers = [];
  depth.forEach((layer, index) => (layers[layer] ??= []).push(index));
  return [...layers].map((layer) => layer ?? []);
}

/** Where each node is in its layer: near the middle of its neighbours, layer by layer, down and up again. */
function order(nodes, edges, layers) {
  const place = nodes.map(() => 0);
  const near = [nodes.map(() => []), nodes.map(() => [])];
  for (const [from, to] of edges) {
    near[0][to].push(from);
    near[1][from].push(to);
  }
  const set = (layer) => layer.forEach((index, at) => { place[index] = at - (layer.length - 1) / 2; });
  layers.forEach(set);
  for (let round = 0; round < ROUNDS; round += 1) {
    const side = near[round % 2];
    for (const layer of round % 2 ? [...layers].reverse() : layers) {
      const middle = new Map(layer.map((index) => [index, side[index].length ? side[index].reduce((sum, other) => sum + place[other], 0) / side[index].length : place[index]]));
      layer.sort((a, b) => middle.get(a) - middle.get(b));
      set(layer);
    }
  }
  return place;
}

const words = (node) => {
  if (node.kind === "in" || node.kind === "out") return node.shape;
  if (node.inner) return t("%(n)s operators in its branches", { n: node.inner });
  return node.weights.length ? node.weights.join(", ") : node.shape;
};

function draw(root, graph) {
  const nodes = nodesOf(graph);
  const edges = edgesOf(nodes);
  const layers = layersOf(nodes, edges);
  const place = order(nodes, edges, layers);
  const at = nodes.map(() => [0, 0]);
  layers.forEach((layer, row) => layer.forEach((index) => { at[index] = [place[index] * (WIDTH + ACROSS), row * (HEIGHT + DOWN)]; }));
  const scene = element("g", {});
  for (const [from, to] of edges) {
    const [[x, y], [u, v]] = [[at[from][0], at[from][1] + HEIGHT / 2], [at[to][0], at[to][1] - HEIGHT / 2]];
    const bend = Math.max(12, (v - y) / 2);
    scene.append(element("path", { d: `M${x} ${y} C${x} ${y + bend} ${u} ${v - bend} ${u} ${v}` }));
  }
  nodes.forEach((node, index) => {
    const [x, y] = at[index];
    const title = element("title", {});
    title.textContent = [node.op, node.name, node.parameters ? t("%(n)s parameters", { n: node.parameters.toLocaleString() }) : "", node.shape].filter(Boolean).join("\n");
    const [op, more] = [element("text", { y: -2 }), element("text", { y: 11, class: "more" })];
    [op.textContent, more.textContent] = [node.op.slice(0, 20), words(node).slice(0, 26)];
    scene.append(element("g", { transform: `translate(${x} ${y})`, class: node.kind }, title, element("rect", { x: -WIDTH / 2, y: -HEIGHT / 2, width: WIDTH, height: HEIGHT, rx: 5 }), op, more));
  });
  const picture = element("svg", { role: "img", "aria-hidden": "true" }, scene);
  root.replaceChildren(picture);
  new View(root, picture, scene).fit();
}

/** Moved by dragging, scaled by the wheel with Ctrl, by + and -, arrow keys and buttons. */
class View {
  constructor(root, picture, scene) {
    Object.assign(this, { root, picture, scene, x: 0, y: 0, scale: 1, held: null });
    picture.addEventListener("pointerdown", (event) => { this.held = [event.clientX - this.x, event.clientY - this.y]; picture.setPointerCapture(event.pointerId); });
    picture.addEventListener("pointermove", (event) => { if (this.held) this.move(event.clientX - this.held[0], event.clientY - this.held[1]); });
    picture.addEventListener("pointerup", () => { this.held = null; });
    root.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return; // the page scrolls as everywhere
      event.preventDefault();
      this.zoom(event.deltaY < 0 ? 1.15 : 1 / 1.15, event.offsetX, event.offsetY);
    }, { passive: false });
    root.addEventListener("keydown", (event) => {
      const steps = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] };
      if (event.key in steps) this.move(this.x + steps[event.key][0], this.y + steps[event.key][1]);
      else if (event.key === "+") this.zoom(1.25);
      else if (event.key === "-") this.zoom(1 / 1.25);
      else if (event.key === "0") this.fit();
      else return;
      event.preventDefault();
    });
    const bar = document.createElement("p");
    bar.className = "network-bar";
    for (const [word, label, act] of [["+", t("Larger"), () => this.zoom(1.25)], ["−", t("Smaller"), () => this.zoom(1 / 1.25)], ["⤢", t("All of it"), () => this.fit(true)]]) {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: word, title: label });
      button.setAttribute("aria-label", label);
      button.addEventListener("click", act);
      bar.append(button);
    }
    root.append(bar);
  }

  move(x, y) {
    [this.x, this.y] = [x, y];
    this.scene.setAttribute("transform", `translate(${x} ${y}) scale(${this.scale})`);
  }

  zoom(by, atX = this.root.clientWidth / 2, atY = this.root.clientHeight / 2) {
    const scale = Math.min(3, Math.max(0.02, this.scale * by));
    const grown = scale / this.scale;
    this.scale = scale;
    this.move(atX - (atX - this.x) * grown, atY - (atY - this.y) * grown);
  }

  /** From the top, wide enough to be read; or all of it. */
  fit(isAll = false) {
    const box = this.scene.getBBox();
    const across = (this.root.clientWidth - 24) / box.width;
    this.scale = isAll ? Math.min(1, across, (this.root.clientHeight - 24) / box.height) : Math.min(1, Math.max(across, 0.7));
    this.move(this.root.clientWidth / 2 - (box.x + box.width / 2) * this.scale, 14 - box.y * this.scale);
  }
}

const root = document.getElementById("network");
if (root) {
  root.textContent = t("Reading the network …");
  fetch(root.dataset.source).then(async (response) => {
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error.message);
    draw(root, answer);
  }).catch((error) => { root.textContent = t("The network can't be drawn: %(reason)s", { reason: error.message }); });
}
