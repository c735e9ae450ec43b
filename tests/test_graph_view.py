"""The graph view: which node became which, how graphs are laid out, and the page in a browser."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

import graphopt
from graphopt import provenance, walk
from graphopt.graph_facts import graph_facts
from graphopt.graph_layout import layered
from graphopt.graph_pairs import pair_models
from graphopt.graph_view import graph_page, graph_view
from graphopt.model_io import load
from graphopt.rewriter import Rewriter
from graphopt.tensor_glance import glance

from .browser import BrowserPage, new_page, start_browser  # noqa: F401

MODEL = """<ir_version: 8, opset_import: ["": 17]>
agraph (float[N,4] x) => (float[N,4] y)
<float[4,4] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}, float[4] b = {1,2,3,4}> {
  [product] a = MatMul(x, w)
  [same] s = Identity(a)
  [bias] c = Add(s, b)
  [squash] r = Relu(c)
  [scale] y = Mul(r, r)
}"""
NESTED = """<ir_version: 8, opset_import: ["": 17]>
agraph (float[2,3] x, bool c) => (float[2,3] z) <float[3] w = {1.0, 2.0, 3.0}> {
  [sum] a = Add(x, w)
  [choice] z = If (c) <
    then_branch = t () => (float[2,3] p) { [neg] p = Neg(a) },
    else_branch = e () => (float[2,3] q) { [abs] q = Abs(a) }
  >
}"""


def parsed(text: str) -> ir.Model:
    model = ir.from_proto(onnx.parser.parse_model(text))
    provenance.stamp(model)
    return model


def named(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in walk.every_node(model) if node.name == name)


def edited() -> tuple[ir.Model, ir.Model]:
    """A model and what became of it: `same` is gone, `bias` has another weight, `squash` is now a Clip and a Neg."""
    before = parsed(MODEL)
    after = before.clone()
    rewriter = Rewriter(after)
    same, bias, squash = (named(after, name) for name in ("same", "bias", "squash"))
    with rewriter.edit("bypass", same):
        rewriter.replace(same.outputs[0], same.inputs[0])
        rewriter.erase(same)
    with rewriter.edit("weight", bias):
        rewriter.set_weight(after.graph.initializers["b"], np.zeros(4, np.float32))
    with rewriter.edit("squash", squash):
        clip = rewriter.insert(rewriter.make("Clip", [squash.inputs[0]], sources=[squash]), before=squash)
        negated = rewriter.insert(rewriter.make("Neg", [clip.outputs[0]], sources=[squash]), before=squash)
        rewriter.replace(squash.outputs[0], negated.outputs[0])
        rewriter.erase(squash)
    return before, after


def statuses(before: ir.Model, after: ir.Model) -> dict[str, str]:
    pairs = pair_models(before, after)
    old = {f"before {node.name}": pairs.status(node, is_after=False) for node in before.graph}
    return old | {f"after {node.op_type}": pairs.status(node, is_after=True) for node in after.graph}


# --- which became which


def test_a_model_beside_itself_is_kept() -> None:
    model = parsed(NESTED)
    pairs = pair_models(model, model.clone())
    assert {pairs.status(node, is_after=True) for node in pairs.made_from} == {"kept"}
    assert {pairs.status(node, is_after=False) for node in pairs.became} == {"kept"}


def test_edits_show_as_what_they_are() -> None:
    before, after = edited()
    found = statuses(before, after)
    assert found["before product"] == found["after MatMul"] == "kept"
    assert found["before same"] == "removed"
    assert found["before bias"] == found["after Add"] == "changed"
    assert found["before scale"] == found["after Mul"] == "kept"
    # One of the two that came from `squash` has its place, the other is new.
    assert sorted([found["after Clip"], found["after Neg"]]) == ["added", "changed"]
    assert found["before squash"] == "changed"


def test_what_differs_is_said() -> None:
    before, after = edited()
    pairs = pair_models(before, after)
    texts = {node.op_type: texts for node, texts in pairs.changes.items() if texts}
    assert texts["Add"] == ["input 1: float[4] → float[4], other numbers"]
    (changed,) = [
        text for name, texts in texts.items() if name in ("Clip", "Neg") for text in texts if "operator" in text
    ]
    assert changed.startswith("operator: Relu → ")


def test_an_attribute_and_another_input_are_changes() -> None:
    before = parsed(MODEL.replace("Relu(c)", "LeakyRelu <alpha = 0.1> (c)"))
    after = parsed(MODEL.replace("Relu(c)", "LeakyRelu <alpha = 0.2> (c)").replace("Mul(r, r)", "Mul(r, c)"))
    pairs = pair_models(before, after)
    texts = {node.op_type: texts for node, texts in pairs.changes.items() if texts}
    assert texts["LeakyRelu"][0].startswith("alpha: 0.1")
    assert texts["Mul"] == ["input 1: r of LeakyRelu → c of Add"]
    assert set(texts) == {"LeakyRelu", "Mul"}


def test_models_of_two_files_are_paired_by_name() -> None:
    before, after = (ir.from_proto(onnx.parser.parse_model(text)) for text in (MODEL, MODEL.replace("Relu", "Sigmoid")))
    found = statuses(before, after)
    assert Counter(found.values()) == {"kept": 8, "changed": 2}


def test_a_change_in_a_branch_changes_what_holds_it() -> None:
    before, after = parsed(NESTED), parsed(NESTED.replace("Abs", "Floor"))
    pairs = pair_models(before, after)
    assert pairs.changes[named(after, "choice")] == ["else_branch: 1 changed, removed or added"]
    assert pairs.status(named(after, "neg"), is_after=True) == "kept"


def test_origins_are_followed_out_of_a_branch() -> None:
    before = parsed(NESTED)
    after = parsed("""<ir_version: 8, opset_import: ["": 17]>
    agraph (float[2,3] x, bool c) => (float[2,3] z) <float[3] w = {1.0, 2.0, 3.0}> {
      [sum] a = Add(x, w)
      [neg] z = Neg(a)
    }""")
    pairs = pair_models(before, after)
    moved = named(after, "neg")
    assert pairs.made_from[moved] == [named(before, "neg")]
    main, then = graph_facts(pairs)[:2]
    shown = next(node for node in main["after"]["nodes"] if node["name"] == "neg")
    assert any(then["before"]["nodes"][at]["name"] == "neg" for page, at in shown["related"] if page == 1)


# --- layout


def rows_of(layout: Any) -> dict[int, list[int]]:
    rows: dict[int, list[int]] = {}
    for vertex, row in enumerate(layout.rows):
        rows.setdefault(row, []).append(vertex)
    return rows


@pytest.mark.parametrize("seed", range(12))
def test_layouts_keep_their_promises(seed: int) -> None:
    rng = random.Random(seed)
    size = rng.choice((1, 2, 9, 60, 200))
    edges = {tuple(sorted(rng.sample(range(size), 2))) for _ in range(2 * size) if size > 1}
    layout = layered(size, edges)
    assert all(layout.rows[start] < layout.rows[end] for start, end in edges)
    for row in rows_of(layout).values():
        places = sorted(layout.x[vertex] for vertex in row)
        assert all(right - left > 0.98 for left, right in itertools.pairwise(places))
    assert layout == layered(size, sorted(edges, reverse=True))
    assert set(layout.bends) | layout.far <= edges


def test_a_chain_is_a_straight_line() -> None:
    layout = layered(50, [(i, i + 1) for i in range(49)])
    assert layout.rows == list(range(50))
    assert set(layout.x) == {0.0}


def test_branches_are_put_so_that_they_do_not_cross() -> None:
    # Two chains written down crosswise.
    layout = layered(6, [(0, 3), (1, 2), (3, 5), (2, 4)])
    assert (layout.x[0] < layout.x[1]) == (layout.x[3] < layout.x[2]) == (layout.x[5] < layout.x[4])


def test_a_circle_is_laid_out_all_the_same() -> None:
    layout = layered(3, [(0, 1), (1, 2), (2, 0)])
    assert layout.rows == [0, 1, 2]


def test_a_deep_graph_does_not_lean() -> None:
    blocks = 300
    edges = [
        edge
        for i in range(0, 4 * blocks, 4)
        for edge in [(i, i + 1), (i + 1, i + 2), (i, i + 3), (i + 2, i + 3), (i + 3, i + 4)]
    ]
    layout = layered(4 * blocks + 1, edges)
    assert max(map(abs, layout.x)) <= 2


def test_edges_over_many_rows_are_left_out_unless_they_are_all_there_is() -> None:
    chain = [(i, i + 1) for i in range(99)]
    # 100 is near its reader, and all it reads is 0.
    layout = layered(101, [*chain, (0, 99), (0, 100), (100, 98)])
    assert layout.rows[100] == 97
    assert layout.far == {(0, 99)}


def test_nothing_has_a_layout() -> None:
    assert layered(0, []).rows == []


# --- facts


def test_partners_have_one_place() -> None:
    before, after = edited()
    (facts,) = graph_facts(pair_models(before, after))
    old = {node["name"]: node["slot"] for node in facts["before"]["nodes"]}
    new = {node["name"]: node["slot"] for node in facts["after"]["nodes"]}
    assert old["product"] == new["product"]
    assert old["x"] == new["x"]
    assert old["same"] not in new.values()
    json.dumps(facts, allow_nan=False)


def test_an_edge_goes_straight_over_the_place_of_what_was_removed() -> None:
    before, after = edited()
    (facts,) = graph_facts(pair_models(before, after))
    slot = {node["name"]: node["slot"] for node in facts["before"]["nodes"]}
    rows = facts["row"]
    assert facts["bends"][f"{slot['product']},{slot['bias']}"] == [
        (rows[slot["same"]] - rows[slot["product"]], facts["x"][slot["same"]])
    ]


def test_values_nested_graphs_capture_are_shown() -> None:
    model = parsed(NESTED)
    main, then, _ = graph_facts(pair_models(model, model.clone()))
    choice = next(node for node in main["after"]["nodes"] if node["name"] == "choice")
    assert [main["after"]["values"][at]["name"] for at in choice["captures"]] == ["a"]
    assert choice["graphs"] == [1, 2]
    assert [(node["kind"], node["name"]) for node in then["after"]["nodes"]] == [
        ("captured", "a"),
        ("node", "neg"),
        ("output", "p"),
    ]
    assert (then["parent"], then["holder"], then["title"]) == (0, "choice", "then_branch")


def test_functions_are_graphs_of_their_own() -> None:
    model = parsed("""<ir_version: 8, opset_import: ["": 17, "own": 1]>
    agraph (float[2] x) => (float[2] y) { [call] y = own.twice(x) }
    <opset_import: ["": 17], domain: "own"> twice (a) => (b) { [inner] b = Add(a, a) }""")
    main, function = graph_facts(pair_models(model, model.clone()))
    call = next(node for node in main["after"]["nodes"] if node["name"] == "call")
    assert call["graphs"] == [1]
    assert function["title"] == "own::twice"
    assert function["parent"] is None


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([1.5, np.nan] * 8, np.float32), {"min": 1.5, "max": 1.5}),
        (np.zeros((0, 3), np.float32), {"first": "", "bytes": 0}),
        (np.array(7, np.int64), {"first": "7"}),
        (np.arange(100_000, dtype=np.float32), {"of": 65536, "min": 0.0, "max": 99999.0}),
        (np.full(9, np.inf, np.float32), {"first": "inf, inf, inf, inf, inf, inf, …"}),
        (np.array([True] * 9), {"bytes": 9}),
    ],
)
def test_any_tensor_is_looked_at(array: np.ndarray, expected: dict[str, Any]) -> None:
    found = glance(ir.tensor(array))
    assert {key: found[key] for key in expected} == expected
    json.dumps(found, allow_nan=False)


# --- the page


def test_the_same_models_give_the_same_view() -> None:
    before, after = edited()
    assert graph_view(before, after) == graph_view(before, after)


def test_models_are_not_changed() -> None:
    before, after = edited()
    states = [ir.to_proto(model).SerializeToString() for model in (before, after)]
    graph_view(before, after)
    assert [ir.to_proto(model).SerializeToString() for model in (before, after)] == states


def write(tmp_path: Path, before: ir.Model, after: ir.Model | None = None, title: str = "a model") -> Path:
    file = tmp_path / "graph.html"
    file.write_text(graph_page(graph_view(before, after), title), encoding="utf-8")
    return file


def opened(page: BrowserPage, file: Path) -> BrowserPage:
    page.open(file)
    page.tab.wait_for_selector(".gv-ready")
    page.evaluate("() => { window.view = document.querySelector('.graph-view').graphView; }")
    return page


def shown(page: BrowserPage, side: str) -> str:
    return str(page.tab.inner_text(f".gv-details [data-side={side}]"))


def colour_at(page: BrowserPage, side: str, name: str) -> list[int]:
    """The colour of the stripe of a node, as drawn."""
    return page.evaluate(  # type: ignore[no-any-return]
        """([side, name]) => {
          view.draw();
          const node = view.scene.sides[side].nodes.find((one) => one.facts.name === name), painter = view.painters[side];
          const x = (node.x - 154 / 2 + 2.5 - view.view.x) * view.view.scale + painter.width / 2;
          const y = (node.y - view.view.y) * view.view.scale + painter.height / 2;
          return [...painter.context.getImageData(Math.round(x * painter.ratio), Math.round(y * painter.ratio), 1, 1).data].slice(0, 3);
        }""",
        [side, name],
    )


def test_a_page_shows_both_sides(page: BrowserPage, tmp_path: Path) -> None:
    opened(page, write(tmp_path, *edited()))
    assert page.tab.inner_text(".gv-pane[data-side=before] .gv-count") == "5 nodes"
    chips = {
        status: page.tab.inner_text(f".gv-chip[data-status={status}] .gv-number")
        for status in ("kept", "changed", "removed", "added")
    }
    assert chips == {"kept": "2", "changed": "2", "removed": "1", "added": "1"}
    # Red where it is gone, amber where it changed.
    red, amber = colour_at(page, "before", "same"), colour_at(page, "after", "bias")
    assert red[0] > 150 > max(red[1:])
    assert amber[0] > amber[1] > amber[2]


def test_a_click_selects_both_partners(page: BrowserPage, tmp_path: Path) -> None:
    opened(page, write(tmp_path, *edited()))
    at = page.evaluate(
        """() => { const node = view.scene.sides.after.nodes.find((one) => one.facts.name === "bias"), painter = view.painters.after;
        return [(node.x - view.view.x) * view.view.scale + painter.width / 2, (node.y - view.view.y) * view.view.scale + painter.height / 2]; }"""
    )
    page.tab.click(".gv-pane[data-side=after] canvas", position={"x": at[0], "y": at[1]})
    for side in ("before", "after"):
        assert "bias" in shown(page, side)
        assert "float[4] → float[4], other numbers" in shown(page, side)
    page.tab.keyboard.press("Escape")
    assert not page.tab.is_visible(".gv-details")


def test_what_was_removed_says_so_and_leads_on(page: BrowserPage, tmp_path: Path) -> None:
    opened(page, write(tmp_path, *edited()))
    page.tab.click(".gv-chip[data-status=removed]")
    assert "removed" in shown(page, "before")
    assert shown(page, "after").strip() == "Not there after."
    page.tab.click(".gv-details [data-side=before] .gv-link >> text=product")
    assert "MatMul" in shown(page, "after")


def test_search_finds_by_name_operator_and_value(page: BrowserPage, tmp_path: Path) -> None:
    opened(page, write(tmp_path, *edited()))
    for text, first in (("PRODUCT", "MatMul product"), ("identity", "Identity same"), ("mul scale", "Mul scale")):
        page.tab.fill(".gv-search input", text)
        page.tab.wait_for_function("text => document.querySelector('.gv-results').innerText.includes(text)", arg=first)
    page.tab.press(".gv-search input", "Enter")
    assert "scale" in shown(page, "after")
    page.tab.fill(".gv-search input", "no such thing")
    page.tab.wait_for_function("() => document.querySelector('.gv-results').innerText === 'nothing found'")


def test_both_sides_move_together_by_wheel_keys_and_dragging(page: BrowserPage, tmp_path: Path) -> None:
    opened(page, write(tmp_path, *edited()))
    canvas = ".gv-pane[data-side=before] canvas"
    start = page.evaluate("() => ({...view.view})")
    page.tab.hover(canvas)
    page.tab.mouse.down()
    page.tab.mouse.move(300, 400, steps=4)
    page.tab.mouse.up()
    dragged = page.evaluate("() => ({...view.view})")
    assert (dragged["x"], dragged["y"]) != (start["x"], start["y"])
    page.tab.mouse.wheel(0, -400)
    page.tab.wait_for_function("scale => view.view.scale > scale", arg=dragged["scale"])
    page.tab.focus(canvas)
    page.tab.keyboard.press("0")
    fitted = page.evaluate("() => view.view.scale")
    page.tab.keyboard.press("+")
    assert page.evaluate("() => view.view.scale") > fitted
    # No distance leads out of the graph.
    page.evaluate("() => view.move(1e9, -1e9, 1e9)")
    end = page.evaluate("() => ({...view.view, right: view.scene.right, top: view.scene.top})")
    assert (end["x"], end["y"]) == (end["right"], end["top"])


def test_nested_graphs_open_and_lead_back(page: BrowserPage, tmp_path: Path) -> None:
    opened(page, write(tmp_path, parsed(NESTED), parsed(NESTED.replace("Abs", "Floor"))))
    page.evaluate("() => view.selectNamed({node: 'choice'})")
    page.tab.click(".gv-details [data-side=after] .gv-open >> nth=1")
    assert page.tab.inner_text(".gv-trail") == "model › choice · else_branch"
    assert page.tab.inner_text(".gv-chip[data-status=changed] .gv-number") == "1"
    page.tab.click(".gv-trail .gv-link")
    assert not page.tab.is_visible(".gv-trail")
    # A search leads into a nested graph.
    page.tab.fill(".gv-search input", "neg")
    page.tab.press(".gv-search input", "Enter")
    assert "then_branch" in page.tab.inner_text(".gv-trail")


def test_other_parts_of_a_page_can_select(page: BrowserPage, tmp_path: Path) -> None:
    opened(page, write(tmp_path, *edited()))
    page.evaluate("() => document.dispatchEvent(new CustomEvent('graphopt-select', {detail: {origin: 'same'}}))")
    page.tab.wait_for_function("() => document.querySelector('.gv-details').innerText.includes('removed')")
    assert "Identity" in shown(page, "before")


def test_names_from_a_model_are_never_markup(page: BrowserPage, tmp_path: Path) -> None:
    before = parsed(MODEL)
    evil = "</script><img src=x onerror=alert(1)>"
    named(before, "product").name = evil
    opened(page, write(tmp_path, before, before.clone(), title=evil))
    page.tab.fill(".gv-search input", "matmul")
    page.tab.press(".gv-search input", "Enter")
    assert evil in shown(page, "after")
    assert page.evaluate("() => document.images.length") == 0


def test_one_model_is_shown_alone(page: BrowserPage, tmp_path: Path) -> None:
    opened(page, write(tmp_path, parsed(NESTED)))
    assert page.evaluate("() => document.querySelectorAll('.gv-pane').length") == 1
    assert page.evaluate("() => document.querySelectorAll('.gv-chip').length") == 0
    page.evaluate("() => view.selectNamed({node: 'sum'})")
    assert "float [3]" in shown(page, "after")


def test_colours_follow_the_page(page: BrowserPage, tmp_path: Path) -> None:
    opened(page, write(tmp_path, *edited()))
    light = page.evaluate("() => view.colours.panel")
    page.evaluate(
        "() => { document.documentElement.style.setProperty('--panel', 'rgb(1, 2, 3)'); document.dispatchEvent(new Event('graphopt-theme')); }"
    )
    page.tab.wait_for_function("() => view.colours.panel === 'rgb(1, 2, 3)'")
    assert light != "rgb(1, 2, 3)"


def test_a_narrow_page_stacks_the_sides(page: BrowserPage, tmp_path: Path) -> None:
    page.tab.set_viewport_size({"width": 390, "height": 800})
    opened(page, write(tmp_path, *edited()))
    boxes = [page.tab.locator(f".gv-pane[data-side={side}]").bounding_box() for side in ("before", "after")]
    assert boxes[1]["y"] >= boxes[0]["y"] + boxes[0]["height"]
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


def test_a_real_model_with_nested_graphs(page: BrowserPage, shared: Path, tmp_path: Path) -> None:
    file = shared / "assets" / "models" / "silero_vad.onnx"
    after = graphopt.optimize(file, "simplify", verify="off").model
    opened(page, write(tmp_path, load(file), after))
    counts = page.evaluate(
        "() => view.graphs.map((graph, index) => { view.open(index); view.draw(); return Object.keys(view.scene.sides).length; })"
    )
    assert len(counts) > 4
    assert set(counts) <= {1, 2}


def test_thousands_of_nodes_are_drawn_by_what_is_seen(page: BrowserPage, tmp_path: Path) -> None:
    count = 5000
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([4]))
    nodes: list[ir.Node] = []
    for index in range(count):
        nodes.append(
            ir.node("Relu" if index % 3 else "Add", [value] if index % 3 else [value, value], name=f"n{index}")
        )
        value = nodes[-1].outputs[0]
        value.name, value.type, value.shape = f"v{index}", ir.TensorType(ir.DataType.FLOAT), ir.Shape([4])
    first = nodes[0].inputs[0]
    assert first is not None
    model = ir.Model(ir.Graph([first], [value], nodes=nodes, opset_imports={"": 17}, name="deep"), ir_version=8)
    opened(page, write(tmp_path, model))
    drawn = """scale => { view.move(0, view.scene.bottom / 2, scale); let labels = 0, nodes = 0; const painter = view.painters.after, [label, node] = [painter.drawLabel, painter.drawNode];
      painter.drawLabel = () => { labels += 1; }; painter.drawNode = function (...given) { nodes += 1; node.apply(painter, given); };
      view.draw(); Object.assign(painter, { drawLabel: label, drawNode: node }); return [labels, nodes]; }"""
    assert page.evaluate(drawn, 0.01) == [0, 0]
    labels, frames = page.evaluate(drawn, 0.25)
    assert labels == 0
    assert 0 < frames < 100
    labels, frames = page.evaluate(drawn, 1)
    assert 0 < labels == frames < 30
