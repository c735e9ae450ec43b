"""Clustered weights: what is stored against what the solver found, every layout and reader, bad input, real models."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.checker
import onnx_ir as ir
import pytest

import graphopt
from graphopt import registry, walk
from graphopt.errors import PassError, UsageError
from graphopt.passes.lossy.cluster import Cluster
from graphopt.passes.lossy.weight_codes import WeightCodes, steps_of
from graphopt.pipeline import Pipeline

from .test_cast import parsed, run, sqnr
from .test_codebook import EMBEDDING, enlarged, notes
from .test_prune import layered

ort = pytest.importorskip("onnxruntime")

MODELS = Path(__file__).parents[1] / "models"
RNG = np.random.default_rng(0)
# One layer of each kind, its sizes odd, so that neither codes nor vectors end where rows do.
LAYERS = {
    "Conv": ("(float[1,7,5,5] x, float[13,7,3,3] w) => (float[1,13,3,3] y) { y = Conv(x, w) }", [13, 7, 3, 3]),
    "Depthwise": (
        "(float[1,13,5,5] x, float[13,1,3,3] w) => (float[1,13,3,3] y) { y = Conv<group=13>(x, w) }",
        [13, 1, 3, 3],
    ),
    "ConvTranspose": (
        "(float[1,7,5,5] x, float[7,13,3,3] w) => (float[1,13,7,7] y) { y = ConvTranspose(x, w) }",
        [7, 13, 3, 3],
    ),
    "Gemm": ("(float[2,21] x, float[15,21] w) => (float[2,15] y) { y = Gemm<transB=1>(x, w) }", [15, 21]),
    "MatMul": ("(float[2,3,21] x, float[21,15] w) => (float[2,3,15] y) { y = MatMul(x, w) }", [21, 15]),
    "LeftMatMul": ("(float[21,3] x, float[15,21] w) => (float[15,3] y) { y = MatMul(w, x) }", [15, 21]),
}


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let weights be clustered also where that makes no file smaller."""
    monkeypatch.setattr("graphopt.passes.lossy.coded_layers._pays", lambda *_: True)


def layer_of(op: str) -> ir.Model:
    """Return a model of one layer."""
    text, shape = LAYERS[op]
    return parsed(f" f {text}", w=RNG.standard_normal(shape))


def inputs_of(model: ir.Model) -> dict[str, Any]:
    """Return random numbers for the inputs of a model, 2 for each size that is not said."""
    return {
        value.name: RNG.standard_normal([dim if isinstance(dim, int) else 2 for dim in value.shape]).astype(np.float32)
        for value in model.graph.inputs
    }


def in_memory(model: ir.Model, spec: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[ir.Model, ir.Model]:
    """Return a model with clustered weights as codes, and one with the same weights as floats."""
    kept: dict[str, Any] = {}

    def remember(self: Any, layer: Any, codes: WeightCodes) -> None:
        kept[layer.weight.name] = layer.in_layout(codes.values())
        lower(self, layer, codes)

    from graphopt.passes.lossy.coded_weights import CodedWeights

    lower = CodedWeights.lower
    monkeypatch.setattr(CodedWeights, "lower", remember)
    coded = graphopt.optimize(model, spec, threads=1, **options).model
    floats = graphopt.optimize(model, "simplify", threads=1).model
    for name, values in kept.items():
        value = floats.graph.initializers[name]
        value.const_value = ir.tensor(values, name=name)
    assert kept
    return coded, floats


SPECS = [
    "cluster:block=none:bits=7",
    "cluster:block=8:bits=5",
    "cluster:granularity=channel",
    "cluster:granularity=6:bits=3:block=4",
    "cluster:outliers=0.02:block=0",
    "cluster:vector=2:block=0",
    "cluster:vector=4:bits=6:outliers=0.01",
    "cluster:vector=2:granularity=8:block=none:outliers=0.01",
]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    ("op", "spec"),
    [
        *(("Conv", f"cluster:bits={bits}") for bits in range(1, 8)),
        *(pair for place, pair in enumerate(itertools.product(LAYERS, SPECS)) if place % 3 != 1),
    ],
)
def test_what_is_stored_is_what_was_found(op: str, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = layer_of(op)
    coded, floats = in_memory(model, f"{spec}:solver=kmeans", monkeypatch)
    feed = inputs_of(model)
    (got,), (want,) = run(coded, **feed), run(floats, **feed)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-3 * np.abs(want).max())


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("opset", "spec"), list(zip((11, 13, 17, 21, 13), SPECS[-5:], strict=True)))
def test_decodes_at_any_opset(opset: int, spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"""<ir_version: 8, opset_import: ["": {opset}]>
    f (float[2, 21] x, float[21, 15] w) => (float[2, 15] y) {{ y = MatMul(x, w) }}"""
    model = parsed(text, w=RNG.standard_normal((21, 15)))
    coded, floats = in_memory(model, f"{spec}:solver=kmeans", monkeypatch)
    graphopt.save(coded, tmp_path / "out.onnx")
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)
    feed = inputs_of(model)
    np.testing.assert_allclose(run(coded, **feed)[0], run(floats, **feed)[0], rtol=1e-3, atol=2e-2)


