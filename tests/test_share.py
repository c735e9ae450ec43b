"""Sharing: what is equal in another layout, sign or scale is found, bit for bit, and nothing else is."""

from __future__ import annotations

import copy
import json
import runpy
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

import graphopt
from graphopt import provenance, walk
from graphopt.passes.analyses.equal_layers import equal_layers
from graphopt.passes.analyses.tensor_content import equal_tensors
from graphopt.passes.analyses.tensor_marks import alike
from graphopt.passes.analyses.tensor_symmetries import View, is_comparable, view_of
from graphopt.passes.exact.share import find_families
from graphopt.passes.exact.shared_listing import list_shared
from graphopt.shapes import infer_shapes
from graphopt.sparse import SparselyStored

from .command_line import run
from .pass_runs import loaded, run_passes

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY, WIDTH, LENGTH = 97, 16, 6
PLANTED = 200
MODELS = ("digits_resnet", "resnet20_cifar10", "gutenberg_llama_7m", "all-MiniLM-L6-v2")
LARGEST_COPIED = 2 << 20
ORDERS = ("share", "simplify,share", "share,simplify", "O2,share", "share,O2", "simplify,share,simplify")


@pytest.fixture(scope="module")
def planted() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "planted.py"), run_name="planted"))


def tensor(array: Any) -> ir.Tensor:
    return ir.tensor(np.ascontiguousarray(array))


def same_bytes(one: Any, other: Any) -> bool:
    return one.shape == other.shape and np.ascontiguousarray(one).tobytes() == np.ascontiguousarray(other).tobytes()


def assert_is_view(source: Any, wanted: Any) -> View:
    view = view_of(tensor(source), tensor(wanted))
    assert view is not None
    assert same_bytes(view.of(source), wanted), view
    assert alike([tensor(source), tensor(wanted)]) == [[0, 1]]
    return view


def assert_is_no_view(source: Any, wanted: Any) -> None:
    assert view_of(tensor(source), tensor(wanted)) is None


SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=5).map(tuple)


@given(SHAPES, st.randoms(use_true_random=False), st.sampled_from((np.float32, np.float64)))
def test_every_layout_sign_and_scale_is_found(shape: tuple[int, ...], random: Any, dtype: Any) -> None:
    rng = np.random.default_rng(random.randrange(1 << 30))
    source = rng.standard_normal(shape).astype(dtype)
    source[rng.random(shape) < rng.choice([0.0, 0.7])] = 0
    wanted = source
    if rng.random() < 0.7:
        wanted = wanted.transpose(rng.permutation(len(shape)))
    if rng.random() < 0.5:
        wanted = wanted.reshape((-1, int(rng.choice([one for one in range(1, 6) if source.size % one == 0]))))
    if rng.random() < 0.7:
        wanted = wanted * dtype(rng.choice([-1.0, 2.0, -0.25, 0.7, 3.0, 1e-3]))
    view = assert_is_view(source, wanted)
    assert view.steps <= 4


@given(SHAPES, st.randoms(use_true_random=False))
def test_reshape_before_a_transposition_is_found(shape: tuple[int, ...], random: Any) -> None:
    order = np.random.default_rng(random.randrange(1 << 30)).permutation(len(shape))
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + 1
    assert_is_view(array.reshape(-1), array.transpose(order))


