"""What OpenVINO ran, read from the graph it made of a model and from the times of its nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from graphopt.backend import Kernel

# Nodes that hold or hand over values, and compute nothing.
_NO_KERNELS = frozenset({"Const", "Input", "Output", "Result"})
# Its nodes for what ONNX has an operator of: the others keep its own names, so that nobody takes them for ONNX's.
_ONNX_OPS = {"FakeQuantize": "QuantizeLinear"}
_DTYPES = {
    "f32": "float32",
    "f64": "float64",
    "f16": "float16",
    "bf16": "bfloat16",
    "boolean": "bool",
    **{f"i{bits}": f"int{bits}" for bits in (2, 4, 8, 16, 32, 64)},
    **{f"u{bits}": f"uint{bits}" for bits in (2, 4, 8, 16, 32, 64)},
}
_NOT_RUN = "not_executed"


def read_kernels(graph: Any, milliseconds: Mapping[str, float]) -> list[Kernel]:
    """Return the kernels of a compiled model.

    Args:
        graph: Its runtime model.
        milliseconds: The time of each node in a run, by the node's name.
    """
    return list(_kernels(graph, milliseconds))


def _kernels(graph: Any, milliseconds: Mapping[str, float]) -> Iterator[Kernel]:
    for node in graph.get_ordered_ops():
        facts = {key: _text(value) for key, value in node.get_rt_info().items()}
        kind = facts.get("layerType", node.get_type_name())
        if kind in _NO_KERNELS or facts.get("execTimeMcs", _NOT_RUN) == _NOT_RUN:
            continue
        sources = [one.get_source_output() for one in node.inputs()]
        name = node.get_friendly_name()
        yield Kernel(
            op=_ONNX_OPS.get(kind, f"openvino::{kind}"),
            # All that it stands for; what OpenVINO put in between stands for nothing.
            name=facts.get("originalLayersNames") or name,
            inputs=tuple(one.get_node().get_friendly_name() for one in sources),
            outputs=(name,),
            reads=tuple(_dtype(one) for one in sources),
            milliseconds=milliseconds.get(name, 0.0),
        )


def _dtype(port: Any) -> str:
    kind = str(port.get_element_type().get_type_name())
    return _DTYPES.get(kind, kind)


def _text(value: Any) -> str:
    return str(value.value if hasattr(value, "value") else value)
