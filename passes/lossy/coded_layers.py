"""Which weights are stored as codes of a table, and what that costs and loses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context, Need
from graphopt.backend import Array
from graphopt.report import show_bytes

from ..analyses.finite_weights import finite_matrix
from ..analyses.linear_layers import LinearLayer, as_linear_layer, is_lookup
from ..analyses.second_moments import gram
from ..analyses.selection import Selection
from ..solvers.codebook import Codebook, CodebookWeight, compensated, nearest
from .code_planes import stored_bytes
from .weight_codes import WeightCodes

# What the nodes, names and shapes that bring a weight back to float take in a file, roughly.
_OVERHEAD_BYTES = 1024
_FLOAT_BYTES = 4
# Block sizes of MatMulBnb4.
_DIRECT_BLOCKS: tuple[int, ...] = tuple(2**power for power in range(4, 13))


class Measures(Protocol):
    """Whatever knows what a weight takes as codes."""

    def stored_bytes(self, outputs: int, inputs: int) -> float:
        """Return what codes, tables and scales of a weight take."""


@dataclass(frozen=True)
class Coding:
    """How weights become codes.

    Attributes:
        book: The codebook.
        bits: Bits a code takes in the file.
        block: Consecutive inputs that share a scale; 0 for all inputs of an output.
        solver: ``rtn`` nearest entries, ``mse`` with searched scales, ``gptq`` with errors made up for.
        direct: Whether an operator is to compute on the codes where it can.
    """

    book: Codebook
    bits: int
    block: int
    solver: str
    direct: bool = False

    def block_of(self, inputs: int) -> int:
        """Return the block size for a row of so many inputs: blocks of even size, in whole bytes.

        What computes on codes wants powers of two that divide the row, and gets the largest, if there is one.
        """
        powers = [size for size in _DIRECT_BLOCKS if size <= self.block and inputs % size == 0]
        if self.direct and powers:
            return max(powers)
        blocks = -(-inputs // self.block) if self.block else 1
        per_byte = max(1, 8 // self.bits)
        return -(-inputs // (blocks * per_byte)) * per_byte

    def stored_bytes(self, outputs: int, inputs: int) -> int:
        """Return what codes and scales of a weight take."""
        block = self.block_of(inputs)
        blocks = -(-inputs // block)
        return stored_bytes(outputs * blocks * block, self.bits) + outputs * blocks * _FLOAT_BYTES


def needs_of(solver: str) -> frozenset[Need]:
    """Return what a pass needs that stores codes: canonical form, and data by the solver."""
    data = {"gptq": {Need.CALIBRATION}, "rtn": set()}.get(solver, {Need.CALIBRATION_OPTIONAL})
    return frozenset({Need.CANONICAL, *data})


def solver_of(solver: str, ctx: Context) -> str:
    """Return the solver that ``auto`` stands for: GPTQ where there are data, and searched scales where not."""
    if solver != "auto":
        return solver
    return "gptq" if ctx.data is not None else "mse"


def coded_layers(model: ir.Model, ctx: Context, selection: Selection, coding: Measures) -> dict[ir.Value, LinearLayer]:
    """Return the weights to be stored as codes, each with a layer that reads it, and note what is left."""
    chosen: dict[ir.Value, LinearLayer] = {}
    others: set[ir.Value] = set()
    small: set[ir.Value] = set()
    excluded = inside = 0
    for node in walk.every_node(model):
        layer = _weight_of(node)
        if layer is None:
            continue
        if not _pays(layer, coding):
            small |= {layer.weight} if selection.allows(node) else set()
            continue
        tensor = walk.constant_tensor(layer.weight)
        if tensor is None or tensor.dtype is not ir.DataType.FLOAT:
            others |= {layer.weight} if selection.allows(node) else set()
        elif not layer.weight.is_initializer() or layer.weight.is_graph_output():
            inside += 1
        elif not all(selection.allows(use.node) for use in layer.weight.uses()):
            excluded += selection.allows(node)
        elif layer.weight not in chosen or is_lookup(chosen[layer.weight].node):
            # What multiplies by a weight says better than a lookup which inputs matter.
            chosen[layer.weight] = layer
    if small:
        ctx.left(f"weights that would be no smaller as codes: {len(small)}")
    if excluded:
        ctx.left(f"{excluded} weights are also read where it is excluded")
    if inside:
        ctx.left(f"{inside} weights lie inside functions, or are outputs of the model")
    if others:
        ctx.left(f"{len(others)} weights are not float32, which codes stand for")
    return chosen


def _weight_of(node: ir.Node) -> LinearLayer | None:
    """Return a node's constant weight as a layer; a table counts as one whose rows are outputs."""
    if is_lookup(node):
        table, indices = node.inputs
        tensor = walk.constant_tensor(table)
        if table is None or indices is None or tensor is None or len(tensor.shape) != 2:
            return None
        return LinearLayer(node, indices, table, 0, 0, None) if tensor.dtype.is_floating_point() else None
    return as_linear_layer(node)


