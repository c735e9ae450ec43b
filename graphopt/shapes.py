"""What is known of shapes and of small integer tensors, symbolic sizes included: inferred, asked for, taken back."""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx_ir as ir

from graphopt import walk
from graphopt.inference import Inference
from graphopt.shape_rules.shape_facts import Contents, Dims
from graphopt.value_records import INFERRED, fact_of, forget, inherit, write_down

__all__ = [
    "INFERRED",
    "contents",
    "contradiction",
    "declare_sizes",
    "dims_of",
    "forget_inferred",
    "impossible_graphs",
    "infer_node",
    "infer_shapes",
    "inherit",
    "same_shape",
    "static_bytes",
    "static_shape",
]


def infer_shapes(model: ir.Model) -> str | None:
    """Infer dtypes, shapes and small integer contents of all values, nested graphs included.

    What the file declares of inputs and outputs stays; of inner values, it fills in what inference does not find. The
    values of a function's body learn nothing, since each call may see other shapes.

    Returns:
        What contradicts what, or None. Where a declaration of an inner value is at fault, inference goes without any;
        where the model contradicts itself, nothing is inferred. Runtimes run such models all the same.
    """
    inference = Inference(model.opset_imports, model.functions)
    inference.run(model.graph)
    reasons = [*inference.contradictions, *inference.clashes]
    if reasons:
        inference = Inference(model.opset_imports, model.functions, trust_declared=False)
        inference.run(model.graph)
    if inference.contradictions:
        forget_inferred(model)
    else:
        _write_down(inference)
    return _contradictory(reasons[0]) if reasons else None


def _contradictory(reason: str) -> str:
    return f"shapes of the model contradict each other: {reason}"


def _write_down(inference: Inference) -> None:
    for value, fact in inference.facts.items():
        if fact.tensor is None or value.producer() is not None:
            write_down(value, fact)


def contradiction(model: ir.Model) -> str | None:
    """Return how dtypes and shapes of values contradict what inference finds, or None; the model is left as it is."""
    inference = Inference(model.opset_imports, model.functions, as_stamped=True)
    inference.run(model.graph)
    reasons = [*inference.contradictions, *inference.clashes]
    return _contradictory(reasons[0]) if reasons else None


def impossible_graphs(model: ir.Model) -> set[ir.Graph]:
    """Return the nested graphs that no run enters, since a node in them cannot take what it reads.

    A runtime overlooks the fault for as long as it cannot infer the shapes that show it.
    """
    if not any(True for node in model.graph for _ in walk.subgraphs(node)):
        return set()
    inference = Inference(model.opset_imports, model.functions)
    inference.run(model.graph)
    return inference.impossible


def infer_node(node: ir.Node, model: ir.Model | None = None) -> None:
    """Infer the outputs of one node from what is known of its inputs: for a node that was just put in.

    Args:
        node: The node.
        model: The model it is in, for the operator sets it imports and its functions.
    """
    opsets = model.opset_imports if model is not None else {}
    inference = Inference(opsets, model.functions if model is not None else {})
    inference.visit(node)
    _write_down(inference)


def forget_inferred(model: ir.Model) -> None:
    """Take back what was inferred, so that a saved file holds no more than it came with."""
    for graph in walk.every_graph(model):
        for value in graph.inputs:
            forget(value)
        if isinstance(graph, ir.Graph):
            for value in graph.initializers.values():
                forget(value)
        for node in graph:
            for value in node.outputs:
                forget(value)


def declare_sizes(value: ir.Value, sizes: Mapping[int, int]) -> None:
    """Let some axes of a value that changed have other sizes, where its shape is declared; what was inferred goes.

    Args:
        value: The value.
        sizes: Axis, counted from the front, to its size now.
    """
    forget(value)
    if value.shape is not None:
        value.shape = ir.Shape([sizes.get(axis, dim) for axis, dim in enumerate(value.shape)])


def dims_of(value: ir.Value | None) -> Dims | None:
    """Return the dimensions of a value, each an `int` or a symbolic size, or None where its rank is not known.

    Equal sizes are equal numbers in every run. Of an output, this is what was inferred, not what is declared.
    """
    return fact_of(value).dims if value is not None else None


def same_shape(a: ir.Value | None, b: ir.Value | None) -> bool:
    """Return whether two values provably have equal shapes."""
    first = dims_of(a)
    return first is not None and first == dims_of(b)


def contents(value: ir.Value | None) -> Contents | None:
    """Return the elements of a small integer or bool tensor, each an `int` or a symbolic size, or None.

    Constants give theirs; those of more than 1,024 elements are not read.
    """
    return fact_of(value).contents if value is not None else None


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return a value's shape where every dimension is known, else None."""
    dims = dims_of(value)
    if dims is None or not all(isinstance(dim, int) for dim in dims):
        return None
    return dims  # type: ignore[return-value]


def static_bytes(value: ir.Value) -> int | None:
    """Return how many bytes a value takes where its dtype and every dimension are known, else None."""
    shape = static_shape(value)
    if shape is None or value.dtype is None or value.dtype == ir.DataType.STRING:
        return None
    return math.prod(shape) * value.dtype.bitwidth // 8
