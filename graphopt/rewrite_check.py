"""Rewrites checked alone: the matched subgraph against its replacement, on random and on extreme inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array, Backend
from graphopt.comparison import Comparison
from graphopt.errors import BackendError, VerificationError
from graphopt.fragment import constant_content, fragment
from graphopt.pattern import Match, Rule, describe_match

STAND_IN_FOR_DYNAMIC = 2


@dataclass
class RewriteChecker:
    """Runs both sides of each rewrite and refuses one that changes the outputs.

    Called with a rewrite, it returns why that could not be checked, or None where it was.

    Attributes:
        backend: Runs both sides.
        imports: Operator sets of the model.
        seed: Seed of the random inputs.
    """

    backend: Backend
    imports: Mapping[str, int]
    seed: int = 0

    def __call__(self, rule: Rule, match: Match, values: Sequence[ir.Value], nodes: Sequence[ir.Node]) -> str | None:
        """Compare the matched nodes with their replacement.

        Raises:
            VerificationError: The outputs differ beyond rounding; names the rule, the nodes and their origins.
        """
        matched = _in_order(match)
        inputs = _inputs_of(matched, nodes, values)
        if not all(_is_known(value) for value in inputs):
            return "the dtype or rank of an input is unknown"
        if any(True for node in (*matched, *nodes) for _ in walk.subgraphs(node)):
            return "nested graphs are not run apart"
        imports = self.imports
        before = fragment(matched, match.root.outputs[: len(values)], inputs, imports)
        after = fragment(nodes, values, inputs, imports)
        try:
            with self.backend.open(before, optimize=False) as a, self.backend.open(after, optimize=False) as b:
                for feed in _feeds(inputs, self.seed):
                    # Each feed by itself: next to the outputs of large inputs any error of small ones is rounding.
                    comparison = Comparison()
                    comparison.update(a.run(feed), b.run(feed))
                    if not comparison.within():
                        raise _refusal(rule, match, comparison)
        except BackendError as error:
            return error.message
        return None


def _refusal(rule: Rule, match: Match, comparison: Comparison) -> VerificationError:
    return VerificationError(
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
    outside = dict.fromkeys(value for value in read if value not in inside and constant_content(value) is None)
    return list(outside)


def _is_known(value: ir.Value) -> bool:
    return isinstance(value.type, ir.TensorType) and value.dtype is not None and value.shape is not None


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
