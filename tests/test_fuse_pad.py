"""Pads before Conv and AveragePool, of every width, filler and form."""

from __future__ import annotations

from collections import Counter

import numpy as np

from .differential import Draft, feeds_of, fired

CASES = 250


def pad(draft: Draft, rank: int) -> str:
    widths = [0, 0, *(draft.rng.choice((0, 1, 2)) for _ in range(rank - 2))] * 2
    if draft.rng.random() < 0.15:
        widths[draft.rng.randrange(2 * rank)] = draft.rng.choice((-1, 1))
    mode = draft.rng.choice(("constant", "constant", "constant", "constant", "edge"))
    filler = draft.rng.choice((0, 0, 0, 1))
    if draft.opset < 11:
        return draft.node("Pad", "x", pads=widths, mode=mode, value=float(filler))
    if draft.opset >= 18 and draft.rng.random() < 0.5:
        begins, ends = widths[:rank], widths[rank:]
        axes = draft.const([axis - rank if draft.rng.random() < 0.5 else axis for axis in range(2, rank)], np.int64)
        given = draft.const([*begins[2:], *ends[2:]], np.int64)
        return draft.node("Pad", "x", given, draft.const(filler), axes, mode=mode)
    inputs = [draft.const(filler)] if filler or draft.rng.random() < 0.5 else []
    return draft.node("Pad", "x", draft.const(widths, np.int64), *inputs, mode=mode)


def test_padding_taken_over_computes_the_same() -> None:
    rules: Counter[str] = Counter()
    for seed in range(CASES):
        draft = Draft(seed)
        draft.opset = draft.rng.choice((10, 11, 13, 17, 18, 20))
        rank = draft.rng.choice((3, 4, 4, 5))
        spatial = rank - 2
        shape = (1, 2, *([4] * spatial))
        padded = pad(draft, rank)
        own = draft.rng.choice(
            ({}, {}, {"pads": [1] * (2 * spatial)}, {"auto_pad": "VALID"}, {"auto_pad": "SAME_UPPER"})
        )
        if draft.rng.random() < 0.5:
            more = draft.rng.choice(({}, {"dilations": [2] * spatial}, {"strides": [2] * spatial}))
            bias = [draft.drawn((3,))] if draft.rng.random() < 0.5 else []
            y = draft.node("Conv", padded, draft.drawn((3, 2, *([2] * spatial))), *bias, **own, **more)
        else:
            more = draft.rng.choice(({}, {"count_include_pad": 1}, {"count_include_pad": 1, "strides": [2] * spatial}))
            more = {**more, **draft.rng.choice(({}, {}, {"ceil_mode": 1}))}
            y = draft.node("AveragePool", padded, kernel_shape=[draft.rng.choice((2, 3))] * spatial, **own, **more)
        declared = draft.rng.choice((shape, ("batch", *shape[1:]), ("batch", 2, *(f"d{i}" for i in range(spatial)))))
        rules += fired("fuse-pad", draft.model(y, declared), feeds_of(shape, np.float32)[:1])
    assert min(rules["pad-conv"], rules["pad-averagepool"]) > CASES / 25, rules
