"""Clusters: k-means against brute force and scikit-learn, and what codes, tables and scales make up for."""

from __future__ import annotations

import itertools
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from graphopt.authoring import Context
from graphopt.backends.onnxruntime import OnnxRuntime
from graphopt.backends.targets import TARGETS
from graphopt.data import open_data
from graphopt.passes.analyses.linear_layers import linear_layers
from graphopt.passes.lossy.cluster_bits import bits_by_error
from graphopt.passes.solvers import cluster_fit
from graphopt.passes.solvers.cluster_fit import fitted
from graphopt.passes.solvers.cluster_refit import refitted_scales, refitted_tables
from graphopt.passes.solvers.cluster_sweep import Problem, descended, swept
from graphopt.passes.solvers.clustered_weight import ClusteredWeight, Clustering, looked_up, stored_bytes
from graphopt.passes.solvers.clusters import clustered
from graphopt.passes.solvers.kmeans import EXACT, kmeans
from graphopt.passes.solvers.kmeans_vectors import kmeans_vectors, nearest_vectors
from graphopt.passes.solvers.objective import importance, output_error
from graphopt.rewriter import Rewriter

from .test_cast import parsed

pytest.importorskip("onnxruntime")

Array = np.ndarray[Any, Any]
ATOL = 1e-9


