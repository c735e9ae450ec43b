"""What a runtime on a machine really runs fast, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class IntegerScheme:
    """How integers are laid out for kernels that compute in integers.

    Attributes:
        activation: Dtype of quantized activations.
        activation_symmetric: Whether the zero point of activations is the middle of their range.
        weight: Dtype of quantized weights; weights are always symmetric.
        per_channel: Whether each output channel of a weight has a scale of its own.
        bias: ``int32`` where the kernel adds the bias before it rescales, ``float`` where it does not.
        reduce_range: Whether weights keep to 7 bits, because the kernel's 16-bit sums saturate.
    """

    activation: Literal["uint8", "int8"]
    activation_symmetric: bool
    weight: Literal["int8"]
    per_channel: bool
    bias: Literal["int32", "float"]
    reduce_range: bool = False


@dataclass(frozen=True)
class Target:
    """A runtime, its provider, and the rules that decide what pays there.

    Attributes:
        name: What ``--target`` calls it.
        help: One line for people.
        backend: Name of the backend that runs it.
        provider: The backend's execution provider, or None where it has no such option.
        static: Scheme of static QDQ quantization, or None where it never pays.
        integer_ops: Operators with an integer kernel once every input and output is quantized.
        shared_scale_ops: Operators that only move or select values: input and output share one scale.
        dynamic_ops: Operators that pay when activations are quantized on the fly.
        weight_only_ops: Operators that may read a weight stored as integers.
        fast_ops: Operators with a kernel that beats what they stand for, as ``domain::op`` outside the ONNX domain.
        slow_ops: Operators that lose to what they stand for: not made, and kept from being made by the runtime itself.
        opset: Newest opset of the ONNX domain that each release of the runtime in use knows in full.
    """

    name: str
    help: str
    backend: str
    provider: str | None = None
    static: IntegerScheme | None = None
    integer_ops: frozenset[str] = field(default_factory=frozenset)
    shared_scale_ops: frozenset[str] = field(default_factory=frozenset)
    dynamic_ops: frozenset[str] = field(default_factory=frozenset)
    weight_only_ops: frozenset[str] = field(default_factory=frozenset)
    fast_ops: frozenset[str] = field(default_factory=frozenset)
    slow_ops: frozenset[str] = field(default_factory=frozenset)
    opset: int = 21
