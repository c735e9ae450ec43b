"""Carries a plan of formats out: constants cast when they are written, casts where formats meet, types stamped."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt import derived, walk
from graphopt.authoring import Context
from graphopt.value_records import forget

from ..analyses.narrow_constants import ENDLESS, clamped, mask_bound
from ..analyses.number_formats import BY_ATTRIBUTE, is_float
from .cast_plan import CastPlan

_RULE = "cast"


@dataclass
class Lowering:
    """One model being brought to another format, in one edit.

    Attributes:
        ctx: Where edits are made.
        plan: What computes in which format.
        casts: How many Casts were put in.
        clamped: How many constants stood for infinity and were brought into the range.
    """

    ctx: Context
    plan: CastPlan
    casts: int = 0
    clamped: int = 0
    _halves: set[ir.Value] = field(default_factory=set)
    _narrow: dict[ir.Value, ir.Value] = field(default_factory=dict)
    _wide: dict[ir.Value, ir.Value] = field(default_factory=dict)
    _constants: dict[tuple[ir.Value, ir.DataType, float | None], ir.Value] = field(default_factory=dict)

    def run(self, model: ir.Model) -> None:
        """Change the model; every output of it keeps its name."""
        # Nothing computes in halves inside functions, whose dtypes only their callers know.
        nodes = [node for graph in walk.graphs_within(model.graph) for node in graph]
        with self.ctx.rewriter.edit(_RULE, *self.plan.ports):
            for node, ports in self.plan.ports.items():
                self._halves.update(node.outputs[index] for index in ports.outputs)
            for graph in list(walk.graphs_within(model.graph)):
                self._settle_outputs(graph)
            for node in nodes:
                self._settle_inputs(node)
                self._settle_attribute(node)
            for node in nodes:
                if walk.is_onnx_op(node, "Constant") and not walk.is_read(node):
                    self.ctx.rewriter.erase(node)
            for value in self._halves:
                _stamp(value, self.plan.dtype)

    def _settle_outputs(self, graph: ir.Graph | ir.Function) -> None:
        """Let what a graph returns stay float32, under the same name."""
        for value in list(dict.fromkeys(graph.outputs)):
            if value not in self._halves:
                continue
            cast = self._cast(value, ir.DataType.FLOAT)
            self.ctx.rewriter.replace(value, cast)
            producer = cast.producer()
            assert producer is not None, "a Cast makes it"
            self.ctx.rewriter.set_input(producer, 0, value)
            self._narrow[cast], self._wide[value] = value, cast

    def _settle_inputs(self, node: ir.Node) -> None:
        """Let a node read each float in the format it computes in."""
        narrow = self.plan.ports[node].inputs if node in self.plan.ports else ()
        for index, value in enumerate(node.inputs):
            if value is None or not is_float(value):
                continue
            tensor = walk.constant_tensor(value)
            if tensor is not None:
                wanted = self._constant(node, value, tensor, in_half=index in narrow)
            else:
                wanted = self._narrowed(value) if index in narrow else self._widened(value)
            if wanted is not value:
                self.ctx.rewriter.set_input(node, index, wanted)
                self.ctx.rewriter.remove_if_unread(value)

    def _narrowed(self, value: ir.Value) -> ir.Value:
        if value in self._halves:
            return value
        if value not in self._narrow:
            self._narrow[value] = self._cast(value, self.plan.dtype)
        return self._narrow[value]

    def _widened(self, value: ir.Value) -> ir.Value:
        if value not in self._halves:
            return value
        if value not in self._wide:
            self._wide[value] = self._cast(value, ir.DataType.FLOAT)
        return self._wide[value]

    def _constant(self, node: ir.Node, value: ir.Value, tensor: ir.TensorProtocol, *, in_half: bool) -> ir.Value:
        """Return a constant as a node reads it: in its format, and no number beyond the range that stands for infinity.

        A node that stays in float32 may hand such a number on to one that does not: it is clamped for both.
        """
        bound = mask_bound(node, self.plan.dtype)
        if bound is not None and not self._stands_for_infinity(value, tensor):
            bound = None
        if not in_half and bound is None:
            return value
        dtype = self.plan.dtype if in_half else ir.DataType.FLOAT
        key = (value, dtype, bound)
        if key not in self._constants:
            content = tensor
            if bound is not None:
                content = ir.tensor(clamped(tensor, bound))
                self.clamped += 1
            content = derived.cast(content, dtype) if in_half else content
            self._constants[key] = self.ctx.rewriter.const(content, value.name or "constant", near=node)
        return self._constants[key]

    def _stands_for_infinity(self, value: ir.Value, tensor: ir.TensorProtocol) -> bool:
        found = self.plan.surveys.get(value)
        if found is not None:
            return found.endless > 0
        if tensor.size > 1:  # what is not looked at anyway is not read for this
            return False
        return bool(abs(float(tensor.numpy().reshape(()))) >= ENDLESS)

    def _settle_attribute(self, node: ir.Node) -> None:
        """Let a node whose format is an attribute say the new one."""
        if not walk.is_onnx_op(node, *BY_ATTRIBUTE) or not is_float(node.outputs[0]):
            return
        in_half, name = node in self.plan.ports, BY_ATTRIBUTE[node.op_type]
        if node.op_type == "Cast":
            if in_half and self.plan.ports[node].outputs:
                self.ctx.rewriter.set_attribute(node, name, int(self.plan.dtype))
            return
        filling = node.attributes[name].as_tensor() if name in node.attributes else ir.tensor(np.zeros(1, np.float32))
        bound = mask_bound(node, self.plan.dtype)
        endless = bound is not None and bool((np.abs(filling.numpy()) >= ENDLESS).any())
        content = ir.tensor(clamped(filling, bound)) if endless and bound is not None else filling
        self.clamped += endless
        if in_half or endless:
            content = derived.cast(content, self.plan.dtype) if in_half else content
            self.ctx.rewriter.set_attribute(node, name, ir.tensor(content.numpy(), dtype=content.dtype))

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Put a Cast of a value right behind what makes it, where all its readers see it."""
        producer, rewriter = value.producer(), self.ctx.rewriter
        sources = [producer] if producer is not None else [use.node for use in itertools.islice(value.uses(), 1)]
        node = rewriter.make("Cast", [value], {"to": int(dtype)}, sources=sources, name=f"{value.name}_cast")
        self.casts += 1
        if producer is not None:
            return rewriter.insert_after(node, producer).outputs[0]
        assert value.graph is not None, "an input belongs to a graph"
        return rewriter.insert(node, before=value.graph[0]).outputs[0]


def _stamp(value: ir.Value, dtype: ir.DataType) -> None:
    """Let a value declare its new format where it declared one; what was inferred of it is inferred anew."""
    forget(value)
    if value.type is not None:
        value.type = ir.TensorType(dtype)
