"""Motifs that compute with shapes, as exporters do: sizes read, changed, joined, and used to reshape or slice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto

if TYPE_CHECKING:
    from .graph_generator import Builder, Value

FLOAT, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64
LARGE = 1e3


def shape_heads(b: Builder) -> Value:
    """The last axis split in heads and moved, and joined again, every size taken from Shape."""
    x = _tokens(b)
    batch, length = _size(b, x, 0), _size(b, x, 1)
    split = _concat(b, batch, length if b.chance(0.7) else b.ints([-1]), b.ints([2, 2]))
    y = b.op("Reshape", x, split, as_shape=(*x.shape[:2], 2, 2))
    y = b.op("Transpose", y, perm=[0, 2, 1, 3])
    y = b.op("Relu", y) if b.chance(0.3) else y
    y = b.op("Transpose", y, perm=[0, 2, 1, 3])
    if b.chance(0.5):
        batch, length = _size(b, y, 0), _size(b, y, 1)
    width = b.rng.choice((lambda: b.ints([-1]), lambda: b.ints([4]), lambda: _product_of(b, y, 2, 3)))()
    return b.op("Reshape", y, _concat(b, batch, length, width), as_shape=x.shape)


def shape_flatten(b: Builder) -> Value:
    """Axes merged by a product of their sizes, and sometimes parted again."""
    x = _tokens(b)
    rows = _product_of(b, x, 0, 1)
    y = b.op("Reshape", x, _concat(b, rows, b.rng.choice((_size(b, x, 2), b.ints([-1])))), as_shape=(None, 4))
    if b.chance(0.4):
        return y
    y = b.op("MatMul", y, b.weight(4, 4), as_shape=(None, 4), bound=x.bound * 4)
    back = _concat(b, _size(b, x, 0), _size(b, x, 1), b.ints([4]))
    return b.op("Reshape", y, back, as_shape=x.shape)


def shape_expand(b: Builder) -> Value:
    """A constant or a narrow value expanded to the shape of another, minus ones replaced as torch's exporter does."""
    x = _tokens(b)
    target = b.rng.choice((lambda: b.op("Shape", x), lambda: _concat(b, *(_size(b, x, axis) for axis in range(3)))))()
    if b.chance(0.5):
        ones = b.op("ConstantOfShape", b.ints([3]), value=_tensor(np.array([1], np.int64)))
        keeps = b.op("Mul", ones, b.ints(-1), bound=LARGE)
        wanted = b.ints(b.rng.choice(([-1, -1, 4], [-1, -1, -1], [1, -1, 4])))
        is_free = b.op("Equal", wanted, keeps) if b.opset >= 11 else None
        target = target if is_free is None else b.op("Where", is_free, target if b.chance(0.5) else ones, wanted)
    small = b.weight(*b.rng.choice(((), (4,), (1, 1, 4), (1, 1, 1))))
    y = b.op("Expand", small, target, as_shape=x.shape)
    return b.op(b.rng.choice(("Add", "Mul")), x, y, bound=x.bound + 1)


def shape_range(b: Builder) -> Value:
    """Positions counted by Range up to a size, added to what they count."""
    x = _tokens(b)
    stop = _scalar(b, x, 1)
    start, step = b.ints(0), b.ints(1)
    if b.chance(0.3):  # as float, cast back, as torch.arange is exported
        start, stop, step = (b.op("Cast", one, to=FLOAT, bound=LARGE) for one in (start, stop, step))
    positions = b.op("Range", start, stop, step, as_shape=(x.shape[1],), bound=4.0)
    positions = positions if positions.dtype == FLOAT else b.op("Cast", positions, to=FLOAT, bound=4.0)
    row = b.op("Reshape", positions, b.ints([-1, 1]), as_shape=(x.shape[1], 1))
    return b.op("Add", x, row, bound=x.bound + 4)


