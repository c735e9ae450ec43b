"""Constants in integer codes while they train, with their scales and zero points."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from graphopt import walk
from graphopt.backend import Array
from graphopt.bias_scales import bias_scales
from graphopt.stored_weights import as_floats

from ..held import ADAPTERS, Held
from .constant_kinds import BIAS, SCALE, WEIGHT, ZERO_POINT
from .constant_readers import Reader, readers_of
from .crossings import crossings_of
from .kept_constants import Kept
from .kept_floats import NO_MATRIX, adapter_for, takes_adapter
from .latent_codes import FLOAT_CODES, CodeGrid, LatentCodes, grid_of
from .masks import kept_of_codes, pattern_of
from .scales import LearnedScale, LearnedZeroPoint, gradient_factor, product_of_scales
from .surgery import Surgery
from .trainable import UNREAD, Trainable

_DTYPES: Mapping[ir.DataType, torch.dtype] = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.DOUBLE: torch.float64,
}
_BYTE_HIGHEST = 255.0  # what a QuantizeLinear without a zero point makes at the most
_MOVED = "they are codes that are moved before they meet their scales"
_CONVERTERS = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class _Coding:
    """How codes are read: constants, and how these lie along the codes."""

    scale: ir.Value
    zero_point: ir.Value | None
    axis: int = 1
    block: int = 0
    layout: tuple[int, ...] | None = None

    def grid(self, codes: Array, dtype: ir.DataType) -> CodeGrid:
        """Return the grid of such codes."""
        return replace(grid_of(codes, dtype, self.axis, self.block), layout=self.layout)


def keep_scales(surgery: Surgery, model: ir.Model, found: Sequence[Trainable], left: Counter[str]) -> Iterator[Kept]:
    """Let scales and zero points train, and yield them, with those of biases that are products of two others."""
    products = bias_scales(model)
    fixed = {value for one in products.values() if one.factors is None for value in one.involved}
    learned: dict[ir.Value, Kept] = {}
    for one in found:
        if one.kind not in (SCALE, ZERO_POINT) or one.value in products:
            continue
        reason = _unfit(one, surgery, fixed)
        if reason is not None:
            left[reason] += 1
            continue
        learned[one.value] = _keep_scale(surgery, one) if one.kind == SCALE else _keep_zero_point(surgery, one)
    yield from learned.values()
    for product in products.values():
        if product.factors is not None and any(factor in learned for factor in product.factors):
            yield _keep_product(surgery, product.scale, product.factors, learned)


def keep_codes(
    surgery: Surgery,
    model: ir.Model,
    found: Sequence[Trainable],
    held: Held,
    scales: Mapping[ir.Value, Kept],
    left: Counter[str],
) -> Iterator[Kept]:
    """Let weights and biases in codes train, each behind a rounding, and yield them.

    A bias whose scale moves is rounded anew even where it does not train.
    """
    chosen = {one.value: one for one in found if one.kind not in (SCALE, ZERO_POINT) and _is_coded(one.tensor)}
    moved = {value: one for value, one in _moved_biases(surgery, model, scales) if value not in chosen}
    for one in (*chosen.values(), *moved.values()):
        coding = _coding_of(one)
        if isinstance(coding, str):
            left[coding] += 1
        elif one.kind == WEIGHT and ADAPTERS in held.train and not takes_adapter(one):
            left[NO_MATRIX] += 1
        elif surgery.path(one.value) is None or not surgery.has(coding.scale, coding.zero_point):
            left[UNREAD] += 1
        else:
            yield _keep_codes(surgery, one, coding, held, scales, trains=one.value in chosen)


def _unfit(one: Trainable, surgery: Surgery, fixed: set[ir.Value]) -> str | None:
    """Return why a scale or zero point cannot learn, or None."""
    if surgery.path(one.value) is None:
        return UNREAD
    if one.value in fixed:
        return "biases in int32 have scales of their own, which go with these"
    if one.kind == SCALE and not (as_floats(one.tensor) > 0).all() and _converts(one):
        return "they are scales that are not above zero"
    return None


def _converts(one: Trainable) -> bool:
    return any(reader.node.op_type in _CONVERTERS for reader in one.readers)


def _keep_scale(surgery: Surgery, one: Trainable) -> Kept:
    factor = max((_factor_of(one, reader.node) for reader in one.readers), default=1.0)
    module = LearnedScale(as_floats(one.tensor), _DTYPES[one.tensor.dtype], factor)
    surgery.at_start(one.value, module)
    return Kept(one.value, one.name, SCALE, module, lambda: {one.name: module.logarithm}, positive=_converts(one))


def _keep_zero_point(surgery: Surgery, one: Trainable) -> Kept:
    dtype = one.tensor.dtype
    low = float(-(2 ** (dtype.bitwidth - 1))) if dtype.is_signed() else 0.0
    high = low + 2**dtype.bitwidth - 1
    factor = max((_factor_of(one, reader.node) for reader in one.readers), default=1.0)
    module = LearnedZeroPoint(as_floats(one.tensor), low, high, factor)
    surgery.at_start(one.value, module)
    grid = CodeGrid(low, high)
    return Kept(one.value, one.name, ZERO_POINT, module, lambda: {one.name: module.shift}, grid=grid)


def _keep_product(
    surgery: Surgery, scale: ir.Value, factors: tuple[ir.Value, ir.Value], learned: Mapping[ir.Value, Kept]
) -> Kept:
    tensor = walk.constant_tensor(scale)
    assert tensor is not None, "a scale is constant"
    shape = walk.dims(tensor)
    now = [_now(surgery, value, learned) for value in factors]
    surgery.at_start(scale, product_of_scales, *factors, shape)

    def product() -> torch.Tensor:
        first, second = (one() for one in now)
        return product_of_scales(first, second.to(first.device), shape)

    return Kept(scale, surgery.name(scale), SCALE, product, dict, positive=True, factors=factors)


def _now(surgery: Surgery, value: ir.Value, kept: Mapping[ir.Value, Kept]) -> Callable[[], torch.Tensor]:
    """Return what gives a constant as it is by now, on the device the module is on."""
    known = kept.get(value)
    return known.now if known is not None else lambda: surgery.tensor(value)


def _factor_of(one: Trainable, node: ir.Node) -> float:
    """Return what the gradient of a scale is multiplied by, for what one operator reads it for."""
    value = node.inputs[0]
    if node.op_type not in _CONVERTERS or value is None:
        return 1.0
    codes = walk.constant_tensor(value)
    if codes is not None:
        grid = grid_of(np.asarray(codes.numpy()), codes.dtype, 0, 0) if _is_coded(codes) else None
        return gradient_factor(codes.size / one.tensor.size, grid.high if grid is not None else _BYTE_HIGHEST)
    sizes = [size for size in (value.shape or ())[1:] if isinstance(size, int)]
    return gradient_factor(math.prod(sizes) / one.tensor.size, _BYTE_HIGHEST)


def _is_coded(tensor: ir.TensorProtocol) -> bool:
    return tensor.dtype.is_integer() or tensor.dtype.bitwidth <= 8


def _moved_biases(
    surgery: Surgery, model: ir.Model, scales: Mapping[ir.Value, Kept]
) -> Iterator[tuple[ir.Value, Trainable]]:
    """Yield the codes whose scales are products that move."""
    crossings = crossings_of(model)
    for node in walk.every_node(model):
        if not walk.is_onnx_op(node, "DequantizeLinear") or len(node.inputs) < 2:
            continue
        codes, scale = node.inputs[0], node.inputs[1]
        known = scales.get(scale) if scale is not None else None
        if codes is not None and known is not None and known.factors and walk.constant_tensor(codes) is not None:
            yield codes, Trainable(codes, surgery.name(codes), BIAS, tuple(readers_of(codes, crossings)))


def _coding_of(one: Trainable) -> _Coding | str:
    """Return how a constant's codes are read, or why that cannot train."""
    if not one.tensor.dtype.is_integer() and one.tensor.dtype not in FLOAT_CODES:
        return f"they are codes in {str(one.tensor.dtype).lower()}, which torch does not round to"
    found = {_read_by(one, reader) for reader in one.readers}
    reason = next((answer for answer in found if isinstance(answer, str)), None)
    if reason is not None or len(found) != 1:
        return reason or "they are codes that are read by several scales"
    return found.pop()


