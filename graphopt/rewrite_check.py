"""Rewrites checked alone: what computes some values against what is to replace them, on random and extreme inputs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import provenance, shapes, walk
from graphopt.backend import Array, Backend, Session
from graphopt.comparison import Comparison
from graphopt.dims import Size, evaluate
from graphopt.errors import BackendError, VerificationError
from graphopt.fragment import constant_content, fragment, nodes_between, values_read

# Sizes every dynamic dimension is bound to in turn; the extreme values are tried at the first of them.
SIZES = (2, 1, 3, 0)
LARGEST_INTEGER, LARGEST_SIZE, LARGEST_VOLUME = 9, 99, 1e6
# The least integer divided by -1 ends the process of ONNX Runtime; others make tensors as large as they are told.
_DIVIDING = frozenset({"Div", "Mod"})
_SIZING = frozenset({"ConstantOfShape", "Expand", "OneHot", "Pad", "Range", "Resize", "Tile"})
Feed = dict[str, Array]


@dataclass(frozen=True)
class Proposal:
    """A rewrite that was not applied yet.

    Attributes:
        model: The model it is for.
        pass_name: The pass that proposes it.
        rule: The rule or kind of edit.
        nodes: What computes the values now, in any order.
        before: The values.
        after: What is to take their places, in the same order.
        made: What computes those, where it is new or outside ``nodes``.
        exact: Whether every bit must be the same, or may be rounded.
    """

    model: ir.Model
    pass_name: str
    rule: str
    nodes: tuple[ir.Node, ...]
    before: tuple[ir.Value, ...]
    after: tuple[ir.Value, ...]
    made: tuple[ir.Node, ...] = ()
    exact: bool = False


@dataclass(frozen=True)
class Refusal:
    """A rewrite that was refused because it changes the outputs; the model was left as it was.

    Attributes:
        nodes: Names of the nodes it was about; ``origins`` the nodes of the original these come from.
        why: How far off it is.
        reproducer: Folder that shows it, or None.
    """

    pass_name: str
    rule: str
    nodes: tuple[str, ...]
    origins: tuple[str, ...]
    why: str
    reproducer: str | None = None

    def __str__(self) -> str:
        where = f"{', '.join(self.nodes)} (from {', '.join(self.origins)})"
        return f"rule `{self.rule}` of pass `{self.pass_name}` {self.why} at {where}"


class WrongRewrite(VerificationError):
    """A rewrite that changes the outputs, where the run is to stop at one."""


@dataclass(frozen=True)
class Verdict:
    """What came of a check: a refusal, why nothing could be told, or neither where both sides agree."""

    refusal: Refusal | None = None
    unchecked: str | None = None


@dataclass(frozen=True)
class Evidence:
    """Both sides of a rewrite as models, and the inputs they differ on."""

    before: ir.Model
    after: ir.Model
    feed: Feed


RewriteCheck = Callable[[Proposal], Verdict]
# Keeps evidence for people, and returns where.
KeepEvidence = Callable[[Proposal, Evidence, str], str | None]


@dataclass
class RewriteChecker:
    """Runs both sides of each proposed rewrite and refuses one that changes the outputs.

    Attributes:
        backend: Runs both sides.
        seed: Seed of the random inputs.
        strict: Whether a refusal ends the run.
        keep: Called with the evidence of the first refusal of each rule.
    """

    backend: Backend
    seed: int = 0
    strict: bool = False
    keep: KeepEvidence | None = None
    _refused: dict[tuple[object, ...], Refusal] = field(default_factory=dict)

    def __call__(self, proposal: Proposal) -> Verdict:
        """Compare both sides of a rewrite.

        Raises:
            WrongRewrite: They differ, beyond rounding or at all where it is exact, and the checker is strict.
        """
        sides = _Sides.of(proposal)
        if sides.untestable is not None:
            return Verdict(unchecked=sides.untestable)
        before, after = sides.models()
        try:
            with (
                self.backend.open(before, threads=1, optimize=False) as a,
                self.backend.open(after, threads=1, optimize=False) as b,
            ):
                tried = feeds(sides.inputs, self.seed, careful=sides.take_no_ends)
                found = _compare(a, b, tried, exact=proposal.exact)
        except BackendError as error:
            return Verdict(unchecked=error.message)
        if isinstance(found, _Difference):
            return Verdict(self._refuse(proposal, Evidence(before, after, found.feed), found.why))
        return Verdict(unchecked=found)

    def _refuse(self, proposal: Proposal, evidence: Evidence, why: str) -> Refusal:
        """Return the refusal, the same one where the same rewrite is proposed again."""
        nodes = tuple(walk.label(node) for node in proposal.nodes)
        origins = frozenset().union(*(provenance.origins(node) for node in proposal.nodes))
        refusal = Refusal(proposal.pass_name, proposal.rule, nodes, tuple(sorted(origins)), why)
        key = (refusal.pass_name, refusal.rule, refusal.nodes, refusal.origins)
        if key not in self._refused:
            is_first = all((one.pass_name, one.rule) != key[:2] for one in self._refused.values())
            kept = self.keep(proposal, evidence, str(refusal)) if self.keep is not None and is_first else None
            self._refused[key] = Refusal(*key, why, kept)
        known = self._refused[key]
        if self.strict:
            hint = "this is a mistake of the rule, not yours; leave its pass out, or report it"
            raise WrongRewrite(
                str(refusal), hint=hint if known.reproducer is None else f"{hint}; it is kept in `{known.reproducer}`"
            )
        return known


@dataclass(frozen=True)
class _Sides:
    """Both sides of a proposal: the nodes that compute each, and the varying values these read from outside."""

    proposal: Proposal
    before: Sequence[ir.Node]
    after: Sequence[ir.Node]
    inputs: Sequence[ir.Value]

    @classmethod
    def of(cls, proposal: Proposal) -> _Sides:
        nodes = set(proposal.nodes)
        before = nodes_between(proposal.before, nodes)
        after = nodes_between(proposal.after, nodes | set(proposal.made))
        reads: dict[ir.Value, None] = {}
        for side, wanted in ((before, proposal.before), (after, proposal.after)):
            made = {value for node in side for value in node.outputs}
            read = [*(value for node in side for value in values_read(node)), *wanted]
            reads.update((value, None) for value in read if value not in made and constant_content(value) is None)
        return cls(proposal, before, after, list(reads))

    @property
    def untestable(self) -> str | None:
        """Why the two cannot be run apart, or None."""
        both = [*self.before, *self.after]
        if any(value in node.outputs for node in both for value in self.inputs):
            return "one side reads what the other computes"
        if not all(_is_known(value) for value in self.inputs):
            return "the dtype or rank of an input is unknown"
        nested = [inner for node in both for inner in walk.nodes_within(node)]
        if any(walk.has_references(node) for node in (*both, *nested)):
            return "an attribute is what the caller of a function gives"
        random = walk.random_functions(self.proposal.model)
        if any(walk.is_random(node) or node.op_identifier() in random for node in (*both, *nested)):
            return "the results differ from run to run"
        return None

    @property
    def take_no_ends(self) -> bool:
        """Whether a node does harm if it is given the least or the largest integer there is."""
        both = [*self.before, *self.after]
        return any(n.op_type in _DIVIDING | _SIZING for node in both for n in (node, *walk.nodes_within(node)))

    def models(self) -> tuple[ir.Model, ir.Model]:
        """Return each side as a model of its own."""
        model = self.proposal.model
        # Operators may be of a domain that is imported once the rewrite is applied.
        imports = {node.domain: 1 for node in self.proposal.made} | walk.all_imports(model)
        before = fragment(self.before, self.proposal.before, self.inputs, imports, model.functions)
        return before, fragment(self.after, self.proposal.after, self.inputs, imports, model.functions)


@dataclass(frozen=True)
class _Difference:
    why: str
    feed: Feed


def _compare(a: Session, b: Session, tried: Iterable[Feed], *, exact: bool) -> _Difference | str | None:
    """Run both sides until they differ; feeds the one side refuses, such as indices out of range, say nothing."""
    refusal, ran = "no inputs fit", False
    for feed in tried:
        try:
            expected = a.run(feed)
        except BackendError as error:
            refusal = error.message
            continue
        ran = True
        try:
            found = b.run(feed)
        except BackendError as error:
            return _Difference(f"makes the model fail: {error.message}", feed)
        # Each feed by itself: next to the outputs of large inputs any error of small ones is rounding.
        comparison = Comparison()
        found = {name: _empty_alike(expected[name], result) for name, result in found.items()}
        comparison.update(expected, found if exact else _overflowing_alike(expected, found))
        if not (comparison.equal if exact else comparison.within()):
            return _Difference(f"changes the outputs by {comparison.max_abs_error:.3g}", feed)
    return None if ran else refusal


def _empty_alike(expected: Any, found: Any) -> Any:
    """Return a result, or the other side's where both are empty: kernels get the shapes of such wrong by themselves."""
    both = isinstance(expected, np.ndarray) and isinstance(found, np.ndarray)
    return expected if both and expected.size == 0 == found.size and expected.dtype == found.dtype else found


