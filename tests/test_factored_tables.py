"""Tables as factors: the best for how often rows are looked up and what multiplies by them, and the graph made."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

import graphopt
from graphopt import Context, Guarantee, Need, Pass
from graphopt.errors import DataError, GraphoptError
from graphopt.passes.analyses.selection import Selection
from graphopt.passes.lossy.factored_tables import candidates_of, counted, frequencies
from graphopt.passes.lossy.factorize import Factorize
from graphopt.passes.solvers.tall_rank import TallSpectrum

onnxruntime = pytest.importorskip("onnxruntime")

ROWS, WIDTH = 40, 10


class Tables(Pass):
    """Factors every table at one rank, or says why not."""

    name = "tables"
    guarantee = Guarantee.LOSSY
    needs = frozenset({Need.CALIBRATION_OPTIONAL})

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.lost: list[float] = []
        self.approximated: list[dict[str, np.ndarray]] = []

    def run(self, model: ir.Model, ctx: Context) -> None:
        for table in candidates_of(model, ctx, Selection(), "whitened"):
            curve = table.curve(lambda _layer: None, ctx)
            place = next(at for at, level in enumerate(curve.levels) if level.ranks == (self.rank,))
            self.approximated.append(dict(curve.approximate(place)))
            self.lost.append(table.apply(curve.levels[place], None, ctx))


def weighed(delta: np.ndarray, rows: np.ndarray | None, columns: np.ndarray | None) -> float:
    """tr(D Δ H Δᵀ), by definition."""
    d = np.ones(len(delta)) if rows is None else rows
    h = np.eye(delta.shape[1]) if columns is None else columns
    return float(np.einsum("r,ri,ij,rj->", d, delta, h, delta))


@pytest.mark.parametrize("with_rows", [True, False])
@pytest.mark.parametrize("with_columns", [True, False])
def test_factors_reach_the_least_weighed_error(with_rows: bool, with_columns: bool) -> None:
    rng = np.random.default_rng(0)
    table = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
    rows = rng.uniform(0.01, 1, ROWS) ** 3 if with_rows else None
    root = rng.standard_normal((WIDTH, WIDTH))
    columns = root @ root.T if with_columns else None
    found = TallSpectrum([table], None if rows is None else [rows], columns)
    d = np.sqrt(np.ones(ROWS) if rows is None else rows)[:, None]
    singular = np.linalg.svd(d * table @ (root if with_columns else np.eye(WIDTH)), compute_uv=False)
    for rank in range(WIDTH + 1):
        least = float(np.sum(singular[rank:] ** 2))
        assert found.errors[rank] == pytest.approx(least, rel=1e-6, abs=1e-9)
        factors = found.factors(rank)
        delta = table - factors.left.astype(np.float64) @ factors.right
        assert weighed(delta, rows, columns) == pytest.approx(least, rel=1e-4, abs=1e-6)


def test_what_is_lost_where_rows_count_otherwise() -> None:
    rng = np.random.default_rng(11)
    table = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
    own, other = rng.uniform(0, 1, (2, ROWS))
    root = rng.standard_normal((WIDTH, WIDTH))
    for columns in (None, root @ root.T):
        found = TallSpectrum([table], [own], columns)
        for rank, share in zip((1, 4, 9), found.shares_lost((1, 4, 9), [other]), strict=True):
            factors = found.factors(rank)
            delta = table - factors.left.astype(np.float64) @ factors.right
            assert share == pytest.approx(weighed(delta, other, columns) / weighed(table, other, columns), rel=1e-4)
        assert found.shares_lost((4,), [own])[0] == pytest.approx(found.errors[4] / found.errors[0], rel=1e-6)


def test_rows_that_count_nothing_keep_what_they_share_with_others() -> None:
    rng = np.random.default_rng(1)
    table = (rng.standard_normal((ROWS, 3)) @ rng.standard_normal((3, WIDTH))).astype(np.float32)
    rows = np.ones(ROWS)
    rows[5:] = 0
    factors = TallSpectrum([table], [rows]).factors(3)
    assert np.allclose(factors.left @ factors.right, table, atol=1e-4)


def test_tables_of_zeros_and_of_low_rank() -> None:
    zero = TallSpectrum([np.zeros((ROWS, WIDTH), np.float32)])
    assert zero.errors.shape == (WIDTH + 1,)
    assert not zero.errors.any()
    assert not (zero.factors(2).left @ zero.factors(2).right).any()
    rng = np.random.default_rng(2)
    flat = (rng.standard_normal((ROWS, 1)) @ rng.standard_normal((1, WIDTH))).astype(np.float32)
    found = TallSpectrum([flat])
    assert len(found.errors) == WIDTH + 1
    assert found.errors[1] < 1e-9 * found.errors[0]
    assert np.allclose(found.factors(4).left @ found.factors(4).right, flat, atol=1e-5)


def test_ids_not_seen_take_the_share_of_those_seen_once() -> None:
    counts = np.array([7, 1, 1, 0, 0, 0, 0, 0])
    found = frequencies(counts)
    assert found.sum() == pytest.approx(1)
    assert found[3:].sum() == pytest.approx(2 / 10, rel=1e-6)
    assert np.allclose(found[3:], found[3])
    assert found[0] / found[1] == pytest.approx(7)
    assert (found > 0).all()
    assert np.allclose(frequencies(np.zeros(4, np.int64)), 0.25)
    assert np.allclose(frequencies(np.array([2, 2])), 0.5)
    # No id that was not seen counts more than one that was.
    assert frequencies(np.array([1, 0]))[1] <= frequencies(np.array([1, 0]))[0]


def test_ids_count_from_the_end_and_must_be_within() -> None:
    assert counted(np.array([[0, -1], [3, 1]]), 4).tolist() == [1, 1, 0, 2]
    assert counted(np.zeros((0, 2), np.int32), 3).tolist() == [0, 0, 0]
    with pytest.raises(DataError, match="beyond the 4 rows"):
        counted(np.array([4]), 4)
    with pytest.raises(DataError, match="beyond the 4 rows"):
        counted(np.array([-5]), 4)


def test_what_only_fills_up_is_not_counted() -> None:
    ids, mask = np.array([[5, 5, 0, 0], [2, 0, 0, 0]]), np.array([[1, 1, 0, 0], [1, 0, 0, 0]])
    assert counted(ids, 6, [mask]).tolist() == [0, 0, 1, 0, 0, 2]
    # A mask of another shape says nothing of these ids, and one of zeros alone is none.
    assert counted(ids, 6, [mask[:1]]).sum() == 8
    assert counted(ids, 6, [np.zeros_like(mask)]).sum() == 8


HEADS = {
    "none": ("", "y = Identity(e)", "float[b,t,10] y"),
    "transpose": ("", "w = Transpose<perm=[1,0]>(table) y = MatMul(e, w)", "float[b,t,40] y"),
    "gemm": (
        "",
        "s = Constant<value_ints=[-1, 10]>() f = Reshape(e, s) y = Gemm<transB=1, alpha=0.5>(f, table)",
        "float[n,40] y",
    ),
    "left": ("", "c = Transpose<perm=[0,2,1]>(e) y = MatMul(table, c)", "float[b,40,t] y"),
}


def table_model(
    head: str, *, ids: str = "int64[b,t] ids", before: str = "i = Identity(ids)", rank: int = WIDTH
) -> ir.Model:
    _, body, output = HEADS[head]
    text = f"""<ir_version: 8, opset_import: ["": 17]>
        g ({ids}, float[{ROWS},{WIDTH}] table) => ({output}, float[b,t,{WIDTH}] e)
        {{ {before} e = Gather(table, i) {body} }}"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    value = list(model.graph.inputs)[-1]
    model.graph.inputs.remove(value)
    rng = np.random.default_rng(3)
    content = rng.standard_normal((ROWS, rank)) @ rng.standard_normal((rank, WIDTH))
    value.const_value = ir.tensor(content.astype(np.float32), name="table")
    model.graph.register_initializer(value)
    return model


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    return [np.asarray(one) for one in session.run(None, feeds)]


