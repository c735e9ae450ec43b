"""Sparsify: weights that are mostly zeros stored without them, and what zeros are worth, said."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context, Guarantee, Pass
from graphopt.backend import Array
from graphopt.report import show_bytes
from graphopt.sparse import FIRST_IR_WITH_SPARSE, SparselyStored, stored_bytes

from ..analyses.linear_layers import linear_layers

# Fewer elements are not worth a look: names and shapes take as much.
_LEAST_ELEMENTS = 64
# A weight of fewer zeros was not pruned.
_LEAST_ZEROS = 0.05
# Beyond this compressing takes minutes, as for `model_io.gzip_bytes`.
_GZIP_LIMIT = 256 << 20
_GZIP_LEVEL = 1


@dataclass(frozen=True)
class Sparsify(Pass):
    """Store weights that are mostly zeros as sparse initializers where that is smaller, and say what that gains."""

    name = "sparsify"
    guarantee = Guarantee.EXACT
    edits: ClassVar[Mapping[str, str]] = {
        "store-sparse": "a tensor = what in it is not zero, with its places, and zeros elsewhere"
    }

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Store what is smaller so, and report."""
        found = _Found()
        for value in list(model.graph.initializers.values()):
            tensor = walk.constant_tensor(value)
            if tensor is None or tensor.size < _LEAST_ELEMENTS or tensor.dtype.bitwidth % 8:
                continue
            array = tensor.numpy()
            if np.count_nonzero(array) > (1 - _LEAST_ZEROS) * array.size:
                continue
            found.add(value, array)
        if not found.dense:
            ctx.note("found no weight with zeros worth leaving out: the model is unchanged")
            return
        reason = _obstacle(model, ctx)
        smaller = [value for value, size in found.sparse.items() if size < found.dense[value]]
        stored = [] if reason is not None else [value for value in smaller if _may_change(value)]
        for value in stored:
            tensor = walk.constant_tensor(value)
            assert tensor is not None, "looked at above"
            if not isinstance(tensor, SparselyStored):
                with ctx.rewriter.edit("store-sparse", *[use.node for use in value.uses()]):
                    ctx.rewriter.set_weight(value, SparselyStored(tensor))
        if reason is None and smaller and not stored:
            reason = "they are outputs of the model, or inputs with a default"
        _report(found, stored, reason, ctx)
        _report_two_of_four(model, ctx)


@dataclass
class _Found:
    """Weights with zeros, by what they take.

    Attributes:
        dense: Bytes as they are.
        sparse: Bytes of what is not zero, and its places.
        zipped: Bytes of all of them compressed, or None where there is too much to compress.
        zeros: How many zeros there are.
        elements: How many numbers.
    """

    dense: dict[ir.Value, int] = field(default_factory=dict)
    sparse: dict[ir.Value, int] = field(default_factory=dict)
    zipped: int | None = 0
    zeros: int = 0
    elements: int = 0

    def add(self, value: ir.Value, array: Array) -> None:
        self.dense[value], self.sparse[value] = array.nbytes, stored_bytes(array)
        self.zeros += array.size - int(np.count_nonzero(array))
        self.elements += array.size
        if sum(self.dense.values()) > _GZIP_LIMIT:
            self.zipped = None
        if self.zipped is not None:
            self.zipped += len(zlib.compress(np.ascontiguousarray(array).view(np.uint8).data, _GZIP_LEVEL))


def _obstacle(model: ir.Model, ctx: Context) -> str | None:
    """Return why nothing may be stored without zeros, or None."""
    if model.ir_version < FIRST_IR_WITH_SPARSE:
        return f"models of IR version {model.ir_version} have no sparse initializers; `opset` brings a later one"
    if not ctx.target.reads_sparse:
        return f"no runtime of `{ctx.target.name}` is known to read sparse initializers; ONNX Runtime does"
    return None


def _may_change(value: ir.Value) -> bool:
    """Return whether a constant is nothing but a constant: no input with a default, and no output."""
    return not value.is_graph_input() and not value.is_graph_output()


def _report(found: _Found, stored: Iterable[ir.Value], obstacle: str | None, ctx: Context) -> None:
    chosen = set(stored)
    before = sum(found.dense.values())
    after = sum(found.sparse[value] if value in chosen else size for value, size in found.dense.items())
    zipped = f", {show_bytes(found.zipped)} compressed by gzip" if found.zipped is not None else ""
    share = found.zeros / found.elements
    what = f"{len(chosen)} of {len(found.dense)} weights with zeros ({share:.0%} of their numbers) stored without them"
    if obstacle is not None:
        what += f": {obstacle}"
    elif not chosen:
        what += ": with its place, a number takes so much more that two in three float32 have to be zero"
    ctx.note(
        f"{what}, {show_bytes(before)} → {show_bytes(after)} on disk; as they were{zipped}",
        weights=len(found.dense),
        stored=len(chosen),
        dense_bytes=before,
        stored_bytes=after,
        gzip_bytes=found.zipped,
        zeros=found.zeros,
        elements=found.elements,
    )
    ctx.note(
        "a dense runtime fills the zeros in again when it loads a model: it computes as before, no faster, in as much "
        "memory; to compute less, remove channels (`prune-channels`)"
    )


def _report_two_of_four(model: ir.Model, ctx: Context) -> None:
    """Say which layers kernels for two weights of four can take."""
    every = linear_layers(model)
    held = [layer.node for layer in every if layer.channels % 4 == 0 and _is_two_of_four(layer.matrix())]
    if held:
        ctx.note(
            f"{len(held)} of {len(every)} layers keep at most two of every four weights: sparse kernels of TensorRT "
            "(`trt_sparsity_enable` of ONNX Runtime's provider, `--sparsity=enable` of trtexec; Ampere and later, in "
            "float16 or int8) may take them, stored densely or not",
            two_of_four=[walk.label(node) for node in held],
        )


def _is_two_of_four(matrix: Array) -> bool:
    groups = matrix.reshape(len(matrix), -1, 4)
    return bool((np.count_nonzero(groups, axis=-1) <= 2).all())