@given(st.integers(0, 8 * 4 * 60 - 1))
def test_one_bit_is_enough(bit: int) -> None:
    """Of what differs by one bit from a transposition no view is claimed; one that were claimed would be exact."""
    source = np.random.default_rng(3).standard_normal((6, 10)).astype(np.float32)
    wanted = np.ascontiguousarray(source.T)
    wanted.reshape(-1).view(np.uint8)[bit // 8] ^= 1 << bit % 8
    assert_is_no_view(source, wanted)
    assert_is_no_view(source, -2 * wanted)


def test_one_bit_far_from_any_sample() -> None:
    source = np.random.default_rng(0).standard_normal((700, 900)).astype(np.float32)
    for place in range(0, source.size, 90_001):
        wanted = np.ascontiguousarray(source.T)
        wanted.reshape(-1).view(np.uint32)[place] ^= 1
        assert_is_no_view(source, wanted)
        assert_is_no_view(source, -wanted)
    assert_is_view(source, source.T)
    assert_is_view(source, source.T * np.float32(0.7))


def test_factor_that_is_rounded_is_found_and_not_undone() -> None:
    source = np.random.default_rng(1).standard_normal((40, 50)).astype(np.float32)
    for factor in (0.7, 3.0, -1 / 3, 1e-20, 123456.7):
        view = assert_is_view(source, source.T * np.float32(factor))
        assert view.factor == np.float32(factor)
    assert str(assert_is_view(source, source * np.float32(0.5))) == "times 0.5"


def test_zeros_keep_their_sign() -> None:
    source = np.random.default_rng(1).standard_normal((8, 8)).astype(np.float32)
    source[1, 1] = 0
    assert assert_is_view(source, -source).factor == -1
    wanted = -source
    wanted[1, 1] = 0  # and not −0
    assert_is_no_view(source, wanted)
    zeros = np.zeros((5, 40), np.float32)
    assert assert_is_view(zeros, zeros.T).factor == 1
    assert assert_is_view(zeros, -zeros).factor == -1


def test_nan_is_moved_and_never_computed() -> None:
    source = np.random.default_rng(1).standard_normal((8, 9)).astype(np.float32)
    source[2, 2], source[3, 3] = np.nan, np.inf
    assert_is_view(source, source.T)
    assert_is_no_view(source, -source)
    assert_is_no_view(source, 2 * source)
    other = source.copy()
    other.view(np.uint32)[2, 2] ^= 1  # another NaN
    assert_is_no_view(source, other.T)
    source[2, 2] = 1
    assert_is_view(source, -2 * source)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.bool_, np.float16, ml_dtypes.bfloat16])
def test_other_dtypes_are_moved(dtype: Any) -> None:
    source = np.random.default_rng(1).integers(0, 2 if dtype is np.bool_ else 99, (8, 9, 2)).astype(dtype)
    assert_is_view(source, source.transpose(2, 0, 1))
    assert_is_view(source, source.transpose(2, 0, 1).reshape(4, 36))
    other = source.copy()
    other[5, 5, 1] = not other[5, 5, 1]
    assert_is_no_view(source, other.transpose(2, 0, 1))


def test_pruned_weights_are_found_by_their_few_numbers() -> None:
    source = np.zeros((300, 500), np.float32)
    source[17, 4], source[200, 444] = 2.5, -7
    assert assert_is_view(source, source.T * np.float32(0.7)).factor == np.float32(0.7)


def test_crowds_are_told_apart() -> None:
    """Many tensors that begin and end alike: each is read once, and what belongs together stays together."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((12, 20)).astype(np.float32) for _ in range(30)]
    halves = [array.astype(np.float16) for array in arrays]
    for array in (*arrays, *halves):
        array[0, 0] = array[-1, -1] = 0
    found = alike([tensor(array) for array in arrays] + [tensor(-2 * array.T) for array in arrays])
    assert found == [[place, place + 30] for place in range(30)] or sorted(found) == [[i, i + 30] for i in range(30)]
    found = alike([tensor(array) for array in halves] + [tensor(-array.T) for array in halves])
    assert sorted(found) == [[place, place + 30] for place in range(30)]


def test_what_cannot_be_compared() -> None:
    assert not is_comparable(ir.StringTensor([b"a"], shape=ir.Shape([1])))
    assert not is_comparable(tensor(np.zeros((0, 4), np.float32)))
    assert not is_comparable(tensor(np.zeros(4, np.complex64)))
    assert not is_comparable(ir.tensor([1, 2, 3], dtype=ir.DataType.INT4))


def language_model(head: str, *, seed: int = 0) -> tuple[onnx.ModelProto, np.ndarray]:
    """Return a model as GPT-2 is, whose head holds a copy of the table, and the table."""
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((VOCABULARY, WIDTH)).astype(np.float32)
    ends = {
        "columns": "logits = MatMul(normed, head)",
        "rows": "turned = Transpose <perm = [1, 0]> (head)\n logits = MatMul(normed, turned)",
        "gemm": "flat = Reshape(normed, rows)\n long = Gemm <transB = 1> (flat, head)\n logits = Reshape(long, batch)",
        "gemm of columns": "flat = Reshape(normed, rows)\n long = Gemm(flat, head)\n logits = Reshape(long, batch)",
    }
    proto = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 18]>
        gpt (int64[1, {LENGTH}] ids) => (float[1, {LENGTH}, {VOCABULARY}] logits) {{
          x = Gather(table, ids)
          h = Add(x, places)
          up = MatMul(h, w1)
          act = Tanh(up)
          down = MatMul(act, w2)
          res = Add(h, down)
          normed = LayerNormalization <axis = -1> (res, gain, shift)
          {ends[head]}
        }}"""
    )
    weights = {
        "table": table,
        "head": np.ascontiguousarray(table.T if "columns" in head else table),
        "places": rng.standard_normal((LENGTH, WIDTH)).astype(np.float32),
        "w1": rng.standard_normal((WIDTH, 4 * WIDTH)).astype(np.float32),
        "w2": rng.standard_normal((4 * WIDTH, WIDTH)).astype(np.float32),
        "gain": np.ones(WIDTH, np.float32),
        "shift": np.zeros(WIDTH, np.float32),
        "rows": np.array([-1, WIDTH]),
        "batch": np.array([1, LENGTH, VOCABULARY]),
    }
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return proto, table


