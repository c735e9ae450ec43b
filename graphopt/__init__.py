"""graphopt: an optimizing compiler for trained neural networks, with proof.

Everything public is imported on first use, so that ``import graphopt`` is light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.authoring import Context, Guarantee, Need, Pass, RewritePass
    from graphopt.benchmarking.benchmark import bench
    from graphopt.benchmarking.results import Bench
    from graphopt.comparing.layer_comparison import LayerComparison, LayerError, compare_layers
    from graphopt.comparing.model_comparison import compare
    from graphopt.debugging.bisection import Bisection, bisect
    from graphopt.debugging.reduction import reduce
    from graphopt.debugging.reduction_result import Reduction
    from graphopt.debugging.rerun import Replay, replay
    from graphopt.driver import optimize
    from graphopt.errors import GraphoptError, PassError, VerificationError
    from graphopt.layer_sensitivity import Sensitivity, sensitivity
    from graphopt.model_io import load, save
    from graphopt.optimization import Result
    from graphopt.options import opt
    from graphopt.pattern import Miss, Rule
    from graphopt.pipeline import Pipeline
    from graphopt.recovering import recover
    from graphopt.registry import Preset
    from graphopt.summary import summarize
    from graphopt.target import Target
    from graphopt.torch_export import to_torch, update_weights
    from graphopt.torch_import import from_torch

_HOMES = {
    "graphopt.authoring": ("Context", "Guarantee", "Need", "Pass", "RewritePass"),
    "graphopt.benchmarking.results": ("Bench",),
    "graphopt.benchmarking.benchmark": ("bench",),
    "graphopt.debugging.bisection": ("Bisection", "bisect"),
    "graphopt.driver": ("optimize",),
    "graphopt.errors": ("GraphoptError", "PassError", "VerificationError"),
    "graphopt.comparing.layer_comparison": ("LayerComparison", "LayerError", "compare_layers"),
    "graphopt.layer_sensitivity": ("Sensitivity", "sensitivity"),
    "graphopt.model_io": ("load", "save"),
    "graphopt.optimization": ("Result",),
    "graphopt.options": ("opt",),
    "graphopt.pattern": ("Miss", "Rule"),
    "graphopt.pipeline": ("Pipeline",),
    "graphopt.recovering": ("recover",),
    "graphopt.registry": ("Preset",),
    "graphopt.debugging.reduction": ("reduce",),
    "graphopt.debugging.reduction_result": ("Reduction",),
    "graphopt.debugging.rerun": ("Replay", "replay"),
    "graphopt.comparing.model_comparison": ("compare",),
    "graphopt.summary": ("summarize",),
    "graphopt.target": ("Target",),
    "graphopt.torch_export": ("to_torch", "update_weights"),
    "graphopt.torch_import": ("from_torch",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Bench",
    "Bisection",
    "Context",
    "GraphoptError",
    "Guarantee",
    "LayerComparison",
    "LayerError",
    "Miss",
    "Need",
    "Pass",
    "PassError",
    "Pipeline",
    "Preset",
    "Reduction",
    "Replay",
    "Result",
    "RewritePass",
    "Rule",
    "Sensitivity",
    "Target",
    "VerificationError",
    "bench",
    "bisect",
    "compare",
    "compare_layers",
    "from_torch",
    "ir",
    "load",
    "opt",
    "optimize",
    "recover",
    "reduce",
    "replay",
    "save",
    "sensitivity",
    "summarize",
    "to_torch",
    "update_weights",
]


def __getattr__(name: str) -> Any:
    if name == "ir":  # the IR is onnx_ir, unwrapped
        return importlib.import_module("onnx_ir")
    if name not in _HOME_OF:
        raise AttributeError(f"module `graphopt` has no attribute `{name}`")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
