"""ONNX's own cases for single operators, through each preset and to a newer opset: right before, right after."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from graphopt import passes, walk
from graphopt.authoring import Guarantee
from graphopt.errors import GraphoptError, ModelError, PassError
from graphopt.passes.exact.opset_history import schema_at
from graphopt.pipeline import Pipeline, weakest

from .node_cases import NodeCase, agrees, newest_opset_that_runs, node_cases, run, with_constant_inputs
from .pass_runs import loaded, run_passes

# How many cases really ran with onnx 1.23 and ONNX Runtime 1.32. Fewer on other versions is no fault of ours.
COUNTED_WITH = ("1.23", "1.32")
FORMS: dict[str, tuple[Callable[[NodeCase], onnx.ModelProto | None], int]] = {
    "plain": (lambda case: case.model, 1740),
    "constant": (with_constant_inputs, 1722),
}
NEWEST = newest_opset_that_runs()
PRESETS = [
    name
    for name in sorted(passes.PRESETS)
    if weakest(step.guarantee for step in Pipeline.parse(name).steps) is not Guarantee.LOSSY
]
# Converted, six of these cases have no kernel any more, and the Scan of opset 8 cannot be said.
SPECS = {**dict.fromkeys(PRESETS, 0), f"opset:to={NEWEST}": 7}
# What ONNX Runtime opens a model of and then has no kernel for, by the opset whose version of it that is: 1.32 opens
# models of opset 28, without kernels for those of its operators that came to take codes and optionals of 6-bit floats.
NO_KERNEL = {
    "Bernoulli": 22,
    "Optional": 28,
    "OptionalGetElement": 28,
    "OptionalHasElement": 28,
    "QuantizeLinear": 28,
    "RandomUniformLike": 22,
    "RoiAlign": 22,
    "Swish": 24,
}
SHOWN = 10


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spec", SPECS)
def test_node_cases_stay_right(form: str, spec: str, record_property: Callable[[str, object], None]) -> None:
    outcomes: Counter[str] = Counter()
    wrong = []
    for index, case in enumerate(node_cases()):
        outcome = outcome_of(index, form, spec)
        if outcome.startswith("wrong"):
            wrong.append(f"{case.name}: {outcome}")
        outcomes[outcome.partition(":")[0]] += 1
    for outcome, count in outcomes.items():
        record_property(f"{form}: {outcome}", count)
    ran = outcomes["unchanged"] + outcomes["changed"]
    summary = f"{form}: {ran} of {len(node_cases())} node cases ran through {spec}, {dict(outcomes)}"
    print(summary)  # noqa: T201
    assert not wrong, f"{len(wrong)} wrong: {wrong[:SHOWN]}"
    if (onnx.__version__.rpartition(".")[0], ort.__version__.rpartition(".")[0]) == COUNTED_WITH:
        assert ran >= FORMS[form][1] - SPECS[spec], summary


@functools.cache
def model_of(index: int, form: str) -> ir.Model | str:
    """Return a case in a form if ONNX Runtime gets it right, else why it is none for us."""
    case = node_cases()[index]
    proto = FORMS[form][0](case)
    if proto is None:
        return "no such form"
    if not agrees(run(proto, inputs_of(case, proto)), case):
        return "not right in ONNX Runtime"
    try:
        return loaded(proto)
    except ModelError as error:
        return f"refused: {error.message}"


def inputs_of(case: NodeCase, proto: onnx.ModelProto) -> dict[str, object]:
    return {info.name: case.inputs[info.name] for info in proto.graph.input}


def outcome_of(index: int, form: str, spec: str) -> str:
    case, model = node_cases()[index], model_of(index, form)
    if isinstance(model, str):
        return model
    try:
        result = run_passes(model.clone(), spec)
    except PassError as error:
        return f"refused: {error.message}" if spec not in PRESETS else f"wrong: {error.message}"
    except GraphoptError as error:
        return f"wrong: {error.message}"
    proto = ir.to_proto(result.model)
    outputs = run(proto, inputs_of(case, proto))
    if outputs is None and spec not in PRESETS and any(map(_has_no_kernel, walk.every_node(result.model))):
        return "no kernel"
    if not agrees(outputs, case):
        return f"wrong: {[edit.rule for edit in result.edits]}"
    return "changed" if result.edits else "unchanged"


def _has_no_kernel(node: ir.Node) -> bool:
    """Return whether a node is of a version of its operator that ONNX Runtime has no kernel for."""
    schema = schema_at(node.op_type, NEWEST) if node.domain in walk.ONNX_DOMAINS else None
    return schema is not None and schema.since_version == NO_KERNEL.get(node.op_type)
