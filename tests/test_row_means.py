"""Means of rows and second moments of blocks of inputs, against the rows themselves."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.passes.analyses.layer_rows import layer_rows, summed_rows
from graphopt.passes.analyses.row_means import RowMean
from graphopt.passes.solvers import grid
from graphopt.passes.solvers.gptq import gptq

from .test_layer_rows import layer_of, rand, random_convolution

pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("seed", range(12))
def test_sums_of_a_convolution_are_those_of_its_rows(seed: int) -> None:
    drawn = random_convolution(seed, False)
    kernel, sizes, group = drawn.pop("kernel"), drawn.pop("sizes"), drawn["group"]
    x = rand(3, 4, *sizes)
    layer, _ = layer_of("Conv", x, rand(8, 4 // group, *kernel), **drawn)
    rows = layer_rows(layer, x)
    sums, count = summed_rows(layer, x)
    assert count == rows.shape[1]
    np.testing.assert_allclose(sums, rows.sum(axis=1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("op_type", ["Conv", "MatMul"])
def test_the_mean_is_that_of_all_samples_however_they_are_cut(op_type: str) -> None:
    x = rand(7, 6, 5, 5) if op_type == "Conv" else rand(7, 5, 6)
    layer, _ = layer_of(op_type, x, rand(4, 6, 3, 3) if op_type == "Conv" else rand(6, 4))
    statistic = RowMean.of(layer)
    collected = statistic.start()
    for part in np.array_split(x, 3):
        collected.update(part, len(part))
    found = statistic.result(collected.arrays())
    np.testing.assert_allclose(found, layer_rows(layer, x).mean(axis=1), rtol=1e-4, atol=1e-5)


def test_blocks_of_channels_are_the_columns_of_all_rows() -> None:
    x = rand(2, 6, 4, 4)
    layer, _ = layer_of("Conv", x, rand(4, 6, 3, 3))
    whole, blocks = layer_rows(layer, x)[0], layer_rows(layer, x, blocks=3)
    by_channel = whole.reshape(len(whole), 9, 6)
    for block, part in enumerate(blocks):
        np.testing.assert_array_equal(part, by_channel[:, :, 2 * block : 2 * block + 2].reshape(len(whole), -1))


def test_a_moment_in_blocks_is_one_without_anything_between_them() -> None:
    weight, rows = rand(5, 12), rand(200, 12) @ rand(12, 12)
    blocks = np.stack([rows[:, at : at + 4].T @ rows[:, at : at + 4] / 200 for at in (0, 4, 8)])
    whole = np.zeros((12, 12), np.float32)
    for block, at in enumerate((0, 4, 8)):
        whole[at : at + 4, at : at + 4] = blocks[block]
    in_blocks, at_once = gptq(weight, grid.Grid(), blocks), gptq(weight, grid.Grid(), whole)
    assert in_blocks.error == pytest.approx(at_once.error, rel=0.05)
    lost = weight - in_blocks.values()
    assert in_blocks.error == pytest.approx(float(np.einsum("oi,ij,oj->", lost, whole, lost)), rel=1e-3)
