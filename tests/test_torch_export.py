"""`to_torch` and `update_weights`: models as modules of PyTorch, trained in loops of their users, and back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt import walk
from graphopt.backend import Array
from graphopt.bias_scales import bias_scales
from graphopt.constant_names import constant_names
from graphopt.errors import BackendError, ModelError, UsageError
from graphopt.sparse import SparselyStored

from .torch_models import assert_close, model_of, run_in

torch = pytest.importorskip("torch")

from torch.nn.utils import parametrize, prune  # noqa: E402

from graphopt.backends.torch_fx import backend as torch_backend  # noqa: E402

DIGITS = Path(__file__).parents[1] / "models" / "digits_cnn.onnx"

LINEAR = """linear (float[N, 3] x) => (float[N, 2] y)
    <float[3, 2] w = {1.001, 2, 3, 4, 5, 6}, float[2] b = {0.5, -0.5}>
    { h = MatMul(x, w)  y = Add(h, b) }"""
HALVES = """halves (float16[N, 2] x) => (float16[N, 2] y)
    <float16[2, 2] w = {0, 0, 0, 0}> { y = MatMul(x, w) }"""
BRANCHES = """branches (bool up, float[2] x) => (float[2] y) {
    y = If (up) <
        then_branch = grow () => (float[2] a) <float[2] w = {2, 2}> { a = Mul(x, w) },
        else_branch = shrink () => (float[2] c) <float[2] w = {0.5, 0.5}> { c = Mul(x, w) }
    > }"""
CALLS = """calls (float[2] x) => (float[2] y) { h = own.Scale(x)  y = own.Scale(h) }
    <opset_import: ["" : 21], domain: "own">
    Scale (v) => (u) { w = Constant <value = float[2] {3, 5}> ()  u = Mul(v, w) }"""
TIED = """tied (int64[N] ids) => (float[N, 3] y) <float[3, 2] table = {1, 2, 3, 4, 5, 6}>
    { h = Gather(table, ids)  t = Transpose(table)  y = MatMul(h, t) }"""
CODES = """codes (float[N, 2] x) => (float[N, 2] y) <int4[2, 2] q = {0, 0, 0, 0}, float s = {0.5}>
    { w = DequantizeLinear(q, s)  y = MatMul(x, w) }"""
# Numbers of types that ONNX's text form has no way to write.
NUMBERS = {
    HALVES: ("w", np.array([[1, 2], [3, 4]], np.float16)),
    CODES: ("q", np.array([[1, -2], [3, 7]]).astype(ml_dtypes.int4)),
}
FILLED = """filled (float[N] x) => (float[N] y)
    { s = Shape(x)  f = ConstantOfShape <value = float[1] {3}> (s)  y = Mul(x, f) }"""

# Sizes and axes that are constants, and those that are computed.
STATIC = """static (float[N, 4] x) => (float[N, 1, 1] y)
    <int64[3] s = {0, 2, 2}, int64[1] none = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] last = {-1}>
    { r = Reshape(x, s)  m = ReduceMean <keepdims = 0> (r, two)  e = Slice(m, none, one, last)
      y = Unsqueeze(e, last) }"""
COMPUTED = """computed (float[N, 3] x) => (float[N, 3] y) <float[4] w = {1, 2, 3, 4}>
    { s = Shape(x)  z = ConstantOfShape(s)  n = Shape(w)  k = Cast <to = 1> (n)  o = CastLike(k, x)
      p = Mul(o, x)  l = CastLike(z, x)  q = Add(p, l)  y = Expand(q, s) }"""

# Floats that one operator reads as a number, and another one as a tensor.
BOTH = {
    "padded": """padded (float[N] x) => (float[M] y) <int64[2] ends = {1, 1}, float v = {3}>
        { t = Mul(x, v)  y = Pad(t, ends, v) }""",
    "counted": """counted (float[N] x) => (float[M] y) <float from = {0}, float to = {4}, float by = {1}>
        { r = Range(from, to, by)  t = Mul(x, by)  s = ReduceSum(t)  y = Mul(r, s) }""",
    "sized": """sized (float[N] x) => (float[M] y) <float two = {2}>
        { s = Shape(x)  f = Cast <to = 1> (s)  d = Mul(f, two)  n = Cast <to = 7> (d)
          t = Mul(x, two)  m = ReduceMax(t)  y = Expand(m, n) }""",
    "branched": """branched (float[N] x) => (float[M] y) <int64[2] ends = {1, 1}, float v = {3}>
        { s = ReduceSum <keepdims = 0> (x)  c = Greater(s, v)
          y = If (c) <then_branch = one () => (float[M] a) { a = Pad(x, ends, v) },
                      else_branch = other () => (float[M] b) { b = Mul(x, v) }> }""",
}

X = np.array([[1, -2, 0.5], [0, 3, 1]], np.float32)


def opened(text: str) -> ir.Model:
    """Return one of the models above."""
    model = model_of(text)
    if text in NUMBERS:
        name, numbers = NUMBERS[text]
        model.graph.initializers[name].const_value = ir.tensor(numbers, name=name)
    return model


def constants_of(model: ir.Model) -> dict[str, Array]:
    """Return what a model stores, by name."""
    found = {name: walk.constant_tensor(value) for value, name in constant_names(model).items()}
    return {name: tensor.numpy() for name, tensor in found.items() if tensor is not None}


def step(module: Any, *inputs: Any, rate: float = 0.01) -> None:
    """Take a step of gradient descent with all parameters that train."""
    optimizer = torch.optim.SGD([one for one in module.parameters() if one.requires_grad], lr=rate)
    optimizer.zero_grad()
    sum(one.float().square().sum() for one in module(*inputs)).backward()
    optimizer.step()


def assert_runs_as(module: Any, model: ir.Model, feeds: dict[str, Any]) -> None:
    """Hold a model in ONNX Runtime against the module whose weights it was given."""
    pytest.importorskip("onnxruntime")
    with torch.no_grad():
        outputs = module(*map(torch.from_numpy, feeds.values()))
    wanted = {value.name or "": one.numpy() for value, one in zip(model.graph.outputs, outputs, strict=True)}
    close = 1e-2 if any(one.dtype == np.float16 for one in wanted.values()) else 1e-4
    assert_close(run_in("onnxruntime", model, feeds), wanted, close)


def test_a_real_model_trained_in_a_loop_of_ones_own(tmp_path: Path) -> None:
    data = np.load(DIGITS.with_name("digits.npz"))
    # Something to learn: each digit is to be called the next one.
    images, labels = torch.from_numpy(data["image"][:64]), torch.from_numpy((data["labels"][:64] + 1) % 10)
    content = DIGITS.read_bytes()
    module = graphopt.to_torch(DIGITS)
    trained = {n for n, one in module.named_parameters() if n.endswith((".weight", ".bias")) and one.ndim > 1}
    for name, one in module.named_parameters():
        one.requires_grad_(name in trained)
    loss = torch.nn.functional.cross_entropy
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(loss(module(images)[0], labels))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]

    updated = graphopt.update_weights(DIGITS, module)
    before, after = constants_of(graphopt.load(DIGITS)), constants_of(updated)
    assert {name for name in before if not np.array_equal(before[name], after[name])} == trained
    graphopt.save(updated, tmp_path / "trained.onnx")
    assert_runs_as(module, graphopt.load(tmp_path / "trained.onnx"), {"image": images.numpy()})
    assert DIGITS.read_bytes() == content


def test_training_changes_neither_the_model_nor_another_module_of_it() -> None:
    model = model_of(LINEAR)
    before = constants_of(model)["w"].copy()
    model.graph.initializers["w"].const_value = ir.tensor(before.copy(), name="w")  # in memory that could be shared
    student, teacher = graphopt.to_torch(model), graphopt.to_torch(model)
    step(student.requires_grad_(True), torch.from_numpy(X))
    assert not torch.equal(student.w, teacher.w)
    updated = graphopt.update_weights(model, student)
    np.testing.assert_array_equal(constants_of(model)["w"], before)
    np.testing.assert_array_equal(teacher.w, before)
    np.testing.assert_array_equal(constants_of(updated)["w"], student.w.detach())


def test_nothing_trains_until_told() -> None:
    module = graphopt.to_torch(model_of(LINEAR), observe=["h"])
    assert not any(one.requires_grad for one in module.parameters())
    assert len(module(torch.from_numpy(X))) == 2
    assert len(graphopt.to_torch(model_of(LINEAR), observe="h")(torch.from_numpy(X))) == 2


@pytest.mark.parametrize(
    ("text", "feeds"),
    [
        (LINEAR, [{"x": X}]),
        (HALVES, [{"x": np.ones((2, 2), np.float16)}]),
        (BRANCHES, [{"up": np.array(up), "x": np.ones(2, np.float32)} for up in (True, False)]),
        (CALLS, [{"x": np.ones(2, np.float32)}]),
        (TIED, [{"ids": np.array([0, 2])}]),
        (CODES, [{"x": np.ones((1, 2), np.float32)}]),
    ],
    ids=["linear", "halves", "branches", "functions", "tied", "scales"],
)
def test_what_was_trained_is_stored_where_it_came_from(text: str, feeds: list[dict[str, Any]]) -> None:
    model = opened(text)
    module = graphopt.to_torch(model).requires_grad_(True)
    for feed in feeds:
        step(module, *map(torch.from_numpy, feed.values()))
    updated = graphopt.update_weights(model, module)
    before, after = constants_of(model), constants_of(updated)
    assert {name: (one.dtype, one.shape) for name, one in after.items()} == {
        name: (one.dtype, one.shape) for name, one in before.items()
    }
    floats = {name for name, one in before.items() if one.dtype.kind == "f"}
    assert floats
    assert {name for name in before if not np.array_equal(before[name], after[name])} == floats
    for feed in feeds:
        assert_runs_as(module, updated, feed)


@pytest.mark.parametrize("case", BOTH)
def test_a_number_that_is_a_weight_too_is_one_number(case: str) -> None:
    """What an operator knows as a number from the start would stay what it was."""
    model = model_of(BOTH[case])
    module = graphopt.to_torch(model)
    for one in module.parameters():
        one.data *= 1.5
    for number in (1, 3):
        assert_runs_as(module, graphopt.update_weights(model, module), {"x": np.full(3, number, np.float32)})


def test_weights_in_another_dtype_change_where_they_were_trained() -> None:
    model = model_of(LINEAR)
    module = graphopt.to_torch(model).to(torch.bfloat16)
    module.b.requires_grad_(True)
    step(module, torch.from_numpy(X).bfloat16())
    after = constants_of(graphopt.update_weights(model, module))
    assert module.w[0, 0] == 1, "bfloat16 has no number closer to 1.001"
    np.testing.assert_array_equal(after["w"], constants_of(model)["w"])
    np.testing.assert_array_equal(after["b"], module.b.detach().float())


def test_codes_may_be_set_within_their_range() -> None:
    model = opened(CODES)
    module = graphopt.to_torch(model)
    module.q[0, 0] = -8
    after = constants_of(graphopt.update_weights(model, module))
    np.testing.assert_array_equal(after["q"].astype(np.int8), [[-8, -2], [3, 7]])
    module.q[0, 0] = 8
    with pytest.raises(UsageError, match=r"`q` has codes of -2 to 8 in int4"):
        graphopt.update_weights(model, module)


def test_scales_of_integer_biases_stay_products_of_two() -> None:
    """A runtime computes with that product, whatever the model says: this once was off by a third of the outputs."""
    model = graphopt.optimize(
        DIGITS, "quant:mode=static", data=DIGITS.with_name("digits.npz"), timed=False, threads=1
    ).model
    bias = next(iter(bias_scales(model).values()))
    assert bias.factors is not None
    module = graphopt.to_torch(model)
    paths = module.meta["graphopt"].parameters
    scale, first, second = (module.get_parameter(paths[value.name]).data for value in (bias.scale, *bias.factors))
    second *= 1.25
    with pytest.raises(UsageError, match="no longer its input's scale times its weight's") as error:
        graphopt.update_weights(model, module)
    assert error.value.hint
    scale.copy_((first * second).reshape(scale.shape))
    graphopt.update_weights(model, module)


def test_sparse_weights_stay_sparse() -> None:
    model = model_of(LINEAR)
    value = model.graph.initializers["w"]
    value.const_value = SparselyStored(ir.tensor(np.eye(3, 2, dtype=np.float32), name="w"))
    module = graphopt.to_torch(model)
    module.w.data[0, 0] = 7
    stored = graphopt.update_weights(model, module).graph.initializers["w"].const_value
    assert isinstance(stored, SparselyStored)
    np.testing.assert_array_equal(stored.numpy(), [[7, 0], [0, 1], [0, 0]])


class Plus(torch.nn.Module):
    """A weight and what is trained beside it."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.more = torch.nn.Parameter(torch.zeros_like(like))

    def forward(self, weight: Any) -> Any:
        return weight + self.more


