"""Generated models in torch: the same values as in ONNX Runtime, whatever operators stand together."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from graphopt import ir, walk
from graphopt.backends.torch_fx.backend import Torch
from graphopt.normal_form import normalize

from .graph_generator import feeds, random_model

pytest.importorskip("torch")

SEEDS = range(60)
# What each runtime draws from a generator of its own.
RANDOM = frozenset({"Bernoulli", "Multinomial", *(f"Random{kind}" for kind in ("Normal", "Uniform"))})
RANDOM |= {f"{name}Like" for name in RANDOM}
# Of the largest number among a result: sums in another order. Half floats have 11 bits; of doubles ONNX Runtime keeps
# some statistics in float32.
TOLERANCES = {np.dtype(np.float16): 4e-3, np.dtype(np.float32): 1e-4, np.dtype(np.float64): 1e-5}
FEWEST = 40


def test_generated_models_compute_what_onnx_runtime_does() -> None:
    compared = 0
    for seed in SEEDS:
        proto = random_model(seed)
        model = ir.from_proto(proto)
        normalize(model)
        expected = in_onnxruntime(proto, seed)
        if expected is None or any(node.op_type in RANDOM for node in walk.every_node(model)):
            continue
        with Torch().open(model, threads=1) as session:
            got = session.run(fed(proto, seed))
        for name, want in expected.items():
            assert_close(got[name], want, f"`{name}` of seed {seed}")
        compared += 1
    assert compared >= FEWEST


def fed(proto: onnx.ModelProto, seed: int) -> dict[str, np.ndarray]:
    """Return feeds, those of inputs that have a default left out: a default is a constant in torch."""
    defaults = {tensor.name for tensor in proto.graph.initializer}
    return {name: array for name, array in feeds(proto, seed).items() if name not in defaults}


def in_onnxruntime(proto: onnx.ModelProto, seed: int) -> dict[str, np.ndarray] | None:
    """Return the outputs, or None where ONNX Runtime cannot run the model."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = ort.InferenceSession(proto.SerializeToString(), options)
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, fed(proto, seed)), strict=True))
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        return None


def assert_close(got: np.ndarray, want: np.ndarray, what: str) -> None:
    assert got.dtype == want.dtype, what
    assert got.shape == want.shape, what
    if want.dtype not in TOLERANCES:
        np.testing.assert_array_equal(got, want, what)
        return
    finite = want[np.isfinite(want)]
    tolerance = TOLERANCES[want.dtype]
    scale = max(1.0, float(np.abs(finite).max(initial=0)))
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * scale, equal_nan=True, err_msg=what)
