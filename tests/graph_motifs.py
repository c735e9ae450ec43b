"""The motifs that generated graphs are made of: each adds a few nodes and returns the values others may go on with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto

from .chain_motifs import (
    bounds_chain,
    branches_alike,
    cast_around,
    cast_integers,
    cuts_and_joins,
    index_chain,
    loop_invariant,
    split_and_join,
)
from .norm_motifs import group_norm, norm_of_any_type, written_softmax
from .shape_motifs import (
    shape_branch,
    shape_expand,
    shape_flatten,
    shape_halves,
    shape_heads,
    shape_mask,
    shape_numbers,
    shape_range,
    shape_resize,
    shape_slice,
    shape_tile,
)
from .transformer_motifs import heads_attention, normalized_product, residual_norm, written_activation, written_norm

if TYPE_CHECKING:
    from .graph_generator import Builder, Value

FLOAT, FLOAT16, DOUBLE = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE
INT32, INT64, BOOL = TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL
FLOATS = (FLOAT, FLOAT, FLOAT, FLOAT16, DOUBLE)
# Elementwise functions that no number of moderate size makes larger than itself or one.
UNARY = ("Neg", "Abs", "Relu", "Sigmoid", "Tanh", "Floor", "Ceil", "Sign", "Identity")
FLOAT_UNARY = (*UNARY, "LeakyRelu", "Elu", "Erf", "HardSigmoid", "Softsign", "Sin", "Cos", "Atan")
FUNCTION_DOMAIN = "test.functions"
# Subgraphs inside subgraphs, no deeper than this.
DEEPEST_SUBGRAPH = 2

Result: TypeAlias = "Value | Sequence[Value] | None"


# Elementwise


def unary(b: Builder) -> Result:
    """One function of one value, of any float type."""
    x = b.pick(b.rng.choice(FLOATS))
    return b.op(b.rng.choice(FLOAT_UNARY if x.dtype == FLOAT else UNARY), x)


def activation_chain(b: Builder) -> Result:
    """Two activations in a row, some of which repeat or swallow one another."""
    x = b.pick()
    for _ in range(2):
        x = _clip(b, x, -1.0, 2.0) if b.chance(0.3) else b.op(b.rng.choice(("Relu", "Sigmoid", "Tanh", "Abs")), x)
    return x


def clip(b: Builder) -> Result:
    """Clip with both bounds, one or none, as attributes or as inputs, constant or not, alone or after Relu."""
    x = b.pick()
    x = b.op("Relu", x) if b.chance(0.4) else x
    low, high = b.rng.choice(((0.0, 6.0), (None, 1.0), (-0.5, None), (None, None), (0.0, 3.4e38)))
    if b.opset >= 11 and b.chance(0.2):
        return b.op("Clip", x, b.op("Neg", b.op("Abs", b.pick(rank=0))))
    return _clip(b, x, low, high)


def binary(b: Builder) -> Result:
    """Two values of any float type and broadcastable shapes, the second often a constant."""
    x = b.pick(b.rng.choice(FLOATS))
    y = b.pick(x.dtype, where=lambda shape: _broadcastable(shape, x.shape), fresh=x.shape)
    if b.chance(0.5):
        y = b.weight(*_narrower(b, x.shape), dtype=x.dtype, between=(0.5, 2.0))
    op = b.rng.choice(("Add", "Sub", "Mul", "Max", "Min", *(["Div"] if y.data is not None else [])))
    bound = {"Mul": x.bound * y.bound, "Div": x.bound * 2}.get(op, x.bound + y.bound)
    return b.op(op, *((x, y) if op == "Div" or b.chance(0.5) else (y, x)), bound=bound)


def power(b: Builder) -> Result:
    """A constant power: square, identity, or the square root of what cannot be negative."""
    x = b.pick()
    exponent = b.rng.choice((2.0, 1.0, 0.5))
    x = b.op("Abs", x) if exponent == 0.5 else x
    return b.op("Pow", x, b.const(np.array(exponent, np.float32)), bound=max(1.0, x.bound**2))


def arithmetic_noop(b: Builder) -> Result:
    """A constant that changes nothing, or seems to: zeros and ones, some of a shape that broadcasts the value."""
    x = b.pick()
    op = b.rng.choice(("Add", "Sub", "Mul", "Div"))
    shape = b.rng.choice(((), (1,), (1,) * (len(x.shape) + 1)))
    neutral = b.const(np.full(shape, {"Add": b.rng.choice((0.0, -0.0)), "Sub": 0.0}.get(op, 1.0), np.float32))
    y = b.op(op, *((neutral, x) if op in ("Add", "Mul") and b.chance(0.5) else (x, neutral)))
    return b.op("Neg", b.op("Neg", y)) if b.chance(0.3) else y


def where_compare(b: Builder) -> Result:
    """Comparison, logic on booleans, and a choice between a value and a constant."""
    x = b.pick()
    mask = b.op("Greater", x, b.const(np.array(0.25, np.float32)))
    if b.chance(0.5):
        mask = b.op(b.rng.choice(("And", "Or")), mask, b.pick(BOOL, 0))
    mask = b.op("Not", mask) if b.chance(0.5) else mask
    return b.op("Where", mask, x, b.weight()), mask


def integer_arithmetic(b: Builder) -> Result:
    """Arithmetic on int64, kept small by Mod."""
    x = b.op("Mul", b.pick(INT64), b.ints(b.rng.randint(-3, 3)))
    return b.op("Mod", b.op("Add", x, b.ints([b.rng.randint(-3, 3)])), b.ints(7))


# Casts


def cast_noop(b: Builder) -> Result:
    """A cast to the type that the value has already."""
    x = b.pick(b.rng.choice((FLOAT, FLOAT16, DOUBLE, INT64, BOOL)))
    return _uncapturable(b, b.op("Cast", x, to=x.dtype))


def cast_chain(b: Builder) -> Result:
    """Casts there and back, some of which lose digits, ending in any type."""
    x = b.pick()
    chains = ((DOUBLE, FLOAT), (FLOAT16, FLOAT), (INT32, INT64), (FLOAT16,), (DOUBLE,), (BOOL, FLOAT))
    for dtype in b.rng.choice(chains):
        x = b.op("Cast", x, to=dtype)
    return _uncapturable(b, x)


# Convolution, normalization, pooling


def conv_bn(b: Builder) -> Result:
    """Conv, BatchNormalization and often Relu."""
    x = _batch_norm(b, _conv(b, _image(b)))
    return b.op("Relu", x) if b.chance(0.5) else x


def conv_alone(b: Builder) -> Result:
    """Conv in two or one spatial dimensions, of a constant or computed weight."""
    if b.chance(0.3):
        x = b.pick(rank=3, where=lambda s: isinstance(s[1], int) and isinstance(s[2], int), fresh=("batch", 3, 4))
        w = b.weight(2, x.shape[1], 1)
        return b.op("Conv", x, w, bound=x.bound * x.shape[1])
    return _conv(b, _image(b), computed=b.chance(0.3))


def conv_bn_shared(b: Builder) -> Result:
    """BatchNormalization after a Conv whose output is used elsewhere too."""
    y = _conv(b, _image(b))
    return _batch_norm(b, y), b.op("Relu", y)


def conv_weight_shared(b: Builder) -> Result:
    """Two Convs of one weight, each with a BatchNormalization of its own."""
    x = _image(b)
    w = b.weight(3, x.shape[1], 1, 1)
    first, second = (b.op("Conv", y, w, bound=y.bound * x.shape[1]) for y in (x, b.op("Tanh", x)))
    return _batch_norm(b, first), _batch_norm(b, second)


def bn_alone(b: Builder) -> Result:
    """BatchNormalization of something else than a Conv."""
    return _batch_norm(b, b.op("Relu", _image(b)))


def pool(b: Builder) -> Result:
    """MaxPool, sometimes with its indices, or AveragePool, sometimes counting its padding."""
    x = _image(b)
    stride, pads = b.rng.choice((1, 2)), b.rng.choice(([0] * 4, [1, 0, 0, 1]))
    window = {"kernel_shape": [2, 2], "strides": [stride, stride], "pads": pads}
    if b.chance(0.5):
        return b.op("AveragePool", x, count_include_pad=int(b.chance(0.5)), **window)
    return b.ops("MaxPool", [x], (True, b.chance(0.3)), **window)


def classifier_head(b: Builder) -> Result:
    """GlobalAveragePool, Flatten, Gemm, Softmax."""
    x = b.op("Flatten", b.op("GlobalAveragePool", _image(b)))
    return b.op("Softmax", _gemm(b, x), axis=1)


def layer_norm(b: Builder) -> Result:
    """Layer normalization, written out."""
    x = b.pick(where=lambda shape: len(shape) > 0, fresh=("batch", 4))
    centred = b.op("Sub", x, _over_axes(b, "ReduceMean", x, [-1], since=18), bound=2 * x.bound)
    square = b.op("Pow", centred, b.const(np.array(2.0, np.float32)), bound=4 * x.bound**2)
    spread = b.op("Add", _over_axes(b, "ReduceMean", square, [-1], since=18), b.const(np.array(1e-2, np.float32)))
    return b.op("Div", centred, b.op("Sqrt", spread), bound=10 * x.bound)


def gelu(b: Builder) -> Result:
    """GELU by the error function, written out."""
    x = b.pick()
    gate = b.op("Erf", b.op("Div", x, b.const(np.array(np.sqrt(2), np.float32))))
    return b.op("Mul", b.op("Mul", x, b.op("Add", gate, b.const(np.array(1, np.float32)), bound=2.0)), b.weight())


# Products


def gemm(b: Builder) -> Result:
    """Gemm with either operand transposed, factors, and a bias of any shape or none."""
    return _gemm(b, b.pick(b.rng.choice(FLOATS), 2, lambda shape: isinstance(shape[1], int), ("batch", 4)))


def matmul(b: Builder) -> Result:
    """MatMul by a constant, 2-D or batched, on either side, often with a bias; or by itself transposed."""
    x = b.pick(b.rng.choice(FLOATS), where=lambda s: len(s) >= 2 and isinstance(s[-1], int), fresh=("batch", "seq", 4))
    form = b.rng.choice(("right", "right", "batched", "left", "computed"))
    rows, columns = x.shape[-2:]
    if form == "computed":
        order = [*range(len(x.shape) - 2), len(x.shape) - 1, len(x.shape) - 2]
        return b.op("MatMul", x, b.op("Transpose", x, perm=order), bound=x.bound**2 * columns)
    if form == "left" and isinstance(rows, int):
        return b.op("MatMul", b.weight(2, rows, dtype=x.dtype), x, bound=x.bound * rows)
    batch = (1,) if form == "batched" else ()
    y = b.op("MatMul", x, b.weight(*batch, columns, 4, dtype=x.dtype), bound=x.bound * columns)
    return b.op("Add", y, b.weight(4, dtype=x.dtype), bound=y.bound + 1) if b.chance(0.5) else y


def attention(b: Builder) -> Result:
    """Dot-product attention, written out, of one value by three constant weights."""
    x = b.pick(rank=3, where=lambda s: isinstance(s[2], int), fresh=("batch", "seq", 4))
    q, k, v = (b.op("MatMul", x, b.weight(x.shape[2], 4), bound=x.bound * x.shape[2]) for _ in range(3))
    scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 2, 1]), bound=q.bound * k.bound * 4)
    scaled = b.op("Div", scores, b.const(np.array(2.0, np.float32)))
    return b.op("MatMul", b.op("Softmax", scaled, axis=2), v, bound=v.bound)


def softmax(b: Builder) -> Result:
    """Softmax or LogSoftmax over any axis or the default one, whose meaning opset 13 changed."""
    x = b.pick(where=lambda shape: len(shape) > 0, fresh=("batch", 4))
    axis = {"axis": b.rng.randrange(len(x.shape))} if b.chance(0.7) else {}
    axis = axis if b.opset >= 13 or len(x.shape) > 1 else {"axis": 0}
    return b.op(b.rng.choice(("Softmax", "LogSoftmax")), x, bound=2 * x.bound + 5, **axis)


def recurrent(b: Builder) -> Result:
    """An LSTM with optional inputs and outputs left empty in the middle."""
    x = b.new_input(FLOAT, (3, 2, 4))
    h = b.weight(1, 2, 2) if b.chance(0.5) else None
    w, r = b.weight(1, 8, 4), b.weight(1, 8, 2)
    return b.ops("LSTM", [x, w, r, None, None, h], (b.chance(0.5), True), bound=1.0, hidden_size=2)


# Shapes


def reshape_chain(b: Builder) -> Result:
    """Reshape after Reshape, by sizes, zero and minus one, sometimes back to where it began."""
    x = b.pick(where=lambda s: len(s) >= 2 and _static(s[1:]), fresh=("batch", 4))
    first, rest = x.shape[0], x.shape[1:]
    size = int(np.prod(rest))
    for _ in range(2):
        target, shape = b.rng.choice((([-1, size], (first, size)), ([-1, 1, size], (first, 1, size)), ([-1], None)))
        x = b.op("Reshape", x, b.ints(target), as_shape=shape)
    if b.chance(0.5):
        return b.op("Reshape", x, b.ints([-1, *rest]), as_shape=(first, *rest))
    return x if x.shape[0] != first else b.op("Reshape", x, b.ints([0, -1]), as_shape=(first, size))


def transpose(b: Builder) -> Result:
    """Transpose, sometimes followed by its inverse or another one."""
    x = b.pick(b.rng.choice(FLOATS), where=lambda shape: len(shape) >= 2, fresh=("batch", "seq", 4))
    order = list(range(len(x.shape)))
    b.rng.shuffle(order)
    y = b.op("Transpose", x, perm=order)
    if b.chance(0.5):
        y = b.op("Relu", y) if b.chance(0.3) else y
        return b.op("Transpose", y, perm=[int(i) for i in np.argsort(order)])
    return b.op("Transpose", y) if b.chance(0.3) else y


def affine_chain(b: Builder) -> Result:
    """Scales and shifts by constants, one behind the other, of floats or integers."""
    x = b.pick(b.rng.choice((*FLOATS, INT64)))
    for _ in range(b.rng.choice((2, 2, 3, 4))):
        x = _affine(b, x, lambda y: _narrower(b, y.shape))
    return x


def linear_affine(b: Builder) -> Result:
    """A Conv, ConvTranspose, Gemm or MatMul with a scale or shift of its channels, before or behind it."""
    if b.chance(0.4):
        x = b.pick(rank=b.rng.choice((2, 3)), where=lambda s: isinstance(s[-1], int), fresh=("batch", 4))
        layer, channels = (_gemm if len(x.shape) == 2 and b.chance(0.5) else _product), []
    else:
        x = _image(b)
        layer, channels = (_conv if b.chance(0.7) else _transposed_conv), [1, 1]

    def shape(y: Value) -> tuple[int, ...]:
        return b.rng.choice(((), (y.shape[1] if channels else y.shape[-1], *channels)))

    if b.chance(0.4):
        return layer(b, b.tame(_affine(b, x, shape)))
    x = layer(b, x)
    return _affine(b, x, shape)


def padded(b: Builder) -> Result:
    """A Pad before a Conv or AveragePool."""
    x = _image(b)
    widths = [0, 0, *(b.rng.choice((0, 1)) for _ in range(2))] * 2
    mode = b.rng.choice(("constant", "constant", "constant", "edge"))
    x = b.op("Pad", x, pads=widths, mode=mode) if b.opset < 11 else b.op("Pad", x, b.ints(widths), mode=mode)
    if b.chance(0.6):
        return _conv(b, x)
    return b.op("AveragePool", x, kernel_shape=[3, 3], count_include_pad=int(b.chance(0.5)))


def linear_pair(b: Builder) -> Result:
    """Two products with constant matrices, with or without something added."""
    x = b.pick(rank=b.rng.choice((2, 2, 3)), where=lambda s: isinstance(s[-1], int), fresh=("batch", 4))
    for _ in range(2):
        x = _gemm(b, x) if len(x.shape) == 2 and b.chance(0.4) else _product(b, x)
    return x


def reduction_dropped(b: Builder) -> Result:
    """A reduction that keeps its axes, and an operator that drops them, often behind a Conv."""
    x = _image(b)
    x = _conv(b, x) if b.chance(0.5) else x
    op, since = b.rng.choice((("ReduceSum", 13), ("ReduceMean", 18), ("ReduceMean", 18), ("ReduceMax", 18)))
    y = _over_axes(b, op, x, b.rng.choice(([2, 3], [-1, -2])), since, keepdims=1, bound=x.bound * 36)
    dropping = b.rng.choice(("Squeeze", "Flatten", "Reshape", None))
    if dropping is None:
        return y
    if dropping == "Squeeze":
        return _over_axes(b, "Squeeze", y, [2, 3], 13)
    return b.op("Flatten", y) if dropping == "Flatten" else b.op("Reshape", y, b.ints([0, -1]))


def repeated_elements(b: Builder) -> Result:
    """Elements of an axis repeated by way of an axis of their own, as heads of keys are for queries that share them."""
    x = b.weight(*(b.rng.randint(1, 4) for _ in range(b.rng.randint(2, 3))))
    sizes, times = [int(size) for size in x.shape], b.rng.randint(1, 3)
    x = b.op("Add", x, b.pick(where=lambda shape: shape == (), fresh=()))
    axis = b.rng.randint(0, len(sizes))
    y = _over_axes(b, "Unsqueeze", x, [axis], 13)
    y = b.op("Expand", y, b.ints([*sizes[:axis], times, *sizes[axis:]]))
    joined = b.rng.choice((max(axis, 1), max(axis, 1), min(axis + 1, len(sizes))))
    wide = [*sizes[:axis], times, *sizes[axis:]]
    return b.op("Reshape", y, b.ints([*wide[: joined - 1], wide[joined - 1] * wide[joined], *wide[joined + 1 :]]))


def layout_detour(b: Builder) -> Result:
    """Operators between a Transpose and its inverse, as converters between layouts leave them."""
    x = b.pick(where=lambda shape: len(shape) >= 3, fresh=("batch", 3, 4))
    order = list(range(len(x.shape)))
    b.rng.shuffle(order)
    y = b.op("Transpose", x, perm=order)
    for _ in range(b.rng.randint(1, 3)):
        y = _of_any_layout(b, y)
    if b.chance(0.2):
        y = b.op("Add", y, b.op("Transpose", b.op("Tanh", x), perm=order), bound=y.bound + 1)
    back = b.op("Transpose", y, perm=[int(i) for i in np.argsort(order)])
    if b.chance(0.3):
        axis = b.rng.randint(0, len(order) - 1)
        return back, _over_axes(b, "ReduceSum", y, [axis], 13, keepdims=int(b.chance(0.5)))
    return (back, y) if b.chance(0.2) else back


def _of_any_layout(b: Builder, x: Value) -> Value:
    """Return one operator of a value that keeps its shape, over all axes or along one."""
    axis = b.rng.randint(-len(x.shape), len(x.shape) - 1)
    match b.rng.choice(("unary", "constant", "softmax", "halves", "scalar")):
        case "unary":
            return b.op(b.rng.choice(UNARY), x)
        case "constant":
            w = b.weight(*_narrower(b, x.shape)) if x.dtype == FLOAT else x
            w = w if len(w.shape) <= len(x.shape) else x
            return b.op(b.rng.choice(("Add", "Max", "Sub")), x, w, bound=x.bound + w.bound)
        case "softmax":
            return b.op("Softmax", x, axis=axis if b.opset >= 13 else axis % len(x.shape), bound=1.0)
        case "halves" if x.shape[axis] == 4:
            halves = [b.op("Slice", x, b.ints([i]), b.ints([i + 2]), b.ints([axis])) for i in (0, 2)]
            return b.op("Concat", *reversed(halves), axis=axis)
    return b.op("Mul", x, b.const(np.array(0.5, np.float32)))


def squeeze_unsqueeze(b: Builder) -> Result:
    """Unsqueeze, then Squeeze of the same axis, or of none in particular."""
    x = b.pick()
    axis = b.rng.randint(0, len(x.shape))
    y = _over_axes(b, "Unsqueeze", x, [axis], since=13)
    return _over_axes(b, "Squeeze", y, [axis], since=13) if b.chance(0.7) else y


def concat_split(b: Builder) -> Result:
    """Concat of two or one values, split again in two or one, where it was joined or elsewhere."""
    x = b.pick(where=lambda s: len(s) > 0 and isinstance(s[-1], int), fresh=("batch", 4))
    axis = len(x.shape) - 1
    joined = b.op("Concat", *b.rng.choice(((x,), (x, x), (x, b.op("Neg", x)))), axis=axis)
    width = joined.shape[-1]
    first = b.rng.randint(1, width)
    sizes = [first, width - first] if first < width else [width]
    wanted = [True] * len(sizes)
    if b.opset >= 13:
        return b.ops("Split", [joined, b.ints(sizes)], wanted, axis=axis)
    return b.ops("Split", [joined], wanted, axis=axis, split=sizes)


def slice_(b: Builder) -> Result:
    """Slice of the last axis: part of it, all of it, backwards, or by a start that is only known at run time."""
    x = b.pick(where=lambda s: len(s) > 0 and isinstance(s[-1], int) and s[-1] > 1, fresh=("batch", 4))
    if b.chance(0.2):
        start = b.pick(INT64, 1, lambda s: s == (1,), (1,))
        start = b.op("Sub", b.op("Mod", start, b.ints([2])), b.ints([2]))
        return b.op("Slice", x, start, b.ints([2**31 - 1]), b.ints([-1]))
    spans = ((0, x.shape[-1] - 1, 1), (0, 2**63 - 1, 1), (-1, -(2**31), -1), (1, 2**31 - 1, 2))
    start, stop, step = b.rng.choice(spans)
    return b.op("Slice", x, b.ints([start]), b.ints([stop]), b.ints([-1]), b.ints([step]))


def pad(b: Builder) -> Result:
    """Pad by widths in an attribute or an input, in every mode, sometimes by nothing at all."""
    x = b.pick(where=lambda s: len(s) > 0 and isinstance(s[-1], int) and s[-1] > 1, fresh=("batch", 4))
    widths = [0] * (2 * len(x.shape))
    widths[-1] = b.rng.choice((0, 1))
    mode = b.rng.choice(("constant", "reflect", "edge"))
    if b.opset < 11:
        return b.op("Pad", x, pads=widths, mode=mode)
    if b.opset >= 18 and b.chance(0.5):
        return b.op("Pad", x, b.ints([1, 0]), None, b.ints([-1]), mode=mode)
    return b.op("Pad", x, b.ints(widths), *([b.weight()] if mode == "constant" and b.chance(0.5) else []), mode=mode)


def flatten(b: Builder) -> Result:
    """Flatten at any axis, often of what is flat already."""
    x = b.pick(where=lambda s: len(s) > 0 and _static(s), fresh=(2, 4))
    return b.op("Flatten", x, axis=b.rng.randint(0, len(x.shape)))


def expand(b: Builder) -> Result:
    """Expand along a new axis, or to the shape that the value has already."""
    x = b.pick()
    target = [1] * len(x.shape) if b.chance(0.5) else [2, *[1] * len(x.shape)]
    return b.op("Expand", x, b.ints(target))


def gather(b: Builder) -> Result:
    """Gather by constant or fed indices, negative ones too."""
    x = b.pick(where=lambda s: len(s) > 0 and isinstance(s[-1], int) and s[-1] > 1, fresh=("batch", 4))
    shape = b.rng.choice(((), (2,), (1, 2)))
    numbers = np.random.default_rng(b.rng.getrandbits(16)).integers(-2, 2, shape)
    indices = b.const(np.asarray(numbers, np.int64)) if b.chance(0.6) else b.new_input(INT64, shape)
    return b.op("Gather", x, indices, axis=len(x.shape) - 1)


def reduction(b: Builder) -> Result:
    """A reduction whose axes are an attribute or an input, depending on the opset."""
    x = b.pick(where=lambda s: len(s) > 0 and isinstance(s[-1], int), fresh=("batch", 4))
    op, since = b.rng.choice((("ReduceSum", 13), ("ReduceMean", 18), ("ReduceMax", 18)))
    return _over_axes(b, op, x, [-1], since, bound=x.bound * x.shape[-1], keepdims=int(b.chance(0.5)))


def shape_reshape(b: Builder) -> Result:
    """Reshape to sizes taken from Shape by Gather or Slice and joined with constants, as exporters write it."""
    x = b.pick(where=lambda s: len(s) >= 2 and _static(s[1:]), fresh=("batch", 3, 4))
    sizes = b.op("Shape", x)
    if b.chance(0.5):
        first = _over_axes(b, "Unsqueeze", b.op("Gather", sizes, b.ints(0), axis=0), [0], since=13)
    else:
        first = b.op("Slice", sizes, b.ints([0]), b.ints([1]))
    target = b.op("Concat", first, b.ints([b.rng.choice((-1, int(np.prod(x.shape[1:]))))]), axis=0)
    return b.op("Reshape", x, target, as_shape=(x.shape[0], int(np.prod(x.shape[1:]))))


def shape_of_known(b: Builder) -> Result:
    """Shape or Size of a value whose shape is known, and numbers computed from it."""
    x = b.pick(where=lambda s: len(s) > 0 and _static(s), fresh=(2, 4))
    if b.chance(0.3):
        return b.op("Size", x, bound=1e3)
    filled = b.op("ConstantOfShape", b.op("Shape", x), as_shape=x.shape)
    return b.op("Add", x, filled)


def zero_size(b: Builder) -> Result:
    """A value without elements, joined to another and summed up."""
    x = b.pick(where=lambda shape: len(shape) > 0, fresh=("batch", 4))
    empty = b.op("Slice", x, b.ints([0]), b.ints([0]), b.ints([0]), as_shape=(0, *x.shape[1:]))
    b.root.outputs += [] if b.depth else [empty]
    return b.op("Concat", empty, x, axis=0, as_shape=x.shape), b.op("ReduceSum", empty, keepdims=0)


# Things to clean up


def identity_outputs(b: Builder) -> Result:
    """One value that is a graph output twice behind Identity, and used inside too."""
    x = b.pick()
    b.outputs += [b.op("Identity", x), b.op("Identity", b.op("Identity", x))]
    return b.op("Relu", x)


def dropout(b: Builder) -> Result:
    """Dropout as it is in inference, its mask sometimes an output, its ratio an attribute or an input."""
    x = b.pick()
    wanted = (True, b.chance(0.3))
    if b.opset < 12:
        return b.ops("Dropout", [x], wanted, ratio=0.3)
    ratio = b.const(np.array(0.3, np.float32)) if b.chance(0.7) else None
    mode = b.const(np.array(False)) if b.chance(0.5) else None
    return b.ops("Dropout", [x, *([ratio, mode] if mode else [ratio] if ratio else [])], wanted)


def dead_branch(b: Builder) -> Result:
    """A motif whose results nobody uses."""
    b.rng.choice((binary, conv_bn, matmul, if_dynamic, loop, constant_expression))(b)


def unused_initializer(b: Builder) -> Result:
    """An initializer without a use."""
    b.initializer(np.arange(6, dtype=np.float32))


def duplicate_expression(b: Builder) -> Result:
    """The same expression twice, and a third that differs in an attribute or in the order of its operands."""
    x, slope = b.pick(), b.weight(between=(1.0, 2.0))
    once, twice = (b.op("LeakyRelu", b.op("Mul", x, slope), alpha=0.1, bound=x.bound * 2) for _ in range(2))
    third = b.rng.choice((lambda: b.op("Mul", slope, x), lambda: b.op("Mul", x, slope)))()
    last = b.op("LeakyRelu", third, alpha=b.rng.choice((0.1, 0.2)), bound=x.bound * 2)
    return b.op("Sub", b.op("Add", once, twice, bound=x.bound * 4), last, bound=x.bound * 6)


def duplicate_initializers(b: Builder) -> Result:
    """Initializers of the same bytes, and one that is equal only as a number or only as bytes."""
    x = b.pick(where=lambda s: len(s) > 0 and s[-1] == 4, fresh=("batch", 4))
    numbers = np.array([1.0, 0.0, 2.0, -1.0], np.float32)
    other = b.rng.choice((np.array([1.0, -0.0, 2.0, -1.0], np.float32), numbers.reshape(1, 4), numbers + 1))
    for array in (numbers, numbers.copy(), other):
        x = b.op("Add", x, b.root.initializer(array), bound=x.bound + 3)
    same_bytes = b.root.initializer(numbers.view(np.int32))
    return b.op("Where", b.op("Cast", same_bytes, to=BOOL), x, b.weight())


def weight_shared(b: Builder) -> Result:
    """One weight used plainly, transposed and by another operator, as tied embeddings are."""
    x = b.pick(where=lambda s: len(s) >= 2 and s[-1] == 4, fresh=("batch", 4))
    w = b.weight(4, 4)
    y = b.op("MatMul", x, w, bound=x.bound * 4)
    z = b.op("MatMul", b.tame(y), b.op("Transpose", w, perm=[1, 0]), bound=200.0)
    return z, b.op("Gather", w, b.ints([0, 2]), axis=0)


def default_input(b: Builder) -> Result:
    """An input with a default, which the caller may replace, in a place that invites folding."""
    x = b.pick(where=lambda s: len(s) > 0 and s[-1] == 4, fresh=("batch", 4))
    factor = b.root.initializer(np.ones(4, np.float32))
    b.root.overridable.append(factor.name)
    return b.op("Mul", x, b.op("Mul", factor, b.weight()), bound=x.bound * 3)


def input_as_output(b: Builder) -> Result:
    """A graph input that is a graph output, or an initializer that is one."""
    numbers = np.arange(3, dtype=np.float32)
    b.outputs.append(b.new_input(FLOAT, ("batch", 4)) if b.chance(0.5) else b.initializer(numbers))


def inner_output(b: Builder) -> Result:
    """A graph output that is used inside as well."""
    x = b.op("Add", b.pick(), b.weight(), bound=100.0)
    b.outputs.append(x)
    return b.op("Relu", x)


def odd_attributes(b: Builder) -> Result:
    """Attributes spelled out with their default values next to the same node without them."""
    x = b.pick(rank=2)
    return b.op("Add", b.op("Transpose", x, perm=[1, 0]), b.op("Transpose", x), bound=2 * x.bound)


# Constants


def constant_expression(b: Builder) -> Result:
    """Nodes all of whose inputs are constant, their result used or given out."""
    t = b.weight(2, 3)
    t = b.op("MatMul", t, b.op("Transpose", b.weight(2, 3), perm=[1, 0]), bound=3.0)
    t = b.op("Concat", t, b.op("Expand", b.weight(), b.ints([1, 2])), axis=0)
    t = b.op("Reshape", t, b.ints([-1]))
    if b.chance(0.3):
        return t
    x = b.pick()
    return b.op("Mul", x, b.op("ReduceMean", t, keepdims=0), bound=x.bound * 3)


def constant_range(b: Builder) -> Result:
    """Range, ConstantOfShape and Cast of constants."""
    numbers = b.op("Cast", b.op("ConstantOfShape", b.ints([4]), value=_tensor(np.array([2], np.int32))), to=FLOAT)
    if b.opset >= 11:
        numbers = b.op("Mul", numbers, b.op("Cast", b.op("Range", b.ints(0), b.ints(4), b.ints(1)), to=FLOAT))
    x = b.pick(where=lambda s: len(s) > 0 and s[-1] == 4, fresh=("batch", 4))
    return b.op("Add", x, numbers, bound=x.bound + 8)


def constant_forms(b: Builder) -> Result:
    """Constant nodes of each form of value."""
    x = b.pick(where=lambda s: len(s) > 0 and s[-1] == 4, fresh=("batch", 4))
    if b.opset < 12:
        return b.op("Add", x, b.op("Constant", value=_tensor(np.ones(4, np.float32))), bound=x.bound + 1)
    x = b.op("Mul", x, b.op("Constant", value_float=0.5))
    x = b.op("Add", x, b.op("Constant", value_floats=[0.0, 1.0, -1.0, 2.0]), bound=x.bound + 2)
    index = b.op("Add", b.op("Constant", value_ints=[0, 1]), b.op("Constant", value_int=1))
    return b.op("Gather", x, index, axis=len(x.shape) - 1)


def string_constant(b: Builder) -> Result:
    """A constant of strings as a graph output."""
    b.root.outputs.append(b.root.op("Identity", b.root.op("Constant", value_strings=[b"a", "ü".encode()])))


# Subgraphs and functions


def if_dynamic(b: Builder) -> Result:
    """If on a fed or computed condition."""
    x = b.pick()
    fed = b.chance(0.4)
    condition = b.pick(BOOL, 0) if fed else b.op("Greater", b.op("ReduceMean", x, keepdims=0), b.weight())
    return _if(b, x, condition)


def if_constant(b: Builder) -> Result:
    """If on a condition that is constant, or would be after folding."""
    condition = b.const(np.array(b.chance(0.5)))
    return _if(b, b.pick(), b.op("Not", condition) if b.chance(0.4) else condition)


def if_nested(b: Builder) -> Result:
    """If in a branch of If, on the same condition or another; its branches capture from both graphs around them."""
    x, condition = b.pick(), b.pick(BOOL, 0)
    outer, other = b.child(), b.child()
    y = outer.offer(outer.op("Add", x, outer.weight(), bound=x.bound + 1))[0]
    again = condition if b.chance(0.5) else outer.op("Not", condition)
    y = outer.op("Add", _if(outer, x, again), y, bound=100.0)
    return _choose(b, x, condition, (outer, y), _branch(other, x))


def loop(b: Builder) -> Result:
    """Loop with captures, a constant or fed trip count, and values collected along the way."""
    x = b.pick()
    trips = b.ints(b.rng.randint(0, 3)) if b.chance(0.7) else b.new_input(INT64, ())
    go_on = b.rng.choice((None, b.const(np.array(True))))
    body = b.child()
    count, go = body.formal(_type(INT64, ())), body.formal(_type(BOOL, ()))
    state = body.formal(x.type, max(1.0, x.bound))
    y = body.op("Tanh", body.absorb(body.op("Add", state, x if b.chance(0.5) else body.weight()), _inner(body, x)))
    more = body.op("Identity", go) if b.chance(0.6) else body.op("Less", count, body.ints(1))
    graph = body.graph(body.name("body"), [more, y, body.op("Neg", y)] if b.depth == 0 else [more, y])
    types = [x.type, _type(x.dtype, (None, *x.shape))] if b.depth == 0 else [x.type]
    return b.ops("Loop", [trips, go_on, x], [True] * len(types), types=types, body=graph)


def scan(b: Builder) -> Result:
    """Scan over the first axis, forwards or backwards, with a capture."""
    x = b.pick(where=lambda s: len(s) >= 2 and _static(s[1:]), fresh=("seq", 4))
    start = b.const(np.zeros(x.shape[1:], np.float32))
    body = b.child()
    state, element = (body.formal(_type(x.dtype, x.shape[1:]), max(1.0, x.bound)) for _ in range(2))
    y = body.op("Tanh", body.absorb(body.op("Add", state, element), x))
    graph = body.graph(body.name("body"), [y, body.op("Mul", y, body.weight())])
    way = {"scan_input_directions": [int(b.chance(0.3))]}
    types = [_type(x.dtype, x.shape[1:]), x.type]
    return b.ops("Scan", [start, x], (True, True), types=types, bound=1.0, body=graph, num_scan_inputs=1, **way)


def function_call(b: Builder) -> Result:
    """A function called once or twice, with an attribute given or left to its default, which calls another."""
    b.root.functions.update(_functions(b.opset))
    x = b.pick()
    for _ in range(b.rng.randint(1, 2)):
        slope = {"slope": b.rng.choice((0.1, 0.2))} if b.chance(0.7) else {}
        factor = b.weight()
        x = b.op("Block", x, factor, types=[x.type], domain=FUNCTION_DOMAIN, bound=x.bound + 1, **slope)
    return x


def function_with_if(b: Builder) -> Result:
    """A function with an If that captures the function's input."""
    b.root.functions.update(_functions(b.opset))
    x = b.pick()
    return b.op("Gate", x, b.pick(BOOL, 0), types=[x.type], domain=FUNCTION_DOMAIN)


