"""What is known of a value, one node as a shape rule sees it, and where the rules put what they find."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.dims import Dim, Size, named, operation, unknown

Dims: TypeAlias = tuple[Size, ...]
# A dimension a rule knows nothing of is None.
LooseDims: TypeAlias = Sequence[Size | None]
Minter: TypeAlias = Callable[..., Dim]

# Contents are followed for tensors of up to this many elements: shapes, axes, sizes, not weights.
CONTENTS_LIMIT = 1024
# Elements nothing is known of are told apart in tensors of up to this many.
UNKNOWN_LIMIT = 8
# The dtypes whose contents are followed, with the range of each.
CONTENT_RANGES: Mapping[ir.DataType, tuple[int, int]] = {
    ir.DataType.INT64: (-(2**63), 2**63 - 1),
    ir.DataType.INT32: (-(2**31), 2**31 - 1),
    ir.DataType.BOOL: (0, 1),
}


class Contradiction(Exception):
    """What a node reads cannot be what it takes; the message says why."""


@dataclass(frozen=True, eq=False)
class Contents:
    """The elements of a small integer or bool tensor: numbers, and symbolic ones.

    Attributes:
        array: An object array of `int` and `Dim`; bools are 0 and 1.
    """

    array: np.ndarray[Any, np.dtype[np.object_]]

    @staticmethod
    def of(entries: Any, shape: Sequence[int] | None = None) -> Contents:
        """Return contents from a sequence of entries, one-dimensional unless a shape is given, or from one entry."""
        array = np.empty(() if isinstance(entries, int | Dim) else len(entries), dtype=object)
        array[...] = entries
        return Contents(array if shape is None else array.reshape(tuple(shape)))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return tuple(self.array.shape)

    @property
    def entries(self) -> tuple[Size, ...]:
        """The elements in order, whatever the shape."""
        entries: list[Size] = self.array.reshape(-1).tolist()
        return tuple(entries)

    @property
    def known(self) -> tuple[int, ...] | None:
        """The elements in order if each is a number, else None."""
        numbers = tuple(entry for entry in self.entries if isinstance(entry, int))
        return numbers if len(numbers) == self.array.size else None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Contents) and self.shape == other.shape and self.entries == other.entries

    def __hash__(self) -> int:
        return hash((self.shape, self.entries))


class Fact:
    """What is known of a value: dtype, dimensions, contents; the type itself where it is no tensor.

    Attributes:
        dtype: Of its elements, or None.
        dims: One size for each axis, or None where the rank is not known.
        type: The type of a value that is no tensor.
    """

    __slots__ = ("_contents", "dims", "dtype", "tensor", "type")

    def __init__(
        self,
        dtype: ir.DataType | None,
        dims: Dims | None,
        contents: Contents | None = None,
        *,
        tensor: ir.TensorProtocol | None = None,
        other: ir.TypeProtocol | None = None,
    ) -> None:
        self.dtype, self.dims, self.type = dtype, dims, other
        self.tensor = tensor
        self._contents = contents

    @property
    def contents(self) -> Contents | None:
        """The elements of a small integer tensor; those of a constant are read when first asked for."""
        if self._contents is None and self.tensor is not None:
            self._contents = contents_of(self.tensor)
            if self._contents is None:
                self.tensor = None
        return self._contents

    def guess(self, mint: Minter) -> Contents | None:
        """Return the contents, with a symbol for each element of a very small tensor nothing is known of."""
        if self.contents is None and self.dtype in CONTENT_RANGES and self.dims is not None and len(self.dims) < 2:
            size = self.dims[0] if self.dims else 1
            if isinstance(size, int) and size <= UNKNOWN_LIMIT:
                is_bool = self.dtype is ir.DataType.BOOL
                entries = [_bit(mint()) if is_bool else mint(signed=True) for _ in range(size)]
                self._contents = Contents.of(entries, self.dims)  # type: ignore[arg-type]
        return self._contents

    def same_as(self, other: Fact | None) -> bool:
        """Return whether another fact says the same."""
        if other is None or self.dtype != other.dtype or self.dims != other.dims or self.type != other.type:
            return False
        return self.tensor is other.tensor and self._contents == other._contents


def _bit(size: Dim) -> Dim:
    return operation("bit", (size,), 0, 1)


def contents_of(tensor: ir.TensorProtocol) -> Contents | None:
    """Return the elements of a constant if it is small and holds integers or bools, else None."""
    if tensor.dtype not in CONTENT_RANGES or tensor.size > CONTENTS_LIMIT:
        return None
    array = tensor.numpy()
    return Contents((array.astype(np.int64) if array.dtype == np.bool_ else array).astype(object))


def declared_dims(shape: ir.Shape | None, mint: Minter) -> Dims | None:
    """Return the dimensions a shape of the IR declares; unnamed ones become unknown sizes."""
    if shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else symbolic(dim) or mint() for dim in shape)


def symbolic(dim: ir.SymbolicDim) -> Dim | None:
    """Return what a symbolic dimension of the IR stands for, or None where it has no name."""
    inferred: Dim | None = getattr(dim, "dim", None)
    if inferred is not None:
        return inferred
    return named(dim.value) if dim.value else None


def stored_dims(dims: Dims) -> list[int | ir.SymbolicDim]:
    """Return dimensions as a shape of the IR holds them."""
    return [dim if isinstance(dim, int) else dim.symbol for dim in dims]


class Call:
    """A node as a shape rule sees it: facts of its inputs, its attributes, and a place for those of its outputs.

    Attributes:
        node: The node.
        inputs: What is known of each input; None for one left out.
        outputs: What the rule found of each output so far.
        opset: The version of the node's operator set.
        mint: Makes a size that equals nothing else.
    """

    __slots__ = ("_bindings", "inputs", "mint", "node", "opset", "outputs")

    def __init__(
        self,
        node: ir.Node,
        inputs: list[Fact | None],
        opset: int,
        mint: Minter = unknown,
        bindings: Mapping[str, ir.Attr] | None = None,
    ) -> None:
        self.node, self.inputs, self.opset, self.mint = node, inputs, opset, mint
        self.outputs: list[tuple[LooseDims | None, ir.DataType | None, Contents | None] | None]
        self.outputs = [None] * len(node.outputs)
        self._bindings = bindings

    # What it reads

    def has(self, index: int) -> bool:
        """Return whether an input is given."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def dims(self, index: int = 0) -> Dims | None:
        """Return the dimensions of an input, or None where it is absent or its rank not known."""
        fact = self.inputs[index] if index < len(self.inputs) else None
        return fact.dims if fact is not None else None

    def dtype(self, index: int = 0) -> ir.DataType | None:
        """Return the dtype of an input, or None."""
        fact = self.inputs[index] if index < len(self.inputs) else None
        return fact.dtype if fact is not None else None

    def contents(self, index: int) -> Contents | None:
        """Return the elements of an input, or None."""
        fact = self.inputs[index] if index < len(self.inputs) else None
        return fact.guess(self.mint) if fact is not None else None

    def sizes(self, index: int) -> Dims | None:
        """Return the elements of an input as a flat tuple, or None."""
        contents = self.contents(index)
        return None if contents is None else contents.entries

    def numbers(self, index: int) -> tuple[int, ...] | None:
        """Return the elements of an input as a flat tuple if all of them are numbers, or None."""
        fact = self.inputs[index] if index < len(self.inputs) else None
        contents = fact.contents if fact is not None else None
        return None if contents is None else contents.known

    def constant(self, index: int) -> np.ndarray[Any, Any] | None:
        """Return what a small constant input of any dtype holds, or None."""
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        tensor = walk.constant_tensor(value)
        return tensor.numpy() if tensor is not None and tensor.size <= CONTENTS_LIMIT else None

    # Its attributes

    def attribute(self, name: str) -> ir.Attr | None:
        """Return an attribute; in a function, what the call gives for a reference.

        Raises:
            LookupError: It is a reference to something the call does not tell.
        """
        attribute = self.node.attributes.get(name)
        if attribute is None or not attribute.is_ref():
            return attribute
        if self._bindings is None:
            raise LookupError(f"attribute `{name}` is what the caller gives")
        return self._bindings.get(attribute.ref_attr_name or "")

    def integer(self, name: str, default: int = 0) -> int:
        """Return an integer attribute."""
        attribute = self.attribute(name)
        return default if attribute is None else attribute.as_int()

    def integers(self, name: str) -> tuple[int, ...] | None:
        """Return an attribute that is a list of integers, or None where it is absent."""
        attribute = self.attribute(name)
        return None if attribute is None else tuple(attribute.as_ints())

    def text(self, name: str, default: str = "") -> str:
        """Return a text attribute."""
        attribute = self.attribute(name)
        return default if attribute is None else attribute.as_string()

    # What it gives

    def give(
        self,
        dims: LooseDims | None,
        dtype: ir.DataType | None = None,
        contents: Contents | None = None,
        at: int = 0,
    ) -> None:
        """Say what an output is; without a dtype it has the one the operator's schema derives from the inputs."""
        if at < len(self.outputs):
            self.outputs[at] = (dims, dtype, contents)


Rule: TypeAlias = Callable[[Call], None]


def axis_of(axis: int, rank: int) -> int:
    """Return an axis counted from the front.

    Raises:
        Contradiction: There is no such axis.
    """
    if not -rank <= axis < max(rank, 1):
        raise Contradiction(f"axis {axis} of a tensor of rank {rank}")
    return axis + rank if axis < 0 else axis