def _read_by(one: Trainable, reader: Reader) -> _Coding | str:
    node = reader.dequantize
    if node is None:
        return "they are codes that something else than a DequantizeLinear reads"
    if node.op_type == "Mul":
        return _multiplied(one, reader, node)
    scale, zero_point = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    tensor = walk.constant_tensor(scale)
    if scale is None or tensor is None or (zero_point is not None and walk.constant_tensor(zero_point) is None):
        return "they are codes whose scale varies"
    if tensor.size > 1 and node.inputs[0] is not one.value:
        return _MOVED
    axis, block = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
    return _Coding(scale, zero_point, axis, block)


def _multiplied(one: Trainable, reader: Reader, node: ir.Node) -> _Coding | str:
    """Return how codes are read that are cast, laid out in blocks if need be, and multiplied by their scales."""
    path = reader.nodes[: reader.nodes.index(node)]
    layout = walk.dims(one.tensor)
    made = path[-1].outputs[0] if path else one.value
    scale = next((value for value in node.inputs if value is not made), None)
    tensor = walk.constant_tensor(scale)
    for view in path:
        if view.op_type == "Reshape":
            sizes = walk.constant_tensor(view.inputs[1])
            if sizes is None:
                return _MOVED
            layout = tuple(torch.empty(layout, device="meta").reshape(sizes.numpy().tolist()).shape)
        elif view.op_type != "Cast":
            return _MOVED
    if scale is None or tensor is None or np.broadcast_shapes(layout, walk.dims(tensor)) != layout:
        return "they are codes whose scale varies"
    return _Coding(scale, None, layout=layout)


