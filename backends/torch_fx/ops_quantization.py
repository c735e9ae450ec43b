"""Operators that quantize, and the products of ONNX's own set that are computed in integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from .operators import Operator, Table
from .ops_products import conv
from .quantizing import codes_of, quantized, shifted, spread
from .tensors import onnx_dtype, torch_dtype

# Sums of products of codes stay whole in it for any length there is, and every device multiplies matrices of it.
_EXACT = torch.float64
_CODES_OF_A_BYTE = 255


def quantize_linear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
    input_types: Sequence[int] = (),
) -> Tensor:
    """Codes of numbers: divided by the scale, rounded to even, moved by the zero point, cut to what the type holds."""
    dtype = _code_dtype(output_dtype, input_types, zero_point)
    scaled = _scaled(x, scale, axis, block_size, precision)
    return quantized(scaled, _moved(zero_point, x, axis, block_size), dtype, saturate)


def fake_quantize_linear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
    input_types: Sequence[int] = (),
) -> Tensor:
    """The codes of `quantize_linear` as floats: with gradients straight through the rounding, and none beyond a cut.

    With what DequantizeLinear adds, the gradient of the scale is that of LSQ (Esser et al. 2020, "Learned Step Size
    Quantization"), that of the zero point LSQ+'s (Bhalgat et al. 2020), their gradient scales aside.
    """
    dtype = _code_dtype(output_dtype, input_types, zero_point)
    scaled = _scaled(x, scale, axis, block_size, precision)
    return codes_of(scaled, _moved(zero_point, x, axis, block_size), dtype, saturate)


def _code_dtype(output_dtype: int, input_types: Sequence[int], zero_point: Tensor | None) -> ir.DataType:
    known = input_types[2] if len(input_types) > 2 else 0
    return ir.DataType(output_dtype or known or _held_in(zero_point))


def _held_in(zero_point: Tensor | None) -> ir.DataType:
    """Return the type of codes whose zero point is of a type the model does not tell: what torch holds it in."""
    return ir.DataType.UINT8 if zero_point is None else onnx_dtype(zero_point.dtype)


def _scaled(x: Tensor, scale: Tensor, axis: int, block_size: int, precision: int) -> Tensor:
    dtype = torch_dtype(precision) if precision else scale.dtype
    if not dtype.is_floating_point or dtype.itemsize == 1:  # a power of two, or a whole number
        dtype = torch.float32
    return x.to(dtype) / spread(scale.to(dtype), x, axis, block_size)


def _moved(zero_point: Tensor | None, x: Tensor, axis: int, block_size: int) -> Tensor | None:
    return None if zero_point is None else spread(zero_point, x, axis, block_size)


def dequantize_linear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Tensor:
    """The numbers that codes stand for; codes and zero points may be floats, as they are while they are trained."""
    dtype = torch_dtype(output_dtype) if output_dtype else scale.dtype
    if dtype.itemsize == 1:
        dtype = torch.float32
    codes = shifted(x, _moved(zero_point, x, axis, block_size), dtype)
    return codes * spread(scale.to(dtype), x, axis, block_size)


def dynamic_quantize_linear(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of one byte over the range of a tensor and 0, with their scale and zero point."""
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    least = torch.minimum(x.min(), zero) if x.numel() else zero
    largest = torch.maximum(x.max(), zero) if x.numel() else zero
    scale = (largest - least) / _CODES_OF_A_BYTE
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero_point = (-least / scale).clamp(0, _CODES_OF_A_BYTE).round().to(torch.uint8)
    return quantized(x / scale, zero_point, ir.DataType.UINT8), scale, zero_point


def mat_mul_integer(
    a: Tensor, b: Tensor, a_zero_point: Tensor | None = None, b_zero_point: Tensor | None = None
) -> Tensor:
    """The product of matrices of codes, less their zero points, which may differ from row to row, column to column."""
    return product_of_codes(a, b, a_zero_point, b_zero_point).to(torch.int32)


def product_of_codes(a: Tensor, b: Tensor, a_zero_point: Tensor | None, b_zero_point: Tensor | None) -> Tensor:
    """Return the product of matrices of codes less their zero points, exactly."""
    by_row = None if a_zero_point is None else _by_row(a_zero_point, a)
    return shifted(a, by_row, _EXACT) @ shifted(b, b_zero_point, _EXACT)


def _by_row(parameter: Tensor, a: Tensor) -> Tensor:
    """Return what is given of each row of a matrix so that it goes with its elements."""
    if parameter.ndim != 1 or parameter.numel() == 1 or a.ndim < 2:
        return parameter
    return parameter.unsqueeze(-1)


def conv_integer(
    x: Tensor,
    w: Tensor,
    x_zero_point: Tensor | None = None,
    w_zero_point: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """The convolution of codes, less their zero points; what is padded stands for 0."""
    found = _convolved(
        shifted(x, x_zero_point, _EXACT),
        shifted(w, _by_filter(w_zero_point, w), _EXACT),
        auto_pad=auto_pad,
        dilations=dilations,
        group=group,
        kernel_shape=kernel_shape,
        pads=pads,
        strides=strides,
    )
    return found.to(torch.int32)


def _convolved(x: Tensor, w: Tensor, bias: Tensor | None = None, **attributes: Any) -> Tensor:
    """Return the convolution of whole numbers, exactly: GPUs may compute it by Fourier transforms, which round."""
    return conv(x, w, bias, **attributes).round()


def _by_filter(parameter: Tensor | None, w: Tensor) -> Tensor | None:
    return None if parameter is None else spread(parameter, w, 0, 0)


def q_linear_conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
    input_types: Sequence[int] = (),
) -> Tensor:
    """The convolution of codes, as codes; the bias has the scale of the input times that of the weight."""
    found = _convolved(
        shifted(x, x_zero_point, _EXACT),
        shifted(w, _by_filter(w_zero_point, w), _EXACT),
        None if bias is None else bias.to(_EXACT),
        auto_pad=auto_pad,
        dilations=dilations,
        group=group,
        kernel_shape=kernel_shape,
        pads=pads,
        strides=strides,
    )
    factor = spread(x_scale * w_scale / y_scale, found, 1, 0)
    dtype = ir.DataType((input_types[7] if len(input_types) > 7 else 0) or _held_in(y_zero_point))
    return quantized(found.to(factor.dtype) * factor, y_zero_point, dtype)


def q_linear_mat_mul(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    *,
    input_types: Sequence[int] = (),
) -> Tensor:
    """The product of matrices of codes, as codes."""
    found = product_of_codes(a, b, a_zero_point, b_zero_point)
    by_row, to_row = (_by_row(one.to(torch.float32), found) for one in (a_scale, y_scale))
    factor = by_row * b_scale.to(torch.float32) / to_row
    dtype = ir.DataType((input_types[7] if len(input_types) > 7 else 0) or _held_in(y_zero_point))
    return quantized(found.to(torch.float32) * factor, _by_row(y_zero_point, found), dtype)


OPERATORS: Table = {
    "ConvInteger": Operator(conv_integer),
    "DequantizeLinear": Operator(dequantize_linear),
    "DynamicQuantizeLinear": Operator(dynamic_quantize_linear),
    "MatMulInteger": Operator(mat_mul_integer),
    "QLinearConv": Operator(q_linear_conv),
    "QLinearMatMul": Operator(q_linear_mat_mul),
    "QuantizeLinear": Operator(quantize_linear),
}
CONTRIB: Table = {
    "DequantizeLinear": Operator(dequantize_linear),
    "QuantizeLinear": Operator(quantize_linear),
}
DIFFERENTIABLE: Table = {"QuantizeLinear": Operator(fake_quantize_linear)}
"""What stands in for operators of ONNX and of com.microsoft where gradients are to go through them."""
