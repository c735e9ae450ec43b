"""What a runtime on a machine really runs fast, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from graphopt.fusion_rules import Code, FusionRules


@dataclass(frozen=True)
class IntegerScheme:
    """How values are laid out for kernels that compute on codes of few bits.

    Attributes:
        activation: Dtype of quantized activations.
        activation_symmetric: Whether the zero point of activations is zero.
        weight: Dtype of quantized weights; in kernels that compute on them, weights are always symmetric.
        per_channel: Whether each output channel of a weight has a scale of its own.
        bias: ``int32`` where the kernel adds the bias before it rescales, ``float`` where it does not.
        reduce_range: Whether weights keep to 7 bits, because the kernel's 16-bit sums saturate.
        quantize_outputs: Whether what a kernel writes is quantized at once; where not, only what it reads is.
        residual: Whether an Add of two branches is given its identity branch quantized, and the other in float.
        least_channels: A weight with fewer inputs or outputs than this stays float, as its kernel would be slower.
        least_depthwise: A depthwise convolution with fewer channels is slower in codes than in float, and stays float
            where a chain of codes begins or ends with it; above 1, one between floats stays float whatever its size.
        least_group: A convolution in groups of fewer channels each, and not depthwise, likewise.
        channel_multiple: Kernels of convolutions read so many input channels at a time: zeros make up what is missing.
        blocks: Sizes of blocks of inputs that may have a scale of their own; none where a kernel takes no blocks.
        remark: What whoever runs such a model has to know, or nothing.
    """

    activation: Code
    activation_symmetric: bool
    weight: Code
    per_channel: bool
    bias: Literal["int32", "float"]
    reduce_range: bool = False
    quantize_outputs: bool = True
    residual: bool = False
    least_channels: int = 1
    least_depthwise: int = 1
    least_group: int = 1
    channel_multiple: int = 1
    blocks: tuple[int, ...] = ()
    remark: str = ""

    def describe(self) -> str:
        """Return it in a few words, activations first: ``uint8 × int8 per channel``."""
        parts = [f"{self.activation} × {self.weight}", "per channel" if self.per_channel else "per tensor"]
        parts += ["symmetric"] * self.activation_symmetric + ["7-bit weights"] * self.reduce_range
        parts += ["float bias"] * (self.bias == "float")
        return " ".join(parts[:2]) + "".join(f", {part}" for part in parts[2:])


@dataclass(frozen=True)
class WeightOnlyScheme:
    """How weights stored in few bits are read by a runtime that computes in float.

    Attributes:
        form: ``MatMulNBits`` (ONNX Runtime's own operator), or ``DequantizeLinear`` in blocks, of the standard.
        bits: Widths the form takes.
        blocks: Block sizes it takes.
        accuracy_level: What MatMulNBits may compute in: 0 as the input, 1 float32, 2 float16, 3 bfloat16, 4 int8.
        embedding: ``GatherBlockQuantized``, or None where a table's rows are gathered as codes and scaled.
        whole_bytes: Widths read rightly through DequantizeLinear only where each row of a matrix stored
            [inputs, outputs] fills whole bytes.
    """

    form: Literal["MatMulNBits", "DequantizeLinear"]
    bits: tuple[int, ...] = (4, 8)
    blocks: tuple[int, ...] = (16, 32, 64, 128, 256)
    accuracy_level: int = 0
    embedding: Literal["GatherBlockQuantized"] | None = None
    whole_bytes: tuple[int, ...] = ()

    def describe(self) -> str:
        """Return it in a few words: ``4, 8 bits in MatMulNBits, blocks 16-256``."""
        bits = ", ".join(map(str, self.bits))
        return f"{bits} bits in {self.form}, blocks {min(self.blocks)}-{max(self.blocks)}"


@dataclass(frozen=True)
class Target:
    """A runtime, its provider, and the rules that decide what pays there.

    Attributes:
        name: What ``--target`` calls it.
        help: One line for people.
        backend: Name of the backend that runs it.
        provider: The backend's execution provider, or None where it has no such option.
        static: Scheme of static QDQ quantization, or None where it never pays.
        alternatives: Other schemes that run there, if asked for.
        weight_only: How weights of few bits are read, or None where only whole channels of int8 are.
        floats: Float dtypes besides float32 that run faster there than float32.
        integer_ops: Operators with an integer kernel once every input and output is quantized.
        shared_scale_ops: Operators that only move or select values: input and output share one scale.
        dynamic_ops: Operators that pay when activations are quantized on the fly.
        dynamic_least: A product with fewer inputs or outputs than this is no faster so.
        weight_only_ops: Operators that may read a weight stored as integers.
        fast_ops: Operators with a kernel that beats what they stand for, as ``domain::op`` outside the ONNX domain.
        slow_ops: Operators that lose to what they stand for: not made, and kept from being made by the runtime itself.
        width_multiple: Channels, or columns of a matrix, that its kernels take at a time: a layer of a width in between
            computes as much as one of the next multiple, or goes to a slower kernel. Passes that choose widths choose
            multiples of it; 1 where nothing is known.
        fusions: What the runtime makes of quantized operators by itself.
        reads_sparse: Whether what reads its files takes sparse initializers, as far as is known.
        opset: Newest opset of the ONNX domain that each release of the runtime in use knows in full.
    """

    name: str
    help: str
    backend: str
    provider: str | None = None
    static: IntegerScheme | None = None
    alternatives: tuple[IntegerScheme, ...] = ()
    weight_only: WeightOnlyScheme | None = None
    floats: frozenset[str] = field(default_factory=frozenset)
    integer_ops: frozenset[str] = field(default_factory=frozenset)
    shared_scale_ops: frozenset[str] = field(default_factory=frozenset)
    dynamic_ops: frozenset[str] = field(default_factory=frozenset)
    dynamic_least: int = 1
    weight_only_ops: frozenset[str] = field(default_factory=frozenset)
    fast_ops: frozenset[str] = field(default_factory=frozenset)
    slow_ops: frozenset[str] = field(default_factory=frozenset)
    width_multiple: int = 1
    fusions: FusionRules = field(default_factory=FusionRules)
    reads_sparse: bool = False
    opset: int = 21

    def describe(self) -> str:
        """Return in one line what pays there: integers, few bits, other floats, which widths."""
        parts = []
        if self.static is not None:
            parts.append(f"static {self.static.describe()}")
        if len(self.alternatives) == 1:
            parts.append(f"or {self.alternatives[0].describe()}")
        elif self.alternatives:
            activations = dict.fromkeys(scheme.activation for scheme in self.alternatives)
            weights = dict.fromkeys(scheme.weight for scheme in self.alternatives)
            parts.append(f"if asked {'/'.join(activations)} × {'/'.join(weights)}")
        parts += ["dynamic int8"] if self.dynamic_ops else []
        parts += [f"weights in {self.weight_only.describe()}"] if self.weight_only is not None else []
        parts += [f"also {', '.join(sorted(self.floats))}"] if self.floats else []
        parts += [f"widths in multiples of {self.width_multiple}"] if self.width_multiple > 1 else []
        return "; ".join(parts)