@pytest.mark.parametrize("head", HEADS)
def test_all_readers_compute_what_the_dense_approximation_gives(head: str) -> None:
    model = table_model(head)
    rng = np.random.default_rng(4)
    ids = rng.integers(-ROWS, ROWS, (8, 5))
    step = Tables(4)
    result = graphopt.optimize(model, [step], data={"ids": ids}, metric="sqnr_db")
    names = {value.name for value in result.model.graph.initializers.values()}
    assert "table" not in names
    dense = table_model(head)
    dense.graph.initializers["table"].const_value = ir.tensor(step.approximated[0]["table"], name="table")
    for got, wanted in zip(run(result.model, {"ids": ids}), run(dense, {"ids": ids}), strict=True):
        assert np.allclose(got, wanted, atol=2e-4 * np.abs(wanted).max())
    assert 0 < step.lost[0] < 1


@pytest.mark.parametrize("head", HEADS)
def test_a_table_of_low_rank_stays_what_it_is(head: str) -> None:
    model = table_model(head, rank=4)
    ids = np.arange(8).reshape(2, 4)
    result = graphopt.optimize(model, [Tables(4)], data={"ids": np.repeat(ids, 4, axis=0)}, metric="sqnr_db")
    everything = np.arange(ROWS).reshape(4, 10)  # ids never seen among them
    for got, wanted in zip(run(result.model, {"ids": everything}), run(model, {"ids": everything}), strict=True):
        assert np.allclose(got, wanted, atol=1e-4 * np.abs(wanted).max())