# Rare


def random_numbers(b: Builder) -> Result:
    """Random numbers, mostly seeded, of a fixed shape or of a value's; twins of them are not the same."""
    b.root.flags.add("nondeterministic")
    x = b.pick(where=lambda s: len(s) > 0 and _static(s), fresh=(2, 4))
    seed = {"seed": 1.0} if b.chance(0.7) else {}
    if b.chance(0.5):
        noise = b.op(b.rng.choice(("RandomUniformLike", "RandomNormalLike")), x, **seed)
    else:
        noise = b.op(b.rng.choice(("RandomUniform", "RandomNormal")), shape=list(x.shape), **seed)
    return b.op("Add", x, noise, bound=x.bound + 5)


def nonfinite(b: Builder) -> Result:
    """Log, Sqrt or Div of anything, as a graph output."""
    b.root.flags.add("nonfinite")
    x = b.pick()
    op = b.rng.choice(("Log", "Sqrt", "Div"))
    b.root.outputs.append(b.root.op("Div", x, b.root.op("Relu", x)) if op == "Div" else b.root.op(op, x))


def sequence(b: Builder) -> Result:
    """A sequence of two tensors, and one of them taken out again."""
    x = b.pick()
    several = b.op("SequenceConstruct", x, b.op("Neg", x))
    return b.op("SequenceAt", several, b.ints(b.rng.choice((0, -1))), as_shape=x.shape)


