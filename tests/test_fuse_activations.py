"""Pairs of clamps, with bounds of every kind, on numbers that have no order too."""

from __future__ import annotations

from collections import Counter

import numpy as np

from .differential import Draft, feeds_of, fired

CASES = 250
DTYPES = (np.float32, np.float32, np.float64, np.float16, np.int32, np.int64)
BOUNDS = (-2, -1, 0, 0, 1, 2, 6)
SHAPE = (2, 3, 5)


def clamp(draft: Draft, x: str) -> str:
    op_type = draft.rng.choice(("Clip", "Clip", "Relu", "Max", "Min"))
    low, high = (draft.rng.choice(BOUNDS) if draft.rng.random() < 0.8 else None for _ in range(2))
    if op_type == "Relu":
        return draft.node("Relu", x)
    if op_type in ("Max", "Min"):
        bound = draft.const(
            np.full(draft.rng.choice(((), (), (1,), (1, 1, 1), (5,), (1, 1, 1, 1))), draft.rng.choice(BOUNDS))
        )
        return draft.node(op_type, *draft.rng.choice(((x, bound), (bound, x))))
    if draft.opset < 11:
        given = {name: float(one) for name, one in (("min", low), ("max", high)) if one is not None}
        return draft.node("Clip", x, **given)
    return draft.node("Clip", x, *("" if one is None else draft.const(one) for one in (low, high)))


def test_merged_clamps_compute_the_same() -> None:
    rules: Counter[str] = Counter()
    for seed in range(CASES):
        draft = Draft(seed)
        draft.dtype, draft.opset = draft.rng.choice(DTYPES), draft.rng.choice((10, 11, 12, 13, 17, 21))
        x = "x"
        for _ in range(draft.rng.choice((2, 2, 3))):
            x = clamp(draft, x)
        rules += fired("fuse-activations", draft.model(x, SHAPE), feeds_of(SHAPE, draft.dtype))
    assert rules["clamps"] > CASES / 3, rules


def test_merged_signs_compute_the_same() -> None:
    rules: Counter[str] = Counter()
    for seed, inner in enumerate(("Sigmoid", "HardSigmoid", "Softmax", "Softplus", "Exp", "Sqrt", "Abs", "Relu")):
        for outer in ("Relu", "Abs"):
            for dtype in (np.float32, np.float64, np.float16):
                for attributes in ({}, {"axis": 1}) if inner == "Softmax" else ({},):
                    draft = Draft(seed, dtype, opset=(11, 13, 17)[seed % 3])
                    y = draft.node(outer, draft.node(inner, "x", **attributes))
                    rules += fired("fuse-activations", draft.model(y, SHAPE), feeds_of(SHAPE, dtype)[:2])
    assert set(rules) == {"relu-of-nonnegative", "abs-of-nonnegative", "clamps"}, rules
