"use strict";
// How a graph is drawn: where everything is in world units, and what of it is worth drawing at a given scale.

const COLUMN = 176, ROW = 76, NODE_WIDTH = 154, NODE_HEIGHT = 42, PORT_HEIGHT = 26, CORNER = 7, STRIPE = 4;
// Heights of a node on the screen, in pixels, from which on it has a frame, its operator, its shape.
const FRAME_FROM = 7, LABEL_FROM = 14, SHAPE_FROM = 27;
const LABEL_SIZE = 12.5, SHAPE_SIZE = 10.5, TEXT_ROOM = NODE_WIDTH - 14;
// Edges are looked up by blocks of rows; below this scale curves cannot be told from lines.
// Where rows are less than so many pixels apart, nodes hide the edges between them.
const BLOCK = 16, CURVES_FROM = 0.12, ROWS_APART_FROM = 2;
const STATUSES = ["kept", "changed", "removed", "added"];

// The geometry of one graph: slots, and on each side the nodes by row and the edges between them.
class Scene {
  constructor(graph) {
    this.graph = graph;
    this.sides = {};
    const xs = graph.x.length ? graph.x : [0], rows = graph.row.length ? graph.row : [0];
    this.left = xs.reduce((a, b) => Math.min(a, b)) * COLUMN - NODE_WIDTH / 2;
    this.right = xs.reduce((a, b) => Math.max(a, b)) * COLUMN + NODE_WIDTH / 2;
    this.top = -NODE_HEIGHT / 2;
    this.bottom = rows.reduce((a, b) => Math.max(a, b)) * ROW + NODE_HEIGHT / 2;
    this.farEdges = new Set(graph.far.map(([start, end]) => `${start},${end}`));
    for (const name of ["before", "after"]) if (graph[name]) this.sides[name] = this.makeSide(graph[name]);
  }

  makeSide(facts) {
    const nodes = facts.nodes.map((node, index) => ({
      index, facts: node, x: this.graph.x[node.slot] * COLUMN, y: this.graph.row[node.slot] * ROW, row: this.graph.row[node.slot],
      height: node.kind === "node" ? NODE_HEIGHT : PORT_HEIGHT, second: secondLine(node, facts.values), weight: weightText(node, facts.values),
      edges: [],
    }));
    const maker = new Map();
    nodes.forEach((node) => node.facts.outputs.forEach((value) => { if (value !== null) maker.set(value, node); }));
    const edges = [], met = new Set();
    for (const node of nodes) {
      for (const value of [...node.facts.inputs, ...(node.facts.captures || [])]) {
        const start = value === null ? undefined : maker.get(value);
        const key = start && `${start.facts.slot},${node.facts.slot}`;
        if (!start || start === node || met.has(key)) continue;
        met.add(key);
        const edge = { index: edges.length, start, end: node, far: this.farEdges.has(key), points: this.route(start, node, key) };
        edges.push(edge);
        start.edges.push(edge);
        node.edges.push(edge);
      }
    }
    const byRow = [...nodes].sort((a, b) => a.row - b.row);
    return { facts, nodes, edges, maker, byRow, blocks: blocksOf(edges), stamps: new Uint32Array(edges.length), stamp: 0 };
  }

  route(start, end, key) {
    const points = [[start.x, start.y + start.height / 2]];
    (this.graph.bends[key] || []).forEach(([rows, x]) => points.push([x * COLUMN, (start.row + rows) * ROW]));
    points.push([end.x, end.y - end.height / 2]);
    return points;
  }

  nodeAt(name, x, y) {
    const side = this.sides[name];
    if (!side) return null;
    const row = Math.round(y / ROW);
    for (let i = firstFrom(side.byRow, row); i < side.byRow.length && side.byRow[i].row === row; i++) {
      const node = side.byRow[i];
      if (Math.abs(node.x - x) <= NODE_WIDTH / 2 && Math.abs(node.y - y) <= node.height / 2) return node;
    }
    return null;
  }
}

function blocksOf(edges) {
  const blocks = new Map();
  for (const edge of edges) {
    if (edge.far) continue;
    const [from, to] = [Math.min(edge.start.row, edge.end.row), Math.max(edge.start.row, edge.end.row)];
    for (let block = Math.floor(from / BLOCK); block <= Math.floor(to / BLOCK); block++) {
      if (!blocks.has(block)) blocks.set(block, []);
      blocks.get(block).push(edge);
    }
  }
  return blocks;
}

// The place of the first node of a row, or of a later one.
function firstFrom(byRow, row) {
  let low = 0, high = byRow.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (byRow[middle].row < row) low = middle + 1; else high = middle;
  }
  return low;
}

function secondLine(node, values) {
  const value = values[node.outputs[0] ?? node.inputs[0]];
  if (node.kind !== "node") return "";
  return value && value.shape ? value.shape : node.name;
}

