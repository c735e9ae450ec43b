"""Codebook and logarithmic weights: entries against brute force, what is stored against its definition, all readers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx.checker
import onnx_ir as ir
import pytest

import graphopt
from graphopt import walk
from graphopt.authoring import Context
from graphopt.backends.onnxruntime import OnnxRuntime
from graphopt.backends.targets import TARGETS
from graphopt.data import open_data
from graphopt.errors import PassError, UsageError
from graphopt.passes.lossy.code_planes import (
    bits_for,
    codes_per_step,
    packed_planes,
    plane_bits,
    unpacked_planes,
    unpacking_table,
)
from graphopt.passes.lossy.codebook import CodebookWeights
from graphopt.passes.lossy.logarithmic import Logarithmic
from graphopt.passes.solvers import codebook
from graphopt.passes.solvers.codebook import Codebook
from graphopt.passes.solvers.objective import output_error
from graphopt.rewriter import Rewriter

from .test_cast import parsed, run, sqnr
from .test_prune import layered, shared_with_gather

pytest.importorskip("onnxruntime")

RNG = np.random.default_rng(0)
BOOKS = {
    "nf4": Codebook(codebook.NF4),
    "fp4": Codebook(codebook.FP4),
    "powers": Codebook(codebook.powers_of_two(4, 1)),
    "sums": Codebook(codebook.powers_of_two(4, 2)),
    "signs": Codebook(codebook.powers_of_two(2, 1)),
}


@pytest.mark.parametrize("name", BOOKS)
def test_entries_are_the_nearest_of_all(name: str) -> None:
    book, numbers = BOOKS[name], RNG.uniform(-1.2, 1.2, 2000).astype(np.float32)
    distance = np.abs(numbers[:, None] - book.table()[None])
    found = np.abs(numbers - book.table()[book.encode(numbers)])
    assert np.allclose(found, distance.min(axis=1), atol=1e-6)


def test_entries_are_the_nearest_in_logarithms() -> None:
    book = Codebook(codebook.powers_of_two(4, 1), in_logarithms=True)
    numbers = np.exp2(RNG.uniform(-6, 0, 2000)).astype(np.float32) * RNG.choice([-1, 1], 2000).astype(np.float32)
    chosen = book.table()[book.encode(numbers)]
    powers = np.exp2(np.clip(np.rint(np.log2(np.abs(numbers))), -6, 0)) * np.sign(numbers)
    assert np.array_equal(chosen, powers.astype(np.float32))
    assert book.table()[book.encode(np.float32([0.0, 1e-9, -1e-9]))].tolist() == [0, 0, 0]


def test_powers_of_two_are_powers_and_their_sums() -> None:
    assert sorted(set(np.abs(codebook.powers_of_two(4, 1)))) == [0, *(2.0**-i for i in range(6, -1, -1))]
    sums = np.unique(np.abs(codebook.powers_of_two(5, 2)))
    assert len(sums) == 16
    largest = 1.5
    terms = [0.0, *(2.0**-i for i in range(12))]
    pairs = {(a + b) / largest for a, b in itertools.product(terms, terms)}
    assert all(min(abs(one - pair) for pair in pairs) < 1e-9 for one in sums)


@pytest.mark.parametrize("bits", range(1, 9))
def test_planes_hold_every_bit_of_the_codes(bits: int) -> None:
    codes = RNG.integers(0, 2**bits, (3, 21)).astype(np.uint8)
    planes = packed_planes(codes, bits)
    whole = -(-21 // codes_per_step(bits)) * codes_per_step(bits)
    assert sum(plane.nbytes for plane in planes) == 3 * bits * whole // 8
    assert np.array_equal(unpacked_planes(planes, bits, 21), codes)
    # By definition: a byte's first code has its high bits, and each plane adds its part.
    highest, shift = plane_bits(bits)[0]
    each = 8 // highest
    first = int(codes[0, 0]) >> shift
    assert planes[0][0, 0] >> (8 - highest) == first
    assert unpacking_table(highest, shift).shape == (256, each)
    assert sum(width for width, _ in plane_bits(bits)) == bits
    assert bits_for(2**bits) == bits


def test_searched_scales_lose_no_more_and_the_error_is_the_objective() -> None:
    weight = RNG.standard_t(3, (16, 64)).astype(np.float32)
    x = RNG.standard_normal((256, 64)) @ RNG.standard_normal((64, 64))
    moment = (x.T @ x / 256).astype(np.float32)
    plain = codebook.nearest(weight, BOOKS["nf4"], 32, second_moment=moment)
    searched = codebook.nearest(weight, BOOKS["nf4"], 32, search=True)
    assert searched.error < codebook.nearest(weight, BOOKS["nf4"], 32).error
    made_up = codebook.compensated(weight, BOOKS["nf4"], 32, moment)
    assert made_up.error < 0.8 * plain.error
    for one in (plain, made_up):
        assert one.error == pytest.approx(output_error(weight - one.values(), moment), rel=1e-3)


def test_compensation_comes_near_the_best_of_all_codes() -> None:
    book = Codebook((-1.0, -0.25, 0.25, 1.0))
    better = 0
    for seed in range(5):
        rng = np.random.default_rng(seed)
        weight = rng.uniform(-1, 1, (1, 6)).astype(np.float32)
        x = rng.standard_normal((40, 6)) @ rng.standard_normal((6, 6))
        moment = (x.T @ x / 40).astype(np.float32)
        found = codebook.compensated(weight, book, 6, moment)
        all_codes = np.array(list(itertools.product(range(4), repeat=6)), np.uint8)
        best = min(output_error(weight - book.decode(code[None], found.scales, 6), moment) for code in all_codes)
        plain = codebook.nearest(weight, book, 6, search=True, second_moment=moment)
        assert best <= found.error * 1.0001 <= plain.error * 1.0002
        better += found.error < plain.error
    assert better >= 2


def test_a_channel_of_zeros_stays_zero() -> None:
    weight = RNG.standard_normal((4, 32)).astype(np.float32)
    weight[2] = 0
    for book in BOOKS.values():
        found = codebook.nearest(weight, book, 16, search=True)
        assert (found.values()[2] == 0).all()
        assert np.isfinite(found.scales).all()


def enlarged(op: str) -> ir.Model:
    """One layer, large enough to be worth codes, its inputs no multiple of a block, and enough of them for a mean."""
    shapes = {
        "Conv": (
            " f (float[4,30,6,6] x, float[64,30,3,3] w) => (float[4,64,4,4] y) { y = Conv(x, w) }",
            [64, 30, 3, 3],
        ),
        "ConvTranspose": (
            " f (float[4,30,6,6] x, float[30,64,3,3] w) => (float[4,64,8,8] y) { y = ConvTranspose(x, w) }",
            [30, 64, 3, 3],
        ),
        "Gemm": (
            " f (float[64,90] x, float[64,90] w, float[64] b) => (float[64,64] y) { y = Gemm<transB=1>(x, w, b) }",
            [64, 90],
        ),
        "MatMul": (" f (float[2,32,90] x, float[90,64] w) => (float[2,32,64] y) { y = MatMul(x, w) }", [90, 64]),
        "LeftMatMul": (" f (float[90,64] x, float[64,90] w) => (float[64,64] y) { y = MatMul(w, x) }", [64, 90]),
    }
    text, shape = shapes[op]
    weights: dict[str, Any] = {"w": RNG.standard_normal(shape)}
    if "float[64] b" in text:
        weights["b"] = RNG.standard_normal(64)
    return parsed(text, **weights)


OPS = ["Conv", "ConvTranspose", "Gemm", "MatMul", "LeftMatMul"]
SPECS = [
    "codebook:block=32",
    "codebook:format=fp4",
    "logarithmic",
    "logarithmic:bits=5:terms=2:block=32",
    "logarithmic:bits=2",
]


def notes(result: graphopt.Result) -> str:
    return "\n".join(note.text for note in result.report.steps[-1].notes)


@pytest.mark.parametrize(("op", "spec"), [*((op, SPECS[0]) for op in OPS), *(("Gemm", spec) for spec in SPECS[1:])])
def test_a_layer_computes_what_the_solver_says(op: str, spec: str, tmp_path: Path) -> None:
    model = enlarged(op)
    value = model.graph.inputs[0]
    x = RNG.standard_normal([dim if isinstance(dim, int) else 2 for dim in value.shape]).astype(np.float32)
    result = graphopt.optimize(model, spec, output=tmp_path / "out.onnx", threads=1)
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)
    (want,), (got,) = run(model, x=x), run(result.model, x=x)
    facts = result.report.steps[-1].notes[-1].facts
    # What the solver predicts of white inputs, and what the whole graph gives, are one error; 64 inputs of each output
    # or more bring what was drawn within 0.4 dB of it.
    assert sqnr(want, got) == pytest.approx(facts["predicted_sqnr"], abs=0.7)
    stored = (tmp_path / "out.onnx").stat().st_size
    assert abs(stored - facts["code_bytes"]) < 9000  # nodes, names, and a table of at most 4 KiB
    again = graphopt.optimize(tmp_path / "out.onnx", "simplify", threads=1)
    assert any(node.op_type == "Cast" for node in again.model.graph), "canonical form has undone it"


@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
@pytest.mark.parametrize("book", ["nf4", "fp4"])
def test_the_runtimes_operator_computes_the_same(op: str, book: str) -> None:
    text = {
        "Gemm": " f (float[N,96] x, float[64,96] w, float[64] b) => (float[N,64] y) { y = Gemm<transB=1>(x, w, b) }",
        "MatMul": " f (float[N,3,96] x, float[96,64] w) => (float[N,3,64] y) { y = MatMul(x, w) }",
    }[op]
    weights: dict[str, Any] = {"w": RNG.standard_normal((64, 96) if op == "Gemm" else (96, 64))}
    if op == "Gemm":
        weights["b"] = RNG.standard_normal(64)
    model = parsed(text, **weights)
    options = f"codebook:format={book}:block=32:solver=rtn:form="
    by_operator, by_table = (
        graphopt.optimize(model, options + form, target="ort-cpu-x86", threads=1) for form in ("MatMulBnb4", "table")
    )
    assert "MatMulBnb4" in [node.op_type for node in by_operator.model.graph]
    x = RNG.standard_normal((2, 96) if op == "Gemm" else (2, 3, 96)).astype(np.float32)
    assert np.allclose(run(by_operator.model, x=x)[0], run(by_table.model, x=x)[0], atol=1e-3)


def test_a_target_without_the_operator_says_so() -> None:
    with pytest.raises(PassError, match="has no MatMulBnb4") as caught:
        graphopt.optimize(enlarged("MatMul"), "codebook:form=MatMulBnb4", target="portable")
    assert "form=table" in (caught.value.hint or "")


EMBEDDING = " f (int64[B, S] ids, float[200, 50] table) => (float[B, S, 50] y) { y = Gather(table, ids) }"


@pytest.mark.parametrize("spec", ["codebook:solver=rtn:block=32", "logarithmic:solver=rtn"])
def test_rows_are_looked_up_in_codes(spec: str) -> None:
    table = RNG.standard_normal((200, 50))
    model = parsed(EMBEDDING, table=table)
    result = graphopt.optimize(model, spec, threads=1)
    assert "lookups decode the rows they read" in notes(result)
    ids = RNG.integers(-200, 200, (3, 4))
    (got,) = run(result.model, ids=ids)
    assert got.shape == (3, 4, 50)
    assert sqnr(table[ids], got) > 13
    assert run(result.model, ids=np.zeros((0, 4), np.int64))[0].shape == (0, 4, 50)


def test_a_tied_table_is_stored_once() -> None:
    text = """ f (int64[S] ids, float[200, 50] table) => (float[S, 200] y)
    { e = Gather(table, ids)  r = Relu(e)  y = Gemm<transB = 1>(r, table) }"""
    model = parsed(text, table=RNG.standard_normal((200, 50)))
    result = graphopt.optimize(model, "codebook", threads=1)
    assert "1 weights stored" in notes(result)
    codes = [name for name in result.model.graph.initializers if name.endswith("_codes")]
    assert len(codes) == 1
    ids = np.arange(7)
    assert sqnr(run(model, ids=ids)[0], run(result.model, ids=ids)[0]) > 15


@pytest.mark.parametrize("spec", ["codebook", "cluster"])
def test_weights_read_in_branches_are_decoded_outside(spec: str) -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    f (float[2, 64] x, bool c, float[64, 64] w) => (float[2, 64] y) {
      y = If (c) <
        then_branch = t () => (float[2, 64] p) { k = MatMul(x, w)  p = Relu(k) },
        else_branch = e () => (float[2, 64] q) { l = MatMul(x, w)  q = Abs(l) }
      >
    }"""
    model = parsed(text, w=RNG.standard_normal((64, 64)))
    result = graphopt.optimize(model, spec, threads=1)
    x = RNG.standard_normal((2, 64)).astype(np.float32)
    for c in (True, False):
        feeds = {"x": x, "c": np.array(c)}
        assert sqnr(run(model, **feeds)[0], run(result.model, **feeds)[0]) > 15


