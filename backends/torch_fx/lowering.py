"""From a model to a module of torch.fx, node by node."""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphopt import walk
from graphopt.constant_names import constant_names
from graphopt.errors import BackendError, did_you_mean
from graphopt.inference import Inference
from graphopt.provenance import origins

from . import catalog
from .lowered_module import LOWERED, LoweredModule
from .operators import Operator
from .ops_control import SCANNED, Row
from .parameters import Lowered, Store
from .placement import place
from .support import refuse_unsupported
from .tensors import torch_dtype

Attributes = Mapping[str, ir.Attr]
# Names the code that torch.fx writes reads itself: an argument of the name would hide it.
_RESERVED = frozenset({"self", "torch", "device", "inf", "nan"})


def lower(
    model: ir.Model, *, observe: Sequence[str] = (), differentiable: bool = False, shared: bool = True
) -> fx.GraphModule:
    """Return a module that computes what a model computes.

    Each node becomes one call of the function of its operator (`Operator`), so whoever looks at the graph sees the
    model. Weights stay where they lie: those of a mapped file in their file, of which a page is copied once something
    writes to it; others in memory that the model shares, so whoever trains them replaces their data by a copy first.

    Args:
        model: The model.
        observe: Names of values of the main graph to return behind the outputs.
        differentiable: Whether QuantizeLinear gives codes as floats, with a straight-through gradient.
        shared: Whether weights in memory are the model's, or copies of them.

    Returns:
        The module: takes the inputs of `graphopt.data.input_specs` by position and returns a tuple. Its
        ``meta["graphopt"]`` is a `Lowered`; its nodes have ``meta["onnx"]``, the name of the node, and
        ``meta["origins"]``.

    Raises:
        BackendError: An operator that torch cannot compute, or a value to observe that is none.
    """
    return _Lowering(model, differentiable, shared).run(observe)


@dataclass
class _Scope:
    """A graph of torch.fx while it is built: what it captures of the one around it, and what it reads of the store."""

    graph: fx.Graph
    parent: _Scope | None = None
    captured: dict[fx.Node, fx.Node] = field(default_factory=dict)
    stored: dict[str, fx.Node] = field(default_factory=dict)
    arguments: set[str] = field(default_factory=set)
    last_placeholder: fx.Node | None = None

    def capture(self, outer: fx.Node) -> fx.Node:
        """Return what stands here for a node of the graph around."""
        if outer not in self.captured:
            with self.graph.inserting_after(self.last_placeholder):
                self.captured[outer] = self.placeholder(outer.name)
            if "path" in outer.meta:
                self.captured[outer].meta["path"] = outer.meta["path"]
        return self.captured[outer]

    def placeholder(self, name: str) -> fx.Node:
        """Add an argument of a name that is Python's and no other argument's."""
        name = _identifier(name)
        while name in self.arguments or name in _RESERVED:
            name += "_"
        self.arguments.add(name)
        self.last_placeholder = self.graph.placeholder(name)
        return self.last_placeholder

    def read_stored(self, path: str) -> fx.Node:
        """Return the node that reads something stored; it is always the outermost graph that does."""
        if path not in self.stored:
            made = self.graph.get_attr(path) if self.parent is None else self.capture(self.parent.read_stored(path))
            made.meta["path"] = path
            self.stored[path] = made
        return self.stored[path]


@dataclass
class _Frame:
    """A graph of the model, or a call of a function, while it is lowered.

    Attributes:
        scope: The graph of torch.fx it goes to.
        outer: The frame around a nested graph.
        opsets: Versions of the operator sets.
        attributes: What the caller of a function gives.
        prefix: What sets names inside a call apart.
        calls: The calls of functions it stands in, outermost first; their names need not differ.
        caller: The frame of the last of them.
        nodes: Value to the node that computes it.
        inference: What is known of its values, once asked for.
    """

    scope: _Scope
    outer: _Frame | None
    opsets: Mapping[str, int]
    attributes: Attributes
    prefix: str = ""
    calls: tuple[ir.Node, ...] = ()
    caller: _Frame | None = None
    nodes: dict[ir.Value, Any] = field(default_factory=dict)
    inference: Inference | None = None


