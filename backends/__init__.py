"""Backends and targets that come with graphopt, found through the same entry point as anybody else's."""

from .targets import TARGETS as TARGETS

BACKENDS = {
    "onnxruntime": "graphopt.backends.onnxruntime:OnnxRuntime",
    "openvino": "graphopt.backends.openvino:OpenVino",
    "reference": "graphopt.backends.reference:Reference",
    "torch": "graphopt.backends.torch_fx.backend:Torch",
}

HOST_TARGET = "graphopt.backends.targets:host_target"
HOST_REASON = "graphopt.backends.targets:host_reason"
