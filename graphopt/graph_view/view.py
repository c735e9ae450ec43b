"""A view of a model's graph before and after, to be explored in a browser: a fragment of a page, without network."""

from __future__ import annotations

import base64
import gzip
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import onnx_ir as ir

from graphopt import shapes, walk
from graphopt.graph_view.facts import Facts, graph_facts
from graphopt.graph_view.pairs import pair_models

_SCRIPTS = ("canvas.js", "details.js", "controls.js", "view.js")
_STATUSES = {
    "kept": "same operator, attributes, weights and inputs",
    "changed": "another operator, attribute, weight or input",
    "removed": "not there after",
    "added": "not there before",
}
_HINT = (
    "Drag to move, click and turn the wheel to zoom (Ctrl + wheel at once), click a node for what is known of it; "
    "double-click one marked ⊞ to open the graph inside. Keys: arrows, + − 0, n and p for the next and previous "
    "change, / to search."
)
_SEARCH = "Search nodes, values, origins"


@dataclass(frozen=True)
class GraphView:
    """A graph view, as parts of a page.

    Attributes:
        html: What goes where it is to be seen.
        style: CSS, all of it under `.graph-view`. Colours come from the page's custom properties `--panel`, `--ink`,
            `--muted`, `--line`, `--accent`, `--kept`, `--changed`, `--removed` and `--added`, where it has them.
        script: JavaScript that is to run once the page is parsed. It draws when the view comes near the screen, again
            on the page's event `graphopt-theme`, and selects on `graphopt-select` with a detail of an `origin`, or of
            a `node` of the model after.
        remark: What is not drawn, or "".
    """

    html: str
    style: str
    script: str
    remark: str


def graph_view(before: ir.Model, after: ir.Model | None = None) -> GraphView:
    """Return a view of two states of a model side by side, nodes matched by origin, or of one model.

    Neither model is changed, but for an origin of nodes that have none. Shapes are inferred on copies, and of large
    weights a part is read.
    """
    new = _with_shapes(before if after is None else after)
    old = new if after is None else _with_shapes(before)
    graphs = graph_facts(pair_models(old, new))
    if after is None:
        graphs = [{**graph, "before": None} for graph in graphs]
        for node in (node for graph in graphs for node in graph["after"]["nodes"]):
            node["partner"], node["related"] = None, []
    sides = ("after",) if after is None else ("before", "after")
    script = "(() => {\n" + "\n".join(_asset(name) for name in _SCRIPTS) + "\n})();\n"
    return GraphView(_fragment(graphs, sides), _asset("view.css"), script, _remark(graphs))


def graph_page(view: GraphView, title: str) -> str:
    """Return a view as a whole page of its own, light or dark as the reader's system is."""
    frame = _asset("page.html")
    parts = {
        "title": html.escape(title),
        "style": view.style,
        "view": view.html,
        "script": view.script,
        "remark": view.remark,
    }
    for name, text in parts.items():
        frame = frame.replace(f"<!-- {name} -->", text)
    return frame.replace('class="graph-view"', 'class="graph-view" data-wheel="always"')


def _with_shapes(model: ir.Model) -> ir.Model:
    """Return the model if all its values have a shape, else a copy on which they are inferred."""
    values = (value for node in walk.every_node(model) for value in node.outputs if value.name)
    if all(value.shape is not None for value in values):
        return model
    copy = model.clone()
    shapes.infer_shapes(copy)
    return copy


def _asset(name: str) -> str:
    return resources.files("graphopt.graph_view").joinpath(name).read_text(encoding="utf-8")


def _remark(graphs: Sequence[Facts]) -> str:
    far = sum(len(graph["far"]) for graph in graphs)
    if not far:
        return ""
    if far == 1:
        return "One edge that skips many layers is drawn only while one of its ends is selected."
    return f"{far:,} edges that skip many layers are drawn only while one of their ends is selected."


def _fragment(graphs: Sequence[Facts], sides: Sequence[str]) -> str:
    packed = gzip.compress(json.dumps(graphs, separators=(",", ":"), ensure_ascii=False).encode(), mtime=0)
    chips = "".join(_chip(status, meaning) for status, meaning in _STATUSES.items()) if len(sides) > 1 else ""
    panes = [_pane(side, alone=len(sides) == 1) for side in sides]
    panes.insert(1, '<canvas class="gv-map" role="img" aria-label="map of the whole graph"></canvas>')
    details = "".join(f'<section data-side="{side}" aria-label="{side}"></section>' for side in sides)
    changes = _button("previous", "↑", "previous change (p)") + _button("next", "↓", "next change (n)")
    return (
        f'<div class="graph-view" data-sides="{len(sides)}">\n<div class="gv-bar">{chips}'
        f'<div class="gv-search"><input type="search" placeholder="{_SEARCH}" aria-label="{_SEARCH}" '
        'aria-expanded="false" autocomplete="off" spellcheck="false">'
        '<ul class="gv-results" hidden></ul></div>'
        f'<div class="gv-tools">{changes if len(sides) > 1 else ""}{_button("begin", "top", "to the beginning (Home)")}'
        f'{_button("out", "−", "zoom out (−)")}<span class="gv-scale"></span>{_button("in", "+", "zoom in (+)")}'
        f"{_button('fit', 'fit', 'fit the whole graph (0)')}</div></div>\n"
        f'<nav class="gv-trail" aria-label="which graph" hidden></nav>\n<div class="gv-stage">{"".join(panes)}'
        f'<div class="gv-tip" hidden></div></div>\n<p class="gv-hint">{_HINT}</p>\n'
        f'<div class="gv-details">{details}</div>\n'
        '<div class="gv-said" aria-live="polite"></div><span class="gv-probe"></span>\n'
        f'<script type="application/octet-stream" class="gv-data">{base64.b64encode(packed).decode()}</script>\n</div>'
    )


def _chip(status: str, meaning: str) -> str:
    title = f"{meaning}; click for the next one"
    return (
        f'<button type="button" class="gv-chip" data-status="{status}" title="{title}"><span class="gv-number"></span>'
        f"{status}</button>"
    )


def _pane(side: str, *, alone: bool) -> str:
    caption = "" if alone else f"<b>{side}</b> "
    label = "graph" if alone else f"graph {side}"
    return (
        f'<figure class="gv-pane" data-side="{side}"><figcaption>{caption}<span class="gv-count"></span></figcaption>'
        f'<canvas tabindex="0" role="application" aria-label="{label}: arrows move, plus and minus zoom"></canvas>'
        "</figure>"
    )


def _button(action: str, sign: str, title: str) -> str:
    return f'<button type="button" data-do="{action}" title="{title}" aria-label="{title}">{sign}</button>'