def test_data_make_the_layers_output_better() -> None:
    model = parsed(
        " f (float[N, 128] x, float[128, 64] w) => (float[N, 64] y) { y = MatMul(x, w) }",
        w=RNG.standard_normal((128, 64)),
    )
    x = (RNG.standard_normal((400, 16)) @ RNG.standard_normal((16, 128))).astype(np.float32)
    (want,) = run(model, x=x)
    losses = {}
    for solver in ("rtn", "mse", "gptq"):
        data = {} if solver == "rtn" else {"data": {"x": x}}
        result = graphopt.optimize(model, f"codebook:solver={solver}", threads=1, **data)
        losses[solver] = sqnr(want, run(result.model, x=x)[0])
    assert losses["gptq"] > losses["rtn"] + 3
    assert losses["mse"] > losses["rtn"] - 0.5


@pytest.mark.parametrize("name", ["codebook", "logarithmic"])
def test_bad_input(name: str) -> None:
    with pytest.raises(
        UsageError, match="`block` cannot be `34`" if name == "logarithmic" else "`block` cannot be `33`"
    ):
        graphopt.optimize(enlarged("Gemm"), f"{name}:block={34 if name == 'logarithmic' else 33}")
    with pytest.raises(UsageError, match="matches no node"):
        graphopt.optimize(enlarged("Gemm"), f"{name}:include=nothing*")
    broken = enlarged("Gemm")
    array = broken.graph.initializers["w"].const_value.numpy().copy()
    array[0, 0] = np.nan
    broken.graph.initializers["w"].const_value = ir.tensor(array, name="w")
    with pytest.raises(PassError, match="`w` holds NaN"):
        graphopt.optimize(broken, name)
    coded = graphopt.optimize(enlarged("Gemm"), name).model
    with pytest.raises(PassError, match="already quantized"):
        graphopt.optimize(coded, name)
    assert "no weight is smaller" in notes(graphopt.optimize(layered("Gemm"), name))
    assert "no weight is smaller" in notes(graphopt.optimize(shared_with_gather(), name))
    left = graphopt.optimize(enlarged("Gemm"), f"{name}:exclude=Gemm")
    assert not any(node.op_type == "Cast" for node in walk.every_node(left.model))