def test_rows_looked_up_often_lose_least() -> None:
    model = table_model("none")
    ids = np.tile(np.arange(4), (64, 2))
    result = graphopt.optimize(model, [Tables(4)], data={"ids": ids}, metric="sqnr_db")
    everything = np.arange(ROWS).reshape(4, 10)
    got, wanted = (run(one, {"ids": everything})[1].reshape(ROWS, WIDTH) for one in (result.model, model))
    lost = np.square(got - wanted).sum(axis=1)
    assert lost[:4].mean() < 0.05 * lost[4:].mean()


def test_ids_come_through_other_operators() -> None:
    before = "j = Cast<to=7>(ids) o = Constant<value_ints=[1]>() i = Add(j, o)"
    model = table_model("none", ids="int32[b,t] ids", before=before)
    ids = np.full((16, 3), 6, np.int32)
    result = graphopt.optimize(model, [Tables(2)], data={"ids": ids}, metric="sqnr_db")
    assert np.allclose(run(result.model, {"ids": ids})[1], run(model, {"ids": ids})[1], atol=0.05)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("e = Gather(table, i) w = Relu(table) y = ReduceSum(w)", "also read by Relu"),
        ("e = Gather(table, i) y = MatMul(h, table)", "multiplied from the other side"),
    ],
)
def test_what_cannot_be_factored_is_said(body: str, reason: str) -> None:
    text = f"""<ir_version: 8, opset_import: ["": 17]>
        g (int64[b,t] i, float[b,{ROWS}] h, float[{ROWS},{WIDTH}] table)
        => (float[b,t,{WIDTH}] e, float[m,n] y) {{ {body} }}"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    value = list(model.graph.inputs)[-1]
    model.graph.inputs.remove(value)
    value.const_value = ir.tensor(np.ones((ROWS, WIDTH), np.float32), name="table")
    model.graph.register_initializer(value)
    result = graphopt.optimize(model, [Tables(2)])
    assert any(reason in note.text for step in result.report.steps for note in step.notes)


def test_a_table_of_doubles_is_said_to_be_one() -> None:
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["": 17]>
        g (int64[b,t] i, double[64,32] table, int64[8] sizes) => (double[b,t,32] e, int64[b,t] s)
        { e = Gather(table, i) s = Gather(sizes, i) }""")
    for value, content in zip(list(model.graph.inputs)[1:], (np.ones((64, 32)), np.arange(8)), strict=True):
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(content, name=value.name)
        model.graph.register_initializer(value)
    result = graphopt.optimize(model, [Factorize(params=0.5, include=("Gather",))])
    left = [note.text for step in result.report.steps for note in step.notes if "its table" in note.text]
    assert left == ["its table is neither float32 nor float16"]


