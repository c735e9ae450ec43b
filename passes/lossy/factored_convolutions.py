"""Convolutions as candidates of `factorize`: two or three smaller ones in a row, the original operator the last."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.authoring import Context
from graphopt.backend import Array
from graphopt.summary import node_macs

from ..analyses.finite_weights import finite_matrix
from ..analyses.layer_rows import takes_rows
from ..analyses.linear_layers import LinearLayer
from ..analyses.second_moments import group_count, inputs_of
from ..solvers.blas_threads import threads_for
from .convolution_forms import Division, Piece, Shape, Solution, Way, forms_of, ways_of, ways_with_errors
from .factor_forms import Curve, Level, Method, Reads, steadied
from .integer_weights import release, weight_tensor
from .layer_bias import bias_for_mean, bias_of_layer
from .prune_aims import Aims

_RULE = "factorize"


@dataclass(frozen=True, eq=False)
class Convolution:
    """A Conv or ConvTranspose with a constant weight that nothing else reads.

    Attributes:
        layer: The layer.
        form: Which forms it may take: ``auto``, ``channel``, ``spatial`` or ``tucker``.
        method: How it is judged.
    """

    layer: LinearLayer
    form: str
    method: Method

    @property
    def nodes(self) -> Sequence[ir.Node]:
        """The operator."""
        return [self.layer.node]

    @property
    def kind(self) -> tuple[object, ...]:
        """Operator, sizes, groups and steps."""
        strides = self.layer.node.attributes.get_ints("strides", [])
        return self.layer.node.op_type, self.layer.dims, group_count(self.layer), tuple(strides)

    @property
    def layers(self) -> int:
        """One."""
        return 1

    @property
    def parameters(self) -> int:
        """How many weights it has."""
        return math.prod(self.layer.dims)

    @property
    def macs(self) -> float:
        """Multiplications of a run; those of one position where shapes are unknown."""
        return float(node_macs(self.layer.node) or self.parameters)

    def curve(self, reads: Reads, ctx: Context) -> Curve:
        """Return all forms and ranks that save weights and multiplications.

        Raises:
            PassError: The weight holds NaN or infinity.
        """
        matrix, shape = finite_matrix(self.layer), Shape.of(self.layer)
        seen, bias = reads(self.layer), bias_of_layer(self.layer, ctx)
        moments = None if seen is None else steadied(seen.second if bias is None else seen.covariance, seen.rows)
        with threads_for(inputs_of(self.layer)):
            found = ways_with_errors(shape, self.form, matrix, moments, ctx.target.width_multiple)
        levels = [Level("whole", (), 0.0, self.parameters, self.macs)]
        levels += [self._level(way, error, shape) for way, error in found]

        def approximate(place: int) -> Mapping[str, Array]:
            way = way_of(levels[place])
            with threads_for(inputs_of(self.layer)):
                near = Division(shape, way.first, matrix, moments).solve(way).matrix
            contents = {self.layer.weight.name or "": self.layer.from_matrix(near)}
            if seen is not None and bias is not None and bias.stored is not None:
                contents[bias.stored.name or ""] = bias_for_mean(bias, matrix - near, seen.mean)
            return contents

        return Curve(levels, approximate)

    def apply(self, level: Level, aims: Aims | None, ctx: Context) -> float:
        """Put smaller convolutions in its place, and return the share of its output's power that is lost."""
        layer, way = self.layer.now(), way_of(level)
        aim = aims.of(layer) if aims is not None else None
        weight = finite_matrix(layer) if aim is None else aim.weight
        moments = None if aim is None else aim.second_moment
        with threads_for(inputs_of(layer)):
            division = Division(Shape.of(layer), way.first, weight, moments)
            solution = division.solve(way)
        with ctx.rewriter.edit(_RULE, layer.node):
            put(layer, way, solution, ctx)
            if aim is not None and aim.bias is not None:
                aim.bias.shift(aim.shift(solution.matrix), ctx)
        return solution.error / division.power if division.power > 0 else 0.0

    def outline(self, level: Level) -> list[tuple[str, tuple[int, ...], dict[str, Any]]]:
        """Return operator, sizes of the weight and attributes of what stands for it at a level, in order."""
        pieces = way_of(level).pieces(Shape.of(self.layer))
        last = self.layer.node.op_type
        found = []
        for place, piece in enumerate(pieces):
            op_type = last if place + 1 == len(pieces) else "Conv"
            found.append((op_type, _dims(self.layer, piece, op_type), attributes_of(self.layer, piece, op_type)))
        return found

    def _level(self, way: Way, error: float, shape: Shape) -> Level:
        pieces = way.pieces(shape)
        macs = self.macs * shape.macs(pieces) / shape.macs()
        return Level(way.form, way.ranks, error, shape.parameters(pieces), macs, plan=way)


