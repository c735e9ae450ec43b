"""Specialisation: a model whose inputs may be of any size becomes one for the sizes a user gives."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from graphopt import walk
from graphopt.errors import UsageError, did_you_mean
from graphopt.shapes import infer_shapes

Dims = tuple[int | str | None, ...] | None
_SHAPE_HINT = "write `--set-shape input:1x3x224x224`"


@dataclass(frozen=True)
class PortChange:
    """An input or output whose declared shape changed: ints, names, None where a dimension has none."""

    name: str
    before: Dims
    after: Dims


@dataclass(frozen=True)
class Specialised:
    """What specialisation changed of the signature.

    Attributes:
        dims: Size of every dimension that had a name, those that follow from others included.
        inputs: Inputs whose shape changed.
        outputs: Outputs whose shape changed.
    """

    dims: Mapping[str, int]
    inputs: tuple[PortChange, ...]
    outputs: tuple[PortChange, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        sides = {"inputs": self.inputs, "outputs": self.outputs}
        changes = {
            side: {one.name: {"before": _listed(one.before), "after": _listed(one.after)} for one in ports}
            for side, ports in sides.items()
        }
        return {"dims": dict(self.dims), **changes}


def _listed(dims: Dims) -> list[int | str | None] | None:
    return None if dims is None else list(dims)


def parse_dims(texts: Sequence[str]) -> dict[str, int]:
    """Return sizes by name of dimension from texts such as ``batch=1,seq=128``.

    Raises:
        UsageError: A part is no ``name=size``, or a name is given two sizes.
    """
    sizes: dict[str, int] = {}
    for part in [part for text in texts for part in text.split(",")]:
        name, equals, size = (one.strip() for one in part.rpartition("="))
        if not equals or not name or not size.lstrip("-").isdecimal():
            raise UsageError(f"`--set-dim {part}` is no size", hint="write `--set-dim batch=1,seq=128`")
        _agree(sizes, name, int(size))
    return sizes


def parse_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return shapes by name of input from texts such as ``input:1x3x224x224``.

    Raises:
        UsageError: A text is no ``input:shape``, or an input is given two shapes.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts:
        # Names of inputs may hold colons.
        name, colon, shape = text.rpartition(":")
        sizes = shape.split("x") if shape else []
        if not colon or not name or not all(size.lstrip("-").isdecimal() for size in sizes):
            raise UsageError(f"`--set-shape {text}` is no shape", hint=_SHAPE_HINT)
        given = tuple(int(size) for size in sizes)
        if shapes.setdefault(name, given) != given:
            raise UsageError(f"input `{name}` is given two shapes", hint="keep one of them")
    return shapes


def check_sizes(dims: Mapping[str, int], shapes: Mapping[str, Sequence[int]]) -> None:
    """Check that what was given are sizes, before any model is opened.

    Raises:
        UsageError: One is no whole number, or less than 1.
    """
    given = [(f"dimension `{name}`", size) for name, size in dims.items()]
    given += [(f"a dimension of input `{name}`", size) for name, shape in shapes.items() for size in shape]
    for what, size in given:
        try:
            positive = not isinstance(size, bool) and operator.index(size) > 0
        except TypeError:
            positive = False
        if not positive:
            raise UsageError(f"{what} cannot be `{size}`", hint="a whole number, 1 or more")


def specialise(model: ir.Model, dims: Mapping[str, int], shapes: Mapping[str, Sequence[int]]) -> Specialised:
    """Give the inputs of a model the sizes asked for, and with them whatever in the model follows from these.

    Dimensions of the same name have the same size everywhere but in functions; those named by an expression of such
    names, such as ``past + seq``, follow. Nothing else about the model changes.

    Args:
        model: The model, changed in place.
        dims: Sizes by name of dimension.
        shapes: Shapes by name of input.

    Raises:
        UsageError: There is no such dimension or input, a rank differs, or sizes contradict each other or the model.
    """
    check_sizes(dims, shapes)
    inputs = {value.name or "": value for value in model.graph.inputs}
    sizes = _sizes_by_name(inputs, dims)
    for name, shape in shapes.items():
        if name not in inputs:
            raise UsageError(f"the model has no input `{name}`", hint=did_you_mean(name, inputs))
        _match_shape(inputs[name], tuple(map(operator.index, shape)), sizes)
    _check_expressions(sizes)
    ports = [*model.graph.inputs, *model.graph.outputs]
    before = [_dims(port) for port in ports]
    for name, shape in shapes.items():
        inputs[name].shape = ir.Shape([operator.index(size) for size in shape])
    for value in _values(model):
        if value.shape is not None:
            value.shape = _with_sizes(value, sizes)
    _check_defaults(model)
    _learn_outputs(model)
    changes = [PortChange(port.name or "", old, _dims(port)) for port, old in zip(ports, before, strict=True)]
    count = len(model.graph.inputs)
    changed = [[one for one in side if one.before != one.after] for side in (changes[:count], changes[count:])]
    return Specialised(sizes, tuple(changed[0]), tuple(changed[1]))


def _sizes_by_name(inputs: Mapping[str, ir.Value], dims: Mapping[str, int]) -> dict[str, int]:
    known = {name for value in inputs.values() for dim in value.shape or () for name in _names(dim)}
    for name in dims:
        if name not in known:
            fixed = "each dimension of each input has a fixed size or no name; see `graphopt inspect`"
            raise UsageError(
                f"no dimension of an input is called `{name}`", hint=did_you_mean(name, known) if known else fixed
            )
    return {name: operator.index(size) for name, size in dims.items()}


def _names(dim: int | ir.SymbolicDim) -> set[str]:
    """Return the name of a dimension, and those it is an expression of."""
    if isinstance(dim, int) or dim.value is None:
        return set()
    try:
        return {dim.value, *dim.free_symbols()}
    except ValueError:  # a name that is no expression
        return {dim.value}


def _match_shape(value: ir.Value, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    """Check a shape against what an input declares, and note what its names stand for."""
    declared = _dims(value)
    if declared is None:
        return
    shown = "×".join("?" if dim is None else str(dim) for dim in declared) or "scalar"
    if len(declared) != len(shape):
        raise UsageError(
            f"input `{value.name}` has {len(declared)} dimensions ({shown}), and is given {len(shape)}",
            hint=_SHAPE_HINT,
        )
    for dim, size in zip(declared, shape, strict=True):
        if isinstance(dim, int) and dim != size:
            raise UsageError(
                f"input `{value.name}` is {shown}: a dimension that is always {dim} cannot be {size}",
                hint="only dimensions without a fixed size can be given one",
            )
        if isinstance(dim, str):
            _agree(sizes, dim, size)


def _agree(sizes: dict[str, int], name: str, size: int) -> None:
    if sizes.setdefault(name, size) != size:
        raise UsageError(
            f"dimension `{name}` cannot be both {sizes[name]} and {size}", hint="dimensions of one name have one size"
        )


def _check_expressions(sizes: Mapping[str, int]) -> None:
    """Check that dimensions named by an expression have the size that it has."""
    for name, size in sizes.items():
        others = {other: known for other, known in sizes.items() if other != name}
        found = _size(ir.SymbolicDim(name), others)
        if isinstance(found, int) and found != size:
            raise UsageError(
                f"dimension `{name}` cannot be both {size} and {found}", hint="give sizes that fit each other"
            )


def _values(model: ir.Model) -> Iterator[ir.Value]:
    """Yield every value of the main graph and the graphs nested in it; names mean the same in all of them."""
    for graph in walk.graphs_within(model.graph):
        yield from graph.inputs
        for node in graph:
            yield from node.outputs


def _dims(value: ir.Value) -> Dims:
    if value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)


def _with_sizes(value: ir.Value, sizes: Mapping[str, int]) -> ir.Shape:
    assert value.shape is not None, "checked by the caller"
    dims = [dim if isinstance(dim, int) else _size(dim, sizes) for dim in value.shape]
    if any(isinstance(dim, int) and dim < 0 for dim in dims):
        raise UsageError(
            f"a dimension of `{value.name}` ({value.shape}) would be negative", hint="give sizes that fit each other"
        )
    return value.shape if dims == list(value.shape) else ir.Shape(dims)


def _size(dim: ir.SymbolicDim, sizes: Mapping[str, int]) -> int | ir.SymbolicDim:
    """Return the size of a dimension that is named, or an expression of names; else the dimension."""
    if dim.value is None:
        return dim
    if dim.value in sizes:
        return sizes[dim.value]
    try:
        found = dim.evaluate(sizes)
    except ValueError:  # a name that is no expression
        return dim
    return found if isinstance(found, int) else dim


def _check_defaults(model: ir.Model) -> None:
    """Check that defaults of inputs have the shape these are declared to have."""
    for value in model.graph.inputs:
        dims, tensor = _dims(value), value.const_value
        if tensor is None or dims is None:
            continue
        if any(isinstance(d, int) and d != size for d, size in zip(dims, walk.dims(tensor), strict=False)):
            raise UsageError(
                f"input `{value.name}` has a default of shape {'x'.join(map(str, walk.dims(tensor)))}",
                hint="only dimensions without a fixed size can be given one",
            )


def _learn_outputs(model: ir.Model) -> None:
    """Declare those dimensions of outputs fixed that are, now that the inputs' are."""
    copy = model.clone()
    inferred = list(copy.graph.outputs)
    copy.graph.outputs.clear()  # what an output declares, inference leaves alone
    infer_shapes(copy)
    for value, twin in zip(model.graph.outputs, inferred, strict=True):
        known, found = value.shape, twin.shape
        if known is None or found is None or len(known) != len(found):
            continue
        pairs = zip(known, found, strict=True)
        value.shape = ir.Shape([b if isinstance(b, int) and not isinstance(a, int) else a for a, b in pairs])