function weightText(node, values) {
  const bytes = node.inputs.reduce((sum, value) => sum + ((value !== null && values[value].constant?.bytes) || 0), 0);
  return node.kind === "node" && bytes >= 1024 ? showBytes(bytes) : "";
}

function showBytes(bytes) {
  const units = ["B", "KB", "MB", "GB"];
  let at = 0;
  while (bytes >= 1000 && at < units.length - 1) { bytes /= 1000; at += 1; }
  return `${at && bytes < 10 ? bytes.toFixed(1) : Math.round(bytes)} ${units[at]}`;
}

// Draws one side of a scene onto a canvas.
class Painter {
  constructor(canvas, colours) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.colours = colours;
    this.fitted = new Map();
  }

  resize() {
    const ratio = window.devicePixelRatio || 1, box = this.canvas.getBoundingClientRect();
    const [width, height] = [Math.round(box.width * ratio), Math.round(box.height * ratio)];
    if (this.canvas.width !== width || this.canvas.height !== height) Object.assign(this.canvas, { width, height });
    Object.assign(this, { width: box.width, height: box.height, ratio });
  }

  // `look` holds the nodes to emphasize: `selected`, one or null, and `related`, a set.
  draw(side, view, look) {
    const { context: c, width, height, ratio } = this;
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    c.clearRect(0, 0, width, height);
    if (!side) return;
    c.translate(width / 2, height / 2);
    c.scale(view.scale, view.scale);
    c.translate(-view.x, -view.y);
    const half = { x: width / 2 / view.scale, y: height / 2 / view.scale };
    const box = { left: view.x - half.x, right: view.x + half.x, top: view.y - half.y, bottom: view.y + half.y };
    this.drawEdges(side, box, view.scale);
    const nodes = visibleNodes(side, box);
    if (look.selected) this.drawSelectedEdges(look.selected, view.scale);
    if (NODE_HEIGHT * view.scale < FRAME_FROM) this.drawDots(nodes, view.scale);
    else nodes.forEach((node) => this.drawNode(node, view.scale));
    if (look.related.size) nodes.filter((node) => look.related.has(node)).forEach((node) => this.drawRing(node, view.scale, true));
    if (look.selected) this.drawRing(look.selected, view.scale, false);
  }

  drawEdges(side, box, scale) {
    const c = this.context;
    if (ROW * scale < ROWS_APART_FROM) return;
    side.stamp += 1;
    c.beginPath();
    for (let block = Math.floor(box.top / ROW / BLOCK); block <= Math.floor(box.bottom / ROW / BLOCK); block++) {
      for (const edge of side.blocks.get(block) || []) {
        if (side.stamps[edge.index] === side.stamp) continue;
        side.stamps[edge.index] = side.stamp;
        this.trace(edge.points, scale);
      }
    }
    c.strokeStyle = this.colours.edge;
    c.lineWidth = Math.max(1.3, 0.7 / scale);
    c.globalAlpha = scale < CURVES_FROM ? 0.6 : 1;
    c.stroke();
    c.globalAlpha = 1;
  }

  trace(points, scale) {
    const c = this.context;
    c.moveTo(points[0][0], points[0][1]);
    for (let i = 1; i < points.length; i++) {
      const [[ax, ay], [bx, by]] = [points[i - 1], points[i]];
      if (scale < CURVES_FROM || ax === bx) c.lineTo(bx, by);
      else {
        const reach = Math.min(Math.abs(by - ay) / 2, ROW) || ROW / 2;
        c.bezierCurveTo(ax, ay + reach, bx, by - reach, bx, by);
      }
    }
  }

  drawSelectedEdges(node, scale) {
    const c = this.context;
    c.strokeStyle = this.colours.accent;
    c.lineWidth = Math.max(2, 1.4 / scale);
    for (const far of [false, true]) {
      c.setLineDash(far ? [6 / Math.min(scale, 1), 5 / Math.min(scale, 1)] : []);
      c.beginPath();
      node.edges.filter((edge) => edge.far === far).forEach((edge) => this.trace(edge.points, scale));
      c.stroke();
    }
    c.setLineDash([]);
  }

  // From far away: a solid mark each, in the colour of its status, what has changed on top and never too small to see.
  drawDots(nodes, scale) {
    const c = this.context;
    for (const status of STATUSES) {
      const least = (status === "kept" ? 1 : 3) / scale;
      c.fillStyle = this.colours[status];
      c.globalAlpha = status === "kept" ? 0.75 : 1;
      for (const node of nodes) {
        if (node.facts.status !== status) continue;
        const [width, height] = [Math.max(NODE_WIDTH, least), Math.max(node.height, least)];
        c.fillRect(node.x - width / 2, node.y - height / 2, width, height);
      }
    }
    c.globalAlpha = 1;
  }

  drawNode(node, scale) {
    const c = this.context, { facts, height } = node, status = this.colours[facts.status];
    const [left, top] = [node.x - NODE_WIDTH / 2, node.y - height / 2], kept = facts.status === "kept";
    const port = facts.kind !== "node", corner = port ? height / 2 : CORNER;
    if (facts.graphs?.length) this.drawSheet(left + 5, top + 5, height);
    c.beginPath();
    c.roundRect(left, top, NODE_WIDTH, height, corner);
    c.fillStyle = this.colours.panel;
    c.fill();
    c.fillStyle = status;
    const small = NODE_HEIGHT * scale < LABEL_FROM;
    c.globalAlpha = kept ? (small ? 0.25 : 0.07) : small ? 0.45 : 0.2;
    c.fill();
    c.globalAlpha = kept ? 0.7 : 1;
    c.strokeStyle = status;
    c.lineWidth = kept ? 1 : 1.6;
    c.stroke();
    c.globalAlpha = 1;
    if (!kept && !port) {
      c.beginPath();
      c.roundRect(left, top, STRIPE + 1, height, [corner, 0, 0, corner]);
      c.fill();
    }
    if (height * scale >= LABEL_FROM || (port && NODE_HEIGHT * scale >= LABEL_FROM)) this.drawLabel(node, scale);
  }

  drawSheet(left, top, height) {
    const c = this.context;
    c.beginPath();
    c.roundRect(left, top, NODE_WIDTH, height, CORNER);
    c.fillStyle = this.colours.panel;
    c.fill();
    c.strokeStyle = this.colours.kept;
    c.lineWidth = 1;
    c.stroke();
  }

  drawLabel(node, scale) {
    const c = this.context, { facts } = node, two = NODE_HEIGHT * scale >= SHAPE_FROM && node.second;
    const label = facts.kind === "node" ? facts.op + (facts.graphs?.length ? " ⊞" : "") : facts.name;
    c.textBaseline = "middle";
    c.textAlign = "center";
    c.fillStyle = this.colours.ink;
    const size = facts.kind === "node" ? LABEL_SIZE : SHAPE_SIZE;
    c.font = `${facts.kind === "node" ? 600 : 400} ${size}px ${this.colours.sans}`;
    c.fillText(this.fit(label, TEXT_ROOM), node.x, node.y - (two ? 8 : 0));
    if (!two) return;
    c.fillStyle = this.colours.muted;
    c.font = `${SHAPE_SIZE}px ${this.colours.sans}`;
    const both = `${node.second} · ${node.weight}`, whole = node.weight && this.fit(both, TEXT_ROOM + 4) === both;
    c.fillText(whole ? both : this.fit(node.second, TEXT_ROOM + 4), node.x, node.y + 9);
  }

  // Shorten a text that is too wide for a node; fonts are in world units, so that it holds at every scale.
  fit(text, room) {
    const key = `${this.context.font}|${text}`;
    if (!this.fitted.has(key)) {
      let shown = text;
      while (shown.length > 3 && this.context.measureText(shown).width > room) shown = `${shown.slice(0, -2).trimEnd().replace(/…$/, "")}…`;
      this.fitted.set(key, shown);
    }
    return this.fitted.get(key);
  }

  drawRing(node, scale, dashed) {
    const c = this.context, away = 4 / Math.min(scale, 1);
    c.beginPath();
    c.roundRect(node.x - NODE_WIDTH / 2 - away, node.y - node.height / 2 - away, NODE_WIDTH + 2 * away, node.height + 2 * away, CORNER + away);
    c.setLineDash(dashed ? [5 / scale, 4 / scale] : []);
    c.strokeStyle = this.colours.accent;
    c.lineWidth = Math.max(2.2, 2.2 / scale);
    c.stroke();
    c.setLineDash([]);
  }
}

function visibleNodes(side, box) {
  const found = [], last = (box.bottom + NODE_HEIGHT) / ROW;
  for (let i = firstFrom(side.byRow, (box.top - NODE_HEIGHT) / ROW); i < side.byRow.length && side.byRow[i].row <= last; i++) {
    const node = side.byRow[i];
    if (node.x + NODE_WIDTH / 2 >= box.left && node.x - NODE_WIDTH / 2 <= box.right) found.push(node);
  }
  return found;
}

// The colours of the page, as a canvas takes them.
function readColours(element) {
  const probe = element.querySelector(".gv-probe");
  const resolve = (name) => { probe.style.color = `var(--gv-${name})`; return getComputedStyle(probe).color; };
  const names = ["panel", "ink", "muted", "edge", "accent", ...STATUSES];
  return { ...Object.fromEntries(names.map((name) => [name, resolve(name)])), sans: getComputedStyle(element).fontFamily };
}
