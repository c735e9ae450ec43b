"""Motifs that transformers are made of, written out as exporters do: activations, normalizations, heads, rotations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .graph_generator import Builder, Value

HEADS, SIZE = 2, 8


def written_activation(b: Builder) -> Value:
    """Gelu by erf or tanh, SiLU, HardSigmoid, HardSwish or Mish, out of their parts; often behind a bias."""
    x = b.pick()
    if x.shape and x.shape[-1] == 4 and b.chance(0.5):
        x = b.op("Add", x, b.weight(4), bound=x.bound + 1)
    return b.rng.choice((_erf_gelu, _tanh_gelu, _silu, _hard_sigmoid, _hard_swish, _mish))(b, x)


def written_norm(b: Builder) -> Value:
    """A root-mean-square or layer normalization out of its parts, scaled and shifted or not."""
    x = b.pick(where=lambda shape: len(shape) > 1, fresh=("batch", 4))
    x = b.op("Sub", x, _mean(b, x), bound=2 * x.bound) if b.chance(0.5) else x
    square = b.op("Mul", x, x, bound=x.bound**2) if b.chance(0.5) else b.op("Pow", x, _number(b, 2), bound=x.bound**2)
    root = b.op("Sqrt", b.op("Add", _mean(b, square), _number(b, 0.01), bound=square.bound + 1))
    if b.chance(0.5):
        y = b.op("Div", x, root, bound=10 * x.bound)
    else:
        inverse = b.op("Reciprocal", root) if b.chance(0.5) else b.op("Div", _number(b, 1), root)
        y = b.op("Mul", x, inverse, bound=10 * x.bound)
    width = x.shape[-1] if isinstance(x.shape[-1], int) else 1
    y = b.op("Mul", y, b.weight(width), bound=y.bound) if b.chance(0.7) else y
    return b.op("Add", y, b.weight(width), bound=y.bound + 1) if b.chance(0.5) else y


def residual_norm(b: Builder) -> Value:
    """LayerNormalization of a sum, biased or not, which is read on or not."""
    x = b.pick(where=lambda shape: len(shape) > 1 and isinstance(shape[-1], int), fresh=("batch", 4))
    width = x.shape[-1]
    y = b.op("Add", x, b.weight(width), bound=x.bound + 1) if b.chance(0.5) else b.op("Tanh", x)
    total = b.op("Add", y, x, bound=y.bound + x.bound)
    normal = b.op("LayerNormalization", total, b.weight(width), b.weight(width), epsilon=0.01, bound=10.0)
    return b.op("Add", normal, total, bound=normal.bound + total.bound) if b.chance(0.3) else normal


def normalized_product(b: Builder) -> Value:
    """A product that alone reads a LayerNormalization, whose factors differ thirtyfold."""
    x = b.pick(where=lambda shape: len(shape) > 1 and isinstance(shape[-1], int) and shape[-1] > 1, fresh=("batch", 4))
    width = x.shape[-1]
    factors = b.const(np.geomspace(0.05, 1.5, width).astype(np.float32))
    normal = b.op("LayerNormalization", x, factors, b.weight(width), epsilon=0.01, bound=2.0 * width)
    return b.op("MatMul", normal, b.weight(width, 4), bound=2.0 * width**2)


def heads_attention(b: Builder) -> Value:
    """Attention of several heads: rotated or not, masked or not, grouped or not."""
    x = b.pick(rank=3, where=lambda s: isinstance(s[2], int), fresh=(2, 3, 4))
    grouped = b.chance(0.3) and isinstance(x.shape[0], int) and isinstance(x.shape[1], int)
    q, k, v = (_heads(b, x, 1 if grouped and i else HEADS) for i in range(3))
    if isinstance(x.shape[1], int) and b.chance(0.4):
        q, k = _rotated(b, q, x.shape[1]), _rotated(b, k, x.shape[1])
    if grouped:
        k, v = _repeated(b, k), _repeated(b, v)
    scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2]), bound=q.bound * k.bound * SIZE)
    scores = b.op("Mul", scores, _number(b, 0.5), bound=scores.bound)
    if isinstance(x.shape[1], int) and b.chance(0.5):
        scores = b.op("Add", scores, _mask(b, x.shape[1]))
    y = b.op("MatMul", b.op("Softmax", scores, axis=-1 if b.opset > 10 else 3), v, bound=v.bound)
    if b.chance(0.2):
        return y
    return b.op("Reshape", b.op("Transpose", y, perm=[0, 2, 1, 3]), b.ints([0, 0, HEADS * SIZE]))


def _number(b: Builder, number: float) -> Value:
    return b.const(np.array(number, np.float32))


def _mean(b: Builder, x: Value) -> Value:
    if b.opset < 18:
        return b.op("ReduceMean", x, axes=[-1], bound=x.bound)
    return b.op("ReduceMean", x, b.ints([-1]), bound=x.bound)


def _erf_gelu(b: Builder, x: Value) -> Value:
    gate = b.op("Add", b.op("Erf", b.op("Div", x, _number(b, 2**0.5))), _number(b, 1), bound=2.0)
    if b.chance(0.5):
        return b.op("Mul", b.op("Mul", x, _number(b, 0.5)), gate, bound=x.bound)
    return b.op("Mul", b.op("Mul", x, gate, bound=2 * x.bound), _number(b, 0.5), bound=x.bound)


def _tanh_gelu(b: Builder, x: Value) -> Value:
    cube = b.op("Mul", b.op("Pow", x, _number(b, 3), bound=x.bound**3), _number(b, 0.044715), bound=x.bound**3)
    inner = b.op("Add", x, cube, bound=x.bound + cube.bound)
    gate = b.op("Tanh", b.op("Mul", inner, _number(b, (2 / np.pi) ** 0.5), bound=inner.bound), bound=1.0)
    return b.op("Mul", b.op("Mul", x, _number(b, 0.5)), b.op("Add", gate, _number(b, 1), bound=2.0), bound=x.bound)


def _silu(b: Builder, x: Value) -> Value:
    scaled = b.op("Mul", x, _number(b, 1.702), bound=2 * x.bound) if b.chance(0.3) else x
    return b.op("Mul", x, b.op("Sigmoid", scaled, bound=1.0), bound=x.bound)


def _hard_sigmoid(b: Builder, x: Value) -> Value:
    shifted = b.op("Add", x, _number(b, 3), bound=x.bound + 3)
    if b.opset < 11:
        clipped = b.op("Clip", shifted, min=0.0, max=6.0, bound=6.0)
    else:
        clipped = b.op("Clip", shifted, _number(b, 0), _number(b, 6), bound=6.0)
    return b.op("Div", clipped, _number(b, 6), bound=1.0)


def _hard_swish(b: Builder, x: Value) -> Value:
    return b.op("Mul", x, _hard_sigmoid(b, x), bound=x.bound)


def _mish(b: Builder, x: Value) -> Value:
    return b.op("Mul", x, b.op("Tanh", b.op("Softplus", x, bound=x.bound + 1), bound=1.0), bound=x.bound)


def _heads(b: Builder, x: Value, count: int) -> Value:
    y = b.op("MatMul", x, b.weight(x.shape[2], count * SIZE), bound=x.bound * x.shape[2])
    y = b.op("Add", y, b.weight(count * SIZE), bound=y.bound + 1) if b.chance(0.5) else y
    return b.op("Transpose", b.op("Reshape", y, b.ints([0, 0, count, SIZE])), perm=[0, 2, 1, 3])


def _repeated(b: Builder, x: Value) -> Value:
    batch, few, length, size = x.shape
    y = b.op("Unsqueeze", x, axes=[2]) if b.opset < 13 else b.op("Unsqueeze", x, b.ints([2]))
    y = b.op("Expand", y, b.ints([batch, few, HEADS // few, length, size]))
    return b.op("Reshape", y, b.ints([batch, HEADS, length, size]))


def _rotated(b: Builder, x: Value, length: int) -> Value:
    angles = np.outer(np.arange(length), 10.0 ** -np.arange(SIZE // 2)).astype(np.float32)
    both = np.concatenate([angles, angles], axis=-1)[None, None]
    # One table in four has halves that differ.
    both[..., 0] += b.chance(0.25)
    half, end = b.ints([SIZE // 2]), b.ints([2**62])
    upper, lower = b.op("Slice", x, half, end, b.ints([3])), b.op("Slice", x, b.ints([0]), half, b.ints([3]))
    turned = b.op("Concat", b.op("Neg", upper), lower, axis=-1 if b.opset > 10 else 3)
    straight, across = b.op("Mul", x, b.const(np.cos(both))), b.op("Mul", turned, b.const(np.sin(both)))
    return b.op("Add", straight, across, bound=2 * x.bound)


def _mask(b: Builder, length: int) -> Value:
    mask = np.triu(np.full((length, length), b.rng.choice((-1.0, np.finfo(np.float32).min, -np.inf)), np.float32), 1)
    if b.chance(0.2):
        mask[0] = mask[0, -1]
    return b.const(mask[None, None] if b.chance(0.7) else mask)