def drawn(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def moment(inputs: int, groups: int = 1, seed: int = 1) -> Array:
    """H of inputs that hang together, [inputs, inputs] or [groups, inputs, inputs]."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((groups, 4 * inputs, inputs)) @ (
        rng.standard_normal((groups, inputs, inputs)) + 2 * np.eye(inputs)
    )
    found = (rows.transpose(0, 2, 1) @ rows / rows.shape[1]).astype(np.float32)
    return found if groups > 1 else found[0]


def cost(points: Array, weights: Array, centers: Array) -> float:
    return float((weights * np.square(points[:, None] - centers).min(axis=1)).sum())


def least_cost(points: Array, weights: Array, entries: int, *, zero: bool) -> float:
    """Try every way to cut sorted points into runs, each of them standing for 0 in turn where one is to."""
    order = np.argsort(points)
    points, weights = points[order].astype(np.float64), weights[order].astype(np.float64)
    best = np.inf
    for cuts in itertools.combinations_with_replacement(range(len(points) + 1), entries - 1):
        free, around = [], []
        for start, end in itertools.pairwise([0, *cuts, len(points)]):
            own, counts = points[start:end], weights[start:end]
            middle = np.average(own, weights=counts) if len(own) else 0.0
            free.append(float((counts * np.square(own - middle)).sum()))
            around.append(float((counts * np.square(own)).sum()))
        total = sum(free)
        best = min(
            [best, *(total - one + held for one, held in zip(free, around, strict=True))] if zero else [best, total]
        )
    return best


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_no_way_to_cut_a_line_costs_less(seed: int, zero: bool) -> None:
    rng = np.random.default_rng(seed)
    count, entries = int(rng.integers(1, 10)), int(rng.integers(1, 5))
    points, weights = rng.normal(size=count) + rng.choice([0, 3, -20]), rng.random(count) + 0.1
    found = kmeans(points, weights, entries, zero=zero)
    assert len(found) <= entries
    assert not zero or 0 in found
    assert np.array_equal(found, np.sort(found))
    assert cost(points, weights, found) <= least_cost(points, weights, entries, zero=zero) * (1 + ATOL) + ATOL


@pytest.mark.parametrize(("count", "entries"), [(500, 8), (2000, 16), (3 * EXACT, 4), (3 * EXACT, 16)])
def test_scikit_learn_finds_nothing_better(count: int, entries: int) -> None:
    cluster = pytest.importorskip("sklearn.cluster", reason="scikit-learn is the reference")
    rng = np.random.default_rng(count + entries)
    points, weights = rng.standard_t(4, count), rng.random(count)
    theirs = cluster.KMeans(entries, n_init=10, random_state=0, tol=0, max_iter=1000)
    theirs.fit(points[:, None], sample_weight=weights)
    # Beyond `EXACT` points the minimum is one among cuts between bins, settled by Lloyd's method.
    assert cost(points, weights, kmeans(points, weights, entries)) <= theirs.inertia_ * (1 + 1e-5)


def test_points_far_from_zero_are_told_apart() -> None:
    points = np.array([1e6, 1e6 + 1, 1e6 + 1.1])
    assert np.allclose(kmeans(points, None, 2), [1e6, 1e6 + 1.05], rtol=1e-12)
    assert np.allclose(kmeans(points * 1e-36, None, 2), [1e-30, 1.00000105e-30], rtol=1e-12)


def test_of_a_million_points_bins_are_as_good() -> None:
    points = np.random.default_rng(0).standard_normal((1 << 20) + 5).astype(np.float32)
    found = kmeans(points, None, 4)
    # The best four values for a normal distribution (Max, Quantizing for Minimum Distortion, 1960).
    assert np.allclose(found, [-1.510, -0.4528, 0.4528, 1.510], atol=5e-3)


def test_points_of_no_weight_do_not_count_unless_all_are() -> None:
    points = np.array([1.0, 2.0, 9.0])
    assert np.array_equal(kmeans(points, np.array([1.0, 1.0, 0.0]), 2), [1.0, 2.0])
    assert np.array_equal(kmeans(points, np.zeros(3), 3), points)


@pytest.mark.parametrize("vector", [2, 4])
def test_scikit_learn_finds_hardly_better_vectors(vector: int) -> None:
    cluster = pytest.importorskip("sklearn.cluster", reason="scikit-learn is the reference")
    points, weights = drawn(2000, vector), np.random.default_rng(1).random((2000, 1)).astype(np.float32)
    costs = np.repeat(weights, vector, axis=1)
    ours = nearest_vectors(points, costs, kmeans_vectors(points, costs, 16))[1].sum()
    theirs = cluster.KMeans(16, n_init=3, random_state=0, tol=0, max_iter=300).fit(points, sample_weight=weights[:, 0])
    assert ours <= theirs.inertia_ * 1.02


def test_the_nearest_vector_is_by_weighed_distance() -> None:
    points, weights, centers = drawn(50, 3), np.abs(drawn(50, 3, seed=1)), drawn(7, 3, seed=2)
    distances = (weights[:, None] * np.square(points[:, None] - centers)).sum(axis=2)
    codes, least = nearest_vectors(points, weights, centers)
    assert np.allclose(distances[np.arange(50), codes], distances.min(axis=1), rtol=1e-5)
    assert np.allclose(least, distances.min(axis=1), rtol=1e-5)


def test_every_vector_is_used_and_the_first_is_held_at_zero() -> None:
    # Two heaps, many of them equal: seeding finds both, and what is left goes where the error is.
    points = np.concatenate([np.zeros((100, 2)), np.ones((100, 2)), drawn(40, 2)]).astype(np.float32)
    found = kmeans_vectors(points, np.ones_like(points), 8, zero=True)
    assert found.shape == (8, 2)
    assert not found[0].any()
    assert len(set(nearest_vectors(points, np.ones_like(points), found)[0])) == 8


KINDS = {
    "plain": Clustering(block=None),
    "scales": Clustering(),
    "blocks": Clustering(bits=3, block=4),
    "channels": Clustering(bits=2, rows=1, block=None),
    "some channels": Clustering(bits=3, rows=5),
    "pairs": Clustering(bits=5, vector=2),
    "fours": Clustering(bits=6, vector=4, rows=8, block=8),
    "outliers": Clustering(bits=2, outliers=0.03),
    "pairs and outliers": Clustering(bits=4, vector=2, outliers=0.03),
    "one bit": Clustering(bits=1),
    "eight bits": Clustering(bits=8),
}
SHAPES = {"dense": (14, 30, 1), "depthwise": (16, 9, 16), "grouped": (12, 18, 3), "odd": (7, 11, 1)}


def by_definition(found: ClusteredWeight) -> Array:
    """Return Ŵ number by number."""
    values = np.empty((len(found.codes), found.inputs), np.float32)
    for output, column in np.ndindex(*values.shape):
        entry = found.tables[output // found.rows, found.codes[output, column // found.vector], column % found.vector]
        scale = np.float32(1) if found.scales is None else found.scales[output, column // found.block]
        values[output, column] = entry * scale
    values.reshape(-1)[found.positions] = found.exact
    return values


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_makes_up_for_errors_is_never_worse_and_is_what_it_says(kind: Clustering, shape: tuple[int, ...]) -> None:
    outputs, inputs, groups = shape
    weight, second = drawn(outputs, inputs), moment(inputs, groups)
    plain = clustered(weight, replace(kind, compensated=False), second)
    found = clustered(weight, kind, second)
    assert found.codes.shape == (outputs, -(-inputs // kind.vector))
    assert found.codes.dtype == np.uint8
    assert found.tables.shape[1:] == (kind.entries, kind.vector)
    assert found.codes.max() < kind.entries
    assert np.array_equal(found.values(), by_definition(found))
    assert found.error == pytest.approx(output_error(weight - found.values(), second))
    assert found.error <= plain.error * (1 + 1e-5) + 1e-9 * output_error(weight, second)


def test_what_makes_up_for_errors_halves_them() -> None:
    weight, second = drawn(32, 72), moment(72)
    assert (
        clustered(weight, Clustering(bits=3), second).error
        < 0.5 * clustered(weight, Clustering(bits=3, compensated=False), second).error
    )


def test_without_scales_it_is_weighed_k_means() -> None:
    weight, second = drawn(20, 12), moment(12)
    found = clustered(weight, Clustering(bits=3, block=None, compensated=False), second)
    costs = importance(second, 20)
    assert costs is not None
    wanted = kmeans(weight, np.broadcast_to(costs, weight.shape), 8)
    assert np.allclose(found.tables[0, :, 0], wanted, rtol=1e-6)
    nearest = np.abs(weight[:, :, None] - found.tables[0, :, 0]).min(axis=2)
    assert np.allclose(np.abs(weight - found.values()), nearest, atol=1e-6)


def test_scales_lose_less_and_are_exact_as_halves() -> None:
    weight = drawn(40, 30) * np.exp(drawn(40, 1, seed=3))
    with_scales = clustered(weight, Clustering(bits=3))
    assert with_scales.scales is not None
    assert with_scales.scales.min() > 0
    assert np.array_equal(with_scales.scales.astype(np.float16).astype(np.float32), with_scales.scales)
    assert with_scales.error < 0.7 * clustered(weight, Clustering(bits=3, block=None)).error


def test_a_table_found_for_some_of_many_outputs_is_about_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = drawn(64, 32) * np.exp(0.3 * drawn(64, 1, seed=3))
    weight[np.random.default_rng(0).random(weight.shape) < 0.3] = 0
    whole = clustered(weight, Clustering(bits=4))
    monkeypatch.setattr(cluster_fit, "_MANY", 1024)
    monkeypatch.setattr(cluster_fit, "_SOME", 1024)
    found = clustered(weight, Clustering(bits=4))
    assert not found.values()[weight == 0].any()
    assert found.error < 1.2 * whole.error


@pytest.mark.parametrize("vector", [1, 2])
def test_many_zeros_stay_zero_and_few_need_not(vector: int) -> None:
    weight, second = drawn(24, 16), moment(16)
    gone = np.repeat(np.random.default_rng(5).random((24, 16 // vector)) < 0.5, vector, axis=1)
    pruned = np.where(gone, np.float32(0), weight)
    for compensated in (False, True):
        found = clustered(pruned, Clustering(bits=4, vector=vector, compensated=compensated), second)
        assert not found.values()[gone].any()
        assert (found.tables == 0).all(axis=2).any()
    weight[0, 0] = 0
    assert clustered(weight, Clustering(bits=2)).values()[0, 0] != 0
    assert clustered(weight, Clustering(bits=2, zeros=True)).values()[0, 0] == 0


def test_outliers_are_kept_exactly_without_a_second_moment_and_free_the_table() -> None:
    weight = drawn(16, 32)
    far = np.array([3, 70, 300, 511])
    weight.reshape(-1)[far] = [80, -90, 100, 75]
    found = clustered(weight, Clustering(bits=3, block=None, outliers=4 / 512))
    assert np.array_equal(found.positions, far)
    assert np.array_equal(found.exact, weight.reshape(-1)[far])
    assert np.abs(found.tables).max() < 5
    assert found.error < 0.5 * clustered(weight, Clustering(bits=3, block=None)).error


@pytest.mark.parametrize("vector", [1, 2])
def test_tables_fitted_to_codes_are_the_minimum(vector: int) -> None:
    weight, second = drawn(20, 12), moment(12)
    problem = Problem(weight[None], second[None], None)
    start = fitted(weight, np.ones_like(weight), Clustering(bits=2, vector=vector))
    fit, values = start, start.values()
    for _ in range(6):
        fit, values = refitted_tables(problem, fit, values)
    # Every entry's number is a column of an ordinary least squares problem.
    scales = fit.spread_scales(12)
    columns = []
    for entry in np.ndindex(4, vector):
        tables = np.zeros_like(fit.tables)
        tables[0][entry] = 1
        columns.append((looked_up(tables, fit.codes, fit.rows) * scales) @ np.linalg.cholesky(second))
    system = np.stack([one.reshape(-1) for one in columns], axis=1).astype(np.float64)
    wanted = (weight @ np.linalg.cholesky(second)).reshape(-1).astype(np.float64)
    best = np.linalg.lstsq(system, wanted, rcond=None)[1].item()
    assert output_error(weight - values, second) == pytest.approx(best, rel=1e-4)
    assert output_error(weight - start.values(), second) > best


@pytest.mark.parametrize("kind", ["scales", "blocks", "one bit", "some channels"])
def test_each_move_lowers_the_error(kind: str) -> None:
    clustering = KINDS[kind]
    weight, second = drawn(20, 16), moment(16)
    problem = Problem(weight[None], second[None], None)
    fit = fitted(weight, np.ones_like(weight), clustering)
    values = fit.values()
    errors = [output_error(weight - values, second)]
    for move in (refitted_tables, refitted_scales):
        fit, values = move(problem, fit, values)
        assert np.allclose(values, fit.values(), atol=1e-6)
        errors.append(output_error(weight - values, second))
    codes, values = descended(problem, fit, values)
    assert np.allclose(values, replace(fit, codes=codes).values(), atol=1e-6)
    errors.append(output_error(weight - values, second))
    noise = 1e-6 * output_error(weight, second)
    assert all(after <= before * (1 + 1e-3) + noise for before, after in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


def test_no_single_code_can_be_moved_for_the_better() -> None:
    weight, second = drawn(6, 8), moment(8)
    problem = Problem(weight[None], second[None], None)
    fit = fitted(weight, np.ones_like(weight), Clustering(bits=2))
    codes, values = swept(problem, fit)
    for _ in range(20):
        codes, values = descended(problem, replace(fit, codes=codes), values)
    least = output_error(weight - values, second)
    for output, column, code in itertools.product(range(6), range(8), range(4)):
        moved = codes.copy()
        moved[output, column] = code
        assert output_error(weight - replace(fit, codes=moved).values(), second) >= least * (1 - 1e-5)


@pytest.mark.parametrize("size", [1e-15, 1e-5, 1.0, 1e5, 1e15])
@pytest.mark.parametrize("second", [None, moment(12)], ids=["plain", "moment"])
def test_huge_and_tiny_weights_lose_the_same_share(size: float, second: Array | None) -> None:
    weight = drawn(10, 12)
    share = clustered(weight, Clustering(bits=3), second).error / output_error(weight, second)
    scaled = weight * np.float32(size)
    found = clustered(scaled, Clustering(bits=3), second)
    assert found.error / output_error(scaled, second) == pytest.approx(share, rel=0.05)


@pytest.mark.parametrize("second", [None, moment(12), np.zeros((12, 12), np.float32)], ids=["plain", "moment", "dead"])
@pytest.mark.parametrize(
    "weight",
    [
        np.zeros((5, 12), np.float32),
        np.full((5, 12), 0.3, np.float32),
        np.resize(np.array([1.0, -2.0, 0.5], np.float32), (5, 12)),
        np.resize(np.array([0.0, 3.0], np.float32), (1, 12)),
    ],
    ids=["zeros", "equal", "three values", "one output"],
)
@pytest.mark.parametrize("block", [None, 0])
def test_as_few_values_as_entries_lose_nothing(weight: Array, second: Array | None, block: int | None) -> None:
    found = clustered(weight, Clustering(bits=2, block=block), second)
    assert np.allclose(found.values(), weight, rtol=2e-3 if block == 0 else 1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1)])
def test_nothing_and_a_single_weight(shape: tuple[int, int]) -> None:
    weight = np.full(shape, 0.7, np.float32)
    found = clustered(weight, Clustering(bits=1))
    assert found.values().shape == shape
    assert np.allclose(found.values(), weight, rtol=1e-3)


@pytest.mark.parametrize("kind", ["scales", "fours", "outliers"])
def test_the_same_weight_has_the_same_codes(kind: str) -> None:
    weight, second = drawn(20, 24), moment(24)
    one, other = (clustered(weight, KINDS[kind], second) for _ in range(2))
    assert np.array_equal(one.codes, other.codes)
    assert np.array_equal(one.tables, other.tables)


def test_what_is_stored_is_counted() -> None:
    # 4-bit codes, a table of 16 floats, and a half for each output.
    assert stored_bytes(Clustering(bits=4), 10, 30) == 10 * 30 / 2 + 64 + 20
    assert stored_bytes(Clustering(bits=8, vector=2, rows=5, block=None), 10, 31) == 10 * 16 + 2 * 256 * 2 * 4


def test_small_layers_get_more_bits_and_large_ones_no_fewer() -> None:
    model = parsed(
        """f (float[N,16,6,6] x, float[16,1,3,3] v, float[256,16,3,3] w, float[10,256,1,1] u) => (float[N,10,4,4] y)
        { a = Conv<group=16, pads=[1,1,1,1]>(x, v)  b = Conv(a, w)  c = Relu(b)  y = Conv(c, u) }""",
        v=drawn(16, 1, 3, 3),
        w=drawn(256, 16, 3, 3),
        u=drawn(10, 256, 1, 1),
    )
    data = open_data({"x": drawn(8, 16, 6, 6)}, model)
    ctx = Context(model, Rewriter(model), TARGETS["portable"], OnnxRuntime(), threads=1, data=data)
    layers = linear_layers(model)
    for asked in (4, 8):
        clustering = Clustering(bits=asked)
        bits = bits_by_error(layers, clustering, ctx)
        sizes = [one.matrix().shape for one in layers]
        even = sum(stored_bytes(clustering, *size) for size in sizes)
        taken = sum(stored_bytes(replace(clustering, bits=one), *size) for one, size in zip(bits, sizes, strict=True))
        assert min(bits) == asked
        assert bits[1] == asked
        assert taken <= 1.03 * even
        assert asked == 8 or bits[0] > asked


def test_a_large_weight_is_clustered_in_little_memory() -> None:
    """A table of words: what is worked on besides the weight is its copy in units, its codes, and samples."""
    weight = np.random.default_rng(0).standard_normal((16384, 512)).astype(np.float32)
    tracemalloc.start()
    found = clustered(weight, Clustering(bits=4, block=64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * weight.nbytes
    assert found.error < 0.02 * np.square(weight).sum()