def shape_slice(b: Builder) -> Value:
    """A slice that begins or ends at a size less one, half a size, a minimum of sizes, or the size itself."""
    x = _tokens(b)
    size = _size(b, x, 1)
    one = b.ints([1])
    forms = [
        lambda: (b.ints([0]), size),
        lambda: (b.ints([0]), b.op("Sub", size, one)),
        lambda: (b.op("Sub", size, one), b.ints([2**31 - 1])),
        lambda: (b.op("Div", size, b.ints([2])), size),
        lambda: (b.op("Mul", one, b.ints([-1])), b.op("Add", size, one)),
    ]
    if b.opset >= 12:
        forms.append(lambda: (b.ints([0]), b.op("Min", size, b.ints([2]))))
    start, stop = b.rng.choice(forms)()
    steps = [b.ints([1])] if b.chance(0.5) else []
    y = b.op("Slice", x, start, stop, b.ints([1]), *steps, as_shape=(x.shape[0], None, 4))
    return b.op("Relu", y, as_shape=(x.shape[0], None, 4))


def shape_halves(b: Builder) -> Value:
    """The last axis cut in two at half its size, and joined the other way round, as rotations are."""
    x = _tokens(b)
    half = b.op("Div", _size(b, x, 2), b.ints([2]))
    low = b.op("Slice", x, b.ints([0]), half, b.ints([-1]), as_shape=(*x.shape[:2], 2))
    high = b.op("Slice", x, half, b.ints([2**63 - 1]), b.ints([-1]), as_shape=(*x.shape[:2], 2))
    return b.op("Concat", b.op("Neg", high), low, axis=-1 if b.opset >= 11 else 2, as_shape=x.shape)


def shape_mask(b: Builder) -> Value:
    """A causal mask as large as the sequence, built from its size, on the product of a value with itself."""
    x = _tokens(b)
    size = _size(b, x, 1)
    scores = b.op("MatMul", x, b.op("Transpose", x, perm=[0, 2, 1]), bound=x.bound**2 * 4)
    square = _concat(b, size, size)
    fill = _tensor(np.array([b.rng.choice((0.0, 1.0, -1e4))], np.float32))
    mask = b.op("ConstantOfShape", square, value=fill, as_shape=(x.shape[1], x.shape[1]))
    if b.opset >= 14 and b.chance(0.7):
        mask = b.op("Trilu", mask, b.ints(1), upper=1)
    if b.opset >= 11 and b.chance(0.4):
        count = b.op("Range", b.ints(0), _scalar(b, x, 1), b.ints(1), as_shape=(x.shape[1],), bound=4.0)
        column = b.op("Reshape", count, b.ints([-1, 1]), as_shape=(x.shape[1], 1))
        mask = b.op("Where", b.op("Less", column, count), mask, b.const(np.zeros((), np.float32)))
    return b.op("Softmax", b.op("Add", scores, mask, bound=1e5), axis=2, bound=1.0)


def shape_tile(b: Builder) -> Value:
    """A narrow constant tiled, or a value made of one number, to sizes taken from Shape."""
    x = _tokens(b)
    if b.chance(0.5):
        repeats = _concat(b, _size(b, x, 0), _size(b, x, 1), b.ints([1]))
        y = b.op("Tile", b.weight(1, 1, 4), repeats, as_shape=x.shape)
    else:
        value = _tensor(np.array([b.rng.choice((0.0, 1.0, 2.0))], np.float32))
        sizes = _concat(b, _size(b, x, 0), _size(b, x, 1), b.ints([4]))
        y = b.op("ConstantOfShape", sizes, value=value, as_shape=x.shape)
    return b.op(b.rng.choice(("Add", "Mul", "Sub")), x, y, bound=2 * x.bound + 2)


def shape_branch(b: Builder) -> Value:
    """A choice by a size: If or Where on a comparison that is constant when shapes are."""
    x = _tokens(b)
    axis = b.rng.randrange(3)
    test = b.op(b.rng.choice(("Less", "Greater", "Equal")), _scalar(b, x, axis), b.ints(b.rng.choice((1, 2, 4))))
    if b.chance(0.4):
        return b.op("Where", test, x, b.op("Neg", x))
    graphs = []
    for op in ("Relu", "Neg"):
        branch = b.child()
        graphs.append(branch.graph(b.name("branch"), [branch.op(op, x)]))
    return b.op("If", test, types=[x.type], bound=x.bound, then_branch=graphs[0], else_branch=graphs[1])


