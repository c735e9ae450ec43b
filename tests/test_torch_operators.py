"""Operators in torch: what ONNX's own cases leave out, versions, sizes of zero, unsigned numbers, gradients."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.errors import BackendError

from .node_cases import run
from .torch_operator_cases import CASES, GRADIENTS, Case

torch = pytest.importorskip("torch")

from graphopt.backends.torch_fx import catalog  # noqa: E402
from graphopt.backends.torch_fx.backend import Torch  # noqa: E402
from graphopt.backends.torch_fx.operators import Operator  # noqa: E402
from graphopt.backends.torch_fx.tensors import to_torch  # noqa: E402

UNSIGNED_AND_SIGNED = [np.dtype(f"{kind}int{bits}") for kind in ("", "u") for bits in (8, 16, 32, 64)]
OLDEST, NEWEST = 7, 28
# Constants are the lowering's own. Loop and Scan of old take their inputs in another way.
UNKNOWN, UNKNOWN_BEFORE, LOOPS_SINCE = {"ImageDecoder"}, {"Loop", "Scan"}, 11
SEED = 3


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_of(case: Case) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Return a model of one node and what to feed it."""
    arrays = case.arrays()
    names = ["" if array is None else f"input{index}" for index, array in enumerate(arrays)]
    results = [f"output{index}" for index in range(case.outputs)]
    node = onnx.helper.make_node(case.op, names, results, **case.attributes)
    feeds = {name: array for name, array in zip(names, arrays, strict=True) if array is not None}
    inputs = [
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
    ]
    outputs = [onnx.helper.make_empty_tensor_value_info(name) for name in results]
    graph = onnx.helper.make_graph([node], "one", inputs, outputs)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", case.opset)], ir_version=8), feeds


def function_of(op: str, opset: int = NEWEST) -> Operator:
    found = catalog.find("", op, opset)
    assert found is not None, op
    return found


def compute(op: str, *inputs: Any, opset: int = NEWEST, **attributes: Any) -> Any:
    """Return the first output of an operator, of arrays."""
    found = function_of(op, opset).function(*(to_torch(np.asarray(one)) for one in inputs), **attributes)
    return (found[0] if isinstance(found, tuple) else found).numpy()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_are_those_of_onnxruntime(case: Case) -> None:
    model, feeds = model_of(case)
    expected = run(model, feeds)
    assert expected is not None, "ONNX Runtime runs it"
    with Torch().open(ir.from_proto(model)) as session:
        found = list(session.run(feeds).values())
    for mine, theirs in zip(found, expected, strict=True):
        assert isinstance(theirs, np.ndarray)
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        np.testing.assert_allclose(
            mine.astype(np.float64), theirs.astype(np.float64), rtol=case.tolerance, atol=case.tolerance
        )


@pytest.mark.parametrize("case", GRADIENTS, ids=str)
def test_gradients_are_those_of_differences(case: Case) -> None:
    operator = function_of(case.op, case.opset)
    arrays = [None if one is None else to_torch(one) for one in case.arrays(np.float64)]
    extra = {"outputs": case.outputs} if "outputs" in operator.keywords else {}
    wanted = range(len(arrays)) if case.learned is None else case.learned
    learned = [one.requires_grad_() for at in wanted if (one := arrays[at]) is not None and one.is_floating_point()]

    def forward(*_: Any) -> Any:
        found = operator.function(*arrays, **case.attributes, **extra)
        outputs = found if isinstance(found, tuple) else (found,)
        return tuple(one for one in outputs[: case.outputs] if one is not None and one.is_floating_point())

    assert learned
    assert torch.autograd.gradcheck(forward, learned)


