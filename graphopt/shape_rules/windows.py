"""Shapes of what looks at neighbourhoods, of normalization, quantization, recurrence, attention and sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from graphopt import dims as d
from graphopt.dims import Size
from graphopt.shape_rules.shape_facts import Call, Contradiction, Dims, Rule, axis_of

INT64, INT32, FLOAT, UINT8 = ir.DataType.INT64, ir.DataType.INT32, ir.DataType.FLOAT, ir.DataType.UINT8

# Convolutions and pools


def _extents(call: Call, sides: Sequence[Size], kernel: Sequence[Size | None]) -> list[Size | None]:
    """Return how many places a window has along each axis."""
    count = len(sides)
    strides, dilations = call.integers("strides") or (1,) * count, call.integers("dilations") or (1,) * count
    pads, auto = call.integers("pads") or (0,) * (2 * count), call.text("auto_pad", "NOTSET")
    result: list[Size | None] = []
    for i, (side, width) in enumerate(zip(sides, kernel, strict=True)):
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            result.append(d.ceildiv(side, strides[i]))
            continue
        if width is None:
            result.append(None)
            continue
        padding = 0 if auto == "VALID" else pads[i] + pads[i + count]
        room = side + padding - ((width - 1) * dilations[i] + 1)
        before = 0 if auto == "VALID" else pads[i]
        ceil = bool(call.integer("ceil_mode"))
        result.append(_windows(room, side, before, strides[i]) if ceil else d.floordiv(room, strides[i]) + 1)
    return [None if size is None else d.as_dimension(size) for size in result]


def _windows(room: Size, side: Size, before: int, stride: int) -> Size | None:
    """Return how many windows fit where the last may stick out; whether one may lie in the padding is not settled."""
    count = d.ceildiv(room, stride) + 1
    last = (count - 1) * stride
    return count if stride == 1 or d.at_most(last - (side + before), -1) else None


def conv(call: Call, data: int = 0, weight: int = 1, dtype: ir.DataType | None = None) -> None:
    """One channel for each filter; sides by kernel, stride, dilation and padding."""
    dims, filters = call.dims(data), call.dims(weight)
    if dims is None:
        return call.give([None] * len(filters) if filters is not None else None, dtype)
    if filters is None:
        return call.give([dims[0], *[None] * (len(dims) - 1)], dtype)
    if len(filters) != len(dims):
        raise Contradiction(f"filters of rank {len(filters)} over a tensor of rank {len(dims)}")
    if d.differ(dims[1], filters[1] * call.integer("group", 1)):
        raise Contradiction(f"{dims[1]} channels, but filters of {filters[1]} in {call.integer('group', 1)} groups")
    kernel = call.integers("kernel_shape") or filters[2:]
    return call.give([dims[0], filters[0], *_extents(call, dims[2:], kernel)], dtype)


def quantized_conv(call: Call) -> None:
    """A convolution with a scale and zero point behind data and filters."""
    conv(call, 0, 3, call.dtype(7))


def integer_conv(call: Call) -> None:
    """A convolution of integers."""
    conv(call, 0, 1, INT32)


def conv_transpose(call: Call) -> None:
    """The sides a convolution would make the input from."""
    dims, filters = call.dims(0), call.dims(1)
    if dims is None or filters is None:
        return call.give([None] * len(dims) if dims is not None else None)
    sides, count = dims[2:], len(dims) - 2
    channels = filters[1] * call.integer("group", 1)
    shape = call.integers("output_shape")
    if shape is not None:
        return call.give([dims[0], channels, *shape[-count:]])
    kernel = call.integers("kernel_shape") or filters[2:]
    strides, dilations = call.integers("strides") or (1,) * count, call.integers("dilations") or (1,) * count
    pads, extra = call.integers("pads") or (0,) * (2 * count), call.integers("output_padding") or (0,) * count
    auto = call.text("auto_pad", "NOTSET")
    result: list[Size | None] = []
    for i, side in enumerate(sides):
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            result.append(side * strides[i])
            continue
        padding = 0 if auto == "VALID" else pads[i] + pads[i + count]
        result.append((side - 1) * strides[i] + extra[i] + (kernel[i] - 1) * dilations[i] + 1 - padding)
    return call.give([dims[0], channels, *(None if n is None else d.as_dimension(n) for n in result)])


def pool(call: Call) -> None:
    """A window over each side; channels stay. Indices, where wanted, are int64."""
    dims, kernel = call.dims(), call.integers("kernel_shape")
    if dims is None:
        return call.give(None)
    if kernel is None or len(kernel) != len(dims) - 2:
        return call.give([*dims[:2], *[None] * (len(dims) - 2)])
    result = [*dims[:2], *_extents(call, dims[2:], kernel)]
    call.give(result)
    return call.give(result, INT64, at=1)


def global_pool(call: Call) -> None:
    """Sides of 1."""
    dims = call.dims()
    call.give([*dims[:2], *[1] * (len(dims) - 2)] if dims is not None else None)


def roi_align(call: Call) -> None:
    """A small picture for each region."""
    dims, rois = call.dims(0), call.dims(1)
    channels, count = dims[1] if dims is not None else None, rois[0] if rois is not None else None
    call.give([count, channels, call.integer("output_height", 1), call.integer("output_width", 1)])


def max_roi_pool(call: Call) -> None:
    """A small picture for each region."""
    dims, rois, shape = call.dims(0), call.dims(1), call.integers("pooled_shape") or (None, None)
    call.give([rois[0] if rois is not None else None, dims[1] if dims is not None else None, *shape])


# Resampling


def resize(call: Call) -> None:
    """The sizes given, or each dimension times its scale, rounded down."""
    dims = call.dims()
    if dims is None:
        return call.give(None)
    axes = tuple(axis_of(axis, len(dims)) for axis in call.integers("axes") or range(len(dims)))
    result: list[Size | None] = list(dims)
    plain = call.text("coordinate_transformation_mode") != "tf_crop_and_resize"
    plain = plain and call.text("keep_aspect_ratio_policy", "stretch") == "stretch"
    sizes = call.sizes(3) if call.has(3) else None
    scales = call.constant(1 if len(call.node.inputs) == 2 else 2) if not call.has(3) else None
    given = call.attribute("scales")
    if given is not None:
        scales = np.asarray(given.as_floats(), np.float32)
    for i, axis in enumerate(axes):
        if sizes is not None and len(sizes) == len(axes) and plain:
            result[axis] = d.as_dimension(sizes[i])
        elif scales is not None and scales.size == len(axes) and plain:
            result[axis] = _scaled(dims[axis], scales.reshape(-1)[i])
        else:
            result[axis] = None
    return call.give(result)


def _scaled(dim: Size, scale: np.float32) -> Size | None:
    """Return a dimension times a scale, where every way of rounding it gives the same."""
    if scale == int(scale):
        return dim * int(scale)
    inverse = 1 / float(scale)
    if inverse == int(inverse) and int(inverse) & (int(inverse) - 1) == 0:
        return d.floordiv(dim, int(inverse))
    if not isinstance(dim, int):
        return None
    ways = {int(np.floor(np.float32(dim) * scale)), int(np.floor(dim * float(scale)))}
    return ways.pop() if len(ways) == 1 else None


def grid_sample(call: Call) -> None:
    """The sides of the grid."""
    dims, grid = call.dims(0), call.dims(1)
    call.give([*dims[:2], *grid[1:-1]] if dims is not None and grid is not None else None)


# Normalization


def batch_normalization(call: Call) -> None:
    """The shape of its input; statistics are as long as there are channels."""
    call.give(call.dims())
    channels = call.dims(3) or call.dims(1)
    for at in range(1, len(call.node.outputs)):
        call.give(channels, at=at)


def layer_normalization(call: Call) -> None:
    """The shape of its input; statistics have a 1 for each axis normalized."""
    dims = call.dims()
    call.give(dims)
    if dims is not None and len(call.node.outputs) > 1:
        axis = axis_of(call.integer("axis", -1), len(dims))
        kept = [*dims[:axis], *[1] * (len(dims) - axis)]
        stash = ir.DataType(call.integer("stash_type", FLOAT.value))
        for at in range(1, len(call.node.outputs)):
            call.give(kept, stash, at=at)


def dropout(call: Call) -> None:
    """The shape of its input, twice."""
    call.give(call.dims())
    call.give(call.dims(), at=1)


# Quantization


def quantize(call: Call) -> None:
    """The shape of its input; the dtype of the zero point."""
    wanted = call.integer("output_dtype")
    dtype = call.dtype(2) if call.has(2) else ir.DataType(wanted) if wanted else UINT8
    call.give(call.dims(), dtype)


def dequantize(call: Call) -> None:
    """The shape of its input; the dtype of the scale."""
    wanted = call.integer("output_dtype")
    call.give(call.dims(), ir.DataType(wanted) if wanted else call.dtype(1))


def dynamic_quantize(call: Call) -> None:
    """The shape of its input, and one scale and zero point."""
    call.give(call.dims(), UINT8)
    call.give((), FLOAT, at=1)
    call.give((), UINT8, at=2)


# Recurrence and attention


def recurrent(call: Call) -> None:
    """Every step's state, and the last one's, for each direction."""
    dims, weights = call.dims(0), call.dims(2)
    hidden = call.integer("hidden_size") or (weights[2] if weights is not None and len(weights) == 3 else None)
    directions = 2 if call.text("direction", "forward") == "bidirectional" else 1
    batch_first = call.integer("layout") == 1
    if dims is None or len(dims) != 3:
        steps, batch = None, None
    else:
        steps, batch = (dims[1], dims[0]) if batch_first else (dims[0], dims[1])
    call.give([batch, steps, directions, hidden] if batch_first else [steps, directions, batch, hidden])
    for at in (1, 2):
        call.give([batch, directions, hidden] if batch_first else [directions, batch, hidden], at=at)


def attention(call: Call) -> None:
    """The queries' rows, the values' columns; keys and values with those of the past before them."""
    query, key, value = call.dims(0), call.dims(1), call.dims(2)
    if query is None or key is None or value is None or len(call.node.outputs) > 3:
        return
    heads, of_keys = call.integer("q_num_heads"), call.integer("kv_num_heads")
    if len(query) == 4 and len(value) == 4:
        call.give([*query[:3], value[3]])
        batch, width, width_of_values, length = key[0], key[3], value[3], key[2]
        shared: Size = key[1]
    elif len(query) == 3 and len(value) == 3 and heads and of_keys:
        width, width_of_values = d.floordiv(key[2], of_keys), d.floordiv(value[2], of_keys)
        call.give([query[0], query[1], width_of_values * heads])
        batch, length, shared = key[0], key[1], of_keys
    else:
        return
    past = call.dims(4)
    if call.has(4) and (past is None or len(past) != 4):
        return
    total = length + past[2] if past is not None else length
    call.give([batch, shared, total, width], at=1)
    call.give([batch, shared, total, width_of_values], call.dtype(2), at=2)


# Selection, sampling


def top_k(call: Call) -> None:
    """The k largest along one axis, and where they are."""
    dims = call.dims()
    if dims is None:
        return
    axis = axis_of(call.integer("axis", -1), len(dims))
    wanted = call.sizes(1) if call.has(1) else (call.integer("k"),)
    result: list[Size | None] = list(dims)
    result[axis] = d.as_dimension(wanted[0]) if wanted is not None and len(wanted) == 1 else None
    call.give(result)
    call.give(result, INT64, at=1)


def nonzero(call: Call) -> None:
    """A column for each element that is not zero."""
    dims = call.dims()
    call.give([max(len(dims), 1) if dims is not None else None, None], INT64)


def one_hot(call: Call) -> None:
    """One axis more, as deep as said."""
    dims, depth = call.dims(0), call.sizes(1)
    if dims is None:
        return call.give(None, call.dtype(2))
    axis = axis_of(call.integer("axis", -1), len(dims) + 1)
    deep = d.as_dimension(depth[0]) if depth is not None and len(depth) == 1 else None
    return call.give([*dims[:axis], deep, *dims[axis:]], call.dtype(2))


def compress(call: Call) -> None:
    """As many as the condition picks."""
    dims, axis = call.dims(), call.attribute("axis")
    if dims is None:
        return call.give([None] if axis is None else None)
    result: list[Size | None] = list(dims) if axis is not None else [None]
    if axis is not None:
        result[axis_of(axis.as_int(), len(dims))] = None
    return call.give(result)


def unique(call: Call) -> None:
    """As many as there are, how they are spread, and how often."""
    dims, axis = call.dims(), call.attribute("axis")
    count = call.mint()
    result: list[Size | None] | None = [count]
    if axis is not None:
        result = list(dims) if dims is not None else None
        if result is not None:
            result[axis_of(axis.as_int(), len(result))] = count
    length = None if dims is None else d.product(dims) if axis is None else dims[axis_of(axis.as_int(), len(dims))]
    call.give(result)
    call.give([count], INT64, at=1)
    call.give([length], INT64, at=2)
    call.give([count], INT64, at=3)


def like_with_dtype(call: Call) -> None:
    """The shape of its input, of the dtype asked for."""
    wanted = call.integer("dtype")
    call.give(call.dims(), ir.DataType(wanted) if wanted else call.dtype())


def random_of_shape(call: Call) -> None:
    """The shape asked for."""
    call.give(call.integers("shape"), ir.DataType(call.integer("dtype", FLOAT.value)))


def multinomial(call: Call) -> None:
    """As many draws as asked for, a row each."""
    dims = call.dims()
    call.give(
        [dims[0] if dims else None, call.integer("sample_size", 1)], ir.DataType(call.integer("dtype", INT32.value))
    )


def determinant(call: Call) -> None:
    """One number for each matrix."""
    dims = call.dims()
    call.give(dims[:-2] if dims is not None else None)


def suppression(call: Call) -> None:
    """Three indices for each box that stays."""
    call.give([None, 3], INT64)


def negative_log_likelihood(call: Call) -> None:
    """The targets' shape, or one number."""
    dims: Dims | None = call.dims(1)
    call.give(dims if call.text("reduction", "mean") == "none" else ())
    call.give(call.dims(0), at=1)


