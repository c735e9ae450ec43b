"""Smaller models cut out of a model: some of its nodes, what they lack given as inputs or as constants."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array
from graphopt.fragment import values_read
from graphopt.shapes import infer_shapes

# A value of integers of no more elements than this may be a shape, which passes and runtimes want to know.
SHAPE_ELEMENTS = 64

Typed = tuple[ir.TypeProtocol | None, ir.Shape | None]


@dataclass(frozen=True)
class Known:
    """What is known of the values of a model.

    Attributes:
        types: Dtype and shape of each, by name, as inference has them.
        arrays: What each held in a run, by name; of some only.
    """

    types: Mapping[str, Typed]
    arrays: Mapping[str, Array]


def types_of(model: ir.Model) -> dict[str, Typed]:
    """Return dtype and shape of every value of the main graph, by name; the model is left as it is."""
    inferred = model.clone()
    infer_shapes(inferred)
    values = [*inferred.graph.inputs, *(value for node in inferred.graph for value in node.outputs)]
    return {value.name: (value.type, value.shape) for value in values if value.name}


def with_initializers(model: ir.Model) -> ir.Model:
    """Return a clone in which constants of the main graph are initializers: they are no nodes to get rid of."""
    clone = model.clone()
    if (clone.ir_version or 0) < walk.FIRST_IR_WITH_PURE_INITIALIZERS:
        return clone
    for node in list(clone.graph):
        old = node.outputs[0] if node.outputs else None
        tensor = walk.constant_tensor(old)
        if old is None or tensor is None or old.is_graph_output():
            continue
        value = ir.Value(name=old.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(walk.dims(tensor)))
        value.const_value = tensor
        old.replace_all_uses_with(value)
        clone.graph.remove(node)
        clone.graph.register_initializer(value)
    return clone


def cut_out(model: ir.Model, kept: Collection[int], known: Known, *, fix_shapes: bool = False) -> ir.Model | None:
    """Return a model of some nodes of the main graph, or None where there can be none.

    What they read of others becomes an input of the same name. Outputs are those that the model has of them, and all
    that nothing reads any more.

    Args:
        model: The model, which is not changed.
        kept: Positions of the nodes.
        known: What is known of the values.
        fix_shapes: Whether values that may be shapes become constants instead of inputs.
    """
    clone = model.clone()
    nodes = list(clone.graph)
    own = {nodes[index]: None for index in kept}
    missing = _missing(own, known)
    if not own:
        return None
    ends = dict.fromkeys(clone.graph.outputs)
    clone.graph.outputs.clear()
    removed = [node for node in nodes if node not in own]
    were_read = {value for node in removed for value in values_read(node)}
    for node in removed:
        detach(node)
    for value in missing:
        _give(clone, value, known, fix_shapes=fix_shapes)
    clone.graph.remove(removed)
    clone.graph.outputs.extend(_outputs(clone, ends, were_read))
    for value in clone.graph.outputs:
        _declare(value, known)
    tidy(clone)
    return clone if clone.graph.outputs else None


def _declare(value: ir.Value, known: Known) -> None:
    """Say of an output what ONNX wants to be told of one: its dtype, and its rank at least."""
    if value.type is None:
        value.type, value.shape = known.types.get(value.name or "", (None, None))
    array = known.arrays.get(value.name or "")
    if value.shape is None and array is not None and isinstance(value.type, ir.TensorType):
        value.shape = ir.Shape([None] * array.ndim)


def _missing(own: dict[ir.Node, None], known: Known) -> list[ir.Value]:
    """Return what nodes read of others; what can be no input is kept instead, with what makes it."""
    missing: dict[ir.Value, None] = {}
    frontier = list(own)
    while frontier:
        for value in values_read(frontier.pop()):
            producer = value.producer()
            if producer is None or producer in own:
                continue
            if _can_be_input(value, known):
                missing[value] = None
            else:
                own[producer] = None
                frontier.append(producer)
    return [value for value in missing if value.producer() not in own]


def _can_be_input(value: ir.Value, known: Known) -> bool:
    if walk.constant_tensor(value) is not None:
        return False
    kind, _ = known.types.get(value.name or "", (None, None))
    return isinstance(kind, ir.TensorType)


def _give(model: ir.Model, old: ir.Value, known: Known, *, fix_shapes: bool) -> None:
    """Put an input, or a constant, in the place of a value."""
    name = old.name or ""
    kind, shape = known.types[name]
    array = known.arrays.get(name)
    if shape is None and array is not None:
        shape = ir.Shape(array.shape)
    fresh = ir.Value(name=name, type=kind, shape=shape)
    old.name = f"{name}_cut"
    old.replace_all_uses_with(fresh)
    if fix_shapes and array is not None and array.dtype.kind in "iub" and array.size <= SHAPE_ELEMENTS:
        fresh.const_value = ir.tensor(array, name=name)
        fresh.shape = ir.Shape(array.shape)
        model.graph.register_initializer(fresh)
    else:
        model.graph.inputs.append(fresh)


def _outputs(model: ir.Model, ends: Collection[ir.Value], were_read: Collection[ir.Value]) -> Iterator[ir.Value]:
    for node in model.graph:
        shown = [value for value in node.outputs if value in ends]
        if not shown and not any(value.uses() for value in node.outputs):
            named = [value for value in node.outputs if value.name]
            shown = [value for value in named if value in were_read] or named[:1]
        yield from shown


def detach(node: ir.Node) -> None:
    """Cut a node, and what is nested in it, off the values it reads."""
    for one in (node, *walk.nodes_within(node)):
        for index in range(len(one.inputs)):
            one.replace_input_with(index, None)


def tidy(model: ir.Model) -> None:
    """Remove inputs and initializers that nothing reads, and functions that nothing calls."""
    captured = {value for node in model.graph for value in values_read(node)}
    captured.update(model.graph.outputs)
    for name, value in list(model.graph.initializers.items()):
        if value not in captured and not value.is_graph_input():
            model.graph.initializers.pop(name)
    unread = [value for value in model.graph.inputs if value not in captured]
    for value in unread:
        model.graph.inputs.remove(value)
        model.graph.initializers.pop(value.name or "", None)
    for key in set(model.functions) - walk.called_functions(model):
        model.functions.pop(key)


def without_output(model: ir.Model, index: int) -> ir.Model | None:
    """Return a model that does not give one of its outputs, nor compute what only that needs."""
    clone = model.clone()
    if len(clone.graph.outputs) < 2:
        return None
    del clone.graph.outputs[index]
    while dead := [node for node in clone.graph if not walk.is_read(node)]:
        for node in dead:
            detach(node)
        clone.graph.remove(dead)
    tidy(clone)
    return clone


def bypassed(model: ir.Model, index: int, types: Mapping[str, Typed]) -> Iterator[ir.Model]:
    """Yield models in which what reads a node reads one of its inputs instead, where the two are alike."""
    node = list(model.graph)[index]
    if len(node.outputs) != 1 or node.outputs[0].is_graph_output():
        return
    wanted = types.get(node.outputs[0].name or "")
    for place, value in enumerate(node.inputs):
        if value is None or wanted is None or not _alike(types.get(value.name or ""), wanted):
            continue
        clone = model.clone()
        other = list(clone.graph)[index]
        source = other.inputs[place]
        assert source is not None, "as in the model it is a clone of"
        other.outputs[0].replace_all_uses_with(source)
        detach(other)
        clone.graph.remove(other)
        tidy(clone)
        yield clone


def _alike(a: Typed | None, b: Typed) -> bool:
    return a is not None and a[0] is not None and a[0] == b[0] and a[1] is not None and a[1] == b[1]


def entered(model: ir.Model, index: int) -> Iterator[ir.Model]:
    """Yield models in which one branch of an If is run whatever its condition says."""
    node = list(model.graph)[index]
    if not walk.is_onnx_op(node, "If"):
        return
    for name in ("then_branch", "else_branch"):
        clone = model.clone()
        choice = list(clone.graph)[index]
        branch = choice.attributes[name].as_graph()
        results = list(branch.outputs)
        if any(value.producer() is None or value.graph is not branch for value in results):
            continue
        branch.outputs.clear()
        constants, inner = list(branch.initializers.values()), list(branch)
        branch.initializers.clear()
        _rename([*constants, *(value for node in inner for value in node.outputs)], _names_outside(clone, choice))
        for value in constants:
            clone.graph.register_initializer(value)
        branch.remove(inner)
        clone.graph.insert_before(choice, inner)
        for old, new in zip(choice.outputs, results, strict=True):
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        detach(choice)
        clone.graph.remove(choice)
        tidy(clone)
        yield clone


def _names_outside(model: ir.Model, node: ir.Node) -> set[str | None]:
    """Return the names of values of a model, but for those nested in a node."""
    inside = {graph for inner in walk.subgraphs(node) for graph in walk.graphs_within(inner)}
    graphs = [walk.body(graph) for graph in walk.every_graph(model) if graph not in inside]
    found = {value.name for graph in graphs for value in (*graph.inputs, *graph.initializers.values())}
    return found | {value.name for graph in graphs for one in graph for value in one.outputs}


def _rename(values: Iterable[ir.Value], taken: set[str | None]) -> None:
    """Give values other names where theirs are taken: branches that exclude each other may share names."""
    for value in values:
        if value.name and value.name in taken:
            value.name = next(name for i in itertools.count(1) if (name := f"{value.name}_{i}") not in taken)
        taken.add(value.name)


def without_remarks(model: ir.Model) -> ir.Model:
    """Return a clone without the texts and metadata that exporters leave, which may be most of a small file."""
    clone = model.clone()
    clone.doc_string = None
    clone.metadata_props.clear()
    for graph in walk.every_graph(clone):
        graph.doc_string = None
        graph.metadata_props.clear()
        outputs = [value for node in graph for value in node.outputs]
        for one in (*graph, *graph.inputs, *walk.body(graph).initializers.values(), *outputs):
            one.doc_string = None
            one.metadata_props.clear()
    return clone


def small_integers(array: Array) -> bool:
    """Return whether an array may be the content of a shape."""
    return bool(array.dtype.kind in "iu" and array.ndim == 1 and np.size(array) <= SHAPE_ELEMENTS)