def _overflowing_alike(expected: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Return results with those of the other side where neither is a number: sums in another order get there apart.

    Infinities of both signs make NaN where they meet, and where they meet is a matter of order. A number in the place
    of NaN or infinity, or the other way round, is none.
    """
    alike = dict(found)
    for name, array in expected.items():
        other = found[name]
        if isinstance(array, np.ndarray) and array.dtype.kind == "f" and getattr(other, "shape", None) == array.shape:
            alike[name] = np.where(_overflows(array) & _overflows(other), array, other)
    return alike


def _overflows(array: Array) -> Array:
    limit = np.finfo(array.dtype).max / 4 if array.dtype.kind == "f" else np.inf
    return ~(np.abs(array) < limit)


def _is_known(value: ir.Value) -> bool:
    return isinstance(value.type, ir.TensorType) and value.dtype is not None and shapes.dims_of(value) is not None


def feeds(inputs: Sequence[ir.Value], seed: int, *, careful: bool = False) -> Iterator[Feed]:
    """Yield inputs for a fragment: random, then zeros, ones, negatives, large values, NaN and infinities.

    What is known of the inputs together holds: dimensions of one name have one size in each feed, and a tensor of sizes
    holds those. Random values are tried at every one of `SIZES`, and once with sizes that differ from name to name.
    Careful feeds leave the ends of the range of integers out.
    """
    rng = np.random.default_rng(seed)
    dtypes = [np.dtype(value.dtype.numpy()) for value in inputs if value.dtype is not None]
    for index, (sizes, contents) in enumerate(_scenes(inputs)):
        ports = [(f"in{i}", shape, dtype) for i, (shape, dtype) in enumerate(zip(sizes, dtypes, strict=True))]
        held = dict(zip([name for name, _, _ in ports], contents, strict=True))
        for spread in (LARGEST_INTEGER, 1):
            yield {name: _filled(_random(rng, shape, dtype, spread), held[name]) for name, shape, dtype in ports}
        for extreme in (0, 1, -1, 1e4, np.nan, np.inf) if index == 0 else ():
            yield {name: _filled(_full(shape, dtype, extreme, careful), held[name]) for name, shape, dtype in ports}


_Contents = Sequence[int | None] | None


def _scenes(inputs: Sequence[ir.Value]) -> Iterator[tuple[list[list[int]], list[_Contents]]]:
    """Yield shapes of all inputs, and what is known to be in them then, with the sizes they hang on bound in turn."""
    dims = [shapes.dims_of(value) or () for value in inputs]
    known = [shapes.contents(value) for value in inputs]
    leaves = sorted({leaf for shape in dims for dim in shape for leaf in _leaves(dim)})
    named = {leaf for one in known if one is not None for entry in one.entries for leaf in _leaves(entry)}
    # Numbers that are no size of anything stay free: all values of them are to be tried.
    leaves += sorted(leaf for leaf in named if leaf not in leaves and not leaf.startswith("?"))
    schemes = [dict.fromkeys(leaves, size) for size in SIZES]
    schemes.append({leaf: SIZES[0] + index for index, leaf in enumerate(leaves)})
    seen: list[tuple[list[list[int]], list[_Contents]]] = []
    for sizes in map(_consistent, schemes):
        try:
            bound = [[evaluate(dim, sizes) for dim in shape] for shape in dims]
            held = [[evaluate(entry, sizes) for entry in one.entries] if one is not None else None for one in known]
        except ZeroDivisionError:
            continue
        fitting = [[dim for dim in shape if dim is not None and dim >= 0] for shape in bound]
        if (fitting, held) not in seen and fitting == bound:
            seen.append((fitting, list(held)))
            yield fitting, list(held)


def _leaves(size: Size) -> Iterator[str]:
    """Yield the names of sizes that a size hangs on; those that have none begin with a question mark."""
    if isinstance(size, int):
        return
    for monomial, _ in size.terms:
        for atom in monomial:
            if atom.kind in ("name", "unknown"):
                yield str(atom.args[0]) if atom.kind == "name" else str(atom)
            else:
                yield from (leaf for arg in atom.args if not isinstance(arg, str) for leaf in _leaves(arg))


def _consistent(sizes: dict[str, int]) -> dict[str, int]:
    """Return sizes in which a name that says what it is, as ``2*n`` does, is that."""
    found = dict(sizes)
    for name in sizes:
        if not name.isidentifier() and not name.startswith("?"):
            with contextlib.suppress(ArithmeticError, TypeError, ValueError):
                dim = ir.SymbolicDim(name)
                value = dim.evaluate({str(leaf): sizes.get(str(leaf), SIZES[0]) for leaf in dim.free_symbols()})
                found[name] = value if isinstance(value, int) else sizes[name]
    return found


def _filled(array: Array, held: _Contents) -> Array:
    """Return an array with those elements in their places that are known."""
    if held is None or len(held) != array.size:
        return array
    flat = array.reshape(-1)
    for index, element in enumerate(held):
        if element is not None:
            flat[index] = element
    return array


def _random(rng: np.random.Generator, shape: list[int], dtype: np.dtype[Any], spread: int) -> Array:
    """Return random values; integers up to ``spread``, and as far below zero if it is more than an index can be."""
    if dtype.kind == "b":
        return rng.random(shape) < 0.5
    if dtype.kind in "iu":
        lowest = -spread if dtype.kind == "i" and spread > 1 else 0
        return rng.integers(lowest, spread + 1, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def _full(shape: list[int], dtype: np.dtype[Any], value: float, careful: bool) -> Array:
    if dtype.kind == "b":
        return np.full(shape, value == 1)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        # Large numbers stay small enough to be the sizes of something, all of them together.
        large = int(min(LARGEST_SIZE, LARGEST_VOLUME ** (1 / max(1, math.prod(shape)))))
        ends = (-large, large) if careful else (limits.min, limits.max)
        whole = ends[1] if np.isinf(value) else ends[0] if np.isnan(value) else int(min(value, large))
        return np.full(shape, min(max(whole, limits.min), limits.max), dtype)
    return np.full(shape, value, dtype)
