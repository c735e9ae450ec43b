"""Products of two constant matrices, and products with a bias behind them."""

from __future__ import annotations

from collections import Counter

import numpy as np

from .differential import Draft, feeds_of, fired

CASES = 250
SIZES = (1, 2, 4, 8)


def bias(draft: Draft, size: int) -> list[str]:
    return (
        [draft.drawn(draft.rng.choice(((size,), (1, size), (), (2, size), (1, 1, size))))]
        if draft.rng.random() < 0.6
        else []
    )


def linear(draft: Draft, x: str, kind: str, inner: int, outer: int) -> str:
    weight = draft.drawn((inner, outer))
    if kind == "Gemm":
        transposed = draft.rng.random() < 0.5
        weight = draft.drawn((outer, inner) if transposed else (inner, outer))
        factors = {"alpha": 0.5} if draft.rng.random() < 0.1 else {}
        return draft.node("Gemm", x, weight, *bias(draft, outer), transB=int(transposed), **factors)
    product = draft.node("MatMul", x, weight)
    added = bias(draft, outer)
    return draft.node("Add", product, *added) if added else product


def test_fewer_products_compute_the_same() -> None:
    rules: Counter[str] = Counter()
    for seed in range(CASES):
        draft = Draft(seed)
        draft.dtype = draft.rng.choice((np.float32, np.float32, np.float64, np.float16))
        kind = draft.rng.choice(("Gemm", "MatMul"))
        sizes = [draft.rng.choice(SIZES) for _ in range(3)]
        shape = (2, sizes[0]) if kind == "Gemm" else draft.rng.choice(((sizes[0],), (2, sizes[0]), (2, 2, sizes[0])))
        x = linear(draft, "x", kind, sizes[0], sizes[1])
        if draft.rng.random() < 0.7:
            x = linear(draft, x, kind, sizes[1], sizes[2])
        declared = draft.rng.choice((shape, ("batch", *shape[1:]) if len(shape) > 1 else shape))
        rules += fired("fuse-linear", draft.model(x, declared), feeds_of(shape, draft.dtype)[:1])
    assert set(rules) == {"matmul-add", "products"}, rules