def optimized_outputs(proto: onnx.ModelProto) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(5).integers(0, VOCABULARY, (1, LENGTH))
    return np.asarray(session.run(None, {"ids": ids})[0])


@pytest.mark.parametrize("head", ["columns", "rows", "gemm", "gemm of columns"])
@pytest.mark.parametrize("passes", ORDERS)
def test_tied_embedding_is_restored_and_stays(head: str, passes: str) -> None:
    proto, table = language_model(head)
    result = run_passes(loaded(proto), passes)
    model = result.model
    held = [value for value in model.graph.initializers.values() if value.const_value.size == table.size]
    assert [same_bytes(value.const_value.numpy(), table) for value in held] == [True]
    again = ir.to_proto(model)
    assert sum(len(one.raw_data) for one in again.graph.initializer if list(one.dims) == [VOCABULARY, WIDTH]) == (
        table.nbytes
    )
    assert not run_passes(model, "share").edits
    if passes.endswith(("simplify", "O2")):
        assert not run_passes(model, passes.rpartition(",")[2]).edits
    if "O2" not in passes and "simplify" not in passes:
        assert same_bytes(optimized_outputs(proto), optimized_outputs(again))
    np.testing.assert_allclose(optimized_outputs(proto), optimized_outputs(again), rtol=1e-4, atol=1e-5)


def test_a_stable_pipeline_is_stable_after_one_round() -> None:
    proto, _ = language_model("columns")
    model = run_passes(loaded(proto), "share,simplify").model
    for passes in ("share,simplify", "simplify,share", "O2,share", "share,O2", "fold-constants", "hoist"):
        assert not run_passes(model, passes).edits or passes in ("O2,share", "share,O2")
    model = run_passes(model, "O2").model
    assert not run_passes(model, "share,O2").edits


