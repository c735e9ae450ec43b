"""Pieces of a lowered model: modules of their own that share its weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor, fx

# Sizes that a value holds: numbers, or (input of the model, axis of it).
Sizes: TypeAlias = Sequence[int | tuple[str, int]]


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a lowered model.

    Attributes:
        module: Takes what `inputs` names by position, and returns a tuple of what `outputs` names.
        inputs: Names of values: inputs of the model, and where the piece begins.
        outputs: Names of values: where it ends.
    """

    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def piece_of(
    whole: fx.GraphModule,
    start: str | None,
    ends: Sequence[str],
    other: Collection[str] = (),
    sizes: Mapping[str, Sizes] | None = None,
) -> Piece | None:
    """Return the part of a lowered model between one value and others.

    What else it needs is computed anew from the inputs of the model, which a value that hangs on the start may hang on
    besides.

    Args:
        whole: A module as backend ``torch`` lowers to; not changed, and its parameters are shared.
        start: Name of the value it begins at; None for the inputs alone.
        ends: Names of the values it computes.
        other: Names of values it must not need, such as where earlier pieces begin.
        sizes: Names of values that hold nothing but sizes, which are read off the inputs.

    Returns:
        The piece; None where an end needs one of the other values.
    """
    lowered = whole.meta["graphopt"]
    begin = lowered.values[start] if start is not None else None
    placeholders = [node for node in whole.graph.nodes if node.op == "placeholder"]
    given = dict(zip(lowered.inputs, placeholders, strict=True))
    known = {lowered.values[name]: what for name, what in (sizes or {}).items()}
    reads = {node: [given[one[0]] for one in what if isinstance(one, tuple)] for node, what in known.items()}
    if begin is not None:
        reads[begin] = []
    needed = _needed([lowered.values[name] for name in ends], reads)
    if any(lowered.values[name] in needed for name in other if name != start):
        return None
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs: list[str] = []
    names = {node: name for name, node in given.items()}
    for node in whole.graph.nodes:
        if node not in needed:
            continue
        if node is begin or node in names:
            copies[node] = graph.placeholder(f"input_{len(inputs)}")
            inputs.append(start if node is begin and start is not None else names[node])
        elif node in known:
            entries = tuple((copies[given[one[0]]], one[1]) if isinstance(one, tuple) else one for one in known[node])
            copies[node] = graph.call_function(sizes_of, (entries,))
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[lowered.values[name]] for name in ends))
    module = fx.GraphModule(whole, graph, class_name="Piece")
    stored = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    module.meta["graphopt"] = replace(
        lowered,
        inputs=tuple(inputs),
        outputs=tuple(ends),
        observed=(),
        parameters={name: path for name, path in lowered.parameters.items() if path in stored},
        buffers={name: path for name, path in lowered.buffers.items() if path in stored},
        values={},
    )
    return Piece(module, tuple(inputs), tuple(ends))


def sizes_of(entries: Sequence[int | tuple[Tensor, int]]) -> Tensor:
    """Return sizes, int64 on the CPU: numbers as they are, and the lengths of axes of tensors."""
    return torch.tensor([one if isinstance(one, int) else one[0].shape[one[1]] for one in entries], dtype=torch.int64)


def _needed(ends: Sequence[fx.Node], reads: Mapping[fx.Node, Sequence[fx.Node]]) -> set[fx.Node]:
    """Return the nodes that some are computed by; of some it is said what else they read."""
    found: set[fx.Node] = set()
    stack = list(ends)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(reads.get(node, node.all_input_nodes))
    return found
