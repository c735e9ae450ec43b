"""ONNX Runtime's own operators in torch: the same as in ONNX Runtime, and gradients where there are some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from graphopt import ir
from graphopt.errors import BackendError
from graphopt.model_io import load, save

torch = pytest.importorskip("torch")

from graphopt.backends.torch_fx import catalog  # noqa: E402
from graphopt.backends.torch_fx.backend import Torch  # noqa: E402
from graphopt.backends.torch_fx.lowering import lower  # noqa: E402
from graphopt.backends.torch_fx.ops_contrib_blocks import unpacked  # noqa: E402

from .pass_runs import run_passes  # noqa: E402

DOMAIN = "com.microsoft"
MODELS = Path(__file__).resolve().parent.parent / "models"
# Sums of products of a few dozen numbers around 1 in float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
# Of outputs up to 1, with inputs and states rounded to 8 bits.
ROUNDED = 0.02
RNG_SEED = 7
# Token types of MiniLM: any model's vocabulary is larger.
FEWEST_TOKENS = 2


@dataclass(frozen=True, eq=False)
class Case:
    """One node: its inputs (None where one is left out), its attributes, its outputs, and which are not compared."""

    op_type: str
    inputs: Sequence[np.ndarray | None]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    outputs: Sequence[int] = (0,)
    hidden: Sequence[int] = ()
    domain: str = DOMAIN
    name: str = ""

    def __str__(self) -> str:
        return self.op_type + (f"-{self.name}" if self.name else "")

    def model(self) -> onnx.ModelProto:
        """Return the node as a model of its inputs."""
        names = [f"x{at}" if one is not None else "" for at, one in enumerate(self.inputs)]
        outs = [f"y{at}" if at in self.outputs else "" for at in range(max(self.outputs) + 1)]
        node = onnx.helper.make_node(self.op_type, names, outs, domain=self.domain, name="node", **self.attributes)
        graph = onnx.helper.make_graph(
            [node],
            "one",
            [
                onnx.helper.make_tensor_value_info(f"x{at}", onnx.helper.np_dtype_to_tensor_dtype(one.dtype), one.shape)
                for at, one in enumerate(self.inputs)
                if one is not None
            ],
            [onnx.helper.make_tensor_value_info(f"y{at}", self.output_type(at), None) for at in self.compared],
        )
        opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid(DOMAIN, 1)]
        return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)

    @property
    def compared(self) -> list[int]:
        """The outputs that are compared."""
        return [at for at in self.outputs if at not in self.hidden]

    def output_type(self, at: int) -> int:
        """Return the element type of an output."""
        counts = self.op_type == "EmbedLayerNormalization" and at == 1
        return onnx.TensorProto.INT32 if counts else onnx.TensorProto.FLOAT

    def feeds(self) -> dict[str, np.ndarray]:
        """Return the inputs by name."""
        return {f"x{at}": one for at, one in enumerate(self.inputs) if one is not None}


def cases() -> list[Case]:
    """Return a case or several for each operator."""
    rng = np.random.default_rng(RNG_SEED)

    def floats(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    def integers(high: int, *shape: int, dtype: Any = np.int64) -> np.ndarray:
        return rng.integers(0, high, shape).astype(dtype)

    rows, width = floats(2, 5, 24), 24
    found = [
        Case("Gelu", [rows]),
        Case("FastGelu", [rows]),
        Case("FastGelu", [rows, floats(width)], name="bias"),
        Case("BiasGelu", [rows, floats(width)]),
        Case("QuickGelu", [rows], {"alpha": 1.5}),
        Case("FusedMatMul", [floats(2, 3, 4), floats(2, 5, 4)], {"transB": 1, "alpha": 0.5}),
        Case("FusedMatMul", [floats(3, 2, 4), floats(2, 4, 5)], {"transBatchA": 1}, name="batch"),
        Case("FusedMatMul", [floats(4, 2, 3), floats(2, 4, 5)], {"transBatchA": 1, "transA": 1}, name="both"),
        Case("TransposeMatMul", [floats(4, 3), floats(4, 5)], {"transA": 1}),
        Case("FusedGemm", [floats(3, 4), floats(4, 5), floats(5)], {"activation": "Relu"}),
        Case(
            "FusedGemm",
            [floats(3, 4), floats(4, 5)],
            {"activation": "LeakyRelu", "activation_alpha": 0.3},
            name="slope",
        ),
        Case("FusedConv", [floats(1, 3, 6, 6), floats(4, 3, 3, 3), floats(4)], {"activation": "Relu", "pads": [1] * 4}),
        Case(
            "FusedConv",
            [floats(1, 3, 6, 6), floats(4, 3, 3, 3), floats(4), floats(1, 4, 4, 4)],
            {"activation": "Clip", "activation_params": [-0.5, 1.0]},
            name="sum",
        ),
        Case("SkipLayerNormalization", [rows, floats(2, 5, 24), floats(24), floats(24), floats(24)], outputs=(0, 3)),
        Case("SkipSimplifiedLayerNormalization", [rows, floats(2, 5, 24), floats(24), floats(24)], outputs=(0, 3)),
        Case("SimplifiedLayerNormalization", [rows, floats(24)], {"axis": -1}, domain=""),
        Case(
            "EmbedLayerNormalization",
            [
                *(integers(9, 2, 5, dtype=np.int32), integers(2, 2, 5, dtype=np.int32)),
                *(floats(9, 8), floats(6, 8), floats(2, 8), floats(8), floats(8)),
                np.array([[1, 1, 1, 0, 0], [1] * 5], np.int32),
            ],
            outputs=(0, 1),
        ),
        Case("Inverse", [floats(2, 3, 3)]),
        Case("CDist", [floats(4, 3), floats(5, 3)], {"metric": "euclidean"}),
    ]
    return [*found, *attention_cases(floats, integers), *block_cases(floats, integers)]


def attention_cases(floats: Any, integers: Any) -> list[Case]:
    """Return cases of attention with masks, caches and positions."""
    heads, size, batch, length = 2, 16, 2, 5
    width = heads * size
    q, k, v = floats(batch, length, width), floats(batch, length, width), floats(batch, length, width)
    few = [q, floats(batch, length, size), floats(batch, length, size)]  # two heads that share one
    past = [floats(batch, 1, 3, size), floats(batch, 1, 3, size)]
    total = np.array(length, np.int32)
    angles = [floats(12, size // 2), floats(12, size // 2)]
    full, some = np.full(batch, length - 1, np.int32), np.array([4, 2], np.int32)
    padding = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)
    grouped = {"num_heads": heads, "kv_num_heads": 1}
    whole = [floats(batch, length, 6), floats(6, 3 * width), floats(3 * width)]
    return [
        Case("MultiHeadAttention", [q, k, v, floats(3 * width)], {"num_heads": heads}),
        Case("MultiHeadAttention", [q, k, v, None, padding], {"num_heads": heads}, name="padding"),
        Case("MultiHeadAttention", [q, k, v, None, np.array([3, 5], np.int32)], {"num_heads": heads}, name="lengths"),
        Case(
            "MultiHeadAttention",
            [q, k, v, None, None, floats(1, heads, length, length)],
            {"num_heads": heads, "unidirectional": 1, "scale": 0.3},
            name="causal",
        ),
        Case(
            "MultiHeadAttention",
            [q, floats(batch, heads, 4, size), floats(batch, heads, 4, size)],
            {"num_heads": heads},
            name="split",
        ),
        Case(
            "MultiHeadAttention",
            [q, k, v, None, None, None, floats(batch, heads, 3, size), floats(batch, heads, 3, size)],
            {"num_heads": heads},
            outputs=(0, 1, 2),
            name="past",
        ),
        Case("Attention", whole, {"num_heads": heads}),
        Case("Attention", [*whole, padding], {"num_heads": heads, "unidirectional": 1}, name="masked"),
        Case("Attention", [*whole, np.array([3, 5, 1, 0], np.int32)], {"num_heads": heads}, name="bounds"),
        Case(
            "Attention",
            [*whole, None, floats(2, batch, heads, 3, size)],
            {"num_heads": heads, "unidirectional": 1},
            outputs=(0, 1),
            name="past",
        ),
        Case(
            "QAttention",
            [
                *(integers(255, batch, length, 6, dtype=np.uint8), integers(127, 6, 3 * width, dtype=np.int8)),
                *(floats(3 * width), np.array(0.02, np.float32), np.array(0.01, np.float32), None),
                *(np.array(120, np.uint8), np.array(3, np.int8)),
            ],
            {"num_heads": heads},
        ),
        Case("GroupQueryAttention", [*few, None, None, full, total], grouped),
        Case(
            "GroupQueryAttention", [*few, None, None, full, total], {**grouped, "local_window_size": 2}, name="window"
        ),
        Case("GroupQueryAttention", [*few, None, None, full, total], {**grouped, "softcap": 2.0}, name="softcap"),
        Case("GroupQueryAttention", [*few, None, None, full, total], {**grouped, "smooth_softmax": 1}, name="smooth"),
        Case(
            "GroupQueryAttention",
            [*few, None, None, full, total, None, None, None, None, floats(heads)],
            grouped,
            name="sinks",
        ),
        Case(
            "GroupQueryAttention",
            [*few, None, None, full, total, *angles],
            {**grouped, "do_rotary": 1},
            outputs=(0, 1, 2),
            name="rotary",
        ),
        Case(
            "GroupQueryAttention",
            [floats(batch, length, width + 2 * size), None, None, None, None, full, total, *angles],
            {**grouped, "do_rotary": 1, "rotary_interleaved": 1},
            name="packed",
        ),
        Case(
            "GroupQueryAttention",
            [
                floats(batch, 1, width),
                *(floats(batch, 1, size) for _ in range(2)),
                *past,
                some - 1,
                np.array(4, np.int32),
            ],
            grouped,
            (0, 1, 2),
            hidden=(1, 2),  # caches hold anything behind the keys of a sample
            name="decode",
        ),
        Case(
            "GroupQueryAttention",
            [floats(1, 2, width), *(floats(1, 2, size) for _ in range(2)), *(one[:1] for one in past), full[:1], total],
            {**grouped, "do_rotary": 0},
            outputs=(0, 1, 2),
            name="continued",
        ),
        Case("RotaryEmbedding", [q, integers(9, batch, length), *angles]),
        Case("RotaryEmbedding", [q, np.array([2]), *angles], {"interleaved": 1}, name="counted"),
        Case(
            "RotaryEmbedding", [floats(batch, heads, length, size), integers(9, batch, length), *angles], name="heads"
        ),
    ]


def block_cases(floats: Any, integers: Any) -> list[Case]:
    """Return cases of weights in blocks of codes."""
    n, k, block = 6, 40, 16  # the last block is not full
    blocks = -(-k // block)
    found = [
        Case(
            "MatMulNBits",
            [floats(2, 3, k), integers(256, n, blocks, block * bits // 8, dtype=np.uint8), floats(n, blocks)],
            {"K": k, "N": n, "bits": bits, "block_size": block},
            name=f"{bits}-bits",
        )
        for bits in (2, 4, 8)
    ]
    packed, scales = integers(256, n, blocks, block // 2, dtype=np.uint8), floats(n, blocks)
    attributes = {"K": k, "N": n, "bits": 4, "block_size": block}
    zeros = integers(256, n, -(-blocks // 2), dtype=np.uint8)
    found += [
        Case("MatMulNBits", [floats(3, k), packed, scales, zeros], attributes, name="zero-points"),
        Case("MatMulNBits", [floats(3, k), packed, scales, floats(n, blocks)], attributes, name="float-zero-points"),
        Case("MatMulNBits", [floats(3, k), packed, scales, None, None, floats(n)], attributes, name="bias"),
    ]
    for kind, name in ((0, "fp4"), (1, "nf4")):
        found.append(
            Case(
                "MatMulBnb4",
                [floats(3, 32), integers(256, n * 32 // 2, dtype=np.uint8), floats(n * 32 // block)],
                {"K": 32, "N": n, "block_size": block, "quant_type": kind},
                name=name,
            )
        )
    table = integers(256, 7, 16, dtype=np.uint8)
    rows = integers(7, 2, 3)
    found += [
        Case("GatherBlockQuantized", [table, rows, floats(7, 2)], {"bits": 4, "block_size": 16}, name="packed"),
        Case(
            "GatherBlockQuantized",
            [table, rows - 7, floats(7, 2), integers(256, 7, 1, dtype=np.uint8)],
            {"bits": 4, "block_size": 16},
            name="zero-points",
        ),
        Case("GatherBlockQuantized", [table, rows, floats(7, 1)], {"bits": 8, "block_size": 16}, name="bytes"),
    ]
    return found


CASES = cases()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_computes_what_onnx_runtime_does(case: Case) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(case.model().SerializeToString(), options, providers=["CPUExecutionProvider"])
    expected = session.run(None, case.feeds())
    with Torch().open(ir.from_proto(case.model())) as opened:
        got = opened.run(case.feeds())
    for mine, theirs in zip(got.values(), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, **CLOSE)


@pytest.mark.parametrize("name", ["digits_cnn", "squeezenet1.1_imagenet", "all-MiniLM-L6-v2", "gutenberg_llama_7m"])
def test_what_onnx_runtime_makes_of_a_model_is_the_same_in_torch(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = tmp_path / "plain.onnx"
    if name == "digits_cnn":
        save(run_passes(load(MODELS / "digits_cnn.onnx"), "simplify").model, source)
    else:
        source = request.getfixturevalue("shared") / "assets" / "models" / f"{name}.onnx"
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    options.log_severity_level = 4
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    fused = load(tmp_path / "fused.onnx")
    assert any(node.domain == DOMAIN for node in fused.graph), "nothing was fused"
    feeds = made_up(session)
    with Torch().open(fused) as opened:
        got = opened.run(feeds)
    for mine, theirs in zip(got.values(), session.run(None, feeds), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)


def made_up(session: ort.InferenceSession) -> dict[str, np.ndarray]:
    """Return feeds: noise for floats, small numbers for tokens, ones for masks; 8 wherever a size is open."""
    rng, feeds = np.random.default_rng(RNG_SEED), {}
    for one in session.get_inputs():
        shape = [size if isinstance(size, int) else 8 for size in one.shape]
        is_float = one.type == "tensor(float)"
        tokens = np.ones(shape, np.int64) if "mask" in one.name else rng.integers(0, FEWEST_TOKENS, shape)
        feeds[one.name] = rng.random(shape, np.float32) if is_float else tokens
    return feeds


def test_heads_packed_together_are_those_apart() -> None:
    packed = torch.randn(2, 5, 2, 3, 4, generator=torch.Generator().manual_seed(RNG_SEED))
    operator = catalog.find(DOMAIN, "MultiHeadAttention", 1)
    assert operator is not None
    apart = [one.flatten(2) for one in packed.unbind(3)]
    expected = operator.function(*apart, num_heads=2)[0]
    torch.testing.assert_close(operator.function(packed, num_heads=2)[0], expected)
    pairs = torch.stack([one.unflatten(-1, (2, 4)) for one in apart[1:]], 3)
    torch.testing.assert_close(operator.function(apart[0], pairs, num_heads=2)[0], expected)


@pytest.mark.parametrize("per_channel", [False, True])
def test_recurrence_of_codes_differs_by_rounding_only(per_channel: bool) -> None:
    rng = np.random.default_rng(RNG_SEED)
    width, hidden, scales = 6, 4, (1, 16) if per_channel else (1,)
    case = Case(
        "DynamicQuantizeLSTM",
        [
            rng.standard_normal((5, 2, width)).astype(np.float32),
            rng.integers(-60, 60, (1, width, 4 * hidden)).astype(np.int8),
            rng.integers(-60, 60, (1, hidden, 4 * hidden)).astype(np.int8),
            rng.standard_normal((1, 8 * hidden)).astype(np.float32),
            *(None, None, None, None),
            *(rng.uniform(0.005, 0.01, scales).astype(np.float32), np.zeros(scales, np.int8)) * 2,
        ],
        {"hidden_size": hidden},
    )
    proto = case.model()
    for at, one in enumerate(case.inputs):
        if at in (1, 2, 8, 9, 10, 11):  # ONNX Runtime wants these as constants
            proto.graph.initializer.append(onnx.numpy_helper.from_array(one, f"x{at}"))
    expected = ort.InferenceSession(proto.SerializeToString()).run(None, {"x0": case.inputs[0], "x3": case.inputs[3]})
    operator = catalog.find(DOMAIN, "DynamicQuantizeLSTM", 1)
    assert operator is not None
    given = [None if one is None else torch.from_numpy(one) for one in case.inputs]
    got = operator.function(*given, **case.attributes)
    np.testing.assert_allclose(got[0].numpy(), expected[0], atol=ROUNDED)


@pytest.mark.parametrize("activation", [0, 1])
def test_groups_of_channels_that_come_last(activation: int) -> None:
    generator = torch.Generator().manual_seed(RNG_SEED)
    x, gamma, beta, skip = (torch.randn(*shape, generator=generator) for shape in ((2, 3, 3, 8), (8,), (8,), (2, 8)))
    plain, skipping = (catalog.find(DOMAIN, name, 1) for name in ("GroupNorm", "SkipGroupNorm"))
    assert plain is not None
    assert skipping is not None
    options = {"activation": activation, "groups": 2}
    total = x + skip[:, None, None]
    expected = torch.nn.functional.group_norm(total.permute(0, 3, 1, 2), 2, gamma, beta).permute(0, 2, 3, 1)
    expected = torch.nn.functional.silu(expected) if activation else expected
    torch.testing.assert_close(plain.function(total, gamma, beta, **options), expected)
    got = skipping.function(x, gamma, beta, skip, **options)
    torch.testing.assert_close(got, (expected, total))


# Inputs that are codes, lengths or positions have no gradient; those of these operators all do.
DIFFERENTIABLE = ("Gelu", "FusedMatMul", "FusedConv", "SkipLayerNormalization", "MultiHeadAttention")


@pytest.mark.parametrize("case", [one for one in CASES if one.op_type in DIFFERENTIABLE and not one.name], ids=str)
def test_gradients_are_those_of_differences(case: Case) -> None:
    module = lower(ir.from_proto(case.model()))
    given = [torch.from_numpy(one).double().requires_grad_() for one in case.feeds().values()]
    assert torch.autograd.gradcheck(lambda *inputs: module(*inputs)[0], given, fast_mode=True)


def test_scales_of_blocks_and_what_they_multiply_have_gradients() -> None:
    case = next(one for one in CASES if str(one) == "MatMulNBits-4-bits")
    a, packed, scales = (torch.from_numpy(one) for one in case.feeds().values())
    a, scales = a.requires_grad_(), scales.requires_grad_()
    lower(ir.from_proto(case.model()))(a, packed, scales)[0].sum().backward()
    assert a.grad is not None
    assert scales.grad is not None
    assert bool(torch.isfinite(scales.grad).all())


@pytest.mark.parametrize(
    ("op_type", "inputs", "attributes", "why"),
    [
        ("MatMulNBits", 3, {"K": 16, "N": 1, "block_size": 16, "bits": 4, "weight_prepacked": 1}, "packed for one GPU"),
        ("Attention", 2, {"num_heads": 1, "do_rotary": 1}, "rotary"),
    ],
)
def test_what_is_not_computed_is_said(op_type: str, inputs: int, attributes: dict[str, Any], why: str) -> None:
    case = Case(op_type, [np.ones((1, 1, 1), np.float32)] * inputs, attributes)
    with Torch().open(ir.from_proto(case.model())) as session, pytest.raises(BackendError, match=why):
        session.run(case.feeds())


def test_an_unknown_operator_is_named_before_any_run() -> None:
    case = Case("LongformerAttention", [np.ones((1, 1, 1), np.float32)] * 2, {"num_heads": 1, "window": 2})
    with pytest.raises(BackendError, match=r"com\.microsoft::LongformerAttention"):
        Torch().open(ir.from_proto(case.model()))


def test_codes_of_a_byte_are_taken_lowest_bits_first() -> None:
    packed = torch.tensor([[0b11_10_01_00]], dtype=torch.uint8)
    assert unpacked(packed, 2).tolist() == [[0, 1, 2, 3]]
    assert unpacked(packed, 4).tolist() == [[4, 14]]
    with pytest.raises(NotImplementedError, match="3 bits"):
        unpacked(packed, 3)
