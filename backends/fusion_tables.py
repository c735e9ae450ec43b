"""What each runtime makes of quantized operators by itself.

For ONNX Runtime on CPUs this is what versions 1.31 and 1.32 do, where they differ the one that is installed, held
against its own optimized graphs by `tests/test_targets.py` and `benchmarks/explain.py`. For the others it is what
their documentation says.
"""

from __future__ import annotations

from dataclasses import replace

from graphopt.fusion_rules import Fusion, FusionRules, WeightFusion
from graphopt.versions import release_of

_U8 = frozenset({"uint8"})
_EIGHT = frozenset({"uint8", "int8"})
_SIXTEEN = frozenset({"uint16", "int16"})
_UP_TO_SIXTEEN = _EIGHT | _SIXTEEN
# Where no ONNX Runtime is installed, the newest release that is known.
_ORT_RELEASE = release_of("onnxruntime", "onnxruntime-gpu") or (1, 32)

_UNARY = {
    "AveragePool": "QLinearAveragePool",
    "GlobalAveragePool": "QLinearGlobalAveragePool",
    "LeakyRelu": "QLinearLeakyRelu",
    "Sigmoid": "QLinearSigmoid",
    "Softmax": "QLinearSoftmax",
}
# DepthToSpace is one of them since 1.31; SpaceToDepth, Pad and GatherND are not.
_MOVES = (
    "DepthToSpace",
    "Expand",
    "Flatten",
    "Gather",
    "GatherElements",
    "Reshape",
    "Slice",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
)


def _ort_cpu(conv_codes: frozenset[str]) -> tuple[Fusion, ...]:
    return (
        Fusion(
            "Conv",
            "QLinearConv",
            codes=conv_codes,
            weights=_EIGHT,
            bias=2,
            bias_on_grid=True,
            quantizes_floats=True,
            one_scale=True,
        ),
        Fusion(
            "MatMul",
            "QLinearMatMul",
            codes=conv_codes,
            weights=_EIGHT,
            writes="either",
            kernel_to_float="MatMulIntegerToFloat",
            one_scale=True,
            weight_scales="placed" if _ORT_RELEASE >= (1, 32) else "any",
        ),
        Fusion(
            "Gemm",
            "QGemm",
            weights=_EIGHT,
            writes="either",
            bias=2,
            quantizes_floats=True,
            zero_points=(0, 1),
            factors=("alpha", "beta"),
            one_scale=True,
            weight_scales="counted",
        ),
        Fusion("Add", "QLinearAdd"),
        Fusion("Mul", "QLinearMul"),
        Fusion("Concat", "QLinearConcat"),
        Fusion("Where", "QLinearWhere", reads=(1, 2)),
        *(Fusion(op, kernel, reads=(0,)) for op, kernel in _UNARY.items()),
        *(Fusion(op, op, reads=(0,), codes=_UP_TO_SIXTEEN, same_grid=True) for op in _MOVES),
        Fusion("MaxPool", "MaxPool", reads=(0,), same_grid=True, since=12),
        Fusion("ReduceMax", "ReduceMax", reads=(0,), same_grid=True, since=12),
        Fusion("ReduceMin", "ReduceMin", reads=(0,), same_grid=True, since=12),
        Fusion("Resize", "Resize", reads=(0,), same_grid=True),
        Fusion("Split", "Split", reads=(0,), codes=_UP_TO_SIXTEEN, same_grid=True),
        Fusion("ArgMax", "ArgMax", reads=(0,), writes="float", one_scale=True, zero_points=(0,)),
    )


