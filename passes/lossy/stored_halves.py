"""Weights stored in a half format and widened when the model is loaded: half the file, arithmetic as before."""

from __future__ import annotations

import onnx_ir as ir

from graphopt import derived, walk
from graphopt.authoring import Context
from graphopt.report import show_bytes

from ..analyses.narrow_constants import survey
from ..analyses.selection import Selection
from .cast_plan import LEAST_WEIGHT_SQNR

_RULE = "store-half"
# Below this a Cast takes about what it spares.
_LEAST_BYTES = 1024
# The first version whose Cast takes bfloat16.
_FIRST_BFLOAT_OPSET = 13


def store_halves(model: ir.Model, ctx: Context, selection: Selection, dtype: ir.DataType) -> None:
    """Store large float32 constants in a half format, each behind one Cast that runtimes fold when they load it.

    Args:
        model: The model, changed in place.
        ctx: Rewriter and report.
        selection: Nodes whose constants may be stored so.
        dtype: FLOAT16 or BFLOAT16.
    """
    name = dtype.name.lower()
    if dtype is ir.DataType.BFLOAT16 and walk.opset(model) < _FIRST_BFLOAT_OPSET:
        ctx.left(f"opset {walk.opset(model)} has no Cast from {name}: `--passes opset:to={_FIRST_BFLOAT_OPSET},cast…`")
        return
    done = before = 0
    noise = signal = 0.0
    for value in list(walk.initializers(model)):
        tensor = walk.constant_tensor(value)
        if tensor is None or tensor.dtype is not ir.DataType.FLOAT or not _pays(tensor):
            continue
        readers = [use.node for use in value.uses()]
        if value.is_graph_output() or not readers:
            continue
        excluded = next((node for node in readers if not selection.allows(node)), None)
        if excluded is not None:
            ctx.left("its constant is read where nothing may be cast", excluded)
            continue
        found = survey(tensor, dtype)
        if found.overflowing or found.sqnr < LEAST_WEIGHT_SQNR:
            what = "is out of range" if found.overflowing else f"loses too much (SQNR {found.sqnr:.0f} dB)"
            ctx.left(f"constant `{value.name}` {what} in {name}", readers[0])
            continue
        _store(value, tensor, dtype, ctx)
        done, before = done + 1, before + tensor.nbytes
        noise, signal = noise + found.noise, signal + found.signal
    if not done:
        ctx.note(f"nothing to store in {name}: no float32 constant of {_LEAST_BYTES} bytes or more may be", constants=0)
        return
    ctx.note(
        f"{done} constants stored in {name}: {show_bytes(before)} → {show_bytes(before // 2)}; the runtime widens them "
        "when it loads the model and computes in float32 as before",
        constants=done,
        bytes_before=before,
        bytes_after=before // 2,
        relative_error=(noise / signal) ** 0.5 if signal else 0.0,
    )


def _pays(tensor: ir.TensorProtocol) -> bool:
    """Return whether a constant is worth a Cast."""
    return tensor.nbytes >= _LEAST_BYTES


def _store(value: ir.Value, tensor: ir.TensorProtocol, dtype: ir.DataType, ctx: Context) -> None:
    readers = [use.node for use in value.uses()]
    graph = value.graph
    assert graph is not None, "an initializer belongs to a graph"
    with ctx.rewriter.edit(_RULE, *readers):
        stored = ctx.rewriter.const(derived.cast(tensor, dtype), f"{value.name}_half", near=graph[0])
        node = ctx.rewriter.make("Cast", [stored], {"to": int(ir.DataType.FLOAT)}, sources=readers[:1], name="widen")
        producer = stored.producer()  # a Constant node, in files too old for anything else
        if producer is not None:
            wide = ctx.rewriter.insert_after(node, producer).outputs[0]
        else:
            wide = ctx.rewriter.insert(node, before=graph[0]).outputs[0]
        ctx.rewriter.replace(value, wide)
        ctx.rewriter.remove_initializer(value)