def test_small_view_in_a_large_model_is_not_folded_back() -> None:
    """Folding may enlarge a file by a little, but not to store again what was shared."""
    proto = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 18]>
        g (float[8, 300] x, float[8, 8] t) => (float[8, 200] y, float[8, 8] z, float[8, 8] u) {
          y = MatMul(x, large)
          z = MatMul(small, t)
          turned = Transpose <perm = [1, 0]> (small)
          u = MatMul(t, turned)
        }"""
    )
    rng = np.random.default_rng(0)
    weights = {"large": (300, 200), "small": (8, 8)}
    for name, shape in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    result = run_passes(loaded(proto), "simplify")
    assert sorted(node.op_type for node in result.model.graph) == ["MatMul", "MatMul", "MatMul", "Transpose"]
    assert "not folded: 256 bytes would take the place of 64" in result.remarks


def test_written_file_is_smaller_by_the_copy(tmp_path: Path) -> None:
    proto, table = language_model("columns")
    onnx.save(
        copy.deepcopy(proto), tmp_path / "in.onnx", save_as_external_data=True, location="in.data", size_threshold=64,
    )  # fmt: skip
    result = graphopt.optimize(tmp_path / "in.onnx", "share", output=tmp_path / "out.onnx")
    assert result.report.ok
    written = onnx.load(tmp_path / "out.onnx")
    assert same_bytes(optimized_outputs(proto), optimized_outputs(written))
    before = sum(file.stat().st_size for file in tmp_path.glob("in*"))
    after = sum(file.stat().st_size for file in tmp_path.glob("out*"))
    assert before - after > 0.9 * table.nbytes


@pytest.mark.parametrize("name", MODELS)
def test_every_planted_copy_is_found(name: str, shared: Path, planted: SimpleNamespace) -> None:
    model = graphopt.load(shared / "assets" / "models" / f"{name}.onnx")
    provenance.stamp(model)
    own = sum(one.nbytes for one in walk.stored_tensors(model))
    copies = planted.plant(model, PLANTED, seed=len(name), largest=LARGEST_COPIED)
    model = run_passes(model, "share").model
    # What is left over is what the steps of views read: shapes, factors, and each reader's own number.
    assert sum(one.nbytes for one in walk.stored_tensors(model)) < own + 16 * PLANTED
    assert planted.what_they_hold(model, copies) == {name: one.digest for name, one in copies.items()}
    assert not run_passes(model, "share").edits
    stored = sum(one.nbytes for one in walk.stored_tensors(run_passes(model, "fold-constants,hoist").model))
    assert stored < own + 16 * PLANTED


@pytest.mark.parametrize("name", MODELS[:2])
def test_no_planted_copy_with_a_wrong_bit_is_merged(name: str, shared: Path, planted: SimpleNamespace) -> None:
    model = graphopt.load(shared / "assets" / "models" / f"{name}.onnx")
    provenance.stamp(model)
    copies = planted.plant(model, 2 * len(planted.KINDS), seed=1)
    rng = np.random.default_rng(0)
    for place, planted_name in enumerate(copies):
        value = model.graph.initializers[planted_name]
        array = value.const_value.numpy().copy()
        array.reshape(-1).view(np.uint32)[rng.integers(array.size)] ^= 1
        array.reshape(-1).view(np.uint32)[rng.integers(array.size)] ^= 2 << place % 20
        value.const_value = ir.tensor(array, name=planted_name)
    digests = {name: planted.digest(model.graph.initializers[name].const_value.numpy()) for name in copies}
    model = run_passes(model, "share").model
    assert planted.what_they_hold(model, copies) == digests
    assert set(copies) <= set(model.graph.initializers)


def test_large_tensors_made_at_writing_are_shared_too() -> None:
    """`simplify` turns a stored transposition into a tensor that is made when it is written."""
    proto, table = language_model("rows")
    head = next(one for one in proto.graph.initializer if one.name == "head")
    head.CopyFrom(numpy_helper.from_array(table * np.float32(2), "head"))
    model = run_passes(loaded(proto), "fold-constants:lazy=0").model
    assert len(find_families(model)) == 1
    model = run_passes(model, "share").model
    assert [node.op_type for node in model.graph if node.op_type in ("Transpose", "Mul")] == ["Transpose", "Mul"]


def test_what_is_to_be_written_sparsely_and_what_is_empty_is_left() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 18]>
        g (float[64, 1] x) => (float[64, 64] y, float[64, 64] z, float[0, 64] e, float[64, 0] f) {
          y = MatMul(x, a)
          z = MatMul(x, b)
          e = Abs(none)
          f = Abs(nothing)
        }"""
    )
    weight = np.zeros((1, 64), np.float32)
    weight[0, 5] = 1
    arrays = {"a": weight, "b": 2 * weight, "none": np.zeros((0, 64), "f"), "nothing": np.zeros((64, 0), "f")}
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    model = loaded(proto)
    assert run_passes(model.clone(), "share").edits
    b = model.graph.initializers["b"]
    b.const_value = SparselyStored(b.const_value)
    assert not run_passes(model, "share").edits


