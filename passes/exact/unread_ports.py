"""Outputs that nobody reads of nodes that stay, and what an If, a Loop or a Scan does for these alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, MutableSequence, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from graphopt import provenance, walk
from graphopt.authoring import Context

# Outputs that may be left out, where that changes no other output. Not so those of BatchNormalization, whose number
# says in old opsets whether it trains, of Attention, where keys and values come and go together, and of MaxPool: ONNX
# Runtime has another kernel for it without indices, which takes NaN and zeros of either sign in another order.
_OPTIONAL_OUTPUTS = {
    ("", "Dropout"): (1,),
    ("", "GRU"): (0, 1),
    ("", "LSTM"): (0, 1, 2),
    ("", "LayerNormalization"): (1, 2),
    ("", "RNN"): (0, 1),
    ("", "SoftmaxCrossEntropyLoss"): (1,),
    ("", "Unique"): (1, 2, 3),
    ("com.microsoft", "SkipLayerNormalization"): (1, 2, 3),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): (1, 2, 3),
}
# Before opset 11 a Loop had to carry something.
_FIRST_OPSET_WITH_STATELESS_LOOP = 11
# Before opset 9 a Scan had a batch axis, and an input for the lengths of its sequences.
_FIRST_OPSET_WITH_PLAIN_SCAN = 9
_LOOP_INPUTS_BEFORE_STATE = 2

Sweep = Callable[[ir.Graph], None]


def leave_out_unread(node: ir.Node, ctx: Context) -> None:
    """Leave out the optional outputs of a node that nothing reads."""
    domain = "" if node.domain in walk.ONNX_DOMAINS else node.domain
    indices = _OPTIONAL_OUTPUTS.get((domain, node.op_type), ())
    unread = [v for index, v in enumerate(node.outputs) if index in indices and v.name and not _is_read(v)]
    if not unread or node.op_identifier() in ctx.model.functions:
        return
    with ctx.rewriter.edit("optional-output", node):
        for value in unread:
            ctx.rewriter.leave_out(value)


def narrow(node: ir.Node, ctx: Context, opset: int, sweep: Sweep) -> ir.Node:
    """Take from an If, a Loop or a Scan what is of no use, and return the node that now stands for it.

    Args:
        node: Any node.
        ctx: The context.
        opset: The version of the ONNX operators where the node stands.
        sweep: Removes what is dead from a nested graph.
    """
    if walk.is_onnx_op(node, "If"):
        return _narrow_if(node, ctx)
    frame = _loop_frame(node, opset) if walk.is_onnx_op(node, "Loop") else None
    if walk.is_onnx_op(node, "Scan") and opset >= _FIRST_OPSET_WITH_PLAIN_SCAN:
        frame = _scan_frame(node)
    return _narrow_iteration(node, frame, ctx, sweep) if frame is not None else node


def _narrow_if(node: ir.Node, ctx: Context) -> ir.Node:
    kept = [index for index, value in enumerate(node.outputs) if _is_read(value)]
    branches = list(walk.subgraphs(node))
    fits = all(len(branch.outputs) == len(node.outputs) for branch in branches)
    if len(kept) == len(node.outputs) or not fits:
        return node
    with ctx.rewriter.edit("if-output", node):
        for branch in branches:
            _drop(branch.outputs, set(range(len(node.outputs))).difference(kept))
        return _rebuilt(node, node.inputs, kept, ctx)


@dataclass(frozen=True)
class _Frame:
    """Where the carried values and collected outputs of a Loop or Scan are.

    Attributes:
        body: The body.
        states: How many values are carried from one iteration to the next.
        node_lead: Inputs of the node before the carried values.
        body_lead: Inputs of the body before the carried values.
        out_lead: Outputs of the body before the carried values; the node has none there.
        elements: How many inputs are taken apart, one element for each iteration.
        carries_one: Whether it has to carry something, read or not.
    """

    body: ir.Graph
    states: int
    node_lead: int = 0
    body_lead: int = 0
    out_lead: int = 0
    elements: int = 0
    carries_one: bool = False

    def fits(self, node: ir.Node) -> bool:
        """Return whether node and body agree on the numbers."""
        return (
            0 <= self.states <= len(node.outputs)
            and len(self.body.inputs) == self.body_lead + self.states + self.elements
            and len(self.body.outputs) == self.out_lead + len(node.outputs)
            and None not in node.inputs[self.node_lead :]
        )


def _loop_frame(node: ir.Node, opset: int) -> _Frame | None:
    body = node.attributes["body"]
    if body.is_ref():
        return None
    states = max(len(node.inputs) - _LOOP_INPUTS_BEFORE_STATE, 0)
    frame = _Frame(body.as_graph(), states, _LOOP_INPUTS_BEFORE_STATE, _LOOP_INPUTS_BEFORE_STATE, 1)
    frame = replace(frame, carries_one=states > 0 and opset < _FIRST_OPSET_WITH_STATELESS_LOOP)
    return frame if frame.fits(node) else None


def _scan_frame(node: ir.Node) -> _Frame | None:
    if walk.has_references(node):
        return None
    elements = node.attributes["num_scan_inputs"].as_int()
    frame = _Frame(node.attributes["body"].as_graph(), len(node.inputs) - elements, elements=elements)
    return frame if frame.fits(node) else None


def _narrow_iteration(node: ir.Node, frame: _Frame, ctx: Context, sweep: Sweep) -> ir.Node:
    """Drop collected outputs nobody reads, values carried only for their own sake, and elements nobody looks at."""
    body = frame.body
    live = _live_states(node, frame)
    kept = [i for i, value in enumerate(node.outputs) if (i in live if i < frame.states else _is_read(value))]
    first_element = frame.body_lead + frame.states
    unseen = [i for i in range(first_element, len(body.inputs)) if not _is_read(body.inputs[i])]
    if len(kept) == len(node.outputs) and (not unseen or len(unseen) == frame.elements == 1):
        return node
    with ctx.rewriter.edit("loop-value", node):
        gone = set(range(len(node.outputs))).difference(kept)
        _drop(body.outputs, {frame.out_lead + index for index in gone})
        sweep(body)
        unseen = [i for i in range(first_element, len(body.inputs)) if not _is_read(body.inputs[i])]
        if len(unseen) == frame.elements:
            unseen = unseen[1:]  # one must say how often to go round
        dead = {frame.body_lead + index for index in range(frame.states) if index not in live} | set(unseen)
        _drop(body.inputs, dead)
        shift = frame.node_lead - frame.body_lead
        inputs = [value for index, value in enumerate(node.inputs) if index - shift not in dead]
        if frame.elements:
            _shorten_lists(node, {i - first_element for i in unseen}, {i - frame.states for i in gone})
        return _rebuilt(node, inputs, kept, ctx)


def _live_states(node: ir.Node, frame: _Frame) -> set[int]:
    """Return which carried values reach, by way of any iteration, something that is read or ends the Loop."""
    body = frame.body
    state_of = {body.inputs[frame.body_lead + index]: index for index in range(frame.states)}
    live = {index for index in range(frame.states) if _is_read(node.outputs[index])}
    if frame.carries_one:
        live.add(0)
    wanted = [*body.outputs[: frame.out_lead], *(body.outputs[frame.out_lead + index] for index in live)]
    collected = range(frame.states, len(node.outputs))
    wanted.extend(body.outputs[frame.out_lead + index] for index in collected if _is_read(node.outputs[index]))
    seen: set[ir.Node] = set()
    while wanted:
        value = wanted.pop()
        state = state_of.get(value)
        if state is not None and state not in live:
            live.add(state)
            wanted.append(body.outputs[frame.out_lead + state])
        producer = value.producer()
        if producer is not None and producer.graph is body and producer not in seen:
            seen.add(producer)
            wanted.extend(walk.values_read(producer))
    return live


def _shorten_lists(node: ir.Node, inputs: Collection[int], outputs: Collection[int]) -> None:
    """Take from the attributes of a Scan what they say of inputs and outputs that are gone."""
    count = node.attributes["num_scan_inputs"].as_int()
    node.attributes.add(ir.AttrInt64("num_scan_inputs", count - len(inputs)))
    for side, gone in (("input", inputs), ("output", outputs)):
        for name in (f"scan_{side}_axes", f"scan_{side}_directions"):
            attribute = node.attributes.pop(name, None)
            rest = [n for i, n in enumerate(attribute.as_ints()) if i not in gone] if attribute is not None else []
            if rest:
                node.attributes.add(ir.AttrInt64s(name, rest))


def _rebuilt(node: ir.Node, inputs: Iterable[ir.Value | None], kept: Sequence[int], ctx: Context) -> ir.Node:
    """Put a node with the same attributes, but other inputs and fewer outputs, in the place of one."""
    new = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        tuple(node.attributes.values()),
        num_outputs=len(kept),
        name=node.name,
        doc_string=node.doc_string,
        metadata_props=dict(node.metadata_props),
    )
    provenance.record(new, [node])
    # The nested graphs are the new node's now; erasing the old one must not empty them.
    node.attributes.clear()
    for value in new.outputs:
        value.name = ""
    ctx.rewriter.insert(new, before=node)
    names = [node.outputs[index].name for index in kept]
    for index, value, name in zip(kept, new.outputs, names, strict=True):
        value.metadata_props.update(node.outputs[index].metadata_props)
        ctx.rewriter.replace(node.outputs[index], value)
        value.name = name
    ctx.rewriter.erase(node)
    return new


def _drop(ports: MutableSequence[ir.Value], indices: Collection[int]) -> None:
    for index in sorted(indices, reverse=True):
        ports.pop(index)


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()