def _keep_codes(
    surgery: Surgery,
    one: Trainable,
    coding: _Coding,
    held: Held,
    scales: Mapping[ir.Value, Kept],
    *,
    trains: bool,
) -> Kept:
    codes, dtype = np.asarray(one.tensor.numpy()), one.tensor.dtype
    grid = coding.grid(codes, dtype)
    numbers = as_floats(one.tensor)
    zero = None if coding.zero_point is None else grid.spread(_floats_of(coding.zero_point), numbers)
    centred = numbers if zero is None else numbers - zero
    start = centred * grid.spread(_floats_of(coding.scale), numbers)
    kept = None
    if one.kind == WEIGHT and held.zeros != "free" and grid.floats is None:
        kept = kept_of_codes(centred.numpy().astype(np.int32), on_purpose=held.zeros == "keep")
    adapter = adapter_for(one, held) if trains else None
    latent = LatentCodes(start, grid, kept, trains=trains, adapter=adapter)
    surgery.instead(one.value, latent, coding.scale, coding.zero_point)
    scale_now = _now(surgery, coding.scale, scales)

    def now() -> torch.Tensor:
        # What only tells sizes may stay on the CPU, and so may what is not trained.
        device = latent.latent.device
        zero_point = None if coding.zero_point is None else surgery.tensor(coding.zero_point).to(device)
        result: torch.Tensor = latent(scale_now().to(device), zero_point)
        return result

    def parameters() -> dict[str, nn.Parameter]:
        own = {one.name: latent.latent}
        return own if adapter is None else own | {f"{one.name}.A": adapter.A, f"{one.name}.B": adapter.B}

    return Kept(
        one.value,
        one.name,
        one.kind,
        now,
        parameters,
        zeros=None if kept is None else np.logical_not(kept),
        pattern=None if kept is None else pattern_of(centred.numpy()),
        zero_points=None if zero is None else zero.numpy(),
        grid=grid,
    )


def _floats_of(value: ir.Value) -> torch.Tensor:
    tensor = walk.constant_tensor(value)
    assert tensor is not None, "asked for constants"
    return as_floats(tensor)
