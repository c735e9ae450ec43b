"""Operators of com.microsoft on codes: computed on the numbers they stand for, and made codes again."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from .operators import Operator, Table
from .ops_pooling import average_pool
from .ops_quantization import dequantize_linear, dynamic_quantize_linear, product_of_codes, quantize_linear
from .quantizing import quantized, shifted


def _codes(y: Tensor, scale: Tensor, zero_point: Tensor | None, like: int) -> Tensor:
    """Return the codes of numbers, of the same type as those they were computed of."""
    return quantize_linear(y, scale, zero_point, axis=-1, output_dtype=like or int(ir.DataType.UINT8))


def q_linear_add(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor | None,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    input_types: Sequence[int] = (),
) -> Tensor:
    """The sum of codes, as codes."""
    y = dequantize_linear(a, a_scale, a_zero) + dequantize_linear(b, b_scale, b_zero)
    return _codes(y, scale, zero, input_types[0])


def q_linear_mul(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor | None,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    input_types: Sequence[int] = (),
) -> Tensor:
    """The product of codes, element by element, as codes."""
    y = dequantize_linear(a, a_scale, a_zero) * dequantize_linear(b, b_scale, b_zero)
    return _codes(y, scale, zero, input_types[0])


def q_linear_sigmoid(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    input_types: Sequence[int] = (),
) -> Tensor:
    """The logistic function of codes, as codes."""
    return _codes(torch.sigmoid(dequantize_linear(x, x_scale, x_zero)), scale, zero, input_types[0])


def q_linear_leaky_relu(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    alpha: float = 0.01,
    input_types: Sequence[int] = (),
) -> Tensor:
    """LeakyRelu of codes, as codes."""
    y = dequantize_linear(x, x_scale, x_zero)
    return _codes(torch.where(y < 0, y * alpha, y), scale, zero, input_types[0])


def q_linear_softmax(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    axis: int = -1,
    opset: int,
    input_types: Sequence[int] = (),
) -> Tensor:
    """Softmax of codes, as codes; before version 13 of it over all axes from one on."""
    y = dequantize_linear(x, x_scale, x_zero)
    rows = y.flatten(axis % y.ndim) if opset < 13 else y.movedim(axis, -1)  # since version 13: along one axis
    y = rows.softmax(-1).reshape(y.shape) if opset < 13 else rows.softmax(-1).movedim(-1, axis)
    return _codes(y, scale, zero, input_types[0])


def q_linear_where(
    condition: Tensor,
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    y: Tensor,
    y_scale: Tensor,
    y_zero: Tensor | None,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    input_types: Sequence[int] = (),
) -> Tensor:
    """Codes of one tensor or of another, as codes."""
    chosen = torch.where(condition, dequantize_linear(x, x_scale, x_zero), dequantize_linear(y, y_scale, y_zero))
    return _codes(chosen, scale, zero, input_types[1])


def q_linear_concat(scale: Tensor, zero: Tensor, *parts: Tensor, axis: int, input_types: Sequence[int] = ()) -> Tensor:
    """Codes joined along an axis; each part comes with its scale and zero point."""
    joined = [dequantize_linear(*parts[start : start + 3]) for start in range(0, len(parts), 3)]
    return _codes(torch.cat(joined, axis), scale, zero, input_types[1])


def q_linear_global_average_pool(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    scale: Tensor,
    zero: Tensor,
    *,
    channels_last: int = 0,
    input_types: Sequence[int] = (),
) -> Tensor:
    """The mean of each channel of codes, as codes."""
    y = dequantize_linear(x, x_scale, x_zero)
    places = list(range(1, y.ndim - 1) if channels_last else range(2, y.ndim))
    return _codes(y.mean(places, keepdim=True), scale, zero, input_types[0])


def q_linear_average_pool(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    channels_last: int = 0,
    count_include_pad: int = 0,
    kernel_shape: list[int],
    pads: list[int] | None = None,
    strides: list[int] | None = None,
    input_types: Sequence[int] = (),
) -> Tensor:
    """AveragePool of codes, as codes."""
    y = dequantize_linear(x, x_scale, x_zero)
    y = average_pool(
        y.movedim(-1, 1) if channels_last else y,
        auto_pad=auto_pad,
        ceil_mode=ceil_mode,
        count_include_pad=count_include_pad,
        kernel_shape=kernel_shape,
        pads=pads,
        strides=strides,
    )
    return _codes(y.movedim(1, -1) if channels_last else y, scale, zero, input_types[0])


def q_linear_reduce_mean(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    axes: list[int] | None = None,
    keepdims: int = 1,
    input_types: Sequence[int] = (),
) -> Tensor:
    """Means of codes along axes, as codes."""
    y = dequantize_linear(x, x_scale, x_zero)
    return _codes(y.mean(axes or list(range(y.ndim)), keepdim=bool(keepdims)), scale, zero, input_types[0])


def q_gemm(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    c: Tensor | None = None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    input_types: Sequence[int] = (),
) -> Tensor:
    """The product of matrices of codes plus a bias of the same scale: as codes, or as numbers without a scale."""
    left = shifted(a, a_zero, torch.float64)
    # What is given of each column of the result is given of each row of a transposed factor.
    right = shifted(b, b_zero.unsqueeze(-1) if transB and b_zero.ndim == 1 else b_zero, torch.float64)
    found = (left.T if transA else left) @ (right.T if transB else right)
    found = found + c if c is not None else found
    y = found.to(torch.float32) * (alpha * a_scale * b_scale)
    return y if scale is None else quantized(y / scale, zero, ir.DataType(input_types[0]))


def mat_mul_integer_to_float(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None = None,
    b_zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The product of matrices of codes as numbers, plus a bias."""
    y = product_of_codes(a, b, a_zero, b_zero).to(a_scale.dtype) * (a_scale * b_scale)
    return y if bias is None else y + bias


def dynamic_quantize_mat_mul(
    a: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """The product of a matrix, quantized over its range, and one of codes, as numbers, plus a bias."""
    codes, scale, zero = dynamic_quantize_linear(a)
    return mat_mul_integer_to_float(codes, b, scale, b_scale, zero, b_zero, bias)


CONTRIB: Table = {
    "DynamicQuantizeMatMul": Operator(dynamic_quantize_mat_mul),
    "MatMulIntegerToFloat": Operator(mat_mul_integer_to_float),
    "QGemm": Operator(q_gemm),
    "QLinearAdd": Operator(q_linear_add),
    "QLinearAveragePool": Operator(q_linear_average_pool),
    "QLinearConcat": Operator(q_linear_concat),
    "QLinearGlobalAveragePool": Operator(q_linear_global_average_pool),
    "QLinearLeakyRelu": Operator(q_linear_leaky_relu),
    "QLinearMul": Operator(q_linear_mul),
    "QLinearReduceMean": Operator(q_linear_reduce_mean),
    "QLinearSigmoid": Operator(q_linear_sigmoid),
    "QLinearSoftmax": Operator(q_linear_softmax),
    "QLinearWhere": Operator(q_linear_where),
}
