"""Normalizations and Gelus written in small operators, which runtimes and other passes look for."""

from __future__ import annotations

import onnx_ir as ir

from graphopt import walk

# How far up a normalization is looked for: its gain, its shift, a cast and a reshape may lie between.
_STEPS_UP = 4
_PASSED_THROUGH = ("Cast", "Reshape", "Mul", "Add", "Sub")


def comes_from_a_normalization(value: ir.Value) -> bool:
    """Return whether a value may be what a normalization divided: its gain and shift are looked for right behind."""
    for _ in range(_STEPS_UP):
        producer = value.producer()
        if producer is None:
            return False
        varying = [one for one in producer.inputs if one is not None and walk.constant_tensor(one) is None]
        if walk.is_onnx_op(producer, "InstanceNormalization"):
            return True
        if walk.is_onnx_op(producer, "Div", "Mul") and len(varying) == 2:
            return True
        if not walk.is_onnx_op(producer, *_PASSED_THROUGH) or not varying:
            return False
        value = varying[0]
    return False


def ends_a_gelu(value: ir.Value) -> bool:
    """Return whether a value may be x·(1 + erf(...)) or x·(1 + tanh(...)), which halved is a Gelu."""
    producer = value.producer()
    if producer is None or not walk.is_onnx_op(producer, "Mul"):
        return False
    gates = [one.producer() for one in producer.inputs if one is not None]
    return any(gate is not None and walk.is_onnx_op(gate, "Add") and _adds_to_a_sigmoid(gate) for gate in gates)


def _adds_to_a_sigmoid(add: ir.Node) -> bool:
    terms = [one.producer() for one in add.inputs if one is not None]
    return any(term is not None and walk.is_onnx_op(term, "Erf", "Tanh") for term in terms)
