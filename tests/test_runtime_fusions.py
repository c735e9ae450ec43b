"""What ONNX Runtime makes one operator of by itself, it still does behind the passes that fold and merge constants."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from .differential import Draft
from .pass_runs import loaded, run_passes

PASSES = "fuse-pad,fuse-affine,merge-affine,fuse-linear,fuse-activations,fuse-reductions"
WIDTH = 8


def optimized(model: onnx.ModelProto, folder: Path) -> Counter[str]:
    """Return the operators that ONNX Runtime runs."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def layer_norm(draft: Draft, x: str) -> str:
    centred = draft.node("Sub", x, draft.node("ReduceMean", x, axes=[-1]))
    square = draft.node("Pow", centred, draft.const(2.0))
    spread = draft.node("Sqrt", draft.node("Add", draft.node("ReduceMean", square, axes=[-1]), draft.const(1e-5)))
    scaled = draft.node("Mul", draft.node("Div", centred, spread), draft.drawn((WIDTH,)))
    return draft.node("Add", scaled, draft.drawn((WIDTH,)))


def rms_norm(draft: Draft, x: str) -> str:
    mean = draft.node("ReduceMean", draft.node("Pow", x, draft.const(2.0)), axes=[-1])
    spread = draft.node("Sqrt", draft.node("Add", mean, draft.const(1e-5)))
    return draft.node("Mul", draft.node("Div", x, spread), draft.drawn((WIDTH,)))


def gelu(draft: Draft, x: str) -> str:
    x = linear(draft, x)
    gate = draft.node("Add", draft.node("Erf", draft.node("Div", x, draft.const(2**0.5))), draft.const(1.0))
    return draft.node("Mul", draft.node("Mul", x, gate), draft.const(0.5))


def quick_gelu(draft: Draft, x: str) -> str:
    return draft.node("Mul", x, draft.node("Sigmoid", draft.node("Mul", x, draft.const(1.702))))


def linear(draft: Draft, x: str) -> str:
    return draft.node("Add", draft.node("MatMul", x, draft.drawn((WIDTH, WIDTH))), draft.drawn((WIDTH,)))


def scaled(draft: Draft, x: str) -> str:
    return draft.node("Mul", x, draft.const(0.125))


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("behind", [linear, scaled])
@pytest.mark.parametrize("block", [layer_norm, rms_norm, gelu, quick_gelu])
def test_fused_before_is_fused_after(block, behind, rank, tmp_path: Path) -> None:
    draft = Draft(0, np.float32, opset=17)
    model = draft.model(behind(draft, block(draft, linear(draft, "x"))), ("batch", "length", WIDTH)[3 - rank :])
    before = optimized(model, tmp_path)
    after = optimized(ir.to_proto(run_passes(loaded(model), PASSES).model), tmp_path)
    fused = {name for name in before if name.endswith(("Gelu", "Normalization"))}
    assert {name: before[name] for name in fused} == {name: after[name] for name in fused}
    assert after.total() <= before.total(), (before, after)
