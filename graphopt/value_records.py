"""What was inferred of a value, kept on the value: found again in constant time, taken back before saving."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graphopt import walk
from graphopt.dims import Symbol, unknown
from graphopt.shape_rules.shape_facts import Contents, Fact, Minter, declared_dims, stored_dims

# Where a value keeps its `Record`.
INFERRED = "graphopt.inferred"
Typed = tuple[ir.TypeProtocol | None, ir.Shape | None]


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of a value, and what it said before it was told.

    Attributes:
        fact: What is known.
        stamp: The dimensions its shape showed when that was written down; another shape since is another story.
        before: Type and shape the value came with.
        after: Type and shape it was given.
    """

    fact: Fact
    stamp: tuple[int | ir.SymbolicDim, ...] | None
    before: Typed
    after: Typed


def _dims_shown(value: ir.Value) -> tuple[int | ir.SymbolicDim, ...] | None:
    return value.shape.dims if value.shape is not None else None


def record_of(value: ir.Value) -> Record | None:
    """Return a value's record if it still holds: nobody gave the value another shape since."""
    record: Record | None = value.meta.data.get(INFERRED)
    return record if record is not None and record.stamp == _dims_shown(value) else None


def kept_fact(value: ir.Value) -> Fact | None:
    """Return what was inferred of a value before, or None."""
    record = record_of(value)
    return record.fact if record is not None else None


def fact_of(value: ir.Value, mint: Minter = unknown) -> Fact:
    """Return what is known of a value: its constant, what was inferred, or what is declared."""
    constant = _constant_fact(value)
    if constant is not None:
        return constant
    record = record_of(value)
    if record is not None:
        return record.fact
    fact = declared_fact(value, mint)
    value.meta[INFERRED] = Record(fact, _dims_shown(value), (value.type, value.shape), (value.type, value.shape))
    return fact


def _constant_fact(value: ir.Value) -> Fact | None:
    tensor = _tensor_of_node(value) if value.producer() is not None else walk.constant_tensor(value)
    if isinstance(tensor, Contents):
        return Fact(ir.DataType.INT64, tensor.shape, tensor)
    return Fact(tensor.dtype, walk.dims(tensor), tensor=tensor) if tensor is not None else None


def _tensor_of_node(value: ir.Value) -> ir.TensorProtocol | Contents | None:
    """Return what a Constant holds, by the shortest way: to ask for a tensor takes longer than to infer most nodes."""
    producer = value.producer()
    if producer is None or producer.op_type != "Constant":
        return None
    attribute = next(iter(producer.attributes.values()), None)
    if attribute is None or attribute.is_ref() or producer.domain not in walk.ONNX_DOMAINS:
        return None
    match attribute.name:
        case "value":
            tensor: ir.TensorProtocol = attribute.value
            return tensor
        case "value_int" | "value_ints":
            return Contents.of(attribute.value)
        case _:
            return walk.constant_tensor(value)


def declared_fact(value: ir.Value, mint: Minter = unknown) -> Fact:
    """Return what a value itself says of its type and shape."""
    other = value.type if value.type is not None and not isinstance(value.type, ir.TensorType) else None
    dtype = value.dtype if other is None else None
    return Fact(dtype, declared_dims(value.shape, mint) if other is None else None, other=other)


def type_and_shape_of_file(value: ir.Value) -> Typed:
    """Return type and shape of a value without what was inferred."""
    record: Record | None = value.meta.data.get(INFERRED)
    if record is None:
        return value.type, value.shape
    was_type, was_shape = record.before
    now_type, now_shape = record.after
    return (
        was_type if value.type == now_type else value.type,
        was_shape if value.shape == now_shape else value.shape,
    )


def write_down(value: ir.Value, fact: Fact) -> None:
    """Keep what was inferred of a value; fill in its type and shape, but no shape of an output: that is declared."""
    before = type_and_shape_of_file(value)
    inner = value.producer() is not None and not value.is_graph_output()
    if inner and fact.dims is not None:
        dims = stored_dims(fact.dims)
        if value.shape is None or value.shape.dims != tuple(dims):
            value.shape = ir.Shape(dims)
    if value.type is None and value.producer() is not None:
        if fact.type is not None:
            value.type = fact.type
        elif fact.dtype is not None:
            value.type = ir.TensorType(fact.dtype)
    value.meta[INFERRED] = Record(fact, _dims_shown(value), before, (value.type, value.shape))


def forget(value: ir.Value) -> None:
    """Take back what was inferred of a value; what a pass has stamped since is the pass's own."""
    record: Record | None = value.meta.pop(INFERRED, None)
    if record is not None and (value.type, value.shape) == record.after:
        value.type, value.shape = record.before
    if value.shape is not None and any(isinstance(dim, Symbol) for dim in value.shape):
        # A pass has copied it from another value.
        value.shape = ir.Shape([None if isinstance(dim, Symbol) else dim for dim in value.shape])


def inherit(heir: ir.Value, value: ir.Value) -> None:
    """Let a value that takes another's place know what is known of that one."""
    mine, theirs = kept_fact(heir), kept_fact(value)
    if theirs is None:
        if heir.type is None and heir.shape is None:
            heir.type, heir.shape = value.type, value.shape.copy() if value.shape is not None else None
        return
    if heir.producer() is None or walk.constant_tensor(heir) is not None:
        return
    if mine is None:
        mine = declared_fact(heir)
    write_down(heir, _merged(mine, theirs))


def _merged(mine: Fact, theirs: Fact) -> Fact:
    dims = mine.dims if mine.dims is not None else theirs.dims
    if mine.dims is not None and theirs.dims is not None and len(mine.dims) == len(theirs.dims):
        pairs = zip(mine.dims, theirs.dims, strict=True)
        dims = tuple(b if not isinstance(a, int) and (isinstance(b, int) or a.unknowns) else a for a, b in pairs)
    contents = mine.contents if mine.contents is not None else theirs.contents
    return Fact(mine.dtype or theirs.dtype, dims, contents, other=mine.type or theirs.type)