def _pays(layer: LinearLayer, coding: Measures) -> bool:
    tensor = walk.constant_tensor(layer.weight)
    assert tensor is not None, "a linear layer has a constant weight"
    outputs = walk.dims(tensor)[layer.output_axis]
    if not tensor.size:
        return False
    return coding.stored_bytes(outputs, tensor.size // outputs) + _OVERHEAD_BYTES < tensor.nbytes


def moments_of(ctx: Context, layers: Mapping[ir.Value, LinearLayer], coding: Coding) -> Mapping[LinearLayer, Array]:
    """Return H of the layers that can be observed, where the solver needs it and there are data."""
    if coding.solver == "rtn" or ctx.data is None:
        return {}
    return gram(ctx, [layer for layer in layers.values() if not is_lookup(layer.node)])


def solve(layer: LinearLayer, coding: Coding, second_moment: Array | None) -> CodebookWeight:
    """Return the codes of one weight.

    Raises:
        PassError: The weight holds NaN or infinity.
    """
    matrix = finite_matrix(layer)
    block = coding.block_of(matrix.shape[1])
    if coding.solver == "gptq" and second_moment is not None:
        return compensated(matrix, coding.book, block, second_moment)
    return nearest(matrix, coding.book, block, search=coding.solver != "rtn", second_moment=second_moment)


@dataclass
class Tally:
    """What all weights together cost and lose.

    Attributes:
        weights: How many.
        before: Bytes as floats.
        parts: Bytes of codes, of tables, of scales and of outliers.
        lost: Predicted output error, summed.
        whole: What that error would be if all weights were zero.
    """

    weights: int = 0
    before: int = 0
    parts: Counter[str] = field(default_factory=Counter)
    lost: float = 0.0
    whole: float = 0.0

    def add(self, ctx: Context, layer: LinearLayer, codes: WeightCodes, whole: float) -> None:
        """Add one weight.

        Args:
            ctx: Where what is forecast is noted.
            layer: The layer, its weight as it was.
            codes: What the weight becomes.
            whole: What the error would be if the weight were zero.
        """
        self.weights += 1
        self.before += codes.outputs * codes.inputs * _FLOAT_BYTES
        self.parts.update(codes.parts())
        # Errors of different layers are of different sizes: each counts by the share of its output.
        share = codes.error / whole if whole else 0.0
        self.lost, self.whole = self.lost + share, self.whole + 1
        if ctx.forecast is not None:
            for node in {use.node for use in layer.weight.uses()}:
                reader = as_linear_layer(node)
                if reader is not None and reader.output_axis == layer.output_axis:
                    ctx.forecast.weight(node, codes.values())

    @property
    def sqnr(self) -> float:
        """Signal to noise of the layers' outputs in dB, the mean share of all layers."""
        return float(-10 * np.log10(self.lost / self.whole)) if self.lost and self.whole else float("inf")

    def note(self, ctx: Context, form: str, lowering: Lowered, remark: str = "") -> None:
        """Say what was done."""
        after = self.parts.total()
        bits = 8 * after / max(self.before / _FLOAT_BYTES, 1)
        kinds = [f"{show_bytes(size)} {kind}" for kind, size in self.parts.items() if size]
        kinds.append(f"{show_bytes(lowering.graph_bytes())} of operators besides")
        ctx.note(
            f"{self.weights} weights stored as {form}, for {lowering.readers()}: {show_bytes(self.before)} → "
            f"{show_bytes(after)} ({bits:.2f} bits each; {', '.join(kinds)}), predicted SQNR of their layers "
            f"{self.sqnr:.1f} dB; {'; '.join(filter(None, (lowering.decoding(), remark)))}",
            weights=self.weights,
            float_bytes=self.before,
            code_bytes=after,
            parts=dict(self.parts),
            graph_bytes=lowering.graph_bytes(),
            bits=bits,
            predicted_sqnr=self.sqnr,
        )


class Lowered(Protocol):
    """What was lowered, as it is told."""

    def readers(self) -> str:
        """Return which operators read codes."""

    def decoding(self) -> str:
        """Return what a runtime does with the codes."""

    def graph_bytes(self) -> int:
        """Return what operators, names and shapes add to the file."""
