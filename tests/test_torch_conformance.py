"""ONNX's own cases for single operators in torch: right where ONNX Runtime is, and what is not is known and said."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from fnmatch import fnmatch

import onnx
import pytest

from graphopt import ir
from graphopt.backends.torch_fx.backend import Torch
from graphopt.errors import BackendError
from graphopt.normal_form import normalize

from .node_cases import NodeCase, agrees, node_cases, run, with_constant_inputs

pytest.importorskip("torch")

# The share of the cases ONNX Runtime gets right that torch must, too; with onnx 1.23 and ONNX Runtime 1.32 it is 0.994.
LEAST_SHARE = 0.99
FORMS: Mapping[str, Callable[[NodeCase], onnx.ModelProto | None]] = {
    "plain": lambda case: case.model,
    "constant": with_constant_inputs,
}
# What is refused, by how the error begins to name it, and why nothing is there.
REFUSED = {
    "ai.onnx.ml::": "trees and tables of strings: nothing of them can be trained by gradients",
    "ImageDecoder": "torch takes no image files apart",
    "Scan` of version 8": "batches of sequences, which opset 9 did away with",
}
# Cases that come out otherwise, as patterns of their names, and why.
DIFFERENT = {
    "test_attention_*causal_fp16*": "a unit in the last place of 16 bits more than the tolerance allows",
    "test_attention_*_bf16*": "as above: bfloat16 has 8 bits, the tolerance is that of float32",
    "test_bernoulli*": "random numbers, of a generator that ONNX leaves open",
    "test_maxunpool_export_with_output_shape": "places count through the output asked for, as in ONNX Runtime",
    "test_training_dropout*": "random numbers, of a generator that ONNX leaves open",
    "test_dft_inverse*": "zeros that are only nearly zero: within rounding, not within the tolerance",
    "test_resize_downsample_scales_*_align_corners": "sizes that are no whole numbers, which ONNX Runtime rounds, too",
}
SHOWN = 10


@pytest.mark.parametrize("form", FORMS)
def test_node_cases_are_right(form: str, record_property: Callable[[str, object], None]) -> None:
    outcomes = {case.name: outcome_of(index, form) for index, case in enumerate(node_cases())}
    counts = Counter(outcome.partition(":")[0] for outcome in outcomes.values())
    theirs = [name for name in outcomes if name in right_in_onnxruntime(form)]
    share = sum(outcomes[name] == "right" for name in theirs) / len(theirs)
    summary = f"{form}: {share:.1%} of the {len(theirs)} node cases that ONNX Runtime gets right, {dict(counts)} of all"
    print(summary)  # noqa: T201
    record_property(form, summary)
    surprising = [f"{name}: {outcome}" for name, outcome in outcomes.items() if not is_known(name, outcome)]
    assert not surprising, f"{len(surprising)} surprising: {surprising[:SHOWN]}"
    assert share >= LEAST_SHARE, summary


def test_every_known_difference_is_one() -> None:
    plain = {case.name: outcome_of(index, "plain") for index, case in enumerate(node_cases())}
    wrong = [name for name, outcome in plain.items() if outcome == "wrong"]
    refused = [outcome for outcome in plain.values() if outcome.startswith("refused")]
    assert [one for one in DIFFERENT if not any(fnmatch(name, one) for name in wrong)] == []
    assert [one for one in REFUSED if not any(f"`{one}" in why for why in refused)] == []


def test_refusals_name_operator_and_node() -> None:
    node = onnx.helper.make_node("ImageDecoder", ["x"], ["y"], name="decoder")
    with pytest.raises(BackendError) as caught:
        Torch().open(one_node(node, onnx.TensorProto.UINT8))
    assert "`ImageDecoder` of version 20" in caught.value.message
    assert "`decoder`" in caught.value.message
    assert caught.value.hint


def test_attributes_that_are_not_known_are_named() -> None:
    node = onnx.helper.make_node("Relu", ["x"], ["y"], name="activation", slope=0.5)
    with pytest.raises(BackendError, match="`Relu` with `slope`"):
        Torch().open(one_node(node, onnx.TensorProto.FLOAT))


def one_node(node: onnx.NodeProto, dtype: int) -> ir.Model:
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [onnx.helper.make_tensor_value_info("x", dtype, [None])],
        [onnx.helper.make_tensor_value_info("y", dtype, None)],
    )
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9))


@functools.cache
def right_in_onnxruntime(form: str) -> frozenset[str]:
    """Return the names of the cases that ONNX Runtime gets right."""
    found = set()
    for case in node_cases():
        proto = FORMS[form](case)
        if proto is not None and agrees(run(proto, inputs_of(case, proto)), case):
            found.add(case.name)
    return frozenset(found)


@functools.cache
def outcome_of(index: int, form: str) -> str:
    """Return what becomes of a case in torch: right, wrong, refused or failed, with the reason of the latter two."""
    case = node_cases()[index]
    proto = FORMS[form](case)
    if proto is None:
        return "no such form"
    model = ir.from_proto(proto)
    normalize(model)
    try:
        session = Torch().open(model, threads=1)
    except BackendError as error:
        return f"refused: {error.message}"
    with session:
        try:
            outputs = list(session.run(inputs_of(case, proto)).values())
        except BackendError as error:
            return f"failed: {error.message}"
    return "right" if agrees(outputs, case) else "wrong"


def is_known(name: str, outcome: str) -> bool:
    """Return whether an outcome is right, or its reason is written above."""
    if outcome.startswith("refused"):
        return any(f"`{one}" in outcome for one in REFUSED)
    return outcome in ("right", "no such form") or (outcome == "wrong" and any(fnmatch(name, one) for one in DIFFERENT))


def inputs_of(case: NodeCase, proto: onnx.ModelProto) -> dict[str, object]:
    return {info.name: case.inputs[info.name] for info in proto.graph.input}
