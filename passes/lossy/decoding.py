"""Operators that make weights of codes: whole ones at the start of the model, or single rows where they are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backend import Array

from ..analyses.linear_layers import LinearLayer
from .code_planes import BYTE_CODES, codes_per_step, plane_bits, unpacking_table
from .weight_codes import WeightCodes

# From here on, a Slice is told as inputs what it takes.
_SLICE_BY_INPUTS = 10
_BYTE_BITS, _HALF_BITS = 8, 4

# What a field of a message takes beside its content, and a constant beside its numbers: name, shape, type.
_FIELD_BYTES, _CONSTANT_BYTES = 3, 40

Add = Callable[..., ir.Value]


@dataclass(frozen=True, eq=False)
class StoredCodes:
    """A weight as constants of the model.

    Attributes:
        planes: uint8 [1, bytes], or [outputs, bytes], for each plane of the codes.
        table: float32 or float16 [entries of all tables], or [entries, numbers of an entry].
        scales: float32 or float16, laid out so that it multiplies what is decoded; None for 1.
        steps: uint8 [1, count], how far each outlier is behind the one before; None where there are none.
        exact: float32 [1, count], what outliers are, divided by their scale.
        codes: What all this stores.
        layer: A layer that reads it.
        by_row: Whether codes lie output by output, each output in whole bytes.
    """

    planes: tuple[ir.Value, ...]
    table: ir.Value
    scales: ir.Value | None
    steps: ir.Value | None
    exact: ir.Value | None
    codes: WeightCodes
    layer: LinearLayer
    by_row: bool

    @property
    def as_weight(self) -> bool:
        """Whether codes lie as the weight does."""
        return self.codes.is_plain and not self.by_row


@dataclass
class Decoding:
    """Adds what decodes.

    What is read by many, such as the codes that a byte holds, is there once. All that makes whole weights comes first
    in the model, in the order in which it was added, so that any node can read it.

    Attributes:
        ctx: Where edits are made.
    """

    ctx: Context
    _last: ir.Node | None = None
    _made: list[ir.Node] = field(default_factory=list)
    _own: dict[ir.Value, int] = field(default_factory=dict)
    _shared: dict[object, ir.Value] = field(default_factory=dict)

    def weight(self, stored: StoredCodes, source: ir.Node) -> ir.Value:
        """Return the whole weight in float32, in its own layout."""
        codes, layer = stored.codes, stored.layer
        add = self._at_start(source)
        dims = layer.dims if stored.as_weight else _blocked(codes)
        value = self._values(add, stored, dims, layer.output_axis if stored.as_weight else 0)
        if stored.steps is not None:
            value = self._with_outliers(add, stored, value, dims)
        if stored.scales is not None:
            value = add("Mul", [value, self._scales(add, stored)])
        return value if stored.as_weight else self._in_layout(add, layer, codes, value)

    def rows(self, node: ir.Node, stored: StoredCodes) -> ir.Value:
        """Return the rows that a lookup reads, of codes that lie row by row."""
        codes, indices = stored.codes, node.inputs[1]
        assert indices is not None, "a lookup has indices"

        def add(op_type: str, inputs: Sequence[ir.Value], **attributes: object) -> ir.Value:
            made = self.ctx.rewriter.make(op_type, inputs, attributes, sources=[node], name="rows")
            self._keep(made)
            return self.ctx.rewriter.insert(made, before=node).outputs[0]

        asked = add("Shape", [indices])

        def shape(*dims: int) -> ir.Value:
            return add("Concat", [asked, self._numbers(*dims)], axis=0)

        bytes_read = [add("Gather", [plane, indices]) for plane in stored.planes]
        columns = codes.padded // codes.vector
        step = codes_per_step(codes.bits)
        aligned = -(-columns // step) * step
        if len(bytes_read) == 1:
            found = self._looked_up(add, stored, bytes_read[0])
        else:
            splits = plane_bits(codes.bits)
            parts = [self._part(add, read, *split) for read, split in zip(bytes_read, splits, strict=True)]
            flat = [add("Reshape", [part, shape(aligned)]) for part in parts]
            found = add("Gather", [stored.table, _total(add, flat)])
        found = self._as_float(add, stored, found)
        width = codes.padded if codes.blocks > 1 else codes.inputs
        if aligned * codes.vector != width:
            found = self._cut(add, add("Reshape", [found, shape(aligned * codes.vector)]), -1, width)
        if stored.scales is None:
            return add("Reshape", [found, shape(width)])
        dims = (codes.blocks, codes.block) if codes.blocks > 1 else (width,)
        found = add("Mul", [add("Reshape", [found, shape(*dims)]), add("Gather", [self._scales(add, stored), indices])])
        if codes.blocks > 1:
            found = add("Reshape", [found, shape(width)])
        return found if width == codes.inputs else self._cut(add, found, -1, codes.inputs)

    def graph_bytes(self) -> int:
        """Return what all that was added takes in the file, but for codes, tables, scales and outliers."""
        nodes = sum(len(ir.serde.serialize_node(node).SerializeToString()) + _FIELD_BYTES for node in self._made)
        read = {value for node in self._made for value in node.inputs if walk.constant_tensor(value) is not None}
        return nodes + _CONSTANT_BYTES * len(read) + sum(size for value, size in self._own.items() if value in read)

    def _values(self, add: Add, stored: StoredCodes, dims: tuple[int, ...], output_axis: int) -> ir.Value:
        """Return what codes stand for, up to scales, in some dimensions."""
        codes = stored.codes
        if len(codes.tables) == 1 and len(stored.planes) == 1:
            found = self._as_float(add, stored, self._looked_up(add, stored, stored.planes[0]))
            return self._fitted(add, found, self._held(stored) * codes.vector, dims)
        coded = dims if codes.vector == 1 else (codes.outputs, codes.padded // codes.vector)
        splits = plane_bits(codes.bits)
        parts = [self._part(add, plane, *split) for plane, split in zip(stored.planes, splits, strict=True)]
        total = _total(add, [self._fitted(add, part, self._held(stored), coded) for part in parts])
        if len(codes.tables) > 1:
            total = add("Add", [total, self._table_starts(codes, coded, output_axis)])
        found = self._as_float(add, stored, add("Gather", [stored.table, total]))
        return found if coded == dims else self._reshaped(add, found, dims)

    def _looked_up(self, add: Add, stored: StoredCodes, packed: ir.Value) -> ir.Value:
        """Return the entries of all codes of each byte, of a single table and plane."""
        indices = add("Cast", [packed], to=int(ir.DataType.INT32))
        if stored.codes.bits == _BYTE_BITS:
            return add("Gather", [stored.table, indices])
        return add("Gather", [self._byte_table(stored), indices])

    def _byte_table(self, stored: StoredCodes) -> ir.Value:
        """Return what each byte stands for, made once of each table."""
        if stored.table not in self._shared:
            add = self._at_start(self.ctx.model.graph[0])
            self._shared[stored.table] = add("Gather", [stored.table, self._unpacking(stored.codes.bits, 0)])
        return self._shared[stored.table]

    def _part(self, add: Add, packed: ir.Value, bits: int, shift: int) -> ir.Value:
        """Return what a plane adds to the codes, int32."""
        indices = add("Cast", [packed], to=int(ir.DataType.INT32))
        return indices if bits == _BYTE_BITS else add("Gather", [self._unpacking(bits, shift), indices])

    def _unpacking(self, bits: int, shift: int) -> ir.Value:
        """Return what each byte of a plane adds to its codes, int32 [256, codes in a byte].

        The half bytes of each byte are stored, as bytes; what is in a half byte is looked up in a table of its own.
        """
        key = bits, shift
        if key not in self._shared:
            add = self._at_start(self.ctx.model.graph[0])
            if bits == _HALF_BITS and not shift:
                table = self._constant(unpacking_table(_HALF_BITS), "codes_in_byte")
                self._shared[key] = add("Cast", [table], to=int(ir.DataType.INT32))
                return self._shared[key]
            in_half = unpacking_table(bits, shift)[: 2**_HALF_BITS, _HALF_BITS // bits :].astype(np.int32)
            each = _HALF_BITS // bits
            halves = self._constant(in_half if each > 1 else in_half.reshape(-1), "codes_in_half")
            made = add("Gather", [halves, self._unpacking(_HALF_BITS, 0)])
            self._shared[key] = made if each == 1 else self._reshaped(add, made, (BYTE_CODES, 2 * each))
        return self._shared[key]

    def _table_starts(self, codes: WeightCodes, dims: tuple[int, ...], axis: int) -> ir.Value:
        """Return where the table of each output begins, int32, to be added to codes of some dimensions."""
        starts = (np.arange(codes.outputs) // codes.rows * 2**codes.bits).astype(np.int32)
        shape = (codes.outputs, *(1 for _ in dims[axis + 1 :]))
        key = shape, codes.rows, codes.bits
        if key not in self._shared:
            self._shared[key] = self._constant(starts.reshape(shape), "table_starts")
        return self._shared[key]

    def _with_outliers(self, add: Add, stored: StoredCodes, value: ir.Value, dims: tuple[int, ...]) -> ir.Value:
        assert stored.steps is not None, "asked for where there are some"
        assert stored.exact is not None, "as above"
        flat = self._reshaped(add, value, (1, math.prod(dims)))
        steps = add("Cast", [stored.steps], to=int(ir.DataType.INT32))
        places = add("CumSum", [steps, self._numbers(1, scalar=True)])
        flat = add("ScatterElements", [flat, places, stored.exact], axis=1)
        return self._reshaped(add, flat, dims)

    def _scales(self, add: Add, stored: StoredCodes) -> ir.Value:
        """Return scales as they multiply what is decoded; only what MatMulBnb4 reads too is not stored so."""
        assert stored.scales is not None, "asked for where there are some"
        wanted = scale_dims(stored.codes, stored.layer, by_row=stored.by_row)
        tensor = walk.constant_tensor(stored.scales)
        assert tensor is not None, "scales are constant"
        scales = stored.scales
        if tensor.dtype is ir.DataType.FLOAT16:
            scales = add("Cast", [scales], to=int(ir.DataType.FLOAT))
        return scales if walk.dims(tensor) == wanted else self._reshaped(add, scales, wanted)

    def _in_layout(self, add: Add, layer: LinearLayer, codes: WeightCodes, value: ir.Value) -> ir.Value:
        """Return what was decoded output by output as the weight lies."""
        if codes.padded != codes.inputs:
            if codes.blocks > 1:
                value = self._reshaped(add, value, (codes.outputs, codes.padded))
            value = self._cut(add, value, 1, codes.inputs)
        dims, perm = _layout(layer)
        as_decoded = (codes.outputs, codes.inputs) if codes.padded != codes.inputs else _blocked(codes)
        if tuple(dims) != as_decoded:
            value = self._reshaped(add, value, tuple(dims))
        return value if perm == sorted(perm) else add("Transpose", [value], perm=perm)

    def _fitted(self, add: Add, value: ir.Value, held: int, dims: tuple[int, ...]) -> ir.Value:
        """Return a value of so many numbers in other dimensions; what is behind these is cut off."""
        wanted = math.prod(dims)
        if held != wanted:
            value = self._cut(add, self._reshaped(add, value, (held,)), 0, wanted)
        return self._reshaped(add, value, dims)

    def _cut(self, add: Add, value: ir.Value, axis: int, size: int) -> ir.Value:
        """Return the first so many along an axis."""
        if walk.opset(self.ctx.model) < _SLICE_BY_INPUTS:
            return add("Slice", [value], axes=[axis], starts=[0], ends=[size])
        return add("Slice", [value, self._numbers(0), self._numbers(size), self._numbers(axis)])

    def _reshaped(self, add: Add, value: ir.Value, dims: tuple[int, ...]) -> ir.Value:
        return add("Reshape", [value, self._numbers(*dims)])

    def _as_float(self, add: Add, stored: StoredCodes, value: ir.Value) -> ir.Value:
        return add("Cast", [value], to=int(ir.DataType.FLOAT)) if stored.codes.halves_tables else value

    def _held(self, stored: StoredCodes) -> int:
        """Return how many codes the stored bytes hold, those that fill them up included."""
        tensor = walk.constant_tensor(stored.planes[0])
        assert tensor is not None, "codes are constant"
        return tensor.size * _BYTE_BITS // plane_bits(stored.codes.bits)[0][0]

    def _numbers(self, *content: int, scalar: bool = False) -> ir.Value:
        """Return a constant of integers; equal ones are one."""
        key = content, scalar
        if key not in self._shared:
            self._shared[key] = self._constant(np.array(content[0] if scalar else content, np.int64), "dims")
        return self._shared[key]

    def _keep(self, node: ir.Node) -> None:
        """Count a node; what it makes is called as it is, which is short."""
        node.outputs[0].name = node.name
        self._made.append(node)

    def _constant(self, content: Array, name: str) -> ir.Value:
        value = self.ctx.rewriter.const(content, name)
        self._own[value] = content.nbytes
        return value

    def _at_start(self, source: ir.Node) -> Add:
        """Return what adds a node at the start of the model, behind those added there before."""

        def add(op_type: str, inputs: Sequence[ir.Value], **attributes: object) -> ir.Value:
            rewriter = self.ctx.rewriter
            node = rewriter.make(op_type, inputs, attributes, sources=[source], name="decode")
            if self._last is None:
                rewriter.insert(node, before=self.ctx.model.graph[0])
            else:
                rewriter.insert_after(node, self._last)
            self._last = node
            self._keep(node)
            return node.outputs[0]

        return add


def scale_dims(codes: WeightCodes, layer: LinearLayer, *, by_row: bool) -> tuple[int, ...]:
    """Return the dimensions in which scales multiply what is decoded."""
    if codes.is_plain and not by_row:
        return (codes.outputs, *(1 for _ in layer.dims[layer.output_axis + 1 :]))
    return (codes.outputs, codes.blocks, 1) if codes.blocks > 1 else (codes.outputs, 1)


def _blocked(codes: WeightCodes) -> tuple[int, ...]:
    """Return the dimensions of what is decoded output by output: in blocks where these have scales."""
    return (codes.outputs, codes.blocks, codes.block) if codes.blocks > 1 else (codes.outputs, codes.padded)


def _total(add: Add, parts: Sequence[ir.Value]) -> ir.Value:
    total = parts[0]
    for part in parts[1:]:
        total = add("Add", [total, part])
    return total


def _layout(layer: LinearLayer) -> tuple[list[int], list[int]]:
    """Return the shape that `LinearLayer.matrix` is a flat view of, and how its axes lie in the weight."""
    dims = list(layer.dims)
    outputs = dims.pop(layer.output_axis)
    axes = list(range(1, len(dims) + 1))
    if layer.node.op_type.startswith("Conv"):
        channels, *kernel = dims
        dims, axes = [*kernel, channels], [axes[-1], *axes[:-1]]
    axes.insert(layer.output_axis, 0)
    return [outputs, *dims], axes
