"""LayerNormalization, RMSNormalization and GroupNormalization from their parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import shapes, walk
from graphopt.backend import Array
from graphopt.pattern import Match, Miss, Rule

from . import chains, heads

_FIRST_OPSET = {"LayerNormalization": 17, "RMSNormalization": 23}
_NAMES = {"LayerNormalization": "layer-norm", "RMSNormalization": "rms-norm"}


@dataclass(frozen=True)
class Standardized:
    """x / sqrt(mean(x²) + epsilon), found as one of its spellings.

    Attributes:
        x: What is divided.
        axes: Axes the mean is over.
        epsilon: What keeps the root from zero.
        nodes: The nodes that compute it.
    """

    x: ir.Value
    axes: tuple[int, ...]
    epsilon: float
    nodes: tuple[ir.Node, ...]


def standardized(root: ir.Node) -> Standardized | None:
    """Recognise x / sqrt(mean(x²) + ε) at its last operator: Div, or Mul by a reciprocal or a power of −½."""
    if root.op_type == "Div":
        x, divisor = root.inputs
        return _over_root(root, x, divisor, ())
    for x, inverse in chains.sides(root):
        node = chains.made_by(inverse, "Reciprocal", "Div", "Pow")
        if node is None or (node.op_type == "Div" and chains.number(node.inputs[0]) != 1.0):
            continue
        is_power = node.op_type == "Pow"
        found = _over_power(root, x, node) if is_power else _over_root(root, x, node.inputs[-1], (node,))
        if found is not None:
            return found
    return None


def _over_root(
    root: ir.Node, x: ir.Value | None, divisor: ir.Value | None, between: tuple[ir.Node, ...]
) -> Standardized | None:
    node = chains.made_by(divisor, "Sqrt")
    return _of_variance(root, x, node.inputs[0], (*between, node)) if node is not None else None


def _over_power(root: ir.Node, x: ir.Value, node: ir.Node) -> Standardized | None:
    if chains.scalar(node.inputs[1], node.inputs[0]) != -0.5:
        return None
    return _of_variance(root, x, node.inputs[0], (node,))


def _of_variance(
    root: ir.Node, x: ir.Value | None, variance: ir.Value | None, between: tuple[ir.Node, ...]
) -> Standardized | None:
    sum_ = chains.shifted(variance)
    mean = chains.made_by(sum_[0], "ReduceMean") if sum_ is not None else None
    if sum_ is None or mean is None or x is None or sum_[1] <= 0:
        return None
    square = chains.made_by(mean.inputs[0], "Pow", "Mul")
    axes = chains.axes_of(mean)
    if square is None or not axes or mean.attributes.get_int("keepdims", 1) != 1 or square.inputs[0] is not x:
        return None
    is_square = square.inputs[1] is x if square.op_type == "Mul" else chains.scalar(square.inputs[1], x) == 2.0
    if not is_square:
        return None
    return Standardized(x, tuple(axes), sum_[1], (root, *between, sum_[2], mean, square))


def centered(found: Standardized) -> tuple[ir.Value, tuple[ir.Node, ...]] | None:
    """Return y and the nodes, where what is standardized is y − mean(y) over the same axes."""
    sub = chains.made_by(found.x, "Sub")
    mean = chains.made_by(sub.inputs[1], "ReduceMean") if sub is not None else None
    if sub is None or mean is None or mean.inputs[0] is not sub.inputs[0] or sub.inputs[0] is None:
        return None
    axes = chains.axes_of(mean)
    rank = chains.rank_of(found.x)
    if (
        axes is None
        or _counted(axes, rank) != _counted(found.axes, rank)
        or mean.attributes.get_int("keepdims", 1) != 1
    ):
        return None
    return sub.inputs[0], (sub, mean)


def _counted(axes: Sequence[int], rank: int | None) -> list[int]:
    """Return axes in order, counted from the first where the rank is known."""
    return sorted(axis + rank if rank is not None and axis < 0 else axis for axis in axes)


class _Normalize(Rule):
    """What the two rules for a whole normalization share: the parts are found first, then weighed."""

    op_type = ""

    def __init__(self, last: str) -> None:
        self.name = _NAMES[self.op_type]
        self._last = last

    def pattern(self, op: Any, a: Any, b: Any) -> Any:
        return getattr(op, self._last)(a, b)

    def applies(self, m: Match) -> bool:
        if chains.opset(m) < _FIRST_OPSET[self.op_type]:
            return False
        parts = self._parts(m.root)
        return parts is not None and m.include(parts[0].nodes)

    def check(self, m: Match) -> Miss | None:
        found, x = self._found(m)
        # The operator computes in float32 whatever it is given; these parts compute in their own dtype.
        if x.dtype != ir.DataType.FLOAT:
            return Miss(f"computes in {x.dtype or 'an unknown dtype'}, the operator would in float32", m.root)
        first = chains.trailing(found.axes, chains.rank_of(x))
        if first is None:
            return Miss("normalizes axes that are not known to be the last ones", m.root)
        if chains.tail(x, -first) is None:
            return Miss("the size of what it normalizes is unknown", m.root)
        return None

    def rewrite(self, op: Any, m: Match) -> Any:
        found, x = self._found(m)
        first = chains.trailing(found.axes, chains.rank_of(x))
        size = chains.tail(x, -first) if first is not None else None
        assert first is not None, "checked"
        assert size is not None, "checked"
        scale = op.const(chains.ones(size, ir.DataType.FLOAT), f"{m.root.name or self.op_type}.ones")
        return getattr(op, self.op_type)(x, scale, axis=first, epsilon=found.epsilon)

    def _found(self, m: Match) -> tuple[Standardized, ir.Value]:
        parts = self._parts(m.root)
        assert parts is not None, "applies"
        return parts

    def _parts(self, root: ir.Node) -> tuple[Standardized, ir.Value] | None:
        """Return the parts, all their nodes in them, and what is normalized."""
        raise NotImplementedError


class LayerNorm(_Normalize):
    """(x − mean(x)) / sqrt(mean((x − mean(x))²) + ε) = LayerNormalization(x, 1, ε).

    By definition, over the last axes and in float32, which is what the operator computes in by default.
    """

    op_type = "LayerNormalization"

    def _parts(self, root: ir.Node) -> tuple[Standardized, ir.Value] | None:
        found = standardized(root)
        center = centered(found) if found is not None else None
        if found is None or center is None:
            return None
        x, nodes = center
        return Standardized(found.x, found.axes, found.epsilon, (*found.nodes, *nodes)), x


class RootMeanSquareNorm(_Normalize):
    """x / sqrt(mean(x²) + ε) = RMSNormalization(x, 1, ε).

    By definition, over the last axes and in float32, which is what the operator computes in by default.
    """

    op_type = "RMSNormalization"

    def _parts(self, root: ir.Node) -> tuple[Standardized, ir.Value] | None:
        found = standardized(root)
        return (found, found.x) if found is not None else None


class NormScale(Rule):
    """Norm(x, s) · t = Norm(x, s · t).

    Scaling is the last step of a normalization without a bias, and t is as long as what is normalized.
    """

    def __init__(self, norm: str) -> None:
        self.name = f"{_NAMES[norm]}-scale"
        self._norm = norm

    def pattern(self, op: Any, x: Any, s: Any, t: Any, b: Any = None) -> Any:
        return op.Mul(getattr(op, self._norm)(x, s, b, _id="norm"), t)

    def applies(self, m: Match) -> bool:
        return _fits(m.norm, m.t)

    def check(self, m: Match) -> Miss | None:
        if m.b is not None and not chains.holds_only(m.b, 0.0):
            return Miss("has a bias already", m.root)
        if not m.all_constant("s"):
            return Miss("its scale varies", m.root)
        if not chains.holds_only(m.s, 1.0) and not m.all_constant("t"):
            return Miss("its scale varies", m.root)
        return None

    def rewrite(self, op: Any, m: Match) -> Any:
        scale = m.t
        if not chains.holds_only(m.s, 1.0) or shapes.static_shape(m.t) != shapes.static_shape(m.s):
            # Leading ones aside the two are of one shape, see `_fits`.
            scale_of_norm = m.array("s").astype(np.float64)
            both = scale_of_norm * m.array("t").astype(np.float64).reshape(scale_of_norm.shape)
            scale = op.const(both.astype(m.array("t").dtype), m.t.name)
        return op.like(m.norm, m.x, scale)


class NormBias(Rule):
    """LayerNormalization(x, s) + b = LayerNormalization(x, s, b).

    Adding the bias is the operator's last step, and b is as long as what is normalized.
    """

    name = "layer-norm-bias"

    def pattern(self, op: Any, x: Any, s: Any, t: Any) -> Any:
        return op.Add(op.LayerNormalization(x, s, _id="norm"), t)

    def applies(self, m: Match) -> bool:
        return _fits(m.norm, m.t)

    def check(self, m: Match) -> Miss | None:
        if shapes.static_shape(m.t) != shapes.static_shape(m.s):
            return Miss("its bias has more axes than what is normalized", m.root)
        return None

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.like(m.norm, m.x, m.s, m.t)


def _fits(norm: ir.Node, factor: ir.Value) -> bool:
    """Return whether a value has the shape of the scale of a normalization, leading ones aside where it is constant."""
    scale, own = shapes.static_shape(norm.inputs[1]), shapes.static_shape(factor)
    if scale is None or own is None or len(scale) != _normalized_axes(norm):
        return False
    if own == scale:
        return True
    rank, extra = chains.rank_of(norm.inputs[0]), len(own) - len(scale)
    is_small = len(scale) == 1 and rank is not None and len(own) <= rank and walk.constant_tensor(factor) is not None
    return is_small and extra > 0 and own == (1,) * extra + scale


def _normalized_axes(norm: ir.Node) -> int | None:
    axis, rank = norm.attributes.get_int("axis", -1), chains.rank_of(norm.inputs[0])
    if axis < 0:
        return -axis
    return rank - axis if rank is not None else None


class NormInFloat(Rule):
    """Cast(Norm(Cast(x, to=float32), 1), to=dtype of x) = Norm(x, 1) with stash_type float32.

    A normalization of a 16-bit x computes in float32 and rounds before it scales.
    """

    def __init__(self, norm: str) -> None:
        self.name = f"{_NAMES[norm]}-in-float"
        self._norm = norm

    def pattern(self, op: Any, x: Any, s: Any) -> Any:
        inner = getattr(op, self._norm)(op.Cast(x, to=int(ir.DataType.FLOAT)), s, _id="norm", stash_type=1)
        return op.Cast(inner)

    def applies(self, m: Match) -> bool:
        narrow = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
        return m.x.dtype in narrow and m.root.attributes.get_int("to", 0) == m.x.dtype.value

    def check(self, m: Match) -> Miss | None:
        if not chains.holds_only(m.s, 1.0):
            return Miss("scales in float32, the operator would in the dtype of its input", m.root)
        return None

    def rewrite(self, op: Any, m: Match) -> Any:
        size = walk.dims(walk.constant_tensor(m.s))  # type: ignore[arg-type]
        return op.like(m.norm, m.x, op.const(chains.ones(size, m.x.dtype), m.s.name))


class GroupNorm(Rule):
    """γ · Reshape(InstanceNormalization(groups of x)) + β = GroupNormalization(x, γ, β).

    By definition, from opset 21, where each group is a row of the inner Reshape and all is given its shape back.
    """

    name = "group-norm"

    def pattern(self, op: Any, x: Any, groups: Any, s: Any, b: Any, shape: Any, gamma: Any, beta: Any) -> Any:
        inner = op.InstanceNormalization(op.Reshape(x, groups, _id="split"), s, b, _id="norm")
        return op.Add(op.Mul(op.Reshape(inner, shape, _id="whole"), gamma), beta)

    def applies(self, m: Match) -> bool:
        is_plain = chains.holds_only(m.s, 1.0) and chains.holds_only(m.b, 0.0)
        return is_plain and chains.opset(m) >= 21 and chains.rank_of(m.split.outputs[0]) == 3

    def check(self, m: Match) -> Miss | None:
        if m.x.dtype != ir.DataType.FLOAT:
            return Miss("is not known to be in float32", m.root)
        if not _same_shape(m.x, m.whole.outputs[0]):
            return Miss("is not known to be given its shape back", m.root)
        batch, channels = heads.dim(m.x, 0), heads.dim(m.x, 1)
        if not heads.same_dim(batch, heads.dim(m.split.outputs[0], 0)) or not isinstance(channels, int):
            return Miss("its groups are not known to be of channels", m.root)
        if channels % _groups(m) != 0:
            return Miss("its groups share channels", m.root)
        if any(_per_channel(value, channels, chains.rank_of(m.x) or 0) is None for value in (m.gamma, m.beta)):
            return Miss("its scale or bias is not one constant for each channel", m.root)
        return None

    def rewrite(self, op: Any, m: Match) -> Any:
        channels, rank = heads.dim(m.x, 1), chains.rank_of(m.x)
        assert isinstance(channels, int), "checked"
        gamma, beta = (_per_channel(value, channels, rank or 0) for value in (m.gamma, m.beta))
        assert gamma is not None, "checked"
        assert beta is not None, "checked"
        return op.GroupNormalization(
            m.x,
            op.const(gamma, m.gamma.name),
            op.const(beta, m.beta.name),
            num_groups=_groups(m),
            epsilon=m.norm.attributes.get_float("epsilon", 1e-5),
        )


def _groups(m: Match) -> int:
    return walk.dims(walk.constant_tensor(m.s))[0]  # type: ignore[arg-type]


def _same_shape(a: ir.Value, b: ir.Value) -> bool:
    rank = chains.rank_of(a)
    return (
        rank is not None
        and rank == chains.rank_of(b)
        and all(heads.same_dim(heads.dim(a, axis), heads.dim(b, axis)) for axis in range(rank))
    )


def _per_channel(value: ir.Value, channels: int, rank: int) -> Array | None:
    """Return a constant of one number for each channel, the second axis of as many as ``rank``, as a vector."""
    tensor = walk.constant_tensor(value)
    if tensor is None or tensor.size != channels:
        return None
    padded = (1,) * (rank - len(tensor.shape)) + walk.dims(tensor)
    return tensor.numpy().reshape(-1) if padded == (1, channels, *(1,) * (rank - 2)) else None
