"""Chains of affine steps, of every dtype and shape of constants."""

from __future__ import annotations

from collections import Counter

import numpy as np

from .differential import Draft, feeds_of, fired

CASES = 250
DTYPES = (np.float32, np.float32, np.float64, np.float16, np.int32, np.int64)
SHAPE = (2, 3, 4)
CONSTANTS = ((), (1,), (4,), (3, 1), (1, 1, 4), (2, 3, 4), (1, 2, 3, 4))


def constant(draft: Draft) -> str:
    shape = draft.rng.choice(CONSTANTS)
    if np.dtype(draft.dtype).kind == "i":
        largest = draft.rng.choice((9, np.iinfo(draft.dtype).max))
        return draft.const(np.random.default_rng(draft.rng.getrandbits(32)).integers(1, largest, shape))
    scale = draft.rng.choice((1, 1, 1, 100, 1e-3))
    return draft.const(np.random.default_rng(draft.rng.getrandbits(32)).uniform(0.5, 2, shape) * scale)


def step(draft: Draft, x: str) -> str:
    op_type = draft.rng.choice(("Mul", "Div", "Add", "Sub", "from", "Neg"))
    if op_type == "Neg":
        return draft.node("Neg", x)
    number = constant(draft)
    if op_type == "from":
        return draft.node("Sub", number, x)
    swapped = op_type in ("Mul", "Add") and draft.rng.random() < 0.3
    return draft.node(op_type, *((number, x) if swapped else (x, number)))


def test_merged_chains_compute_the_same() -> None:
    rules: Counter[str] = Counter()
    for seed in range(CASES):
        draft = Draft(seed)
        draft.dtype = draft.rng.choice(DTYPES)
        x = "x"
        for _ in range(draft.rng.choice((2, 3, 4))):
            x = step(draft, x)
        if draft.rng.random() < 0.15:
            x = draft.node(draft.rng.choice(("Add", "Sub")), "x", draft.node("Neg", x))
        shape = draft.rng.choice((SHAPE, ("batch", 3, 4)))
        rules += fired("merge-affine", draft.model(x, shape), feeds_of(SHAPE, draft.dtype)[:1])
    assert set(rules) == {"factors", "terms", "scaled-shift", "negated-term"}, rules