def shape_numbers(b: Builder) -> Value:
    """Sizes as numbers: a value divided by the root of its width, or scaled by how many elements it has."""
    x = _tokens(b)
    if b.chance(0.5):
        width = b.op("Cast", _size(b, x, 2), to=FLOAT, bound=4.0)
        return b.op("Div", x, b.op("Sqrt", width))
    count = b.op("Size", x) if b.chance(0.5) else b.op("ReduceProd", b.op("Shape", x), keepdims=0)
    number = b.op("Cast", count, to=FLOAT, bound=100.0)
    return b.op("Mul", x, b.op("Sigmoid", number))


def shape_resize(b: Builder) -> Value:
    """Resize to twice the size, by factors or by sizes that keep the first two."""
    x = b.pick(rank=4, where=lambda s: isinstance(s[1], int) and isinstance(s[2], int), fresh=("batch", 2, 5, 5))
    grown = (*x.shape[:2], x.shape[2] * 2, x.shape[3] * 2)
    roi = None if b.opset >= 13 or b.chance(0.5) else b.const(np.zeros(0, np.float32))
    roi = b.const(np.zeros(0, np.float32)) if b.opset < 13 and roi is None else roi
    if b.chance(0.5):
        return b.op("Resize", x, roi, b.const(np.array([1, 1, 2, 2], np.float32)), mode="nearest", as_shape=grown)
    kept = b.op("Slice", b.op("Shape", x), b.ints([0]), b.ints([2]), b.ints([0]))
    sizes = _concat(b, kept, b.ints(grown[2:]))
    scales = None if b.opset >= 13 else b.const(np.zeros(0, np.float32))
    return b.op("Resize", x, roi, scales, sizes, mode="nearest", as_shape=grown)


# Parts


def _tokens(b: Builder) -> Value:
    """Return a value of shape [batch, length, 4], the first two mostly dynamic."""
    return b.pick(rank=3, where=lambda s: s[2] == 4, fresh=("batch", "seq", 4))


def _size(b: Builder, x: Value, axis: int) -> Value:
    """Return one size as int64 [1], read in one of the ways in which exporters do."""
    ways = ["gather", "gather", "gather_1d", "slice", *(["attributes"] * 2 if b.opset >= 15 else [])]
    match b.rng.choice(ways):
        case "gather":
            size = _unsqueeze(b, _scalar(b, x, axis))
        case "gather_1d":
            size = b.op("Gather", b.op("Shape", x), b.ints([axis if b.chance(0.7) else axis - len(x.shape)]), axis=0)
        case "slice":
            size = b.op("Slice", b.op("Shape", x), b.ints([axis]), b.ints([axis + 1]), b.ints([0]))
        case _:
            size = b.op("Shape", x, start=axis, end=axis + 1)
    if b.chance(0.15):
        size = b.op("Cast", b.op("Cast", size, to=INT32), to=INT64)
    if b.chance(0.1):
        size = b.op("Mul", size, b.ints([1]))
    return size


def _scalar(b: Builder, x: Value, axis: int) -> Value:
    """Return one size as an int64 scalar."""
    return b.op("Gather", b.op("Shape", x), b.ints(axis), axis=0)


def _product_of(b: Builder, x: Value, first: int, second: int) -> Value:
    """Return the product of two sizes as int64 [1]."""
    if b.chance(0.6):
        return b.op("Mul", _size(b, x, first), _size(b, x, second))
    return _unsqueeze(b, b.op("Mul", _scalar(b, x, first), _scalar(b, x, second)))


def _concat(b: Builder, *sizes: Value) -> Value:
    """Return int64 vectors joined, sometimes through Cast, which exporters add to be safe."""
    joined = b.op("Concat", *sizes, axis=0)
    return b.op("Cast", joined, to=INT64) if b.chance(0.2) else joined


def _unsqueeze(b: Builder, x: Value) -> Value:
    return b.op("Unsqueeze", x, b.ints([0])) if b.opset >= 13 else b.op("Unsqueeze", x, axes=[0])


def _tensor(array: np.ndarray) -> TensorProto:
    return onnx.numpy_helper.from_array(array)