def test_canonical_form_does_not_undo_it(tmp_path: Path) -> None:
    before = graphopt.optimize(
        enlarged("Conv"), "cluster:granularity=channel:bits=3:solver=kmeans", output=tmp_path / "a.onnx"
    )
    after = graphopt.optimize(before.model, "simplify", output=tmp_path / "b.onnx")
    ops = [node.op_type for node in after.model.graph]
    assert ops.count("Gather") >= 3, "canonical form has undone it"
    assert (tmp_path / "b.onnx").stat().st_size < 1.02 * (tmp_path / "a.onnx").stat().st_size


def test_the_report_says_what_the_file_takes(tmp_path: Path) -> None:
    model = enlarged("Conv")
    result = graphopt.optimize(model, "cluster:outliers=0.01", output=tmp_path / "out.onnx", threads=1)
    facts = next(note.facts for note in result.report.steps[-1].notes if "parts" in note.facts)
    assert facts["parts"]["codes"] == 64 * 30 * 9 // 2
    assert facts["parts"]["tables"] == 16 * 4
    assert facts["code_bytes"] == sum(facts["parts"].values())
    size = (tmp_path / "out.onnx").stat().st_size
    assert facts["code_bytes"] + facts["graph_bytes"] == pytest.approx(size, abs=400)