def candidate_of(layer: LinearLayer, form: str, method: Method, ctx: Context) -> Convolution | str:
    """Return a convolution as a candidate, or why it is left as it is.

    Args:
        layer: A Conv or ConvTranspose whose weight nothing else reads.
        form: ``auto``, ``channel``, ``spatial`` or ``tucker``.
        method: How it is judged.
        ctx: The target.
    """
    groups, dims = group_count(layer), layer.dims
    if layer.node.op_type == "ConvTranspose":
        if groups > 1 or not takes_rows(layer):
            return "transposed convolutions in groups are not factored"
    elif dims[0] % groups:
        return "their channels do not divide into their groups"
    elif dims[1] == 1 and groups > 1:
        return "each of their channels is by itself (depthwise): there are none to go through in common"
    if len(layer.weight.uses()) > 1:
        return "several convolutions share their weight"
    shape = Shape.of(layer)
    if not (forms := forms_of(shape, form)):
        return f"their kernels have no form `{form}`"
    if not any(ways_of(shape, one, first, ctx.target.width_multiple) for one, first in forms):
        return "fewer channels in between would make them no smaller"
    return Convolution(layer, form, method)


def way_of(level: Level) -> Way:
    """Return the form and ranks of a level of a convolution."""
    assert isinstance(level.plan, Way), "a level of a convolution"
    return level.plan


def put(layer: LinearLayer, way: Way, solution: Solution, ctx: Context) -> None:
    """Put the convolutions of a form in the place of one; what has strides, pads and dilations keeps them.

    The operator itself becomes the last, so that its name, its output, its bias and where it comes from stay.

    Args:
        layer: The layer.
        way: The form and its ranks.
        solution: The weights of the pieces.
        ctx: Where edits are made.
    """
    rewriter, node = ctx.rewriter, layer.node
    dtype, read = weight_tensor(layer).dtype, layer.input
    pieces = way.pieces(Shape.of(layer))
    for place, (piece, weight) in enumerate(zip(pieces, solution.weights, strict=True)):
        is_last = place + 1 == len(pieces)
        op_type = node.op_type if is_last else "Conv"
        laid = weight if op_type == "Conv" else np.swapaxes(weight, 0, 1)
        content = ir.Tensor(np.ascontiguousarray(laid).astype(dtype.numpy()), dtype=dtype)
        constant = rewriter.const(content, f"{layer.weight.name}_{place}", near=node)
        attributes = attributes_of(layer, piece, op_type)
        if not is_last:
            made = rewriter.make("Conv", [read, constant], attributes, sources=[node], name="factor")
            read = rewriter.insert(made, before=node).outputs[0]
            continue
        rewriter.set_input(node, 0, read)
        rewriter.set_input(node, 1, constant)
        for name in {*attributes, *_WINDOW} & {*attributes, *node.attributes}:
            rewriter.set_attribute(node, name, attributes.get(name))
    release(rewriter, layer.weight)


_WINDOW = ("kernel_shape", "strides", "pads", "dilations", "auto_pad")


def attributes_of(layer: LinearLayer, piece: Piece, op_type: str) -> dict[str, Any]:
    """Return the attributes of a piece of a layer.

    Along axes in which it moves as the whole does it has that one's strides, pads and dilations; along the others it
    is one position wide and leaves sizes as they are, which automatic padding does of itself.
    """
    own = layer.node.attributes
    if op_type == "ConvTranspose":
        return {name: own[name] for name in own}  # it is the whole, but for its inputs
    rank = len(layer.dims) - 2
    kernel = [layer.dims[2 + axis] if axis in piece.along else 1 for axis in range(rank)]
    found: dict[str, Any] = {"kernel_shape": kernel}
    groups = group_count(layer)
    if groups > 1:
        found["group"] = groups
    if not piece.along:
        return found
    for name in ("strides", "dilations"):
        if name in own:
            given = own[name].as_ints()
            found[name] = [given[axis] if axis in piece.along else 1 for axis in range(rank)]
    auto = own.get_string("auto_pad", "NOTSET")
    if auto != "NOTSET":
        found["auto_pad"] = auto
    elif "pads" in own:
        pads = own["pads"].as_ints()
        found["pads"] = [pads[side] if side % rank in piece.along else 0 for side in range(2 * rank)]
    return found


def _dims(layer: LinearLayer, piece: Piece, op_type: str) -> tuple[int, ...]:
    kernel = tuple(size if axis in piece.along else 1 for axis, size in enumerate(layer.dims[2:]))
    if op_type == "ConvTranspose":
        return (piece.inputs, piece.outputs, *kernel)
    return (piece.outputs * group_count(layer), piece.inputs, *kernel)
