// The graph view: state, the two sides moved together, search, the map of the whole, keys and pointers.

const FURTHEST_IN = 2.5, WHEEL_STEP = 0.0016, KEY_PAN = 80, ZOOM_STEP = 1.35, MARGIN = 40, READABLE = 0.75, LEAST_FITTED = 0.42;
const CLICK_REACH = 4, MOST_RESULTS = 60, IDLE_AFTER = 1500, CAPTION = 28, BREATH = 120;

class GraphView {
  constructor(element, graphs) {
    Object.assign(this, { element, graphs, scenes: new Map(), at: 0, selection: null, draws: [], waiting: false });
    this.names = ["before", "after"].filter((name) => element.querySelector(`.gv-pane[data-side=${name}]`));
    this.colours = readColours(element);
    this.panes = Object.fromEntries(this.names.map((name) => [name, element.querySelector(`.gv-pane[data-side=${name}] canvas`)]));
    this.painters = Object.fromEntries(this.names.map((name) => [name, new Painter(this.panes[name], this.colours)]));
    this.map = element.querySelector(".gv-map");
    this.view = { x: 0, y: 0, scale: 1 };
    this.listen();
    this.open(0);
    element.classList.add("gv-ready");
  }

  get scene() { return this.scenes.get(this.at); }

  sceneOf(index) {
    if (!this.scenes.has(index)) this.scenes.set(index, new Scene(this.graphs[index]));
    return this.scenes.get(index);
  }

  find(selector) { return this.element.querySelector(selector); }

  // Show a graph, from its beginning; a small one whole.
  open(index) {
    this.at = index;
    this.sceneOf(index);
    this.selection = null;
    this.showTrail();
    this.showCounts();
    this.resize();
    this.begin();
    this.showSelection();
  }

  begin() {
    this.fit();
    if (this.view.scale >= LEAST_FITTED || !this.scene.graph.x.length) return;
    const first = Math.min(...Object.values(this.scene.sides).map((side) => side.byRow[0]?.row ?? 0));
    const near = Object.values(this.scene.sides).flatMap((side) => side.byRow.slice(0, 12)).filter((node) => node.row <= first + 6);
    const middle = near.reduce((sum, node) => sum + node.x, 0) / (near.length || 1);
    this.move(middle, this.scene.top - MARGIN - CAPTION + this.size().height / 2 / READABLE, READABLE);
  }

  size() { return this.painters[this.names[0]]; }

  fit() {
    const { left, right, top, bottom } = this.scene, { width, height } = this.size();
    const scale = Math.min((width - MARGIN) / (right - left), (height - MARGIN - CAPTION) / (bottom - top), 1.1);
    this.move((left + right) / 2, (top + bottom) / 2 - CAPTION / 2 / scale, scale);
  }

  furthestOut() {
    const { left, right, top, bottom } = this.scene, { width, height } = this.size();
    return Math.min((width - MARGIN) / (right - left), (height - MARGIN) / (bottom - top), 1) * 0.6;
  }

  move(x, y, scale = this.view.scale) {
    const { left, right, top, bottom } = this.scene;
    scale = Math.min(FURTHEST_IN, Math.max(Math.max(this.furthestOut(), 1e-4), scale));
    this.view = { x: Math.min(right, Math.max(left, x)), y: Math.min(bottom, Math.max(top, y)), scale };
    this.redraw();
  }

  zoom(factor, px = this.size().width / 2, py = this.size().height / 2) {
    const before = this.toWorld(px, py), scale = this.view.scale;
    this.move(this.view.x, this.view.y, scale * factor);
    const after = this.toWorld(px, py);
    this.move(this.view.x + before.x - after.x, this.view.y + before.y - after.y);
  }

  toWorld(px, py) {
    const { width, height } = this.size();
    return { x: this.view.x + (px - width / 2) / this.view.scale, y: this.view.y + (py - height / 2) / this.view.scale };
  }

  resize() {
    const wasHidden = !this.size().width;
    this.names.forEach((name) => this.painters[name].resize());
    this.mapPicture = null;
    // A view that begins inside something folded has no size yet.
    if (this.unprinted) this.fit(); else if (wasHidden && this.size().width) this.begin();
    this.redraw();
  }

  recolour() {
    Object.assign(this.colours, readColours(this.element));
    this.mapPicture = null;
    this.draw();
  }