def test_steps_reach_every_place() -> None:
    positions = np.sort(RNG.choice(20_000, 40, replace=False))
    at = np.cumsum(steps_of(positions), dtype=np.int64)
    assert set(positions) <= set(at)
    assert len(set(at)) == len(at), "a place twice would be written in no order"
    assert steps_of(np.array([0, 255, 511])).tolist() == [0, 255, 255, 1]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_rows_are_looked_up_in_codes(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = " f (int64[B, S] ids, float[50, 13] table) => (float[B, S, 13] y) { y = Gather(table, ids) }"
    model = parsed(text, table=RNG.standard_normal((50, 13)))
    coded, floats = in_memory(model, f"cluster:bits={bits}", monkeypatch)
    assert not any(node.op_type == "Mul" and node.outputs[0].shape == (50, 13) for node in coded.graph)
    for ids in (RNG.integers(-50, 50, (3, 4)), np.zeros((0, 4), np.int64)):
        np.testing.assert_allclose(run(coded, ids=ids)[0], run(floats, ids=ids)[0], rtol=1e-5, atol=1e-6)


def test_outliers_of_a_table_are_decoded_with_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = parsed(EMBEDDING, table=RNG.standard_t(2, (200, 50)))
    coded, floats = in_memory(model, "cluster:outliers=0.02", monkeypatch)
    ids = np.arange(12).reshape(3, 4)
    np.testing.assert_allclose(run(coded, ids=ids)[0], run(floats, ids=ids)[0], rtol=1e-5, atol=1e-6)


def test_a_tied_table_is_stored_once() -> None:
    text = """ f (int64[S] ids, float[200, 50] table) => (float[S, 200] y)
    { e = Gather(table, ids)  r = Relu(e)  y = Gemm<transB = 1>(r, table) }"""
    model = parsed(text, table=RNG.standard_normal((200, 50)))
    result = graphopt.optimize(model, "cluster", threads=1)
    assert sum(name.endswith("_codes") for name in result.model.graph.initializers) == 1
    ids = np.arange(7)
    assert sqnr(run(model, ids=ids)[0], run(result.model, ids=ids)[0]) > 15


def test_zeros_stay_zero() -> None:
    """Pruned weights: behind `prune`, every zero is still one, in the weight that the runtime decodes."""
    model = parsed(
        " f (float[N, 128] x, float[128, 64] w) => (float[N, 64] y) { y = MatMul(x, w) }",
        w=RNG.standard_normal((128, 64)),
    )
    x = RNG.standard_normal((200, 128)).astype(np.float32)
    pruned = graphopt.optimize(model, "prune", data={"x": x}, threads=1).model
    zeros = pruned.graph.initializers["w"].const_value.numpy() == 0
    both = graphopt.optimize(model, "prune,cluster", data={"x": x}, threads=1).model
    found = run(both, x=np.eye(128, dtype=np.float32))[0]
    assert (found[zeros] == 0).all()
    assert (found[~zeros] != 0).mean() > 0.9


def test_data_make_the_layers_output_better() -> None:
    model = parsed(
        " f (float[N, 128] x, float[128, 64] w) => (float[N, 64] y) { y = MatMul(x, w) }",
        w=RNG.standard_normal((128, 64)),
    )
    x = (RNG.standard_normal((400, 16)) @ RNG.standard_normal((16, 128))).astype(np.float32)
    (want,) = run(model, x=x)
    found = {
        solver: sqnr(
            want, run(graphopt.optimize(model, f"cluster:solver={solver}", data=data, threads=1).model, x=x)[0]
        )
        for solver, data in (("kmeans", None), ("auto", {"x": x}))
    }
    assert found["auto"] > found["kmeans"] + 3


def test_bad_input() -> None:
    with pytest.raises(UsageError, match="`granularity` cannot be `some`"):
        graphopt.optimize(enlarged("Gemm"), "cluster:granularity=some")
    with pytest.raises(UsageError, match="`granularity` cannot be `0`"):
        graphopt.optimize(enlarged("Gemm"), "cluster:granularity=0")
    with pytest.raises(UsageError, match="matches no node"):
        graphopt.optimize(enlarged("Gemm"), "cluster:include=nothing*")
    broken = enlarged("Gemm")
    array = broken.graph.initializers["w"].const_value.numpy().copy()
    array[0, 0] = np.nan
    broken.graph.initializers["w"].const_value = ir.tensor(array, name="w")
    with pytest.raises(PassError, match="`w` holds NaN"):
        graphopt.optimize(broken, "cluster")
    coded = graphopt.optimize(enlarged("Gemm"), "cluster").model
    with pytest.raises(PassError, match="already quantized"):
        graphopt.optimize(coded, "cluster")
    assert "no weight is smaller" in notes(graphopt.optimize(layered("Gemm"), "cluster"))
    left = graphopt.optimize(enlarged("Gemm"), "cluster:exclude=Gemm")
    assert not any(node.op_type == "Cast" for node in walk.every_node(left.model))
    old = parsed(
        """<ir_version: 8, opset_import: ["": 10]>
    f (float[2, 64] x, float[64, 64] w) => (float[2, 64] y) { y = MatMul(x, w) }""",
        w=RNG.standard_normal((64, 64)),
    )
    with pytest.raises(PassError, match="needs opset 11") as caught:
        graphopt.optimize(old, "cluster:outliers=0.01")
    assert "opset:to=11" in (caught.value.hint or "")


def network() -> ir.Model:
    """Return three convolutions that all take codes, the last of which is followed by a product."""
    text = """ f (float[N,8,6,6] x, float[16,8,3,3] w1, float[16] b1, float[16,16,3,3] w2, float[24,16,1,1] w3,
       float[24,10] w4) => (float[N,10] y) {
      a = Conv<pads=[1,1,1,1]>(x, w1, b1)
      b = Relu(a)
      c = Conv<pads=[1,1,1,1]>(b, w2)
      d = Relu(c)
      e = Conv(d, w3)
      f = Relu(e)
      g = GlobalAveragePool(f)
      h = Flatten(g)
      y = MatMul(h, w4)
    }"""
    shapes = {"w1": (16, 8, 3, 3), "b1": 16, "w2": (16, 16, 3, 3), "w3": (24, 16, 1, 1), "w4": (24, 10)}
    return parsed(text, **{name: RNG.standard_normal(shape) for name, shape in shapes.items()})


IMAGES = {"x": RNG.standard_normal((64, 8, 6, 6)).astype(np.float32)}


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    ("options", "target"),
    [
        ("", "ort-cpu-x86"),
        (":block=0", "ort-cpu-x86-avx2"),
        (":block=0", "ort-cpu-x86"),
        (":outliers=0.02:block=8", "ort-cpu-x86"),
        (":granularity=channel", "ort-cpu-x86"),
        (":block=none:bits=3", "ort-cpu-x86"),
        (":granularity=5:vector=2:block=none", "ort-cpu-x86"),
    ],
)
def test_quantized_weights_are_made_of_the_same_codes(options: str, target: str) -> None:
    model = network()
    spec = f"cluster{options}:solver=kmeans"
    clustered = graphopt.optimize(model, spec, data=IMAGES, threads=1, target=target).model
    result = graphopt.optimize(model, f"{spec},quant:mode=static", data=IMAGES, threads=1, target=target)
    assert "4 weights are made of their codes as before, now as integers" in notes(result)
    stored = result.model.graph.initializers.values()
    for name in ("w1", "w2", "w3", "w4"):
        kept = [value for value in stored if value.name.startswith(f"{name}_codes")]
        assert kept, f"the codes of {name} are gone"
    # No weight is stored a second time.
    largest = max(value.const_value.nbytes for value in stored if not value.name.startswith("codes_in_byte"))
    assert largest <= 16 * 16 * 9 // 2
    (before,), (after,) = run(clustered, **IMAGES), run(result.model, **IMAGES)
    assert sqnr(before, after) > 20


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    "passes", ["cluster:solver=kmeans", "cluster:solver=kmeans:block=0", "codebook:solver=rtn:block=16"]
)
def test_the_runtime_computes_on_the_integers_of_codes(passes: str, tmp_path: Path) -> None:
    spec = f"{passes},quant:mode=static"
    graphopt.optimize(network(), spec, data=IMAGES, threads=1, output=tmp_path / "q.onnx", target="ort-cpu-x86")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "ran.onnx")
    ort.InferenceSession(str(tmp_path / "q.onnx"), options, providers=["CPUExecutionProvider"])
    ran = Counter(node.op_type for node in onnx.load(tmp_path / "ran.onnx").graph.node)
    assert ran["QLinearConv"] == 3
    assert not ran["Gather"], "codes would be decoded at each run"
    assert not ran["Conv"]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    ("passes", "why"),
    [
        ("cluster,quant:mode=dynamic", "only `mode=static` computes on them"),
        ("cluster,quant:mode=weights", "only `mode=static` computes on them"),
    ],
)
def test_other_modes_leave_codes_in_float(passes: str, why: str) -> None:
    model = network()
    result = graphopt.optimize(model, passes, data=IMAGES, threads=1, target="ort-cpu-x86")
    assert why in notes(result)
    assert sqnr(run(model, **IMAGES)[0], run(result.model, **IMAGES)[0]) > 5
    assert not any(value.name.endswith("_floats") for value in result.model.graph.initializers.values())


