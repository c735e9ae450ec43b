"""Affine steps around linear operators, over every combination of operator, step, shape and attribute."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx

from .differential import Draft, feeds_of, fired
from .test_golden import rules_of

CASES = 420
DTYPES = (np.float32, np.float32, np.float64, np.float16)
SIZES = (1, 2, 4, 6)


def constant(draft: Draft, shape: list[int], axis: int) -> str:
    """Return a positive constant that broadcasts along the channels, or, at times, along other axes, or adds some."""
    channel = [1] * len(shape)
    channel[axis] = shape[axis]
    other = [1] * len(shape)
    other[0] = shape[0]
    choices = ([], [1], channel, channel[axis:], channel, channel[axis:], other, [1, *channel], [1] * len(shape), shape)
    return draft.drawn(draft.rng.choice(choices), low=0.5)


def step(draft: Draft, x: str, shape: list[int], axis: int) -> str:
    """Scale or shift x by constants that broadcast along its channel axis, mostly."""
    op_type = draft.rng.choice(("Mul", "Div", "Add", "Sub", "from", "Neg", *["BatchNormalization"] * 2))
    match op_type:
        case "Neg":
            return draft.node("Neg", x)
        case "BatchNormalization" if len(shape) >= 2:
            return draft.node("BatchNormalization", x, *(draft.drawn([shape[1]], low=0.5) for _ in range(4)))
        case "BatchNormalization" | "Mul" | "Add":
            operands = [x, constant(draft, shape, axis)]
            draft.rng.shuffle(operands)
            return draft.node("Add" if op_type == "Add" else "Mul", *operands)
        case "from":
            return draft.node("Sub", constant(draft, shape, axis), x)
    return draft.node(op_type, x, constant(draft, shape, axis))


def convolution(draft: Draft, kind: str, batch: int) -> tuple[list[int], str]:
    """Return the shape of the input, and the output, of a convolution with a step before or behind it."""
    rng = draft.rng
    spatial, groups = rng.choice((1, 2)), rng.choice((1, 1, 2, 4))
    inputs, outputs = groups * rng.choice((1, 2)), groups * rng.choice((1, 2))
    shape = [batch, inputs, *([5] * spatial)]
    axis = 1 - len(shape)
    before = rng.random() < 0.4
    x = step(draft, "x", shape, axis) if before else "x"
    dims = (outputs, inputs // groups) if kind == "Conv" else (inputs, outputs // groups)
    weight = draft.drawn([*dims, *([2] * spatial)])
    bias = [draft.drawn([outputs])] if rng.random() < 0.5 else []
    options = rng.choice(({}, {"pads": [1] * (2 * spatial)}, {"auto_pad": "VALID"}, {"strides": [2] * spatial}))
    y = draft.node(kind, x, weight, *bias, group=groups, **options)
    return shape, y if before else step(draft, y, [batch, outputs, *([1] * spatial)], axis)


def product(draft: Draft, kind: str, batch: int) -> tuple[list[int], str]:
    """Return the shape of the input, and the output, of a product with a step before or behind it."""
    rng = draft.rng
    inner, outer = rng.choice(SIZES), rng.choice(SIZES)
    shape = [batch, inner] if kind == "Gemm" else [*rng.choice(([], [batch], [batch, 3])), inner]
    before = rng.random() < 0.4
    x = step(draft, "x", shape, -1) if before else "x"
    if kind == "Gemm":
        options = {name: 1 for name in ("transB",) if rng.random() < 0.5}
        weight = draft.drawn([outer, inner] if options else [inner, outer])
        options |= {name: 0.5 for name in ("alpha", "beta") if rng.random() < 0.15}
        bias = [draft.drawn(rng.choice(([], [1], [outer], [1, outer], [batch, outer])))] if rng.random() < 0.7 else []
        y = draft.node("Gemm", x, weight, *bias, **options)
    else:
        y = draft.node("MatMul", x, draft.drawn([*rng.choice(([], [2])), inner, outer]))
        if kind == "MatMul and Add":
            operands = [y, draft.drawn([outer])]
            rng.shuffle(operands)
            y = draft.node("Add", *operands)
    return shape, y if before else step(draft, y, [*shape[:-1], outer], -1)


def model_of(draft: Draft) -> tuple[onnx.ModelProto, list[int]]:
    """Return a linear operator with a step beside it, and the shape of its input."""
    draft.dtype, draft.opset = draft.rng.choice(DTYPES), draft.rng.choice((11, 13, 17, 20))
    kind = draft.rng.choice(("Conv", "Conv", "ConvTranspose", "Gemm", "MatMul", "MatMul and Add"))
    build = convolution if kind.startswith("Conv") else product
    shape, output = build(draft, kind, draft.rng.choice((1, 2)))
    declared = [f"d{i}" if draft.rng.random() < 0.15 else size for i, size in enumerate(shape)]
    return draft.model(output, declared), shape


def test_what_is_folded_computes_the_same() -> None:
    rules: Counter[str] = Counter()
    for seed in range(CASES):
        draft = Draft(seed)
        model, shape = model_of(draft)
        rules += fired("fuse-affine", model, feeds_of(shape, draft.dtype)[:1])
    assert set(rules) == rules_of("fuse-affine"), rules