def test_parametrized_weights_are_stored_as_they_are_computed() -> None:
    model = model_of(LINEAR)
    module = graphopt.to_torch(model)
    plus = Plus(module.w)
    parametrize.register_parametrization(module, "w", plus)
    step(module, torch.from_numpy(X))
    assert plus.more.abs().min() > 0
    updated = graphopt.update_weights(model, module)
    np.testing.assert_array_equal(constants_of(updated)["w"], module.w.detach())
    assert_runs_as(module, updated, {"x": X})
    with pytest.raises(UsageError, match="no place for `parametrizations"):
        graphopt.update_weights(model, module.state_dict())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda module: torch.compile(module, backend="eager"),
        torch.optim.swa_utils.AveragedModel,
        torch.nn.DataParallel,
        lambda module: module.state_dict(),
    ],
    ids=["compiled", "averaged", "parallel", "state-dict"],
)
def test_wrapped_modules_and_state_dicts_do_as_well(wrap: Callable[[Any], Any]) -> None:
    model = model_of(LINEAR)
    module = graphopt.to_torch(model)
    module.w.data[0, 0] = 7
    assert constants_of(graphopt.update_weights(model, wrap(module)))["w"][0, 0] == 7


def test_a_constant_that_is_only_observed_is_none_too_many() -> None:
    text = "sized (float[N] x) => (float[N] y) <int64[1] s = {-1}> { y = Reshape(x, s) }"
    module = graphopt.to_torch(model_of(text), observe=["s"])
    assert "s" in module.state_dict()
    graphopt.update_weights(model_of(text), module)


