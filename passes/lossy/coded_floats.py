"""Weights made of codes of a table: as floats while a model is quantized, then as integers of the same codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backend import Array

from ..analyses.linear_layers import LINEAR_OPS, LinearLayer
from ..analyses.quantized import reads_stored_integers
from ..solvers.grid import Grid, GridWeight, positive
from ..solvers.objective import output_error
from .integer_weights import release

_RULE = "coded-floats"
# What moves decoded values, on their way from the table to the weight.
_MOVES = ("Reshape", "Slice", "Transpose")


@dataclass(frozen=True, eq=False)
class CodedFloats:
    """A weight that operators make of codes, and the constant that stands for it while the model is quantized.

    Attributes:
        made: What the operators make.
        path: Those between the table and that, in order.
        table: The constant table, float32 [entries] or [entries, numbers of an entry]; None where an entry is no
            one integer, because of scales of blocks or outliers: what is made is then rounded in the model.
        starts: Where the table of each output begins, [outputs]; None where all have one.
        scales: float32 [outputs], or None.
        constant: The constant, its content made when it is read.
        region: All operators that the weight hangs on, in order.
    """

    made: ir.Value
    path: tuple[ir.Node, ...]
    table: ir.Value | None
    starts: Array | None
    scales: Array | None
    constant: ir.Value
    region: Sequence[ir.Node]

    def on_grid(self, layer: LinearLayer, grid: Grid, least_scales: Array | None) -> GridWeight | None:
        """Return the weight in integers, each entry of a table one; None where the grid cannot have it so.

        Args:
            layer: The layer, its weight the constant.
            grid: What its kernel takes.
            least_scales: float32 [outputs], or None; no scale may be smaller.
        """
        matrix = layer.matrix()
        if grid.block is not None or not grid.symmetric or (grid.tensor and not self._is_even):
            return None
        scales = self._grid_scales(matrix, grid)
        raised = 0
        if least_scales is not None and bool((scales[:, 0] < least_scales).any()):
            if grid.tensor:
                return None
            # Entries are no whole steps of larger scales: what is made is rounded in the model.
            raised = int((scales[:, 0] < least_scales).sum())
            scales = np.maximum(scales, least_scales[:, None])
        scales = scales[:1] if grid.tensor else scales
        codes = grid.encode(matrix, scales)
        found = GridWeight(grid, codes, scales, None, 0.0)
        left = matrix - found.values()
        # Another model may have such operators that mean something else.
        if not bool((np.abs(left) <= scales).all()):
            return None
        return GridWeight(grid, codes, scales, None, output_error(left), raised)

    def _grid_scales(self, matrix: Array, grid: Grid) -> Array:
        """Return the scale of each output, float32 [outputs, 1]."""
        if self.table is None:
            return positive(np.abs(matrix).max(axis=1, initial=0.0, keepdims=True) / np.float32(grid.highest))
        steps = self._steps(grid)[self._tables(len(matrix))]
        return np.asarray((steps if self.scales is None else steps * self.scales)[:, None], np.float32)

    def as_integers(self, ctx: Context, layer: LinearLayer, found: GridWeight) -> ir.Value:
        """Add operators that make the integers of the codes, and return what they make."""
        rewriter, grid = ctx.rewriter, found.grid
        if self.table is None or found.raised:
            scales = found.scales.reshape(-1)
            constants = [
                rewriter.const(scales, "scales", near=self.path[-1]),
                rewriter.const(np.zeros(len(scales), np.int8), "zeros", near=self.path[-1]),
            ]
            axis = {"axis": layer.output_axis}
            rounded = rewriter.make(
                "QuantizeLinear", [self.made, *constants], axis, sources=[self.path[-1]], name="codes"
            )
            return rewriter.insert_after(rounded, self.path[-1]).outputs[0]
        content = walk.constant_tensor(self.table)
        assert content is not None, "a table is constant"
        floats = content.numpy().astype(np.float32)
        steps = np.repeat(self._steps(grid), len(floats) // self._count)
        steps = steps.reshape(-1, *(1 for _ in floats.shape[1:]))
        codes = np.clip(np.rint(floats / steps), grid.lowest, grid.highest).astype(np.int8)
        now = rewriter.const(codes, f"{self.table.name}_q", near=self.path[0])
        last, before = self.path[-1], self.table
        for node in self.path:
            if node.op_type in ("Mul", "Cast"):
                before = node.outputs[0]
                continue
            inputs = [now if value is before else value for value in node.inputs]
            made = rewriter.make(node.op_type, inputs, dict(node.attributes), sources=[node], name="decode")
            last = rewriter.insert_after(made, last)
            before, now = node.outputs[0], last.outputs[0]
        return now

    @property
    def _is_even(self) -> bool:
        """Whether all of it has one scale."""
        return self.scales is None and self.starts is None and self.table is not None

    @property
    def _count(self) -> int:
        return 1 if self.starts is None else len(np.unique(self.starts))

    def _tables(self, outputs: int) -> Array:
        """Return which table each output has."""
        if self.starts is None:
            return np.zeros(outputs, np.int64)
        return np.asarray(np.unique(self.starts, return_inverse=True)[1].reshape(-1))

    def _steps(self, grid: Grid) -> Array:
        """Return the step of the grid of each table: the largest entry is the largest code."""
        content = walk.constant_tensor(self.table)
        assert content is not None, "a table is constant"
        largest = np.abs(content.numpy().astype(np.float32)).reshape(self._count, -1).max(axis=1)
        return np.where(largest > np.finfo(np.float32).tiny, largest / np.float32(grid.highest), np.float32(1.0))


@dataclass
class CodedLayers:
    """All weights of linear layers that operators make of codes.

    Attributes:
        ctx: Where edits are made.
        weights: By the constant that stands for each.
        left: How many cannot be read so, and are left to be decoded to floats.
        kept: How many are in integers by their own codes.
        restored: How many read them as before.
    """

    ctx: Context
    weights: dict[ir.Value, CodedFloats] = field(default_factory=dict)
    left: int = 0
    kept: int = 0
    restored: int = 0
    _integers: dict[ir.Value, ir.Value] = field(default_factory=dict)

    def given(self, layer: LinearLayer, grid: Grid, least_scales: Array | None) -> GridWeight | None:
        """Return the integers that the codes of a layer's weight stand for, or None."""
        coded = self.weights.get(layer.weight)
        return None if coded is None else coded.on_grid(layer, grid, least_scales)

    def integers(self, layer: LinearLayer, found: GridWeight) -> ir.Value:
        """Return the integers of a weight that was `given` so, as operators make them of its codes."""
        if layer.weight not in self._integers:
            self._integers[layer.weight] = self.weights[layer.weight].as_integers(self.ctx, layer, found)
            self.kept += 1
        return self._integers[layer.weight]

    def restore(self) -> None:
        """Let what still reads constants read what operators make of codes again, and erase what nothing reads."""
        for coded in self.weights.values():
            with self.ctx.rewriter.edit(_RULE, coded.path[0]):
                uses = list(coded.constant.uses())
                self.restored += bool(uses)
                for use in uses:
                    self.ctx.rewriter.set_input(use.node, use.idx, coded.made)
                release(self.ctx.rewriter, coded.constant)
                _erase_unread(self.ctx, coded.made)
        self.weights = {}

    def note(self, mode: str) -> None:
        """Say what became of them, behind everything else."""
        total = len(self.weights) + self.restored
        still = sum(bool(constant.uses()) for constant in self.weights) + self.restored
        if self.kept:
            self.ctx.note(
                f"{self.kept} weights are made of their codes as before, now as integers: the runtime decodes them "
                "once as it loads the model, and the file stays as small",
                kept=self.kept,
            )
        again = total - still - self.kept
        if again > 0:
            self.ctx.note(
                f"{again} weights were made of codes and are stored as integers of their own: channels of zeros were "
                "added, or the format is none that codes become",
                stored_again=again,
            )
        why = "" if mode == "static" else f"; only `mode=static` computes on them, and this is `{mode}`"
        if still + self.left:
            self.ctx.left(f"{still + self.left} weights are made of codes and stay in float{why}")


