// Pointers, keys, buttons and the search of a graph view: mixed into its class.

const Controls = {
  listen() {
    for (const name of this.names) this.listenToPane(name, this.panes[name]);
    this.listenToMap();
    this.listenToSearch();
    this.element.addEventListener("keydown", (event) => this.onKey(event));
    const buttons = { fit: () => this.fit(), begin: () => this.begin(), in: () => this.zoom(ZOOM_STEP), out: () => this.zoom(1 / ZOOM_STEP), next: () => this.step("any", true), previous: () => this.step("any", false) };
    for (const [name, act] of Object.entries(buttons)) this.find(`[data-do=${name}]`)?.addEventListener("click", act);
    this.element.querySelectorAll(".gv-chip").forEach((chip) => chip.addEventListener("click", (event) => this.step(chip.dataset.status, !event.shiftKey)));
    new ResizeObserver(() => this.resize()).observe(this.find(".gv-stage"));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.recolour());
    window.addEventListener("beforeprint", () => this.beforePrint());
    window.addEventListener("afterprint", () => { if (this.unprinted) { this.view = this.unprinted; this.unprinted = null; this.redraw(); } });
  },

  // On paper: the whole graph. Nothing that is put off to the next frame is in time.
  beforePrint() {
    this.unprinted ??= this.view;
    this.fit();
    this.recolour();
  },

  listenToPane(name, canvas) {
    const held = new Map();
    let travelled = 0, spread = 0;
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      canvas.focus({ preventScroll: true });
      held.set(event.pointerId, [event.offsetX, event.offsetY]);
      [travelled, spread] = [held.size > 1 ? CLICK_REACH + 1 : 0, 0];
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!held.has(event.pointerId)) return this.hover(name, canvas, event);
      const [x, y] = held.get(event.pointerId), [dx, dy] = [event.offsetX - x, event.offsetY - y];
      held.set(event.pointerId, [event.offsetX, event.offsetY]);
      travelled += Math.abs(dx) + Math.abs(dy);
      if (held.size === 2) return (spread = this.pinch([...held.values()], spread));
      if (travelled > CLICK_REACH) this.move(this.view.x - dx / this.view.scale, this.view.y - dy / this.view.scale);
    });
    const release = (event) => {
      if (held.delete(event.pointerId) && event.type === "pointerup" && travelled <= CLICK_REACH) this.click(name, event);
    };
    for (const type of ["pointerup", "pointercancel"]) canvas.addEventListener(type, release);
    canvas.addEventListener("pointerleave", () => { this.find(".gv-tip").hidden = true; });
    canvas.addEventListener("dblclick", (event) => {
      const node = this.nodeUnder(name, event);
      if (node?.facts.graphs?.length) this.open(node.facts.graphs[0]); else if (!node) this.zoom(ZOOM_STEP ** 2, event.offsetX, event.offsetY);
    });
    // The page goes on scrolling under the wheel until the view has been clicked, or Ctrl is held.
    canvas.addEventListener("wheel", (event) => {
      const active = this.element.contains(document.activeElement) || this.element.dataset.wheel === "always";
      if (!event.ctrlKey && !active) return this.hintAtWheel();
      event.preventDefault();
      const step = event.deltaMode === 1 ? event.deltaY * 20 : event.deltaY;
      this.zoom(Math.exp(-Math.max(-300, Math.min(300, step)) * WHEEL_STEP * (event.ctrlKey ? 3 : 1)), event.offsetX, event.offsetY);
    }, { passive: false });
  },

  hintAtWheel() {
    this.element.classList.add("gv-wheel");
    clearTimeout(this.wheelHint);
    this.wheelHint = setTimeout(() => this.element.classList.remove("gv-wheel"), 1200);
  },

  pinch([[ax, ay], [bx, by]], before) {
    const spread = Math.hypot(ax - bx, ay - by);
    if (before) this.zoom(spread / before, (ax + bx) / 2, (ay + by) / 2);
    return spread;
  },

  nodeUnder(name, event) {
    const { x, y } = this.toWorld(event.offsetX, event.offsetY);
    return this.scene.nodeAt(name, x, y);
  },

  click(name, event) {
    const node = this.nodeUnder(name, event);
    if (node) this.select(name, node.index); else this.select(null);
  },

  hover(name, canvas, event) {
    const node = this.nodeUnder(name, event), tip = this.find(".gv-tip"), stage = this.find(".gv-stage").getBoundingClientRect();
    canvas.style.cursor = node ? "pointer" : "grab";
    tip.hidden = !node;
    if (!node) return;
    tip.textContent = [nodeTitle(node.facts), node.second, node.facts.status].filter(Boolean).join(" · ");
    const room = stage.width - tip.offsetWidth - 8;
    Object.assign(tip.style, { left: `${Math.max(4, Math.min(room, event.clientX - stage.left + 14))}px`, top: `${event.clientY - stage.top + 16}px` });
  },

  listenToMap() {
    const lead = (event) => {
      if (!event.buttons || !this.mapPicture) return;
      const { x, y } = this.mapPicture.toWorld(event.offsetX, event.offsetY);
      this.move(x, y, Math.max(this.view.scale, Math.min(READABLE, LEAST_FITTED)));
    };
    this.map.addEventListener("pointerdown", (event) => { this.map.setPointerCapture(event.pointerId); lead(event); });
    this.map.addEventListener("pointermove", lead);
  },

  listenToSearch() {
    const field = this.find(".gv-search input"), list = this.find(".gv-results");
    let soon = 0;
    const close = () => { list.hidden = true; field.setAttribute("aria-expanded", "false"); };
    field.addEventListener("input", () => { clearTimeout(soon); soon = setTimeout(() => this.showResults(field, list), BREATH); });
    field.addEventListener("focus", () => { if (field.value) this.showResults(field, list); });
    field.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key === "Escape") { close(); this.panes[this.names[0]].focus(); }
      if (event.key === "ArrowDown") { event.preventDefault(); list.querySelector("button")?.focus(); }
      if (event.key === "Enter") { clearTimeout(soon); this.showResults(field, list); list.querySelector("button")?.click(); }
    });
    list.addEventListener("keydown", (event) => {
      event.stopPropagation();
      const row = document.activeElement.closest("li");
      if (event.key === "ArrowDown") { event.preventDefault(); row?.nextElementSibling?.querySelector("button")?.focus(); }
      if (event.key === "ArrowUp") { event.preventDefault(); (row?.previousElementSibling?.querySelector("button") ?? field).focus(); }
      if (event.key === "Escape") { close(); field.focus(); }
    });
    this.find(".gv-search").addEventListener("focusout", (event) => { if (!this.find(".gv-search").contains(event.relatedTarget)) close(); });
    this.closeResults = close;
  },

  showResults(field, list) {
    const found = this.search(field.value);
    const rows = found.slice(0, MOST_RESULTS).map((one) => make("li", {}, make("button", { type: "button", onclick: () => { this.closeResults(); this.go(one.graph, one.side, one.node); } },
      make("span", { class: `gv-dot gv-${one.facts.status}`, "aria-label": one.facts.status }), make("strong", {}, one.facts.kind === "node" ? one.facts.op : one.facts.kind), ` ${one.facts.name}`)));
    const more = found.length > MOST_RESULTS ? `${found.length - MOST_RESULTS} more: type more of the name` : found.length ? "" : "nothing found";
    list.replaceChildren(...rows, ...(more ? [make("li", { class: "gv-muted" }, more)] : []));
    list.hidden = !field.value.trim();
    field.setAttribute("aria-expanded", String(!list.hidden));
  },

  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const pan = (dx, dy) => this.move(this.view.x + (dx * KEY_PAN) / this.view.scale, this.view.y + (dy * KEY_PAN) / this.view.scale);
    const inPane = event.target.tagName === "CANVAS";
    const keys = {
      "+": () => this.zoom(ZOOM_STEP), "=": () => this.zoom(ZOOM_STEP), "-": () => this.zoom(1 / ZOOM_STEP), 0: () => this.fit(),
      n: () => this.step("any", true), p: () => this.step("any", false), "/": () => this.find(".gv-search input").focus(), Escape: () => this.select(null),
    };
    const inPaneOnly = { ArrowLeft: () => pan(-1, 0), ArrowRight: () => pan(1, 0), ArrowUp: () => pan(0, -1), ArrowDown: () => pan(0, 1), Home: () => this.begin(), Enter: () => this.openSelected() };
    const act = keys[event.key] ?? (inPane ? inPaneOnly[event.key] : undefined);
    if (!act) return;
    event.preventDefault();
    act();
  },

  openSelected() {
    const chosen = this.selection && this.scene.sides[this.selection.side].nodes[this.selection.node];
    if (chosen?.facts.graphs?.length) this.open(chosen.facts.graphs[0]);
  },
};