class _Lowering:
    def __init__(self, model: ir.Model, differentiable: bool, shared: bool) -> None:
        self._model = model
        self._differentiable = differentiable
        self._names = constant_names(model)
        self._store = Store(shared=shared)
        self._paths: dict[Any, str] = {}
        self._anchor = self._store.put_buffer("graphopt_place", torch.zeros(1))

    def run(self, observe: Sequence[str]) -> fx.GraphModule:
        model, store = self._model, self._store
        refuse_unsupported(model)
        frame = _Frame(_Scope(fx.Graph()), None, model.opset_imports, {})
        inputs = [value for value in model.graph.inputs if not value.is_initializer()]
        for value in inputs:
            frame.nodes[value] = frame.scope.placeholder(value.name or "")
            frame.nodes[value].meta["numbers"] = _holds_numbers(value)
        anchor = frame.scope.read_stored(self._anchor)
        self._lower_nodes(frame, model.graph)
        wanted = [*model.graph.outputs, *self._observed(frame, observe)]
        graph = frame.scope.graph
        graph.output(tuple(self._read(frame, value) for value in wanted))
        place(graph, anchor, self._constants(graph), store.root.get_submodule)
        module = LoweredModule(store.root, graph, class_name="Lowered")
        module.meta[LOWERED] = self._lowered(frame, inputs, observe)
        return module

    def _observed(self, frame: _Frame, observe: Sequence[str]) -> list[ir.Value]:
        known = {value.name or "": value for value in [*frame.nodes, *self._model.graph.initializers.values()]}
        for name in observe:
            if name not in known:
                raise BackendError(f"the model has no value `{name}` to observe", hint=did_you_mean(name, known))
        return [known[name] for name in observe]

    def _constants(self, graph: fx.Graph) -> dict[fx.Node, torch.Tensor]:
        """Return what is stored of the model and read in its main graph."""
        held = {node: self._store.get(str(node.target)) for node in graph.nodes if node.op == "get_attr"}
        return {n: one for n, one in held.items() if isinstance(one, torch.Tensor) and n.target != self._anchor}

    def _lowered(self, frame: _Frame, inputs: Sequence[ir.Value], observe: Sequence[str]) -> Lowered:
        nodes = set(frame.scope.graph.nodes)
        read = {str(node.target) for node in nodes if node.op == "get_attr"}
        return Lowered(
            inputs=tuple(value.name or "" for value in inputs),
            outputs=tuple(value.name or "" for value in self._model.graph.outputs),
            observed=tuple(observe),
            parameters={name: path for name, path in self._store.parameters.items() if path in read},
            buffers={name: path for name, path in self._store.buffers.items() if path in read},
            values={value.name or "": node for value, node in frame.nodes.items() if node in nodes},
        )

    def _lower_nodes(self, frame: _Frame, graph: ir.Graph | ir.Function) -> None:
        for node in graph:
            if walk.is_onnx_op(node, "Constant"):
                self._lower_constant(frame, node)
            elif node.op_identifier() in self._model.functions:
                self._lower_call(frame, node, self._model.functions[node.op_identifier()])
            else:
                self._lower_operator(frame, node)

    def _lower_constant(self, frame: _Frame, node: ir.Node) -> None:
        value = node.outputs[0]
        kind, attribute = self._resolved(frame, node).popitem()
        # What a function's caller gives goes by the caller's name for it, and is stored for each call.
        tensor = walk.constant_of(ir.Attr(kind, attribute.type, attribute.value))
        assert tensor is not None, "dense"
        if walk.has_references(node):
            path = self._stored((frame.calls, node), f"{frame.prefix}{value.name}", tensor)
        else:
            path = self._stored(value, self._names[value], tensor)
        frame.nodes[value] = frame.scope.read_stored(path)

    def _stored(self, key: Any, name: str, tensor: ir.TensorProtocol) -> str:
        if key not in self._paths:
            self._paths[key] = self._store.put(name, tensor, is_constant=isinstance(key, ir.Value))
        return self._paths[key]

    def _lower_call(self, frame: _Frame, node: ir.Node, function: ir.Function) -> None:
        """Lower the body of a function in place of a call of it."""
        defaults = {name: attribute for name, attribute in function.attributes.items() if attribute.value is not None}
        prefix = f"{frame.prefix}{walk.label(node)}/"
        given = defaults | self._resolved(frame, node)
        inner = _Frame(frame.scope, None, function.opset_imports, given, prefix, (*frame.calls, node), frame)
        arguments = [self._read(frame, value) for value in node.inputs]
        inner.nodes.update(zip(function.inputs, arguments, strict=False))
        inner.nodes.update(dict.fromkeys(function.inputs[len(arguments) :]))
        self._lower_nodes(inner, function)
        for value, returned in zip(node.outputs, function.outputs, strict=False):
            frame.nodes[value] = self._read(inner, returned)

    def _lower_operator(self, frame: _Frame, node: ir.Node) -> None:
        version = walk.imported(frame.opsets, node.domain)
        found = catalog.find(node.domain, node.op_type, version, differentiable=self._differentiable)
        assert found is not None, "refused before"
        arguments = _without_trailing([self._read(frame, value) for value in node.inputs])
        wanted = _wanted_outputs(node)
        keywords = {name: self._attribute(frame, node, one) for name, one in self._resolved(frame, node).items()}
        keywords |= self._told(frame, node, found, wanted)
        graph = frame.scope.graph
        call = graph.create_node(
            "call_function", found.function, tuple(arguments), keywords, _identifier(node.name or node.op_type)
        )
        call.meta.update(onnx=f"{frame.prefix}{walk.label(node)}", origins=origins(node), operator=found)
        call.meta["texts"] = self._has_texts and any(self._may_hold_texts(frame, value) for value in node.inputs)
        if not found.returns_tuple:
            frame.nodes[node.outputs[0]] = call
            return
        for index, value in enumerate(node.outputs[:wanted]):
            if value.name:
                frame.nodes[value] = graph.call_function(operator.getitem, (call, index))
                frame.nodes[value].meta.update(onnx=call.meta["onnx"], origins=call.meta["origins"])

    def _told(self, frame: _Frame, node: ir.Node, found: Operator, wanted: int) -> dict[str, Any]:
        """Return the keywords a function asks for by name, besides attributes."""
        told: dict[str, Any] = {}
        if "outputs" in found.keywords:
            told["outputs"] = wanted
        if "input_types" in found.keywords:
            told["input_types"] = [self._element_type(frame, value) for value in node.inputs]
        return told

    @cached_property
    def _has_texts(self) -> bool:
        """Whether there are strings anywhere in the model."""
        model, text = self._model, ir.DataType.STRING
        stored = filter(None, map(walk.constant_tensor, self._names))
        casts = (node for node in walk.every_node(model) if walk.is_onnx_op(node, "Cast"))
        return (
            any(value.dtype is text for value in model.graph.inputs)
            or any(tensor.dtype is text for tensor in stored)
            or any(node.attributes.get_int("to", 0) == text for node in casts)
        )

    def _may_hold_texts(self, frame: _Frame, value: ir.Value | None) -> bool:
        """Return whether a value is strings, or may be for all that is known."""
        return value is not None and self._element_type(frame, value) in (0, ir.DataType.STRING)

    def _element_type(self, frame: _Frame, value: ir.Value | None) -> int:
        """Return ONNX's code of the element type of a value, or 0; what the model leaves out is inferred."""
        if value is None:
            return 0
        tensor = value.const_value if value.const_value is not None else walk.constant_tensor(value)
        known = tensor.dtype if tensor is not None else value.dtype
        return int(known or self._inferred(frame).fact(value).dtype or 0)

    def _inferred(self, frame: _Frame) -> Inference:
        """Return what is known of a frame's values; of those of a function, as this call runs it."""
        if frame.outer is not None:
            return self._inferred(frame.outer)
        if frame.inference is None:
            functions, body = self._model.functions, self._model.graph
            frame.inference = Inference(frame.opsets, functions, attributes=frame.attributes, as_stamped=True)
            if frame.caller is not None:
                call, around = frame.calls[-1], self._inferred(frame.caller)
                body = functions[call.op_identifier()].graph
                given = zip(body.inputs, call.inputs, strict=False)
                frame.inference.facts.update((one, around.fact(value)) for one, value in given if value is not None)
            frame.inference.run(body)
        return frame.inference

    def _read(self, frame: _Frame, value: ir.Value | None) -> Any:
        """Return the node that computes a value, in the frame's graph; None for one left out."""
        if value is None:
            return None
        if value not in frame.nodes:
            if value.is_initializer() and value.const_value is not None:
                path = self._stored(value, self._names[value], value.const_value)
                frame.nodes[value] = frame.scope.read_stored(path)
            elif frame.outer is None:
                return None  # an optional output of a function that its operator was not asked for
            else:
                outer = self._read(frame.outer, value)
                same = frame.scope is frame.outer.scope or outer is None
                frame.nodes[value] = outer if same else frame.scope.capture(outer)
        return frame.nodes[value]

    def _resolved(self, frame: _Frame, node: ir.Node) -> dict[str, ir.Attr]:
        """Return the attributes of a node, those of a function's caller in place of references."""
        found = {}
        for name, attribute in node.attributes.items():
            if not attribute.is_ref():
                found[name] = attribute
            elif (given := frame.attributes.get(attribute.ref_attr_name or "")) is not None:
                found[name] = given
        return found

    def _attribute(self, frame: _Frame, node: ir.Node, attribute: ir.Attr) -> Any:
        match attribute.type:
            case ir.AttributeType.GRAPH:
                return self._nested(frame, node, attribute.as_graph())
            case ir.AttributeType.TENSOR:
                name = f"{frame.prefix}{walk.label(node)}.{attribute.name}"
                path = self._stored((frame.calls, node, attribute.name), name, attribute.as_tensor())
                return frame.scope.read_stored(path)
            case ir.AttributeType.INTS | ir.AttributeType.FLOATS | ir.AttributeType.STRINGS:
                return list(attribute.value)
            case _:
                return attribute.value

    def _nested(self, frame: _Frame, node: ir.Node, graph: ir.Graph) -> tuple[fx.Node, tuple[fx.Node, ...]]:
        """Return the module of a nested graph, and what it captures: these follow its own inputs."""
        scope = _Scope(fx.Graph(), frame.scope)
        inner = _Frame(scope, frame, frame.opsets, frame.attributes, frame.prefix, frame.calls)
        for index, value in enumerate(graph.inputs):
            inner.nodes[value] = scope.placeholder(value.name or f"input_{index}")
        scope.read_stored(self._anchor)  # the first of what is captured: see `placement`
        self._lower_nodes(inner, graph)
        scope.graph.output(tuple(self._read(inner, value) for value in graph.outputs))
        module = LoweredModule(self._store.root, scope.graph, class_name="Nested")
        module.meta[SCANNED] = [_row(value) for value in graph.outputs]
        path = self._store.put_module(f"{walk.label(node)}.{graph.name or 'graph'}", module)
        return frame.scope.read_stored(path), tuple(scope.captured)


def _identifier(name: str) -> str:
    """Return a name as one of Python's."""
    text = re.sub(r"\W", "_", name, flags=re.ASCII)
    return f"_{text}" if not text or text[0].isdigit() or keyword.iskeyword(text) else text


def _without_trailing(arguments: list[Any]) -> list[Any]:
    while arguments and arguments[-1] is None:
        arguments.pop()
    return arguments


def _wanted_outputs(node: ir.Node) -> int:
    """Return how many outputs of a node are wanted, trailing ones without a name left out."""
    return max((index + 1 for index, value in enumerate(node.outputs) if value.name), default=0)


def _row(value: ir.Value) -> Row:
    """Return dtype and shape of what a loop stacks, as far as the model says; what it does not is of no elements."""
    strings = value.dtype is ir.DataType.STRING
    dtype = None if strings else torch_dtype(value.dtype) if value.dtype is not None else torch.float32
    return dtype, tuple(dim if isinstance(dim, int) else 0 for dim in value.shape or ())


def _holds_numbers(value: ir.Value) -> bool:
    """Return whether an input may be sizes: a few integers."""
    few = value.shape is not None and value.shape.rank() <= 1
    return few and value.dtype in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