WINDOW_RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "Conv": conv,
        "ConvInteger": integer_conv,
        "QLinearConv": quantized_conv,
        "ConvTranspose": conv_transpose,
        **dict.fromkeys(("MaxPool", "AveragePool", "LpPool"), pool),
        **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"), global_pool),
        "RoiAlign": roi_align,
        "MaxRoiPool": max_roi_pool,
        "Resize": resize,
        "Upsample": resize,
        "GridSample": grid_sample,
        "BatchNormalization": batch_normalization,
        "LayerNormalization": layer_normalization,
        "RMSNormalization": layer_normalization,
        "Dropout": dropout,
        "QuantizeLinear": quantize,
        "DequantizeLinear": dequantize,
        "DynamicQuantizeLinear": dynamic_quantize,
        **dict.fromkeys(("LSTM", "GRU", "RNN"), recurrent),
        "Attention": attention,
        "RotaryEmbedding": dropout,
        "TopK": top_k,
        "NonZero": nonzero,
        "OneHot": one_hot,
        "Compress": compress,
        "Unique": unique,
        **dict.fromkeys(("EyeLike", "RandomNormalLike", "RandomUniformLike", "Bernoulli"), like_with_dtype),
        **dict.fromkeys(("RandomNormal", "RandomUniform"), random_of_shape),
        "Multinomial": multinomial,
        "Det": determinant,
        "NonMaxSuppression": suppression,
        "NegativeLogLikelihoodLoss": negative_log_likelihood,
        "SoftmaxCrossEntropyLoss": negative_log_likelihood,
    }
)