_ORT_WRITTEN = frozenset(
    {
        "ConvInteger",
        "MatMulInteger",
        "QLinearConv",
        "QLinearMatMul",
        *(
            f"com.microsoft::{name}"
            for name in (
                "DynamicQuantizeLSTM",
                "DynamicQuantizeMatMul",
                "GatherBlockQuantized",
                "MatMulInteger16",
                "MatMulIntegerToFloat",
                "MatMulNBits",
                "NhwcMaxPool",
                "QAttention",
                "QEmbedLayerNormalization",
                "QGemm",
                "QLinearAdd",
                "QLinearAveragePool",
                "QLinearConcat",
                "QLinearConv",
                "QLinearGlobalAveragePool",
                "QLinearLeakyRelu",
                "QLinearMul",
                "QLinearReduceMean",
                "QLinearSigmoid",
                "QLinearSoftmax",
                "QLinearWhere",
                "QMoE",
            )
        ),
    }
)
_ORT_PROPAGATES = (
    ("MaxPool", 12),
    ("Reshape", 5),
    ("Slice", 1),
    ("Squeeze", 1),
    ("Transpose", 1),
    ("Unsqueeze", 1),
)
_ORT_WEIGHTS = WeightFusion(
    frozenset({"MatMul", "Gemm"}),
    "MatMulNBits",
    frozenset({"uint2", "int2", "uint4", "int4", "uint8", "int8"}),
    least_block=16,
    whole_bytes=frozenset({"uint2", "int2"}),
)
# Before 1.32 a product between Q and DQ in 16 bits stayed in float, and its weight was dequantized in every run.
_ORT_CPU_WEIGHTS = replace(_ORT_WEIGHTS, floats=_SIXTEEN if _ORT_RELEASE >= (1, 32) else frozenset())

ORT_X86 = FusionRules(
    fusions=_ort_cpu(_U8),
    weights=_ORT_CPU_WEIGHTS,
    written=_ORT_WRITTEN,
    propagates=_ORT_PROPAGATES,
    dynamic=True,
    rewrites_int8=True,
    joins_bias=True,
    drops_activations=True,
)
ORT_ARM = replace(ORT_X86, fusions=_ort_cpu(_EIGHT), rewrites_int8=False)

# The int8 fusions list the CPU only; what there is no CUDA kernel for goes to the CPU, with copies.
ORT_CUDA = FusionRules(
    weights=_ORT_WEIGHTS,
    written=frozenset(f"com.microsoft::{name}" for name in ("GatherBlockQuantized", "MatMulNBits", "QMoE")),
    joins_bias=True,
)

_TENSORRT_CODES = frozenset({"int8", "float8e4m3fn"})
TENSORRT = FusionRules(
    fusions=(
        *(
            Fusion(op, f"int8 {op}", reads=(0, 1), codes=_TENSORRT_CODES, writes="either", float_bias=2, symmetric=True)
            for op in ("Conv", "ConvTranspose", "Gemm", "MatMul")
        ),
        # With one branch in codes it becomes the end of the convolution that makes the other.
        Fusion("Add", "Add of a residual", one_read=True, codes=_TENSORRT_CODES, writes="either", symmetric=True),
        *(
            Fusion(op, f"int8 {op}", codes=_TENSORRT_CODES, symmetric=True)
            for op in ("AveragePool", "Concat", "GlobalAveragePool", "Mul")
        ),
        *(
            Fusion(op, op, reads=(0,), codes=_TENSORRT_CODES, same_grid=True, symmetric=True)
            for op in (*_MOVES, "MaxPool")
        ),
    ),
    propagates=tuple((op, 1) for op in ("MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")),
)

OPENVINO = FusionRules(
    fusions=(
        *(
            Fusion(op, f"int8 {op}", reads=(0, 1), codes=_U8, weights=_EIGHT, writes="either")
            for op in ("Conv", "ConvTranspose", "Gemm", "MatMul")
        ),
        *(
            Fusion(op, f"int8 {op}", codes=_U8, writes="either")
            for op in ("Add", "AveragePool", "Concat", "GlobalAveragePool", "Mul")
        ),
        *(Fusion(op, op, reads=(0,), codes=_EIGHT, writes="either") for op in (*_MOVES, "MaxPool", "Resize")),
    ),
    weights=replace(_ORT_WEIGHTS, kernel="compressed MatMul"),
    propagates=tuple((op, 1) for op in ("MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")),
    drops_activations=True,
)

# The standard promises no kernel; these are its operators on integers.
PORTABLE = FusionRules(written=frozenset({"ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"}))
