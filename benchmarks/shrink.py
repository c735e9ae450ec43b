"""Smaller models that still show what a larger one showed: one output, fewer nodes, plain names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import onnx

SIMPLEST_OPSET, SIMPLEST_IR_VERSION = 18, 10


def smaller_model(proto: onnx.ModelProto, fails: Callable[[onnx.ModelProto], bool]) -> onnx.ModelProto:
    """Return a model that fails as well and that no single cut makes smaller."""
    smaller = True
    while smaller:
        smaller = False
        for candidate in cuts(proto):
            if fails(candidate):
                proto, smaller = candidate, True
                break
    renamed = with_plain_names(proto)
    return renamed if fails(renamed) else proto


def smaller_recipe(recipe: Any, fails: Callable[[Any], bool]) -> Any:
    """Return a `Recipe` of fewer steps: drops halves before single ones, while what is left fails."""
    size = max(1, len(recipe.steps) // 2)
    while True:
        for at in range(0, len(recipe.steps), size):
            fewer = replace(recipe, steps=recipe.steps[:at] + recipe.steps[at + size :])
            if fewer.steps and fails(fewer):
                recipe = fewer
                break
        else:
            if size == 1:
                break
            size = max(1, size // 2)
    for change in ({"annotated": False}, {"ir_version": SIMPLEST_IR_VERSION}, {"opset": SIMPLEST_OPSET}):
        simpler = replace(recipe, **change)
        recipe = simpler if simpler != recipe and fails(simpler) else recipe
    return recipe


def cuts(proto: onnx.ModelProto) -> Iterator[onnx.ModelProto]:
    """Yield smaller graphs: with one output, or with a node's results fed instead of computed, the last nodes first."""
    count = len(proto.graph.output)
    if count > 1:
        for one in proto.graph.output:
            yield without_dead_code(proto, outputs=[one])
    inferred = onnx.shape_inference.infer_shapes(proto)
    types = {info.name: info for info in (*inferred.graph.value_info, *inferred.graph.output)}
    for at in reversed(range(len(proto.graph.node))):
        node = proto.graph.node[at]
        wanted = [name for name in node.output if name]
        if any(name not in types for name in wanted):
            continue
        cut = onnx.ModelProto()
        cut.CopyFrom(proto)
        del cut.graph.node[at]
        cut.graph.input.extend(types[name] for name in wanted)
        yield without_dead_code(cut)


def without_dead_code(proto: onnx.ModelProto, outputs: Sequence[onnx.ValueInfoProto] | None = None) -> onnx.ModelProto:
    """Return a copy without the nodes, inputs and initializers that the outputs do not need."""
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    graph = model.graph
    made = {name for node in graph.node for name in node.output}
    kept = [info for info in outputs or graph.output if info.name in made] or list(outputs or graph.output)[:1]
    needed = {info.name for info in kept}
    nodes: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            nodes.insert(0, node)
            needed |= names_used(node)
    for field, values in (
        (graph.output, kept),
        (graph.node, nodes),
        (graph.input, [info for info in graph.input if info.name in needed]),
        (graph.initializer, [tensor for tensor in graph.initializer if tensor.name in needed]),
    ):
        copies = [type(value).FromString(value.SerializeToString()) for value in values]
        del field[:]
        field.extend(copies)
    called = {node.op_type for node in onnx_nodes(graph)} | {
        node.op_type for function in model.functions for node in function.node
    }
    functions = [function for function in model.functions if function.name in called]
    copies = [onnx.FunctionProto.FromString(function.SerializeToString()) for function in functions]
    del model.functions[:]
    model.functions.extend(copies)
    return model


def onnx_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph and of its subgraphs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from onnx_nodes(attribute.g)


def names_used(node: onnx.NodeProto) -> set[str]:
    """Return the values a node reads, those its subgraphs capture included."""
    used = set(node.input)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            used |= {info.name for info in attribute.g.output}
            used |= set().union(*(names_used(inner) for inner in attribute.g.node))
    return used


def with_plain_names(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose values are named so that ONNX text can be parsed again, and without what it need not say."""
    names: dict[str, str] = {}

    def plain(name: str) -> str:
        return name and names.setdefault(name, f"v{len(names)}")

    def rename(graph: onnx.GraphProto) -> None:
        for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
            value.name = plain(value.name)
        for node in graph.node:
            node.name = ""
            node.input[:] = [plain(name) for name in node.input]
            node.output[:] = [plain(name) for name in node.output]
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    rename(attribute.g)

    model = onnx.ModelProto()
    model.CopyFrom(proto)
    rename(model.graph)
    for entry in model.metadata_props:
        if entry.key == "overridable_inputs":
            entry.value = json.dumps([names[name] for name in json.loads(entry.value) if name in names])
    return model
