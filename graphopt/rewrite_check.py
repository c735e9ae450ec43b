"""Rewrites checked alone: the matched subgraph against its replacement, on random and on extreme inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array, Backend
from graphopt.comparison import Comparison
from graphopt.errors import BackendError, VerificationError
from graphopt.pattern import Match, Rule, describe_match

STAND_IN_FOR_DYNAMIC = 2


@dataclass
class RewriteChecker:
    """Runs both sides of each rewrite and refuses one that changes the outputs.

    Attributes:
        checked: How many rewrites were compared.
        unchecked: Why others could not be, with the rule's name.
    """

    backend: Backend
    seed: int
    checked: int = 0
    unchecked: list[str] = field(default_factory=list)

    def __call__(self, rule: Rule, match: Match, values: Sequence[ir.Value], nodes: Sequence[ir.Node]) -> None:
        """Compare the matched nodes with their replacement.

        Raises:
            VerificationError: The outputs differ beyond rounding; names the rule, the nodes and their origins.
        """
        matched = _in_order(match)
        inputs = _inputs_of(matched, nodes, values)
        if not all(_is_known(value) for value in inputs):
            self.unchecked.append(f"{rule.name}: an input's dtype or rank is unknown")
            return
        before = _fragment(matched, match.root.outputs, inputs, match)
        after = _fragment(nodes, values, inputs, match)
        comparison = Comparison()
        try:
            with self.backend.open(before, optimize=False) as a, self.backend.open(after, optimize=False) as b:
                for feed in _feeds(inputs, self.seed):
                    out_a, out_b = a.run(feed), b.run(feed)
                    comparison.update(dict(enumerate(out_a.values())), dict(enumerate(out_b.values())))  # type: ignore[arg-type]
        except BackendError as error:
            self.unchecked.append(f"{rule.name}: {error.message}")
            return
        self.checked += 1
        if not comparison.within():
            raise VerificationError(
                f"rule `{rule.name}` changes the outputs by {comparison.max_abs_error:.3g} at {describe_match(match)}",
                hint="this is a mistake of the rule, not yours; leave its pass out, or report it",
            )


def _in_order(match: Match) -> list[ir.Node]:
    inside = set(match.nodes.values())
    assert match.root.graph is not None
    return [node for node in match.root.graph if node in inside]


def _inputs_of(matched: Iterable[ir.Node], nodes: Iterable[ir.Node], values: Iterable[ir.Value]) -> list[ir.Value]:
    """Return the varying values either side reads from outside, each once."""
    both = [*matched, *nodes]
    inside = {value for node in both for value in node.outputs}
    read = [value for node in both for value in walk.values_read(node)] + list(values)
    outside = dict.fromkeys(value for value in read if value not in inside and _content(value) is None)
    return list(outside)


def _content(value: ir.Value) -> ir.TensorProtocol | None:
    """Return what a constant holds, one not yet in the graph included."""
    return walk.constant_tensor(value) or (value.const_value if value.producer() is None else None)


def _is_known(value: ir.Value) -> bool:
    return isinstance(value.type, ir.TensorType) and value.dtype is not None and value.shape is not None


def _fragment(
    nodes: Iterable[ir.Node], outputs: Sequence[ir.Value], inputs: Sequence[ir.Value], match: Match
) -> ir.Model:
    """Return a model of copies of some nodes."""
    mapped: dict[ir.Value, ir.Value] = {
        value: ir.Value(name=f"in{i}", type=value.type, shape=value.shape) for i, value in enumerate(inputs)
    }
    constants: list[ir.Value] = []

    def lookup(value: ir.Value) -> ir.Value:
        if value not in mapped:
            content = _content(value)
            assert content is not None, "every outside value is an input or constant"
            tensor = ir.LazyTensor(
                lambda: content, dtype=content.dtype, shape=ir.Shape(content.shape), name=f"c{len(constants)}"
            )
            mapped[value] = ir.Value(
                name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(content.shape), const_value=tensor
            )
            constants.append(mapped[value])
        return mapped[value]

    copies = []
    for node in nodes:
        read = [lookup(value) if value is not None else None for value in node.inputs]
        copy = ir.Node(
            node.domain, node.op_type, read, tuple(node.attributes.values()), num_outputs=len(node.outputs)
        )
        for index, (old, new) in enumerate(zip(node.outputs, copy.outputs, strict=True)):
            new.name = f"{len(copies)}_{index}"
            mapped[old] = new
        copies.append(copy)
    ends = []
    for value in outputs:
        identity = ir.Node("", "Identity", [lookup(value)])
        identity.outputs[0].name = f"out{len(ends)}"
        copies.append(identity)
        ends.append(identity.outputs[0])
    graph = match.root.graph
    assert graph is not None
    imports = dict(graph.opset_imports) or {"": 18}
    body = ir.Graph([mapped[v] for v in inputs], ends, nodes=copies, initializers=constants, opset_imports=imports)
    return ir.Model(body, ir_version=10)


def _feeds(inputs: Sequence[ir.Value], seed: int) -> Iterator[dict[str, Array]]:
    """Yield random values, then zeros, ones, negatives, large values, NaN and infinities."""
    rng = np.random.default_rng(seed)
    shapes = [[dim if isinstance(dim, int) else STAND_IN_FOR_DYNAMIC for dim in value.shape or ()] for value in inputs]
    dtypes = [np.dtype(value.dtype.numpy()) for value in inputs if value.dtype is not None]
    yield {f"in{i}": _random(rng, shape, dtype) for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))}
    for extreme in (0, 1, -1, 1e4, np.nan, np.inf):
        yield {f"in{i}": _full(s, d, extreme) for i, (s, d) in enumerate(zip(shapes, dtypes, strict=True))}


def _random(rng: np.random.Generator, shape: list[int], dtype: np.dtype[Any]) -> Array:
    if dtype.kind in "iub":
        return rng.integers(0, 2, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def _full(shape: list[int], dtype: np.dtype[Any], value: float) -> Array:
    if dtype.kind in "iub":
        return np.full(shape, 1 if value == 1 else 0, dtype)
    return np.full(shape, value, dtype)
