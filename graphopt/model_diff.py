"""Two states of one model, side by side as text: which nodes and constants differ."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from graphopt import walk

# A constant of more elements than this is shown by its first ones; one of more bytes is compared by identity alone.
_SHOWN_ELEMENTS, COMPARED_BYTES = 4, 1 << 24
_LONGEST_ATTRIBUTE = 60


def changed_lines(before: ir.Model, after: ir.Model) -> tuple[list[str], list[str]]:
    """Return the nodes and constants that only the one state has, and those that only the other has, as text."""
    old, new = dict.fromkeys(node_lines(before)), dict.fromkeys(node_lines(after))
    removed, added = [line for line in old if line not in new], [line for line in new if line not in old]
    constants, others = _constants(before), _constants(after)
    for name in dict.fromkeys([*constants, *others]):
        a, b = constants.get(name), others.get(name)
        if a is None or b is None or not same_content(a, b):
            removed += [f"{name} = {show_tensor(a)}"] if a is not None else []
            added += [f"{name} = {show_tensor(b)}"] if b is not None else []
    return removed, added


def model_lines(model: ir.Model) -> Iterator[str]:
    """Yield a whole model as text: its inputs and outputs, nodes and constants, large ones by a checksum."""
    for kind, values in (("input", model.graph.inputs), ("output", model.graph.outputs)):
        for value in values:
            yield f"{kind} {value.name} {value.dtype} {value.shape}"
    yield from node_lines(model)
    for name, tensor in _constants(model).items():
        whole = tensor.size <= _SHOWN_ELEMENTS
        yield f"{name} = {show_tensor(tensor)}" + ("" if whole else f" crc32 {zlib.crc32(tensor.tobytes()):08x}")


def node_lines(model: ir.Model) -> Iterator[str]:
    """Yield each node of a model as a line of text, those of nested graphs and functions included."""
    for node in walk.every_node(model):
        inputs = ", ".join(value.name or "?" if value is not None else '""' for value in node.inputs)
        outputs = ", ".join(value.name or '""' for value in node.outputs)
        attributes = ", ".join(f"{name}={show_attribute(attr)}" for name, attr in sorted(node.attributes.items()))
        options = f" <{attributes}>" if attributes else ""
        operator = node.op_type if node.domain in walk.ONNX_DOMAINS else f"{node.domain}::{node.op_type}"
        yield f"[{node.name or ''}] {outputs} = {operator}{options} ({inputs})"


def show_attribute(attribute: ir.Attr) -> str:
    """Return what an attribute holds, a long one shortened, a graph not at all."""
    if attribute.is_ref():
        return f"@{attribute.ref_attr_name}"
    if attribute.type == ir.AttributeType.TENSOR:
        return show_tensor(attribute.as_tensor())
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return "{…}"
    text = str(attribute.value)
    return text if len(text) <= _LONGEST_ATTRIBUTE else text[:_LONGEST_ATTRIBUTE] + "…"


def show_tensor(tensor: ir.TensorProtocol) -> str:
    """Return a tensor's dtype, shape and first elements."""
    shape = ",".join(map(str, walk.dims(tensor)))
    if tensor.nbytes > COMPARED_BYTES:
        return f"{tensor.dtype}[{shape}]"
    flat = np.asarray(tensor.numpy()).reshape(-1)
    shown = ", ".join(str(item) for item in flat[:_SHOWN_ELEMENTS].tolist())
    return f"{tensor.dtype}[{shape}] {{{shown}{', …' if flat.size > _SHOWN_ELEMENTS else ''}}}"


def _constants(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    return {v.name or "": v.const_value for v in walk.initializers(model) if v.const_value is not None}


def same_content(a: ir.TensorProtocol, b: ir.TensorProtocol) -> bool:
    """Return whether two tensors hold the same; states of one run share what no edit has touched.

    Tensors of more than 16 MiB are compared by identity alone.
    """
    if a is b:
        return True
    if a.dtype != b.dtype or walk.dims(a) != walk.dims(b) or a.nbytes > COMPARED_BYTES:
        return False
    if a.dtype == ir.DataType.STRING:
        return bool(np.array_equal(a.numpy(), b.numpy()))
    return a.tobytes() == b.tobytes()
