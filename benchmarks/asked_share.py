"""How much a tool has to be asked to take away for a share of the multiplications to be left: tried, and counted."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from prune_judging import macs

Feeds = dict[str, np.ndarray[Any, Any]]
# Given how much to remove, 0 to 1, returns what is left.
Shrinker = Callable[[float], onnx.ModelProto]

# Halvings of the interval of ratios: to about half a percent.
HALVINGS = 8


def down_to(share: float, model: onnx.ModelProto, feeds: Feeds, shrink: Shrinker) -> onnx.ModelProto:
    """Return what a tool makes by the least ratio that leaves no more than a share of the multiplications."""
    sample = {name: x[:1] for name, x in feeds.items()}
    whole, best = count(model, sample), None
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        ratio = (low + high) / 2
        made = shrink(ratio)
        if count(made, sample) > share * whole:
            low = ratio
        else:
            high, best = ratio, made
    if best is None:
        raise ValueError(f"no ratio leaves {share:.0%} of the multiplications")
    return best


def count(model: onnx.ModelProto, sample: Feeds) -> int:
    """Return the multiply-accumulates of a model in memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        return macs(path, sample)
