"""Channel groups through reshapes, embeddings and nested graphs, against groups written out by hand.

A unit of each group is also removed: what is left computes what zeros in its place would.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.dims import named
from graphopt.passes.analyses.axis_factors import Factors, shared_factors
from graphopt.passes.analyses.channel_groups import Layout, channel_groups

from .lettered_groups import MAJOR, MINOR, groups_of, model_of, of_constants, reasons

# Views


def test_windows_of_an_image_leave_channels_alone() -> None:
    text = """
    swin (float[1,4,4,3] x) => (float[1,4,4,2] out)
    <int64[6] apart = {1, 2, 2, 2, 2, 3}, int64[3] windows = {-1, 4, 3}, int64[6] back = {1, 2, 2, 2, 2, -1},
     int64[4] image = {1, 4, 4, -1}> {
      y = MatMul(x, w0)
      cut = Reshape(y, apart)
      sorted = Transpose<perm = [0, 1, 3, 2, 4, 5]>(cut)
      rows = Reshape(sorted, windows)
      hidden = MatMul(rows, w1)
      blocks = Reshape(hidden, back)
      unsorted = Transpose<perm = [0, 1, 3, 2, 4, 5]>(blocks)
      whole = Reshape(unsorted, image)
      out = MatMul(whole, w2)
    }
    """
    weights = {"w0": (3, 3), "w1": (3, 5), "w2": (5, 2)}
    before, behind = groups_of(text, weights)
    assert before == dict.fromkeys(("cut:5", "rows:2", "sorted:5", "w0:1", "w1:0", "y:3"), "abc")
    assert behind == dict.fromkeys(("blocks:5", "hidden:2", "unsorted:5", "w1:1", "w2:0", "whole:3"), "abcde")


WINDOW_ATTENTION = """
swin (float[1,4,4,3] x) => (float[4,4,3] out)
<int64[6] apart = {1, 2, 2, 2, 2, 3}, int64[3] windows = {-1, 4, 3}, int64[5] packed = {4, 4, 3, 2, 2},
 int64 zero = {0}, int64 one = {1}, int64 two = {2}, int64[16] places = {4,5,7,8,3,4,6,7,1,2,4,5,0,1,3,4},
 int64[3] square = {4, 4, -1}, int64[1] front = {0}, int64[5] masked = {1, 4, 2, 4, 4}, int64[4] plain = {-1, 2, 4, 4},
 int64[3] joined = {4, 4, 4}> {
  cut = Reshape(x, apart)
  sorted = Transpose<perm = [0, 1, 3, 2, 4, 5]>(cut)
  rows = Reshape(sorted, windows)
  qkv = MatMul(rows, w)
  parts = Reshape(qkv, packed)
  turned = Transpose<perm = [2, 0, 3, 1, 4]>(parts)
  q = Gather<axis = 0>(turned, zero)
  k = Gather<axis = 0>(turned, one)
  v = Gather<axis = 0>(turned, two)
  kt = Transpose<perm = [0, 1, 3, 2]>(k)
  scores = MatMul(q, kt)
  chosen = Gather<axis = 0>(table, places)
  pairs = Reshape(chosen, square)
  by_head = Transpose<perm = [2, 0, 1]>(pairs)
  bias = Unsqueeze(by_head, front)
  biased = Add(scores, bias)
  of_windows = Reshape(biased, masked)
  shifted = Add(of_windows, mask)
  again = Reshape(shifted, plain)
  weights = Softmax<axis = -1>(again)
  heads = MatMul(weights, v)
  ht = Transpose<perm = [0, 2, 1, 3]>(heads)
  row = Reshape(ht, joined)
  out = MatMul(row, wo)
}
"""


def test_heads_with_a_bias_each_in_windows_with_a_mask() -> None:
    weights = {"w": (3, 12), "table": (9, 2), "mask": (1, 4, 1, 4, 4), "wo": (4, 3)}
    (heads,) = of_constants(groups_of(WINDOW_ATTENTION, weights, MAJOR), weights)
    assert heads == {"table:1": "ab", "w:1": "aabb" * 3, "wo:0": "aabb"}
    (inside,) = of_constants(groups_of(WINDOW_ATTENTION, weights, MINOR), weights)
    assert inside == {"w:1": "ab" * 6, "wo:0": "abab"}


def test_heads_that_are_merged_with_batches_of_any_size_stay() -> None:
    text = """
    attention (float[5,B,4] x) => (float[N,5,5] out) <int64[3] apart = {5, -1, 2}> {
      q = MatMul(x, wq)
      qh = Reshape(q, apart)
      qt = Transpose<perm = [1, 0, 2]>(qh)
      k = MatMul(x, wk)
      kh = Reshape(k, apart)
      kt = Transpose<perm = [1, 2, 0]>(kh)
      out = MatMul(qt, kt)
    }
    """
    weights = {"wq": (4, 6), "wk": (4, 6)}
    for layout in (MAJOR, MINOR):
        (inside,) = of_constants(groups_of(text, weights, layout), weights)
        assert inside == {"wk:1": "ababab", "wq:1": "ababab"}


def test_patches_of_an_image_become_rows() -> None:
    text = """
    vit (float[N,3,4,4] x) => (float[N,5,2] out)
    <int64[3] flat = {0, 3, -1}, int64[3] one = {1, 1, 1}> {
      patches = Conv<strides = [2, 2], kernel_shape = [2, 2]>(x, w0)
      columns = Reshape(patches, flat)
      rows = Transpose<perm = [0, 2, 1]>(columns)
      first = Expand(token, one)
      all = Concat<axis = 1>(first, rows)
      placed = Add(all, places)
      out = MatMul(placed, w1)
    }
    """
    weights = {"w0": (3, 3, 2, 2), "token": (1, 1, 3), "places": (1, 5, 3), "w1": (3, 2)}
    (group,) = groups_of(text.replace("float[N,", "float[1,"), weights)
    assert of_constants([group], weights) == [{"places:2": "abc", "token:2": "abc", "w0:0": "abc", "w1:0": "abc"}]


@pytest.mark.parametrize("layout", [MAJOR, MINOR], ids=["major", "minor"])
def test_flattened_channels_go_with_all_their_places(layout: Layout) -> None:
    text = """
    flat (float[N,3,2,2] x) => (float[N,2] out) {
      y = Conv(x, w0)
      small = MaxPool<kernel_shape = [1, 1]>(y)
      row = Flatten(small)
      out = MatMul(row, w1)
    }
    """
    weights = {"w0": (3, 3, 1, 1), "w1": (12, 2)}
    (group,) = groups_of(text, weights, layout)
    assert group == {
        "row:1": "aaaabbbbcccc",
        "small:1": "abc",
        "w0:0": "abc",
        "w1:0": "aaaabbbbcccc",
        "y:1": "abc",
    }


def test_pixels_shuffled_out_of_channels() -> None:
    # Channels are divided into 2 × 2 pixels each, which become places.
    text = """
    shuffle (float[1,3,2,2] x) => (float[1,2,4,4] out)
    <int64[6] apart = {1, 3, 2, 2, 2, 2}, int64[4] image = {1, 3, 4, 4}> {
      y = Conv(x, w0)
      parts = Reshape(y, apart)
      sorted = Transpose<perm = [0, 1, 4, 2, 5, 3]>(parts)
      large = Reshape(sorted, image)
      out = Conv(large, w1)
    }
    """
    weights = {"w0": (12, 3, 1, 1), "w1": (2, 3, 1, 1)}
    for layout in (MAJOR, MINOR):
        (group,) = of_constants(groups_of(text, weights, layout), weights)
        assert group == {"w0:0": "aaaabbbbcccc", "w1:1": "abc"}


def test_a_normalization_by_groups_taken_apart() -> None:
    # What exporters make of GroupNorm: channels and places of a group in a row, each row normalised.
    text = """
    groups (float[1,3,2,2] x) => (float[1,2,2,2] out)
    <int64[3] rows = {0, 2, -1}, float[2] ones = {1, 1}, float[2] zeros = {0, 0}, int64[4] image = {1, 6, 2, 2}> {
      y = Conv(x, w0)
      flat = Reshape(y, rows)
      even = InstanceNormalization(flat, ones, zeros)
      back = Reshape(even, image)
      scaled = Mul(back, scale)
      out = Conv(scaled, w1)
    }
    """
    weights = {"w0": (6, 3, 1, 1), "scale": (6, 1, 1), "w1": (2, 6, 1, 1)}
    (inside,) = of_constants(groups_of(text, weights, MINOR), weights)
    assert inside == {"scale:0": "abcabc", "w0:0": "abcabc", "w1:1": "abcabc"}


def test_sizes_read_off_another_tensor_keep_pace_with_it() -> None:
    text = """
    sizes (float[N,4] x) => (float[N,2] out) <int64[1] first = {-1}> {
      y = MatMul(x, w0)
      z = MatMul(x, w1)
      width = Shape<start = 1, end = 2>(z)
      shape = Concat<axis = 0>(first, width)
      same = Reshape(y, shape)
      left = MatMul(same, w2)
      right = MatMul(z, w3)
      out = Add(left, right)
    }
    """
    weights = {"w0": (4, 3), "w1": (4, 3), "w2": (3, 2), "w3": (3, 2)}
    (group,) = of_constants(groups_of(text, weights), weights)
    assert group == dict.fromkeys(("w0:1", "w1:1", "w2:0", "w3:0"), "abc")


def test_rows_that_cross_each_other_stay() -> None:
    text = """
    uneven (float[4,4] x) => (float[12,2] out) <int64[2] shape = {12, 2}, int64[2] crossing = {8, 3}> {
      y = MatMul(x, w0)
      rows = Reshape(y, crossing)
      turned = Reshape(rows, shape)
      out = MatMul(turned, w1)
    }
    """
    found = channel_groups(model_of(text, {"w0": (4, 6), "w1": (2, 2)}))
    assert not found.groups
    assert any("unevenly" in reason for reason in reasons(found))


# Embeddings


def test_an_embedding_that_is_also_the_head() -> None:
    text = """
    language (int64[1,S] ids) => (float[1,S,5] out) {
      x = Gather(table, ids)
      inner = MatMul(x, w0)
      curve = Relu(inner)
      back = MatMul(curve, w1)
      sum = Add(x, back)
      head = Transpose<perm = [1, 0]>(table)
      out = MatMul(sum, head)
    }
    """
    weights = {"table": (5, 3), "w0": (3, 4), "w1": (4, 3)}
    found = groups_of(text, weights)
    stream = {"back:2": "abc", "head:0": "abc", "sum:2": "abc", "table:1": "abc", "w0:0": "abc", "w1:1": "abc"}
    assert {**stream, "x:2": "abc"} in found
    assert dict.fromkeys(("curve:2", "inner:2", "w0:1", "w1:0"), "abcd") in found
    assert len(found) == 2


# Nested graphs


BRANCHES = """
choice (bool flag, float[N,4] x) => (float[N,2] out) {
  y = MatMul(x, w0)
  z = If(flag) <
    then_branch = then_graph () => (float[N,3] positive) { positive = Relu(y) },
    else_branch = else_graph () => (float[N,3] negative) { negative = Neg(y) }
  >
  out = MatMul(z, w1)
}
"""


def test_channels_through_branches() -> None:
    (group,) = groups_of(BRANCHES, {"w0": (4, 3), "w1": (3, 2)})
    assert group == dict.fromkeys(("negative:1", "positive:1", "w0:1", "w1:0", "y:1", "z:1"), "abc")


def test_layers_inside_of_a_branch() -> None:
    text = """
    choice (bool flag, float[N,2] x) => (float[N,2] out) {
      out = If(flag) <
        then_branch = then_graph () => (float[N,2] big) {
          w = Constant<value = float[2,3] {1, 2, 3, 4, 5, 6}>()
          v = Constant<value = float[3,2] {1, 2, 3, 4, 5, 6}>()
          y = MatMul(x, w)
          big = MatMul(y, v)
        },
        else_branch = else_graph () => (float[N,2] same) { same = Identity(x) }
      >
    }
    """
    (group,) = groups_of(text, {})
    assert group == {"v:0": "abc", "w:1": "abc", "y:1": "abc"}


def test_a_state_that_a_loop_carries() -> None:
    text = """
    repeated (int64 count, bool go, float[1,2] x) => (float[1,2] out) {
      start = MatMul(x, w0)
      end, steps = Loop(count, go, start) <
        body = step (int64 number, bool going, float[1,3] state) => (bool still, float[1,3] next, float[1,3] seen) {
          still = Identity(going)
          next = Tanh(state)
          seen = Identity(next)
        }
      >
      out = MatMul(end, w1)
    }
    """
    (group,) = groups_of(text, {"w0": (2, 3), "w1": (3, 2)})
    assert group == dict.fromkeys(("end:1", "next:1", "seen:1", "start:1", "state:1", "w0:1", "w1:0"), "abc")


def test_a_state_and_slices_of_a_scan() -> None:
    text = """
    scanned (float[4,5,2] x, float[4,3] first) => (float[4,2] out) {
      steps = MatMul(x, w0)
      start = MatMul(first, w1)
      last, seen = Scan<num_scan_inputs = 1, scan_input_axes = [1], scan_output_axes = [1],
        body = step (float[4,3] state, float[4,3] now) => (float[4,3] next, float[4,3] kept) {
          next = Add(state, now)
          kept = Relu(next)
        }
      >(start, steps)
      left = MatMul(last, w2)
      rows = ReduceSum<keepdims = 0>(seen, axis)
      right = MatMul(rows, w3)
      out = Add(left, right)
    }
    """
    weights = {"w0": (2, 3), "w1": (3, 3), "w2": (3, 2), "w3": (3, 2)}
    text = text.replace("(float[4,2] out)", "(float[4,2] out) <int64[1] axis = {1}>")
    (group,) = groups_of(text, weights)
    assert of_constants([group], weights) == [dict.fromkeys(("w0:1", "w1:1", "w2:0", "w3:0"), "abc")]
    assert group["seen:2"] == "abc"
    assert group["now:1"] == "abc"


def test_branches_of_other_ranks_are_left_alone() -> None:
    text = """
    choice (bool flag, float[1,4] x) => (out) {
      y = MatMul(x, w0)
      out = If(flag) <
        then_branch = then_graph () => (float[1,3] same) { same = Identity(y) },
        else_branch = else_graph () => (float[3] flat) { flat = Squeeze(y) }
      >
    }
    """
    found = channel_groups(model_of(text.replace("=> (out)", "=> (float[K,L] out)"), {"w0": (4, 3)}))
    assert not found.groups


def test_functions_are_left_alone() -> None:
    text = """
    calls (float[N,2] x) => (float[N,2] out) {
      y = MatMul(x, w0)
      z = own.curve(y)
      out = MatMul(z, w1)
    }
    <domain: "own", opset_import: ["" : 21]> curve (a) => (b) { b = Relu(a) }
    """
    found = channel_groups(model_of(text, {"w0": (2, 3), "w1": (3, 2)}))
    assert not found.groups
    assert "it calls the function curve" in reasons(found)


# Factors


@pytest.mark.parametrize(
    ("before", "behind", "sizes", "inputs", "outputs"),
    [
        ((2, 6), (2, 2, 3), (2, 2, 3), ((0,), (1, 2)), ((0,), (1,), (2,))),
        ((4, 6), (8, 3), (4, 2, 3), ((0,), (1, 2)), ((0, 1), (2,))),
        ((1, 6, 1), (6,), (6,), ((), (0,), ()), ((0,),)),
        ((4, 6), (6, 4), (), (None, None), (None, None)),
        ((5, 4, 6), (5, 6, 4), (5,), ((0,), None, None), ((0,), None, None)),
    ],
)
def test_factors_that_shapes_share(
    before: tuple[int, ...],
    behind: tuple[int, ...],
    sizes: tuple[int, ...],
    inputs: tuple[object, ...],
    outputs: tuple[object, ...],
) -> None:
    found = shared_factors(before, behind)
    assert (tuple(found.sizes), tuple(found.of_inputs), tuple(found.of_outputs)) == (sizes, inputs, outputs)


def coordinates(
    shape: Sequence[int], factors: Factors, parts: Sequence[tuple[int, ...] | None]
) -> dict[int, np.ndarray]:
    """Return, for each factor of a shape, where each element lies along it."""
    places = np.unravel_index(np.arange(math.prod(shape)), shape)
    found = {}
    for along, mine in zip(places, parts, strict=True):
        sizes = [factors.sizes[factor] for factor in mine or ()]
        found.update(zip(mine or (), np.unravel_index(along, sizes) if sizes else (), strict=True))
    return found


@given(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=5), st.data())
def test_a_factor_is_the_same_stretch_of_elements_in_both_shapes(sizes: list[int], data: st.DataObject) -> None:
    def grouped() -> list[int]:
        cuts = sorted(data.draw(st.sets(st.integers(1, len(sizes) - 1)))) if len(sizes) > 1 else []
        bounds = [0, *cuts, len(sizes)]
        return [math.prod(sizes[a:b]) for a, b in itertools.pairwise(bounds)]

    before, behind = grouped(), grouped()
    found = shared_factors(before, behind)
    here = coordinates(before, found, found.of_inputs)
    there = coordinates(behind, found, found.of_outputs)
    assert here.keys() == there.keys()
    for factor, along in here.items():
        np.testing.assert_array_equal(along, there[factor])


def test_sizes_that_differ_from_run_to_run_are_factors() -> None:
    batch, height, odd = named("batch"), named("height"), named("odd")
    found = shared_factors((batch, 6, height, height), (batch, 2, 3 * height * height))
    assert (found.sizes, found.of_inputs) == ([batch, 2, 3, height, height], ((0,), (1, 2), (3,), (4,)))
    assert found.of_outputs == ((0,), (1,), (2, 3, 4))
    # What hides its factors is gone round: from behind.
    found = shared_factors((batch, 12, 64), (odd, 768))
    assert found.of_inputs == (None, (1,), (0,))
    assert found.of_outputs == (None, (1, 0))
    # An axis that is half understood is not understood, nor is what it shares a factor with.
    assert shared_factors((2, 9), (6, odd)).of_inputs == (None, None)