# Parts of motifs


def _type(dtype: int, shape: Sequence[int | str | None]) -> onnx.TypeProto:
    return onnx.helper.make_tensor_type_proto(dtype, shape)


def _tensor(array: np.ndarray) -> TensorProto:
    return onnx.numpy_helper.from_array(array)


def _static(shape: Sequence[int | str | None]) -> bool:
    return all(isinstance(size, int) for size in shape)


def _broadcastable(one: Sequence[int | str], other: Sequence[int | str]) -> bool:
    pairs = zip(reversed(one), reversed(other), strict=False)
    return all(mine == theirs or 1 in (mine, theirs) for mine, theirs in pairs)


def _narrower(b: Builder, shape: Sequence[int | str]) -> tuple[int, ...]:
    """Return a static shape that broadcasts with `shape`: a suffix of it with some ones, sometimes an axis more."""
    kept = shape[b.rng.randint(0, len(shape)) :]
    sizes = tuple(size if isinstance(size, int) and b.chance(0.7) else 1 for size in kept)
    return (1, *sizes) if b.chance(0.1) else sizes


def _uncapturable(b: Builder, x: Value) -> Value:
    """Return something else than a Cast's output.

    ONNX Runtime 1.31, even without its optimizations, drops a Cast that undoes another one, and does not see that a
    subgraph captures it.
    """
    return b.op("Not" if x.dtype == BOOL else "Neg", x)


