"""RotaryEmbedding from x · cos + rotated x · sin, the halves of a head swapped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array
from graphopt.pattern import Match, Miss, Rule

from . import chains, heads

# Tables up to this many bytes are compared and halved; they are far smaller than a weight.
_LARGEST_TABLE = 64 << 20


@dataclass(frozen=True)
class Rotation:
    """x · cos + concat(−second half of x, first half) · sin, found at its last operator.

    Attributes:
        x: [batch, heads, length, size].
        cos: Cosines, [1 or batch, 1, length, size], both halves equal.
        sin: Sines, like them.
        nodes: The nodes that compute it.
    """

    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    nodes: tuple[ir.Node, ...]


def find(root: ir.Node) -> Rotation | None:
    """Recognise a rotation at its Add."""
    for straight, turned in chains.sides(root):
        first, second = chains.made_by(straight, "Mul"), chains.made_by(turned, "Mul")
        if first is None or second is None:
            continue
        for rotated, sin in chains.sides(second):
            found = _rotated(rotated)
            if found is None:
                continue
            x, nodes = found
            cos = next((other for one, other in chains.sides(first) if one is x), None)
            if cos is not None:
                return Rotation(x, cos, sin, (root, first, second, *nodes))
    return None


def _rotated(value: ir.Value) -> tuple[ir.Value, tuple[ir.Node, ...]] | None:
    """Recognise concat(−x[size/2:], x[:size/2]) over the last axis."""
    concat = chains.made_by(value, "Concat")
    if concat is None or len(concat.inputs) != 2 or concat.attributes.get_int("axis", 0) not in (-1, 3):
        return None
    negated = chains.made_by(concat.inputs[0], "Neg")
    if negated is None:
        return None
    upper, lower = _half(negated.inputs[0]), _half(concat.inputs[1])
    if upper is None or lower is None or upper[0] is not lower[0] or (upper[1], lower[1]) != (1, 0):
        return None
    return upper[0], (concat, negated, upper[2], lower[2])


def _half(value: ir.Value | None) -> tuple[ir.Value, int, ir.Node] | None:
    """Recognise a half of the last axis of x, by Slice or Split: x, which half, the node."""
    node = value.producer() if value is not None else None
    if value is None or node is None or not walk.is_onnx_op(node, "Slice", "Split") or node.inputs[0] is None:
        return None
    x = node.inputs[0]
    size = heads.dim(x, 3)
    if chains.rank_of(x) != 4 or not isinstance(size, int) or size % 2:
        return None
    if node.op_type == "Split":
        is_halves = len(node.outputs) == 2 and node.attributes.get_int("axis", 0) in (-1, 3)
        if not is_halves or not all(heads.dim(output, 3) == size // 2 for output in node.outputs):
            return None
        return x, value.index() or 0, node
    bounds = [chains.integers(each) for each in node.inputs[1:]]
    if len(bounds) < 3 or any(bound is None or len(bound) != 1 for bound in bounds):
        return None
    start, end, axis, step = (bound[0] for bound in (*bounds, [1])[:4])  # type: ignore[index]
    if axis not in (-1, 3) or step != 1:
        return None
    start, end = (bound + size if bound < 0 else bound for bound in (start, end))
    if start == 0 and end == size // 2:
        return x, 0, node
    return (x, 1, node) if start == size // 2 and end >= size else None


@dataclass(frozen=True)
class Table:
    """Half of a table of cosines or sines, of both halves equal.

    Attributes:
        content: The half as [batch, length, size / 2] where it is constant, else None.
        angles: The angles of the half, [batch, length, size / 2], where it is not.
        function: Cos or Sin.
        factor: What is multiplied to it.
        nodes: The nodes that compute the table.
    """

    content: Array | None
    angles: ir.Value | None = None
    function: str = ""
    factor: float = 1.0
    nodes: tuple[ir.Node, ...] = ()


def table(value: ir.Value) -> Table | None:
    """Return half of a table of [batch, 1, length, size] whose halves are equal, or None."""
    if chains.rank_of(value) != 4 or heads.dim(value, 1) != 1:
        return None
    tensor = walk.constant_tensor(value)
    if tensor is not None:
        content = tensor.numpy() if tensor.nbytes <= _LARGEST_TABLE else np.empty((1, 1, 1, 0))
        lower, upper = np.split(content, 2, axis=-1) if content.shape[-1] % 2 == 0 else (content, content[..., :0])
        return Table(lower[:, 0]) if lower.size and np.array_equal(lower, upper) else None
    unsqueeze = chains.made_by(value, "Unsqueeze")
    if unsqueeze is None or unsqueeze.inputs[0] is None or chains.axes_of(unsqueeze) not in ([1], [-3]):
        return None
    scaled = chains.product(unsqueeze.inputs[0])
    node = chains.made_by(scaled.values[0], "Cos", "Sin") if len(scaled.values) == 1 else None
    concat = chains.made_by(node.inputs[0], "Concat") if node is not None else None
    if node is None or concat is None or len(concat.inputs) != 2 or concat.inputs[0] is not concat.inputs[1]:
        return None
    if concat.attributes.get_int("axis", 0) not in (-1, 2) or chains.rank_of(concat.inputs[0]) != 3:
        return None
    return Table(None, concat.inputs[0], node.op_type, scaled.factor, (unsqueeze, *scaled.nodes, node, concat))


class Rotary(Rule):
    """x · cos + concat(−x₂, x₁) · sin = RotaryEmbedding(x, half of cos, half of sin).

    By definition, from opset 23, where x₁ and x₂ are the halves of x and both halves of cos and sin are equal.
    """

    name = "rotary-embedding"
    inner_may_be_read = True

    def pattern(self, op: Any, a: Any, b: Any) -> Any:
        return op.Add(a, b)

    def applies(self, m: Match) -> bool:
        found = find(m.root) if chains.opset(m) >= 23 else None
        return found is not None and m.include(nodes_of(found))

    def check(self, m: Match) -> Miss | None:
        found = find(m.root)
        assert found is not None, "applies"
        why = obstacle(found)
        return Miss(why, m.root) if why is not None else None

    def rewrite(self, op: Any, m: Match) -> Any:
        found = find(m.root)
        assert found is not None, "applies"
        caches = [_cache(op, one, found.x) for one in (found.cos, found.sin)]
        return op.RotaryEmbedding(found.x, *caches)


def nodes_of(found: Rotation) -> list[ir.Node]:
    """Return the nodes of a rotation, with those of its tables and those that split the heads of x."""
    parts = heads.split(found.x)
    tables = [each for each in (table(found.cos), table(found.sin)) if each is not None]
    return [
        *found.nodes,
        *(node for each in tables for node in each.nodes),
        *(parts.nodes if parts is not None else ()),
    ]


def obstacle(found: Rotation) -> str | None:
    """Return why a rotation that was found cannot be one operator, or None."""
    if found.x.dtype != ir.DataType.FLOAT:
        return "is not known to be in float32"
    if any(not _fits(one, found.x) for one in (found.cos, found.sin)):
        return "its tables are not known to have its batch and length"
    if table(found.cos) is None or table(found.sin) is None:
        return "the halves of its tables are not known to be equal"
    return None


def _fits(one: ir.Value, x: ir.Value) -> bool:
    is_batch = heads.dim(one, 0) == 1 or heads.same_dim(heads.dim(one, 0), heads.dim(x, 0))
    return is_batch and all(heads.same_dim(heads.dim(one, axis), heads.dim(x, axis)) for axis in (2, 3))


def _cache(op: Any, value: ir.Value, x: ir.Value) -> ir.Value:
    """Return half of a table with the batch of x, which the operator does not broadcast."""
    half = _half_of(op, value)
    if heads.same_dim(heads.dim(value, 0), heads.dim(x, 0)):
        return half
    count, parts = heads.dim(x, 0), heads.split(x)
    if isinstance(count, int):
        return op.Expand(half, op.const(np.array([count, 1, 1]), "batch"))  # type: ignore[no-any-return]
    batch = op.Shape(x if parts is None else parts.whole, start=0, end=1)
    return op.Expand(half, op.Concat(batch, op.const(np.array([1, 1]), "ones"), axis=0))  # type: ignore[no-any-return]


def _half_of(op: Any, value: ir.Value) -> ir.Value:
    found = table(value)
    assert found is not None, "checked"
    if found.content is not None:
        return op.const(np.ascontiguousarray(found.content), f"{value.name}.half")  # type: ignore[no-any-return]
    half = getattr(op, found.function)(found.angles)
    if found.factor != 1.0:
        half = op.Mul(half, op.const(np.float32(found.factor), f"{value.name}.factor"))
    return half  # type: ignore[no-any-return]


def flat_half(op: Any, value: ir.Value) -> ir.Value:
    """Return half of a table of batch 1 as [length, size / 2]."""
    found = table(value)
    if found is not None and found.content is not None:
        return op.const(np.ascontiguousarray(found.content[0]), f"{value.name}.half")  # type: ignore[no-any-return]
    return op.Squeeze(_half_of(op, value), op.const(np.array([0], np.int64), "axis"))  # type: ignore[no-any-return]


class RotaryOfHeads(Rule):
    """RotaryEmbedding(split heads of x) = split heads of RotaryEmbedding(x).

    Given rank 3 and the number of heads, the operator rotates each head by itself, wherever its axis is.
    """

    name = "rotary-of-heads"
    inner_may_be_read = True

    def pattern(self, op: Any, x: Any, cos: Any, sin: Any) -> Any:
        return op.RotaryEmbedding(x, cos, sin)

    def applies(self, m: Match) -> bool:
        found = heads.split(m.x)
        return found is not None and m.include(found.nodes)

    def check(self, m: Match) -> Miss | None:
        others = {use.node for use in m.x.uses()} - {m.root}
        if m.x.is_graph_output() or any(not walk.is_onnx_op(node, "Shape") for node in others):
            return Miss("its split heads feed other nodes", m.root)
        return None

    def rewrite(self, op: Any, m: Match) -> Any:
        found = heads.split(m.x)
        assert found is not None, "applies"
        turned = op.like(m.root, found.whole, m.cos, m.sin)
        node = turned.producer()
        node.attributes.add(ir.AttrInt64("num_heads", found.count))
        return heads.split_again(op, turned, found)