def _resize(module: Any) -> None:
    module.w = torch.nn.Parameter(torch.zeros(2, 2))


def _fill(number: float) -> Callable[[Any], None]:
    return lambda module: module.w.data.fill_(number)


@pytest.mark.parametrize(
    ("text", "change", "message"),
    [
        (LINEAR, lambda module: delattr(module, "w"), "has no `w`, where weight `w` was"),
        (LINEAR, lambda module: module.register_parameter("lora", torch.nn.Parameter(torch.ones(1))), "`lora`"),
        (LINEAR, _resize, r"`w` is \[3, 2\] in the model and \[2, 2\]"),
        (LINEAR, lambda module: setattr(module.w, "data", module.w.int()), "float32 in the model and int32"),
        (LINEAR, lambda module: module.to("meta"), "device `meta`"),
        (LINEAR, _fill(float("nan")), "`w` is infinite or no number as float"),
        (HALVES, lambda module: module.float() and _fill(1e6)(module), "`w` is infinite or no number as float16"),
    ],
    ids=["missing", "added", "resized", "integers", "meta", "nan", "overflow"],
)
def test_weights_that_do_not_fit_are_refused(text: str, change: Callable[[Any], Any], message: str) -> None:
    model = opened(text)
    module = graphopt.to_torch(model)
    change(module)
    with pytest.raises(UsageError, match=message) as caught:
        graphopt.update_weights(model, module)
    assert caught.value.hint