def test_a_shared_weight_is_decoded_before_the_first_product_is_gone() -> None:
    """MatMulBnb4 takes the place of the first node, and the second cannot be one."""
    text = " f (float[N,64] x, float[64,64] w) => (float[N,64] y) { a = MatMul(x, w) y = Gemm<alpha=2.0>(a, w) }"
    model = parsed(text, w=RNG.standard_normal((64, 64)))
    by_operator, by_table = (
        graphopt.optimize(model, f"codebook:solver=rtn:form={form}", target="ort-cpu-x86", threads=1).model
        for form in ("MatMulBnb4", "table")
    )
    ops = [node.op_type for node in by_operator.graph]
    assert ops.count("MatMulBnb4") == ops.count("Gemm") == 1
    x = RNG.standard_normal((2, 64)).astype(np.float32)
    assert np.allclose(run(by_operator, x=x)[0], run(by_table, x=x)[0], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("spec", [CodebookWeights(solver="rtn"), Logarithmic(solver="rtn")])
def test_what_is_predicted_is_a_share(spec: CodebookWeights | Logarithmic) -> None:
    """The share of noise in the outputs, each counting alike, whatever their size."""
    of = parsed(
        " f (float[N,96] x, float[96,64] w) => (float[N,64] y) { [layer] y = MatMul(x, w) }",
        w=100 * RNG.standard_normal((96, 64)),
    )
    data = open_data({"x": RNG.standard_normal((256, 96)).astype(np.float32)}, of)
    ctx = Context(of, Rewriter(of), TARGETS["portable"], OnnxRuntime(), threads=1, data=data, predicts=True)
    feed = RNG.standard_normal((256, 96)).astype(np.float32)
    before = run(of, x=feed)[0]
    spec.run(of, ctx)
    noise, signal = np.square(run(of, x=feed)[0] - before).mean(0), np.square(before).mean(0)
    (found,) = [note.facts["predicted_error"] for note in ctx.notes if "predicted_error" in note.facts]
    assert found == pytest.approx(float((noise / (noise + signal)).mean()), rel=0.1)
