"""What a lowered model does on a GPU, on a device that is none: where things lie, and what GPUs have no kernels for."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import numpy as np
import pytest

from graphopt import ir
from graphopt.data import input_specs
from graphopt.errors import BackendError
from graphopt.normal_form import normalize

from .node_cases import NodeCase, node_cases, with_constant_inputs

torch = pytest.importorskip("torch")

from graphopt.backends.torch_fx.lowering import lower  # noqa: E402
from graphopt.backends.torch_fx.tensors import to_torch  # noqa: E402
from graphopt.passes.recovery.constraints.constrained import constrain  # noqa: E402
from graphopt.passes.recovery.held import Held  # noqa: E402

from .pretended_device import GPULack, Pretended, brought_back, pretend, pretend_module, pretended_device  # noqa: E402
from .test_torch_contrib import CASES as CONTRIBUTED  # noqa: E402
from .torch_models import model_of  # noqa: E402

# Cases that do not run there, as patterns of their names, and why: they would on a GPU.
ELSEWHERE = {
    "test_bernoulli_seed*": "torch draws no numbers of a seed on a device that is none",
    "test_training_dropout*": "as above",
    "test_attention_4d_fp16*": "torch knows no automatic precision for a device that is none",
}
SHOWN = 10
KINDS = (
    frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}),
    frozenset({ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.UINT8}),
)


def on_both(model: ir.Model, feeds: Mapping[str, Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return what a model gives on the host and on the device.

    Raises:
        GPULack: Something was in the wrong place, or is not there on GPUs.
    """
    module = lower(model)
    inputs = [tensor_of(feeds[spec.name]) for spec in input_specs(model)]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)  # both draw the same
        wanted = module(*inputs)
        pretend_module(module)
        torch.manual_seed(0)
        with pretended_device():
            found = module.forward(*pretend(inputs))
    return wanted, brought_back(found)


def tensor_of(given: Any) -> Any:
    if given is None or isinstance(given, list):
        return given and [tensor_of(one) for one in given]
    return to_torch(np.array(given))


def assert_same_on_both(model: ir.Model, feeds: Mapping[str, Any]) -> None:
    wanted, found = on_both(model, feeds)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        if isinstance(other, torch.Tensor):
            torch.testing.assert_close(one, other, equal_nan=True)
        elif isinstance(other, np.ndarray):
            np.testing.assert_array_equal(one, other)


def distinct(cases: Sequence[NodeCase]) -> list[NodeCase]:
    """Return a case of each set of operators on each kinds of elements, of which a GPU computes with all or none."""
    found = {}
    for case in cases:
        types = (info.type.tensor_type.elem_type for info in (*case.model.graph.input, *case.model.graph.output))
        kinds = tuple(next((kind for kind in KINDS if one in kind), one) for one in types)
        found.setdefault((frozenset(node.op_type for node in case.model.graph.node), kinds), case)
    return list(found.values())


@pytest.mark.parametrize("form", ["plain", "constant"])
def test_operators_are_computed_where_their_inputs_lie(form: str) -> None:
    """Plain operators; and those made of others, with inputs that are constants: sizes come from all over."""
    wrong = []
    for case in distinct(node_cases()):
        proto = case.model if form == "plain" else with_constant_inputs(case)
        if proto is None or any(fnmatch(case.name, one) for one in ELSEWHERE):
            continue
        if (form == "plain") != (len(proto.graph.node) == 1):
            continue
        model = ir.from_proto(proto)
        normalize(model)
        try:
            assert_same_on_both(model, case.inputs)
        except BackendError:
            continue  # refused, as the test of conformance has it
        except (GPULack, AssertionError, RuntimeError, TypeError) as error:
            wrong.append(f"{case.name}: {error}")
    assert not wrong, f"{len(wrong)}: {wrong[:SHOWN]}"


def test_contributed_operators_are_computed_where_their_inputs_lie() -> None:
    for case in CONTRIBUTED:
        assert_same_on_both(ir.from_proto(case.model()), case.feeds())


TEXTS = {
    "matches": """g (string[n] words, float[n] x) => (float[n] y) {
        found = RegexFullMatch <pattern = "a+"> (words) f = Cast <to = 1> (found) y = Mul (f, x) }""",
    "stored": """g (string[n] words, float[n] x) => (float[n] y) { y = own.firsts (x) }
    <opset_import: ["" : 21], domain: "own">
    firsts (v) => (u) {
        words = Constant <value_strings = ["a", "b", "c", "a"]> ()
        found = RegexFullMatch <pattern = "a"> (words) f = Cast <to = 1> (found) u = Mul (f, v) }""",
    "equal": """g (string[n] words, float[n] x) => (float[n] y) <string[1] a = {"a"}> {
        found = Equal (words, a) f = Cast <to = 1> (found) y = Mul (f, x) }""",
    "numbers": """g (string[n] words, float[n] x) => (float[n] y) {
        found = StringNormalizer <case_change_action = "LOWER"> (words) other, n = StringSplit (found)
        f = Cast <to = 1> (n) y = Mul (f, x) }""",
    "read": """g (string[n] words, float[n] x) => (float[n] y, string[n] again) {
        c = Cast <to = 8> (x) f = Cast <to = 1> (c) y = Mul (f, x) again = Identity (words) }""",
    "distinct": """g (string[n] words, float[n] x) => (string[m] y, float[m] z) {
        y, first = Unique (words) z = Gather (x, first) }""",
    "chosen": """g (string[n] words, float[n] x) => (string[k] y) <float zero = {0}> {
        positive = Greater (x, zero) kept = Compress <axis = 0> (words, positive)
        places = NonZero (positive) t = Transpose (places) all = GatherND (words, t)
        y = Concat <axis = 0> (kept, all) }""",
    "where": """g (string[n] words, float[n] x) => (string[n] y) <float zero = {0}> {
        positive = Greater (x, zero) twice = StringConcat (words, words) y = Where (positive, words, twice) }""",
    "branch": """g (string[n] words, float[n] x) => (float[n] y) <float zero = {0}> {
        s = ReduceSum <keepdims = 0> (x) which = Greater (s, zero)
        y = If (which) <then_branch = t () => (float[n] a) {
                          m = RegexFullMatch <pattern = "a"> (words) f = Cast <to = 1> (m) a = Add (f, x) },
                        else_branch = e () => (float[n] b) {
                          k = TfIdfVectorizer <max_gram_length = 1, min_gram_length = 1, max_skip_count = 0,
                            mode = "TF", ngram_counts = [0], ngram_indexes = [0, 1], pool_strings = ["a", "b"]> (words)
                          r = ReduceSum (k) b = Mul (x, r) }> }""",
}