def test_tables_that_are_not_finite_are_refused() -> None:
    model = table_model("none")
    content = np.ones((ROWS, WIDTH), np.float32)
    content[3, 2] = np.nan
    model.graph.initializers["table"].const_value = ir.tensor(content, name="table")
    with pytest.raises(GraphoptError, match="table `table` holds NaN"):
        graphopt.optimize(model, [Tables(2)])


def test_a_convolution_right_behind_a_lookup_is_factored_too() -> None:
    rng = np.random.default_rng(11)
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["": 17]>
        g (int64[b,24] ids, float[64,32] table, float[40,24,3] w) => (float[b,40,30] y)
        { e = Gather(table, ids) y = Conv(e, w) }""")
    contents = {"table": rng.standard_normal((64, 8)) @ rng.standard_normal((8, 32))}
    contents["w"] = np.einsum("or,rck->ock", rng.standard_normal((40, 4)), rng.standard_normal((4, 24, 3)))
    for value in list(model.graph.inputs)[1:]:
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(contents[value.name or ""].astype(np.float32), name=value.name)
        model.graph.register_initializer(value)
    ids = rng.integers(0, 64, (32, 24))
    step = Factorize(params=0.5, include=("Gather", "Conv"))  # what the ranks of both take
    result = graphopt.optimize(model, [step], data={"ids": ids}, metric="sqnr_db")
    operators = [node.op_type for node in result.model.graph]
    assert operators[:4] == ["Gather", "MatMul", "Conv", "Conv"]
    (got,), (wanted,) = run(result.model, {"ids": ids}), run(model, {"ids": ids})
    assert np.allclose(got, wanted, atol=1e-3 * np.abs(wanted).max())


@pytest.mark.parametrize("layers", [1, 2])
def test_layers_right_behind_a_lookup_are_factored_too(layers: int) -> None:
    """What they read is another value once the table is factored."""
    rng = np.random.default_rng(10)
    products = ["q = MatMul(e, w1)", "k = MatMul(e, w2)"][:layers]
    outputs = ", ".join(["float[b,t,40] q", "float[b,t,40] k"][:layers])
    text = f"""<ir_version: 8, opset_import: ["": 17]>
        g (int64[b,t] ids, float[64,32] table, float[32,40] w1, float[32,40] w2) => ({outputs})
        {{ e = Gather(table, ids) {" ".join(products)} }}"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    basis = rng.standard_normal((8, 32))
    for value in list(model.graph.inputs)[1:]:
        count = 64 if value.name == "table" else 40
        content = rng.standard_normal((count, 8)) @ basis
        model.graph.inputs.remove(value)
        laid = content if value.name == "table" else content.T
        value.const_value = ir.tensor(np.ascontiguousarray(laid, np.float32), name=value.name)
        if value.uses():
            model.graph.register_initializer(value)
    ids = rng.integers(0, 64, (32, 6))
    step = Factorize(params=0.6, include=("Gather", "MatMul"))
    result = graphopt.optimize(model, [step], data={"ids": ids}, metric="sqnr_db")
    operators = [node.op_type for node in result.model.graph]
    assert operators[:2] == ["Gather", "MatMul"]
    assert operators.count("MatMul") == 2 + layers
    for got, wanted in zip(run(result.model, {"ids": ids}), run(model, {"ids": ids}), strict=True):
        assert np.allclose(got, wanted, atol=1e-3 * np.abs(wanted).max())
