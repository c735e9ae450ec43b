// What is known of a selected node, as elements of the page. Names come from a model: they enter as text only.

const MOST_READERS = 12;

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") element.addEventListener("click", value);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function nodeTitle(facts) {
  return facts.kind === "node" ? `${facts.op} ${facts.name}`.trim() : `${facts.kind} ${facts.name}`;
}

// `go(graph, side, node)` leads to another node.
function showDetails(place, graphs, at, sideName, go, open) {
  place.replaceChildren();
  const side = graphs[at.graph][sideName], facts = side?.nodes[at.node];
  if (!facts) return;
  const other = sideName === "before" ? "after" : "before";
  place.append(
    make("header", {}, make("strong", {}, facts.kind === "node" ? facts.op : facts.kind),
      facts.domain ? make("span", { class: "gv-muted" }, facts.domain) : null,
      make("span", { class: `gv-badge gv-${facts.status}` }, facts.status)),
    make("p", { class: "gv-name" }, facts.name || "(no name)"));
  if (facts.changes.length) place.append(heading("What changed"), make("ul", {}, ...facts.changes.map((text) => make("li", {}, text))));
  appendRelated(place, graphs, facts, other, go);
  for (const index of facts.graphs || []) {
    const inner = graphs[index], count = (inner[sideName] || inner[other]).nodes.filter((node) => node.kind === "node").length;
    place.append(make("button", { type: "button", class: "gv-open", onclick: () => open(index) }, `⊞ open ${inner.title} (${count} nodes)`));
  }
  if (facts.attributes?.length) place.append(heading("Attributes"), attributeTable(facts.attributes));
  appendValues(place, "Inputs", facts.inputs, side, at, sideName, go, true);
  if (facts.captures?.length) appendValues(place, "Read by nested graphs", facts.captures, side, at, sideName, go, true);
  appendValues(place, "Outputs", facts.outputs, side, at, sideName, go, false);
  if (facts.origins?.length) place.append(heading(facts.origins.length > 1 ? "Origins" : "Origin"), make("p", { class: "gv-name" }, facts.origins.join(", ")));
}

function heading(text) { return make("h4", {}, text); }

function attributeTable(attributes) {
  return make("table", {}, ...attributes.map(([name, value]) => make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, value))));
}

function appendRelated(place, graphs, facts, other, go) {
  const others = facts.related;
  if (facts.status === "removed" && facts.kind === "node" && !others.length) {
    place.append(make("p", { class: "gv-muted" }, "Nothing after comes from it."));
  }
  if (!others.length) return;
  const title = other === "after" ? (facts.status === "removed" ? "Lives on in" : "Also in") : facts.status === "added" ? "Made because of" : "Also made from";
  place.append(heading(title), make("ul", { class: "gv-links" }, ...others.map(([graph, node]) => {
    const found = graphs[graph][other].nodes[node];
    return make("li", {}, link(nodeTitle(found), () => go(graph, other, node)));
  })));
}

function link(text, onclick) { return make("button", { type: "button", class: "gv-link", onclick }, text); }

function appendValues(place, title, indices, side, at, sideName, go, areInputs) {
  if (!indices.length) return;
  const rows = indices.map((index, position) => {
    if (index === null) return make("tr", {}, make("th", { scope: "row" }, String(position)), make("td", { class: "gv-muted" }, "left out"));
    const value = side.values[index];
    const cell = make("td", {}, make("span", { class: "gv-name" }, value.name || "(no name)"), make("div", { class: "gv-muted" }, `${value.type || "type unknown"} ${value.shape ? `[${value.shape}]` : "shape unknown"}`));
    if (value.constant) cell.append(constantFacts(value.constant));
    else cell.append(neighbours(side, index, areInputs, (node) => go(at.graph, sideName, node)));
    return make("tr", {}, make("th", { scope: "row" }, String(position)), cell);
  });
  place.append(heading(title), make("table", {}, ...rows));
}

function neighbours(side, value, ofInput, go) {
  const found = [];
  side.nodes.forEach((node, index) => {
    const linked = ofInput ? node.outputs.includes(value) : node.inputs.includes(value) || node.captures?.includes(value);
    if (linked) found.push([node, index]);
  });
  const shown = found.slice(0, MOST_READERS).map(([node, index]) => link(nodeTitle(node), () => go(index)));
  const more = found.length > MOST_READERS ? `and ${found.length - MOST_READERS} more` : "";
  return make("div", { class: "gv-links" }, found.length ? (ofInput ? "from " : "to ") : "", ...shown, more);
}

function constantFacts(constant) {
  const place = make("div", { class: "gv-constant" });
  const facts = [showBytes(constant.bytes)];
  if (constant.min !== undefined) facts.push(`${constant.min} … ${constant.max}`, `mean ${constant.mean}`);
  if (constant.zeros) facts.push(`${(100 * constant.zeros).toFixed(constant.zeros < 0.1 ? 1 : 0)} % zeros`);
  if (constant.of) facts.push(`of ${constant.of.toLocaleString("en")} elements looked at`);
  if (constant.first === undefined) facts.push("not read: large, and not stored as it is");
  if (constant.histogram) place.append(histogram(constant));
  place.append(make("div", { class: "gv-muted" }, facts.join(" · ")));
  if (constant.first !== undefined) place.append(make("div", { class: "gv-name" }, constant.first));
  return place;
}

function histogram(constant) {
  const space = "http://www.w3.org/2000/svg", most = Math.max(...constant.histogram), bins = constant.histogram.length;
  const drawing = document.createElementNS(space, "svg");
  drawing.setAttribute("viewBox", `0 0 ${bins * 5} 36`);
  drawing.setAttribute("role", "img");
  drawing.setAttribute("aria-label", `histogram from ${constant.min} to ${constant.max}`);
  constant.histogram.forEach((count, index) => {
    const bar = document.createElementNS(space, "rect"), height = count ? Math.max(1, (34 * count) / most) : 0;
    Object.entries({ x: index * 5, y: 36 - height, width: 4, height }).forEach(([name, value]) => bar.setAttribute(name, value));
    drawing.append(bar);
  });
  return drawing;
}
