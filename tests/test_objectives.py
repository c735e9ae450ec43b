"""What training makes small: each term against the metric it stands for, and exact however a batch is divided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.data import Dataset, open_data
from graphopt.errors import DataError, GraphoptError, PassError, UsageError
from graphopt.metrics import KL, cross_entropies

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from graphopt import registry  # noqa: E402
from graphopt.passes.recovery.aim import Aim  # noqa: E402
from graphopt.passes.recovery.cut_values import cut_values, ends_of_blocks  # noqa: E402
from graphopt.passes.recovery.objectives import Objective, choose  # noqa: E402
from graphopt.passes.recovery.samples import StoredSamples, TrainingBatch  # noqa: E402
from graphopt.passes.recovery.stepping import values_of  # noqa: E402
from graphopt.shapes import infer_shapes  # noqa: E402

RNG = np.random.default_rng(0)
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]], np.int64)
IDS = RNG.integers(0, 11, MASK.shape)
X = RNG.normal(0, 1, (6, 3, 6, 6)).astype(np.float32)


def model_of(
    nodes: list[onnx.NodeProto], inputs: dict[str, Any], outputs: dict[str, Any], constants: dict[str, Any]
) -> ir.Model:
    """Return a model of opset 17; inputs of whole numbers where their names end in ids or mask."""
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info(
                name, TensorProto.INT64 if name.endswith(("ids", "mask")) else TensorProto.FLOAT, dims
            )
            for name, dims in inputs.items()
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in outputs.items()],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made)
    from graphopt import provenance

    model = ir.from_proto(made)
    provenance.stamp(model) if hasattr(provenance, "stamp") else None
    return model
