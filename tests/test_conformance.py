"""ONNX's own cases for single operators, through `simplify`: what was right before is right after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from graphopt.errors import GraphoptError, ModelError

from .node_cases import NodeCase, agrees, node_cases, run, with_constant_inputs
from .pass_runs import loaded, run_passes

# How many cases really ran with onnx 1.23 and ONNX Runtime 1.31. Fewer on other versions is no fault of ours.
COUNTED_WITH = ("1.23", "1.31")
FORMS: dict[str, tuple[Callable[[NodeCase], onnx.ModelProto | None], int]] = {
    "plain": (lambda case: case.model, 1490),
    "constant": (with_constant_inputs, 1472),
}
SHOWN = 10


@pytest.mark.parametrize("form", FORMS)
def test_simplified_node_cases_are_right(form: str, record_property: Callable[[str, object], None]) -> None:
    as_form, floor = FORMS[form]
    outcomes: Counter[str] = Counter()
    wrong = []
    for case in node_cases():
        proto = as_form(case)
        outcome = "no such form" if proto is None else outcome_of(case, proto)
        if outcome.startswith("wrong"):
            wrong.append(f"{case.name}: {outcome}")
        outcomes[outcome.partition(":")[0]] += 1
    for outcome, count in outcomes.items():
        record_property(f"{form}: {outcome}", count)
    ran = outcomes["unchanged"] + outcomes["changed"]
    summary = f"{form}: {ran} of {len(node_cases())} node cases ran through simplify, {dict(outcomes)}"
    print(summary)  # noqa: T201
    assert not wrong, f"{len(wrong)} wrong: {wrong[:SHOWN]}"
    if (onnx.__version__.rpartition(".")[0], ort.__version__.rpartition(".")[0]) == COUNTED_WITH:
        assert ran >= floor, summary


def outcome_of(case: NodeCase, proto: onnx.ModelProto) -> str:
    inputs = {name: case.inputs[name] for name in (info.name for info in proto.graph.input)}
    if not agrees(run(proto, inputs), case):
        return "not right in ONNX Runtime"
    try:
        model = loaded(proto)
    except ModelError as error:
        return f"refused: {error.message}"
    try:
        result = run_passes(model, "simplify")
    except GraphoptError as error:
        return f"wrong: {error.message}"
    if not agrees(run(ir.to_proto(result.model), inputs), case):
        return f"wrong: {[edit.rule for edit in result.edits]}"
    return "changed" if result.edits else "unchanged"
