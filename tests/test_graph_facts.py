"""Graphs before and after: which node became which, how graphs are laid out, and what a viewer shows of them."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

import graphopt
from graphopt.graph_view.facts import graph_facts
from graphopt.graph_view.layout import layered
from graphopt.graph_view.pairs import pair_models
from graphopt.graph_view.tensor_glance import glance, look_alike
from graphopt.graph_view.view import graph_view
from graphopt.model_io import load
from graphopt.rewriter import Rewriter

from .edited_models import MODEL, NESTED, edited, named, parsed
from .graph_generator import random_model


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


def test_what_is_not_drawn_has_no_partner_that_is() -> None:
    start = '<ir_version: 8, opset_import: ["" : 17]> g (float[1, 2] x) => (float[1, 2] y)'
    stored, decoded = (
        parsed(f"{start} {text} y = MatMul(x, w) }}")
        for text in (
            "{ w = Constant<value = float[2, 2] {1, 2, 3, 4}>()",
            "<int8[2, 2] codes = {1, 2, 3, 4}, float scale = {1}> { w = DequantizeLinear(codes, scale)",
        )
    )
    for before, after, status in ((stored, decoded, "added"), (decoded, stored, "removed")):
        graph = graph_facts(pair_models(before.clone(), after.clone()))[0]
        nodes = [one for side in ("before", "after") for one in graph[side]["nodes"]]
        assert {one["status"] for one in nodes if one["op"] == "DequantizeLinear"} == {status}


def test_what_is_put_between_two_nodes_changes_neither() -> None:
    before = parsed(MODEL)
    after = before.clone()
    rewriter = Rewriter(after)
    squash = named(after, "squash")
    with rewriter.edit("between", squash):
        value = squash.inputs[0]
        negated = rewriter.insert(rewriter.make("Neg", [value], sources=[squash]), before=squash)
        twice = rewriter.insert(rewriter.make("Neg", [negated.outputs[0]], sources=[squash]), before=squash)
        rewriter.set_input(squash, 0, twice.outputs[0])
    found = statuses(before, after)
    assert {name for name, status in found.items() if status != "kept"} == {"after Neg"}


def test_no_pair_turns_the_order_around() -> None:
    before, after = parsed(MODEL), parsed(MODEL)
    product, scale = named(after, "product"), named(after, "scale")
    rewriter = Rewriter(after)
    with rewriter.edit("ahead", product):
        # It comes from the last node of all and is before the first.
        value = product.inputs[0]
        ahead = rewriter.insert(rewriter.make("Abs", [value], sources=[scale]), before=product)
        rewriter.set_input(product, 0, ahead.outputs[0])
        negated = rewriter.insert(rewriter.make("Neg", [scale.inputs[0]], sources=[]), before=scale)
        rewriter.replace(scale.outputs[0], negated.outputs[0])
        rewriter.erase(scale)
    pairs = pair_models(before, after)
    assert ahead not in pairs.before
    assert pairs.became[named(before, "scale")] == [ahead]


def test_what_prepares_a_weight_has_not_become_what_it_is_for() -> None:
    before = parsed(MODEL)
    after = before.clone()
    rewriter = Rewriter(after)
    product, same = named(after, "product"), named(after, "same")
    with rewriter.edit("prepare", product):
        weight = product.inputs[1]
        exp = rewriter.insert(rewriter.make("Exp", [weight], sources=[product, same]), before=product)
        rewriter.set_input(product, 1, exp.outputs[0])
        rewriter.replace(same.outputs[0], same.inputs[0])
        rewriter.erase(same)
    pairs = pair_models(before, after)
    assert exp not in pairs.before
    assert pairs.status(named(before, "same"), is_after=False) == "removed"
    assert pairs.changes[product] == [f"input 1: constant w → {exp.outputs[0].name} of Exp"]


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


def test_what_was_added_takes_the_place_of_what_was_removed() -> None:
    before = parsed(MODEL)
    after = before.clone()
    rewriter = Rewriter(after)
    same = named(after, "same")
    with rewriter.edit("other", same):
        cast = rewriter.insert(rewriter.make("Cast", [same.inputs[0]], {"to": 1}, sources=[same]), before=same)
        rewriter.replace(same.outputs[0], cast.outputs[0])
        rewriter.erase(same)
    (facts,) = graph_facts(pair_models(before, after))
    old = next(node for node in facts["before"]["nodes"] if node["name"] == "same")
    new = next(node for node in facts["after"]["nodes"] if node["op"] == "Cast")
    assert (old["status"], new["status"]) == ("removed", "added")
    assert old["slot"] == new["slot"]
    assert old["partner"] is None
    assert len(facts["x"]) == len(facts["before"]["nodes"])


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


def test_large_weights_of_two_files_are_compared_by_a_part() -> None:
    large = np.zeros(5 << 20, np.float32)
    other = large.copy()
    assert look_alike(ir.tensor(large), ir.tensor(other))
    other[-1] = 1
    assert not look_alike(ir.tensor(large), ir.tensor(other))
    assert not look_alike(ir.tensor(large), ir.tensor(large[:-1]))


def test_what_is_not_drawn_is_said() -> None:
    lines = [f"v{i + 1} = Relu(v{i})" for i in range(40)]
    text = f"""<ir_version: 8, opset_import: ["": 17]>
    agraph (float[2] v0) => (float[2] y) {{ {" ".join(lines)} w = Neg(v1) y = Sum(v40, v1, w) }}"""
    model = parsed(text)
    assert graph_view(model).remark.startswith("One edge that skips many layers")
    assert graph_view(parsed(MODEL)).remark == ""


@pytest.mark.parametrize("seed", range(10))
def test_random_models_have_facts_that_hold_together(seed: int, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    onnx.save(random_model(seed), file)
    pages = graph_facts(pair_models(load(file), graphopt.optimize(file, "simplify", verify="off").model))
    json.dumps(pages, allow_nan=False)
    for facts, (side, other) in itertools.product(pages, (("before", "after"), ("after", "before"))):
        if facts[side] is None:
            continue
        nodes = facts[side]["nodes"]
        assert len({node["slot"] for node in nodes}) == len(nodes)
        for node in nodes:
            assert (node["partner"] is not None) == (node["status"] in ("kept", "changed"))
            if node["partner"] is not None:
                assert facts[other]["nodes"][node["partner"]]["slot"] == node["slot"]
            assert all(pages[page][other]["nodes"][at] for page, at in node["related"])
