"""Pads of zeros folded into the padding of what follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.authoring import RewritePass
from graphopt.pattern import Match, Miss, Rule
from graphopt.target import Target


@dataclass(frozen=True)
class FusePad(RewritePass):
    """Fold a Pad of zeros into the Conv or AveragePool that reads it."""

    name = "fuse-pad"

    def rules(self, target: Target) -> Sequence[Rule]:
        """Return a rule for each operator with padding of its own."""
        return (PadConv(), PadAveragePool())


class PadConv(Rule):
    """Conv(Pad(x, p), pads=q) = Conv(x, pads=p+q), for zeros around the spatial axes: a Conv pads with zeros too."""

    name = "pad-conv"

    def pattern(
        self, op: Any, x: Any, w: Any, pads: Any = None, filler: Any = None, axes: Any = None, b: Any = None
    ) -> Any:
        return op.Conv(op.Pad(x, pads, filler, axes, _id="pad"), w, b)

    def check(self, m: Match) -> Miss | None:
        if m.w.shape is None:
            return Miss("the rank of its weight is unknown", m.root)
        return _refusal(m)

    def rewrite(self, op: Any, m: Match) -> Any:
        pads = _spatial_pads(m, len(m.w.shape))
        if isinstance(pads, Miss):
            return pads
        inputs = [m.x, m.w, *([m.b] if m.b is not None else [])]
        return op.Conv(*inputs, _name=m.root.name, **_with_pads(m.root, pads))


class PadAveragePool(Rule):
    """AveragePool(Pad(x, p), pads=q) = AveragePool(x, pads=p+q, count_include_pad=1), where a window counts all of q.

    Zeros of the Pad count as elements of the window, and so they must afterwards.
    """

    name = "pad-averagepool"

    def pattern(self, op: Any, x: Any, pads: Any = None, filler: Any = None, axes: Any = None) -> Any:
        return op.AveragePool(op.Pad(x, pads, filler, axes, _id="pad"))

    def check(self, m: Match) -> Miss | None:
        own = m.root.attributes.get_ints("pads", ())
        if any(own) and not m.root.attributes.get_int("count_include_pad", 0):
            return Miss("its own padding is not counted", m.root)
        if m.root.attributes.get_int("ceil_mode", 0):
            return Miss("its last window may be cut off", m.root)
        if any(step != 1 for step in m.root.attributes.get_ints("dilations", ())):
            return Miss("is dilated", m.root)
        return _refusal(m)

    def rewrite(self, op: Any, m: Match) -> Any:
        kernel = m.root.attributes["kernel_shape"].as_ints()
        pads = _spatial_pads(m, len(kernel) + 2)
        if isinstance(pads, Miss):
            return pads
        attributes = _with_pads(m.root, pads)
        if any(width >= size for width, size in zip(attributes["pads"], (*kernel, *kernel), strict=True)):
            return Miss("padding as wide as the kernel is not supported everywhere", m.root)
        return op.AveragePool(m.x, _name=m.root.name, **{**attributes, "count_include_pad": 1})


def _refusal(m: Match) -> Miss | None:
    if m.root.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return Miss("pads by the size of its input", m.root)
    if m.pad.attributes.get_string("mode", "constant") != "constant":
        return Miss("repeats what it pads", m.pad)
    if not m.all_constant("pads", "filler", "axes"):
        return Miss("its widths or filler vary", m.pad)
    if m.pad.attributes.get_float("value", 0.0) != 0 or (m.filler is not None and np.any(m.array("filler") != 0)):
        return Miss("pads with something else than zeros", m.pad)
    return None


def _spatial_pads(m: Match, rank: int) -> list[int] | Miss:
    """Return what a Pad adds at the beginnings, then the ends, of the axes behind batch and channels."""
    # Widths were an attribute before opset 11.
    given = m.array("pads").tolist() if m.pads is not None else list(m.pad.attributes.get_ints("pads", ()))
    axes = m.array("axes").reshape(-1).tolist() if m.axes is not None else range(len(given) // 2)
    begins, ends = [0] * rank, [0] * rank
    for position, axis in enumerate(axes):
        if not -rank <= axis < rank:
            return Miss("its input has another rank", m.pad)
        begins[axis], ends[axis] = given[position], given[position + len(given) // 2]
    if any(begins[:2]) or any(ends[:2]):
        return Miss("pads batch or channels", m.pad)
    if min(*begins, *ends) < 0:
        return Miss("takes elements away", m.pad)
    return begins[2:] + ends[2:]


def _with_pads(node: ir.Node, pads: list[int]) -> dict[str, Any]:
    """Return the attributes of a node with its padding widened."""
    own = node.attributes.get_ints("pads", ()) or [0] * len(pads)
    widened = [a + b for a, b in zip(own, pads, strict=True)]
    kept = {name: attribute for name, attribute in node.attributes.items() if name != "auto_pad"}
    return {**kept, "pads": widened}
