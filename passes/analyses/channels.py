"""Linear operators channel by channel: which constants are one number for each, and how the weight takes them in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array

FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
_CONVOLUTIONS = ("Conv", "ConvTranspose")


@dataclass(frozen=True, eq=False)
class ChannelView:
    """A Conv, ConvTranspose, Gemm or MatMul with a constant floating-point weight as its second input.

    Attributes:
        node: The operator.
        weight: Its weight.
        tensor: What the weight holds.
        dims: Shape of the weight.
    """

    node: ir.Node
    weight: ir.Value
    tensor: ir.TensorProtocol
    dims: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of weight, inputs and outputs."""
        return self.tensor.dtype.numpy()

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        match self.node.op_type:
            case "Conv":
                return self.dims[0]
            case "ConvTranspose":
                return self.dims[1] * self._groups
            case _:
                return self.dims[self._output_axis]

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        match self.node.op_type:
            case "Conv":
                return self.dims[1] * self._groups
            case "ConvTranspose":
                return self.dims[0]
            case _:
                return self.dims[self._input_axis]

    @property
    def axis(self) -> int:
        """Axis of the channels in input and output, counted from the end, so negative."""
        return 1 - len(self.dims) if self.node.op_type in _CONVOLUTIONS else -1

    @property
    def least_rank(self) -> int:
        """The least rank the output may have."""
        if self.node.op_type in _CONVOLUTIONS:
            return len(self.dims)
        if self.node.op_type == "Gemm":
            return 2
        x = self.node.inputs[0]
        rank = len(x.shape) if x is not None and x.shape is not None else None
        # A vector times a matrix is a vector.
        return max(rank, len(self.dims)) - int(rank == 1) if rank is not None else len(self.dims) - 1

    @property
    def weight_is_shared(self) -> bool:
        """Whether anything else reads the weight, so that a changed copy would make the model larger."""
        return len(self.weight.uses()) > 1 or self.weight.is_graph_output()

    def over_outputs(self, factor: Array) -> Array:
        """Return a factor, a scalar or one for each output channel, in a shape that multiplies the weight."""
        if factor.ndim == 0:
            return factor
        ones = [1] * (len(self.dims) - 2)
        match self.node.op_type:
            case "Conv":
                return factor.reshape(-1, 1, *ones)
            case "ConvTranspose":
                # The weight is [inputs, outputs / groups, ...]: each input belongs to one group of outputs.
                return np.repeat(factor.reshape(self._groups, -1), self.dims[0] // self._groups, 0).reshape(
                    self.dims[0], -1, *ones
                )
            case _:
                return _along(factor, self._output_axis, len(self.dims))

    def over_inputs(self, factor: Array) -> Array:
        """Return a factor, a scalar or one for each input channel, in a shape that multiplies the weight."""
        if factor.ndim == 0:
            return factor
        ones = [1] * (len(self.dims) - 2)
        match self.node.op_type:
            case "Conv":
                # The weight is [outputs, inputs / groups, ...].
                return np.repeat(factor.reshape(self._groups, -1), self.dims[0] // self._groups, 0).reshape(
                    self.dims[0], -1, *ones
                )
            case "ConvTranspose":
                return factor.reshape(-1, 1, *ones)
            case _:
                return _along(factor, self._input_axis, len(self.dims))

    def scaled(self, factor: Array) -> Array | None:
        """Return the weight times a factor shaped for it, rounded once, or None where that leaves its dtype's range."""
        weight = self.tensor.numpy()
        result = np.empty_like(weight, order="C")
        with np.errstate(all="ignore"):
            # Computed in float64 in small pieces: no copy of the weight in that dtype is ever there.
            np.multiply(weight, factor, out=result, casting="unsafe", dtype=np.float64)
        kept = _keeps_range(weight, result, factor)
        self.release()
        return result if kept else None

    def release(self) -> None:
        """Let the system take back the memory of the weight's pages, if they are those of a file."""
        release = getattr(self.tensor, "release", None)
        if release is not None:
            release()

    def bias_vector(self, bias: ir.Value | None) -> Array | None:
        """Return a bias, the operator's own or one added behind it, as float64 if it is one number for each channel."""
        if self.node.op_type in _CONVOLUTIONS:
            return per_channel(bias, self.outputs, -1, 1)
        return per_channel(bias, self.outputs, self.axis, self.least_rank)

    @property
    def _groups(self) -> int:
        return self.node.attributes.get_int("group", 1)

    @property
    def _output_axis(self) -> int:
        if self.node.op_type == "Gemm":
            return 0 if self.node.attributes.get_int("transB", 0) else 1
        return len(self.dims) - 1

    @property
    def _input_axis(self) -> int:
        if self.node.op_type == "Gemm":
            return 1 if self.node.attributes.get_int("transB", 0) else 0
        return len(self.dims) - 2


def view_of(node: ir.Node) -> ChannelView | None:
    """Return the channels of a linear operator, or None where its weight is no floating-point constant it can scale."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    tensor = walk.constant_tensor(weight)
    if weight is None or tensor is None or tensor.dtype not in FLOATS or tensor.size == 0:
        return None
    dims = walk.dims(tensor)
    least = 3 if node.op_type in _CONVOLUTIONS else 2
    return ChannelView(node, weight, tensor, dims) if len(dims) >= least else None


def per_channel(value: ir.Value | None, channels: int, axis: int, rank: int) -> Array | None:
    """Return a constant as float64 if it broadcasts along the channels only: a scalar, or a vector of all channels.

    Args:
        value: What may be such a constant.
        channels: Number of channels.
        axis: Axis of the channels, counted from the end.
        rank: The least rank of what it is broadcast with; more axes than these it must not add.
    """
    tensor = walk.constant_tensor(value)
    if tensor is None or tensor.dtype not in FLOATS or tensor.size not in (1, channels):
        return None
    dims = walk.dims(tensor)
    if len(dims) > rank:
        return None
    if tensor.size == 1:
        return tensor.numpy().astype(np.float64).reshape(())
    at = len(dims) + axis
    if at < 0 or dims[at] != channels:
        return None
    return tensor.numpy().astype(np.float64).reshape(-1)


def rounded(content: Array, dtype: np.dtype[Any]) -> Array | None:
    """Return float64 numbers in another dtype, or None where finite ones would become infinite."""
    with np.errstate(all="ignore"):
        result = content.astype(dtype)
    return result if np.isfinite(result.astype(np.float64)).all() or not np.isfinite(content).all() else None


def _along(factor: Array, axis: int, rank: int) -> Array:
    shape = [1] * rank
    shape[axis] = -1
    return factor.reshape(shape)


def _keeps_range(weight: Array, result: Array, factor: Array) -> bool:
    """Return whether no number overflowed, and half-precision ones kept their digits."""
    extremes = (float(result.min()), float(result.max()))
    if not np.isfinite(extremes).all():
        return False
    if result.dtype != np.float16:
        return True
    # Below 6e-5 a float16 loses digits. That is no loss next to a larger weight of the same channel.
    exact = weight.astype(np.float64) * factor
    error = np.abs(exact - result.astype(np.float64))
    return bool(error.max() <= float(np.finfo(np.float16).eps) * np.abs(exact).max())