@contextmanager
def coded_as_floats(model: ir.Model, ctx: Context, *, may_compute: bool = True) -> Iterator[CodedLayers]:
    """Let layers read constants in place of weights that are made of codes; behind it, what still does reads codes.

    Args:
        model: The model.
        ctx: Where edits are made.
        may_compute: Whether any kernel may compute on the codes; else all is left as it is.
    """
    found = CodedLayers(ctx)
    for value, uses in _decoded_weights(model).items():
        read = _read(value) if may_compute else None
        if read is None:
            found.left += 1
            continue
        constant = _constant(value, read.region, ctx)
        found.weights[constant] = replace(read, constant=constant)
        for node, index in uses:
            ctx.rewriter.set_input(node, index, constant)
    try:
        yield found
    finally:
        found.restore()


def decoding_nodes(model: ir.Model) -> set[ir.Node]:
    """Return the operators that make weights of codes on which integer kernels can compute."""
    read = (_read(value) for value in _decoded_weights(model))
    return {node for coded in read if coded is not None for node in coded.region}


def _decoded_weights(model: ir.Model) -> dict[ir.Value, list[tuple[ir.Node, int]]]:
    """Return the values made of codes that linear operators multiply by, and where."""
    found: dict[ir.Value, list[tuple[ir.Node, int]]] = {}
    for node in walk.every_node(model):
        if not walk.is_onnx_op(node, *LINEAR_OPS):
            continue
        for index, value in enumerate(list(node.inputs)[:2]):
            if value is not None and value.producer() is not None and (value in found or _is_decoded(value)):
                found.setdefault(value, []).append((node, index))
    return found


