"""Reductions with a Squeeze, Flatten or Reshape behind them, and means over images."""

from __future__ import annotations

from collections import Counter

import numpy as np

from graphopt.passes.exact.fuse_reductions import REDUCTIONS

from .differential import Draft, feeds_of, fired

CASES = 250


def reduced(draft: Draft, x: str, op_type: str, axes: list[int]) -> str:
    since = 13 if op_type == "ReduceSum" else 18
    if not axes:
        return draft.node(op_type, x)
    if draft.opset >= since:
        return draft.node(op_type, x, draft.const(axes, np.int64), keepdims=1)
    return draft.node(op_type, x, axes=axes)


def reshaped(draft: Draft, x: str, axes: list[int], rank: int, shape: tuple[int, ...]) -> str:
    left = [shape[axis] for axis in range(rank) if axis not in {one % rank for one in axes}]
    match draft.rng.choice(("Squeeze", "Squeeze", "Flatten", "Reshape")):
        case "Squeeze":
            dropped = [axis % rank if draft.rng.random() < 0.5 else axis for axis in axes]
            dropped = dropped[:-1] if draft.rng.random() < 0.2 and len(axes) > 1 else dropped
            if not axes or draft.rng.random() < 0.1:
                return draft.node("Squeeze", x)
            if draft.opset < 13:
                return draft.node("Squeeze", x, axes=dropped)
            return draft.node("Squeeze", x, draft.const(dropped, np.int64))
        case "Flatten":
            return draft.node("Flatten", x, axis=draft.rng.choice((1, 1, 1, 2)))
    target = draft.rng.choice(([0, -1], left, [-1, *left[1:2]], [*left[:1], -1], [-1, 1]))
    return draft.node("Reshape", x, draft.const(target, np.int64))


def test_reductions_that_drop_their_axes_compute_the_same() -> None:
    rules: Counter[str] = Counter()
    for seed in range(CASES):
        draft = Draft(seed)
        draft.opset = draft.rng.choice((11, 12, 13, 17, 18, 20))
        rank = draft.rng.choice((3, 4))
        shape = (draft.rng.choice((1, 2)), 3, *([4] * (rank - 2)))
        images = list(range(2, rank))
        axes = draft.rng.choice((images, images, images, [1], [-1], [0], [0, 1], []))
        axes = [axis - rank if draft.rng.random() < 0.3 and axis > 0 else axis for axis in axes]
        x = draft.node("Relu", draft.node("Conv", "x", draft.drawn((3, 3, *([1] * (rank - 2))))))
        y = reduced(draft, x, draft.rng.choice((*REDUCTIONS, "ReduceMean", "ReduceMean")), axes)
        if draft.rng.random() < 0.8:
            y = reshaped(draft, y, axes, rank, shape)
        declared = draft.rng.choice((shape, ("batch", *shape[1:]), ("a", "b", *shape[2:])))
        rules += fired("fuse-reductions", draft.model(y, declared), feeds_of(shape, np.float32)[:1])
    assert set(rules) == {"reduce-squeeze", "reduce-flatten", "mean-as-pool"}, rules
