"""Where the time goes: kernels given to the nodes they run, what these take at least, and the roofline."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, parser

import graphopt
from graphopt import registry, summary
from graphopt.backend import Kernel
from graphopt.benchmarking import benchmark, roofline
from graphopt.benchmarking.kernel_profile import KernelTime, Profile, profile, sized
from graphopt.benchmarking.results import Bench, Profiled, Row
from graphopt.benchmarking.roofline import Peaks, measure_peaks, roof_of
from graphopt.choices import open_model
from graphopt.commands.bench_tables import listing_of
from graphopt.errors import BackendError
from graphopt.generated import generated_feeds
from graphopt.kernel_nodes import nodes_of_kernels
from graphopt.latency import Latency
from graphopt.node_costs import cost_of

from .command_line import CLASSES, FEATURES, fill, run

OPSETS = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'


def parsed(text: str, **sizes: Any) -> ir.Model:
    """Return a model whose shapes are inferred."""
    return sized(open_model(ir.from_proto(parser.parse_model(f"{OPSETS} {text}"))), sizes)


class Told:
    """A backend that tells the kernels it is told to."""

    name = "told"

    def __init__(self, *kernels: Kernel) -> None:
        self._kernels = list(kernels)

    def kernels(self, model: ir.Model, feeds: Mapping[str, Any], *, threads: int = 0, runs: int = 5) -> list[Kernel]:
        return self._kernels


def _kernel(op: str, name: str, made: str, milliseconds: float, *reads: str) -> Kernel:
    return Kernel(op, name, (), (made,), reads, milliseconds)


# What nodes take

PRODUCTS = {
    "MatMul": ("g (float[2,5,3] x, float[3,4] w) => (float[2,5,4] y) { y = MatMul(x, w) }", 2 * 5 * 4 * 3),
    "Gemm": ("g (float[3,5] x, float[3,4] w) => (float[5,4] y) { y = Gemm<transA=1>(x, w) }", 5 * 4 * 3),
    "Conv": (
        "g (float[1,4,8,8] x, float[6,2,3,3] w) => (float[1,6,6,6] y) { y = Conv<group=2>(x, w) }",
        6 * 36 * 2 * 9,
    ),
    "QLinearConv": (
        "g (uint8[1,4,8,8] x, int8[6,4,3,3] w) => (uint8[1,6,6,6] y) <float s={1}, uint8 z={0}, int8 o={0}>"
        "{ y = QLinearConv(x, s, z, w, s, o, s, z) }",
        6 * 36 * 4 * 9,
    ),
    "QLinearMatMul": (
        "g (uint8[5,3] x, int8[3,4] w) => (uint8[5,4] y) <float s={1}, uint8 z={0}, int8 o={0}>"
        "{ y = QLinearMatMul(x, s, z, w, s, o, s, z) }",
        5 * 4 * 3,
    ),
    "MatMulNBits": (
        "g (float[5,32] x, uint8[16,1,16] w, float[16] s) => (float[5,16] y)"
        "{ y = com.microsoft.MatMulNBits<K=32, N=16, bits=4, block_size=32>(x, w, s) }",
        5 * 16 * 32,
    ),
    "LSTM": (
        "g (float[7,2,3] x, float[1,16,3] w, float[1,16,4] r) => (float[7,1,2,4] y)"
        "{ y = LSTM<hidden_size=4>(x, w, r) }",
        7 * 2 * 16 * (3 + 4),
    ),
    "MultiHeadAttention": (
        "g (float[2,5,8] q, float[2,9,8] k, float[2,9,8] v) => (float[2,5,8] y)"
        "{ y = com.microsoft.MultiHeadAttention<num_heads=2>(q, k, v) }",
        2 * (2 * 5 * 9 * 8),
    ),
    "attention with a past": (
        "g (float[2,1,8] q, float[2,1,4] k, float[2,1,4] v, float[2,1,6,4] p, float[2,1,6,4] o) => (float[2,1,8] y)"
        "{ y = com.microsoft.GroupQueryAttention<num_heads=2, kv_num_heads=1>(q, k, v, p, o) }",
        2 * (2 * 1 * 7 * 8),
    ),
}


@pytest.mark.parametrize(("text", "macs"), PRODUCTS.values(), ids=PRODUCTS)
def test_operations(text: str, macs: int) -> None:
    model = parsed(text)
    assert cost_of([model.graph.node(0)]).operations == 2 * macs


def test_unknown_work_is_unknown() -> None:
    dynamic = parsed("g (float[n,3] x, float[3,4] w) => (float[n,4] y) { y = MatMul(x, w) }")
    assert cost_of([dynamic.graph.node(0)]).operations is None
    assert cost_of([dynamic.graph.node(0)]).bytes is None
    sums = parsed('g (float[2,3] x, float[3,4] w) => (float[2,4] y) { y = Einsum<equation="ij,jk->ik">(x, w) }')
    assert cost_of([sums.graph.node(0)]).operations is None


def test_bytes_are_of_what_goes_in_and_out() -> None:
    model = parsed(
        "g (float[2,3] x) => (float[2,4] y, float[2,4] z) <float[3,4] w = {1,1,1,1,1,1,1,1,1,1,1,1}>"
        "{ z = MatMul(x, w)  h = Relu(z)  y = Neg(h) }"
    )
    product, relu, negation = model.graph
    assert cost_of([product]).bytes == 4 * (6 + 12 + 8)
    assert cost_of([relu, negation]).bytes == 4 * (8 + 8)
    # `z` is an output, so that it is written although it is read at once.
    assert cost_of([product, relu, negation]).bytes == 4 * (6 + 12 + 8 + 8)
    assert cost_of([relu, negation]).operations == 0


def test_a_lookup_reads_what_it_gives() -> None:
    model = parsed("g (float[1000,8] t, int64[3] i) => (float[3,8] y) { y = Gather(t, i) }")
    assert cost_of([model.graph.node(0)]).bytes == 3 * 8 * 4 + 3 * 8 + 3 * 8 * 4
    view = parsed("g (float[4,2] x) => (float[8] y) { s = Constant<value_ints=[8]>()  y = Reshape(x, s) }")
    assert cost_of([view.graph.node(1)]).bytes == 0


# Which kernel runs what

RESIDUAL = """g (float[1,2,4,4] x, float[2,2,1,1] v, float[2,2,1,1] w) => (float[1,2,4,4] y) {
    a = Conv(x, v)  b = Relu(a)  c = Conv(b, w)  d = Add(c, b)  y = Relu(d) }"""


def test_nodes_without_a_name_go_to_the_kernels_around_them() -> None:
    model = parsed(RESIDUAL)
    nodes = list(model.graph)
    kernels = [_kernel("Conv", "relu", "b", 1.0), _kernel("Conv", "conv2", "y", 1.0)]
    groups = nodes_of_kernels(kernels, nodes, {1: [kernels[0]], 2: [kernels[1]]})
    assert [[node.op_type for node in group] for group in groups] == [["Conv", "Relu"], ["Conv", "Add", "Relu"]]


def test_a_kernel_does_one_product() -> None:
    """What is before the product that a kernel is found to do is no part of it."""
    model = parsed(RESIDUAL)
    nodes = list(model.graph)
    kernels = [_kernel("Conv", "last", "y", 1.0)]
    groups = nodes_of_kernels(kernels, nodes, {4: kernels})
    assert [[node.op_type for node in group] for group in groups] == [["Conv", "Add", "Relu"]]


def test_a_node_with_several_kernels_is_of_the_slowest() -> None:
    model = parsed("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    kernels = [_kernel("Reorder", "r", "z", 0.1), _kernel("Relu", "y", "y", 0.5)]
    groups = nodes_of_kernels(kernels, list(model.graph), {0: kernels})
    assert [len(group) for group in groups] == [0, 1]


BRANCHES = """g (bool c, float[4] x) => (float[4] y) {
    y = If<then_branch = t () => (float[4] a) { a = Relu(x) }, else_branch = e () => (float[4] b) { b = Neg(x) }>(c)
}"""


def test_control_flow_takes_what_its_graphs_do_not() -> None:
    model = parsed(BRANCHES)
    told = Told(
        _kernel("If", "graphopt0_If", "y", 5.0),
        _kernel("Relu", "graphopt1_Relu", "a", 3.0, "float32"),
        _kernel("Neg", "graphopt2_Neg", "b", 0.0),
    )
    found = profile(model, told, {"c": np.array(True), "x": np.zeros(4, np.float32)})
    assert [(one.op, one.milliseconds) for one in found.kernels] == [("Relu", 3.0), ("If", 2.0)]
    assert found.milliseconds == 5.0
    relu, branch = found.kernels
    assert (relu.bytes, branch.bytes) == (32, None)


def test_a_kernel_of_no_time_at_all_is_shown() -> None:
    """As runtimes tell it that take the difference of two clocks."""
    model = parsed("g (float[2,3] x, float[3,4] w) => (float[2,4] y) { y = MatMul(x, w) }")
    feeds = {"x": np.zeros((2, 3), np.float32), "w": np.zeros((3, 4), np.float32)}
    found = profile(model, Told(_kernel("MatMul", "graphopt0_MatMul", "y", -0.001)), feeds)
    assert [one.milliseconds for one in found.kernels] == [0.0]
    row = Row("m", "b", 1, {}, Latency(1.0, 1.0, 1.0, 1, 1.0))
    whole = (Profiled("m", "b", found, roof_of(found, PEAKS)),)
    listing = listing_of(Bench((row,), whole, 1, (), "cpu", "made-up inputs", None, ()))
    assert list(listing.sheets[2].rows[0])[-2:] == ["–", ""]


def test_profile_of_a_model_as_it_is_fused(tmp_path: Path) -> None:
    model = open_model(fill(tmp_path))
    found = profile(model, registry.backend("onnxruntime"), generated_feeds(model, 0, sets=1, batch=3)[0], threads=1)
    nodes = [name for kernel in found.kernels for name in kernel.nodes]
    assert sorted(nodes) == ["bias", "first", "relu", "second"]
    assert sum(kernel.operations or 0 for kernel in found.kernels) == 2 * 3 * (FEATURES * 32 + 32 * CLASSES)
    assert sum(one.milliseconds for one in found.by_op) == pytest.approx(found.milliseconds)
    assert [node.name for node in model.graph] == ["first", "bias", "relu", "second"], "the model is left as it is"


@pytest.mark.parametrize("name", ["digits_resnet", "squeezenet1.1_imagenet", "stories260k"])
def test_all_products_of_real_models_are_found(shared: Path, name: str) -> None:
    model = open_model(shared / "assets" / "models" / f"{name}.onnx")
    feeds = generated_feeds(model, 0, sets=1, batch=1)[0]
    found = profile(model, registry.backend("onnxruntime"), feeds, threads=1, runs=1)
    whole = 2 * summary.count_macs(sized(model, feeds))
    assert sum(kernel.operations or 0 for kernel in found.kernels) == whole


def test_integer_kernels_of_a_quantized_model(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1] / "models"
    out = tmp_path / "int8.onnx"
    quick = "quant:mode=static:solver=rtn"
    graphopt.optimize(root / "digits_cnn.onnx", quick, data=root / "digits.npz", output=out, verify="off")
    model = open_model(out)
    feeds = generated_feeds(model, 0, sets=1, batch=1)[0]
    found = profile(model, registry.backend("onnxruntime"), feeds, threads=1, runs=1)
    products = [kernel for kernel in found.kernels if kernel.operations]
    assert products
    assert all(kernel.integers for kernel in products)
    # Not of the float model: `quant` gives the first layer channels that its kernel reads faster.
    assert sum(kernel.operations or 0 for kernel in products) == 2 * summary.count_macs(sized(model, feeds))


# The roofline

PEAKS = Peaks("told", 100e9, 400e9, memory=10e9, caches=50e9, cache_bytes=1_000_000)


def _time(milliseconds: float, operations: int | None, moved: int | None, *, integers: bool = False) -> KernelTime:
    return KernelTime("MatMul", ("n",), "", integers, milliseconds, operations, moved)


def test_roof_of_a_kernel() -> None:
    much = 10_000_000
    assert PEAKS.least(_time(1, 200_000_000, 1000), much) == (2.0, "compute")
    assert PEAKS.least(_time(1, 200_000_000, 1000, integers=True), much) == (0.5, "compute")
    assert PEAKS.least(_time(1, 0, 5_000_000), much) == (0.5, "memory")
    assert PEAKS.least(_time(1, 0, 500_000), 500_000) == (0.01, "caches")
    assert PEAKS.least(_time(1, None, 500_000), much) is None


def test_roof_of_a_profile() -> None:
    kernels = (_time(4.0, 200_000_000, 1000), _time(1.0, 0, 5_000_000), _time(2.0, None, None))
    roof = roof_of(Profile(kernels), PEAKS)
    assert (roof.least, roof.taken, roof.unknown) == (2.5, 5.0, 2.0)
    assert roof.share == 0.5
    assert roof.bound_by == {"compute": 0.8, "memory": 0.2}
    assert roof_of(Profile(()), PEAKS).share == 0


@pytest.fixture
def small_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_GEMM_SIZES": (64,), "_CONV_CHANNELS": 16}.items():
        monkeypatch.setattr(roofline, name, value)
    monkeypatch.setattr(roofline, "_MEMORY_SHAPE", (256, 512))
    monkeypatch.setattr(benchmark, "measure_peaks", functools.partial(measure_peaks, seconds=0.0))


@pytest.mark.usefixtures("small_peaks")
@pytest.mark.parametrize("backend", ["onnxruntime", "reference"])
def test_peaks_are_measured(backend: str) -> None:
    peaks = measure_peaks(registry.backend(backend), threads=1, seconds=0.0)
    assert peaks.float_operations > 0
    assert peaks.integer_operations is not None
    assert peaks.memory > 0


@pytest.mark.usefixtures("small_peaks")
def test_backend_without_integers_has_no_peak_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = registry.backend("onnxruntime")
    opened = type(backend).open

    def refuse_codes(self: Any, model: ir.Model, **options: Any) -> Any:
        if model.graph.inputs[0].dtype != ir.DataType.FLOAT:
            raise BackendError("no integers here")
        return opened(self, model, **options)

    monkeypatch.setattr(type(backend), "open", refuse_codes)
    assert measure_peaks(backend, threads=1, seconds=0.0).integer_operations is None


# On the command line


@pytest.mark.usefixtures("small_peaks")
def test_profile_and_roof_on_the_command_line(tmp_path: Path) -> None:
    model = fill(tmp_path)
    args = ("bench", model, "--roofline", "--seconds", 0.1, "--threads", 1)
    outcome = run(*args)
    assert (outcome.code, outcome.err) == (0, "")
    assert f"{model} on onnxruntime cpu" in outcome.out
    assert "of the roof" in outcome.out
    assert " peaks of onnxruntime cpu, measured: float32 " in outcome.out
    (found,) = json.loads(run(*args, "--json").out)["profiles"]
    assert {"milliseconds", "by_op", "kernels", "roof"} <= set(found)
    assert found["roof"]["peaks"]["float_operations"] > 0
    assert {name for kernel in found["kernels"] for name in kernel["nodes"]} == {"bias", "first", "relu", "second"}


def test_backend_that_tells_nothing_is_a_warning(tmp_path: Path) -> None:
    model = fill(tmp_path)
    outcome = run("bench", model, "--profile", "--backend", "reference", "--seconds", 0.1)
    assert outcome.code == 0
    assert "warning: no profile: backend `onnx reference` does not tell what it runs" in outcome.out


def test_long_lists_are_cut_unless_asked_for() -> None:
    kernels = tuple(KernelTime(f"Op{n}", tuple("abcde"), "", False, 1.0, 1000, 100) for n in range(30))
    row = Row("m", "b", 1, {}, Latency(1.0, 1.0, 1.0, 1, 1.0))
    found = Bench((row,), (Profiled("m", "b", Profile(kernels), None),), 1, (), "cpu", "made-up inputs", None, ())
    assert [row[0] for row in listing_of(found).sheets[1].rows][-2:] == ["20 other operators", "all"]
    assert len(listing_of(found, verbose=True).sheets[1].rows) == 31
    slowest = listing_of(found).sheets[2]
    assert slowest.columns[0] == "slowest of 30"
    assert len(slowest.rows) == 10
    assert slowest.rows[0][1] == "a, b, c and 2 more"
    assert len(listing_of(found, verbose=True).sheets[2].rows) == 30
    eleven = replace(found, profiles=(Profiled("m", "b", Profile(kernels[:11]), None),))
    assert [row[0] for row in listing_of(eleven).sheets[1].rows][-2:] == ["Op10", "all"]


@pytest.mark.usefixtures("small_peaks")
def test_each_of_two_kinds_of_one_backend_has_peaks_of_its_own(tmp_path: Path) -> None:
    other = "onnxruntime:config=session.disable_prepacking=1"
    args = ("bench", fill(tmp_path), "--roofline", "--seconds", 0.1, "--threads", 1)
    out = run(*args, "--backend", f"onnxruntime,{other}").out
    assert "peaks of onnxruntime, measured" in out
    assert f"peaks of {other}, measured" in out


def test_dynamic_sizes_are_those_of_the_feed(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "x2"], ["y"], "product")],
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "n"]) for name in ("x", "x2")],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "n"])],
    )
    path = tmp_path / "square.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    found = graphopt.bench([path], sweep={"n": [32]}, profiled=True, seconds=0.01, threads=1)
    assert found.profiles[0].profile.kernels[0].operations == 2 * 32**3