def test_an_attribute_is_no_place_for_a_weight() -> None:
    model = model_of(FILLED)
    module = graphopt.to_torch(model)
    graphopt.update_weights(model, module)
    for one in module.parameters():
        one.data.fill_(4)
    with pytest.raises(UsageError, match="is no constant of the model"):
        graphopt.update_weights(model, module)


def test_what_has_no_weights_is_refused() -> None:
    with pytest.raises(UsageError, match="a `list` has no weights"):
        graphopt.update_weights(model_of(LINEAR), [torch.zeros(2)])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="has no `w`"):
        graphopt.update_weights(model_of(LINEAR), torch.nn.Sequential())


class Whole(torch.nn.Module):
    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body
        self.head = torch.nn.Linear(2, 2)


def _halved(module: Any) -> Any:
    prune.l1_unstructured(module, "w", amount=0.5)
    return module


@pytest.mark.parametrize(
    ("given", "message", "hint"),
    [
        (lambda _: torch.nn.Linear(2, 2), "no place for `weight` and 1 more", "that `graphopt.to_torch` made"),
        (Whole, r"no place for `body\.w` and", "its part `body` has the weights"),
        (lambda module: Whole(module).state_dict(), r"no place for `body\.w`", "its part `body` has the weights"),
        (_halved, "no place for `w_orig` and 1 more", "prune.remove"),
        (lambda module: {"w": module.w.numpy()}, "`w` is an array of NumPy", "from_numpy"),
    ],
    ids=["another", "around", "state-dict-around", "pruned", "numpy"],
)
def test_what_is_given_instead_is_told_what_to_give(given: Callable[[Any], Any], message: str, hint: str) -> None:
    model = model_of(LINEAR)
    with pytest.raises(UsageError, match=message) as caught:
        graphopt.update_weights(model, given(graphopt.to_torch(model)))
    assert hint in str(caught.value.hint)


