"""Sizes TensorRT builds an engine for: least, usual and most of every dynamic input."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Feeds
from graphopt.errors import UsageError, did_you_mean
from graphopt.shapes import infer_shapes, static_shape
from graphopt.specialise import specialise

_HINT = "write `dims=batch=1..8..32+sequence=16..512`: MIN..OPT..MAX, MIN..MAX, or one size"
_SIZES = re.compile(r"(\d+)(?:\.\.(\d+))?(?:\.\.(\d+))?")
_ENDS = ("min", "opt", "max")
_OPTION = "trt_profile_{}_shapes"


@dataclass(frozen=True)
class Span:
    """Sizes of one dimension: least, usual and most."""

    least: int
    usual: int
    most: int

    def at(self, end: str) -> int:
        """Return the size at ``min``, ``opt`` or ``max``."""
        return {"min": self.least, "opt": self.usual, "max": self.most}[end]


def parse_spans(texts: Sequence[str]) -> dict[str, Span]:
    """Return sizes by name of dimension from texts such as ``batch=1..8..32``; two sizes make the usual one the most.

    Raises:
        UsageError: A text is no such sizes, or they are not in order, or a name is given twice.
    """
    spans: dict[str, Span] = {}
    for text in texts:
        name, _, sizes = text.rpartition("=")
        found = _SIZES.fullmatch(sizes.strip())
        if not name or found is None:
            raise UsageError(f"`dims`: `{text}` are no sizes of a dimension", hint=_HINT)
        numbers = [int(number) for number in found.groups() if number is not None]
        span = Span(numbers[0], numbers[-2] if len(numbers) == len(_ENDS) else numbers[-1], numbers[-1])
        if not 1 <= span.least <= span.usual <= span.most:
            raise UsageError(f"`dims`: the sizes in `{text}` are not in order", hint="1 ≤ MIN ≤ OPT ≤ MAX")
        if name.strip() in spans:
            raise UsageError(f"`dims`: dimension `{name.strip()}` is given twice", hint="keep one of them")
        spans[name.strip()] = span
    return spans


def profile_options(model: ir.Model, texts: Sequence[str]) -> dict[str, str]:
    """Return the three options that say for which shapes an engine is built; none where no sizes are given.

    Without them TensorRT builds for the shapes it is first run on, and again whenever one comes that is outside of
    what it has seen.

    Args:
        model: The model; a dimension without a name is called by its input and axis, as ``x[0]``.
        texts: Sizes by name of dimension.

    Raises:
        UsageError: A dimension is not the model's, or a dynamic input is left out in part.
    """
    spans = parse_spans(texts)
    if not spans:
        return {}
    dynamic = _dynamic_inputs(model)
    known = {
        name for dims in dynamic.values() for dim in dims if isinstance(dim, str) for name in {dim, *_asked_of(dim)}
    }
    for name in spans:
        if name not in known:
            raise UsageError(
                f"`dims`: no dynamic dimension of an input is called `{name}`", hint=_known_hint(name, known)
            )
    left = _left_out(dynamic, spans)
    if left:
        listed = "; ".join(f"`{name}`: {', '.join(dims)}" for name, dims in left.items())
        raise UsageError(
            f"`dims` leaves out dynamic dimensions of inputs ({listed})",
            hint="TensorRT wants all of them or none; " + _HINT,
        )
    return {_OPTION.format(end): _text(_shapes(dynamic, spans, end)) for end in _ENDS}


def inner_profiles(model: ir.Model, texts: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Return the options of `profile_options` with the shapes of other values besides: where a part of a model begins.

    Args:
        model: The model.
        texts: Sizes by name of dimension, of all dynamic inputs.
        names: Names of values.

    Raises:
        UsageError: The shape of one is not known even where those of all inputs are.
    """
    spans, dynamic, found = parse_spans(texts), _dynamic_inputs(model), {}
    for end in _ENDS:
        given = _shapes(dynamic, spans, end)
        sized = model.clone()
        specialise(sized, {}, given)
        infer_shapes(sized)
        found[_OPTION.format(end)] = _text(given | {name: _inner_shape(sized, name) for name in names})
    return found


def _inner_shape(model: ir.Model, name: str) -> tuple[int, ...]:
    for graph in walk.graphs_within(model.graph):
        for node in graph:
            for value in node.outputs:
                shape = static_shape(value) if value.name == name else None
                if shape is not None:
                    return shape
    raise UsageError(
        f"`dims`: a part of the model for TensorRT begins at `{name}`, whose shape does not follow from the inputs'",
        hint="leave `dims` out: TensorRT then takes the shapes it is run on",
    )


def spans_of(model: ir.Model, feeds: Iterable[Feeds]) -> tuple[str, ...]:
    """Return the option ``dims`` that covers feeds: the sizes seen, the last feed's as the usual ones.

    Args:
        model: The model the feeds are of.
        feeds: What it is to run on.
    """
    seen: dict[str, list[int]] = {}
    dynamic = _dynamic_inputs(model)
    for feed in feeds:
        for name, dims in dynamic.items():
            for dim, size in zip(dims, feed[name].shape, strict=True):
                if isinstance(dim, str):
                    seen.setdefault(dim, []).append(size)
    return tuple(f"{name}={min(sizes)}..{sizes[-1]}..{max(sizes)}" for name, sizes in seen.items())


def _dynamic_inputs(model: ir.Model) -> dict[str, tuple[int | str, ...]]:
    """Return the dimensions of inputs that have some without a size, those given a default left out."""
    found: dict[str, tuple[int | str, ...]] = {}
    for value in model.graph.inputs:
        name = value.name or ""
        if name in model.graph.initializers:
            continue
        if value.shape is None:
            raise UsageError(
                f"`dims`: input `{name}` declares no shape, not even how many dimensions it has",
                hint=f"`graphopt optimize --set-shape {name}:…` gives it one",
            )
        dims = tuple(
            dim if isinstance(dim, int) else (dim.value or f"{name}[{axis}]") for axis, dim in enumerate(value.shape)
        )
        if any(isinstance(dim, str) for dim in dims):
            found[name] = dims
    return found


def _asked_of(dim: int | str) -> set[str]:
    """Return the names a dimension follows from: its own, or those of the expression that it is."""
    if isinstance(dim, int):
        return set()
    try:
        return set(ir.SymbolicDim(dim).free_symbols()) or {dim}
    except ValueError:  # a name that is no expression
        return {dim}


def _left_out(dynamic: Mapping[str, tuple[int | str, ...]], spans: Mapping[str, Span]) -> dict[str, list[str]]:
    left = {
        name: [dim for dim in dims if isinstance(dim, str) and dim not in spans and not _asked_of(dim) <= set(spans)]
        for name, dims in dynamic.items()
    }
    return {name: dims for name, dims in left.items() if dims}


def _shapes(
    dynamic: Mapping[str, tuple[int | str, ...]], spans: Mapping[str, Span], end: str
) -> dict[str, tuple[int, ...]]:
    sizes = {name: span.at(end) for name, span in spans.items()}
    return {name: tuple(_size(dim, sizes) for dim in dims) for name, dims in dynamic.items()}


def _text(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())


def _size(dim: int | str, sizes: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    if dim in sizes:
        return sizes[dim]
    found = ir.SymbolicDim(dim).evaluate(dict(sizes))
    if not isinstance(found, int) or found < 0:
        raise UsageError(f"`dims`: dimension `{dim}` has no size", hint=f"give `{dim}` sizes of its own")
    return found


def _known_hint(name: str, known: set[str]) -> str:
    return did_you_mean(name, known) if known else "every input has a fixed shape: leave `dims` out"