@pytest.mark.parametrize("case", TEXTS)
@pytest.mark.parametrize("sign", [1, -1])
def test_strings_stay_on_the_host_and_numbers_do_not(case: str, sign: int) -> None:
    words = np.array(["a", "b", "aa", "a"], object)
    x = np.array([1, 2, -0.5, 4], np.float32) * np.float32(sign)
    assert_same_on_both(model_of(TEXTS[case]), {"words": words, "x": x})


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint32", "float"])
@pytest.mark.parametrize(
    "line", ['Einsum <equation = "ij,jk->ik"> (x, w)', "MatMul (x, w)", "Gemm <transB = 1> (x, w)"]
)
def test_products_of_integers_are_exact_where_there_are_none(line: str, dtype: str) -> None:
    model = model_of(f"g ({dtype}[n,3] x, {dtype}[3,3] w) => ({dtype}[n,3] y) {{ y = {line} }}")
    kind = np.float32 if dtype == "float" else np.dtype(dtype)
    largest = 4000  # sums of products that float32 no longer holds
    numbers = np.arange(largest - 9, largest).reshape(3, 3).astype(kind)
    assert_same_on_both(model, {"x": numbers, "w": numbers.T.copy()})


def test_a_convolution_of_codes_is_whole_whatever_computed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fourier transforms, which GPUs may compute it by, come out a little beside whole numbers."""
    from graphopt.backends.torch_fx import ops_quantization

    exact = ops_quantization.conv
    monkeypatch.setattr(ops_quantization, "conv", lambda *args, **kwargs: exact(*args, **kwargs) - 1e-9)
    codes = torch.arange(9, dtype=torch.uint8).reshape(1, 1, 3, 3)
    ones = torch.ones(1, 1, 2, 2, dtype=torch.int8)
    found = ops_quantization.conv_integer(codes, ones)
    assert found.tolist() == [[[[8, 12], [20, 24]]]]


def test_pieces_of_sizes_may_be_tensors_too() -> None:
    model = model_of("""g (float[b,n] x) => (float[b,n] y, float[k] z)
    <int64[2] halves = {1, 1}, int64[1] last = {-1}> {
        s = Shape (x) rows, columns = Split <axis = 0> (s, halves) f = Cast <to = 1> (columns) y = Mul (x, f)
        wide = Concat <axis = 0> (rows, last) again = Reshape (y, wide) g = Cast <to = 1> (rows)
        flat = Reshape (again, last) z = Concat <axis = 0> (flat, g) }""")
    assert_same_on_both(model, {"x": np.ones((2, 3), np.float32)})


def test_constraints_hold_where_the_model_lies() -> None:
    """Masks, scales that train, and what is stored in the end."""
    from .test_constraints_nested import blocks

    coded = model_of("""g (float[n,4] x) => (float[n,4] y)
    <float scale = {0.05}, uint8 zero = {128}, float s = {0.1}, int8[4,4] codes = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}> {
        q = QuantizeLinear (x, scale, zero) d = DequantizeLinear (q, scale, zero)
        w = DequantizeLinear (codes, s) y = MatMul (d, w) }""")
    for model, width in ((coded, 4), (blocks(), 16)):
        x = torch.linspace(-1, 1, 3 * width).reshape(3, width)
        steps = []
        for there in (False, True):
            module = lower(model, differentiable=True)
            held = constrain(module, model, Held())
            if there:
                pretend_module(module)
            with pretended_device() if there else contextlib.nullcontext():
                module.forward(Pretended(x) if there else x)[0].square().sum().backward()
                groups = held.parameters()
                gradients = [tensor.grad for group in groups for tensor in group.tensors]
                steps.append((brought_back(gradients) if there else gradients, dict(held.stored())))
        (wanted, _), (found, stored) = steps
        torch.testing.assert_close(found, wanted)
        assert stored == {}


def test_the_device_refuses_what_a_gpu_does() -> None:
    there, here = Pretended(torch.ones(2, 2)), torch.ones(2, 2)
    with pretended_device() as device:
        assert (there + 1).device == device
        assert (there + torch.tensor(1.0)).sum().item() == 8
        with pytest.raises(GPULack, match="a tensor of the host"):
            there + here
        with pytest.raises(GPULack, match=r"aten::mm: of torch\.int64"):
            there.long() @ there.long()
        with pytest.raises(GPULack, match=r"of torch\.uint16"):
            there.to(torch.uint16) + there.to(torch.uint16)
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()
    with pytest.raises(GPULack, match="a result on the host"):
        brought_back([here])