def albert(layers: int) -> onnx.ModelProto:
    """Return a model that goes through the same two layers again and again, each with weights of its own."""
    steps = "\n".join(
        f"a{i} = MatMul(h{i}, u{i})\n b{i} = Relu(a{i})\n h{i + 1} = MatMul(b{i}, d{i})" for i in range(layers)
    )
    proto = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 18]>
        g (float[3, 16] h0) => (float[3, 16] h{layers}) {{ {steps} }}"""
    )
    rng = np.random.default_rng(0)
    up, down = rng.standard_normal((16, 32)).astype(np.float32), rng.standard_normal((32, 16)).astype(np.float32)
    for place in range(layers):
        proto.graph.initializer.append(numpy_helper.from_array(up, f"u{place}"))
        proto.graph.initializer.append(numpy_helper.from_array(down, f"d{place}"))
    return proto


def test_equal_layers_are_reported_as_rows() -> None:
    result = run_passes(loaded(albert(3)), "share")
    assert len(result.model.graph.initializers) == 2
    [note] = [text for text in result.remarks if "layers hold" in text]
    assert note.startswith("4 layers hold the weights of others: ")
    assert "(2 layers)" in note
    runs = equal_layers(result.model)
    assert [(len(run.layers), run.bytes) for run in runs] == [(2, 4096), (2, 4096)]


def test_other_attributes_make_another_layer() -> None:
    text = """<ir_version: 9, opset_import: ["" : 18]>
    g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] z) {
      y = Conv <pads = [1, 1, 1, 1]> (x, w)
      z = Conv <pads = [2, 2, 2, 2], dilations = [2, 2]> (y, w)
    }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((4, 4, 3, 3), np.float32), "w"))
    assert not equal_layers(loaded(proto))


def listed(proto: onnx.ModelProto) -> Any:
    model = loaded(proto)
    infer_shapes(model)
    return list_shared(model)


def test_listing_names_what_is_stored_twice() -> None:
    proto, table = language_model("columns")
    proto.graph.output.append(onnx.helper.make_tensor_value_info("places_too", 1, [LENGTH, WIDTH]))
    places = next(one for one in proto.graph.initializer if one.name == "places")
    proto.graph.initializer.append(numpy_helper.from_array(-numpy_helper.to_array(places), "places_too"))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("places", 1, [LENGTH, WIDTH]))
    listing = listed(proto)
    assert listing.values["tensors"] == [
        {"name": "head", "same_as": "table", "how": "transposed", "bytes": table.nbytes, "stays": None},
        {
            "name": "places_too",
            "same_as": "places",
            "how": "negated",
            "bytes": 4 * LENGTH * WIDTH,
            "stays": "is an output",
        },
    ]
    assert listing.remarks == [
        "1 of 2 tensors need not be stored: `--passes share` saves 6.2 kB; `places_too` is an output"
    ]


def test_listing_of_layers_and_of_nothing() -> None:
    values = listed(albert(2)).values
    assert [one["how"] for one in values["tensors"]] == ["equal", "equal"]
    assert [len(one["names"]) for one in values["layers"]] == [2]
    nothing = listed(albert(1))
    assert nothing.values == {"tensors": [], "layers": []}
    assert nothing.remarks == ["no tensor holds the numbers of another one"]


def test_command_shows_what_is_shared(tmp_path: Path) -> None:
    proto, _ = language_model("columns")
    onnx.save(proto, tmp_path / "m.onnx")
    done = run("inspect", "--shared", str(tmp_path / "m.onnx"))
    assert done.code == 0
    assert "transposed" in done.out
    assert "1 of 1 tensors need not be stored" in done.out
    found = json.loads(run("inspect", "--shared", "--json", str(tmp_path / "m.onnx")).out)
    assert [one["how"] for one in found["tensors"]] == ["transposed"]
    assert run("inspect", "--shared", "--groups", str(tmp_path / "m.onnx")).code != 0


def test_tensors_of_equal_content_are_still_told_by_content() -> None:
    arrays: Sequence[Any] = [np.arange(9.0), np.arange(9.0), -np.arange(9.0)]
    assert equal_tensors([tensor(array) for array in arrays]) == [[0, 1]]
