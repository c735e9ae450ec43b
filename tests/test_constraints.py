"""What is held while a model trains: zeros, ties, tables, dtypes; and which constants train at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt import walk
from graphopt.errors import PassError, UsageError
from graphopt.passes.recovery.constraints.trainable import idle_matrices, refuse, trainables
from graphopt.passes.recovery.held import KINDS, Held
from graphopt.sparse import SparselyStored

from .pass_runs import loaded, run_passes

torch = pytest.importorskip("torch")

from .trained_models import ALL_BUT_ADAPTERS, constrained, difference, is_exact  # noqa: E402

RNG = np.random.default_rng(0)
# Sums of a few dozen products of numbers around 1 in float32; of half floats, rounded once more.
CLOSE, CLOSE_HALF = 1e-4, 0.1


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: Mapping[str, tuple[list[Any], int]],
    outputs: Mapping[str, int],
    constants: Mapping[str, np.ndarray],
    opset: int = 21,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, dtype, shape) for name, (shape, dtype) in inputs.items()],
        [helper.make_tensor_value_info(name, dtype, None) for name, dtype in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(0, 0.3, shape).astype(np.float32)


def pruned(array: np.ndarray, share: float) -> np.ndarray:
    out = array.copy()
    out[np.abs(out) < np.quantile(np.abs(out), share)] = 0
    return out


def two_of_four(array: np.ndarray) -> np.ndarray:
    groups = array.reshape(-1, 4).copy()
    np.put_along_axis(groups, np.argsort(np.abs(groups), axis=1)[:, :2], 0, axis=1)
    return groups.reshape(array.shape)


def perceptron(w: np.ndarray | None = None, dtype: Any = np.float32) -> onnx.ModelProto:
    """Return Gemm, Relu, MatMul, Add."""
    code = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    constants = {"w": normal(8, 16) if w is None else w, "b": normal(8), "v": normal(8, 4), "c": normal(4)}
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], "fc", transB=1),
        helper.make_node("Relu", ["h"], ["r"], "relu"),
        helper.make_node("MatMul", ["r", "v"], ["m"], "out"),
        helper.make_node("Add", ["m", "c"], ["y"], "add"),
    ]
    typed = {name: array.astype(dtype) for name, array in constants.items()}
    return model_of(nodes, {"x": (["N", 16], code)}, {"y": code}, typed)


FEED = {"x": RNG.normal(0, 1, (12, 16)).astype(np.float32)}


def kinds_of(proto: onnx.ModelProto) -> dict[str, str]:
    return {one.name: one.kind for one in trainables(loaded(proto), Held(train=ALL_BUT_ADAPTERS))}


# Which constants train


def test_layers_give_weights_and_biases() -> None:
    assert kinds_of(perceptron()) == {"w": "weights", "b": "biases", "v": "weights", "c": "biases"}


def test_a_transformer_block_trains_but_for_what_nobody_learnt() -> None:
    constants = {
        "table": normal(20, 8),
        "places": normal(6, 8),
        "gamma": normal(8),
        "beta": normal(8),
        "root": np.array(0.35, np.float32),
        "mask": np.triu(np.full((6, 6), -3e38, np.float32), 1),
        "soft": np.triu(np.full((6, 6), -100, np.float32), 1),
        "cos": np.cos(np.arange(6)[:, None] * np.ones((1, 8))).astype(np.float32),
        "frequencies": (0.1 ** np.arange(4)).astype(np.float32),
        "positions": np.arange(6, dtype=np.float32)[:, None],
        "epsilon": np.array([1e-5], np.float32),
        "scale": normal(8),
        "wq": normal(8, 8),
    }
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"], "embed"),
        helper.make_node("Add", ["e", "places"], ["p"], "at"),
        helper.make_node("LayerNormalization", ["p", "gamma", "beta"], ["n"], "norm"),
        helper.make_node("MatMul", ["n", "wq"], ["q"], "query"),
        helper.make_node("Mul", ["q", "cos"], ["rotated"], "rotate"),
        helper.make_node("Mul", ["positions", "frequencies"], ["angles"], "angles"),
        helper.make_node("Sin", ["angles"], ["waves"], "sin"),
        helper.make_node("ReduceSum", ["waves"], ["wave"], "wave", keepdims=0),
        helper.make_node("Transpose", ["n"], ["nt"], "turn", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["rotated", "nt"], ["s"], "scores"),
        helper.make_node("Mul", ["s", "root"], ["sr"], "rooted"),
        helper.make_node("Add", ["sr", "mask"], ["sm"], "masked"),
        helper.make_node("Add", ["sm", "soft"], ["ss"], "masked_softly"),
        helper.make_node("Softmax", ["ss"], ["a"], "softmax"),
        helper.make_node("MatMul", ["a", "n"], ["v"], "values"),
        helper.make_node("Mul", ["v", "scale"], ["vs"], "layer_scale"),
        helper.make_node("Add", ["vs", "wave"], ["vw"], "waved"),
        helper.make_node("Add", ["vw", "epsilon"], ["y"], "eps"),
    ]
    proto = model_of(nodes, {"ids": (["N", 6], TensorProto.INT64)}, {"y": TensorProto.FLOAT}, constants)
    assert kinds_of(proto) == {
        "table": "weights",
        "places": "weights",
        "gamma": "norms",
        "beta": "norms",
        "wq": "weights",
        "scale": "norms",
    }
    assert {value.name for value in idle_matrices(loaded(proto))} == {"mask", "soft", "cos"}


def test_places_and_strides_are_held_and_a_class_token_is_not() -> None:
    constants = {
        "token": normal(1, 1, 8),
        "padding": np.zeros((1, 1, 8), np.float32),
        "anchors": np.stack(np.meshgrid(np.arange(8), np.arange(8)))[:, :1].reshape(2, 8)[:, :8].astype(np.float32)
        + 0.5,
        "strides": np.repeat([8.0, 16.0], 4).astype(np.float32),
        "w": normal(8, 8),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], "product"),
        helper.make_node("Concat", ["token", "m", "padding"], ["c"], "beside", axis=1),
        helper.make_node("Slice", ["c", "from", "to", "axis"], ["two"], "two"),
        helper.make_node("Add", ["two", "anchors"], ["placed"], "place"),
        helper.make_node("Mul", ["placed", "strides"], ["y"], "stretch"),
    ]
    constants |= {name: np.array([number]) for name, number in (("from", 0), ("to", 2), ("axis", 1))}
    proto = model_of(nodes, {"x": ([1, 4, 8], TensorProto.FLOAT)}, {"y": TensorProto.FLOAT}, constants)
    assert kinds_of(proto) == {"token": "weights", "w": "weights"}


def test_running_statistics_and_what_normalizes_the_input_are_held() -> None:
    constants = {"mean": normal(1, 3, 1, 1), "std": normal(1, 3, 1, 1), "w": normal(4, 3, 1, 1)}
    constants |= {name: np.abs(normal(4)) for name in ("s", "t", "m", "v")}
    nodes = [
        helper.make_node("Sub", ["x", "mean"], ["a"]),
        helper.make_node("Div", ["a", "std"], ["b"]),
        helper.make_node("Conv", ["b", "w"], ["c"]),
        helper.make_node("BatchNormalization", ["c", "s", "t", "m", "v"], ["y"]),
    ]
    proto = model_of(nodes, {"x": (["N", 3, 4, 4], TensorProto.FLOAT)}, {"y": TensorProto.FLOAT}, constants)
    assert kinds_of(proto) == {"w": "weights", "s": "norms", "t": "norms"}


def test_options_choose() -> None:
    model = loaded(perceptron())
    chosen = [one.name for one in trainables(model, Held(train=("weights",)))]
    assert chosen == ["w", "v"]
    assert [one.name for one in trainables(model, Held(include=("fc",)))] == ["w", "b"]
    assert [one.name for one in trainables(model, Held(exclude=("MatMul",)))] == ["w", "b", "c"]
    refuse(model, Held())


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"train": ("wieghts",)}, "did you mean `weights`"),
        ({"train": ()}, "any of"),
        ({"train": ("weights", "adapters")}, "one of the two"),
    ],
)
def test_words_that_train_does_not_know_are_refused(options: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError) as caught:
        Held(**options).check_held()
    assert what in (caught.value.hint or "")


def test_every_word_of_train_is_explained() -> None:
    Held(train=tuple(word for word in KINDS if word != "adapters")).check_held()
    assert all(KINDS.values())


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(PassError, match="nothing to train: no norms"):
        refuse(loaded(perceptron()), Held(train=("norms",)))
    with pytest.raises(UsageError, match="matches no node"):
        refuse(loaded(perceptron()), Held(include=("fd",)))


def test_operators_on_integers_are_refused_by_name() -> None:
    constants = {"w": RNG.integers(-9, 9, (16, 4)).astype(np.int8)}
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], "quantize"),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["y"], "product"),
    ]
    proto = model_of(nodes, {"x": (["N", 16], TensorProto.FLOAT)}, {"y": TensorProto.INT32}, constants)
    with pytest.raises(PassError, match="`quantize`, `product` compute on integers") as caught:
        refuse(loaded(proto), Held())
    assert "float model" in (caught.value.hint or "")


# Zeros


@pytest.mark.parametrize(
    ("make", "pattern"), [(lambda w: pruned(w, 0.8), None), (two_of_four, "2:4")], ids=["unstructured", "2of4"]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
def test_zeros_stay_exactly_zero(make: Any, pattern: str | None, dtype: Any) -> None:
    w = make(normal(8, 16))
    trained = constrained(perceptron(w, dtype))
    trained.train({"x": FEED["x"].astype(dtype)})
    trained.constrained.check()
    now = trained.array("w")
    zeros = w.astype(dtype) == 0
    assert now.dtype == np.dtype(dtype)
    assert (now[zeros] == 0).all()
    assert not np.signbit(now[zeros].astype(np.float32)).any()
    assert (now[~zeros] != w.astype(dtype)[~zeros]).mean() > 0.9
    text = " ".join(trained.constrained.describe())
    assert "zeros held in 1 weight," in text
    assert (pattern is None) == ("pattern" not in text)


def test_zeros_may_be_set_free() -> None:
    w = pruned(normal(8, 16), 0.5)
    trained = constrained(perceptron(w), zeros="free")
    # So many samples that no Relu is silent for all: weights before such a one get no gradient.
    trained.train({"x": RNG.normal(0, 1, (200, 16)).astype(np.float32)})
    assert (trained.array("w") != 0).all()


def test_what_is_written_computes_what_was_trained() -> None:
    trained = constrained(perceptron(pruned(normal(8, 16), 0.5)))
    before = trained.outputs(FEED)[0]
    trained.train(FEED)
    assert np.abs(trained.outputs(FEED)[0] - before).max() > 0.01
    assert difference(trained, FEED) < CLOSE
    assert sorted(name for name, _ in trained.constrained.stored()) == ["b", "c", "v", "w"]


def test_nothing_is_written_before_a_step() -> None:
    assert list(constrained(perceptron()).constrained.stored()) == []


def test_the_model_itself_is_not_written_to() -> None:
    proto = perceptron()
    trained = constrained(proto)
    trained.train(FEED)
    for tensor in proto.graph.initializer:
        kept = trained.model.graph.initializers[tensor.name].const_value
        assert kept is not None
        np.testing.assert_array_equal(kept.numpy(), numpy_helper.to_array(tensor))


def test_half_floats_train_in_float32_and_are_stored_as_they_were() -> None:
    trained = constrained(perceptron(dtype=np.float16))
    assert {tensor.dtype for one in trained.constrained.parameters() for tensor in one.tensors} == {torch.float32}
    feed = {"x": FEED["x"].astype(np.float16)}
    trained.train(feed)
    assert trained.array("w").dtype == np.float16
    assert difference(trained, feed) < CLOSE_HALF
    assert is_exact(trained, feed)


def test_sparse_initializers_stay_sparse() -> None:
    model = loaded(perceptron(pruned(normal(8, 16), 0.9)))
    value = model.graph.initializers["w"]
    assert value.const_value is not None
    value.const_value = SparselyStored(value.const_value)
    trained = constrained(model)
    trained.train(FEED)
    written = trained.written().graph.initializers["w"].const_value
    assert isinstance(written, SparselyStored)
    assert np.count_nonzero(written.numpy()) <= round(0.1 * 8 * 16) + 1


# Ties, tables, adapters


def test_a_tied_weight_is_one_parameter() -> None:
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"], "embed"),
        helper.make_node("Transpose", ["table"], ["t"], "turn", perm=[1, 0]),
        helper.make_node("MatMul", ["e", "t"], ["y"], "logits"),
    ]
    constants = {"table": normal(10, 8)}
    proto = model_of(nodes, {"ids": (["N", 3], TensorProto.INT64)}, {"y": TensorProto.FLOAT}, constants)
    trained = constrained(proto)
    assert [one.names for one in trained.constrained.parameters()] == [("table",)]
    feed = {"ids": RNG.integers(0, 10, (4, 3))}
    trained.train(feed)
    assert difference(trained, feed) < CLOSE
    assert len(trained.written().graph.initializers) == 1


def coded(pass_name: str) -> ir.Model:
    """Return a perceptron whose weights are stored as codes."""
    proto = perceptron()
    wide = {"w": normal(64, 64), "b": normal(64), "v": normal(64, 32), "c": normal(32)}
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in wide.items())
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 64
    return run_passes(loaded(proto), pass_name).model


@pytest.mark.parametrize(
    ("name", "tables"),
    [("cluster:solver=kmeans:bits=4", True), ("codebook:format=nf4", False), ("logarithmic:bits=4", False)],
)
def test_codes_stay_codes_and_only_tables_that_were_found_train(name: str, tables: bool) -> None:
    model = coded(name)
    trained = constrained(model)
    groups = {one.name: one.names for one in trained.constrained.parameters()}
    assert ("tables" in groups) == tables
    assert "scales" in groups
    feed = {"x": RNG.normal(0, 1, (12, 64)).astype(np.float32)}
    trained.train(feed)
    trained.constrained.check()
    written = trained.written()
    for value, after in zip(walk.initializers(model), walk.initializers(written), strict=True):
        assert value.const_value is not None
        assert after.const_value is not None
        if not value.const_value.dtype.is_floating_point():
            np.testing.assert_array_equal(value.const_value.numpy(), after.const_value.numpy())
    assert difference(trained, feed) < 10 * CLOSE
    assert is_exact(trained, feed)


def test_adapters_are_merged_and_zeros_stay() -> None:
    w = pruned(normal(8, 16), 0.5)
    trained = constrained(perceptron(w), train=("adapters",), adapter_rank=2)
    (group,) = trained.constrained.parameters()
    assert group.names == ("w.A", "w.B", "v.A", "v.B")
    assert [tuple(one.shape) for one in group.tensors] == [(2, 16), (8, 2), (2, 4), (8, 2)]
    trained.train(FEED)
    change = trained.array("v") - trained.model.graph.initializers["v"].const_value.numpy()  # type: ignore[union-attr]
    assert np.linalg.matrix_rank(change, tol=1e-5) == 2
    assert (trained.array("w")[w == 0] == 0).all()
    assert sorted(name for name, _ in trained.constrained.stored()) == ["v", "w"]
    assert difference(trained, FEED) < CLOSE


def test_adapters_begin_alike_in_every_run() -> None:
    first, second = (constrained(perceptron(), train=("adapters",)).constrained.parameters() for _ in range(2))
    for a, b in zip(first[0].tensors, second[0].tensors, strict=True):
        assert torch.equal(a, b)


# A constraint that breaks is seen


def test_a_broken_mask_is_caught() -> None:
    trained = constrained(perceptron(pruned(normal(8, 16), 0.5)))
    trained.train(FEED)
    mask = next(buffer for name, buffer in trained.module.named_buffers() if name.endswith("kept"))
    mask.fill_(True)
    with torch.no_grad():
        for parameter in trained.module.parameters():
            parameter.add_(0.5)
    with pytest.raises(PassError, match="`w` has numbers where there were zeros") as caught:
        trained.constrained.check()
    assert caught.value.hint


def test_weights_that_are_no_numbers_are_caught() -> None:
    trained = constrained(perceptron())
    with torch.no_grad():
        trained.constrained.weights()["v"][0, 0] = float("nan")
    with pytest.raises(PassError, match="`v` infinite or no number"):
        trained.constrained.check()


def test_floats_too_large_for_what_stores_them_are_caught() -> None:
    trained = constrained(perceptron(dtype=np.float16))
    with torch.no_grad():
        trained.constrained.weights()["v"][0, 0] = 1e6
    with pytest.raises(PassError, match="`v` infinite or no number"):
        trained.constrained.check()


def test_a_state_dict_holds_all_that_trains_and_no_masks() -> None:
    proto = perceptron(pruned(normal(8, 16), 0.5))
    trained, other = constrained(proto), constrained(proto)
    trained.train(FEED)
    state = trained.module.state_dict()
    assert not any(name.endswith("kept") for name in state)
    other.module.load_state_dict(state)
    np.testing.assert_array_equal(other.array("w"), trained.array("w"))