def extremes(dtype: np.dtype[Any], count: int = 60) -> np.ndarray:
    """Return numbers at the ends of what a type holds, and a few small ones."""
    limits = np.iinfo(dtype)
    pool = [0, 1, 2, 3, 7, limits.max, limits.max - 1, limits.max // 2, limits.max // 2 + 1, limits.min, limits.min + 1]
    return np.random.default_rng(SEED).choice(np.array(pool, dtype=object), count).astype(dtype)


@pytest.mark.parametrize("dtype", UNSIGNED_AND_SIGNED, ids=str)
def test_integers_wrap_and_compare_as_numpys(dtype: np.dtype[Any]) -> None:
    a = extremes(dtype)
    b = np.roll(a, 7)
    with np.errstate(all="ignore"):
        expected = {
            "Add": a + b,
            "Sub": a - b,
            "Mul": a * b,
            "Max": np.maximum(a, b),
            "Min": np.minimum(a, b),
            "Less": a < b,
            "LessOrEqual": a <= b,
            "Greater": a > b,
            "GreaterOrEqual": a >= b,
            "Equal": a == b,
            "BitwiseAnd": a & b,
            "BitwiseOr": a | b,
            "BitwiseXor": a ^ b,
        }
        for op, wanted in expected.items():
            found = compute(op, a, b)
            assert found.dtype == wanted.dtype, op
            np.testing.assert_array_equal(found, wanted, err_msg=op)
        np.testing.assert_array_equal(compute("BitwiseNot", a), ~a)
        np.testing.assert_array_equal(compute("Sign", a), np.sign(a))
        low, high = np.array(2, dtype), np.array(np.iinfo(dtype).max // 2 + 1, dtype)
        np.testing.assert_array_equal(compute("Clip", a, low, high), np.clip(a, low, high))


@pytest.mark.parametrize("dtype", UNSIGNED_AND_SIGNED, ids=str)
def test_integers_are_divided_towards_zero(dtype: np.dtype[Any]) -> None:
    a = extremes(dtype)
    b = np.roll(a, 11)
    b = np.where(np.isin(b, [0, np.array(-1).astype(dtype)]), np.array(3, dtype), b)  # no zeros, no overflow
    pairs = zip(a.tolist(), b.tolist(), strict=True)
    towards_zero = [abs(one) // abs(by) * (1 if (one < 0) == (by < 0) else -1) for one, by in pairs]
    np.testing.assert_array_equal(compute("Div", a, b), np.array(towards_zero, dtype=object).astype(dtype))
    np.testing.assert_array_equal(compute("Mod", a, b), np.mod(a, b))
    np.testing.assert_array_equal(compute("Mod", a, b, fmod=1), np.fmod(a, b))


@pytest.mark.parametrize("direction", ["LEFT", "RIGHT"])
@pytest.mark.parametrize("dtype", UNSIGNED_AND_SIGNED, ids=str)
def test_bits_shifted_out_are_gone(dtype: np.dtype[Any], direction: str) -> None:
    bits = np.iinfo(dtype).bits
    a, by = extremes(dtype), (np.arange(60) % (bits + 3)).astype(dtype)
    expected = []
    for one, places in zip(a.tolist(), by.tolist(), strict=True):
        moved = one << places if direction == "LEFT" else one >> places
        beyond = -1 if direction == "RIGHT" and one < 0 else 0
        expected.append((beyond if places >= bits else moved) % 2**bits)
    wanted = np.array(expected, dtype=object).astype(f"uint{bits}").view(dtype)
    np.testing.assert_array_equal(compute("BitShift", a, by, direction=direction), wanted)
    if dtype.kind == "i":
        np.testing.assert_array_equal(
            compute("BitShift", a, np.full_like(a, -1), direction=direction),
            np.where((a < 0) & (direction == "RIGHT"), -1, 0),
        )


@pytest.mark.parametrize("dtype", UNSIGNED_AND_SIGNED, ids=str)
def test_integers_are_reduced_as_numpys(dtype: np.dtype[Any]) -> None:
    table = extremes(dtype).reshape(4, 15)
    axis = np.array([1])
    with np.errstate(all="ignore"):
        sums = {"ReduceSum": np.sum, "ReduceProd": np.prod, "ReduceMax": np.max, "ReduceMin": np.min}
        for op, reduce in sums.items():
            wanted = reduce(table, axis=1, keepdims=True).astype(dtype)
            np.testing.assert_array_equal(compute(op, table, axis), wanted, err_msg=op)
        np.testing.assert_array_equal(compute("CumSum", table, np.array(1)), np.cumsum(table, axis=1, dtype=dtype))
        np.testing.assert_array_equal(compute("MatMul", table, table.T.copy()), table @ table.T)
    np.testing.assert_array_equal(compute("ArgMax", table, axis=1, keepdims=0), np.argmax(table, axis=1))
    limits = np.iinfo(dtype)
    assert compute("ReduceMax", table[:, :0], axis).tolist() == [[limits.min]] * 4, "the largest of nothing"
    assert compute("ReduceMin", table[:, :0], axis).tolist() == [[limits.max]] * 4


def test_norms_have_a_gradient_at_zero() -> None:
    for op, attributes in (("ReduceL2", {}), ("LpNormalization", {}), ("LpPool", {"kernel_shape": [2]})):
        zeros = torch.zeros(1, 1, 4, requires_grad=True)
        found = function_of(op).function(zeros, **attributes)
        found.sum().backward()
        assert torch.isfinite(zeros.grad).all(), op


def test_special_numbers() -> None:
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 2.5, -1.5], np.float32)
    assert np.isnan(compute("Sign", special)).tolist() == np.isnan(special).tolist()
    assert compute("Round", special).tolist()[-2:] == [2.0, -2.0], "halves go to the even number"
    largest = np.finfo(np.float32).max
    assert compute("Clip", special).tolist()[2:4] == [largest, -largest], "ONNX's default bounds are the type's"
    crossed = compute("Clip", special, np.float32(3), np.float32(1))
    assert crossed[np.isfinite(special)].tolist() == [1.0] * 4, "the upper bound holds"
    minus = compute("Mod", np.float32([-0.0, 0.0, 4.0]), np.float32([2.0, -2.0, -2.0]))
    assert np.signbit(minus).tolist() == [False, True, True], "zeros have the sign of the divisor"


@pytest.mark.parametrize("op", ["RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike"])
def test_draws_are_repeated_by_a_seed(op: str) -> None:
    operator = function_of(op)
    inputs = [torch.zeros(2000, dtype=torch.float64)] if op.endswith("Like") else []
    told = {} if inputs else {"shape": [2000], "dtype": 11, "device": torch.device("cpu")}
    spread = {"mean": 3.0, "scale": 0.5} if "Normal" in op else {"low": 2.0, "high": 4.0}
    first = operator.function(*inputs, seed=7.0, **told, **spread)
    assert torch.equal(first, operator.function(*inputs, seed=7.0, **told, **spread))
    assert not torch.equal(first, operator.function(*inputs, seed=8.0, **told, **spread))
    assert first.dtype == torch.float64
    assert abs(first.mean().item() - 3) < 0.1
    assert abs(first.std().item() - (0.5 if "Normal" in op else 2 / 12**0.5)) < 0.05


def test_classes_are_drawn_by_their_shares() -> None:
    logits = np.log(np.array([[0.1, 0.9], [0.6, 0.4]], np.float32))
    drawn = compute("Multinomial", logits, sample_size=4000, seed=1.0)
    assert (drawn.dtype, drawn.shape) == (np.int32, (2, 4000))
    assert np.abs(drawn.mean(axis=1) - [0.9, 0.4]).max() < 0.05
    ones = compute("Bernoulli", np.full(4000, 0.3, np.float32), dtype=9, seed=1.0)
    assert ones.dtype == np.bool_
    assert abs(ones.mean() - 0.3) < 0.05


def test_dropout_drops_only_where_the_model_says_so() -> None:
    x = np.ones(4000, np.float32)
    assert compute("Dropout", x, np.float32(0.25)).tolist() == x.tolist()
    trained = compute("Dropout", x, np.float32(0.25), np.array(True), seed=1)
    assert set(np.unique(trained)) == {0.0, np.float32(1 / 0.75)}
    assert abs((trained == 0).mean() - 0.25) < 0.05


def test_what_torch_has_no_kernel_for_is_refused_by_name() -> None:
    volume, grid = np.zeros((1, 1, 2, 2, 2), np.float32), np.zeros((1, 2, 2, 2, 3), np.float32)
    with pytest.raises(NotImplementedError, match="GridSample: `cubic` over 3 spatial axes"):
        compute("GridSample", volume, grid, mode="cubic")
    with pytest.raises(NotImplementedError, match="Conv: over 4 spatial axes"):
        compute("Conv", np.zeros((1,) * 6, np.float32), np.zeros((1,) * 6, np.float32))
    model, feeds = model_of(Case("GridSample", (volume, grid), {"mode": "cubic"}, opset=20))
    with Torch().open(ir.from_proto(model)) as session, pytest.raises(BackendError, match="GridSample"):
        session.run(feeds)


@pytest.mark.parametrize("opset", range(OLDEST, NEWEST + 1))
def test_every_operator_is_known(opset: int) -> None:
    names = {schema.name for schema in schemas() if schema.domain == ""}
    missing = set()
    for name in names:
        try:
            schema = onnx.defs.get_schema(name, opset, "")
        except onnx.defs.SchemaError:
            continue
        if not schema.deprecated and catalog.find("", name, opset) is None:
            missing.add(name)
    assert missing <= {"Constant", *(UNKNOWN if opset >= LOOPS_SINCE else UNKNOWN_BEFORE)}


def schemas() -> list[onnx.defs.OpSchema]:
    known = onnx.defs.get_all_schemas_with_history()
    return [schema for schema in known if schema.domain in catalog.TABLES and not schema.deprecated]


@pytest.mark.parametrize("domain", sorted(catalog.TABLES))
def test_functions_take_what_the_schemas_say(domain: str) -> None:
    """Every attribute of every version, and as many inputs and outputs."""
    wrong = []
    for schema in schemas():
        found = catalog.find(schema.domain, schema.name, schema.since_version)
        if schema.domain != domain or found is None:
            continue
        label = f"{schema.name} {schema.since_version}"
        parameters = inspect.signature(found.function).parameters.values()
        wrong += [f"{label}: `{name}`" for name in schema.attributes if name not in found.keywords]
        positional = [one for one in parameters if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        variadic = any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in parameters)
        if schema.max_input > len(positional) and not variadic:
            wrong.append(f"{label}: {schema.max_input} inputs")
        several = len(schema.outputs) > 1 or any(
            one.option == onnx.defs.OpSchema.FormalParameterOption.Variadic for one in schema.outputs
        )
        if several and not found.returns_tuple:
            wrong.append(f"{label}: one output")
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_and_learns(dtype: Any) -> None:
    """On a CPU, where torch lacks kernels: no case fails, and each gives what float32 gives, about."""
    for case in GRADIENTS:
        operator = function_of(case.op, case.opset)
        told = {"outputs": case.outputs} if "outputs" in operator.keywords else {}
        wide = [None if one is None else to_torch(one) for one in case.arrays()]
        drawn = [isinstance(one, tuple) for one in case.inputs]
        narrow = [one.to(dtype).requires_grad_() if mine else one for one, mine in zip(wide, drawn, strict=True)]
        found, wanted = (operator.function(*inputs, **case.attributes, **told) for inputs in (narrow, wide))
        found, wanted = (one[0] if isinstance(one, tuple) else one for one in (found, wanted))
        torch.testing.assert_close(found.float(), wanted.float(), rtol=0.1, atol=0.1, msg=str(case))
        if any(drawn) and found.requires_grad:
            found.float().sum().backward()
            grads = [one.grad for one, mine in zip(narrow, drawn, strict=True) if mine]
            assert any(one is not None for one in grads), case