def test_what_cannot_be_a_module_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="no value `z` to observe"):
        graphopt.to_torch(model_of(LINEAR), observe=["z"])
    with pytest.raises(BackendError, match="cannot compute"):
        graphopt.to_torch(model_of("odd (float[2] x) => (float[2] y) { y = own.Unknown(x) }"))
    with pytest.raises(UsageError, match="a model cannot be a `int`"):
        graphopt.to_torch(3)  # type: ignore[arg-type]
    monkeypatch.setattr(torch_backend, "_version", lambda: None)
    with pytest.raises(BackendError, match="PyTorch is not installed"):
        graphopt.to_torch(model_of(LINEAR))


@pytest.mark.parametrize("again", [lambda one: one, copy.deepcopy], ids=["itself", "copied"])
def test_modules_are_pickled_with_all_they_know(again: Callable[[Any], Any]) -> None:
    model = model_of(BRANCHES)
    module = graphopt.to_torch(model, observe=["y"])
    read = pickle.loads(pickle.dumps(again(module)))
    for up in (True, False):
        given = torch.tensor(up), torch.ones(2)
        assert all(map(torch.equal, read(*given), module(*given)))
    assert read.meta["graphopt"].parameters == module.meta["graphopt"].parameters
    assert read.meta["graphopt"].values["y"] in set(read.graph.nodes)
    assert [node.meta.get("onnx") for node in read.graph.nodes] == [
        node.meta.get("onnx") for node in module.graph.nodes
    ]
    next(read.parameters()).data.fill_(7)
    found = constants_of(graphopt.update_weights(model, read))
    assert sorted(one[0] for one in found.values()) in ([0.5, 7], [2, 7])


def test_sizes_that_are_constants_compile_whole_and_export() -> None:
    module, x = graphopt.to_torch(model_of(STATIC)), torch.arange(12.0).reshape(3, 4)
    wanted = module(x)[0]
    assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(x)[0], wanted)
    again = graphopt.from_torch(module.eval(), (x,), dynamic_shapes=({0: "rows"},))
    with torch.no_grad():
        wanted = module(x[:2])[0].numpy()
    found = run_in("torch", again, {"x": x[:2].numpy()})
    np.testing.assert_array_equal(found["y"], wanted)


def test_what_cannot_be_exported_again_has_another_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("Could not guard on data-dependent expression Eq(u0, 0)")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(ModelError, match="what `to_torch` made") as caught:
        graphopt.from_torch(graphopt.to_torch(model_of(COMPUTED)).eval(), (torch.ones(2, 3),))
    assert "update_weights" in (caught.value.hint or "")


def test_a_whole_module_goes_to_another_type() -> None:
    module, x = graphopt.to_torch(model_of(COMPUTED)), torch.ones(2, 3)
    wanted = module(x)[0]
    assert "1.0, 2.0" not in module.code, "of a weight whose shape is read no number is part of the code"
    narrow = module.to(torch.bfloat16)(x.bfloat16())[0]
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow.float(), wanted)


def test_modules_do_what_modules_of_torch_do() -> None:
    module, x = graphopt.to_torch(model_of(LINEAR)), torch.from_numpy(X)
    wanted = module(x)[0]
    state = {name: one.clone() for name, one in module.state_dict().items()}
    doubled = {name: 2 * one for name, one in module.named_parameters()}
    assert torch.equal(torch.func.functional_call(module, doubled, (x,))[0], 2 * wanted)
    assert torch.equal(torch.func.vmap(lambda row: module(row[None])[0][0])(x), wanted)
    other = graphopt.to_torch(model_of(LINEAR))
    other.w.data.zero_()
    assert other.load_state_dict(state).missing_keys == []
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(one[0], wanted) for one in pool.map(other.train(), [x] * 16))