@pytest.mark.usefixtures("eager")
def test_excluded_layers_go_on_reading_floats() -> None:
    model = network()
    spec = "cluster:solver=kmeans:block=0,quant:mode=static:exclude=MatMul"
    result = graphopt.optimize(model, spec, data=IMAGES, threads=1, target="ort-cpu-x86")
    assert "1 weights are made of codes and stay in float" in notes(result)
    product = next(node for node in result.model.graph if node.op_type == "MatMul")
    assert product.inputs[1].producer() is not None, "it reads a constant"
    assert sqnr(run(model, **IMAGES)[0], run(result.model, **IMAGES)[0]) > 8


def test_factored_pruned_clustered_and_quantized(tmp_path: Path) -> None:
    """One after the other on a real network: the file of 4 bits, the kernels of int8, the digits as before."""
    images = np.load(MODELS / "digits.npz")["image"]
    passes = "factorize:params=0.8:method=svd,prune:sparsity=0.3,cluster:solver=compensated,quant"
    options: dict[str, Any] = {"data": {"image": images[:64]}, "threads": 1, "target": "ort-cpu-x86"}
    result = graphopt.optimize(MODELS / "digits_cnn.onnx", passes, output=tmp_path / "out.onnx", **options)
    assert "made of their codes as before, now as integers" in notes(result)
    assert (tmp_path / "out.onnx").stat().st_size < (MODELS / "digits_cnn.onnx").stat().st_size / 4.5
    before = run(graphopt.load(MODELS / "digits_cnn.onnx"), image=images[64:])[0]
    after = run(result.model, image=images[64:])[0]
    assert (before.argmax(1) == after.argmax(1)).mean() > 0.98


