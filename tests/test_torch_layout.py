"""Torch's operators that move elements about, and those of sequences, text, recurrence: what node cases leave out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from graphopt import ir
from graphopt.backend import Array

torch = pytest.importorskip("torch")

from graphopt.backends.torch_fx import catalog  # noqa: E402
from graphopt.backends.torch_fx.backend import Torch  # noqa: E402
from graphopt.backends.torch_fx.moved import CARRIERS  # noqa: E402

CPU = torch.device("cpu")
SEED = 5


def function(op_type: str, opset: int = 22) -> Any:
    found = catalog.find("", op_type, opset)
    assert found is not None
    return found.function


def model_of(
    op_type: str, inputs: Sequence[Array | None], attributes: Mapping[str, Any], opset: int, outputs: Sequence[int]
) -> onnx.ModelProto:
    """Return one node whose first input is fed and whose others are constants."""
    names = [f"x{at}" if one is not None else "" for at, one in enumerate(inputs)]
    node = onnx.helper.make_node(op_type, names, [f"y{at}" for at in range(len(outputs))], **attributes)
    first = inputs[0]
    assert first is not None
    code = onnx.helper.np_dtype_to_tensor_dtype(first.dtype)
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [onnx.helper.make_tensor_value_info("x0", code, first.shape)],
        [onnx.helper.make_tensor_value_info(f"y{at}", one, None) for at, one in enumerate(outputs)],
        [
            onnx.numpy_helper.from_array(one, name)
            for name, one in zip(names[1:], inputs[1:], strict=True)
            if one is not None
        ],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)


FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
RNG = np.random.default_rng(SEED)
ROWS = RNG.standard_normal((3, 4, 5)).astype(np.float32)
NONE = np.zeros((0, 4), np.float32)


def whole(*numbers: int) -> Array:
    return np.array(numbers, np.int64)


@pytest.mark.parametrize(
    ("op_type", "inputs", "attributes", "opset", "outputs"),
    [
        ("Squeeze", [ROWS[:1]], {"axes": [-3]}, 11, [FLOAT]),
        ("Unsqueeze", [ROWS], {"axes": [0, -1]}, 11, [FLOAT]),
        ("Split", [ROWS], {"axis": -1, "split": [2, 3]}, 11, [FLOAT] * 2),
        ("Split", [ROWS], {"axis": 1}, 11, [FLOAT] * 2),
        ("Split", [ROWS], {"axis": 2, "num_outputs": 3}, 18, [FLOAT] * 3),
        ("Slice", [ROWS], {"starts": [1, -2], "ends": [9, 100], "axes": [0, -1]}, 9, [FLOAT]),
        ("Slice", [ROWS, whole(-1), whole(-9), whole(2), whole(-2)], {}, 13, [FLOAT]),
        ("Slice", [ROWS, whole(2), whole(1)], {}, 13, [FLOAT]),
        ("Slice", [ROWS, whole(0), whole(2**62), whole(1), whole(3)], {}, 13, [FLOAT]),
        ("Pad", [ROWS], {"pads": [0, 1, 0, 0, 0, 2], "value": 3.0}, 10, [FLOAT]),
        ("Pad", [ROWS, whole(0, -1, 1, 0, 2, -2)], {}, 13, [FLOAT]),
        ("Pad", [ROWS, whole(0, 2, 3, 0, 1, 2)], {"mode": "reflect"}, 13, [FLOAT]),
        ("Pad", [ROWS, whole(2, 4), np.array(1, np.float32), whole(-1)], {"mode": "edge"}, 18, [FLOAT]),
        ("Pad", [ROWS, whole(3, 0, 0, 0, 4, 0)], {"mode": "wrap"}, 19, [FLOAT]),
        ("Reshape", [NONE, whole(0, 2, 2)], {}, 13, [FLOAT]),
        ("Reshape", [NONE, whole(2, -1, 3)], {}, 13, [FLOAT]),
        ("Reshape", [NONE, whole(3, 0)], {"allowzero": 1}, 14, [FLOAT]),
        ("Flatten", [ROWS], {"axis": -1}, 11, [FLOAT]),
        ("Flatten", [NONE], {"axis": 0}, 11, [FLOAT]),
        ("Concat", [NONE, np.ones((2, 4), np.float32)], {"axis": -2}, 11, [FLOAT]),
        ("Expand", [ROWS[:, :1], whole(2, 1, 4, 1)], {}, 11, [FLOAT]),
        ("Tile", [ROWS, whole(1, 0, 2)], {}, 11, [FLOAT]),
        ("Transpose", [NONE], {}, 11, [FLOAT]),
        ("DepthToSpace", [RNG.standard_normal((1, 8, 2, 3)).astype(np.float32)], {"blocksize": 2}, 9, [FLOAT]),
        ("Gather", [ROWS, np.array([[-1, 0]])], {"axis": -2}, 11, [FLOAT]),
        ("Gather", [ROWS, np.array(-2)], {"axis": 1}, 11, [FLOAT]),
        ("Gather", [ROWS, np.zeros((0, 2), np.int64)], {}, 11, [FLOAT]),
        ("GatherND", [ROWS, np.array([[1], [-1], [0]])], {"batch_dims": 1}, 12, [FLOAT]),
        ("GatherND", [ROWS, np.array([[[0, 1]], [[-1, -1]]])], {}, 11, [FLOAT]),
        ("GatherElements", [ROWS, np.array([[[0, -1]]])], {"axis": 2}, 11, [FLOAT]),
        ("Scatter", [ROWS, np.array([[[1]]]), np.ones((1, 1, 1), np.float32)], {"axis": -1}, 10, [FLOAT]),
        (
            "ScatterElements",
            [ROWS, np.array([[[1, 1, 1]]]), np.full((1, 1, 3), 2, np.float32)],
            {"axis": 2, "reduction": "mul"},
            18,
            [FLOAT],
        ),
        ("ScatterND", [ROWS, np.array([[-1, 0]]), np.ones((1, 5), np.float32)], {}, 11, [FLOAT]),
        (
            "ScatterND",
            [ROWS, np.array([[1], [1]]), np.ones((2, 4, 5), np.float32)],
            {"reduction": "add"},
            16,
            [FLOAT],
        ),
        ("TopK", [np.array([[1, 3, 3, 2]], np.float32), whole(3)], {"largest": 1}, 11, [FLOAT, INT64]),
        ("TopK", [ROWS, whole(0)], {"axis": 0, "largest": 0}, 11, [FLOAT, INT64]),
        ("OneHot", [np.array([[-1, 7], [1, 0]]), whole(3), np.array([2, 5], np.float32)], {"axis": 0}, 11, [FLOAT]),
        ("Compress", [ROWS, np.array([False, True])], {"axis": 1}, 11, [FLOAT]),
        ("Compress", [ROWS, np.array([True] * 3)], {}, 11, [FLOAT]),
        ("NonZero", [NONE], {}, 13, [INT64]),
        ("Unique", [np.array([3, 1, 3, 2], np.float32)], {"sorted": 0}, 11, [FLOAT, INT64, INT64, INT64]),
        ("Shape", [NONE], {}, 13, [INT64]),
        ("Shape", [ROWS], {"start": -2, "end": 9}, 15, [INT64]),
        ("Range", [np.array(3, np.float32), np.array(-1, np.float32), np.array(-1.5, np.float32)], {}, 11, [FLOAT]),
        ("Range", [np.array(5), np.array(-5), np.array(-3)], {}, 11, [INT64]),
        ("EyeLike", [ROWS[0]], {"k": -1}, 9, [FLOAT]),
        ("Trilu", [np.full((2, 3, 4), np.inf, np.float32), np.array(-1)], {"upper": 0}, 14, [FLOAT]),
        ("ReverseSequence", [ROWS[..., 0], whole(1, 3, 2)], {"time_axis": 1, "batch_axis": 0}, 10, [FLOAT]),
        ("CastLike", [ROWS, np.array(1)], {}, 15, [INT64]),
    ],
)
def test_it_computes_what_onnx_runtime_does(
    op_type: str, inputs: Sequence[Array | None], attributes: Mapping[str, Any], opset: int, outputs: Sequence[int]
) -> None:
    proto = model_of(op_type, inputs, attributes, opset, outputs)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    expected = ort.InferenceSession(proto.SerializeToString(), options).run(None, {"x0": inputs[0]})
    with Torch().open(ir.from_proto(proto)) as session:
        got = session.run({"x0": inputs[0]})
    for mine, theirs in zip(got.values(), expected, strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)


def recurrent(op_type: str, gates: int, direction: str, **attributes: Any) -> tuple[list[Array | None], dict[str, Any]]:
    ways, hidden, length, batch, width = 1 + (direction == "bidirectional"), 3, 4, 2, 5

    def floats(*shape: int) -> Array:
        return (RNG.standard_normal(shape) / 2).astype(np.float32)

    inputs: list[Array | None] = [
        floats(length, batch, width),
        floats(ways, gates * hidden, width),
        floats(ways, gates * hidden, hidden),
        floats(ways, 2 * gates * hidden),
        np.array([4, 2], np.int32),
        floats(ways, batch, hidden),
    ]
    if op_type == "LSTM":
        inputs += [floats(ways, batch, hidden), floats(ways, 3 * hidden)]
    return inputs, {"hidden_size": hidden, "direction": direction, **attributes}


@pytest.mark.parametrize(
    ("op_type", "gates", "attributes"),
    [
        ("RNN", 1, {}),
        ("RNN", 1, {"clip": 0.3}),
        ("GRU", 3, {}),
        ("GRU", 3, {"linear_before_reset": 1}),
        ("LSTM", 4, {}),
        ("LSTM", 4, {"clip": 0.5}),
        ("LSTM", 4, {"activations": ["HardSigmoid", "Softsign", "LeakyRelu"], "activation_alpha": [0.3, 0.1]}),
    ],
)
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_recurrence_is_that_of_onnx_runtime(
    op_type: str, gates: int, attributes: Mapping[str, Any], direction: str
) -> None:
    more = dict(attributes)
    if direction == "bidirectional" and "activations" in more:
        more |= {name: more[name] * 2 for name in ("activations", "activation_alpha")}
    inputs, given = recurrent(op_type, gates, direction, **more)
    proto = model_of(op_type, inputs, given, 14, [FLOAT] * (3 if op_type == "LSTM" else 2))
    expected = ort.InferenceSession(proto.SerializeToString()).run(None, {"x0": inputs[0]})
    with Torch().open(ir.from_proto(proto)) as session:
        got = session.run({"x0": inputs[0]})
    for mine, theirs in zip(got.values(), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("op_type", "gates"), [("RNN", 1), ("GRU", 3), ("LSTM", 4)])
def test_recurrence_has_gradients(op_type: str, gates: int) -> None:
    inputs, given = recurrent(op_type, gates, "bidirectional")
    tensors = [torch.from_numpy(one) for one in inputs]
    trained = [one.double().requires_grad_() for at, one in enumerate(tensors) if at != 4]

    def run(*parts: Any) -> Any:
        return function(op_type)(*parts[:4], tensors[4], *parts[4:], **given)

    assert torch.autograd.gradcheck(run, trained, fast_mode=True)


@pytest.mark.parametrize("layout", ["forward", "bidirectional"])
def test_a_layout_of_batches_first_is_the_other_turned(layout: str) -> None:
    inputs, given = recurrent("GRU", 3, layout)
    x, w, r, b, lengths, h = (torch.from_numpy(one) for one in inputs)
    every, last = function("GRU")(x, w, r, b, lengths, h, **given)
    turned = function("GRU")(x.transpose(0, 1), w, r, b, lengths, h.transpose(0, 1), layout=1, **given)
    torch.testing.assert_close(turned, (every.permute(2, 0, 1, 3), last.transpose(0, 1)))


@pytest.mark.parametrize("dtype", sorted(CARRIERS, key=str), ids=str)
def test_what_torch_hardly_has_kernels_for_is_moved(dtype: Any) -> None:
    data = torch.tensor([[1, 2, 4], [8, 16, 1]], dtype=torch.float32).to(dtype)
    wide = data.to(torch.float64)
    at = torch.tensor([1, 0])
    moves: dict[str, tuple[Any, ...]] = {
        "Concat": (data, data),
        "Gather": (data, at),
        "GatherElements": (data, torch.tensor([[1, 0, 1]])),
        "Pad": (data, torch.tensor([0, 1, 1, 0])),
        "ScatterND": (data, torch.tensor([[1]]), data[:1]),
        "Slice": (data, torch.tensor([2]), torch.tensor([-9]), torch.tensor([1]), torch.tensor([-1])),
        "Tile": (data, torch.tensor([2, 1])),
        "Transpose": (data,),
        "Trilu": (data,),
    }
    for op_type, inputs in moves.items():
        keywords = {"axis": 0} if op_type == "Concat" else {}
        got = function(op_type)(*inputs, **keywords)
        plain = function(op_type)(
            *(wide if one is data else one.to(wide.dtype) if one.dtype == dtype else one for one in inputs), **keywords
        )
        if dtype is torch.float8_e8m0fnu and op_type in ("Pad", "Trilu"):
            continue  # it has no zero to fill with
        assert got.dtype == dtype
        torch.testing.assert_close(got.to(torch.float64), plain)


def test_strings_are_moved() -> None:
    words = np.array([["a", "b"], ["c", "dé"]], dtype=object)
    assert function("Transpose")(words).tolist() == [["a", "c"], ["b", "dé"]]
    assert function("Concat")(words, words[:1], axis=0).tolist() == [["a", "b"], ["c", "dé"], ["a", "b"]]
    assert function("Gather")(words, torch.tensor(-1), axis=1).tolist() == ["b", "dé"]
    assert function("Pad")(words, torch.tensor([0, 1, 0, 0])).tolist() == [["", "a", "b"], ["", "c", "dé"]]
    assert [one.tolist() for one in function("Split")(words, axis=1, num_outputs=2)] == [
        [["a"], ["c"]],
        [["b"], ["dé"]],
    ]
    assert function("OneHot")(torch.tensor([1]), torch.tensor(2), np.array(["no", "yes"], object)).tolist() == [
        ["no", "yes"]
    ]
    found, first, inverse, counts = function("Unique")(np.array(["b", "a", "b"], object), sorted=0)
    assert (found.tolist(), first.tolist(), inverse.tolist(), counts.tolist()) == (
        ["b", "a"],
        [0, 1],
        [0, 1, 0],
        [2, 1],
    )
    assert function("ConstantOfShape")(torch.tensor([2]), device=CPU, value=words[0, :1]).tolist() == ["a", "a"]


@pytest.mark.parametrize("saturate", [0, 1])
def test_numbers_too_large_for_floats_of_8_bits(saturate: int) -> None:
    given = torch.tensor([1000.0, -1000.0, 470.0, 448.0, float("inf"), float("nan"), 0.1])
    code = onnx.TensorProto.FLOAT8E4M3FN
    got = function("Cast")(given, to=code, saturate=saturate).float()
    top = 448.0 if saturate else float("nan")
    expected = torch.tensor([top, -top, top, 448.0, top, float("nan"), 0.1015625])
    torch.testing.assert_close(got, expected, equal_nan=True)


def test_numbers_become_text_and_back() -> None:
    cast = function("Cast")
    texts = cast(torch.tensor([1.5, -0.0, float("inf"), float("nan")]), to=onnx.TensorProto.STRING)
    assert texts.tolist() == ["1.5", "-0", "INF", "NaN"]
    short = torch.tensor([0.1, 1e-7, 100000.0, 0.47892547])
    assert cast(short, to=onnx.TensorProto.STRING).tolist() == ["0.1", "1e-07", "100000", "0.47892547"]
    assert cast(short.double()[:1], to=onnx.TensorProto.STRING).tolist() == ["0.10000000149011612"]
    assert cast(np.array(["3", "-4"], object), to=INT64).tolist() == [3, -4]
    assert cast(np.array(["1e3"], object), to=FLOAT).tolist() == [1000.0]
    assert cast(torch.tensor([7, -9, 200]), to=onnx.TensorProto.INT4).tolist() == [7, 7, -8]


NOISE = torch.Generator().manual_seed(SEED)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=NOISE)


@pytest.mark.parametrize(
    ("op_type", "inputs", "keywords"),
    [
        ("Gather", [noise(3, 4), torch.tensor([2, -1, 2])], {}),
        ("GatherND", [noise(3, 4), torch.tensor([[0, 1], [0, 1]])], {}),
        ("ScatterElements", [noise(3, 4), torch.tensor([[1, 1, 0, 0]]), noise(1, 4)], {"reduction": "add"}),
        ("ScatterND", [noise(3, 4), torch.tensor([[2], [0]]), noise(2, 4)], {}),
        ("Pad", [noise(3, 4), torch.tensor([1, 2, 0, 1])], {"mode": "reflect"}),
        (
            "Slice",
            [noise(3, 4), torch.tensor([3]), torch.tensor([-9]), torch.tensor([1]), torch.tensor([-2])],
            {},
        ),
        ("TopK", [noise(3, 4), torch.tensor([2])], {}),
        (
            "Attention",
            [noise(2, 3, 8), noise(2, 5, 4), noise(2, 5, 4)],
            {"q_num_heads": 4, "kv_num_heads": 2, "is_causal": 1},
        ),
        ("RotaryEmbedding", [noise(1, 2, 3, 4), noise(1, 3, 2), noise(1, 3, 2)], {"interleaved": 1}),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_gradients_are_those_of_differences(op_type: str, inputs: list[Any], keywords: dict[str, Any]) -> None:
    trained = [one.double().requires_grad_() for one in inputs if one.is_floating_point()]
    fixed = [one for one in inputs if not one.is_floating_point()]
    order = [one.is_floating_point() for one in inputs]

    def run(*parts: Any) -> Any:
        floats, others = iter(parts), iter(fixed)
        found = function(op_type, 24)(*(next(floats) if is_float else next(others) for is_float in order), **keywords)
        return found if not isinstance(found, tuple) else tuple(one for one in found if one.is_floating_point())

    assert torch.autograd.gradcheck(run, trained, fast_mode=True)


def test_a_row_that_sees_no_key_gives_zeros_and_finite_gradients() -> None:
    q, k, v = (torch.randn(1, 1, 2, 4, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[True, False], [False, False]])
    output, *_ = function("Attention", 24)(q, k, v, mask)
    output.sum().backward()
    assert output[0, 0, 1].tolist() == [0.0] * 4
    assert all(bool(torch.isfinite(one.grad).all()) for one in (q, k, v) if one.grad is not None)


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_attention_without_scores_is_the_same(causal: int, dtype: Any) -> None:
    generator = torch.Generator().manual_seed(SEED)
    q, k, v = (torch.randn(2, heads, 5, 8, generator=generator).to(dtype).requires_grad_() for heads in (4, 2, 2))
    plain, *_ = function("Attention", 24)(q, k, v, is_causal=causal, outputs=1)
    spelled, *_ = function("Attention", 24)(q, k, v, is_causal=causal, outputs=4)
    torch.testing.assert_close(plain, spelled)
    weights = torch.randn(plain.shape, generator=generator).to(dtype)
    first, second = (torch.autograd.grad((one * weights).sum(), (q, k, v)) for one in (plain, spelled))
    torch.testing.assert_close(first, second)


def test_a_scalar_has_no_axis_to_be_zero_along() -> None:
    assert function("NonZero")(torch.tensor(3.0)).shape == (0, 1)  # ONNX Runtime follows NumPy's older ways


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64], ids=str)
def test_unsigned_elements_are_scattered_and_found(dtype: Any) -> None:
    top = torch.iinfo(dtype).max
    data, updates = torch.tensor([1, top, 3, 0], dtype=dtype), torch.tensor([2, top - 1], dtype=dtype)
    for reduction, expected in (("add", [1, top, 3, 0]), ("mul", [1, 4, 3, 0]), ("max", [1, top, 3, 0])):
        for op_type, indices in (("ScatterElements", torch.tensor([1, 1])), ("ScatterND", torch.tensor([[1], [1]]))):
            found = function(op_type)(data, indices, updates, reduction=reduction).tolist()
            assert found == expected, (op_type, reduction)
    assert function("NonZero")(data).tolist() == [[0, 1, 2]]


def test_distinct_numbers_are_in_order_beside_what_is_none() -> None:
    found, first, inverse, counts = function("Unique")(torch.tensor([2.0, float("nan"), -1.0, 2.0]))
    assert found.tolist()[:2] == [-1.0, 2.0]
    assert (found.isnan().tolist(), counts.tolist()) == ([False, False, True], [1, 2, 1])
    assert (first.tolist(), inverse.tolist()) == ([2, 0, 1], [1, 2, 0, 1])


def test_slices_of_no_elements_are_scattered() -> None:
    found = function("ScatterND")(torch.zeros(4, 0), torch.tensor([[0], [1]]), torch.zeros(2, 0), reduction="add")
    assert found.shape == (4, 0)


@pytest.mark.parametrize("value", [2**53 + 1, -(2**63), 2**63 - 1])
def test_a_large_integer_is_padded_with_as_it_is(value: int) -> None:
    found = function("Pad")(torch.tensor([5]), torch.tensor([1, 1]), torch.tensor(value))
    assert found.tolist() == [value, 5, value]


def test_nothing_is_written_into_inputs() -> None:
    data = torch.zeros(3, 4)
    function("ScatterND")(data, torch.tensor([[1]]), torch.ones(1, 4))
    function("ScatterElements")(data, torch.tensor([[1, 1, 1, 1]]), torch.ones(1, 4), reduction="add")
    function("TensorScatter", 24)(data.reshape(1, 3, 4), torch.ones(1, 1, 4))
    assert not data.any()