def _constant(value: ir.Value, region: Sequence[ir.Node], ctx: Context) -> ir.Value:
    """Return a constant that stands for a value, computed whenever it is read."""
    assert value.shape is not None, "checked as it was read"

    def content() -> ir.TensorProtocol:
        return ir.tensor(ctx.evaluate(region, [value])[0])

    lazy = ir.LazyTensor(content, dtype=ir.DataType.FLOAT, shape=ir.Shape(list(value.shape)), name=value.name)
    return ctx.rewriter.const(lazy, f"{value.name}_floats", near=region[-1])


def _read(value: ir.Value) -> CodedFloats | None:
    """Return a value as a weight made of codes, None where its shape is not known."""
    region, last = _region(value), value.producer()
    if region is None or last is None or value.shape is None or value.is_graph_output():
        return None
    if not all(isinstance(size, int) for size in value.shape):
        return None
    of_table = _read_table(value, region)
    return of_table if of_table is not None else CodedFloats(value, (last,), None, None, None, value, region)


def _read_table(value: ir.Value, region: Sequence[ir.Node]) -> CodedFloats | None:
    """Return a value as entries of tables and scales of outputs, as `Decoding` makes it, or None."""
    path: list[ir.Node] = []
    scales: Array | None = None
    node = value.producer()
    while node is not None and not walk.is_onnx_op(node, "Gather"):
        path.append(node)
        if walk.is_onnx_op(node, "Mul") and scales is None:
            scales = _content(node.inputs[1])
            if scales is None:
                return None
        elif not walk.is_onnx_op(node, *_MOVES, "Cast"):
            return None
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is None:
        return None
    path.append(node)
    starts = _starts(node.inputs[1])
    of_bytes = node.inputs[0].producer() if node.inputs[0] is not None else None
    if of_bytes is not None and walk.constant_tensor(node.inputs[0]) is None:
        if not walk.is_onnx_op(of_bytes, "Gather"):
            return None
        path.append(of_bytes)
    table = path[-1].inputs[0]
    if table is None or walk.constant_tensor(table) is None:
        return None
    if any(numbers is not None and numbers.size != max(numbers.shape) for numbers in (scales, starts)):
        return None  # scales of blocks
    begins, flat = (None if numbers is None else numbers.reshape(-1) for numbers in (starts, scales))
    return CodedFloats(value, tuple(reversed(path)), table, begins, flat, value, region)


def _content(value: ir.Value | None) -> Array | None:
    """Return what a constant holds, also one in float16 that is cast."""
    producer = value.producer() if value is not None else None
    if producer is not None and walk.is_onnx_op(producer, "Cast"):
        value = producer.inputs[0]
    tensor = walk.constant_tensor(value)
    return None if tensor is None else tensor.numpy().astype(np.float32)


def _starts(indices: ir.Value | None) -> Array | None:
    """Return where the tables of outputs begin, if codes are moved by that."""
    adder = indices.producer() if indices is not None else None
    if adder is None or not walk.is_onnx_op(adder, "Add"):
        return None
    tensor = walk.constant_tensor(adder.inputs[1])
    return None if tensor is None else tensor.numpy()


def _is_decoded(value: ir.Value) -> bool:
    """Return whether a value hangs on stored codes, and on nothing that varies."""
    region = _region(value)
    return region is not None and any(reads_stored_integers(node) for node in region)


def _region(value: ir.Value) -> Sequence[ir.Node] | None:
    """Return all nodes that a value hangs on, in order; None where it hangs on an input, or on too much to be codes."""
    seen: dict[ir.Node, None] = {}
    frontier = [value]
    most = 64
    while frontier:
        one = frontier.pop()
        node = one.producer()
        if node is None:
            if walk.constant_tensor(one) is None:
                return None
            continue
        if walk.constant_tensor(one) is not None or node in seen:
            continue
        if len(seen) == most or any(True for _ in walk.subgraphs(node)):
            return None
        seen[node] = None
        frontier.extend(each for each in node.inputs if each is not None)
    graph = value.graph
    return None if graph is None else [node for node in graph if node in seen]


def _erase_unread(ctx: Context, value: ir.Value) -> None:
    """Erase what makes a value that nothing reads, as far back as nothing else does."""
    frontier = [value]
    while frontier:
        node = frontier.pop().producer()
        if node is None or node.graph is None or walk.is_read(node):
            continue
        inputs = [one for one in node.inputs if one is not None]
        ctx.rewriter.erase(node)
        for one in inputs:
            release(ctx.rewriter, one)
        frontier.extend(inputs)