@pytest.mark.parametrize("weight", [np.zeros((64, 90)), np.full((64, 90), 0.5), np.eye(64, 90) * 1e30])
def test_weights_of_few_values_are_exact(weight: Any) -> None:
    text = " f (float[2,90] x, float[64,90] w) => (float[2,64] y) { y = Gemm<transB=1>(x, w) }"
    model = parsed(text, w=weight)
    coded = graphopt.optimize(model, "cluster", threads=1).model
    feed = inputs_of(model)
    np.testing.assert_allclose(run(coded, **feed)[0], run(model, **feed)[0], rtol=1e-5)


def test_no_scales_are_said_in_text_and_recipes() -> None:
    pipeline = Pipeline.of([registry.find("PASSES", "cluster")(block=None)])
    assert str(pipeline) == "cluster:block=none"
    assert Pipeline.parse(str(pipeline)) == Pipeline.from_toml(pipeline.to_toml()) == pipeline


@pytest.mark.usefixtures("eager")
def test_weights_in_other_floats_are_left_with_a_reason() -> None:
    model = parsed(" f (float16[2,21] x, float16[21,15] w) => (float16[2,15] y) { y = MatMul(x, w) }")
    weight = model.graph.inputs.pop(1)
    weight.const_value = ir.tensor(RNG.standard_normal((21, 15)).astype(np.float16), name="w")
    model.graph.register_initializer(weight)
    result = graphopt.optimize(model, "cluster")
    assert "1 weights are not float32" in notes(result)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("options", "said"), [("", False), (":vector=2", True), (":bits=1", True)])
def test_zeros_that_codes_cannot_keep_are_said(options: str, said: bool) -> None:
    weight = np.where(RNG.random((21, 15)) < 0.3, 0.0, RNG.standard_normal((21, 15)))
    text = "(float[2,21] x, float[21,15] w) => (float[2,15] y) { y = MatMul(x, w) }"
    result = graphopt.optimize(parsed(f" f {text}", w=weight), f"cluster{options}")
    assert ("1 weights lose zeros they had" in notes(result)) == said


def test_a_number_of_channels_may_be_written_as_one() -> None:
    assert Cluster(granularity=8) == Cluster(granularity="8")  # type: ignore[arg-type]