def _over_axes(b: Builder, op: str, x: Value, axes: list[int], since: int, **attributes: object) -> Value:
    """Add an operator whose axes are an input since some opset and an attribute before."""
    if b.opset >= since:
        return b.op(op, x, b.ints(axes), **attributes)
    rank = len(x.shape)
    return b.op(op, x, axes=[axis % rank if axis < 0 else axis for axis in axes], **attributes)


def _clip(b: Builder, x: Value, low: float | None, high: float | None) -> Value:
    if b.opset < 11:
        given = {"min": low, "max": high}
        return b.op("Clip", x, **{name: number for name, number in given.items() if number is not None})
    bounds = [None if number is None else b.const(np.array(number, np.float32)) for number in (low, high)]
    while bounds and bounds[-1] is None:
        bounds.pop()
    return b.op("Clip", x, *bounds, bound=x.bound)


def _image(b: Builder) -> Value:
    """Return a 4-D value whose sizes but the first are known and not too small."""
    return b.pick(rank=4, where=lambda s: _static(s[1:]) and min(s[2:]) >= 3, fresh=("batch", 4, 5, 5))


def _conv(b: Builder, x: Value, computed: bool = False) -> Value:
    """Add a Conv of any kind: plain, grouped or depthwise, with or without bias, padded in one of three ways."""
    channels = x.shape[1]
    group = b.rng.choice([1, 1, channels, 2 if channels % 2 == 0 else 1])
    out, side = group * b.rng.choice((1, 2)) if group > 1 else b.rng.choice((2, 3, 4)), b.rng.choice((1, 3))
    w = b.weight(out, channels // group, side, side)
    w = b.op("Mul", w, b.pick(rank=0), bound=3.0) if computed else w
    bias = [b.weight(out)] if b.chance(0.5) else []
    pads = ({"pads": [1, 1, 1, 1]}, {"pads": [0, 1, 1, 0]})
    padding = b.rng.choice(({}, *pads, {"auto_pad": "SAME_UPPER"}, {"auto_pad": "VALID"}))
    stride = {"strides": [b.rng.choice((1, 2))] * 2} if b.chance(0.5) else {}
    bound = x.bound * w.bound * channels // group * side**2 + 1
    return b.op("Conv", x, w, *bias, group=group, kernel_shape=[side, side], bound=bound, **padding, **stride)


def _affine(b: Builder, x: Value, shape: Callable[[Value], tuple[int, ...]]) -> Value:
    """Return a value scaled, shifted or negated by a positive constant of a shape that suits it."""
    op = b.rng.choice(("Mul", "Add", "Sub", "Neg", "from", *(["Div"] if x.dtype != INT64 else [])))
    if op == "Neg":
        return b.op("Neg", x)
    if x.dtype == INT64:
        w, bound = b.const(np.array(b.rng.randint(1, 3), np.int64)), 3 * x.bound + 3
    else:
        w, bound = b.weight(*shape(x), dtype=x.dtype, between=(0.5, 1.5)), 2 * x.bound + 2
    operands = (w, x) if op == "from" or (op in ("Mul", "Add") and b.chance(0.3)) else (x, w)
    return b.op("Sub" if op == "from" else op, *operands, bound=bound)


def _product(b: Builder, x: Value) -> Value:
    """Return x times a constant matrix, with or without a bias."""
    inner, outer = x.shape[-1], b.rng.choice((3, 4))
    y = b.op("MatMul", x, b.weight(inner, outer), bound=x.bound * inner)
    return (
        b.op("Add", y, b.weight(*b.rng.choice(((), (outer,), (1, outer)))), bound=y.bound + 1) if b.chance(0.6) else y
    )


def _transposed_conv(b: Builder, x: Value) -> Value:
    group = b.rng.choice([1, 2 if x.shape[1] % 2 == 0 else 1])
    w = b.weight(x.shape[1], 2, 1, 1)
    bias = [b.weight(2 * group)] if b.chance(0.5) else []
    return b.op("ConvTranspose", x, w, *bias, group=group, kernel_shape=[1, 1], bound=x.bound * x.shape[1] + 1)


def _batch_norm(b: Builder, x: Value) -> Value:
    channels = x.shape[1]
    scale, mean, variance = (b.weight(channels, between=(0.5, 1.5)) for _ in range(3))
    epsilon = {"epsilon": 1e-3} if b.chance(0.5) else {}
    return b.op("BatchNormalization", x, scale, b.weight(channels), mean, variance, bound=3 * x.bound + 4, **epsilon)


def _gemm(b: Builder, x: Value) -> Value:
    rows, columns = x.shape
    flip = isinstance(rows, int) and b.chance(0.3)
    inner, flop = rows if flip else columns, b.chance(0.5)
    w = b.weight(*((3, inner) if flop else (inner, 3)), dtype=x.dtype)
    bias = b.weight(*b.rng.choice(((3,), (1, 3), ())), dtype=x.dtype)
    bias = None if b.opset >= 11 and b.chance(0.3) else bias
    options = {"transA": int(flip), "transB": int(flop)} if flip or flop else {}
    options |= {"alpha": 0.5, "beta": 2.0} if b.chance(0.3) else {}
    return b.op("Gemm", x, w, *([] if bias is None else [bias]), bound=x.bound * inner + 1, **options)


def _inner(b: Builder, x: Value) -> Value:
    """Return what some motif makes in this subgraph, out of values inside and outside of it."""
    motifs = (unary, binary, matmul, conv_bn, constant_expression, clip, shape_reshape, duplicate_expression)
    deeper = (if_dynamic, if_constant, loop) if b.depth < DEEPEST_SUBGRAPH else ()
    result = b.rng.choice((*motifs, *deeper))(b)
    return [*b.offer(result), x][0]


def _branch(child: Builder, x: Value) -> tuple[Builder, Value]:
    """Fill a branch with something that depends on `x`, has its type, and captures other values as well."""
    y = child.op(child.rng.choice(FLOAT_UNARY), x)
    y = child.op("Add", y, child.weight(), bound=x.bound + 1) if child.chance(0.7) else y
    return child, child.absorb(y, _inner(child, x)) if child.chance(0.6) else y


def _choose(b: Builder, x: Value, condition: Value, yes: tuple[Builder, Value], no: tuple[Builder, Value]) -> Value:
    graphs = [child.graph(b.name("branch"), [y]) for child, y in (yes, no)]
    bound = max(yes[1].bound, no[1].bound)
    return b.op("If", condition, types=[x.type], bound=bound, then_branch=graphs[0], else_branch=graphs[1])


def _if(b: Builder, x: Value, condition: Value) -> Value:
    return _choose(b, x, condition, _branch(b.child(), x), _branch(b.child(), x))


def _functions(opset: int) -> dict[str, onnx.FunctionProto]:
    """Return the functions: `Activate` by an attribute, `Block` that calls it, `Gate` that chooses."""
    make_node, opsets = onnx.helper.make_node, [onnx.helper.make_opsetid("", opset)]
    both = [*opsets, onnx.helper.make_opsetid(FUNCTION_DOMAIN, 1)]
    slope = onnx.helper.make_attribute("slope", 0.3)

    def by_slope(node: onnx.NodeProto, name: str) -> onnx.NodeProto:
        node.attribute.add(name=name, ref_attr_name="slope", type=onnx.AttributeProto.FLOAT)
        return node

    def branch(op: str) -> onnx.GraphProto:
        y = onnx.helper.make_tensor_value_info("y_inner", FLOAT, None)
        return onnx.helper.make_graph([make_node(op, ["x_1"], ["y_inner"])], op, [], [y])

    activate = [by_slope(make_node("LeakyRelu", ["x_1"], ["t_2"]), "alpha"), make_node("Relu", ["x_1"], ["t_3"])]
    activate.append(make_node("Max", ["t_2", "t_3"], ["y"]))
    block = [by_slope(make_node("Activate", ["x_1"], ["t_2"], domain=FUNCTION_DOMAIN), "slope")]
    block.append(make_node("Mul", ["t_2", "factor"], ["y"]))
    gate = [make_node("If", ["condition"], ["y"], then_branch=branch("Relu"), else_branch=branch("Neg"))]
    make = onnx.helper.make_function
    return {
        "Activate": make(FUNCTION_DOMAIN, "Activate", ["x_1"], ["y"], activate, opsets, ["slope"]),
        "Block": make(FUNCTION_DOMAIN, "Block", ["x_1", "factor"], ["y"], block, both, [], [slope]),
        "Gate": make(FUNCTION_DOMAIN, "Gate", ["x_1", "condition"], ["y"], gate, opsets),
    }


@dataclass(frozen=True)
class Motif:
    """A motif, how often it is taken, and where it is possible."""

    write: Callable[[Builder], Result]
    weight: int = 3
    opsets: range = range(10, 1000)
    since_ir_version: int = 3


_COMMON = (
    unary, activation_chain, clip, binary, power, arithmetic_noop, where_compare, integer_arithmetic, cast_noop,
    cast_chain, conv_bn, conv_alone, conv_bn_shared, conv_weight_shared, bn_alone, pool, classifier_head, layer_norm,
    gelu, gemm, matmul, attention, softmax, recurrent, reshape_chain, transpose, squeeze_unsqueeze, concat_split,
    slice_, pad, flatten, expand, gather, reduction, shape_reshape, shape_of_known, identity_outputs, dropout,
    dead_branch, unused_initializer, duplicate_expression, duplicate_initializers, weight_shared, default_input,
    input_as_output, inner_output, odd_attributes, constant_expression, constant_range, constant_forms, if_dynamic,
    if_constant, if_nested, loop, scan, affine_chain, linear_affine, padded, linear_pair, reduction_dropped,
    bounds_chain, branches_alike, cast_around, cast_integers, cuts_and_joins, index_chain, loop_invariant,
    split_and_join, shape_branch, shape_expand, shape_flatten, shape_halves, shape_heads, shape_mask, shape_numbers,
    shape_tile,
)  # fmt: skip

MOTIFS: Mapping[str, Motif] = {
    **{write.__name__.rstrip("_"): Motif(write) for write in _COMMON},
    "conv_bn": Motif(conv_bn, weight=18),
    "activation_chain": Motif(activation_chain, weight=9),
    "padded": Motif(padded, weight=9),
    "repeated_elements": Motif(repeated_elements, weight=9),
    "linear_pair": Motif(linear_pair, weight=9),
    "reduction_dropped": Motif(reduction_dropped, weight=9),
    "written_activation": Motif(written_activation, weight=9),
    "written_norm": Motif(written_norm),
    "residual_norm": Motif(residual_norm, opsets=range(17, 1000)),
    "normalized_product": Motif(normalized_product, opsets=range(17, 1000)),
    "heads_attention": Motif(heads_attention),
    "group_norm": Motif(group_norm),
    "norm_of_any_type": Motif(norm_of_any_type),
    "written_softmax": Motif(written_softmax),
    "shape_range": Motif(shape_range, opsets=range(11, 1000)),
    "shape_resize": Motif(shape_resize, opsets=range(11, 1000)),
    "shape_slice": Motif(shape_slice),
    "default_input": Motif(default_input, since_ir_version=4),
    # In opset 10 inference knows the shape of nothing that a Slice feeds.
    "layout_detour": Motif(layout_detour, opsets=range(11, 1000)),
    "function_call": Motif(function_call, weight=6, since_ir_version=8),
    "function_with_if": Motif(function_with_if, since_ir_version=8),
    "sequence": Motif(sequence, opsets=range(11, 1000), weight=1),
    "string_constant": Motif(string_constant, opsets=range(13, 1000), weight=1),
    "zero_size": Motif(zero_size, weight=1),
    "random_numbers": Motif(random_numbers, opsets=range(10, 22), weight=1),
    "nonfinite": Motif(nonfinite, weight=1),
}