  redraw() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => { this.waiting = false; this.draw(); });
  }

  draw() {
    const begun = performance.now();
    for (const name of this.names) this.painters[name].draw(this.scene.sides[name], this.view, this.look(name));
    this.drawMap();
    this.draws.push(performance.now() - begun);
    if (this.draws.length > 1000) this.draws.shift();
    this.find(".gv-scale").textContent = `${Math.round(this.view.scale * 100)} %`;
  }

  // What is emphasized on a side: the selected node or its partner, and the nodes it is related to.
  look(name) {
    const chosen = this.selection, side = this.scene.sides[name], look = { selected: null, related: new Set() };
    if (!chosen || !side) return look;
    const node = this.scene.sides[chosen.side].nodes[chosen.node];
    if (name === chosen.side) return { ...look, selected: node };
    const related = node.facts.related.filter(([graph]) => graph === this.at).map(([, index]) => side.nodes[index]);
    return { selected: side.nodes[node.facts.partner] ?? null, related: new Set(related) };
  }

  select(side, node, { centre = false } = {}) {
    this.selection = side === null ? null : { side, node };
    if (centre && this.selection) {
      const found = this.scene.sides[side].nodes[node];
      this.move(found.x, found.y, Math.max(this.view.scale, READABLE));
    }
    this.redraw();
    this.showSelection();
  }

  go(graph, side, node) {
    if (graph !== this.at) this.open(graph);
    this.select(side, node, { centre: true });
  }

  showSelection() {
    const chosen = this.selection;
    this.element.classList.toggle("gv-selected", Boolean(chosen));
    for (const name of this.names) {
      const place = this.find(`.gv-details [data-side=${name}]`), look = this.look(name);
      const node = look.selected ?? (look.related.size === 1 ? [...look.related][0] : null);
      if (node) showDetails(place, this.graphs, { graph: this.at, node: node.index }, name, this.go.bind(this), this.open.bind(this));
      else place.replaceChildren(...(chosen ? [make("p", { class: "gv-muted" }, this.absence(name, look.related))] : []));
    }
    if (chosen) this.find(".gv-said").textContent = `${nodeTitle(this.scene.sides[chosen.side].nodes[chosen.node].facts)}, ${this.scene.sides[chosen.side].nodes[chosen.node].facts.status}`;
  }

  absence(name, related) {
    if (related.size) return `${related.size} nodes ${name === "after" ? "come from it" : "are its origins"}: those ringed above.`;
    return name === "after" ? "Not there after." : "Not there before.";
  }

  showTrail() {
    const trail = this.find(".gv-trail"), path = [];
    for (let index = this.at; index !== null && index !== undefined; index = this.graphs[index].parent) path.unshift(index);
    if (path[0] !== 0) path.unshift(0);
    trail.replaceChildren(...path.flatMap((index, depth) => {
      const { title, holder } = this.graphs[index], text = index === 0 ? "model" : holder ? `${holder} · ${title}` : title;
      const step = index === this.at ? make("span", { "aria-current": "page" }, text) : link(text, () => this.open(index));
      return depth ? [make("span", { class: "gv-muted" }, " › "), step] : [step];
    }));
    trail.hidden = path.length === 1;
  }

  showCounts() {
    const count = (name) => this.graphs[this.at][name]?.nodes.filter((node) => node.kind === "node").length ?? 0;
    for (const name of this.names) this.find(`.gv-pane[data-side=${name}] .gv-count`).textContent = `${count(name).toLocaleString("en")} nodes`;
    for (const status of STATUSES) {
      const chip = this.find(`.gv-chip[data-status=${status}]`);
      if (!chip) continue;
      const found = this.nodesOf(status).length;
      chip.querySelector(".gv-number").textContent = found.toLocaleString("en");
      chip.disabled = !found;
    }
  }

  // The nodes of a status, or all that are not kept, from top to bottom; each pair once, on the side after.
  nodesOf(status) {
    const found = [];
    for (const name of this.names) {
      for (const node of this.scene.sides[name]?.nodes ?? []) {
        if (node.facts.kind !== "node" && (status !== "any" || node.facts.status === "kept")) continue;
        const own = node.facts.status === "removed" || name === this.names[this.names.length - 1];
        if (own && (status === "any" ? node.facts.status !== "kept" : node.facts.status === status)) found.push([name, node]);
      }
    }
    return found.sort(([, a], [, b]) => a.row - b.row || a.x - b.x);
  }

  step(status, forward) {
    const found = this.nodesOf(status);
    if (!found.length) return;
    const chosen = this.selection && this.scene.sides[this.selection.side].nodes[this.selection.node];
    const here = chosen ?? { row: -1, x: 0 };
    const key = (node) => node.row * 1e6 + node.x;
    const ordered = forward ? found : [...found].reverse();
    const next = ordered.find(([, node]) => node !== chosen && (forward ? key(node) > key(here) : key(node) < key(here))) || ordered[0];
    this.select(next[0], next[1].index, { centre: true });
  }

  // The map: both sides whole, drawn once, and the part that is seen.
  drawMap() {
    const map = this.map, ratio = window.devicePixelRatio || 1, box = map.getBoundingClientRect();
    if (!box.width) return;
    if (!this.mapPicture) this.mapPicture = this.paintMap(box, ratio);
    const c = map.getContext("2d");
    c.setTransform(1, 0, 0, 1, 0, 0);
    c.clearRect(0, 0, map.width, map.height);
    c.drawImage(this.mapPicture.canvas, 0, 0);
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    const { place, lane } = this.mapPicture, { width, height } = this.size(), { scale } = this.view;
    const [, top] = place(0, this.view.y - height / 2 / scale), [, bottom] = place(0, this.view.y + height / 2 / scale);
    this.names.forEach((name, side) => {
      const left = Math.max(0, place(this.view.x - width / 2 / scale, 0)[0]), right = Math.min(lane, place(this.view.x + width / 2 / scale, 0)[0]);
      c.strokeStyle = this.colours.accent;
      c.lineWidth = 1.5;
      c.strokeRect(side * lane + left + 0.75, Math.max(0.75, top), Math.max(4, right - left - 1.5), Math.max(5, Math.min(bottom, box.height - 0.75) - Math.max(0.75, top)));
    });
  }

  paintMap(box, ratio) {
    const canvas = document.createElement("canvas"), { left, right, top, bottom } = this.scene, lane = box.width / this.names.length;
    Object.assign(canvas, { width: Math.round(box.width * ratio), height: Math.round(box.height * ratio) });
    Object.assign(this.map, { width: canvas.width, height: canvas.height });
    const c = canvas.getContext("2d"), stretch = { x: (lane - 8) / (right - left), y: (box.height - 8) / (bottom - top) };
    stretch.x = Math.min(stretch.x, stretch.y * 4);
    const place = (x, y) => [lane / 2 + (x - (left + right) / 2) * stretch.x, 4 + (y - top) * stretch.y];
    c.scale(ratio, ratio);
    for (const status of STATUSES) {
      c.fillStyle = this.colours[status];
      c.globalAlpha = status === "kept" ? 0.5 : 1;
      this.names.forEach((name, side) => (this.scene.sides[name]?.nodes ?? []).filter((node) => node.facts.status === status).forEach((node) => {
        const [x, y] = place(node.x, node.y), width = Math.max(2, NODE_WIDTH * stretch.x), height = Math.max(status === "kept" ? 1 : 1.6, node.height * stretch.y);
        c.fillRect(side * lane + x - width / 2, y - height / 2, width, height);
      }));
    }
    return { canvas, place, lane, toWorld: (x, y) => ({ x: ((x % lane) - lane / 2) / stretch.x + (left + right) / 2, y: (y - 4) / stretch.y + top }) };
  }

  search(text) {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean), found = [];
    if (!words.length) return found;
    this.graphs.forEach((graph, index) => {
      for (const name of [...this.names].reverse()) {
        (graph[name]?.nodes ?? []).forEach((node, at) => {
          if (name === "before" && this.names.length > 1 && graph.after && node.status !== "removed") return;
          const values = [...node.inputs, ...node.outputs].map((value) => (value === null ? "" : graph[name].values[value].name));
          const within = [node.op, node.name, node.kind, ...(node.origins || []), ...values].join(" ").toLowerCase();
          if (words.every((word) => within.includes(word))) found.push({ graph: index, side: name, node: at, facts: node, exact: node.name.toLowerCase() === text.trim().toLowerCase() });
        });
      }
    });
    return found.sort((a, b) => b.exact - a.exact);
  }

  // Select what comes from a node of the original, or a node of the model after by its name; returns whether it was found.
  selectNamed({ origin, node }) {
    for (const name of [...this.names].reverse()) {
      for (let index = 0; index < this.graphs.length; index++) {
        const nodes = this.graphs[index][name]?.nodes ?? [];
        const at = nodes.findIndex((facts) => (origin !== undefined ? facts.origins?.includes(origin) : facts.name === node && facts.kind === "node"));
        if (at >= 0) { this.go(index, name, at); return true; }
      }
    }
    return false;
  }
}

Object.assign(GraphView.prototype, Controls);

function begin(element) {
  const begun = performance.now();
  return readData(element.querySelector(".gv-data").textContent).then((graphs) => {
    const view = new GraphView(element, graphs);
    element.graphView = view;
    view.draw();
    element.graphView.loadMilliseconds = performance.now() - begun;
    return view;
  }).catch((error) => {
    element.querySelector(".gv-hint").textContent = `The graph cannot be shown: ${error.message}`;
    throw error;
  });
}

async function readData(text) {
  const bytes = Uint8Array.from(atob(text.trim()), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

for (const element of document.querySelectorAll(".graph-view")) {
  let view = null;
  const start = () => (view ??= begin(element));
  const watch = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    watch.disconnect();
    start();
  }, { rootMargin: "300px" });
  watch.observe(element);
  // A reader may print or search the page without having been here: as soon as there is nothing else to do.
  (window.requestIdleCallback ?? ((act) => setTimeout(act, IDLE_AFTER)))(start, { timeout: IDLE_AFTER });
  window.addEventListener("beforeprint", start);
  document.addEventListener("graphopt-theme", () => view?.then((found) => found.recolour()));
  document.addEventListener("graphopt-select", (event) => start().then((found) => found.selectNamed(event.detail)));
}
