"""The targets graphopt knows: what each runtime runs fast, as tested on it."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path

from graphopt.fusion_rules import Code, FusionRules
from graphopt.target import IntegerScheme, Target, WeightOnlyScheme

from . import fusion_tables

# ONNX Runtime CPU fuses these into integer kernels once every input and output is quantized. Relu and Clip cost
# nothing there: the range of the Q behind them says the same.
_ORT_CPU_INTEGER_OPS = frozenset(
    {"Conv", "Gemm", "MatMul", "Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid"}
)
# Value-preserving operators that run on integers when both sides share one scale.
_ORT_CPU_SHARED_SCALE_OPS = frozenset(
    {
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "MaxPool",
        "ReduceMax",
        "ReduceMin",
        "Reshape",
        "Resize",
        "Slice",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)
_MATRIX_OPS = frozenset({"MatMul", "Gemm"})
# Quantized as it comes, a product of 512 rows with 16 inputs or outputs takes 0.99× to 1.28× the time of float; with
# 32, 0.71× to 1.03×; with 64 and more, 0.29× to 0.72×. One of a single row takes 1.1× up to 128, and 0.5× from 768 on.
_ORT_CPU_DYNAMIC_LEAST = 32
_WEIGHT_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# Gemm, against MatMul and Add, from 1×16 to 512×512: 0.68× (small) to 1.05× the time as it stands, 0.95× to 1.03× once
# ONNX Runtime has made a Gemm of both by itself.
_ORT_CPU_FAST_OPS = frozenset({"Gemm"})
# GlobalAveragePool, against ReduceMean, behind a Conv: 0.88× to 1.02×, for it keeps the blocked layout of the Conv.
# Elsewhere it takes up to 1.38×. ReduceSumSquare, ReduceL1 and ReduceL2 are not here: they take up to 3.3× the time
# of a Mul or Abs and a ReduceSum.
_ORT_X86_FAST_OPS = _ORT_CPU_FAST_OPS | {"GlobalAveragePool"}
# ONNX Runtime 1.31, one thread, 128 tokens of width 768, against the parts with its own optimizations on them:
# RotaryEmbedding 0.23×, FastGelu 0.71×, MultiHeadAttention 0.96× (384 tokens) to 1.00×, QuickGelu 0.98×, Gelu and
# BiasGelu 1.00×, since it makes these of the parts itself where it recognises them. GroupQueryAttention against
# MultiHeadAttention of repeated heads 0.99×. MatMulIntegerToFloat, given the bias, makes 0.92× of MiniLM in static
# integers. The standard Attention, from opset 23, 0.93× to 0.95× of either.
_ORT_X86_RUNTIME_OPS = frozenset(
    f"com.microsoft::{name}"
    for name in (
        "BiasGelu",
        "FastGelu",
        "Gelu",
        "GroupQueryAttention",
        "MatMulIntegerToFloat",
        "MultiHeadAttention",
        "QuickGelu",
        "RotaryEmbedding",
    )
)
# Swish takes 2.8× and GroupNormalization 1.9× the time of their parts: it has no kernels for them, and computes them
# from parts that it then no longer fuses.
_ORT_CPU_SLOW_OPS = frozenset({"GroupNormalization", "Swish"})
# SkipLayerNormalization, which it makes of Add and LayerNormalization, takes 5× the time of these on x86.
_ORT_X86_SLOW_OPS = _ORT_CPU_SLOW_OPS | {"com.microsoft::SkipLayerNormalization"}


# ONNX Runtime 1.31 makes a MatMulNBits of a product and a DequantizeLinear before it. With 2 bits it then takes each
# row of codes to begin with a new byte, which the standard does not: where rows end within one, the results are noise.
_ORT_WHOLE_BYTES = (2,)
# Read four bits at a time by kernels that compute in int8; `accuracy_level` 4 says they may. Blocks below 16 have none.
_ORT_CPU_WEIGHT_ONLY = WeightOnlyScheme(
    form="MatMulNBits",
    bits=(2, 4, 8),
    accuracy_level=4,
    embedding="GatherBlockQuantized",
    whole_bytes=_ORT_WHOLE_BYTES,
)

# Its kernels of float32 take the columns of a matrix in panels of 16, on every CPU, and the channels of convolutions in
# blocks of 16 with AVX-512 or NEON, of 8 with AVX2 alone, which 16 fills as well. What fills no block costs more than a
# block: MobileNet with 70 % of its multiplications, in multiples of 8 and fewer, took 1.07 times as long as whole, in
# multiples of 16 0.81 times (AVX-512, batch 8).
_ORT_CPU_WIDTH_MULTIPLE = 16


def _ort_cpu(
    name: str,
    help: str,
    scheme: IntegerScheme,
    alternative: IntegerScheme,
    fusions: FusionRules,
    fast_ops: frozenset[str],
    slow_ops: frozenset[str],
) -> Target:
    return Target(
        name=name,
        help=help,
        backend="onnxruntime",
        reads_sparse=True,
        provider="cpu",
        static=scheme,
        alternatives=(alternative,),
        weight_only=_ORT_CPU_WEIGHT_ONLY,
        fusions=fusions,
        integer_ops=_ORT_CPU_INTEGER_OPS,
        shared_scale_ops=_ORT_CPU_SHARED_SCALE_OPS,
        dynamic_ops=_MATRIX_OPS,
        dynamic_least=_ORT_CPU_DYNAMIC_LEAST,
        weight_only_ops=_WEIGHT_OPS,
        fast_ops=fast_ops,
        slow_ops=slow_ops,
        width_multiple=_ORT_CPU_WIDTH_MULTIPLE,
    )


# ONNX Runtime's x86 kernels of convolutions read channels four at a time, and copy each window out where they cannot:
# the first Conv of SqueezeNet takes 1.10 ms at 4 channels and 2.63 at 3, of MobileNet 0.30 and 0.81 (batch 8).
_X86_CHANNELS = 4
# Depthwise kernels on codes of 16 channels take 1.3 to 3.7 times as long as those on floats. With the layers that lead
# to them left float, MobileNet (batch 8) takes 0.95× the time and YuNet (batch 1) 0.85×; with the depthwise layers
# alone, amid codes, 1.02× and 1.06×.
_X86_LEAST_DEPTHWISE = 32
# Kernels on codes of other groups, 3×3 on 16×16 and 32×32 positions, take 5.6 to 7.2 times as long as those on floats
# with 2 channels in a group, 2.8 to 3.8 with 4, 1.4 to 1.8 with 8, 1.2 to 1.4 with 16, and 0.6 to 0.7 with 32.
# Amid codes it makes no difference to leave them float: ONNX Runtime quantizes their weights by itself.
_X86_LEAST_GROUP = 32


def _u8s8(
    *, reduce_range: bool, channel_multiple: int = 1, least_depthwise: int = 1, least_group: int = 1
) -> IntegerScheme:
    return IntegerScheme(
        activation="uint8",
        activation_symmetric=False,
        weight="int8",
        per_channel=True,
        bias="int32",
        reduce_range=reduce_range,
        channel_multiple=channel_multiple,
        least_depthwise=least_depthwise,
        least_group=least_group,
    )


def _x86(*, reduce_range: bool) -> IntegerScheme:
    return _u8s8(
        reduce_range=reduce_range,
        channel_multiple=_X86_CHANNELS,
        least_depthwise=_X86_LEAST_DEPTHWISE,
        least_group=_X86_LEAST_GROUP,
    )


_S8S8 = IntegerScheme(activation="int8", activation_symmetric=False, weight="int8", per_channel=True, bias="int32")

# GEMMs and convolutions with fewer channels than this run faster in fp16 than in the int8 kernels.
_TENSORRT_LEAST_CHANNELS = 16
_TENSORRT_INT8 = IntegerScheme(
    activation="int8",
    activation_symmetric=True,
    weight="int8",
    per_channel=True,
    bias="float",
    quantize_outputs=False,
    residual=True,
    least_channels=_TENSORRT_LEAST_CHANNELS,
)
# Tensor cores read 16 bytes of a row at a time: 8 channels of float16, 16 of int8.
_FLOAT16_WIDTH_MULTIPLE = 8
_INT8_WIDTH_MULTIPLE = 16
# oneDNN's layout nChw16c on AVX-512, two blocks of its nChw8c on AVX2.
_OPENVINO_WIDTH_MULTIPLE = 16
# Vectors of floats are 4, 8 or 16 lanes wide: 8 fills the first two, and leaves more widths to choose from than 16.
_PORTABLE_WIDTH_MULTIPLE = 8
_TENSORRT_FP8 = replace(_TENSORRT_INT8, activation="float8e4m3fn", weight="float8e4m3fn", per_channel=False)

_BLOCKS = (16, 32, 64, 128, 256)
_INTEGER_ACTIVATIONS: tuple[Code, ...] = ("uint8", "int8", "uint16", "int16")
_INTEGER_WEIGHTS: tuple[Code, ...] = ("int8", "uint8", "int4", "uint4")
_FLOAT_CODES: tuple[Code, ...] = ("float8e4m3fn", "float8e5m2")
# It makes MatMulIntegerToFloat and QLinearMatMul of these, which take no floats, and then refuses the model.
_FLOATS_ON_ORT = (
    "ONNX Runtime 1.31 loads matrix products on float8 only with the session entry `session.disable_quant_qdq` set to "
    "1, as graphopt does"
)
# What QuantizeLinear and DequantizeLinear can say, whether or not a runtime has kernels for it.
_STANDARD = (
    *(
        IntegerScheme(activation, symmetric, weight, per_channel=True, bias="int32", blocks=_BLOCKS)
        for activation in _INTEGER_ACTIVATIONS
        for symmetric in (False, True)
        for weight in _INTEGER_WEIGHTS
    ),
    *(
        IntegerScheme(code, True, weight, per_channel=True, bias="float", remark=_FLOATS_ON_ORT)
        for code in _FLOAT_CODES
        for weight in _FLOAT_CODES
    ),
)

_INTEL_AND_AMD = _ORT_X86_FAST_OPS | _ORT_X86_RUNTIME_OPS

TARGETS = {
    target.name: target
    for target in (
        _ort_cpu(
            "ort-cpu-x86",
            "ONNX Runtime on x86 CPUs with VNNI: U8S8",
            _x86(reduce_range=False),
            _S8S8,
            fusion_tables.ORT_X86,
            _INTEL_AND_AMD,
            _ORT_X86_SLOW_OPS,
        ),
        # Without VNNI the 16-bit sums of VPMADDUBSW saturate at full 8-bit weights.
        _ort_cpu(
            "ort-cpu-x86-avx2",
            "ONNX Runtime on x86 CPUs without VNNI: U8S7",
            _x86(reduce_range=True),
            _S8S8,
            fusion_tables.ORT_X86,
            _INTEL_AND_AMD,
            _ORT_X86_SLOW_OPS,
        ),
        _ort_cpu(
            "ort-cpu-arm",
            "ONNX Runtime on ARM CPUs: S8S8",
            _S8S8,
            _u8s8(reduce_range=False),
            fusion_tables.ORT_ARM,
            _ORT_CPU_FAST_OPS,
            _ORT_CPU_SLOW_OPS,
        ),
        Target(
            name="ort-cuda",
            help="ONNX Runtime's CUDA provider: weights as integers; integer arithmetic does not pay there",
            backend="onnxruntime",
            provider="cuda",
            reads_sparse=True,
            weight_only=WeightOnlyScheme(form="MatMulNBits", embedding="GatherBlockQuantized"),
            floats=frozenset({"float16", "bfloat16"}),
            weight_only_ops=_WEIGHT_OPS,
            fusions=fusion_tables.ORT_CUDA,
            width_multiple=_FLOAT16_WIDTH_MULTIPLE,
        ),
        Target(
            name="tensorrt",
            help="ONNX Runtime's TensorRT provider: explicit symmetric int8, float bias",
            backend="onnxruntime",
            provider="tensorrt",
            reads_sparse=True,
            static=_TENSORRT_INT8,
            alternatives=(_TENSORRT_FP8,),
            # Two codes a byte, low first, in blocks along the inputs.
            weight_only=WeightOnlyScheme(form="DequantizeLinear", bits=(4,), blocks=(64, 128)),
            floats=frozenset({"float16", "bfloat16"}),
            integer_ops=_WEIGHT_OPS,
            weight_only_ops=_WEIGHT_OPS,
            fusions=fusion_tables.TENSORRT,
            width_multiple=_INT8_WIDTH_MULTIPLE,
        ),
        Target(
            name="openvino",
            help="OpenVINO on x86 CPUs: U8S8",
            backend="openvino",
            # The files of ort-cpu-x86 run there as they are.
            static=_u8s8(reduce_range=False),
            weight_only=WeightOnlyScheme(form="DequantizeLinear", bits=(4, 8), blocks=(32, 64, 128, 256)),
            integer_ops=_WEIGHT_OPS | {"Add", "AveragePool", "Concat", "GlobalAveragePool", "Mul"},
            shared_scale_ops=_ORT_CPU_SHARED_SCALE_OPS - {"ReduceMax", "ReduceMin"},
            dynamic_ops=_MATRIX_OPS,
            weight_only_ops=_WEIGHT_OPS,
            fusions=fusion_tables.OPENVINO,
            width_multiple=_OPENVINO_WIDTH_MULTIPLE,
        ),
        Target(
            name="portable",
            help="any runtime of the ONNX standard: nothing is assumed to pay",
            backend="onnxruntime",
            provider="cpu",
            static=_u8s8(reduce_range=False),
            alternatives=_STANDARD,
            weight_only=WeightOnlyScheme(form="DequantizeLinear", bits=(2, 4, 8), whole_bytes=_ORT_WHOLE_BYTES),
            integer_ops=_MATRIX_OPS | {"Conv"},
            dynamic_ops=_MATRIX_OPS,
            weight_only_ops=_WEIGHT_OPS,
            fusions=fusion_tables.PORTABLE,
            width_multiple=_PORTABLE_WIDTH_MULTIPLE,
        ),
    )
}

_VNNI_FLAGS = {"avx512_vnni", "avx_vnni"}
# Features of CPUs that kernels of runtimes are chosen by.
_KERNEL_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm")


def host_target() -> str:
    """Return the name of the target of this machine's CPU; without a list of its features, the careful one."""
    if _is_arm():
        return "ort-cpu-arm"
    return "ort-cpu-x86" if _VNNI_FLAGS & _cpu_flags() else "ort-cpu-x86-avx2"


def host_reason() -> str:
    """Return in a few words why that target is this machine's."""
    flags = _cpu_flags()
    known = ", ".join(flag for flag in _KERNEL_FLAGS if flag in flags) or "none that kernels ask for"
    if _is_arm():
        return f"an ARM CPU (features: {known})"
    if not flags:
        return "an x86 CPU whose features cannot be read, so the careful one"
    return f"an x86 CPU {'with' if _VNNI_FLAGS & flags else 'without'} VNNI (features: {known})"


def _is_arm() -> bool:
    return platform.machine().lower() in ("arm64", "aarch64")


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    # ARM calls them so.
    named = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return set(next(named, "").split())
