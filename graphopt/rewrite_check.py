"""Rewrites checked alone: the matched subgraph against its replacement, on random and on extreme inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array, Backend, Session
from graphopt.comparison import Comparison
from graphopt.errors import BackendError, VerificationError
from graphopt.fragment import constant_content, fragment
from graphopt.pattern import Match, Rule, describe_match

STAND_IN_FOR_DYNAMIC = 2
LARGEST_INTEGER, LARGEST_SIZE = 9, 99


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
                return _compare(a, b, rule, match, _feeds(inputs, self.seed))
        except BackendError as error:
            return error.message


def _compare(a: Session, b: Session, rule: Rule, match: Match, feeds: Iterable[dict[str, Array]]) -> str | None:
    """Run both sides; feeds the matched nodes refuse, such as indices out of range, say nothing."""
    refusal, ran = "", False
    for feed in feeds:
        try:
            expected = a.run(feed)
        except BackendError as error:
            refusal = error.message
            continue
        ran = True
        # Each feed by itself: next to the outputs of large inputs any error of small ones is rounding.
        comparison = Comparison()
        comparison.update(expected, b.run(feed))
        if not comparison.within():
            raise _refusal(rule, match, comparison)
    return None if ran else refusal


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
    """Yield random values, then zeros, ones, negatives, large values, NaN and infinities; last, integers as indices."""
    rng = np.random.default_rng(seed)
    shapes = [[dim if isinstance(dim, int) else STAND_IN_FOR_DYNAMIC for dim in value.shape or ()] for value in inputs]
    dtypes = [np.dtype(value.dtype.numpy()) for value in inputs if value.dtype is not None]
    ports = [(f"in{i}", shape, dtype) for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))]
    for spread in (LARGEST_INTEGER, 1):
        yield {name: _random(rng, shape, dtype, spread) for name, shape, dtype in ports}
    for extreme in (0, 1, -1, 1e4, np.nan, np.inf):
        yield {name: _full(shape, dtype, extreme) for name, shape, dtype in ports}


def _random(rng: np.random.Generator, shape: list[int], dtype: np.dtype[Any], spread: int) -> Array:
    """Return random values; integers up to ``spread``, and as far below zero if it is more than an index can be."""
    if dtype.kind == "b":
        return rng.random(shape) < 0.5
    if dtype.kind in "iu":
        lowest = -spread if dtype.kind == "i" and spread > 1 else 0
        return rng.integers(lowest, spread + 1, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def _full(shape: list[int], dtype: np.dtype[Any], value: float) -> Array:
    if dtype.kind == "b":
        return np.full(shape, value == 1)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        # Large numbers stay small enough to be the sizes of something.
        whole = limits.max if np.isinf(value) else limits.min if np.isnan(value) else int(min(value, LARGEST_SIZE))
        return np.full(shape, min(max(whole, limits.min), limits.max), dtype)
    return np.full(shape, value, dtype)
