"""Names a module's author knows, on what torch's exporter made: paths of modules on nodes, values and weights."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from graphopt import walk
from graphopt.derived import transposed

# What the exporter notes on a node: the path of each module around it, outermost first, and the node of torch.fx last.
_SCOPES = "pkg.torch.onnx.name_scopes"
# What torch.export calls the place of nodes that no module asked for, such as sizes of inputs.
_NO_MODULE = "_empty_nn_module_stack"
# What a module is there for, where its other nodes only prepare or finish.
_MAIN_OPERATORS = frozenset(
    {
        "BatchNormalization",
        "Conv",
        "ConvTranspose",
        "DeformConv",
        "GRU",
        "Gather",
        "Gemm",
        "GroupNormalization",
        "InstanceNormalization",
        "LSTM",
        "LayerNormalization",
        "MatMul",
        "PRelu",
        "RMSNormalization",
        "RNN",
    }
)
_CONVOLUTIONS, _BIAS = ("Conv", "ConvTranspose"), 2
_HANDS_ON = ("Cast", "Identity", "Reshape", "Transpose")


def name_by_modules(model: ir.Model) -> None:
    """Name nodes, and the values between them, by the modules they come from, and drop the exporter's other notes.

    The one node of a module that computes with a parameter has the module's path for a name, `layers.3.mlp.up_proj`;
    any other has its operator behind it, `layers.3.mlp/Mul`, with a number where that is not the first. A value is
    called as the node that makes it. Inputs, outputs and initializers keep their names.
    """
    nodes = list(walk.every_node(model))
    paths = {node: _module_path(node) for node in nodes}
    mains = Counter(paths[node] for node in nodes if paths[node] and _computes_with_weight(node))
    called = _biases(nodes, paths, mains)
    kept = {value for graph in walk.every_graph(model) for value in (*graph.inputs, *graph.outputs)}
    taken = {value.name for value in kept} | {
        name for graph in walk.every_graph(model) if isinstance(graph, ir.Graph) for name in graph.initializers
    }
    for node in nodes:
        path = paths[node]
        is_main = mains[path] == 1 and _computes_with_weight(node)
        node.name = _fresh(path if is_main else f"{path}/{node.op_type}", taken)
        taken.add(node.name)
        for index, value in enumerate(node.outputs):
            if value not in kept:
                name = called.get(value) or (node.name if index == 0 else f"{node.name}:{index}")
                value.name = _fresh(name, taken - {node.name})
                taken.add(value.name)
        for note in set(node.metadata_props) - {_SCOPES}:
            del node.metadata_props[note]
    for graph in walk.every_graph(model):
        graph.metadata_props.clear()
    model.metadata_props.clear()


def _biases(nodes: Sequence[ir.Node], paths: Mapping[ir.Node, str], mains: Mapping[str, int]) -> dict[ir.Value, str]:
    """Return names for biases that modules do not have and the exporter computes: they become weights once folded."""
    lone = [node for node in nodes if mains[paths[node]] == 1 and _computes_with_weight(node)]
    convolutions = [node for node in lone if node.op_type in _CONVOLUTIONS and len(node.inputs) > _BIAS]
    computed = {node: node.inputs[_BIAS] for node in convolutions}
    return {value: f"{paths[node]}.bias" for node, value in computed.items() if value is not None and value.producer()}


def name_axes(model: ir.Model, names: Mapping[str, str]) -> None:
    """Give free dimensions other names, also within the sizes that are computed of them, such as `s31 + 1`."""
    if not names:
        return
    old = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
    values = {value for graph in walk.every_graph(model) for value in (*graph.inputs, *graph.outputs)}
    values |= {value for node in walk.every_node(model) for value in node.outputs}
    for value in values:
        if value.shape is not None and any(isinstance(dim, ir.SymbolicDim) for dim in value.shape):
            value.shape = ir.Shape([dim if isinstance(dim, int) else _named(dim, old, names) for dim in value.shape])


def _named(dim: ir.SymbolicDim, old: re.Pattern[str], names: Mapping[str, str]) -> str | None:
    return None if dim.value is None else old.sub(lambda found: names[found[1]], dim.value)


def name_outputs(model: ir.Model, names: Sequence[str]) -> None:
    """Name the outputs in order, and let each be a value of its own; without a name, they keep the exporter's.

    What a module returns twice, or hands through under another name, comes from an Identity: to the exporter it is one
    value, of which the last name is left. An output is not named as an input or a weight that it is not.
    """
    outputs = model.graph.outputs
    stored = {value.name: value for value in (*model.graph.inputs, *model.graph.initializers.values())}
    taken: set[str | None] = {*names, *stored}
    seen: set[ir.Value] = set()
    for index, (value, wanted) in enumerate(zip(list(outputs), names, strict=True)):
        is_taken = wanted in stored and stored[wanted] is not value
        name = "" if is_taken else wanted
        if value not in seen and value in stored.values() and name in ("", value.name):
            seen.add(value)
            continue
        name = name or _fresh(value.name or "", taken)
        if value in seen or value in stored.values():
            outputs[index] = _identity(model.graph, value)
        outputs[index].name = name
        seen.add(value)
        taken.add(name)


def _identity(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """Return a value of its own that is equal to another."""
    node = ir.Node("", "Identity", [value], num_outputs=1)
    graph.append(node)
    node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
    return node.outputs[0]


def output_keys(program: Any, count: int) -> list[str]:
    """Return a name for each tensor that an exported program gives: its key in a dict, `logits`, or `past.0` within.

    Nothing stands for an output without a key, and for one whose key another has.
    """
    from torch.utils import _pytree

    spec = program.call_spec.out_spec
    given = program.graph_signature.user_outputs
    if spec is None or spec.num_leaves != len(given):
        return [""] * count
    try:
        found, _ = _pytree.tree_flatten_with_path(_pytree.tree_unflatten(list(given), spec))
    except ValueError:  # a class whose parts have no names
        return [""] * count
    names = [_joined(path) for path, output in found if output is not None]
    return [name if names.count(name) == 1 else "" for name in names] if len(names) == count else [""] * count


def _joined(path: Sequence[Any]) -> str:
    """Return the keys, attributes and places on the way to a tensor, joined by dots; nothing where a place is first."""
    parts = [getattr(key, "key", getattr(key, "name", None)) for key in path]
    if not parts or parts[0] is None:
        return ""
    return ".".join(str(key.idx if part is None else part) for key, part in zip(path, parts, strict=True))


def store_as_read(model: ir.Model) -> None:
    """Let weights that are only ever read transposed be initializers of that layout, under the names they have.

    The exporter writes a Linear of torch, [out, in], as a Transpose and a MatMul, which reads [in, out]; were the
    Transpose folded, the result would bear the exporter's name for it. Nothing is copied: the transposed tensor is a
    view of the parameter.
    """
    graph = model.graph
    for weight in list(graph.initializers.values()):
        uses = list(weight.uses())
        if len(uses) != 1 or weight.is_graph_output() or weight.const_value is None:
            continue
        node = uses[0].node
        if not walk.is_onnx_op(node, "Transpose") or node.graph is not graph or node.outputs[0].is_graph_output():
            continue
        axes = node.attributes.get_ints("perm", tuple(reversed(range(len(walk.dims(weight.const_value))))))
        view = transposed(weight.const_value, axes)
        view.name = weight.name
        node.outputs[0].replace_all_uses_with(weight)
        graph.remove(node, safe=True)
        weight.const_value, weight.shape = view, ir.Shape(view.shape)


def _module_path(node: ir.Node) -> str:
    """Return the path of the innermost module a node is of; nothing for the outermost, and for unknown ones."""
    noted = node.metadata_props.get(_SCOPES)
    scopes = ast.literal_eval(noted) if noted else []
    return next((str(scope) for scope in reversed(scopes[:-1]) if scope and not scope.startswith(_NO_MODULE)), "")


def _computes_with_weight(node: ir.Node) -> bool:
    return node.op_type in _MAIN_OPERATORS and any(_is_stored(value) for value in node.inputs)


def _is_stored(value: ir.Value | None) -> bool:
    """Return whether a value is a parameter, or one that is only handed on."""
    while value is not None and not value.is_initializer():
        producer = value.producer()
        if producer is None or not walk.is_onnx_op(producer, *_HANDS_ON):
            return False
        value = producer.inputs[0]
    return value is not None and value.dtype is not None and value.dtype.is_floating_point()


def _fresh(name: str, taken: set[str | None]) -> str:
    """Return the name, or the first of it with a number behind it that nothing has yet."""
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    return found
